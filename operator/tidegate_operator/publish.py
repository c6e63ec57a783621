"""Desired -> objects as the cluster stores them, and their files in a run directory.

`objects_of` and `render` are pure. `Publisher` writes only what differs from what is
there, each file by atomic rename, in an order in which a reader that stops anywhere
holds nothing that names what it cannot find.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

import msgspec
import yaml
from msgspec import UNSET
from tidegate_api import API_VERSION
from tidegate_api.state import (
    FORMAT,
    TABLES,
    Identity,
    IdentitySpec,
    IPCacheEntry,
    Meta,
    NodeState,
    NodeStateSpec,
    PeerSet,
    RuleSet,
    StateObject,
    StateSlice,
    StateSliceSpec,
    TableRef,
    digest,
    encode,
    shard_of,
    slice_name,
)

from tidegate_operator.compile import Desired, NodeContent
from tidegate_operator.identities import EMPTY_LEDGER, Ledger
from tidegate_operator.objects import IdentityKey
from tidegate_operator.problems import Problem

Table = Literal["ipcache", "services", "peers"]

MIN_SHARDS = 8
SHARD_ENTRIES = 2048
"""A table has the fewest shards, a power of two and at least MIN_SHARDS, that hold on average
no more keys than this: what one change makes every loader read again."""
FIRST_EPOCH = 1
TABLE_LABEL = "tidegate.dev/table"
RELEASED_LABEL = "tidegate.dev/released"
"""On an Identity that nothing uses: when it was released, on the ledger's own count."""

KIND_DIRECTORIES = {
    "Identity": "identities",
    "RuleSet": "rulesets",
    "StateSlice": "stateslices",
    "NodeState": "nodestates",
}


class PublishError(Exception):
    """The run directory could not be written. What was written before stands, and the
    next publish goes on from there."""


# ---- Objects ------------------------------------------------------------------------


def identity_object(number: int, key: IdentityKey, released: int | None = None) -> Identity:
    spec = (
        IdentitySpec(cidrs=list(key.cidrs))
        if key.cidrs
        else IdentitySpec(namespace=key.namespace, labels=dict(key.labels))
    )
    labels = {RELEASED_LABEL: str(released)} if released is not None else UNSET
    return Identity(
        api_version=API_VERSION,
        kind="Identity",
        metadata=Meta(name=str(number), labels=labels),
        spec=spec,
    )


def ledger_objects(ledger: Ledger) -> dict[int, Identity]:
    """number -> Identity, sorted by number."""
    found = {number: identity_object(number, key) for key, number in ledger.live.items()}
    for number, (key, count) in ledger.released.items():
        found[number] = identity_object(number, key, count)
    return dict(sorted(found.items()))


def ledger_of(identities: Iterable[Identity]) -> Ledger:
    """The ledger that `ledger_objects` wrote. Names that are no number are left out."""
    live: dict[IdentityKey, int] = {}
    released: dict[int, tuple[IdentityKey, int]] = {}
    for identity in identities:
        if not identity.metadata.name.isdigit():
            continue
        spec, number = identity.spec, int(identity.metadata.name)
        key = IdentityKey(
            spec.namespace or "",
            tuple(sorted((spec.labels or {}).items())),
            tuple(spec.cidrs or ()),
        )
        count = (identity.metadata.labels or {}).get(RELEASED_LABEL)
        if count is None:
            live[key] = number
        else:
            released[number] = (key, int(count))
    ordered = dict(sorted(released.items(), key=lambda item: item[1][1]))
    return Ledger(live, ordered, max((count for _, count in ordered.values()), default=0))


def shards_for(keys: int) -> int:
    """How many shards a table of so many keys needs."""
    shards = MIN_SHARDS
    while keys > shards * SHARD_ENTRIES:
        shards *= 2
    return shards


def slice_object(
    table: Table, place: tuple[int, int, int], revision: int, content: Mapping[str, Any]
) -> StateSlice:
    """One shard; `place` is (epoch, shard, shards), `content` key -> entry, for services
    key -> list of entries."""
    epoch, shard, shards = place
    entries: list[Any] = []
    for key in sorted(content):
        entries += content[key] if table == "services" else [content[key]]
    lists: dict[str, Any] = {table: entries}
    return StateSlice(
        api_version=API_VERSION,
        kind="StateSlice",
        metadata=Meta(name=slice_name(table, *place), labels={TABLE_LABEL: table}),
        spec=StateSliceSpec(
            format=FORMAT,
            table=table,
            epoch=epoch,
            shard=shard,
            shards=shards,
            revision=revision,
            **lists,
        ),
    )


