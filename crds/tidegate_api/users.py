"""The kinds that people write, as far as Tidegate reads them.

NetworkPolicy, Service and Identity, whose meaning is ours to enforce, are
modelled whole: a misspelt field is an error that names it. Workloads are
modelled for the fields that matter to a network and let the rest pass.

Upstream kinds mean what the API server's decoder and defaulting make of them
(DESIGN invariant 9): null and absent are the same, a scalar is never converted.
Nothing here reads files or knows where a document came from.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

Protocol = Literal["TCP", "UDP", "SCTP"]
Family = Literal["IPv4", "IPv6"]
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_NAME = 63
MAX_SUBDOMAIN = 253
MAX_LABELS = 128
"""Labels of one user-made Identity."""
MAX_CIDRS = 1024
"""CIDRs of one user-made Identity."""

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUALIFIED = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")


def invalid(message: str, remedy: str) -> PydanticCustomError:
    """The error every validator here raises: what is wrong and what to do."""
    return PydanticCustomError(
        "tidegate", "{message}; {remedy}", {"message": message, "remedy": remedy}
    )


def short(text: str) -> str:
    """What people wrote, for a message: they may have written anything."""
    return text if len(text) <= 60 else f"{text[:40]}… ({len(text)} characters)"


# ---- Scalars ------------------------------------------------------------------


def _dns_label(value: str) -> str:
    if len(value) > MAX_NAME or not _LABEL.fullmatch(value):
        raise invalid(
            f"{short(value)!r} is not an RFC 1123 label",
            f"use at most {MAX_NAME} lower-case letters, digits and '-', "
            "beginning and ending with a letter or digit",
        )
    return value


def _subdomain(value: str) -> str:
    if len(value) > MAX_SUBDOMAIN or not _SUBDOMAIN.fullmatch(value):
        raise invalid(
            f"{short(value)!r} is not an RFC 1123 name",
            f"use at most {MAX_SUBDOMAIN} lower-case letters, digits, '-' and '.', "
            "beginning and ending with a letter or digit",
        )
    return value


def check_label_key(key: str) -> None:
    """Raise unless `key` is `[prefix/]name` with prefix <= 253 and name <= 63."""
    prefix, slash, name = key.rpartition("/")
    if slash and (len(prefix) > MAX_SUBDOMAIN or not _SUBDOMAIN.fullmatch(prefix)):
        raise invalid(
            f"the prefix of label key {short(key)!r} is not an RFC 1123 name",
            f"use a DNS name of at most {MAX_SUBDOMAIN} characters before the '/'",
        )
    if len(name) > MAX_NAME or not _QUALIFIED.fullmatch(name):
        raise invalid(
            f"{short(key)!r} is not a label key",
            f"use at most {MAX_NAME} letters, digits, '-', '_' and '.', "
            "beginning and ending with a letter or digit",
        )


def _matching(pattern: re.Pattern[str], most: int) -> WithJsonSchema:
    """What an API server checks of a text that a validator here checks too."""
    return WithJsonSchema({"type": "string", "maxLength": most, "pattern": f"^{pattern.pattern}$"})


def check_label_value(key: str, value: str) -> None:
    if value and (len(value) > MAX_NAME or not _QUALIFIED.fullmatch(value)):
        raise invalid(
            f"{short(value)!r} is not a value for label {short(key)!r}",
            f"use at most {MAX_NAME} letters, digits, '-', '_' and '.', "
            "beginning and ending with a letter or digit",
        )


def _labels(value: dict[str, str]) -> dict[str, str]:
    for key, text in value.items():
        check_label_key(key)
        check_label_value(key, text)
    return value


def _null_values(value: object) -> object:
    """As Go decodes map[string]string: null is the empty string."""
    if isinstance(value, dict):
        return {key: "" if text is None else text for key, text in value.items()}
    return value


def _port(value: int) -> int:
    if not 1 <= value <= 65535:
        raise invalid(f"{value} is not a port", "use a number from 1 to 65535")
    return value


def port_name(value: str) -> str:
    if len(value) > 15 or not _PORT_NAME.fullmatch(value):
        raise invalid(
            f"{short(value)!r} is not a port name",
            "use at most 15 lower-case letters, digits and '-', with at least one letter",
        )
    return value


def _port_or_name(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise invalid(f"{value!r} is neither a port number nor a port name", "use 1 to 65535")
    if isinstance(value, int):
        return _port(value)
    if value.isdigit():
        raise invalid(f"{value!r} is text, not a number", f"write it without quotes: {value}")
    return port_name(value)


def network(text: str) -> IPNetwork:
    """Parse a CIDR. Raises `invalid` for host bits, naming the masked CIDR."""
    address, slash, bits = text.partition("/")
    if not slash or not bits.isascii() or not bits.isdigit() or "%" in address:
        raise invalid(f"{short(text)!r} is not a CIDR", "write address/bits, as in 10.0.0.0/8")
    try:
        whole = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise invalid(
            f"{short(text)!r} is not a CIDR",
            "write address/bits, as in 10.0.0.0/8 or fd00::/8, without leading zeros",
        ) from None
    if ipaddress.ip_address(address) != whole.network_address:
        raise invalid(f"{text!r} has bits set to the right of its mask", f"write {whole}")
    return whole


def check_excepts(cidr: str, excepts: Sequence[str]) -> None:
    """Each of `excepts` is a smaller network within `cidr`; all of them are known to be networks.
    Raises `invalid`."""
    whole = ipaddress.ip_network(cidr)
    for text in excepts:
        part = ipaddress.ip_network(text)
        inside = part.version == whole.version and part.subnet_of(whole)  # type: ignore[arg-type]
        if not inside or part == whole:
            raise invalid(
                f"except {text} does not lie strictly inside {cidr}",
                f"list only smaller networks within {cidr}",
            )


def _cidr(value: str) -> str:
    network(value)
    return value


def _ip(value: str) -> str:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        raise invalid(f"{short(value)!r} is not an IP address", "write one address") from None
    return value


def is_special(value: str) -> bool:
    """Whether an API server refuses the address for an endpoint or as an external one: nobody's,
    loopback or link-local, which mean something else on every node."""
    address = ipaddress.ip_address(value)
    local = ipaddress.ip_network("224.0.0.0/24" if address.version == 4 else "ff02::/16")
    return (
        address.is_unspecified or address.is_loopback or address.is_link_local or address in local
    )


def _outer_ip(value: str) -> str:
    _ip(value)
    if is_special(value):
        raise invalid(
            f"{value} is unspecified, loopback or link-local",
            "write an address that is the same for every node",
        )
    return value


def _padded_cidr(value: str) -> str:
    """An API server takes spaces around it."""
    return _cidr(value.strip())


def _cluster_ip(value: str) -> str:
    return value if value in ("", "None") else _ip(value)


DNSLabel = Annotated[str, AfterValidator(_dns_label), _matching(_LABEL, MAX_NAME)]
Subdomain = Annotated[str, AfterValidator(_subdomain), _matching(_SUBDOMAIN, MAX_SUBDOMAIN)]
Labels = Annotated[dict[str, str], BeforeValidator(_null_values), AfterValidator(_labels)]
Annotations = Annotated[dict[str, str], BeforeValidator(_null_values)]
Port = Annotated[int, AfterValidator(_port)]
PortName = Annotated[str, AfterValidator(port_name)]
PortOrName = Annotated[Any, BeforeValidator(_port_or_name)]
"""int or str; a union would hide which of the two was meant in its errors."""
CIDR = Annotated[str, AfterValidator(_cidr)]
IP = Annotated[str, AfterValidator(_ip)]
OuterIP = Annotated[str, AfterValidator(_outer_ip)]
PaddedCIDR = Annotated[str, AfterValidator(_padded_cidr)]
ClusterIP = Annotated[str, AfterValidator(_cluster_ip)]


# ---- Bases ------------------------------------------------------------------------


class Own(BaseModel):
    """Base of Tidegate's own kinds: null is an error, absence has a meaning."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, alias_generator=to_camel)


