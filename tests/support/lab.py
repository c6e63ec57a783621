"""A datapath on the bench: the real programs over maps that a test fills by hand.

Nothing is attached and no loader code runs: what is put into the maps is spelled out here from
the structs' meaning, so a fault in the loader cannot hide one in the programs.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidegate_bpf import Codec, LoadedObject, Map, MapType, ObjectFile, SkbContext

BUILD = Path(__file__).parents[2] / "datapath" / "build"
PASS, DROP, REDIRECT = -1, 2, 7
STRUCTS = [
    "tg_node_key",
    "tg_endpoint",
    "tg_rule_key",
    "tg_rule",
    "tg_prefix",
    "tg_ipcache",
    "tg_frontend_key",
    "tg_frontend",
    "tg_backend",
    "tg_service_count",
    "tg_stream",
    "tg_process",
    "tg_ct_key",
    "tg_ct",
    "tg_half_open_set",
    "tg_control",
    "tg_counter",
    "tg_event",
    "tg_flow_event",
    "tg_trace",
    "tg_trace_filter",
]
U32 = struct.Struct("=I")
SHAPES, LANES = 12, 3
"""Key shapes a lane may have, and lanes: of all rules (or the Admin tier), of those below it, of
those in audit mode."""
RULES, CIDR, ISOLATED, AUDIT, AUDITED = 1, 2, 4, 8, 16
"""A policy's flags."""
SETS, WAYS = 256, 4
"""Of a share of half-open flows."""
INNER_MAP = 0x1000
"""BPF_F_INNER_MAP: an array whose size may differ from the declared one's."""
HAIRPIN4, HAIRPIN6 = "169.254.42.1", "fd74:6964:6567:6174::1"


def addr(text: str) -> bytes:
    """128 bits, IPv4 mapped; "" is none."""
    if not text:
        return bytes(16)
    ip = ipaddress.ip_address(text)
    return bytes(10) + b"\xff\xff" + ip.packed if ip.version == 4 else ip.packed


def prefix(text: str) -> tuple[int, bytes]:
    net = ipaddress.ip_network(text)
    return net.prefixlen + (96 if net.version == 4 else 0), addr(str(net.network_address))


def addr_proof(raw: bytes) -> int:
    w = struct.unpack("=4I", raw)
    return ((w[0] * 0x9E3779B1) ^ (w[1] * 0x85EBCA77) ^ (w[2] * 0xC2B2AE3D) ^ w[3]) & 0xFFFFFFFF


def frontend_proof(raw: bytes, port: int, protocol: int) -> int:
    word = struct.unpack("=H", struct.pack(">H", port))[0] | protocol << 16
    x = addr_proof(raw) ^ (word * 0x27D4EB2F & 0xFFFFFFFF)
    return (x ^ x >> 16) & 0xFFFF


@dataclass(frozen=True)
class Rules:
    """One direction's rule set. `entries`: (peer word, protocol, port, lane << 5 | prefix bits) →
    (precedence, rule, action), and flags if there are any; `cidr`: prefix text → class;
    `isolated`: what no rule decides is denied; `audited`: the second verdict denies it."""

    entries: dict[tuple[int, int, int, int], tuple[int, ...]] = field(default_factory=dict)
    cidr: dict[str, int] = field(default_factory=dict)
    isolated: bool = True
    audited: bool = False

    def shapes(self, lane: int = 0) -> list[int]:
        found = {
            peer >> 24 << 5 | prefix & 31
            for peer, _, _, prefix in self.entries
            if prefix >> 5 == lane
        }
        return sorted(found, key=lambda s: (s >> 5, -(s & 31)))

    def flags(self) -> int:
        audit = AUDIT if self.audited or self.shapes(2) else 0
        return (
            RULES
            | (CIDR if self.cidr else 0)
            | (ISOLATED if self.isolated else 0)
            | audit
            | (AUDITED if self.audited else 0)
        )


@dataclass
class Pod:
    id: int
    identity: int
    ifindex: int
    ip4: str = ""
    ip6: str = ""
    ingress: Rules | None = None
    egress: Rules | None = None
    local: bool = True

    @property
    def mac(self) -> bytes:
        return bytes([2, 0, 0, 0, 1, self.id & 255])

    @property
    def host_mac(self) -> bytes:
        return bytes([2, 0, 0, 0, 2, self.id & 255])


