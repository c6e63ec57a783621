"""The whole way on a bench: documents -> operator -> loader -> pinned maps -> programs.

The product's parts at their published borders, and nothing between them. Programs are loaded and
pinned by the loader's code, attached to nothing, and run by hand in a network namespace that has
the interface numbers a node needs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from support.ca_maps import Answer
from support.clusters import Manifest, Manifests, documents, pod_key
from support.lab import BUILD, DROP
from tidegate_api.state import NodeState, PeerSet, RuleSet, StateObject, StateSlice, digest
from tidegate_bpf import LoadedObject, ObjectFile, Program, SkbContext, bpffs, netns
from tidegate_loader import apply, attach, kernel, maps, plan
from tidegate_loader.local import LocalInterface
from tidegate_operator import identities, publish, world
from tidegate_operator.compile import Compiler, Desired
from tidegate_operator.identities import EMPTY_LEDGER, Ledger
from tidegate_operator.manifests import Folder
from tidegate_operator.objects import Pod, World
from tidegate_operator.world import EMPTY_WORLD

FIRST_IFINDEX, INTERFACES = 100, 16
OUTSIDE = 1
"""Any other interface: the packet came from outside the node."""
_serial = itertools.count()


# ---- the operator -------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    world: World
    ledger: Ledger
    desired: Desired
    objects: list[StateObject]

    def state(self, node: str) -> maps.State:
        """What the node's loader reads."""
        by_kind: dict[type, list[Any]] = {}
        for item in self.objects:
            by_kind.setdefault(type(item), []).append(item)
        slices: dict[str, list[StateSlice]] = {}
        for item in by_kind[StateSlice]:
            slices.setdefault(item.spec.table, []).append(item)
        peers: list[PeerSet] = [p for s in slices["peers"] for p in s.spec.peers]  # type: ignore[union-attr]
        named = next(n for n in by_kind[NodeState] if n.metadata.name == node)
        rule_sets = {r.metadata.name: r for r in by_kind.get(RuleSet, [])}
        return maps.State(
            node=named,
            digest=digest(named.spec),
            rule_sets={name: rule_sets[name] for name in named.spec.rule_sets},
            peers={p.name: p for p in peers},
            ipcache=tuple(slices["ipcache"]),
            services=tuple(slices["services"]),
        )

    def interfaces(self, node: str) -> dict[str, LocalInterface]:
        """The node's pods on the bench's interfaces, in order of UID."""
        found = {}
        pods = [p for p in self.world.pods.values() if p.node == node and not p.host_network]
        for number, pod in enumerate(sorted(pods, key=lambda p: p.uid), FIRST_IFINDEX):
            found[pod.uid] = interface(pod, number)
        return found


def interface(pod: Pod, number: int) -> LocalInterface:
    """The pod on the bench's interface `number`."""
    return LocalInterface(
        uid=pod.uid,
        namespace=pod.namespace,
        name=pod.name,
        ifname=f"tgh{number}",
        ifindex=number,
        pod_mac=f"02:00:00:00:00:{number:02x}",
        host_mac=f"02:00:00:00:01:{number:02x}",
        addresses=list(pod.addresses),
    )


class Operator:
    """A folder and what the operator remembers of it; a new one starts from scratch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read = Folder(folder)
        self._compiler = Compiler()
        self._world, self._ledger = EMPTY_WORLD, EMPTY_LEDGER

    def step(self, wanted: Sequence[Manifest]) -> Compiled:
        """`wanted` as the folder's one file, compiled. Every document must be a valid one."""
        write(self.folder, wanted)
        read = self._read.read()
        errors = [p for p in read.problems if p.severity == "error"]
        assert not errors, errors
        self._world, _ = world.build(read.documents, world.DEFAULTS, self._world)
        self._ledger = identities.allocate(self._world, self._ledger)
        desired = self._compiler.compile(self._world, self._ledger)
        objects = publish.render(desired, self._ledger)
        return Compiled(self._world, self._ledger, desired, objects)


def write(folder: Path, wanted: Sequence[Manifest]) -> None:
    """By rename, as editors save."""
    temporary = folder / ".all.tmp"
    temporary.write_text(yaml.dump_all(wanted, Dumper=_Dumper, sort_keys=False))
    temporary.rename(folder / "all.yaml")


