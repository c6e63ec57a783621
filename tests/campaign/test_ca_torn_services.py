"""A reader on one CPU against the loader's updates of Services of every kind on the other: it never
gets a backend that no state of the Service has, by whichever way it asks.

Each Service has two states whose backends are disjoint, and disjoint from every other Service's;
all go back and forth between theirs. Two of them have backends that nothing else holds, so that ids
come and go with them.

Faults it was seen to find: ids that are freed before frontends leave them; backends written after
the frontends that name them. Not found: slots and ids that never rest, since whoever writes next
comes too late for a program that runs for microseconds.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec import UNSET, structs
from support import ca_rig, edge, frames
from support import loader_world as world
from support.ca_race import race
from support.ca_soak import SOAK, campaign
from support.choosing import DROPPED, REFUSED, Ask, by_packet, by_socket
from tidegate_api import state as api
from tidegate_loader import addresses, apply, kernel, maps, plan

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs"),
]

CI_SECONDS = 15
SOAK_UPDATES = 1_000_000
UPDATES_A_SECOND = 2000
"""Of the loader's clock here, so that slots and ids rest and are used again."""
RING_EVERY = 200
"""Turns between two rings: each takes 16,384 slots, which rest for 10 s of that clock. A turn is
some 40 updates, so three or four of each rest at a time."""
CLIENT = "10.0.0.1"
INSIDERS = [CLIENT]
OUTSIDERS = [f"192.0.2.{n}" for n in range(1, 41)]
STRANGERS = [f"198.18.0.{n}" for n in range(1, 41)]
UPLINKS = maps.Uplinks(
    frozenset({addresses.pack(edge.NODE4)}), (addresses.pack(edge.NODE4), addresses.ZERO)
)
NOBODY = frozenset[str]()


@dataclass(frozen=True)
class Served:
    """One Service's port. `kept`: something else holds its backends too. `comes`: it is not there
    in state 0."""

    number: int
    protocol: api.Protocol = "UDP"
    kept: bool = True
    comes: bool = False
    slow: bool = False
    more: tuple[tuple[str, Any], ...] = ()

    def backends(self, facts: int) -> list[api.Backend]:
        """Three or two, of which one is this node's."""
        count = 3 - (self.number + facts) % 2
        return [
            api.Backend(
                address=f"10.8.{self.number}.{facts * 4 + at}",
                port=8000 + self.number,
                node=world.NODE if at == 0 else "node-2",
            )
            for at in range(count)
        ]

    def reachable(self, local: bool) -> frozenset[str]:
        """Addresses of either state; `local`: this node's only."""
        states = (1,) if self.comes else (0, 1)
        return frozenset(
            backend.address
            for facts in states
            for backend in self.backends(facts)
            if not local or backend.node == world.NODE
        )

    @property
    def vips(self) -> dict[str, tuple[str, int]]:
        return {
            "ClusterIP": (f"10.96.0.{self.number}", 80),
            "NodePort": (edge.NODE4, 30000 + self.number),
            "LoadBalancer": (f"203.0.113.{self.number}", 80),
        }

    def port(self, facts: int) -> api.ServicePort:
        fronts = [
            api.Frontend(
                address="0.0.0.0" if kind == "NodePort" else address,
                port=port,
                protocol=self.protocol,
                kind=UNSET if kind == "ClusterIP" else kind,  # type: ignore[arg-type]
            )
            for kind, (address, port) in self.vips.items()
        ]
        return api.ServicePort(
            namespace="ns",
            name=f"s{self.number}",
            type="LoadBalancer",
            frontends=sorted(fronts, key=lambda front: (front.address, front.port)),
            backends=self.backends(facts),
            **dict(self.more),
        )


PLAIN = [Served(1), Served(2), Served(3, kept=False), Served(4, comes=True, kept=False)]
STREAMS = [Served(5, "TCP"), Served(6, "TCP")]
STICKY = [Served(7, more=(("affinity", 60),)), Served(8, more=(("affinity", 10_800),))]
LOCAL = [
    Served(9, more=(("internal", "Local"), ("external", "Local"))),
    Served(10, more=(("external", "Local"),)),
]
RANGED = [Served(11, more=(("source_ranges", ["192.0.2.0/24"]),))]
RINGED = [
    Served(12, slow=True, more=(("algorithm", "Maglev"), ("affinity", 60))),
]
EVERY = [*PLAIN, *STREAMS, *STICKY, *LOCAL, *RANGED, *RINGED]


def state(facts: int, ring: int) -> maps.State:
    ports = [
        served.port(ring if served.slow else facts) for served in EVERY if facts or not served.comes
    ]
    held = [b for s in EVERY if s.kept for f in (0, 1) for b in s.backends(f)]
    for protocol in ("TCP", "UDP"):
        front = api.Frontend(address="10.96.1.1", port=80, protocol=protocol)  # type: ignore[arg-type]
        name = f"keep-{protocol.lower()}"
        ports.append(
            api.ServicePort(
                namespace="ns", name=name, type="ClusterIP", frontends=[front], backends=held
            )
        )
    made = world.World(
        endpoints=[world.endpoint(1, 300)],
        ipcache={f"{CLIENT}/32": 300, "10.0.0.0/8": 0},
        services=ports,
    ).state()
    spec = structs.replace(made.node.spec, node_port_addresses=[edge.NODE4])
    return structs.replace(made, node=structs.replace(made.node, spec=spec))


