"""The compiler: one pass over the world with caches of what each part came to.

Every cache holds, beside its result, the very objects it was made from, and is used only
while they are the same ones; entries that a pass did not use are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import UNSET
from tidegate_api.state import (
    Backend,
    Endpoint,
    Frontend,
    IPCacheEntry,
    PeerSet,
    Reserved,
    RuleSet,
    ServicePort,
)

from tidegate_operator.compile.peers import PeerSets
from tidegate_operator.compile.rules import (
    Compiled,
    Inexpressible,
    compile_rules,
    inexpressible,
    peer_fields,
)
from tidegate_operator.identities import Ledger
from tidegate_operator.objects import (
    Direction,
    Endpoints,
    IdentityKey,
    ObjectName,
    Pod,
    PodPeer,
    Policy,
    Service,
    World,
)
from tidegate_operator.problems import Problem, Source, at


@dataclass(frozen=True)
class NodeContent:
    """What one node enforces, before publish adds the tables' revisions."""

    endpoints: list[Endpoint]
    rule_sets: list[str]
    peer_sets: list[str]
    uid: str = ""
    """Of the Node that the state belongs to; "" where nodes are no objects."""


@dataclass(frozen=True)
class Desired:
    """The whole desired state. Keys are those that shards are cut by: a name, a CIDR,
    "namespace/name"; every dict is in sorted order of its keys."""

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
class _Subject:
    """What an identity is subject to: `candidates` are the policies of its namespace,
    `selecting` those of them that select it."""

    candidates: tuple[Policy, ...]
    selecting: tuple[Policy, ...]
    ingress: Compiled | None
    egress: Compiled | None
    parts: tuple[Compiled, ...]
    """Those of the two that there are."""


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is said about one policy, whatever the world."""

    policy: Policy
    inexpressible: tuple[Inexpressible, ...]
    peers: tuple[tuple[str, str, PodPeer], ...]
    """(field, name of the set, selector)"""


_PodCache = tuple[Pod, int, _Subject, Endpoint, tuple[IPCacheEntry, ...]]
_ServiceCache = tuple[Service, Endpoints, list[ServicePort]]
_RuleSetKey = tuple[Direction, tuple[int, ...]]


class Compiler:
    """`compile` for a world that changes: same result, cost of the change."""

    def __init__(self) -> None:
        self._peers = PeerSets()
        self._candidates: dict[str, tuple[Policy, ...]] = {}
        self._subjects: dict[IdentityKey, _Subject] = {}
        self._rule_sets: dict[_RuleSetKey, Compiled] = {}
        self._pods: dict[ObjectName, _PodCache] = {}
        self._services: dict[ObjectName, _ServiceCache] = {}
        self._facts: dict[ObjectName, _Facts] = {}

    def compile(self, world: World, ledger: Ledger) -> Desired:
        self._candidates = self._policies_by_namespace(world)
        self._subjects = self._all_subjects(world)
        self._facts = self._all_facts(world)
        used = {name: peer for facts in self._facts.values() for _, name, peer in facts.peers}
        self._peers.update(used, ledger.live, world.namespaces)
        self._pods = {
            name: self._pod(name, pod, ledger.live[pod.identity])
            for name, pod in world.pods.items()
            if not pod.host_network
        }
        self._services = {
            name: self._service(name, service, world.endpoints[name])
            for name, service in world.services.items()
        }
        rule_sets, peers = self._in_force()
        return Desired(
            rule_sets=rule_sets,
            nodes=self._nodes(world),
            ipcache=self._ipcache(world, ledger),
            services={str(name): ports for name, (_, _, ports) in self._services.items() if ports},
            peers=peers,
            problems=tuple(self._problems(world)),
        )

    # ---- subjects and their rule sets ----

    def _policies_by_namespace(self, world: World) -> dict[str, tuple[Policy, ...]]:
        found: dict[str, list[Policy]] = {}
        for policy in world.policies.values():
            found.setdefault(policy.name.namespace, []).append(policy)
        return {
            name: before if _same(before := self._candidates.get(name, ()), now) else tuple(now)
            for name, now in found.items()
        }

    def _all_subjects(self, world: World) -> dict[IdentityKey, _Subject]:
        """Host-network pods too: for them only `selecting` is of use, to say so."""
        found: dict[IdentityKey, _Subject] = {}
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
        used = {id(part) for subject in found.values() for part in subject.parts}
        for name in [name for name, part in self._rule_sets.items() if id(part) not in used]:
            del self._rule_sets[name]
        return found

    def _subject(
        self, key: IdentityKey, candidates: tuple[Policy, ...], before: _Subject | None
    ) -> _Subject:
        selecting = _selecting(key, candidates, before)
        ingress = self._rules("Ingress", selecting)
        egress = self._rules("Egress", selecting)
        parts = tuple(part for part in (ingress, egress) if part is not None)
        return _Subject(candidates, selecting, ingress, egress, parts)

    def _rules(self, direction: Direction, selecting: tuple[Policy, ...]) -> Compiled | None:
        isolating = tuple(policy for policy in selecting if policy.rules(direction) is not None)
        if not isolating:
            return None
        # The result holds the policies, so no other object can take their ids.
        key = (direction, tuple(map(id, isolating)))
        held = self._rule_sets.get(key)
        if held is None:
            held = self._rule_sets[key] = compile_rules(direction, isolating)
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
        )
        entries = tuple(
            IPCacheEntry(cidr=_host(address), identity=number, node=pod.node)
            for address in pod.addresses
        )
        if held is not None and held[4] == entries:
            entries = held[4]
        return pod, number, subject, endpoint, entries

    def _service(self, name: ObjectName, service: Service, endpoints: Endpoints) -> _ServiceCache:
        held = self._services.get(name)
        if held is not None and held[0] is service and held[1] is endpoints:
            return held
        names = {(port.port, port.protocol): port.name for port in service.ports}
        address_of = {6 if ":" in address else 4: address for address in service.cluster_ips}
        ports = [
            ServicePort(
                namespace=name.namespace,
                name=name.name,
                type=service.type,
                frontends=[
                    Frontend(
                        address=address_of[port.family],
                        port=port.port,
                        protocol=port.protocol,
                        port_name=names[port.port, port.protocol],
                    )
                ],
                backends=[
                    Backend(address=address, port=number) for address, number in port.backends
                ],
            )
            for port in endpoints.ports
        ]
        ports.sort(
            key=lambda port: (
                port.frontends[0].address,
                port.frontends[0].port,
                port.frontends[0].protocol,
            )
        )
        return service, endpoints, ports

    # ---- the whole ----

    def _in_force(self) -> tuple[dict[str, RuleSet], dict[str, PeerSet]]:
        used = {
            id(part): part for _, _, subject, _, _ in self._pods.values() for part in subject.parts
        }
        rule_sets = {part.name: part.rule_set for part in used.values()}
        names = {name for part in used.values() for name in part.peers}
        peers = {name: self._peers.published(name) for name in sorted(names)}
        return dict(sorted(rule_sets.items())), peers

    def _nodes(self, world: World) -> dict[str, NodeContent]:
        endpoints: dict[str, list[Endpoint]] = {name: [] for name in world.nodes}
        used: dict[str, dict[int, Compiled]] = {name: {} for name in world.nodes}
        for pod, _, subject, endpoint, _ in self._pods.values():
            if pod.node not in endpoints:  # its node is gone, or not there yet
                continue
            endpoints[pod.node].append(endpoint)
            for part in subject.parts:
                used[pod.node][id(part)] = part
        return {
            name: NodeContent(
                endpoints=endpoints[name],
                rule_sets=sorted({part.name for part in used[name].values()}),
                peer_sets=sorted({peer for part in used[name].values() for peer in part.peers}),
                uid=node.uid,
            )
            for name, node in world.nodes.items()
        }

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
                found[cidr] = IPCacheEntry(cidr=cidr, identity=int(Reserved.REMOTE_NODE))
        for address in world.apiservers:
            cidr = _host(address)
            found[cidr] = IPCacheEntry(cidr=cidr, identity=int(Reserved.KUBE_APISERVER))
        for _, _, _, _, entries in self._pods.values():
            for entry in entries:
                found[entry.cidr] = entry
        return dict(sorted(found.items()))

    # ---- what people should know ----

    def _all_facts(self, world: World) -> dict[ObjectName, _Facts]:
        found = {}
        for name, policy in world.policies.items():
            held = self._facts.get(name)
            if held is None or held.policy is not policy:
                held = _Facts(policy, inexpressible(policy), peer_fields(policy))
            found[name] = held
        return found

    def _problems(self, world: World) -> list[Problem]:
        subjects = {id(held[2]): held[2] for held in self._pods.values()}
        selecting = {policy.name for item in subjects.values() for policy in item.selecting}
        on_host: dict[ObjectName, list[str]] = {}
        for name, pod in world.pods.items():
            if pod.host_network:
                for policy in self._subjects[pod.identity].selecting:
                    on_host.setdefault(policy.name, []).append(str(name))
        problems = []
        for name, facts in self._facts.items():
            source = world.sources.get(("NetworkPolicy", *name), Source())
            problems += _say(facts, source, self._peers)
            if name not in selecting:
                problems.append(_warning(name, source, "spec.podSelector", "selects no pod now"))
            if name in on_host:
                pods = on_host[name]
                text = f"selects host-network pods, which no policy protects: {pods[0]}"
                text += f" and {len(pods) - 1} more" if len(pods) > 1 else ""
                problems.append(_warning(name, source, "spec.podSelector", text))
        return problems


def _warning(name: ObjectName, source: Source, field: str, message: str) -> Problem:
    return at(
        source,
        "warning",
        message,
        object=f"NetworkPolicy {name}",
        field=field,
        remedy="compare the selector with the labels of pods and namespaces",
    )


def _say(facts: _Facts, source: Source, peers: PeerSets) -> list[Problem]:
    name = facts.policy.name
    problems = [
        at(
            source,
            "error",
            f"{part.what} is not yet expressible: this entry allows nothing",
            object=f"NetworkPolicy {name}",
            field=part.field,
            remedy="use single port numbers",
        )
        for part in facts.inexpressible
    ]
    problems += [
        _warning(name, source, field, "selects no peer now")
        for field, peer, _ in facts.peers
        if peers.is_empty(peer)
    ]
    return problems


def _selecting(
    key: IdentityKey, candidates: tuple[Policy, ...], before: _Subject | None
) -> tuple[Policy, ...]:
    """Which candidates select the identity; those that were asked before are not again."""
    asked = {id(policy) for policy in before.candidates} if before is not None else set()
    yes = {id(policy) for policy in before.selecting} if before is not None else set()
    labels = dict(key.labels)
    return tuple(
        policy
        for policy in candidates
        if (id(policy) in yes if id(policy) in asked else policy.pods.matches(labels))
    )


def _same(before: tuple[Policy, ...], now: list[Policy]) -> bool:
    return len(before) == len(now) and all(
        one is other for one, other in zip(before, now, strict=True)
    )


def _host(address: str) -> str:
    return f"{address}/128" if ":" in address else f"{address}/32"
