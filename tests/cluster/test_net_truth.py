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
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support import ca_town, frames
from support import truth_town as t
from support.asking import GRACE_SECONDS, Echoes, Flows, Places, Question
from support.ca_maps import ADDR, ALLOW, DENY, ISOLATED, U32, codec
from support.waiting import until
from tidegate_bpf import Map, netns
from tidegate_cli.standalone.errors import PrerequisiteError
from tidegate_cli.standalone.loaders import check
from tidegate_cli.standalone.rundir import RunDir

pytestmark = [pytest.mark.cluster, pytest.mark.kernel]
WAIT_SECONDS = 60.0


@dataclass
class Truth:
    town: ca_town.Town
    places: Places
    outside: str
    addresses: dict[str, tuple[str, str]] = field(default_factory=dict)

    def learn(self, wanted: str = "") -> bool:
        """Who is where, as `up` made it; whether `wanted` is among them."""
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
        return wanted in self.addresses

    def questions(self, rows: Sequence[t.Row]) -> list[tuple[t.Row, Question]]:
        return [
            (row, Question(row.who, address, row.port, protocol, source))
            for row in rows
            for protocol in ([row.protocol] if row.protocol else ["TCP", "UDP"])
            for address, source in zip(
                self.addresses[row.target], t.OUTSIDE.get(row.who, ("", "")), strict=True
            )
        ]

    def agrees(self, rows: Sequence[t.Row] = t.TABLE) -> None:
        """Soon every row is true: a change takes a moment to reach the nodes."""
        deadline = time.monotonic() + WAIT_SECONDS
        while (wrong := self.wrong(rows)) and time.monotonic() < deadline:
            pass
        assert wrong == []

    def wrong(
        self, rows: Sequence[t.Row] = t.TABLE, seconds: float = 3.0, grace: float = GRACE_SECONDS
    ) -> list[str]:
        """Rows that are not as expected, an answer being due in so many seconds; one that must not
        come has `grace` more."""
        asked = self.questions(rows)
        expected = [row.allowed for row, _ in asked]
        questions = [question for _, question in asked]
        found = self.places.ask(questions, expected, seconds, grace)
        return [
            f"{row.why}: {q.who} > {row.target} {q.address} {q.port}/{q.protocol}: {got or '-'}"
            for (row, q), got in zip(asked, found, strict=True)
            if got != ("answered" if row.allowed else "")
        ]

    def inhabit(self, **changed: str) -> None:
        """Everybody, some otherwise."""
        self.save("inhabitants", "---".join((t.INHABITANTS | changed).values()))

    def save(self, name: str, text: str) -> None:
        """By rename, as editors save."""
        temporary = self.town.folder / f".{name}.tmp"
        temporary.write_text(text)
        temporary.rename(self.town.folder / f"{name}.yaml")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def join(run_dir: RunDir, outside: str, cidrs: dict[str, tuple[str, str]]) -> None:
    """A host on the nodes' network that has many addresses."""
    fabric = f"{run_dir.netns_prefix}_fabric"
    veth = ("type", "veth", "peer", "eth0", "netns", outside)
    ip("-n", fabric, "link", "add", "out", *veth)
    ip("-n", fabric, "link", "set", "out", "master", "br0", "up")
    for link in ("lo", "eth0"):
        ip("-n", outside, "link", "set", link, "up")
    for pair in t.OUTSIDE.values():
        ip("-n", outside, "addr", "add", f"{pair[0]}/16", "dev", "eth0")
        ip("-n", outside, "addr", "add", f"{pair[1]}/64", "dev", "eth0", "nodad")
    for node, pair in cidrs.items():
        for cidr, via in zip(pair, t.NODES[node], strict=True):
            ip("-n", outside, "route", "add", cidr, "via", via)


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
            found = Truth(town, Places({}), outside)
            found.inhabit()
            town.up()
            found.learn()
            join(town.run_dir, outside, found.cidrs)
            found.save("policies", t.policies(found.addresses, found.cidrs))
            with Echoes(found.places) as echoes:
                for name in ("sctp", "open", "ranged"):
                    echoes.serve(name, "SCTP", *t.SCTP_PORTS)
                for name, pair in t.OUTSIDE.items():
                    for protocol in ("TCP", "UDP", "SCTP"):
                        echoes.serve(name, protocol, t.OUTER, at=pair)
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
        self._names["10.96.7.7"] = "vip"
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
    """A policy that waits for its pod; then pods and a namespace that have other labels."""
    late = t.policy(
        "late", f"{{from: [{t.FRIENDS}, {{namespaceSelector: {{matchLabels: {{team: blue}}}}}}]}}"
    )
    truth.save("late-policy", late)
    truth.save("late", t.pod("late"))
    until(lambda: truth.learn("late"), "the pod is there", WAIT_SECONDS)
    rows = t.rows("""
near far mate > late:8080/ yes  # the policy was there first
stray alien   > late:8080/ no   # and isolates
""")
    truth.agrees(rows)
    changed = {
        "near": t.pod("near", 1, "role: former"),
        "stray": t.pod("stray", 1, "role: friend"),
        "blue": t.namespace("red"),
    }
    # While it is open, no other namespace has its number.
    with Path(truth.places.paths["near"]).open("rb") as lives, _put_back(truth):
        truth.inhabit(**changed)
        truth.agrees(
            t.rows("""
stray far > late:8080/ yes  # has the label now
stray     > hosted:8080/ yes  # for every policy
near      > late:8080/ no   # has it no more
near      > hosted:8080/ no   # for every policy
mate      > late:8080/ no   # the namespace has another label
mate      > by-team:8080/ no   # for every policy
mate      > by-name:8080/ yes  # and the same name
""")
        )
        number = os.fstat(lives.fileno()).st_ino
        assert Path(truth.places.paths["near"]).stat().st_ino == number, "the same pod"
        truth.save("late", t.pod("late").replace("app: late", "app: free"))
        truth.agrees(t.rows("near stray mate alien > late:8080/ yes  # nobody's subject now"))
    truth.agrees(rows)
    truth.agrees()


