"""Questions asked with real packets, all at once, by sockets of this process in others' network
namespaces: a whole truth table takes as long as its slowest answer.

These sockets are in no pod's cgroup, so what they send to a Service is translated per packet.
The kernel has no SCTP sockets: an INIT is sent and answered by raw sockets (RFC 9260, 3.3.2).
"""

from __future__ import annotations

import contextlib
import itertools
import selectors
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from support import frames
from tidegate_bpf import netns

GRACE_SECONDS = 0.5
"""After the last answer that must come, for answers that must not."""
PATIENCE_SECONDS = 20.0
AGAIN_SECONDS = 0.4
"""Then what has no answer is sent again; TCP does so by itself."""
DATAGRAMS = 32
"""To a Service: that none of two endpoints gets one happens once in four billion times."""
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
INIT_ACK = struct.pack("!BBHIIHHI", 2, 0, 20, 1, 0x10000, 1, 1, 1)
"""What a kernel that masquerades takes for the answer to an INIT whose tag is 1."""
_ports = itertools.cycle(range(20000, 32000))


@dataclass(frozen=True)
class Question:
    """May `who` (a place) talk to the port? `source`: the address to ask from."""

    who: str
    address: str
    port: int
    protocol: str
    source: str = ""

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.address else socket.AF_INET


class Places:
    """Name → path of a network namespace."""

    def __init__(self, paths: Mapping[str, str]) -> None:
        self.paths = dict(paths)

    def socket(
        self, who: str, family: int, kind: int, protocol: int = 0, source: str = "", port: int = 0
    ) -> socket.socket:
        """Not blocking."""
        with netns.inside(self.paths[who]):
            made = socket.socket(family, kind, protocol)
        made.setblocking(False)
        if source:
            if family == socket.AF_INET6 and kind != socket.SOCK_RAW:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind((source, port))
        return made

    def ask(
        self,
        questions: Sequence[Question],
        expected: Sequence[bool],
        seconds: float,
        grace: float = GRACE_SECONDS,
    ) -> list[str]:
        """Per question "answered", "refused" (it came through, and nobody serves it) or "". Waits
        for all that are expected, at most `seconds`, and `grace` for the others."""
        with contextlib.ExitStack() as stack:
            asked = [_Asked(self, q) for q in questions]
            for one in asked:
                stack.callback(one.sock.close)
            wanted = [one for one, wants in zip(asked, expected, strict=True) if wants]
            _wait(asked, wanted, seconds, grace)
        return [one.found for one in asked]

    def heard(
        self, questions: Sequence[Question], wanted: set[str], seconds: float
    ) -> list[set[str]]:
        """Which pods of namespace default answer datagrams to a Service, as many as make sure that
        each endpoint gets one. Waits for those wanted of each question, and a moment more."""
        found: list[set[str]] = [set() for _ in questions]
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            for names, question in zip(found, questions, strict=True):
                for _ in range(DATAGRAMS):
                    sock = self.socket(question.who, question.family, socket.SOCK_DGRAM)
                    stack.callback(sock.close)
                    sock.connect((question.address, question.port))
                    sock.send(b"x")
                    selector.register(sock, selectors.EVENT_READ, (sock, names))
            deadline, complete = time.monotonic() + seconds, False
            while time.monotonic() < deadline:
                for key, _ in selector.select(0.05):
                    sock, names = key.data
                    with contextlib.suppress(OSError):
                        names.add(sock.recv(4096).split()[0].decode().removeprefix("default/"))
                if not complete and all(names >= wanted for names in found):
                    deadline, complete = time.monotonic() + GRACE_SECONDS, True
        return found


@dataclass
class _Asked:
    places: Places
    question: Question
    sock: socket.socket = field(init=False)
    sport: int = 0
    found: str = ""

    def __post_init__(self) -> None:
        q = self.question
        kind, protocol = {
            "TCP": (socket.SOCK_STREAM, 0),
            "UDP": (socket.SOCK_DGRAM, 0),
            "SCTP": (socket.SOCK_RAW, frames.SCTP),
        }[q.protocol]
        self.sock = self.places.socket(q.who, q.family, kind, protocol, q.source)
        self.sport = next(_ports)
        with contextlib.suppress(OSError):
            self.sock.connect((q.address, 0 if q.protocol == "SCTP" else q.port))
        self.send()

    def send(self) -> None:
        q = self.question
        with contextlib.suppress(OSError):
            if q.protocol == "UDP":
                self.sock.send(b"x")
            elif q.protocol == "SCTP":
                self.sock.send(frames.sctp(self.sport, q.port))

    def event(self) -> None:
        """The socket is ready."""
        protocol = self.question.protocol
        try:
            if protocol == "TCP":
                code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    raise OSError(code, "connect")
                self.found = "answered"
                return
            data = self.sock.recv(4096)
            if protocol == "UDP" or _sctp_ports(self.sock, data) == (
                self.question.port,
                self.sport,
            ):
                self.found = "answered"
        except ConnectionRefusedError:
            self.found = "refused"
        except BlockingIOError:
            return
        except OSError as error:
            self.found = error.strerror or "failed"


def _wait(asked: list[_Asked], wanted: list[_Asked], seconds: float, grace: float) -> None:
    with selectors.DefaultSelector() as selector:
        for one in asked:
            tcp = one.question.protocol == "TCP"
            selector.register(one.sock, selectors.EVENT_WRITE if tcp else selectors.EVENT_READ, one)
        begun = sent = time.monotonic()
        rest: float | None = None
        while True:
            for key, _ in selector.select(0.05):
                key.data.event()
                if key.data.found:
                    selector.unregister(key.fileobj)
            now = time.monotonic()
            if rest is None and all(one.found for one in wanted):
                rest = now + grace
            if now - begun > seconds or (rest is not None and now > rest):
                return
            if now - sent > AGAIN_SECONDS:
                sent = now
                for one in asked:
                    if not one.found:
                        one.send()