class Upstream(Own):
    """Base of upstream kinds: null is absence, at every level."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: object) -> object:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data


class Open(Upstream):
    """An upstream type of which we know only some fields."""

    model_config = ConfigDict(extra="ignore")


class ObjectMeta(Upstream):
    name: Subdomain
    namespace: DNSLabel = ""
    """"" = not written; the reader makes it "default" where the kind is namespaced."""
    labels: Labels = {}
    annotations: Annotations = {}
    generate_name: Any = None
    uid: Any = None
    resource_version: Any = None
    generation: Any = None
    creation_timestamp: Any = None
    deletion_timestamp: Any = None
    deletion_grace_period_seconds: Any = None
    finalizers: Any = None
    owner_references: Any = None
    managed_fields: Any = None
    self_link: Any = None


class Object(Upstream):
    """What every upstream object has. `status` is accepted (exported manifests
    carry it) and never read."""

    namespaced: ClassVar[bool] = True

    api_version: str
    kind: str
    metadata: ObjectMeta
    status: Any = None


class PodMeta(Open):
    """metadata of a pod template; names in it are ignored, as upstream does."""

    labels: Labels = {}
    annotations: Annotations = {}


# ---- Selectors ----------------------------------------------------------------------


class LabelSelectorRequirement(Upstream):
    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: list[str] = []

    @model_validator(mode="after")
    def _values_fit_operator(self) -> Self:
        check_label_key(self.key)
        if self.operator in ("In", "NotIn"):
            if not self.values:
                raise invalid(
                    f"operator {self.operator} of {self.key!r} has no values",
                    "list at least one value, or use Exists or DoesNotExist",
                )
            for value in self.values:
                check_label_value(self.key, value)
        elif self.values:
            raise invalid(
                f"operator {self.operator} of {self.key!r} takes no values", "remove values"
            )
        return self


class LabelSelector(Upstream):
    """`{}` selects everything; the absent selector is the holder's to define."""

    match_labels: Labels = {}
    match_expressions: list[LabelSelectorRequirement] = []


