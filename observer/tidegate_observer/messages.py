"""A flow → messages of the API."""

from __future__ import annotations

from typing import Any

from google.protobuf import any_pb2, struct_pb2, wrappers_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from tidegate_observer import icmp
from tidegate_observer.api import flow_pb2
from tidegate_observer.flow import (
    ICMP,
    ICMPV6,
    MAPPED,
    SCTP,
    TCP,
    UDP,
    Decision,
    End,
    Flow,
    Kind,
    Lost,
    address_text,
)
from tidegate_observer.meaning import CLUSTER, drop_reason, meaning, theirs

EMITTER = "Tidegate"
FLAGS = ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR")
"""By bit."""
_SHOWN = (1, 4, 0, 2, 3, 5, 6, 7)
"""Bits in the order in which people are used to reading them: SYN, ACK, FIN, RST, …"""


MAX_COUNT = (1 << 32) - 1
"""Of a `uint32`."""


def timestamp(nanoseconds: int) -> Timestamp:
    return Timestamp(seconds=nanoseconds // 10**9, nanos=nanoseconds % 10**9)


def flow_message(flow: Flow, uuid: str) -> flow_pb2.Flow:
    """Everything that is known of it."""
    told = meaning(flow)
    made = flow_pb2.Flow(
        time=timestamp(flow.time),
        uuid=uuid,
        verdict=told.verdict,  # type: ignore[arg-type]
        IP=flow_pb2.IP(
            source=address_text(flow.source_address),
            destination=address_text(flow.destination_address),
            ipVersion=flow_pb2.IPv4 if flow.source_address[:12] == MAPPED else flow_pb2.IPv6,
        ),
        source=_end(flow.source),
        destination=_end(flow.destination),
        Type=flow_pb2.L3_L4,
        node_name=flow.node,
        event_type=flow_pb2.CiliumEventType(type=told.type, sub_type=told.sub_type),
        traffic_direction=flow.direction + 1,  # type: ignore[arg-type]
        policy_match_type=told.match,
        trace_observation_point=told.point,  # type: ignore[arg-type]
        is_reply=wrappers_pb2.BoolValue(value=False),
        emitter=flow_pb2.Emitter(name=EMITTER),
        Summary=summary(flow),
        socket_cookie=flow.cookie,
        cgroup_id=flow.cgroup,
    )
    if flow.interface:
        made.interface.index = flow.interface
        made.interface.name = flow.interface_name
    _protocol(flow, made)
    if flow.service is not None:
        made.destination_service.name = flow.service.name
        made.destination_service.namespace = flow.service.namespace
    if flow.kind == Kind.DENIED:
        made.drop_reason_desc = drop_reason(flow)  # type: ignore[assignment]
        made.drop_reason = drop_reason(flow)
        made.egress_denied_by.extend(_policies(flow.egress))
        made.ingress_denied_by.extend(_policies(flow.ingress))
    elif flow.kind == Kind.AUDITED:
        made.egress_denied_by.extend(_policies(flow.egress))
        made.ingress_denied_by.extend(_policies(flow.ingress))
    elif flow.kind == Kind.TRACED:
        made.trace_reason = flow.how  # type: ignore[assignment]
        if not flow.how:
            made.ClearField("is_reply")
        else:
            made.is_reply.value = flow.how == flow_pb2.REPLY
    else:
        made.trace_reason = flow_pb2.NEW if flow.kind == Kind.START else flow_pb2.ESTABLISHED
        made.egress_allowed_by.extend(_policies(flow.egress))
        made.ingress_allowed_by.extend(_policies(flow.ingress))
    if flow.kind != Kind.END:
        # The log has one line of it, of its start.
        made.policy_log.extend(_asked(flow))
    if flow.more:
        count = min(flow.more, MAX_COUNT)
        if flow.direction:
            made.aggregate.egress_flow_count = count
        else:
            made.aggregate.ingress_flow_count = count
    if flow.counts is not None or flow.process is not None:
        made.extensions.CopyFrom(_extensions(flow))
    return made


def _end(end: End) -> flow_pb2.Endpoint:
    made = flow_pb2.Endpoint(
        ID=end.id,
        identity=theirs(end.identity),
        namespace=end.namespace,
        labels=end.labels,
        pod_name=end.pod,
        cluster_name=CLUSTER if end.namespace else "",
    )
    if end.workload:
        made.workloads.add(name=end.workload, kind=end.workload_kind)
    return made


def _protocol(flow: Flow, made: flow_pb2.Flow) -> None:
    ports: dict[str, Any] = {
        "source_port": flow.source_port,
        "destination_port": flow.destination_port,
    }
    if flow.protocol == TCP:
        flags = {n: True for bit, n in enumerate(FLAGS) if flow.tcp_flags >> bit & 1}
        made.l4.TCP.CopyFrom(flow_pb2.TCP(**ports, flags=flow_pb2.TCPFlags(**flags)))
    elif flow.protocol == UDP:
        made.l4.UDP.CopyFrom(flow_pb2.UDP(**ports))
    elif flow.protocol == SCTP:
        made.l4.SCTP.CopyFrom(flow_pb2.SCTP(**ports))
    elif flow.protocol == ICMP:
        kind, code = icmp.type_code(flow)
        made.l4.ICMPv4.CopyFrom(flow_pb2.ICMPv4(type=kind, code=code))
    elif flow.protocol == ICMPV6:
        kind, code = icmp.type_code(flow)
        made.l4.ICMPv6.CopyFrom(flow_pb2.ICMPv6(type=kind, code=code))


def _policies(decision: Decision | None) -> list[flow_pb2.Policy]:
    return [
        flow_pb2.Policy(kind=p.kind, namespace=p.namespace, name=p.name)
        for p in (decision.policies if decision is not None else ())
    ]


def _asked(flow: Flow) -> list[str]:
    """Policies whose rule asks for a line in the policy log, as it names them."""
    decided = (d for d in (flow.egress, flow.ingress) if d is not None and d.log)
    return [f"{p.kind} {p.namespace}/{p.name}" for d in decided for p in d.policies]


def _extensions(flow: Flow) -> any_pb2.Any:
    """A well-known type: a client that does not know us can still print it."""
    counts, process, made, packed = flow.counts, flow.process, struct_pb2.Struct(), any_pb2.Any()
    if process is not None:
        made.update({"process": process.name, "pid": process.pid})
    if counts is not None:
        latencies = {"handshakeSeconds": counts.handshake, "firstByteSeconds": counts.first_byte}
        made.update({name: value / 10**9 for name, value in latencies.items() if value})
        made.update(
            {
                "packets": counts.packets,
                "bytes": counts.bytes,
                "replyPackets": counts.reply_packets,
                "replyBytes": counts.reply_bytes,
                "seconds": counts.nanoseconds / 10**9,
                "closed": counts.closed,
            }
        )
    packed.Pack(made)
    return packed


def flags_text(flags: int) -> str:
    return ", ".join(FLAGS[bit] for bit in _SHOWN if flags >> bit & 1)


def summary(flow: Flow) -> str:
    """What a client prints in its last column."""
    if flow.protocol == TCP:
        text = f"TCP Flags: {flags_text(flow.tcp_flags)}" if flow.tcp_flags else "TCP"
    else:
        names = {UDP: "UDP", SCTP: "SCTP", ICMP: "ICMPv4", ICMPV6: "ICMPv6"}
        text = names.get(flow.protocol, f"IP protocol {flow.protocol}")
        if icmp.is_icmp(flow):
            text += f" {icmp.text(flow)}"
    if flow.process is not None and flow.counts is None:
        # Not every client that prints this knows that a process may call itself anything.
        name = flow.process.name.encode("unicode_escape").decode()
        text += f"; by {name} ({flow.process.pid})"
    if flow.more:
        text += f"; {flow.more} more like this one"
    counts = flow.counts
    if counts is not None:
        text += (
            f"; ended ({counts.closed}) after {counts.nanoseconds / 10**9:.3f}s: "
            f"{counts.packets} packets, {counts.bytes} bytes out, "
            f"{counts.reply_packets} packets, {counts.reply_bytes} bytes back"
        )
    return text


def lost_message(lost: Lost) -> flow_pb2.LostEvent:
    return flow_pb2.LostEvent(
        source=flow_pb2.OBSERVER_EVENTS_QUEUE if lost.queued else flow_pb2.PERF_EVENT_RING_BUFFER,
        num_events_lost=lost.count,
        first=timestamp(lost.first),
        last=timestamp(lost.time),
    )
