"""rr-local, connect-clusterip: real packets between two pods' namespaces on one node.

The programs are the real ones over maps filled by hand; they are attached and detached between
rounds, so that both variants use the very same interfaces, sockets' ends and CPU.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from lab import BUILD, Lab, Pod, Rules
from measure import Result, Unmeasurable, interleaved, paired, pinned
from tidegate_bpf import AttachType, LoadedObject, ObjectFile, attach_cgroup, attach_tcx, mounts
from tidegate_bpf.netns import inside

RR = Path(__file__).parent / "build" / "rr"
NODE = "tg-bench-node"
CLIENT = Pod(1, 256, 2, "10.244.0.2")
SERVER = Pod(2, 257, 3, "10.244.0.3")
GATEWAY = "169.254.1.1"
FRONTEND = "10.96.0.10"
PORT = 8080
TCP = 6
ROUNDS = 31
PLACES, RUNS_EACH = 6, 11
WAIT_SECONDS = 5.0


def namespace(pod: Pod) -> str:
    return f"tg-bench-pod{pod.id}"


def mac(raw: bytes) -> str:
    return raw.hex(":")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def wire(pod: Pod) -> None:
    """A routed veth pair as the common CNIs make it; no ARP, so that nothing happens by chance."""
    space, host = namespace(pod), f"pod{pod.id}"
    ip("netns", "add", space)
    ip(
        "-n",
        NODE,
        "link",
        "add",
        host,
        "index",
        str(pod.ifindex),
        "address",
        mac(pod.host_mac),
        "type",
        "veth",
        "peer",
        "name",
        "eth0",
        "address",
        mac(pod.mac),
        "netns",
        space,
    )
    ip("-n", NODE, "link", "set", host, "up")
    ip("-n", NODE, "route", "add", f"{pod.ip4}/32", "dev", host)
    ip("-n", NODE, "neigh", "add", pod.ip4, "dev", host, "lladdr", mac(pod.mac))
    ip("-n", space, "link", "set", "eth0", "up")
    ip("-n", space, "addr", "add", f"{pod.ip4}/32", "dev", "eth0")
    ip("-n", space, "route", "add", GATEWAY, "dev", "eth0")
    ip("-n", space, "route", "add", "default", "via", GATEWAY)
    ip("-n", space, "neigh", "add", GATEWAY, "dev", "eth0", "lladdr", mac(pod.host_mac))


@contextmanager
def node() -> Iterator[None]:
    with ExitStack() as stack:
        ip("netns", "add", NODE)
        stack.callback(ip, "netns", "del", NODE)
        ip("netns", "exec", NODE, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        for pod in (CLIENT, SERVER):
            wire(pod)
            stack.callback(ip, "netns", "del", namespace(pod))
        yield


@contextmanager
def cgroup() -> Iterator[Path]:
    mounted = mounts.cgroup2()
    if mounted is None:
        raise Unmeasurable("no cgroup2 hierarchy is mounted")
    directory = Path(mounted) / "tg-bench"
    directory.mkdir()
    try:
        yield directory
    finally:
        directory.rmdir()


@contextmanager
def server() -> Iterator[None]:
    command = ["ip", "netns", "exec", namespace(SERVER), str(RR), "serve", SERVER.ip4, str(PORT)]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while not listening():
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError("the server does not listen")
            time.sleep(0.01)
        yield
    finally:
        process.kill()
        process.wait()


def listening() -> bool:
    with inside(f"/run/netns/{namespace(SERVER)}"):
        table = Path("/proc/thread-self/net/tcp").read_text()
    return f":{PORT:04X} 00000000:0000 0A" in table


def client(mode: str, address: str, port: int, count: int, group: Path | None = None) -> float:
    """Microseconds, the median of `count`."""

    def join() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    command = ["ip", "netns", "exec", namespace(CLIENT), str(RR), mode, address, str(port)]
    done = subprocess.run(
        [*command, str(count)], check=True, capture_output=True, text=True, preexec_fn=join
    )
    return int(done.stdout) / 1000


class Gates:
    """The datapath at both pods' interfaces; `attached` for the block, gone after it."""

    def __init__(self, lab: Lab) -> None:
        self.programs = lab.loaded.programs
        rules = {(257, TCP, PORT, 24): (1, 0, 1)}, {(256, TCP, PORT, 24): (1, 0, 1)}
        egress, ingress = (Rules(entries) for entries in rules)
        lab.world(
            [
                Pod(1, 256, CLIENT.ifindex, CLIENT.ip4, egress=egress),
                Pod(2, 257, SERVER.ifindex, SERVER.ip4, ingress=ingress),
            ]
        )

    @contextmanager
    def attached(self) -> Iterator[None]:
        with ExitStack() as stack, inside(f"/run/netns/{NODE}"):
            for pod in (CLIENT, SERVER):
                for name, ingress in (("from_pod", True), ("to_pod", False)):
                    link = attach_tcx(self.programs[name], pod.ifindex, ingress=ingress)
                    stack.enter_context(link)
            yield


