"""`tidegate doctor`: what this machine has and lacks, a line each, with the remedy.

Found by trying; changes nothing that outlives the process.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from tidegate_bpf import BpfError, LibraryMissing, ObjectFile, PermissionDenied, features
from tidegate_bpf.features import Probe
from tidegate_loader import datagrams

from tidegate_cli import render, target
from tidegate_cli.errors import CliError
from tidegate_cli.live import objects_dir
from tidegate_cli.objects import RunObjects

OBJECTS = ("pod.o", "sock.o", "net.o", "xdp.o")
_CLONE_NEWNET = 0x40000000
Grade = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Line:
    grade: Grade
    name: str
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.grade:<4}  {self.name}: {self.detail}"
        return f"{text}; {self.remedy}" if self.remedy and self.grade != "ok" else text


def doctor(args: argparse.Namespace) -> int:
    lines = _lines(args)
    if args.output == "table":
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    else:
        names = ("grade", "name", "detail", "remedy")
        found = [{n: getattr(line, n) for n in names if getattr(line, n)} for line in lines]
        render.structured(found, args.output)
    return 1 if any(line.grade == "FAIL" for line in lines) else 0


def _lines(args: argparse.Namespace) -> list[Line]:
    """Of this machine, unless a cluster or this node's loader is meant."""
    if args.local:
        return examine_node()
    if args.kubeconfig is None and args.context is None and not target.as_plugin():
        return examine(args.run_dir)
    place = target.choose(args)
    assert not isinstance(place, RunObjects)
    from tidegate_cli.cluster import doctor as cluster  # noqa: PLC0415 - asks the API

    return cluster.examine(place, args.node)


def examine(run_dir: str) -> list[Line]:
    """Every check of a machine that is to carry a cluster by itself, whatever the others say."""
    return _examine(_bpffs(run_dir), graded(_namespaces, "FAIL"))


def examine_node() -> list[Line]:
    """Every check of a node, from inside its loader's pod."""
    return _examine(graded(lambda: features.bpffs_at(str(target.LOCAL_PIN_DIR)), "FAIL"))


def _examine(*more: Line) -> list[Line]:
    bad: Grade = "FAIL"
    lines = [
        graded(features.kernel, bad),
        graded(features.capabilities, bad),
        graded(features.library, bad),
        graded(features.kernel_btf, bad),
        graded(features.cgroup2, bad),
        *more,
    ]
    if lines[2].grade != "ok":  # nothing below works without libbpf
        return lines
    lines += [graded(probe, "warn") for probe in (features.jit, features.tcx, features.batch)]
    lines.append(graded(datagrams.supported, "warn"))
    return [*lines, *_objects()]


def graded(probe: Callable[[], Probe], bad: Grade) -> Line:
    """A probe as a line; `bad` is what a "no" amounts to."""
    try:
        answer = probe()
    except OSError as error:
        return Line(bad, probe.__name__.strip("_"), error.strerror or str(error))
    # What OSError puts before its text is not for people.
    detail = re.sub(r"^\[Errno \d+\] ", "", answer.detail)
    return Line("ok" if answer.ok else bad, answer.name, detail, answer.remedy)


def _bpffs(run_dir: str) -> Line:
    """`up` mounts its own below the run directory; the kernel has to know the file system."""
    own = features.bpffs_at(os.path.join(run_dir, "bpf"))
    if own.ok:
        return Line("ok", "bpffs", own.detail)
    with open("/proc/filesystems") as names:
        known = any(line.split()[-1] == "bpf" for line in names if line.strip())
    if known:
        return Line("ok", "bpffs", "in this kernel; `tidegate up` mounts one")
    return Line("FAIL", "bpffs", "not in this kernel", "a kernel with CONFIG_BPF_SYSCALL=y")


def _namespaces() -> Probe:
    """A network namespace can be made, in a child that ends with it."""
    name = "network namespaces"
    if not os.path.exists("/proc/self/ns/net"):
        return Probe(name, False, "not in this kernel", "a kernel with CONFIG_NET_NS=y")
    child = os.fork()
    if child == 0:
        os._exit(1 if ctypes.CDLL(None).unshare(_CLONE_NEWNET) else 0)
    _, code = os.waitpid(child, 0)
    if code:
        return Probe(name, False, "cannot be made", "run as root, or with CAP_SYS_ADMIN")
    return Probe(name, True, "can be made")


def _objects() -> Iterable[Line]:
    """Each compiled object: there, and taken by this kernel's verifier. Nothing is pinned."""
    try:
        directory = objects_dir()
    except CliError as error:
        what, _, remedy = str(error).partition("; ")
        return [Line("FAIL", "eBPF objects", what, remedy)]
    return [_object(str(directory / name)) for name in OBJECTS]


def _object(path: str) -> Line:
    name = f"verifier {os.path.basename(path)}"
    if not os.path.exists(path):
        return Line("FAIL", name, f"no {path}", "run `make objects`")
    try:
        with ObjectFile(path).load() as loaded:
            return Line("ok", name, f"{len(loaded.programs)} programs load")
    except (PermissionDenied, LibraryMissing) as error:
        remedy = "run as root, or with CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN"
        return Line("FAIL", name, str(error.strerror), remedy)
    except BpfError as error:
        return Line("FAIL", name, str(error.strerror), "report it with the output of `uname -r`")
