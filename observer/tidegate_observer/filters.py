"""FlowFilter messages → one function that says whether a flow is asked for.

Meanings as Hubble's API has them: a flow is asked for if some message of the white list matches
(or there is none) and no message of the black list does; a message matches if each of its fields
does; a field matches if one of its values does. What is not understood is refused: a filter that is
left out would show what was not asked for. May not live here: messages of flows, the network.
"""

from __future__ import annotations

import fnmatch
import functools
import ipaddress
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from msgspec.structs import astuple

from tidegate_observer import labels
from tidegate_observer.api import flow_pb2
from tidegate_observer.flow import ICMP, ICMPV6, MAPPED, SCTP, TCP, UDP, End, Flow, Service
from tidegate_observer.meaning import (
    CLUSTER,
    drop_reason,
    event_type,
    theirs,
    verdict,
)
from tidegate_observer.messages import flow_message
from tidegate_observer.told import Told

Test = Callable[[Flow], bool]
EndTest = Callable[[End], bool]

MAX_FILTERS = 64
"""Messages in one list."""
MAX_VALUES = 256
"""Values in one field."""
MAX_TEXT = 1024
MAX_EXPRESSIONS = 16
MAX_ENDS = 20_000
"""Answers that one filter remembers."""

PROTOCOLS: dict[str, tuple[int, ...]] = {
    "tcp": (TCP,),
    "udp": (UDP,),
    "sctp": (SCTP,),
    "icmp": (ICMP, ICMPV6),
    "icmpv4": (ICMP,),
    "icmpv6": (ICMPV6,),
    "vrrp": (112,),
    "igmp": (2,),
    # Of the application: no flow here says which it is.
    "http": (),
    "dns": (),
    "kafka": (),
}
PORTED = (TCP, UDP, SCTP)


class FilterError(ValueError):
    """A filter that cannot be answered; the text says which and why."""


class CostlyError(Exception):
    """A test gave up on a flow, which took it too long."""


class Numbered(Flow, gc=False):
    """A flow with its id, for expressions that ask for it."""

    uuid: str = ""


def numbered(flow: Flow, uuid: str) -> Numbered:
    made = Numbered(*astuple(flow))
    made.uuid = uuid
    return made


def asks_by_expression(items: Iterable[flow_pb2.FlowFilter]) -> bool:
    return any(item.HasField("experimental") for item in items)


def build(white: Iterable[flow_pb2.FlowFilter], black: Iterable[flow_pb2.FlowFilter]) -> Test:
    """FilterError; the test, where an expression of CEL is asked for: CostlyError."""
    allowed = [_message(item) for item in _bounded(white, "white list")]
    denied = [_message(item) for item in _bounded(black, "black list")]
    if not denied:
        if not allowed:
            return lambda _flow: True
        if len(allowed) == 1:
            return allowed[0]
    return lambda flow: (
        (not allowed or any(t(flow) for t in allowed)) and not any(t(flow) for t in denied)
    )


def split_uuids(
    white: Iterable[flow_pb2.FlowFilter],
) -> tuple[list[flow_pb2.FlowFilter], frozenset[str] | None]:
    """The white list without its ids, and the ids: no flow knows its own, but who holds it does.
    FilterError."""
    kept: list[flow_pb2.FlowFilter] = []
    wanted: set[str] = set()
    for item in white:
        if item.uuid:
            wanted.update(item.uuid)
            copy = flow_pb2.FlowFilter()
            copy.CopyFrom(item)
            copy.ClearField("uuid")
            item = copy
        kept.append(item)
    if wanted and len(kept) > 1:
        raise FilterError("uuid goes with no second filter")
    return kept, frozenset(wanted) if wanted else None


def _bounded(items: Iterable[flow_pb2.FlowFilter], what: str) -> list[flow_pb2.FlowFilter]:
    found = list(items)
    if len(found) > MAX_FILTERS:
        raise FilterError(f"{what}: {len(found)} filters, at most {MAX_FILTERS}")
    return found


def _message(item: flow_pb2.FlowFilter) -> Test:
    _all_known(item, "unknown filter: ")
    tests = [_test(name, values) for name, values in _fields(item)]
    return functools.reduce(_both, tests) if tests else _constant(True)


