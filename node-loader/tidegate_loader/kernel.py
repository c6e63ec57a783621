"""The node's pinned maps: where they are, how their bytes read, what they hold now.

Reads only, but for finishing a rename that a killed loader left half done.
`apply` writes. May not live here: what the maps should hold.
"""

from __future__ import annotations

import contextlib
import errno
import operator
import os
import struct
import time
from array import array
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from tidegate_bpf import BpfError, Codec, LayoutError, Map, ObjectFile

from tidegate_loader import addresses, maps, plan, plan_services, rules, services
from tidegate_loader.addresses import ZERO, Prefix
from tidegate_loader.local import Realised
from tidegate_loader.plan import (
    Actual,
    BackendInForce,
    FrontendInForce,
    Limits,
    NodeEntry,
    NodeKey,
    Policy,
    RuleSetInForce,
)
from tidegate_loader.rules import RuleKey, RuleValue
from tidegate_loader.services import HEADER, BackendAddress, FrontendKey, RangeKey, Special, Wanted

WRONG = -1
"""Stands for a value whose proof is not its key's; equals no desired value."""
FEW = 1024
"""Up to so many keys are read one by one, more by a dump."""

SLOT_MASK, FLAGS_SHIFT = 0x00FFFFFF, 24
"""Of tg_frontend.base: the first slot, and above it enum tg_frontend_flags."""

INDEX = struct.Struct("=I")
ZERO_KEY = INDEX.pack(0)
_ADDRESS = struct.Struct("16s")

_STRUCTS: dict[str, dict[str, str]] = {
    "tg_node_key": {"kind": "u32", "addr": "bytes[16]"},
    "tg_policy": {
        "slot": "u32",
        "rule_set": "u32",
        "flags": "u8",
        "counts": "bytes[3]",
        "shapes": "bytes[36]",
    },
    "tg_endpoint": {
        "id": "u32",
        "identity": "u32",
        "ifindex": "u32",
        "half_open": "u32",
        "pod_mac": "bytes[6]",
        "host_mac": "bytes[6]",
        "flags": "u32",
        "ip4": "bytes[16]",
        "ip6": "bytes[16]",
        "ingress": "struct tg_policy",
        "egress": "struct tg_policy",
    },
    "tg_rule_key": {"peer": "u32", "port": "be16", "protocol": "u8", "prefix": "u8"},
    "tg_rule": {"precedence": "u32", "rule": "u32", "action": "u32", "flags": "u32"},
    "tg_prefix": {"bits": "u32", "addr": "bytes[16]"},
    "tg_ipcache": {"proof": "u32", "identity": "u32"},
    "tg_frontend_key": {"addr": "bytes[16]", "port": "be16", "protocol": "u8"},
    "tg_frontend": {"base": "u32", "count": "u16", "proof": "u16"},
    "tg_backend": {
        "addr": "bytes[16]",
        "port": "be16",
        "protocol": "u8",
        "state": "u8",
        "freed_at": "u32",
    },
    "tg_range": {"bits": "u32", "service": "be32", "addr": "bytes[16]"},
    "tg_sock_key": {"cookie": "u64", "addr": "bytes[16]", "port": "be16"},
    "tg_service_count": {"connections": "u64", "refused": "u64"},
    "tg_node_addr": {"addr": "bytes[16]", "proof": "u32"},
    "tg_control": {"epoch": "u64", "next_id": "u64"},
}

