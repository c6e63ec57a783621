"""kube-proxy as the other proxy, and what connections cost at a site (`support.sites`).

It is built from Kubernetes' module and watches a real kube-apiserver; what it has put into
a node's namespace stays there when it is killed, so nothing of it runs while packets are measured.
No row's own meaning may live here.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from measure import Unmeasurable
from support import apiserver, sites, stored, town_api
from tidegate_bpf.netns import inside
from tidegate_cli.standalone.rundir import Pod
from tidegate_kube import Client

RR = Path(__file__).parent / "build" / "rr"
WRITERS = 8
SYNC_SECONDS = 300.0
WAIT_SECONDS = 5.0
SYNCED = "SyncProxyRules complete"
"""What kube-proxy logs at -v=2 when its rules are in the kernel."""
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")

Tree = dict[str, Any]


@contextmanager
def api() -> Iterator[Api]:
    if not (apiserver.BINARIES / "kube-proxy").exists():
        raise Unmeasurable("kube-proxy is not built: run `make kube-binaries`")
    with (
        tempfile.TemporaryDirectory(prefix="tg-bench-") as directory,
        apiserver.running(Path(directory)) as server,
        closing(server.client()) as client,
    ):
        made = Api(server, client)
        made.apply(sites.NODE_OBJECTS)
        yield made


class Api:
    """A real API server; it holds what `apply` was given."""

    def __init__(self, server: apiserver.ApiServer, client: Client) -> None:
        self.server = server
        self._client = client

    def apply(self, trees: Sequence[Tree]) -> None:
        with ThreadPoolExecutor(WRITERS) as pool:
            for done in [pool.submit(town_api.apply, self._client, tree) for tree in trees]:
                done.result()

    def store(self, trees: Sequence[Tree]) -> None:
        """New Services and their EndpointSlices, straight into etcd: these are the many."""
        stored.store(self.server.etcd_url, trees)


# ---- kube-proxy -----------------------------------------------------------------------------


class KubeProxy:
    """A process on one node of a site, in one of its modes. Context manager."""

    def __init__(self, api: Api, node: Path, name: str, mode: str) -> None:
        self._stack = ExitStack()
        directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="tg-bench-")))
        self._log = directory / "log"
        self._stack.enter_context(_reachable(node, api.server.port))
        config = api.server.kubeconfig(directory / "kubeconfig")
        _legacy(directory / "sbin")
        environment = os.environ | {"PATH": f"{directory / 'sbin'}:{os.environ['PATH']}"}
        command = [
            str(apiserver.BINARIES / "kube-proxy"),
            f"--kubeconfig={config}",
            f"--hostname-override={name}",
            f"--proxy-mode={mode}",
            "--cluster-cidr=10.244.0.0/16",
            # The machine's own limits stay as they are.
            "--conntrack-max-per-core=0",
            "--conntrack-min=0",
            "--oom-score-adj=0",
            "--v=2",
        ]
        with inside(node), self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*apiserver.WITH_US, *command], stdout=log, stderr=log, env=environment
            )

    def __enter__(self) -> KubeProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._stack.close()

    def syncs(self) -> int:
        """How often its rules were written, of both families."""
        return self._log.read_text(errors="replace").count(SYNCED)

    def wait(self, syncs: int) -> None:
        deadline = time.monotonic() + SYNC_SECONDS
        while self.syncs() < syncs:
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = self._log.read_text(errors="replace")[-2000:]
                raise AssertionError(f"kube-proxy does not write its rules:\n{tail}")
            time.sleep(0.1)

    def cpu(self) -> float:
        """Seconds of it and of the children that it has waited for."""
        line = Path(f"/proc/{self.process.pid}/stat").read_text()
        fields = line.rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / CLOCK_TICKS


def _legacy(directory: Path) -> None:
    """iptables as it was before nftables: with 10,000 Services of five endpoints, the one that is
    made of nftables does not end within five minutes."""
    directory.mkdir()
    for family, command in itertools.product(("ip", "ip6"), ("", "-save", "-restore")):
        there = shutil.which(f"{family}tables-legacy{command}")
        if there is None:
            raise Unmeasurable("there is no iptables-legacy")
        (directory / f"{family}tables{command}").symlink_to(there)


@contextmanager
def _reachable(node: Path, port: int) -> Iterator[None]:
    """This namespace's 127.0.0.1:`port` is that of `node`, too."""
    with inside(node):
        listener = socket.create_server(("127.0.0.1", port))

    def accept() -> None:
        with suppress(OSError):
            while True:
                here, _ = listener.accept()
                there = socket.create_connection(("127.0.0.1", port))
                for one, other in ((here, there), (there, here)):
                    threading.Thread(target=pump, args=(one, other), daemon=True).start()

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


# ---- connections ----------------------------------------------------------------------------


@contextmanager
def servers(site: sites.Site) -> Iterator[None]:
    """One in each of the two pods that are asked."""
    with ExitStack() as stack:
        for pod in site.pods:
            if pod.name in ("near", "far"):
                stack.enter_context(_server(site, pod))
        yield


@contextmanager
def _server(site: sites.Site, pod: Pod) -> Iterator[None]:
    command = [str(RR), "answer", pod.addresses[0], str(sites.PORT)]
    process = site.start(pod.name, command)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while not _listens(pod):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the server of {pod.name} does not listen")
            time.sleep(0.01)
        yield
    finally:
        process.kill()
        process.wait()


def _listens(pod: Pod) -> bool:
    with inside(pod.netns):
        table = Path("/proc/thread-self/net/tcp").read_text()
    return f":{sites.PORT:04X} 00000000:0000 0A" in table


def measure(
    site: sites.Site, who: str, mode: str, to: tuple[str, int], count: int, group: Path | None
) -> float:
    """Microseconds, the median of `count`. `mode`: of rr.c. `group`: the client's cgroup."""
    command = [str(RR), mode, to[0], str(to[1]), str(count)]
    process = site.start(who, command, group, stdout=subprocess.PIPE, text=True)
    printed, _ = process.communicate()
    if process.returncode:
        raise AssertionError(f"{who} does not reach {to} of {site.prefix}")
    return int(printed) / 1000
