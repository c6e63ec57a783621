"""A small town for the datapath's packet fixtures: pods, policies, addresses and services on one
`Lab`, in a network namespace of its own.

Rows name pods by letter; `Town` turns the letters into frames, runs them, and says what came out.
Expected header bytes come from `frames`, never from the datapath.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from support import frames as f
from support.lab import DROP, SETS, U32, Lab, Pod, Rules
from tidegate_bpf import Map, RingBuffer, netns

ALLOW, DENY = 1, 0
ANY, CLASS = 0x02000000, 0x01000000
POLICY, POLICY_DENY, INVALID, TRUNCATED = 133, 181, 134, 135
SOURCE, ETHERTYPE, EXT_HEADER, NO_BACKEND, PENDING = 132, 140, 156, 158, 203
VLAN, ND, NO_RULE_SET, FRAGMENT, ERROR = 220, 221, 222, 223, 224
SCTP_PORT, SOURCE_ROUTE, SENDER, EVENT_LOST = 225, 226, 228, 254
EVENT_LIMITED = 252
INGRESS, EGRESS = 0, 1

IDENTITY = {"a": 300, "b": 301, "c": 302, "d": 303, "r": 304}
IP4 = {"a": "10.1.0.10", "b": "10.1.0.11", "c": "10.1.0.12", "d": "10.1.0.13", "r": "10.2.0.20"}
IP6 = {"a": "fd00:1::10", "b": "fd00:1::11", "c": "fd00:1::12", "d": "fd00:1::13"}
IP6 |= {"r": "fd00:2::20", "n": "fd00:9::2", "w": "2001:db8::8", "u": "fd00:1::99"}
# A node, the world, and an address of a pod CIDR that nobody has published.
IP4 |= {"n": "172.18.0.2", "w": "192.0.2.8", "u": "10.1.0.99"}
IFINDEX = {"a": 10, "b": 11, "c": 12, "d": 13}
PENDING_IFINDEX = 14
BACKENDS = 16
"""Ids that `open` frees."""
VIP4, VIP6 = "10.96.0.1", "fd00:96::1"


_numbers = itertools.count()


@contextlib.contextmanager
def namespace() -> Iterator[None]:
    """This thread in a fresh network namespace that has the town's interface numbers."""
    name = f"tgt-{os.getpid()}-{next(_numbers)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        for index in (*IFINDEX.values(), PENDING_IFINDEX):
            link = f"link add v{index} index {index} type veth peer name p{index}"
            subprocess.run(["ip", "-n", name, *link.split()], check=True)
        with netns.inside(f"/run/netns/{name}"):
            yield
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


@dataclass(frozen=True)
class Seen:
    """What a run did: verdict, the one reason counted (0: forwarded), its direction, the frame."""

    verdict: int
    reason: int
    direction: int
    data: bytes

    @property
    def frame(self) -> f.Frame:
        return f.parse(self.data)


