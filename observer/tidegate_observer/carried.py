"""What flows to each frontend of a node have carried: of those that have ended, and of those under
way as they were last looked at.

In a file beside the observer's socket: `tidegate lb list --stats` reads it, and the next observer
goes on from there. May not live here: where flows come from.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from tidegate_observer.flow import Counts, Entry, Flow, FrontendKey, address_bytes, address_text

MAX_FRONTENDS = 8192
"""Of those beyond nothing is counted."""


class Amounts(msgspec.Struct, frozen=True, gc=False):
    packets: int = 0
    bytes: int = 0
    reply_packets: int = 0
    reply_bytes: int = 0

    def plus(self, counts: Counts) -> Amounts:
        return Amounts(
            self.packets + counts.packets,
            self.bytes + counts.bytes,
            self.reply_packets + counts.reply_packets,
            self.reply_bytes + counts.reply_bytes,
        )


NOTHING = Amounts()


class _Row(msgspec.Struct, array_like=True):
    address: str
    port: int
    protocol: int
    amounts: Amounts


_decoder = msgspec.json.Decoder(list[_Row])


def file_name(node: str) -> str:
    return f"carried-{node}"


def read(path: Path) -> dict[tuple[str, int, int], Amounts] | None:
    """(address, port, protocol number) → what went there and back; None: nobody counts."""
    try:
        rows = _decoder.decode(path.read_bytes())
    except (OSError, msgspec.MsgspecError):
        return None
    return {(row.address, row.port, row.protocol): row.amounts for row in rows}


class Carried:
    """One node's."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ended: dict[FrontendKey, Amounts] = {
            (address_bytes(address), port, protocol): amounts
            for (address, port, protocol), amounts in (read(path) or {}).items()
        }

    def add(self, entries: Iterable[Entry]) -> None:
        """Of flows that have ended."""
        for flow in entries:
            if isinstance(flow, Flow) and flow.asked is not None and flow.counts is not None:
                _add(self._ended, flow.asked, flow.counts)

    def write(
        self,
        under_way: Iterable[tuple[FrontendKey, Counts]],
        served: Callable[[bytes, int, int], object],
    ) -> None:
        """`served`: whether there is such a frontend; one that goes takes its figures with it.
        OSError."""
        for key in [key for key in self._ended if not served(*key)]:
            del self._ended[key]
        total = dict(self._ended)
        for key, counts in under_way:
            if served(*key):
                _add(total, key, counts)
        rows = [_Row(address_text(k[0]), *k[1:], amounts) for k, amounts in sorted(total.items())]
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_bytes(msgspec.json.encode(rows))
        os.replace(temporary, self._path)


def _add(to: dict[FrontendKey, Amounts], key: FrontendKey, counts: Counts) -> None:
    held = to.get(key)
    if held is not None or len(to) < MAX_FRONTENDS:
        to[key] = (held or NOTHING).plus(counts)
