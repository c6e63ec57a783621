"""Every kind that the operator watches, and the snapshot of them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tidegate_api.state import Identity, NodeState, RuleSet, StateObject, StateSlice
from tidegate_kube import Client, Reflector, Resource, resources

from tidegate_operator.cluster import kinds
from tidegate_operator.cluster.kinds import IdentityFacts, UserIdentityFacts
from tidegate_operator.cluster.world import Key, Snapshot

T = TypeVar("T")


class Watches:
    """One reflector a kind."""

    def __init__(self, client: Client) -> None:
        self.changed: Callable[[], None] = lambda: None
        """Called from their threads; must not block. Set it before `start`."""

        def watch(
            resource: Resource, decode: Callable[[bytes], T], optional: bool = False
        ) -> Reflector[T]:
            return Reflector(client, resource, decode, lambda: self.changed(), optional=optional)

        self.nodes = watch(resources.NODES, kinds.node)
        self.namespaces = watch(resources.NAMESPACES, kinds.namespace)
        self.pods = watch(resources.PODS, kinds.pod)
        self.services = watch(resources.SERVICES, kinds.service)
        self.slices = watch(resources.ENDPOINT_SLICES, kinds.endpoint_slice)
        self.policies = watch(resources.NETWORK_POLICIES, kinds.network_policy)
        self.cluster_policies = watch(
            resources.CLUSTER_NETWORK_POLICIES, kinds.cluster_policy, optional=True
        )
        self.traffic_policies = watch(resources.TRAFFIC_POLICIES, kinds.traffic_policy)
        self.identities: Reflector[IdentityFacts] = watch(resources.IDENTITIES, kinds.identity)
        self.rule_sets = watch(resources.RULE_SETS, kinds.rule_set)
        self.state_slices = watch(resources.STATE_SLICES, kinds.state_slice)
        self.node_states = watch(resources.NODE_STATES, kinds.node_state)
        self.policy_statuses = watch(resources.POLICY_STATUSES, kinds.policy_status)
        self.cluster_policy_statuses = watch(
            resources.CLUSTER_POLICY_STATUSES, kinds.cluster_policy_status
        )
        self.inputs: tuple[Reflector[Any], ...] = (
            self.nodes,
            self.namespaces,
            self.pods,
            self.services,
            self.slices,
            self.policies,
            self.cluster_policies,
            self.traffic_policies,
            self.identities,
        )
        self.needed: tuple[Reflector[Any], ...] = (
            *self.inputs,
            self.rule_sets,
            self.state_slices,
            self.node_states,
        )
        """Without a complete list of these nothing is published."""
        self.all: tuple[Reflector[Any], ...] = (
            *self.needed,
            self.policy_statuses,
            self.cluster_policy_statuses,
        )
        self._made: Mapping[Key, UserIdentityFacts] = {}
        self._made_of: Mapping[Key, IdentityFacts] | None = None
        self._invalid: Mapping[str, Mapping[Key, str]] = {}

    @property
    def ours(self) -> dict[type[StateObject], Reflector[Any]]:
        return {
            Identity: self.identities,
            RuleSet: self.rule_sets,
            StateSlice: self.state_slices,
            NodeState: self.node_states,
        }

    def start(self) -> None:
        for reflector in self.all:
            reflector.start()

    def stop(self) -> None:
        for reflector in self.all:
            reflector.stop()

    def unsynced(self) -> list[str]:
        """Kinds of which there is no complete list: not read yet, forbidden, or gone."""
        return [item.resource.plural for item in self.needed if not item.synced]

    def highest_term(self) -> int:
        """Of all leaders that have written a NodeState."""
        held = self.node_states.snapshot().values()
        terms = [item.item.spec.term or 0 for item in held if isinstance(item, kinds.Held)]
        return max(terms, default=0)

    def snapshot(self) -> Snapshot:
        """Every mapping is the same object as last time while nothing in it has changed."""
        invalid = {item.resource.kind: found for item in self.inputs if (found := item.invalid)}
        if invalid != self._invalid:
            self._invalid = invalid
        return Snapshot(
            nodes=self.nodes.snapshot(),
            namespaces=self.namespaces.snapshot(),
            pods=self.pods.snapshot(),
            services=self.services.snapshot(),
            slices=self.slices.snapshot(),
            policies=self.policies.snapshot(),
            cluster_policies=self.cluster_policies.snapshot(),
            traffic_policies=self.traffic_policies.snapshot(),
            identities=self._user_made(),
            invalid=self._invalid,
        )

    def _user_made(self) -> Mapping[Key, UserIdentityFacts]:
        held = self.identities.snapshot()
        if held is not self._made_of:
            made = {key: item for key, item in held.items() if isinstance(item, UserIdentityFacts)}
            if _meaning(made) != _meaning(self._made):
                self._made = made
            self._made_of = held
        return self._made


def _meaning(made: Mapping[Key, UserIdentityFacts]) -> dict[Key, object]:
    """Without versions and statuses."""
    return {key: (item.spec, item.target.uid) for key, item in made.items()}