@contextlib.contextmanager
def _put_back(truth: Truth) -> Iterator[None]:
    try:
        yield
    finally:
        truth.inhabit()
        truth.save("late", t.pod("late"))


CLIENTS = ("near", "far", "mate", "alien", "two", "outside-200", "outside-202", "outside-210")


@pytest.mark.parametrize(
    ("changed", "cut"),
    [
        # near: the receiver's rule. far: its own egress, TCP only. mate: its namespace's label.
        # outside-200: the block has a hole now.
        (
            1,
            {
                "near TCP",
                "near UDP",
                "far TCP",
                "mate TCP",
                "mate UDP",
                "outside-200 TCP",
                "outside-200 UDP",
            },
        ),
        # near: its own label. far: a TrafficPolicy. mate: the Admin tier. alien: the block has a
        # hole. outside-210: the Identity has no such address any more.
        (
            2,
            {
                f"{who} {kind}"
                for who in ("near", "far", "mate", "alien", "outside-210")
                for kind in ("TCP", "UDP")
            },
        ),
    ],
)
def test_what_is_allowed_no_more_is_cut_and_the_rest_loses_nothing(
    truth: Truth, changed: int, cut: set[str]
) -> None:
    """Established flows, from either end's policy; the rest go on without a datagram lost."""
    truth.save("kept", t.kept(truth.addresses, truth.cidrs))
    truth.agrees(_kept(set()))
    with Flows() as flows:
        for number, who in enumerate(CLIENTS):
            for kind in ("TCP", "UDP"):
                # One family each, so that both are there.
                family = (number + (kind == "UDP")) % 2
                to, source = truth.addresses["kept"][family], t.OUTSIDE.get(who, ("", ""))[family]
                flows.open(truth.places, f"{who} {kind}", Question(who, to, 8080, kind, source))
        until(lambda: min(flows.counts().values()) > 5, "all are answered", WAIT_SECONDS)
        try:
            truth.save("kept", t.kept(truth.addresses, truth.cidrs, changed=changed))
            if changed == 1:
                truth.inhabit(blue=t.namespace("red"))
            else:
                near = t.pod("near", 1, "role: former")
                truth.inhabit(near=near, office=t.office("172.18.0.211/32"))
            truth.agrees(_kept(cut))
            deadline = time.monotonic() + WAIT_SECONDS
            while (silent := flows.silent()) != cut and time.monotonic() < deadline:
                pass
            assert silent == cut
            ended = flows.counts()
            assert flows.silent() == cut
            assert {name for name, count in flows.counts().items() if count == ended[name]} == cut
            assert flows.lost().keys() <= cut
        finally:
            truth.inhabit()
            truth.save("kept", "")
    truth.agrees(t.rows(f"{' '.join(CLIENTS)} > kept:8080/ yes  # nobody isolates"))


def _kept(cut: set[str]) -> list[t.Row]:
    """New connections have the same fate."""
    return [
        t.Row("as the flow", who, "kept", 8080, kind, f"{who} {kind}" not in cut)
        for who in CLIENTS
        for kind in ("TCP", "UDP")
    ]


def test_a_policy_that_is_widened_interrupts_nothing(truth: Truth) -> None:
    """More peers, another kind of peer for the same pods, more ports, one more policy, none."""
    ports = "ports: [{port: 8080}, {port: 8080, protocol: UDP}]"
    wide = "ports: [{port: 8000, endPort: 9000}, {port: 1, endPort: 65535, protocol: UDP}]"
    other, near = t.pods_with(role="other"), t.pods_with(app="near")
    far, everybody = t.blocks(*t.both(truth.cidrs["node-2"])), "from: [{namespaceSelector: {}}]"
    steps = {
        "stray > kept:8080/": t.policy("kept", f"{{from: [{t.FRIENDS}, {other}], {ports}}}"),
        "alien > kept:8080/": t.policy("kept", f"{{from: [{near}, {far}], {ports}}}"),
        "mate > kept:8081/UDP": t.policy("kept", f"{{{everybody}, {wide}}}"),
        "mate > kept:7000/TCP": "---".join(
            [t.policy("kept", f"{{{everybody}}}"), t.policy("kept", name="more")]
        ),
        "outside-200 > kept:8080/": "",
    }
    truth.save("kept", t.policy("kept", f"{{from: [{t.FRIENDS}], {ports}}}"))
    truth.agrees(t.rows("near far > kept:8080/ yes\nstray > kept:8080/ no"))
    with Flows() as flows:
        for who in ("near", "far"):
            for kind in ("TCP", "UDP"):
                to = truth.addresses["kept"][kind == "UDP"]
                flows.open(truth.places, f"{who} {kind}", Question(who, to, 8080, kind))
        for opened, text in steps.items():
            truth.save("kept", text)
            truth.agrees(t.rows(f"{opened} yes # is what it adds"))
            assert flows.silent() == set(), opened
        assert flows.lost() == {}
