"""TrafficPolicy as written -> Policy as meant. Nothing is defaulted: everything was written."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from tidegate_api import trafficpolicy as api

from tidegate_operator.cluster_policies import closed
from tidegate_operator.objects import (
    Direction,
    EntityPeer,
    IdentityPeer,
    PodPeer,
    Policy,
    PolicyName,
    PolicyPeer,
    PolicyPort,
    PolicyRule,
    Requirement,
    Selector,
)
from tidegate_operator.policies import RulePlace, block, pods_in


def policy(
    name: PolicyName, written: api.TrafficPolicy, unread: Collection[RulePlace] = ()
) -> Policy:
    """`unread`: rules that were written and could not be read; of them only `action` counts."""
    spec = written.spec

    def rules(direction: Direction, items: Sequence[api.Rule]) -> tuple[PolicyRule, ...]:
        return tuple(
            closed(rule.action == "Allow") if (direction.lower(), index) in unread else _rule(rule)
            for index, rule in enumerate(items)
        )

    return Policy(
        name=name,
        subject=PodPeer(name.namespace, None, _selector(spec.subject.pod_selector)),
        isolates=frozenset(spec.isolates),
        ingress=rules("Ingress", spec.ingress),
        egress=rules("Egress", spec.egress),
        origin=written,
        audit=spec.mode == "Audit",
    )


def _rule(written: api.Rule) -> PolicyRule:
    found = [(peer, index) for index, item in enumerate(written.peers) for peer in _peers(item)]
    peers = None
    if not any(peer.any for peer in written.peers):
        peers = tuple(peer for peer, _ in found)
    ports = None
    if not any(port.any for port in written.ports):
        ports = tuple(map(_port, written.ports))
    return PolicyRule(
        peers,
        ports,
        written.action,
        written.log,
        written=() if peers is None else tuple(index for _, index in found),
    )


def _peers(written: api.Peer) -> Iterator[PolicyPeer]:
    if written.pods is not None:
        yield pods_in(
            _selector(written.pods.namespace_selector), _selector(written.pods.pod_selector)
        )
    for entity in written.entities or ():
        yield EntityPeer(entity)
    for item in written.cidrs or ():
        yield block(item.cidr, item.except_)
    if written.identity is not None:
        yield IdentityPeer(written.identity)


def _port(written: api.Port) -> PolicyPort:
    if written.icmp is not None:
        return PolicyPort(
            "ICMP" if written.icmp.family == "IPv4" else "ICMPv6",
            icmp_type=written.icmp.type,
            icmp_code=written.icmp.code,
        )
    if written.range is not None:
        return PolicyPort(written.protocol, written.range.start, written.range.end)
    return PolicyPort(
        written.protocol, written.port if written.port is not None else written.port_name
    )


def _selector(written: api.LabelSelector) -> Selector:
    """Normalised as in `policies.selector`."""
    found = {
        Requirement(key, "In", (value,)) for key, value in (written.match_labels or {}).items()
    } | {
        Requirement(part.key, part.operator, tuple(sorted(set(part.values))))
        for part in written.match_expressions or ()
    }
    return Selector(tuple(sorted(found)))
