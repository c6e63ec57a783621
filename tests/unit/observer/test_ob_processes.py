"""Processes by their sockets' cookies, and pods in the node's network by their cgroups."""

from __future__ import annotations

import math
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from tidegate_bpf import ObjectFile
from tidegate_observer import cgroups, processes, rundir
from tidegate_observer.cgroups import Cgroups, uid_of
from tidegate_observer.directory import Directory
from tidegate_observer.flow import End, Process, address_bytes
from tidegate_observer.limits import Limits
from tidegate_observer.messages import flow_message
from tidegate_observer.people import Pod
from tidegate_observer.processes import BUSY, Processes
from tidegate_observer.records import Denials, Flows
from tidegate_observer.rings import Drain, Place
from tidegate_observer.rundir import RunDirSource
from unit.observer.flows import WEB, flow, started
from unit.observer.test_ob_records import record

SPEC = ObjectFile(Path(__file__).parents[3] / "datapath" / "build" / "pod.o")
CURL = Process(77, "curl")
UID = "0a1b2c3d-0000-4000-8000-00000000cafe"


def place(cookie: int, pid: int, name: bytes = b"curl") -> bytes:
    return struct.pack("=Q16s", (cookie & 0xFFFFFFFF) << 32 | pid, name)


def test_a_process_is_known_by_its_sockets_cookie() -> None:
    known = Processes(SPEC, Path("/nowhere"))
    look = place(1 << 40 | 5, 77) + bytes(24)
    known.note(look, look)
    assert known.get(5) == CURL
    assert known.get(6) is None
    assert known.get(0) is None


def test_a_place_that_is_being_written_is_read_again() -> None:
    """It is believed only if a second look finds the same."""
    known = Processes(SPEC, Path("/nowhere"))
    known.note(place(5, 77, b"half"), place(6, 77, b"curl"))
    assert (known.get(5), known.get(6)) == (None, None)
    known.note(place(6, 77, b"curl"), place(6, 77, b"curl"))
    assert known.get(6) == CURL
    writing = struct.pack("=Q16s", BUSY, b"curl")
    known.note(writing, writing)
    assert known.get(0xFFFFFFFF) is None


def test_what_was_known_is_kept_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MAX_KNOWN", 2)
    known = Processes(SPEC, Path("/nowhere"))
    for cookie in (1, 2, 3):
        known.note(place(cookie, 77), place(cookie, 77))
    assert [known.get(cookie) for cookie in (1, 2, 3)] == [None, CURL, CURL]


def test_names_are_whatever_programs_call_themselves() -> None:
    assert processes.name_of(b"\x1b[2J\xff\0rest") == "\x1b[2J\N{REPLACEMENT CHARACTER}"
    assert processes.name_of(b"exactly-16-bytes") == "exactly-16-bytes"


def test_nothing_is_known_without_the_map(tmp_path: Path) -> None:
    known = Processes(SPEC, tmp_path)
    known.read()
    assert known.get(1) is None


def known_one() -> Processes:
    known = Processes(SPEC, Path("/nowhere"))
    known.note(place(5, 77), place(5, 77))
    return known


def test_flows_and_denials_name_the_process() -> None:
    directory = Directory()
    plain = {"src": address_bytes("10.0.0.1"), "dst": address_bytes("10.0.0.2"), "protocol": 6}
    flows = Flows(SPEC, "n", 10, known_one())
    data = record("tg_flow_event", **plain, start=3, cookie=9 << 32 | 5)
    data += record("tg_flow_event", **plain, start=3, kind=1)
    data += record("tg_flow_event", **plain, start=4, cookie=6)
    assert [f.process for f in flows.flows(data, 0, directory)] == [CURL, CURL, None]
    denials = Denials(SPEC, "n", None, known_one())
    data = b"".join(record("tg_event", **plain, socket=socket) for socket in (5, 6, 0))
    assert [f.process for f in denials.flows(data, 0, directory)] == [CURL, None, None]


def test_one_denials_process_does_not_stand_for_the_others() -> None:
    limits = Limits(SPEC, "n", Path("/nowhere"))
    kind = (9, 0, 300, 301, 0, 133)
    limits.seen[kind] = flow(process=CURL)
    found = limits._entry(kind, 4, 0, Directory())
    assert (found.more, found.process) == (4, None)


def test_a_flow_says_its_process() -> None:
    made = flow_message(started(process=CURL), "1")
    assert made.Summary == "TCP Flags: SYN; by curl (77)"
    assert b"process" in made.extensions.value
    assert not flow_message(started(), "1").HasField("extensions")
    hostile = flow_message(started(process=Process(1, "\x1b[2J\n\N{RIGHT-TO-LEFT OVERRIDE}x")), "1")
    assert hostile.Summary == "TCP Flags: SYN; by \\x1b[2J\\n\\u202ex (1)"


def test_places_are_read_before_records_can_be_taken() -> None:
    seen: list[int] = []

    class One:
        data, place = b"record", Place(1, 6)

        def read(self) -> bytes:
            found, self.data = self.data, b""
            return found

    ring: Any = One()
    drain = Drain([ring], lambda: seen.append(1))
    drain.read()
    assert (seen, drain.take(0)) == ([1], b"record")
    drain.read()
    assert seen == [1]


# ---- cgroups ------------------------------------------------------------------------------------

