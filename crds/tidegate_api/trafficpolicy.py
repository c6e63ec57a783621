"""TrafficPolicy: what NetworkPolicy cannot say. Ours, and namespaced.

No field widens a policy by being absent. Whatever says whom or what a rule is about is
required, and "any" is written out; so a misspelt field leaves a required one missing, also
where nobody checks for unknown fields.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from tidegate_api.users import (
    ObjectMeta,
    Own,
    Subdomain,
    check_excepts,
    check_label_key,
    check_label_value,
    external_network,
    invalid,
    port_name,
)

MAX_RULES = 64
"""Rules of one direction."""
MAX_PEERS = 32
"""Of one rule; so also ports."""
MAX_CIDRS = 1024
"""Of one peer."""
MAX_EXCEPTS = 64
"""Of one CIDR."""
MAX_TERMS = 16
"""Labels of one selector; so also expressions."""
MAX_VALUES = 64
"""Of one expression."""


def _yes(value: object) -> object:
    if value is not True:  # 1 is equal to it, and no JSON true
        raise invalid("is not true", "write true, or leave it out")
    return value


Yes = Annotated[
    Literal[True],
    BeforeValidator(_yes),
    WithJsonSchema({"type": "boolean", "enum": [True]}),
]
Direction = Literal["Ingress", "Egress"]


def _listed(least: int, most: int, kind: str = "atomic") -> Any:
    return Field(
        min_length=least,
        max_length=most,
        json_schema_extra={"x-kubernetes-list-type": kind},
    )


def _cidr(value: str) -> str:
    external_network(value)
    return value


def _port_number(value: int) -> int:
    if not 1 <= value <= 65535:
        raise invalid(f"{value} is not a port", "use a number from 1 to 65535")
    return value


CIDR = Annotated[
    str,
    AfterValidator(_cidr),
    # CEL would walk a million of them; one that is none stalls its policy and fails closed.
    WithJsonSchema({"type": "string", "maxLength": 43, "pattern": r"^[0-9a-f:.]+/[0-9]{1,3}$"}),
]
PortNumber = Annotated[
    int,
    AfterValidator(_port_number),
    WithJsonSchema({"type": "integer", "format": "int32", "minimum": 1, "maximum": 65535}),
]
PortName = Annotated[
    str,
    AfterValidator(port_name),
    WithJsonSchema({"type": "string", "maxLength": 15, "pattern": "^[a-z0-9]+(-[a-z0-9]+)*$"}),
]
Byte = Annotated[
    int,
    Field(ge=0, le=255),
    WithJsonSchema({"type": "integer", "format": "int32", "minimum": 0, "maximum": 255}),
]
_DNS_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
# [prefix/]name, without CEL: there may be too many of them.
LabelKey = Annotated[
    str,
    WithJsonSchema(
        {
            "type": "string",
            "maxLength": 317,
            "minLength": 1,
            "pattern": rf"^({_DNS_LABEL}(\.{_DNS_LABEL})*/)?"
            "[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$",
            "allOf": [{"pattern": "^([^/]{1,253}/)?[^/]{1,63}$"}],
        }
    ),
]
_LABEL_TEXT: dict[str, Any] = {
    "type": "string",
    "maxLength": 63,
    "pattern": "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$",
}
LabelText = Annotated[str, WithJsonSchema(_LABEL_TEXT)]
# An API server drops a null it does not expect, and the label with it: there a rule refuses it.
LabelValue = Annotated[str, WithJsonSchema({**_LABEL_TEXT, "nullable": True})]


class Strict(Own):
    """Null is an error everywhere below."""

    exactly_one: ClassVar[bool] = False
    """One field has to be there, and no second one."""
    cel: ClassVar[tuple[tuple[str, str], ...]] = ()
    """What an API server checks beyond fields: rule and message."""

    @model_validator(mode="before")
    @classmethod
    def _no_null(cls, data: object) -> object:
        if isinstance(data, dict):
            for key, value in data.items():
                if value is None:
                    raise invalid(f"{key} is null", f"give it a value or leave {key} out")
        return data

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = len(self.model_fields_set)
        if self.exactly_one and given != 1:
            names = ", ".join(field.alias or n for n, field in type(self).model_fields.items())
            raise invalid(f"{given} things are said where one has to be", f"give one of {names}")
        return self


# ---- Selectors -------------------------------------------------------------------------


class Expression(Strict):
    """One condition on a label."""

    cel = (
        (
            "(self.operator in ['In', 'NotIn']) == (has(self.values) && self.values.size() > 0)",
            "In and NotIn take values, Exists and DoesNotExist none",
        ),
    )

    key: LabelKey
    """The label."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    """`In` and `NotIn` take values, the others none. `NotIn` also matches without the label."""
    values: Annotated[list[LabelText], _listed(0, MAX_VALUES)] = Field(default=[])
    """What the label's value is compared with."""

    @model_validator(mode="after")
    def _values_fit(self) -> Self:
        check_label_key(self.key)
        for value in self.values:
            check_label_value(self.key, value)
        if (self.operator in ("In", "NotIn")) != bool(self.values):
            raise invalid(
                f"operator {self.operator} of {self.key!r} has {len(self.values)} values",
                "give In and NotIn at least one, and the others none",
            )
        return self


