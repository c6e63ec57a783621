"""A policy that splits a class, or lets two be one again, opens no gap.

What the operator writes is kept as a sequence of single writes. A node's reader stops anywhere in
it, any number of times, and brings its kernel (the loader's own plan, on dictionaries) to what is
there. After each step of a plan, whoever may talk to whom must be as one
of the states between what the node had and what it reads: who may in all of them always can, who
may in none never.

Faults it was seen to find: addresses that move after the policies changed, or with them and
without copies; peer sets of policies that go without the new number; numbers that merge at once;
peer sets without the old number of a pod whose node state could not be written yet; other labels of
a pod that are read with a policy, or published with it.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
import yaml
from support.ca_soak import SOAK
from tidegate_api.state import TABLES, NodeState, RuleSet, StateObject, StateSlice, slice_name
from tidegate_loader import addresses, maps, plan
from tidegate_loader.local import LocalInterface
from tidegate_loader.rules import WORD_ANY, copy_of, identities_of
from tidegate_operator import identities, publish
from tidegate_operator.compile import Compiler
from tidegate_operator.identities import EMPTY_LEDGER
from tidegate_operator.objects import Direction, ObjectName, Pod, PodPeer
from tidegate_operator.problems import Problem
from tidegate_operator.relabels import Relabels
from tidegate_operator.store import PublishError, T, path_of, path_to
from tidegate_operator.world import EMPTY_WORLD, MadeWorld, Options, build, with_labels
from unit.operator.given import documents

KEYS, VALUES, SPACES = ("app", "tier"), ("a", "b", "c"), ("default", "other")
NODE = "node-1"
Pair = tuple[ObjectName, ObjectName]
LIMITS = plan.Limits(
    ipcache=999, networks=99, frontends=9, slots=9, backends=9, rule_sets=64, half_open=64
)


class Log:
    """A store that keeps every write, in order. `refuses`: one in so many node states is not
    written, as when its status has changed in between; 0: none."""

    def __init__(self, refuses: int = 0) -> None:
        self._refuses, self._source = refuses, random.Random(refuses)
        self.writes: list[tuple[str, StateObject | None]] = []
        self._held: dict[type, dict[str, Any]] = {}

    def held(self, kind: type[T]) -> Mapping[str, T]:
        return self._held.setdefault(kind, {})

    def put(self, batch: Sequence[StateObject]) -> Mapping[str, str]:
        failures = {}
        for item in batch:
            known = isinstance(item, NodeState) and item.metadata.name in self.held(NodeState)
            if known and self._refuses and not self._source.randrange(self._refuses):
                failures[path_of(item)] = "409 Conflict"
                continue
            self._held.setdefault(type(item), {})[item.metadata.name] = item
            self.writes.append((path_of(item), item))
        return failures

    def drop(self, kind: type[T], names: Sequence[str]) -> Mapping[str, str]:
        for name in names:
            self._held.setdefault(kind, {}).pop(name, None)
            self.writes.append((path_to(kind.__name__, name), None))
        return {}

    def report(self, problems: Sequence[Problem]) -> Sequence[str]:
        return ()


class Reader:
    """One node's loader, and its kernel as dictionaries."""

    def __init__(self) -> None:
        self.objects: dict[str, StateObject] = {}
        self.actual = plan.Actual(limits=LIMITS)
        self._entries: dict[int, dict[Any, Any]] = {}
        self._built: plan.BuildNodeTable | None = None

    def state(self) -> maps.State | None:
        """None: it is not complete."""
        node = self.objects.get(path_to("NodeState", NODE))
        if not isinstance(node, NodeState):
            return None
        tables: dict[str, list[StateSlice]] = {}
        for table in TABLES:
            ref = node.spec.tables[table]
            for shard in range(ref.shards):
                name = slice_name(table, ref.epoch, shard, ref.shards)
                item = self.objects.get(path_to("StateSlice", name))
                if not isinstance(item, StateSlice):
                    return None
                tables.setdefault(table, []).append(item)
            if max(item.spec.revision for item in tables[table]) < ref.min_revision:
                return None
        peers = {peer.name: peer for item in tables["peers"] for peer in item.spec.peers or ()}
        rule_sets: dict[str, RuleSet] = {}
        for name in node.spec.rule_sets:
            found = self.objects.get(path_to("RuleSet", name))
            if not isinstance(found, RuleSet):
                return None
            rule_sets[name] = found
        if not set(node.spec.peer_sets) <= peers.keys():
            return None
        return maps.State(
            node=node, digest="", rule_sets=rule_sets, peers=peers,
            ipcache=tuple(tables["ipcache"]), services=tuple(tables["services"]),
        )  # fmt: skip

    def execute(self, step: plan.AnyStep) -> None:
        a = self.actual
        match step:
            case plan.ReserveIds(next_id=next_id):
                a.next_id = next_id
            case plan.CreateHalfOpen(slots=slots):
                a.half_open |= set(slots)
            case plan.CreateRuleSet(id=number, expanded=e):
                self._entries[number] = dict(e.entries)
                known = identities_of(e.entries)
                a.rule_sets[number] = plan.RuleSetInForce(e.name, e.content, None, known)
            case plan.CopyRuleSets(items=items, numbers=numbers):
                for source, number, _, _ in items:
                    of = self._entries[source]
                    self._entries[number] = copy_of(of.keys(), of.values(), numbers)
                    a.rule_sets[number] = plan.RuleSetInForce("", "", None)
            case plan.PutRuleSets(items=items):
                for number, slot, _ in items:
                    r = a.rule_sets[number]
                    a.rule_sets[number] = plan.RuleSetInForce(r.name, r.content, slot, r.identities)
            case plan.BuildNodeTable():
                self._built = step
            case plan.SwitchNodeTable():
                assert self._built is not None
                a.node_table, a.uids = self._built.entries, self._built.uids
            case plan.RemoveRuleSets(items=items):
                for number, _ in items:
                    del a.rule_sets[number], self._entries[number]
            case plan.DeleteIpcache(keys=keys):
                for key in keys:
                    a.ipcache.pop(key)
            case plan.UpsertIpcache(entries=entries):
                a.ipcache.update(entries)
            case plan.BumpEpoch(epoch=epoch):
                a.epoch = epoch
            case plan.UpsertNetworks(entries=networks):
                a.networks.update(networks)
            case _:
                raise AssertionError(step)

    def verdicts(self, pods: Iterable[Pod]) -> dict[tuple[Direction, Pair], bool]:
        """Of every pair with an end on the node, that end's."""
        table = self.actual.node_table or {}
        found: dict[tuple[Direction, Pair], bool] = {}
        numbers: dict[ObjectName, int] = {}
        rows: dict[ObjectName, plan.NodeEntry] = {}
        for pod in pods:
            name, address = ObjectName(pod.namespace, pod.name), addresses.pack(pod.addresses[0])
            row = table.get((plan.NODE_ADDR, address))
            if row is not None:
                rows[name] = row
            word = self.actual.ipcache.get(address, 0)
            numbers[name] = row.identity if row is not None else word & plan.NUMBER
        for name, row in rows.items():
            for other, number in numbers.items():
                found["Ingress", (other, name)] = self._allows(row.ingress, number)
                found["Egress", (name, other)] = self._allows(row.egress, number)
        return found

    def _allows(self, policy: plan.Policy | None, number: int) -> bool:
        if policy is None:
            return True
        return any(key[0] in (number, WORD_ANY) for key in self._entries[policy.rule_set])


