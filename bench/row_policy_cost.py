"""policy-*: 10,000 pods, 2,000 identities, 1,000 policies on 100 nodes, as the cluster operator
has them.

Measured is what a change costs the operator between its arrival and the desired state: the world
built of what the API server holds (decoded), numbers allocated, compiled. What is published of it,
and decoding, are measured by op-*. policy-cold: the same from nothing; its memory is what a process
that does only this grows by. policy-pod: a pod with known labels gets its address. policy-label:
a pod comes whose labels make a new identity. policy-edit: the peers and the port of one policy
change. policy-bytes: what is published when a label set appears, and to whom it matters.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from typing import Any

from measure import Result, absolute, pinned, resident
from row_compile import milliseconds
from row_operator import Counting, Tree, address, decoded, namespace, node
from support import town_api
from tidegate_api.state import encode, shard_of
from tidegate_operator import identities, publish
from tidegate_operator.cluster import kinds
from tidegate_operator.cluster.world import EMPTY_CLUSTER, Snapshot, build
from tidegate_operator.compile import Compiler
from tidegate_operator.identities import EMPTY_LEDGER

NODES, PODS, POLICIES, NAMESPACES, IDENTITIES = 100, 10_000, 1_000, 100, 2_000
APPS = POLICIES // NAMESPACES
SIDES = IDENTITIES // POLICIES
REST_SECONDS = 3600
RUNS = 15
SIZE = f"{PODS:,} pods, {IDENTITIES:,} identities, {POLICIES:,} policies, {NODES} nodes"


def pod(number: int, ip: bool = True, **labels: str) -> Tree:
    """The pods of an identity lie on nodes that follow each other."""
    kind = number % IDENTITIES
    app = kind // NAMESPACES % APPS
    own = {"app": f"app-{app}", "side": f"side-{kind // POLICIES}", "release": f"r-{number % 7}"}
    text = address(number, NODES) if ip else ""
    return town_api.pod(  # type: ignore[no-any-return]
        f"app-{number:05d}", f"node-{number // 7 % NODES}", text, f"ns-{kind % NAMESPACES}",
        **{**own, **labels},
    )  # fmt: skip


def policy(number: int, port: int = 8080, side: int = 0) -> Tree:
    near = {"podSelector": {"matchLabels": {"side": f"side-{side}"}}}
    known = {"app": f"app-{number % APPS}", "side": f"side-{side}"}
    team = {"matchLabels": {"team": f"team-{number % 4}"}}
    far = {"namespaceSelector": team, "podSelector": {"matchLabels": known}}
    watch = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"role": "monitoring"}}}
    app = number // NAMESPACES
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"policy-{app}", "namespace": f"ns-{number % NAMESPACES}"},
        "spec": {
            "podSelector": {"matchLabels": {"app": f"app-{app}"}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [near, far, watch], "ports": [{"port": port}]}],
            "egress": [{"to": [near]}, {"ports": [{"port": 53, "protocol": "UDP"}]}],
        },
    }


class Operator:
    """A step of the runner, without what it writes."""

    def __init__(self) -> None:
        self.snapshot = Snapshot(
            nodes=decoded([node(n) for n in range(NODES)], kinds.node),
            namespaces=decoded([namespace(n) for n in range(NAMESPACES)], kinds.namespace),
            pods=decoded([pod(n) for n in range(PODS)], kinds.pod),
            policies=decoded([policy(n) for n in range(POLICIES)], kinds.network_policy),
        )
        self.world, self.ledger = EMPTY_CLUSTER, EMPTY_LEDGER
        self._compiler, self._allocator = Compiler(), identities.Allocator()
        self._moment = 0

    def step(self) -> float:
        """Milliseconds."""
        with pinned():
            return self._step()

    def _step(self) -> float:
        began = time.perf_counter_ns()
        self.world, _ = build(self.snapshot, self.world, hold=True)
        self._moment += 1
        self.ledger = self._allocator.allocate(self.world, self.ledger, self._moment, REST_SECONDS)
        self.desired = self._compiler.compile(self.world, self.ledger)
        return milliseconds(began)

    def change(self, kind: str, tree: Tree) -> None:
        decode: dict[str, Callable[[bytes], Any]] = {
            "pods": kinds.pod,
            "policies": kinds.network_policy,
        }
        held = {**getattr(self.snapshot, kind), **decoded([tree], decode[kind])}
        self.snapshot = dataclasses.replace(self.snapshot, **{kind: held})

    def changed(self, kind: str, tree: Tree) -> float:
        self.change(kind, tree)
        return self.step()


def _cold(out: Any) -> None:
    """In a process of its own: (ms, MiB)."""
    operator = Operator()
    before = resident(os.getpid())
    took = operator.step()
    if (len(operator.world.pods), len(operator.ledger.live)) != (PODS, IDENTITIES):
        raise AssertionError(f"{len(operator.ledger.live)} identities")
    out.put((took, before, resident(os.getpid())))


def cold() -> Iterator[Result]:
    spawn = get_context("spawn")
    memory: list[tuple[float, float]] = []

    def run() -> float:
        out = spawn.Queue()
        child = spawn.Process(target=_cold, args=(out,))
        child.start()
        took, before, after = out.get(timeout=120)
        child.join()
        memory.append((before, after))
        return float(took) / 1000

    found = absolute("policy-cold", f"{SIZE}: from scratch", "s", 6.0, run, 3)
    after = statistics.median(after for _, after in memory)
    grown = statistics.median(after - before for before, after in memory)
    what = f"{SIZE}: resident with everything compiled, {grown:.0f} MiB more than before"
    yield found
    yield Result("policy-cold-rss", what, after, "MiB", "median of 3 processes", 300.0)


def one() -> Iterator[Result]:
    operator = Operator()
    operator.step()
    numbers = iter(range(PODS))
    for _ in range(3):  # caches of every part
        operator.changed("pods", pod(next(numbers), ip=False))

    def known() -> float:
        number = next(numbers)
        operator.changed("pods", pod(number, ip=False))
        return operator.changed("pods", pod(number))

    what = f"{SIZE}: a pod with known labels gets its address"
    yield absolute("policy-pod", what, "ms", 5.0, known, RUNS)

    def new() -> float:
        return operator.changed("pods", pod(next(numbers), role="monitoring"))

    what = f"{SIZE}: a pod's labels make a new identity, which {POLICIES:,} policies pick"
    yield absolute("policy-label", what, "ms", 20.0, new, RUNS)

    def edit() -> float:
        number = next(numbers) % POLICIES
        return operator.changed("policies", policy(number, 9000 + number, 1))

    yield absolute("policy-edit", f"{SIZE}: one policy changed", "ms", 100.0, edit, RUNS)


def appears() -> Iterator[Result]:
    """The pod is of no app, so that of its namespace's sets only those by side pick it."""
    operator, store = Operator(), Counting()
    operator.step()
    publisher = publish.Publisher(store, publish.CLUSTER_SIZES)  # type: ignore[arg-type]
    publisher.publish(operator.desired, operator.ledger)
    before = operator.desired
    publisher.publish(before, operator.ledger)
    store.clear()
    operator.changed("pods", pod(PODS, app="nothing-known"))
    desired = operator.desired
    publisher.publish(desired, operator.ledger)
    sets = [name for name, item in desired.peers.items() if before.peers.get(name) != item]
    nodes = [name for name, item in desired.nodes.items() if before.nodes.get(name) != item]
    written = Counter(item.kind for item in store.put_since)
    shards = {item.metadata.name for item in store.put_since if item.kind == "StateSlice"}
    named = {n for n in shards if n.startswith("peers")}
    of_sets = {shard_of(n, publish.shards_for(len(desired.peers), 16)) for n in sets}
    if written["NodeState"] != len(nodes) or len(named) != len(of_sets) or written["RuleSet"]:
        raise AssertionError(f"{dict(written)}, {len(nodes)} nodes, {len(sets)} peer sets")
    size = sum(len(encode(item)) for item in store.put_since) / 1024
    what = (
        f"{SIZE}: a label set appears: bytes published, for {len(nodes)} of the nodes and"
        f" {len(sets)} of {len(desired.peers)} peer sets"
    )
    against = "objects: " + ", ".join(f"{count} {kind}" for kind, count in sorted(written.items()))
    yield Result("policy-bytes", what, size, "KiB", against, 128.0)


ROWS: dict[str, Callable[[], Iterator[Result]]] = {
    "policy-cold": cold,
    "policy-one": one,
    "policy-bytes": appears,
}
