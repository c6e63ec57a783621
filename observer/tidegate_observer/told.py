"""A message that `messages` made of a flow → that flow, as far as filters ask for it. Pure."""

from __future__ import annotations

import re
from typing import Any

from tidegate_observer.api import flow_pb2
from tidegate_observer.flow import (
    ICMP,
    ICMPV6,
    NOBODY,
    SCTP,
    TCP,
    UDP,
    Decision,
    End,
    Flow,
    Kind,
    Service,
    address_bytes,
)
from tidegate_observer.meaning import AUDIT, DROPPED, POLICY_VERDICT, our_identity
from tidegate_observer.messages import EMITTER, FLAGS

_PROTOCOLS = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP, "ICMPv4": ICMP, "ICMPv6": ICMPV6}


class Told(Flow, gc=False):
    """A flow of which there is only the message."""

    message: Any = None
    """flow_pb2.Flow."""


def told(message: flow_pb2.Flow) -> Told:
    """ValueError: it is of another program, whose numbers may mean something else, or no message of
    ours (of fields left out, too, filters cannot judge)."""
    if message.emitter.name != EMITTER:
        raise ValueError(f"no flow of {EMITTER}'s, or not all of it: filters cannot judge it")
    kind, decision = Kind.TRACED, None
    if message.verdict == DROPPED:
        kind = Kind.DENIED
    elif message.verdict == AUDIT:
        kind = Kind.AUDITED
    elif message.event_type.type == POLICY_VERDICT:
        kind, decision = Kind.START, Decision((), 0)
    which = message.l4.WhichOneof("protocol")
    inner: Any = getattr(message.l4, which) if which else None
    flags = inner.flags if which == "TCP" else None
    service = message.destination_service
    return Told(
        node=message.node_name,
        time=message.time.seconds * 10**9 + message.time.nanos,
        kind=kind,
        reason=message.drop_reason_desc,  # means the same where ours is asked for
        direction=message.traffic_direction - 1,
        source_address=_address(message.IP.source),
        destination_address=_address(message.IP.destination),
        source_port=getattr(inner, "source_port", 0),
        destination_port=getattr(inner, "destination_port", 0),
        protocol=_PROTOCOLS[which] if which in _PROTOCOLS else _unnamed(message.Summary),
        tcp_flags=sum(1 << bit for bit, name in enumerate(FLAGS) if getattr(flags, name, False)),
        interface=message.interface.index,
        interface_name=message.interface.name,
        source=_end(message.source),
        destination=_end(message.destination),
        ingress=decision,
        service=Service(service.namespace, service.name) if service.name else None,
        point=message.event_type.sub_type,
        how=flow_pb2.REPLY if message.is_reply.value else 0,
        message=message,
    )


def _unnamed(summary: str) -> int:
    """The protocol of a message that has no `l4`; 0: it is not said."""
    found = re.match(r"IP protocol (\d{1,3})\b", summary)
    return int(found[1]) if found else 0


def _address(text: str) -> bytes:
    return address_bytes(text) if text else NOBODY


def _end(end: flow_pb2.Endpoint) -> End:
    workload = end.workloads[0] if end.workloads else flow_pb2.Workload()
    return End(
        our_identity(end.identity),
        end.ID,
        end.namespace,
        end.pod_name,
        tuple(end.labels),
        workload.name,
        workload.kind,
    )
