"""What the world is made of: frozen values, upstream defaults applied.

Dicts in them are never changed after they are made. Objects that did not change
between two worlds are the same Python objects, so that caches may key on `is`.
No I/O, no clock.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from tidegate_operator.problems import Source

if TYPE_CHECKING:
    from tidegate_operator.relevance import Relevance

Protocol = Literal["TCP", "UDP", "SCTP"]
Direction = Literal["Ingress", "Egress"]
PROTOCOLS: tuple[Protocol, Protocol, Protocol] = ("TCP", "UDP", "SCTP")
"""Those that have ports."""
PolicyProtocol = Literal["TCP", "UDP", "SCTP", "ICMP", "ICMPv6"]
Entity = Literal["world", "host", "remote-node", "kube-apiserver", "cluster"]
Action = Literal["Allow", "Deny", "Pass"]
Tier = Literal["Admin", "Developer", "Baseline"]

NAME_LABEL = "kubernetes.io/metadata.name"
"""On every Namespace, always its name: the one label of it that no user can set."""


class ObjectName(NamedTuple):
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class PolicyName(NamedTuple):
    """A policy object of any kind; `namespace` "" for cluster-scoped kinds."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        name = f"{self.namespace}/{self.name}" if self.namespace else self.name
        return f"{self.kind} {name}"


class IdentityKey(NamedTuple):
    """What an allocated identity stands for: a namespace and the identity-relevant
    labels, system labels among them (`relevance`), sorted by key; or `cidrs`, sorted, of
    hosts outside (namespace "")."""

    namespace: str
    labels: tuple[tuple[str, str], ...]
    cidrs: tuple[str, ...] = ()


