"""Objects as an API server sends them -> what of them matters to a network.

Every decoder takes the JSON of one object and raises DecodeError if it is not one. What it
returns is small, frozen and comparable: an object whose other parts changed (a heartbeat, a
container's state) is equal to what it was before. Many strings occur often, so they are kept
once. No I/O.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Callable, Mapping
from sys import intern
from typing import Any, Generic, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from tidegate_api import API_VERSION, clusterpolicy, state, trafficpolicy, users

from tidegate_operator import endpoints, unread
from tidegate_operator.meanings import WrittenPolicy
from tidegate_operator.objects import (
    ContainerPort,
    EndpointList,
    HostPort,
    Listed,
    ObjectName,
    Protocol,
)
from tidegate_operator.policies import RulePlace
from tidegate_operator.services import (
    FAMILIES,
    SERVICE_NAME_LABEL,
    ZONE_LABEL,
    family_of,
    host_port,
)

NOT_READY_TAINT = "tidegate.dev/agent-not-ready"
PORT_CACHE = 4096
"""Container ports that are kept once: the pods of a workload have the same."""
MAX_ERRORS = 5
"""Errors named for one object."""


class DecodeError(Exception):
    """The object is not one of its kind, or not one that we understand."""


# ---- What is left of them ----------------------------------------------------------------


class PodFacts(msgspec.Struct, frozen=True):
    """`addresses`: canonical, IPv4 first. `ended`: every container has, for good; such a pod
    keeps its addresses in the API, and somebody else may have them. `since`: RFC 3339, when it
    started, or was made; orders the claims to one address. `ports`: those with a name, in the
    order in which it is looked for."""

    key: ObjectName
    uid: str
    labels: dict[str, str]
    node: str
    host_network: bool
    addresses: tuple[str, ...]
    ports: tuple[ContainerPort, ...]
    running: bool
    ended: bool
    since: str
    host_ports: tuple[HostPort, ...] = ()
    static: bool = False
    """Of a file on its node: the API has a mirror of it, whose UID the runtime does not know."""


class NodeFacts(msgspec.Struct, frozen=True):
    """`pod_cidrs` and `addresses` (internal and external): canonical; addresses IPv4 first, and
    internal ones before external ones. `zone` "": in none."""

    name: str
    uid: str
    addresses: tuple[str, ...]
    pod_cidrs: tuple[str, ...]
    taint: int | None
    """Where in `spec.taints` ours is."""
    taints: int
    linux: bool
    zone: str = ""
    labels: dict[str, str] = {}


class NamespaceFacts(msgspec.Struct, frozen=True):
    name: str
    labels: dict[str, str]


class SliceFacts(msgspec.Struct, frozen=True):
    """`service` "": of none."""

    service: str
    endpoints: EndpointList
    triggered: str = ""
    """When what it tells of has changed, as its writer says; "": it does not."""


class ServiceFacts(msgspec.Struct, frozen=True):
    """`ignored`: fields that we do not know; the rest of the Service works."""

    written: users.Service
    ignored: tuple[str, ...]


class Target(msgspec.Struct, frozen=True):
    """An object to say something about."""

    uid: str
    generation: int


class PolicyFacts(msgspec.Struct, frozen=True):
    written: WrittenPolicy
    target: Target
    unread: tuple[RulePlace, ...] = ()
    """Rules that are not understood; see the module of that name."""
    why: str = ""


class UserIdentityFacts(msgspec.Struct, frozen=True):
    """An Identity that a user made."""

    spec: users.IdentitySpec
    target: Target
    version: str
    status: state.IdentityStatus | msgspec.UnsetType


_O = TypeVar(
    "_O",
    state.RuleSet,
    state.StateSlice,
    state.NodeState,
    state.Identity,
    state.PolicyStatus,
    state.ClusterPolicyStatus,
)


class Held(msgspec.Struct, Generic[_O], frozen=True):
    """An object of our own kinds, and which version of it."""

    item: _O
    version: str
    uid: str


class Broken(msgspec.Struct, frozen=True):
    """An object of our own kinds that is not as we write it: there is nothing to learn from
    it, and it is replaced."""

    version: str
    uid: str
    reason: str


IdentityFacts = UserIdentityFacts | Held[state.Identity] | Broken


# ---- Upstream kinds, as far as we read them ------------------------------------------------


class _Camel(msgspec.Struct, frozen=True, rename="camel"):
    pass


class _Meta(_Camel, frozen=True):
    name: str
    namespace: str = ""
    uid: str = ""
    generation: int = 0
    labels: dict[str, str] | None = None
    creation_timestamp: str | None = None


class _Version(_Camel, frozen=True):
    uid: str = ""
    resource_version: str = ""


class _Head(_Camel, frozen=True):
    metadata: _Version


class _WithStatus(_Camel, frozen=True):
    status: state.IdentityStatus | msgspec.UnsetType = msgspec.UNSET


class _ContainerPort(_Camel, frozen=True):
    container_port: int = 0
    host_port: int | None = None
    host_ip: str | None = msgspec.field(default=None, name="hostIP")
    name: str | None = None
    protocol: Protocol | None = None


class _Container(_Camel, frozen=True):
    ports: list[_ContainerPort] | None = None
    restart_policy: str | None = None


class _PodSpec(_Camel, frozen=True):
    containers: list[_Container] | None = None
    init_containers: list[_Container] | None = None
    node_name: str | None = None
    host_network: bool | None = None


class _PodIP(_Camel, frozen=True):
    ip: str | None = None


class _PodStatus(_Camel, frozen=True):
    phase: str | None = None
    pod_ip: str | None = msgspec.field(default=None, name="podIP")
    pod_ips: list[_PodIP] | None = msgspec.field(default=None, name="podIPs")
    start_time: str | None = None


class _PodAnnotations(msgspec.Struct, frozen=True):
    mirror: str = msgspec.field(default="", name="kubernetes.io/config.mirror")


class _PodMeta(_Meta, frozen=True):
    annotations: _PodAnnotations | None = None


class _Pod(_Camel, frozen=True):
    metadata: _PodMeta
    spec: _PodSpec = _PodSpec()
    status: _PodStatus | None = None


class _Taint(_Camel, frozen=True):
    key: str = ""


class _NodeSpec(_Camel, frozen=True):
    pod_cidr: str | None = msgspec.field(default=None, name="podCIDR")
    pod_cidrs: list[str] | None = msgspec.field(default=None, name="podCIDRs")
    taints: list[_Taint] | None = None


class _NodeAddress(_Camel, frozen=True):
    type: str = ""
    address: str = ""


class _NodeStatus(_Camel, frozen=True):
    addresses: list[_NodeAddress] | None = None


class _Node(_Camel, frozen=True):
    metadata: _Meta
    spec: _NodeSpec | None = None
    status: _NodeStatus | None = None


class _Namespace(_Camel, frozen=True):
    metadata: _Meta


class _Conditions(_Camel, frozen=True):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class _Named(_Camel, frozen=True):
    name: str = ""


class _Hints(_Camel, frozen=True):
    for_zones: list[_Named] | None = None
    for_nodes: list[_Named] | None = None


class _Endpoint(_Camel, frozen=True):
    addresses: list[str] | None = None
    conditions: _Conditions | None = None
    node_name: str | None = None
    hints: _Hints | None = None


class _Port(_Camel, frozen=True):
    name: str | None = None
    protocol: Protocol | None = None
    port: int | None = None


class _Trigger(msgspec.Struct, frozen=True):
    time: str = msgspec.field(name="endpoints.kubernetes.io/last-change-trigger-time", default="")


class _SliceMeta(_Meta, frozen=True):
    annotations: _Trigger | None = None


class _EndpointSlice(_Camel, frozen=True):
    metadata: _SliceMeta
    address_type: str = ""
    endpoints: list[_Endpoint] | None = None
    ports: list[_Port] | None = None


_HASH = re.compile(r"[0-9a-f]{32}")
"""Of a static pod's file. No UID of the API server is like that."""

