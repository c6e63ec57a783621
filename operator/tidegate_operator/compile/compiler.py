"""The compiler: one pass over the world with caches of what each part came to.

Every cache holds, beside its result, the very objects it was made from, and is used only
while they are the same ones; entries that a pass did not use are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from msgspec import UNSET
from tidegate_api.state import (
    Endpoint,
    HostPort,
    IPCacheEntry,
    PeerSet,
    Reserved,
    RuleSet,
    ServicePort,
)

from tidegate_operator import changes
from tidegate_operator.compile.peers import PeerSets
from tidegate_operator.compile.rules import (
    MAX_RULE_SET_BYTES,
    Compiled,
    Inexpressible,
    UsedSet,
    asks_for_ports,
    compile_rules,
    inexpressible,
    used_sets,
)
from tidegate_operator.compile.services import ServiceTable
from tidegate_operator.compile.used import Subject, Used
from tidegate_operator.identities import Ledger
from tidegate_operator.objects import (
    Direction,
    IdentityKey,
    NamedPortPeer,
    ObjectName,
    Picked,
    Pod,
    Policy,
    PolicyName,
    Protocol,
    World,
)
from tidegate_operator.problems import Problem, Source, at
from tidegate_operator.relevance import port_label


@dataclass(frozen=True)
class NodeContent:
    """What one node enforces, before publish adds the tables' revisions."""

    endpoints: list[Endpoint]
    rule_sets: list[str]
    peer_sets: list[str]
    uid: str = ""
    """Of the Node that the state belongs to; "" where nodes are no objects."""
    zone: str = ""
    """"" also where no Service asks for it."""
    port_addresses: tuple[str, ...] = ()
    """Those that answer for NodePorts and host ports; () also where there is no such port."""
    masquerade: tuple[str, ...] | None = None
    """Networks outside to which its pods keep their addresses; None: they always do."""


@dataclass(frozen=True)
class Desired:
    """The whole desired state. Keys are those that shards are cut by: a name, a CIDR,
    "namespace/name"; every dict but `ipcache` is in sorted order of its keys."""

    rule_sets: dict[str, RuleSet]
    nodes: dict[str, NodeContent]
    ipcache: dict[str, IPCacheEntry]
    services: dict[str, list[ServicePort]]
    peers: dict[str, PeerSet]
    problems: tuple[Problem, ...]


def compile(world: World, ledger: Ledger) -> Desired:
    """Desired state of `world` with the numbers of `ledger`, which must have been
    allocated for it (KeyError otherwise)."""
    return Compiler().compile(world, ledger)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is said about one policy, whatever the world."""

    policy: Policy
    inexpressible: tuple[Inexpressible, ...]
    sets: tuple[UsedSet, ...]


class _Said(NamedTuple):
    """What is wrong with one policy, and what that follows from."""

    facts: _Facts
    about: tuple[Source, tuple[UsedSet, ...], bool, tuple[str, ...], int]
    problems: tuple[Problem, ...]


_PodCache = tuple[Pod, int, Subject, Endpoint, tuple[IPCacheEntry, ...]]
_RuleSetKey = tuple[Direction, tuple[int, ...], tuple[tuple[tuple[Protocol, str], int], ...]]


@dataclass
class _Running:
    """What a pass adds up over pods, so that the next one needs to look only at those that
    changed. Of pods in the host's network only `everybody` knows."""

    everybody: dict[IdentityKey, int]
    """Pods of each identity."""
    subjects: dict[IdentityKey, set[ObjectName]]
    """Their pods; the host's network apart."""
    by_node: dict[str, dict[ObjectName, _PodCache]]
    entries: dict[str, IPCacheEntry]
    nodes: dict[str, NodeContent]
    ported: dict[str, tuple[NodeContent, bool]]
    """Whether a pod of the node has host ports."""
    on_host: set[ObjectName]


@dataclass(frozen=True)
class _Pass:
    """What the last pass was given and came to."""

    world: World
    ledger: Ledger
    problems: tuple[Problem, ...]
    versions: tuple[int, int, int]
    """Of which peer sets are empty, of which policies select somebody, and of what services'
    conflicts say."""


