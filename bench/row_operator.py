"""op-*, bytes-*: the operator on a real API server, objects only: nothing runs on the nodes.

op-cold: from its start with nothing published to everything published. op-ready: the same on an
empty cluster. op-one: a pod gets its address, until its node's state and its shard are written.
op-rss: the most memory the process ever had, through both. bytes-pod: what pods cost while a
node gets its 110, at 10 and at 1,000 nodes. bytes-labels: what a label set costs that a
selector in every rule set picks.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
from measure import Result, Unmeasurable, absolute, calibration, percentile
from support import apiserver, town_api
from tidegate_api.state import IPCacheEntry, NodeState, StateSlice, encode
from tidegate_kube import Client, resources
from tidegate_operator import identities
from tidegate_operator.cluster import kinds
from tidegate_operator.cluster.world import Snapshot, build
from tidegate_operator.compile import Compiler
from tidegate_operator.identities import EMPTY_LEDGER
from tidegate_operator.publish import CLUSTER_SIZES, Publisher

NODES, PODS, POLICIES, SERVICES, NAMESPACES = 100, 10_000, 1_000, 2_000, 100
BACKENDS = 5
COLD_RUNS = 3
ONE_SAMPLES = 40
WRITERS = 8
PODS_A_NODE = 110
WORKLOADS_A_NODE = 25
"""In a small cluster; a large one has POLICIES of them."""
LISTEN = "127.0.0.1:19180"
WAIT_SECONDS = 180.0

Tree = dict[str, Any]


# ---- The cluster -----------------------------------------------------------------------------


def address(number: int, nodes: int) -> str:
    """Of a pod, in the pod CIDR of its node."""
    node = number % nodes
    return f"10.{64 + (node >> 8)}.{node & 255}.{2 + number // nodes}"


def namespace(number: int) -> Tree:
    labels = {"team": f"team-{number % 4}"}
    return {"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": f"ns-{number}", "labels": labels}}  # fmt: skip


def node(number: int) -> Tree:
    cidr = f"10.{64 + (number >> 8)}.{number & 255}.0/24"
    ip = {"type": "InternalIP", "address": f"172.18.{number >> 8}.{number & 255}"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": f"node-{number}"},
        "spec": {"podCIDR": cidr, "podCIDRs": [cidr]},
        "status": {"addresses": [ip]},
    }


def pod(number: int, nodes: int, **labels: str) -> Tree:
    """Nodes in turn; workloads of some replicas, scattered over them."""
    workload = zlib.crc32(str(number).encode()) % min(POLICIES, nodes * WORKLOADS_A_NODE)
    app = workload // NAMESPACES
    return town_api.pod(  # type: ignore[no-any-return]
        f"app-{app}-6d4cf56db6-{number:06d}",
        f"node-{number % nodes}",
        address(number, nodes),
        f"ns-{workload % NAMESPACES}",
        **{"app": f"app-{app}", "tier": f"tier-{app % 3}", "pod-template-hash": "6d4cf56db6"},
        **labels,
    )


def policy(number: int) -> Tree:
    """One for each app of each namespace: its neighbours, and monitoring everywhere."""
    near = {"podSelector": {"matchLabels": {"tier": f"tier-{number % 3}"}}}
    monitoring = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"role": "monitoring"}}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"policy-{number // NAMESPACES}",
                     "namespace": f"ns-{number % NAMESPACES}"},
        "spec": {
            "podSelector": {"matchLabels": {"app": f"app-{number // NAMESPACES}"}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [near, monitoring], "ports": [{"port": 8080}]}],
            "egress": [{"to": [near]}, {"ports": [{"port": 53, "protocol": "UDP"}]}],
        },
    }  # fmt: skip


def service(number: int) -> tuple[Tree, Tree]:
    name, where = f"service-{number}", f"ns-{number % NAMESPACES}"
    port = {"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}
    made = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": where},
        "spec": {"clusterIP": f"10.96.{1 + (number >> 8)}.{number & 255}", "ports": [port]},
    }
    ready = [
        {"addresses": [address(number * BACKENDS + index, NODES)], "conditions": {"ready": True}}
        for index in range(BACKENDS)
    ]
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{name}-1", "namespace": where,
                     "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": ready,
    }  # fmt: skip
    return made, endpoints


def populate(client: Client) -> None:
    with ThreadPoolExecutor(WRITERS) as pool:
        for batch in (
            [namespace(i) for i in range(NAMESPACES)] + [node(i) for i in range(NODES)],
            [pod(i, NODES) for i in range(PODS)],
            [policy(i) for i in range(POLICIES)],
            [tree for i in range(SERVICES) for tree in service(i)],
        ):
            for done in [pool.submit(town_api.apply, client, tree) for tree in batch]:
                done.result()


@contextmanager
def empty() -> Iterator[tuple[Client, Path]]:
    """A server that knows our kinds: a client of it, and a kubeconfig."""
    if not (apiserver.BINARIES / "kube-apiserver").exists():
        raise Unmeasurable("kube-apiserver is not built: run `make kube-apiserver`")
    with tempfile.TemporaryDirectory(prefix="tg-bench-") as directory:
        place = Path(directory)
        with apiserver.running(place) as server, closing(server.client()) as client:
            town_api.install(client)
            yield client, server.kubeconfig(place / "kubeconfig")


@contextmanager
def cluster() -> Iterator[tuple[Client, Path]]:
    """The same with everything in it."""
    with empty() as (client, kubeconfig):
        populate(client)
        yield client, kubeconfig


# ---- The operator ----------------------------------------------------------------------------


class Operator:
    """A process of it; `seconds` from its start to everything published."""

    def __init__(self, kubeconfig: Path) -> None:
        began = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tidegate_operator", "--kubeconfig", str(kubeconfig),
             "--no-election", "--listen", LISTEN, "--log-level", "warning"],
        )  # fmt: skip
        try:
            self._await(began + WAIT_SECONDS)
        except BaseException:
            self.stop()
            raise
        self.seconds = time.monotonic() - began

    def _await(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise AssertionError(f"the operator ended with {self._process.returncode}")
            try:
                with urllib.request.urlopen(f"http://{LISTEN}/readyz", timeout=2):
                    return
            except OSError:
                time.sleep(0.02)
        raise AssertionError("the operator never published")

    def memory(self) -> float:
        """MiB, the most it ever had."""
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        (line,) = (line for line in text.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    def written(self) -> tuple[int, int]:
        """(objects, bytes) since its start."""
        with urllib.request.urlopen(f"http://{LISTEN}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()

        def total(name: str) -> int:
            found = [line for line in lines if line.startswith(name + "{")]
            return int(sum(float(line.rpartition(" ")[2]) for line in found))

        return (
            total("tidegate_operator_objects_written_total"),
            total("tidegate_operator_written_bytes_total"),
        )

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def operator(kubeconfig: Path) -> Iterator[Operator]:
    made = Operator(kubeconfig)
    try:
        yield made
    finally:
        made.stop()


def forget(client: Client) -> None:
    """As if nothing had ever been published."""
    for resource in town_api.OURS.values():
        client.raw("DELETE", resource.path())


class Seen:
    """The time at which a watch brings the first object that fulfils a condition."""

    def __init__(self, client: Client, kind: type, wanted: Callable[[Any], bool]) -> None:
        resource = town_api.OURS[kind]
        version = ""
        for page in client.pages(resource):
            version = page.resource_version
        self._watch = client.watch(resource, version, seconds=60, silence=60)
        self._decoder, self._wanted = msgspec.json.Decoder(kind), wanted
        self.at = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for event in self._watch:
            if event.type in ("ADDED", "MODIFIED") and self._wanted(
                self._decoder.decode(event.object)
            ):
                self.at = time.monotonic()
                return

    def wait(self) -> float:
        self._thread.join(30)
        self._watch.close()
        if not self.at:
            raise AssertionError("the operator never wrote it")
        return self.at


def one_change(client: Client, number: int, **labels: str) -> float:
    """Milliseconds from a pod's address in the API to its endpoint and address published."""
    tree = pod(number, NODES, **labels)
    where = tree["metadata"]["namespace"]
    name, ip = tree["metadata"]["name"], tree["status"]["podIP"]
    bare = {key: value for key, value in tree.items() if key != "status"}
    endpoint = Seen(
        client, NodeState, lambda item: any(e.name == name for e in item.spec.endpoints)
    )
    held = json.loads(client.create(resources.PODS, encode(bare), where))
    endpoint.wait()
    state = Seen(
        client, NodeState, lambda item: any(ip in e.addresses for e in item.spec.endpoints)
    )
    shard = Seen(client, StateSlice, lambda item: _has(item, ip))
    held["status"] = tree["status"]
    began = time.monotonic()
    client.update(resources.PODS, name, encode(held), where, "status")
    return (max(state.wait(), shard.wait()) - began) * 1000


