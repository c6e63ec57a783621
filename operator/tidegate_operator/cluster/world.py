"""Snapshot -> World: the cluster as it is. Pure; given the previous world, what did not
change is the same object.

An endpoint is published when its pod is bound to a node, whether or not its addresses are
known. A pod that has ended gives its addresses up; of two pods that claim one address the
running, newer one has it. Host-network pods are kept only to say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import eq, itemgetter
from typing import Any, TypeVar

import msgspec
from tidegate_api import users

from tidegate_operator import endpoints, meanings, services
from tidegate_operator.changes import alike, both, changed, gone
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

_V = TypeVar("_V")


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
    cluster_policies: Mapping[Key, PolicyFacts] = field(default_factory=dict)
    traffic_policies: Mapping[Key, PolicyFacts] = field(default_factory=dict)
    identities: Mapping[Key, UserIdentityFacts] = field(default_factory=dict)
    invalid: Mapping[str, Mapping[Key, str]] = field(default_factory=dict)
    """kind -> objects that cannot be decoded, and why; they keep their last valid meaning."""


@dataclass(frozen=True, kw_only=True)
class ClusterWorld(World):
    """A World with what the next one is made from."""

    snapshot: Snapshot = field(compare=False, repr=False)
    by_service: dict[ObjectName, dict[Key, EndpointList]] = field(compare=False, repr=False)
    stalled: dict[str, str] = field(compare=False, repr=False)
    """User-made Identities that are not in force, and why."""
    claims: dict[str, tuple[PodFacts, ...]] = field(compare=False, repr=False)
    """address, or file of a static pod -> the pods that say they have it, in order of names."""
    of_services: services.Settings = field(compare=False, repr=False)
    remarks: dict[tuple[str, Key], tuple[Problem, ...]] = field(compare=False, repr=False)
    """(kind, key) of a Service or a slice -> what there is to say of it."""
    said: tuple[Problem, ...] = field(compare=False, repr=False)


def build(
    snapshot: Snapshot,
    previous: ClusterWorld | None = None,
    settings: Settings = DEFAULTS,
    of_services: services.Settings = services.DEFAULTS,
    hold: bool = False,
) -> tuple[ClusterWorld, tuple[Problem, ...]]:
    """Never raises for what the snapshot says. `hold`: see `meanings.held`."""
    before = previous or EMPTY_CLUSTER
    policies, asked = _policies(snapshot, before, settings)
    relevant = meanings.held(asked, before, hold)
    nodes = _nodes(snapshot, before, of_services)
    pod_cidrs = tuple(sorted({cidr for node in nodes.values() for cidr in node.pod_cidrs}))
    pods, claims = _pods(snapshot, relevant, before)
    found, stalled = _user_identities(snapshot, relevant, pod_cidrs, before)
    by_service = _by_service(snapshot, before)
    remarks = _remarks(snapshot, before, of_services)
    served = _services(snapshot, before, of_services)
    world = ClusterWorld(
        nodes=nodes,
        namespaces=_namespaces(snapshot, pods, found, before),
        pods=pods,
        services=served,
        endpoints=_endpoints(served, by_service, before),
        policies=policies,
        identities=found,
        sources={},
        relevance=relevant,
        asked=asked,
        pod_cidrs=pod_cidrs,
        apiservers=tuple(
            sorted(
                {
                    one.address
                    for item in by_service.get(API_SERVICE, {}).values()
                    for one in item.endpoints
                    if not one.ends
                }
            )
        ),
        snapshot=snapshot,
        by_service=by_service,
        stalled=stalled,
        claims=claims,
        of_services=of_services,
        remarks=remarks,
        said=_said(snapshot, before, remarks),
    )
    return world, (*world.said, *_stalled(stalled))


def anew(world: ClusterWorld) -> ClusterWorld:
    """What to build from, as if nothing had been built before, but for numbers that are kept
    apart: to be taken over with `hold`."""
    return replace(EMPTY_CLUSTER, relevance=world.relevance)


_INDEXES = ("pods", "nodes", "namespaces", "services", "endpoints", "policies", "identities")
_OTHERS = (
    *("relevance", "asked", "pod_cidrs", "apiservers", "stalled"),
    *("claims", "by_service", "remarks", "said"),
)


def unlike(one: ClusterWorld, other: ClusterWorld) -> Iterator[str]:
    """ "table/key" of what is not the same, or is in one of them only; "table/order" where the
    same keys come in another order."""
    for table in _INDEXES:
        ours: Mapping[object, object] = getattr(one, table)
        theirs: Mapping[object, object] = getattr(other, table)
        found = [
            f"{table}/{key}"
            for key in dict.fromkeys((*ours, *theirs))
            if key not in ours or key not in theirs or ours[key] != theirs[key]
        ]
        yield from found
        if not found and not all(map(eq, ours, theirs)):
            yield f"{table}/order"
    yield from (name for name in _OTHERS if getattr(one, name) != getattr(other, name))


def _policies(
    snapshot: Snapshot, before: ClusterWorld, settings: Settings
) -> tuple[dict[PolicyName, Policy], Relevance]:
    same = (
        same_policies(snapshot, before.snapshot)
        and snapshot.identities is before.snapshot.identities
    )
    if same and settings == before.asked.settings:
        return before.policies, before.asked
    named = dict(sorted(every_policy(snapshot)))
    written = {name: facts.written for name, facts in named.items()}
    unread = {name: facts.unread for name, facts in named.items() if facts.unread}
    found = meanings.policies(written, before.policies, unread)
    ours = meanings.named(item.spec for item in snapshot.identities.values())
    asked = relevance(found.values(), settings, ours)
    return found, before.asked if asked == before.asked else asked


def every_policy(snapshot: Snapshot) -> Iterator[tuple[PolicyName, PolicyFacts]]:
    for kind, held in zip(
        meanings.POLICY_KINDS,
        (snapshot.cluster_policies, snapshot.policies, snapshot.traffic_policies),
        strict=True,
    ):
        for key, facts in held.items():
            yield PolicyName(kind, *key), facts


def with_labels(snapshot: Snapshot, pods: Mapping[Key, PodFacts]) -> Snapshot:
    """But for the labels of `pods`, which are as they say."""
    if not pods:
        return snapshot
    held = {
        key: msgspec.structs.replace(snapshot.pods[key], labels=was.labels)
        for key, was in pods.items()
    }
    return replace(snapshot, pods={**snapshot.pods, **held})


def same_policies(one: Snapshot, other: Snapshot) -> bool:
    return (
        one.policies is other.policies
        and one.cluster_policies is other.cluster_policies
        and one.traffic_policies is other.traffic_policies
    )


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


def _nodes(
    snapshot: Snapshot, before: ClusterWorld, of_services: services.Settings
) -> dict[str, Node]:
    if snapshot.nodes is before.snapshot.nodes and of_services == before.of_services:
        return dict(before.nodes)
    found = {}
    for item in sorted(snapshot.nodes.values(), key=lambda item: item.name):
        made = Node(
            item.name,
            item.addresses,
            item.pod_cidrs,
            item.uid,
            item.zone,
            services.port_addresses(item.addresses, of_services),
            item.labels,
            of_services.masquerade,
        )
        held = before.nodes.get(item.name)
        found[item.name] = held if held is not None and held == made else made
    return found


def _namespaces(
    snapshot: Snapshot,
    pods: Mapping[ObjectName, Pod],
    made: Mapping[str, UserIdentity],
    before: ClusterWorld,
) -> dict[str, dict[str, str]]:
    """Also those that something lies in and that have not been read yet, or no more."""
    if (
        snapshot.namespaces is before.snapshot.namespaces
        and made is before.identities
        and alike(before.pods, pods)
    ):
        return before.namespaces
    labels: dict[str, Mapping[str, str]] = {
        item.name: item.labels for item in snapshot.namespaces.values()
    }
    for name in set(map(_space, pods)):
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
    new, lost = both(old, now)
    claims = dict(before.claims) if same else {}
    contested: set[str] = set()
    for key in (*lost, *new):
        if (item := old.get(key)) is not None and _claims(item):
            for text in _claimed(item):
                _change(claims, text, [held for held in claims[text] if held is not item])
                contested.add(text)
    for key in new:
        if _claims(item := now[key]):
            for text in _claimed(item):
                _change(claims, text, [*claims.get(text, ()), item])
                contested.add(text)
    found = dict(before.pods) if same else {}
    ordered = same  # nothing comes in between
    for key in lost:
        found.pop(ObjectName(*key), None)
    rivals = {item.key for text in contested for item in claims.get(text, ())}
    for key in {*(ObjectName(*key) for key in new), *rivals}:
        item = now[key]
        if not _lives(item):
            found.pop(key, None)
            continue
        if item.static and not item.host_network and _first_made(claims[_mirror(item)]) is not item:
            found.pop(key, None)
            continue
        addresses = item.addresses
        if not item.host_network:
            addresses = tuple(text for text in addresses if _owner(claims[text]) is item)
        held = before.pods.get(key)
        if not same or held is None or held.origin is not item or held.addresses != addresses:
            held = _pod(item, addresses, relevant)
        ordered = ordered and key in found
        found[key] = held
    if not ordered:
        found = dict(sorted(found.items(), key=_first))
    return found, claims


_space = itemgetter(0)
"""Of an ObjectName: its namespace."""


def _first(item: tuple[ObjectName, object]) -> ObjectName:
    return item[0]


def _lives(item: PodFacts) -> bool:
    return bool(item.node) and not item.ended


def _claims(item: PodFacts) -> bool:
    return _lives(item) and not item.host_network


def _claimed(item: PodFacts) -> tuple[str, ...]:
    return (*item.addresses, _mirror(item)) if item.static else item.addresses


def _mirror(item: PodFacts) -> str:
    return f"mirror of {item.node}/{item.uid}"


def _first_made(claims: Iterable[PodFacts]) -> PodFacts:
    """Whoever may make pods may call one the mirror of a file: the first to be made is."""
    return min(claims, key=lambda item: (item.since, item.key))


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
        host_ports=item.host_ports,
    )


# ---- services ------------------------------------------------------------------------------


def _services(
    snapshot: Snapshot, before: ClusterWorld, of_services: services.Settings
) -> dict[ObjectName, Service]:
    """Looks only at Services that changed."""
    same = of_services == before.of_services
    old: Mapping[Key, ServiceFacts] = before.snapshot.services if same else {}
    now = snapshot.services
    if same and now is old:
        return before.services
    found = dict(before.services)
    for key in changed(old, now):
        name, written = ObjectName(*key), now[key].written
        addresses = _cluster_ips(written) if services.is_programmed(written) else ()
        held = before.services.get(name)
        found[name] = services.service(name, written, addresses, held, of_services)
    return _as_there(found, now, before.services)


def _as_there(
    found: dict[ObjectName, _V], there: Mapping[Any, object], before: Mapping[ObjectName, object]
) -> dict[ObjectName, _V]:
    """Without what is not `there`; in order, as `before` is."""
    if len(found) == len(before) == len(there):  # nothing came, so nothing went
        return found
    for name in found.keys() - there.keys():
        del found[name]
    return dict(sorted(found.items(), key=_first))


def _cluster_ips(written: users.Service) -> tuple[str, ...]:
    """As the API server gave them."""
    spec = written.spec
    texts = dict.fromkeys((spec.cluster_ip, *spec.cluster_ips))
    return tuple(services.canonical(text) for text in texts if text)


def _by_service(
    snapshot: Snapshot, before: ClusterWorld
) -> dict[ObjectName, dict[Key, EndpointList]]:
    """Looks only at slices that changed."""
    old, now = before.snapshot.slices, snapshot.slices
    if now is old:
        return before.by_service
    found = dict(before.by_service)
    new = changed(old, now)
    others = {*new, *gone(old, now)}
    touched: set[ObjectName] = set()
    for key in others:
        for item in (old.get(key), now.get(key)):
            if item is not None and item.service:
                touched.add(ObjectName(key[0], item.service))
    for name in touched:
        held = found.get(name, {})
        found[name] = {key: item for key, item in held.items() if key not in others}
    for key in new:
        if owner := now[key].service:
            found[ObjectName(key[0], owner)][key] = now[key].endpoints
    for name in touched:
        if not found[name]:
            del found[name]
    return found


def triggers(before: Snapshot, now: Snapshot) -> dict[str, str]:
    """Key of a service -> when the first of its EndpointSlices that are others than `before` has
    changed, as they say (RFC 3339, in UTC: in the order of time). Nothing of what is read first:
    nobody knows how long it has been so."""
    if not before.slices:
        return {}
    found: dict[str, str] = {}
    for key in changed(before.slices, now.slices):
        item = now.slices[key]
        if item.service and item.triggered:
            name = f"{key[0]}/{item.service}"
            found[name] = min(found.get(name, item.triggered), item.triggered)
    return found


def _endpoints(
    served: dict[ObjectName, Service],
    by_service: Mapping[ObjectName, Mapping[Key, EndpointList]],
    before: ClusterWorld,
) -> dict[ObjectName, Endpoints]:
    if served is before.services and by_service is before.by_service:
        return before.endpoints
    nothing: Mapping[Key, EndpointList] = {}
    found = dict(before.endpoints)
    touched = {
        *changed(before.services, served),
        *changed(before.by_service, by_service),
        *gone(before.by_service, by_service),
    }
    for name in touched & served.keys():
        own = by_service.get(name, nothing)
        made = endpoints.from_slices(served[name], [*own.values()])
        held = before.endpoints.get(name)
        found[name] = held if held is not None and held == made else made
    return _as_there(found, served, before.endpoints)


# ---- what people should know ---------------------------------------------------------------


def _said(
    snapshot: Snapshot,
    before: ClusterWorld,
    remarks: Mapping[tuple[str, Key], tuple[Problem, ...]],
) -> tuple[Problem, ...]:
    if (
        remarks is before.remarks
        and same_policies(snapshot, before.snapshot)
        and snapshot.invalid is before.snapshot.invalid
    ):
        return before.said
    return (*_of_objects(snapshot), *(one for key in sorted(remarks) for one in remarks[key]))


def _remarks(
    snapshot: Snapshot, before: ClusterWorld, of_services: services.Settings
) -> dict[tuple[str, Key], tuple[Problem, ...]]:
    """Looks only at what changed; the same object if nothing of it did."""
    same = of_services == before.of_services
    old = before.snapshot if same else Snapshot()
    found = dict(before.remarks) if same else {}
    pairs: tuple[tuple[str, Mapping[Key, object], Mapping[Key, object]], ...] = (
        ("Service", old.services, snapshot.services),
        ("EndpointSlice", old.slices, snapshot.slices),
    )
    for kind, was, now in pairs:
        for key in gone(was, now):
            found.pop((kind, key), None)
        for key in changed(was, now):
            if said := tuple(_remarks_of(key, now[key], of_services)):
                found[kind, key] = said
            else:
                found.pop((kind, key), None)
    return before.remarks if same and found == before.remarks else found


def _remarks_of(key: Key, item: object, of_services: services.Settings) -> Iterable[Problem]:
    match item:
        case ServiceFacts(written=written, ignored=ignored):
            for remark in services.remarks(written, of_services):
                yield _problem("warning", "Service", key, *remark)
            for name in ignored:
                yield _problem("warning", "Service", key, name, "is not known here, and not served")
        case SliceFacts(endpoints=found) if found.refused:
            text = f"{', '.join(found.refused)}: unspecified, loopback or link-local"
            remedy = "name addresses that are the same for every node"
            yield _problem("error", "EndpointSlice", key, "endpoints", text, remedy)


def _of_objects(snapshot: Snapshot) -> Iterable[Problem]:
    for kind, objects in sorted(snapshot.invalid.items()):
        for key, reason in sorted(objects.items()):
            yield _problem("error", kind, key, "", f"{reason}; {STAYS}", "repair the object")
    for policy, held in sorted(every_policy(snapshot), key=lambda item: item[0]):
        if held.unread:
            text = f"{held.why}: rules that are not understood allow nothing"
            if policy.kind != "NetworkPolicy":
                text += ", and those that would deny or pass deny everything"
            remedy = "say it in fields that this version serves, or upgrade Tidegate"
            key = (policy.namespace, policy.name)
            yield _problem("error", policy.kind, key, "spec", text, remedy)


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


EMPTY_CLUSTER = ClusterWorld(
    nodes={},
    namespaces={},
    pods={},
    services={},
    endpoints={},
    policies={},
    identities={},
    sources={},
    relevance=Relevance(),
    asked=Relevance(),
    pod_cidrs=(),
    snapshot=Snapshot(),
    by_service={},
    stalled={},
    claims={},
    of_services=services.DEFAULTS,
    remarks={},
    said=(),
)
