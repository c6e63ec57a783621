"""Snapshot -> World: the cluster as it is. Pure; given the previous world, what did not
change is the same object.

An endpoint is published when its pod is bound to a node, whether or not its addresses are
known. A pod that has ended gives its addresses up; of two pods that claim one address the
running, newer one has it. Host-network pods are kept only to say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tidegate_operator import meanings, services
from tidegate_operator.cluster.kinds import (
    NamespaceFacts,
    NodeFacts,
    PodFacts,
    PolicyFacts,
    ServiceFacts,
    SliceFacts,
    UserIdentityFacts,
)
from tidegate_operator.objects import (
    EndpointList,
    Endpoints,
    Node,
    ObjectName,
    Pod,
    Policy,
    PolicyName,
    Service,
    UserIdentity,
    World,
)
from tidegate_operator.problems import Problem, Severity
from tidegate_operator.relevance import DEFAULTS, Relevance, Settings, relevance

Key = tuple[str, str]
API_SERVICE = ObjectName("default", "kubernetes")
"""Its endpoints serve the API."""
STAYS = "the last valid version stays in force"


@dataclass(frozen=True)
class Snapshot:
    """What the API server holds, by (namespace, name). A mapping that did not change is the
    same object as before."""

    nodes: Mapping[Key, NodeFacts] = field(default_factory=dict)
    namespaces: Mapping[Key, NamespaceFacts] = field(default_factory=dict)
    pods: Mapping[Key, PodFacts] = field(default_factory=dict)
    services: Mapping[Key, ServiceFacts] = field(default_factory=dict)
    slices: Mapping[Key, SliceFacts] = field(default_factory=dict)
    policies: Mapping[Key, PolicyFacts] = field(default_factory=dict)
    identities: Mapping[Key, UserIdentityFacts] = field(default_factory=dict)
    invalid: Mapping[str, Mapping[Key, str]] = field(default_factory=dict)
    """kind -> objects that cannot be decoded, and why; they keep their last valid meaning."""


@dataclass(frozen=True, kw_only=True)
class ClusterWorld(World):
    """A World with what the next one is made from."""

    snapshot: Snapshot = field(compare=False, repr=False)
    by_service: dict[ObjectName, tuple[EndpointList, ...]] = field(compare=False, repr=False)
    stalled: dict[str, str] = field(compare=False, repr=False)
    """User-made Identities that are not in force, and why."""
    claims: dict[str, tuple[PodFacts, ...]] = field(compare=False, repr=False)
    """address -> the pods that say they have it, in order of their names."""
    said: tuple[Problem, ...] = field(compare=False, repr=False)


def build(
    snapshot: Snapshot, previous: ClusterWorld | None = None, settings: Settings = DEFAULTS
) -> tuple[ClusterWorld, tuple[Problem, ...]]:
    """Never raises for what the snapshot says."""
    before = previous or EMPTY_WORLD
    policies, relevant = _policies(snapshot, before, settings)
    nodes = _nodes(snapshot, before)
    pod_cidrs = tuple(sorted({cidr for node in nodes.values() for cidr in node.pod_cidrs}))
    pods, claims = _pods(snapshot, relevant, before)
    found, stalled = _user_identities(snapshot, relevant, pod_cidrs, before)
    by_service = _by_service(snapshot, before)
    served = _services(snapshot, before)
    world = ClusterWorld(
        nodes=nodes,
        namespaces=_namespaces(snapshot, pods, found),
        pods=pods,
        services=served,
        endpoints=_endpoints(served, by_service, before),
        policies=policies,
        identities=found,
        sources={},
        relevance=relevant,
        pod_cidrs=pod_cidrs,
        apiservers=tuple(
            sorted({text for item in by_service.get(API_SERVICE, ()) for text in item.ready})
        ),
        snapshot=snapshot,
        by_service=by_service,
        stalled=stalled,
        claims=claims,
        said=_said(snapshot, before),
    )
    return world, (*world.said, *_stalled(stalled))


def _policies(
    snapshot: Snapshot, before: ClusterWorld, settings: Settings
) -> tuple[dict[PolicyName, Policy], Relevance]:
    if snapshot.policies is before.snapshot.policies and settings == before.relevance.settings:
        return before.policies, before.relevance
    named = {
        PolicyName("NetworkPolicy", *key): snapshot.policies[key]
        for key in sorted(snapshot.policies)
    }
    written = {name: facts.written for name, facts in named.items()}
    unread = {name: facts.unread for name, facts in named.items() if facts.unread}
    found = meanings.policies(written, before.policies, unread)
    return found, relevance(found.values(), settings)


def _user_identities(
    snapshot: Snapshot, relevant: Relevance, pod_cidrs: tuple[str, ...], before: ClusterWorld
) -> tuple[dict[str, UserIdentity], dict[str, str]]:
    if snapshot.identities is before.snapshot.identities and (relevant, pod_cidrs) == (
        before.relevance,
        before.pod_cidrs,
    ):
        return before.identities, before.stalled
    specs = {name: item.spec for (_, name), item in sorted(snapshot.identities.items())}
    return meanings.user_identities(specs, relevant, pod_cidrs)


# ---- nodes and namespaces ------------------------------------------------------------------


def _nodes(snapshot: Snapshot, before: ClusterWorld) -> dict[str, Node]:
    if snapshot.nodes is before.snapshot.nodes:
        return dict(before.nodes)
    found = {}
    for item in sorted(snapshot.nodes.values(), key=lambda item: item.name):
        made = Node(item.name, item.addresses, item.pod_cidrs, item.uid)
        held = before.nodes.get(item.name)
        found[item.name] = held if held is not None and held == made else made
    return found


def _namespaces(
    snapshot: Snapshot, pods: Mapping[ObjectName, Pod], made: Mapping[str, UserIdentity]
) -> dict[str, dict[str, str]]:
    """Also those that something lies in and that have not been read yet, or no more."""
    labels: dict[str, Mapping[str, str]] = {
        item.name: item.labels for item in snapshot.namespaces.values()
    }
    for name in {key.namespace for key in pods}:
        labels.setdefault(name, {})
    for identity in made.values():
        if not identity.key.cidrs:
            labels.setdefault(identity.key.namespace, {})
    return meanings.namespaces(labels)


# ---- pods ----------------------------------------------------------------------------------


def _pods(
    snapshot: Snapshot, relevant: Relevance, before: ClusterWorld
) -> tuple[Mapping[ObjectName, Pod], dict[str, tuple[PodFacts, ...]]]:
    """Pods that exist for the network, and the claims to addresses. Looks only at pods that
    changed, and those that claim an address with one of them."""
    same = relevant == before.relevance
    if same and snapshot.pods is before.snapshot.pods:
        return before.pods, before.claims
    old: Mapping[Key, PodFacts] = before.snapshot.pods if same else {}
    now = snapshot.pods
    changed = [key for key, item in now.items() if old.get(key) is not item]
    gone = [key for key in old if key not in now]
    claims = dict(before.claims) if same else {}
    contested: set[str] = set()
    for key in (*gone, *changed):
        if (item := old.get(key)) is not None and _claims(item):
            for text in item.addresses:
                _change(claims, text, [held for held in claims[text] if held is not item])
                contested.add(text)
    for key in changed:
        if _claims(item := now[key]):
            for text in item.addresses:
                _change(claims, text, [*claims.get(text, ()), item])
                contested.add(text)
    found = dict(before.pods) if same else {}
    for key in gone:
        found.pop(ObjectName(*key), None)
    rivals = {item.key for text in contested for item in claims.get(text, ())}
    for key in {*(ObjectName(*key) for key in changed), *rivals}:
        item = now[key]
        if not _lives(item):
            found.pop(key, None)
            continue
        addresses = item.addresses
        if not item.host_network:
            addresses = tuple(text for text in addresses if _owner(claims[text]) is item)
        held = before.pods.get(key)
        if not same or held is None or held.origin is not item or held.addresses != addresses:
            held = _pod(item, addresses, relevant)
        found[key] = held
    if not same or found.keys() != before.pods.keys():
        found = dict(sorted(found.items(), key=_first))
    return found, claims


def _first(item: tuple[ObjectName, Pod]) -> ObjectName:
    return item[0]


def _lives(item: PodFacts) -> bool:
    return bool(item.node) and not item.ended


def _claims(item: PodFacts) -> bool:
    return _lives(item) and not item.host_network


def _change(claims: dict[str, tuple[PodFacts, ...]], address: str, holders: list[PodFacts]) -> None:
    if holders:
        claims[address] = tuple(sorted(holders, key=lambda item: item.key))
    else:
        claims.pop(address, None)


def _owner(claims: Iterable[PodFacts]) -> PodFacts:
    return max(claims, key=_claim)


def _claim(item: PodFacts) -> tuple[bool, str, str]:
    return item.running, item.since, item.uid


def _pod(item: PodFacts, addresses: tuple[str, ...], relevant: Relevance) -> Pod:
    return Pod(
        uid=item.uid,
        namespace=item.key.namespace,
        name=item.key.name,
        labels=item.labels,
        node=item.node,
        addresses=addresses,
        ports=item.ports,
        host_network=item.host_network,
        identity=relevant.key(item.key.namespace, item.labels, item.ports),
        origin=item,
    )


# ---- services ------------------------------------------------------------------------------


def _services(snapshot: Snapshot, before: ClusterWorld) -> dict[ObjectName, Service]:
    if snapshot.services is before.snapshot.services:
        return before.services
    found = {}
    for key in sorted(snapshot.services):
        name, written = ObjectName(*key), snapshot.services[key].written
        addresses = _cluster_ips(written.spec.cluster_ip, written.spec.cluster_ips)
        if written.spec.type == "ExternalName":
            addresses = ()
        found[name] = services.service(name, written, addresses, before.services.get(name))
    return found


def _cluster_ips(one: str, several: Iterable[str]) -> tuple[str, ...]:
    """As the API server gave them; none for a headless Service."""
    texts = [text for text in dict.fromkeys((one, *several)) if text]
    return () if "None" in texts else tuple(services.canonical(text) for text in texts)


def _by_service(
    snapshot: Snapshot, before: ClusterWorld
) -> dict[ObjectName, tuple[EndpointList, ...]]:
    if snapshot.slices is before.snapshot.slices:
        return before.by_service
    lists: dict[ObjectName, list[EndpointList]] = {}
    for key in sorted(snapshot.slices):
        item = snapshot.slices[key]
        if item.service:
            lists.setdefault(ObjectName(key[0], item.service), []).append(item.endpoints)
    return {name: tuple(found) for name, found in lists.items()}


def _endpoints(
    served: Mapping[ObjectName, Service],
    by_service: Mapping[ObjectName, tuple[EndpointList, ...]],
    before: ClusterWorld,
) -> dict[ObjectName, Endpoints]:
    if served is before.services and by_service is before.by_service:
        return before.endpoints
    found = {}
    for name, service in served.items():
        slices = by_service.get(name, ())
        held = before.endpoints.get(name)
        if (
            held is None
            or before.services.get(name) is not service
            or before.by_service.get(name, ()) != slices
        ):
            made = services.endpoints_of(service, slices)
            held = held if held is not None and held == made else made
        found[name] = held
    return found


# ---- what people should know ---------------------------------------------------------------


def _said(snapshot: Snapshot, before: ClusterWorld) -> tuple[Problem, ...]:
    if (
        snapshot.services is before.snapshot.services
        and snapshot.policies is before.snapshot.policies
        and snapshot.invalid is before.snapshot.invalid
    ):
        return before.said
    return tuple(_of_objects(snapshot))


def _of_objects(snapshot: Snapshot) -> Iterable[Problem]:
    for kind, objects in sorted(snapshot.invalid.items()):
        for key, reason in sorted(objects.items()):
            yield _problem("error", kind, key, "", f"{reason}; {STAYS}", "repair the object")
    for key, policy in sorted(snapshot.policies.items(), key=lambda item: item[0]):
        if policy.unread:
            text = f"{policy.why}: rules that are not understood allow nothing"
            remedy = "say it in fields that this version serves, or upgrade Tidegate"
            yield _problem("error", "NetworkPolicy", key, "spec", text, remedy)
    for key, facts in sorted(snapshot.services.items(), key=lambda item: item[0]):
        for name, text in services.unserved(facts.written.spec):
            yield _problem("warning", "Service", key, name, text)
        for name in facts.ignored:
            yield _problem("warning", "Service", key, name, "is not known here, and not served")


def _stalled(found: Mapping[str, str]) -> Iterable[Problem]:
    for name, reason in sorted(found.items()):
        remedy = "name each outside address once, and no pod's"
        yield _problem("error", "Identity", ("", name), "spec.cidrs", f"stalled: {reason}", remedy)


def _problem(
    severity: Severity, kind: str, key: Key, where: str, message: str, remedy: str = ""
) -> Problem:
    name = "/".join(part for part in key if part)
    return Problem(
        severity=severity, object=f"{kind} {name}", field=where, message=message, remedy=remedy
    )


EMPTY_WORLD = ClusterWorld(
    nodes={},
    namespaces={},
    pods={},
    services={},
    endpoints={},
    policies={},
    identities={},
    sources={},
    relevance=Relevance(),
    pod_cidrs=(),
    snapshot=Snapshot(),
    by_service={},
    stalled={},
    claims={},
    said=(),
)
