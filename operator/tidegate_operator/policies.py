"""NetworkPolicy as written -> Policy as meant: upstream defaults, normal forms.

This is the one place that knows what null, [], {} and absence mean in NetworkPolicy; its
neighbours `cluster_policies` and `traffic_policies` know the other kinds.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Sequence

from tidegate_api import users

from tidegate_operator.objects import (
    NAME_LABEL,
    NOTHING,
    BlockPeer,
    PodPeer,
    Policy,
    PolicyName,
    PolicyPort,
    PolicyRule,
    Requirement,
    Selector,
)

RulePlace = tuple[str, int]
"""("ingress" or "egress", index)."""


def selector(written: users.LabelSelector) -> Selector:
    """Normalise: equal meanings as far as sorting and folding can tell are equal."""
    found = {Requirement(key, "In", (value,)) for key, value in written.match_labels.items()} | {
        Requirement(part.key, part.operator, tuple(sorted(set(part.values))))
        for part in written.match_expressions
    }
    return Selector(tuple(sorted(found)))


def policy(
    name: PolicyName, written: users.NetworkPolicy, unread: Collection[RulePlace] = ()
) -> Policy:
    """`unread`: rules that were written and could not be read; they allow nothing."""
    spec = written.spec
    isolates = spec.isolates()
    ingress: tuple[PolicyRule, ...] = ()
    egress: tuple[PolicyRule, ...] = ()
    if "Ingress" in isolates:
        ingress = tuple(
            NOTHING
            if ("ingress", index) in unread
            else PolicyRule(_peers(name.namespace, rule.from_), _ports(rule.ports))
            for index, rule in enumerate(spec.ingress)
        )
    if "Egress" in isolates:
        egress = tuple(
            NOTHING
            if ("egress", index) in unread
            else PolicyRule(_peers(name.namespace, rule.to), _ports(rule.ports))
            for index, rule in enumerate(spec.egress)
        )
    return Policy(
        name=name,
        subject=PodPeer(name.namespace, None, selector(spec.pod_selector)),
        isolates=isolates,
        ingress=ingress,
        egress=egress,
        origin=written,
    )


def _peers(
    namespace: str, written: Sequence[users.NetworkPolicyPeer]
) -> tuple[PodPeer | BlockPeer, ...] | None:
    if not written:
        return None
    return tuple(_peer(namespace, peer) for peer in written)


def _peer(namespace: str, written: users.NetworkPolicyPeer) -> PodPeer | BlockPeer:
    if written.ip_block is not None:
        return block(written.ip_block.cidr, written.ip_block.except_)
    pods = selector(written.pod_selector) if written.pod_selector is not None else Selector()
    if written.namespace_selector is None:
        return PodPeer(namespace, None, pods)
    return pods_in(selector(written.namespace_selector), pods)


def block(cidr: str, excepts: Sequence[str]) -> BlockPeer:
    found = {ipaddress.ip_network(text) for text in excepts}
    ordered = sorted(found, key=lambda net: (int(net.network_address), net.prefixlen))
    return BlockPeer(str(ipaddress.ip_network(cidr)), tuple(str(net) for net in ordered))


def pods_in(namespaces: Selector, pods: Selector) -> PodPeer:
    match namespaces.requirements:
        case (Requirement(key=key, operator="In", values=(only,)),) if key == NAME_LABEL:
            # The label is the namespace's name, always: the same pods as naming it.
            return PodPeer(only, None, pods)
    return PodPeer(None, namespaces, pods)


def _ports(written: Sequence[users.NetworkPolicyPort]) -> tuple[PolicyPort, ...] | None:
    if not written:
        return None
    return tuple(PolicyPort(port.protocol, port.port, port.end_port) for port in written)
