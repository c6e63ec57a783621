"""Loading, attaching and reading eBPF through libbpf and bpf(2), by ctypes.

What may not live here: Kubernetes, policy, addresses' meaning, map names, any import outside the
standard library. Whatever names a map or a struct belongs to the caller.

    lib        signature table and error check over libbpf.so.1 (>= 1.1); `require()`
    errors     the exception tree, rooted at BpfError
    btf        struct layouts, enums and globals from BTF bytes (pure)
    codec      Codec: struct layout ↔ Python values, singly and in bulk (pure)
    objects    ObjectFile (spec) → LoadedObject (maps, programs)
    maps       Map: element and batch operations, pins, facts
    programs   Program: pins, facts, dry runs with SkbContext
    links      attach_tcx, attach_xdp, attach_cgroup → Link, updated in place
    clsact     the same hooks on kernels without tcx
    ringbuf    RingBuffer: records by memory map
    features   Probe answers for `doctor`
    mounts, bpffs, netns   mount table, mounting a bpffs, entering a network namespace

Every owner of a descriptor is a context manager, closes once, and has `fileno()`; Map, Program
and Link have `pin(path)`, `open_pinned(path)` and `dup()`. Nothing is thread-safe beyond what the
kernel promises for one call; calls release the interpreter's lock.
"""

from tidegate_bpf.btf import Btf, Field, Layout
from tidegate_bpf.codec import Codec
from tidegate_bpf.errors import (
    BpfError,
    LayoutError,
    LibraryMissing,
    MapFull,
    NotSupported,
    PermissionDenied,
    VerifierError,
)
from tidegate_bpf.links import (
    AttachType,
    Link,
    LinkInfo,
    attach_cgroup,
    attach_tcx,
    attach_xdp,
)
from tidegate_bpf.maps import Map, MapInfo, MapType
from tidegate_bpf.objects import LoadedObject, MapSpec, ObjectFile, ProgramSpec
from tidegate_bpf.programs import Program, ProgramInfo, SkbContext, TestRun
from tidegate_bpf.ringbuf import RingBuffer

__all__ = [
    "AttachType",
    "BpfError",
    "Btf",
    "Codec",
    "Field",
    "Layout",
    "LayoutError",
    "LibraryMissing",
    "Link",
    "LinkInfo",
    "LoadedObject",
    "Map",
    "MapFull",
    "MapInfo",
    "MapSpec",
    "MapType",
    "NotSupported",
    "ObjectFile",
    "PermissionDenied",
    "Program",
    "ProgramInfo",
    "ProgramSpec",
    "RingBuffer",
    "SkbContext",
    "TestRun",
    "VerifierError",
    "attach_cgroup",
    "attach_tcx",
    "attach_xdp",
]
