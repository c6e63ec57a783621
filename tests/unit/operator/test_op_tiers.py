"""ClusterNetworkPolicy and TrafficPolicy: meanings as rows, from YAML to terms."""

from __future__ import annotations

import pytest
from msgspec import UNSET
from tidegate_api.state import (
    ADMIN_PRECEDENCE,
    DEVELOPER_PRECEDENCE,
    AnyPeer,
    CIDRPeer,
    EntityPeer,
    RuleSetSpec,
    SetPeer,
    Term,
)
from tidegate_operator.compile import Desired
from tidegate_operator.problems import Problem
from unit.operator.given import compiled, pod, policy, read

NODES = (
    "---\napiVersion: v1\nkind: Node\nmetadata: {name: n1, labels: {pool: a}}\n"
    "---\napiVersion: v1\nkind: Node\nmetadata: {name: n2}\n"
    "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: other, labels: {team: x}}\n"
)
PODS = pod("web", "{app: web}") + pod("db", "{app: db}") + pod("far", "{app: web}", "other")
IDENTITY = (
    "---\napiVersion: tidegate.dev/v1alpha1\nkind: Identity\nmetadata: {name: office}\n"
    "spec: {cidrs: [192.0.2.0/24]}\n"
)
EVERYBODY = "subject: {namespaces: {}}"
ALL_PODS = "subject: {podSelector: {any: true}}"
ANY = "peers: [{any: true}], ports: [{any: true}]"


def cnp(name: str, spec: str) -> str:
    return (
        "---\napiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\n"
        f"metadata: {{name: {name}}}\nspec: {{{spec}}}\n"
    )


def tgp(name: str, spec: str) -> str:
    return (
        "---\napiVersion: tidegate.dev/v1alpha1\nkind: TrafficPolicy\n"
        f"metadata: {{name: {name}}}\nspec: {{{spec}}}\n"
    )


def admin(rules: str, tier: str = "Admin") -> str:
    return cnp("c", f"tier: {tier}, priority: 7, {EVERYBODY}, {rules}")


def own(rules: str, isolates: str = "[]", mode: str = "Enforce") -> str:
    return tgp("t", f"{ALL_PODS}, isolates: {isolates}, mode: {mode}, {rules}")


def _tier(term: Term) -> str:
    if term.precedence >= ADMIN_PRECEDENCE:
        return "A"
    return "D" if term.precedence >= DEVELOPER_PRECEDENCE else "B"


def _peer(term: Term, desired: Desired, names: dict[int, str]) -> str:
    match term.peer:
        case AnyPeer():
            return "any"
        case SetPeer(name=of):
            held = desired.peers[of]
            known = [names.get(number, str(number)) for number in held.identities]
            return "{" + " ".join(sorted(known) + held.cidrs) + "}"
        case CIDRPeer(cidr=cidr, excepts=excepts):
            return cidr + "".join(f"-{text}" for text in excepts)
        case EntityPeer(entity=entity):
            return str(entity)


def _ports(term: Term) -> str:
    if term.protocol in ("ICMP", "ICMPv6"):
        parts = ["*" if part is UNSET else str(part) for part in (term.icmp_type, term.icmp_code)]
        return f"{term.protocol} {'/'.join(parts)}"
    ports = str(term.port or term.port_name or "*")
    return f"{term.protocol or '*'} {ports}" + (f"-{term.end_port}" if term.end_port else "")


def rule_set(text: str, direction: str, of: str = "web") -> RuleSetSpec | None:
    _, _, desired = compiled(NODES + PODS + text)
    endpoints = {e.name: e for node in desired.nodes.values() for e in node.endpoints}
    name = endpoints[of].ingress if direction == "Ingress" else endpoints[of].egress
    return desired.rule_sets[name].spec if isinstance(name, str) else None


def terms(text: str, direction: str) -> list[str] | None:
    """From the highest down: tier, action, peer, ports, rule."""
    _, ledger, desired = compiled(NODES + PODS + text)
    names = {
        number: f"{key.namespace}/{dict(key.labels).get('app', key.cidrs)}"
        for key, number in ledger.live.items()
    }
    endpoints = {e.name: e for node in desired.nodes.values() for e in node.endpoints}
    name = endpoints["web"].ingress if direction == "Ingress" else endpoints["web"].egress
    if not isinstance(name, str):
        return None
    spec = desired.rule_sets[name].spec
    owners = [*spec.policies, *spec.others]
    short = []
    for term in sorted(spec.terms, key=lambda term: -term.precedence):
        rule = spec.rules[term.rule]
        flags = ("~" if term.audit else "") + ("!" if rule.log else "")
        short.append(
            f"{_tier(term)} {term.action}{flags} {_peer(term, desired, names)} {_ports(term)}"
            f" <- {owners[rule.policy].name}[{rule.index}]"
        )
    return short