def node_object(name: str, content: NodeContent, tables: Mapping[str, TableRef]) -> NodeState:
    """`tables`: with the revision without which the content cannot be applied."""
    return NodeState(
        api_version=API_VERSION,
        kind="NodeState",
        metadata=Meta(name=name),
        spec=NodeStateSpec(
            format=FORMAT,
            mode="Enforcing",
            endpoints=content.endpoints,
            rule_sets=content.rule_sets,
            peer_sets=content.peer_sets,
            tables=dict(tables),
        ),
    )


def render(desired: Desired, ledger: Ledger) -> list[StateObject]:
    """Every object, in publish order, as a first publish into an empty place writes them."""
    sizes = {
        "peers": len(desired.peers),
        "ipcache": len(desired.ipcache),
        "services": len(desired.services),
    }
    tables = {
        table: TableRef(
            epoch=FIRST_EPOCH,
            shards=shards_for(sizes[table]),
            min_revision=int(table == "peers"),
        )
        for table in TABLES
    }
    found: list[StateObject] = [*ledger_objects(ledger).values(), *desired.rule_sets.values()]
    found += _slices("peers", desired.peers)
    found += [node_object(name, content, tables) for name, content in desired.nodes.items()]
    found += _slices("ipcache", desired.ipcache)
    found += _slices("services", desired.services)
    return found


def _slices(table: Table, content: Mapping[str, Any]) -> list[StateSlice]:
    parts = _split(content, shards_for(len(content)))
    places = [(FIRST_EPOCH, shard, len(parts)) for shard in range(len(parts))]
    return [slice_object(table, place, 1, p) for place, p in zip(places, parts, strict=True)]


def _split(content: Mapping[str, Any], shards: int) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{} for _ in range(shards)]
    for key, entry in content.items():
        parts[shard_of(key, shards)][key] = entry
    return parts


def path_of(item: StateObject) -> str:
    """The object's file below `objects/`."""
    return f"{KIND_DIRECTORIES[item.kind]}/{item.metadata.name}.json"


def write_stream(
    desired: Desired, ledger: Ledger, stream: TextIO, form: Literal["yaml", "json"]
) -> None:
    """Write every object to `stream`: YAML documents, or one JSON List."""
    items = [msgspec.to_builtins(item) for item in render(desired, ledger)]
    if form == "json":
        whole = {"apiVersion": "v1", "kind": "List", "items": items}
        stream.write(msgspec.json.format(encode(whole), indent=2).decode() + "\n")
        return
    yaml.dump_all(items, stream, Dumper=_NoAliases, explicit_start=True, sort_keys=False, width=100)


