"""Many observers as one: their flows merged in the order of time, and which of them do not answer.

Holds no flows: a stream of a client is a stream to each node, with a short queue between. Of a node
that cannot be reached the client is told, and gets what the others have.
"""

from __future__ import annotations

import collections
import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from tidegate_observer.api import observer_pb2, peer_pb2, relay_pb2
from tidegate_observer.client import Client, ObserverError

QUEUE = 256
"""Responses that wait of each node. What is more waits on the node, which has its own limit."""
WINDOW_SECONDS = 0.3
"""For how long a flow to be followed waits for earlier ones of other nodes."""
READY_SECONDS = 2.0
RETRY_SECONDS = 2.0
POLL_SECONDS = 0.05
MAX_LAST = 65536
"""Flows that are gathered to find the last ones of all nodes; of more each node's are shown."""

Response = observer_pb2.GetFlowsResponse
_END = None


def nanoseconds(response: Response) -> int:
    """When it happened."""
    return int(response.time.seconds * 10**9 + response.time.nanos)


def status(state: int, names: Iterable[str], message: str = "") -> Response:
    """What is said of nodes among flows."""
    made = Response()
    made.node_status.state_change = state  # type: ignore[assignment]
    made.node_status.node_names.extend(names)
    made.node_status.message = message
    made.time.GetCurrentTime()
    return made


