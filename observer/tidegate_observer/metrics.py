"""Figures for Prometheus: the names that dashboards for Hubble and for Cilium's agents ask for, and
our own where they have none. Every label has few values: what would be one more is "other".
"""

from __future__ import annotations

import bisect
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import cast

from prometheus_client.core import (
    CounterMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest

from tidegate_observer import icmp
from tidegate_observer.api import flow_pb2
from tidegate_observer.figures import counter, gauge
from tidegate_observer.flow import (
    ICMP,
    ICMPV6,
    MAPPED,
    SCTP,
    TCP,
    UDP,
    Counts,
    Entry,
    Flow,
    Kind,
    Lost,
)
from tidegate_observer.meaning import DROP, POLICY_VERDICT, drop_reason, event_type, verdict
from tidegate_observer.pressure import Usage
from tidegate_observer.standing import Changes

MAX_POLICIES = 500
MAX_SERVICES = 500
MAX_PORTS = 200
OTHER = "other"
WORLD = 2
LOST_SOURCES = ("PERF_EVENT_RING_BUFFER", "OBSERVER_EVENTS_QUEUE")
"""By `Lost.queued`."""
LIMITED = 252
"""TG_REASON_EVENT_LIMITED."""
PROTOCOLS = {TCP: "TCP", UDP: "UDP", SCTP: "SCTP", ICMP: "ICMPv4", ICMPV6: "ICMPv6"}
FLAGS = ((2, "SYN"), (1, "FIN"), (4, "RST"))
DIRECTIONS = ("INGRESS", "EGRESS")
PROGRAMMING = (
    0.25,
    0.5,
    *(float(n) for n in range(1, 60)),
    *(float(n) for n in range(60, 120, 5)),
    *(float(n) for n in range(120, 301, 30)),
)
"""As kube-proxy has them, and the loader (`tidegate_loader.programming`)."""
NO_DROPS = frozenset((0, 230, 231, LIMITED, 253, 254))
"""Reasons that programs count packets under and let them pass; docs/drop-reasons.md."""
BUCKETS = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 300.0)

TIMES = {
    "duration": "from a flow's first packet to its last",
    "handshake": "from a flow's first packet to the first answer",
    "first_byte": "from a flow's first packet to the first byte of the answer, of TCP",
}
"""What is measured of a Service's flows, each a histogram of seconds."""

START, END, DENIED = int(Kind.START), int(Kind.END), int(Kind.DENIED)
"""An enum's members are looked up by name each time, and cost as much as all the rest."""

Labels = tuple[str, ...]