class _NoAliases(yaml.CSafeDumper):
    """Equal lists are written out: an object must be readable by itself."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


# ---- The run directory -----------------------------------------------------------------

_T = TypeVar("_T", RuleSet, StateSlice, NodeState, Identity)


def read_ledger(run_dir: Path) -> Ledger:
    """The ledger of an earlier run; empty if there was none."""
    return ledger_of(_read_all(run_dir / "objects", Identity).values())


def _read_all(objects: Path, kind: type[_T]) -> dict[str, _T]:
    """name -> object for every readable file of `kind`. One that cannot be read or
    decoded counts as absent: it is written anew."""
    directory = objects / KIND_DIRECTORIES[kind.__name__]
    decoder = msgspec.json.Decoder(kind)
    found: dict[str, _T] = {}
    for path in sorted(directory.glob("*.json")):
        try:
            item = decoder.decode(path.read_bytes())
        except (OSError, msgspec.DecodeError):
            continue
        if item.metadata.name == path.name.removesuffix(".json"):
            found[item.metadata.name] = item
    return found


@dataclass
class _TableState:
    """One table as it is on disk: `shards[i]` is None until it was written."""

    content: dict[str, Any]
    shards: list[dict[str, Any] | None]
    revision: int
    epoch: int
    last_epoch: int
    """The newest that any file has, complete or not."""

    @property
    def ref(self) -> TableRef:
        return TableRef(epoch=self.epoch, shards=len(self.shards), min_revision=self.revision)


def _table_state(table: str, slices: Iterable[StateSlice]) -> _TableState:
    """The newest epoch that is complete: node states may name it, or the one before it. Of
    none, the newest; without any file, a table of no shards."""
    found: dict[tuple[int, int], dict[int, StateSlice]] = {}
    for item in slices:
        spec = item.spec
        if spec.table == table and item.metadata.name == slice_name(
            table, spec.epoch, spec.shard, spec.shards
        ):
            found.setdefault((spec.epoch, spec.shards), {})[spec.shard] = item
    if not found:
        return _TableState({}, [], 0, FIRST_EPOCH, 0)
    complete = [key for key, held in found.items() if len(held) == key[1]]
    epoch, shards = max(complete or found)
    revisions = [item.spec.revision for held in found.values() for item in held.values()]
    state = _TableState({}, [None] * shards, max(revisions), epoch, max(found)[0])
    for shard, item in found[epoch, shards].items():
        part = _content(item.spec)
        state.shards[shard] = part
        state.content.update(part)
    return state


def _content(spec: StateSliceSpec) -> dict[str, Any]:
    match spec.table:
        case "ipcache":
            return {entry.cidr: entry for entry in spec.ipcache or ()}
        case "peers":
            return {entry.name: entry for entry in spec.peers or ()}
        case "services":
            found: dict[str, Any] = {}
            for port in spec.services or ():
                found.setdefault(f"{port.namespace}/{port.name}", []).append(port)
            return found


class Publisher:
    """The only writer of `run_dir/objects`. Starts from what is there."""

    def __init__(self, run_dir: Path) -> None:
        self._objects = run_dir / "objects"
        slices = _read_all(self._objects, StateSlice)
        self._tables = {table: _table_state(table, slices.values()) for table in TABLES}
        self._slice_names = set(slices)
        self._nodes = {
            name: item.spec for name, item in _read_all(self._objects, NodeState).items()
        }
        self._rule_sets = {
            name
            for name, item in _read_all(self._objects, RuleSet).items()
            if digest(item.spec) == name
        }
        self._identities = _read_all(self._objects, Identity)
        self._ledger: Ledger | None = None
        self._problems: bytes | None = None
        self._changed: list[str] = []

    def publish(
        self, desired: Desired, ledger: Ledger, problems: Sequence[Problem] = ()
    ) -> tuple[str, ...]:
        """Make the directory hold `desired`; the paths written or removed, in order.

        Referents first: identities, rule sets and peer sets before the node states that
        name them, node states before the facts that use their identities. Removals
        reversed. An address that changes identity does so between two states of the peer
        sets: the first knows the old and the new number, the second only the new (DESIGN
        invariant 8). A table that has outgrown its shards is written anew beside them, as it
        was, before node states name it. Raises PublishError."""
        self._changed = []
        try:
            self._write_identities(ledger)
            self._write_rule_sets(desired.rule_sets)
            self._reshard("peers", desired.peers)
            self._reshard("ipcache", desired.ipcache)
            self._reshard("services", desired.services)
            self._write_table("peers", self._bridge(desired))
            self._write_nodes(desired.nodes)
            self._write_table("ipcache", desired.ipcache)
            self._write_table("services", desired.services)
            self._write_table("peers", desired.peers)
            self._remove_nodes(desired.nodes)
            self._remove_rule_sets(desired.rule_sets)
            self._remove_identities(ledger)
            self._remove_slices()
            self._write_problems(problems)
        except OSError as error:
            raise PublishError(f"cannot write {error.filename}: {error.strerror}") from error
        return tuple(self._changed)

    # ---- additions ----

    def _put(self, name: str, data: bytes) -> None:
        _write(self._objects / name, data)
        self._changed.append(name)

    def _drop(self, name: str) -> None:
        (self._objects / name).unlink(missing_ok=True)
        self._changed.append(name)

    def _write_identities(self, ledger: Ledger) -> None:
        if ledger is self._ledger:
            return
        before = self._ledger or EMPTY_LEDGER
        fresh = [
            identity_object(number, key)
            for key, number in ledger.live.items() - before.live.items()
        ]
        fresh += [
            identity_object(number, key, count)
            for number, (key, count) in ledger.released.items() - before.released.items()
        ]
        for item in sorted(fresh, key=lambda item: int(item.metadata.name)):
            if self._identities.get(item.metadata.name) != item:
                self._put(path_of(item), encode(item))
                self._identities[item.metadata.name] = item

    def _write_rule_sets(self, wanted: Mapping[str, RuleSet]) -> None:
        for name in wanted.keys() - self._rule_sets:
            self._put(path_of(wanted[name]), encode(wanted[name]))
            self._rule_sets.add(name)

    def _bridge(self, desired: Desired) -> dict[str, PeerSet]:
        """Peer sets between old and new: also those that node states on disk still name,
        and also members whose addresses ipcache is about to move."""
        held: dict[str, IPCacheEntry] = self._tables["ipcache"].content
        moving = {
            held[cidr].identity
            for cidr, entry in desired.ipcache.items()
            if cidr in held and held[cidr] is not entry and held[cidr].identity != entry.identity
        }
        peers: dict[str, PeerSet] = dict(desired.peers)
        for name, before in self._tables["peers"].content.items():
            now = peers.get(name)
            if now is None:
                peers[name] = before
            elif moving and now is not before:
                stay = moving.intersection(before.identities).difference(now.identities)
                if stay:
                    members = sorted(stay.union(now.identities))
                    peers[name] = msgspec.structs.replace(now, identities=members)
        return peers

    def _reshard(self, table: Table, wanted: Mapping[str, Any]) -> None:
        """Room for `wanted`. A table that shrank keeps its shards: small ones cost little."""
        state, shards = self._tables[table], shards_for(len(wanted))
        if not state.shards:
            state.shards = [None] * shards
        if shards <= len(state.shards):
            return
        epoch, revision = state.last_epoch + 1, state.revision + 1
        # What a lost shard held is not known: what it should hold, or addresses would go.
        content = state.content if None not in state.shards else {**wanted, **state.content}
        parts = _split(content, shards)
        for shard, part in enumerate(parts):
            self._put_slice(slice_object(table, (epoch, shard, shards), revision, part))
        self._tables[table] = _TableState(content, [*parts], revision, epoch, epoch)

    def _put_slice(self, item: StateSlice) -> None:
        self._put(path_of(item), encode(item))
        self._slice_names.add(item.metadata.name)

    def _write_table(self, table: Table, wanted: Mapping[str, Any]) -> None:
        state = self._tables[table]
        shards = len(state.shards)
        parts: dict[int, dict[str, Any]] = {}
        for key in _differing(state.content, wanted):
            shard = shard_of(key, shards)
            part = parts.setdefault(shard, dict(state.shards[shard] or {}))
            if key in wanted:
                part[key] = wanted[key]
            else:
                part.pop(key, None)
        for shard, held in enumerate(state.shards):
            if held is None:
                parts.setdefault(shard, {})
        revision = state.revision + 1
        for shard in sorted(parts):
            place = (state.epoch, shard, shards)
            self._put_slice(slice_object(table, place, revision, parts[shard]))
            state.revision = revision
            for key in state.shards[shard] or ():
                state.content.pop(key, None)
            state.content.update(parts[shard])
            state.shards[shard] = parts[shard]
        # Equal to what is there, but the very objects that the next diff will compare.
        state.content = dict(wanted)

    def _write_nodes(self, wanted: Mapping[str, NodeContent]) -> None:
        tables = {table: self._tables[table].ref for table in TABLES}
        for name, content in wanted.items():
            held = self._nodes.get(name)
            if held is not None and _says(held, content, tables):
                continue
            item = node_object(name, content, tables)
            self._put(path_of(item), encode(item))
            self._nodes[name] = item.spec

    def _write_problems(self, problems: Sequence[Problem]) -> None:
        data = encode(list(problems))
        if data != self._problems:
            self._put("problems.json", data)
            self._problems = data

    # ---- removals ----

    def _remove_nodes(self, wanted: Mapping[str, NodeContent]) -> None:
        for name in sorted(self._nodes.keys() - wanted.keys()):
            self._drop(f"nodestates/{name}.json")
            del self._nodes[name]

    def _remove_rule_sets(self, wanted: Mapping[str, RuleSet]) -> None:
        for name in sorted(self._rule_sets - wanted.keys()):
            self._drop(f"rulesets/{name}.json")
            self._rule_sets.discard(name)

    def _remove_identities(self, ledger: Ledger) -> None:
        if ledger is self._ledger:
            return
        keep = {str(number) for number in (*ledger.live.values(), *ledger.released)}
        for name in sorted(self._identities.keys() - keep):
            self._drop(f"identities/{name}.json")
            del self._identities[name]
        self._ledger = ledger

    def _remove_slices(self) -> None:
        ours = {
            slice_name(table, state.epoch, shard, len(state.shards))
            for table, state in self._tables.items()
            for shard in range(len(state.shards))
        }
        for name in sorted(self._slice_names - ours):
            self._drop(f"stateslices/{name}.json")
        self._slice_names &= ours


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    absent = object()
    found = {
        key
        for key, entry in now.items()
        if (held := before.get(key, absent)) is not entry and held != entry
    }
    found.update(before.keys() - now.keys())
    return found


def _says(spec: NodeStateSpec, content: NodeContent, tables: Mapping[str, TableRef]) -> bool:
    return (
        spec.format == FORMAT
        and spec.mode == "Enforcing"
        and spec.endpoints == content.endpoints
        and spec.rule_sets == content.rule_sets
        and spec.peer_sets == content.peer_sets
        and spec.tables.keys() == tables.keys()
        and all(
            (ref.epoch, ref.shards) == (tables[table].epoch, tables[table].shards)
            for table, ref in spec.tables.items()
        )
    )
