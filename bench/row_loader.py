"""loader-*: one node's loader with 100,000 addresses, from the files of a run directory.

The programs are the real ones; the two interfaces are a veth pair in a namespace of our own. A
process that starts has every CPU of the machine, as on a node; a change is timed on one.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import loader_world as world
from measure import Result, absolute, interleaved, pinned
from msgspec import structs
from row_datapath import two_interfaces
from tidegate_api import state as api
from tidegate_bpf import bpffs
from tidegate_loader import attach, log
from tidegate_loader.loader import Loader
from tidegate_loader.local import NodePaths, encode, read_realised
from tidegate_operator.compile import Desired
from tidegate_operator.compile.compiler import NodeContent
from tidegate_operator.identities import EMPTY_LEDGER
from tidegate_operator.publish import FOLDER_SIZES, Publisher
from tidegate_operator.store import FileStore

OBJECTS = Path(__file__).parents[1] / "datapath" / "build"
ENTRIES = 100_000
FIRST_IDENTITY = 256


def address(number: int) -> str:
    return f"10.{64 + (number >> 16)}.{number >> 8 & 255}.{number & 255}/32"


def rule_set(port: int) -> api.RuleSet:
    return world.rule_set(world.term(api.SetPeer(name="clients"), 0, "TCP", port))


class Node:
    """A run directory and a bpffs that hold one node of two pods."""

    sizes = FOLDER_SIZES

    def __init__(self, directory: Path, interfaces: tuple[int, int]) -> None:
        self.run_dir = directory / "run"
        self.mounted = directory / "bpf"
        self.mounted.mkdir()
        self.paths = NodePaths(self.run_dir, world.NODE)
        self.runs = 0
        self.publisher = Publisher(FileStore(self.run_dir), self.sizes)
        cidrs = sorted((address(i), FIRST_IDENTITY + i % 5000) for i in range(ENTRIES))
        self.ipcache = {
            cidr: api.IPCacheEntry(cidr=cidr, identity=identity, node="node-2")
            for cidr, identity in cidrs
        }
        self.paths.interfaces.mkdir(parents=True)
        for number, ifindex in enumerate(interfaces, 1):
            path = self.paths.interfaces / f"uid-{number}.json"
            found = world.interface(number, ifindex)
            found = structs.replace(found, ifname=socket.if_indextoname(ifindex))
            path.write_bytes(encode(found))
        self.write()

    def write(self, port: int = 80) -> None:
        """As `tidegate up` does: only what differs, in the publisher's order."""
        rules = rule_set(port)
        name = rules.metadata.name
        clients = world.peer_set("clients", *range(FIRST_IDENTITY, FIRST_IDENTITY + 200))
        content = NodeContent(
            endpoints=[world.endpoint(n, 255 + n, name) for n in (1, 2)],
            rule_sets=[name],
            peer_sets=["clients"],
        )
        desired = Desired(
            rule_sets={name: rules},
            nodes={world.NODE: content},
            ipcache=self.ipcache,
            services={},
            peers={"clients": clients},
            problems=(),
        )
        self.publisher.publish(desired, EMPTY_LEDGER)

    def move(self, number: int, identity: int) -> None:
        cidr = address(number)
        entry = api.IPCacheEntry(cidr=cidr, identity=identity, node="node-2")
        self.ipcache = self.ipcache | {cidr: entry}

    @property
    def pin_dir(self) -> Path:
        return self.mounted / f"{self.runs}"

    def forget(self) -> None:
        """The next loader finds nothing in the kernel."""
        self.runs += 1
        self.paths.realised.unlink(missing_ok=True)

    def process(self) -> float:
        """Milliseconds of a loader process from start to the state in force."""
        command = ["-m", "tidegate_loader", "--once", "--log-level", "warning"]
        command += ["--node", world.NODE, "--run-dir", str(self.run_dir)]
        command += ["--pin-dir", str(self.pin_dir), "--objects", str(OBJECTS)]
        return self.python(command)

    def python(self, arguments: list[str]) -> float:
        """Milliseconds of an interpreter of its own."""
        # Bytecode is compiled once, as in an installed package.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": str(self.run_dir.parent / "bytecode"),
        }
        began = time.perf_counter_ns()
        subprocess.run([sys.executable, *arguments], check=True, env=environment)
        return (time.perf_counter_ns() - began) / 1e6

    def loader(self) -> Loader:
        options = argparse.Namespace(
            node=world.NODE, pin_dir=self.pin_dir, objects=OBJECTS, force_clsact=False, cgroup=None,
            flow_events=True, load_balancer_mode="snat",
        load_balancer_acceleration="disabled",
        )  # fmt: skip
        return Loader(self.paths, options, log.logger(world.NODE, "warning"))


