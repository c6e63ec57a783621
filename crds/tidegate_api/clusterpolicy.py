"""ClusterNetworkPolicy v1alpha2 (`policy.networking.k8s.io`), as far as its CRD says it.

Fields and limits are those of the API's published Go types. Its CRD is the users' to install.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tidegate_api.users import (
    LabelSelector,
    Object,
    Port,
    Upstream,
    external_network,
    invalid,
)

API_VERSION = "policy.networking.k8s.io/v1alpha2"
MAX_PRIORITY = 1000
MAX_RULES = 25
"""Rules of one direction; also peers and protocols of a rule, and networks of a peer."""
MAX_RULE_NAME = 100
_DOMAIN_LABEL = "[a-zA-Z0-9]([-a-zA-Z0-9_]*[a-zA-Z0-9])?"
DOMAIN_NAME = rf"^(\*\.)?({_DOMAIN_LABEL}\.)+{_DOMAIN_LABEL}\.?$"

Action = Literal["Accept", "Deny", "Pass"]
Transport = Literal["TCP", "UDP", "SCTP"]


def _network(value: str) -> str:
    """The first CRDs take host bits, and mean the network around them; later ones do not."""
    try:
        whole = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise invalid(f"{value!r} is not a CIDR", "write address/bits, as in fd00::/8") from None
    external_network(f"{whole.network_address}/{value.partition('/')[2]}")
    return str(whole)


def _distinct(values: object) -> object:
    """As a server refuses what is twice in a set, by how it is written."""
    if isinstance(values, list) and all(isinstance(value, str) for value in values):
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise invalid(f"{twice[0]!r} is there twice", "write it once")
    return values


def _one_of(model: Upstream, what: str) -> None:
    """Exactly one field; what an API server says with minProperties and maxProperties."""
    if len(model.model_fields_set) != 1:
        names = ", ".join(field.alias or n for n, field in type(model).model_fields.items())
        raise invalid(
            f"{what} has {len(model.model_fields_set)} fields", f"give exactly one of {names}"
        )


class NamespacedPod(Upstream):
    """Pods of namespaces. An absent `namespaceSelector` is an empty one: every namespace."""

    namespace_selector: LabelSelector = LabelSelector()
    pod_selector: LabelSelector


class Subject(Upstream):
    namespaces: LabelSelector | None = None
    pods: NamespacedPod | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        _one_of(self, "the subject")
        return self


class IngressPeer(Upstream):
    namespaces: LabelSelector | None = None
    pods: NamespacedPod | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        _one_of(self, "the peer")
        return self


Networks = Annotated[
    list[Annotated[str, AfterValidator(_network)]],
    Field(min_length=1, max_length=MAX_RULES),
    BeforeValidator(_distinct),
]
DomainNames = Annotated[
    list[Annotated[str, Field(pattern=DOMAIN_NAME)]],
    Field(min_length=1, max_length=MAX_RULES),
    BeforeValidator(_distinct),
]


class EgressPeer(IngressPeer):
    nodes: LabelSelector | None = None
    networks: Networks | None = None
    domain_names: DomainNames | None = None

    @property
    def without_port_names(self) -> bool:
        return self.namespaces is None and self.pods is None


class PortRange(Upstream):
    start: Port
    end: Port

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.start >= self.end:
            raise invalid(f"start {self.start} is not below end {self.end}", "use number for one")
        return self


class DestinationPort(Upstream):
    number: Port | None = None
    range: PortRange | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        _one_of(self, "the port")
        return self


class PortMatch(Upstream):
    """What is said of a protocol that has ports; there must be something."""

    destination_port: DestinationPort


class Protocol(Upstream):
    tcp: PortMatch | None = None
    udp: PortMatch | None = None
    sctp: PortMatch | None = None
    destination_named_port: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        _one_of(self, "the protocol")
        return self


Protocols = Annotated[list[Protocol], Field(min_length=1, max_length=MAX_RULES)]
RuleName = Annotated[str, Field(max_length=MAX_RULE_NAME)]


class IngressRule(Upstream):
    name: RuleName = ""
    action: Action
    from_: Annotated[list[IngressPeer], Field(alias="from", min_length=1, max_length=MAX_RULES)]
    protocols: Protocols | None = None


class EgressRule(Upstream):
    name: RuleName = ""
    action: Action
    to: Annotated[list[EgressPeer], Field(min_length=1, max_length=MAX_RULES)]
    protocols: Protocols | None = None

    @model_validator(mode="after")
    def _peers_fit(self) -> Self:
        named = any(item.destination_named_port is not None for item in self.protocols or ())
        if named and any(peer.without_port_names for peer in self.to):
            raise invalid(
                "networks, nodes and domainNames have no named ports",
                "use a number there, or make it two rules",
            )
        if self.action != "Accept" and any(peer.domain_names is not None for peer in self.to):
            raise invalid(
                f"domainNames cannot be in a rule whose action is {self.action}",
                "accept the names, and deny networks in a rule below",
            )
        return self


class ClusterNetworkPolicySpec(Upstream):
    tier: Literal["Admin", "Baseline"]
    priority: Annotated[int, Field(ge=0, le=MAX_PRIORITY)]
    subject: Subject
    ingress: Annotated[list[IngressRule], Field(max_length=MAX_RULES)] = Field(default=[])
    egress: Annotated[list[EgressRule], Field(max_length=MAX_RULES)] = Field(default=[])


class ClusterNetworkPolicy(Object):
    namespaced: ClassVar[bool] = False

    spec: ClusterNetworkPolicySpec
