"""flow-*: what seeing every flow costs, and how quickly it is answered.

Rows of the observer alone run its own code on records made here; flow-overhead and flow-follow send
real packets between pods of `tidegate up`.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from measure import Result, Unmeasurable, interleaved, pinned
from tidegate_bpf import Codec, ObjectFile, RingBuffer
from tidegate_observer.directory import Directory, pod_labels
from tidegate_observer.flow import End, address_bytes
from tidegate_observer.history import History
from tidegate_observer.informer import pod
from tidegate_observer.people import Pod
from tidegate_observer.records import Flows

if TYPE_CHECKING:
    from support.ca_town import Town

ROOT = Path(__file__).resolve().parents[1]
EVENTS = 200_000
PODS = 1000
STORED = 100_000
ROUNDS = 5
FOLLOWED = 200


def records(count: int) -> tuple[Flows, bytes, Directory]:
    """Starts of flows between PODS pods, each with a policy, as the programs write them."""
    spec = ObjectFile(ROOT / "datapath/build/pod.o")
    codec = Codec(spec.layout("tg_flow_event"))
    directory = Directory()
    ends = []
    for number in range(PODS):
        address = address_bytes(f"10.244.{number >> 8}.{number & 255}")
        labels = pod_labels(f"ns-{number % 20}", {"app": f"app-{number % 50}", "tier": "web"})
        directory.addresses[address] = End(
            300 + number, 0, f"ns-{number % 20}", f"pod-{number}", labels, "app", "Deployment"
        )
        ends.append(address)
    rows = []
    for at in range(count):
        source, destination = at % PODS, (at * 7 + 1) % PODS
        values = dict.fromkeys(codec.names, 0) | {
            "time": at * 1000,
            "src": ends[source],
            "dst": ends[destination],
            "frontend": bytes(16),
            "sport": 1024 + at % 60000,
            "dport": 8080,
            "protocol": 6,
            "tcp_flags": 2,
            "src_identity": 300 + source,
            "dst_identity": 300 + destination,
            "src_rule": (1 << 32) - 1,
            "dst_rule": (1 << 32) - 1,
        }
        rows.append(tuple(values[name] for name in codec.names))
    size = codec.size
    packed = codec.pack_all(rows)
    data = b"".join(bytes(8) + packed[i : i + size] for i in range(0, len(packed), size))
    return Flows(spec, "node-1"), data, directory


def decode() -> Iterator[Result]:
    made, data, directory = records(EVENTS)
    chunk = (made.size + 8) * 2000
    rates = []
    with pinned():
        for _ in range(ROUNDS):
            history = History(65536)
            start = time.process_time()
            for at in range(0, len(data), chunk):
                history.extend(made.flows(data[at : at + chunk], 0, directory))
            rates.append(EVENTS / (time.process_time() - start))
    # Bars are upper ones: time for an event, against 300,000 a second.
    rate = max(rates)
    yield Result(
        "flow-decode",
        "an event decoded, joined and stored, one core",
        1e6 / rate,
        "us",
        "300,000 events/s",
        1e6 / 300_000,
        {"events_per_second": round(rate)},
    )


@contextmanager
def served(history: History) -> Iterator[str]:
    from tidegate_observer.server import About, ObserverService, Server  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as directory:
        address = f"unix:{directory}/s"
        with Server(ObserverService(history, About(("node-1",), "bench")), [address]):
            yield address
            history.close()


def query() -> Iterator[Result]:
    from tidegate_observer.api import flow_pb2, observer_pb2  # noqa: PLC0415
    from tidegate_observer.client import Client  # noqa: PLC0415

    made, data, directory = records(STORED)
    history = History(STORED)
    history.extend(made.flows(data, 0, directory))
    del data
    gc.collect()
    wanted = observer_pb2.GetFlowsRequest(
        whitelist=[
            flow_pb2.FlowFilter(
                source_label=["app=app-7"],
                destination_pod=["ns-10/pod-10"],
                destination_port=["8080"],
            )
        ]
    )
    took, found = [], 0
    with served(history) as address, Client(address) as client:
        for _ in range(ROUNDS * 2):
            start = time.perf_counter()
            found = sum(1 for _ in client.flows(wanted))
            took.append((time.perf_counter() - start) * 1000)
    yield Result(
        "flow-query",
        f"GetFlows over {STORED:,} flows with three filters",
        statistics.median(took),
        "ms",
        "the request's start",
        150.0,
        {"found": found, "worst": round(max(took), 1)},
    )


class Everybody:
    """As the API server tells of them: an implementation of `people.People`."""

    def __init__(self, pods: dict[tuple[str, str], Pod]) -> None:
        self.pods = pods
        self.identities: dict[int, End] = {}
        self._told = False

    def fresh(self) -> bool:
        told, self._told = self._told, True
        return not told


def everybody(count: int) -> Everybody:
    """Pods of Deployments of ten each."""
    pods = {}
    for number in range(count):
        app, space, suffix = f"app-{number // 10}", f"ns-{number // 10 % 50}", f"{number:x}abc"
        owner = {"kind": "ReplicaSet", "name": f"{app}-6f9c", "controller": True}
        labels = {f"app.kubernetes.io/{word}": app for word in ("name", "instance")}
        labels |= {"pod-template-hash": "6f9c", "tier": "web", "team": f"team-{number % 7}"}
        item = {
            "metadata": {"name": f"{app}-6f9c-{suffix}", "namespace": space, "labels": labels}
            | {"ownerReferences": [owner]},
            "spec": {"nodeName": f"node-{number % 100}"},
            "status": {"podIPs": [{"ip": f"10.9.{number >> 8}.{number & 255}"}]},
        }
        pods[space, f"{app}-6f9c-{suffix}"] = pod(json.dumps(item).encode())
    return Everybody(pods)


RSS = """
import sys
sys.path[:0] = sys.argv[1].split(":")
import tidegate_observer.main  # all that the process has
from pathlib import Path
from row_flows import everybody, records
from tidegate_observer.history import History
from tidegate_observer.rundir import RunDirSource
from tidegate_observer.server import About, ObserverService, Server
source = RunDirSource(Path("/none"), "node-1", people=everybody(10000))
source.refresh()
made, data, directory = records(70000)
history = History(65536)
step = (made.size + 8) * 1000
for at in range(0, len(data), step):
    history.extend(made.flows(data[at:at + step], 0, directory))