class _Dumper(yaml.CSafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def compile_cluster(folder: Path, cluster: Manifests) -> Compiled:
    return Operator(folder).step(documents(cluster))


def oracle_cluster(cluster: Manifests, made: Compiled) -> dict[str, Any]:
    """The cluster with the places and addresses that the product gave its pods."""
    pods = {str(name): pod for name, pod in made.world.pods.items()}
    assert pods.keys() == {pod_key(pod) for pod in cluster["pods"]}
    return cluster | {  # type: ignore[return-value]
        "addresses": {key: list(pod.addresses) for key, pod in pods.items()},
        "nodes": {key: pod.node for key, pod in pods.items()},
    }


# ---- nodes --------------------------------------------------------------------------


@contextlib.contextmanager
def bench(
    directory: Path, nodes: Sequence[str] = ("node-1", "node-2")
) -> Iterator[dict[str, Node]]:
    """Nodes with pin directories of their own, this thread in the namespace of their
    interfaces; gone after the block."""
    with namespace(), mounted(directory / "bpf") as pins:
        made = {name: Node(pins / name) for name in nodes}
        try:
            yield made
        finally:
            for node in made.values():
                node.close()


@contextlib.contextmanager
def mounted(directory: Path) -> Iterator[Path]:
    directory.mkdir()
    bpffs.mount(directory)
    try:
        yield directory
    finally:
        bpffs.unmount(directory)


@contextlib.contextmanager
def namespace() -> Iterator[None]:
    """This thread in a namespace of its own, with INTERFACES from FIRST_IFINDEX on."""
    name = f"tgH-{os.getpid()}-{next(_serial)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        for index in range(FIRST_IFINDEX, FIRST_IFINDEX + INTERFACES):
            link = f"link add tgh{index} index {index} type veth peer name tgp{index}"
            subprocess.run(["ip", "-n", name, *link.split()], check=True)
        with netns.inside(f"/run/netns/{name}"):
            yield
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


class Node:
    """One node's loader, taken apart, and its programs: those in force and their dry-run copy."""

    def __init__(self, pin_dir: Path) -> None:
        self.pin_dir = pin_dir
        spec = ObjectFile(BUILD / "pod.o")
        self.programs: Mapping[str, Program] = attach.Programs(BUILD, pin_dir, {}).programs
        self.loader = Bookkeeper(pin_dir, spec)
        pins = {name: str(pin_dir / "maps" / name) for name in spec.maps if name != "scratch"}
        self.dry: LoadedObject = spec.load(pins=pins, rodata={"dry_run": 1})

    def close(self) -> None:
        self.dry.close()
        self.loader.close()
        for program in self.programs.values():
            program.close()

    def judge(
        self, program: str, frame: bytes, ifindex: int, *, host: bool = False
    ) -> tuple[Answer, int]:
        """What the dry-run copy says of a new flow's first packet, and its reason."""
        context = SkbContext(ifindex=ifindex, ingress_ifindex=0 if host else OUTSIDE)
        result = self.dry.programs[program].test_run(frame, context, data_out_size=0)
        after = SkbContext.from_buffer_copy(result.ctx_out)
        cb = after.cb
        sides = ((cb[1], _signed(cb[2])), (cb[3], _signed(cb[4])))
        audits = (cb[0] >> 8 & 0xFF, cb[0] >> 16 & 0xFF)
        passed = result.retval != DROP
        return Answer(passed, *sides, audits, _signed(after.priority)), cb[0] & 0xFF

    def passes(self, program: str, frame: bytes, ifindex: int, *, host: bool = False) -> bool:
        """Whether the program in force lets the packet through."""
        context = SkbContext(ifindex=ifindex, ingress_ifindex=0 if host else OUTSIDE)
        result = self.programs[program].test_run(frame, context, data_out_size=0)
        return result.retval != DROP

    def rule_set_name(self, number: int) -> str:
        return self.loader.actual.rule_sets[number].name


def _signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


class Bookkeeper:
    """One node's maps, build, plan and apply, over pins that are there."""

    def __init__(self, pin_dir: Path, spec: ObjectFile) -> None:
        self.kernel = kernel.Kernel(pin_dir, kernel.Layouts(spec))
        self.actual = self.kernel.actual(None, {})
        self.builder = maps.Builder()

    def close(self) -> None:
        self.kernel.close()

    def apply(
        self,
        state: maps.State,
        interfaces: Mapping[str, LocalInterface],
        uplinks: maps.Uplinks = maps.Uplinks(),  # noqa: B008 - frozen
    ) -> plan.Plan:
        """One cycle of the loader; afterwards nothing is left to do."""
        desired = self.builder.build(state, interfaces, uplinks)
        self.actual.now = kernel.now()
        made = plan.plan(desired, self.actual)
        assert made.problems == ()
        errors = apply.apply(made, self.kernel, self.actual)
        assert errors == []
        left = plan.plan(desired, self.actual).steps
        assert left == (), left
        self.actual.ipcache_parts, self.actual.service_parts = desired.ipcache, desired.services
        return made


@contextlib.contextmanager
def from_scratch(pin_dir: Path) -> Iterator[Bookkeeper]:
    """New maps and no programs; gone after the block."""
    for name in ("maps", "rule_sets", "cidrs", "half_open"):
        (pin_dir / name).mkdir(parents=True)
    spec = ObjectFile(BUILD / "pod.o")
    with spec.load(autoload=set()) as loaded:
        for name in spec.maps:
            loaded.maps[name].pin(str(pin_dir / "maps" / name))
    made = Bookkeeper(pin_dir, spec)
    try:
        yield made
    finally:
        made.close()
        for path in sorted(pin_dir.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        pin_dir.rmdir()