_ENUMS: dict[str, int] = {
    "TG_NODE_IFINDEX": plan.NODE_IFINDEX,
    "TG_NODE_ADDR": plan.NODE_ADDR,
    "TG_PEER_IDENTITY": rules.PEER_IDENTITY,
    "TG_PEER_CLASS": rules.PEER_CLASS,
    "TG_PEER_ANY": rules.PEER_ANY,
    "TG_PEER_ENTITY": rules.PEER_ENTITY,
    "TG_PEER_WORD_CLASS": rules.WORD_CLASS,
    "TG_PEER_WORD_ANY": rules.WORD_ANY,
    "TG_PEER_WORD_ENTITY": rules.WORD_ENTITY,
    "TG_ENTITY_OWN": rules.ENTITY_OWN,
    "TG_ENTITY_NODE": rules.ENTITY_NODE,
    "TG_ENTITY_API": rules.ENTITY_API,
    "TG_MAX_SHAPES": rules.MAX_SHAPES,
    "TG_LANE_MAIN": rules.MAIN,
    "TG_LANE_BELOW": rules.BELOW,
    "TG_LANE_AUDIT": rules.IN_AUDIT,
    "TG_LANES": rules.LANES,
    "TG_POLICY_RULES": rules.HAS_RULES,
    "TG_POLICY_CIDR": rules.HAS_CIDR,
    "TG_POLICY_ISOLATED": rules.ISOLATED,
    "TG_POLICY_AUDIT": rules.AUDIT,
    "TG_POLICY_AUDITED": rules.AUDITED,
    "TG_ACTION_DENY": rules.DENY,
    "TG_ACTION_ALLOW": rules.ALLOW,
    "TG_ACTION_PASS": rules.PASS,
    "TG_RULE_LOG": rules.LOG,
    "TG_IPCACHE_LOCAL": maps.LOCAL,
    "TG_IPCACHE_FRONTEND": maps.FRONTEND,
    "TG_IPCACHE_PEER": maps.PEER,
    "TG_IPCACHE_NODE": maps.NODE,
    "TG_IPCACHE_OWN": maps.OWN,
    "TG_BACKEND_FREE": plan.FREE,
    "TG_BACKEND_ACTIVE": plan.ACTIVE,
    "TG_FRONTEND_AFFINITY": services.AFFINITY,
    "TG_FRONTEND_RANGES": services.RANGES,
    "TG_FRONTEND_OUTSIDE": services.OUTSIDE,
    "TG_FRONTEND_LOCAL": services.LOCAL,
    "TG_FRONTEND_INTERNAL_LOCAL": services.INTERNAL_LOCAL,
    "TG_FRONTEND_TWO": services.TWO,
    "TG_FRONTEND_RING": services.RING,
    "TG_FRONTEND_HEADER": services.HEADER,
    "TG_FRONTEND_SLOT": SLOT_MASK,
    "TG_FRONTEND_FLAGS": FLAGS_SHIFT,
    "TG_SLOT_HEADER": plan_services.SLOT_HEADER,
}


class Layouts:
    """Every struct bound to the object's BTF. LayoutError: the object and this
    code disagree about a name, a kind, a width or a constant."""

    def __init__(self, spec: ObjectFile) -> None:
        values = {name: v for members in spec.enums.values() for name, v in members.items()}
        for name, value in _ENUMS.items():
            if values.get(name) != value:
                raise LayoutError(f"{name} is {values.get(name)} in the object, not {value}")
        codecs = {name: Codec(spec.layout(name), fields) for name, fields in _STRUCTS.items()}
        self.node_key = codecs["tg_node_key"]
        self.endpoint = codecs["tg_endpoint"]
        self.rule_key = codecs["tg_rule_key"]
        self.rule = codecs["tg_rule"]
        self.prefix = codecs["tg_prefix"]
        self.ipcache = codecs["tg_ipcache"]
        self.frontend_key = codecs["tg_frontend_key"]
        self.frontend = codecs["tg_frontend"]
        self.backend = codecs["tg_backend"]
        self.control = codecs["tg_control"]
        self.range = codecs["tg_range"]
        self.node_addr = codecs["tg_node_addr"]
        self.sock_key = codecs["tg_sock_key"]
        self.service_count = codecs["tg_service_count"]
        inner = spec.maps["half_open_v2"].inner
        if inner is None:
            raise LayoutError("half_open_v2 declares no inner map")
        self.half_open = inner


