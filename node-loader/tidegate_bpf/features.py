"""What this machine can do, found by trying, never by comparing versions."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

from tidegate_bpf import bpffs, lib, mounts
from tidegate_bpf.errors import BpfError, LibraryMissing, NotSupported, PermissionDenied
from tidegate_bpf.links import attach_tcx
from tidegate_bpf.maps import Map, MapType
from tidegate_bpf.programs import Program

CAPABILITIES = {"NET_ADMIN": 12, "SYS_ADMIN": 21, "PERFMON": 38, "BPF": 39}
"""Bits of CapEff that matter here. SYS_ADMIN includes BPF and PERFMON."""

_NO_INTERFACE = 0x7FFFFFFF
_SCHED_CLS = 3
_RETURN_ZERO = bytes((0xB7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0))
"""mov r0, 0; exit. Registers 0 and no immediate: the same bytes in either byte order."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One answer. `detail` says what was found; `remedy` what to do when not `ok`, else empty."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


_known: dict[str, Probe] = {}


def _conclusive(name: str, probe: Callable[[], Probe]) -> Probe:
    """Cache a yes or a no; never an error that says neither (no permission, no memory)."""
    if name in _known:
        return _known[name]
    try:
        answer = probe()
    except PermissionDenied as cause:
        return Probe(name, False, str(cause), "run as root, or with CAP_BPF and CAP_NET_ADMIN")
    except BpfError as cause:
        return Probe(name, False, str(cause), "see the error")
    _known[name] = answer
    return answer


def library() -> Probe:
    """libbpf is there and new enough."""
    try:
        lib.require()
    except LibraryMissing as cause:
        return Probe("libbpf", False, str(cause), "install libbpf 1.1 or newer (Debian: libbpf1)")
    return Probe("libbpf", True, ".".join(map(str, lib.version())))


def tcx() -> Probe:
    """Links on tc hooks. Without them clsact is used, so a "no" is no failure of the machine."""
    return _conclusive("tcx", _tcx)


def _tcx() -> Probe:
    fd = lib.bpf().bpf_prog_load(_SCHED_CLS, b"tg_probe", b"GPL", _RETURN_ZERO, 2, None)
    with Program(fd) as program:
        try:
            attach_tcx(program, _NO_INTERFACE, ingress=True).close()
        except NotSupported:
            return Probe("tcx", False, "not in this kernel", "Linux 6.6 or newer; clsact is used")
        except BpfError as cause:
            if cause.errno != errno.ENODEV:
                raise
    return Probe("tcx", True, "supported")


def batch() -> Probe:
    """Batched map operations."""
    return _conclusive("batch operations", _batch)


def _batch() -> Probe:
    key, count = bytes(4), ctypes.c_uint32(1)
    with Map.create(MapType.HASH, 4, 4, 1, name="tg_probe") as probe:
        code = lib.bpf().bpf_map_update_batch(probe.fileno(), key, key, ctypes.byref(count), None)
    if code < 0:
        detail = os.strerror(-code)
        return Probe("batch operations", False, detail, "Linux 5.6 or newer")
    return Probe("batch operations", True, "supported")


def bpffs_at(path: str) -> Probe:
    """A bpffs at `path`."""
    if bpffs.is_bpffs(path):
        return Probe("bpffs", True, path)
    return Probe("bpffs", False, f"none at {path}", f"mount -t bpf bpf {path}")


def cgroup2() -> Probe:
    """The cgroup v2 hierarchy."""
    path = mounts.cgroup2()
    if path is None:
        return Probe("cgroup2", False, "not mounted", "mount -t cgroup2 cgroup2 DIRECTORY")
    return Probe("cgroup2", True, path)


def kernel_btf() -> Probe:
    """The kernel's own types."""
    path = "/sys/kernel/btf/vmlinux"
    if os.access(path, os.R_OK):
        return Probe("kernel BTF", True, path)
    return Probe("kernel BTF", False, f"no {path}", "a kernel with CONFIG_DEBUG_INFO_BTF=y")


def jit() -> Probe:
    """Programs are compiled to machine code."""
    # Not cached: it may be turned on. The setting itself shows in the first network namespace only.
    try:
        fd = lib.bpf().bpf_prog_load(_SCHED_CLS, b"tg_probe", b"GPL", _RETURN_ZERO, 2, None)
        with Program(fd) as program:
            enabled = program.info.jited_size > 0
    except BpfError as cause:
        return Probe("JIT", False, str(cause), "run as root, or with CAP_BPF and CAP_NET_ADMIN")
    remedy = "sysctl -w net.core.bpf_jit_enable=1"
    return Probe("JIT", enabled, "on" if enabled else "off", "" if enabled else remedy)


def capabilities() -> Probe:
    """This process may load and attach programs."""
    with open("/proc/self/status") as lines:
        effective = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff"))
    held = {name for name, bit in CAPABILITIES.items() if effective >> bit & 1}
    implied = {"BPF", "PERFMON"} if "SYS_ADMIN" in held else set()
    missing = sorted(CAPABILITIES.keys() - {"SYS_ADMIN"} - held - implied)
    if missing:
        named = ", ".join(f"CAP_{name}" for name in missing)
        return Probe("capabilities", False, f"missing {named}", f"run as root, or with {named}")
    return Probe("capabilities", True, ", ".join(f"CAP_{name}" for name in sorted(held)))


def kernel() -> Probe:
    """The kernel's release, for people to read; nothing is decided by it."""
    name = os.uname()
    return Probe("kernel", name.sysname == "Linux", f"{name.release} {name.machine}")