class _Node:
    """One node's answers to one question, fetched by a thread of their own."""

    def __init__(
        self, name: str, address: str, request: observer_pb2.GetFlowsRequest, gone: threading.Event
    ) -> None:
        self.name = name
        self.answers: queue.Queue[Response | None] = queue.Queue(QUEUE)
        self._address = address
        self._request = request
        self._gone = gone
        threading.Thread(target=self._run, name=f"relay-{name}", daemon=True).start()

    def _run(self) -> None:
        request = observer_pb2.GetFlowsRequest()
        request.CopyFrom(self._request)
        while not self._gone.is_set():
            last = self._fetch(request)
            if not request.follow:
                break
            if last is not None:
                # What came meanwhile, and nothing twice.
                request.number = 0
                request.since.FromNanoseconds(last + 1)
            self._gone.wait(RETRY_SECONDS)
        self._put(_END)

    def _fetch(self, request: observer_pb2.GetFlowsRequest) -> int | None:
        last = None
        try:
            with Client(self._address) as client:
                client.wait_ready(READY_SECONDS)
                if request.follow:
                    self._put(status(relay_pb2.NODE_CONNECTED, [self.name]))
                for response in client.flows(request):
                    if response.WhichOneof("response_types") == "flow":
                        last = nanoseconds(response)
                    if not self._put(response):
                        return last
        except ObserverError as error:
            self._put(status(relay_pb2.NODE_UNAVAILABLE, [self.name], str(error)))
        return last

    def _put(self, answer: Response | None) -> bool:
        """False: nobody wants it any more."""
        while not self._gone.is_set():
            try:
                self.answers.put(answer, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def until_the_end(self) -> Iterator[Response]:
        while (answer := self.answers.get()) is not _END:
            yield answer


def merged(
    peers: Mapping[str, str], request: observer_pb2.GetFlowsRequest, active: Callable[[], bool]
) -> Iterator[Response]:
    """Of every node, by time; `peers`: name → address. Ends early once `active` says no."""
    gone = threading.Event()
    try:
        nodes = [_Node(name, address, request, gone) for name, address in sorted(peers.items())]
        if request.follow:
            yield from _followed(nodes, active)
        else:
            yield from _gathered(nodes, request)
    finally:
        gone.set()


def _gathered(nodes: list[_Node], request: observer_pb2.GetFlowsRequest) -> Iterator[Response]:
    said: list[Response] = []

    def flows(node: _Node) -> Iterator[Response]:
        for response in node.until_the_end():
            if response.WhichOneof("response_types") == "node_status":
                said.append(response)
            else:
                yield response

    found: Iterable[Response] = heapq.merge(*map(flows, nodes), key=nanoseconds)
    number = request.number
    if number and request.first:
        found = itertools.islice(found, number)
    elif number and number <= MAX_LAST:
        found = collections.deque(found, maxlen=number)
    yield from found
    yield from said


def _followed(nodes: list[_Node], active: Callable[[], bool]) -> Iterator[Response]:
    waiting: list[tuple[int, int, float, Response]] = []
    numbers = itertools.count()
    ended: set[str] = set()
    while active() and len(ended) < len(nodes):
        now = time.monotonic()
        for node in nodes:
            for _ in range(QUEUE):
                try:
                    answer = node.answers.get_nowait()
                except queue.Empty:
                    break
                if answer is _END:
                    ended.add(node.name)
                elif answer.WhichOneof("response_types") == "node_status":
                    yield answer
                else:
                    at = nanoseconds(answer)
                    heapq.heappush(waiting, (at, next(numbers), now, answer))
        while waiting and waiting[0][2] <= now - WINDOW_SECONDS:
            yield heapq.heappop(waiting)[3]
        time.sleep(POLL_SECONDS)
    yield from (item[3] for item in sorted(waiting))


class RelayService:
    """The Observer service over the observers of `peers` (name → address); see `methods`."""

    def __init__(self, peers: Mapping[str, str], version: str) -> None:
        self._peers = dict(peers)
        self._version = version
        self._started = time.monotonic()

    def get_flows(
        self, request: observer_pb2.GetFlowsRequest, context: grpc.ServicerContext
    ) -> Iterator[Response]:
        if request.first and request.follow:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "first and follow exclude each other")
        yield from merged(self._peers, request, context.is_active)

    def _ask(self, ask: Callable[[Client], Any]) -> dict[str, Any]:
        """Each node's answer, None of one that has none."""

        def one(address: str) -> Any:
            try:
                with Client(address) as client:
                    client.wait_ready(READY_SECONDS)
                    return ask(client)
            except ObserverError:
                return None

        with ThreadPoolExecutor(16) as pool:
            names = sorted(self._peers)
            answers = pool.map(one, [self._peers[name] for name in names])
            return dict(zip(names, answers, strict=True))

    def server_status(
        self, _request: observer_pb2.ServerStatusRequest, _context: grpc.ServicerContext
    ) -> observer_pb2.ServerStatusResponse:
        answers = self._ask(Client.status)
        there = [answer for answer in answers.values() if answer is not None]
        missing = [name for name, answer in answers.items() if answer is None]
        made = observer_pb2.ServerStatusResponse(
            num_flows=sum(a.num_flows for a in there),
            max_flows=sum(a.max_flows for a in there),
            seen_flows=sum(a.seen_flows for a in there),
            flows_rate=sum(a.flows_rate for a in there),
            uptime_ns=int((time.monotonic() - self._started) * 10**9),
            unavailable_nodes=missing,
            version=self._version,
        )
        made.num_connected_nodes.value = len(there)
        made.num_unavailable_nodes.value = len(missing)
        return made

    def get_nodes(
        self, _request: observer_pb2.GetNodesRequest, _context: grpc.ServicerContext
    ) -> observer_pb2.GetNodesResponse:
        made = observer_pb2.GetNodesResponse()
        for name, answer in self._ask(Client.nodes).items():
            if answer is not None:
                made.nodes.extend(answer.nodes)
            else:
                made.nodes.add(
                    name=name, address=self._peers[name], state=relay_pb2.NODE_UNAVAILABLE
                )
        return made

    def get_namespaces(
        self, _request: observer_pb2.GetNamespacesRequest, _context: grpc.ServicerContext
    ) -> observer_pb2.GetNamespacesResponse:
        answers = self._ask(Client.namespaces).values()
        found = {(n.cluster, n.namespace) for a in answers if a is not None for n in a.namespaces}
        return observer_pb2.GetNamespacesResponse(
            namespaces=[
                observer_pb2.Namespace(cluster=cluster, namespace=name)
                for cluster, name in sorted(found)
            ]
        )

    def get_agent_events(
        self, _request: observer_pb2.GetAgentEventsRequest, _context: grpc.ServicerContext
    ) -> Iterator[observer_pb2.GetAgentEventsResponse]:
        """No node makes any."""
        yield from ()

    def get_debug_events(
        self, _request: observer_pb2.GetDebugEventsRequest, _context: grpc.ServicerContext
    ) -> Iterator[observer_pb2.GetDebugEventsResponse]:
        """No node makes any."""
        yield from ()

    def notify(
        self, _request: peer_pb2.NotifyRequest, context: grpc.ServicerContext
    ) -> Iterator[peer_pb2.ChangeNotification]:
        for name, address in sorted(self._peers.items()):
            yield peer_pb2.ChangeNotification(name=name, address=address, type=peer_pb2.PEER_ADDED)
        while context.is_active():
            time.sleep(POLL_SECONDS)
