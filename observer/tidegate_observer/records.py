"""Records of the kernel's ring buffers → flows. Pure: bytes and a Directory in, flows out.

Three hundred thousand a second must get through here on one CPU, so each kind of record is one loop
over `struct.iter_unpack`, and all that can be looked up is looked up in a dict.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence

from tidegate_bpf import LayoutError, ObjectFile
from tidegate_bpf.btf import Layout

from tidegate_observer.directory import Directory
from tidegate_observer.flow import NOBODY, Counts, Flow, Kind
from tidegate_observer.limits import AUDIT, LOG, MAX_KINDS, DenialKind
from tidegate_observer.processes import Processes

RECORD_HEADER = 8
"""Bytes of the kernel's before each record."""

_FORMATS = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "be16": "H"}

PORTS: list[int] = (
    [(port & 255) << 8 | port >> 8 for port in range(65536)]
    if sys.byteorder == "little"
    else list(range(65536))
)
"""A port as the machine loads it → as people write it; one int for all flows that have it."""


def reader(layout: Layout, names: Sequence[str], header: int = RECORD_HEADER) -> struct.Struct:
    """Unpacks the named members, in the order of the layout, which `names` must be in, from a
    struct with `header` bytes before it. LayoutError: the object does not have the members, or
    not as numbers and bytes."""
    held = [field for field in layout.fields if field.name in names]
    missing = set(names) - {field.name for field in held}
    if missing or [f.name for f in held if f.name in names] != list(names):
        raise LayoutError(f"struct {layout.name}: no {sorted(missing)}, or in another order")
    parts, at = [f"{header}x"], 0
    for field in held:
        parts.append(f"{field.offset - at}x")
        if field.type.startswith("bytes["):
            parts.append(f"{field.size}s")
        elif field.kind in _FORMATS and field.count is None:
            parts.append(_FORMATS[field.kind])
        else:
            raise LayoutError(f"struct {layout.name}: {field.name} is {field.type}")
        at = field.offset + field.size
    parts.append(f"{layout.size - at}x")
    return struct.Struct("=" + "".join(parts))


EVENT = (
    "time",
    "ifindex",
    "socket",
    "src",
    "dst",
    "sport",
    "dport",
    "protocol",
    "reason",
    "direction",
    "tcp_flags",
    "src_identity",
    "dst_identity",
    "endpoint",
    "rule_set",
    "rule",
    "flags",
)
"""Members of struct tg_event that a flow is made of."""


FLOW_EVENT = (
    "time",
    "start",
    "cookie",
    "cgroup",
    "packets",
    "bytes",
    "reply_packets",
    "reply_bytes",
    "src",
    "dst",
    "frontend",
    "sport",
    "dport",
    "frontend_port",
    "protocol",
    "kind",
    "direction",
    "tcp_flags",
    "handshake",
    "first_byte",
    "ifindex",
    "src_identity",
    "dst_identity",
    "src_endpoint",
    "dst_endpoint",
    "src_rule_set",
    "src_rule",
    "dst_rule_set",
    "dst_rule",
)
"""Members of struct tg_flow_event."""
FLOW_START = 0
NO_BACKEND = 158
RST = 4
COOKIE_LOW = (1 << 32) - 1


