"""Layers one and two over libbpf: the signature table and the error check.

Nothing here owns a handle or knows what a call is for. Everything goes through libbpf's thin
wrappers of bpf(2), so no syscall number and no attr layout of one architecture lives here.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_int, c_size_t, c_uint32, c_void_p
from typing import Any, Self

from tidegate_bpf.errors import LibraryMissing, error

SONAME = "libbpf.so.1"
MINIMUM = (1, 1)
"""Debian 12 ships 1.1. Newer kernels' features (tcx) need no newer library."""

_Check = Callable[[Any, Any, tuple[Any, ...]], Any]


def _check_int(result: int, function: Any, _arguments: tuple[Any, ...]) -> int:
    """libbpf >= 1.0 returns -errno."""
    if result < 0:
        raise error(-result, function.__name__)
    return result


def _check_pointer(result: int | None, function: Any, _arguments: tuple[Any, ...]) -> int:
    """libbpf >= 1.0 returns NULL and sets errno."""
    if not result:
        raise error(ctypes.get_errno(), function.__name__)
    return result


_P, _S, _I, _U = c_void_p, c_char_p, c_int, c_uint32

# name: (result, arguments, check). Where the check is None the caller looks at the result, because
# an error is an ordinary answer there (absent key, end of iteration, rejected program).
_TABLE: dict[str, tuple[Any, tuple[Any, ...], _Check | None]] = {
    "libbpf_set_print": (_P, (_P,), None),
    "libbpf_major_version": (_U, (), None),
    "libbpf_minor_version": (_U, (), None),
    "libbpf_num_possible_cpus": (_I, (), _check_int),
    "btf__raw_data": (_P, (_P, _P), _check_pointer),
    "bpf_object__open_file": (_P, (_S, _P), _check_pointer),
    "bpf_object__close": (None, (_P,), None),
    "bpf_object__load": (_I, (_P,), None),
    "bpf_object__btf": (_P, (_P,), _check_pointer),
    "bpf_object__next_map": (_P, (_P, _P), None),
    "bpf_object__next_program": (_P, (_P, _P), None),
    "bpf_program__name": (_S, (_P,), None),
    "bpf_program__section_name": (_S, (_P,), None),
    "bpf_program__fd": (_I, (_P,), None),
    "bpf_program__autoload": (c_bool, (_P,), None),
    "bpf_program__set_autoload": (_I, (_P, c_bool), _check_int),
    "bpf_program__set_log_buf": (_I, (_P, _P, c_size_t), _check_int),
    "bpf_program__set_log_level": (_I, (_P, _U), _check_int),
    "bpf_map__name": (_S, (_P,), None),
    "bpf_map__type": (_I, (_P,), None),
    "bpf_map__key_size": (_U, (_P,), None),
    "bpf_map__value_size": (_U, (_P,), None),
    "bpf_map__max_entries": (_U, (_P,), None),
    "bpf_map__map_flags": (_U, (_P,), None),
    "bpf_map__btf_key_type_id": (_U, (_P,), None),
    "bpf_map__btf_value_type_id": (_U, (_P,), None),
    "bpf_map__inner_map": (_P, (_P,), None),
    "bpf_map__initial_value": (_P, (_P, _P), _check_pointer),
    "bpf_map__set_max_entries": (_I, (_P, _U), _check_int),
    "bpf_map__reuse_fd": (_I, (_P, _I), _check_int),
    "bpf_map__fd": (_I, (_P,), None),
    "bpf_map_create": (_I, (_I, _S, _U, _U, _U, _P), _check_int),
    "bpf_map_freeze": (_I, (_I,), _check_int),
    "bpf_map_lookup_elem": (_I, (_I, _S, _P), None),
    "bpf_map_update_elem": (_I, (_I, _S, _S, ctypes.c_uint64), None),
    "bpf_map_delete_elem": (_I, (_I, _S), None),
    "bpf_map_get_next_key": (_I, (_I, _P, _P), None),
    "bpf_map_lookup_batch": (_I, (_I, _P, _P, _P, _P, _P, _P), None),
    "bpf_map_update_batch": (_I, (_I, _P, _P, _P, _P), None),
    "bpf_map_delete_batch": (_I, (_I, _P, _P, _P), None),
    "bpf_map_get_fd_by_id": (_I, (_U,), _check_int),
    "bpf_obj_pin": (_I, (_I, _S), _check_int),
    "bpf_obj_get": (_I, (_S,), _check_int),
    "bpf_obj_get_info_by_fd": (_I, (_I, _P, _P), _check_int),
    "bpf_prog_load": (_I, (_I, _S, _S, _P, c_size_t, _P), _check_int),
    "bpf_prog_test_run_opts": (_I, (_I, _P), _check_int),
    "bpf_link_create": (_I, (_I, _I, _I, _P), _check_int),
    "bpf_link_update": (_I, (_I, _I, _P), _check_int),
    "bpf_link_detach": (_I, (_I,), _check_int),
    "bpf_tc_hook_create": (_I, (_P,), None),
    "bpf_tc_hook_destroy": (_I, (_P,), _check_int),
    "bpf_tc_attach": (_I, (_P, _P), _check_int),
    "bpf_tc_detach": (_I, (_P, _P), None),
    "bpf_tc_query": (_I, (_P, _P), None),
}