def _endpoint(item: NodeState, name: str) -> list[str] | None:
    """Its addresses, if it is there."""
    return next((e.addresses for e in item.spec.endpoints if e.name == name), None)


def _has(item: StateSlice, ip: str) -> bool:
    entries: Sequence[IPCacheEntry] = item.spec.ipcache or ()
    return any(entry.cidr == f"{ip}/32" for entry in entries)


SIZE = f"{PODS:,} pods, {NODES} nodes, {POLICIES:,} policies, {SERVICES:,} services"


def operate() -> Iterator[Result]:
    """op-cold, op-one, op-rss and bytes-labels, in one populated cluster."""
    with cluster() as (client, kubeconfig):
        colds, loops, ones, most = [], [], [], 0.0
        for run in range(COLD_RUNS):
            loops.append(calibration())
            forget(client)
            with operator(kubeconfig) as made:
                colds.append(made.seconds)
                objects, size = made.written()
                if run == COLD_RUNS - 1:
                    for number in range(PODS, PODS + ONE_SAMPLES):
                        ones.append(one_change(client, number))
                    labels = label_set(client, made)
                most = max(most, made.memory())
        extra: Mapping[str, Any] = {
            "runs": [round(value, 2) for value in colds],
            "objects": objects,
            "bytes": size,
            "calibration": {"unit": "ms", "runs": [round(value, 2) for value in loops]},
        }
        what = f"{SIZE}: from the operator's start to all published"
        median = statistics.median(colds)
        yield Result("op-cold", what, median, "s", f"median of {COLD_RUNS}", 30.0, extra)
        extra = {"p99": round(percentile(ones, 0.99), 1), "runs": [round(v, 1) for v in ones]}
        what = f"{SIZE}: a pod's address in the API, to its state and shard written"
        yield Result(
            "op-one", what, percentile(ones, 0.5), "ms", f"p50 of {ONE_SAMPLES}", 100.0, extra
        )
        what = f"{SIZE}: the most memory the operator ever had"
        yield Result("op-rss", what, most, "MiB", "VmHWM", 400.0)
        yield labels