_A = TypeVar("_A")


def _decoder(kind: type[_A]) -> Callable[[bytes], _A]:
    made = msgspec.json.Decoder(kind)

    def decode(data: bytes) -> _A:
        try:
            return made.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DecodeError(str(error)) from error

    return decode


_head = _decoder(_Head)
_status = _decoder(_WithStatus)
_pod = _decoder(_Pod)
_node = _decoder(_Node)
_namespace = _decoder(_Namespace)
_slice = _decoder(_EndpointSlice)
_tree = _decoder(dict[str, Any])


def pod(data: bytes) -> PodFacts:
    found = _pod(data)
    meta, spec, status = found.metadata, found.spec, found.status or _PodStatus()
    # What the kubelet calls a static pod is the hash of its file.
    mirrored = meta.annotations.mirror if meta.annotations is not None else ""
    mirrored = mirrored if _HASH.fullmatch(mirrored) else ""
    texts = [item.ip for item in status.pod_ips or () if item.ip] or [status.pod_ip or ""]
    return PodFacts(
        key=ObjectName(intern(meta.namespace), meta.name),
        uid=mirrored or meta.uid,
        labels=_labels(meta),
        node=intern(spec.node_name or ""),
        host_network=bool(spec.host_network),
        addresses=_addresses(texts),
        ports=_named_ports(spec),
        host_ports=() if spec.host_network else _host_ports(spec),
        running=status.phase == "Running",
        ended=status.phase in ("Succeeded", "Failed"),
        since=status.start_time or meta.creation_timestamp or "",
        static=bool(mirrored),
    )


