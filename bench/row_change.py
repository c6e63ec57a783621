"""svc-change-cpu, svc-change-cpu-cluster: what one changed endpoint costs, against kube-proxy.

CPU of all threads, from what is new to what is read back from the kernel. kube-proxy is a process
that watches a real kube-apiserver. Ours gets the same Services from what the operator's code makes
of them: once from a folder's files, without the rest of its process, and once as on a node of a
cluster, as a process that watches our objects in that same API server: HTTP, JSON and the files
in which it keeps them included.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import proxies
from measure import Result, progress
from row_proxy import ENDPOINTS, SIZES, Arena, filler
from support import loader_api, sites
from tidegate_api.state import encode
from tidegate_bpf.netns import inside
from tidegate_kube import Client
from tidegate_loader import log
from tidegate_loader.loader import Loader
from tidegate_operator.cluster.store import RESOURCES
from tidegate_operator.publish import CLUSTER_SIZES

CHANGES = 7
NODE = "node-1"
WAIT_SECONDS = 120.0
QUIET_SECONDS = 0.3
"""A process that took no CPU for so long is done with what it had to do."""
NOTHING_SECONDS = 0.0005
"""Of CPU, in that time: its clock ticks, and that it looks whether there is anything."""
WRITERS = 8
CHANGED = "endpoints.kubernetes.io/last-change-trigger-time"
Way = Callable[[Sequence[sites.Tree]], float]
"""A Service and its EndpointSlice are others now -> seconds of CPU until that is in force."""


class ApiStore:
    """An `ObjectStore` in an API server whose only writer it is. KubeError."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._held: dict[Any, dict[str, Any]] = {}

    def held(self, kind: Any) -> dict[str, Any]:
        return self._held.setdefault(kind, {})

    def put(self, batch: Sequence[Any]) -> dict[str, str]:
        with ThreadPoolExecutor(WRITERS) as pool:
            for done in [pool.submit(self._put, item) for item in batch]:
                done.result()
        return {}

    def _put(self, item: Any) -> None:
        resource, name, held = RESOURCES[type(item)], item.metadata.name, self.held(type(item))
        if name in held:
            self._client.patch(resource, name, encode(item))
        else:
            self._client.create(resource, encode(item))
        held[name] = item

    def drop(self, kind: Any, names: Sequence[str]) -> dict[str, str]:
        for name in names:
            self._client.delete(RESOURCES[kind], name)
            self.held(kind).pop(name, None)
        return {}

    def report(self, problems: Sequence[object]) -> tuple[()]:
        del problems
        return ()


# ---- ours ----------------------------------------------------------------------------------------


def by_files(arena: Arena, stack: ExitStack) -> Way:
    """Of a loader's cycle, once the change is in the files."""
    options = argparse.Namespace(
        node=NODE, pin_dir=arena.tidegate.pin_dir(NODE), objects=sites.OBJECTS,
        force_clsact=False, cgroup=arena.tidegate.group, flow_events=True,
        load_balancer_mode="snat", load_balancer_acceleration="disabled",
    )  # fmt: skip
    here, paths = arena.places["ours"].space(NODE), arena.tidegate.paths(NODE)
    with inside(here):
        loader = Loader(paths, options, log.logger(NODE, "warning"))
        stack.callback(loader.close)
        loader.cycle()

    def run(changed: Sequence[sites.Tree]) -> float:
        arena.tidegate.change(changed)
        with inside(here):
            began = time.process_time()
            loader.cycle()
            taken = time.process_time() - began
        if not loader.realised_now:
            raise AssertionError("the state is not in force")
        return taken

    return run