LATENCIES = [0] + [
    1000 * code if code < 8 else 500 * ((2 * (8 + code % 8) + 1) << code // 8 - 1)
    for code in range(1, 256)
]
"""What `tg_latency` made of a time → nanoseconds, the middle of what it may have been."""


def _nobody(_cookie: int) -> None:
    return None


def flow_key(
    start: int, source: bytes, destination: bytes, sport: int, dport: int, protocol: int
) -> int:
    """Names one flow of a node, from its records and from its entry alike; ports as they lie in
    memory."""
    return hash((start, source, destination, sport << 16 | dport, protocol))


class Flows:
    """struct tg_flow_event: flows that start, and flows that end."""

    def __init__(
        self,
        spec: ObjectFile,
        node: str,
        max_live: int = 0,
        processes: Processes | None = None,
    ) -> None:
        """`max_live`: how many flows at most `live` holds, from their start to their end.
        `processes`: who their sockets are of; None: not known."""
        layout = spec.layout("tg_flow_event")
        self._process = processes.get if processes is not None else _nobody
        self._node = node
        self._max_live = max_live
        self.live: dict[int, Flow] = {}
        """By `flow_key`."""
        self.size = layout.size
        self._struct = reader(layout, FLOW_EVENT)

    def flows(self, data: bytes, offset: int, directory: Directory) -> list[Flow]:
        """As of `Denials`."""
        found = []
        node, end, who = self._node, directory.end, directory.who
        decision, services = directory.decision, directory.services
        started, ended = Kind.START.value, Kind.END.value
        live, room = self.live, self._max_live
        host, process = directory.host, self._process
        link, names = directory.link, directory.interfaces
        for (
            time,
            start,
            cookie,
            cgroup,
            packets,
            size,
            reply_packets,
            reply_size,
            source,
            destination,
            frontend,
            sport,
            dport,
            frontend_port,
            protocol,
            kind,
            direction,
            tcp_flags,
            handshake,
            first_byte,
            interface,
            source_identity,
            destination_identity,
            source_endpoint,
            destination_endpoint,
            source_set,
            source_rule,
            destination_set,
            destination_rule,
        ) in self._struct.iter_unpack(data):
            if kind == FLOW_START:
                if frontend == NOBODY:
                    asked = (destination, PORTS[dport], protocol)
                    service = services.get(asked)
                else:
                    asked = (frontend, PORTS[frontend_port], protocol)
                    service = services.get(asked) or directory.service(*asked)
                begins = end(source, source_identity, source_endpoint)
                if cgroup and not begins.pod:
                    begins = host(begins, cgroup)
                flow = Flow(
                    node,
                    time + offset,
                    started,
                    0,
                    direction,
                    source,
                    destination,
                    PORTS[sport],
                    PORTS[dport],
                    protocol,
                    tcp_flags,
                    interface,
                    begins,
                    end(destination, destination_identity, destination_endpoint),
                    decision(source_set, source_rule) if source_set else None,
                    decision(destination_set, destination_rule) if destination_set else None,
                    service,
                    None,
                    cookie,
                    cgroup,
                    process=process(cookie & COOKIE_LOW) if cookie else None,
                    asked=asked if service is not None else None,
                    interface_name=names.get(interface) or link(interface),
                )
                if len(live) < room:
                    live[hash((start, source, destination, sport << 16 | dport, protocol))] = flow
            else:
                key = flow_key(start, source, destination, sport, dport, protocol)
                begun = live.pop(key, None)
                counts = Counts(
                    packets,
                    size,
                    reply_packets,
                    reply_size,
                    max(0, time - start) if start else 0,
                    "rst" if tcp_flags & RST else "fin",
                    LATENCIES[handshake],
                    LATENCIES[first_byte],
                )
                flow = Flow(
                    node,
                    time + offset,
                    ended,
                    0,
                    direction,
                    source,
                    destination,
                    PORTS[sport],
                    PORTS[dport],
                    protocol,
                    tcp_flags,
                    interface,
                    begun.source if begun else who(source, source_endpoint),
                    begun.destination if begun else who(destination, destination_endpoint),
                    egress=begun.egress if begun else None,
                    ingress=begun.ingress if begun else None,
                    service=begun.service if begun else None,
                    counts=counts,
                    asked=begun.asked if begun else None,
                    process=begun.process if begun else None,
                    interface_name=names.get(interface) or link(interface),
                )
            found.append(flow)
        return found


class Denials:
    """struct tg_event: packets that were dropped, by a policy or for what they are; and flows that
    passed, of which a policy wants to tell."""

    def __init__(
        self,
        spec: ObjectFile,
        node: str,
        seen: dict[DenialKind, Flow] | None = None,
        processes: Processes | None = None,
    ) -> None:
        """`seen`: where the last denial of each kind is kept (`limits.Limits`); `processes` as
        of `Flows`."""
        layout = spec.layout("tg_event")
        self._node = node
        self._process = processes.get if processes is not None else _nobody
        self.seen: dict[DenialKind, Flow] = {} if seen is None else seen
        self.size = layout.size
        self._struct = reader(layout, EVENT)

    def flows(self, data: bytes, offset: int, directory: Directory) -> list[Flow]:
        """`offset`: nanoseconds to add to the kernel's clock to get the time since 1970."""
        found = []
        node = self._node
        end, decision = directory.end, directory.decision
        egress_of, denied = 1, Kind.DENIED.value
        audited = Kind.AUDITED.value
        seen, process, link = self.seen, self._process, directory.link
        if len(seen) > MAX_KINDS:
            seen.clear()
        for (
            time,
            interface,
            socket,
            source,
            destination,
            sport,
            dport,
            protocol,
            reason,
            direction,
            tcp_flags,
            source_identity,
            destination_identity,
            endpoint,
            rule_set,
            rule,
            flags,
        ) in self._struct.iter_unpack(data):
            if flags & LOG:
                continue  # its flow is told of as every other
            verdict = decision(rule_set, rule, flags == AUDIT) if rule_set else None
            leaves = direction == egress_of
            flow = Flow(
                node,
                time + offset,
                audited if flags & AUDIT else denied,
                reason,
                direction,
                source,
                destination,
                PORTS[sport],
                PORTS[dport],
                protocol,
                tcp_flags,
                interface,
                end(source, source_identity, endpoint if leaves else 0),
                end(destination, destination_identity, 0 if leaves else endpoint),
                verdict if leaves else None,
                None if leaves else verdict,
                process=process(socket) if socket else None,
                interface_name=link(interface),
            )
            if reason == NO_BACKEND:
                flow.service = directory.service(destination, PORTS[dport], protocol)
            what = reason | direction << 8 | flags << 16
            seen[rule_set, rule, source_identity, destination_identity, endpoint, what] = flow
            found.append(flow)
        return found


TRACE = (
    "time",
    "src",
    "dst",
    "sport",
    "dport",
    "protocol",
    "point",
    "how",
    "tcp_flags",
    "ifindex",
    "length",
)
"""Members of struct tg_trace."""
FROM_ENDPOINT = 5


class Traces:
    """struct tg_trace: packets that somebody asked for."""

    def __init__(self, spec: ObjectFile, node: str) -> None:
        layout = spec.layout("tg_trace")
        self._node = node
        self.size = layout.size
        self._struct = reader(layout, TRACE)

    def flows(self, data: bytes, offset: int, directory: Directory) -> list[Flow]:
        """As of `Denials`."""
        found = []
        for (
            time,
            source,
            destination,
            sport,
            dport,
            protocol,
            point,
            how,
            tcp_flags,
            interface,
            _length,
        ) in self._struct.iter_unpack(data):
            found.append(
                Flow(
                    self._node,
                    time + offset,
                    Kind.TRACED.value,
                    0,
                    1 if point == FROM_ENDPOINT else 0,
                    source,
                    destination,
                    PORTS[sport],
                    PORTS[dport],
                    protocol,
                    tcp_flags,
                    interface,
                    directory.who(source),
                    directory.who(destination),
                    point=point,
                    how=how,
                    interface_name=directory.link(interface),
                )
            )
        return found
