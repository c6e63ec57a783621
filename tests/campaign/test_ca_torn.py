"""A reader on one CPU against the loader's writes on the other.

The writer drives the loader's own plan and apply between node states whose policies, addresses and
services differ; elements come and go so that the kernel hands one key's memory to another. The
reader asks the programs without pause and never may get an answer that belongs to no state: a
verdict of neither, one end by the old policy and the other by the new, another service's backend.

Faults it was seen to find within half a minute: a node table edited in place instead of swapped;
slots written after the frontend that names them; old rule sets removed before the switch; an
address deleted before it is written anew. Not found: proofs not compared, which takes an interrupt
between two instructions that meets the reuse of that very element.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ca_rig, frames
from support import loader_world as world
from support.ca_maps import U32, codec
from support.ca_race import race
from support.ca_soak import SOAK, campaign
from tidegate_api.state import AnyPeer, SetPeer
from tidegate_bpf import SkbContext
from tidegate_loader import apply, kernel, maps, plan

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs"),
]

CI_SECONDS = 20
SOAK_WRITES = 1_000_000
SWITCH_EVERY = 20
"""Applies of addresses and services between two policy switches."""
UPDATES_A_SECOND = 2000
"""Of the loader's clock here, so that slots come back to use within the campaign."""

HAMMER = 2000
"""Runs of a program in one call."""

CLIENT, SERVER = 1, 2
MOVING, DENIED, ALLOWED = "10.9.0.1", range(16, 24), range(32, 40)
VIPS = range(1, 9)
TCP = frames.TCP

# ---- the states -------------------------------------------------------------------------


def _swap(direction: str, first: int) -> list[object]:
    """Ports 80 and 90 by rules 0 and 1, or by 1 and 0. Port 60 at one end only: a packet to it
    passes where one end's policy is the old one and the other's the new one."""
    here = [world.term(AnyPeer(), 2, "TCP", 60)] if (direction == "Egress") == bool(first) else []
    return [
        *here,
        world.term(AnyPeer(), first, "TCP", 80),
        world.term(AnyPeer(), 1 - first, "TCP", 90),
        world.term(AnyPeer(), 2, "TCP", 8080),
    ]


def _peer_terms() -> list[object]:
    return [
        world.term(SetPeer(name="allowed"), 3, "TCP", 70),
        world.term(SetPeer(name="old"), 4, "TCP", 71),
        world.term(SetPeer(name="new"), 5, "TCP", 71),
    ]


def state(policy: int, facts: int) -> maps.DesiredMaps:
    """`policy`: which rule decides; `facts`: who has which address, and what is behind a vip."""
    into = world.rule_set(*_swap("Ingress", policy), *_peer_terms())  # type: ignore[arg-type]
    out = world.rule_set(*_swap("Egress", policy), direction="Egress", name="q")  # type: ignore[arg-type]
    built = world.World(
        endpoints=[
            world.endpoint(CLIENT, 300, egress=out.metadata.name),
            world.endpoint(SERVER, 301, ingress=into.metadata.name),
        ],
        rule_sets=[into, out],
        peers=[
            world.peer_set("allowed", 400),
            world.peer_set("old", 500),
            world.peer_set("new", 501),
        ],
        ipcache=_addresses(facts),
        services=_services(facts),
    )
    interfaces = {
        f"uid-{n}": world.interface(n, ca_rig.FIRST_IFINDEX + n) for n in (CLIENT, SERVER)
    }
    return maps.build(built.state(), interfaces)


def _addresses(facts: int) -> dict[str, int]:
    """Half of the denied and of the allowed peers exist at a time."""
    found = {"10.0.0.1/32": 300, "10.0.0.2/32": 301, "10.0.0.0/8": 0, f"{MOVING}/32": 500 + facts}
    for peers, identity in ((DENIED, 401), (ALLOWED, 400)):
        found |= {f"10.9.0.{n}/32": identity for n in peers if n % 2 == facts}
    return found


