"""Bytes ↔ Python values for one struct layout. Pure; no map, no file.

Integers are Python ints in host order whatever the order in memory. Arrays of u8 and addresses are
`bytes` of the exact length, other arrays tuples, nested structs named tuples. Members named `pad*`
are written as zeros and not seen.
"""

from __future__ import annotations

import collections
import itertools
import operator
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tidegate_bpf.btf import Field, Layout
from tidegate_bpf.errors import LayoutError

_FORMATS = {
    "u8": "B",
    "u16": "H",
    "u32": "I",
    "u64": "Q",
    "s8": "b",
    "s16": "h",
    "s32": "i",
    "s64": "q",
}
_NETWORK = {"be16": 2, "be32": 4, "be64": 8}

# Everything works on columns (one list for each member over all rows), so that the loop over
# rows runs inside C functions: ten times as fast as a Python loop for 100,000 rows.
_Column = Iterable[Any]
_Encode = Callable[[list[Any]], list[_Column]]
_Decode = Callable[[Iterator[_Column]], _Column]
_named_tuple: Callable[[str, list[str]], Any] = collections.namedtuple
_to_bytes: Callable[..., bytes] = int.to_bytes
_from_bytes: Callable[..., int] = int.from_bytes

_CHUNK = 4096
"""Rows worked on at once: their columns stay in the processor's cache."""


def _plain(column: list[Any]) -> list[_Column]:
    return [column]


def _network(size: int) -> tuple[_Encode, _Decode]:
    def encode(column: list[Any]) -> list[_Column]:
        return [map(_to_bytes, column, itertools.repeat(size), itertools.repeat("big"))]

    def decode(leaves: Iterator[_Column]) -> _Column:
        return map(_from_bytes, next(leaves), itertools.repeat("big"))

    return encode, decode


def _check_lengths(name: str, column: list[Any], length: int) -> None:
    """struct and zip would cut or pad silently."""
    if set(map(len, column)) - {length}:
        wrong = next(len(value) for value in column if len(value) != length)
        raise ValueError(f"{name}: length {wrong}, not {length}")


def _bytes(name: str, size: int) -> _Encode:
    def encode(column: list[Any]) -> list[_Column]:
        _check_lengths(name, column, size)
        return [column]

    return encode


def _split(column: list[Any], count: int) -> Iterator[list[Any]]:
    return (list(map(operator.itemgetter(index), column)) for index in range(count))


def _many(name: str, count: int, encode: _Encode, decode: _Decode) -> tuple[_Encode, _Decode]:
    def encode_all(column: list[Any]) -> list[_Column]:
        _check_lengths(name, column, count)
        return [leaf for part in _split(column, count) for leaf in encode(part)]

    def decode_all(leaves: Iterator[_Column]) -> _Column:
        return zip(*[decode(leaves) for _ in range(count)], strict=True)

    return encode_all, decode_all