def _sctp_ports(sock: socket.socket, data: bytes) -> tuple[int, int]:
    """Of a raw socket's packet, which has its header in IPv4 only."""
    at = (data[0] & 15) * 4 if sock.family == socket.AF_INET else 0
    found: tuple[int, int] = struct.unpack_from("!HH", data, at)
    return found


class Echoes:
    """Answers in `places`: TCP by accepting, UDP by echo, SCTP by an INIT ACK."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._selector = selectors.DefaultSelector()
        self._ports: dict[int, tuple[int, ...]] = {}
        self._end, end = socket.socketpair()
        self._selector.register(end, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run)

    def serve(
        self, who: str, protocol: str, *ports: int, at: tuple[str, str] = ("0.0.0.0", "::")
    ) -> None:
        """`at`: where several addresses are, one of each family, which answers come from."""
        for family, address in zip((socket.AF_INET, socket.AF_INET6), at, strict=True):
            if protocol == "SCTP":
                made = self._places.socket(who, family, socket.SOCK_RAW, frames.SCTP, address)
                self._ports[made.fileno()] = ports
                self._selector.register(made, selectors.EVENT_READ)
                continue
            for port in ports:
                kind = socket.SOCK_STREAM if protocol == "TCP" else socket.SOCK_DGRAM
                made = self._places.socket(who, family, kind, 0, address, port)
                if protocol == "TCP":
                    made.listen(128)
                self._selector.register(made, selectors.EVENT_READ)

    def __enter__(self) -> Echoes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock.family == socket.AF_UNIX:
                    return
                with contextlib.suppress(OSError):
                    self._answer(sock)

    def _answer(self, sock: socket.socket) -> None:
        if sock.type == socket.SOCK_STREAM:
            sock.accept()[0].close()
            return
        data, client = sock.recvfrom(4096)
        if sock.type == socket.SOCK_DGRAM:
            sock.sendto(data, client)
            return
        sport, dport = _sctp_ports(sock, data)
        if dport in self._ports[sock.fileno()]:
            sock.sendto(frames.sctp(dport, sport, 1, INIT_ACK), client)


# ---- flows that stay ----------------------------------------------------------------------


@dataclass
class Flow:
    """One connection, or one socket of datagrams, that asks and asks. `missing`: datagrams without
    an answer after LOST_SECONDS. A pod that has no CPU for longer answers late, and in their
    order: lost is what has none once a later one has (`newest`). `late`: how many came so."""

    name: str
    sock: socket.socket
    answered: int = 0
    newest: int = 0
    missing: set[int] = field(default_factory=set)
    late: int = 0
    sent_at: float = 0.0
    number: int = 0
    waits: bool = False

    @property
    def stream(self) -> bool:
        return self.sock.type == socket.SOCK_STREAM

    @property
    def lost(self) -> int:
        return sum(number < self.newest for number in self.missing)

    def turn(self, now: float) -> None:
        with contextlib.suppress(OSError):
            while data := self.sock.recv(4096):
                self._answer(data)
        if self.waits and not self.stream and now - self.sent_at > LOST_SECONDS:
            self.missing.add(self.number)
            self.waits = False
        if not self.waits:
            self.number += 1
            self.sent_at, self.waits = now, True
            with contextlib.suppress(OSError):
                self.sock.send(REQUEST if self.stream else b"%d" % self.number)

    def _answer(self, data: bytes) -> None:
        self.answered += 1
        number = self.number if self.stream else int(data.split()[-1])
        self.newest = max(self.newest, number)
        self.late += number in self.missing
        self.missing.discard(number)
        if number == self.number:
            self.waits = False


LOST_SECONDS = 3.0
PERIOD_SECONDS = 0.01


class Flows:
    """Flows of one thread: each is asked as often as the others."""

    def __init__(self) -> None:
        self.flows: dict[str, Flow] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def open(self, places: Places, name: str, question: Question) -> None:
        """Raises OSError where it does not come about."""
        kind = socket.SOCK_STREAM if question.protocol == "TCP" else socket.SOCK_DGRAM
        sock = places.socket(question.who, question.family, kind, 0, question.source)
        sock.settimeout(PATIENCE_SECONDS)
        sock.connect((question.address, question.port))
        sock.setblocking(False)
        self.flows[name] = Flow(name, sock)

    def __enter__(self) -> Flows:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        for flow in self.flows.values():
            flow.sock.close()

    def _run(self) -> None:
        while not self._end.wait(PERIOD_SECONDS):
            now = time.monotonic()
            for flow in list(self.flows.values()):
                flow.turn(now)

    def counts(self) -> dict[str, int]:
        return {name: flow.answered for name, flow in self.flows.items()}

    def silent(self, turns: int = 20) -> set[str]:
        """Who had no answer while another flow had so many. There must be one that lives."""
        before = self.counts()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            more = {name: count - before[name] for name, count in self.counts().items()}
            if max(more.values()) >= turns:
                return {name for name, count in more.items() if not count}
            assert time.monotonic() < deadline, "no flow is answered"
            time.sleep(0.01)

    def lost(self) -> dict[str, int]:
        return {name: flow.lost for name, flow in self.flows.items() if flow.lost}

    def late(self) -> int:
        return sum(flow.late for flow in self.flows.values())
