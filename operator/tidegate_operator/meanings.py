"""What objects mean, wherever they come from: shared by the folder's builder and the
cluster's, so that the same manifests give the same rule sets and identities in both.
No I/O, no clock.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from tidegate_api import users
from tidegate_api.clusterpolicy import ClusterNetworkPolicy
from tidegate_api.trafficpolicy import TrafficPolicy
from tidegate_api.users import NetworkPolicy

from tidegate_operator import cluster_policies, traffic_policies
from tidegate_operator import policies as network_policies
from tidegate_operator.objects import (
    NAME_LABEL,
    IdentityKey,
    Policy,
    PolicyName,
    UserIdentity,
    World,
)
from tidegate_operator.policies import RulePlace
from tidegate_operator.relevance import Relevance

WrittenPolicy = NetworkPolicy | ClusterNetworkPolicy | TrafficPolicy
POLICY_KINDS = ("ClusterNetworkPolicy", "NetworkPolicy", "TrafficPolicy")
"""In the order of their names."""


def namespaces(labels: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """name -> labels; its own name last, so that nobody's label of that key counts (DESIGN
    invariant 10)."""
    return {name: {**labels[name], NAME_LABEL: name} for name in sorted(labels)}


def policies(
    written: Mapping[PolicyName, WrittenPolicy],
    previous: Mapping[PolicyName, Policy],
    unread: Mapping[PolicyName, Collection[RulePlace]] | None = None,
) -> dict[PolicyName, Policy]:
    """In the order of `written`; the policy of `previous` where the meaning is the same.
    `unread`: see `policies.policy`."""
    found = {}
    for name, item in written.items():
        before = previous.get(name)
        if before is not None and before.origin is item:
            found[name] = before
            continue
        now = _policy(name, item, (unread or {}).get(name, ()))
        found[name] = now if before != now or before is None else before
    return found


def named(written: Iterable[users.IdentitySpec]) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Namespace and labels of those that stand for pods."""
    for spec in written:
        if spec.namespace is not None and spec.labels is not None:
            yield spec.namespace, spec.labels


def held(asked: Relevance, before: World, hold: bool) -> Relevance:
    """What a world tells apart that follows `before`. `hold`: whatever that told apart, so that
    numbers split before a policy needs it, and are one again only when none does."""
    if hold and asked is before.asked:
        return before.relevance
    found = asked.with_(before.relevance) if hold else asked
    return before.relevance if found == before.relevance else found


def _policy(name: PolicyName, written: WrittenPolicy, unread: Collection[RulePlace]) -> Policy:
    match written:
        case NetworkPolicy():
            return network_policies.policy(name, written, unread)
        case ClusterNetworkPolicy():
            return cluster_policies.policy(name, written, unread)
        case TrafficPolicy():
            return traffic_policies.policy(name, written, unread)


def user_identities(
    written: Mapping[str, users.IdentitySpec], relevance: Relevance, pod_cidrs: Sequence[str]
) -> tuple[dict[str, UserIdentity], dict[str, str]]:
    """(in force, stalled: name -> why). The first in the order of `written` has a network."""
    found: dict[str, UserIdentity] = {}
    stalled: dict[str, str] = {}
    taken: list[tuple[users.IPNetwork, str]] = []
    pods = [ipaddress.ip_network(text) for text in pod_cidrs]
    for name, spec in written.items():
        if spec.namespace is not None and spec.labels is not None:
            key = relevance.key(spec.namespace, spec.labels)
            found[name] = UserIdentity(name, key)
            continue
        networks = sorted({users.network(text) for text in spec.cidrs or ()}, key=str)
        clash = _clash(networks, taken, pods)
        if clash:
            stalled[name] = clash
            continue
        taken += [(network, name) for network in networks]
        key = IdentityKey("", (), tuple(map(str, networks)))
        found[name] = UserIdentity(name, key)
    return found, stalled


def _clash(
    networks: Sequence[users.IPNetwork],
    taken: Sequence[tuple[users.IPNetwork, str]],
    pods: Sequence[users.IPNetwork],
) -> str:
    for network in networks:
        for other, owner in taken:
            if _overlap(network, other):
                return f"{network} overlaps {other} of Identity {owner}"
        for other in pods:
            if network.prefixlen >= other.prefixlen and _overlap(network, other):
                return f"{network} lies among the pods' addresses ({other})"
    return ""


def _overlap(one: users.IPNetwork, other: users.IPNetwork) -> bool:
    return one.version == other.version and one.overlaps(other)
