"""The methods of the API by name: what a server answers and a client may ask. A table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import Message

from tidegate_observer.api import observer_pb2, peer_pb2

OBSERVER, PEER = "observer.Observer", "peer.Peer"

MARKS = "tidegate-marks-ms"
"""Metadata of a GetFlows that follows: how often it wants to be told how far the observer is. An
answer to that has a time and nothing else; whoever does not ask never sees one."""


class Method(NamedTuple):
    service: str
    name: str
    function: str
    """Of `server.ObserverService`."""
    request: type[Message]
    response: type[Message]
    streams: bool

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"


GET_FLOWS = Method(
    OBSERVER,
    "GetFlows",
    "get_flows",
    observer_pb2.GetFlowsRequest,
    observer_pb2.GetFlowsResponse,
    True,
)
GET_AGENT_EVENTS = Method(
    OBSERVER,
    "GetAgentEvents",
    "get_agent_events",
    observer_pb2.GetAgentEventsRequest,
    observer_pb2.GetAgentEventsResponse,
    True,
)
GET_DEBUG_EVENTS = Method(
    OBSERVER,
    "GetDebugEvents",
    "get_debug_events",
    observer_pb2.GetDebugEventsRequest,
    observer_pb2.GetDebugEventsResponse,
    True,
)
GET_NODES = Method(
    OBSERVER,
    "GetNodes",
    "get_nodes",
    observer_pb2.GetNodesRequest,
    observer_pb2.GetNodesResponse,
    False,
)
GET_NAMESPACES = Method(
    OBSERVER,
    "GetNamespaces",
    "get_namespaces",
    observer_pb2.GetNamespacesRequest,
    observer_pb2.GetNamespacesResponse,
    False,
)
SERVER_STATUS = Method(
    OBSERVER,
    "ServerStatus",
    "server_status",
    observer_pb2.ServerStatusRequest,
    observer_pb2.ServerStatusResponse,
    False,
)
NOTIFY = Method(PEER, "Notify", "notify", peer_pb2.NotifyRequest, peer_pb2.ChangeNotification, True)

METHODS = (
    GET_FLOWS,
    GET_AGENT_EVENTS,
    GET_DEBUG_EVENTS,
    GET_NODES,
    GET_NAMESPACES,
    SERVER_STATUS,
    NOTIFY,
)


HEALTH = "grpc.health.v1.Health"
_SERVING = b"\x08\x01"
"""HealthCheckResponse{status: SERVING}: who can answer serves."""


def _health() -> grpc.GenericRpcHandler[Any, Any]:
    """gRPC's own health check, which `hubble status` asks first."""
    check = grpc.unary_unary_rpc_method_handler(lambda _request, _context: _SERVING)
    return grpc.method_handlers_generic_handler(HEALTH, {"Check": check})


def handlers(servicer: object) -> tuple[grpc.GenericRpcHandler[Any, Any], ...]:
    """For a gRPC server; `servicer` has the functions."""
    found: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}
    for method in METHODS:
        kind: Callable[..., Any] = (
            grpc.unary_stream_rpc_method_handler
            if method.streams
            else grpc.unary_unary_rpc_method_handler
        )
        found.setdefault(method.service, {})[method.name] = kind(
            getattr(servicer, method.function),
            request_deserializer=method.request.FromString,
            response_serializer=method.response.SerializeToString,
        )
    made = (grpc.method_handlers_generic_handler(name, calls) for name, calls in found.items())
    return (*made, _health())


def call(channel: grpc.Channel, method: Method) -> Callable[..., Any]:
    """A function of (request, timeout=…) that asks a server."""
    kind: Callable[..., Any] = channel.unary_stream if method.streams else channel.unary_unary
    made: Callable[..., Any] = kind(
        method.path,
        request_serializer=method.request.SerializeToString,
        response_deserializer=method.response.FromString,
    )
    return made