def label_set(client: Client, made: Operator) -> Result:
    """A pod with labels that nobody had, which a selector in every ingress rule set picks."""
    _, before = made.written()
    peers = Seen(
        client,
        StateSlice,
        lambda item: any("role in (monitoring)" in peer.selector for peer in item.spec.peers or ()),
    )
    began = time.monotonic()
    one_change(client, PODS + ONE_SAMPLES, role="monitoring")
    seconds = peers.wait() - began
    _, after = made.written()
    what = f"a new label set in a selector of {POLICIES:,} rule sets: bytes written"
    against = "all of its writes; seconds until its peers are written in `seconds`, at most 1"
    extra = {"seconds": round(seconds, 3)}
    if seconds > 1:
        raise AssertionError(f"it took {seconds:.2f} s")
    return Result("bytes-labels", what, (after - before) / 1024, "KiB", against, 2048.0, extra)


# ---- Bytes of one pod ------------------------------------------------------------------------


class Counting:
    """A store that remembers what was put since `clear`."""

    def __init__(self) -> None:
        self._held: dict[type, dict[str, Any]] = {}
        self.put_since: list[Any] = []
        self.before: dict[str, Any] = {}

    def clear(self) -> None:
        self.put_since, self.before = [], {}

    def held(self, kind: type) -> dict[str, Any]:
        return self._held.setdefault(kind, {})

    def put(self, batch: Sequence[Any]) -> dict[str, str]:
        for item in batch:
            held = self.held(type(item))
            if item.metadata.name in held:
                self.before[item.metadata.name] = held[item.metadata.name]
            held[item.metadata.name] = item
            self.put_since.append(item)
        return {}

    def drop(self, kind: type, names: Sequence[str]) -> dict[str, str]:
        for name in names:
            self.held(kind).pop(name, None)
        return {}

    def report(self, problems: Sequence[Any]) -> Sequence[str]:
        return ()


def decoded(trees: Sequence[Tree], decode: Callable[[bytes], Any]) -> dict[tuple[str, str], Any]:
    found = {}
    for tree in trees:
        meta = {"uid": "00000000-0000-4000-8000-000000000000", "generation": 1, **tree["metadata"]}
        key = (meta.get("namespace", ""), meta["name"])
        found[key] = decode(json.dumps({**tree, "metadata": meta}).encode())
    return found


@dataclasses.dataclass
class Fill:
    """One node gets its pods, one by one, in a cluster whose other nodes are full."""

    sizes: list[int]
    """Bytes written for each pod."""
    shards: list[StateSlice]
    """What the most expensive of them for other nodes wrote of tables ..."""
    before: dict[str, Any]
    """... and what was there before it."""


