"""Where the node's desired state comes from: a run directory, read whole or not at all.

Nothing missing, deleted, empty or unreadable moves the node: `Source.state`
raises Stalled and the caller keeps what it has. May not live here: what the
state means for maps, and anything of the kernel.
"""

from __future__ import annotations

import contextlib
import operator
import os
from collections.abc import Collection
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
from msgspec import UNSET, UnsetType
from tidegate_api.state import (
    TABLES,
    NodeState,
    NodeStateSpec,
    PeerSet,
    RuleSet,
    StateSlice,
    TableRef,
    digest,
    slice_name,
)

from tidegate_loader.local import (
    READS_FORMATS,
    LocalInterface,
    NodePaths,
    write_atomic,
)
from tidegate_loader.maps import State, set_names

Stamp = tuple[int, int, int]
READS = 5
"""Attempts to read addresses while no peer set changes."""


class Stalled(Exception):
    """The desired state cannot be taken over; `reason` is a condition's reason."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


_T = TypeVar("_T")


class _PeekedMeta(msgspec.Struct):
    generation: int | UnsetType = UNSET


class _PeekedSpec(msgspec.Struct):
    format: int | UnsetType = UNSET


class _Peeked(msgspec.Struct):
    """What may be known of an object that is not understood."""

    metadata: _PeekedMeta = msgspec.field(default_factory=_PeekedMeta)
    spec: _PeekedSpec = msgspec.field(default_factory=_PeekedSpec)


_peek_decoder = msgspec.json.Decoder(_Peeked)


class _Files(Generic[_T]):
    """Decoded files of one type, read again only when their stamp changes."""

    def __init__(self, kind: type[_T]) -> None:
        self._decoder = msgspec.json.Decoder(kind)
        self._held: dict[str, tuple[Stamp, _T]] = {}
        self.fresh: set[str] = set()
        """Paths that were decoded since somebody cleared this."""

    def get(self, path: str) -> _T:
        """Stalled: not there, or not one of these."""
        try:
            info = os.stat(path)
            stamp = (info.st_mtime_ns, info.st_size, info.st_ino)
            held = self._held.get(path)
            if held is None or held[0] != stamp:
                with open(path, "rb") as file:
                    held = (stamp, self._decoder.decode(file.read()))
                self._held[path] = held
                self.fresh.add(path)
        except FileNotFoundError:
            raise Stalled("Missing", f"{_short(path)} is not there") from None
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            number = _peek(path).spec.format
            if number is not UNSET:
                # Of a later format: that it has unknown fields is no news.
                _check_format(_short(path), number)
            raise Stalled("Unreadable", f"{_short(path)}: {error}") from error
        return held[1]

    def stamp(self, path: str) -> Stamp | None:
        """The stamp of what was last decoded from there."""
        held = self._held.get(path)
        return held[0] if held else None

    def keep_only(self, paths: set[str]) -> None:
        for path in self._held.keys() - paths:
            del self._held[path]


def _short(path: str) -> str:
    """The last two parts of a path."""
    return "/".join(path.split("/")[-2:])


def _peek(path: str) -> _Peeked:
    """Nothing is known of what is not there, or no object at all."""
    try:
        with open(path, "rb") as file:
            return _peek_decoder.decode(file.read())
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return _Peeked()


_AnyFiles = _Files[NodeState] | _Files[RuleSet] | _Files[StateSlice]


class _Listed:
    """The shards of a table, as they were read last."""

    def __init__(self, root: str, table: str, ref: TableRef) -> None:
        self.epoch, self.shards = ref.epoch, ref.shards
        names = [slice_name(table, ref.epoch, n, ref.shards) for n in range(ref.shards)]
        self.places = [(name, f"{root}/stateslices/{name}.json") for name in names]
        self.number = {name: shard for shard, name in enumerate(names)}
        self.held: dict[int, StateSlice] = {}
        """Shard -> what it holds, each of them checked: none, or all in order."""
        self.items: tuple[StateSlice, ...] = ()
        """The same."""
        self.unread: set[int] = set()
        """Shards whose files were written since: all others hold what they held."""
        self.newest = 0


class Source:
    """Reads one node's state and interfaces."""

    def __init__(self, paths: NodePaths, node: str) -> None:
        self._paths = paths
        self._name = node
        self._nodes = _Files(NodeState)
        self._rule_sets = _Files(RuleSet)
        self._slices = _Files(StateSlice)
        self._interfaces = _Files(LocalInterface)
        self._copied: dict[str, Stamp] = {}
        self._named: tuple[NodeState, dict[str, _AnyFiles]] | None = None
        """The last NodeState that `_files` was asked about, and what it said."""
        self._kept: NodeState | None = None
        """Of the state that `keep` has copied last."""
        self._listed: dict[tuple[str, str], _Listed] = {}
        """Root and table → its shards as they were read last."""
        self._told = False
        """Who writes the files being read has said which it has written."""
        self._verified: dict[str, RuleSet] = {}
        self._peers: tuple[tuple[StateSlice, ...], dict[str, PeerSet]] | None = None
        self._last: State | None = None
        self._known: dict[str, LocalInterface] = {}
        self.generation: int | UnsetType = UNSET
        """Of the newest NodeState looked at, taken over or not."""

    def state(self, written: Collection[str] | None = None) -> State:
        """The complete desired state; the same object while nothing it names changed.
        `written`: of all shards only these (relative to objects/) may be others than when this
        was called before; None: any. It is remembered for as long as they cannot be read.
        Stalled: it is incomplete, of an unknown format or unreadable."""
        root = str(self._paths.objects)
        self._note(root, written)
        try:
            found = self._read(root)
        except Stalled:
            self.generation = _peek(f"{root}/nodestates/{self._name}.json").metadata.generation
            raise
        finally:
            self._told = False
        self.generation = found.node.metadata.generation
        return found

    def _note(self, root: str, written: Collection[str] | None) -> None:
        self._told = written is not None
        names = {Path(file).stem for file in written or ()}
        for (where, _), listed in self._listed.items():
            if where == root:
                fresh = listed.number.keys() & names if self._told else listed.number
                listed.unread.update(listed.number[name] for name in fresh)

    def is_detached(self) -> bool:
        """Whether the newest NodeState that can be read says so."""
        for root in (self._paths.objects, self._paths.lastgood):
            with contextlib.suppress(Stalled):
                node = self._nodes.get(f"{root}/nodestates/{self._name}.json")
                return node.spec.mode == "Detached"
        return False

    def last_good(self) -> State:
        """The state that `keep` last copied. Stalled: there is none."""
        return self._read(str(self._paths.lastgood))

    def _read(self, root: str) -> State:
        node = self._nodes.get(f"{root}/nodestates/{self._name}.json")
        spec = node.spec
        _check_format(self._name, spec.format)
        rule_sets = {name: self._rule_set(root, name) for name in spec.rule_sets}
        tables = self._tables(root, spec)
        last = self._last
        if (
            last is not None
            and last.node is node
            and _identical(last.ipcache, tables["ipcache"])
            and _identical(last.services, tables["services"])
            and self._peers is not None
            and _identical(self._peers[0], tables["peers"])
        ):
            return last
        peers = self._peer_sets(tables["peers"])
        _check_references(node, rule_sets, peers)
        same_spec = last is not None and last.node is node
        self._last = State(
            node=node,
            digest=last.digest if last is not None and same_spec else digest(spec),
            rule_sets=rule_sets,
            peers=peers,
            ipcache=tables["ipcache"],
            services=tables["services"],
        )
        return self._last

    def _rule_set(self, root: str, name: str) -> RuleSet:
        found = self._rule_sets.get(f"{root}/rulesets/{name}.json")
        if self._verified.get(name) is not found:
            _check_format(name, found.spec.format)
            if not found.metadata.name == name == digest(found.spec):
                raise Stalled("Unverified", f"rulesets/{name}.json: the name is not its content's")
            self._verified[name] = found
        return found

    def _tables(self, root: str, spec: NodeStateSpec) -> dict[str, tuple[StateSlice, ...]]:
        """The peer sets are those of before and after the addresses were read: an address may
        move only to a number that they know, and they lose the old one only afterwards."""
        refs = spec.tables
        peers = self._table(root, "peers", refs.get("peers"))
        for _ in range(READS):
            found = {t: self._table(root, t, refs.get(t)) for t in TABLES if t != "peers"}
            before, peers = peers, self._table(root, "peers", refs.get("peers"))
            if _identical(before, peers):
                return {**found, "peers": peers}
        raise Stalled("Incomplete", "the peer sets change faster than they can be read")

    def _table(self, root: str, table: str, ref: TableRef | None) -> tuple[StateSlice, ...]:
        if ref is None:
            raise Stalled("Missing", f"the NodeState names no table {table}")
        last = self._listed.get((root, table))
        if last is None or (last.epoch, last.shards) != (ref.epoch, ref.shards):
            last = _Listed(root, table, ref)
        self._reread(last, table, ref)
        self._listed[root, table] = last
        if not last.items or last.newest < ref.min_revision:
            raise Stalled(
                "Incomplete",
                f"table {table} is at revision {last.newest}, not yet {ref.min_revision}",
            )
        return last.items

    def _reread(self, last: _Listed, table: str, ref: TableRef) -> None:
        """Stalled: one of them is not there, or not what its name says; none is taken over."""
        shards = sorted(last.unread) if self._told and last.items else range(ref.shards)
        fresh: dict[int, StateSlice] = {}
        for shard in shards:
            name, path = last.places[shard]
            item = self._slices.get(path)
            if item is not last.held.get(shard):
                _check_shard(name, item, table, ref, shard)
                fresh[shard] = item
        if fresh:
            last.held.update(fresh)
            last.items = tuple(last.held.values())
            newest = max(item.spec.revision for item in fresh.values())
            older = newest < last.newest  # one was put back: what was the newest may be gone
            among = last.items if older else ()
            last.newest = max((item.spec.revision for item in among), default=newest)
        last.unread.clear()

    def _peer_sets(self, slices: tuple[StateSlice, ...]) -> dict[str, PeerSet]:
        if self._peers is None or not _identical(self._peers[0], slices):
            listed = (peer for item in slices for peer in item.spec.peers or [])
            self._peers = (slices, {peer.name: peer for peer in listed})
        return self._peers[1]

    def interfaces(self) -> tuple[dict[str, LocalInterface], list[str]]:
        """(by UID, what could not be read). A directory that vanished is what it was last."""
        try:
            names = [n for n in os.listdir(self._paths.interfaces) if is_object(n)]
        except FileNotFoundError:
            return self._known, ["the interfaces directory is not there"]
        found: dict[str, LocalInterface] = {}
        problems: list[str] = []
        paths = {name: f"{self._paths.interfaces}/{name}" for name in sorted(names)}
        for name, path in paths.items():
            try:
                interface = self._interfaces.get(path)
                found[interface.uid] = interface
            except Stalled as error:
                uid = name.removesuffix(".json")
                if uid in self._known and error.reason != "Missing":
                    found[uid] = self._known[uid]
                problems.append(str(error))
        self._interfaces.keep_only(set(paths.values()))
        if found != self._known:
            self._known = found
        return self._known, problems

    def keep(self, state: State) -> None:
        """Copy the objects of `state` to lastgood/, the NodeState last, then drop the rest."""
        named = self._files(state)
        source, target = str(self._paths.objects), str(self._paths.lastgood)
        same = self._kept is state.node
        kinds: tuple[_AnyFiles, ...] = (self._rule_sets, self._slices, self._nodes)
        if same:  # these files and no others, of which those that were not read again are copied
            fresh = (path.removeprefix(f"{source}/") for kind in kinds for path in kind.fresh)
            changed = {relative: named[relative] for relative in fresh if relative in named}
        else:
            changed = named
        for relative, files in changed.items():
            stamp = files.stamp(f"{source}/{relative}")
            if stamp is None or self._copied.get(relative) != stamp:
                _copy(f"{source}/{relative}", f"{target}/{relative}")
                if stamp is not None:
                    self._copied[relative] = stamp
        for kind in kinds:
            kind.fresh.clear()
        if not same:
            self._drop_all_but(named, source, target)
            self._kept = state.node
        self._verified = dict(state.rule_sets)

    def _drop_all_but(self, named: dict[str, _AnyFiles], source: str, target: str) -> None:
        for name in ("rulesets", "stateslices", "nodestates"):
            with contextlib.suppress(FileNotFoundError):
                for file in os.listdir(f"{target}/{name}"):
                    if f"{name}/{file}" not in named:
                        os.unlink(f"{target}/{name}/{file}")
        self._copied = {r: s for r, s in self._copied.items() if r in named}
        current = {f"{root}/{relative}" for relative in named for root in (source, target)}
        for kind in (self._nodes, self._rule_sets, self._slices):
            kind.keep_only(current)

    def names(self, state: State) -> frozenset[str]:
        """The files that make up a state, relative to objects/."""
        return frozenset(self._files(state))

    def _files(self, state: State) -> dict[str, _AnyFiles]:
        """Every file of a state, in the order of publishing, with who reads it."""
        if self._named is None or self._named[0] is not state.node:
            self._named = (state.node, self._named_by(state.node.spec))
        return self._named[1]

    def _named_by(self, spec: NodeStateSpec) -> dict[str, _AnyFiles]:
        return {
            **{f"rulesets/{name}.json": self._rule_sets for name in spec.rule_sets},
            **{
                f"stateslices/{slice_name(table, ref.epoch, shard, ref.shards)}.json": self._slices
                for table, ref in spec.tables.items()
                if table in TABLES
                for shard in range(ref.shards)
            },
            f"nodestates/{self._name}.json": self._nodes,
        }


