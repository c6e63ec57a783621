"""Sites: nodes, pods and veths alike, for whatever serves Services there.

    outside ── br0 ── node-1 ── client, plain, near   as `tidegate up` makes them
                  └── node-2 ── far

`Tidegate` is what the operator's own code makes of Services, and the loaders of a site's nodes that
get it through a run directory. Nothing here sends a packet.
"""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from support import town_api
from support.ca_maps import codec
from support.ca_rig import Compiled
from support.lab import U32, addr
from tidegate_bpf import Map, bpffs, mounts
from tidegate_bpf.netns import inside
from tidegate_cli.standalone import cgroups, netns, network
from tidegate_cli.standalone.rundir import Node, Pod
from tidegate_loader.local import LocalInterface, NodePaths, encode
from tidegate_operator import identities, publish
from tidegate_operator.cluster import kinds
from tidegate_operator.cluster.world import ClusterWorld, Snapshot, build, triggers
from tidegate_operator.compile import Compiler
from tidegate_operator.identities import EMPTY_LEDGER
from tidegate_operator.publish import Publisher, Sizes
from tidegate_operator.store import FileStore, ObjectStore

OBJECTS = Path(__file__).parents[2] / "datapath" / "build"
TCP = 6
PORT = 8080
"""Of every Service's endpoints, unless it says another."""
NODES = {"node-1": "172.18.0.2", "node-2": "172.18.0.3"}
OUTSIDE = "172.18.0.200"
PODS = {
    "client": ("node-1", "10.244.0.2"),
    "plain": ("node-1", "10.244.0.4"),
    "near": ("node-1", "10.244.0.3"),
    "far": ("node-2", "10.244.1.2"),
}
"""What they do is up to their users."""
NODE_OBJECTS = [town_api.node(name, at) for at, name in enumerate(NODES)]
POD_OBJECTS = [town_api.pod(name, node, ip) for name, (node, ip) in PODS.items()]
Tree = dict[str, Any]


# ---- places ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """Its namespaces are named by `prefix`."""

    prefix: str
    nodes: list[Node]
    pods: list[Pod]

    def space(self, who: str) -> Path:
        """The network namespace of a node, a pod, or "outside"."""
        return netns.path(f"{self.prefix}-{who}")

    def start(
        self, who: str, command: Sequence[str], group: Path | None = None, **how: Any
    ) -> subprocess.Popen[Any]:
        """A process there; `group`: in that cgroup."""

        def join() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        with inside(self.space(who)):
            return subprocess.Popen(command, preexec_fn=join, **how)


def _described(prefix: str) -> Site:
    nodes = [
        Node(name=name, addresses=[address], pod_cidrs=[f"10.244.{at}.0/24"],
             netns=str(netns.path(f"{prefix}-{name}")), cgroup="")
        for at, (name, address) in enumerate(NODES.items())
    ]  # fmt: skip
    pods = [
        Pod(uid=name, namespace="default", name=name, node=node, addresses=[address], ports=[],
            host_network=False, command="", netns=str(netns.path(f"{prefix}-{name}")), cgroup="",
            ifname=f"veth-{name}")
        for name, (node, address) in PODS.items()
    ]  # fmt: skip
    return Site(prefix, nodes, pods)


@contextmanager
def made(name: str) -> Iterator[Site]:
    found = _described(f"{name}")
    fabric = f"{found.prefix}-fabric"
    with ExitStack() as stack:
        for space in (fabric, *(Path(x.netns).name for x in (*found.nodes, *found.pods))):
            stack.callback(netns.delete, space)
        network.create_fabric(fabric)
        network.create_nodes(netns.path(fabric), found.nodes)
        for node in found.nodes:
            pods = [pod for pod in found.pods if pod.node == node.name]
            network.create_pods(node, pods)
            network.connect_pods(node, pods)
        _outside(found, fabric, stack)
        yield found