def _both(first: Test, second: Test) -> Test:
    return lambda flow: first(flow) and second(flow)


def _all_known(item: Message, said: str) -> None:
    """FilterError: it has a field that is not in the contract, or what is in it has."""
    # The stubs do not know that the set can be iterated.
    found = cast("Iterable[Any]", UnknownFieldSet(item))
    unknown = sorted({field.field_number for field in found})
    if unknown:
        raise FilterError(f"{said}field {', '.join(map(str, unknown))}")
    for field, value in item.ListFields():
        if field.message_type is not None:
            for one in value if field.is_repeated else [value]:
                _all_known(one, f"{said}{field.name}, ")


def _fields(item: flow_pb2.FlowFilter) -> Iterable[tuple[str, Sequence[object]]]:
    for field, value in item.ListFields():
        values = list(value) if field.is_repeated else [value]
        if len(values) > MAX_VALUES:
            raise FilterError(f"{field.name}: {len(values)} values, at most {MAX_VALUES}")
        for one in values:
            if isinstance(one, str) and len(one) > MAX_TEXT:
                raise FilterError(f"{field.name}: longer than {MAX_TEXT} characters")
        yield field.name, values


def _test(name: str, values: Sequence[object]) -> Test:
    for prefix, end in (("source_", _source), ("destination_", _destination)):
        made = _ENDS.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if made is not None:
            return end(made(values))
    special = _SPECIAL.get(name)
    if special is None:
        raise FilterError(f"filter {name} is not supported")
    return special(values)


# ---- of one end ----------------------------------------------------------------------------


def _source(test: EndTest) -> Test:
    known = _Memo(test)
    return lambda flow: known[id(flow.source)] or known.ask(flow.source)


def _destination(test: EndTest) -> Test:
    known = _Memo(test)
    return lambda flow: known[id(flow.destination)] or known.ask(flow.destination)


class _Memo(dict[int, bool]):
    """Ends are few and flows are many: id of an end that was asked about → the answer."""

    def __init__(self, test: EndTest) -> None:
        super().__init__()
        self._test = test
        self._kept: list[End] = []

    def __missing__(self, _key: int) -> bool:
        return False

    def ask(self, end: End) -> bool:
        """Once for each end, which is kept: its id must stay its own."""
        if id(end) in self:
            return False
        if len(self) >= MAX_ENDS:
            self.clear()
            self._kept.clear()
        self._kept.append(end)
        answer = self[id(end)] = self._test(end)
        return answer


def namespaced(text: str) -> tuple[str, str]:
    """(namespace, name) of "namespace/name"; without a slash the namespace is "default", an empty
    one is every namespace."""
    namespace, slash, name = text.partition("/")
    return (namespace, name) if slash else ("default", text)


def _pods(values: Sequence[object]) -> EndTest:
    wanted = [namespaced(str(value)) for value in values]
    return lambda end: (
        bool(end.pod)
        and any(
            (not namespace or namespace == end.namespace) and end.pod.startswith(name)
            for namespace, name in wanted
        )
    )


def _label_test(values: Sequence[object]) -> EndTest:
    try:
        selectors = [labels.parse(str(value)) for value in values]
    except ValueError as error:
        raise FilterError(f"label selector: {error}") from error
    return lambda end: any(selector(end.labels) for selector in selectors)


def _identities(values: Sequence[object]) -> EndTest:
    wanted = {int(str(value)) for value in values}
    return lambda end: theirs(end.identity) in wanted


def _workloads(values: Sequence[object]) -> EndTest:
    wanted = [v for v in values if isinstance(v, flow_pb2.Workload)]
    return lambda end: (
        bool(end.workload)
        and any(
            (not w.name or w.name == end.workload) and (not w.kind or w.kind == end.workload_kind)
            for w in wanted
        )
    )


def _clusters(values: Sequence[object]) -> EndTest:
    wanted = set(values)
    return lambda end: CLUSTER in wanted and bool(end.pod)


def _names(values: Sequence[object]) -> EndTest:
    """Of the DNS; no flow here has them."""
    for value in values:
        if not re.fullmatch(r"[-a-zA-Z0-9_.*]*", str(value)):
            raise FilterError(f"not a name: {value!r}")
    return lambda _end: False


