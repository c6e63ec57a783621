"""ClusterNetworkPolicy as written -> Policy as meant.

What is not understood fails closed, as the API wants it: a rule that accepts matches nothing,
any other denies everything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from tidegate_api import clusterpolicy as api

from tidegate_operator.objects import (
    DENY_ALL,
    NOTHING,
    Action,
    Direction,
    NodePeer,
    PodPeer,
    Policy,
    PolicyName,
    PolicyPeer,
    PolicyPort,
    PolicyRule,
    Selector,
)
from tidegate_operator.policies import RulePlace, block, pods_in, selector

_ACTIONS: dict[str, Action] = {"Accept": "Allow", "Deny": "Deny", "Pass": "Pass"}


def policy(
    name: PolicyName, written: api.ClusterNetworkPolicy, unread: Collection[RulePlace] = ()
) -> Policy:
    """`unread`: rules that were written and could not be read; of them only `action` counts."""
    spec = written.spec

    def rules(
        direction: Direction, items: Sequence[api.IngressRule | api.EgressRule]
    ) -> tuple[PolicyRule, ...]:
        return tuple(
            closed(rule.action == "Accept") if (direction.lower(), index) in unread else _rule(rule)
            for index, rule in enumerate(items)
        )

    return Policy(
        name=name,
        subject=_pods(spec.subject),
        isolates=frozenset(),
        ingress=rules("Ingress", spec.ingress),
        egress=rules("Egress", spec.egress),
        origin=written,
        tier=spec.tier,
        priority=spec.priority,
        unserved=tuple(
            f"spec.egress[{index}].to[{place}].domainNames"
            for index, rule in enumerate(spec.egress)
            for place, peer in enumerate(rule.to)
            if peer.domain_names is not None
        ),
    )


def closed(allows: bool) -> PolicyRule:
    """What a rule that is not understood means."""
    return NOTHING if allows else DENY_ALL


def _rule(written: api.IngressRule | api.EgressRule) -> PolicyRule:
    of = written.from_ if isinstance(written, api.IngressRule) else written.to
    peers = [(peer, index) for index, item in enumerate(of) for peer in _peers(item)]
    ports = None
    if written.protocols is not None:
        ports = tuple(map(_port, written.protocols))
    return PolicyRule(
        tuple(peer for peer, _ in peers),
        ports,
        _ACTIONS[written.action],
        written=tuple(index for _, index in peers),
    )


def _peers(written: api.IngressPeer) -> Iterator[PolicyPeer]:
    """One for each network; none for names of domains, which nothing resolves yet."""
    if written.namespaces is not None or written.pods is not None:
        yield _pods(written)
    if not isinstance(written, api.EgressPeer):
        return
    if written.nodes is not None:
        yield NodePeer(selector(written.nodes))
    for cidr in written.networks or ():
        yield block(cidr, ())


def _pods(written: api.Subject | api.IngressPeer) -> PodPeer:
    if written.namespaces is not None:
        return pods_in(selector(written.namespaces), Selector())
    assert written.pods is not None
    return pods_in(selector(written.pods.namespace_selector), selector(written.pods.pod_selector))


def _port(written: api.Protocol) -> PolicyPort:
    if written.destination_named_port is not None:
        return PolicyPort(None, written.destination_named_port)
    if written.tcp is not None:
        return _numbered("TCP", written.tcp)
    if written.udp is not None:
        return _numbered("UDP", written.udp)
    assert written.sctp is not None
    return _numbered("SCTP", written.sctp)


def _numbered(protocol: api.Transport, written: api.PortMatch) -> PolicyPort:
    port = written.destination_port
    if port.range is not None:
        return PolicyPort(protocol, port.range.start, port.range.end)
    return PolicyPort(protocol, port.number)