def _outside(site: Site, fabric: str, stack: ExitStack) -> None:
    space = f"{site.prefix}-outside"
    netns.create(space, {})
    stack.callback(netns.delete, space)
    for words in (
        ("-n", fabric, "link", "add", "out", "type", "veth", "peer", "eth0", "netns", space),
        ("-n", fabric, "link", "set", "out", "master", network.BRIDGE, "up"),
        ("-n", fabric, "link", "set", network.BRIDGE, "up"),
        ("-n", space, "link", "set", "eth0", "up"),
        ("-n", space, "addr", "add", f"{OUTSIDE}/16", "dev", "eth0"),
    ):
        subprocess.run(["ip", *words], check=True)


# ---- Services ------------------------------------------------------------------------------


def ready(address: str) -> Tree:
    return {"addresses": [address], "conditions": {"ready": True}}


def ending(address: str) -> Tree:
    """An endpoint that still serves what it has."""
    conditions = {"ready": False, "serving": True, "terminating": True}
    return {"addresses": [address], "conditions": conditions}


def service(
    name: str,
    vip: str,
    endpoints: Sequence[Tree],
    node_port: int = 0,
    target: int = PORT,
    port: int = 80,
    protocols: Sequence[str] = ("TCP",),
) -> list[Tree]:
    """A Service with its EndpointSlice; `node_port` 0: a ClusterIP only."""
    ports: list[Tree] = [
        {"name": p.lower(), "port": port, "targetPort": target, "protocol": p} for p in protocols
    ]
    spec: Tree = {"clusterIP": vip, "clusterIPs": [vip], "ports": ports}
    if node_port:
        ports[0]["nodePort"] = node_port
        spec["type"] = "NodePort"
    meta = {"name": name, "namespace": "default"}
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec},
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {**meta, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "ports": [
                {"name": p["name"], "port": target, "protocol": p["protocol"]} for p in ports
            ],
            "endpoints": list(endpoints),
        },
    ]


def _decoded(trees: Sequence[Tree], decode: Any) -> dict[tuple[str, str], Any]:
    found = {}
    for tree in trees:
        meta = {"uid": "00000000-0000-4000-8000-000000000000", "generation": 1, **tree["metadata"]}
        key = (meta.get("namespace", ""), meta["name"])
        found[key] = decode(msgspec.json.encode({**tree, "metadata": meta}))
    return found


# ---- Tidegate -------------------------------------------------------------------------------


