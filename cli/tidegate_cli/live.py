"""A node's kernel state through its pins: raw structs, decoded by the object's own BTF.

Reads only, and independently of the loader's reading: this is what people check the loader with.
May not live here: verdicts (`lookup`), formats (`render`, `lists`).
"""

from __future__ import annotations

import errno
import struct
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tidegate_bpf
from tidegate_bpf import BpfError, Codec, Map, MapSpec, ObjectFile
from tidegate_loader import addresses
from tidegate_loader.kernel import FLAGS_SHIFT, SLOT_MASK, Layouts
from tidegate_loader.local import Realised
from tidegate_loader.plan_services import SLOT_HEADER
from tidegate_loader.services import HEADER
from tidegate_observer.tracked import life

from tidegate_cli.errors import CliError
from tidegate_cli.objects import RunObjects

INDEX = struct.Struct("=I")
ZERO = INDEX.pack(0)

_CT_KEY = {"a": "bytes[16]", "b": "bytes[16]", "aport": "be16", "bport": "be16", "protocol": "u8"}
_CT = [
    "word",
    "seen",
    "flags",
    "nat_addr",
    "src_endpoint",
    "dst_endpoint",
    "src_rule",
    "dst_rule",
    "to_dst",
    "to_src",
    "backend",
    "nat_port",
    "handshake",
    "first_byte",
    "start",
    "packets",
    "bytes",
    "reply_packets",
    "reply_bytes",
]
_COUNTER = {"packets": "u64", "bytes": "u64"}

BEGAN_A, NAT, SERVICE = 0x01, 0x20, 0x40
FREE, BUSY = 0, 1 << 63
"""Words of a half-open flow's place that holds none, or is being written."""


def objects_dir() -> Path:
    """Where the compiled programs are: in the source tree, else with the installation's data
    (/usr/lib/tidegate/objects in the image). Raises CliError."""
    source = Path(tidegate_bpf.__file__).parents[2] / "datapath" / "build"
    data = (sys.prefix, sysconfig.get_path("data"))
    for place in (source, *(Path(prefix, "lib/tidegate/objects") for prefix in data)):
        if (place / "pod.o").is_file():
            return place
    raise CliError("the eBPF objects are not built", "run `make objects`")


@dataclass(frozen=True)
class Endpoint:
    """One local endpoint of the node table in force; policies are struct tg_policy rows."""

    row: Any

    @property
    def addresses(self) -> list[str]:
        return [addresses.text(a) for a in (self.row.ip4, self.row.ip6) if a != addresses.ZERO]


@dataclass(frozen=True)
class Flow:
    """One conntrack entry. Addresses are text; `age` is in seconds since the last packet, `left`
    until it counts as absent (negative: it already does)."""

    protocol: int
    source: tuple[str, int]
    destination: tuple[str, int]
    kind: str
    """"table" or "half-open"."""
    flags: int
    nat: tuple[str, int] | None
    src_endpoint: int
    dst_endpoint: int
    src_rule: int
    dst_rule: int
    backend: int
    age: float
    left: float
    packets: int
    bytes: int
    reply_packets: int
    reply_bytes: int
    """As counted since it began; 0 of all: the node does not count."""
    epoch: int
    """Low 40 bits of the policy epoch it was judged in."""


Slot = tuple[int, str, int] | int
"""(backend id, address, port), or the id that no active backend has."""


@dataclass(frozen=True)
class Frontend:
    address: str
    port: int
    protocol: int
    base: int
    count: int
    backends: tuple[Slot, ...]
    """Each slot."""
    flags: int = 0
    """enum tg_frontend_flags."""
    number: int = 0
    """Of the service port, with a header."""
    affinity: int = 0
    """Seconds for which a client keeps its backend."""
    outside: tuple[Slot, ...] = ()
    """What clients from outside get, where that is another list."""


