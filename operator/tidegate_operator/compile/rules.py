"""Policies of one subject -> its rule set, and what of them cannot be said."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from msgspec import UNSET
from msgspec.structs import replace
from tidegate_api import state
from tidegate_api.state import (
    FORMAT,
    AnyPeer,
    CIDRPeer,
    Peer,
    PolicyRef,
    Rule,
    RuleSet,
    RuleSetSpec,
    SetPeer,
    Term,
    encode,
    format_of_rules,
    rule_set,
)

from tidegate_operator.compile.peers import set_name
from tidegate_operator.compile.precedence import HIGHEST, in_force, isolating, precedences
from tidegate_operator.objects import (
    PROTOCOLS,
    Action,
    BlockPeer,
    Direction,
    EntityPeer,
    NamedPortPeer,
    Picked,
    PodPeer,
    Policy,
    PolicyPeer,
    PolicyPort,
    PolicyRule,
    Protocol,
    named_port_peers,
)

DIRECTIONS: tuple[Direction, Direction] = ("Ingress", "Egress")


class _Match(NamedTuple):
    """What a term matches, and the order of terms. "" and 0: any; `icmp_*` -1: any."""

    kind: str
    peer: str
    excepts: tuple[str, ...]
    protocol: str
    port: int
    end_port: int = 0
    port_name: str = ""
    icmp_type: int = -1
    icmp_code: int = -1


class _Key(NamedTuple):
    """What makes two terms the same."""

    match: _Match
    precedence: int
    action: Action
    audit: bool


@dataclass(frozen=True)
class Compiled:
    """A rule set, the peer sets it names, and the policies it is made of."""

    rule_set: RuleSet
    peers: tuple[str, ...]
    policies: tuple[Policy, ...]
    refused: int = 0
    """Bytes that it would have, where that is more than MAX_RULE_SET_BYTES: it then denies
    everything."""

    @property
    def name(self) -> str:
        return self.rule_set.metadata.name


Ports = Mapping[tuple[Protocol, str], int]
"""The subject's own named ports: (protocol, name) -> number."""
MAX_RULE_SET_BYTES = 1_500_000
"""Of one rule set's spec: what an API server can store, less what surrounds it. 10,000 terms and
more, depending on what they say."""
NO_PORTS: Ports = MappingProxyType({})


@dataclass(frozen=True)
class Inexpressible:
    """A part of a rule that matches nothing; `field` is its path in the policy."""

    field: str
    message: str
    remedy: str


def compile_rules(
    direction: Direction, policies: tuple[Policy, ...], ports: Ports = NO_PORTS
) -> Compiled:
    """The rule set of a subject of exactly `policies`, each of which counts in `direction`.
    `ports`: of the subject, those that the policies' ingress rules name."""
    having = in_force(policies, direction)
    ranks = precedences(having, direction)
    isolate = [policy for policy in having if isolating(policy, direction)]
    others = [policy for policy in having if not isolating(policy, direction)]
    first: dict[_Key, tuple[int, int]] = {}
    logged: set[tuple[int, int]] = set()
    for number, policy in enumerate((*isolate, *others)):
        for index, rule in enumerate(policy.rules(direction)):
            if rule.log:
                logged.add((number, index))
            precedence = ranks[policy.name, index]
            for match in _matches(direction, rule, ports):
                # Visited in order of (policy, rule): the lowest rule stays.
                key = _Key(match, precedence, rule.action, policy.audit)
                first.setdefault(key, (number, index))
    places = sorted(set(first.values()))
    position = {place: index for index, place in enumerate(places)}
    terms = [_term(key, position[first[key]]) for key in sorted(first)]
    spec = RuleSetSpec(
        format=FORMAT,
        direction=direction,
        policies=[PolicyRef(**policy.name._asdict()) for policy in isolate],
        others=[PolicyRef(**policy.name._asdict()) for policy in others],
        audited=[
            number
            for number, policy in enumerate(others)
            if policy.audit and direction in policy.isolates
        ],
        rules=[
            Rule(policy=number, index=index, log=(number, index) in logged)
            for number, index in places
        ],
        terms=terms,
    )
    spec = replace(spec, format=format_of_rules(spec))
    size = len(encode(spec))
    if size > MAX_RULE_SET_BYTES:
        return Compiled(rule_set(_closed(spec)), (), policies, size)
    named = {term.peer.name for term in terms if isinstance(term.peer, SetPeer)}
    return Compiled(rule_set(spec), tuple(sorted(named)), policies)


def _closed(spec: RuleSetSpec) -> RuleSetSpec:
    """Instead of one that is too large to be published: nothing is allowed, and the rest of the
    cluster goes on."""
    deny = Term(peer=AnyPeer(), action="Deny", precedence=HIGHEST, rule=0)
    return replace(spec, rules=spec.rules[:1], terms=[deny])


def _matches(direction: Direction, rule: PolicyRule, ports: Ports) -> Iterator[_Match]:
    named = named_port_peers(rule.peers)
    for place, peer in enumerate(rule.peers if rule.peers is not None else (None,)):
        start = _Match(*_peer(peer), "", 0)
        if rule.ports is None:
            yield start
            continue
        for port in rule.ports:
            if not isinstance(port.port, str):
                yield _numbered(start, port)
            elif direction == "Ingress":
                for protocol in _protocols(port):
                    number = ports.get((protocol, port.port))
                    if number is not None:
                        yield start._replace(protocol=protocol, port=number)
            elif (peers := _port_set(named[place], port)) is not None:
                name, wanted = set_name(peers), port.protocol or ""
                yield _Match("set", name, (), wanted, 0, port_name=port.port)


