"""Attachments as links: tcx and XDP on an interface, programs on a cgroup. A link that is
neither pinned nor held open detaches."""

from __future__ import annotations

import ctypes
import enum
import errno
from dataclasses import dataclass

from tidegate_bpf.errors import BpfError, NotSupported
from tidegate_bpf.lib import Owner, bpf, read_info
from tidegate_bpf.programs import Program


class AttachType(enum.IntEnum):
    """The attach types in use; numbers of enum bpf_attach_type."""

    INET4_CONNECT = 10
    INET6_CONNECT = 11
    UDP4_SENDMSG = 14
    UDP6_SENDMSG = 15
    UDP4_RECVMSG = 19
    UDP6_RECVMSG = 20
    INET4_GETPEERNAME = 29
    INET6_GETPEERNAME = 30
    XDP = 37
    TCX_INGRESS = 46
    TCX_EGRESS = 47


_LINK_CGROUP = 3
_LINK_XDP = 6
_LINK_TCX = 11
_XDP_GENERIC, _XDP_NATIVE = 1 << 1, 1 << 2


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """`target` is the cgroup's id or the interface's index in its namespace; 0 once that is gone.
    None, as `attach_type`, for kinds of link not made here."""

    type: int
    id: int
    program_id: int
    target: int | None
    attach_type: int | None


class _Cgroup(ctypes.Structure):
    _fields_ = (("cgroup_id", ctypes.c_uint64), ("attach_type", ctypes.c_uint32))


class _Tcx(ctypes.Structure):
    _fields_ = (("ifindex", ctypes.c_uint32), ("attach_type", ctypes.c_uint32))


class _Xdp(ctypes.Structure):
    _fields_ = (("ifindex", ctypes.c_uint32),)


class _Kinds(ctypes.Union):
    _fields_ = (("cgroup", _Cgroup), ("tcx", _Tcx), ("xdp", _Xdp))


class _CreateOptions(ctypes.Structure):
    """A prefix of struct bpf_link_create_opts."""

    _fields_ = (("sz", ctypes.c_size_t), ("flags", ctypes.c_uint32))


class _Info(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("prog_id", ctypes.c_uint32),
        ("kind", _Kinds),
    )


class Link(Owner):
    """Owns one descriptor of a link."""

    @property
    def info(self) -> LinkInfo:
        """Facts, read now."""
        raw = _Info()
        read_info(self.fileno(), raw)
        target = attach_type = None
        if raw.type == _LINK_CGROUP:
            target, attach_type = raw.kind.cgroup.cgroup_id, raw.kind.cgroup.attach_type
        elif raw.type == _LINK_TCX:
            target, attach_type = raw.kind.tcx.ifindex, raw.kind.tcx.attach_type
        elif raw.type == _LINK_XDP:
            target, attach_type = raw.kind.xdp.ifindex, AttachType.XDP
        return LinkInfo(raw.type, raw.id, raw.prog_id, target, attach_type)

    def update(self, program: Program) -> None:
        """Replace the program in place; no packet meets a gap. BpfError (ENOLINK) when the
        interface or cgroup is gone."""
        bpf().bpf_link_update(self.fileno(), program.fileno(), None)

    def detach(self) -> None:
        """Detach although pins or other descriptors hold the link."""
        bpf().bpf_link_detach(self.fileno())


def attach_tcx(program: Program, ifindex: int, *, ingress: bool) -> Link:
    """Attach a tc program to an interface of the calling thread's network namespace; `ingress` is
    tc's. Raises NotSupported before Linux 6.6, BpfError (ENODEV)."""
    where = AttachType.TCX_INGRESS if ingress else AttachType.TCX_EGRESS
    try:
        return Link(bpf().bpf_link_create(program.fileno(), ifindex, where, None))
    except BpfError as cause:
        if cause.errno == errno.EINVAL:
            raise NotSupported("tcx", errno.EINVAL) from cause
        raise


def attach_xdp(program: Program, ifindex: int, *, native: bool) -> Link:
    """Attach an XDP program to an interface of the calling thread's network namespace, in its
    driver or (`native` False) in the kernel's generic way. BpfError: EOPNOTSUPP or EINVAL (not this
    driver, or not at its MTU), EBUSY or EEXIST (another program is there), ENODEV."""
    options = _CreateOptions(ctypes.sizeof(_CreateOptions), _XDP_NATIVE if native else _XDP_GENERIC)
    created = bpf().bpf_link_create(
        program.fileno(), ifindex, AttachType.XDP, ctypes.byref(options)
    )
    return Link(created)


def attach_cgroup(program: Program, cgroup_fd: int, attach_type: AttachType) -> Link:
    """Attach to a cgroup2 directory's descriptor; its descendants are covered too."""
    return Link(bpf().bpf_link_create(program.fileno(), cgroup_fd, attach_type, None))