_Node = TypeVar("_Node", bound=Node)


@contextmanager
def node(kind: type[_Node] = Node) -> Iterator[_Node]:  # type: ignore[assignment]
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tg-bench-")))
        made = kind(directory, stack.enter_context(two_interfaces()))
        bpffs.mount(str(made.mounted))
        stack.callback(bpffs.unmount, str(made.mounted))
        yield made


def timed_cycle(loader: Loader) -> float:
    began = time.perf_counter_ns()
    loader.cycle()
    taken = (time.perf_counter_ns() - began) / 1e6
    if not loader.realised_now:
        raise AssertionError("the state is not in force")
    return taken


def cold() -> Iterator[Result]:
    with node() as here:

        def run() -> float:
            here.forget()
            return here.process()

        what = f"a loader process fills an empty kernel with {ENTRIES:,} ipcache entries, {cpus()}"
        whole = absolute("loader-cold", what, "ms", 500.0, run)
        extra = {"parts": parts(here, run), **whole.extra}
        yield dataclasses.replace(whole, extra=extra)


def cpus() -> str:
    return f"with {len(os.sched_getaffinity(0))} CPUs"


def medians(measured: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Milliseconds each."""
    found = interleaved(measured, 3)
    return {name: round(statistics.median(values), 1) for name, values in found.items()}


def parts(here: Node, run: Callable[[], float]) -> dict[str, float]:
    """What the whole is made of, and what it is on one CPU."""

    def programs() -> float:
        here.forget()
        began = time.perf_counter_ns()
        attach.Programs(OBJECTS, here.pin_dir, {}).close()
        return (time.perf_counter_ns() - began) / 1e6

    def one_cpu() -> float:
        with pinned():
            return run()

    return medians(
        {
            "start and imports": lambda: here.python(["-c", "import tidegate_loader.main"]),
            "loading the programs": programs,
            "the whole, pinned to one CPU": one_cpu,
        }
    )


def noop() -> Iterator[Result]:
    with node() as here:
        here.process()

        def one_cpu() -> float:
            with pinned():
                return here.process()

        entries = f"{ENTRIES:,} ipcache entries"
        what = f"a loader process finds {entries} and nothing to change, {cpus()}"
        whole = absolute("loader-noop", what, "ms", 250.0, here.process)
        extra = {"parts": medians({"the whole, pinned to one CPU": one_cpu}), **whole.extra}
        yield dataclasses.replace(whole, extra=extra)


def one() -> Iterator[Result]:
    with pinned(), node() as here, ExitStack() as stack:
        loader = here.loader()
        stack.callback(loader.close)
        loader.cycle()
        changes = iter(range(ENTRIES))

        def run() -> float:
            here.move(next(changes) * 17, FIRST_IDENTITY + 6000)
            here.write()
            return timed_cycle(loader)

        what = f"one of {ENTRIES:,} ipcache entries changed: from the written files to the kernel"
        yield absolute("loader-one", what, "ms", 10.0, run)


def switch() -> Iterator[Result]:
    with pinned(), node() as here, ExitStack() as stack:
        loader = here.loader()
        stack.callback(loader.close)
        loader.cycle()
        ports = iter(range(1000, 2000))

        def run() -> float:
            before = read_realised(here.paths.realised)
            here.write(next(ports))
            taken = timed_cycle(loader)
            after = read_realised(here.paths.realised)
            if not before or not after or after.counters.switches != before.counters.switches + 1:
                raise AssertionError("the node table was not switched")
            return taken

        what = "a policy changed: from the written files to the new node table in force"
        yield absolute("loader-switch", what, "ms", 30.0, run)


ROWS: dict[str, Callable[[], Iterator[Result]]] = {
    "loader-cold": cold,
    "loader-noop": noop,
    "loader-one": one,
    "loader-switch": switch,
}