def _selector(source: random.Random) -> dict[str, Any]:
    parts = []
    for key in source.sample(KEYS, source.randint(0, 2)):
        operator = source.choice(("In", "NotIn", "Exists", "DoesNotExist"))
        part: dict[str, Any] = {"key": key, "operator": operator}
        if operator in ("In", "NotIn"):
            part["values"] = source.sample(VALUES, source.randint(1, 2))
        parts.append(part)
    return {"matchExpressions": parts}


def _policy(source: random.Random, name: str) -> dict[str, Any]:
    def rules(side: str) -> list[dict[str, Any]]:
        found = []
        for _ in range(source.randint(0, 2)):
            peer: dict[str, Any] = {"podSelector": _selector(source)}
            if source.random() < 0.4:
                peer["namespaceSelector"] = {}
            found.append({side: [peer]} if source.random() < 0.9 else {})
        return found

    metadata = {"name": name, "namespace": source.choice(SPACES)}
    types = source.choice((["Ingress"], ["Egress"], ["Ingress", "Egress"]))
    spec = {"podSelector": _selector(source), "policyTypes": types,
            "ingress": rules("from"), "egress": rules("to")}  # fmt: skip
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": metadata, "spec": spec}  # fmt: skip


def _pods(source: random.Random) -> list[dict[str, Any]]:
    return [_pod(f"p{n}", SPACES[n % 2], _labels(source)) for n in range(12)]