# ---- Cluster ---------------------------------------------------------------------------


class Namespace(Object):
    namespaced = False

    spec: Any = None

    @model_validator(mode="after")
    def _label_name(self) -> Self:
        _dns_label(self.metadata.name)
        return self


class Node(Object):
    namespaced = False

    spec: Any = None


# ---- Workloads ---------------------------------------------------------------------------


class ContainerPort(Open):
    container_port: Port
    name: PortName = ""
    protocol: Protocol = "TCP"
    host_port: Annotated[int, Field(ge=0, le=65535)] = 0
    host_ip: str = Field(default="", alias="hostIP")


class Container(Open):
    name: DNSLabel
    ports: list[ContainerPort] = []
    restart_policy: str = ""
    """Of an init container: Always, and it goes on running."""


class PodSpec(Open):
    containers: Annotated[list[Container], Field(min_length=1)]
    init_containers: list[Container] = []
    node_name: Subdomain = ""
    host_network: bool = False


class PodTemplate(Open):
    metadata: PodMeta = PodMeta()
    spec: PodSpec


class Pod(Object):
    spec: PodSpec


class WorkloadSpec(Open):
    selector: LabelSelector
    template: PodTemplate

    @model_validator(mode="after")
    def _selects_its_template(self) -> Self:
        labels = self.template.metadata.labels
        for key, value in self.selector.match_labels.items():
            if labels.get(key) != value:
                raise invalid(
                    f"selector wants label {key}={value}, which the template does not carry",
                    f"add {key}: {value!r} to spec.template.metadata.labels",
                )
        return self


Count = Annotated[int, Field(ge=0)]


class ReplicatedSpec(WorkloadSpec):
    replicas: Count = 1


class StatefulSetOrdinals(Open):
    start: Count = 0