def backends(vip: int, facts: int) -> list[tuple[str, int]]:
    """Disjoint between services and states; two or one."""
    return [(f"10.8.{vip}.{facts * 2 + n}", 8080) for n in range(2 - (vip + facts) % 2)]


def _services(facts: int) -> list[object]:
    """Service 8 comes and goes. One more holds every backend, so that ids last."""
    every = [b for vip in VIPS for f in (0, 1) for b in backends(vip, f)]
    found = [world.service("keep", "10.96.1.0", 80, every)]
    for vip in VIPS:
        if vip != 8 or facts:
            found.append(world.service(f"s{vip}", f"10.96.0.{vip}", 80, backends(vip, facts)))
    return found  # type: ignore[return-value]


# ---- the reader -------------------------------------------------------------------------


class Reader:
    """Asks without pause. `wrong`: what no state answers."""

    def __init__(self, node: ca_rig.Node) -> None:
        self._node = node
        self.reads = 0
        self.wrong: Counter[str] = Counter()
        self._client = ca_rig.FIRST_IFINDEX + CLIENT
        self._server = ca_rig.FIRST_IFINDEX + SERVER
        self._sport = itertools.count()

    def round(self) -> None:
        for _ in range(8):
            self._policy()
        self._peers()
        self._services()
        self._established()
        pod = "10.0.0.2"
        self._hammer("from_pod", self._frame("10.0.0.1", pod, 60), self._client, False)
        self._hammer("to_pod", self._frame(MOVING, pod, 71), self._server, True)
        for number in DENIED:
            frame = self._frame(f"10.9.0.{number}", pod, 70)
            self._hammer("to_pod", frame, self._server, False)

    def _hammer(self, program: str, frame: bytes, ifindex: int, passes: bool) -> None:
        """The program in force, over and over in the kernel; its counters tell."""
        egress = program == "from_pod"
        before = self._forwarded(egress)
        context = SkbContext(ifindex=ifindex, ingress_ifindex=ca_rig.OUTSIDE)
        run = self._node.programs[program].test_run
        run(frame, context, repeat=HAMMER, data_out_size=0)
        passed = self._forwarded(egress) - before
        self.reads += HAMMER - 1
        self._expect(f"{program} over and over", passed == HAMMER * passes, passed)

    def _forwarded(self, egress: bool) -> int:
        parts = self._node.loader.kernel.map("metrics_v1").lookup_per_cpu(U32.pack(egress))
        return sum(codec("tg_counter").unpack(part[:16]).packets for part in parts)

    def _expect(self, what: str, good: bool, got: object) -> None:
        self.reads += 1
        if not good:
            self.wrong[f"{what}: {got}"] += 1

    def _frame(self, src: str, dst: str, port: int) -> bytes:
        return frames.packet(src, dst, TCP, 1024 + next(self._sport) % 60000, port)

    def _policy(self) -> None:
        """Both ends are here: old rules at both, or new rules at both."""
        for port, pairs in ((80, {(0, 0), (1, 1)}), (90, {(1, 1), (0, 0)})):
            answer, _ = self._node.judge(
                "from_pod", self._frame("10.0.0.1", "10.0.0.2", port), self._client
            )
            pair = answer.egress[1], answer.ingress[1]
            self._expect(f"port {port}", answer.allowed and pair in pairs, answer)
        frame = self._frame("10.0.0.1", "10.0.0.2", 91)
        answer, _ = self._node.judge("from_pod", frame, self._client)
        self._expect("port 91", not answer.allowed and answer.egress[1] == -1, answer)

    def _peers(self) -> None:
        answer, _ = self._node.judge("to_pod", self._frame(MOVING, "10.0.0.2", 71), self._server)
        self._expect("moving", answer.allowed and answer.ingress[1] in (4, 5), answer)
        for peers, rules in ((DENIED, {-1}), (ALLOWED, {-1, 3})):
            for number in peers:
                frame = self._frame(f"10.9.0.{number}", "10.0.0.2", 70)
                answer, _ = self._node.judge("to_pod", frame, self._server)
                good = answer.ingress[1] in rules and answer.allowed == (answer.ingress[1] == 3)
                self._expect(f"peer {number}", good, answer)

    def _services(self) -> None:
        program, context = self._node.dry.programs["from_pod"], SkbContext(ifindex=self._client)
        for vip in VIPS:
            asked = f"10.96.0.{vip}"
            result = program.test_run(
                self._frame("10.0.0.1", asked, 80), context, data_out_size=256
            )
            seen = frames.parse(result.data_out)
            wanted = {b for f in (0, 1) for b in backends(vip, f)}
            if vip == 8:
                wanted = {*backends(vip, 1), (asked, 80)}
            good = (seen.dst, seen.dport) in wanted and result.retval != 2
            self._expect(f"service {vip}", good, (seen.dst, seen.dport, result.retval))

    def _established(self) -> None:
        """A flow that every state allows, through the program in force: it is judged again after
        each change, and must always pass; one that none allows must never."""
        for port, passes in ((80, True), (91, False)):
            tcp = frames.tcp("10.0.0.1", "10.0.0.2", 999, port, frames.ACK)
            data = frames.eth(frames.ip("10.0.0.1", "10.0.0.2", TCP, tcp))
            got = self._node.passes("from_pod", data, self._client)
            self._expect(f"flow to port {port}", got == passes, got)


