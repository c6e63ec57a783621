"""What a flow is in the words and numbers of Hubble's API. Pure.

Where Tidegate's own numbers differ (reserved identities, drop reasons) they are translated here and
nowhere else, both ways: what a client is shown it can ask for.
"""

from __future__ import annotations

from typing import NamedTuple

from tidegate_observer.api import flow_pb2
from tidegate_observer.flow import Decision, Flow, Kind

CLUSTER = "default"
"""The name of the one cluster."""

FORWARDED, DROPPED, AUDIT = flow_pb2.FORWARDED, flow_pb2.DROPPED, flow_pb2.AUDIT

DROP, TRACE, POLICY_VERDICT = 1, 4, 5
"""`event_type.type`."""
TO_ENDPOINT, TO_STACK = 0, 3
"""`event_type.sub_type` of a trace; `trace_observation_point` has its own numbers."""

_IDENTITIES = {3: 7, 4: 6, 5: 4}
"""kube-apiserver, remote-node, health."""

_REASONS = {
    140: flow_pb2.UNSUPPORTED_L2_PROTOCOL,
    142: flow_pb2.ERROR_WRITING_TO_PACKET,
    220: flow_pb2.VLAN_FILTERED,
    221: flow_pb2.FORBIDDEN_ICMPV6_MESSAGE,
    222: flow_pb2.NO_CONFIGURATION_AVAILABLE_TO_PERFORM_POLICY_DECISION,
    223: flow_pb2.FIRST_LOGICAL_DATAGRAM_FRAGMENT_NOT_FOUND,
    224: flow_pb2.UNKNOWN_CONNECTION_TRACKING_STATE,
    225: flow_pb2.ERROR_WRITING_TO_PACKET,
    226: flow_pb2.INVALID_PACKET_DROPPED,
    227: flow_pb2.NO_CONFIGURATION_AVAILABLE_TO_PERFORM_POLICY_DECISION,
    228: flow_pb2.INVALID_SOURCE_MAC,
}
_OUR_IDENTITIES = {number: ours for ours, number in _IDENTITIES.items()}
_KNOWN_REASONS = frozenset(flow_pb2.DropReason.values())


class Meaning(NamedTuple):
    """How an event is told."""

    verdict: int
    type: int
    sub_type: int
    point: int
    """enum TraceObservationPoint; 0: it is no trace."""
    match: int
    """`policy_match_type`; 0: none."""


def theirs(identity: int) -> int:
    """Hubble's number of an identity."""
    return _IDENTITIES.get(identity, identity)


def our_identity(number: int) -> int:
    """The identity that is told by Hubble's number."""
    return _OUR_IDENTITIES.get(number, number)


def verdict(flow: Flow) -> int:
    if flow.kind == Kind.DENIED:
        return DROPPED
    return AUDIT if flow.kind == Kind.AUDITED else FORWARDED


def drop_reason(flow: Flow) -> int:
    """enum DropReason; 0: nothing was dropped, or the API has no word for it."""
    if flow.kind != Kind.DENIED:
        return 0
    reason = _REASONS.get(flow.reason, flow.reason)
    return reason if reason in _KNOWN_REASONS else 0


def deciding(flow: Flow) -> Decision | None:
    """The decision that is told of: the ingress policy's is the last one."""
    for decision in (flow.ingress, flow.egress):
        if decision is not None and decision.rule >= 0:
            return decision
    return flow.ingress or flow.egress


def event_type(flow: Flow) -> tuple[int, int]:
    """(type, sub_type)."""
    if flow.kind == Kind.DENIED:
        return DROP, drop_reason(flow)
    if flow.kind == Kind.AUDITED or (flow.kind == Kind.START and deciding(flow) is not None):
        return POLICY_VERDICT, 0
    if flow.kind == Kind.TRACED:
        return TRACE, flow.point
    return TRACE, TO_ENDPOINT if flow.destination.id else TO_STACK


def meaning(flow: Flow) -> Meaning:
    kind, sub = event_type(flow)
    point = 0
    if kind == TRACE:
        # As of `flow_pb2`, but for this one.
        point = flow_pb2.TO_ENDPOINT if sub == TO_ENDPOINT else sub
    decided = deciding(flow) if kind == POLICY_VERDICT else None
    return Meaning(verdict(flow), kind, sub, point, decided.match if decided else 0)