class Compiler:
    """`compile` for a world that changes: same result, cost of the change.

    It looks at those pods that are other objects than before, and at those for whose identity
    the policies come to another rule set. Only numbers that changed make it look at all."""

    def __init__(self) -> None:
        self._peers = PeerSets()
        self._used_peers: dict[str, Picked] = {}
        self._candidates: dict[str, tuple[Policy, ...]] = {}
        self._across = False
        """Whether some policy has its subjects in the namespaces of a selector."""
        self._subjects: dict[IdentityKey, Subject] = {}
        self._rule_sets: dict[_RuleSetKey, Compiled] = {}
        self._pods: dict[ObjectName, _PodCache] = {}
        self._services = ServiceTable()
        self._facts: dict[PolicyName, _Facts] = {}
        self._said: dict[PolicyName, _Said] = {}
        self._running = _Running({}, {}, {}, {}, {}, {}, set())
        self._used = Used()
        self._last: _Pass | None = None

    def compile(self, world: World, ledger: Ledger) -> Desired:
        last, self._last = self._last, None  # an error half-way makes the next pass a whole one
        if last is not None and (
            _renumbered(last.ledger, ledger)
            or (self._across and last.world.namespaces != world.namespaces)
        ):
            last = None
        old = last.world.pods if last is not None else {}
        changed, gone = changes.both(old, world.pods)
        edited = last is not None and not _identical(last.world.policies, world.policies)
        if last is None:
            self._start(world)
        elif edited:
            again = self._new_policies(world) - set(changed) - set(gone)
            changed = [*changed, *again]
        touched, on_host = self._count(world, old, changed, gone)
        if last is not None:
            self._new_subjects(world, old, changed, gone)
        keys: Iterable[IdentityKey]
        if last is None or edited:
            keys = {**self._used.subjects, **self._running.subjects}
        else:
            keys = {old[name].identity for name in (*gone, *changed) if name in old}
            keys |= {world.pods[name].identity for name in changed}
        self._used.follow(keys, self._running.subjects, self._subjects)
        self._peers.update(
            self._used_peers, ledger.live, world.namespaces, world.identities, world.nodes
        )
        self._pods_of(world, ledger, changed, gone)
        rule_sets, peers = self._used.in_force()
        services = self._update_services(world)
        if (
            last is None
            or edited
            or on_host
            or last.versions != (self._peers.emptied, self._used.said, services.version)
            or last.world.sources != world.sources
        ):
            problems = (*self._problems(world), *services.problems(world.sources))
        else:
            problems = last.problems
        versions = (self._peers.emptied, self._used.said, services.version)
        self._last = _Pass(world, ledger, problems, versions)
        return Desired(
            rule_sets=rule_sets,
            nodes=self._nodes(world, None if last is None else touched),
            ipcache=self._ipcache(world, ledger),
            services=services.entries,
            peers={name: self._peers.published(name) for name in peers},
            problems=problems,
        )

    def _start(self, world: World) -> None:
        """A pass over everything."""
        self._candidates = self._policies_by_namespace(world)
        self._subjects = self._all_subjects(world)
        self._drop_rule_sets()
        self._take_facts(world)
        self._running = _Running({}, {}, {}, {}, {}, {}, set())
        self._pods = {name: held for name, held in self._pods.items() if name in world.pods}

    def _new_policies(self, world: World) -> set[ObjectName]:
        """Other policies than before. The pods that had a place before and whose rule sets are
        others now."""
        before = self._candidates
        self._candidates = self._policies_by_namespace(world)
        self._take_facts(world)
        affected = {
            name
            for name in before.keys() | self._candidates.keys()
            if before.get(name) is not self._candidates.get(name)
        }
        again: set[ObjectName] = set()
        for key in [key for key in self._subjects if key.namespace in affected]:
            held = self._subjects[key]
            now = self._subject(key, self._candidates.get(key.namespace, ()), held)
            self._subjects[key] = now
            if now.ingress is not held.ingress or now.egress is not held.egress:
                again |= self._running.subjects.get(key, set())
        self._drop_rule_sets()
        return again

    def _take_facts(self, world: World) -> None:
        self._facts = self._all_facts(world)
        self._used_peers = {
            used.name: used.peer for facts in self._facts.values() for used in facts.sets
        }

    def _count(
        self,
        world: World,
        old: Mapping[ObjectName, Pod],
        changed: Iterable[ObjectName],
        gone: Iterable[ObjectName],
    ) -> tuple[set[str], bool]:
        """Take pods that changed out of the sums and put them in again as they are now: all out
        first, as one may have what another had. The nodes whose pods changed; and whether pods
        in the host's network did."""
        running = self._running
        touched: set[str] = set()
        on_host = False
        for name in (*gone, *changed):
            pod = old.get(name)
            if pod is None:
                continue
            _less(running.everybody, pod.identity)
            if pod.host_network:
                running.on_host.discard(name)
                on_host = True
                continue
            own = running.subjects[pod.identity]
            own.remove(name)
            if not own:
                del running.subjects[pod.identity]
            touched.add(pod.node)
            held = running.by_node[pod.node].pop(name)
            for entry in held[4]:
                running.entries.pop(entry.cidr, None)
        for name in changed:
            pod = world.pods[name]
            _more(running.everybody, pod.identity)
            if pod.host_network:
                running.on_host.add(name)
                on_host = True
            else:
                running.subjects.setdefault(pod.identity, set()).add(name)
                touched.add(pod.node)
        return touched, on_host

    def _new_subjects(
        self,
        world: World,
        old: Mapping[ObjectName, Pod],
        changed: Iterable[ObjectName],
        gone: Iterable[ObjectName],
    ) -> None:
        """Those that pods came with; and without those whose last pod went."""
        for name in changed:
            key = world.pods[name].identity
            if key not in self._subjects:
                candidates = self._candidates.get(key.namespace, ())
                self._subjects[key] = self._subject(key, candidates, None)
        lost = {old[name].identity for name in (*changed, *gone) if name in old}
        lost = {key for key in lost if key not in self._running.everybody}
        for key in lost:
            del self._subjects[key]
        if lost:
            self._drop_rule_sets()

    def _pods_of(
        self,
        world: World,
        ledger: Ledger,
        changed: Iterable[ObjectName],
        gone: Iterable[ObjectName],
    ) -> None:
        running = self._running
        for name in gone:
            self._pods.pop(name, None)
        for name in changed:
            pod = world.pods[name]
            if pod.host_network:
                self._pods.pop(name, None)
                continue
            held = self._pod(name, pod, ledger.live[pod.identity])
            self._pods[name] = held
            running.by_node.setdefault(pod.node, {})[name] = held
            for entry in held[4]:
                running.entries[entry.cidr] = entry

    # ---- subjects and their rule sets ----

    def _policies_by_namespace(self, world: World) -> dict[str, tuple[Policy, ...]]:
        found: dict[str, list[Policy]] = {}
        self._across = False
        for policy in world.policies.values():
            within = policy.subject.namespaces
            if within is None:
                found.setdefault(policy.subject.namespace or "", []).append(policy)
                continue
            self._across = True
            for name, labels in world.namespaces.items():
                if within.matches(labels):
                    found.setdefault(name, []).append(policy)
        return {
            name: before if _same(before := self._candidates.get(name, ()), now) else tuple(now)
            for name, now in found.items()
        }

    def _all_subjects(self, world: World) -> dict[IdentityKey, Subject]:
        """Host-network pods too: for them only `selecting` is of use, to say so."""
        found: dict[IdentityKey, Subject] = {}
        for pod in world.pods.values():
            key = pod.identity
            if key in found:
                continue
            candidates = self._candidates.get(key.namespace, ())
            before = self._subjects.get(key)
            if before is not None and before.candidates is candidates:
                found[key] = before
            else:
                found[key] = self._subject(key, candidates, before)
        return found

    def _drop_rule_sets(self) -> None:
        used = {id(part) for subject in self._subjects.values() for part in subject.parts}
        for name in [name for name, part in self._rule_sets.items() if id(part) not in used]:
            del self._rule_sets[name]

    def _subject(
        self, key: IdentityKey, candidates: tuple[Policy, ...], before: Subject | None
    ) -> Subject:
        selecting = _selecting(key, candidates, before)
        ingress = self._rules("Ingress", selecting, key)
        egress = self._rules("Egress", selecting, key)
        parts = tuple(part for part in (ingress, egress) if part is not None)
        return Subject(candidates, selecting, ingress, egress, parts)

    def _rules(
        self, direction: Direction, selecting: tuple[Policy, ...], subject: IdentityKey
    ) -> Compiled | None:
        counting = tuple(policy for policy in selecting if policy.counts(direction))
        if not counting:
            return None
        # The result holds the policies, so no other object can take their ids.
        ports = _ports_of(subject, counting) if direction == "Ingress" else {}
        key = (direction, tuple(map(id, counting)), tuple(sorted(ports.items())))
        held = self._rule_sets.get(key)
        if held is None:
            held = self._rule_sets[key] = compile_rules(direction, counting, ports)
        return held

    # ---- what comes of each object ----

    def _pod(self, name: ObjectName, pod: Pod, number: int) -> _PodCache:
        subject = self._subjects[pod.identity]
        held = self._pods.get(name)
        if held is not None and held[0] is pod and held[1] == number and held[2] is subject:
            return held
        ingress, egress = subject.ingress, subject.egress
        endpoint = Endpoint(
            uid=pod.uid,
            namespace=pod.namespace,
            name=pod.name,
            identity=number,
            addresses=list(pod.addresses),
            ingress=ingress.name if ingress is not None else UNSET,
            egress=egress.name if egress is not None else UNSET,
            host_ports=[
                HostPort(
                    port=one.port,
                    protocol=one.protocol,
                    target=one.target,
                    address=one.address or UNSET,
                )
                for one in pod.host_ports
            ]
            or UNSET,
        )
        entries = tuple(
            IPCacheEntry(cidr=_host(address), identity=number, node=pod.node)
            for address in pod.addresses
        )
        if held is not None and held[4] == entries:
            entries = held[4]
        return pod, number, subject, endpoint, entries

    # ---- the whole ----

    def _update_services(self, world: World) -> ServiceTable:
        table, self._services = self._services, ServiceTable()  # as `_last`
        table.update(world.services, world.endpoints)
        self._services = table
        return table

    def _nodes(self, world: World, touched: set[str] | None) -> dict[str, NodeContent]:
        """Anew for `touched`, None: for all."""
        before = self._running.nodes
        found = {}
        for name, node in world.nodes.items():
            held = before.get(name)
            if held is None or touched is None or name in touched or held.uid != node.uid:
                held = self._node(name, node.uid)
            zone = node.zone if self._services.asks_zones else ""
            ported = self._services.asks_node_ports or self._has_host_ports(name, held)
            addresses = node.port_addresses if ported else ()
            own = (zone, addresses, node.masquerade)
            if (held.zone, held.port_addresses, held.masquerade) != own:
                held = replace(
                    held, zone=zone, port_addresses=addresses, masquerade=node.masquerade
                )
            found[name] = held
        self._running.nodes = found
        return found

    def _has_host_ports(self, name: str, content: NodeContent) -> bool:
        known = self._running.ported.get(name)
        if known is None or known[0].endpoints is not content.endpoints:
            asked = any(endpoint.host_ports is not UNSET for endpoint in content.endpoints)
            known = self._running.ported[name] = (content, asked)
        return known[1]

    def _node(self, name: str, uid: str) -> NodeContent:
        pods = [held for _, held in sorted(self._running.by_node.get(name, {}).items())]
        used = {id(part): part for held in pods for part in held[2].parts}
        return NodeContent(
            endpoints=[held[3] for held in pods],
            rule_sets=sorted({part.name for part in used.values()}),
            peer_sets=sorted({peer for part in used.values() for peer in part.peers}),
            uid=uid,
        )

    def _ipcache(self, world: World, ledger: Ledger) -> dict[str, IPCacheEntry]:
        """Later ones win: a user's CIDR never takes a pod's or a node's address, and a node
        that serves the API is known as that."""
        found: dict[str, IPCacheEntry] = {}
        for identity in world.identities.values():
            for cidr in identity.key.cidrs:
                found[cidr] = IPCacheEntry(cidr=cidr, identity=ledger.live[identity.key])
        for cidr in world.pod_cidrs:
            found[cidr] = IPCacheEntry(cidr=cidr, identity=int(Reserved.UNKNOWN))
        for node in world.nodes.values():
            for address in node.addresses + node.gateways:
                cidr = _host(address)
                number = int(Reserved.REMOTE_NODE)
                found[cidr] = IPCacheEntry(cidr=cidr, identity=number, node=node.name)
        for address in world.apiservers:
            cidr, number = _host(address), int(Reserved.KUBE_APISERVER)
            owner = found[cidr].node if cidr in found else UNSET
            found[cidr] = IPCacheEntry(cidr=cidr, identity=number, node=owner)
        whole = self._running.entries.copy()  # many; the rest is few
        for cidr, entry in found.items():
            whole.setdefault(cidr, entry)
        return whole

    # ---- what people should know ----

    def _all_facts(self, world: World) -> dict[PolicyName, _Facts]:
        found = {}
        for name, policy in world.policies.items():
            held = self._facts.get(name)
            if held is None or held.policy is not policy:
                held = _Facts(policy, inexpressible(policy), used_sets(policy))
            found[name] = held
        return found

    def _problems(self, world: World) -> list[Problem]:
        selecting, refused = self._used.policies, self._used.refused()
        on_host: dict[PolicyName, list[str]] = {}
        for pod in sorted(self._running.on_host):
            for policy in self._subjects[world.pods[pod].identity].selecting:
                on_host.setdefault(policy.name, []).append(str(pod))
        said, self._said = self._said, {}
        for name, facts in self._facts.items():
            source = world.sources.get((name.kind, name.namespace, name.name), Source())
            empty = tuple(used for used in facts.sets if self._peers.is_empty(used.name))
            pods = tuple(on_host.get(name, ()))
            about = (source, empty, name in selecting, pods, refused.get(name, 0))
            held = said.get(name)
            if held is None or held.facts is not facts or held.about != about:
                held = _Said(facts, about, _say(facts, *about))
            self._said[name] = held
        return [problem for held in self._said.values() for problem in held.problems]