def _numbered(start: _Match, port: PolicyPort) -> _Match:
    assert not isinstance(port.port, str)
    return start._replace(
        protocol=port.protocol or "",
        port=port.port or 0,
        end_port=port.end_port or 0,
        icmp_type=-1 if port.icmp_type is None else port.icmp_type,
        icmp_code=-1 if port.icmp_code is None else port.icmp_code,
    )


def _protocols(port: PolicyPort) -> Iterator[Protocol]:
    for protocol in PROTOCOLS:
        if port.protocol in (None, protocol):
            yield protocol


def _peer(peer: PolicyPeer | None) -> tuple[str, str, tuple[str, ...]]:
    """Kind, peer and excepts of a match; None: of any peer."""
    match peer:
        case None:
            return "any", "", ()
        case BlockPeer():
            return "cidr", peer.cidr, peer.excepts
        case EntityPeer("host" | "remote-node" | "kube-apiserver"):
            return "entity", peer.entity, ()
        case _:
            return "set", set_name(peer), ()


def _term(key: _Key, rule: int) -> Term:
    match = key.match
    peer: Peer
    match match.kind:
        case "any":
            peer = AnyPeer()
        case "set":
            peer = SetPeer(name=match.peer)
        case "entity":
            peer = state.EntityPeer(entity=match.peer)  # type: ignore[arg-type]
        case _:
            peer = CIDRPeer(cidr=match.peer, excepts=list(match.excepts))
    return Term(
        peer=peer,
        action=key.action,
        precedence=key.precedence,
        rule=rule,
        protocol=match.protocol or UNSET,  # type: ignore[arg-type]
        port=match.port or UNSET,
        end_port=match.end_port if match.end_port > match.port else UNSET,
        port_name=match.port_name or UNSET,
        icmp_type=match.icmp_type if match.icmp_type >= 0 else UNSET,
        icmp_code=match.icmp_code if match.icmp_code >= 0 else UNSET,
        audit=key.audit,
    )


def asks_for_ports(policies: Iterable[Policy]) -> frozenset[tuple[Protocol, str]]:
    """The named ports of their subjects that ingress rules ask for."""
    return frozenset(
        name for policy in policies for rule in policy.ingress for name in rule.port_names
    )


def inexpressible(policy: Policy) -> tuple[Inexpressible, ...]:
    """Fields that are not served, and the named ports of peers that have none (DESIGN
    invariant 13)."""
    return tuple(
        Inexpressible(field, "is not served yet: it matches nothing", "name networks instead")
        for field in policy.unserved
    ) + tuple(
        Inexpressible(
            _port_field(policy, "Egress", index, place),
            f"the port name {port.port!r} matches nothing at peers that are no pods",
            "use a number there",
        )
        for index, rule in enumerate(policy.egress)
        if None in named_port_peers(rule.peers)
        for place, port in enumerate(rule.ports or ())
        if isinstance(port.port, str)
    )


@dataclass(frozen=True, slots=True)
class UsedSet:
    """A peer set that a policy's rule sets may name, and the field that asks for it."""

    field: str
    name: str
    peer: Picked


def used_sets(policy: Policy) -> tuple[UsedSet, ...]:
    found = []
    for direction in DIRECTIONS:
        for index, rule in enumerate(policy.rules(direction)):
            for place, peer in enumerate(rule.peers or ()):
                kind, name, _ = _peer(peer)
                if kind == "set":
                    assert not isinstance(peer, BlockPeer)
                    found.append(UsedSet(_peer_field(policy, direction, index, place), name, peer))
            if direction == "Ingress":
                continue
            for place, port in enumerate(rule.ports or ()):
                for named in _port_sets(rule, port):
                    field = _port_field(policy, direction, index, place)
                    found.append(UsedSet(field, set_name(named), named))
    return tuple(found)


def _port_sets(rule: PolicyRule, port: PolicyPort) -> Iterator[NamedPortPeer]:
    for pods in named_port_peers(rule.peers):
        named = _port_set(pods, port)
        if named is not None:
            yield named


def _port_set(pods: PodPeer | None, port: PolicyPort) -> NamedPortPeer | None:
    """Those of `pods` that have the port, at egress; None: nobody."""
    if pods is None or not isinstance(port.port, str):
        return None
    protocol = next((known for known in PROTOCOLS if known == port.protocol), None)
    return NamedPortPeer(pods, protocol, port.port)


def _peer_field(policy: Policy, direction: Direction, index: int, place: int) -> str:
    rule = policy.rules(direction)[index]
    side = "from" if direction == "Ingress" else "to"
    if policy.name.kind == "TrafficPolicy":
        side = "peers"
    written = rule.written[place] if rule.written else place
    return f"spec.{direction.lower()}[{index}].{side}[{written}]"


def _port_field(policy: Policy, direction: Direction, index: int, place: int) -> str:
    rule = f"spec.{direction.lower()}[{index}]"
    match policy.name.kind:
        case "NetworkPolicy":
            return f"{rule}.ports[{place}].port"
        case "ClusterNetworkPolicy":
            return f"{rule}.protocols[{place}].destinationNamedPort"
        case _:
            return f"{rule}.ports[{place}].portName"
