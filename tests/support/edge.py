"""The town's node with an uplink: what comes in there from clients outside.

`Edge` adds to a `Town` the programs of net.o over the same maps, an interface with the node's
addresses, routes and neighbours, and services that ask for more than backends. As in `lab`, what
is put into maps is spelled out here from the structs' meaning.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from support import frames as f
from support import lab as l
from support import town as t
from support.lab import U32
from tidegate_bpf import Codec, LoadedObject, ObjectFile, Program, SkbContext

UPLINK = 20
NODE4, NODE6 = "172.18.0.1", "fd00:9::1"
SNAT = range(10000, 30000)
AFFINITY, RANGES, OUTSIDE, LOCAL, TWO, RING, HEADER = 1, 2, 4, 8, 32, 64, 128
MASQUERADED = 231
XDP_PASS, XDP_TX = 2, 3
NAT_FULL, NAT_LOST, NO_ROUTE, TTL, SOURCE_RANGE = 229, 230, 169, 196, 177


@dataclass(frozen=True)
class Out:
    """`reason` None: nothing was counted; the packet was none of ours."""

    verdict: int
    reason: int | None
    data: bytes

    @property
    def frame(self) -> f.Frame:
        return f.parse(self.data)


class Edge:
    """`xdp`: what comes in meets XDP's program first, and tc's if that lets it pass."""

    def __init__(self, town: t.Town, xdp: bool = False) -> None:
        self.town = town
        self.xdp = xdp
        self.turned = 0
        """Frames that XDP sent back out by itself."""
        self.lab = town.lab
        file = ObjectFile(l.BUILD / "net.o")
        self._files = [file, *([ObjectFile(l.BUILD / "xdp.o")] if xdp else [])]
        self.maps = self.lab.maps
        self.programs: dict[str, Program] = {}
        self._loaded: list[LoadedObject] = []
        self.load()
        names = ("tg_nat_key", "tg_nat", "tg_node_addr", "tg_range", "tg_affinity_key")
        self.codecs = {name: Codec(file.layout(name)) for name in names}

    def load(self, **rodata: int) -> None:
        """The programs, with knobs."""
        self.close()
        self._loaded = []
        for file in self._files:
            pins = {name: m for name, m in self.maps.items() if name in file.maps and "_v" in name}
            known = {name: value for name, value in rodata.items() if name in file.rodata}
            self._loaded.append(file.load(pins=pins, rodata=known))
            self.programs |= self._loaded[-1].programs

    def close(self) -> None:
        for loaded in self._loaded:
            loaded.close()

    def open(self) -> None:
        """A fresh town, and a node with its addresses."""
        self.town.open()
        for name in (
            "nat_v1",
            "affinity_v1",
            "source_ranges_v1",
            "node_addrs_v1",
            "masquerade_v1",
        ):
            for key in list(self.maps[name].keys()):
                self.maps[name].discard(key)
        for at, text in enumerate((NODE4, NODE6)):
            raw = l.addr(text)
            value = self.codecs["tg_node_addr"].pack(addr=raw, proof=l.addr_proof(raw))
            self.maps["node_addrs_v1"].update(raw, value)
            self.maps["node_source_v1"].update(U32.pack(at), value)

    def service(
        self,
        vip: str,
        port: int,
        protocol: int,
        inside: list[tuple[str, int]],
        *,
        outside: list[tuple[str, int]] | None = None,
        flags: int = OUTSIDE,
        affinity: int = 0,
        elsewhere: bool = True,
        base: int = 1,
        number: int = 7,
    ) -> None:
        """`outside` None: the same. Backends take ids base, base + 1, …; slots are from 100 on."""
        ids = []
        for at, (text, backend_port) in enumerate([*inside, *(outside or [])], base):
            row = self.lab.codecs["tg_backend"].pack(
                addr=l.addr(text), port=backend_port, protocol=protocol, state=1, freed_at=0
            )
            self.lab.maps["backends_v1"].update(U32.pack(at), row)
            ids.append(at)
        flags |= HEADER | (TWO if outside is not None else 0)
        header = [number, affinity, len(outside or []), int(elsewhere)]
        for at, word in enumerate([*header, *ids], 100 * base):
            self.lab.maps["slots_v1"].update(U32.pack(at), U32.pack(word))
        raw = l.addr(vip)
        self.lab.maps["frontends_v1"].update(
            self.lab.codecs["tg_frontend_key"].pack(addr=raw, port=port, protocol=protocol),
            self.lab.codecs["tg_frontend"].pack(
                base=100 * base | flags << 24,
                count=len(inside),
                proof=l.frontend_proof(raw, port, protocol),
            ),
        )

    def allow(self, network: str, number: int = 7) -> None:
        bits, raw = l.prefix(network)
        key = self.codecs["tg_range"].pack(bits=bits + 32, service=number, addr=raw)
        self.maps["source_ranges_v1"].update(key, U32.pack(1))

    def masquerade(self, *leave: str) -> None:
        """All that pods send outside, but for what is sent into the networks `leave`."""
        for text, value in (("::/0", 1), ("0.0.0.0/0", 1), *((text, 0) for text in leave)):
            bits, raw = l.prefix(text)
            key = self.lab.codecs["tg_prefix"].pack(bits=bits, addr=raw)
            self.maps["masquerade_v1"].update(key, U32.pack(value))

    def send(self, data: bytes, *, program: str = "from_net", host: bool = False) -> Out:
        before = self.lab.counters()
        if self.xdp and program == "from_net":
            verdict, out = self.run_xdp(data)
        else:
            verdict, out = XDP_PASS, data
        if verdict == XDP_PASS:
            assert out == data, "what XDP lets pass it leaves alone"
            given = self.context(host=host)
            result = self.programs[program].test_run(data, given, data_out_size=len(data) + 128)
            verdict, out = result.retval, result.data_out
        else:
            assert verdict == XDP_TX
            self.turned += 1
            verdict = l.REDIRECT
        after = self.lab.counters()
        changed = [k[0] for k, n in after.items() if n != before.get(k, 0) and k[0] != t.EVENT_LOST]
        assert len(changed) <= 1, changed
        return Out(verdict, changed[0] if changed else None, out)

    def run_xdp(self, data: bytes) -> tuple[int, bytes]:
        context = struct.pack("=6I", 0, len(data), 0, UPLINK, 0, 0)  # struct xdp_md
        result = self.programs["from_wire"].test_run(data, context, data_out_size=len(data) + 128)
        return result.retval, result.data_out

    def context(self, *, host: bool = False) -> SkbContext:
        """At the uplink; `host`: of the node's own making."""
        return SkbContext(ifindex=UPLINK, ingress_ifindex=0 if host else UPLINK)

    def age(self, units: int) -> None:
        """As if no packet of a translated flow had come for so many units of `seen`."""
        codec = self.codecs["tg_nat"]
        for key, value in list(self.maps["nat_v1"].items()):
            row = codec.unpack(value)
            aged = row._replace(seen=(row.seen - units) & 0xFFFFFFFF)
            self.maps["nat_v1"].update(key, codec.pack_row(aged))

    def nat(self) -> int:
        return len(list(self.maps["nat_v1"].keys()))


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def wire() -> None:
    """This thread's namespace has an uplink with the node's addresses and known neighbours."""
    _ip("link", "add", "up0", "index", str(UPLINK), "type", "veth", "peer", "name", "wire")
    _ip("link", "set", "up0", "address", f.MAC_B, "up")
    _ip("link", "set", "wire", "up")
    _ip("addr", "add", f"{NODE4}/16", "dev", "up0")
    _ip("addr", "add", f"{NODE6}/64", "dev", "up0", "nodad")
    for key in ("net/ipv4/conf/all/forwarding", "net/ipv6/conf/all/forwarding"):
        with open(os.path.join("/proc/sys", key), "w") as file:
            file.write("1")
    for via, everything in (("172.18.0.254", "default"), ("fd00:9::fe", "default")):
        family = "-6" if ":" in via else "-4"
        _ip(family, "neigh", "add", via, "lladdr", "02:00:00:00:00:fe", "dev", "up0")
        _ip(family, "route", "add", everything, "via", via, "dev", "up0")


@contextlib.contextmanager
def edge(xdp: bool = False) -> Iterator[Edge]:
    """In a network namespace with an uplink whose neighbours are known."""
    with t.town() as town:
        wire()
        made = Edge(town, xdp)
        try:
            yield made
        finally:
            made.close()