class LabelSelector(Strict):
    """Exactly one of these, so that no misspelt second condition can go missing."""

    exactly_one = True

    any: Yes | None = None
    """Selects everything."""
    match_labels: (
        Annotated[
            dict[str, LabelValue],
            Field(
                min_length=1,
                max_length=MAX_TERMS,
                json_schema_extra={
                    "x-kubernetes-validations": [
                        {
                            "rule": "self.all(key, "
                            "!format.qualifiedName().validate(key).hasValue())",
                            "message": "every key must be a label key: [prefix/]name",
                        },
                        {
                            "rule": "self.all(key, dyn(self[key]) != null)",
                            "message": 'null is no value of a label: write ""',
                        },
                    ]
                },
            ),
        ]
        | None
    ) = None
    """Labels that all have exactly these values."""
    match_expressions: Annotated[list[Expression], _listed(1, MAX_TERMS)] | None = None
    """Conditions on labels, all of which hold."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        for key, value in (self.match_labels or {}).items():
            check_label_key(key)
            check_label_value(key, value)
        return self


class Subject(Strict):
    """Whose traffic the policy judges."""

    pod_selector: LabelSelector
    """Pods of the policy's namespace, by their labels."""


# ---- Peers -----------------------------------------------------------------------------


class Pods(Strict):
    """Pods of namespaces; pods in the host's network are never among them."""

    namespace_selector: LabelSelector
    """Their namespaces. The label `kubernetes.io/metadata.name` is a namespace's name."""
    pod_selector: LabelSelector
    """The pods in them."""


class Block(Strict):
    """Addresses, whoever has them: pods, nodes and hosts outside alike."""

    cidr: CIDR
    """A network, without bits to the right of its mask."""
    except_: Annotated[list[CIDR], _listed(0, MAX_EXCEPTS)] = Field(alias="except")
    """Networks inside it that do not belong to the peer; [] for none."""

    @model_validator(mode="after")
    def _excepts_lie_inside(self) -> Self:
        check_excepts(self.cidr, self.except_)
        return self


class Peer(Strict):
    """Who is on the other side: exactly one of these."""

    exactly_one = True

    any: Yes | None = None
    """Everybody, known or not."""
    pods: Pods | None = None
    """Pods, by labels of their namespace and their own."""
    entities: (
        Annotated[
            list[Literal["world", "host", "remote-node", "kube-apiserver", "cluster"]],
            _listed(1, 5, "set"),
        ]
        | None
    ) = None
    """`world`: addresses outside the cluster. `host`: the subject's own node. `remote-node`: every
    other node. `kube-apiserver`: what serves the API. `cluster`: every pod and node, and what
    serves the API."""
    cidrs: Annotated[list[Block], _listed(1, MAX_CIDRS)] | None = None
    """Networks."""
    identity: Subdomain | None = None
    """The name of an Identity that a user made: the pods or hosts that it stands for."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if self.entities is not None and len(set(self.entities)) != len(self.entities):
            raise invalid("entities names one twice", "name each once")
        return self


# ---- Ports -----------------------------------------------------------------------------


class ICMP(Strict):
    """ICMP messages. A type needs its code: a number, or `anyCode`."""

    cel = (
        (
            "has(self.any) ? !has(self.type) && !has(self.code) && !has(self.anyCode) : "
            "has(self.type) && has(self.code) != has(self.anyCode)",
            "give any: true, or type with code, or type with anyCode: true",
        ),
    )

    family: Literal["IPv4", "IPv6"]
    """ICMP or ICMPv6."""
    any: Yes | None = None
    """Every message."""
    type: Byte | None = None
    """One type."""
    code: Byte | None = None
    """One code of the type."""
    any_code: Yes | None = None
    """Every code of the type."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        typed = self.type is not None
        coded = (self.code is not None) + (self.any_code is not None)
        if typed == (self.any is not None) or coded != typed:
            raise invalid(
                "it is not clear which messages are meant",
                "give any: true, or type with code, or type with anyCode: true",
            )
        return self


