"""One loaded program: pinning, facts, and dry runs on a packet."""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_int, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass

from tidegate_bpf.lib import Owner, bpf, read_info

MAX_FRAME = 1 << 16
"""Default room for a dry run's output frame."""


class _Info(ctypes.Structure):
    """A prefix of struct bpf_prog_info."""

    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("tag", c_uint8 * 8),
        ("jited_prog_len", c_uint32),
        ("xlated_prog_len", c_uint32),
        ("pointers", c_uint64 * 2),
        ("load_time", c_uint64),
        ("created_by_uid", c_uint32),
        ("nr_map_ids", c_uint32),
        ("map_ids", c_uint64),
        ("name", c_char * 16),
        ("ifindex", c_uint32),
        ("gpl_compatible", c_uint32),
        ("netns", c_uint64 * 2),
        ("nr_jited", c_uint32 * 2),
        ("jited", c_uint64 * 2),
        ("btf_id", c_uint32),
        ("func_info_rec_size", c_uint32),
        ("func_info", c_uint64),
        ("nr_func_info", c_uint32),
        ("nr_line_info", c_uint32),
        ("line_info", c_uint64 * 2),
        ("line_info_counts", c_uint32 * 4),
        ("prog_tags", c_uint64),
        ("run", c_uint64 * 3),
        ("verified_insns", c_uint32),
    )


class SkbContext(ctypes.Structure):
    """struct __sk_buff as a dry run takes and returns it.

    The kernel takes only these in, and refuses (EINVAL) any other that is not zero: mark, priority,
    ingress_ifindex, ifindex (an interface of the caller's network namespace), cb, tstamp,
    wire_len, gso_segs, gso_size, hwtstamp. It gives back the same but gso_size.
    """

    _fields_ = (
        ("len", c_uint32),
        ("pkt_type", c_uint32),
        ("mark", c_uint32),
        ("queue_mapping", c_uint32),
        ("protocol", c_uint32),
        ("vlan_present", c_uint32),
        ("vlan_tci", c_uint32),
        ("vlan_proto", c_uint32),
        ("priority", c_uint32),
        ("ingress_ifindex", c_uint32),
        ("ifindex", c_uint32),
        ("tc_index", c_uint32),
        ("cb", c_uint32 * 5),
        ("hash", c_uint32),
        ("tc_classid", c_uint32),
        ("data", c_uint32),
        ("data_end", c_uint32),
        ("napi_id", c_uint32),
        ("family", c_uint32),
        ("remote_ip4", c_uint32),
        ("local_ip4", c_uint32),
        ("remote_ip6", c_uint32 * 4),
        ("local_ip6", c_uint32 * 4),
        ("remote_port", c_uint32),
        ("local_port", c_uint32),
        ("data_meta", c_uint32),
        ("flow_keys", c_uint64),
        ("tstamp", c_uint64),
        ("wire_len", c_uint32),
        ("gso_segs", c_uint32),
        ("sk", c_uint64),
        ("gso_size", c_uint32),
        ("tstamp_type", c_uint8),
        ("hwtstamp", c_uint64),
    )


class _TestRunOptions(ctypes.Structure):
    _fields_ = (
        ("sz", c_size_t),
        ("data_in", c_void_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_void_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    )


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    """What the kernel says of a program. `tag` identifies its instructions; sizes in bytes;
    `verified_insns` is how many instructions the verifier walked."""

    type: int
    id: int
    name: str
    tag: str
    jited_size: int
    xlated_size: int
    verified_insns: int


@dataclass(frozen=True, slots=True)
class TestRun:
    """Result of a dry run. `retval` is signed; `duration_ns` is the mean of one repetition."""

    __test__ = False  # not a test case, whatever its name

    retval: int
    data_out: bytes
    ctx_out: bytes
    duration_ns: int


class Program(Owner):
    """Owns one descriptor of a loaded program."""

    @property
    def info(self) -> ProgramInfo:
        """Facts, read now."""
        raw = _Info()
        read_info(self.fileno(), raw)
        return ProgramInfo(
            raw.type,
            raw.id,
            raw.name.decode(),
            bytes(raw.tag).hex(),
            raw.jited_prog_len,
            raw.xlated_prog_len,
            raw.verified_insns,
        )

    def test_run(
        self,
        data: bytes,
        ctx: bytes | SkbContext | None = None,
        repeat: int = 1,
        data_out_size: int = MAX_FRAME,
    ) -> TestRun:
        """Run on a copy of frame `data` (at least 14 bytes for tc). Maps are the real ones.
        Packet programs run on the calling thread's CPU: pin the thread to choose it.
        BpfError: EINVAL (frame or context), ENODEV (ctx.ifindex), ENOSPC (data_out_size)."""
        given = bytes(ctx) if ctx is not None else b""
        output = ctypes.create_string_buffer(data_out_size)
        context = ctypes.create_string_buffer(len(given))
        source = ctypes.create_string_buffer(data, len(data))
        context_in = ctypes.create_string_buffer(given, len(given))
        options = _TestRunOptions(
            sz=ctypes.sizeof(_TestRunOptions),
            data_in=ctypes.addressof(source),
            data_size_in=len(data),
            data_out=ctypes.addressof(output) if data_out_size else None,
            data_size_out=data_out_size,
            repeat=repeat,
        )
        if given:
            options.ctx_in = ctypes.addressof(context_in)
            options.ctx_out = ctypes.addressof(context)
            options.ctx_size_in = options.ctx_size_out = len(given)
        bpf().bpf_prog_test_run_opts(self.fileno(), ctypes.byref(options))
        return TestRun(
            ctypes.c_int32(options.retval).value,
            output.raw[: options.data_size_out] if data_out_size else b"",
            context.raw[: options.ctx_size_out] if given else b"",
            options.duration,
        )