class StatefulSetSpec(ReplicatedSpec):
    ordinals: StatefulSetOrdinals = StatefulSetOrdinals()


class JobSpec(Open):
    template: PodTemplate
    parallelism: Count = 1
    completions: Count | None = None
    suspend: bool = False


class Deployment(Object):
    spec: ReplicatedSpec


class ReplicaSet(Object):
    spec: ReplicatedSpec


class StatefulSet(Object):
    spec: StatefulSetSpec


class DaemonSet(Object):
    spec: WorkloadSpec


class Job(Object):
    spec: JobSpec


# ---- Services --------------------------------------------------------------------------------


class ServicePort(Upstream):
    port: Port
    name: DNSLabel = ""
    protocol: Protocol = "TCP"
    target_port: PortOrName = None
    """Absent: the same as `port`."""
    node_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """0: an API server gives one where the type has them."""
    app_protocol: Any = None


class ClientIPConfig(Upstream):
    timeout_seconds: Annotated[int, Field(ge=1, le=86_400)] = 10_800


class SessionAffinityConfig(Upstream):
    client_ip: ClientIPConfig = Field(default=ClientIPConfig(), alias="clientIP")


class ServiceSpec(Upstream):
    type: Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"] = "ClusterIP"
    selector: Labels = {}
    ports: list[ServicePort] = []
    cluster_ip: ClusterIP = Field(default="", alias="clusterIP")
    cluster_ips: list[ClusterIP] = Field(default=[], alias="clusterIPs")
    ip_families: list[Family] = []
    ip_family_policy: Literal["SingleStack", "PreferDualStack", "RequireDualStack"] = "SingleStack"
    session_affinity: Literal["None", "ClientIP"] = "None"
    internal_traffic_policy: Literal["Cluster", "Local"] = "Cluster"
    external_traffic_policy: Literal["Cluster", "Local"] | None = None
    publish_not_ready_addresses: bool = False
    external_ips: list[OuterIP] = Field(default=[], alias="externalIPs")
    external_name: Any = None
    load_balancer_ip: Any = Field(default=None, alias="loadBalancerIP")
    load_balancer_class: Any = None
    load_balancer_source_ranges: list[PaddedCIDR] = []
    allocate_load_balancer_node_ports: bool = True
    health_check_node_port: Annotated[int, Field(ge=0, le=65535)] = 0
    session_affinity_config: SessionAffinityConfig = SessionAffinityConfig()
    traffic_distribution: str = ""

    @model_validator(mode="after")
    def _ports_are_distinct(self) -> Self:
        names, numbers = set(), set()
        for port in self.ports:
            if len(self.ports) > 1 and not port.name:
                raise invalid(f"port {port.port} has no name", "name every port of several")
            if port.name and port.name in names:
                raise invalid(f"two ports are named {port.name!r}", "give each its own name")
            if (port.port, port.protocol) in numbers:
                raise invalid(f"port {port.port}/{port.protocol} appears twice", "remove one")
            names.add(port.name)
            numbers.add((port.port, port.protocol))
        if not self.ports and self.type != "ExternalName" and self.cluster_ip != "None":
            raise invalid("the Service has no ports", "list at least one port in spec.ports")
        return self


class LoadBalancerIngress(Open):
    ip: str = ""
    ip_mode: str = "VIP"


class LoadBalancerStatus(Open):
    ingress: list[LoadBalancerIngress] = []


class ServiceStatus(Open):
    load_balancer: LoadBalancerStatus = LoadBalancerStatus()


class Service(Object):
    spec: ServiceSpec
    status: ServiceStatus = ServiceStatus()
    """Read, unlike other kinds': the addresses of its load balancer are nowhere else."""

    @model_validator(mode="after")
    def _label_name(self) -> Self:
        _dns_label(self.metadata.name)
        return self


class EndpointConditions(Open):
    ready: bool = True
    serving: bool = True
    terminating: bool = False


class Named(Open):
    name: str


class EndpointHints(Open):
    for_zones: list[Named] = []
    for_nodes: list[Named] = []