SLICE = f"kubepods-burstable-pod{UID.replace('-', '_')}.slice"
NAMES = [
    (UID, UID),
    (f"pod{UID}", UID),
    (SLICE, UID),
    (f"kubelet-{SLICE}", UID),
    ("kubepods-pod0123456789abcdef0123456789abcdef.slice", "0123456789abcdef0123456789abcdef"),
    ("kubepods-burstable.slice", ""),
    ("system.slice", ""),
    (f"cri-containerd-{'0' * 64}.scope", ""),
    (f"x{UID}", ""),
]


@pytest.mark.parametrize(("name", "expected"), NAMES)
def test_the_uid_in_a_directorys_name(name: str, expected: str) -> None:
    assert uid_of(name) == expected


def test_a_container_is_of_the_pod_above_it(tmp_path: Path) -> None:
    container = tmp_path / "kubepods.slice" / SLICE / "cri-containerd-1.scope"
    container.mkdir(parents=True)
    other = tmp_path / "system.slice"
    other.mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    found = cgroups.walk(tmp_path)
    inode = {path: path.stat().st_ino for path in (container, container.parent, other, tmp_path)}
    assert {path: found[number] for path, number in inode.items()} == {
        container: UID,
        container.parent: UID,
        other: "",
        tmp_path: "",
    }
    assert len(found) == 5
    assert cgroups.walk(tmp_path / "gone") == {}


def test_a_cgroup_that_is_nowhere_is_not_looked_for_all_the_time(tmp_path: Path) -> None:
    held = Cgroups(tmp_path)
    assert held.look(tmp_path.stat().st_ino) == ""
    late = tmp_path / UID
    late.mkdir()
    held._due = math.inf
    assert held.look(late.stat().st_ino) is None
    held._due = 0.0
    assert held.look(late.stat().st_ino) == UID
    held._due = 0.0
    assert held.look(1) == "", "whose it was is gone"
    assert Cgroups(None).look(1) == ""


class Late:
    """Implements `people.People`: the pod is known once it was asked for `rounds` times."""

    def __init__(self, rounds: int) -> None:
        self.left = rounds
        self.identities: dict[int, End] = {}

    def fresh(self) -> bool:
        self.left -= 1
        return self.left == 0

    @property
    def pods(self) -> dict[tuple[str, str], Pod]:
        return {("town", "agent"): Pod((), True, uid=UID)} if self.left <= 0 else {}


def host_source(source: RunDirSource, cgroup: int) -> End:
    ends = {"src": address_bytes("192.0.2.1"), "dst": address_bytes("192.0.2.2")}
    plain = ends | {"protocol": 6, "src_identity": 1, "cgroup": cgroup}
    (found,) = Flows(SPEC, "n").flows(record("tg_flow_event", **plain), 0, source.directory)
    return found.source


def test_the_first_flow_of_a_new_pod_in_the_nodes_network_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its only flow, maybe: neither that somebody else's cgroup was looked for a moment ago, nor
    that the API server tells of the pod a moment later, leaves it without a name."""
    monkeypatch.setitem(rundir.WAIT_SECONDS, "cgroup", 60.0)
    tree = tmp_path / "cgroup"
    tree.mkdir()
    source = RunDirSource(tmp_path, "n", people=Late(40), cgroup=tree)
    assert host_source(source, 1).pod == ""
    container = tree / f"pod{UID}" / "container"
    container.mkdir(parents=True)
    source._cgroups._due = time.monotonic() + 0.1
    assert host_source(source, container.stat().st_ino).pod == "agent"


def test_a_cgroup_whose_pod_nobody_tells_is_not_waited_for_again(tmp_path: Path) -> None:
    tree = tmp_path / "cgroup"
    container = tree / f"pod{UID}"
    container.mkdir(parents=True)
    source = RunDirSource(tmp_path, "n", people=Late(1 << 30), cgroup=tree)
    cgroup = container.stat().st_ino
    assert host_source(source, cgroup).pod == ""
    reads: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "refresh", lambda: reads.append(1))
        for _ in range(100):
            assert host_source(source, cgroup).pod == ""
    assert not reads


def test_who_is_on_the_node_is_known_by_the_cgroup() -> None:
    proxy = End(1, namespace="kube-system", pod="proxy-x", labels=("k8s:app=proxy",))
    asked: list[tuple[str, Any]] = []

    def missing(what: str, which: Any) -> bool:
        asked.append((what, which))
        return False

    directory = Directory(missing)
    directory.hosts = {8: proxy, 9: None}
    plain = {"src": address_bytes("192.0.2.1"), "dst": address_bytes("10.0.0.2"), "protocol": 6}

    def source(identity: int, cgroup: int, src: bytes = plain["src"]) -> End:
        fields = plain | {"src": src, "src_identity": identity, "cgroup": cgroup}
        (found,) = Flows(SPEC, "n").flows(record("tg_flow_event", **fields), 0, directory)
        return found.source

    assert source(1, 8) is proxy
    assert source(6, 8) == replace(proxy, identity=6)
    assert source(1, 9).pod == ""
    assert not asked
    assert source(1, 10).pod == ""
    assert asked == [("cgroup", 10)]
    assert source(1, 0).pod == ""
    pods = address_bytes("10.0.0.1")
    directory.addresses[pods] = WEB
    assert source(WEB.identity, 8, pods) is WEB
    assert flow_message(flow(source=proxy), "1").source.pod_name == "proxy-x"