def fill(nodes: int) -> Fill:
    """Every pod joins a Service, as pods do. Those of label sets that nobody had are not
    counted: see bytes-labels."""
    count = nodes * PODS_A_NODE
    everything = [pod(number, nodes) for number in range(count)]
    services = [service(number) for number in range(min(SERVICES, count // BACKENDS))]
    mine = [tree for number, tree in enumerate(everything) if number % nodes == nodes - 1]
    others = [tree for number, tree in enumerate(everything) if number % nodes != nodes - 1]
    snapshot = Snapshot(
        nodes=decoded([node(i) for i in range(nodes)], kinds.node),
        namespaces=decoded([namespace(i) for i in range(NAMESPACES)], kinds.namespace),
        pods=decoded(others, kinds.pod),
        services=decoded([made for made, _ in services], kinds.service),
        slices=decoded([made for _, made in services], kinds.endpoint_slice),
        policies=decoded([policy(i) for i in range(POLICIES)], kinds.network_policy),
    )
    store = Counting()
    publisher, compiler = Publisher(store, CLUSTER_SIZES), Compiler()
    world, _ = build(snapshot)
    ledger = identities.allocate(world, EMPTY_LEDGER)
    publisher.publish(compiler.compile(world, ledger), ledger)
    found = Fill([], [], {})
    for place, tree in enumerate(mine):
        store.clear()
        _, slice_tree = service(place)
        slice_tree["endpoints"].append({"addresses": [tree["status"]["podIP"]]})
        snapshot = dataclasses.replace(
            snapshot,
            pods={**snapshot.pods, **decoded([tree], kinds.pod)},
            slices={**snapshot.slices, **decoded([slice_tree], kinds.endpoint_slice)},
        )
        world, _ = build(snapshot, world)
        ledger = identities.allocate(world, ledger)
        publisher.publish(compiler.compile(world, ledger), ledger)
        written = sorted(type(item).__name__ for item in store.put_since)
        if written != ["NodeState", "StateSlice", "StateSlice"]:
            continue
        found.sizes.append(sum(len(encode(item)) for item in store.put_since))
        shards = [item for item in store.put_since if isinstance(item, StateSlice)]
        if _size(shards) > _size(found.shards):
            found.shards, found.before = shards, store.before
    if len(found.sizes) < PODS_A_NODE * 3 // 4:
        raise AssertionError(f"only {len(found.sizes)} pods of known labels")
    return found


def _size(items: Sequence[Any]) -> int:
    return sum(len(encode(item)) for item in items)


def delivered(client: Client, shards: Sequence[StateSlice], before: Mapping[str, Any]) -> int:
    """Bytes of the watch events that every other node gets: the shards, as a server sends them."""
    total = 0
    for item in shards:
        name = item.metadata.name
        client.create(resources.STATE_SLICES, encode(before[name]))
        there = json.loads(client.get(resources.STATE_SLICES, name))["metadata"]
        version = there["resourceVersion"]
        watch = client.watch(resources.STATE_SLICES, version, seconds=60, silence=60)
        tree = msgspec.to_builtins(item)
        tree["metadata"]["resourceVersion"] = version
        client.update(resources.STATE_SLICES, name, encode(tree))
        event = next(event for event in watch if event.type == "MODIFIED")
        total += len(event.object) + len('{"type":"MODIFIED","object":}\n')
        watch.close()
        client.delete(resources.STATE_SLICES, name)
    return total


def bytes_pod() -> Iterator[Result]:
    with empty() as (client, _):
        found = {nodes: fill(nodes) for nodes in (10, 1000)}
        sent = {n: delivered(client, one.shards, one.before) for n, one in found.items()}
    means = {nodes: statistics.mean(one.sizes) for nodes, one in found.items()}
    extra: dict[str, Any] = {
        f"nodes-{nodes}": {"mean": round(means[nodes]), "last": one.sizes[-1], "sent": sent[nodes]}
        for nodes, one in found.items()
    }
    extra["ratio"] = round(means[1000] / means[10], 3)
    what = f"a pod added, with a Service, {PODS_A_NODE} pods a node: bytes written"
    against = f"mean over a node's {PODS_A_NODE}; the worse of 10 and 1,000 nodes"
    yield Result("bytes-pod", what, max(means.values()) / 1024, "KiB", against, 32.0, extra)
    what = f"a pod added, with a Service, {PODS_A_NODE} pods a node: bytes to each other node"
    against = "the worst; watch events of a real server"
    yield Result("bytes-delivered", what, max(sent.values()) / 1024, "KiB", against, 8.0, extra)


def ready() -> Iterator[Result]:
    """On an empty cluster: imports, discovery, lists, the first publish."""
    with empty() as (client, kubeconfig):

        def run() -> float:
            forget(client)
            with operator(kubeconfig) as made:
                return made.seconds

        run()  # a server that just started is slow to serve what it never served
        yield absolute("op-ready", "an empty cluster: start of the operator", "s", 3.0, run)


ROWS: dict[str, Callable[[], Iterator[Result]]] = {
    "op-cold": operate,
    "op-ready": ready,
    "bytes-pod": bytes_pod,
}
"""`op-cold` yields op-one, op-rss and bytes-labels too: one cluster is enough."""
