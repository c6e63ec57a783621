"""Flows that have started and not ended: which of them the kernel has forgotten, or will.

TCP says when it ends; whatever else ends by silence, and an entry may have to make room. So the
table of flows is looked through now and then. A flow that expired ended "idle", one that is gone
without a word ended "unknown". Reads maps, changes nothing in them.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from pathlib import Path

from msgspec import structs
from tidegate_bpf import BpfError, Map, ObjectFile

from tidegate_observer.flow import TCP, Counts, Flow, FrontendKey, Kind
from tidegate_observer.records import LATENCIES, flow_key, reader

MAX_LIVE = 65536
"""Flows that are followed to their end on a node; of those beyond only TCP's ends are told."""
SWEEP_SECONDS = 10.0
GRACE_NS = 1_000_000_000
"""A flow this young may have come after the table was read."""

BEGAN_A, REPLIED, FIN_ORIG, FIN_REPLY, RST, SERVICE = 0x01, 0x02, 0x04, 0x08, 0x10, 0x40
FREE, BUSY = 0, 1 << 63
"""Words of a half-open flow's place that holds none, or is being written."""

LIVES = {
    "tcp_established_life": 20117,
    "tcp_closed_life": 10,
    "tcp_opening_life": 60,
    "other_established_life": 180,
    "other_opening_life": 60,
}
"""Knobs of conntrack.h, in units of `seen` (2^30 ns); a test compares them with the header."""

_KEY = ("a", "b", "aport", "bport", "protocol")
_ENTRY = (
    "word",
    "seen",
    "flags",
    "handshake",
    "first_byte",
    "start",
    "packets",
    "bytes",
    "reply_packets",
    "reply_bytes",
)

State = tuple[bool, int, Counts]
"""Whether it has expired, when it was last seen (units of `seen`), what was counted."""


def life(protocol: int, flags: int) -> int:
    """For how many units of `seen` an entry lives after its last packet."""
    closed = flags & RST or flags & (FIN_ORIG | FIN_REPLY) == FIN_ORIG | FIN_REPLY
    if protocol == TCP and closed:
        return LIVES["tcp_closed_life"]
    stage = "established" if flags & REPLIED else "opening"
    return LIVES[f"{'tcp' if protocol == TCP else 'other'}_{stage}_life"]


class Tracked:
    """One node's. `live` is filled and emptied as records come (`records.Flows`)."""

    def __init__(self, spec: ObjectFile, node: str, pins: Path, live: dict[int, Flow]) -> None:
        self._node = node
        self._pins = pins
        self._live = live
        self._key = reader(spec.layout("tg_ct_key"), _KEY, header=0)
        self._entry = reader(spec.layout("tg_ct"), _ENTRY, header=0)
        self._key_size = spec.layout("tg_ct_key").size
        self._missing: set[int] = set()
        self._counted: dict[int, Counts] = {}
        """Of flows to Services that were under way when the table was last looked through."""
        self.entries = 0
        """In the table, when it was last looked through."""
        self.size = spec.maps["ct_v2"].max_entries
        self.seconds = 0.0
        """How long that took."""
        self.sweeps = 0
        self._due = time.monotonic() + SWEEP_SECONDS

    def sweep(self, offset: int, *, now: bool = False) -> list[Flow]:
        """Flows found to have ended, if it is time to look; `offset` as of `records`. BpfError."""
        if not now and time.monotonic() < self._due:
            return []
        began = time.monotonic_ns()
        states = {key: state for key, state in self._states(began) if key in self._live}
        ended, missing = [], set()
        for key, flow in list(self._live.items()):
            state = states.get(key)
            if state is None:
                if flow.time - offset > began - GRACE_NS:
                    continue
                # What ended this moment is told by a record that was not read yet.
                if key not in self._missing:
                    missing.add(key)
                    continue
                lasted = max(0, began + offset - flow.time)
                known = self._counted.get(key, Counts(0, 0, 0, 0, 0, ""))
                counts = structs.replace(known, nanoseconds=lasted, closed="unknown")
                ended.append(_end(flow, began + offset, counts))
            elif state[0]:
                ended.append(_end(flow, max(flow.time, (state[1] << 30) + offset), state[2]))
            else:
                continue
            del self._live[key]
        self._missing = missing
        self._counted = {
            key: states[key][2] if key in states else self._counted[key]
            for key, flow in self._live.items()
            if flow.asked is not None and (key in states or key in self._counted)
        }
        self.seconds = (time.monotonic_ns() - began) / 1e9
        self.sweeps += 1
        self._due = time.monotonic() + SWEEP_SECONDS
        return ended

    def under_way(self) -> Iterator[tuple[FrontendKey, Counts]]:
        """Flows to Services that have not ended, with what they had carried at the last look."""
        for key, counts in self._counted.items():
            flow = self._live.get(key)
            if flow is not None and flow.asked is not None:
                yield flow.asked, counts

    def _states(self, now_ns: int) -> Iterator[tuple[int, State]]:
        now = now_ns >> 30
        for keys, values in self._tables():
            rows = zip(self._key.iter_unpack(keys), self._entry.iter_unpack(values), strict=True)
            for (a, b, aport, bport, protocol), entry in rows:
                word, seen, flags, handshake, first_byte, start, *amounts = entry
                if word in (FREE, BUSY) or flags & SERVICE or not start:
                    continue
                if flags & BEGAN_A:
                    key = flow_key(start, a, b, aport, bport, protocol)
                else:
                    key = flow_key(start, b, a, bport, aport, protocol)
                age = (now - seen) & 0xFFFFFFFF
                expired = not age >> 31 and age > life(protocol, flags)
                lasted = max(0, (seen << 30) - start)
                packets, size, reply_packets, reply_size = amounts
                counts = Counts(
                    packets,
                    size,
                    reply_packets,
                    reply_size,
                    lasted,
                    "idle",
                    LATENCIES[handshake],
                    LATENCIES[first_byte],
                )
                yield key, (expired, seen, counts)

    def _tables(self) -> Iterator[tuple[bytes, bytes]]:
        """(keys, values) of the table, then of each half-open share."""
        with Map.open_pinned(str(self._pins / "maps" / "ct_v2")) as table:
            found = table.dump()
        self.entries = len(found[0]) // self._key_size
        yield found
        for path in (self._pins / "half_open").glob("[0-9]*"):
            try:
                with Map.open_pinned(str(path)) as share:
                    data = share.dump()[1]
            except BpfError as error:
                if error.errno != errno.ENOENT:  # its endpoint went
                    raise
                continue
            yield self.ways(data)

    def ways(self, data: bytes) -> tuple[bytes, bytes]:
        """(keys, values) of a share's sets, without the ways that never held a flow."""
        size, step = self._key_size, self._key_size + self._entry.size
        ways = [data[at : at + step] for at in range(0, len(data), step)]
        used = [way for way in ways if any(way[: size + 8])]
        return b"".join(way[:size] for way in used), b"".join(way[size:] for way in used)


def _end(flow: Flow, when: int, counts: Counts) -> Flow:
    return Flow(
        flow.node,
        when,
        Kind.END.value,
        0,
        flow.direction,
        flow.source_address,
        flow.destination_address,
        flow.source_port,
        flow.destination_port,
        flow.protocol,
        0,
        flow.interface,
        flow.source,
        flow.destination,
        flow.egress,
        flow.ingress,
        service=flow.service,
        counts=counts,
        process=flow.process,
        asked=flow.asked,
        interface_name=flow.interface_name,
    )