def outcome(
    id: str, what: str, against: str, bar: float, figures: dict[str, list[float]]
) -> Result:
    """Each round's ratio is of two runs, one after the other: what is slow is so for both."""
    base = statistics.median(figures["base"])
    extra = {"us": {name: [round(v, 2) for v in values] for name, values in figures.items()}}
    ratio = paired(figures, "ours", "base")
    return Result(id, what, ratio, "ratio", f"{against}, {base:.1f} us", bar, extra)


def rr_local() -> Iterator[Result]:
    """In turn by programs that were loaded several times: where the kernel happens to put code
    and maps moves the ratio of each by up to 0.03, for as long as it is loaded."""
    count = 10_000
    with ExitStack() as stack:
        stack.enter_context(pinned())
        stack.enter_context(node())
        labs = [stack.enter_context(Lab()) for _ in range(PLACES)]
        stack.enter_context(server())
        turns = itertools.cycle([Gates(lab) for lab in labs])

        def bare() -> float:
            return client("rr", SERVER.ip4, PORT, count)

        def ours() -> float:
            with next(turns).attached():
                return bare()

        figures = interleaved({"base": bare, "ours": ours}, PLACES * RUNS_EACH)
        for lab in labs:
            expect_flows(lab)
        what = "TCP request/response of two pods on one node, policy at both ends, p50"
        result = outcome("rr-local", what, "the same veths without programs", 0.94, figures)
        places = [
            round(paired({k: v[at::PLACES] for k, v in figures.items()}, "ours", "base"), 4)
            for at in range(PLACES)
        ]
        yield replace(result, extra={**result.extra, "places": places})


def expect_flows(lab: Lab) -> None:
    if not lab.flows():
        raise AssertionError("no packet has met the programs")


def socket_programs(lab: Lab) -> LoadedObject:
    sock = ObjectFile(BUILD / "sock.o")
    shared = {name: lab.maps[name] for name in sock.maps if name in lab.maps and "." not in name}
    return sock.load(pins=shared)


def connect_clusterip() -> Iterator[Result]:
    count = 3000
    with ExitStack() as stack:
        stack.enter_context(pinned())
        stack.enter_context(node())
        group = stack.enter_context(cgroup())
        lab = stack.enter_context(Lab())
        sock = stack.enter_context(socket_programs(lab))
        gates = Gates(lab)
        lab.service(FRONTEND, 80, TCP, [(SERVER.ip4, PORT)])
        stack.enter_context(server())
        stack.enter_context(gates.attached())
        directory = os.open(group, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, directory)

        def direct() -> float:
            return client("connect", SERVER.ip4, PORT, count, group)

        def ours() -> float:
            hook = AttachType.INET4_CONNECT
            with attach_cgroup(sock.programs["connect4"], directory, hook):
                return client("connect", FRONTEND, 80, count, group)

        figures = interleaved({"base": direct, "ours": ours}, ROUNDS)
        what = "TCP connect to a ClusterIP through socket load balancing, p50"
        against = "connecting to the backend itself, no socket program attached"
        yield outcome("connect-clusterip", what, against, 1.05, figures)


ROWS: dict[str, Callable[[], Iterator[Result]]] = {
    "rr-local": rr_local,
    "connect-clusterip": connect_clusterip,
}