# ---- Selectors -------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class Requirement:
    """One condition on a label. `values` sorted; empty for the two Exists."""

    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: tuple[str, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        match self.operator:
            case "In":
                return value is not None and value in self.values
            case "NotIn":  # a missing label is not in any list
                return value is None or value not in self.values
            case "Exists":
                return value is not None
            case "DoesNotExist":
                return value is None

    def __str__(self) -> str:
        match self.operator:
            case "In":
                return f"{self.key} in ({', '.join(self.values)})"
            case "NotIn":
                return f"{self.key} not in ({', '.join(self.values)})"
            case "Exists":
                return self.key
            case "DoesNotExist":
                return f"!{self.key}"


@dataclass(frozen=True, slots=True, order=True)
class Selector:
    """A label selector, normalised: requirements sorted and without repeats,
    matchLabels written as In. No requirement: selects everything."""

    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        return all(requirement.matches(labels) for requirement in self.requirements)

    def __str__(self) -> str:
        return ", ".join(map(str, self.requirements)) or "any"


@dataclass(frozen=True, slots=True)
class PodPeer:
    """Pods, by labels, of one `namespace` (namespaces is None), or of the namespaces
    that `namespaces` selects (namespace is None)."""

    namespace: str | None
    namespaces: Selector | None
    pods: Selector


@dataclass(frozen=True, slots=True)
class BlockPeer:
    """Addresses of `cidr` outside all `excepts`; canonical text, excepts sorted."""

    cidr: str
    excepts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EntityPeer:
    """What has a name whatever its address is."""

    entity: Entity


@dataclass(frozen=True, slots=True)
class NodePeer:
    """The addresses of nodes, by the nodes' labels."""

    nodes: Selector


@dataclass(frozen=True, slots=True)
class IdentityPeer:
    """Who a user-made Identity stands for, by its name."""

    identity: str


@dataclass(frozen=True, slots=True)
class NamedPortPeer:
    """Those of `peer` that have a container port of this name, with its number at each of
    them. `protocol` None: of whichever."""

    peer: PodPeer
    protocol: Protocol | None
    port: str


PolicyPeer = PodPeer | BlockPeer | EntityPeer | NodePeer | IdentityPeer
Picked = PodPeer | EntityPeer | NodePeer | IdentityPeer | NamedPortPeer
"""What may be a peer set."""

EVERY_POD = PodPeer(None, Selector(), Selector())


@dataclass(frozen=True, slots=True)
class PolicyPort:
    """`port` None: every port of the protocol; a text: the container port of that name, of the
    subject at ingress, of the peer at egress. `protocol` None: whichever that port has."""

    protocol: PolicyProtocol | None
    port: int | str | None = None
    end_port: int | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """None = any. Upstream's empty list is None here; only NOTHING has an empty tuple."""

    peers: tuple[PolicyPeer, ...] | None
    ports: tuple[PolicyPort, ...] | None
    action: Action = "Allow"
    log: bool = False
    written: tuple[int, ...] = field(default=(), compare=False)
    """Where several of `peers` are one item of the rule as written: of each, which one."""

    @property
    def port_names(self) -> list[tuple[Protocol, str]]:
        """Ports that are given by a name."""
        return [
            (protocol, port.port)
            for port in self.ports or ()
            if isinstance(port.port, str)
            for protocol in PROTOCOLS
            if port.protocol in (None, protocol)
        ]


NOTHING = PolicyRule((), ())
"""What a rule that cannot be read allows (DESIGN invariant 13): its policy still isolates."""
DENY_ALL = PolicyRule(None, None, "Deny")
"""What a rule that cannot be read becomes where matching nothing would allow more."""


@dataclass(frozen=True)
class Policy:
    """A policy of any kind after defaulting. Whoever is a subject of one that isolates is denied
    what no rule of its tier allows."""

    name: PolicyName
    subject: PodPeer
    """Whose traffic it judges."""
    isolates: frozenset[Direction]
    ingress: tuple[PolicyRule, ...]
    egress: tuple[PolicyRule, ...]
    origin: object = field(compare=False, repr=False)
    tier: Tier = "Developer"
    priority: int = 0
    """Within the tier, lower first."""
    audit: bool = False
    """Nothing is enforced; what would be denied is reported."""
    unserved: tuple[str, ...] = ()
    """Paths of fields that are understood and match nothing yet."""

    def rules(self, direction: Direction) -> tuple[PolicyRule, ...]:
        return self.ingress if direction == "Ingress" else self.egress

    def counts(self, direction: Direction) -> bool:
        """Whether it has a say at all."""
        return direction in self.isolates or bool(self.rules(direction))

    @functools.cached_property
    def selectors(self) -> tuple[tuple[str | None, Selector], ...]:
        """Every pod selector that is in force with the policy, and the namespace in whose pods
        it looks; None: in those of any."""
        found: list[tuple[str | None, Selector]] = [(self.subject.namespace, self.subject.pods)]
        for rule in (*self.ingress, *self.egress):
            found += [
                (peer.namespace, peer.pods)
                for peer in rule.peers or ()
                if isinstance(peer, PodPeer)
            ]
        return tuple(dict.fromkeys(found))

    @functools.cached_property
    def asks(self) -> tuple[tuple[str | None, str, tuple[str, ...]], ...]:
        """What `selectors` ask of labels: (namespace, key, values; none: whether it is there). To
        NotIn another value is as good as none."""
        found = [
            (namespace, part.key, part.values)
            for namespace, selector in self.selectors
            for part in selector.requirements
        ]
        return tuple(dict.fromkeys(found))

    @functools.cached_property
    def port_names(self) -> tuple[tuple[str | None, Protocol, str], ...]:
        """Every named port that a rule asks for, and the namespace in whose pods; None: in
        those of any. At ingress it is the subject's own, at egress the peer's."""
        found: list[tuple[str | None, Protocol, str]] = []
        for rule in self.ingress:
            found += [(self.subject.namespace, *port) for port in rule.port_names]
        for rule in self.egress:
            spaces = [peer.namespace for peer in named_port_peers(rule.peers) if peer is not None]
            found += [(space, *port) for space in spaces for port in rule.port_names]
        return tuple(dict.fromkeys(found))


def named_port_peers(peers: tuple[PolicyPeer, ...] | None) -> tuple[PodPeer | None, ...]:
    """The pods that each peer of an egress rule is, where a port has a name; None: it has none,
    for it is no pod, or not known to be one."""
    if peers is None:
        return (EVERY_POD,)
    return tuple(
        peer
        if isinstance(peer, PodPeer)
        else (EVERY_POD if peer == EntityPeer("cluster") else None)
        for peer in peers
    )


# ---- Cluster -----------------------------------------------------------------------


def gateways(pod_cidrs: Iterable[str]) -> tuple[str, ...]:
    """The first address of each pod CIDR, as the common CNIs have it."""
    return tuple(str(ipaddress.ip_network(cidr)[1]) for cidr in pod_cidrs)


@dataclass(frozen=True)
class Node:
    """Addresses and CIDRs in canonical text. `uid` "": it is no API object. `zone` "": in none.
    `port_addresses`: those that answer for NodePorts and host ports, IPv4 first. `masquerade`:
    as `services.Settings` have it."""

    name: str
    addresses: tuple[str, ...]
    pod_cidrs: tuple[str, ...]
    uid: str = ""
    zone: str = ""
    port_addresses: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    masquerade: tuple[str, ...] | None = None

    @functools.cached_property
    def gateways(self) -> tuple[str, ...]:
        """Where the node's pods send what is not for them; addresses of the node's own."""
        return gateways(self.pod_cidrs)


@dataclass(frozen=True, slots=True)
class ContainerPort:
    port: int
    protocol: Protocol
    name: str = ""


class HostPort(NamedTuple):
    """A port of the node that leads to a pod's port `target`. `address` "": at every address that
    answers for such ports."""

    port: int
    protocol: Protocol
    target: int
    address: str = ""


@dataclass(frozen=True)
class Pod:
    """One pod on its node. `addresses`: canonical, IPv4 first, those that are known and
    nobody else's; a host-network pod has its node's. `ports`: in the order in which a name is
    looked for."""

    uid: str
    namespace: str
    name: str
    labels: dict[str, str]
    node: str
    addresses: tuple[str, ...]
    ports: tuple[ContainerPort, ...]
    host_network: bool
    identity: IdentityKey
    origin: object = field(compare=False, repr=False)
    host_ports: tuple[HostPort, ...] = ()
    """Sorted; () in the host's network, where a port is the node's anyway."""


@dataclass(frozen=True, slots=True)
class ServicePort:
    port: int
    protocol: Protocol
    name: str
    target: int | str
    """A container port, or the name of one."""
    node_port: int = 0
    """Of every node; 0: none."""


class Outside(NamedTuple):
    """An address of a Service that is reached from outside; canonical."""

    kind: Literal["ExternalIP", "LoadBalancer"]
    address: str


@dataclass(frozen=True)
class Service:
    """`cluster_ips`: one per family, () for headless, ExternalName and what another proxy
    serves: of such a Service nothing is programmed. `selector` None: the Service's endpoints are
    somebody's EndpointSlices."""

    name: ObjectName
    type: str
    selector: dict[str, str] | None
    ports: tuple[ServicePort, ...]
    cluster_ips: tuple[str, ...]
    origin: object = field(compare=False, repr=False)
    outside: tuple[Outside, ...] = ()
    """Sorted, of both families."""
    affinity: int = 0
    """Seconds; 0: none."""
    internal_local: bool = False
    external_local: bool = False
    source_ranges: tuple[str, ...] = ()
    """Sorted, of both families; (): everybody."""
    health_check_port: int = 0
    maglev: bool = False
    near: Literal["", "PreferSameZone", "PreferSameNode"] = ""
    """Which hints endpoints get that are derived from a selector."""
    since: str = ""
    """RFC 3339; "" = not known. The older one keeps an address that two claim."""


class Backend(NamedTuple):
    """An endpoint behind a Service's port, as its EndpointSlice has it. `node` "": none. `zones`,
    `nodes`: hints, sorted; (): none. `ends`: it is terminating and still serves."""

    address: str
    port: int
    node: str = ""
    zones: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    ends: bool = False


@dataclass(frozen=True, slots=True)
class EndpointPort:
    """The backends of one Service port in one family: sorted, each address and port once."""

    port: int
    protocol: Protocol
    family: Literal[4, 6]
    backends: tuple[Backend, ...]


class Listed(NamedTuple):
    """An endpoint of a slice that is ready, or `ends` and serves; as Backend, without a port."""

    address: str
    node: str = ""
    zones: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    ends: bool = False


@dataclass(frozen=True, slots=True)
class EndpointList:
    """One EndpointSlice after defaulting. `family` None: names, which lead nowhere.
    `ports`: (name, protocol, number; None = the Service's own). `endpoints`: those that may get
    connections, with one address of each; `refused`: addresses that may not be an endpoint's."""

    family: Literal[4, 6] | None
    ports: tuple[tuple[str, Protocol, int | None], ...]
    endpoints: tuple[Listed, ...]
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Endpoints:
    """Where a Service leads. `notes`: what is odd about it, (field, message, remedy)."""

    ports: tuple[EndpointPort, ...]
    notes: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class UserIdentity:
    """A user-made Identity: pods to come (pre-warming), or hosts outside."""

    name: str
    key: IdentityKey


@dataclass(frozen=True)
class World:
    """One snapshot. Every mapping is in sorted order of its keys."""

    nodes: Mapping[str, Node]
    namespaces: dict[str, dict[str, str]]
    """name -> labels, NAME_LABEL included."""
    pods: Mapping[ObjectName, Pod]
    services: dict[ObjectName, Service]
    endpoints: dict[ObjectName, Endpoints]
    policies: dict[PolicyName, Policy]
    identities: dict[str, UserIdentity]
    sources: dict[tuple[str, str, str], Source]
    """(kind, namespace, name) -> where it was written."""
    relevance: Relevance
    """What of a pod has made its identity."""
    asked: Relevance
    """What the policies ask for; `relevance` may for a while tell more apart."""
    pod_cidrs: tuple[str, ...]
    """Every address that a pod may ever have."""
    apiservers: tuple[str, ...] = ()
    """Addresses that serve the API, of nodes or others; canonical, sorted."""
