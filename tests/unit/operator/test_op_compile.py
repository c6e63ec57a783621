"""World and ledger to desired state: meanings as rows, incremental equals from scratch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given as hypothesis_given
from hypothesis import settings
from hypothesis import strategies as st
from tidegate_api.state import DEVELOPER_PRECEDENCE, AnyPeer, CIDRPeer, SetPeer, encode
from tidegate_operator import identities, world
from tidegate_operator.compile import Compiler, Desired, compile
from tidegate_operator.identities import EMPTY_LEDGER, Ledger
from tidegate_operator.manifests import Document
from tidegate_operator.objects import ObjectName
from tidegate_operator.publish import render
from tidegate_operator.relevance import Relevance, Settings
from tidegate_operator.world import Options
from unit.operator.given import compiled, documents, pod, policy, service

PODS = pod("web", "{app: web}") + pod("db", "{app: db}") + pod("far", "{app: web}", "other")


def _terms(desired: Desired, name: str | None, names: dict[str, str]) -> list[str] | None:
    """The terms of a rule set in short: peer protocol port <- rule."""
    if not isinstance(name, str):
        return None
    spec = desired.rule_sets[name].spec
    short = []
    for term in spec.terms:
        match term.peer:
            case AnyPeer():
                peer = "any"
            case SetPeer(name=of):
                members = desired.peers[of].identities
                peer = "{" + " ".join(sorted(names[str(number)] for number in members)) + "}"
            case CIDRPeer(cidr=cidr, excepts=excepts):
                peer = cidr + "".join(f"-{text}" for text in excepts)
        assert (term.action, term.precedence) == ("Allow", DEVELOPER_PRECEDENCE)
        rule = spec.rules[term.rule]
        owner = spec.policies[rule.policy].name
        ports = str(term.port or term.port_name or "*") + (
            f"-{term.end_port}" if term.end_port else ""
        )
        short.append(f"{peer} {term.protocol or '*'} {ports} <- {owner}[{rule.index}]")
    return short


def _rules(text: str, of: str = "web") -> tuple[list[str] | None, list[str] | None]:
    now, ledger, desired = compiled(PODS + text)
    names = {str(number): f"{key[0]}/{dict(key[1]).get('app')}" for key, number in
             ledger.live.items()}  # fmt: skip
    endpoints = {e.name: e for node in desired.nodes.values() for e in node.endpoints}
    endpoint = endpoints[of]
    assert now.pods[ObjectName(endpoint.namespace, of)].uid == endpoint.uid
    return (_terms(desired, endpoint.ingress, names), _terms(desired, endpoint.egress, names))


WEB = "podSelector: {matchLabels: {app: web}}"
MEANINGS = [
    ("nothing selects it: default allow", "{podSelector: {matchLabels: {app: x}}}", None, None),
    ("{} selects every pod; ingress is isolated", "{}", [], None),
    ("egress by policyTypes", "{policyTypes: [Egress]}", None, []),
    ("{} rule allows everything", "{ingress: [{}]}", ["any * * <- p[0]"], None),
    ("pods of the own namespace", f"{{ingress: [{{from: [{{{WEB}}}]}}]}}",
     ["{default/web} * * <- p[0]"], None),
    ("all pods of the own namespace", "{ingress: [{from: [{podSelector: {}}]}]}",
     ["{default/db default/web} * * <- p[0]"], None),
    ("all pods anywhere", "{ingress: [{from: [{namespaceSelector: {}}]}]}",
     ["{default/db default/web other/web} * * <- p[0]"], None),
    ("namespace and pod", "{ingress: [{from: [{namespaceSelector: {matchLabels: "
     f"{{kubernetes.io/metadata.name: other}}}}, {WEB}}}]}}]}}", ["{other/web} * * <- p[0]"], None),
    ("not in a namespace", "{ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: "
     f"kubernetes.io/metadata.name, operator: NotIn, values: [default]}}]}}, {WEB}}}]}}]}}",
     ["{other/web} * * <- p[0]"], None),
    ("nobody", "{ingress: [{from: [{podSelector: {matchLabels: {app: x}}}]}]}",
     ["{} * * <- p[0]"], None),
    ("a block and its excepts, sorted", "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: "
     "[10.9.0.0/16, 10.1.0.0/16]}}]}]}", ["10.0.0.0/8-10.1.0.0/16-10.9.0.0/16 * * <- p[0]"], None),
    ("block in canonical form", "{ingress: [{from: [{ipBlock: {cidr: 'FD00:0::/8'}}]}]}",
     ["fd00::/8 * * <- p[0]"], None),
    ("TCP by default", "{ingress: [{ports: [{port: 80}]}]}", ["any TCP 80 <- p[0]"], None),
    ("every port of a protocol", "{ingress: [{ports: [{protocol: UDP}]}]}",
     ["any UDP * <- p[0]"], None),
    ("{} port is every TCP port", "{ingress: [{ports: [{}]}]}", ["any TCP * <- p[0]"], None),
    ("peers times ports", f"{{ingress: [{{from: [{{{WEB}}}, {{ipBlock: {{cidr: '::/0'}}}}], "
     "ports: [{port: 1}, {port: 2, protocol: SCTP}]}]}",
     ["::/0 SCTP 2 <- p[0]", "::/0 TCP 1 <- p[0]", "{default/web} SCTP 2 <- p[0]",
      "{default/web} TCP 1 <- p[0]"], None),
    ("equal terms keep the lowest rule", "{ingress: [{ports: [{port: 1}]}, {ports: [{port: 2}]}, "
     "{ports: [{port: 1}]}]}", ["any TCP 1 <- p[0]", "any TCP 2 <- p[1]"], None),
    ("a port name that the subject lacks allows nothing, its neighbour does",
     "{ingress: [{ports: [{port: dns}, {port: 81}]}]}", ["any TCP 81 <- p[0]"], None),
    ("only a port name that it lacks: isolated", "{ingress: [{ports: [{port: dns}]}]}", [], None),
    ("a port name of another protocol", "{ingress: [{ports: [{port: web, protocol: UDP}]}]}", [],
     None),
    ("a port name is the subject's own number", "{ingress: [{ports: [{port: web}]}]}",
     ["any TCP 80 <- p[0]"], None),
    ("a port name at a block, at ingress", "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}}], "
     "ports: [{port: web}]}]}", ["10.0.0.0/8 TCP 80 <- p[0]"], None),
    ("a port name at egress is the peers'", "{policyTypes: [Egress], egress: [{to: [{podSelector: "
     "{}}, {ipBlock: {cidr: 10.0.0.0/8}}], ports: [{port: web}]}]}", None,
     ["{default/db default/web} TCP web <- p[0]"]),
    ("endPort", "{ingress: [{ports: [{port: 1, endPort: 9}, {port: 7, endPort: 7}]}]}",
     ["any TCP 1-9 <- p[0]", "any TCP 7 <- p[0]"], None),
    ("every port is not every protocol", "{ingress: [{ports: [{port: 1, endPort: 65535}]}]}",
     ["any TCP 1-65535 <- p[0]"], None),
    ("egress", "{policyTypes: [Egress], egress: [{to: [{podSelector: {}}]}]}", None,
     ["{default/db default/web} * * <- p[0]"]),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "spec", "ingress", "egress"), MEANINGS)
def test_meaning(
    reason: str, spec: str, ingress: list[str] | None, egress: list[str] | None
) -> None:
    assert _rules(policy("p", spec)) == (ingress, egress)


def test_policies_add_up_and_both_isolate() -> None:
    text = policy("b", "{ingress: [{ports: [{port: 1}]}]}") + policy("a", "{ingress: []}")
    text += policy("c", "{ingress: [{ports: [{port: 1}]}]}")
    assert _rules(text)[0] == ["any TCP 1 <- b[0]"]


def test_policies_of_another_namespace_do_not_select() -> None:
    assert _rules(policy("p", "{}", "other")) == (None, None)


def test_namespace_labels_decide_membership_and_cannot_be_forged() -> None:
    text = "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: other, labels: {team: x}}\n"
    team = "{ingress: [{from: [{namespaceSelector: {matchLabels: {team: x}}}]}]}"
    assert _rules(text + policy("p", team))[0] == ["{other/web} * * <- p[0]"]
    assert _rules(policy("p", team))[0] == ["{} * * <- p[0]"]


def test_outside_identities_are_never_pods() -> None:
    text = "---\napiVersion: tidegate.dev/v1alpha1\nkind: Identity\nmetadata: {name: i}\n"
    text += "spec: {cidrs: [192.0.2.0/24, 172.18.0.2/32]}\n"
    everything = "{ingress: [{from: [{namespaceSelector: {}}]}]}"
    assert _rules(text + policy("p", everything))[0] == [
        "{default/db default/web other/web} * * <- p[0]"
    ]
    _, ledger, desired = compiled(text)
    (number,) = ledger.live.values()
    assert desired.ipcache["192.0.2.0/24"].identity == number
    assert desired.ipcache["172.18.0.2/32"].identity == 4  # a node's address stays the node's


def test_prewarmed_identity_is_a_member_before_its_pods() -> None:
    text = "---\napiVersion: tidegate.dev/v1alpha1\nkind: Identity\nmetadata: {name: i}\n"
    text += "spec: {namespace: soon, labels: {app: new}}\n"
    everything = "{ingress: [{from: [{namespaceSelector: {}}]}]}"
    found = _rules(text + policy("p", everything))[0]
    assert found == ["{default/db default/web other/web soon/new} * * <- p[0]"]


def test_ipcache() -> None:
    _, ledger, desired = compiled(pod("a") + pod("h", rest=", hostNetwork: true"))
    (number,) = ledger.live.values()
    assert {
        key: (entry.identity, entry.node or None) for key, entry in desired.ipcache.items()
    } == {
        "10.244.0.0/16": (0, None),
        "fd00:10:244::/56": (0, None),
        "10.244.0.2/32": (number, "node-1"),
        "fd00:10:244::2/128": (number, "node-1"),
        "172.18.0.2/32": (4, "node-1"),
        "172.18.0.3/32": (4, "node-2"),
        "fc00:f853:ccd:e793::2/128": (4, "node-1"),
        "fc00:f853:ccd:e793::3/128": (4, "node-2"),
        "10.244.0.1/32": (4, "node-1"),
        "10.244.1.1/32": (4, "node-2"),
        "fd00:10:244::1/128": (4, "node-1"),
        "fd00:10:244:1::1/128": (4, "node-2"),
    }


def test_equal_rule_sets_and_equal_selectors_are_one() -> None:
    one = "{%s, ingress: [{from: [{podSelector: {matchLabels: {app: db}}}]}]}"
    two = (
        "{%s, ingress: [{from: [{podSelector: {matchExpressions: "
        "[{key: app, operator: In, values: [db]}]}}]}]}"
    )
    text = PODS + policy("p", one % WEB)
    text += policy("q", two % "podSelector: {matchLabels: {app: db}}")
    _, _, desired = compiled(text)
    assert len(desired.peers) == 1
    _, _, desired = compiled(PODS + policy("p", "{ingress: []}"))
    assert len(desired.rule_sets) == 1


def test_rule_sets_hold_no_identity_number() -> None:
    _, ledger, desired = compiled(PODS + policy("p", "{ingress: [{from: [{podSelector: {}}]}]}"))
    text = b"".join(encode(item) for item in desired.rule_sets.values()).decode()
    assert not [number for number in ledger.live.values() if str(number) in text]


SAID = [
    ("selects no pod", "{podSelector: {matchLabels: {app: x}}}", "spec.podSelector", "warning"),
    ("selects no peer", "{ingress: [{}, {from: [{podSelector: {}}, {podSelector: {matchLabels: "
     "{app: x}}}]}]}", "spec.ingress[1].from[1]", "warning"),
    ("a port name that nobody has", "{egress: [{ports: [{port: dns}]}]}",
     "spec.egress[0].ports[0].port", "warning"),
    ("a port name at a block", "{egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8}}], ports: [{port: "
     "web}]}]}", "spec.egress[0].ports[0].port", "error"),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "spec", "field", "severity"), SAID)
def test_said(reason: str, spec: str, field: str, severity: str) -> None:
    _, _, desired = compiled(PODS + policy("p", spec))
    (problem,) = desired.problems
    assert (problem.field, problem.severity) == (field, severity)
    assert (problem.file, problem.object) == ("a.yaml", "NetworkPolicy default/p")


def test_selecting_host_network_is_said_once() -> None:
    text = pod("h", rest=", hostNetwork: true") + pod("i", rest=", hostNetwork: true") + pod("a")
    _, _, desired = compiled(text + policy("p", "{}"))
    (problem,) = desired.problems
    assert "default/h and 1 more" in problem.message
    assert [e.name for node in desired.nodes.values() for e in node.endpoints] == ["a"]


def test_node_names_only_what_its_endpoints_use() -> None:
    text = pod("a", "{app: a}") + pod("b", "{app: b}")
    text += policy("p", "{podSelector: {matchLabels: {app: a}}, "
                   "ingress: [{from: [{podSelector: {}}]}]}")  # fmt: skip
    _, _, desired = compiled(text)
    used = {name: (len(n.rule_sets), len(n.peer_sets)) for name, n in desired.nodes.items()}
    assert used == {"node-1": (1, 1), "node-2": (0, 0)}


# ---- Incremental equals from scratch -----------------------------------------------------

Bytes = list[bytes]


class Follower:
    """One compiler that lives through every state."""

    def __init__(self) -> None:
        self.world: world.MadeWorld | None = None
        self.ledger = EMPTY_LEDGER
        self.compiler = Compiler()

    def step(self, given: Sequence[Document]) -> None:
        # The world's builder has caches too: without them it must say the same.
        bare = None
        if self.world is not None:
            other = Relevance(Settings(excluded=("?",)))
            bare = replace(self.world, endpoints={}, expansions={}, relevance=other)
        want_world = world.build(given, Options(), bare)
        self.world, problems = world.build(given, Options(), self.world)
        assert (self.world, problems) == want_world
        self.ledger = identities.allocate(self.world, self.ledger)
        got = self.compiler.compile(self.world, self.ledger)
        want = compile(self.world, self.ledger)
        assert _bytes(got, self.ledger) == _bytes(want, self.ledger)


def _bytes(desired: Desired, ledger: Ledger) -> Bytes:
    problems = [encode(problem) for problem in desired.problems]
    return [encode(item) for item in render(desired, ledger)] + problems


def _variants() -> dict[str, list[tuple[Document, ...]]]:
    """name -> the forms an object may take; a state picks one of each, or none."""
    namespace = "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: %s, labels: {team: %s}}\n"
    to = "{ingress: [{from: [%s], ports: [{port: 80}]}], %s}"
    specs = [
        "{}",
        "{policyTypes: [Ingress, Egress]}",
        to % ("{podSelector: {matchLabels: {app: a}}}", "podSelector: {}"),
        to % ("{namespaceSelector: {matchLabels: {team: x}}}", "podSelector: {}"),
        to % ("{namespaceSelector: {}, podSelector: {matchLabels: {app: b}}}", WEB),
        to % ("{podSelector: {matchExpressions: [{key: apps.kubernetes.io/pod-index, operator: "
              "Exists}]}}", "egress: [{}]"),
        "{ingress: [{ports: [{port: web}]}]}",
    ]  # fmt: skip
    workload = (
        "---\nkind: StatefulSet\napiVersion: apps/v1\nmetadata: {name: s, namespace: m}\n"
        "spec: {selector: {}, replicas: %d, template: {metadata: {labels: {app: a}}, "
        "spec: {containers: [{name: c}]}}}\n"
    )
    found = {
        "Namespace n": [namespace % ("n", "x"), namespace % ("n", "y")],
        "Namespace m": [namespace % ("m", "x")],
        "StatefulSet": [workload % 1, workload % 2],
        "Node": ["---\napiVersion: v1\nkind: Node\nmetadata: {name: node-2}\n"],
        "Identity": [
            "---\napiVersion: tidegate.dev/v1alpha1\nkind: Identity\nmetadata: {name: i}\n"
            f"spec: {spec}\n"
            for spec in ("{cidrs: [192.0.2.0/24]}", "{namespace: n, labels: {app: b}}")
        ],
    }
    for name, space in itertools.product("pq", "nm"):
        found[f"Pod {space}/{name}"] = [
            pod(name, labels, space, rest)
            for labels in ("{app: a}", "{app: b}", "{app: web}")
            for rest in ("", ", hostNetwork: true")
        ]
        found[f"Policy {space}/{name}"] = [policy(name, spec, space) for spec in specs]
        found[f"Service {space}/{name}"] = [
            service(name, spec, space)
            for spec in (
                "{selector: {app: a}, ports: [{port: 80, targetPort: web}]}",
                "{selector: {app: b}, ports: [{port: 80}], ipFamilyPolicy: PreferDualStack}",
                "{clusterIP: None, selector: {app: a}, ports: [{port: 80}]}",
            )
        ]
    return {name: [documents(text) for text in texts] for name, texts in found.items()}


VARIANTS = _variants()
STATE = st.fixed_dictionaries(
    {}, optional={name: st.sampled_from(forms) for name, forms in VARIANTS.items()}
)


@settings(max_examples=150, deadline=None)
@hypothesis_given(st.lists(STATE, max_size=8))
def test_incremental_equals_from_scratch(states: list[dict[str, tuple[Document, ...]]]) -> None:
    follower = Follower()
    for state in states:
        follower.step([document for form in state.values() for document in form])


def _pick(**forms: int) -> dict[str, tuple[Document, ...]]:
    return {name: VARIANTS[name][form] for name, form in forms.items()}


STATES: list[dict[str, tuple[Document, ...]]] = [
    _pick(**{"Pod n/p": 0}),
    _pick(**{"Pod n/p": 0, "Policy n/p": 2, "Pod n/q": 2}),
    _pick(**{"Pod n/p": 2, "Policy n/p": 2, "Pod n/q": 2, "Service n/p": 0}),
    _pick(**{"Pod n/p": 2, "Policy n/p": 3, "Pod m/q": 0, "Service n/p": 1, "Namespace m": 0}),
    _pick(**{"Pod n/p": 3, "Policy n/p": 3, "Policy n/q": 1, "Pod m/q": 0, "Namespace n": 1}),
    # The asymmetric one: a policy whose only subject and only peer left in one step.
    _pick(**{"Policy n/p": 4, "Policy n/q": 5, "StatefulSet": 1}),
]


def _expanders() -> Iterator[tuple[str, list[list[Document]]]]:
    flat = [[document for form in state.values() for document in form] for state in STATES]
    yield "as written", flat
    yield "keys reversed", [state[::-1] for state in flat]
    yield "states reversed", flat[::-1]
    yield "empty between", [state for one in flat for state in ([], one)]
    yield "each alone", [state for one in flat for state in (one, [])][:-1]
    merged: dict[object, Document] = {}
    for state in flat:
        merged.update({document.key: document for document in state})
    yield "all squashed", [list(merged.values()), flat[-1]]


@pytest.mark.parametrize(("reason", "states"), list(_expanders()))
def test_state_lists(reason: str, states: list[list[Document]]) -> None:
    follower = Follower()
    for state in states:
        follower.step(state)


def test_other_numbers_for_the_same_world() -> None:
    now, ledger, _ = compiled(PODS)
    other = Ledger({key: number ^ 1 for key, number in ledger.live.items()}, {})
    compiler = Compiler()
    for numbers in (ledger, other):
        got = compiler.compile(now, numbers)
        assert _bytes(got, numbers) == _bytes(compile(now, numbers), numbers)


def test_order_of_documents_means_nothing() -> None:
    flat = [document for forms in VARIANTS.values() for document in forms[0]]
    results = []
    for given in (flat, flat[::-1]):
        now, _ = world.build(given)
        ledger = identities.allocate(now, EMPTY_LEDGER)
        results.append(_bytes(compile(now, ledger), ledger))
    assert results[0] == results[1]