del data
import ctypes, gc
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
with Server(ObserverService(history, About(("node-1",), "bench")), ["unix:" + sys.argv[2]]):
    print(open("/proc/self/smaps_rollup").read(), flush=True)
"""


def rss() -> Iterator[Result]:
    paths = ":".join(p for p in sys.path if p)
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [sys.executable, "-c", RSS, paths, f"{directory}/s"],
            capture_output=True,
            text=True,
            check=True,
        )
    size = next(int(line.split()[1]) for line in done.stdout.splitlines() if "Rss:" in line)
    yield Result(
        "flow-rss",
        "memory of the observer with 65,536 flows, in a cluster of 10,000 pods",
        size / 1024,
        "MiB",
        "nothing",
        120.0,
    )


# ---- real packets -----------------------------------------------------------------------------


@contextmanager
def town() -> Iterator[Town]:
    from support import ca_town  # noqa: PLC0415 - pytest and all: only these rows need it

    with tempfile.TemporaryDirectory() as directory, ca_town.town(Path(directory)) as made:
        made.save("nodes", ca_town.node(1))
        made.save("pods", ca_town.pod("server"), ca_town.pod("client"))
        made.save("policy", ca_town.policy("lock", "server"))
        made.up()
        ca_town.until(lambda: made.run_dir.observer.exists(), "the observer serves")
        yield made


@contextmanager
def relay(observer: Path) -> Iterator[Path]:
    """Its socket: a relay of two nodes, which both are that observer: each must say that it has
    told everything before a flow is in order."""
    socket_path = observer.with_name("relay.sock")
    command = [sys.executable, "-c", "from tidegate_observer.relay_main import main; main()"]
    command += ["--socket", str(socket_path)]
    for name in ("a", "b"):
        command += ["--peer", f"{name}=unix:{observer}"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 30.0
            while not socket_path.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError("the relay does not serve")
                time.sleep(0.05)
            yield socket_path
        finally:
            process.terminate()


def followed(made: Town, *more: str) -> list[float]:
    """Milliseconds from each denied packet to the line that `tidegate observe --follow` prints."""
    run = made.run_dir.path
    command = [sys.executable, "-m", "tidegate_cli", "observe", "--follow", "-o", "json", *more]
    environment = os.environ | {"TIDEGATE_RUN_DIR": str(run)}
    printed: dict[int, float] = {}
    sent: dict[int, float] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        stream = process.stdout
        assert stream is not None

        def read() -> None:
            for line in stream:
                at = line.find('"source_port":')
                if at >= 0:
                    port = int(line[at + 14 : at + 19])
                    printed.setdefault(port, time.monotonic())

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(2.0)
        address = made.pod("server").addresses[0]
        for port in range(20000, 20000 + FOLLOWED):
            with made.inside("client"):
                sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            with sock:
                sock.bind(("", port))
                sent[port] = time.monotonic()
                sock.sendto(b"x", (address, 8081))
            time.sleep(0.01)
        time.sleep(1.0)
        process.terminate()
        reader.join()
    took = sorted((printed[p] - sent[p]) * 1000 for p in sent if p in printed)
    if len(took) < FOLLOWED:
        raise Unmeasurable(f"{FOLLOWED - len(took)} of {FOLLOWED} were not printed")
    return took


def follow() -> Iterator[Result]:
    """Of one observer, and of two through a relay."""
    if os.geteuid():
        raise Unmeasurable("needs root")
    with town() as made, relay(made.run_dir.observer) as merged:
        rows = (
            ("flow-follow", "from a packet to its printed line", ()),
            (
                "flow-follow-relay",
                "from a packet to its printed line, two nodes through a relay",
                ("--server", f"unix://{merged}"),
            ),
        )
        for id, what, more in rows:
            took = followed(made, *more)
            yield Result(
                id,
                f"{what}, 99 of 100",
                took[int(len(took) * 0.99) - 1],
                "ms",
                "the packet",
                250.0,
                {"median": round(statistics.median(took), 1)},
            )


@contextmanager
def iperf() -> Iterator[None]:
    """A server of iperf3 in the server's pod, at the port that policy allows."""
    import row_packets as packets  # noqa: PLC0415

    space = ["ip", "netns", "exec", packets.namespace(packets.SERVER)]
    with subprocess.Popen(
        [*space, "iperf3", "-s", "-B", packets.SERVER.ip4, "-p", str(packets.PORT)],
        stdout=subprocess.DEVNULL,
    ) as process:
        try:
            deadline = time.monotonic() + packets.WAIT_SECONDS
            while not packets.listening():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError("iperf3 does not listen")
                time.sleep(0.01)
            yield
        finally:
            process.kill()


