"""The Observer and Peer services of the nodes that one process reads.

A stream is a thread that walks the history at its own pace. It never holds more than a slice of it:
who reads too slowly finds that what comes next is gone, and is disconnected with how much that was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import structlog

from tidegate_observer import agent, filters, messages
from tidegate_observer.api import flow_pb2, observer_pb2, peer_pb2, relay_pb2
from tidegate_observer.flow import Flow, Lost
from tidegate_observer.history import History
from tidegate_observer.meaning import CLUSTER
from tidegate_observer.methods import MARKS, handlers
from tidegate_observer.streams import Stream, Streams
from tidegate_observer.tls import OBSERVER_NAME, Certificates

MAX_STREAMS = 32
"""Calls at once; the next one is told that there are too many."""
SLICE = 1024
"""Entries looked at without looking up: the work of one turn of a stream."""
WAIT_SECONDS = 0.5
MIN_MARKS_MS = 20
MAX_REQUEST = 1 << 20
KEEPALIVE_MS = 20_000
"""How often a client asks whether the server is still there, see `client`."""
STOP_SECONDS = 1.0

log = structlog.get_logger()


@dataclass(frozen=True)
class About:
    """What the server says of itself."""

    nodes: tuple[str, ...]
    version: str
    address: str = ""
    namespaces: Callable[[], list[str]] = list
    peers: Callable[[], dict[str, str]] | None = None
    """Node → address of every observer, as asked now; None: `nodes`, at `address`."""
    secure: bool = False
    """`address` and those of `peers` are served with TLS."""
    agent: History = field(default_factory=agent.history)
    """Agent events."""
    instance: int = 0
    """Makes the flows' ids those of this process."""
    started: float = field(default_factory=time.monotonic)