class Codec:
    """Packs and unpacks one struct. `fields`, if given, is bound at once (see `bind`).

    Raises LayoutError for a layout it cannot express (bit-fields, unions, pointers)."""

    def __init__(
        self, layout: Layout, fields: Mapping[str, str] | Iterable[str] | None = None
    ) -> None:
        self.layout = layout
        self.name = layout.name
        self.size = layout.size
        self._fields = [f for f in layout.fields if not f.name.startswith("pad")]
        self.names = tuple(f.name for f in self._fields)
        self._encoders: list[_Encode] = []
        self._decoders: list[_Decode] = []
        self._leaves = 0
        self._struct = struct.Struct("=" + self._compile())
        try:
            self.type = _named_tuple(layout.name, list(self.names))
        except ValueError as cause:
            raise LayoutError(f"struct {layout.name}: {cause}") from cause
        if fields is not None:
            self.bind(fields)

    def bind(self, fields: Mapping[str, str] | Iterable[str]) -> Codec:
        """Refuse (LayoutError) unless `fields` are exactly the struct's members, without `pad*`:
        names, or {name: type} with types as `btf.Field.type` writes them. Returns the codec."""
        found = {f.name: f.type for f in self._fields}
        if isinstance(fields, Mapping):
            wanted = dict(fields)
        else:
            names = list(fields)
            wanted = {name: found.get(name, "missing") for name in names}
        if wanted == found:
            return self
        differing = sorted(
            f"{name} (object: {found.get(name, 'absent')}, Python: {wanted.get(name, 'absent')})"
            for name in wanted.keys() | found.keys()
            if wanted.get(name) != found.get(name)
        )
        raise LayoutError(f"struct {self.name}: " + ", ".join(differing))

    # -- single values ----------------------------------------------------

    def pack(self, **fields: Any) -> bytes:
        """Bytes of one struct; every field by name, nested ones as tuples in member order.
        TypeError for a missing or unknown field, ValueError for a value out of range."""
        return self.pack_row(self.type(**fields))

    def pack_row(self, row: Sequence[Any]) -> bytes:
        """Bytes of one struct; values in member order."""
        return self.pack_all([row])

    def pack_into(self, buffer: bytearray | memoryview, offset: int, **fields: Any) -> None:
        """As `pack`, into a writable buffer."""
        buffer[offset : offset + self.size] = self.pack(**fields)

    def unpack(self, data: bytes | memoryview) -> Any:
        """A named tuple of the struct's members. ValueError unless `data` is `size` bytes."""
        if len(data) != self.size:
            raise ValueError(f"{self.name}: {len(data)} bytes, not {self.size}")
        return self.unpack_all(data)[0]

    # -- many -------------------------------------------------------------

    def pack_all(self, rows: Iterable[Sequence[Any]]) -> bytes:
        """Concatenated structs; each row's values in member order. ValueError for a value out of
        range or a row of another length."""
        rest, packed = iter(rows), list[bytes]()
        try:
            if all(encode is _plain for encode in self._encoders):
                return b"".join(itertools.starmap(self._struct.pack, rest))
            while chunk := list(itertools.islice(rest, _CHUNK)):
                packed.extend(map(self._struct.pack, *self._encode(chunk)))
        except (struct.error, OverflowError) as cause:
            raise ValueError(f"{self.name}: {cause}") from cause
        return b"".join(packed)

    def unpack_all(self, data: bytes | memoryview) -> list[Any]:
        """Every struct of a concatenation. ValueError when the length is no multiple of `size`."""
        if len(data) % self.size:
            raise ValueError(f"{self.name}: {len(data)} bytes are no multiple of {self.size}")
        rest = self._struct.iter_unpack(data)
        if all(decode is next for decode in self._decoders):
            return list(map(self.type._make, rest))
        unpacked: list[Any] = []
        while chunk := list(itertools.islice(rest, _CHUNK)):
            columns = [map(operator.itemgetter(i), chunk) for i in range(self._leaves)]
            unpacked.extend(self._decode(iter(columns)))
        return unpacked

    # -- compilation ------------------------------------------------------

    def _encode(self, rows: list[Any]) -> list[_Column]:
        _check_lengths(self.name, rows, len(self._encoders))
        columns = _split(rows, len(self._encoders))
        pairs = zip(self._encoders, columns, strict=True)
        return [leaf for encode, column in pairs for leaf in encode(column)]

    def _decode(self, leaves: Iterator[_Column]) -> _Column:
        columns = [decode(leaves) for decode in self._decoders]
        return map(self.type._make, zip(*columns, strict=True))

    def _compile(self) -> str:
        """The struct format of the whole layout, gaps and padding as `x`."""
        out, at = "", 0
        for field in self.layout.fields:
            if field.offset < at:
                raise LayoutError(f"struct {self.name}.{field.name} overlaps its neighbour")
            out += "x" * (field.offset - at)
            if field.name.startswith("pad"):
                out += f"{field.size}x"
            else:
                out += self._member(field)
            at = field.offset + field.size
        return out + "x" * (self.layout.size - at)

    def _member(self, field: Field) -> str:
        encode: _Encode
        decode: _Decode = next
        leaves = 1
        if field.type.startswith("bytes["):
            encode = _bytes(f"{self.name}.{field.name}", field.size)
            form = f"{field.size}s"
        else:
            form, leaves, encode, decode = self._element(field)
            if field.count is not None:
                name = f"{self.name}.{field.name}"
                encode, decode = _many(name, field.count, encode, decode)
                form *= field.count
                leaves *= field.count
        self._encoders.append(encode)
        self._decoders.append(decode)
        self._leaves += leaves
        return form

    def _element(self, field: Field) -> tuple[str, int, _Encode, _Decode]:
        """(struct format, leaves in it, encoder, decoder) of one element."""
        if field.nested is not None:
            codec = Codec(field.nested)
            return codec._struct.format[1:], codec._leaves, codec._encode, codec._decode
        if field.kind in _FORMATS:
            return _FORMATS[field.kind], 1, _plain, next
        if field.kind in _NETWORK:
            size = _NETWORK[field.kind]
            return f"{size}s", 1, *_network(size)
        raise LayoutError(f"struct {self.name}.{field.name}: {field.kind}")
