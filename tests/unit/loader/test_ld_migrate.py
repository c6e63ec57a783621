"""From one layout to another: what is copied where, member by member."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tidegate_bpf.btf import Field, Layout
from tidegate_loader import attach, migrate

SIZES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "be16": 2, "be32": 4}


def _layout(*members: tuple[str, str] | tuple[str, Layout], name: str = "s") -> Layout:
    """Members one behind the other."""
    fields, at = [], 0
    for member, kind in members:
        if isinstance(kind, Layout):
            fields.append(Field(member, at, kind.size, "struct", nested=kind))
            at += kind.size
        elif kind.startswith("bytes"):
            size = int(kind[5:])
            fields.append(Field(member, at, size, "u8", count=size))
            at += size
        else:
            fields.append(Field(member, at, SIZES[kind], kind))
            at += SIZES[kind]
    return Layout(name, at, tuple(fields))


INNER = _layout(("a", "u32"), ("b", "bytes6"))
LARGER = _layout(("b", "bytes6"), ("new", "u16"), ("a", "u64"))

ROWS = [
    ("the same", _layout(("a", "u32"), ("b", "u32")), _layout(("a", "u32"), ("b", "u32")),
     [(0, 0, 8)]),
    ("another order", _layout(("a", "u32"), ("b", "u16")), _layout(("b", "u16"), ("a", "u32")),
     [(0, 4, 2), (2, 0, 4)]),
    ("one is new", _layout(("a", "u32")), _layout(("n", "u64"), ("a", "u32")), [(8, 0, 4)]),
    ("one is gone", _layout(("a", "u32"), ("b", "u32")), _layout(("b", "u32")), [(0, 4, 4)]),
    ("padding is nothing", _layout(("pad", "u32")), _layout(("pad", "u32")), []),
    ("another byte order is another member", _layout(("a", "u16")), _layout(("a", "be16")), []),
    ("another length is another member", _layout(("a", "bytes4")), _layout(("a", "bytes6")), []),
    ("inside of structs", _layout(("x", "u16"), ("s", INNER)), _layout(("s", INNER), ("x", "u16")),
     [(0, 2, 10), (10, 0, 2)]),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "old", "new", "expected"), ROWS, ids=lambda v: str(v)[:24])
def test_spans(reason: str, old: Layout, new: Layout, expected: list[migrate.Span]) -> None:
    assert migrate.merged(migrate.spans(old, new)) == expected, reason


@pytest.mark.skipif(sys.byteorder != "little", reason="offsets of a little-endian machine")
def test_numbers_keep_their_low_bytes() -> None:
    old, new = _layout(("s", INNER)), _layout(("s", LARGER))
    assert migrate.merged(migrate.spans(old, new)) == [(0, 4, 6), (8, 0, 4)]
    assert migrate.merged(migrate.spans(new, old)) == [(0, 8, 4), (4, 0, 6)]


kinds = st.sampled_from([*SIZES, "bytes3", "bytes16"])
layouts = st.dictionaries(st.sampled_from("abcdefgh"), kinds, min_size=1).map(
    lambda members: _layout(*members.items())
)


LARGEST = 8 * 16  # every one of the eight members with sixteen bytes


@given(layouts, layouts, st.binary(min_size=LARGEST * 3, max_size=LARGEST * 3), st.integers(1, 3))
def test_whatever_the_layouts_are_each_member_is_its_own_or_zero(
    old: Layout, new: Layout, data: bytes, count: int
) -> None:
    rows = data[: old.size * count]
    moves = migrate.merged(migrate.spans(old, new))
    found = list(migrate._converted(rows, old.size, moves, new.size))
    assert len(found) == count
    before = {field.name: field for field in old.fields}
    for number, row in enumerate(found):
        start = number * old.size
        for field in new.fields:
            part = row[field.offset : field.offset + field.size]
            held = before.get(field.name)
            source = rows[start + held.offset :][: held.size] if held is not None else b""
            if held is not None and held.type == field.type:
                assert part == source
            elif (
                held is not None
                and held.kind[0] == field.kind[0] == "u"
                and not (held.count or field.count)
            ):
                wanted = int.from_bytes(source, sys.byteorder) % (1 << 8 * field.size)
                assert int.from_bytes(part, sys.byteorder) == wanted
            else:
                assert part == bytes(field.size)


def test_stems() -> None:
    names = ("ct_v1", "half_open_v12", "scratch", "a_vb", "node_v")
    assert [migrate.stem(n) for n in names] == ["ct", "half_open", "", "", ""]


def test_old_maps_go_when_the_layout_of_the_new_ones_is_kept(tmp_path: Path) -> None:
    """In this order: a loader killed between the two would leave maps nobody can read."""
    built = tmp_path / "pod.o"
    built.write_bytes(b"new")
    kept = tmp_path / "loaded"
    migrate.keep(kept, SimpleNamespace(name="pod.o", read_bytes=lambda: b"old"))  # type: ignore[arg-type]
    seen: list[bytes] = []

    class Old(migrate.Migration):
        def forget(self) -> None:
            seen.append((kept / "pod.o").read_bytes())

    programs = attach.Programs.__new__(attach.Programs)
    programs.specs = {"pod.o": SimpleNamespace(path=built)}  # type: ignore[dict-item]
    programs._kept = kept
    programs.migrations = [Old(tmp_path / "ct_v1", tmp_path / "ct_v2", None)]
    programs.migrated()
    assert seen == [b"new"]
    assert programs.migrations == []
