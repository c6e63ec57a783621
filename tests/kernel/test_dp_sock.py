"""Socket load balancing with real sockets, in a cgroup and a network namespace of its own."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support.lab import U32, Lab
from tidegate_bpf import AttachType, attach_cgroup, features, mounts, netns

pytestmark = pytest.mark.kernel
TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
VIP4, VIP6 = "10.96.0.1", "fd00:96::1"
BACKEND4, BACKEND6 = "127.0.0.2", "fd00:b::1"
SECONDS = 10
SO_COOKIE = 57
FAMILIES = [
    # reason, family, address asked for, backend
    ("IPv4", socket.AF_INET, VIP4, BACKEND4),
    ("IPv6", socket.AF_INET6, VIP6, BACKEND6),
    ("IPv4 on an IPv6 socket", socket.AF_INET6, "::ffff:" + VIP4, BACKEND4),
]


@pytest.fixture(scope="module")
def namespace() -> Iterator[None]:
    """This thread in a namespace with nothing but a loopback interface."""
    name = f"tgt-sock-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        for command in ("link set lo up", f"addr add {BACKEND6}/128 dev lo nodad"):
            subprocess.run(["ip", "-n", name, *command.split()], check=True)
        with netns.inside(f"/run/netns/{name}"):
            yield
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def join(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


@pytest.fixture(scope="module")
def cgroup() -> Iterator[Path]:
    """This process in a cgroup of its own, and back where it was afterwards."""
    found = features.cgroup2()
    root = mounts.cgroup2()
    if root is None:
        pytest.skip(found.detail)
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    home = next(line[3:] for line in lines if line.startswith("0::"))
    made = Path(root) / f"tgt-sock-{os.getpid()}"
    made.mkdir()
    try:
        join(made)
        yield made
    finally:
        join(Path(root) / home.lstrip("/"))
        made.rmdir()


@pytest.fixture
def lab(namespace: None, cgroup: Path) -> Iterator[Lab]:
    with attached(cgroup) as made:
        yield made


@contextmanager
def attached(cgroup: Path, **knobs: int) -> Iterator[Lab]:
    with Lab(program="sock", **knobs) as made, ExitStack() as stack:
        group = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, group)
        for name, program in made.loaded.programs.items():
            stack.enter_context(attach_cgroup(program, group, attach_type(name)))
        yield made


def attach_type(program: str) -> AttachType:
    verb, version = program[:-1].upper(), program[-1]
    kind = "UDP" if verb.endswith("MSG") else "INET"
    return AttachType[f"{kind}{version}_{verb}"]


def server(kind: int, address: str, port: int = 0) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, kind)
    made.settimeout(SECONDS)
    made.bind((address, port))
    if kind == socket.SOCK_STREAM:
        made.listen()
    return made


def client(family: int, kind: int) -> socket.socket:
    made = socket.socket(family, kind)
    made.settimeout(SECONDS)
    return made


def port(of: socket.socket) -> int:
    return int(of.getsockname()[1])


def serve(lab: Lab, *backends: socket.socket, asked: int = 80) -> None:
    """The frontend of the backends' family and kind, at port `asked`."""
    protocol = TCP if backends[0].type == socket.SOCK_STREAM else UDP
    vip = VIP4 if backends[0].family == socket.AF_INET else VIP6
    lab.service(vip, asked, protocol, [(s.getsockname()[0], port(s)) for s in backends])


@pytest.mark.parametrize(("why", "family", "vip", "backend"), FAMILIES)
def test_connect(lab: Lab, why: str, family: int, vip: str, backend: str) -> None:
    with closing(server(socket.SOCK_STREAM, backend)) as listener:
        serve(lab, listener)
        with closing(client(family, socket.SOCK_STREAM)) as made:
            made.connect((vip, 80))
            assert made.getpeername()[:2] == (vip, 80), why
            accepted, _ = listener.accept()
            with closing(accepted):
                made.sendall(b"question")
                assert accepted.recv(100) == b"question"
                accepted.sendall(b"answer")
                assert made.recv(100) == b"answer"


BUSY = 2**64 - 1
PLACES: list[tuple[str, dict[str, Callable[[Any], Any]], bool]] = [
    # reason, what becomes of the connected socket's place, whether its frontend is still known
    ("its own", {}, True),
    ("a later socket's", {"cookie": lambda cookie: cookie + 65536}, False),
    ("being written", {"cookie": lambda _: BUSY}, False),
    ("of another connection", {"backend_port": lambda number: number ^ 1}, False),
    ("of another connection", {"backend": lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])}, False),
]