class Metrics:
    """Counts what one thread adds; `text` may be asked by any."""

    def __init__(self) -> None:
        self._processed: Counter[tuple[int, int, int]] = Counter()
        self._drops: Counter[tuple[int, int]] = Counter()
        self._world: Counter[tuple[int, int]] = Counter()
        self._icmp: Counter[tuple[str, str]] = Counter()
        self._ports: Counter[tuple[int, int]] = Counter()
        self._flags: Counter[tuple[int, bool]] = Counter()
        self._lost: Counter[str] = Counter(dict.fromkeys(LOST_SOURCES, 0))
        self._denied: Counter[Labels] = Counter()
        self._services: dict[Labels, _Service] = {}
        self._ends: Counter[str] = Counter()
        self.programs: dict[tuple[int, int], tuple[int, int]] = {}
        """(reason, direction) → (packets, bytes), as the programs count; set from outside."""
        self.tracked = (0, 1, 0.0)
        """Entries of the table of flows, its size, seconds that looking through it took."""
        self.maps: Usage = {}
        """Of all nodes together, but for the table of flows."""
        self.programming: tuple[list[int], float] = ([], 0.0)
        """Changes of endpoints by how long they took (PROGRAMMING, and above); seconds of all."""
        self.changes = Changes()
        """Of what is in force."""
        self.sweeps = 0
        self.held = (0, 1)
        """Flows held by the observer, and how many it can hold."""
        self._started = time.time()

    def add(self, entries: Iterable[Entry]) -> None:
        """Most flows are like many others: what is counted of all of those is looked up once for
        each kind, because fifty thousand a second must get through here, too."""
        alike: dict[tuple[object, ...], tuple[Flow, list[int]]] = {}
        ports: dict[tuple[int, int], int] = {}
        for entry in entries:
            if entry.__class__ is Lost:
                self._lost[LOST_SOURCES[entry.queued]] += entry.count
                continue
            flow = cast("Flow", entry)
            kind, protocol, to = flow.kind, flow.protocol, flow.destination
            shape = (
                kind,
                flow.reason,
                flow.point,
                flow.ingress is None and flow.egress is None,
                to.identity == WORLD,
                not to.id,
                protocol,
                protocol == TCP and (flow.tcp_flags, flow.source_address[:12] == MAPPED),
            )
            held = alike.get(shape)
            if held is None:
                held = alike[shape] = flow, [0]
            held[1][0] += 1
            if kind == START:
                if protocol in (ICMP, ICMPV6):
                    name = icmp.name(protocol, icmp.type_code(flow)[0])
                    self._icmp["IPv4" if protocol == ICMP else "IPv6", name] += 1
                else:
                    key = protocol, flow.destination_port
                    ports[key] = ports.get(key, 0) + 1
                if flow.service is not None:
                    self._service(flow).started += 1
            elif kind == END:
                self._end(flow)
            elif kind == DENIED:
                self._deny(flow)
        for flow, (count,) in alike.values():
            self._alike(flow, count)
        for key, count in ports.items():
            self._port(*key, count)

    def _alike(self, flow: Flow, count: int) -> None:
        """So many flows that differ from this one in nothing that is counted here."""
        kind, sub = event_type(flow)
        judged = verdict(flow)
        self._processed[kind, sub, judged] += count
        if flow.destination.identity == WORLD:
            self._world[flow.protocol, judged] += count
        if flow.protocol == TCP:
            four = flow.source_address[:12] == MAPPED
            for bit, _ in FLAGS:
                if flow.tcp_flags & bit:
                    self._flags[bit, four] += count

    def _port(self, protocol: int, port: int, count: int) -> None:
        key = protocol, port
        if key not in self._ports and len(self._ports) >= MAX_PORTS:
            key = protocol, 0
        self._ports[key] += count

    def _end(self, flow: Flow) -> None:
        if flow.counts is not None:
            self._ends[flow.counts.closed] += 1
            if flow.service is not None:
                self._service(flow).ended(flow.counts)

    def _deny(self, flow: Flow) -> None:
        count = flow.more or 1
        self._drops[drop_reason(flow), flow.protocol] += count
        if flow.service is not None:
            self._service(flow).refused += count
        decision = flow.egress or flow.ingress
        for policy in decision.policies if decision is not None else ():
            direction = "egress" if flow.egress is not None else "ingress"
            reason = _reason(drop_reason(flow))
            key = policy.kind, policy.namespace, policy.name, direction, reason
            if key not in self._denied and len(self._denied) >= MAX_POLICIES:
                key = OTHER, OTHER, OTHER, direction, reason
            self._denied[key] += count

    def _service(self, flow: Flow) -> _Service:
        assert flow.service is not None
        key = flow.service.namespace, flow.service.name
        if key not in self._services and len(self._services) >= MAX_SERVICES:
            key = OTHER, OTHER
        return self._services.setdefault(key, _Service())

    # ---- what is shown ----------------------------------------------------------------------

    def text(self) -> bytes:
        """In Prometheus' text form."""
        made: bytes = generate_latest(self)
        return made

    def collect(self) -> Iterator[Metric]:
        yield from self._hubble()
        yield from self._programs()
        yield from self._own()
        yield from self.changes.collect()

    def _hubble(self) -> Iterator[Metric]:
        rows = {
            (TYPES.get(kind, str(kind)), _subtype(kind, sub), flow_pb2.Verdict.Name(judged)): count
            for (kind, sub, judged), count in self._processed.items()
        }
        labels = ("type", "subtype", "verdict")
        yield counter("hubble_flows_processed", "flow events", labels, rows)
        drops = {(_reason(r), _protocol(p)): n for (r, p), n in self._drops.items()}
        yield counter("hubble_drop", "denied packets", ("reason", "protocol"), drops)
        world = {
            (_protocol(p), flow_pb2.Verdict.Name(judged)): count
            for (p, judged), count in self._world.items()
        }
        yield counter("hubble_flows_to_world", "to the world", ("protocol", "verdict"), world)
        yield counter("hubble_icmp", "ICMP flows", ("family", "type"), dict(self._icmp))
        ports = {
            (_protocol(p), str(port) if port else OTHER): n for (p, port), n in self._ports.items()
        }
        yield counter("hubble_port_distribution", "by port", ("protocol", "port"), ports)
        names = dict(FLAGS)
        flags = {(names[b], "IPv4" if v4 else "IPv6"): n for (b, v4), n in self._flags.items()}
        yield counter("hubble_tcp_flags", "TCP flags seen", ("flag", "family"), flags)
        lost = {(source,): count for source, count in self._lost.items()}
        yield counter("hubble_lost_events", "events that were not seen", ("source",), lost)

    def _programs(self) -> Iterator[Metric]:
        labels = ("reason", "direction")
        drops = {k: v for k, v in self.programs.items() if k[0] not in NO_DROPS}
        passed = {(DIRECTIONS[d],): v for (r, d), v in self.programs.items() if r == 0}
        for at, word in enumerate(("count", "bytes")):
            rows: dict[Labels, int] = Counter()
            for (reason, direction), value in drops.items():
                rows[_reason(reason), DIRECTIONS[direction]] += value[at]
            yield counter(f"cilium_drop_{word}", "dropped, by the programs", labels, rows)
            forward = {key: value[at] for key, value in passed.items()}
            yield counter(f"cilium_forward_{word}", "forwarded", ("direction",), forward)
        limited = {(DIRECTIONS[d],): v[0] for (r, d), v in self.programs.items() if r == LIMITED}
        yield counter("tidegate_denials_aggregated", "not told one by one", ("direction",), limited)
        entries, size, seconds = self.tracked
        maps = {(name,): held for name, held in {**self.maps, "ct": (entries, size)}.items()}
        filled = {name: used / room for name, (used, room) in maps.items()}
        yield gauge("cilium_bpf_map_pressure", "filled", filled, "map_name")
        rooms = {name: room for name, (_, room) in maps.items()}
        yield gauge("cilium_bpf_map_capacity", "entries", rooms, "map_name")
        name = "cilium_datapath_conntrack_gc"
        yield gauge(f"{name}_entries", "tracked flows", {("alive",): entries}, "status")
        yield gauge(
            f"{name}_duration_seconds", "the last look", {("completed",): seconds}, "status"
        )
        yield counter(f"{name}_runs", "looks", ("status",), {("completed",): self.sweeps})

    def _own(self) -> Iterator[Metric]:
        labels = ("kind", "namespace", "policy", "direction", "reason")
        yield counter("tidegate_policy_denied", "denied, by policy", labels, self._denied)
        ends = {(how,): count for how, count in self._ends.items()}
        yield counter("tidegate_flows_ended", "flows that ended", ("how",), ends)
        held, size = self.held
        yield gauge(
            "tidegate_observer_flows", "flows held", {("held",): held, ("room",): size}, "what"
        )
        started = {(): self._started}
        yield gauge("tidegate_observer_start_time_seconds", "since when it runs", started)
        starts = CounterMetricFamily(
            "tidegate_service_connections", "flows to a Service", labels=("namespace", "service")
        )
        resets = CounterMetricFamily(
            "tidegate_service_resets", "of them reset", labels=("namespace", "service")
        )
        refused = CounterMetricFamily(
            "tidegate_service_refused",
            "of a Service without backends",
            labels=("namespace", "service"),
        )
        passed = [
            CounterMetricFamily(
                f"tidegate_service_{word}",
                f"{word} of its flows, when they end",
                labels=("namespace", "service", "way"),
            )
            for word in ("packets", "bytes")
        ]
        histograms = {
            name: HistogramMetricFamily(
                f"tidegate_service_{name}_seconds", text, labels=("namespace", "service")
            )
            for name, text in TIMES.items()
        }
        for key, service in sorted(self._services.items()):
            for way, figures in service.passed.items():
                for family, figure in zip(passed, figures, strict=True):
                    family.add_metric((*key, way), figure)
            starts.add_metric(key, service.started)
            resets.add_metric(key, service.resets)
            refused.add_metric(key, service.refused)
            for name, histogram in histograms.items():
                times = service.times[name]
                histogram.add_metric(key, times.buckets(), times.seconds)
        yield from (starts, resets, refused, *histograms.values(), *passed)
        yield self._programming()

    def _programming(self) -> Metric:
        counts, seconds = self.programming
        made = HistogramMetricFamily(
            "kubeproxy_network_programming_duration_seconds",
            "from the time that an EndpointSlice says to its change being in force",
            labels=(),
        )
        total, buckets = 0, []
        bounds = (*map(str, PROGRAMMING), "+Inf")
        for bound, count in zip_longest(bounds, counts[: len(bounds)], fillvalue=0):
            total += count
            buckets.append((str(bound), float(total)))
        made.add_metric((), buckets, seconds)
        return made


