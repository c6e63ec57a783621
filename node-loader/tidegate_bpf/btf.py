"""BTF, read from bytes: struct layouts, enums and the offsets of global variables.

Pure: bytes in, frozen values out. No file, no kernel, no libbpf.
"""

from __future__ import annotations

import functools
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tidegate_bpf.errors import LayoutError

_HEADER = struct.Struct("=HBBIIIII")
_TYPE = struct.Struct("=III")
_ARRAY = struct.Struct("=III")
_MAGIC = 0xEB9F

# BTF_KIND_*; Documentation/bpf/btf.rst
INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT = range(1, 12)
FUNC, FUNC_PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = range(12, 20)
_TRANSPARENT = {TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG}
_BIG_ENDIAN = {"__be16": "be16", "__be32": "be32", "__be64": "be64"}


class _Type(NamedTuple):
    name: str
    kind: int
    vlen: int
    flag: bool
    size: int  # or the id of the type referred to
    data: bytes


@dataclass(frozen=True, slots=True)
class Field:
    """One member. `kind` is the element's: `u8`…`u64`, `s8`…`s64` (machine order), `be16`, `be32`,
    `be64` (network order), `struct`, or `unsupported: why`. `count` is None unless an array."""

    name: str
    offset: int
    size: int
    kind: str
    count: int | None = None
    nested: Layout | None = None

    @property
    def type(self) -> str:
        """What Python code declares it as: `u32`, `be16`, `bytes[6]` (arrays of u8 and of network
        order integers), `u32[4]`, `struct tg_policy`. A struct that holds nothing but one array of
        network order integers, as an address does, counts as that array."""
        if self.nested is not None and self.count is None:
            raw = self.nested.raw
            return f"struct {self.nested.name}" if raw is None else f"bytes[{raw}]"
        if self.count is None:
            return self.kind
        if self.kind in ("u8", "s8") or self.kind in _BIG_ENDIAN.values():
            return f"bytes[{self.size}]"
        return f"{self.kind}[{self.count}]"


@dataclass(frozen=True, slots=True)
class Layout:
    """One struct: its size in bytes and its members in order."""

    name: str
    size: int
    fields: tuple[Field, ...]

    @property
    def raw(self) -> int | None:
        """Bytes, if the struct is one array of network order integers and nothing else."""
        if len(self.fields) != 1:
            return None
        (only,) = self.fields
        whole = only.count is not None and only.size == self.size
        return self.size if whole and only.kind in _BIG_ENDIAN.values() else None


@dataclass(frozen=True, slots=True)
class Variable:
    """A global: offset and size in its section's map; `kind` as in Field, or `bytes`."""

    name: str
    offset: int
    size: int
    kind: str