@pytest.mark.parametrize(("kind", "family", "vip", "backend"), FAMILIES)
def test_a_connections_place(lab: Lab, kind: str, family: int, vip: str, backend: str) -> None:
    """The frontend is shown only by what the socket itself left, about the peer it has."""
    with (
        closing(server(socket.SOCK_STREAM, backend)) as listener,
        closing(client(family, socket.SOCK_STREAM)) as made,
    ):
        serve(lab, listener)
        made.connect((vip, 80))
        cookie = int.from_bytes(made.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)
        place = U32.pack(cookie % 65536)
        table, codec = lab.maps["streams_v1"], lab.codecs["tg_stream"]
        row = codec.unpack(table.lookup(place))
        assert (row.cookie, row.frontend_port, row.backend_port) == (cookie, 80, port(listener))
        direct = f"::ffff:{backend}" if vip.startswith("::ffff:") else backend
        for why, change, known in PLACES:
            fields = {name: to(getattr(row, name)) for name, to in change.items()}
            table.update(place, codec.pack_row(row._replace(**fields)))
            expected = (vip, 80) if known else (direct, port(listener))
            assert made.getpeername()[:2] == expected, (kind, why)


def test_a_place_that_is_being_written_is_left_alone(lab: Lab) -> None:
    """The connection is made, and shows the backend."""
    table, codec = lab.maps["streams_v1"], lab.codecs["tg_stream"]
    busy = codec.pack_row(codec.unpack(bytes(codec.size))._replace(cookie=BUSY))
    table.update_items([(U32.pack(place), busy) for place in range(65536)])
    with closing(server(socket.SOCK_STREAM, BACKEND4)) as listener:
        serve(lab, listener)
        with closing(client(socket.AF_INET, socket.SOCK_STREAM)) as made:
            made.connect((VIP4, 80))
            assert made.getpeername() == (BACKEND4, port(listener))
    assert all(value == busy for _, value in table.items())


def test_a_socket_that_connects_again(lab: Lab) -> None:
    with ExitStack() as stack:
        listeners = [
            stack.enter_context(closing(server(socket.SOCK_STREAM, BACKEND4))) for _ in range(2)
        ]
        made = stack.enter_context(closing(client(socket.AF_INET, socket.SOCK_STREAM)))
        for number, listener in enumerate(listeners):
            lab.service(VIP4, 80 + number, TCP, [(BACKEND4, port(listener))], base=number)
            made.connect((VIP4, 80 + number))
            assert made.getpeername() == (VIP4, 80 + number)
            disconnect(made)
        made.connect((BACKEND4, port(listeners[0])))
        assert made.getpeername() == (BACKEND4, port(listeners[0]))


def disconnect(of: socket.socket) -> None:
    """connect() to AF_UNSPEC; Python has no name for it."""
    nowhere = ctypes.create_string_buffer(16)
    assert ctypes.CDLL(None, use_errno=True).connect(of.fileno(), nowhere, 16) == 0


@pytest.mark.parametrize(("why", "family", "vip", "backend"), FAMILIES)
def test_datagrams(lab: Lab, why: str, family: int, vip: str, backend: str) -> None:
    """Of a socket that names its peer each time: the answer comes from who was asked."""
    with closing(server(socket.SOCK_DGRAM, backend)) as echo:
        serve(lab, echo)
        with closing(client(family, socket.SOCK_DGRAM)) as made:
            for _ in range(3):
                made.sendto(b"question", (vip, 80))
                data, sender = echo.recvfrom(100)
                assert data == b"question", why
                echo.sendto(b"answer", sender)
                data, peer = made.recvfrom(100)
                assert (data, peer[:2]) == (b"answer", (vip, 80)), why


@pytest.mark.parametrize(("why", "family", "vip", "backend"), FAMILIES)
def test_datagrams_keep_their_backend_while_it_lives(
    lab: Lab, why: str, family: int, vip: str, backend: str
) -> None:
    with ExitStack() as stack:
        echoes = [stack.enter_context(closing(server(socket.SOCK_DGRAM, backend))) for _ in "abcd"]
        made = stack.enter_context(closing(client(family, socket.SOCK_DGRAM)))
        ports = [(backend, port(echo)) for echo in echoes]
        left = list(range(4))

        def serve_left(base: int) -> dict[int, int]:
            """Index of an echo -> id of its backend."""
            vip_bytes = VIP4 if "." in vip else VIP6
            lab.service(vip_bytes, 80, UDP, [ports[at] for at in left], base=base)
            return {at: base + place for place, at in enumerate(left)}

        ids = serve_left(1)
        while left:
            for _ in range(12):
                made.sendto(b"x", (vip, 80))
            (found,) = (at for at, echo in enumerate(echoes) if drained(echo))
            assert found in left, why
            lab.maps["backends_v1"].update(U32.pack(ids[found]), bytes(24))
            left.remove(found)
            ids = serve_left(max(ids.values()) + 1)