def by_the_api(arena: Arena, stack: ExitStack) -> Way:
    """The same of a loader's process, from the change in the API server on."""
    server, tidegate = arena.api.server, arena.tidegate
    with progress("our objects in the API server"):
        loader_api.install(server)
        client = stack.enter_context(closing(server.client()))
        tidegate.publish_to(ApiStore(client), CLUSTER_SIZES)
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tg-bench-")))
    account = loader_api.account(server, directory / "account")
    (directory / "server").write_text(server.url)
    more = ["--kube", "--server-file", str(directory / "server"), "--service-account", str(account)]
    process = tidegate.start(NODE, *more)
    stack.callback(process.wait)
    stack.callback(process.kill)

    def cpu() -> float:
        """When it rests: of all its threads, those that have ended included."""
        clock = ~process.pid << 3 | 2  # CPUCLOCK_SCHED of a process, clock_gettime(2)
        found, since = time.clock_gettime(clock), time.monotonic()
        deadline = since + WAIT_SECONDS
        while time.monotonic() - since < QUIET_SECONDS:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError("the loader has ended, or never rests")
            time.sleep(QUIET_SECONDS / 10)
            now = time.clock_gettime(clock)
            if now - found > NOTHING_SECONDS:
                found, since = now, time.monotonic()
        return time.clock_gettime(clock)

    def wait(changed: Sequence[sites.Tree]) -> None:
        service, endpoints = changed
        wanted = {address for each in endpoints["endpoints"] for address in each["addresses"]}
        deadline = time.monotonic() + WAIT_SECONDS
        while tidegate.backends(NODE, service["spec"]["clusterIP"]) != wanted:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError("the change is not in force")
            time.sleep(0.005)

    def run(changed: Sequence[sites.Tree]) -> float:
        # As a cluster's controller says it: how long the change took is measured, too.
        now = datetime.datetime.now(datetime.UTC).isoformat()
        changed[1]["metadata"]["annotations"] = {CHANGED: now}
        spent = cpu()
        tidegate.change(changed)
        wait(changed)
        return cpu() - spent

    # The first one: it reads everything, and files of a folder become those of a cluster.
    with progress("a loader that watches it"):
        run(filler(SIZES[-1] // 2 + 1, 1))
    return run


# ---- both ----------------------------------------------------------------------------------------


WAYS = {
    "svc-change-cpu": (by_files, "the loader, from a folder's files"),
    "svc-change-cpu-cluster": (by_the_api, "the loader's process, from the API server"),
}


def changes() -> Iterator[Result]:
    numbers = iter(range(1, SIZES[-1] // 2, 7))
    with made() as arena:
        for id, (way, words) in WAYS.items():
            with ExitStack() as stack, progress(f"{CHANGES} changed endpoints: {words}"):
                ours = way(arena, stack)
                found = compared(id, words, arena, ours, [next(numbers) for _ in range(CHANGES)])
            yield found


@contextmanager
def made() -> Iterator[Arena]:
    with ExitStack() as stack:
        api = stack.enter_context(proxies.api())
        places = {
            name: stack.enter_context(sites.made(f"tg-bench-{name}"))
            for name in ("ours", "iptables")
        }
        arena = Arena(api, places, stack.enter_context(sites.tidegate(places["ours"])))
        arena.fill(SIZES[-1], {"iptables": "iptables"})
        yield arena


def compared(id: str, words: str, arena: Arena, way: Way, numbers: Sequence[int]) -> Result:
    ours, theirs = [], []
    with arena.kube_proxy("iptables", "iptables", NODE) as other:
        for number in numbers:
            changed = filler(number, 1)
            ours.append(way(changed))
            syncs, spent = other.syncs(), other.cpu()
            arena.api.apply(changed[1:])
            other.wait(syncs + 1)
            theirs.append(other.cpu() - spent)
    extra = {
        "ms": {
            "ours": [round(v * 1000, 2) for v in ours],
            "kube-proxy": [round(v * 1000) for v in theirs],
        }
    }
    value = statistics.median(theirs) / statistics.median(ours)
    what = f"one endpoint of {SIZES[-1]:,} Services with {ENDPOINTS} changed: CPU of {words}"
    against = "kube-proxy iptables, which takes so much more"
    return Result(id, what, value, "ratio", against, 50.0, extra, at_least=True)


ROWS: dict[str, Callable[[], Iterator[Result]]] = {"svc-change-cpu": changes}
