"""One kernel map behind one descriptor: element and batch operations on bytes.

Keys and values are `bytes` of exactly `key_size` and `value_stride`; their meaning is the
caller's (see `codec`). What maps are for is not known here.

A single update or delete of a map-in-map element returns only after every program that may still
hold the old inner map has left it (the call waits for an RCU grace period, 5-15 ms). Batch
operations wait likewise only from Linux 6.8 on: where old readers must be gone, update singly.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tidegate_bpf.errors import ENOTSUPP, BpfError, LayoutError, MapFull, error
from tidegate_bpf.lib import Owner, bpf, read_info


class MapType(enum.IntEnum):
    """The map types in use; numbers of enum bpf_map_type."""

    HASH = 1
    ARRAY = 2
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LRU_PERCPU_HASH = 10
    LPM_TRIE = 11
    ARRAY_OF_MAPS = 12
    HASH_OF_MAPS = 13
    RINGBUF = 27


PER_CPU = frozenset({MapType.PERCPU_HASH, MapType.PERCPU_ARRAY, MapType.LRU_PERCPU_HASH})

ANY, NOEXIST, EXIST = 0, 1, 2
"""Flags of `update`."""

NO_PREALLOC = 1 << 0
"""Flag of `create`; required for LPM_TRIE."""

_CHUNK = 8192
"""Elements a lookup batch asks for: large enough to amortise the call, small enough for memory."""

_NO_BATCH = frozenset({ENOTSUPP, errno.EOPNOTSUPP, errno.EINVAL, errno.EINTR})
"""Batch not offered for this type; EINTR: kernels before 6.13 give up at holes in map-in-map."""


@functools.cache
def possible_cpus() -> int:
    """CPUs for which a per-CPU map has a value."""
    return int(bpf().libbpf_num_possible_cpus())


@dataclass(frozen=True, slots=True)
class MapInfo:
    """What the kernel says of a map. Sizes in bytes; `name` is cut to 15 characters."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


class _Info(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
    )


