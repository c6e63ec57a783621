"""NetworkPolicy feature by feature with real packets: one town, one table, every row on one node or
across two, in IPv4 and IPv6 (`support/truth_town.py`). That the table can fail is proven on the
entries of the rule sets in force.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import itertools
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import ca_town, frames
from support import truth as truth_
from support import truth_town as t
from support.asking import GRACE_SECONDS, Places
from support.ca_maps import ADDR, ALLOW, DENY, ISOLATED, U32, codec
from support.truth import WAIT_SECONDS, ip
from tidegate_bpf import Map, netns
from tidegate_cli.standalone.errors import PrerequisiteError
from tidegate_cli.standalone.loaders import check
from tidegate_cli.standalone.rundir import RunDir

pytestmark = [pytest.mark.cluster, pytest.mark.kernel]


@dataclass
class Truth(truth_.Truth):
    """As `tidegate up` made it, from a folder that it watches."""

    town: ca_town.Town
    outside: str

    def learn(self, *wanted: str) -> bool:
        state = self.town.run_dir.read()
        assert state is not None
        for pod in state.pods:
            if not pod.host_network:
                self.places.paths[pod.name] = pod.netns
                self.addresses[pod.name] = (pod.addresses[0], pod.addresses[1])
        for node in state.nodes:
            self.places.paths[node.name] = node.netns
        self.cidrs = {node.name: (node.pod_cidrs[0], node.pod_cidrs[1]) for node in state.nodes}
        self.addresses |= t.NODES | t.OUTSIDE | {"vip": t.VIP}
        self.places.paths |= dict.fromkeys(t.OUTSIDE, f"/run/netns/{self.outside}")
        return self.addresses.keys() >= set(wanted)

    def save(self, name: str, text: str) -> None:
        """By rename, as editors save."""
        temporary = self.town.folder / f".{name}.tmp"
        temporary.write_text(text)
        temporary.rename(self.town.folder / f"{name}.yaml")


def join(run_dir: RunDir, outside: str) -> None:
    """A host on the nodes' network."""
    fabric = f"{run_dir.netns_prefix}_fabric"
    veth = ("type", "veth", "peer", "eth0", "netns", outside)
    ip("-n", fabric, "link", "add", "out", *veth)
    ip("-n", fabric, "link", "set", "out", "master", "br0", "up")


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Truth]:
    try:
        check()
    except PrerequisiteError as error:
        pytest.skip(str(error))
    outside = f"tgo-{os.getpid()}"
    ip("netns", "add", outside)
    try:
        with ca_town.town(tmp_path_factory.mktemp("truth")) as town:
            found = Truth(Places({}), town, outside)
            found.inhabit()
            town.up()
            found.learn()
            join(town.run_dir, outside)
            truth_.furnish(found, outside)
            found.save("policies", t.policies(found.addresses, found.cidrs))
            with truth_.answered(found):
                yield found
    finally:
        ip("netns", "del", outside)


def test_the_truth_table(truth: Truth) -> None:
    """Policies of pods that lived before them."""
    truth.agrees()


def test_a_pod_reaches_itself_by_its_service_where_sockets_are_translated(truth: Truth) -> None:
    """`narcissus` is isolated both ways; in its own cgroup its socket is translated."""
    truth.agrees([row for row in t.TABLE if "narcissus" in (row.who, row.target)])
    for address in t.VIP:
        argv = [sys.executable, "-c", CONNECT, address, "80"]
        assert truth.town.tidegate("exec", "narcissus", "--", *argv).returncode == 0, address
    argv = [sys.executable, "-c", CONNECT, truth.addresses["open"][0], "8080"]
    assert truth.town.tidegate("exec", "narcissus", "--", *argv).returncode != 0


CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2).close()"