_ENDS: dict[str, Callable[[Sequence[object]], EndTest]] = {
    "pod": _pods,
    "label": _label_test,
    "identity": _identities,
    "workload": _workloads,
    "cluster_name": _clusters,
    "fqdn": _names,
}


# ---- of the flow -----------------------------------------------------------------------------


def _addresses(values: Sequence[object]) -> Callable[[bytes], bool]:
    exact: set[bytes] = set()
    networks: list[tuple[bool, int, int]] = []
    for value in values:
        try:
            network = ipaddress.ip_network(str(value), strict=False)
        except ValueError as error:
            raise FilterError(f"not an address or network: {value!r}") from error
        four = network.version == 4
        raw = (MAPPED if four else b"") + network.network_address.packed
        bits = network.prefixlen + (96 if four else 0)
        if bits == 128:
            exact.add(raw)
        else:
            shift = 128 - bits
            networks.append((four, int.from_bytes(raw, "big") >> shift, shift))
    if not networks:
        return exact.__contains__

    def test(address: bytes) -> bool:
        if address in exact:
            return True
        number, family = int.from_bytes(address, "big"), address[:12] == MAPPED
        return any(four == family and number >> shift == prefix for four, prefix, shift in networks)

    return test


def _source_ip(values: Sequence[object]) -> Test:
    test = _addresses(values)
    return lambda flow: test(flow.source_address)


def _destination_ip(values: Sequence[object]) -> Test:
    test = _addresses(values)
    return lambda flow: test(flow.destination_address)


def _ports(values: Sequence[object]) -> frozenset[int]:
    found = set()
    for value in values:
        if not re.fullmatch(r"\d{1,5}", str(value)) or int(str(value)) > 65535:
            raise FilterError(f"not a port: {value!r}")
        found.add(int(str(value)))
    return frozenset(found)


def _source_port(values: Sequence[object]) -> Test:
    wanted = _ports(values)
    return lambda flow: flow.source_port in wanted and flow.protocol in PORTED


def _destination_port(values: Sequence[object]) -> Test:
    wanted = _ports(values)
    return lambda flow: flow.destination_port in wanted and flow.protocol in PORTED


def _verdicts(values: Sequence[object]) -> Test:
    wanted = frozenset(values)
    return lambda flow: verdict(flow) in wanted


def _protocols(values: Sequence[object]) -> Test:
    wanted: set[int] = set()
    for value in values:
        known = PROTOCOLS.get(str(value).lower())
        if known is None:
            raise FilterError(f"unknown protocol {value!r}: one of {', '.join(PROTOCOLS)}")
        wanted.update(known)
    return lambda flow: flow.protocol in wanted


def _event_types(values: Sequence[object]) -> Test:
    wanted = [
        (v.type, v.sub_type if v.match_sub_type else None)
        for v in values
        if isinstance(v, flow_pb2.EventTypeFilter)
    ]

    def test(flow: Flow) -> bool:
        kind, sub = event_type(flow)
        return any(kind == k and s in (None, sub) for k, s in wanted)

    return test


def _drop_reasons(values: Sequence[object]) -> Test:
    wanted = frozenset(values)
    return lambda flow: drop_reason(flow) in wanted


def _directions(values: Sequence[object]) -> Test:
    wanted = frozenset(values)
    return lambda flow: flow.direction + 1 in wanted


def _versions(values: Sequence[object]) -> Test:
    wanted = frozenset(values)
    return lambda flow: (1 if flow.source_address[:12] == MAPPED else 2) in wanted


def _replies(values: Sequence[object]) -> Test:
    """But for traced packets every event is told in the direction its flow began."""
    return lambda flow: (flow.how == HOW_REPLY) in values


HOW_REPLY = 3
"""TG_HOW_REPLY."""
_FLAGS = ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR", "NS")


def _tcp_flags(values: Sequence[object]) -> Test:
    wanted = [
        sum(1 << bit for bit, name in enumerate(_FLAGS) if getattr(value, name, False))
        for value in values
    ]
    return lambda flow: (
        flow.protocol == TCP and any(flow.tcp_flags & mask == mask for mask in wanted)
    )


