"""apply-latency, loader-rss, map-memory: the whole product, as `tidegate up` runs it.

TIDEGATE_BENCH_FOLDER names the folder for the memory rows (default examples/shop).
"""

from __future__ import annotations

import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from measure import Result, Unmeasurable, absolute, calibration, percentile, resident
from tidegate_bpf import Map
from tidegate_bpf.errors import BpfError
from tidegate_bpf.netns import inside
from tidegate_cli.standalone.rundir import Pod, RunDir, Supervisor

ROOT = Path(__file__).parents[1]
SAMPLES = 200
PODS = 12
PORT = 9000
PROBE_SECONDS = 0.0005
SILENCE_SECONDS = 0.1
"""No answer for so long: denied."""
GIVE_UP_SECONDS = 5.0
IDLE_SECONDS = 5.0


# ---- a cluster ---------------------------------------------------------------------------


def tidegate(run_dir: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tidegate_cli", "--run-dir", str(run_dir), *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[RunDir, Supervisor]]:
    with tempfile.TemporaryDirectory(prefix="tg-bench-") as directory:
        run_dir = RunDir.at(Path(directory) / "run")
        try:
            done = tidegate(run_dir.path, "up", str(folder), "--detach")
            state = run_dir.read()
            if done.returncode or state is None:
                raise Unmeasurable(f"`tidegate up` fails: {done.stderr.strip()[-500:]}")
            yield run_dir, state
        finally:
            tidegate(run_dir.path, "down")


# ---- apply-latency ---------------------------------------------------------------------------


def manifests() -> list[dict[str, object]]:
    pod = {
        "containers": [
            {"name": "main", "image": "app", "ports": [{"containerPort": PORT, "protocol": "UDP"}]}
        ]
    }
    found: list[dict[str, object]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "bench"}}
    ]
    for number in range(PODS):
        app = "server" if not number else "client"
        found.append(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": f"pod-{number}", "namespace": "bench", "labels": {"app": app}},
                "spec": pod | {"nodeName": f"node-{1 + number % 2}"},
            }
        )
    return found


def policy(allowed: bool) -> str:
    """The server's; the other pods have one too, so that the compiler has more to look at."""
    near = {
        "from": [{"podSelector": {"matchLabels": {"app": "client"}}}],
        "ports": [{"port": PORT, "protocol": "UDP"}],
    }
    return yaml.dump(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "server", "namespace": "bench"},
            "spec": {
                "podSelector": {"matchLabels": {"app": "server"}},
                "policyTypes": ["Ingress"],
                "ingress": [near] if allowed else [],
            },
        }
    )


