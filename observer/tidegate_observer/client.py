"""Asking an observer. Errors as one text for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc

from tidegate_observer.api import observer_pb2, peer_pb2
from tidegate_observer.methods import (
    GET_AGENT_EVENTS,
    GET_FLOWS,
    GET_NAMESPACES,
    GET_NODES,
    MARKS,
    NOTIFY,
    SERVER_STATUS,
    call,
)
from tidegate_observer.tls import ClientCredentials

TIMEOUT_SECONDS = 5.0
KEEPALIVE_MS = 20_000
NOBODY = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)


class ObserverError(Exception):
    """The observer could not be asked, or refused."""


class UnreachableError(ObserverError):
    """Nobody answers there."""


class Client:
    """One server, "unix:PATH" or "HOST:PORT". A context manager. Every call: ObserverError."""

    def __init__(
        self, address: str, certificates: ClientCredentials | None = None, server_name: str = ""
    ) -> None:
        """`certificates`: to ask by TLS, of a server that has one for `server_name`; "": for its
        address.
        ObserverError: a file of them is missing."""
        self.address = address
        options: list[tuple[str, str | int]] = [
            ("grpc.enable_http_proxy", 0),
            ("grpc.max_reconnect_backoff_ms", 1000),
            # No thread of gRPC's own for a stream.
            ("SingleThreadedUnaryStream", 1),
        ]
        if certificates is None:
            self._channel = grpc.insecure_channel(address, options=options)
            return
        try:
            credentials = certificates.for_client()
        except OSError as error:
            raise ObserverError(f"no certificate to ask with: {error}") from error
        if server_name:
            options.append(("grpc.ssl_target_name_override", server_name))
        options += [
            # A node that is gone says nothing: a stream to it must not wait for ever.
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_MS // 2),
        ]
        self._channel = grpc.secure_channel(address, credentials, options=options)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._channel.close()

    def wait_ready(self, seconds: float) -> None:
        """Until it answers. A call, in this thread: gRPC's own way leaves one behind that a process
        which ends in that moment dies of."""
        ask = call(self._channel, SERVER_STATUS)
        try:
            ask(observer_pb2.ServerStatusRequest(), timeout=seconds, wait_for_ready=True)
        except grpc.RpcError as error:
            if _code(error) in NOBODY:
                text = f"no answer from {self.address} in {seconds:.0f} s"
                raise UnreachableError(text) from None
            raise _failed(error) from error

    def flows(
        self, request: observer_pb2.GetFlowsRequest, marks: float = 0.0
    ) -> Iterator[observer_pb2.GetFlowsResponse]:
        """As they come; with `follow` until it is left. `marks`: about so many seconds apart there
        are responses that have nothing but a time, until which everything has been told; 0: none.
        A server of another kind makes none."""
        told = ((MARKS, str(round(marks * 1000))),) if marks else ()
        yield from self._stream(GET_FLOWS, request, told)

    def agent_events(
        self, request: observer_pb2.GetAgentEventsRequest
    ) -> Iterator[observer_pb2.GetAgentEventsResponse]:
        """As `flows`."""
        yield from self._stream(GET_AGENT_EVENTS, request)

    def peers(self) -> Iterator[peer_pb2.ChangeNotification]:
        """The observers that it knows, and what changes, until it is left."""
        yield from self._stream(NOTIFY, peer_pb2.NotifyRequest())

    def _stream(
        self, method: Any, request: Any, told: tuple[tuple[str, str], ...] = ()
    ) -> Iterator[Any]:
        stream = call(self._channel, method)(request, metadata=told)
        try:
            yield from stream
        except grpc.RpcError as error:
            raise _failed(error) from error
        finally:
            stream.cancel()

    def status(self) -> observer_pb2.ServerStatusResponse:
        answer: observer_pb2.ServerStatusResponse = self._ask(
            SERVER_STATUS, observer_pb2.ServerStatusRequest()
        )
        return answer

    def nodes(self) -> observer_pb2.GetNodesResponse:
        answer: observer_pb2.GetNodesResponse = self._ask(GET_NODES, observer_pb2.GetNodesRequest())
        return answer

    def namespaces(self) -> observer_pb2.GetNamespacesResponse:
        answer: observer_pb2.GetNamespacesResponse = self._ask(
            GET_NAMESPACES, observer_pb2.GetNamespacesRequest()
        )
        return answer

    def _ask(self, method: Any, request: Any) -> Any:
        try:
            return call(self._channel, method)(request, timeout=TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            raise _failed(error) from error


def _failed(error: grpc.RpcError) -> ObserverError:
    code = _code(error)
    details = error.details() if hasattr(error, "details") else str(error)
    text = f"{code.name.lower().replace('_', ' ') if code else 'error'}: {details}"
    return UnreachableError(text) if code in NOBODY else ObserverError(text)


def _code(error: grpc.RpcError) -> grpc.StatusCode | None:
    """Every error of a call is one of its outcome, too; the stubs do not say so."""
    return error.code() if hasattr(error, "code") else None
