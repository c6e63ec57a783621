"""Object files: what they declare (`ObjectFile`, no kernel), what was loaded (`LoadedObject`)."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidegate_bpf.btf import Btf, Layout, Variable
from tidegate_bpf.errors import LayoutError, VerifierError, error
from tidegate_bpf.lib import bpf
from tidegate_bpf.maps import Map
from tidegate_bpf.programs import Program

_LOG_BYTES = 16 << 20
"""Room for one program's verifier log; an anonymous mapping, so only what is written is used."""

_RODATA = ".rodata"


@dataclass(frozen=True, slots=True)
class MapSpec:
    """A map as declared. `key` and `value` name the struct or integer type; None if unknown (a
    map-in-map's value, a ring buffer's both). Sizes in bytes."""

    name: str
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    key: str | None
    value: str | None
    inner: MapSpec | None


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """A program as declared. `section` is its SEC(); `autoload` is false for SEC("?…")."""

    name: str
    section: str
    autoload: bool


@dataclass(slots=True)
class LoadedObject:
    """Owns the descriptors of what was loaded; close them, or take what you keep by `dup`."""

    maps: dict[str, Map] = field(default_factory=dict)
    programs: dict[str, Program] = field(default_factory=dict)

    def close(self) -> None:
        """Release every descriptor. Pinned or attached things live on."""
        for owner in (*self.maps.values(), *self.programs.values()):
            owner.close()

    def __enter__(self) -> LoadedObject:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


class ObjectFile:
    """The spec of a compiled object: deterministic, needs no root and no kernel.

    `programs`, `maps`: by name; `rodata`: the `const volatile` knobs;
    `enums`: {enum: {enumerator: value}}. Internal maps (.rodata, .bss) are not in `maps`.
    Raises BpfError when the file cannot be read as an object.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with _opened(self.path) as handle:
            self.btf = Btf(_raw_btf(handle))
            self.programs = {p.name: p for p in map(_program_spec, _programs(handle))}
            self.maps = {
                name: _map_spec(pointer, self.btf)
                for name, pointer in _maps(handle)
                if "." not in name
            }
        self.rodata: Mapping[str, Variable] = self.btf.variables(_RODATA)
        self.enums = self.btf.enums

    def layout(self, name: str) -> Layout:
        """Struct `name`. Raises LayoutError when the object has none."""
        return self.btf.layout(name)

    def load(
        self,
        *,
        pins: Mapping[str, Map | str] | None = None,
        max_entries: Mapping[str, int] | None = None,
        rodata: Mapping[str, int | bytes] | None = None,
        autoload: set[str] | None = None,
        log_level: int = 0,
    ) -> LoadedObject:
        """Load into the kernel.

        `pins`: maps to use instead of new ones, open or as a pin's path. `max_entries`: sizes of
        new maps. `rodata`: values of knobs. `autoload`: exactly these programs (None: as declared).
        Raises VerifierError, LayoutError (a pinned map is of another shape; an unknown name),
        PermissionDenied, NotSupported, BpfError.
        """
        self._check_names(pins or {}, max_entries or {}, autoload or set())
        with _opened(self.path) as handle, contextlib.ExitStack() as stack:
            maps = dict(_maps(handle))
            for name, size in (max_entries or {}).items():
                bpf().bpf_map__set_max_entries(maps[name], size)
            for name, pin in (pins or {}).items():
                self._reuse(maps[name], self.maps[name], pin)
            if rodata:
                self._set_rodata(maps, rodata)
            logs = _select(handle, autoload, log_level)
            for log in logs.values():
                stack.callback(log.close)
            code = bpf().bpf_object__load(handle)
            if code < 0:
                raise self._load_error(-code, logs)
            return self._take(handle, maps)

    def _check_names(
        self, pins: Mapping[str, Any], max_entries: Mapping[str, int], autoload: set[str]
    ) -> None:
        unknown = sorted((pins.keys() | max_entries.keys()) - self.maps.keys())
        unknown += sorted(autoload - self.programs.keys())
        if unknown:
            raise LayoutError(f"{self.path.name} has no {', '.join(unknown)}")

    def _reuse(self, pointer: int, spec: MapSpec, pin: Map | str) -> None:
        if isinstance(pin, str):
            with Map.open_pinned(pin) as opened:
                self._reuse(pointer, spec, opened)
            return
        found = pin.info
        wanted = {"type": spec.type, "key_size": spec.key_size, "value_size": spec.value_size}
        for what, value in wanted.items():
            if getattr(found, what) != value:
                raise LayoutError(
                    f"map {spec.name}: {what} is {getattr(found, what)} where it is pinned, "
                    f"{value} in {self.path.name}"
                )
        bpf().bpf_map__reuse_fd(pointer, pin.fileno())

    def _set_rodata(self, maps: Mapping[str, int], values: Mapping[str, int | bytes]) -> None:
        pointer = next((p for name, p in maps.items() if name.endswith(_RODATA)), None)
        if pointer is None:
            raise LayoutError(f"{self.path.name} has no {_RODATA}")
        size = ctypes.c_size_t()
        base = bpf().bpf_map__initial_value(pointer, ctypes.byref(size))
        for name, value in values.items():
            variable = self.rodata.get(name)
            if variable is None:
                raise LayoutError(f"{self.path.name} has no knob {name}")
            data = _knob_bytes(variable, value)
            if variable.offset + len(data) > size.value:
                raise LayoutError(f"knob {name} lies outside {_RODATA}")
            ctypes.memmove(base + variable.offset, data, len(data))

    def _load_error(self, code: int, logs: dict[str, mmap.mmap]) -> Exception:
        # Programs load in file order up to the first failure; its log is the last one written.
        for name in reversed(logs):
            text = logs[name][: logs[name].find(b"\0")]
            if text:
                return VerifierError(code, name, text.decode(errors="replace"))
        return error(code, f"load {self.path.name}")

    def _take(self, handle: int, maps: Mapping[str, int]) -> LoadedObject:
        """Own duplicates, so that libbpf's object and its memory can go at once."""
        loaded = LoadedObject()
        for name in self.maps:
            loaded.maps[name] = Map(os.dup(bpf().bpf_map__fd(maps[name])))
        for pointer in _programs(handle):
            fd = bpf().bpf_program__fd(pointer)
            if fd >= 0:
                loaded.programs[bpf().bpf_program__name(pointer).decode()] = Program(os.dup(fd))
        return loaded


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = bpf().bpf_object__open_file(os.fsencode(path), None)
    try:
        yield handle
    finally:
        bpf().bpf_object__close(handle)


