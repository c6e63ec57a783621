"""What lies in a node's part of the run directory, as types.

`LocalInterface` is written by the CNI step (on one machine: by `tidegate up`)
and read by the loader; `Realised` is written by the loader and read by the
CLI. Types and their bytes only: no watching, no kernel.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
from msgspec import UNSET, UnsetType
from tidegate_api.state import FORMAT, NEWEST_FORMAT, Model, NodeStateStatus, encode

READS_FORMATS = tuple(range(FORMAT, NEWEST_FORMAT + 1))
"""The `spec.format`s that this loader understands."""


class LocalInterface(Model, frozen=True):
    """nodes/<node>/interfaces/<uid>.json: what the node knows of a pod first."""

    uid: str
    namespace: str
    name: str
    ifname: str
    """Host side of the pod's veth pair, in the node's network namespace."""
    ifindex: int
    pod_mac: str
    """Six hex pairs with colons: the pod's end."""
    host_mac: str
    addresses: list[str]
    adopted: bool = False
    """It ran before there was a gate: it is not gated until its NodeState names it."""


class RealisedEndpoint(Model, frozen=True):
    """One endpoint of the node table in force."""

    id: int
    ifindex: int
    half_open: int
    """Slot in half_open_v2, and the name of the pin in half_open/."""
    namespace: str
    name: str
    identity: int
    addresses: list[str]
    ingress: int | UnsetType = UNSET
    """Rule-set id; absent: no policy selects it in this direction."""
    egress: int | UnsetType = UNSET


class RealisedRuleSet(Model, frozen=True):
    """A rule set in force; its key in `Realised.rule_sets` is its id."""

    name: str
    """Name of the RuleSet object, whose `spec.rules` the rule ids index."""
    content: str
    slot: int


class Counters(Model, frozen=True):
    drift: int = 0
    """Entries found changed behind the loader's back and repaired."""
    switches: int = 0
    """Node tables put in force."""
    left_out: int = 0
    """Entries for which a map has no room now: what they would allow is not allowed."""


class Programming(Model, frozen=True):
    """How long changes of endpoints took until they were in force here: the Kubernetes SLI "network
    programming latency", from the time that their EndpointSlice says to that of the read-back."""

    counts: list[int] = msgspec.field(default_factory=list)
    """Of each bucket of `programming.BUCKETS`, and of what is above all of them."""
    seconds: float = 0.0
    """Of all of them."""


class Realised(Model, frozen=True):
    """nodes/<node>/realised.json: what was read back from the kernel, by name."""

    node: str
    epoch: int
    instance: int = 0
    """Kernel id of control_v1: ids below mean something only beside these very maps."""
    endpoints: dict[str, RealisedEndpoint] = msgspec.field(default_factory=dict)
    """By pod UID."""
    rule_sets: dict[str, RealisedRuleSet] = msgspec.field(default_factory=dict)
    """By decimal id."""
    services: dict[str, str] = msgspec.field(default_factory=dict)
    """Frontend "address:port/protocol" -> "namespace/name[:port name]"."""
    objects: dict[str, str] = msgspec.field(default_factory=dict)
    """Loaded object file -> hash of its content."""
    counters: Counters = Counters()
    programming: Programming | UnsetType = UNSET
    """Absent until a change was measured; since the loader started."""
    digest: str | UnsetType = UNSET
    """Digest of the NodeState spec in force; absent until one was equal."""
    peer_sets: str | UnsetType = UNSET
    """Digest of the peer sets in force beside it."""
    status: NodeStateStatus = NodeStateStatus()


class NodePaths:
    """The node's paths in the run directory, named once."""

    def __init__(self, run_dir: Path, node: str) -> None:
        self.objects = run_dir / "objects"
        self.node = run_dir / "nodes" / node
        self.interfaces = self.node / "interfaces"
        self.lastgood = self.node / "lastgood"
        self.loaded = self.node / "loaded"
        """The objects whose maps are pinned: who comes after them reads their layouts there."""
        self.realised = self.node / "realised.json"
        self.applying = self.node / "applying"
        """Exists while an apply is under way: its epoch may not be bumped yet."""
        self.enforcing = self.node / "enforcing"
        """Exists from the first state in force until the node is detached, reboots included:
        while it does, and no programs are loaded, the CNI step lets no pod start."""
        self.detached = self.node / "detached"
        """Exists while nothing is enforced here on purpose."""


def leave(paths: NodePaths) -> None:
    """Remove what a detached node's loader keeps, but for the word that it is detached."""
    shutil.rmtree(paths.objects, ignore_errors=True)
    for path in paths.node.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != paths.detached:
            path.unlink()


def write_atomic(path: Path, data: bytes) -> None:
    """A reader sees the old file or the new one."""
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_bytes(data)
    os.replace(temporary, path)


class RealisedFile:
    """Written when it changes. The Services' names are most of it and seldom do: they are
    encoded when they are others."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: Realised | None = None
        self._names: tuple[dict[str, str], msgspec.Raw] = ({}, msgspec.Raw(b"{}"))

    def write(self, realised: Realised) -> None:
        """OSError."""
        if realised == self._written:
            return
        if realised.services is not self._names[0]:
            self._names = (realised.services, msgspec.Raw(encode(realised.services)))
        names = zip(realised.__struct_fields__, realised.__struct_encode_fields__, strict=True)
        fields = {name: getattr(realised, field) for field, name in names}
        said = {name: value for name, value in fields.items() if value is not UNSET}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, encode(said | {"services": self._names[1]}))
        self._written = realised


def read_realised(path: Path) -> Realised | None:
    """None: never written, or not readable as one (then ids have no names and
    endpoints get new ones; nothing worse)."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Realised)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None