def node(data: bytes) -> NodeFacts:
    found = _node(data)
    spec, status = found.spec or _NodeSpec(), found.status or _NodeStatus()
    addresses = [
        item.address
        for kind in ("InternalIP", "ExternalIP")
        for item in status.addresses or ()
        if item.type == kind
    ]
    taints = [item.key for item in spec.taints or ()]
    labels = found.metadata.labels or {}
    cidrs = spec.pod_cidrs or ([spec.pod_cidr] if spec.pod_cidr else [])
    return NodeFacts(
        name=intern(found.metadata.name),
        uid=found.metadata.uid,
        addresses=_addresses(addresses),
        pod_cidrs=tuple(dict.fromkeys(_network(text) for text in cidrs)),
        taint=next((at for at, key in enumerate(taints) if key == NOT_READY_TAINT), None),
        taints=len(taints),
        linux=labels.get("kubernetes.io/os", "linux") == "linux",
        zone=intern(labels.get(ZONE_LABEL, "")),
        labels=labels,
    )


def namespace(data: bytes) -> NamespaceFacts:
    found = _namespace(data)
    return NamespaceFacts(intern(found.metadata.name), _labels(found.metadata))


def endpoint_slice(data: bytes) -> SliceFacts:
    found = _slice(data)
    owner = (found.metadata.labels or {}).get(SERVICE_NAME_LABEL, "")
    family = FAMILIES.get(found.address_type)
    ports = tuple(
        (port.name or "", port.protocol or "TCP", port.port) for port in found.ports or ()
    )
    listed: list[Listed] = []
    refused: list[str] = []
    # Names (addressType FQDN) lead nowhere.
    for item in found.endpoints or () if family is not None else ():
        one = _listed(item)
        if one is not None and users.is_special(one.address):
            refused.append(one.address)
        elif one is not None:
            listed.append(one)
    return SliceFacts(
        intern(owner),
        EndpointList(family, ports, tuple(listed), tuple(sorted(refused))),
        found.metadata.annotations.time if found.metadata.annotations is not None else "",
    )


def _listed(item: _Endpoint) -> Listed | None:
    """What is not said of conditions: ready, and serving, and not terminating."""
    conditions, hints = item.conditions or _Conditions(), item.hints or _Hints()
    try:
        return endpoints.listed(
            item.addresses or (),
            conditions.ready is not False,
            conditions.serving is not False,
            conditions.terminating is True,
            intern(item.node_name or ""),
            [intern(zone.name) for zone in hints.for_zones or ()],
            [intern(node.name) for node in hints.for_nodes or ()],
        )
    except ValueError as error:
        raise DecodeError(str(error)) from error


def service(data: bytes) -> ServiceFacts:
    """A Service that the API server took is served as far as we understand it: fields that
    a newer server knows and we do not are left out, and named."""
    tree = _bare(data, "v1", "Service", status=True)
    try:
        return ServiceFacts(users.Service.model_validate(tree), ())
    except ValidationError as error:
        unknown = [
            item["loc"]
            for item in error.errors(include_url=False)
            if item["type"] == "extra_forbidden"
        ]
        if not unknown:
            raise DecodeError(_words(error)) from error
    for path in unknown:
        unread.remove(tree, path)
    names = tuple(".".join(map(str, path)) for path in unknown)
    return ServiceFacts(_validate(users.Service, tree), names)


def network_policy(data: bytes) -> PolicyFacts:
    return _policy(data, "networking.k8s.io/v1", users.NetworkPolicy)


def cluster_policy(data: bytes) -> PolicyFacts:
    return _policy(data, clusterpolicy.API_VERSION, clusterpolicy.ClusterNetworkPolicy)


def traffic_policy(data: bytes) -> PolicyFacts:
    return _policy(data, API_VERSION, trafficpolicy.TrafficPolicy)


