"""Policies of every kind with real packets on a cluster: the truth table that `tests/cluster` has
for namespaces of one machine (`support/truth_town.py`), with what users install and apply.

ClusterNetworkPolicy's CRD is the one that its project publishes. Only in `tests/cluster`: that each
rule and network of the table has a row that fails without it, as it takes wrong entries in the
kernel that nobody mends; and senders that write others' addresses, as nodes drop their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from support import truth as scenarios
from support import truth_town as t
from support.asking import Flows, Question
from support.ca_soak import scaled
from support.truth import WAIT_SECONDS
from support.waiting import until

from rig import asking, install
from rig.truth import SPACE, Truth, town

pytestmark = pytest.mark.kind


@pytest.fixture(scope="module")
def truth(tidegate: None) -> Iterator[Truth]:
    with town() as made:
        # Nothing is in the way: what the table forbids is policy's doing.
        made.agrees([replace(row, allowed=True) for row in t.TABLE])
        made.save("policies", t.policies(made.addresses, made.cidrs))
        made.agrees()
        yield made


def test_the_truth_table(truth: Truth) -> None:
    """Once more, by programs in the pods' containers, whose sockets are translated."""
    asked = [(row, q) for row, q in truth.questions(t.TABLE) if _by_program(truth, row)]
    by = {who: asking.in_pod(truth.pods[who]) for who in sorted({row.who for row, _ in asked})}

    def answers(who: str) -> list[str]:
        mine = [(row, q) for row, q in asked if row.who == who]
        found = by[who].ask(
            [
                asking.Question(q.address, q.port, q.protocol, seconds=10 if row.allowed else 1)
                for row, q in mine
            ]
        )
        return [
            f"{row}: {answer}"
            for (row, _), answer in zip(mine, found, strict=True)
            if answer.pod != (_name(row.target) if row.allowed else "")
        ]

    try:
        with ThreadPoolExecutor(len(by)) as pool:
            assert [wrong for found in pool.map(answers, by) for wrong in found] == []
    finally:
        for asker in by.values():
            asker.close()
    assert len(asked) > 250


def _by_program(truth: Truth, row: t.Row) -> bool:
    """Whether both are pods, or it is the Service of one."""
    return row.protocol != "SCTP" and row.who in truth.pods and bool(_name(row.target))


def _name(target: str) -> str:
    """Whom the answering program names."""
    if target == "vip":
        target = "narcissus"
    spaces = dict.fromkeys(t.INHABITANTS, SPACE) | {"mate": "blue", "cousin": "blue"}
    return f"{spaces[target]}/{target}" if target in spaces and target[:4] != "node" else ""


# ---- the API server as a peer ------------------------------------------------------------------

API = t.rows("""
to-api               > api:443/TCP       yes  # by its Service
to-api               > server:6443/TCP   yes  # by the node's address
to-api               > server:10250/TCP  no   # another port of that node
to-api               > server-6:6443/TCP no   # an address that is not the Service's
to-api               > node-1:10250/TCP  no   # its own node
to-api               > node-2:10250/TCP  no   # another
to-api               > open:8080/        no   # a pod
no-api               > api:443/TCP       no   # denied by its Service
no-api               > server:6443/TCP   no   # and by the node's address
no-api               > server:10250/TCP  yes  # another port of that node
no-api               > node-2:10250/TCP  yes  # another node
no-api               > open:8080/        yes  # a pod
beside-api           > api:443/TCP       yes  # which is its own node, too
beside-api           > server:6443/TCP   yes
beside-api           > server:10250/TCP  no
beside-api           > node-1:10250/TCP  no
no-api-beside        > api:443/TCP       no
no-api-beside        > server:6443/TCP   no
no-api-beside        > server:10250/TCP  yes
control              > from-api-4:8080/  yes  # who serves the API asks
control              > from-api-6:8080/  no   # not from that address
node-2 far           > from-api:8080/    no   # others
node-1               > from-api:8080/    yes  # the pod's own node is let in
""")
API_PODS = {"to-api": 1, "no-api": 2, "from-api": 1, "beside-api": 0, "no-api-beside": 0}


def test_the_api_server_as_a_peer(truth: Truth) -> None:
    """Whether it is asked by its Service, packet by packet or where a program connects, or by its
    address; from its own node, too."""
    peer = "peers: [{entities: [kube-apiserver]}]"
    only, every = "ports: [{protocol: TCP, port: 6443}]", "ports: [{any: true}]"
    allow, deny = f"{{action: Allow, {peer}, {only}}}", f"{{action: Deny, {peer}, {only}}}"
    four, six = truth.addresses["control"]
    truth.addresses |= {"server": (four, ""), "server-6": ("", six)}
    made = [
        t.pod(name, node).replace("nodeName: node-0", "nodeName: control")
        for name, node in API_PODS.items()
    ]
    truth.save("api-pods", "---".join(made))
    until(lambda: truth.learn(*API_PODS), "pods are there", WAIT_SECONDS)
    four, six = truth.addresses["from-api"]
    truth.addresses |= {"from-api-4": (four, ""), "from-api-6": ("", six)}
    truth.agrees([replace(row, allowed=True) for row in API])
    isolated = {way: f"isolates: [{way}]" for way in ("Ingress", "Egress")}
    rules = [
        t.traffic("to-api", "Egress", [allow], isolated["Egress"]),
        t.traffic("beside-api", "Egress", [allow], isolated["Egress"]),
        t.traffic("no-api", "Egress", [deny]),
        t.traffic("no-api-beside", "Egress", [deny]),
        t.traffic(
            "from-api", "Ingress", [f"{{action: Allow, {peer}, {every}}}"], isolated["Ingress"]
        ),
    ]
    truth.save("api-policies", "---".join(rules))
    truth.agrees(API)
    for name in ("to-api", "beside-api", "no-api", "no-api-beside"):
        asker = asking.in_pod(truth.pods[name])
        try:
            (answer,) = asker.ask([asking.Question(truth.addresses["api"][0], 443, seconds=3)])
        finally:
            asker.close()
        # It is a server of HTTPS, and says so.
        assert ("HTTPS server" in answer.body) == (not name.startswith("no")), (name, answer)


