"""Desired -> objects as they are stored, and the order in which they are.

`render` is pure. `Publisher` writes only what differs from what is there, in an order in
which a reader that stops anywhere holds nothing that names what it cannot find; where it
writes to, and how, is the store's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import msgspec
import yaml
from msgspec import UNSET, UnsetType
from tidegate_api import API_VERSION
from tidegate_api.service import format_of
from tidegate_api.state import (
    DIGEST_ANNOTATION,
    FIRST_IDENTITY,
    FORMAT,
    NEWEST_FORMAT,
    TABLES,
    TRIGGER_ANNOTATION,
    Identity,
    IdentitySpec,
    IPCacheEntry,
    Masquerade,
    Meta,
    NodeState,
    NodeStateSpec,
    OwnerReference,
    PeerSet,
    RuleSet,
    StateObject,
    StateSlice,
    StateSliceSpec,
    TableRef,
    digest,
    encode,
    format_of_peers,
    shard_of,
    slice_name,
)

from tidegate_operator.bridge import with_fresh, with_stay
from tidegate_operator.changes import changed, gone
from tidegate_operator.compile import Desired, NodeContent
from tidegate_operator.identities import EMPTY_LEDGER, Ledger
from tidegate_operator.objects import IdentityKey
from tidegate_operator.problems import Problem
from tidegate_operator.store import (
    RELEASED_LABEL,
    ObjectStore,
    PublishError,
    T,
    alike,
    failed,
    path_of,
    path_to,
    read_all,
)

Table = Literal["ipcache", "services", "peers"]

MIN_SHARDS = 8
SHARD_ENTRIES = 2048
"""A table has the fewest shards, a power of two and at least MIN_SHARDS, that hold on average
no more keys than this: what one change makes every loader read again."""
Sizes = Mapping[Table, int]
"""Keys a shard, on average, of the tables that are not cut by SHARD_ENTRIES."""
FOLDER_SIZES: Sizes = {"services": 256}
"""A key of services is a whole Service with its endpoints."""
CLUSTER_SIZES: Sizes = {"ipcache": 32, "services": 4, "peers": 16}
"""Where every shard that changes is sent to every node: some 2 KiB each. The folder's nodes
read from a disk, and reading few large files costs them less."""
FIRST_EPOCH = 1
TABLE_LABEL = "tidegate.dev/table"

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


def key_of(identity: Identity) -> IdentityKey:
    spec = identity.spec
    return IdentityKey(
        spec.namespace or "",
        tuple(sorted((spec.labels or {}).items())),
        tuple(spec.cidrs or ()),
    )


def ledger_of(identities: Iterable[Identity]) -> Ledger:
    """The ledger that `ledger_objects` wrote. Names that are no number are left out."""
    live: dict[IdentityKey, int] = {}
    released: dict[int, tuple[IdentityKey, int]] = {}
    for identity in identities:
        if not identity.metadata.name.isdigit():
            continue
        key, number = key_of(identity), int(identity.metadata.name)
        count = (identity.metadata.labels or {}).get(RELEASED_LABEL)
        if count is None:
            live[key] = number
        else:
            released[number] = (key, int(count))
    ordered = dict(sorted(released.items(), key=lambda item: item[1][1]))
    return Ledger(live, ordered, max((count for _, count in ordered.values()), default=0))


def shards_for(keys: int, entries: int) -> int:
    """How many shards a table of so many keys needs, with `entries` in each on average."""
    shards = MIN_SHARDS
    while keys > shards * entries:
        shards *= 2
    return shards


def slice_object(
    table: Table,
    place: tuple[int, int, int],
    revision: int,
    content: Mapping[str, Any],
    triggered: str = "",
) -> StateSlice:
    """One shard; `place` is (epoch, shard, shards), `content` key -> entry, for services
    key -> list of entries. `triggered`: see TRIGGER_ANNOTATION."""
    epoch, shard, shards = place
    entries: list[Any] = []
    for key in sorted(content):
        entries += content[key] if table == "services" else [content[key]]
    lists: dict[str, Any] = {table: entries}
    return StateSlice(
        api_version=API_VERSION,
        kind="StateSlice",
        metadata=Meta(
            name=slice_name(table, *place),
            labels={TABLE_LABEL: table},
            annotations={TRIGGER_ANNOTATION: triggered} if triggered else UNSET,
        ),
        spec=StateSliceSpec(
            format=_format_of(table, entries),
            table=table,
            epoch=epoch,
            shard=shard,
            shards=shards,
            revision=revision,
            **lists,
        ),
    )


def _format_of(table: Table, entries: Sequence[Any]) -> int:
    """The lowest that can say them all."""
    match table:
        case "services":
            return max(map(format_of, entries), default=FORMAT)
        case "peers":
            return format_of_peers(entries)
        case "ipcache":
            return FORMAT


def _node_format(content: NodeContent) -> int:
    new = content.zone or content.port_addresses or content.masquerade is not None
    ports = any(endpoint.host_ports is not UNSET for endpoint in content.endpoints)
    return NEWEST_FORMAT if new or ports else FORMAT


def _masquerade(content: NodeContent) -> Masquerade | UnsetType:
    excludes = content.masquerade
    return UNSET if excludes is None else Masquerade(excludes=list(excludes))


def node_object(
    name: str, content: NodeContent, tables: Mapping[str, TableRef], term: int | None = None
) -> NodeState:
    """`tables`: with the revision without which the content cannot be applied. `term`: of the
    leader that writes it, if leaders are elected."""
    spec = NodeStateSpec(
        format=_node_format(content),
        mode="Enforcing",
        endpoints=content.endpoints,
        rule_sets=content.rule_sets,
        peer_sets=content.peer_sets,
        tables=dict(tables),
        term=UNSET if term is None else term,
        zone=content.zone or UNSET,
        node_port_addresses=list(content.port_addresses) or UNSET,
        masquerade=_masquerade(content),
    )
    node = OwnerReference(api_version="v1", kind="Node", name=name, uid=content.uid)
    return NodeState(
        api_version=API_VERSION,
        kind="NodeState",
        metadata=Meta(
            name=name,
            annotations={DIGEST_ANNOTATION: digest(spec)},
            owner_references=[node] if content.uid else UNSET,
        ),
        spec=spec,
    )


def render(desired: Desired, ledger: Ledger, sizes: Sizes = FOLDER_SIZES) -> list[StateObject]:
    """Every object, in publish order, as a first publish into an empty place writes them."""
    content: dict[Table, Mapping[str, Any]] = {
        "ipcache": desired.ipcache,
        "services": desired.services,
        "peers": desired.peers,
    }
    shards = {table: _shards(table, content[table], sizes) for table in content}
    tables: dict[str, TableRef] = {
        table: TableRef(epoch=FIRST_EPOCH, shards=len(items), min_revision=int(table == "peers"))
        for table, items in shards.items()
    }
    found: list[StateObject] = [*ledger_objects(ledger).values(), *desired.rule_sets.values()]
    found += shards["peers"]
    found += [node_object(name, content, tables) for name, content in desired.nodes.items()]
    found += shards["ipcache"] + shards["services"]
    return found


def _shards(table: Table, content: Mapping[str, Any], sizes: Sizes) -> list[StateSlice]:
    parts = _split(content, shards_for(len(content), sizes.get(table, SHARD_ENTRIES)))
    places = [(FIRST_EPOCH, shard, len(parts)) for shard in range(len(parts))]
    return [slice_object(table, place, 1, p) for place, p in zip(places, parts, strict=True)]


def _split(content: Mapping[str, Any], shards: int) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{} for _ in range(shards)]
    for key, entry in content.items():
        parts[shard_of(key, shards)][key] = entry
    return parts


def write_stream(
    desired: Desired,
    ledger: Ledger,
    stream: TextIO,
    form: Literal["yaml", "json"],
    sizes: Sizes = FOLDER_SIZES,
) -> None:
    """Write every object to `stream`: YAML documents, or one JSON List."""
    items = [msgspec.to_builtins(item) for item in render(desired, ledger, sizes)]
    if form == "json":
        whole = {"apiVersion": "v1", "kind": "List", "items": items}
        stream.write(msgspec.json.format(encode(whole), indent=2).decode() + "\n")
        return
    yaml.dump_all(items, stream, Dumper=_NoAliases, explicit_start=True, sort_keys=False, width=100)


class _NoAliases(yaml.CSafeDumper):
    """Equal lists are written out: an object must be readable by itself."""

    def ignore_aliases(self, data: object) -> bool:
        return True


# ---- What is there -------------------------------------------------------------------


def read_ledger(run_dir: Path) -> Ledger:
    """The ledger of an earlier run; empty if there was none."""
    return ledger_of(read_all(run_dir / "objects", Identity).values())


@dataclass
class _TableState:
    """One table as it is stored: `shards[i]`, and the object `items[i]` that holds it, are None
    until they were written."""

    content: dict[str, Any]
    shards: list[dict[str, Any] | None]
    items: list[StateSlice | None]
    revision: int
    epoch: int
    last_epoch: int
    """The newest that any file has, complete or not."""

    @property
    def ref(self) -> TableRef:
        return TableRef(epoch=self.epoch, shards=len(self.shards), min_revision=self.revision)

    def forget(self, shard: int) -> None:
        """What the shard held counts as not written."""
        for key in self.shards[shard] or ():
            self.content.pop(key, None)
        self.shards[shard] = self.items[shard] = None


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
        return _TableState({}, [], [], 0, FIRST_EPOCH, 0)
    complete = [key for key, held in found.items() if len(held) == key[1]]
    epoch, shards = max(complete or found)
    revisions = [item.spec.revision for held in found.values() for item in held.values()]
    nothing: list[None] = [None] * shards
    state = _TableState({}, [*nothing], [*nothing], max(revisions), epoch, max(found)[0])
    for shard, item in found[epoch, shards].items():
        part = _content(item.spec)
        state.shards[shard], state.items[shard] = part, item
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


NO_TRIGGERS: Mapping[str, str] = {}


class Publisher:
    """The only writer of a store's objects. Starts from what is there, and before each
    publish takes over what somebody else made of it meanwhile: that is repaired."""

    def __init__(
        self,
        store: ObjectStore,
        sizes: Sizes = FOLDER_SIZES,
        grace: float = 0.0,
        term: int | None = None,
    ) -> None:
        """`grace`: seconds for which an unused rule set stays, for nodes that lag behind.
        `term`: see `node_object`."""
        self._store = store
        self._sizes = sizes
        self._grace = grace
        self._term = term
        self._tables = {
            table: _table_state(table, store.held(StateSlice).values()) for table in TABLES
        }
        self._identities: dict[str, Identity] = {}
        self._ledger: Ledger | None = None
        self._known: dict[str, RuleSet] = {}
        self._digests: dict[str, tuple[NodeStateSpec, str]] = {}
        self._unused: dict[str, float] = {}
        self._changed: list[str] = []
        self._failures: dict[str, str] = {}
        self._owed: set[int] = set()

    @property
    def waiting(self) -> bool:
        """Is there something whose grace period runs?"""
        return bool(self._unused)

    def publish(
        self,
        desired: Desired,
        ledger: Ledger,
        problems: Sequence[Problem] = (),
        now: float = 0.0,
        triggers: Mapping[str, str] | None = None,
    ) -> tuple[str, ...]:
        """Make the store hold `desired`; the paths written or removed, in order. `now`: a
        monotonic clock, for the grace period. `triggers`: key of a service -> when endpoints of
        it changed, of those that have since the last publish.

        Referents first: identities, rule sets and peer sets before the node states that
        name them, node states before the facts that use their identities. Removals
        reversed. An address that changes identity does so between two states of the peer
        sets: the first knows the old and the new number, the second only the new (DESIGN
        invariant 8). To a number that no address has yet it moves before the policies change,
        to another after. A table that has outgrown its shards is written anew beside them, as it
        was, before node states name it. Each step is one batch, and ends before the next
        begins. What one object's failure makes incomplete is left as it was, and tried again
        by the next publish. Raises PublishError."""
        self._changed, self._failures = [], {}
        self._take_over()
        self._write_identities(ledger)
        missing = self._write_rule_sets(desired.rule_sets)
        self._reshard("peers", desired.peers)
        self._reshard("ipcache", desired.ipcache)
        self._reshard("services", desired.services)
        facts = _differing(self._tables["ipcache"].content, desired.ipcache)
        moves = self._moves(desired, facts)
        fresh = self._fresh(moves)
        self._write_table("peers", self._bridge(desired, moves, fresh))
        if fresh:
            split = {cidr for cidr, (_, new) in moves.items() if new in fresh}
            facts -= split
            wanted = {**self._tables["ipcache"].content}
            wanted.update((cidr, desired.ipcache[cidr]) for cidr in split)
            self._write_table("ipcache", wanted, split)
        self._write_nodes(desired.nodes, missing)
        self._owed = self._numbers_behind(desired)
        self._write_table("ipcache", desired.ipcache, facts)
        self._write_table("services", desired.services, triggers=triggers or NO_TRIGGERS)
        self._write_table("peers", self._needed(desired))
        self._remove_nodes(desired.nodes)
        self._remove_rule_sets(desired.rule_sets, now)
        self._remove_identities(ledger)
        self._remove_slices()
        self._changed += self._store.report(problems)
        if self._failures:
            raise failed(self._failures)
        return tuple(self._changed)

    # ---- what is there ----

    def _take_over(self) -> None:
        """Forget of the tables what the store no longer holds as we wrote it."""
        held = self._store.held(StateSlice)
        for state in self._tables.values():
            for shard, item in enumerate(state.items):
                if item is None:
                    continue
                now = held.get(item.metadata.name)
                if now is item:
                    continue
                if now is not None and alike(now, item):
                    state.items[shard] = now
                else:
                    state.forget(shard)

    def strangers(self) -> dict[int, IdentityKey]:
        """Numbers in the store that the ledger last published does not know, and what they
        stand for: those of a leader before us, that came late."""
        held = self._store.held(Identity)
        names = held.keys() - self._identities.keys() if self._ledger is not None else set()
        return {int(name): key_of(held[name]) for name in sorted(names) if name.isdigit()}

    def disturbed(self) -> bool:
        """Has somebody else changed what we wrote? True also before the first publish."""
        if self._ledger is None:
            return True
        slices = self._store.held(StateSlice)
        identities = self._store.held(Identity)
        nodes, rule_sets = self._store.held(NodeState), self._store.held(RuleSet)
        items = [item for state in self._tables.values() for item in state.items]
        return (
            len(slices) != len(items)
            or any(item is None or not _held(slices, item) for item in items)
            or identities.keys() != self._identities.keys()
            or not all(_held(identities, item) for item in self._identities.values())
            or nodes.keys() != self._digests.keys()
            or any(not _as_written(nodes[name], held) for name, held in self._digests.items())
            or not all(_held(rule_sets, item) for item in self._known.values())
        )

    # ---- additions ----

    def _put(self, batch: Sequence[StateObject]) -> set[str]:
        """The names of those that could not be written."""
        if not batch:
            return set()
        failures = self._store.put(batch)
        self._failures.update(failures)
        written = {path_of(item): item.metadata.name for item in batch}
        self._changed += [path for path in written if path not in failures]
        return {name for path, name in written.items() if path in failures}

    def _must_put(self, batch: Sequence[StateObject]) -> None:
        """As `_put`, for what everything later depends on."""
        if self._put(batch):
            raise failed(self._failures)

    def _drop(self, kind: type[T], names: Sequence[str]) -> None:
        if not names:
            return
        failures = self._store.drop(kind, names)
        self._failures.update(failures)
        paths = [path_to(kind.__name__, name) for name in names]
        self._changed += [path for path in paths if path not in failures]

    def _write_identities(self, ledger: Ledger) -> None:
        if ledger is not self._ledger:
            before = self._ledger or EMPTY_LEDGER
            for key, number in ledger.live.items() - before.live.items():
                self._identities[str(number)] = identity_object(number, key)
            for number, (key, count) in ledger.released.items() - before.released.items():
                self._identities[str(number)] = identity_object(number, key, count)
            keep = {str(number) for number in (*ledger.live.values(), *ledger.released)}
            for name in self._identities.keys() - keep:
                del self._identities[name]
            self._ledger = ledger
        held = self._store.held(Identity)
        stale = [item for item in self._identities.values() if not _held(held, item)]
        self._must_put(sorted(stale, key=lambda item: int(item.metadata.name)))

    def _write_rule_sets(self, wanted: Mapping[str, RuleSet]) -> set[str]:
        """The names of those that could not be written."""
        held = self._store.held(RuleSet)
        self._known = dict(wanted)
        return self._put([item for item in wanted.values() if not _held(held, item)])

    def _moves(self, desired: Desired, facts: set[str]) -> dict[str, tuple[int, int]]:
        """Addresses, among `facts`, that change their identity: old number, new number."""
        held: dict[str, IPCacheEntry] = self._tables["ipcache"].content
        found = {}
        for cidr in facts & desired.ipcache.keys() & held.keys():
            old, new = held[cidr].identity, desired.ipcache[cidr].identity
            if old != new:
                found[cidr] = (old, new)
        return found

    def _fresh(self, moves: Mapping[str, tuple[int, int]]) -> dict[int, set[int]]:
        """New numbers that no address has yet, and the old ones of the addresses that move to
        them."""
        if not moves:
            return {}
        held: dict[str, IPCacheEntry] = self._tables["ipcache"].content
        carried = {entry.identity for entry in held.values()}
        found: dict[int, set[int]] = {}
        for old, new in moves.values():
            if new not in carried and new >= FIRST_IDENTITY:
                found.setdefault(new, set()).add(old)
        return found

    def _bridge(
        self,
        desired: Desired,
        moves: Mapping[str, tuple[int, int]],
        fresh: Mapping[int, set[int]],
    ) -> dict[str, PeerSet]:
        """Peer sets between old and new: also those that node states in force still name,
        and also members whose addresses ipcache is about to move. A set that goes knows a
        fresh number where it knows the number in whose place that comes: the policies that
        name it are in force until after the move."""
        moving = {old for old, _ in moves.values()} | self._owed
        peers: dict[str, PeerSet] = dict(desired.peers)
        for name, before in self._tables["peers"].content.items():
            now = peers.get(name)
            if now is None:
                peers[name] = with_fresh(before, fresh)
            elif moving and now is not before:
                stay = moving.intersection(before.identities).difference(now.identities)
                if stay:
                    peers[name] = with_stay(now, before, stay)
        return peers

    def _behind(self, desired: Desired) -> list[NodeState]:
        """Node states that could not be replaced."""
        if not self._failures:
            return []
        held = self._store.held(NodeState)
        failed = (node for node in desired.nodes if path_to("NodeState", node) in self._failures)
        return [held[node] for node in failed if node in held]

    def _numbers_behind(self, desired: Desired) -> set[int]:
        """Numbers that no address has any more, but pods of such node states do: to their own
        node they are these."""
        old = {one.identity for node in self._behind(desired) for one in node.spec.endpoints}
        return old - {entry.identity for entry in desired.ipcache.values()} if old else old

    def _needed(self, desired: Desired) -> Mapping[str, PeerSet]:
        """The peer sets of `desired`, and those of node states that could not be replaced, with
        the numbers that are still in force."""
        old = {name for node in self._behind(desired) for name in node.spec.peer_sets}
        content = self._tables["peers"].content
        kept = {name: content[name] for name in sorted(old - desired.peers.keys() & content.keys())}
        for name in sorted(desired.peers.keys() & content.keys()) if self._owed else ():
            now, before = desired.peers[name], content[name]
            stay = self._owed.intersection(before.identities).difference(now.identities)
            if stay:
                kept[name] = with_stay(now, before, stay)
        return {**desired.peers, **kept} if kept else desired.peers

    def _reshard(self, table: Table, wanted: Mapping[str, Any]) -> None:
        """Room for `wanted`. A table that shrank keeps its shards: small ones cost little."""
        state = self._tables[table]
        shards = shards_for(len(wanted), self._sizes.get(table, SHARD_ENTRIES))
        if not state.shards:
            state.shards, state.items = [None] * shards, [None] * shards
        if shards <= len(state.shards):
            return
        epoch, revision = state.last_epoch + 1, state.revision + 1
        # What a lost shard held is not known: what it should hold, or addresses would go.
        content = state.content if None not in state.shards else {**wanted, **state.content}
        parts = _split(content, shards)
        items = [
            slice_object(table, (epoch, shard, shards), revision, part)
            for shard, part in enumerate(parts)
        ]
        state.last_epoch, state.revision = epoch, revision
        self._must_put(items)
        self._tables[table] = _TableState(content, [*parts], [*items], revision, epoch, epoch)

    def _write_table(
        self,
        table: Table,
        wanted: Mapping[str, Any],
        differing: set[str] | None = None,
        triggers: Mapping[str, str] = NO_TRIGGERS,
    ) -> None:
        """`differing`: what `_differing` says of it, where it is known."""
        state = self._tables[table]
        shards = len(state.shards)
        parts: dict[int, dict[str, Any]] = {}
        if differing is None:
            differing = _differing(state.content, wanted)
        first: dict[int, str] = {}
        for key in differing:
            shard = shard_of(key, shards)
            if key in triggers:
                first[shard] = min(first.get(shard, triggers[key]), triggers[key])
            part = parts.setdefault(shard, dict(state.shards[shard] or {}))
            if key in wanted:
                part[key] = wanted[key]
            else:
                part.pop(key, None)
        for shard, held in enumerate(state.shards):
            if held is None:
                parts.setdefault(shard, {})
        if parts:
            state.revision += 1
        items = {
            shard: slice_object(
                table,
                (state.epoch, shard, shards),
                state.revision,
                parts[shard],
                first.get(shard, ""),
            )
            for shard in sorted(parts)
        }
        for shard, item in items.items():
            state.forget(shard)
            state.shards[shard], state.items[shard] = parts[shard], item
        # Equal to what is there, but the very objects that the next diff will compare.
        state.content = dict(wanted)
        try:
            self._must_put([*items.values()])
        except PublishError:
            self._take_over()
            raise

    def _write_nodes(self, wanted: Mapping[str, NodeContent], missing: set[str]) -> None:
        """Those that name a rule set of `missing` keep what they have."""
        tables = {table: self._tables[table].ref for table in TABLES}
        held = self._store.held(NodeState)
        batch = []
        for name, content in wanted.items():
            if missing and not missing.isdisjoint(content.rule_sets):
                path = path_to("NodeState", name)
                self._failures[path] = "a rule set that it names could not be written"
                continue
            now = held.get(name)
            if now is None or not self._node_is(now, content, tables):
                batch.append(node_object(name, content, tables, self._term))
        for item in batch:
            self._digests[item.metadata.name] = (item.spec, digest_of(item))
        self._put(batch)

    def _node_is(
        self, held: NodeState, content: NodeContent, tables: Mapping[str, TableRef]
    ) -> bool:
        name = held.metadata.name
        if not _says(held.spec, content, tables):
            return False
        known = self._digests.get(name)
        if known is None or known[0] is not held.spec:
            known = self._digests[name] = (held.spec, digest(held.spec))
        return _as_written(held, known) and _owner(held.metadata) == content.uid

    # ---- removals ----

    def _remove_nodes(self, wanted: Mapping[str, NodeContent]) -> None:
        for name in self._digests.keys() - wanted.keys():
            del self._digests[name]
        self._drop(NodeState, sorted(self._store.held(NodeState).keys() - wanted.keys()))

    def _remove_rule_sets(self, wanted: Mapping[str, RuleSet], now: float) -> None:
        nodes = self._store.held(NodeState).values()
        used = {name for node in nodes for name in node.spec.rule_sets}
        unused = self._store.held(RuleSet).keys() - wanted.keys() - used
        self._unused = {name: self._unused.get(name, now) for name in sorted(unused)}
        over = [name for name, since in self._unused.items() if now - since >= self._grace]
        self._drop(RuleSet, over)
        for name in over:
            self._unused.pop(name)

    def _remove_identities(self, ledger: Ledger) -> None:
        self._drop(Identity, sorted(self._store.held(Identity).keys() - self._identities.keys()))

    def _remove_slices(self) -> None:
        ours = {
            slice_name(table, state.epoch, shard, len(state.shards))
            for table, state in self._tables.items()
            for shard in range(len(state.shards))
        }
        self._drop(StateSlice, sorted(self._store.held(StateSlice).keys() - ours))


def _held(held: Mapping[str, T], item: T) -> bool:
    now = held.get(item.metadata.name)
    return now is item or (now is not None and alike(now, item))


def digest_of(item: NodeState) -> str:
    """What its writer said its spec is."""
    return (item.metadata.annotations or {}).get(DIGEST_ANNOTATION, "")


def _as_written(item: NodeState, written: tuple[NodeStateSpec, str]) -> bool:
    """The spec is what we wrote or took over, and the annotation says its digest."""
    spec, wanted = written
    return (item.spec is spec or item.spec == spec) and digest_of(item) == wanted


def _owner(meta: Meta) -> str:
    """UID of the Node that owns the object; "" if none does."""
    found = [owner.uid for owner in meta.owner_references or () if owner.kind == "Node"]
    return found[0] if len(found) == 1 else ""


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    found = {key for key in changed(before, now) if before.get(key) != now[key]}
    found.update(gone(before, now))
    return found


def _says(spec: NodeStateSpec, content: NodeContent, tables: Mapping[str, TableRef]) -> bool:
    return (
        spec.format == _node_format(content)
        and (spec.zone or "") == content.zone
        and tuple(spec.node_port_addresses or ()) == content.port_addresses
        and spec.masquerade == _masquerade(content)
        and spec.mode == "Enforcing"
        and spec.endpoints == content.endpoints
        and spec.rule_sets == content.rule_sets
        and spec.peer_sets == content.peer_sets
        and spec.tables.keys() == tables.keys()
        and all(
            (ref.epoch, ref.shards) == (tables[table].epoch, tables[table].shards)
            and ref.min_revision <= tables[table].min_revision
            for table, ref in spec.tables.items()
        )
    )