class Range(Strict):
    """Ports next to each other."""

    cel = (("self.start <= self.end", "end must not be below start"),)

    start: PortNumber
    """The first."""
    end: PortNumber
    """The last."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.end < self.start:
            raise invalid(
                f"end {self.end} is below start {self.start}", f"use {self.start} or more"
            )
        return self


class Port(Strict):
    """What of the traffic: `any`, or `protocol` with one of `port`, `range` and `portName`, or
    `icmp`."""

    cel = (
        (
            "has(self.protocol) ? !has(self.any) && !has(self.icmp) && "
            "(has(self.port) ? 1 : 0) + (has(self.range) ? 1 : 0) + (has(self.portName) ? 1 : 0) "
            "== 1 : has(self.any) != has(self.icmp) && !has(self.port) && !has(self.range) && "
            "!has(self.portName)",
            "give any: true, or icmp, or protocol with one of port, range and portName",
        ),
    )

    any: Yes | None = None
    """Every protocol and port, ICMP too."""
    protocol: Literal["TCP", "UDP", "SCTP"] | None = None
    """Of the port."""
    port: PortNumber | None = None
    """One destination port."""
    range: Range | None = None
    """Destination ports from the first to the last."""
    port_name: PortName | None = None
    """The container port of that name, with the number that it has: of the subject at ingress,
    of the peer at egress."""
    icmp: ICMP | None = None
    """Messages of ICMP or ICMPv6."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        whole = ({"any"}, {"icmp"}, *({"protocol", n} for n in ("port", "range", "port_name")))
        if self.model_fields_set not in whole:
            raise invalid(
                "it is not clear which ports are meant",
                "give any: true, or icmp, or protocol with one of port, range and portName",
            )
        return self


# ---- The policy ------------------------------------------------------------------------


class Rule(Strict):
    """What to do with traffic that one of the peers and one of the ports match."""

    action: Literal["Allow", "Deny"]
    """A Deny outranks every Allow of a TrafficPolicy or NetworkPolicy, wherever it is written."""
    peers: Annotated[list[Peer], _listed(1, MAX_PEERS)]
    """Who is on the other side; `[{any: true}]` for everybody."""
    ports: Annotated[list[Port], _listed(1, MAX_PEERS)]
    """Which ports and messages; `[{any: true}]` for all."""
    log: bool = False
    """Whether every new flow that the rule decides is reported."""


class TrafficPolicySpec(Strict):
    """What the policy says."""

    subject: Subject
    """Whose traffic the policy judges."""
    isolates: Annotated[list[Direction], _listed(0, 2, "set")]
    """Directions in which the subject is denied what no rule of any NetworkPolicy or TrafficPolicy
    allows; [] for a policy that only adds rules."""
    mode: Literal["Enforce", "Audit"]
    """`Audit`: nothing is enforced; what the policy would deny passes, is counted and reported."""
    ingress: Annotated[list[Rule], _listed(0, MAX_RULES)] = Field(default=[])
    """Rules for what comes to the subject."""
    egress: Annotated[list[Rule], _listed(0, MAX_RULES)] = Field(default=[])
    """Rules for what the subject opens."""

    @model_validator(mode="after")
    def _has_a_say(self) -> Self:
        if len(set(self.isolates)) != len(self.isolates):
            raise invalid("isolates names a direction twice", "name each once")
        return self


class TrafficPolicy(Own):
    """What NetworkPolicy cannot say: deny, entities, sets of CIDRs, ICMP, user-made identities,
    audit, log. It cannot override a decision of the Admin tier."""

    namespaced: ClassVar[bool] = True

    api_version: str
    kind: str
    metadata: ObjectMeta
    spec: TrafficPolicySpec
