"""Many observers as one: their flows merged in the order of time, and which of them do not answer.

Holds no flows: a stream of a client is a stream to each node, with a short queue between. Of a node
that cannot be reached the client is told, and gets what the others have. Nodes may come and go
while a client follows.
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
from tidegate_observer.order import Order
from tidegate_observer.streams import Streams

QUEUE = 256
"""Responses that wait of each node. What is more waits on the node, which has its own limit."""
MARK_SECONDS = 0.05
"""How often each node that is followed says how far it is; of very many nodes all together say
so no more than `MARKS_A_SECOND` times."""
MARKS_A_SECOND = 1000
AHEAD_SECONDS = 2.0
"""A node whose flows come from so far in the future has a clock that is wrong, or ours is."""
READY_SECONDS = 2.0
RETRY_SECONDS = 2.0
POLL_SECONDS = 0.05
GATHER_SECONDS = 0.01
AT_ONCE = 16
"""Nodes that are asked at the same time."""
MAX_LAST = 65536
"""Flows that are gathered to find the last ones of all nodes; of more each node's are shown."""

Response = Any
"""GetFlowsResponse, or GetAgentEventsResponse."""
_END = None

Peers = Callable[[], Mapping[str, str]]
"""Node → address, as of now."""
Connect = Callable[[str], Client]
"""Of an address. ObserverError."""
Ask = Callable[[Client, Any], Iterator[Response]]
"""What is asked of each node, with the request."""


def nanoseconds(response: Response) -> int:
    """When it happened."""
    return int(response.time.seconds * 10**9 + response.time.nanos)


def kind(response: Response) -> str | None:
    """None: it says how far its node is, and nothing else."""
    if isinstance(response, observer_pb2.GetFlowsResponse):
        return str(response.WhichOneof("response_types") or "") or None
    return "agent_event"


def status(state: int, names: Iterable[str], message: str = "") -> observer_pb2.GetFlowsResponse:
    """What is said of nodes among flows."""
    made = observer_pb2.GetFlowsResponse()
    made.node_status.state_change = state  # type: ignore[assignment]
    made.node_status.node_names.extend(names)
    made.node_status.message = message
    made.time.GetCurrentTime()
    return made