class Tidegate:
    """A site's loaders, which get from the operator's own code what it makes of the Services.
    `group`: the cgroup whose sockets are translated."""

    def __init__(self, site: Site, directory: Path, group: Path) -> None:
        self.group = group
        self._site = site
        self._run_dir, self._bpf = directory / "run", directory / "bpf"
        self._publisher, self._compiler = Publisher(FileStore(self._run_dir)), Compiler()
        self._world: ClusterWorld | None = None
        pods = [{**pod, "metadata": {**pod["metadata"], "uid": pod["metadata"]["name"]}}
                for pod in POD_OBJECTS]  # fmt: skip
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}}
        self._snapshot = Snapshot(
            nodes=_decoded(NODE_OBJECTS, kinds.node),
            namespaces=_decoded([namespace], kinds.namespace),
            pods=_decoded(pods, kinds.pod),
        )
        for pod in site.pods:
            node = next(n for n in site.nodes if n.name == pod.node)
            paths = self.paths(node.name).interfaces
            paths.mkdir(parents=True, exist_ok=True)
            interface = LocalInterface(
                uid=pod.uid, namespace="default", name=pod.name, ifname=pod.ifname,
                ifindex=network.index_of(Path(node.netns), pod.ifname),
                pod_mac=network.pod_mac(pod), host_mac=network.host_mac(pod),
                addresses=pod.addresses,
            )  # fmt: skip
            (paths / f"{pod.uid}.json").write_bytes(encode(interface))

    def paths(self, node: str) -> NodePaths:
        return NodePaths(self._run_dir, node)

    def pin_dir(self, node: str) -> Path:
        return self._bpf / node

    def publish_to(self, store: ObjectStore, sizes: Sizes) -> None:
        """What is published from now on, and what is by now, goes there."""
        self._publisher = Publisher(store, sizes)
        self.change([])

    def publish(self, trees: Sequence[Tree]) -> None:
        """These Services and no others."""
        self._snapshot = replace(self._snapshot, services={}, slices={})
        self.change(trees)

    def change(self, trees: Sequence[Tree], gone: Sequence[str] = ()) -> None:
        """These beside what is published already, and without those of the names `gone`."""
        names = {("default", name) for name in gone}
        found = {}
        for kind, held, decode in (
            ("Service", self._snapshot.services, kinds.service),
            ("EndpointSlice", self._snapshot.slices, kinds.endpoint_slice),
        ):
            fresh = _decoded([tree for tree in trees if tree["kind"] == kind], decode)
            found[kind] = {k: v for k, v in (dict(held) | fresh).items() if k not in names}
        before = self._snapshot
        self._snapshot = replace(before, services=found["Service"], slices=found["EndpointSlice"])
        self._world, _ = build(self._snapshot, self._world)
        ledger = identities.allocate(self._world, EMPTY_LEDGER)
        desired = self._compiler.compile(self._world, ledger)
        self._publisher.publish(desired, ledger, triggers=triggers(before, self._snapshot))

    def cold(self) -> Compiled:
        """What a new operator makes of the same."""
        world, _ = build(self._snapshot)
        ledger = identities.allocate(world, EMPTY_LEDGER)
        desired = Compiler().compile(world, ledger)
        return Compiled(world, ledger, desired, publish.render(desired, ledger))

    def realise(self, *nodes: str) -> None:
        """A loader on these nodes, or all, once: what it did stays in force."""
        for node in nodes or NODES:
            subprocess.run([*self.command(node), "--once"], check=True, env=_environment())

    def start(self, node: str, *more: str) -> subprocess.Popen[bytes]:
        """A loader that stays."""
        return subprocess.Popen([*self.command(node), *more], env=_environment())

    def backends(self, node: str, vip: str, port: int = 80) -> set[str]:
        """Where the kernel of the node leads sockets that ask for the Service's TCP port."""
        asked = codec("tg_frontend_key").pack(addr=addr(vip), port=port, protocol=TCP)
        with ExitStack() as stack:
            frontends, slots, backends = (
                stack.enter_context(Map.open_pinned(str(self.pin_dir(node) / "maps" / name)))
                for name in ("frontends_v1", "slots_v1", "backends_v1")
            )
            try:
                row = codec("tg_frontend").unpack(frontends.lookup(asked))
            except KeyError:
                return set()
            ids = [slots.lookup(U32.pack(at)) for at in range(row.base, row.base + row.count)]
            found = [codec("tg_backend").unpack(backends.lookup(number)).addr for number in ids]
        return {str(ipaddress.IPv6Address(raw).ipv4_mapped) for raw in found}

    def command(self, node: str) -> list[str]:
        command = [sys.executable, "-m", "tidegate_loader", "--node", node, "--log-level"]
        command += ["warning", "--run-dir", str(self._run_dir), "--objects", str(OBJECTS)]
        command += ["--pin-dir", str(self.pin_dir(node)), "--cgroup", str(self.group)]
        return [*command, "--netns", str(self._site.space(node))]


def _environment() -> Mapping[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


@contextmanager
def tidegate(site: Site) -> Iterator[Tidegate]:
    mounted = mounts.cgroup2()
    assert mounted is not None, "no cgroup2 hierarchy is mounted"
    group = Path(mounted) / site.prefix
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tg-site-")))
        cgroups.create(group)
        stack.callback(cgroups.remove, group)
        (directory / "bpf").mkdir()
        bpffs.mount(str(directory / "bpf"))
        stack.callback(bpffs.unmount, str(directory / "bpf"))
        yield Tidegate(site, directory, group)