def _pod(name: str, namespace: str, labels: dict[str, str]) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace, "labels": labels}
    spec = {"containers": [{"name": "c", "image": "i"}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _labels(source: random.Random) -> dict[str, str]:
    return {key: source.choice(VALUES) for key in KEYS if source.random() < 0.8}


def _truth(world: MadeWorld) -> dict[tuple[Direction, Pair], bool]:
    """By the pods' own labels, and no number."""
    found: dict[tuple[Direction, Pair], bool] = {}
    sides: tuple[Direction, Direction] = ("Ingress", "Egress")
    for name, pod in world.pods.items():
        of = [p for p in world.policies.values() if p.name.namespace == name.namespace]
        of = [p for p in of if p.subject.pods.matches(pod.labels)]
        for direction in sides:
            isolating = [p for p in of if direction in p.isolates]
            rules = [rule for p in isolating for rule in p.rules(direction)]
            for other, peer in world.pods.items():
                pair = (other, name) if direction == "Ingress" else (name, other)
                found[direction, pair] = not isolating or any(
                    rule.peers is None or any(_picks(world, p, peer) for p in rule.peers)
                    for rule in rules
                )
    return found


def _picks(world: MadeWorld, peer: object, pod: Pod) -> bool:
    assert isinstance(peer, PodPeer)
    if peer.namespaces is None:
        inside = peer.namespace == pod.namespace
    else:
        inside = peer.namespaces.matches(world.namespaces[pod.namespace])
    return inside and peer.pods.matches(pod.labels)


class Town:
    """The operator's side: events, their truths, and where in the log each begins.

    `hasty`: labels may change in the moment of a policy, what a refused write keeps from being
    whole may be overtaken by the next event, and the reader may be away for any time."""

    def __init__(self, seed: int, refuses: int = 0, hasty: bool = False) -> None:
        self.source = random.Random(seed)
        self.log = Log(refuses)
        self.truths: list[dict[tuple[Direction, Pair], bool]] = []
        self.begins: list[int] = []
        self.whole: list[tuple[int, int]] = []
        """Where in the log all of an event was written, and which one."""
        self.merges: list[int] = []
        """Where numbers that were held are let go, and where that ends: only once the node has
        all that was before, and by itself."""
        self.world = EMPTY_WORLD
        self._hasty, self._relabels = hasty, Relabels()
        self._ledger, self._compiler = EMPTY_LEDGER, Compiler()
        self._publisher = publish.Publisher(self.log)
        self.pods = _pods(self.source)
        self.policies: dict[str, dict[str, Any]] = {}

    def event(self) -> None:
        """A policy comes, changes or goes; a pod's labels change; or what was held is let go."""
        source, what = self.source, self.source.random()
        if what < 0.65:
            name = source.choice(("x", "y"))
            if name in self.policies and source.random() < 0.3:
                del self.policies[name]
            else:
                self.policies[name] = _policy(source, name)
        if 0.65 <= what < 0.8 or (self._hasty and what < 0.25):
            source.choice(self.pods)["metadata"]["labels"] = _labels(source)
        self.follow(what < 0.65, what < 0.8)

    def follow(self, policies: bool, hold: bool = True) -> None:
        """What is written now is published. `policies`: are they others? `hold`: of numbers."""
        text = yaml.dump_all([*self.pods, *self.policies.values()])
        before, whole = self.world, not self.begins or self.whole[-1][1] == len(self.begins) - 1
        hold = hold or not whole
        now, _ = build(documents(text), Options(nodes=2), before, hold)
        reason = self._hasty and (policies or not hold or not whole)
        waiting = self._relabels.waiting(before.pods, now.pods, reason, 0.0)
        if self._publish(with_labels(now, waiting), not hold) and waiting:
            self._publish(now, not hold)

    def _publish(self, now: MadeWorld, merges: bool) -> bool:
        """Is it written whole?"""
        self.world, number = now, len(self.begins)
        self._ledger = identities.allocate(now, self._ledger)
        self.begins.append(len(self.log.writes))
        if merges:
            self.merges.append(len(self.log.writes))
        self.truths.append(_truth(now))
        desired, whole = self._compiler.compile(now, self._ledger), False
        while not whole:
            with contextlib.suppress(PublishError):
                self._publisher.publish(desired, self._ledger)
                whole = True
            if not whole and self._hasty and self.source.random() < 0.5:
                return False
        self.whole.append((len(self.log.writes), number))
        if merges:
            self.merges.append(len(self.log.writes))
        return True


def _interfaces(world: MadeWorld) -> dict[str, LocalInterface]:
    pods = [pod for pod in world.pods.values() if pod.node == NODE]
    return {
        pod.uid: LocalInterface(
            uid=pod.uid, namespace=pod.namespace, name=pod.name, ifname=f"v{n}", ifindex=10 + n,
            pod_mac=f"02:00:00:00:00:{n:02x}", host_mac=f"02:00:00:00:01:{n:02x}",
            addresses=list(pod.addresses),
        )
        for n, pod in enumerate(pods)
    }  # fmt: skip


SEEDS = 24
CAMPAIGN = range(2000) if SOAK else range(SEEDS, SEEDS + 3)
NEAR = (1, 1, 2, 5, 20, 60)
FAR = (*NEAR, 100, 200)
"""How many writes the reader is behind when it reads again; an event is some twenty."""
FOUND = [(seed, refuses) for seed in (191, 227, 241) for refuses in (0, 2)]
"""A node that reads a policy and other labels of a pod at once."""
ROWS = [
    *((seed, 0, False) for seed in range(SEEDS)),
    *((seed, 2, False) for seed in (*range(12), 44, 57)),
    *((seed, refuses, False) for seed, refuses in FOUND),
    *((seed, refuses, True) for seed in range(8) for refuses in (0, 2, 3)),
]


@pytest.mark.parametrize(("seed", "refuses", "hasty"), ROWS)
def test_no_state_in_between_is_seen(seed: int, refuses: int, hasty: bool) -> None:
    _run(seed, refuses, hasty)


@pytest.mark.slow
@pytest.mark.parametrize("hasty", [False, True])
@pytest.mark.parametrize("refuses", [0, 2, 3])
def test_no_state_in_between_is_seen_of_many(refuses: int, hasty: bool) -> None:
    for seed in CAMPAIGN:
        _run(seed, refuses, hasty)


def test_labels_and_a_policy_that_change_at_once() -> None:
    """Pods of two numbers get one that nobody had: what a policy that goes says of the two differs,
    so of the one it can say only what is true of neither."""
    town = Town(0, hasty=True)
    town.pods = [
        _pod(name, "default", {"app": name, "tier": "a"} if name == "b" else {"app": name})
        for name in ("a", "b", "c")
    ]
    # a is on the reader's node, b on the other, and c becomes one with b.
    for tier in ({}, {"tier": "a"}):
        peers = [{"app": "b", **tier}, {"app": "c"}]
        town.policies["x"] = _from("a", *peers)
        if tier:
            town.pods[2]["metadata"]["labels"] = {"app": "b", "tier": "a"}
        town.follow(True)
    assert _read(town, 0, strides=(1,)) == 2


def _from(subject: str, *peers: dict[str, str]) -> dict[str, Any]:
    rules = [{"from": [{"podSelector": {"matchLabels": labels}}]} for labels in peers]
    spec = {"podSelector": {"matchLabels": {"app": subject}}, "ingress": rules}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": "x", "namespace": "default"}, "spec": spec}  # fmt: skip


def _run(seed: int, refuses: int, hasty: bool) -> None:
    town = Town(seed, refuses, hasty)
    for _ in range(12):
        town.event()
    assert _read(town, seed, FAR if hasty else NEAR)


def _read(town: Town, seed: int, strides: Sequence[int]) -> int:
    """The last event that the reader has whole. FAR ones are any; else it is never further behind
    than two events, nor than what is let go."""
    reader = Reader()
    source, at, had = random.Random(~seed), 0, 0
    interfaces = _interfaces(town.world)
    while at < len(town.log.writes):
        later = [*(begin for begin in town.begins if begin > at), len(town.log.writes)]
        ends = [] if strides is FAR else [*(end for end in town.merges if end > at), *later[1:2]]
        to = min(*ends, later[-1], at + source.choice(strides))
        for path, item in town.log.writes[at:to]:
            if item is None:
                reader.objects.pop(path, None)
            else:
                reader.objects[path] = item
        at = to
        state = reader.state()
        if state is None:
            continue
        now = max(n for n, begin in enumerate(town.begins) if begin < at)
        between = town.truths[had : now + 1]
        first = reader.actual.node_table is None
        for step in plan.plan(maps.build(state, interfaces), reader.actual).steps:
            reader.execute(step)
            if first:
                continue  # nothing was enforced: addresses come after the policies
            for pair, verdict in reader.verdicts(town.world.pods.values()).items():
                said = {truth[pair] for truth in between}
                assert verdict in said, (seed, at, had, now, pair, step)
        had = max((n for end, n in town.whole if end <= at), default=0)
    return had