def save(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.rename(path)


@dataclass
class Probe:
    """One socket in the client's namespace, always the same flow: established when allowed."""

    link: socket.socket
    sent: dict[int, float] = field(default_factory=dict)
    last: int = -1
    """Newest probe that was answered."""
    last_answer: float = 0.0
    number: int = 0

    def step(self) -> None:
        """Sends one probe and takes the answers that came."""
        began = time.monotonic()
        self.sent[self.number] = began
        self.link.send(b"%d" % self.number)
        self.number += 1
        while True:
            try:
                answer = int(self.link.recv(64).split()[-1])
            except BlockingIOError:
                break
            if answer > self.last:
                self.last, self.last_answer = answer, time.monotonic()
        time.sleep(max(0.0, PROBE_SECONDS - (time.monotonic() - began)))

    def until(self, allowed: bool, since: float) -> float:
        """When the verdict changed: the first answer, or the first probe of the silence."""
        first = self.number
        while time.monotonic() < since + GIVE_UP_SECONDS:
            self.step()
            if allowed and self.last >= first:
                return self.last_answer
            if not allowed and time.monotonic() - self.sent[max(self.last, 0)] > SILENCE_SECONDS:
                return self.sent[self.last + 1]
        raise AssertionError(f"the verdict did not become {'allow' if allowed else 'deny'}")


@contextmanager
def probe(client: Pod, server: Pod) -> Iterator[Probe]:
    with inside(client.netns):
        link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with link:
        link.setblocking(False)
        link.connect((server.addresses[0], PORT))
        yield Probe(link)


def measure_latency(folder: Path, state: Supervisor) -> dict[bool, list[float]]:
    pods = {pod.name: pod for pod in state.pods}
    server = pods["pod-0"]
    near = next(p for p in pods.values() if p is not server and p.node == server.node)
    far = next(p for p in pods.values() if p.node != server.node)
    found: dict[bool, list[float]] = {True: [], False: []}
    shuffle = random.Random(1)
    for client in (near, far):
        with probe(client, server) as prober:
            prober.until(True, time.monotonic())
            for number in range(SAMPLES // 2):
                allowed = bool(number % 2)
                until = time.monotonic() + shuffle.uniform(0.01, 0.05)
                while time.monotonic() < until:
                    prober.step()
                began = time.monotonic()
                save(folder / "server.yaml", policy(allowed))
                found[allowed].append((prober.until(allowed, began) - began) * 1000)
    return found


def apply_latency() -> Iterator[Result]:
    with tempfile.TemporaryDirectory(prefix="tg-bench-") as directory:
        folder = Path(directory)
        (folder / "pods.yaml").write_text(yaml.dump_all(manifests()))
        save(folder / "server.yaml", policy(True))
        loop = calibration()
        with cluster(folder) as (_, state):
            found = measure_latency(folder, state)
    both = found[True] + found[False]
    what = f"file saved to verdict changed for real packets, {PODS} pods, p99 of {len(both)}"
    against = f"p50 {statistics.median(both):.1f} ms; calibration loop {loop:.1f} ms"
    extra = {
        "p50": {"allow": statistics.median(found[True]), "deny": statistics.median(found[False])},
        "max": max(both),
        "calibration": {"unit": "ms", "runs": [round(loop, 2)]},
    }
    yield Result("apply-latency", what, percentile(both, 0.99), "ms", against, 200.0, extra)


# ---- memory -------------------------------------------------------------------------------------


def folder() -> Path:
    return Path(os.environ.get("TIDEGATE_BENCH_FOLDER", ROOT / "examples" / "shop"))


def loaders(run_dir: RunDir) -> dict[int, str]:
    """{pid: node} of this run's loader processes."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"tidegate_loader" in words and os.fsencode(run_dir.path) in words:
            found[int(entry.name)] = words[words.index(b"--node") + 1].decode()
    return found


def charged(pins: Path) -> float:
    """MiB that the kernel charges for every map pinned below `pins`; each map once."""
    sizes: dict[int, int] = {}
    for path in sorted(p for p in pins.rglob("*") if not p.is_dir()):
        if path.parent.name in ("progs", "links"):
            continue
        try:
            with Map.open_pinned(str(path)) as found:
                sizes[found.info.id] = found.memory()
        except BpfError:
            continue
    return sum(sizes.values()) / (1 << 20)


def memory(row: str) -> Iterator[Result]:
    where = folder()
    with cluster(where) as (run_dir, state):
        time.sleep(IDLE_SECONDS)
        running = loaders(run_dir)
        if not running:
            raise Unmeasurable("no loader process is running")
        name = f"{where.name}, {len(state.pods)} pods on {len(state.nodes)} nodes"
        if row == "loader-rss":
            run = lambda: max(resident(pid) for pid in running)  # noqa: E731
            yield absolute(row, f"idle loader's resident memory, {name}", "MiB", 40.0, run)
        else:
            run = lambda: max(charged(run_dir.bpf / node.name) for node in state.nodes)  # noqa: E731
            yield absolute(row, f"kernel memory of a node's maps, {name}", "MiB", 64.0, run)


def loader_rss() -> Iterator[Result]:
    return memory("loader-rss")


def map_memory() -> Iterator[Result]:
    return memory("map-memory")


ROWS: dict[str, Callable[[], Iterator[Result]]] = {
    "apply-latency": apply_latency,
    "loader-rss": loader_rss,
    "map-memory": map_memory,
}
