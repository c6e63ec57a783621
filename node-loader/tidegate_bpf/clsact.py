"""Attaching to tc's clsact qdisc, for kernels without tcx. One program at each hook, at a fixed
handle and priority, replaced in place. All calls act in the calling thread's network namespace."""

from __future__ import annotations

import ctypes
import errno
from ctypes import c_int, c_size_t, c_uint32

from tidegate_bpf.errors import error
from tidegate_bpf.lib import bpf
from tidegate_bpf.programs import Program

HANDLE = 1
PRIORITY = 1

_INGRESS, _EGRESS = 1, 2
_REPLACE = 1
_ABSENT = (-errno.ENOENT, -errno.EINVAL, -errno.ENODEV)
"""No filter; no qdisc to hold one; no interface."""


class _Hook(ctypes.Structure):
    _fields_ = (
        ("sz", c_size_t),
        ("ifindex", c_int),
        ("attach_point", c_int),
        ("parent", c_uint32),
    )


class _Options(ctypes.Structure):
    _fields_ = (
        ("sz", c_size_t),
        ("prog_fd", c_int),
        ("flags", c_uint32),
        ("prog_id", c_uint32),
        ("handle", c_uint32),
        ("priority", c_uint32),
    )


def _hook(ifindex: int, point: int) -> _Hook:
    return _Hook(sz=ctypes.sizeof(_Hook), ifindex=ifindex, attach_point=point)


def _options() -> _Options:
    return _Options(sz=ctypes.sizeof(_Options), handle=HANDLE, priority=PRIORITY)


def attach(program: Program, ifindex: int, *, ingress: bool) -> None:
    """Attach, or replace what `attach` put there before. Raises BpfError (ENODEV, EINVAL)."""
    hook = _hook(ifindex, _INGRESS if ingress else _EGRESS)
    code = bpf().bpf_tc_hook_create(ctypes.byref(hook))
    if code < 0 and code != -errno.EEXIST:
        raise error(-code, f"clsact on interface {ifindex}")
    options = _options()
    options.prog_fd, options.flags = program.fileno(), _REPLACE
    bpf().bpf_tc_attach(ctypes.byref(hook), ctypes.byref(options))


def query(ifindex: int, *, ingress: bool) -> int | None:
    """Id of the program that `attach` put there; None if there is none."""
    hook, options = _hook(ifindex, _INGRESS if ingress else _EGRESS), _options()
    code = bpf().bpf_tc_query(ctypes.byref(hook), ctypes.byref(options))
    if code in _ABSENT:
        return None
    if code < 0:
        raise error(-code, f"query clsact on interface {ifindex}")
    return int(options.prog_id)


def detach(ifindex: int, *, ingress: bool) -> None:
    """Remove what `attach` put there; removing the absent succeeds. The qdisc stays."""
    hook, options = _hook(ifindex, _INGRESS if ingress else _EGRESS), _options()
    code = bpf().bpf_tc_detach(ctypes.byref(hook), ctypes.byref(options))
    if code < 0 and code not in _ABSENT:
        raise error(-code, f"detach clsact from interface {ifindex}")


def remove_qdisc(ifindex: int) -> None:
    """Remove the clsact qdisc with everything on it, whoever attached it."""
    hook = _hook(ifindex, _INGRESS | _EGRESS)
    bpf().bpf_tc_hook_destroy(ctypes.byref(hook))