def drained(echo: socket.socket) -> int:
    """Datagrams that were there."""
    echo.setblocking(False)
    count = 0
    with suppress(BlockingIOError):
        while echo.recv(100):
            count += 1
    return count


@pytest.mark.parametrize(("why", "family", "vip", "backend"), FAMILIES)
def test_connected_datagrams(lab: Lab, why: str, family: int, vip: str, backend: str) -> None:
    with closing(server(socket.SOCK_DGRAM, backend)) as echo:
        serve(lab, echo)
        with closing(client(family, socket.SOCK_DGRAM)) as made:
            made.connect((vip, 80))
            assert made.getpeername()[:2] == (vip, 80), why
            made.send(b"question")
            data, sender = echo.recvfrom(100)
            assert data == b"question", why
            echo.sendto(b"answer", sender)
            data, peer = made.recvfrom(100)
            assert (data, peer[:2]) == (b"answer", (vip, 80)), why


@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize(("why", "family", "vip", "backend"), FAMILIES)
def test_empty_service_refuses(
    lab: Lab, protocol: int, why: str, family: int, vip: str, backend: str
) -> None:
    lab.service(VIP4 if "." in vip else VIP6, 80, protocol, [])
    kind = socket.SOCK_STREAM if protocol == TCP else socket.SOCK_DGRAM
    with closing(client(family, kind)) as made:
        with pytest.raises(ConnectionRefusedError):
            made.connect((vip, 80))
        if protocol == UDP:
            with pytest.raises(ConnectionRefusedError):
                made.sendto(b"x", (vip, 80))


def test_a_backend_that_went_refuses(lab: Lab) -> None:
    with closing(server(socket.SOCK_STREAM, BACKEND4)) as listener:
        serve(lab, listener)
        lab.maps["backends_v1"].update(bytes(4), bytes(24))
        made = client(socket.AF_INET, socket.SOCK_STREAM)
        with closing(made), pytest.raises(ConnectionRefusedError):
            made.connect((VIP4, 80))


def test_what_is_no_frontend_is_untouched(lab: Lab) -> None:
    """Another port or protocol of the frontend's address, and the backend itself."""
    with ExitStack() as stack:
        listener = stack.enter_context(closing(server(socket.SOCK_STREAM, BACKEND4)))
        vip = "127.0.0.9"
        lab.service(vip, 80, TCP, [(BACKEND4, port(listener))])
        direct = stack.enter_context(closing(server(socket.SOCK_STREAM, vip, 81)))
        for address in ((vip, 81), (BACKEND4, port(listener))):
            made = stack.enter_context(closing(client(socket.AF_INET, socket.SOCK_STREAM)))
            made.connect(address)
            assert made.getpeername() == address
        stack.enter_context(closing(direct.accept()[0]))
        stack.enter_context(closing(listener.accept()[0]))
        datagrams = stack.enter_context(closing(server(socket.SOCK_DGRAM, vip, 80)))
        made = stack.enter_context(closing(client(socket.AF_INET, socket.SOCK_DGRAM)))
        made.sendto(b"x", (vip, 80))
        assert datagrams.recv(10) == b"x"


def test_another_socket_sees_the_backend(lab: Lab) -> None:
    """What a socket asked for is its own memory."""
    with ExitStack() as stack:
        echo = stack.enter_context(closing(server(socket.SOCK_DGRAM, BACKEND4)))
        serve(lab, echo)
        first, second = (
            stack.enter_context(closing(client(socket.AF_INET, socket.SOCK_DGRAM)))
            for _ in range(2)
        )
        for made, address in ((first, (VIP4, 80)), (second, echo.getsockname())):
            made.sendto(b"x", address)
            echo.sendto(b"y", echo.recvfrom(10)[1])
            assert made.recvfrom(10)[1] == address


def test_only_sockets_of_the_cgroup(lab: Lab, cgroup: Path) -> None:
    with closing(server(socket.SOCK_STREAM, BACKEND4)) as listener:
        serve(lab, listener)
        join(cgroup.parent)
        try:
            with closing(client(socket.AF_INET, socket.SOCK_STREAM)) as made:
                with pytest.raises(OSError, match="unreachable") as caught:
                    made.connect((VIP4, 80))
                assert caught.value.errno == errno.ENETUNREACH
        finally:
            join(cgroup)


def test_spread(lab: Lab) -> None:
    with ExitStack() as stack:
        listeners = [
            stack.enter_context(closing(server(socket.SOCK_STREAM, f"127.0.0.{n}")))
            for n in range(2, 6)
        ]
        for listener in listeners:
            listener.settimeout(0)
        serve(lab, *listeners)
        found: Counter[int] = Counter()
        for _ in range(200):
            with closing(client(socket.AF_INET, socket.SOCK_STREAM)) as made:
                made.connect((VIP4, 80))
                for number, listener in enumerate(listeners):
                    try:
                        listener.accept()[0].close()
                    except BlockingIOError:
                        continue
                    found[number] += 1
        assert sum(found.values()) == 200
        assert min(found[n] for n in range(4)) > 20, found


