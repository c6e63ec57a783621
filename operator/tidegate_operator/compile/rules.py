"""Policies that isolate one subject -> its rule set, and what of them cannot be said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from msgspec import UNSET
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
    rule_set,
)

from tidegate_operator.compile.peers import set_name
from tidegate_operator.objects import BlockPeer, Direction, PodPeer, Policy, PolicyRule

NETWORK_POLICY_PRECEDENCE = 1 << 30
"""Of every NetworkPolicy term: policies only add, so no term outranks another. Admin
tiers will lie above, baseline ones below."""

DIRECTIONS: tuple[Direction, Direction] = ("Ingress", "Egress")

# What makes two terms the same, and their order: peer kind, peer, excepts, protocol, ports.
_TermKey = tuple[str, str, tuple[str, ...], str, int]


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
    """The rule set of a subject that exactly `policies`, sorted by name, isolate in
    `direction`."""
    first: dict[_TermKey, tuple[int, int]] = {}
    for number, policy in enumerate(policies):
        for index, rule in enumerate(policy.rules(direction) or ()):
            for key in _terms(rule):
                # Visited in order of (policy, rule): the lowest rule stays.
                first.setdefault(key, (number, index))
    rules = sorted(set(first.values()))
    position = {rule: index for index, rule in enumerate(rules)}
    terms = [_term(key, position[first[key]]) for key in sorted(first)]
    spec = RuleSetSpec(
        format=FORMAT,
        direction=direction,
        policies=[
            PolicyRef(kind="NetworkPolicy", namespace=p.name[0], name=p.name[1]) for p in policies
        ],
        rules=[Rule(policy=policy, index=index) for policy, index in rules],
        terms=terms,
    )
    named = {term.peer.name for term in terms if isinstance(term.peer, SetPeer)}
    return Compiled(rule_set(spec), tuple(sorted(named)), policies)


def _terms(rule: PolicyRule) -> Iterator[_TermKey]:
    ports: list[tuple[str, int]] = [("", 0)]
    if rule.ports is not None:
        ports = [
            (port.protocol, port.port or 0)
            for port in rule.ports
            if not isinstance(port.port, str) and port.end_port is None
        ]
    peers: list[tuple[str, str, tuple[str, ...]]] = [("any", "", ())]
    if rule.peers is not None:
        peers = [
            ("cidr", peer.cidr, peer.excepts)
            if isinstance(peer, BlockPeer)
            else ("set", set_name(peer), ())
            for peer in rule.peers
        ]
    for kind, name, excepts in peers:
        for protocol, port in ports:
            yield kind, name, excepts, protocol, port


def _term(key: _TermKey, rule: int) -> Term:
    kind, name, excepts, protocol, port = key
    peer: Peer
    match kind:
        case "any":
            peer = AnyPeer()
        case "set":
            peer = SetPeer(name=name)
        case _:
            peer = CIDRPeer(cidr=name, excepts=list(excepts))
    return Term(
        peer=peer,
        action="Allow",
        precedence=NETWORK_POLICY_PRECEDENCE,
        rule=rule,
        protocol=protocol or UNSET,  # type: ignore[arg-type]
        port=port or UNSET,
    )


def inexpressible(policy: Policy) -> tuple[Inexpressible, ...]:
    """The port entries of `policy` that allow nothing yet (DESIGN invariant 13)."""
    found = []
    for direction in DIRECTIONS:
        for index, rule in enumerate(policy.rules(direction) or ()):
            for place, port in enumerate(rule.ports or ()):
                field = f"spec.{direction.lower()}[{index}].ports[{place}]"
                if isinstance(port.port, str):
                    found.append(Inexpressible(f"{field}.port", f"the named port {port.port!r}"))
                elif port.end_port is not None:
                    found.append(Inexpressible(f"{field}.endPort", "endPort"))
    return tuple(found)


def peer_fields(policy: Policy) -> tuple[tuple[str, str, PodPeer], ...]:
    """Each pod peer of `policy`: its path, the name of its set, itself."""
    return tuple(
        (f"spec.{direction.lower()}[{index}].{side}[{place}]", set_name(peer), peer)
        for direction, side in zip(DIRECTIONS, ("from", "to"), strict=True)
        for index, rule in enumerate(policy.rules(direction) or ())
        for place, peer in enumerate(rule.peers or ())
        if isinstance(peer, PodPeer)
    )