class Town:
    """a, b, c, d live here, r on another node, n is a node, w the world. Without `rules` nobody is
    isolated; `rules` maps letter + direction ("b<" ingress, "b>" egress) to a rule set."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def open(self, rules: dict[str, Rules] | None = None, **identities: int) -> None:
        """A fresh town: no flow, fragment, service or address is left of the one before."""
        flows = ("ct_v2", "answered_v1", "frags_v1")
        names = (*flows, "ipcache_v1", "ipcache_lpm_v1", "frontends_v1")
        for table in (self.lab.maps[name] for name in names):
            for key in list(table.keys()):
                table.discard(key)
        empty = bytes(self.lab.codecs["tg_half_open_set"].size)
        for share in self.lab.shares.values():
            share.update_items([(U32.pack(i), empty) for i in range(SETS)])
        for number in range(BACKENDS):
            self.lab.maps["backends_v1"].update(U32.pack(number), bytes(24))
        self.lab.slots = 0
        self.lab.network("10.1.0.0/16", 0)
        self.lab.network("fd00:1::/64", 0)
        self.switch(rules, **identities)
        for text in (IP4["n"], IP6["n"]):
            self.lab.ipcache(text, 4, peer=True)

    def switch(self, rules: dict[str, Rules] | None = None, **identities: int) -> None:
        """Other policies or identities; flows live on."""
        rules = rules or {}
        pods = [
            Pod(
                id=number,
                identity=identities.get(name, IDENTITY[name]),
                ifindex=IFINDEX.get(name, 0),
                ip4=IP4[name],
                ip6=IP6[name],
                ingress=rules.get(name + "<"),
                egress=rules.get(name + ">"),
                local=name in IFINDEX,
            )
            for number, name in enumerate(IDENTITY, 1)
        ]
        self.pods = dict(zip(IDENTITY, pods, strict=True))
        self.lab.world(pods)

    def send(self, hook: str, data: bytes, *, host: bool = False) -> Seen:
        """`hook`: the pod's letter, then ">" where it leaves the pod, "<" where it enters."""
        program = "from_pod" if hook[1] == ">" else "to_pod"
        before = self.lab.counters()
        ifindex = IFINDEX.get(hook[0], PENDING_IFINDEX)
        verdict, after, _ = self.lab.run(program, data, ifindex, from_ifindex=0 if host else 1)
        changed = [key for key, count in self.lab.counters().items() if count != before.get(key, 0)]
        changed = [key for key in changed if key[0] not in (EVENT_LOST, EVENT_LIMITED)]
        assert len(changed) == 1, changed
        ((reason, direction),) = changed
        # Only what nobody serves is answered; all else that is counted is dropped.
        assert (verdict == DROP) == (reason != 0) or reason == NO_BACKEND
        return Seen(verdict, reason, direction, after)

    def reason(self, hook: str, data: bytes, *, host: bool = False) -> int:
        return self.send(hook, data, host=host).reason

    def share(self, name: str) -> Map:
        """The half-open flows that pod `name` may have."""
        number = list(IFINDEX).index(name)
        return self.lab.shares[self.pods[name].id, number]

    def half_open(self, name: str) -> list[Any]:
        return [value for _, value in self.lab.half_open(self.share(name)).values()]

    def established(self) -> list[Any]:
        return [value for _, value in self.lab.flows()]

    def edit(self, table: Map, **fields: Callable[[int], int]) -> None:
        """Pass a field of every flow in `table` through a function."""

        def edited(flow: Any) -> Any:
            return flow._replace(**{name: to(getattr(flow, name)) for name, to in fields.items()})

        share = table in self.lab.shares.values()
        codec = self.lab.codecs["tg_half_open_set" if share else "tg_ct"]
        for key, value in list(table.items()):
            row = codec.unpack(value)
            if share:
                ways = (w._replace(ct=edited(w.ct)) if w.ct.word else w for w in row.way)
                row = row._replace(way=tuple(ways))
            else:
                row = edited(row)
            table.update(key, codec.pack_row(row))

    def age(self, table: Map, units: int) -> None:
        """As if no packet had come for so many units of `seen`."""
        self.edit(table, seen=lambda seen: (seen - units) & 0xFFFFFFFF)

    def handshake(self, src: str, dst: str, version: int, sport: int = 40000) -> None:
        """TCP from `src` to port 80 of `dst`, both pods here, to established."""
        for flags, back in ((f.SYN, False), (f.SYN | f.ACK, True), (f.ACK, False)):
            hook = (dst if back else src) + ">"
            assert self.reason(hook, segment(src, dst, version, flags, back, sport)) == 0

    def told(self) -> list[Any]:
        """Starts and ends of flows since the last call."""
        with RingBuffer(self.lab.maps["flows_v1"]) as ring:
            return [self.lab.codecs["tg_flow_event"].unpack(raw) for raw in ring.read()]

    def events(self) -> list[Any]:
        """Denials since the last call."""
        with RingBuffer(self.lab.maps["events_v1"]) as ring:
            return [self.lab.codecs["tg_event"].unpack(raw) for raw in ring.read()]


@contextlib.contextmanager
def town(**rodata: int | bytes) -> Iterator[Town]:
    with namespace(), Lab(program="pod", **rodata) as lab:
        yield Town(lab)


def ip_of(name: str, version: int) -> str:
    """Letter or literal address."""
    return (IP4 if version == 4 else IP6).get(name, name)


def segment(
    src: str, dst: str, version: int, flags: int, back: bool = False, sport: int = 40000
) -> bytes:
    """TCP between port `sport` of `src` and port 80 of `dst`; `back`: from `dst`."""
    ends = [(ip_of(src, version), sport), (ip_of(dst, version), 80)]
    (a, aport), (b, bport) = reversed(ends) if back else ends
    return tcp(a, b, aport, bport, flags)


def rules(*entries: tuple[int, int, int, int], cidr: dict[str, int] | None = None) -> Rules:
    """Allow each (peer word, protocol, port, prefix bits); rule n is the nth."""
    return Rules({entry: (1, n, ALLOW) for n, entry in enumerate(entries)}, cidr or {})


def from_(name: str, protocol: int = 0, port: int = 0) -> tuple[int, int, int, int]:
    """A rule's key: identity of `name`, exact port if given, one protocol if given."""
    bits = 24 if port else 8 if protocol else 0
    return (IDENTITY[name], protocol, port, bits)


def tcp(src: str, dst: str, sport: int, dport: int, flags: int, payload: bytes = b"") -> bytes:
    return f.eth(f.ip(src, dst, f.TCP, f.tcp(src, dst, sport, dport, flags, payload)))


def udp(src: str, dst: str, sport: int, dport: int, payload: bytes = b"x") -> bytes:
    return f.eth(f.ip(src, dst, f.UDP, f.udp(src, dst, sport, dport, payload)))


def packet(
    protocol: int, src: str, dst: str, sport: int, dport: int, flags: int = f.SYN, size: int = 5
) -> bytes:
    """A frame with a payload of `size` bytes; SCTP's has no such thing."""
    if protocol == f.TCP:
        return tcp(src, dst, sport, dport, flags, b"x" * size)
    if protocol == f.UDP:
        return udp(src, dst, sport, dport, b"x" * size)
    return f.eth(f.ip(src, dst, f.SCTP, f.sctp(sport, dport)))


def ends(packet: f.Frame | bytes) -> tuple[str, int, str, int]:
    """Source and destination of a packet whose checksums are right."""
    frame = f.parse(packet) if isinstance(packet, bytes) else packet
    assert frame.valid, (frame.problem, frame.ip_check, frame.l4_check)
    return frame.src, frame.sport, frame.dst, frame.dport