@functools.cache
def bpf() -> Any:
    """libbpf with every signature of the table bound. Raises LibraryMissing."""
    try:
        library = ctypes.CDLL(SONAME, use_errno=True)
    except OSError as cause:
        raise LibraryMissing(f"cannot load {SONAME}: {cause}; install libbpf1") from cause
    for name, (result, arguments, check) in _TABLE.items():
        try:
            function = getattr(library, name)
        except AttributeError as cause:
            wanted = ".".join(map(str, MINIMUM))
            raise LibraryMissing(f"{SONAME} lacks {name}; install libbpf >= {wanted}") from cause
        function.restype = result
        function.argtypes = arguments
        if check is not None:
            function.errcheck = check
    # Its messages go to stderr through a va_list, which is not portably decoded; the verifier's
    # log is taken from a buffer of our own instead.
    library.libbpf_set_print(None)
    return library


@functools.cache
def libc() -> Any:
    """The C library; functions set `ctypes.get_errno()`."""
    return ctypes.CDLL(None, use_errno=True)


def version() -> tuple[int, int]:
    """libbpf's (major, minor). Raises LibraryMissing."""
    library = bpf()
    return int(library.libbpf_major_version()), int(library.libbpf_minor_version())


def require() -> None:
    """Raise LibraryMissing unless libbpf is there and new enough."""
    found = version()
    if found < MINIMUM:
        raise LibraryMissing(f"libbpf {found[0]}.{found[1]} is too old; install >= 1.1")


class Owner:
    """Layer three's base: owns one file descriptor, closes it once, is a context manager."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor; ValueError when closed."""
        if self._fd < 0:
            raise ValueError(f"{type(self).__name__} is closed")
        return self._fd

    def close(self) -> None:
        """Release the descriptor; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def pin(self, path: str) -> None:
        """Pin to `path` on a bpffs, which must not exist yet (BpfError, EEXIST)."""
        bpf().bpf_obj_pin(self.fileno(), os.fsencode(path))

    @classmethod
    def open_pinned(cls, path: str) -> Self:
        """Open what is pinned at `path`. Raises BpfError (ENOENT when absent)."""
        return cls(bpf().bpf_obj_get(os.fsencode(path)))

    def dup(self) -> Self:
        """A second owner of the same kernel object."""
        return type(self)(os.dup(self.fileno()))

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


def read_info(fd: int, info: ctypes.Structure) -> None:
    """Fill `info` (a prefix of the kernel's struct is enough) for the object behind `fd`."""
    size = c_uint32(ctypes.sizeof(info))
    bpf().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size))