class _CreateOptions(ctypes.Structure):
    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("btf_fd", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
        ("btf_vmlinux_value_type_id", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("map_extra", ctypes.c_uint64),
        ("numa_node", ctypes.c_uint32),
        ("map_ifindex", ctypes.c_uint32),
    )


class _BatchOptions(ctypes.Structure):
    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("elem_flags", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


class Map(Owner):
    """Owns one descriptor of a map. `fd` must be a map's (BpfError otherwise)."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        raw = _Info()
        read_info(fd, raw)
        self.info = MapInfo(
            raw.type,
            raw.id,
            raw.key_size,
            raw.value_size,
            raw.max_entries,
            raw.flags,
            raw.name.decode(),
        )
        if raw.type in PER_CPU:
            self.value_stride = (raw.value_size + 7) // 8 * 8 * possible_cpus()
        else:
            self.value_stride = raw.value_size

    @classmethod
    def create(
        cls,
        type: MapType,
        key_size: int,
        value_size: int,
        max_entries: int,
        *,
        flags: int = 0,
        name: str = "",
        inner: Map | None = None,
    ) -> Map:
        """A new map; `inner` is the template of a map-in-map. `name` is cut to 15 characters."""
        options = _CreateOptions(sz=ctypes.sizeof(_CreateOptions), map_flags=flags)
        if inner is not None:
            options.inner_map_fd = inner.fileno()
        fd = bpf().bpf_map_create(
            type, name.encode()[:15], key_size, value_size, max_entries, ctypes.byref(options)
        )
        return cls(fd)

    @classmethod
    def from_id(cls, map_id: int) -> Map:
        """The map with this id, as a map-in-map's value names it. Needs CAP_SYS_ADMIN."""
        return cls(bpf().bpf_map_get_fd_by_id(map_id))

    # -- one element --------------------------------------------------------

    def lookup(self, key: bytes) -> bytes:
        """The value (`value_stride` bytes; an id, u32, in a map-in-map). KeyError when absent."""
        self._check_key(key)
        value = ctypes.create_string_buffer(self.value_stride)
        code = bpf().bpf_map_lookup_elem(self.fileno(), key, value)
        if code < 0:
            raise self._error(-code, "lookup", key)
        return value.raw

    def lookup_per_cpu(self, key: bytes) -> list[bytes]:
        """A per-CPU map's values, one of `value_size` bytes for each possible CPU."""
        return self.split_per_cpu(self.lookup(key))

    def split_per_cpu(self, value: bytes) -> list[bytes]:
        """Cut one value of `value_stride` bytes into each CPU's."""
        step = (self.info.value_size + 7) // 8 * 8
        return [value[at : at + self.info.value_size] for at in range(0, len(value), step)]

    def update(self, key: bytes, value: bytes | Map, flags: int = ANY) -> None:
        """Write one element. `value` is a Map for a map-in-map. Raises MapFull; BpfError (EEXIST)
        with NOEXIST; KeyError with EXIST when absent."""
        self._check_key(key)
        data = _fd_bytes(value) if isinstance(value, Map) else value
        if len(data) != self.value_stride:
            raise LayoutError(f"{self}: value of {len(data)} bytes, not {self.value_stride}")
        code = bpf().bpf_map_update_elem(self.fileno(), key, data, flags)
        if code < 0:
            raise self._error(-code, "update", key)

    def delete(self, key: bytes) -> None:
        """Remove one element. KeyError when absent."""
        self._check_key(key)
        code = bpf().bpf_map_delete_elem(self.fileno(), key)
        if code < 0:
            raise self._error(-code, "delete", key)

    def discard(self, key: bytes) -> bool:
        """Remove one element; deleting the absent succeeds. True if it was there."""
        try:
            self.delete(key)
        except KeyError:
            return False
        return True

    # -- many ---------------------------------------------------------------

    def keys(self) -> Iterator[bytes]:
        """Every key, one call each. If elements vanish meanwhile some may come twice."""
        current: ctypes.Array[ctypes.c_char] | None = None
        # A key deleted while the iterator stands on it sends the kernel back to the first one.
        for _ in range(2 * self.info.max_entries + _CHUNK):
            following = ctypes.create_string_buffer(self.info.key_size)
            code = bpf().bpf_map_get_next_key(self.fileno(), current, following)
            if code == -errno.ENOENT:
                return
            if code < 0:
                raise self._error(-code, "next key", b"")
            yield following.raw
            current = following
        raise BpfError(errno.EAGAIN, f"{self} changes faster than it can be read")

    def dump(self, *, dense: bool = False) -> tuple[bytes, bytes]:
        """All keys and all values, each concatenated: what `Codec.unpack_all` reads. In batches;
        element by element where the kernel has none for this type. An element that moves while
        the dump runs may come twice or not at all. `dense`: of an array that is filled from its
        beginning; ends after a batch of nothing but zeros."""
        try:
            return self._dump_batches(dense)
        except BpfError as cause:
            if cause.errno not in _NO_BATCH:
                raise
        keys, values = [], []
        for key in self.keys():
            try:
                values.append(self.lookup(key))
            except KeyError:
                continue
            keys.append(key)
        return b"".join(keys), b"".join(values)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """(key, value) pairs of a `dump`."""
        keys, values = self.dump()
        size, stride = self.info.key_size, self.value_stride
        for index in range(len(keys) // size):
            yield (
                keys[index * size : (index + 1) * size],
                values[index * stride : (index + 1) * stride],
            )

    def update_items(self, items: Iterable[tuple[bytes, bytes | Map]], flags: int = ANY) -> int:
        """`update_batch` of pairs. Returns how many were written."""
        keys, values = [], []
        for key, value in items:
            self._check_key(key)
            keys.append(key)
            values.append(_fd_bytes(value) if isinstance(value, Map) else value)
        return self.update_batch(b"".join(keys), b"".join(values), flags)

    def update_batch(self, keys: bytes, values: bytes, flags: int = ANY) -> int:
        """Write concatenated keys and values in order. Returns how many were written. Raises
        MapFull (`.done` written before it). For a map-in-map, values are descriptors (u32)."""
        count = self._count(keys)
        if count * self.value_stride != len(values):
            raise LayoutError(
                f"{self}: {count} keys with {len(values)} bytes of values of {self.value_stride}"
            )
        if not count:
            return 0
        done = ctypes.c_uint32(count)
        options = _BatchOptions(sz=ctypes.sizeof(_BatchOptions), elem_flags=flags)
        code = bpf().bpf_map_update_batch(
            self.fileno(), keys, values, ctypes.byref(done), ctypes.byref(options)
        )
        if code >= 0:
            return count
        if -code in _NO_BATCH:
            return self._update_singly(keys, values, flags)
        raise self._error(-code, "update batch", b"", done.value)

    def delete_batch(self, keys: bytes) -> int:
        """Remove concatenated keys; absent ones are skipped. Returns how many were there."""
        count, at, removed = self._count(keys), 0, 0
        size = self.info.key_size
        buffer = ctypes.create_string_buffer(keys, len(keys))
        options = _BatchOptions(sz=ctypes.sizeof(_BatchOptions))
        while at < count:
            done = ctypes.c_uint32(count - at)
            code = bpf().bpf_map_delete_batch(
                self.fileno(),
                ctypes.byref(buffer, at * size),
                ctypes.byref(done),
                ctypes.byref(options),
            )
            if -code in _NO_BATCH:
                rest = range(at * size, count * size, size)
                return removed + sum(self.discard(keys[i : i + size]) for i in rest)
            if code < 0 and code != -errno.ENOENT:
                raise self._error(-code, "delete batch", b"", removed + done.value)
            # The kernel stops at the first absent key; `done` counts those before it.
            removed += done.value
            at += done.value + (code < 0)
        return removed

    # -- the map ------------------------------------------------------------

    def freeze(self) -> None:
        """No more writes through bpf(2), for ever. BpfError (EBUSY) while another write runs."""
        bpf().bpf_map_freeze(self.fileno())

    def memory(self) -> int:
        """Bytes of kernel memory the map is charged for (approximate for NO_PREALLOC maps)."""
        with open(f"/proc/self/fdinfo/{self.fileno()}") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name == "memlock":
                    return int(value)
        return 0

    def __repr__(self) -> str:
        return f"<Map {self.info.name or self.info.id}>"

    # -- inner --------------------------------------------------------------

    def _check_key(self, key: bytes) -> None:
        # The kernel reads key_size bytes from the pointer, whatever is there.
        if len(key) != self.info.key_size:
            raise LayoutError(f"{self}: key of {len(key)} bytes, not {self.info.key_size}")

    def _count(self, keys: bytes) -> int:
        count, rest = divmod(len(keys), self.info.key_size)
        if rest:
            raise LayoutError(f"{self}: {len(keys)} bytes are no multiple of {self.info.key_size}")
        return count

    def _error(self, code: int, what: str, key: bytes, done: int = 0) -> Exception:
        if code == errno.ENOENT:
            return KeyError(key)
        if code in (errno.E2BIG, errno.ENOSPC):
            return MapFull(code, f"{what}: {self} holds at most {self.info.max_entries}", done)
        return error(code, f"{what} in {self}")

    def _update_singly(self, keys: bytes, values: bytes, flags: int) -> int:
        size, stride = self.info.key_size, self.value_stride
        for index in range(self._count(keys)):
            key = keys[index * size : (index + 1) * size]
            try:
                self.update(key, values[index * stride : (index + 1) * stride], flags)
            except MapFull as cause:
                cause.done = index
                raise
        return self._count(keys)

    def _dump_batches(self, dense: bool) -> tuple[bytes, bytes]:
        size, stride = self.info.key_size, self.value_stride
        chunk = min(_CHUNK, self.info.max_entries)
        # HASH continues by bucket number (4 bytes), the others by key.
        token = ctypes.create_string_buffer(max(4, size))
        started = False
        keys, values, total = [], [], 0
        key_buffer = ctypes.create_string_buffer(chunk * size)
        value_buffer = ctypes.create_string_buffer(chunk * stride)
        options = _BatchOptions(sz=ctypes.sizeof(_BatchOptions))
        while total <= 2 * self.info.max_entries + _CHUNK:
            count = ctypes.c_uint32(chunk)
            code = bpf().bpf_map_lookup_batch(
                self.fileno(),
                token if started else None,
                token,
                key_buffer,
                value_buffer,
                ctypes.byref(count),
                ctypes.byref(options),
            )
            if code == -errno.ENOSPC:  # one bucket alone is larger than the buffers
                chunk *= 2
                key_buffer = ctypes.create_string_buffer(chunk * size)
                value_buffer = ctypes.create_string_buffer(chunk * stride)
                continue
            if code < 0 and code != -errno.ENOENT:
                raise error(-code, f"lookup batch in {self}")
            keys.append(ctypes.string_at(key_buffer, count.value * size))
            values.append(ctypes.string_at(value_buffer, count.value * stride))
            total += count.value
            if code < 0 or (dense and not values[-1].strip(b"\0")):
                return b"".join(keys), b"".join(values)
            started = True
        raise BpfError(errno.EAGAIN, f"{self} changes faster than it can be read")


def _fd_bytes(inner: Map) -> bytes:
    return bytes(ctypes.c_uint32(inner.fileno()))