def _check_shard(name: str, item: StateSlice, table: str, ref: TableRef, shard: int) -> None:
    spec = item.spec
    _check_format(name, spec.format)
    if (spec.table, spec.epoch, spec.shard, spec.shards) != (
        table,
        ref.epoch,
        shard,
        ref.shards,
    ) or getattr(spec, table) is msgspec.UNSET:
        raise Stalled("Unverified", f"stateslices/{name}.json: the name is not its content's")


def _check_format(name: str, number: int) -> None:
    if number not in READS_FORMATS:
        words = ", ".join(map(str, READS_FORMATS))
        raise Stalled("UnknownFormat", f"{name} has format {number}; this loader reads {words}")


def _check_references(
    node: NodeState, rule_sets: dict[str, RuleSet], peers: dict[str, PeerSet]
) -> None:
    for endpoint in node.spec.endpoints:
        for name in (endpoint.ingress, endpoint.egress):
            if name is not msgspec.UNSET and name not in rule_sets:
                raise Stalled(
                    "Incomplete", f"endpoint {endpoint.uid} uses unlisted rule set {name}"
                )
    wanted = {name for rule_set in rule_sets.values() for name in set_names(rule_set)}
    missing = sorted((wanted | set(node.spec.peer_sets)) - peers.keys())
    if missing:
        raise Stalled("Incomplete", f"peer set {missing[0]} is in no shard of the table peers")


def _identical(one: tuple[object, ...], two: tuple[object, ...]) -> bool:
    return one is two or (len(one) == len(two) and all(map(operator.is_, one, two)))


def is_object(name: str) -> bool:
    return name.endswith(".json") and not name.startswith(".")


def _copy(source: str, target: str) -> None:
    """Atomic; skipped when time and size say that the copy is the source's."""
    info = os.stat(source)
    try:
        held = os.stat(target)
        if (held.st_mtime_ns, held.st_size) == (info.st_mtime_ns, info.st_size):
            return
    except FileNotFoundError:
        os.makedirs(os.path.dirname(target), exist_ok=True)
    path = Path(target)
    write_atomic(path, Path(source).read_bytes())
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
