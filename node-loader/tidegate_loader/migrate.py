"""Entries that programs made, carried from a map of one layout to its successor of another.

Only what a loader cannot make anew: tracked flows, and what sockets were translated to. Both
layouts come from the objects' BTF, so neither side knows the other's code; upgrade and
downgrade are one thing. Members are matched by name and type: one that is new is zero, one
that is gone is dropped. May not live here: when to copy, and what is attached.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tidegate_bpf import Map, ObjectFile
from tidegate_bpf.btf import Field, Layout

CARRIED = ("ct", "socks", "nat", "affinity")
"""Maps, without their versions, whose entries outlive a change of layout. Half-open flows do
not, nor whose they are: their next packet opens them again."""
_CHUNK = 8192
"""Entries converted and written at once."""

Span = tuple[int, int, int]
"""(offset in the new struct, offset in the old one, bytes)."""


def stem(name: str) -> str:
    """A map's name without its layout's version; "" for one that has none."""
    head, _, version = name.rpartition("_v")
    return head if version.isdigit() else ""


class Migration:
    """One map of another layout that is pinned beside its successor."""

    def __init__(self, old: Path, new: Path, specs: tuple[ObjectFile, ObjectFile] | None) -> None:
        """`specs`: the objects that declare them, old and new; None: the old one is not known,
        and nothing can be carried."""
        self.old = old
        self.new = new
        self._spans: tuple[list[Span], list[Span]] | None = None
        self._sizes = (0, 0)
        if specs is not None and stem(new.name) in CARRIED:
            before, after = specs[0].maps.get(old.name), specs[1].maps[new.name]
            if before is not None:
                pairs = ((before.key, after.key), (before.value, after.value))
                keys, values = (_layout_spans(specs, one, other) for one, other in pairs)
                self._spans, self._sizes = (keys, values), (after.key_size, after.value_size)

    def copy(self) -> int:
        """Entries whose key the successor has not; how many. What it has is newer. BpfError."""
        if self._spans is None:
            return 0
        with Map.open_pinned(str(self.old)) as old, Map.open_pinned(str(self.new)) as new:
            info = old.info
            keys, values = old.dump()
            there = set(_rows(new.dump()[0], self._sizes[0]))
            fresh = (
                (key, value)
                for key, value in zip(
                    _converted(keys, info.key_size, self._spans[0], self._sizes[0]),
                    _converted(values, info.value_size, self._spans[1], self._sizes[1]),
                    strict=True,
                )
                if key not in there
            )
            count = 0
            while chunk := list(itertools.islice(fresh, _CHUNK)):
                new.update_batch(b"".join(k for k, _ in chunk), b"".join(v for _, v in chunk))
                count += len(chunk)
            return count

    def forget(self) -> None:
        """Unpin the old map; programs that still use it keep it."""
        self.old.unlink(missing_ok=True)


def superseded(maps: Path, names: Iterable[str]) -> Iterator[tuple[Path, Path]]:
    """(pinned map, its successor) for every pinned map that another version of its name in
    `names`, those now declared, has taken the place of."""
    wanted = {stem(name): name for name in names if stem(name)}
    for path in sorted(maps.iterdir()):
        successor = wanted.get(stem(path.name))
        if successor is not None and successor != path.name:
            yield path, maps / successor


def kept(directory: Path, name: str) -> ObjectFile | None:
    """The object that was loaded last; None: it was not kept, or is not readable."""
    with contextlib.suppress(OSError):
        return ObjectFile(directory / name)
    return None


def keep(directory: Path, source: Path) -> None:
    """Keep an object that has been loaded: its layouts are what is pinned."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{source.name}.tmp"
    temporary.write_bytes(source.read_bytes())
    os.replace(temporary, directory / source.name)


def _layout_spans(
    specs: tuple[ObjectFile, ObjectFile], old: str | None, new: str | None
) -> list[Span]:
    if old is None or new is None:
        return []
    return merged(spans(specs[0].layout(old), specs[1].layout(new)))


def spans(old: Layout, new: Layout) -> Iterator[Span]:
    """What to copy where, member by member."""
    before = {field.name: field for field in old.fields}
    for field in new.fields:
        held = before.get(field.name)
        if held is None or field.name.startswith("pad"):
            continue
        if field.nested is not None and held.nested is not None:
            if (field.count, held.count) == (None, None):
                for to, at, size in spans(held.nested, field.nested):
                    yield field.offset + to, held.offset + at, size
        elif held.type == field.type:
            yield field.offset, held.offset, field.size
        elif _is_number(held) and _is_number(field):
            yield _resized(held, field)


def _is_number(field: Field) -> bool:
    return field.count is None and field.kind in ("u8", "u16", "u32", "u64")


def _resized(old: Field, new: Field) -> Span:
    """The low bytes of a number that grew or shrank."""
    size = min(old.size, new.size)
    if sys.byteorder == "little":
        return new.offset, old.offset, size
    return new.offset + new.size - size, old.offset + old.size - size, size


def merged(found: Iterable[Span]) -> list[Span]:
    """Neighbours that stay neighbours in one."""
    joined: list[Span] = []
    for to, at, size in sorted(found):
        if joined and joined[-1][0] + joined[-1][2] == to and joined[-1][1] + joined[-1][2] == at:
            joined[-1] = (joined[-1][0], joined[-1][1], joined[-1][2] + size)
        else:
            joined.append((to, at, size))
    return joined


def _rows(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def _converted(data: bytes, size: int, moves: list[Span], new_size: int) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        row = bytearray(new_size)
        for to, offset, length in moves:
            row[to : to + length] = data[at + offset : at + offset + length]
        yield bytes(row)