class SliceEndpoint(Open):
    addresses: list[str]
    conditions: EndpointConditions = EndpointConditions()
    node_name: str = ""
    zone: str = ""
    hints: EndpointHints = EndpointHints()


class SlicePort(Open):
    name: str = ""
    protocol: Protocol = "TCP"
    port: Port | None = None


class EndpointSlice(Object):
    address_type: Literal["IPv4", "IPv6", "FQDN"]
    endpoints: list[SliceEndpoint] = []
    ports: list[SlicePort] = []

    @model_validator(mode="after")
    def _addresses_fit_type(self) -> Self:
        for endpoint in self.endpoints:
            for address in endpoint.addresses:
                if self.address_type != "FQDN":
                    _outer_ip(address)
                    if (":" in address) != (self.address_type == "IPv6"):
                        raise invalid(
                            f"{address} is not of addressType {self.address_type}",
                            "move it to a slice of its own family",
                        )
        return self


# ---- NetworkPolicy ---------------------------------------------------------------------------


class IPBlock(Upstream):
    cidr: CIDR
    except_: list[CIDR] = Field(default=[], alias="except")

    @model_validator(mode="after")
    def _excepts_lie_inside(self) -> Self:
        check_excepts(self.cidr, self.except_)
        return self


class NetworkPolicyPeer(Upstream):
    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None
    ip_block: IPBlock | None = None

    @model_validator(mode="after")
    def _one_kind_of_peer(self) -> Self:
        selects = self.pod_selector is not None or self.namespace_selector is not None
        if self.ip_block is not None and selects:
            raise invalid(
                "ipBlock cannot be combined with podSelector or namespaceSelector",
                "make them two entries of the list",
            )
        if self.ip_block is None and not selects:
            raise invalid(
                "the peer names nothing",
                "give podSelector, namespaceSelector or ipBlock; for any peer leave the list out",
            )
        return self


class NetworkPolicyPort(Upstream):
    protocol: Protocol = "TCP"
    port: PortOrName = None
    end_port: Port | None = None

    @model_validator(mode="after")
    def _range_is_ordered(self) -> Self:
        if self.end_port is None:
            return self
        if not isinstance(self.port, int):
            raise invalid("endPort needs a numeric port", "give the first port as a number")
        if self.end_port < self.port:
            raise invalid(
                f"endPort {self.end_port} is below port {self.port}",
                f"use {self.port} to 65535",
            )
        return self


class NetworkPolicyIngressRule(Upstream):
    from_: list[NetworkPolicyPeer] = Field(default=[], alias="from")
    ports: list[NetworkPolicyPort] = []


class NetworkPolicyEgressRule(Upstream):
    to: list[NetworkPolicyPeer] = []
    ports: list[NetworkPolicyPort] = []


class NetworkPolicySpec(Upstream):
    pod_selector: LabelSelector = LabelSelector()
    policy_types: list[Literal["Ingress", "Egress"]] = []
    ingress: list[NetworkPolicyIngressRule] = []
    egress: list[NetworkPolicyEgressRule] = []

    def isolates(self) -> frozenset[Literal["Ingress", "Egress"]]:
        """The directions the policy isolates its subjects in, after defaulting:
        without policyTypes always Ingress, and Egress iff it has egress rules."""
        if self.policy_types:
            return frozenset(self.policy_types)
        return frozenset(("Ingress", "Egress") if self.egress else ("Ingress",))


class NetworkPolicy(Object):
    spec: NetworkPolicySpec = NetworkPolicySpec()


# ---- Identity ----------------------------------------------------------------------------------


def external_network(value: str) -> IPNetwork:
    """A CIDR as an API server's CEL library reads it too. Raises `invalid`."""
    whole = network(value)
    bits = value.partition("/")[2]
    if bits != str(whole.prefixlen):
        raise invalid(f"{value!r} has zeros before its bits", f"write {whole}")
    if isinstance(whole, ipaddress.IPv6Network) and whole.network_address.ipv4_mapped is not None:
        raise invalid(f"{value!r} is an IPv4 network in IPv6 form", "write it as IPv4")
    return whole