def _subject_field(name: PolicyName) -> str:
    """Where a policy of that kind says whom it selects."""
    return "spec.podSelector" if name.kind == "NetworkPolicy" else "spec.subject"


def _warning(name: PolicyName, source: Source, field: str, message: str) -> Problem:
    return at(
        source,
        "warning",
        message,
        object=str(name),
        field=field,
        remedy="compare the selector with the labels of pods and namespaces",
    )


def _say(
    facts: _Facts,
    source: Source,
    empty: tuple[UsedSet, ...],
    selects: bool,
    on_host: tuple[str, ...],
    size: int,
) -> tuple[Problem, ...]:
    """`empty`: peers that nobody is now; `on_host`: pods it selects that
    are in the host's network; `size`: of a rule set that is refused, or 0."""
    name = facts.policy.name
    problems = [
        at(
            source,
            "error",
            part.message,
            object=str(name),
            field=part.field,
            remedy=part.remedy,
        )
        for part in facts.inexpressible
    ]
    if size:
        problems.append(_too_large(name, source, size))
    problems += [_warning(name, source, used.field, _nobody(used)) for used in empty]
    if not selects:
        problems.append(_warning(name, source, _subject_field(name), "selects no pod now"))
    if on_host:
        text = f"selects host-network pods, which no policy protects: {on_host[0]}"
        text += f" and {len(on_host) - 1} more" if len(on_host) > 1 else ""
        problems.append(_warning(name, source, _subject_field(name), text))
    return tuple(problems)