class Btf:
    """The types of one object. Raises LayoutError when `raw` is not BTF of this byte order."""

    def __init__(self, raw: bytes) -> None:
        if len(raw) < _HEADER.size:
            raise LayoutError("BTF is truncated")
        magic, _version, _flags, header, type_at, type_size, text_at, text_size = (
            _HEADER.unpack_from(raw)
        )
        if magic != _MAGIC:
            raise LayoutError(f"BTF magic {magic:#x} is not {sys.byteorder}-endian BTF")
        self._text = raw[header + text_at : header + text_at + text_size]
        types = raw[header + type_at : header + type_at + type_size]
        self._types = [_Type("", 0, 0, False, 0, b""), *self._parse(types)]

    def _string(self, offset: int) -> str:
        return self._text[offset : self._text.index(b"\0", offset)].decode()

    def _parse(self, data: bytes) -> Iterator[_Type]:
        width = {INT: 4, ARRAY: 12, VAR: 4, DECL_TAG: 4}
        per_item = {STRUCT: 12, UNION: 12, ENUM: 8, FUNC_PROTO: 8, DATASEC: 12, ENUM64: 12}
        at = 0
        while at < len(data):
            name, info, size = _TYPE.unpack_from(data, at)
            kind, vlen = info >> 24 & 0x1F, info & 0xFFFF
            if not INT <= kind <= ENUM64:
                raise LayoutError(f"BTF kind {kind} is unknown")
            at += _TYPE.size
            length = width.get(kind, 0) + per_item.get(kind, 0) * vlen
            yield _Type(
                self._string(name), kind, vlen, bool(info >> 31), size, data[at : at + length]
            )
            at += length

    @functools.cached_property
    def _by_name(self) -> dict[tuple[int, str], int]:
        return {(t.kind, t.name): i for i, t in enumerate(self._types) if t.name}

    def layout(self, name: str) -> Layout:
        """Struct `name`'s layout. Raises LayoutError when the object has no such struct."""
        try:
            return self._layout(self._by_name[STRUCT, name])
        except KeyError:
            raise LayoutError(f"no struct {name} in the object's BTF") from None

    def type_name(self, type_id: int) -> str | None:
        """Name of the struct, integer or typedef; None for 0 and anonymous types."""
        return self._types[type_id].name or None

    @functools.cached_property
    def enums(self) -> Mapping[str, Mapping[str, int]]:
        """Named enums: {enum: {enumerator: value}}."""
        return {
            t.name: dict(self._enumerators(t))
            for t in self._types
            if t.kind in (ENUM, ENUM64) and t.name
        }

    def _enumerators(self, t: _Type) -> Iterator[tuple[str, int]]:
        # The flag says whether values are signed.
        if t.kind == ENUM:
            for name, value in struct.iter_unpack("=Ii" if t.flag else "=II", t.data):
                yield self._string(name), value
            return
        for name, low, high in struct.iter_unpack("=IIi" if t.flag else "=III", t.data):
            yield self._string(name), low | high << 32

    def variables(self, section: str) -> dict[str, Variable]:
        """Globals of a data section (`.rodata`); empty when the object has none."""
        type_id = self._by_name.get((DATASEC, section))
        if type_id is None:
            return {}
        found = {}
        for var, offset, size in struct.iter_unpack("=III", self._types[type_id].data):
            kind, count, _nested = self._element(self._types[var].size)
            integer = count is None and kind[0] in "us" and kind[1:].isdigit()
            name = self._types[var].name
            found[name] = Variable(name, offset, size, kind if integer else "bytes")
        return found

    @functools.cache  # noqa: B019 - a Btf lives as long as its object file; layouts are few
    def _layout(self, type_id: int) -> Layout:
        t = self._types[type_id]
        fields = []
        for name_at, member, bits in struct.iter_unpack("=III", t.data):
            name = self._string(name_at)
            kind, count, nested = self._element(member)
            width, offset = (bits >> 24, bits & 0xFFFFFF) if t.flag else (0, bits)
            if width:
                kind = "unsupported: bit-field"
            fields.append(Field(name, offset // 8, self._size(member), kind, count, nested))
        return Layout(t.name, t.size, tuple(fields))

    def _element(self, type_id: int) -> tuple[str, int | None, Layout | None]:
        """(kind, array length, nested layout) of a member's type."""
        t = self._types[type_id]
        count: int | None = None
        while t.kind in _TRANSPARENT or t.kind == ARRAY:
            if t.kind == TYPEDEF and t.name in _BIG_ENDIAN:
                return _BIG_ENDIAN[t.name], count, None
            if t.kind == ARRAY:
                element, _index, number = _ARRAY.unpack(t.data)
                count = number * (1 if count is None else count)
                type_id = element
            else:
                type_id = t.size
            t = self._types[type_id]
        if t.kind == INT:
            signed = t.data[3 if sys.byteorder == "little" else 0] & 1
            return f"{'s' if signed else 'u'}{t.size * 8}", count, None
        if t.kind in (ENUM, ENUM64):
            return f"{'s' if t.flag else 'u'}{t.size * 8}", count, None
        if t.kind == STRUCT:
            return "struct", count, self._layout(type_id)
        return f"unsupported: BTF kind {t.kind}", count, None

    def _size(self, type_id: int) -> int:
        t = self._types[type_id]
        if t.kind in _TRANSPARENT:
            return self._size(t.size)
        if t.kind == ARRAY:
            element, _index, number = _ARRAY.unpack(t.data)
            return int(number) * self._size(element)
        return 8 if t.kind == PTR else t.size
