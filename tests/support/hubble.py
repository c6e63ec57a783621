"""A client of Hubble's API that shares nothing with our server: it reads bytes by the contract.

`tests/golden/observer/contract.txt` says which field has which number and type; what comes over the
wire is taken apart by that text alone, into dicts. Messages of Google's that the contract names are
spelled out here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc

CONTRACT = Path(__file__).parents[1] / "golden" / "observer" / "contract.txt"

GOOGLE = """
message google.protobuf.Timestamp
  1 seconds int64
  2 nanos int32
message google.protobuf.BoolValue
  1 value bool
message google.protobuf.Int32Value
  1 value int32
message google.protobuf.UInt32Value
  1 value uint32
message google.protobuf.FieldMask
  1 paths repeated string
message google.protobuf.Any
  1 type_url string
  2 value bytes
message google.protobuf.Struct
  1 fields repeated google.protobuf.Struct.Entry
message google.protobuf.Struct.Entry
  1 key string
  2 value google.protobuf.Value
message google.protobuf.Value
  2 number_value double
  3 string_value string
"""


class Field(NamedTuple):
    number: int
    name: str
    type: str
    repeated: bool


class Contract:
    def __init__(self, text: str) -> None:
        self.enums: dict[str, dict[int, str]] = {}
        self.messages: dict[str, list[Field]] = {}
        self.calls: dict[str, tuple[str, str, bool]] = {}
        """"/service/Method" → request, response, whether it streams."""
        current: list[Field] = []
        for line in text.splitlines():
            if found := re.match(r"enum (\S+): (.*)", line):
                pairs = (item.split(" ") for item in found[2].split(", "))
                self.enums[found[1]] = {int(number): name for number, name in pairs}
            elif line.startswith("message "):
                current = self.messages.setdefault(line.split()[1], [])
            elif found := re.match(r"  (\d+) (\S+) (repeated )?(\S+)", line):
                current.append(Field(int(found[1]), found[2], found[4], bool(found[3])))
            elif found := re.match(r"rpc (\S+)\((\S+)\) returns \((stream )?(\S+)\)", line):
                self.calls["/" + found[1]] = found[2], found[4], bool(found[3])

    # ---- from bytes --------------------------------------------------------------------

    def decode(self, kind: str, data: bytes) -> dict[str, Any]:
        """Fields that are there; AssertionError for one that the contract does not have."""
        fields = {field.number: field for field in self.messages[kind]}
        found: dict[str, Any] = {}
        for number, wire, raw in _wire(data):
            assert number in fields, f"{kind} has no field {number}"
            field = fields[number]
            for value in self._values(field.type, wire, raw):
                if field.repeated:
                    found.setdefault(field.name, []).append(value)
                else:
                    found[field.name] = value
        return found

    def _values(self, kind: str, wire: int, raw: Any) -> Iterator[Any]:
        if kind in self.messages:
            assert wire == 2
            yield self.decode(kind, raw)
        elif kind in ("string", "bytes"):
            assert wire == 2
            yield raw.decode() if kind == "string" else raw
        elif kind == "double":
            assert wire == 1
            yield struct.unpack("<d", raw)[0]
        elif wire == 2:  # packed
            at = 0
            while at < len(raw):
                number, at = _varint(raw, at)
                yield self._number(kind, number)
        else:
            assert wire == 0
            yield self._number(kind, raw)

    def _number(self, kind: str, number: int) -> Any:
        if kind in self.enums:
            return self.enums[kind].get(number, number)
        if kind == "bool":
            return bool(number)
        return number - (1 << 64) if kind in ("int32", "int64") and number >> 63 else number

    # ---- to bytes --------------------------------------------------------------------------

    def encode(self, kind: str, value: dict[str, Any]) -> bytes:
        fields = {field.name: field for field in self.messages[kind]}
        out = bytearray()
        for name, given in value.items():
            field = fields[name]
            for one in given if field.repeated else [given]:
                out += self._one(field, one)
        return bytes(out)

    def _one(self, field: Field, value: Any) -> bytes:
        if field.type in self.messages:
            raw = self.encode(field.type, value)
        elif field.type == "string":
            raw = value.encode()
        else:
            if field.type in self.enums and isinstance(value, str):
                value = next(n for n, name in self.enums[field.type].items() if name == value)
            return _put(field.number << 3) + _put(int(value) & (1 << 64) - 1)
        return _put(field.number << 3 | 2) + _put(len(raw)) + raw


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if not data[at - 1] & 0x80:
            return value, at


def _put(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _wire(data: bytes) -> Iterator[tuple[int, int, Any]]:
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        raw: Any
        if wire == 0:
            raw, at = _varint(data, at)
        else:
            size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            raw, at = data[at : at + size], at + size
            assert len(raw) == size
        yield number, wire, raw


def contract() -> Contract:
    return Contract(CONTRACT.read_text() + GOOGLE)


class Hubble:
    """Asks a server. A context manager."""

    def __init__(
        self, address: str, credentials: grpc.ChannelCredentials | None = None, name: str = ""
    ) -> None:
        """`credentials`: to ask by TLS, a server that has a certificate for `name`."""
        self.contract = contract()
        self._channel = (
            grpc.secure_channel(address, credentials, [("grpc.ssl_target_name_override", name)])
            if credentials is not None
            else grpc.insecure_channel(address)
        )

    def __enter__(self) -> Hubble:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def ask(self, path: str, **request: Any) -> Any:
        """A response, or an iterator of them."""
        asked, answered, streams = self.contract.calls[path]
        kind = self._channel.unary_stream if streams else self._channel.unary_unary
        call = kind(
            path,
            request_serializer=lambda value: self.contract.encode(asked, value),
            response_deserializer=lambda data: self.contract.decode(answered, data),
        )
        return call(request)

    def flows(self, **request: Any) -> list[dict[str, Any]]:
        """Of GetFlows without follow."""
        answers = self.ask("/observer.Observer/GetFlows", **request)
        return [answer["flow"] for answer in answers if "flow" in answer]