class Lab:
    """Context manager. `world` switches the node table; the other setters write at once."""

    def __init__(self, *, program: str = "pod", **rodata: int | bytes) -> None:
        self.file = ObjectFile(BUILD / f"{program}.o")
        self.codecs = {name: Codec(self.file.layout(name)) for name in STRUCTS}
        knobs = {"hairpin_ip4": addr(HAIRPIN4), "hairpin_ip6": addr(HAIRPIN6)}
        self.rodata = {k: v for k, v in (knobs | rodata).items() if k in self.file.rodata}
        self.loaded: LoadedObject = self.file.load(rodata=self.rodata)
        self.maps = self.loaded.maps
        self.keep: list[Map] = []
        self.epoch = 0
        self.slots = 0
        self.shares: dict[tuple[int, int], Map] = {}
        self.linked: dict[str, list[tuple[bytes, Map]]] = {
            "rule_sets_v2": [],
            "cidrs_v1": [],
            "half_open_v2": [],
        }
        self.bump()

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.loaded.close()
        for inner in self.keep:
            inner.close()

    def inner(self, kind: MapType, key: int, value: int, entries: int, flags: int = 0) -> Map:
        made = Map.create(kind, key, value, max(entries, 1), flags=flags)
        self.keep.append(made)
        return made

    def bump(self) -> None:
        self.epoch += 1
        control = self.codecs["tg_control"].pack(epoch=self.epoch, next_id=1)
        self.maps["control_v1"].update(U32.pack(0), control)

    def policy(self, rules: Rules | None, rule_set: int) -> tuple[int, int, int, bytes, bytes]:
        if rules is None:
            return (0, 0, 0, bytes(LANES), bytes(LANES * SHAPES))
        slot, self.slots = self.slots, self.slots + 1
        inner = self.inner(MapType.HASH, 8, 16, len(rules.entries))
        for (peer, protocol, port, bits), (
            precedence,
            rule,
            action,
            *flags,
        ) in rules.entries.items():
            key = self.codecs["tg_rule_key"].pack(
                peer=peer, port=port, protocol=protocol, prefix=bits
            )
            inner.update(
                key,
                self.codecs["tg_rule"].pack(
                    precedence=precedence, rule=rule, action=action, flags=sum(flags)
                ),
            )
        self.linked["rule_sets_v2"].append((U32.pack(slot), inner))
        if rules.cidr:
            trie = self.inner(MapType.LPM_TRIE, 20, 4, len(rules.cidr), flags=1)
            for text, number in rules.cidr.items():
                bits, raw = prefix(text)
                trie.update(self.codecs["tg_prefix"].pack(bits=bits, addr=raw), U32.pack(number))
            self.linked["cidrs_v1"].append((U32.pack(slot), trie))
        lanes = [bytes(rules.shapes(lane)) for lane in range(LANES)]
        padded = b"".join(lane.ljust(SHAPES, b"\0") for lane in lanes)
        return (slot, rule_set, rules.flags(), bytes(map(len, lanes)), padded)

    def world(self, pods: list[Pod]) -> None:
        """Publish these local pods as a new node table, with their addresses in ipcache. A pod id
        seen before keeps its place and its half-open flows (`shares`)."""
        table = self.inner(MapType.HASH, 20, self.codecs["tg_endpoint"].size, len(pods) * 3)
        node_key = self.codecs["tg_node_key"]
        for number, pod in enumerate(p for p in pods if p.local):
            if (pod.id, number) not in self.shares:
                self.shares[pod.id, number] = self.inner(
                    MapType.ARRAY, 4, self.codecs["tg_half_open_set"].size, SETS, INNER_MAP
                )
                self.linked["half_open_v2"].append((U32.pack(number), self.shares[pod.id, number]))
            value = self.codecs["tg_endpoint"].pack(
                id=pod.id,
                identity=pod.identity,
                ifindex=pod.ifindex,
                half_open=number,
                pod_mac=pod.mac,
                host_mac=pod.host_mac,
                flags=0,
                ip4=addr(pod.ip4),
                ip6=addr(pod.ip6),
                ingress=self.policy(pod.ingress, pod.id * 10 + 1),
                egress=self.policy(pod.egress, pod.id * 10 + 2),
            )
            table.update(node_key.pack(kind=1, addr=U32.pack(pod.ifindex) + bytes(12)), value)
            for text in filter(None, (pod.ip4, pod.ip6)):
                table.update(node_key.pack(kind=2, addr=addr(text)), value)
        # In batches: each update of a map-in-map waits for the kernel's readers.
        for name, inners in self.linked.items():
            self.maps[name].update_items(inners)
            inners.clear()
        self.maps["node_v2"].update(U32.pack(0), table)
        for pod in pods:
            for text in filter(None, (pod.ip4, pod.ip6)):
                self.ipcache(text, pod.identity, local=pod.local, peer=True)
        self.bump()

    def ipcache(
        self,
        text: str,
        identity: int,
        *,
        local: bool = False,
        frontend: bool = False,
        peer: bool = False,
        node: bool = False,
        own: bool = False,
    ) -> None:
        raw = addr(text)
        flags = local << 24 | frontend << 25 | peer << 26 | node << 27 | own << 28
        value = self.codecs["tg_ipcache"].pack(proof=addr_proof(raw), identity=identity | flags)
        self.maps["ipcache_v1"].update(raw, value)

    def network(self, text: str, identity: int) -> None:
        bits, raw = prefix(text)
        key = self.codecs["tg_prefix"].pack(bits=bits, addr=raw)
        self.maps["ipcache_lpm_v1"].update(key, U32.pack(identity))

    def service(
        self, vip: str, port: int, protocol: int, backends: list[tuple[str, int]], base: int = 0
    ) -> None:
        """Backends take ids and slots base, base + 1, …"""
        for at, (text, backend_port) in enumerate(backends, base):
            backend = self.codecs["tg_backend"].pack(
                addr=addr(text), port=backend_port, protocol=protocol, state=1, freed_at=0
            )
            self.maps["backends_v1"].update(U32.pack(at), backend)
            self.maps["slots_v1"].update(U32.pack(at), U32.pack(at))
        raw = addr(vip)
        self.maps["frontends_v1"].update(
            self.codecs["tg_frontend_key"].pack(addr=raw, port=port, protocol=protocol),
            self.codecs["tg_frontend"].pack(
                base=base, count=len(backends), proof=frontend_proof(raw, port, protocol)
            ),
        )
        self.ipcache(vip, 2, frontend=True)

    def run(
        self, program: str, frame: bytes, ifindex: int = 1, *, from_ifindex: int = 1
    ) -> tuple[int, bytes, SkbContext]:
        """(tc verdict, frame after, context after). `ifindex` must exist in this network
        namespace (1: loopback). `from_ifindex` 0: made by this node itself."""
        context = SkbContext(ifindex=ifindex, ingress_ifindex=from_ifindex)
        room = len(frame) + 64  # translation never grows a frame
        result = self.loaded.programs[program].test_run(frame, context, data_out_size=room)
        return result.retval, result.data_out, SkbContext.from_buffer_copy(result.ctx_out)

    def counters(self) -> dict[tuple[int, int], int]:
        """{(reason, direction): packets}"""
        found = {}
        for key, value in self.maps["metrics_v1"].items():
            if not any(value):
                continue
            index = U32.unpack(key)[0]
            parts = self.maps["metrics_v1"].split_per_cpu(value)
            packets = sum(self.codecs["tg_counter"].unpack(p[:16]).packets for p in parts)
            found[index // 2, index % 2] = packets
        return found

    def asked(self, vip: str, port: int, protocol: int) -> tuple[int, int]:
        """How often a frontend was asked: (somebody was there, nobody was)."""
        key = self.codecs["tg_frontend_key"].pack(addr=addr(vip), port=port, protocol=protocol)
        table = self.maps["service_counts_v1"]
        try:
            parts = table.lookup_per_cpu(key)
        except KeyError:
            return 0, 0
        rows = [self.codecs["tg_service_count"].unpack(part) for part in parts]
        return sum(r.connections for r in rows), sum(r.refused for r in rows)

    def flows(self) -> list[tuple[object, object]]:
        """(key, value) of every established flow."""
        key, value = self.codecs["tg_ct_key"], self.codecs["tg_ct"]
        return [(key.unpack(k), value.unpack(v)) for k, v in self.maps["ct_v2"].items()]

    def half_open(self, share: Map) -> dict[tuple[int, int], tuple[Any, Any]]:
        """{(set, way): (key, value)} of a share's flows."""
        codec = self.codecs["tg_half_open_set"]
        return {
            (U32.unpack(at)[0], i): (way.key, way.ct)
            for at, raw in share.items()
            if any(raw)
            for i, way in enumerate(codec.unpack(raw).way)
            if way.ct.word
        }
