"""svc-change, svc-change-cluster, svc-cold: a loader with 10,000 Services of five endpoints each.

As in `row_loader`, from the files of a run directory to what was read back from the kernel; the
files of a change are written by the publisher before the clock starts.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import loader_world as world
from measure import Result, absolute, pinned
from row_loader import OBJECTS, Node, node, timed_cycle
from tidegate_api import state as api
from tidegate_operator.compile import Desired
from tidegate_operator.compile.compiler import NodeContent
from tidegate_operator.identities import EMPTY_LEDGER
from tidegate_operator.publish import CLUSTER_SIZES

SERVICES = 10_000
ENDPOINTS = 5


def service(number: int, first: int) -> api.ServicePort:
    """Backends `first` and the four after it of a service's own ten addresses."""
    pods = [
        f"10.{64 + (n >> 16)}.{n >> 8 & 255}.{n & 255}"
        for n in (number * 10 + (first + i) % 10 for i in range(ENDPOINTS))
    ]
    vip = f"10.96.{number >> 8}.{number & 255}"
    return world.service(f"s{number}", vip, 80, sorted((pod, 8080) for pod in pods))


class ServiceNode(Node):
    def write(self, port: int = 80) -> None:
        if not hasattr(self, "services"):
            self.services = {f"ns/s{n}": [service(n, 0)] for n in range(SERVICES)}
            self.ipcache = {}
        desired = Desired(
            rule_sets={},
            nodes={world.NODE: NodeContent([world.endpoint(1, 256)], [], [])},
            ipcache=self.ipcache,
            services=dict(sorted(self.services.items())),
            peers={},
            problems=(),
        )
        self.publisher.publish(desired, EMPTY_LEDGER)

    def change(self, number: int) -> None:
        """One endpoint goes, another comes."""
        self.services = self.services | {f"ns/s{number}": [service(number, 1)]}


class ClusterNode(ServiceNode):
    sizes = CLUSTER_SIZES


def change() -> Iterator[Result]:
    what = f"one endpoint of {SERVICES:,} Services with {ENDPOINTS} changed: from the files"
    yield _changed("svc-change", what, ServiceNode)
    yield _changed("svc-change-cluster", f"{what}, cut as in a cluster", ClusterNode)


def _changed(id: str, what: str, kind: type[ServiceNode]) -> Result:
    with pinned(), node(kind) as here, ExitStack() as stack:
        loader = here.loader()
        stack.callback(loader.close)
        loader.cycle()
        numbers = iter(range(SERVICES))

        def run() -> float:
            here.change(next(numbers) * 7)
            here.write()
            return timed_cycle(loader)

        return absolute(id, what, "ms", 50.0, run)


# Not getrusage: its figure is that of whoever started the process, where that is the larger one.
PEAK = """
import re, sys
from tidegate_loader.main import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
raise SystemExit(code)
"""


def cold() -> Iterator[Result]:
    with node(ServiceNode) as here:

        def run() -> float:
            here.forget()
            return here.process() / 1000

        what = f"a loader process fills an empty kernel with {SERVICES:,} Services"
        whole = absolute("svc-cold", what, "s", 3.0, run)
        here.forget()
        peak = peak_of(here)
        yield dataclasses.replace(whole, extra={"peak MiB": round(peak, 1), **whole.extra})
        yield Result("svc-cold-memory", "the same, its peak", peak, "MiB", "resident", 120.0)


def peak_of(here: Node) -> float:
    argv = ["--once", "--log-level", "warning", "--node", world.NODE]
    argv += ["--run-dir", str(here.run_dir), "--pin-dir", str(here.pin_dir)]
    argv += ["--objects", str(OBJECTS)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-c", PEAK, *argv],
        check=True,
        env=environment,
        capture_output=True,
        text=True,
    )
    return int(found.stdout) / 1024


ROWS: dict[str, Callable[[], Iterator[Result]]] = {"svc-change": change, "svc-cold": cold}
