"""The one place that writes to the kernel's maps: executes a plan, reads back what it wrote.

`Actual` is updated from what was read, never from what was meant. May not live
here: any decision about what to write, or in which order.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from tidegate_bpf import BpfError, Map, MapType
from tidegate_bpf.maps import NO_PREALLOC

from tidegate_loader import addresses
from tidegate_loader.kernel import (
    FEW,
    FLAGS_SHIFT,
    INDEX,
    ZERO_KEY,
    Kernel,
    ipcache_values,
    node_key_row,
)
from tidegate_loader.plan import (
    RANGE_REST_SECONDS,
    Actual,
    AnyStep,
    BackendInForce,
    BuildNodeTable,
    BumpEpoch,
    CopyRuleSets,
    CreateHalfOpen,
    CreateRuleSet,
    DeleteFrontends,
    DeleteIpcache,
    DeleteMasquerade,
    DeleteNetworks,
    DeleteRanges,
    FreeBackends,
    FrontendInForce,
    NodeEntry,
    Plan,
    Policy,
    PutRuleSets,
    RemoveHalfOpen,
    RemoveRuleSets,
    ReserveIds,
    Resting,
    RuleSetInForce,
    SwitchNodeTable,
    TurnRings,
    UpsertFrontends,
    UpsertIpcache,
    UpsertMasquerade,
    UpsertNetworks,
    UpsertRanges,
    WriteBackends,
    WriteNode,
    WriteSlots,
)
from tidegate_loader.rules import LANES, MAX_SHAPES, content_of, copy_of, identities_of
from tidegate_loader.services import RING, FrontendKey, RangeKey, Special, places

POLL_SECONDS = 0.0002
"""How long to wait between looks for a batch to become visible."""
MAX_ERRORS = 10
"""Errors of one apply that are told one by one."""

Group = Literal["policy", "facts", "services", "epoch"]


def apply(plan: Plan, kernel: Kernel, actual: Actual) -> list[str]:
    """Execute every step that still makes sense; the errors, at most MAX_ERRORS.

    After an error the rest of its group is left undone, and so is whatever
    relies on a switch that did not happen; `actual` must then be read anew.
    """
    writer = Writer(kernel, actual)
    errors: list[str] = []
    failed: set[Group] = set()
    for step in plan.steps:
        group = _group(step)
        if group in failed or ("policy" in failed and isinstance(step, UpsertIpcache)):
            continue
        try:
            writer.execute(step)
        except (OSError, KeyError) as error:
            failed.add(group)
            errors.append(f"{type(step).__name__}: {error}")
    return errors[:MAX_ERRORS]


def _group(step: AnyStep) -> Group:
    match step:
        case DeleteIpcache() | DeleteNetworks() | UpsertIpcache() | UpsertNetworks():
            return "facts"
        case BumpEpoch():  # never left out: whatever was written before it counts
            return "epoch"
        case (
            DeleteFrontends()
            | WriteBackends()
            | WriteSlots()
            | TurnRings()
            | UpsertFrontends()
            | FreeBackends()
            | WriteNode()
            | UpsertMasquerade()
            | DeleteMasquerade()
            | UpsertRanges()
            | DeleteRanges()
        ):
            return "services"
        case _:
            return "policy"


class Writer:
    """Executes steps one at a time. OSError (BpfError) when the kernel refuses one."""

    def __init__(self, kernel: Kernel, actual: Actual) -> None:
        self._kernel = kernel
        self._layouts = kernel.layouts
        self._actual = actual
        self._built: tuple[Map, BuildNodeTable] | None = None

    def execute(self, step: AnyStep) -> None:
        match step:
            case ReserveIds(next_id=next_id):
                self._write_control(self._actual.epoch, next_id)
            case BumpEpoch(epoch=epoch):
                self._write_control(epoch, self._actual.next_id)
                self._actual.interrupted = False
            case CreateHalfOpen(slots=slots):
                self._create_half_open(slots)
            case CreateRuleSet():
                self._create_rule_set(step)
            case CopyRuleSets():
                for source, number, _, has_cidr in step.items:
                    self._copy_rule_set(source, number, step.numbers, has_cidr)
            case PutRuleSets(items=items):
                self._put_rule_sets(items)
            case BuildNodeTable():
                self._build_node_table(step)
            case SwitchNodeTable():
                self._switch_node_table()
            case RemoveRuleSets(items=items):
                self._remove_rule_sets(items)
            case RemoveHalfOpen(slots=slots):
                self._remove_half_open(slots)
            case DeleteIpcache(keys=hosts):
                self._delete_ipcache(hosts)
            case UpsertIpcache(entries=hosts):
                self._upsert_ipcache(hosts)
            case DeleteNetworks(keys=networks):
                for bits, address in networks:
                    key = self._layouts.prefix.pack_row((bits, address))
                    self._kernel.map("ipcache_lpm_v1").discard(key)
                self._actual.networks = self._kernel.read_networks()
            case UpsertNetworks(entries=networks):
                self._kernel.map("ipcache_lpm_v1").update_batch(
                    self._layouts.prefix.pack_all(networks), _u32(networks.values())
                )
                self._actual.networks = self._kernel.read_networks()
            case WriteNode(addresses=own, source=source):
                self._write_node(own, source)
            case UpsertMasquerade(entries=networks):
                opened = self._kernel.map("masquerade_v1")
                for (bits, address), value in networks.items():
                    key = self._layouts.prefix.pack_row((bits, address))
                    opened.update(key, INDEX.pack(value))
                self._actual.masquerade = self._kernel.decode_prefixes(opened)
            case DeleteMasquerade(keys=networks):
                opened = self._kernel.map("masquerade_v1")
                for bits, address in networks:
                    opened.discard(self._layouts.prefix.pack_row((bits, address)))
                self._actual.masquerade = self._kernel.decode_prefixes(opened)
            case UpsertRanges(keys=ranges):
                self._kernel.map("source_ranges_v1").update_batch(
                    self._pack_ranges(ranges), _u32([1] * len(ranges))
                )
                self._actual.ranges = self._kernel.read_ranges()
            case DeleteRanges(keys=ranges):
                for packed in map(self._pack_ranges, ((key,) for key in ranges)):
                    self._kernel.map("source_ranges_v1").discard(packed)
                self._actual.ranges = self._kernel.read_ranges()
            case DeleteFrontends(keys=frontends):
                self._delete_frontends(frontends)
            case WriteBackends(entries=backends) | FreeBackends(entries=backends):
                self._write_backends(backends)
            case WriteSlots(ranges=ranges):
                numbers = [base + i for base, ids in ranges.items() for i in range(len(ids))]
                values = [n for ids in ranges.values() for n in ids]
                self._kernel.map("slots_v1").update_batch(_u32(numbers), _u32(values))
                if self._actual.index is not None:
                    for base, ids in ranges.items():
                        self._actual.index.taken(base, len(ids))
            case TurnRings(slots=turned, entries=frontends):
                if turned:
                    self._kernel.map("slots_v1").update_batch(_u32(turned), _u32(turned.values()))
                self._reread_frontends(frontends)
            case UpsertFrontends(entries=frontends):
                self._upsert_frontends(frontends)

    def _write_control(self, epoch: int, next_id: int) -> None:
        packed = self._layouts.control.pack(epoch=epoch, next_id=next_id)
        self._kernel.map("control_v1").update(ZERO_KEY, packed)
        self._actual.epoch, self._actual.next_id = self._kernel.read_control()

    # -- policy -----------------------------------------------------------------

    def _create_half_open(self, slots: Sequence[int]) -> None:
        made = [self._half_open_map(self._layouts.half_open.max_entries) for _ in slots]
        for slot, inner in zip(slots, made, strict=True):
            _pin(inner, self._kernel.pin_dir / "half_open" / str(slot))
        self._link("half_open_v2", zip(slots, made, strict=True))
        self._actual.half_open.update(slots)

    def _half_open_map(self, size: int) -> Map:
        spec = self._layouts.half_open
        return Map.create(
            MapType(spec.type),
            spec.key_size,
            spec.value_size,
            size,
            flags=spec.flags,
            name="half_open",
        )

    def _rules_map(self, size: int) -> Map:
        key, value = self._layouts.rule_key.size, self._layouts.rule.size
        return Map.create(MapType.HASH, key, value, max(1, size), name="rule_set")

    def _trie_map(self, size: int) -> Map:
        key = self._layouts.prefix.size
        return Map.create(
            MapType.LPM_TRIE, key, INDEX.size, max(1, size), flags=NO_PREALLOC, name="cidrs"
        )

    def _create_rule_set(self, step: CreateRuleSet) -> None:
        expanded, number = step.expanded, str(step.id)
        with self._rules_map(len(expanded.entries)) as inner:
            keys = [(peer, port, proto, bits) for peer, proto, port, bits in expanded.entries]
            inner.update_batch(
                self._layouts.rule_key.pack_all(keys),
                self._layouts.rule.pack_all(expanded.entries.values()),
            )
            entries = self._kernel.decode_rules(inner)
            cidr = {}
            if expanded.cidr:
                with self._trie_map(len(expanded.cidr)) as trie:
                    trie.update_batch(
                        self._layouts.prefix.pack_all(expanded.cidr), _u32(expanded.cidr.values())
                    )
                    cidr = self._kernel.decode_prefixes(trie)
                    _pin(trie, self._kernel.pin_dir / "cidrs" / number)
            _pin(inner, self._kernel.pin_dir / "rule_sets" / number)
        same = (entries, cidr) == (expanded.entries, expanded.cidr)
        content = expanded.content if same else content_of(entries, cidr)
        self._actual.rule_sets[step.id] = RuleSetInForce(
            expanded.name, content, None, identities_of(entries)
        )

    def _copy_rule_set(
        self, source: int, number: int, numbers: Mapping[int, int], has_cidr: bool
    ) -> None:
        """Of a copy nobody knows whose it is: it goes with this apply, or with the next."""
        pins = self._kernel.pin_dir
        with Map.open_pinned(str(pins / "rule_sets" / str(source))) as there:
            keys, values = there.dump()
        cut = _cut(values, self._layouts.rule.size)
        rows = copy_of(self._layouts.rule_key.unpack_all(keys), cut, numbers)
        with self._rules_map(len(rows)) as inner:
            inner.update_batch(self._layouts.rule_key.pack_all(rows), b"".join(rows.values()))
            _pin(inner, pins / "rule_sets" / str(number))
        if has_cidr:
            with Map.open_pinned(str(pins / "cidrs" / str(source))) as trie:
                _pin(trie, pins / "cidrs" / str(number))
        self._actual.rule_sets[number] = RuleSetInForce("", "", None)

    def _put_rule_sets(self, items: Sequence[tuple[int, int, bool]]) -> None:
        tries = [(number, slot) for number, slot, has_cidr in items if has_cidr]
        sets = [(number, slot) for number, slot, _ in items]
        for name, directory, pairs in (
            ("cidrs_v1", "cidrs", tries),
            ("rule_sets_v2", "rule_sets", sets),
        ):
            if not pairs:
                continue
            pins = [self._kernel.pin_dir / directory / str(number) for number, _ in pairs]
            opened = [Map.open_pinned(str(pin)) for pin in pins]
            self._link(name, zip((slot for _, slot in pairs), opened, strict=True))
        for number, slot in sets:
            held = self._actual.rule_sets[number]
            self._actual.rule_sets[number] = msgspec.structs.replace(held, slot=slot)

    def _link(self, name: str, pairs: Iterable[tuple[int, Map]]) -> None:
        """One batch: each single update of a map-in-map waits for an RCU grace period.

        The batch waits for one too, for readers of what was there before: nobody,
        for these slots are free. So a thread waits, and this returns once programs
        see the last slot filled, when nothing is left to go wrong."""
        linking = _Linking(self._kernel.map(name), list(pairs))
        linking.start()
        linking.wait_visible()

    def _build_node_table(self, step: BuildNodeTable) -> None:
        layouts = self._layouts
        table = Map.create(
            MapType.HASH,
            layouts.node_key.size,
            layouts.endpoint.size,
            max(1, len(step.entries)),
            name="node_table",
        )
        table.update_batch(
            layouts.node_key.pack_all(map(node_key_row, step.entries)),
            layouts.endpoint.pack_all(map(_endpoint_row, step.entries.values())),
        )
        _pin(table, self._kernel.built_pin)
        self._built = (table, step)

    def _switch_node_table(self) -> None:
        if self._built is None:
            raise BpfError(0, "no node table was built")
        (table, step), self._built = self._built, None
        with table:
            # A single update: it returns when no program reads the old table.
            self._kernel.map("node_v2").update(ZERO_KEY, table)
            os.replace(self._kernel.built_pin, self._kernel.node_table_pin)
            self._actual.node_table = self._kernel.decode_node_table(table)
            self._actual.uids = step.uids

    def _remove_rule_sets(self, items: Sequence[tuple[int, int | None]]) -> None:
        slots = [slot for _, slot in items if slot is not None]
        with_trie = [
            slot
            for number, slot in items
            if slot is not None and (self._kernel.pin_dir / "cidrs" / str(number)).exists()
        ]
        # An empty map takes the place, in one batch; deleting waits once per slot.
        if slots:
            self._link("rule_sets_v2", _same(slots, self._rules_map(1)))
        if with_trie:
            self._link("cidrs_v1", _same(with_trie, self._trie_map(1)))
        for number, _ in items:
            for directory in ("cidrs", "rule_sets"):
                (self._kernel.pin_dir / directory / str(number)).unlink(missing_ok=True)
            self._actual.rule_sets.pop(number, None)

    def _remove_half_open(self, slots: Sequence[int]) -> None:
        self._link("half_open_v2", _same(slots, self._half_open_map(1)))
        for slot in slots:
            (self._kernel.pin_dir / "half_open" / str(slot)).unlink(missing_ok=True)
        self._actual.half_open.difference_update(slots)

    # -- facts --------------------------------------------------------------------

    def _delete_ipcache(self, keys: Sequence[bytes]) -> None:
        self._kernel.map("ipcache_v1").delete_batch(b"".join(keys))
        self._reread_ipcache(keys, None)

    def _upsert_ipcache(self, entries: dict[bytes, int]) -> None:
        packed = b"".join(entries)
        self._kernel.map("ipcache_v1").update_batch(
            packed, ipcache_values(packed, entries.values())
        )
        held = self._actual.ipcache
        self._reread_ipcache(entries, held | entries if held else entries)

    def _reread_ipcache(
        self, keys: Sequence[bytes] | dict[bytes, int], likely: dict[bytes, int] | None
    ) -> None:
        if len(keys) > FEW:
            self._actual.ipcache = self._kernel.read_ipcache(likely)
            return
        found = self._kernel.read_ipcache_keys(keys)
        for key in keys:
            if key not in found:
                self._actual.ipcache.pop(key, None)
        self._actual.ipcache.update(found)

    # -- services -------------------------------------------------------------------

    def _rest(self, keys: Iterable[FrontendKey]) -> None:
        actual = self._actual
        left = [f for f in map(actual.frontends.get, keys) if f is not None and f.count]
        until = actual.now + RANGE_REST_SECONDS
        actual.resting = (*actual.resting, *(Resting(f.base, f.count, until) for f in left))

    def _delete_frontends(self, keys: Sequence[FrontendKey]) -> None:
        packed = self._layouts.frontend_key.pack_all(keys)
        self._kernel.map("frontends_v1").delete_batch(packed)
        self._kernel.map("service_counts_v1").delete_batch(packed)
        self._rest(keys)
        for key in keys:
            self._replace(key, None)

    def _replace(self, key: FrontendKey, found: FrontendInForce | None) -> None:
        """What is in force under the key now."""
        actual, index = self._actual, self._actual.index
        if index is not None:
            index.used(key, actual.frontends.get(key), -1)
            index.used(key, found, 1)
        if found is None:
            actual.frontends.pop(key, None)
        else:
            actual.frontends[key] = found

    def _upsert_frontends(self, entries: dict[FrontendKey, FrontendInForce]) -> None:
        rows = [
            (*_frontend_word(held), addresses.frontend_proof(*key)) for key, held in entries.items()
        ]
        self._kernel.map("frontends_v1").update_batch(
            self._layouts.frontend_key.pack_all(entries), self._layouts.frontend.pack_all(rows)
        )
        self._rest(entries)
        self._reread_frontends(entries)

    def _reread_frontends(self, entries: dict[FrontendKey, FrontendInForce]) -> None:
        if len(entries) > FEW:
            found = self._kernel.read_frontends(self._actual.backends)
        else:
            found = self._kernel.read_frontend_keys(entries, self._actual.backends)
        for key in entries:
            self._replace(key, found.get(key))

    def _write_backends(self, entries: dict[int, BackendInForce]) -> None:
        rows = [(*b.key, b.state, b.freed_at) for b in entries.values()]
        self._kernel.map("backends_v1").update_batch(
            _u32(entries), self._layouts.backend.pack_all(rows)
        )
        found = self._kernel.read_backend_ids(entries)
        if self._actual.index is not None:
            for number, backend in found.items():
                self._actual.index.written(number, self._actual.backends.get(number), backend)
        self._actual.backends.update(found)

    def _write_node(self, own: frozenset[bytes], source: tuple[bytes, bytes]) -> None:
        opened, codec = self._kernel.map("node_addrs_v1"), self._layouts.node_addr
        for address in self._actual.node_addresses - own:
            opened.discard(address)
        for address in own - self._actual.node_addresses:
            opened.update(address, codec.pack_row((address, addresses.addr_proof(address))))
        for at, address in enumerate(source):
            packed = codec.pack_row((address, addresses.addr_proof(address)))
            self._kernel.map("node_source_v1").update(INDEX.pack(at), packed)
        self._actual.node_addresses = self._kernel.read_node_addresses()
        self._actual.node_source = self._kernel.read_node_source()

    def _pack_ranges(self, keys: Iterable[RangeKey]) -> bytes:
        rows = [(bits + 32, number, address) for number, bits, address in keys]
        return self._layouts.range.pack_all(rows)


def _frontend_word(held: FrontendInForce) -> tuple[int, int]:
    """(base and flags, count) as struct tg_frontend has them."""
    if isinstance(held.backends, Special):
        inside, flags = len(held.backends.inside), held.backends.flags
        return held.base | flags << FLAGS_SHIFT, places(inside) if flags & RING else inside
    return held.base, held.count


class _Linking(threading.Thread):
    """One batch into a map-in-map, on its way. Owns the inner maps it links."""

    def __init__(self, outer: Map, pairs: list[tuple[int, Map]]) -> None:
        super().__init__(daemon=True)
        self._outer = outer
        self._pairs = pairs
        self._error: OSError | None = None

    def run(self) -> None:
        try:
            self._outer.update_items([(INDEX.pack(slot), inner) for slot, inner in self._pairs])
        except OSError as error:
            self._error = error
        for _, inner in self._pairs:
            inner.close()

    def wait_visible(self) -> None:
        """Return when the last slot holds its map; the batch writes in order. BpfError
        when it failed."""
        slot, inner = self._pairs[-1]
        key, wanted = INDEX.pack(slot), INDEX.pack(inner.info.id)
        while self.is_alive():
            with contextlib.suppress(KeyError):
                if self._outer.lookup(key) == wanted:
                    return
            self.join(POLL_SECONDS)
        if self._error is not None:
            raise self._error


def _u32(numbers: Iterable[int]) -> bytes:
    return b"".join(map(INDEX.pack, numbers))


def _cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def _same(slots: Sequence[int], inner: Map) -> list[tuple[int, Map]]:
    return [(slot, inner) for slot in slots]


def _pin(owner: Map, path: Path) -> None:
    """Whatever a killed loader left there is nobody's."""
    path.unlink(missing_ok=True)
    owner.pin(str(path))


def _policy_row(policy: Policy | None) -> tuple[int, int, int, bytes, bytes]:
    if policy is None:
        return (0, 0, 0, bytes(LANES), bytes(LANES * MAX_SHAPES))
    counts = bytes(map(len, policy.shapes))
    padded = b"".join(bytes(lane).ljust(MAX_SHAPES, b"\0") for lane in policy.shapes)
    return (policy.slot, policy.rule_set, policy.flags, counts, padded)


def _endpoint_row(entry: NodeEntry) -> tuple[object, ...]:
    return (
        entry.id,
        entry.identity,
        entry.ifindex,
        entry.half_open,
        entry.pod_mac,
        entry.host_mac,
        0,
        entry.ip4,
        entry.ip6,
        _policy_row(entry.ingress),
        _policy_row(entry.egress),
    )