class ObserverService:
    """The calls; see `methods`. Each may run in many threads."""

    def __init__(self, history: History, about: About) -> None:
        self._history = history
        self._about = about
        self.streams = Streams()

    # ---- flows -------------------------------------------------------------------------

    def get_flows(
        self, request: observer_pb2.GetFlowsRequest, context: grpc.ServicerContext
    ) -> Iterator[observer_pb2.GetFlowsResponse]:
        end = self._history.added
        query = self._query(request, context)
        marks = _marks(context)
        with self.streams.watched(context) as stream:
            found = _affordable(self._entries(query, end, context, stream, marks), context)
            if not query.follow:
                # It is held as it was read: what waited for a name comes after what is younger.
                found = iter(sorted(found, key=lambda one: one[1].time))
            for number, entry in found:
                stream.move()
                yield self._response(number, entry, query)
                stream.move()

    def _query(
        self, request: observer_pb2.GetFlowsRequest, context: grpc.ServicerContext
    ) -> _Query:
        if request.first and request.follow:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "first and follow exclude each other")
        mask: Any = request.field_mask if request.HasField("field_mask") else None
        if mask is not None and not mask.IsValidForDescriptor(flow_pb2.Flow.DESCRIPTOR):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "field_mask: no such field of a flow")
        try:
            white, uuids = filters.split_uuids(request.whitelist)
            test = filters.build(white, request.blacklist)
        except filters.FilterError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return _Query(
            test=test,
            number=request.number,
            first=request.first,
            follow=request.follow,
            since=_nanoseconds(request, "since"),
            until=_nanoseconds(request, "until"),
            uuids=uuids,
            numbered=filters.asks_by_expression((*request.whitelist, *request.blacklist)),
            mask=mask,
        )

    def _entries(
        self,
        query: _Query,
        end: int,
        context: grpc.ServicerContext,
        stream: Stream,
        marks: float,
    ) -> Iterator[tuple[int, _Told]]:
        history = self._history
        left = query.number or None
        if query.follow and query.number == 0 and query.since is None:
            at = end
        elif query.first or query.number == 0:
            at = history.oldest
        else:
            at = self._rewound(query, end, context, stream)
        while at < end and context.is_active():
            stop = min(at + SLICE, end)
            for number, entry in self._wanted(query, at, stop):
                if left is not None and isinstance(entry, Flow):
                    if not left:
                        break
                    left -= 1
                yield number, entry
            at = stop
            stream.move()
            if left == 0 and not query.follow:
                return
        if query.follow:
            yield from self._following(query, at, context, stream, marks)

    def _rewound(
        self, query: _Query, end: int, context: grpc.ServicerContext, stream: Stream
    ) -> int:
        """Number of the first of the last flows that are asked for."""
        wanted, at = query.number, end
        while at > self._history.oldest and context.is_active():
            start = max(self._history.oldest, at - SLICE)
            for number, entry in reversed(self._wanted(query, start, at)):
                if isinstance(entry, Flow):
                    wanted -= 1
                    if not wanted:
                        return number
            at = start
            stream.move()
        return at

    def _wanted(self, query: _Query, start: int, stop: int) -> list[tuple[int, Flow | Lost]]:
        """What is asked for of [start, stop), with its numbers."""
        first, entries = self._history.slice(start, stop)
        numbered = enumerate(entries, first)
        plain = query.since is None and query.until is None and query.uuids is None
        if plain and not query.numbered:
            test = query.test
            return [(n, e) for n, e in numbered if e.__class__ is Lost or test(e)]  # type: ignore[arg-type]
        return [(n, e) for n, e in numbered if self._fits(query, n, e)]

    def _fits(self, query: _Query, number: int, entry: Flow | Lost) -> bool:
        if query.since is not None and entry.time < query.since:
            return False
        if query.until is not None and entry.time > query.until:
            return False
        if isinstance(entry, Lost):
            return True
        if query.uuids is not None and self._uuid(number) not in query.uuids:
            return False
        if query.numbered:
            entry = filters.numbered(entry, self._uuid(number))
        return query.test(entry)

    def _following(
        self,
        query: _Query,
        at: int,
        context: grpc.ServicerContext,
        stream: Stream,
        marks: float,
    ) -> Iterator[tuple[int, _Told]]:
        history, marked = self._history, 0
        while context.is_active() and not history.closed:
            if query.until is not None and time.time_ns() > query.until:
                return
            came = history.wait(at, marks or WAIT_SECONDS)
            # First how far it is, then what there is: that may be more, and never less.
            through = history.through
            if not came and history.added <= at:
                stream.move()
                if marks and through > marked:
                    marked = through
                    yield at, _Mark(through)
                continue
            missed = history.oldest - at
            if missed > 0:
                text = f"too slow: {missed} flows went by unread; the last {history.size} are held"
                log.warning("client disconnected", peer=stream.peer, reason=text)
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
            stop = min(at + SLICE, history.added)
            more = stop < history.added
            yield from self._wanted(query, at, stop)
            at = stop
            if marks and through > marked and not more:
                marked = through
                yield at, _Mark(through)
            stream.move()

    def _response(self, number: int, entry: _Told, query: _Query) -> observer_pb2.GetFlowsResponse:
        if isinstance(entry, _Mark):
            return observer_pb2.GetFlowsResponse(time=messages.timestamp(entry.time))
        if isinstance(entry, Lost):
            return observer_pb2.GetFlowsResponse(
                lost_events=messages.lost_message(entry),
                node_name=entry.node,
                time=messages.timestamp(entry.time),
            )
        made = messages.flow_message(entry, self._uuid(number))
        answer = observer_pb2.GetFlowsResponse(node_name=entry.node, time=made.time)
        if query.mask is None:
            answer.flow.CopyFrom(made)
        else:
            answer.flow.SetInParent()
            query.mask.MergeMessage(made, answer.flow)
        return answer

    def _uuid(self, number: int) -> str:
        digits = f"{self._about.instance & (1 << 64) - 1:016x}{number:016x}"
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))

    # ---- the rest ----------------------------------------------------------------------------

    def get_agent_events(
        self, request: observer_pb2.GetAgentEventsRequest, context: grpc.ServicerContext
    ) -> Iterator[observer_pb2.GetAgentEventsResponse]:
        yield from agent.stream(self._about.agent, request, context.is_active)

    def get_debug_events(
        self, request: observer_pb2.GetDebugEventsRequest, context: grpc.ServicerContext
    ) -> Iterator[observer_pb2.GetDebugEventsResponse]:
        """The programs send none."""
        while request.follow and context.is_active() and not self._history.closed:
            time.sleep(WAIT_SECONDS)
        yield from ()

    def get_nodes(
        self, _request: observer_pb2.GetNodesRequest, _context: grpc.ServicerContext
    ) -> observer_pb2.GetNodesResponse:
        history, addresses = self._history, self._peers()
        return observer_pb2.GetNodesResponse(
            nodes=[
                observer_pb2.Node(
                    name=name,
                    version=self._about.version,
                    address=addresses.get(name, self._about.address),
                    state=relay_pb2.NODE_CONNECTED,
                    tls=observer_pb2.TLS(
                        enabled=self._about.secure,
                        server_name=OBSERVER_NAME if self._about.secure else "",
                    ),
                    uptime_ns=self._uptime(),
                    num_flows=history.held,
                    max_flows=history.size,
                    seen_flows=history.seen,
                )
                for name in self._about.nodes
            ]
        )

    def get_namespaces(
        self, _request: observer_pb2.GetNamespacesRequest, _context: grpc.ServicerContext
    ) -> observer_pb2.GetNamespacesResponse:
        return observer_pb2.GetNamespacesResponse(
            namespaces=[
                observer_pb2.Namespace(cluster=CLUSTER, namespace=name)
                for name in self._about.namespaces()
            ]
        )

    def server_status(
        self, _request: observer_pb2.ServerStatusRequest, _context: grpc.ServicerContext
    ) -> observer_pb2.ServerStatusResponse:
        history = self._history
        return observer_pb2.ServerStatusResponse(
            num_flows=history.held,
            max_flows=history.size,
            seen_flows=history.seen,
            uptime_ns=self._uptime(),
            version=self._about.version,
            flows_rate=history.rate(),
        )

    def _uptime(self) -> int:
        return int((time.monotonic() - self._about.started) * 10**9)

    def notify(
        self, _request: peer_pb2.NotifyRequest, context: grpc.ServicerContext
    ) -> Iterator[peer_pb2.ChangeNotification]:
        """Every observer that is known, then what changes, for as long as one listens."""
        told: dict[str, str] = {}
        while context.is_active() and not self._history.closed:
            now = self._peers()
            for name in told.keys() - now.keys():
                yield self._change(name, told[name], peer_pb2.PEER_DELETED)
            for name in sorted(now):
                if name not in told:
                    yield self._change(name, now[name], peer_pb2.PEER_ADDED)
                elif now[name] != told[name]:
                    yield self._change(name, now[name], peer_pb2.PEER_UPDATED)
            told = now
            time.sleep(WAIT_SECONDS)

    def _peers(self) -> dict[str, str]:
        about = self._about
        if about.peers is None:
            return dict.fromkeys(about.nodes, about.address)
        return dict(about.peers())

    def _change(self, name: str, address: str, kind: int) -> peer_pb2.ChangeNotification:
        made = peer_pb2.ChangeNotification(name=name, address=address, type=kind)  # type: ignore[arg-type]
        if self._about.secure:
            made.tls.server_name = OBSERVER_NAME
        return made