class NodeMaps:
    """One node's pinned maps, opened when first read. A context manager.

    Raises CliError when the node has none."""

    def __init__(self, pin_dir: Path) -> None:
        self.pin_dir = pin_dir
        self._opened: dict[Path, Map] = {}
        if not (pin_dir / "maps").is_dir():
            raise CliError(f"no maps are pinned in {pin_dir}", "is the node's loader running?")
        self.spec = ObjectFile(objects_dir() / "pod.o")
        self.layouts = Layouts(self.spec)
        self._ct_key = Codec(self.spec.layout("tg_ct_key"), _CT_KEY)
        self._ct = Codec(self.spec.layout("tg_ct"), _CT)
        self._half_open_set = Codec(self.spec.layout("tg_half_open_set"), ["way"])
        self._counter = Codec(self.spec.layout("tg_counter"), _COUNTER)

    def __enter__(self) -> NodeMaps:
        return self

    def __exit__(self, *_exception: object) -> None:
        for opened in self._opened.values():
            opened.close()
        self._opened.clear()

    def map(self, name: str) -> Map:
        """The map pinned as maps/`name`. CliError: it is not as our object has it."""
        return self._fits(self._open(self.pin_dir / "maps" / name), self.spec.maps[name])

    def pins(self) -> dict[str, str]:
        """Name → path of every pinned map that the object declares."""
        return {
            name: str(self.pin_dir / "maps" / name)
            for name in self.spec.maps
            if (self.pin_dir / "maps" / name).exists()
        }

    # ---- policy ----------------------------------------------------------------

    @cached_property
    def epoch(self) -> int:
        return int(self.layouts.control.unpack(self.map("control_v1").lookup(ZERO)).epoch)

    def node_table(self) -> Map | None:
        """The inner map in force; None: no table is."""
        return self._inner(
            "node_v2", 0, [self.pin_dir / n for n in ("node_table", "node_table_new")]
        )

    def endpoints(self) -> list[Endpoint]:
        """Endpoints of the table in force, by id."""
        table = self.node_table()
        if table is None:
            return []
        found = {}
        for key, value in table.items():
            if self.layouts.node_key.unpack(key).kind == self._enum("TG_NODE_IFINDEX"):
                row = self.layouts.endpoint.unpack(value)
                found[row.id] = Endpoint(row)
        return [found[number] for number in sorted(found)]

    def endpoint_at(self, address: bytes) -> Endpoint | None:
        """The local endpoint that has an address, as a program would find it."""
        table = self.node_table()
        if table is None:
            return None
        key = self.layouts.node_key.pack(kind=self._enum("TG_NODE_ADDR"), addr=address)
        value = get(table, key)
        return None if value is None else Endpoint(self.layouts.endpoint.unpack(value))

    def rule_set(self, policy: Any) -> Map | None:
        """The rules that a policy row leads to; None: the slot is empty."""
        return self._inner("rule_sets_v2", policy.slot, [self._pin("rule_sets", policy)])

    def cidrs(self, policy: Any) -> Map | None:
        return self._inner("cidrs_v1", policy.slot, [self._pin("cidrs", policy)])

    def rules(self, policy: Any) -> list[tuple[Any, Any]]:
        """(key row, value row) of a rule set, sorted by key."""
        opened = self.rule_set(policy)
        if opened is None:
            return []
        rows = (
            (self.layouts.rule_key.unpack(k), self.layouts.rule.unpack(v))
            for k, v in opened.items()
        )
        return sorted(rows)

    def classes(self, policy: Any) -> list[tuple[str, int]]:
        """(prefix, class) of a rule set's CIDR table, sorted."""
        opened = self.cidrs(policy) if policy.flags & self._enum("TG_POLICY_CIDR") else None
        return [] if opened is None else self._prefixes(opened)

    # ---- facts -----------------------------------------------------------------

    def ipcache(self) -> list[tuple[str, int, int, bool]]:
        """(prefix, identity, flags, proof is right), networks too, sorted by prefix."""
        found = []
        for key, value in self.map("ipcache_v1").items():
            row = self.layouts.ipcache.unpack(value)
            prefix = addresses.prefix_text((128, key))
            good = row.proof == addresses.addr_proof(key)
            found.append((prefix, row.identity & 0xFFFFFF, row.identity & ~0xFFFFFF, good))
        networks = self._prefixes(self.map("ipcache_lpm_v1"))
        found += [(prefix, identity, 0, True) for prefix, identity in networks]
        return sorted(found)

    def frontends(self) -> list[Frontend]:
        """Every frontend with what each of its slots leads to."""
        found = []
        for key, value in self.map("frontends_v1").items():
            front, word = self.layouts.frontend_key.unpack(key), self.layouts.frontend.unpack(value)
            base, flags = word.base & SLOT_MASK, word.base >> FLAGS_SHIFT
            header, at = (0, 0, 0), base
            if flags & HEADER:
                slots = self.map("slots_v1")
                number, affinity, outer = (
                    INDEX.unpack(slots.lookup(INDEX.pack(base + i)))[0] for i in range(3)
                )
                header, at = (number, affinity, outer), base + SLOT_HEADER
            inside, outside = (
                tuple(self._slot(slot, front.protocol) for slot in range(first, first + count))
                for first, count in ((at, word.count), (at + word.count, header[2]))
            )
            found.append(
                Frontend(
                    addresses.text(front.addr),
                    front.port,
                    front.protocol,
                    base,
                    word.count,
                    inside,
                    flags,
                    header[0],
                    header[1],
                    outside,
                )
            )
        return sorted(found, key=lambda f: (f.address, f.port, f.protocol))

    def service_counts(self) -> dict[tuple[str, int, int], tuple[int, int]]:
        """(address, port, protocol) → (connections, refused), all CPUs; only who was asked."""
        found = {}
        opened = self.map("service_counts_v1")
        for key, value in opened.items():
            front = self.layouts.frontend_key.unpack(key)
            rows = [self.layouts.service_count.unpack(p) for p in opened.split_per_cpu(value)]
            figures = (sum(r.connections for r in rows), sum(r.refused for r in rows))
            found[addresses.text(front.addr), front.port, front.protocol] = figures
        return found

    def source_ranges(self) -> list[tuple[int, str]]:
        """(number of the service port, prefix), sorted."""
        rows = map(self.layouts.range.unpack, self.map("source_ranges_v1").keys())
        return sorted((r.service, addresses.prefix_text((r.bits - 32, r.addr))) for r in rows)

    def backends(self) -> list[tuple[int, Any]]:
        """(id, row) of every id that was ever written."""
        blank = bytes(self.layouts.backend.size)
        return [
            (INDEX.unpack(key)[0], self.layouts.backend.unpack(value))
            for key, value in self.map("backends_v1").items()
            if value != blank
        ]

    def flows(self) -> Iterator[Flow]:
        """Established flows, then the half-open shares."""
        for key, value in self.map("ct_v2").items():
            ct = self._ct.unpack(value)
            if ct.word not in (FREE, BUSY):
                yield self._flow(self._ct_key.unpack(key), ct, "table")
        shares = self._declared_inner("half_open_v2")
        for path in sorted((self.pin_dir / "half_open").glob("[0-9]*"), key=lambda p: int(p.name)):
            for _, value in self._fits(self._open(path), shares).items():
                for way in self._half_open_set.unpack(value).way if any(value) else ():
                    if way.ct.word not in (FREE, BUSY):
                        yield self._flow(way.key, way.ct, "half-open")

    # ---- figures ---------------------------------------------------------------

    def metrics(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(reason, direction) → (packets, bytes), all CPUs, without zeros."""
        found = {}
        opened = self.map("metrics_v1")
        for key, value in opened.items():
            rows = [self._counter.unpack(part) for part in opened.split_per_cpu(value)]
            packets = sum(row.packets for row in rows)
            if packets:
                (index,) = INDEX.unpack(key)
                found[index // 2, index % 2] = packets, sum(row.bytes for row in rows)
        return found

    def memory(self) -> dict[str, int]:
        """Bytes of kernel memory by map; inner maps are summed under their pins' directory."""
        found = {p.name: self._open(p).memory() for p in sorted((self.pin_dir / "maps").iterdir())}
        for name in ("rule_sets", "cidrs", "half_open"):
            inner = (self.pin_dir / name).glob("[0-9]*")
            found[name] = sum(self._memory(path) for path in inner)
        found["node_table"] = self._memory(self.pin_dir / "node_table")
        return found

    def hooks(self) -> dict[str, list[str]]:
        """Names of the pinned links: {"tcx": interfaces' hooks, "cgroup": attach types}."""
        names = sorted(p.name for p in (self.pin_dir / "links").glob("*"))
        return {
            "tcx": [name for name in names if not name.startswith("cgroup-")],
            "cgroup": [
                name.removeprefix("cgroup-") for name in names if name.startswith("cgroup-")
            ],
        }

    # ---- inner -----------------------------------------------------------------

    def _open(self, path: Path) -> Map:
        if path not in self._opened:
            self._opened[path] = Map.open_pinned(str(path))
        return self._opened[path]

    def _memory(self, path: Path) -> int:
        try:
            with Map.open_pinned(str(path)) as opened:
                return opened.memory()
        except BpfError as error:
            if error.errno != errno.ENOENT:  # replaced while we read
                raise
            return 0

    def _enum(self, name: str) -> int:
        return next(m[name] for m in self.spec.enums.values() if name in m)

    def _pin(self, directory: str, policy: Any) -> Path:
        return self.pin_dir / directory / str(policy.rule_set)

    def _inner(self, outer: str, slot: int, pins: list[Path]) -> Map | None:
        """The map in a slot, by the pin that is the same map, else by its id."""
        value = get(self.map(outer), INDEX.pack(slot))
        if value is None:
            return None
        (number,) = INDEX.unpack(value)
        declared = self._declared_inner(outer)
        for pin in pins:
            if pin.exists() and self._open(pin).info.id == number:
                return self._fits(self._open(pin), declared)
        path = Path(outer) / str(number)
        if path not in self._opened:
            self._opened[path] = Map.from_id(number)
        return self._fits(self._opened[path], declared)

    def _declared_inner(self, outer: str) -> MapSpec:
        declared = self.spec.maps[outer].inner
        assert declared is not None
        return declared

    def _fits(self, opened: Map, declared: MapSpec) -> Map:
        """Bytes of another layout would be read as nonsense, or not at all."""
        held = opened.info.key_size, opened.info.value_size
        known = declared.key_size, declared.value_size
        if held != known:
            raise CliError(
                f"{declared.name} in {self.pin_dir} has keys and values of {held[0]} and {held[1]} "
                f"bytes, this command knows them with {known[0]} and {known[1]}",
                "node and command are of different versions: use the command that came with the "
                "node's loader, or bring the loader to this version",
            )
        return opened

    def _prefixes(self, opened: Map) -> list[tuple[str, int]]:
        rows = ((self.layouts.prefix.unpack(k), INDEX.unpack(v)[0]) for k, v in opened.items())
        return sorted((addresses.prefix_text((k.bits, k.addr)), number) for k, number in rows)

    def _slot(self, slot: int, protocol: int) -> tuple[int, str, int] | int:
        (number,) = INDEX.unpack(self.map("slots_v1").lookup(INDEX.pack(slot)))
        row = self.layouts.backend.unpack(self.map("backends_v1").lookup(INDEX.pack(number)))
        if row.state != self._enum("TG_BACKEND_ACTIVE") or row.protocol != protocol:
            return int(number)
        return number, addresses.text(row.addr), row.port

    def _flow(self, k: Any, v: Any, kind: str) -> Flow:
        a, b = (addresses.text(k.a), k.aport), (addresses.text(k.b), k.bport)
        began_a = v.flags & BEGAN_A
        age = (seconds_now() - v.seen) & 0xFFFFFFFF
        age = age - (1 << 32) if age >> 31 else age
        unit = (1 << 30) / 1e9
        return Flow(
            protocol=k.protocol,
            source=a if began_a else b,
            destination=b if began_a else a,
            kind=kind,
            flags=v.flags,
            nat=(addresses.text(v.nat_addr), v.nat_port) if v.flags & (NAT | SERVICE) else None,
            src_endpoint=v.src_endpoint,
            dst_endpoint=v.dst_endpoint,
            src_rule=signed(v.src_rule),
            dst_rule=signed(v.dst_rule),
            backend=v.backend,
            age=age * unit,
            left=(life(k.protocol, v.flags) - age) * unit,
            packets=v.packets,
            bytes=v.bytes,
            reply_packets=v.reply_packets,
            reply_bytes=v.reply_bytes,
            epoch=v.word >> 24,
        )


def seconds_now() -> int:
    """What the programs call now: CLOCK_MONOTONIC nanoseconds >> 30."""
    return time.monotonic_ns() >> 30


def signed(number: int) -> int:
    """A __u32 that carries an enum tg_rule_special."""
    return number - (1 << 32) if number >> 31 else number


def get(opened: Map, key: bytes) -> bytes | None:
    """`lookup` with None for an absent key."""
    try:
        return opened.lookup(key)
    except KeyError:
        return None


@dataclass(frozen=True)
class NodeView:
    """A node as the CLI shows it: its kernel, and what its loader says of ids."""

    name: str
    maps: NodeMaps
    realised: Realised | None

    def rule_set_name(self, number: int) -> str:
        """Name of the RuleSet object behind an id; "" when its loader does not say."""
        known = self.realised.rule_sets.get(str(number)) if self.realised else None
        return known.name if known else ""

    def pod_name(self, endpoint: int) -> str:
        """ "namespace/name" of an endpoint id; "" when unknown."""
        known = self.realised.endpoints.values() if self.realised else ()
        return next((f"{e.namespace}/{e.name}" for e in known if e.id == endpoint), "")


def views(run: RunObjects, only: str | None) -> Iterator[NodeView]:
    """Each node in turn, its maps open until the next is asked for."""
    for node in run.nodes(only):
        with NodeMaps(run.pin_dir(node)) as maps:
            yield NodeView(node, maps, run.realised(node))