def _too_large(name: PolicyName, source: Source, size: int) -> Problem:
    return at(
        source,
        "error",
        f"the rules for one of its pods take {size} bytes, more than the {MAX_RULE_SET_BYTES} of a "
        "rule set: the pod is denied everything",
        object=str(name),
        field="spec",
        remedy="join ports to ranges and networks to larger ones, or select pods by fewer policies",
    )


def _nobody(used: UsedSet) -> str:
    if isinstance(used.peer, NamedPortPeer):
        return "no peer has a port of this name now"
    return "selects no peer now"


def _ports_of(subject: IdentityKey, policies: Iterable[Policy]) -> dict[tuple[Protocol, str], int]:
    """Those of the subject's own named ports that ingress rules ask for."""
    labels = dict(subject.labels)
    asked = asks_for_ports(policies)
    return {name: int(text) for name in asked if (text := labels.get(port_label(*name)))}


def _selecting(
    key: IdentityKey, candidates: tuple[Policy, ...], before: Subject | None
) -> tuple[Policy, ...]:
    """Which candidates select the identity; those that were asked before are not again."""
    asked = {id(policy) for policy in before.candidates} if before is not None else set()
    yes = {id(policy) for policy in before.selecting} if before is not None else set()
    labels = dict(key.labels)
    return tuple(
        policy
        for policy in candidates
        if (id(policy) in yes if id(policy) in asked else policy.subject.pods.matches(labels))
    )


def _more(count: dict[IdentityKey, int], key: IdentityKey) -> None:
    count[key] = count.get(key, 0) + 1


def _less(count: dict[IdentityKey, int], key: IdentityKey) -> None:
    count[key] -= 1
    if not count[key]:
        del count[key]


def _identical(one: Mapping[PolicyName, Policy], other: Mapping[PolicyName, Policy]) -> bool:
    return one is other or (
        len(one) == len(other) and all(other.get(name) is item for name, item in one.items())
    )


def _renumbered(before: Ledger, now: Ledger) -> bool:
    """Has a key that had a number another one now?"""
    return before is not now and any(
        now.live.get(key, number) != number for key, number in before.live.items()
    )


def _same(before: tuple[Policy, ...], now: list[Policy]) -> bool:
    return len(before) == len(now) and all(
        one is other for one, other in zip(before, now, strict=True)
    )


def _host(address: str) -> str:
    return f"{address}/128" if ":" in address else f"{address}/32"