@dataclass(frozen=True)
class _Query:
    test: filters.Test
    number: int
    first: bool
    follow: bool
    since: int | None
    until: int | None
    uuids: frozenset[str] | None
    numbered: bool
    """The test may ask for a flow's id."""
    mask: Any | None


@dataclass(frozen=True)
class _Mark:
    """Everything until then has been told."""

    time: int
    """Nanoseconds since 1970."""


_Told = Flow | Lost | _Mark


def _affordable(
    found: Iterator[tuple[int, _Told]], context: grpc.ServicerContext
) -> Iterator[tuple[int, _Told]]:
    """The same; ends the call where a filter takes too long."""
    try:
        yield from found
    except filters.CostlyError as error:
        log.warning("client disconnected", peer=context.peer(), reason=str(error))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))


def _marks(context: grpc.ServicerContext) -> float:
    """Seconds between marks that the client asks for; 0: it asks for none."""
    found = dict(context.invocation_metadata()).get(MARKS, "")
    return max(int(found), MIN_MARKS_MS) / 1000 if str(found).isdecimal() else 0.0


def _nanoseconds(request: observer_pb2.GetFlowsRequest, name: str) -> int | None:
    if not request.HasField(name):
        return None
    value = getattr(request, name)
    return int(value.seconds * 10**9 + value.nanos)


class Server:
    """Serves on Unix sockets, and with certificates on TCP addresses. A context manager."""

    def __init__(
        self, service: object, addresses: list[str], certificates: Certificates | None = None
    ) -> None:
        """`service`: what has the functions of `methods`. `addresses`: as gRPC writes them,
        "unix:PATH" or "HOST:PORT". OSError."""
        self._pool = ThreadPoolExecutor(MAX_STREAMS, thread_name_prefix="stream")
        self._server = grpc.server(
            self._pool,
            maximum_concurrent_rpcs=MAX_STREAMS,
            options=[
                ("grpc.max_receive_message_length", MAX_REQUEST),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
            ],
        )
        self._server.add_generic_rpc_handlers(handlers(service))
        for address in addresses:
            self._listen(address, certificates)

    def _listen(self, address: str, certificates: Certificates | None) -> None:
        path = address.removeprefix("unix:")
        if path != address:
            Path(path).unlink(missing_ok=True)
        elif certificates is None:
            raise OSError(f"{address} is no Unix socket: it is served with certificates only")
        try:
            if certificates is None or path != address:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, certificates.for_server())
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from error
        if not bound:
            raise OSError(f"cannot listen on {address}")
        if path != address:
            Path(path).chmod(0o660)

    def __enter__(self) -> Server:
        self._server.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._server.stop(STOP_SECONDS).wait()
        self._pool.shutdown(wait=False, cancel_futures=True)