def _external(value: str) -> str:
    external_network(value)
    return value


ExternalCIDR = Annotated[
    str,
    AfterValidator(_external),
    WithJsonSchema(
        {
            "type": "string",
            "maxLength": 43,
            "x-kubernetes-validations": [
                {
                    "rule": "isCIDR(self) && cidr(self).masked() == cidr(self)",
                    "message": "must be a CIDR without bits to the right of its mask",
                }
            ],
        }
    ),
]


IdentityLabelValue = Annotated[
    str,
    WithJsonSchema(
        {
            "type": "string",
            "maxLength": MAX_NAME,
            # The star is the operator's own: a rule of the whole object says so.
            "pattern": f"^({_QUALIFIED.pattern}|\\*)?$",
            # An API server drops a null it does not expect, and the label with it. Where null
            # may be, a rule of the map can refuse it.
            "nullable": True,
        }
    ),
]
"""Checked with its key, which an error names."""


class IdentitySpec(Own):
    """Either `namespace` and the complete `labels` of pods to come (pre-warming),
    or `cidrs` of external hosts."""

    namespace: DNSLabel | None = None
    """The pods' namespace."""
    labels: (
        Annotated[
            dict[str, IdentityLabelValue],
            AfterValidator(_labels),
            Field(
                json_schema_extra={
                    "maxProperties": MAX_LABELS,
                    "x-kubernetes-validations": [
                        {
                            "rule": "self.all(key, dyn(self[key]) != null)",
                            "message": 'null is no value of a label: write ""',
                        },
                    ],
                }
            ),
        ]
        | None
    ) = None
    """The pods' identity-relevant labels, all of them: the pods that have exactly these."""
    cidrs: (
        Annotated[
            list[ExternalCIDR], Field(json_schema_extra={"minItems": 1, "maxItems": MAX_CIDRS})
        ]
        | None
    ) = None
    """Networks outside the cluster, without host bits. They never match a podSelector or a
    namespaceSelector, and never override the address of a pod or a node."""

    @model_validator(mode="before")
    @classmethod
    def _no_null(cls, data: object) -> object:
        if isinstance(data, dict):
            for key, value in data.items():
                if value is None:
                    raise invalid(f"{key} is null", f"give it a value or leave {key} out")
        return data

    @model_validator(mode="after")
    def _one_meaning(self) -> Self:
        pods = self.namespace is not None and self.labels is not None
        half = (self.namespace is None) != (self.labels is None)
        if half or pods == (self.cidrs is not None):
            raise invalid(
                "an Identity is either namespace with labels, or cidrs",
                "give both namespace and labels, or only cidrs",
            )
        return self

    @model_validator(mode="after")
    def _has_a_size(self) -> Self:
        if self.cidrs is not None and not self.cidrs:
            raise invalid("cidrs is empty", "list at least one CIDR or delete the Identity")
        if self.cidrs is not None and len(self.cidrs) > MAX_CIDRS:
            raise invalid(f"{len(self.cidrs)} cidrs", f"list at most {MAX_CIDRS} in one Identity")
        if self.labels is not None and len(self.labels) > MAX_LABELS:
            raise invalid(f"{len(self.labels)} labels", f"give at most {MAX_LABELS}")
        return self


class Identity(Own):
    """One number for pods that are alike, or for networks outside. User-made ones have a name
    that begins with a letter; those with a decimal name are the operator's own."""

    namespaced: ClassVar[bool] = False

    api_version: str
    kind: str
    metadata: ObjectMeta
    spec: IdentitySpec
    status: Any = None

    @model_validator(mode="after")
    def _letter_first(self) -> Self:
        if not self.metadata.name[0].isalpha():
            raise invalid(
                f"the name {self.metadata.name!r} does not begin with a letter",
                "begin it with a letter: decimal names are the operator's own",
            )
        return self
