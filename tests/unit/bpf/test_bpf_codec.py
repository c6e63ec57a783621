"""Layouts from BTF, and codecs: pure, no root."""

from __future__ import annotations

import struct
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tidegate_bpf import Btf, Codec, Field, Layout, LayoutError, ObjectFile
from tidegate_bpf.btf import Variable
from unit.bpf.compiled import small_object

INNER = {"a": "u16", "port": "be16", "mac": "bytes[6]"}
ALL = {
    "u8": "u8",
    "s8": "s8",
    "u16": "u16",
    "s16": "s16",
    "u32": "u32",
    "s32": "s32",
    "u64": "u64",
    "s64": "s64",
    "be16": "be16",
    "be32": "be32",
    "addr": "bytes[16]",
    "one": "struct t_inner",
    "two": "struct[2]",
    "many": "u32[3]",
    "last": "u8",
}


@pytest.fixture(scope="module")
def spec() -> ObjectFile:
    return ObjectFile(small_object())


def integers(bits: int, signed: bool = False) -> st.SearchStrategy[int]:
    low = -(1 << bits - 1) if signed else 0
    return st.integers(low, low + (1 << bits) - 1)


def raw(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


inner_rows = st.tuples(integers(16), integers(16), raw(6))
rows = st.tuples(
    integers(8),
    integers(8, True),
    integers(16),
    integers(16, True),
    integers(32),
    integers(32, True),
    integers(64),
    integers(64, True),
    integers(16),
    integers(32),
    raw(16),
    inner_rows,
    st.tuples(inner_rows, inner_rows),
    st.tuples(integers(32), integers(32), integers(32)),
    integers(8),
)


@given(st.lists(rows, max_size=5))
def test_round_trip(some: list[tuple[Any, ...]]) -> None:
    codec = Codec(ObjectFile(small_object()).layout("t_all"), ALL)
    packed = codec.pack_all(some)
    assert len(packed) == codec.size * len(some)
    assert codec.unpack_all(packed) == some
    for index, row in enumerate(some):
        one = packed[index * codec.size : (index + 1) * codec.size]
        assert codec.pack_row(row) == one
        assert codec.pack(**dict(zip(codec.names, row, strict=True))) == one
        assert codec.unpack(one) == row


def test_more_rows_than_a_chunk(spec: ObjectFile) -> None:
    codec = Codec(spec.layout("t_inner"), INNER)
    some = [(i % 65536, i % 65535, bytes(6)) for i in range(10_000)]
    assert codec.unpack_all(codec.pack_all(some)) == some


def test_bytes_on_the_wire_and_in_the_machine(spec: ObjectFile) -> None:
    codec = Codec(spec.layout("t_inner"), INNER)
    packed = codec.pack(a=0x0102, port=0x0304, mac=b"abcdef")
    assert packed == (0x0102).to_bytes(2, sys.byteorder) + b"\x03\x04" + b"abcdef" + bytes(2)
    buffer = bytearray(b"\xff" * 16)
    codec.pack_into(buffer, 2, a=0x0102, port=0x0304, mac=b"abcdef")
    assert bytes(buffer) == b"\xff\xff" + packed + b"\xff\xff"


def test_offsets_are_the_compilers(spec: ObjectFile) -> None:
    native = struct.Struct("@BbHhIiQqHI16s12s12s12sIIIBxxxxxxx")
    assert spec.layout("t_all").size == native.size
    codec = Codec(spec.layout("t_all"))
    row = [0] * 10 + [bytes(16), (0, 0, bytes(6)), ((0, 0, bytes(6)),) * 2, (0, 0, 7), 9]
    assert native.unpack(codec.pack_row(row))[-2:] == (7, 9)


@pytest.mark.parametrize(
    ("reason", "fields", "message"),
    [
        ("a kind differs", {**INNER, "port": "u16"}, "port (object: be16, Python: u16)"),
        ("a length differs", {**INNER, "mac": "bytes[8]"}, "mac (object: bytes[6], Python: byt"),
        ("one too many", {**INNER, "more": "u8"}, "more (object: absent, Python: u8)"),
        ("one missing", {"a": "u16", "port": "be16"}, "mac (object: bytes[6], Python: absent)"),
        ("padding is no field", {**INNER, "pad": "bytes[2]"}, "pad (object: absent"),
        ("names only, one missing", ["a", "port"], "mac (object: bytes[6], Python: absent)"),
        ("names only, one unknown", ["a", "port", "mac", "b"], "b (object: absent, Python: missi"),
    ],
)
def test_bind_refuses(spec: ObjectFile, reason: str, fields: Any, message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        Codec(spec.layout("t_inner"), fields)
    assert message in str(caught.value), reason


def test_bind_accepts_names(spec: ObjectFile) -> None:
    assert Codec(spec.layout("t_inner"), ["mac", "a", "port"]).names == ("a", "port", "mac")


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        ("machine integer out of range", (65536, 0, bytes(6))),
        ("negative unsigned", (-1, 0, bytes(6))),
        ("network integer out of range", (0, 65536, bytes(6))),
        ("short bytes", (0, 0, bytes(5))),
        ("long bytes", (0, 0, bytes(7))),
        ("short row", (0, 0)),
        ("long row", (0, 0, bytes(6), 0)),
    ],
)
def test_bad_values(spec: ObjectFile, reason: str, row: tuple[Any, ...]) -> None:
    codec = Codec(spec.layout("t_inner"))
    with pytest.raises(ValueError, match="t_inner"):
        codec.pack_all([(0, 0, bytes(6)), row])