def _raw_btf(handle: int) -> bytes:
    size = ctypes.c_uint32()
    # Taken from the opened object, where libbpf has filled in the offsets of global variables.
    data = bpf().btf__raw_data(bpf().bpf_object__btf(handle), ctypes.byref(size))
    return ctypes.string_at(data, size.value)


def _programs(handle: int) -> Iterator[int]:
    pointer = bpf().bpf_object__next_program(handle, None)
    while pointer:
        yield pointer
        pointer = bpf().bpf_object__next_program(handle, pointer)


def _maps(handle: int) -> Iterator[tuple[str, int]]:
    pointer = bpf().bpf_object__next_map(handle, None)
    while pointer:
        yield bpf().bpf_map__name(pointer).decode(), pointer
        pointer = bpf().bpf_object__next_map(handle, pointer)


def _program_spec(pointer: int) -> ProgramSpec:
    library = bpf()
    return ProgramSpec(
        library.bpf_program__name(pointer).decode(),
        library.bpf_program__section_name(pointer).decode(),
        library.bpf_program__autoload(pointer),
    )


def _map_spec(pointer: int, btf: Btf) -> MapSpec:
    library = bpf()
    inner = library.bpf_map__inner_map(pointer)
    return MapSpec(
        library.bpf_map__name(pointer).decode(),
        library.bpf_map__type(pointer),
        library.bpf_map__key_size(pointer),
        library.bpf_map__value_size(pointer),
        library.bpf_map__max_entries(pointer),
        library.bpf_map__map_flags(pointer),
        btf.type_name(library.bpf_map__btf_key_type_id(pointer)),
        btf.type_name(library.bpf_map__btf_value_type_id(pointer)),
        _map_spec(inner, btf) if inner else None,
    )


def _select(handle: int, autoload: set[str] | None, log_level: int) -> dict[str, mmap.mmap]:
    """Choose programs and give each a log buffer. At level 0 libbpf asks for a log only when a
    program has failed."""
    library, logs = bpf(), {}
    for pointer in _programs(handle):
        name = library.bpf_program__name(pointer).decode()
        if autoload is not None:
            library.bpf_program__set_autoload(pointer, name in autoload)
        if not library.bpf_program__autoload(pointer):
            continue
        log = mmap.mmap(-1, _LOG_BYTES)
        # A temporary view: closing the mapping needs that no exported buffer is left.
        address = ctypes.addressof(ctypes.c_char.from_buffer(log))
        library.bpf_program__set_log_buf(pointer, address, _LOG_BYTES)
        library.bpf_program__set_log_level(pointer, log_level)
        logs[name] = log
    return logs


def _knob_bytes(variable: Variable, value: int | bytes) -> bytes:
    if isinstance(value, int):
        signed = variable.kind.startswith("s")
        try:
            return value.to_bytes(variable.size, sys.byteorder, signed=signed)
        except OverflowError as cause:
            raise LayoutError(f"knob {variable.name}: {value} needs more bytes") from cause
    if len(value) != variable.size:
        raise LayoutError(f"knob {variable.name}: {len(value)} bytes, not {variable.size}")
    return value