def _service_names(values: Sequence[object]) -> Callable[[Service | None], bool]:
    wanted = [namespaced(str(value)) for value in values]
    return lambda service: (
        service is not None
        and any(
            (not namespace or namespace == service.namespace) and service.name.startswith(name)
            for namespace, name in wanted
        )
    )


def _destination_service(values: Sequence[object]) -> Test:
    test = _service_names(values)
    return lambda flow: test(flow.service)


def _source_service(values: Sequence[object]) -> Test:
    """A flow's source never is a Service here."""
    return _never(values)


def _node_names(values: Sequence[object]) -> Test:
    """`[cluster/]node`, each with `*`."""
    known: dict[str, bool] = {}

    def fits(pattern: str, name: str) -> bool:
        cluster, slash, node = pattern.rpartition("/")
        if slash and cluster and not fnmatch.fnmatchcase(CLUSTER, cluster):
            return False
        return not node or fnmatch.fnmatchcase(name, node)

    def test(flow: Flow) -> bool:
        if flow.node not in known:
            known[flow.node] = any(fits(str(value), flow.node) for value in values)
        return known[flow.node]

    return test


def _node_labels(values: Sequence[object]) -> Test:
    """No node's labels are known here."""
    try:
        return _constant(any(labels.parse(str(value))(()) for value in values))
    except ValueError as error:
        raise FilterError(f"node label selector: {error}") from error


def _interfaces(values: Sequence[object]) -> Test:
    """By index, by name, or both."""
    wanted = [(v.index, v.name) for v in values if isinstance(v, flow_pb2.NetworkInterface)]
    return lambda flow: any(
        index in (0, flow.interface) and name in ("", flow.interface_name)
        for index, name in wanted
        if index or name
    )


def _never(_values: Sequence[object]) -> Test:
    """Of what no flow here has: names of the DNS, HTTP, traces."""
    return lambda _flow: False


def _constant(answer: bool) -> Test:
    return lambda _flow: answer


def _encrypted(values: Sequence[object]) -> Test:
    return _constant(False in values)


def _experimental(values: Sequence[object]) -> Test:
    """Over the flow's message. Several expressions: one of them."""
    texts: list[str] = []
    for value in values:
        assert isinstance(value, flow_pb2.FlowFilter.Experimental)
        texts += value.cel_expression
    if len(texts) > MAX_EXPRESSIONS:
        raise FilterError(f"cel_expression: {len(texts)} values, at most {MAX_EXPRESSIONS}")
    if not texts:
        return _constant(True)
    # Memory that nobody needs who asks for no expression.
    from tidegate_observer import expressions  # noqa: PLC0415

    try:
        matches = expressions.build(texts)
    except expressions.ExpressionError as error:
        raise FilterError(f"cel_expression: {error}") from error

    def test(flow: Flow) -> bool:
        try:
            if isinstance(flow, Told):
                return matches(flow.message)
            return matches(flow_message(flow, flow.uuid if isinstance(flow, Numbered) else ""))
        except expressions.CostlyError as error:
            raise CostlyError(f"cel_expression: {error}") from error

    return test


_SPECIAL: dict[str, Callable[[Sequence[object]], Test]] = {
    "source_ip": _source_ip,
    "destination_ip": _destination_ip,
    "source_ip_xlated": _never,
    "source_port": _source_port,
    "destination_port": _destination_port,
    "verdict": _verdicts,
    "protocol": _protocols,
    "event_type": _event_types,
    "drop_reason_desc": _drop_reasons,
    "traffic_direction": _directions,
    "ip_version": _versions,
    "reply": _replies,
    "tcp_flags": _tcp_flags,
    "source_service": _source_service,
    "destination_service": _destination_service,
    "node_name": _node_names,
    "node_labels": _node_labels,
    "interface": _interfaces,
    "encrypted": _encrypted,
    "dns_query": _never,
    "http_status_code": _never,
    "http_method": _never,
    "http_path": _never,
    "http_url": _never,
    "http_header": _never,
    "trace_id": _never,
    "ip_trace_id": _never,
    "experimental": _experimental,
}
"""`uuid` is the server's: it numbers flows."""