def _policy(data: bytes, version: str, model: type[WrittenPolicy]) -> PolicyFacts:
    """A policy that the API server took isolates and denies, whatever else it says: see `unread`.
    DecodeError: not even whom it selects can be told."""
    tree = _bare(data, version, model.__name__)
    try:
        written = model.model_validate(tree)
    except ValidationError as error:
        try:
            left = unread.leave(tree, error, model)
        except unread.Unreadable:
            raise DecodeError(_words(error)) from error
        written = _validate(model, tree)
        return PolicyFacts(written, _target(written), left, _words(error))
    return PolicyFacts(written, _target(written))


# ---- Our own kinds -----------------------------------------------------------------------


def identity(data: bytes) -> IdentityFacts:
    """Decimal names are the operator's own, all others a user's."""
    found = _namespace(data)
    if found.metadata.name.isdigit():
        return allocated(data)
    written = _validate(users.Identity, _bare(data, API_VERSION, "Identity"))
    version = _head(data).metadata.resource_version
    try:
        status = _status(data).status
    except DecodeError:  # it is ours to write, whatever it is now
        status = msgspec.UNSET
    return UserIdentityFacts(written.spec, _target(written), version, status)


def _ours(kind: type[_O]) -> Callable[[bytes], Held[_O] | Broken]:
    made = _decoder(kind)

    def decode(data: bytes) -> Held[_O] | Broken:
        meta = _head(data).metadata
        try:
            return Held(made(data), meta.resource_version, meta.uid)
        except DecodeError as error:
            return Broken(meta.resource_version, meta.uid, str(error))

    return decode


allocated = _ours(state.Identity)
rule_set = _ours(state.RuleSet)
state_slice = _ours(state.StateSlice)
node_state = _ours(state.NodeState)
policy_status = _ours(state.PolicyStatus)
cluster_policy_status = _ours(state.ClusterPolicyStatus)


# ---- Parts -------------------------------------------------------------------------------


def _labels(meta: _Meta) -> dict[str, str]:
    return {intern(key): intern(value) for key, value in (meta.labels or {}).items()}


def _named_ports(spec: _PodSpec) -> tuple[ContainerPort, ...]:
    """Of the containers, then of the init containers that go on running."""
    running = [item for item in spec.init_containers or () if item.restart_policy == "Always"]
    return tuple(
        _container_port(port.container_port, port.protocol or "TCP", port.name)
        for container in (*(spec.containers or ()), *running)
        for port in container.ports or ()
        if port.name
    )


def _host_ports(spec: _PodSpec) -> tuple[HostPort, ...]:
    found = {
        host_port(port.host_port, port.protocol or "TCP", port.container_port, port.host_ip or "")
        for container in (*(spec.containers or ()), *(spec.init_containers or ()))
        for port in container.ports or ()
        if port.host_port
    }
    return tuple(sorted(found))


_container_port = functools.lru_cache(maxsize=PORT_CACHE)(ContainerPort)


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise DecodeError(str(error)) from error


def _addresses(texts: list[str]) -> tuple[str, ...]:
    found = dict.fromkeys(_address(text) for text in texts if text)
    return tuple(sorted(found, key=family_of))


def _network(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError as error:
        raise DecodeError(str(error)) from error


def _bare(data: bytes, version: str, kind: str, status: bool = False) -> dict[str, Any]:
    """Without what changes without meaning anything; items of a list do not say their kind.
    `status`: the status means something, and the annotations, and how old the object is."""
    tree = _tree(data)
    tree.update(apiVersion=version, kind=kind)
    if not status:
        tree.pop("status", None)
    metadata = tree.get("metadata")
    if isinstance(metadata, Mapping):
        kept = ["name", "namespace", "labels", "uid", "generation"]
        kept += ["annotations", "creationTimestamp"] if status else []
        tree["metadata"] = {key: metadata[key] for key in kept if key in metadata}
    return tree


_M = TypeVar("_M", bound=BaseModel)


def _validate(model: type[_M], tree: dict[str, Any]) -> _M:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise DecodeError(_words(error)) from error


def _words(error: ValidationError) -> str:
    found = [
        f"{'.'.join(map(str, item['loc']))}: {item['msg']}"
        for item in error.errors(include_url=False)
    ]
    more = f"; and {len(found) - MAX_ERRORS} more" if len(found) > MAX_ERRORS else ""
    return "; ".join(found[:MAX_ERRORS]) + more


def _target(written: WrittenPolicy | users.Identity) -> Target:
    meta = written.metadata
    return Target(str(meta.uid or ""), int(meta.generation or 0))
