"""What lives through events is, after each, what a new one makes of the same: the cluster's world,
the ledger and the compiler, byte for byte. Pods come, go, move, get addresses and other labels;
policies come, go and are edited, so that classes split and merge; named ports, namespaces' labels
and Identities change.

Faults it was seen to find: a subject kept though its policies changed; pods of a namespace not
looked at again; a peer set's emptiness not told; a key that is counted after its last owner left.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from tidegate_api.state import encode
from tidegate_operator import identities
from tidegate_operator.cluster import kinds
from tidegate_operator.cluster.world import EMPTY_CLUSTER, Snapshot, build
from tidegate_operator.compile import Compiler, compile
from tidegate_operator.identities import EMPTY_LEDGER
from tidegate_operator.publish import render

Tree = dict[str, Any]
SPACES, KEYS, VALUES = ("a", "b", "c"), ("app", "tier"), ("x", "y", "z")
EVENTS = 60


class Events:
    """Changes of a snapshot, one at a time."""

    def __init__(self, seed: int) -> None:
        self._source = random.Random(seed)
        nodes = {("", f"n{n}"): kinds.node(_bytes(_node(n))) for n in range(3)}
        self.snapshot = Snapshot(nodes=nodes)

    def next(self) -> Snapshot:
        source = self._source
        for _ in range(source.choice((1, 1, 2))):
            field, kind, count, share = source.choice(_FIELDS)
            held = dict(getattr(self.snapshot, field))
            name = f"{kind.lower()}-{source.randrange(count)}"
            space = "" if kind in ("Namespace", "Identity") else source.choice(SPACES)
            if kind == "Namespace":
                name = source.choice(SPACES)
            key = (space, name)
            if source.random() < share and key in held:
                del held[key]
            else:
                meta: Tree = {"name": name, "uid": f"{space}-{name}", "labels": {}}
                if space:
                    meta["namespace"] = space
                tree = _MAKE[kind](source, {"metadata": meta})
                held[key] = _DECODE[kind](_bytes(tree))
            self.snapshot = dataclasses.replace(self.snapshot, **{field: held})
        return self.snapshot


def _bytes(tree: Tree) -> bytes:
    return json.dumps(tree).encode()


def _node(number: int) -> Tree:
    cidr = f"10.244.{number}.0/24"
    addresses = [{"type": "InternalIP", "address": f"172.18.0.{number + 2}"}]
    return {"metadata": {"name": f"n{number}", "uid": f"n{number}"},
            "spec": {"podCIDR": cidr}, "status": {"addresses": addresses}}  # fmt: skip


def _labels(source: random.Random) -> dict[str, str]:
    return {key: source.choice(VALUES) for key in KEYS if source.random() < 0.7}


def _pod(source: random.Random, tree: Tree) -> Tree:
    node = source.randrange(3)
    ports = [{"containerPort": source.choice((80, 81)), "name": "web"}]
    tree["metadata"]["labels"] = _labels(source)
    tree["spec"] = {
        "nodeName": f"n{node}",
        "hostNetwork": source.random() < 0.1,
        "containers": [{"name": "c", "ports": ports if source.random() < 0.5 else []}],
    }
    tree["status"] = {"phase": source.choice(("Running", "Running", "Pending", "Failed"))}
    if source.random() < 0.8:
        tree["status"]["podIP"] = f"10.244.{node}.{source.randrange(2, 12)}"
    return tree


def _selector(source: random.Random) -> Tree:
    parts: list[Tree] = []
    for key in source.sample(KEYS, source.randint(0, 2)):
        operator = source.choice(("In", "NotIn", "Exists", "DoesNotExist"))
        values = source.sample(VALUES, source.randint(1, 2))
        part = {"key": key, "operator": operator}
        parts.append({**part, "values": values} if operator in ("In", "NotIn") else part)
    return {"matchExpressions": parts}


def _policy(source: random.Random, tree: Tree) -> Tree:
    def rule(side: str) -> Tree:
        made: Tree = {}
        if source.random() < 0.8:
            peer: Tree = {"podSelector": _selector(source)}
            if source.random() < 0.5:
                peer["namespaceSelector"] = source.choice(({}, {"matchLabels": {"team": "x"}}))
            made[side] = [peer]
        if source.random() < 0.5:
            made["ports"] = [{"port": source.choice((80, 443, "web"))}]
        return made

    tree.update(apiVersion="networking.k8s.io/v1", kind="NetworkPolicy")
    tree["spec"] = {
        "podSelector": _selector(source),
        "policyTypes": source.choice((["Ingress"], ["Egress"], ["Ingress", "Egress"])),
        "ingress": [rule("from") for _ in range(source.randint(0, 2))],
        "egress": [rule("to") for _ in range(source.randint(0, 2))],
    }
    return tree


def _namespace(source: random.Random, tree: Tree) -> Tree:
    tree["metadata"]["labels"] = {"team": source.choice(VALUES)}
    return tree


def _identity(source: random.Random, tree: Tree) -> Tree:
    tree.update(apiVersion="tidegate.dev/v1alpha1", kind="Identity")
    tree["spec"] = {"namespace": source.choice(SPACES), "labels": _labels(source)}
    return tree


_FIELDS = (
    *(("pods", "Pod", 12, 0.3),) * 6,
    *(("policies", "NetworkPolicy", 3, 0.3),) * 4,
    ("namespaces", "Namespace", 3, 0.2),
    ("identities", "Identity", 2, 0.5),
)
_MAKE: dict[str, Callable[[random.Random, Tree], Tree]] = {
    "Pod": _pod, "NetworkPolicy": _policy, "Namespace": _namespace, "Identity": _identity,
}  # fmt: skip
_DECODE: dict[str, Callable[[bytes], Any]] = {
    "Pod": kinds.pod, "NetworkPolicy": kinds.network_policy,
    "Namespace": kinds.namespace, "Identity": kinds.identity,
}  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_each_event_ends_as_a_new_start_does(seed: int) -> None:
    events, source = Events(seed), random.Random(~seed)
    world, ledger = EMPTY_CLUSTER, EMPTY_LEDGER
    compiler, allocator = Compiler(), identities.Allocator()
    for moment in range(EVENTS):
        snapshot = events.next()
        hold = source.random() < 0.7
        world, problems = build(snapshot, world, hold=hold)
        if not hold:
            assert (world, problems) == build(snapshot), (seed, moment)
        want_ledger = identities.allocate(world, ledger, moment, 20)
        ledger = allocator.allocate(world, ledger, moment, 20)
        assert ledger == want_ledger, (seed, moment)
        assert list(world.pods) == sorted(world.pods)
        got, want = compiler.compile(world, ledger), compile(world, ledger)
        assert got.problems == want.problems, (seed, moment)
        for one, two in zip(render(got, ledger), render(want, ledger), strict=True):
            assert encode(one) == encode(two), (seed, moment, one.metadata.name)
        assert (list(got.rule_sets), list(got.peers)) == (list(want.rule_sets), list(want.peers))