class _Node:
    """One node's answers to one question, fetched by a thread of their own."""

    def __init__(
        self,
        name: str,
        address: str,
        request: Any,
        connect: Connect,
        ask: Ask,
        came: threading.Event,
    ) -> None:
        """`came` is set when there is an answer."""
        self.name = name
        self.address = address
        self.answers: queue.Queue[Response | None] = queue.Queue(QUEUE)
        self.gone = threading.Event()
        """Nobody wants its answers any more."""
        self.ended = False
        self._request = request
        self._connect = connect
        self._ask = ask
        self._came = came
        self._said: Response | None = None
        threading.Thread(target=self._run, name=f"relay-{name}", daemon=True).start()

    def _run(self) -> None:
        request = type(self._request)()
        request.CopyFrom(self._request)
        while not self.gone.is_set():
            last = self._fetch(request)
            if not request.follow:
                break
            if last is not None:
                # What came meanwhile, and nothing twice.
                request.number = 0
                request.since.FromNanoseconds(last + 1)
            self.gone.wait(RETRY_SECONDS)
        self._put(_END)

    def _fetch(self, request: Any) -> int | None:
        last = None
        try:
            with self._connect(self.address) as client:
                client.wait_ready(READY_SECONDS)
                if request.follow:
                    self._say(relay_pb2.NODE_CONNECTED)
                for response in self._ask(client, request):
                    if kind(response) in ("flow", "agent_event"):
                        last = nanoseconds(response)
                    if not self._put(response):
                        return last
        except ObserverError as error:
            self._say(relay_pb2.NODE_UNAVAILABLE, str(error))
        return last

    def _say(self, state: int, message: str = "") -> None:
        """Once, until it is something else."""
        said = status(state, [self.name], message)
        if self._said is None or self._said.node_status != said.node_status:
            self._said = said
            self._put(said)

    def _put(self, answer: Response | None) -> bool:
        """False: nobody wants it any more."""
        while not self.gone.is_set():
            try:
                self.answers.put(answer, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            self._came.set()
            return True
        return False

    def until_the_end(self) -> Iterator[Response]:
        while (answer := self.answers.get()) is not _END:
            yield answer

    def now(self) -> Iterator[Response]:
        """What is there, but for no more than a queue of it: others wait, too."""
        for _ in range(QUEUE):
            try:
                answer = self.answers.get_nowait()
            except queue.Empty:
                return
            if answer is _END:
                self.ended = True
                return
            yield answer


def merged(
    peers: Peers,
    request: observer_pb2.GetFlowsRequest | observer_pb2.GetAgentEventsRequest,
    active: Callable[[], bool],
    connect: Connect = Client,
    ask: Ask | None = None,
) -> Iterator[Response]:
    """Of every node, by time. Ends early once `active` says no. `ask`: default: for flows."""
    nodes: dict[str, _Node] = {}
    came = threading.Event()

    def flows(client: Client, asked: Any) -> Iterator[Response]:
        marks = max(MARK_SECONDS, len(nodes) / MARKS_A_SECOND) if request.follow else 0.0
        return client.flows(asked, marks)

    def begin(name: str, address: str) -> None:
        nodes[name] = _Node(name, address, request, connect, ask or flows, came)

    try:
        for name, address in sorted(peers().items()):
            begin(name, address)
        if request.follow:
            yield from _Following(nodes, peers, begin, came).run(active)
        else:
            yield from _gathered(list(nodes.values()), request)
    finally:
        for node in nodes.values():
            node.gone.set()


def _gathered(nodes: list[_Node], request: Any) -> Iterator[Response]:
    said: list[Response] = []

    def flows(node: _Node) -> Iterator[Response]:
        for response in node.until_the_end():
            if kind(response) == "node_status":
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


class _Following:
    """What comes from nodes that come and go, in the order of time as far as it can be had."""

    def __init__(
        self,
        nodes: dict[str, _Node],
        peers: Peers,
        begin: Callable[[str, str], None],
        came: threading.Event,
    ) -> None:
        self._came = came
        self._nodes = nodes
        self._peers = peers
        self._begin = begin
        self._order = Order()
        self._ahead: set[str] = set()

    def run(self, active: Callable[[], bool]) -> Iterator[Response]:
        while active() and not all(node.ended for node in self._nodes.values()):
            yield from self._renew()
            now, idle = time.monotonic(), True
            self._came.clear()
            for node in list(self._nodes.values()):
                for answer in node.now():
                    idle = idle and kind(answer) is None
                    yield from self._take(node.name, answer, now)
                if node.ended:
                    self._order.forget(node.name)
            yield from self._order.due(now)
            if idle and self._came.wait(POLL_SECONDS):
                # What the others say in this moment is taken with it.
                time.sleep(GATHER_SECONDS)
        yield from self._order.rest()

    def _take(self, name: str, answer: Response, now: float) -> Iterator[Response]:
        what = kind(answer)
        if what is None:
            self._order.mark(name, nanoseconds(answer))
        elif what == "node_status":
            if answer.node_status.state_change == relay_pb2.NODE_CONNECTED:
                self._order.mark(name, 0)
            else:
                self._order.forget(name)
            yield answer
        else:
            yield from self._skewed(name, answer)
            self._order.add(nanoseconds(answer), now, answer)

    def _renew(self) -> Iterator[Response]:
        wanted = self._peers()
        for name in [n for n, node in self._nodes.items() if wanted.get(n) != node.address]:
            self._nodes.pop(name).gone.set()
            self._order.forget(name)
            if name not in wanted:
                yield status(relay_pb2.NODE_GONE, [name])
        for name in sorted(wanted.keys() - self._nodes.keys()):
            self._begin(name, wanted[name])

    def _skewed(self, name: str, answer: Response) -> Iterator[Response]:
        """Told once of each node."""
        ahead = nanoseconds(answer) / 10**9 - time.time()
        if ahead > AHEAD_SECONDS and name not in self._ahead:
            self._ahead.add(name)
            text = f"its clock is {ahead:.1f} s ahead of the relay's: flows are not in order"
            yield status(relay_pb2.NODE_ERROR, [name], text)


class RelayService:
    """The Observer service over the observers of `peers`; see `methods`."""

    def __init__(self, peers: Peers, version: str, connect: Connect = Client) -> None:
        self._peers = peers
        self._version = version
        self._connect = connect
        self.streams = Streams()

    def get_flows(
        self, request: observer_pb2.GetFlowsRequest, context: grpc.ServicerContext
    ) -> Iterator[Response]:
        if request.first and request.follow:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "first and follow exclude each other")
        with self.streams.watched(context) as stream:

            def active() -> bool:
                stream.move()
                return context.is_active()

            for answer in merged(self._peers, request, active, self._connect):
                stream.move()
                yield answer

    def _ask(self, ask: Callable[[Client], Any]) -> dict[str, Any]:
        """Each node's answer, None of one that has none."""

        def one(address: str) -> Any:
            try:
                with self._connect(address) as client:
                    client.wait_ready(READY_SECONDS)
                    return ask(client)
            except ObserverError:
                return None

        peers = self._peers()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            names = sorted(peers)
            answers = pool.map(one, [peers[name] for name in names])
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
            # In which that was seen: a relay that began just now has seen nothing itself.
            uptime_ns=max((a.uptime_ns for a in there), default=0),
            unavailable_nodes=missing,
            version=self._version,
        )
        made.num_connected_nodes.value = len(there)
        made.num_unavailable_nodes.value = len(missing)
        return made

    def get_nodes(
        self, _request: observer_pb2.GetNodesRequest, _context: grpc.ServicerContext
    ) -> observer_pb2.GetNodesResponse:
        made, addresses = observer_pb2.GetNodesResponse(), self._peers()
        for name, answer in self._ask(Client.nodes).items():
            if answer is not None:
                made.nodes.extend(answer.nodes)
            else:
                made.nodes.add(
                    name=name, address=addresses.get(name, ""), state=relay_pb2.NODE_UNAVAILABLE
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
        self, request: observer_pb2.GetAgentEventsRequest, context: grpc.ServicerContext
    ) -> Iterator[observer_pb2.GetAgentEventsResponse]:
        """Of a node that does not answer nothing is said: this stream has no word for it."""
        with self.streams.watched(context) as stream:

            def active() -> bool:
                stream.move()
                return context.is_active()

            for answer in merged(self._peers, request, active, self._connect, Client.agent_events):
                stream.move()
                if kind(answer) == "agent_event":
                    yield answer

    def get_debug_events(
        self, request: observer_pb2.GetDebugEventsRequest, context: grpc.ServicerContext
    ) -> Iterator[observer_pb2.GetDebugEventsResponse]:
        """No node makes any."""
        while request.follow and context.is_active():
            time.sleep(POLL_SECONDS)
        yield from ()

    def notify(
        self, _request: peer_pb2.NotifyRequest, context: grpc.ServicerContext
    ) -> Iterator[peer_pb2.ChangeNotification]:
        for name, address in sorted(self._peers().items()):
            yield peer_pb2.ChangeNotification(name=name, address=address, type=peer_pb2.PEER_ADDED)
        while context.is_active():
            time.sleep(POLL_SECONDS)