MEANINGS = [
    ("rules in order, each action",
     admin("ingress: [{action: Accept, from: [{namespaces: {}}]}, {action: Deny, from: "
           "[{namespaces: {}}]}, {action: Pass, from: [{namespaces: {}}]}]"), "Ingress",
     ["A Allow {default/db default/web other/web} * * <- c[0]",
      "A Deny {default/db default/web other/web} * * <- c[1]",
      "A Pass {default/db default/web other/web} * * <- c[2]"]),
    ("Baseline lies below",
     admin("egress: [{action: Deny, to: [{namespaces: {}}]}]", "Baseline"), "Egress",
     ["B Deny {default/db default/web other/web} * * <- c[0]"]),
    ("no rules in a direction: no say", admin("egress: []"), "Egress", None),
    ("namespaces by label", admin("ingress: [{action: Deny, from: [{namespaces: {matchLabels: "
                                  "{team: x}}}]}]"), "Ingress",
     ["A Deny {other/web} * * <- c[0]"]),
    ("pods; an absent namespaceSelector is every namespace",
     admin("ingress: [{action: Deny, from: [{pods: {podSelector: {matchLabels: {app: web}}}}]}]"),
     "Ingress", ["A Deny {default/web other/web} * * <- c[0]"]),
    ("nodes are addresses", admin("egress: [{action: Deny, to: [{nodes: {matchLabels: {pool: a}}}]"
                                  "}]"), "Egress",
     ["A Deny {172.18.0.2/32 fc00:f853:ccd:e793::2/128} * * <- c[0]"]),
    ("networks, one term each, host bits masked",
     admin("egress: [{action: Deny, to: [{networks: [10.1.2.3/8, 'fd00::/8']}]}]"), "Egress",
     ["A Deny 10.0.0.0/8 * * <- c[0]", "A Deny fd00::/8 * * <- c[0]"]),
    ("names of domains match nothing",
     admin("egress: [{action: Accept, to: [{domainNames: ['*.example.com']}]}]"), "Egress", []),
    ("protocols", admin("ingress: [{action: Deny, from: [{namespaces: {}}], protocols: [{tcp: "
                        "{destinationPort: {number: 80}}}, {udp: {destinationPort: {range: {start:"
                        " 5, end: 9}}}}, {destinationNamedPort: web}, {destinationNamedPort: dns}]"
                        "}]"), "Ingress",
     ["A Deny {default/db default/web other/web} TCP 80 <- c[0]",
      "A Deny {default/db default/web other/web} UDP 5-9 <- c[0]"]),
    ("a named port of peers",
     admin("egress: [{action: Deny, to: [{namespaces: {}}], protocols: [{destinationNamedPort: "
           "web}]}]"), "Egress",
     ["A Deny {default/db default/web other/web} * web <- c[0]"]),
    ("deny is above allow, in one tier with NetworkPolicy",
     own(f"ingress: [{{action: Allow, {ANY}}}, {{action: Deny, log: true, {ANY}}}]")
     + policy("n", "{ingress: [{ports: [{port: 1}]}]}"), "Ingress",
     ["D Deny! any * * <- t[1]", "D Allow any * * <- t[0]", "D Allow any TCP 1 <- n[0]"]),
    ("entities",
     own("egress: [{action: Deny, ports: [{any: true}], peers: [{entities: [world, host, "
         "remote-node, kube-apiserver, cluster]}]}]") + IDENTITY, "Egress",
     ["D Deny host * * <- t[0]", "D Deny kube-apiserver * * <- t[0]",
      "D Deny remote-node * * <- t[0]",
      "D Deny {/('192.0.2.0/24',) 2} * * <- t[0]",
      "D Deny {1 3 4 default/db default/web other/web} * * <- t[0]"]),
    ("CIDRs and their excepts",
     own("egress: [{action: Deny, ports: [{any: true}], peers: [{cidrs: [{cidr: 10.0.0.0/8, "
         "except: [10.2.0.0/16, 10.1.0.0/16]}, {cidr: 192.0.2.0/24, except: []}]}]}]"), "Egress",
     ["D Deny 10.0.0.0/8-10.1.0.0/16-10.2.0.0/16 * * <- t[0]", "D Deny 192.0.2.0/24 * * <- t[0]"]),
    ("ICMP", own("ingress: [{action: Deny, peers: [{any: true}], ports: [{icmp: {family: IPv4, "
                 "type: 8, code: 0}}, {icmp: {family: IPv4, type: 3, anyCode: true}}, {icmp: "
                 "{family: IPv6, any: true}}]}]"), "Ingress",
     ["D Deny any ICMP 3/* <- t[0]", "D Deny any ICMP 8/0 <- t[0]",
      "D Deny any ICMPv6 */* <- t[0]"]),
    ("a user-made identity", own("ingress: [{action: Allow, ports: [{protocol: TCP, range: {start: "
                                 "1, end: 65535}}], peers: [{identity: office}]}]") + IDENTITY,
     "Ingress", ["D Allow {/('192.0.2.0/24',)} TCP 1-65535 <- t[0]"]),
    ("an identity that is not there", own("ingress: [{action: Allow, ports: [{any: true}], peers: "
                                          "[{identity: gone}]}]"), "Ingress",
     ["D Allow {} * * <- t[0]"]),
    ("audit", own(f"ingress: [{{action: Deny, {ANY}}}]", mode="Audit"), "Ingress",
     ["D Deny~ any * * <- t[0]"]),
    ("a port's name", own("ingress: [{action: Deny, peers: [{any: true}], ports: [{protocol: TCP, "
                          "portName: web}, {protocol: UDP, portName: web}]}]"), "Ingress",
     ["D Deny any TCP 80 <- t[0]"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "direction", "expected"), [m[1:] for m in MEANINGS], ids=[m[0] for m in MEANINGS]
)
def test_meaning(text: str, direction: str, expected: list[str] | None) -> None:
    found = terms(text, direction)
    assert (found and sorted(found)) == (expected and sorted(expected))
    if expected and not any("any" in item for item in expected):
        assert [item[0] for item in found or ()] == [item[0] for item in expected]


def _named(text: str) -> tuple[list[str], list[str], list[int]]:
    spec = rule_set(text, "Ingress")
    assert spec is not None
    names = [[item.name for item in of] for of in (spec.policies, spec.others)]
    return names[0], names[1], spec.audited


BASE = admin("ingress: [{action: Deny, from: [{namespaces: {}}]}]", "Baseline")
ISOLATION = [
    ("tiers isolate nobody", BASE, ([], ["c"], [])),
    ("a NetworkPolicy silences Baseline", BASE + policy("n", "{}"), (["n"], [], [])),
    ("so does a TrafficPolicy that isolates", BASE + own("ingress: []", "[Ingress]"),
     (["t"], [], [])),
    ("not one that isolates otherwise", BASE + own("ingress: []", "[Egress]"), ([], ["c"], [])),
    ("nor one in audit mode", BASE + own("ingress: []", "[Ingress]", "Audit"),
     ([], ["c", "t"], [1])),
    ("nor one that only denies", BASE + own(f"ingress: [{{action: Deny, {ANY}}}]"),
     ([], ["c", "t"], [])),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"), [row[1:] for row in ISOLATION], ids=[row[0] for row in ISOLATION]
)
def test_isolation(text: str, expected: tuple[list[str], list[str], list[int]]) -> None:
    assert _named(text) == expected


def test_subjects_of_a_cluster_policy() -> None:
    def subjects(subject: str) -> set[str]:
        rule = "ingress: [{action: Deny, from: [{namespaces: {}}]}]"
        text = cnp("c", f"tier: Admin, priority: 0, subject: {subject}, {rule}")
        text += pod("host", "{app: web}", rest=", hostNetwork: true")
        return {n for n in ("web", "db", "far") if rule_set(text, "Ingress", n) is not None}

    assert subjects("{namespaces: {}}") == {"web", "db", "far"}
    assert subjects("{namespaces: {matchLabels: {team: x}}}") == {"far"}
    assert subjects("{pods: {podSelector: {matchLabels: {app: web}}}}") == {"web", "far"}
    assert subjects("{pods: {namespaceSelector: {matchLabels: {team: x}}, podSelector: {}}}") == {
        "far"
    }


def test_priority_then_name() -> None:
    rule = "ingress: [{action: Deny, from: [{namespaces: {}}]}]"
    text = "".join(
        cnp(name, f"tier: Admin, priority: {priority}, {EVERYBODY}, {rule}")
        for name, priority in (("b", 1), ("a", 1), ("z", 0), ("c", 1000))
    )
    found = terms(text, "Ingress") or []
    assert [item.rpartition(" ")[2] for item in found] == ["z[0]", "a[0]", "b[0]", "c[0]"]


def test_names_of_domains_are_reported() -> None:
    text = admin("egress: [{action: Accept, to: [{namespaces: {}}, {domainNames: [a.b]}]}]")
    _, _, desired = compiled(NODES + PODS + text)
    (problem,) = [item for item in desired.problems if item.severity == "error"]
    assert problem.object == "ClusterNetworkPolicy c"
    assert problem.field == "spec.egress[0].to[1].domainNames"


def _problems(text: str) -> list[Problem]:
    return [problem for problem in read(a__yaml=text).problems if problem.severity == "error"]


A_RULE = "action: Deny, from: [{namespaces: {}}]"
REFUSED = [
    ("no peers", admin("ingress: [{action: Deny, from: []}]"), "spec.ingress[0].from"),
    ("peers absent", admin("ingress: [{action: Deny}]"), "spec.ingress[0].from"),
    ("an empty peer", admin("ingress: [{action: Deny, from: [{}]}]"), "spec.ingress[0].from[0]"),
    ("two kinds of peer", admin("ingress: [{action: Deny, from: [{namespaces: {}, pods: "
                                "{podSelector: {}}}]}]"), "spec.ingress[0].from[0]"),
    ("nodes at ingress", admin("ingress: [{action: Deny, from: [{nodes: {}}]}]"),
     "spec.ingress[0].from[0].nodes"),
    ("26 rules", admin(f"ingress: [{', '.join(['{' + A_RULE + '}'] * 26)}]"), "spec.ingress"),
    ("priority 1001", cnp("c", f"tier: Admin, priority: 1001, {EVERYBODY}"), "spec.priority"),
    ("no priority", cnp("c", f"tier: Admin, {EVERYBODY}"), "spec.priority"),
    ("another tier", cnp("c", f"tier: Middle, priority: 1, {EVERYBODY}"), "spec.tier"),
    ("Allow is not Accept", admin("ingress: [{action: Allow, from: [{namespaces: {}}]}]"),
     "spec.ingress[0].action"),
    ("names denied", admin("egress: [{action: Deny, to: [{domainNames: [a.b]}]}]"),
     "spec.egress[0]"),
    ("named port of a network", admin("egress: [{action: Deny, to: [{networks: [10.0.0.0/8]}], "
                                      "protocols: [{destinationNamedPort: x}]}]"),
     "spec.egress[0]"),
    ("a protocol that says nothing", admin("ingress: [{RULE, protocols: [{tcp: {}}]}]"),
     "spec.ingress[0].protocols[0].tcp.destinationPort"),
    ("a range of one", admin("ingress: [{RULE, protocols: [{tcp: {destinationPort: {range: {start:"
                             " 1, end: 1}}}}]}]"),
     "spec.ingress[0].protocols[0].tcp.destinationPort.range"),
    ("no isolates", tgp("t", f"{ALL_PODS}, mode: Enforce"), "spec.isolates"),
    ("no mode", tgp("t", f"{ALL_PODS}, isolates: []"), "spec.mode"),
    ("no subject", tgp("t", "isolates: [], mode: Enforce"), "spec.subject"),
    ("an empty selector", tgp("t", "subject: {podSelector: {}}, isolates: [], mode: Enforce"),
     "spec.subject.podSelector"),
    ("peers absent", own("ingress: [{action: Deny, ports: [{any: true}]}]"),
     "spec.ingress[0].peers"),
    ("peers misspelt", own("ingress: [{action: Deny, peer: [{any: true}], ports: [{any: true}]}]"),
     "spec.ingress[0].peer"),
    ("ports absent", own("ingress: [{action: Deny, peers: [{any: true}]}]"),
     "spec.ingress[0].ports"),
    ("any: false", own("ingress: [{action: Deny, peers: [{any: false}], ports: [{any: true}]}]"),
     "spec.ingress[0].peers[0].any"),
    ("a protocol alone", own("ingress: [{action: Deny, peers: [{any: true}], ports: [{protocol: "
                             "TCP}]}]"), "spec.ingress[0].ports[0]"),
    ("a port alone", own("ingress: [{action: Deny, peers: [{any: true}], ports: [{port: 1}]}]"),
     "spec.ingress[0].ports[0]"),
    ("a type without a code", own("ingress: [{action: Deny, peers: [{any: true}], ports: [{icmp: "
                                  "{family: IPv4, type: 8}}]}]"), "spec.ingress[0].ports[0].icmp"),
    ("except absent", own("ingress: [{action: Deny, ports: [{any: true}], peers: [{cidrs: [{cidr: "
                          "10.0.0.0/8}]}]}]"), "spec.ingress[0].peers[0].cidrs[0].except"),
    ("pods of which namespaces", own("ingress: [{action: Deny, ports: [{any: true}], peers: "
                                     "[{pods: {podSelector: {any: true}}}]}]"),
     "spec.ingress[0].peers[0].pods.namespaceSelector"),
    ("null", own(f"ingress: [{{action: Deny, {ANY}, log: null}}]"), "spec.ingress[0]"),
    ("Pass is Admin's", own(f"ingress: [{{action: Pass, {ANY}}}]"), "spec.ingress[0].action"),
    ("HTTP is not there yet", own(f"ingress: [{{action: Allow, {ANY}, http: []}}]"),
     "spec.ingress[0].http"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "field"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_refused(text: str, field: str) -> None:
    assert field in [problem.field for problem in _problems(text.replace("RULE", A_RULE))]