def test_the_table_notices_every_rule_and_every_network(truth: Truth) -> None:
    """Behind the loaders' backs, while they are stopped: each rule of each rule set the other way
    round, each network of a rule set gone, nobody isolated. For whoever is asked about it, a row
    has to be wrong, or the table proves nothing of that rule."""
    truth.agrees()
    with _stopped(truth), _Faults(truth) as faults:
        asked = {row.target for row in t.TABLE} | {row.who for row in t.TABLE}
        unseen = []
        for what in ("rule", "network", "isolation"):
            for turn in itertools.count():
                broken = faults.seed(what, turn)
                if not broken:
                    break
                left = [names for names in broken if names & asked]
                # What a fault lets through may be late on a busy machine: asked with more patience.
                for seconds in (0.6, 3.0, 10.0):
                    seen = truth.wrong(seconds=seconds, grace=seconds) if left else []
                    left = [names for names in left if not any(_about(names, x) for x in seen)]
                faults.mend()
                unseen += [f"{what} {turn} of {', '.join(sorted(names))}" for names in left]
    assert unseen == []
    truth.agrees()
    assert faults.count > 30


def _about(names: set[str], wrong: str) -> bool:
    who, _, rest = wrong.partition(" > ")
    return bool(names & {who.rpartition(": ")[2], rest.split()[0]})


@contextlib.contextmanager
def _stopped(truth: Truth) -> Iterator[None]:
    """Loaders that repair nothing: they are the town's own processes."""
    loaders = truth.town.loaders().values()
    for pid in loaders:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in loaders:
            os.kill(pid, signal.SIGCONT)


class _Faults:
    """Wrong values in the kernel's maps of all nodes, one of each rule set at a time."""

    def __init__(self, truth: Truth) -> None:
        self._nodes = [truth.town.run_dir.bpf / name for name in t.NODES]
        self._names = {pair[0]: name for name, pair in truth.addresses.items()}
        self._names[t.VIP[0]] = "vip"
        self._undo: list[tuple[Map, bytes, bytes]] = []
        self.count = 0

    def __enter__(self) -> _Faults:
        return self

    def __exit__(self, *_: object) -> None:
        self.mend()

    def mend(self) -> None:
        for table, key, value in reversed(self._undo):
            table.update(key, value)
            table.close()
        self._undo.clear()

    def seed(self, what: str, turn: int) -> list[set[str]]:
        """Whose policy has one fault each; [] when there are no more."""
        found = [names for node in self._nodes for names in self._seed(node, what, turn)]
        self.count += len(found)
        return found

    def _seed(self, node: Path, what: str, turn: int) -> Iterator[set[str]]:
        with Map.open_pinned(str(node / "maps" / "node_v2")) as outer:
            table = Map.from_id(U32.unpack(outer.lookup(U32.pack(0)))[0])
        subjects: dict[tuple[int, bool], set[str]] = {}
        for raw_key, raw in table.items():
            key, row = codec("tg_node_key").unpack(raw_key), codec("tg_endpoint").unpack(raw)
            name = self._names.get(_text(key.addr), "") if key.kind == ADDR else ""
            for policy in (row.ingress, row.egress):
                if policy.flags and name:
                    isolated = bool(policy.flags & ISOLATED)
                    subjects.setdefault((policy.rule_set, isolated), set()).add(name)
            if what == "isolation" and turn == 0 and row.ingress.flags | row.egress.flags:
                keep = 255 - ISOLATED
                sides = {
                    side: getattr(row, side)._replace(flags=getattr(row, side).flags & keep)
                    for side in ("ingress", "egress")
                }
                self._write(table, raw_key, codec("tg_endpoint").pack_row(row._replace(**sides)))
        for (number, isolated), names in subjects.items():
            done = (
                turn == 0 and isolated
                if what == "isolation"
                else self._rule(node, number, turn)
                if what == "rule"
                else self._network(node, number, turn)
            )
            if done:
                yield names
        table.close()

    def _rule(self, node: Path, number: int, turn: int) -> bool:
        """All entries of the rule set's rule number `turn`."""
        inner = Map.open_pinned(str(node / "rule_sets" / str(number)))
        done = False
        for key, raw in inner.items():
            row = codec("tg_rule").unpack(raw)
            if row.rule == turn:
                done = True
                other = DENY if row.action == ALLOW else ALLOW
                self._write(inner, key, codec("tg_rule").pack_row(row._replace(action=other)))
        inner.close()
        return done

    def _network(self, node: Path, number: int, turn: int) -> bool:
        path = node / "cidrs" / str(number)
        if not path.exists():
            return False
        trie = Map.open_pinned(str(path))
        found = sorted(trie.items())
        if turn < len(found):
            self._write(trie, found[turn][0], None)
        trie.close()
        return turn < len(found)

    def _write(self, table: Map, key: bytes, value: bytes | None) -> None:
        mine = Map.from_id(table.info.id)
        self._undo.append((mine, key, mine.lookup(key)))
        if value is None:
            mine.delete(key)
        else:
            mine.update(key, value)


