"""`tidegate probe`: real connections out of this node's pods, asked for by `matrix`.

Runs in an errand's pod: the node's processes are visible, its files at HOST. Enters each pod's
network namespace and cgroup, as a process of the pod would. What it prints is read from its log.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

import msgspec

from tidegate_cli import connectivity
from tidegate_cli.cluster.errand import HOST
from tidegate_cli.connectivity import Destination, Rows
from tidegate_cli.errors import CliError
from tidegate_cli.standalone.rundir import Pod

_CLONE_NEWCGROUP = 0x02000000
_PROC = Path("/proc")


class Task(msgspec.Struct, frozen=True):
    """Who asks whom. `sources`: pod UID → places in `targets`, each (address, port)."""

    seconds: float
    targets: list[tuple[str, int]]
    sources: dict[str, list[int]]


def encode(task: Task) -> str:
    """As one argument: short, and of characters that nothing has to quote."""
    return base64.urlsafe_b64encode(zlib.compress(msgspec.json.encode(task), 9)).decode()


def decode(text: str) -> Task:
    """CliError: not one of these."""
    try:
        data = zlib.decompress(base64.urlsafe_b64decode(text))
        return msgspec.json.decode(data, type=Task)
    except (ValueError, zlib.error, msgspec.MsgspecError) as error:
        raise CliError(f"no task: {error}", "this is for `tidegate matrix`") from error


def probe(args: argparse.Namespace) -> int:
    """Prints {pod UID: [[pod that answered, what else happened], …]}, in the task's order."""
    task = decode(args.task)
    _enter_cgroup_namespace()
    places = find(task.sources)
    missing = sorted(task.sources.keys() - places.keys())
    if missing:
        raise CliError(f"no process of pod {', '.join(missing)} is on this node")
    rows = [
        (_pod(uid, *places[uid]), [_destination(*task.targets[i]) for i in wanted])
        for uid, wanted in task.sources.items()
    ]
    results = connectivity.probe_forked(rows, task.seconds)
    found = {
        pod.uid: [[result.pod, result.detail] for result in row]
        for (pod, _), row in zip(rows, results, strict=True)
    }
    json.dump(found, sys.stdout)
    return 0


def _pod(uid: str, pid: int, cgroup: Path) -> Pod:
    return Pod(
        uid=uid,
        namespace="",
        name=uid,
        node="",
        addresses=[],
        ports=[],
        host_network=False,
        command="",
        netns=f"/proc/{pid}/ns/net",
        cgroup=str(cgroup),
        ifname="",
    )


def _destination(address: str, port: int) -> Destination:
    family = 6 if ":" in address else 4
    return Destination("", family, address, port, "TCP", (), handshake=True)


def _enter_cgroup_namespace() -> None:
    """The node's: in one's own, no process can be moved out of it. OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(_PROC / "1/ns/cgroup", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, _CLONE_NEWCGROUP):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), "/proc/1/ns/cgroup")
    finally:
        os.close(fd)


def find(uids: Iterable[str]) -> dict[str, tuple[int, Path]]:
    """Pod UID → (a process of it that is in the pod's network, its cgroup2 directory)."""
    top = cgroup2_mount((_PROC / "1/mountinfo").read_text())
    own = os.stat(_PROC / "1/ns/net").st_ino
    wanted = {uid.replace("-", "_"): uid for uid in uids}
    found: dict[str, tuple[int, Path]] = {}
    for path in _PROC.glob("[0-9]*/cgroup"):
        try:
            text = path.read_text()
            network = os.stat(path.parent / "ns/net").st_ino
        except OSError:  # it ended
            continue
        uid = wanted.get(pod_of(text))
        if uid is not None and network != own and uid not in found:
            found[uid] = int(path.parent.name), Path(HOST + top + unified(text))
    return found


def pod_of(cgroups: str) -> str:
    """The pod UID in /proc/<pid>/cgroup, with _ for -; "" for a process of no pod."""
    match = re.search(r"pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12})", cgroups)
    return match[1].replace("-", "_") if match else ""


def unified(cgroups: str) -> str:
    """The path in the v2 hierarchy; "" where there is none."""
    lines = (line.partition("::") for line in cgroups.splitlines())
    return next((path for number, _, path in lines if number == "0"), "")


def cgroup2_mount(mountinfo: str) -> str:
    """Where cgroup2 is mounted. CliError: nowhere."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[0] == "cgroup2":
            return before.split()[4]
    raise CliError("the node has no cgroup2 mount")


def task_of(rows: Rows, seconds: float) -> Task:
    """What the rows of one node ask."""
    targets = list(dict.fromkeys((d.address, d.port) for _, columns in rows for d in columns))
    places = {target: number for number, target in enumerate(targets)}
    sources = {
        pod.uid: [places[d.address, d.port] for d in columns] for pod, columns in rows if columns
    }
    return Task(seconds, targets, sources)