class _Times:
    """A histogram."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._counts = [0] * (len(BUCKETS) + 1)

    def add(self, nanoseconds: int) -> None:
        seconds = nanoseconds / 1e9
        self.seconds += seconds
        self._counts[bisect.bisect_left(BUCKETS, seconds)] += 1

    def buckets(self) -> list[tuple[str, float]]:
        total, found = 0, []
        for bound, count in zip((*map(str, BUCKETS), "+Inf"), self._counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class _Service:
    def __init__(self) -> None:
        self.started = 0
        self.resets = 0
        self.refused = 0
        self.times = {name: _Times() for name in TIMES}
        self.passed = {"request": [0, 0], "reply": [0, 0]}
        """Of flows that have ended: packets, bytes."""

    def ended(self, counts: Counts) -> None:
        self.resets += counts.closed == "rst"
        for way, packets, size in (
            ("request", counts.packets, counts.bytes),
            ("reply", counts.reply_packets, counts.reply_bytes),
        ):
            self.passed[way][0] += packets
            self.passed[way][1] += size
        self.times["duration"].add(counts.nanoseconds)
        if counts.handshake:
            self.times["handshake"].add(counts.handshake)
        if counts.first_byte:
            self.times["first_byte"].add(counts.first_byte)


POINTS = {0: "to-endpoint", 3: "to-stack", 5: "from-endpoint", 11: "to-network"}
TYPES = {DROP: "Drop", 4: "Trace", POLICY_VERDICT: "PolicyVerdict"}


def _subtype(kind: int, sub: int) -> str:
    if kind == DROP:
        return _reason(sub)
    return POINTS.get(sub, str(sub)) if kind == 4 else ""


def _reason(number: int) -> str:
    """As Hubble writes it; ours that it has no word for by number."""
    if number in flow_pb2.DropReason.values():
        return flow_pb2.DropReason.Name(number)
    return f"REASON_{number}"


def _protocol(number: int) -> str:
    return PROTOCOLS.get(number, OTHER)
