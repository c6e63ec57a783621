"""GetFlowsResponse messages → text in the forms that Hubble's users know.

Names come from whoever runs pods: nothing of them that a terminal would obey reaches one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TextIO

from google.protobuf import struct_pb2
from google.protobuf.json_format import MessageToDict
from tidegate_observer.api import flow_pb2, observer_pb2

DROP, TRACE, POLICY_VERDICT = 1, 4, 5
MATCHES = ("none", "L3-Only", "L3-L4", "L4-Only", "all", "L3-Proto", "Proto-Only")
"""By `policy_match_type`."""
REASONS = {
    132: "Invalid source ip",
    133: "Policy denied",
    135: "CT: Truncated or invalid header",
    155: "CT: Map insertion failed",
    158: "Service backend not found",
    162: "Reached EDT rate-limiting drop horizon",
    174: "Is a ClusterIP",
    177: "Denied by LB src range check",
    181: "Policy denied by denylist",
    202: "Host datapath not ready",
    203: "Endpoint policy program not available",
}
"""Texts that people know; the others are said by the names of the API."""
RESERVED = {1: "host", 2: "world", 3: "unmanaged", 4: "health", 5: "init", 6: "remote-node"}
RESERVED |= {7: "kube-apiserver", 8: "ingress"}
STATES = {1: "flows come from node", 2: "no flows from node", 3: "node is gone:", 4: "node"}
"""By state of a node."""
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
HEADER = ("TIMESTAMP", "SOURCE", "DESTINATION", "TYPE", "VERDICT", "SUMMARY")
RED, GREEN, YELLOW, CYAN, PLAIN = "\033[31m", "\033[32m", "\033[33m", "\033[36m", "\033[0m"
_KNOWN = (struct_pb2.Struct,)
"""Types that an extension may be of: they must be loaded to be printed."""

_UNSAFE = re.compile(r"[^\x20-\x7e\u00a1-\u02ff\u0370-\u1fff\u2c00-\u2fdf\u3040-\ud7ff]")


def safe(text: str) -> str:
    """Without anything that a terminal obeys, or that changes the order of what is around it."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Printer:
    """Writes one response after the other; `close` writes what is held back for its columns."""

    def __init__(
        self,
        form: str,
        out: TextIO,
        *,
        color: bool = False,
        time_format: str = "StampMilli",
        nodes: bool = False,
        numeric: bool = False,
        live: bool = False,
    ) -> None:
        """`live`: write each row when it comes, in columns that were guessed."""
        self._out = out
        self._color = color
        self._time_format = time_format
        self._nodes = nodes
        self._numeric = numeric
        self._live = live
        self._rows: list[tuple[str, ...]] = []
        self._count = 0
        forms: dict[str, Callable[[observer_pb2.GetFlowsResponse], None]] = {
            "compact": self._compact,
            "dict": self._dict,
            "json": self._json,
            "jsonpb": self._jsonpb,
        }
        self._write = forms.get(form, self._tab)
        self._structured = form in ("json", "jsonpb")

    def write(self, response: observer_pb2.GetFlowsResponse) -> str | None:
        """None, or a word for people that is not of the output: what the server says of itself."""
        kind = response.WhichOneof("response_types")
        if kind == "flow":
            self._write(response)
            self._count += 1
            return None
        if self._structured:
            self._jsonpb(response)
            return None
        if kind == "lost_events":
            lost = response.lost_events
            source = flow_pb2.LostEventSource.Name(lost.source)
            where = f" on {safe(response.node_name)}" if response.node_name else ""
            return f"EVENTS LOST: {source} {lost.num_events_lost}{where}"
        if kind == "node_status":
            status = response.node_status
            names = ", ".join(map(safe, status.node_names))
            word = STATES.get(status.state_change, "state of node")
            return f"{word} {names}" + (f": {safe(status.message)}" if status.message else "")
        return None

    def close(self) -> None:
        rows = self._rows
        if not rows or self._live:
            return
        widths = [max(len(strip(row[i])) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            self._out.write(_line(row, widths))

    # ---- forms -----------------------------------------------------------------------------

    def _compact(self, response: observer_pb2.GetFlowsResponse) -> None:
        flow = response.flow
        node = f" [{safe(flow.node_name)}]" if self._nodes else ""
        left, right, arrow = flow.source, flow.destination, "->"
        ends = self._ends(flow)
        if not flow.HasField("is_reply"):
            arrow = "<>"
        elif flow.is_reply.value:
            left, right, arrow, ends = right, left, "<-", (ends[1], ends[0])
        self._out.write(
            f"{self._time(flow)}{node}: {ends[0]} {self._identity(left)} {arrow} "
            f"{ends[1]} {self._identity(right)} {self._type(flow)} {self._verdict(flow)} "
            f"({safe(flow.Summary)})\n"
        )

    def _cells(self, flow: flow_pb2.Flow) -> tuple[str, ...]:
        source, destination = self._ends(flow)
        cells = (
            self._time(flow),
            source,
            destination,
            self._type(flow),
            self._verdict(flow),
            safe(flow.Summary),
        )
        if not self._nodes:
            return cells
        return (cells[0], safe(flow.node_name), *cells[1:])

    def _header(self) -> tuple[str, ...]:
        return (HEADER[0], "NODE", *HEADER[1:]) if self._nodes else HEADER

    def _tab(self, response: observer_pb2.GetFlowsResponse) -> None:
        rows = [self._cells(response.flow)]
        if not self._count:
            rows.insert(0, self._header())
        if not self._live:
            self._rows += rows
            return
        widths = [20, *([12] if self._nodes else []), 44, 44, 40, 12, 0]
        for row in rows:
            self._out.write(_line(row, widths))

    def _dict(self, response: observer_pb2.GetFlowsResponse) -> None:
        if self._count:
            self._out.write("------------\n")
        for name, cell in zip(self._header(), self._cells(response.flow), strict=True):
            self._out.write(f"{name:>11}: {cell}\n")

    def _json(self, response: observer_pb2.GetFlowsResponse) -> None:
        self._out.write(json_line(response.flow))

    def _jsonpb(self, response: observer_pb2.GetFlowsResponse) -> None:
        self._out.write(json_line(response))

    # ---- cells ---------------------------------------------------------------------------------

    def _time(self, flow: flow_pb2.Flow) -> str:
        return time_text(self._time_format, flow.time.seconds, flow.time.nanos)

    def _ends(self, flow: flow_pb2.Flow) -> tuple[str, str]:
        ports: tuple[int, int] | None = None
        protocol = flow.l4.WhichOneof("protocol")
        if protocol in ("TCP", "UDP", "SCTP"):
            held = getattr(flow.l4, protocol)
            ports = held.source_port, held.destination_port
        ends = []
        for number, (end, address) in enumerate(
            ((flow.source, flow.IP.source), (flow.destination, flow.IP.destination))
        ):
            port = ports[number] if ports is not None else None
            named = bool(end.pod_name) and not self._numeric
            text = f"{end.namespace}/{end.pod_name}" if named else address
            if port is not None:
                bracket = ":" in address and not named
                text = f"[{text}]:{port}" if bracket else f"{text}:{port}"
            ends.append(self._paint(CYAN, safe(text)))
        return ends[0], ends[1]

    def _identity(self, end: flow_pb2.Endpoint) -> str:
        name = RESERVED.get(end.identity)
        return f"({name})" if name else f"(ID:{end.identity})"

    def _type(self, flow: flow_pb2.Flow) -> str:
        kind, sub = flow.event_type.type, flow.event_type.sub_type
        if kind == DROP:
            return self._reason(flow, sub)
        if kind == POLICY_VERDICT:
            match = flow.policy_match_type
            word = MATCHES[match] if match < len(MATCHES) else str(match)
            direction = flow_pb2.TrafficDirection.Name(flow.traffic_direction)
            return f"policy-verdict:{word} {direction}"
        if kind == TRACE:
            point = flow_pb2.TraceObservationPoint.Name(flow.trace_observation_point)
            return point.lower().replace("_", "-")
        return f"event {kind}:{sub}"

    def _reason(self, flow: flow_pb2.Flow, sub: int) -> str:
        number = sub or flow.drop_reason_desc
        if number in REASONS:
            return REASONS[number]
        if number in flow_pb2.DropReason.values():
            words = flow_pb2.DropReason.Name(number).replace("_", " ")
            return words[0] + words[1:].lower()
        return f"Reason {number}"

    def _verdict(self, flow: flow_pb2.Flow) -> str:
        word, color = flow_pb2.Verdict.Name(flow.verdict), ""
        judged = flow.event_type.type == POLICY_VERDICT
        if flow.verdict == flow_pb2.FORWARDED:
            word, color = ("ALLOWED" if judged else word), GREEN
        elif flow.verdict in (flow_pb2.DROPPED, flow_pb2.ERROR):
            word, color = ("DENIED" if judged else word), RED
        elif flow.verdict == flow_pb2.AUDIT:
            word, color = "AUDITED", YELLOW
        allowed = [*flow.egress_allowed_by, *flow.ingress_allowed_by]
        denied = [*flow.egress_denied_by, *flow.ingress_denied_by]
        names = [safe(f"{p.name} ({p.kind})" if p.kind else p.name) for p in denied or allowed]
        by = f" BY {', '.join(dict.fromkeys(names))}" if names else ""
        return self._paint(color, word) + by

    def _paint(self, color: str, text: str) -> str:
        return f"{color}{text}{PLAIN}" if self._color and color else text


def time_text(form: str, seconds: int, nanos: int) -> str:
    """In UTC, in one of `arguments.TIME_FORMATS`."""
    when = datetime.fromtimestamp(seconds, UTC)
    month, day = MONTHS[when.month - 1], DAYS[when.weekday()]
    match form:
        case "YearMonthDay":
            return f"{when:%Y-%m-%d}"
        case "YearMonthDayHour":
            return f"{when:%Y-%m-%dT%H}Z"
        case "YearMonthDayHourMinute":
            return f"{when:%Y-%m-%dT%H:%M}Z"
        case "RFC3339":
            return f"{when:%Y-%m-%dT%H:%M:%S}Z"
        case "RFC3339Milli":
            return f"{when:%Y-%m-%dT%H:%M:%S}.{nanos // 10**6:03}Z"
        case "RFC3339Micro":
            return f"{when:%Y-%m-%dT%H:%M:%S}.{nanos // 10**3:06}Z"
        case "RFC3339Nano":
            # As Go writes it: without zeros at the end.
            rest = f".{nanos:09}".rstrip("0").rstrip(".")
            return f"{when:%Y-%m-%dT%H:%M:%S}{rest}Z"
        case "RFC1123Z":
            return f"{day}, {when:%d} {month} {when:%Y %H:%M:%S} +0000"
    return f"{month} {when.day:>2} {when:%H:%M:%S}.{nanos // 10**6:03}"


def strip(text: str) -> str:
    """Without colours."""
    return re.sub(r"\033\[\d+m", "", text)


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [
        cell + " " * (width - len(strip(cell))) for cell, width in zip(row, widths, strict=True)
    ]
    return "   ".join(cells).rstrip() + "\n"


def json_line(message: Any) -> str:
    found = MessageToDict(message, preserving_proto_field_name=True)
    return json.dumps(found, separators=(",", ":")) + "\n"
