"""tcx, clsact and cgroup attachments in a private network namespace and cgroup."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tidegate_bpf import (
    AttachType,
    BpfError,
    Link,
    LoadedObject,
    ObjectFile,
    attach_cgroup,
    attach_tcx,
    bpffs,
    clsact,
    features,
    mounts,
    netns,
)
from unit.bpf.compiled import small_object

pytestmark = pytest.mark.kernel


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace with a veth pair v0, v1; its path."""
    name = f"tgb1-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        pair = ["link", "add", "v0", "type", "veth", "peer", "name", "v1"]
        subprocess.run(["ip", "-n", name, *pair], check=True)
        yield f"/run/netns/{name}"
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.fixture
def loaded() -> Iterator[LoadedObject]:
    with ObjectFile(small_object()).load() as found:
        yield found


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "bpf"
    path.mkdir()
    bpffs.mount(path)
    yield path
    bpffs.unmount(path)


def test_inside_a_namespace_and_back(namespace: str) -> None:
    home = os.stat("/proc/thread-self/ns/net").st_ino
    with contextlib.suppress(LookupError), netns.inside(namespace):
        assert os.stat("/proc/thread-self/ns/net").st_ino == os.stat(namespace).st_ino
        assert socket.if_nametoindex("v0") > 0
        raise LookupError  # back home on failure too
    assert os.stat("/proc/thread-self/ns/net").st_ino == home
    fd = os.open(namespace, os.O_RDONLY)
    with netns.inside(fd):
        assert os.stat("/proc/thread-self/ns/net").st_ino == os.stat(namespace).st_ino
    os.fstat(fd)  # the caller's descriptor stays the caller's
    os.close(fd)


@pytest.mark.parametrize("ingress", [True, False])
def test_tcx(namespace: str, loaded: LoadedObject, pins: Path, ingress: bool) -> None:
    if not (probe := features.tcx()).ok:
        pytest.skip(f"missing feature: {probe.name}")
    first, second = loaded.programs["answer"], loaded.programs["minus"]
    with netns.inside(namespace):
        ifindex = socket.if_nametoindex("v0")
        link = attach_tcx(first, ifindex, ingress=ingress)
    with link:
        where = AttachType.TCX_INGRESS if ingress else AttachType.TCX_EGRESS
        assert (link.info.target, link.info.attach_type) == (ifindex, where)
        assert link.info.program_id == first.info.id
        link.update(second)
        assert link.info.program_id == second.info.id
        link.pin(str(pins / "link"))
    with Link.open_pinned(str(pins / "link")) as again:
        assert again.info.program_id == second.info.id
        subprocess.run(["ip", "-n", os.path.basename(namespace), "link", "del", "v0"], check=True)
        assert again.info.target == 0
        with pytest.raises(BpfError) as gone:
            again.update(first)
        assert gone.value.errno == errno.ENOLINK


def test_tcx_errors(loaded: LoadedObject) -> None:
    if not (probe := features.tcx()).ok:
        pytest.skip(f"missing feature: {probe.name}")
    with pytest.raises(BpfError) as caught:
        attach_tcx(loaded.programs["answer"], 0x7FFFFFF, ingress=True)
    assert caught.value.errno == errno.ENODEV


def test_clsact(namespace: str, loaded: LoadedObject) -> None:
    first, second = loaded.programs["answer"], loaded.programs["minus"]
    with netns.inside(namespace):
        ifindex = socket.if_nametoindex("v0")
        assert clsact.query(ifindex, ingress=True) is None
        clsact.detach(ifindex, ingress=True)
        clsact.attach(first, ifindex, ingress=True)
        assert clsact.query(ifindex, ingress=True) == first.info.id
        assert clsact.query(ifindex, ingress=False) is None
        clsact.attach(second, ifindex, ingress=True)
        clsact.attach(first, ifindex, ingress=False)
        assert clsact.query(ifindex, ingress=True) == second.info.id
        shown = subprocess.run(
            ["tc", "filter", "show", "dev", "v0", "ingress"], capture_output=True, check=True
        )
        assert shown.stdout.count(b"handle") == 1  # replaced, not added
        clsact.detach(ifindex, ingress=True)
        clsact.detach(ifindex, ingress=True)
        assert clsact.query(ifindex, ingress=True) is None
        assert clsact.query(ifindex, ingress=False) == first.info.id
        clsact.remove_qdisc(ifindex)
        assert clsact.query(ifindex, ingress=False) is None


CONNECT = """
import os, socket, sys
with open(sys.argv[1] + "/cgroup.procs", "w") as procs:
    procs.write(str(os.getpid()))
print("in", flush=True)
for _ in sys.stdin:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        print(s.connect_ex(("127.0.0.1", 9)), flush=True)
"""


@pytest.fixture
def cgroup() -> Iterator[Path]:
    root = mounts.cgroup2()
    assert root is not None
    path = Path(root) / f"tgb1-{os.getpid()}"
    path.mkdir()
    yield path
    path.rmdir()


def test_cgroup(cgroup: Path, loaded: LoadedObject, pins: Path) -> None:
    refuse, allow = loaded.programs["refuse"], loaded.programs["allow"]
    child = subprocess.Popen(
        [sys.executable, "-c", CONNECT, str(cgroup)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def connect() -> int:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("\n")
        child.stdin.flush()
        return int(child.stdout.readline())

    with child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "in\n"
            assert connect() == 0
            directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
            with attach_cgroup(refuse, directory, AttachType.INET4_CONNECT) as link:
                os.close(directory)
                assert connect() == errno.EPERM
                assert link.info.target == cgroup.stat().st_ino
                assert link.info.attach_type == AttachType.INET4_CONNECT
                link.update(allow)
                assert connect() == 0
                link.update(refuse)
                link.pin(str(pins / "link"))
            assert connect() == errno.EPERM  # the pin holds it
            with Link.open_pinned(str(pins / "link")) as again:
                again.detach()
            assert connect() == 0
        finally:
            child.kill()