# ---- the writer -------------------------------------------------------------------------


class Writer:
    def __init__(self, loader: ca_rig.Bookkeeper) -> None:
        self._loader = loader
        self._states = {(p, f): state(p, f) for p in (0, 1) for f in (0, 1)}
        self.written: Counter[str] = Counter()
        self.apply(0, 0)

    @property
    def total(self) -> int:
        return sum(self.written.values())

    def turns(self) -> Iterator[None]:
        """One apply each, for ever."""
        policy, facts = 0, 0
        for turn in itertools.count(1):
            facts ^= 1
            policy ^= turn % SWITCH_EVERY == 0
            self.apply(policy, facts)
            yield

    def apply(self, policy: int, facts: int) -> None:
        actual = self._loader.actual
        actual.now = kernel.now() + self.total // UPDATES_A_SECOND
        actual.ipcache_parts = actual.service_parts = None
        made = plan.plan(self._states[policy, facts], actual)
        assert made.problems == ()
        errors = apply.apply(made, self._loader.kernel, actual)
        assert errors == []
        for step in made.steps:
            match step:
                case plan.SwitchNodeTable():
                    self.written["policy switches"] += 1
                case plan.UpsertIpcache(entries=entries):
                    self.written["addresses"] += len(entries)
                case plan.DeleteIpcache(keys=keys):
                    self.written["addresses"] += len(keys)
                case plan.UpsertFrontends(entries=frontends):
                    self.written["services"] += len(frontends)
                case plan.DeleteFrontends(keys=gone):
                    self.written["services"] += len(gone)


def test_a_reader_never_sees_what_no_state_says(tmp_path: Path) -> None:
    with ca_rig.bench(tmp_path, ["node-1"]) as nodes, campaign("torn-reads", "") as figures:
        node = nodes["node-1"]
        writer = Writer(node.loader)
        deadline = time.monotonic() + CI_SECONDS
        reads, wrong = race(
            lambda: contextlib.nullcontext(Reader(node)),
            writer.turns(),
            lambda: writer.total >= SOAK_WRITES if SOAK else time.monotonic() > deadline,
        )
        figures.count = writer.total
        split = ", ".join(f"{n} {what}" for what, n in sorted(writer.written.items()))
        figures.what = f"writes ({split}) under {reads} reads"
        figures.failures += [f"{n} times {what}" for what, n in wrong]
        assert reads > 1000
        assert writer.written["policy switches"] > 10