def _text(raw: bytes) -> str:
    found = ipaddress.ip_address(raw)
    assert isinstance(found, ipaddress.IPv6Address)
    return str(found.ipv4_mapped or found)


# ---- host is where a packet was made ------------------------------------------------------

SINK = 7777


def test_who_writes_the_nodes_address_is_not_the_node(truth: Truth) -> None:
    """`probed` lets in nobody but its own node, `open` everybody. A pod that writes another's
    address is not heard at all; a host that writes the node's is one more host."""
    pod, host = _writer(truth, "near"), _writer(truth, "outside-200")
    with netns.inside(truth.places.paths["node-1"]):
        # A node's stack would drop its own address on the wire before any program sees it.
        for name in ("all", "eth0"):
            for key, value in (("rp_filter", "0"), ("accept_local", "1")):
                Path(f"/proc/sys/net/ipv4/conf/{name}/{key}").write_text(value)
    expected = {
        "open": {b"as itself", b"a host as the node", b"the node"},
        "probed": {b"the node"},
    }
    for family in (0, 1):
        node = t.NODES["node-1"][family]
        for target, heard in expected.items():
            to = truth.addresses[target][family]
            kind = socket.AF_INET6 if family else socket.AF_INET
            sink = truth.places.socket(
                target, kind, socket.SOCK_DGRAM, 0, ("0.0.0.0", "::")[family], SINK
            )
            with sink:
                pod(truth.addresses["near"][family], to, b"as itself")
                pod(node, to, b"a pod as the node")
                host(node, to, b"a host as the node")
                probe = truth.places.socket("node-1", kind, socket.SOCK_DGRAM)
                with probe:
                    probe.sendto(b"the node", (to, SINK))
                assert _heard(sink, heard) == heard, (target, to)


def _writer(truth: Truth, who: str) -> Callable[[str, str, bytes], None]:
    """(source, destination, payload) → a datagram of `who`, as its next hop gets frames."""
    hop = "eth0" if who in t.OUTSIDE else truth.town.pod(who).ifname
    mine, theirs = _mac(truth, who, "eth0"), _mac(truth, "node-1", hop)

    def write(src: str, dst: str, payload: bytes) -> None:
        data = frames.ip(src, dst, frames.UDP, frames.udp(src, dst, 40000, SINK, payload))
        with truth.places.socket(who, socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind(("eth0", 0))
            sock.send(frames.eth(data, src=mine, dst=theirs))

    return write


def _mac(truth: Truth, who: str, link: str) -> str:
    """By SIOCGIFHWADDR (linux/sockios.h)."""
    with truth.places.socket(who, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        asked = struct.pack("256s", link.encode())
        return frames.mac_text(fcntl.ioctl(sock.fileno(), 0x8927, asked)[18:24])


def _heard(sink: socket.socket, wanted: set[bytes]) -> set[bytes]:
    """All that came, when what is wanted has, and a moment later."""
    found: set[bytes] = set()
    deadline = time.monotonic() + WAIT_SECONDS
    complete = False
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            found.add(sink.recv(100))
            continue
        if found >= wanted and not complete:
            complete, deadline = True, time.monotonic() + GRACE_SECONDS
        time.sleep(0.01)
    return found


# ---- what changes ---------------------------------------------------------------------------


def test_labels_of_living_pods_and_namespaces(truth: Truth) -> None:
    truth_.labels_change(truth)


@pytest.mark.parametrize("changed", truth_.CUTS)
def test_what_is_allowed_no_more_is_cut_and_the_rest_loses_nothing(
    truth: Truth, changed: int
) -> None:
    truth_.flows_are_cut(truth, changed)


def test_a_policy_that_is_widened_interrupts_nothing(truth: Truth) -> None:
    truth_.policies_are_widened(truth)