def test_what_is_asked_is_counted_once_a_socket(lab: Lab) -> None:
    """A connection, a connected socket for datagrams, one that sends several without."""
    with (
        closing(server(socket.SOCK_STREAM, BACKEND4)) as listener,
        closing(server(socket.SOCK_DGRAM, BACKEND4)) as receiver,
        closing(client(socket.AF_INET, socket.SOCK_STREAM)) as stream,
        closing(client(socket.AF_INET, socket.SOCK_DGRAM)) as connected,
        closing(client(socket.AF_INET, socket.SOCK_DGRAM)) as free,
    ):
        serve(lab, listener)
        lab.service(VIP4, 80, UDP, [(BACKEND4, port(receiver))], base=9)
        stream.connect((VIP4, 80))
        assert lab.asked(VIP4, 80, TCP) == (1, 0)
        connected.connect((VIP4, 80))
        connected.send(b"x")
        for _ in range(3):
            free.sendto(b"x", (VIP4, 80))
        assert lab.asked(VIP4, 80, UDP) == (2, 0)
        lab.service(VIP4, 80, UDP, [], base=9)
        with pytest.raises(ConnectionRefusedError):
            connected.connect((VIP4, 80))
        assert lab.asked(VIP4, 80, UDP) == (2, 1)


def noted(lab: Lab, of: socket.socket) -> tuple[int, bytes] | None:
    """(process, name) at the socket's place, if it is its own."""
    cookie = struct.unpack("=Q", of.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))[0]
    places = lab.maps["processes_v1"]
    key = U32.pack(cookie % places.info.max_entries)
    place = lab.codecs["tg_process"].unpack(places.lookup(key))
    if place.word >> 32 != cookie & 0xFFFFFFFF:
        return None
    return place.word & 0xFFFFFFFF, place.name.rstrip(b"\0")


def me() -> tuple[int, bytes]:
    """As the kernel knows this process and thread."""
    return os.getpid(), Path("/proc/thread-self/comm").read_bytes().rstrip(b"\n")


@pytest.mark.parametrize("asked", [BACKEND4, VIP4, BACKEND6, "::ffff:" + BACKEND4])
def test_who_connects_is_noted(lab: Lab, asked: str) -> None:
    family = socket.AF_INET6 if ":" in asked else socket.AF_INET
    backend = BACKEND6 if asked == BACKEND6 else BACKEND4
    with (
        closing(server(socket.SOCK_STREAM, backend)) as listener,
        closing(client(family, socket.SOCK_STREAM)) as made,
    ):
        serve(lab, listener)
        assert noted(lab, made) is None
        made.connect((asked, 80 if asked == VIP4 else port(listener)))
        assert noted(lab, made) == me()


def test_who_sends_a_datagram_is_noted(lab: Lab) -> None:
    with (
        closing(server(socket.SOCK_DGRAM, BACKEND4)) as listener,
        closing(client(socket.AF_INET, socket.SOCK_DGRAM)) as made,
        closing(client(socket.AF_INET, socket.SOCK_DGRAM)) as silent,
    ):
        made.sendto(b"x", (BACKEND4, port(listener)))
        assert noted(lab, made) == me()
        assert noted(lab, silent) is None


def test_a_socket_that_another_process_sends_through_is_its(lab: Lab) -> None:
    with (
        closing(server(socket.SOCK_DGRAM, BACKEND4)) as listener,
        closing(client(socket.AF_INET, socket.SOCK_DGRAM)) as made,
    ):
        made.sendto(b"x", (BACKEND4, port(listener)))
        code = "import socket, sys; s = socket.socket(fileno=int(sys.argv[1]))\n"
        code += "s.sendto(b'x', (sys.argv[2], int(sys.argv[3])))"
        words = [str(made.fileno()), BACKEND4, str(port(listener))]
        child = subprocess.Popen([sys.executable, "-c", code, *words], pass_fds=[made.fileno()])
        assert child.wait(SECONDS) == 0
        found = noted(lab, made)
        assert found is not None
        assert found[0] == child.pid


def test_where_flows_are_not_told_of_nobody_is_noted(namespace: None, cgroup: Path) -> None:
    with (
        attached(cgroup, flow_events=0) as lab,
        closing(server(socket.SOCK_STREAM, BACKEND4)) as listener,
        closing(client(socket.AF_INET, socket.SOCK_STREAM)) as made,
    ):
        made.connect((BACKEND4, port(listener)))
        assert noted(lab, made) is None