def test_bad_array_length(spec: ObjectFile) -> None:
    row = [0] * 10 + [bytes(16), (0, 0, bytes(6)), ((0, 0, bytes(6)),) * 2, (0, 0), 9]
    with pytest.raises(ValueError, match=r"t_all\.many: length 2, not 3"):
        Codec(spec.layout("t_all")).pack_row(row)


@pytest.mark.parametrize("length", [0, 11, 13, 24])
def test_unpack_wants_the_exact_size(spec: ObjectFile, length: int) -> None:
    with pytest.raises(ValueError, match="t_inner"):
        Codec(spec.layout("t_inner")).unpack(bytes(length))


def test_what_a_codec_cannot_say(spec: ObjectFile) -> None:
    with pytest.raises(LayoutError, match=r"t_odd\.pointer: unsupported"):
        Codec(spec.layout("t_odd"))
    overlap = Layout("u", 4, (Field("a", 0, 4, "u32"), Field("b", 0, 4, "u32")))
    with pytest.raises(LayoutError, match="overlaps"):
        Codec(overlap)
    with pytest.raises(LayoutError, match="class"):
        Codec(Layout("k", 4, (Field("class", 0, 4, "u32"),)))


def test_enums(spec: ObjectFile) -> None:
    assert spec.enums["t_signed"] == {"T_MINUS": -3, "T_PLUS": 5}
    assert spec.enums["t_unsigned"] == {"T_BIG": 0xFFFFFFFF, "T_HUNDRED": 133}


def test_spec(spec: ObjectFile) -> None:
    table = spec.maps["table_v1"]
    assert (table.key, table.value, table.key_size, table.max_entries) == ("__u32", "t_all", 4, 16)
    inner = spec.maps["outer_v1"].inner
    assert inner is not None
    assert (inner.type, inner.key_size, inner.value_size) == (1, 4, 8)
    assert spec.maps.keys() == {"table_v1", "outer_v1", "ring_v1"}
    assert (spec.programs["answer"].section, spec.programs["answer"].autoload) == ("tc", True)
    assert not spec.programs["bad"].autoload
    knob = spec.rodata["knob"]
    assert knob == Variable("knob", knob.offset, 4, "u32")
    assert spec.rodata["negative"].kind == "s16"
    assert (spec.rodata["blob"].kind, spec.rodata["blob"].size) == ("bytes", 4)
    assert len({v.offset for v in spec.rodata.values()}) == 3


def test_unknown_struct(spec: ObjectFile) -> None:
    with pytest.raises(LayoutError, match="no struct t_none"):
        spec.layout("t_none")


@pytest.mark.parametrize("data", [b"", b"\x9f", bytes(24)])
def test_not_btf(data: bytes) -> None:
    with pytest.raises(LayoutError, match="BTF"):
        Btf(data)


def test_no_object(tmp_path: Any) -> None:
    with pytest.raises(OSError, match="bpf_object__open_file"):
        ObjectFile(tmp_path / "absent.o")