# ---- the reader -------------------------------------------------------------------------


class Reader:
    """Asks every Service in every way. `wrong`: what no state of it answers."""

    def __init__(self, node: ca_rig.Node, by: Ask) -> None:
        pod = ca_rig.FIRST_IFINDEX + 1
        self.reads = 0
        self.wrong: Counter[str] = Counter()
        self._socket = by
        self._pod = {
            number: by_packet(node, "from_pod", INSIDERS, pod, number)
            for number in (frames.TCP, frames.UDP)
        }
        self._uplink = {
            number: by_packet(node, "from_net", OUTSIDERS, edge.UPLINK, number)
            for number in (frames.TCP, frames.UDP)
        }
        self._stranger = by_packet(node, "from_net", STRANGERS, edge.UPLINK)

    def round(self) -> None:
        for served in EVERY:
            number = frames.TCP if served.protocol == "TCP" else frames.UDP
            features = dict(served.more)
            for kind, where in served.vips.items():
                inner = served.reachable(kind == "ClusterIP" and "internal" in features)
                self._expect("pod", served, self._pod[number](*where), inner)
                if number == frames.UDP:
                    self._expect("socket", served, self._socket(*where), inner)
                if kind != "ClusterIP":
                    outer = served.reachable("external" in features)
                    self._expect("uplink", served, self._uplink[number](*where), outer)
            if "source_ranges" in features:
                got = self._stranger(*served.vips["LoadBalancer"])
                self._expect("stranger", served, got, frozenset({DROPPED}))

    def _expect(self, way: str, served: Served, got: str, wanted: frozenset[str]) -> None:
        self.reads += 1
        # One that is not there is asked for by nobody, or goes on as any other address.
        absent = {DROPPED, REFUSED, *(address for address, _ in served.vips.values())}
        if got not in wanted and not (served.comes and got in absent):
            self.wrong[f"service {served.number} by {way}: {got}"] += 1


@contextlib.contextmanager
def reading(node: ca_rig.Node) -> Iterator[Reader]:
    with by_socket(node, f"tgt-torn-{os.getpid()}") as by:
        yield Reader(node, by)


# ---- the writer -------------------------------------------------------------------------


class Writer:
    def __init__(self, loader: ca_rig.Bookkeeper) -> None:
        self._loader = loader
        interfaces = {"uid-1": world.interface(1, ca_rig.FIRST_IFINDEX + 1)}
        self._states = {
            (facts, ring): maps.Builder().build(state(facts, ring), interfaces, UPLINKS)
            for facts in (0, 1)
            for ring in (0, 1)
        }
        self.updates = self.ids = self.rings = 0
        self.apply(0, 0)

    def turns(self) -> Iterator[None]:
        """One apply each, for ever."""
        facts = ring = 0
        for turn in itertools.count(1):
            facts ^= 1
            if turn % RING_EVERY == 0:
                ring ^= 1
                self.rings += 1
            self.apply(facts, ring)
            yield

    def apply(self, facts: int, ring: int) -> None:
        actual = self._loader.actual
        actual.wake(kernel.now() + self.updates // UPDATES_A_SECOND)
        actual.ipcache_parts = actual.service_parts = None
        made = plan.plan(self._states[facts, ring], actual)
        assert made.problems == ()
        assert apply.apply(made, self._loader.kernel, actual) == []
        self.count(made.steps)

    def count(self, steps: Sequence[object]) -> None:
        for step in steps:
            match step:
                case plan.UpsertFrontends(entries=entries):
                    self.updates += len(entries)
                case plan.DeleteFrontends(keys=keys):
                    self.updates += len(keys)
                case plan.WriteBackends(entries=written):
                    self.ids += len(written)


def test_a_reader_never_gets_a_backend_of_no_state(tmp_path: Path) -> None:
    with ca_rig.bench(tmp_path, [world.NODE]) as nodes, campaign("torn-services", "") as figures:
        edge.wire()
        node = nodes[world.NODE]
        writer = Writer(node.loader)
        deadline = time.monotonic() + CI_SECONDS
        reads, wrong = race(
            lambda: reading(node),
            writer.turns(),
            lambda: writer.updates >= SOAK_UPDATES if SOAK else time.monotonic() > deadline,
        )
        figures.count = writer.updates
        figures.what = f"updates of frontends ({writer.ids} of backends, {writer.rings} of rings)"
        figures.what += f" under {reads} reads"
        figures.failures += [f"{n} times {what}" for what, n in wrong]
        assert reads > 1000
        assert writer.updates > 1000
        assert writer.rings > 0