def node_key_row(key: NodeKey) -> tuple[int, bytes]:
    """An ifindex is the address's first word as the machine stores it."""
    kind, value = key
    return kind, value if isinstance(value, bytes) else struct.pack("=I12x", value)


class Kernel:
    """Owns the descriptors of one node's pinned maps.

    `pin_dir` must hold what `attach.Programs` pins. BpfError when a map is missing.
    """

    def __init__(self, pin_dir: Path, layouts: Layouts) -> None:
        self.pin_dir = pin_dir
        self.layouts = layouts
        self._maps = {
            path.name: Map.open_pinned(str(path)) for path in sorted((pin_dir / "maps").iterdir())
        }
        for name in ("rule_sets", "cidrs", "half_open"):
            (pin_dir / name).mkdir(exist_ok=True)

    def map(self, name: str) -> Map:
        """A pinned map by its name."""
        try:
            return self._maps[name]
        except KeyError:
            raise BpfError(errno.ENOENT, f"map {name} is not pinned in {self.pin_dir}") from None

    def close(self) -> None:
        for owned in self._maps.values():
            owned.close()

    @property
    def node_table_pin(self) -> Path:
        return self.pin_dir / "node_table"

    @property
    def built_pin(self) -> Path:
        """A node table that is built and not yet, or only just, in force."""
        return self.pin_dir / "node_table_new"

    # -- everything ------------------------------------------------------------

    def actual(
        self,
        realised: Realised | None,
        names: Mapping[int, str],
        likely: dict[bytes, int] | None = None,
        dumped: tuple[bytes, bytes] | None = None,
    ) -> Actual:
        """What the kernel holds now. `realised` and `names` (rule-set id ->
        RuleSet) say whose ids these are; ids are never reused, so both may be old.
        `likely`, `dumped`: see `read_ipcache`."""
        epoch, next_id = self.read_control()
        backends = self.read_backends()
        table = self.read_node_table()
        found = Actual(
            limits=self.limits(),
            now=now(),
            epoch=epoch,
            next_id=next_id,
            node_table=table,
            rule_sets=self.read_rule_sets(names, table or {}),
            half_open=self._linked("half_open_v2", "half_open"),
            ipcache=self.read_ipcache(likely, dumped),
            networks=self.read_networks(),
            backends=backends,
            frontends=self.read_frontends(backends),
            ranges=self.read_ranges(),
            node_addresses=self.read_node_addresses(),
            node_source=self.read_node_source(),
            masquerade=self.decode_prefixes(self.map("masquerade_v1")),
        )
        if realised is not None:
            found.uids = {u: e.id for u, e in realised.endpoints.items() if e.id < next_id}
        return found

    @property
    def instance(self) -> int:
        """Which maps these are: no other control map has this id while the machine is up."""
        return self.map("control_v1").info.id

    def limits(self) -> Limits:
        size = {name: m.info.max_entries for name, m in self._maps.items()}
        return Limits(
            ipcache=size["ipcache_v1"],
            networks=size["ipcache_lpm_v1"],
            frontends=size["frontends_v1"],
            slots=size["slots_v1"],
            backends=size["backends_v1"],
            rule_sets=size["rule_sets_v2"],
            half_open=size["half_open_v2"],
            ranges=size["source_ranges_v1"],
            masquerade=size["masquerade_v1"],
        )

    def read_control(self) -> tuple[int, int]:
        """(epoch, next id)."""
        row = self.layouts.control.unpack(self.map("control_v1").lookup(ZERO_KEY))
        return row.epoch, row.next_id

    # -- policy ------------------------------------------------------------------

    def read_node_table(self) -> dict[NodeKey, NodeEntry] | None:
        """The table in force; None: there is none, or its pin is lost."""
        try:
            (in_force,) = INDEX.unpack(self.map("node_v2").lookup(ZERO_KEY))
        except KeyError:
            return None
        for pin in (self.node_table_pin, self.built_pin):
            opened = open_pin(pin)
            if opened is None:
                continue
            with opened:
                if opened.info.id != in_force:
                    continue
                if pin == self.built_pin:  # killed between the swap and this rename
                    os.replace(pin, self.node_table_pin)
                return self.decode_node_table(opened)
        return None

    def decode_node_table(self, table: Map) -> dict[NodeKey, NodeEntry]:
        keys, values = table.dump()
        rows = zip(
            self.layouts.node_key.unpack_all(keys),
            self.layouts.endpoint.unpack_all(values),
            strict=True,
        )
        return {_node_key(key.kind, key.addr): _node_entry(value) for key, value in rows}

    def read_rule_sets(
        self, names: Mapping[int, str], table: Mapping[NodeKey, NodeEntry]
    ) -> dict[int, RuleSetInForce]:
        """Every pinned rule set, whether the node table names it or not."""
        pins = _numbered(self.pin_dir / "rule_sets")
        policies = (p for entry in table.values() for p in (entry.ingress, entry.egress) if p)
        # Slots are taken lowest first: what no table names yet follows what one names.
        slots = range(max((p.slot for p in policies), default=-1) + 1 + len(pins))
        linked = {inner: slot for slot, inner in self._inner_ids("rule_sets_v2", slots).items()}
        tries = self._inner_ids("cidrs_v1", slots)  # a copy of a rule set shares its trie
        found = {}
        for path in pins:
            number = int(path.name)
            with Map.open_pinned(str(path)) as opened:
                entries = self.decode_rules(opened)
                slot = linked.get(opened.info.id)
            cidr: dict[Prefix, int] = {}
            trie = open_pin(self.pin_dir / "cidrs" / path.name)
            if trie is not None:
                with trie:
                    cidr = self.decode_prefixes(trie)
                    if slot is not None and tries.get(slot) != trie.info.id:
                        slot = None
            content = rules.content_of(entries, cidr)
            known = rules.identities_of(entries)
            found[number] = RuleSetInForce(names.get(number, ""), content, slot, known)
        return found

    def decode_rules(self, inner: Map) -> dict[RuleKey, RuleValue]:
        keys, values = inner.dump()
        rows = zip(
            self.layouts.rule_key.unpack_all(keys),
            self.layouts.rule.unpack_all(values),
            strict=True,
        )
        return {
            (k.peer, k.protocol, k.port, k.prefix): (v.precedence, v.rule, v.action, v.flags)
            for k, v in rows
        }

    def decode_prefixes(self, trie: Map) -> dict[Prefix, int]:
        keys, values = trie.dump()
        numbers = array("I", values)
        rows = self.layouts.prefix.unpack_all(keys)
        return {(row.bits, row.addr): n for row, n in zip(rows, numbers, strict=True)}

    def _inner_ids(self, name: str, slots: Iterable[int]) -> dict[int, int]:
        """Slot -> inner map id, of some slots. Never of all: before Linux 6.8 every look-up
        in a map of maps, in a batch too, waits for an RCU grace period."""
        opened, found = self.map(name), {}
        limit = opened.info.max_entries
        for slot in slots:
            if slot >= limit:
                break
            with contextlib.suppress(KeyError):
                found[slot] = INDEX.unpack(opened.lookup(INDEX.pack(slot)))[0]
        return found

    def _linked(self, name: str, directory: str) -> set[int]:
        """Slots whose inner map is the one pinned under the slot's number."""
        pins = _numbered(self.pin_dir / directory)
        linked = self._inner_ids(name, [int(path.name) for path in pins])
        found = set()
        for path in pins:
            with Map.open_pinned(str(path)) as opened:
                if linked.get(int(path.name)) == opened.info.id:
                    found.add(int(path.name))
        return found

    # -- facts -----------------------------------------------------------------------

    def dump_ipcache(self) -> tuple[bytes, bytes]:
        """All keys and all values; mostly in the kernel, without the interpreter's lock."""
        return self.map("ipcache_v1").dump()

    def read_ipcache(
        self,
        likely: dict[bytes, int] | None = None,
        dumped: tuple[bytes, bytes] | None = None,
    ) -> dict[bytes, int]:
        """Every entry: `likely` itself when the map holds just that, which costs less to
        find out than to make another such dict and look everything up in it. `dumped`: what
        `dump_ipcache` has just read."""
        keys, values = dumped or self.dump_ipcache()
        words = memoryview(values).cast("I")
        identities = words[1::2].tolist()
        proofs, expected = words[0::2].tobytes(), addresses.addr_proofs(keys)
        if proofs == expected and likely is not None and _same_entries(keys, identities, likely):
            return likely
        packed = [key for (key,) in _ADDRESS.iter_unpack(keys)]
        if proofs == expected:
            return dict(zip(packed, identities, strict=True))
        rows = zip(packed, identities, array("I", proofs), array("I", expected), strict=True)
        return {key: i if proof == wanted else WRONG for key, i, proof, wanted in rows}

    def read_ipcache_keys(self, keys: Iterable[bytes]) -> dict[bytes, int]:
        """The entries of some addresses; absent ones are left out."""
        opened, codec, found = self.map("ipcache_v1"), self.layouts.ipcache, {}
        for key in keys:
            try:
                row = codec.unpack(opened.lookup(key))
            except KeyError:
                continue
            found[key] = row.identity if row.proof == addresses.addr_proof(key) else WRONG
        return found

    def read_networks(self) -> dict[Prefix, int]:
        return self.decode_prefixes(self.map("ipcache_lpm_v1"))

    # -- services ----------------------------------------------------------------------

    def read_backends(self) -> dict[int, BackendInForce]:
        """Every id that was ever written, those that rest too."""
        # An array, in order of ids; the lowest free one is taken first, and what was ever
        # written is not zero: behind a batch of zeros there is nothing.
        _, values = self.map("backends_v1").dump(dense=True)
        size = self.layouts.backend.size
        used = -(-len(values.rstrip(b"\0")) // size) * size
        found = {}
        for at in range(0, used, FEW * size):  # rows of all at once would be the most we hold
            rows = self.layouts.backend.unpack_all(values[at : min(at + FEW * size, used)])
            for number, row in enumerate(rows, at // size):
                if row.state or row.freed_at or row.addr != ZERO:
                    key = (row.addr, row.port, row.protocol)
                    found[number] = BackendInForce(key, row.state, row.freed_at)
        return found

    def read_backend_ids(self, numbers: Collection[int]) -> dict[int, BackendInForce]:
        if len(numbers) > FEW:
            found = self.read_backends()
            return {n: found[n] for n in numbers if n in found}
        opened = self.map("backends_v1")
        return {n: self._backend(opened.lookup(INDEX.pack(n))) for n in numbers}

    def _backend(self, value: bytes) -> BackendInForce:
        row = self.layouts.backend.unpack(value)
        return BackendInForce((row.addr, row.port, row.protocol), row.state, row.freed_at)

    def read_frontends(
        self, backends: Mapping[int, BackendInForce]
    ) -> dict[FrontendKey, FrontendInForce]:
        keys, values = self.map("frontends_v1").dump()
        rows = zip(
            self.layouts.frontend_key.unpack_all(keys),
            self.layouts.frontend.unpack_all(values),
            strict=True,
        )
        words = {(k.addr, k.port, k.protocol): (v.base, v.count, v.proof) for k, v in rows}
        return self._resolve(words, backends)

    def read_frontend_keys(
        self, keys: Iterable[FrontendKey], backends: Mapping[int, BackendInForce]
    ) -> dict[FrontendKey, FrontendInForce]:
        opened, words = self.map("frontends_v1"), {}
        for key in keys:
            try:
                row = self.layouts.frontend.unpack(
                    opened.lookup(self.layouts.frontend_key.pack_row(key))
                )
            except KeyError:
                continue
            words[key] = (row.base, row.count, row.proof)
        return self._resolve(words, backends)

    def _resolve(
        self,
        words: Mapping[FrontendKey, tuple[int, int, int]],
        backends: Mapping[int, BackendInForce],
    ) -> dict[FrontendKey, FrontendInForce]:
        """Each frontend with the backends that a program would find."""
        slots = _Slots(self.map("slots_v1"), sum(count for _, count, _ in words.values()))
        found = {}
        for key, (word, count, proof) in words.items():
            base, flags = word & SLOT_MASK, word >> FLAGS_SHIFT
            listed: Wanted | None
            if flags & HEADER:
                size, listed = _read_special(slots, (base, flags, count), key[2], backends)
            else:
                size, listed = count, _members(slots.read(base, count), key[2], backends)
            if proof != addresses.frontend_proof(*key) or (flags and not flags & HEADER):
                listed = None
            found[key] = FrontendInForce(base, size, listed)
        return found

    def asked_for_service(self, cookie: int, backend: BackendAddress) -> bool:
        """Whether the socket has that backend because it asked for a Service."""
        address, port = backend
        key = self.layouts.sock_key.pack(cookie=cookie, addr=address, port=port)
        try:
            self.map("socks_v1").lookup(key)
        except KeyError:
            return False
        return True

    # -- for clients outside ---------------------------------------------------------------

    def read_ranges(self) -> frozenset[RangeKey]:
        keys, _ = self.map("source_ranges_v1").dump()
        rows = self.layouts.range.unpack_all(keys)
        return frozenset((row.service, row.bits - 32, row.addr) for row in rows)

    def read_node_addresses(self) -> frozenset[bytes]:
        """An address whose value is not its own is none."""
        keys, values = self.map("node_addrs_v1").dump()
        packed = [key for (key,) in _ADDRESS.iter_unpack(keys)]
        rows = self.layouts.node_addr.unpack_all(values)
        return frozenset(
            key
            for key, row in zip(packed, rows, strict=True)
            if row.addr == key and row.proof == addresses.addr_proof(key)
        )

    def read_node_source(self) -> tuple[bytes, bytes]:
        opened = self.map("node_source_v1")
        rows = [self.layouts.node_addr.unpack(opened.lookup(INDEX.pack(i))) for i in (0, 1)]
        first, second = (
            row.addr if row.proof == addresses.addr_proof(row.addr) else ZERO for row in rows
        )
        return first, second


class _Slots:
    """Ranges of slots: one by one if they are few, else all at once."""

    def __init__(self, opened: Map, expected: int) -> None:
        self._map = opened
        self._size = opened.info.max_entries
        self._all: array[int] | None = None
        if expected > FEW:
            self._all = array("I", opened.dump(dense=True)[1])

    def read(self, base: int, count: int) -> list[int]:
        """What is there; what is not, is 0."""
        if self._all is not None:
            found = self._all[base : base + count].tolist()
        else:
            slots = range(base, min(base + count, self._size))
            found = [INDEX.unpack(self._map.lookup(INDEX.pack(i)))[0] for i in slots]
        return found + [0] * (count - len(found))


def _members(
    numbers: Iterable[int], protocol: int, backends: Mapping[int, BackendInForce]
) -> tuple[BackendAddress, ...] | None:
    """None: one of them is none."""
    found = [backends.get(number) for number in numbers]
    if not all(b is not None and _serves(b, protocol) for b in found):
        return None
    return tuple(b.key[:2] for b in found if b is not None)


def _read_special(
    slots: _Slots,
    word: tuple[int, int, int],
    protocol: int,
    backends: Mapping[int, BackendInForce],
) -> tuple[int, Special | None]:
    """(slots that it takes, what it is). `word`: base, flags, count."""
    base, flags, count = word
    header = plan_services.SLOT_HEADER
    number, affinity, outer, elsewhere = slots.read(base, header)
    if outer > services.MAX_BACKENDS:
        return header + count, None
    inside, outside = (
        slots.read(base + header, count),
        slots.read(base + header + count, outer),
    )
    read = _read_ring if flags & services.RING else _read_sorted
    lists = [read(numbers, protocol, backends) for numbers in (inside, outside)]
    if lists[0] is None or lists[1] is None:
        return header + count + outer, None
    made = Special(flags, number, affinity, bool(elsewhere), lists[0], lists[1])
    return header + count + outer, made


def _read_sorted(
    numbers: list[int], protocol: int, backends: Mapping[int, BackendInForce]
) -> tuple[BackendAddress, ...] | None:
    found = _members(numbers, protocol, backends)
    return tuple(sorted(found)) if found is not None and numbers == sorted(numbers) else None


def _read_ring(
    numbers: list[int], protocol: int, backends: Mapping[int, BackendInForce]
) -> tuple[BackendAddress, ...] | None:
    """The members of a ring; None: it is not theirs."""
    places = _members(numbers, protocol, backends)
    if not places:
        return places
    found = tuple(sorted(set(places)))
    same = services.ring_of(found) == places
    return found if same else None


def ipcache_values(packed: bytes, identities: Iterable[int]) -> bytes:
    """`struct tg_ipcache` of each of the 16-byte addresses that `packed` concatenates."""
    words = array("I", bytes(len(packed) // 2))
    words[0::2] = array("I", addresses.addr_proofs(packed))
    words[1::2] = array("I", identities)
    return words.tobytes()


def _same_entries(keys: bytes, values: list[int], likely: dict[bytes, int]) -> bool:
    """Whether these, in whatever order, are just the entries of `likely`. The kernel names
    no key twice.

    As many, and of the same sum of hash times value: hashes have 64 bits and are keyed anew in
    every process, so that nobody can choose entries that meet. (The sum of the pairs' hashes
    would not do: two values that have changed places leave it as it is, one time in some.)
    Asking the dict for each key would walk through its memory at random and cost twice as much."""
    if len(values) != len(likely) or 0 in values:  # a key without an identity would not count
        return False
    found: int = sum(map(operator.mul, map(hash, _ADDRESS.iter_unpack(keys)), values))
    # Of keys of the same form: (key,).
    wanted: int = sum(map(operator.mul, map(hash, zip(likely)), likely.values()))
    return found == wanted


def now() -> int:
    """CLOCK_MONOTONIC seconds, as programs and tg_backend.freed_at count."""
    return int(time.monotonic())


def open_pin(path: Path) -> Map | None:
    """The map pinned there; None: there is none."""
    try:
        return Map.open_pinned(str(path))
    except BpfError as error:
        if error.errno == errno.ENOENT:
            return None
        raise


def _numbered(directory: Path) -> list[Path]:
    return sorted((p for p in directory.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))


def _serves(backend: BackendInForce, protocol: int) -> bool:
    return backend.state == plan.ACTIVE and backend.key[2] == protocol


def _node_key(kind: int, address: bytes) -> NodeKey:
    if kind == plan.NODE_IFINDEX and address[4:] == ZERO[4:]:
        return kind, INDEX.unpack(address[:4])[0]
    return kind, address


def _policy(row: tuple[int, int, int, bytes, bytes]) -> Policy | None:
    slot, rule_set, flags, counts, shapes = row
    if not flags:
        return None
    lanes = ((lane * rules.MAX_SHAPES, count) for lane, count in enumerate(counts))
    in_use = tuple(tuple(shapes[at : at + count]) for at, count in lanes)
    return Policy(slot, rule_set, flags, in_use)


def _node_entry(row: Any) -> NodeEntry:
    (number, identity, ifindex, half_open, pod_mac, host_mac, _, ip4, ip6, ingress, egress) = row
    return NodeEntry(
        number,
        identity,
        ifindex,
        half_open,
        pod_mac,
        host_mac,
        ip4,
        ip6,
        _policy(ingress),
        _policy(egress),
    )
