"""Policies of one subject -> its rule set, and what of them cannot be said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from msgspec import UNSET
from msgspec.structs import replace
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
    format_of_rules,
    rule_set,
)

from tidegate_operator.compile.peers import set_name
from tidegate_operator.compile.precedence import in_force, isolating, precedences
from tidegate_operator.objects import Action, BlockPeer, Direction, PodPeer, Policy, PolicyRule

DIRECTIONS: tuple[Direction, Direction] = ("Ingress", "Egress")


class _Match(NamedTuple):
    """What a term matches, and the order of terms. "" and 0: any."""

    kind: str
    peer: str
    excepts: tuple[str, ...]
    protocol: str
    port: int
    end_port: int


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

    @property
    def name(self) -> str:
        return self.rule_set.metadata.name


@dataclass(frozen=True)
class Inexpressible:
    """A port entry that allows nothing yet; `field` is its path in the policy."""

    field: str
    what: str


def compile_rules(direction: Direction, policies: tuple[Policy, ...]) -> Compiled:
    """The rule set of a subject of exactly `policies`, each of which counts in `direction`."""
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
            for match in _matches(rule):
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
    named = {term.peer.name for term in terms if isinstance(term.peer, SetPeer)}
    return Compiled(rule_set(spec), tuple(sorted(named)), policies)


def _matches(rule: PolicyRule) -> Iterator[_Match]:
    ports: list[tuple[str, int, int]] = [("", 0, 0)]
    if rule.ports is not None:
        ports = [
            (port.protocol, port.port or 0, port.end_port or 0)
            for port in rule.ports
            if not isinstance(port.port, str)
        ]
    peers: list[tuple[str, str, tuple[str, ...]]] = [("any", "", ())]
    if rule.peers is not None:
        peers = [
            ("cidr", peer.cidr, peer.excepts)
            if isinstance(peer, BlockPeer)
            else ("set", set_name(peer), ())
            for peer in rule.peers
        ]
    for peer in peers:
        for port in ports:
            yield _Match(*peer, *port)


def _term(key: _Key, rule: int) -> Term:
    match = key.match
    peer: Peer
    match match.kind:
        case "any":
            peer = AnyPeer()
        case "set":
            peer = SetPeer(name=match.peer)
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
        audit=key.audit,
    )


def inexpressible(policy: Policy) -> tuple[Inexpressible, ...]:
    """The port entries of `policy` that allow nothing yet (DESIGN invariant 13)."""
    found = []
    for direction in DIRECTIONS:
        for index, rule in enumerate(policy.rules(direction)):
            for place, port in enumerate(rule.ports or ()):
                field = f"spec.{direction.lower()}[{index}].ports[{place}]"
                if isinstance(port.port, str):
                    found.append(Inexpressible(f"{field}.port", f"the named port {port.port!r}"))
    return tuple(found)


def peer_fields(policy: Policy) -> tuple[tuple[str, str, PodPeer], ...]:
    """Each pod peer of `policy`: its path, the name of its set, itself."""
    return tuple(
        (f"spec.{direction.lower()}[{index}].{side}[{place}]", set_name(peer), peer)
        for direction, side in zip(DIRECTIONS, ("from", "to"), strict=True)
        for index, rule in enumerate(policy.rules(direction))
        for place, peer in enumerate(rule.peers or ())
        if isinstance(peer, PodPeer)
    )