def gigabyte() -> float:
    """Microseconds that a gigabyte takes through one connection of iperf3."""
    import row_packets as packets  # noqa: PLC0415

    space = ["ip", "netns", "exec", packets.namespace(packets.CLIENT)]
    words = ["iperf3", "-J", "-c", packets.SERVER.ip4, "-p", str(packets.PORT), "-t", "1"]
    done = subprocess.run([*space, *words], check=True, capture_output=True, text=True)
    return 8e15 / float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"])


def connection() -> float:
    """Microseconds for a connection that is made, used and closed, the mean of many."""
    import row_packets as packets  # noqa: PLC0415

    count = 3000
    began = time.perf_counter_ns()
    packets.client("connect", packets.SERVER.ip4, packets.PORT, count)
    return (time.perf_counter_ns() - began) / 1000 / count


def overhead() -> Iterator[Result]:
    """The same interfaces and packets, programs with flow events and without; the ring is emptied
    after each round, so that every event is delivered."""
    import row_packets as packets  # noqa: PLC0415
    from lab import Lab  # noqa: PLC0415

    if shutil.which("iperf3") is None:
        raise Unmeasurable("iperf3 is not installed")
    rows = (
        ("flow-overhead", iperf, gigabyte, "a gigabyte by iperf3 between two pods of a node", 0.97),
        (
            "flow-overhead-short",
            packets.server,
            connection,
            "short TCP connections of two pods on one node",
            0.93,
        ),
    )
    for id, server, measured, what, least in rows:
        with (
            pinned(),
            packets.node(),
            Lab(flow_events=0) as off,
            Lab(flow_events=1) as on,
            server(),
        ):
            gates = {"base": packets.Gates(off), "ours": packets.Gates(on)}

            def run(name: str, measured: Callable[[], float] = measured) -> float:
                with gates[name].attached():  # noqa: B023 - called in this turn
                    took = measured()
                with RingBuffer(on.maps["flows_v1"]) as ring:
                    told.append(len(ring.read()))  # noqa: B023
                return took

            told: list[int] = []
            figures = interleaved(
                {"base": functools.partial(run, "base"), "ours": functools.partial(run, "ours")},
                packets.ROUNDS,
            )
            if not sum(told):
                raise AssertionError("nothing was told")
            against = "programs without flow events"
            # As times: throughput of at least `least` is a time of at most its inverse.
            what = f"{what} with flow events, p50"
            yield packets.outcome(id, what, against, round(1 / least, 3), figures)


ROWS: dict[str, Callable[[], Iterator[Result]]] = {
    "flow-overhead": overhead,
    "flow-decode": decode,
    "flow-query": query,
    "flow-rss": rss,
    "flow-follow": follow,
}