# ---- what changes ------------------------------------------------------------------------------


def test_labels_of_living_pods_and_namespaces(truth: Truth) -> None:
    scenarios.labels_change(truth)


@pytest.mark.parametrize("changed", scenarios.CUTS)
def test_what_is_allowed_no_more_is_cut_and_the_rest_loses_nothing(
    truth: Truth, changed: int
) -> None:
    scenarios.flows_are_cut(truth, changed)


def test_a_policy_that_is_widened_interrupts_nothing(truth: Truth) -> None:
    scenarios.policies_are_widened(truth)


TINTS = 3
"""Splits on top of one another before all is one again."""
ALLIES, FOES = ("ally-1", "ally-2"), ("foe-1", "foe-2")


def test_a_class_that_is_split_loses_and_admits_nothing(truth: Truth) -> None:
    """Labels that no policy mentions cost no number; then policies mention them, one after the
    other, and pods that were one class get numbers of their own, on both nodes."""
    pods = [
        t.pod(f"{who}-{node}", node, f"role: {role}, {tints}")
        for who, role in (("ally", "friend"), ("foe", "other"))
        for node, tints in ((1, _tints("x")), (2, _tints("y")))
    ]
    truth.save("tinted", "---".join(pods))
    names = (*ALLIES, *FOES)
    until(lambda: truth.learn(*names), "pods are there", WAIT_SECONDS)
    truth.agrees(t.rows("ally-1 ally-2 > hosted:8080/ yes\nfoe-1 foe-2 > hosted:8080/ no"))
    until(lambda: _classes() == 2, "two classes", WAIT_SECONDS)
    with Flows() as flows, _Beside(truth) as beside:
        for who in ALLIES:
            for kind in ("TCP", "UDP"):
                to = truth.addresses["hosted"][kind == "UDP"]
                flows.open(truth.places, f"{who} {kind}", Question(who, to, 8080, kind))
        for cycle in range(scaled(ci=2, soak=10)):
            until(lambda: _classes() == 2, "classes are one again", WAIT_SECONDS)
            for n in range(TINTS):
                some = f"{{podSelector: {{matchLabels: {{tint-{n}: x}}}}}}"
                text = t.policy("probed", f"{{from: [{some}]}}", name=f"tint-{n}")
                truth.save(f"tint-{n}", text)
                until(lambda: _classes() == 4, f"{cycle}: split by {n}", WAIT_SECONDS)
                # What is split already stays so; what mentions it changes.
                if n:
                    truth.save(f"tint-{n - 1}", "")
                until(lambda: flows.silent() == set(), "every flow goes on", WAIT_SECONDS)
            truth.save(f"tint-{TINTS - 1}", "")
        truth.loses_nothing(flows)
        assert beside.wrong == []
        assert min(beside.made, beside.refused) > 10
        # And it would have been noticed.
        truth.save("let-in", t.policy("hosted", "{}", name="let-in"))
        until(lambda: beside.wrong, "what passes is seen", WAIT_SECONDS)
    truth.save("let-in", "")


def _tints(value: str) -> str:
    return ", ".join(f"tint-{n}: {value}" for n in range(TINTS))


def _classes() -> int:
    """How many identities allies and foes have, once every node has them in force; else 0."""
    states = install.node_states().values()
    if not all(map(install.is_realised, states)):
        return 0
    found = {
        one["name"]: one["identity"]
        for state in states
        for one in state["spec"]["endpoints"]
        if one["namespace"] == SPACE
    }
    return len({found.get(name) for name in (*ALLIES, *FOES)})


class _Beside:
    """New connections all the time: of allies, which must come about, and of foes, which must
    not. `wrong`: what went otherwise."""

    def __init__(self, truth: Truth) -> None:
        self._truth, self._end = truth, threading.Event()
        turns = ((ALLIES, True, WAIT_SECONDS), (FOES, False, 0.3))
        self._threads = [threading.Thread(target=self._repeat, args=turn) for turn in turns]
        self.made = self.refused = 0
        self.wrong: list[str] = []

    def __enter__(self) -> _Beside:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, names: Sequence[str], allowed: bool, seconds: float) -> None:
        rows = t.rows("\n".join(f"{name} > hosted:8080/ yes" for name in names))
        while not self._end.wait(0.01):
            self.wrong += self._truth.wrong([replace(r, allowed=allowed) for r in rows], seconds, 0)
            if allowed:
                self.made += len(rows)
            else:
                self.refused += len(rows)
