"""tc-*: the datapath's programs under BPF_PROG_TEST_RUN, as ratios to an empty program.

Maps are filled by hand (tests/support/lab.py); nothing is attached and no loader code runs.
"""

from __future__ import annotations

import ipaddress
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import frames
from lab import DROP, PASS, REDIRECT, U32, Lab, Pod, Rules, addr, frontend_proof
from measure import Result, interleaved, pinned
from tidegate_bpf import RingBuffer, SkbContext
from tidegate_bpf.netns import inside

BENCH = Path(__file__).parent / "build" / "bench"
ROUNDS = 100
BURST_NS = 2_000_000
"""A round's length: shorter than a time slice, so that most rounds are nobody else's."""
DENIED = 10_000
EVERY_EVENT = 1 << 62
"""A limit of denials that none of them meets."""
"""Denials a burst: their events fit into the ring, which is emptied after each burst."""
ADDRESSES = 1000
LOCAL = 100
"""Local pods where flows stay on the node; about what a kubelet allows (110)."""
RULE_SETS = 10
"""Distinct rule sets among the local pods: replicas of one workload share one, as in the loader."""
RULES = 1000
SOURCE = "10.244.0.1"
FIRST = int(ipaddress.ip_address("10.244.1.0"))
FIRST_SERVICE = int(ipaddress.ip_address("10.96.0.0"))
FIRST_IDENTITY = 1000
ANY = 0x02000000
CLASS = 0x01000000
TCP = 6

PLAIN_SHAPES = 10
"""Key shapes that a rule set without entities may have."""

Entry = dict[tuple[int, int, int, int], tuple[int, ...]]


def text(number: int) -> str:
    return str(ipaddress.ip_address(number))


def plain_rules(port: int = 80) -> Rules:
    """A rule for each identity on one port: the shape that label selectors with ports make."""
    identities = [256, *range(FIRST_IDENTITY, FIRST_IDENTITY + RULES)]
    return Rules({(peer, TCP, port, 24): (1, i, 1) for i, peer in enumerate(identities)})


def worst_rules() -> Rules:
    """1,000 rules over as many key shapes as a rule set may have, addresses by CIDR among them.
    Every shape is probed for every flow; the one that allows comes last."""
    bits = [24, 23, 22, 8]
    entries: Entry = {}
    for at, width in enumerate(bits):
        port = 1024 if width > 8 else 0
        entries[900 + at, TCP, port, width] = (1, at, 1)
        entries[CLASS | 900 + at, TCP, port, width] = (1, 10 + at, 1)
    entries[ANY, TCP, 1024, 24] = (1, 20, 1)
    entries[ANY, TCP, 0, 8] = (1, 23, 1)
    for i in range(RULES - len(entries)):
        entries[2_000_000 + i, TCP, 80, 24] = (1, 100 + i, 1)
    cidr = {f"10.{200 + i // 100}.{i % 100}.0/24": 2 + i for i in range(300)}
    return Rules(entries, cidr | {"10.244.0.0/16": 1})


def remote_pods(first: int, count: int) -> list[Pod]:
    return [Pod(i + 10, FIRST_IDENTITY + i, 0, text(first + i), local=False) for i in range(count)]


def local_pods(ingress: Rules) -> list[Pod]:
    """Interfaces that do not exist: a dry run redirects nothing."""
    sets = [Rules(ingress.entries, ingress.cidr) for _ in range(RULE_SETS)]
    return [
        Pod(i + 10, FIRST_IDENTITY + i, 1000 + i, text(FIRST + i), ingress=sets[i % RULE_SETS])
        for i in range(LOCAL)
    ]


class SharedLab(Lab):
    """One inner map for one Rules object, however many pods it protects."""

    def __init__(self, **knobs: int) -> None:
        self.made: dict[int, tuple[int, int, int, bytes, bytes]] = {}
        super().__init__(program=str(BENCH), **knobs)

    def policy(self, rules: Rules | None, rule_set: int) -> tuple[int, int, int, bytes, bytes]:
        if id(rules) not in self.made:
            self.made[id(rules)] = super().policy(rules, rule_set)
        return self.made[id(rules)]


def timed(
    lab: Lab, program: str, frame: bytes, repeat: int = 0, ifindex: int = 1
) -> Callable[[], float]:
    """Nanoseconds of one repetition, each time it is called. By the wall clock: the kernel's own
    mean is a whole number, too coarse for an empty program."""
    context = SkbContext(ifindex=ifindex, ingress_ifindex=ifindex)
    run = lab.loaded.programs[program].test_run
    repeat = repeat or BURST_NS // max(run(frame, context, 2000).duration_ns, 1)

    def burst() -> float:
        began = time.perf_counter_ns()
        run(frame, context, repeat)
        return (time.perf_counter_ns() - began) / repeat

    return burst


def expect(lab: Lab, program: str, frame: bytes, verdict: int, ifindex: int = 1) -> None:
    """A figure of a program that did something else would be worthless."""
    found = lab.run(program, frame, ifindex)[0]
    if found != verdict:
        raise AssertionError(f"{program} answers {found}, not {verdict}: {lab.counters()}")


def syn(destination: str, port: int = 80) -> bytes:
    return frames.packet(SOURCE, destination, TCP, 40000, port)


PROGRAMS = ("empty", "fresh_only", "fresh_flow")


class Bench:
    """Programs of bench.bpf.c over filled maps, each measured beside its own baselines."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack

    def lab(self, pods: list[Pod], egress: Rules, **knobs: int) -> Lab:
        knobs = {"fresh_base": FIRST, "fresh_count": ADDRESSES, "fresh_port": 80} | knobs
        lab = self.stack.enter_context(SharedLab(**knobs))
        lab.world([Pod(1, 256, 1, SOURCE, egress=egress), *pods])
        return lab

    def cost(self, lab: Lab, frame: bytes) -> dict[str, float]:
        return costs(interleaved({name: timed(lab, name, frame) for name in PROGRAMS}, ROUNDS))


def costs(figures: dict[str, list[float]]) -> dict[str, float]:
    """{"empty", "prelude", "flow"} in ns; the flow's is net of the prelude. The least of many
    rounds has nobody else's time in it."""
    empty, fresh, flow = (min(figures[name]) for name in PROGRAMS)
    return {"empty": empty, "prelude": fresh - empty, "flow": flow - (fresh - empty)}


def result(id: str, what: str, cost: dict[str, float], bar: float) -> Result:
    against = f"an empty program, {cost['empty']:.1f} ns"
    extra = {"ns": {name: round(value, 1) for name, value in cost.items()}}
    return Result(id, what, cost["flow"] / cost["empty"], "ratio", against, bar, extra)


# ---- established ---------------------------------------------------------------------


@contextmanager
def two_interfaces() -> Iterator[tuple[int, int]]:
    """A network namespace with the interfaces that the two ends' runs name."""
    name = "tg-bench"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(
            ["ip", "-n", name, "link", "add", "near", "type", "veth", "peer", "name", "far"],
            check=True,
        )
        with inside(f"/run/netns/{name}"):
            yield 2, 3
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def handshake(lab: Lab, ends: tuple[str, str], interfaces: tuple[int, int]) -> bytes:
    """Runs SYN, SYN-ACK and ACK through the hooks; the frame of a data packet thereafter."""
    (client, server), (at_client, at_server) = ends, interfaces

    def segment(src: str, dst: str, ports: tuple[int, int], flags: int) -> bytes:
        return frames.eth(frames.ip(src, dst, TCP, frames.tcp(src, dst, *ports, flags)))

    there, back = (40000, 80), (80, 40000)
    ack = segment(client, server, there, frames.ACK)
    expect(lab, "from_pod", segment(client, server, there, frames.SYN), REDIRECT, at_client)
    answer = segment(server, client, back, frames.SYN | frames.ACK)
    expect(lab, "from_pod", answer, REDIRECT, at_server)
    expect(lab, "from_pod", ack, REDIRECT, at_client)
    if len(lab.flows()) != 1:
        raise AssertionError("the flow is not established")
    return ack


def established() -> Iterator[Result]:
    rows = (
        ("tc-established", "IPv4", ("10.244.0.1", "10.244.0.2"), 4.0),
        ("tc-established-v6", "IPv6", ("fd00:10:244::1", "fd00:10:244::2"), 5.0),
    )
    for id, family, ends, bar in rows:
        with pinned(), two_interfaces() as (a, b), ExitStack() as stack:
            bench = Bench(stack).lab([], plain_rules())
            lab = stack.enter_context(Lab())
            field = "ip4" if family == "IPv4" else "ip6"
            rules = Rules({(256, TCP, 80, 24): (1, 0, 1)})
            lab.world(
                [
                    Pod(1, 256, a, egress=rules, **{field: ends[0]}),
                    Pod(2, 256, b, ingress=rules, **{field: ends[1]}),
                ]
            )
            frame = handshake(lab, ends, (a, b))
            figures = interleaved(
                {
                    "empty": timed(bench, "empty", frame),
                    "flow": timed(lab, "from_pod", frame, ifindex=a),
                },
                ROUNDS,
            )
            expect(lab, "from_pod", frame, REDIRECT, a)
            cost = {name: min(values) for name, values in figures.items()}
            what = f"established {family} flow: endpoint, anti-spoofing, conntrack, redirect"
            yield result(id, what, cost, bar)


# ---- new flows --------------------------------------------------------------------------


def new_one() -> Iterator[Result]:
    with pinned(), ExitStack() as stack:
        bench = Bench(stack)
        lab = bench.lab(remote_pods(FIRST, ADDRESSES), plain_rules())
        expect(lab, "fresh_flow", syn(text(FIRST)), PASS)
        what = "new flow to another node: one end's policy, conntrack entry written"
        yield result("tc-new-one", what, bench.cost(lab, syn(text(FIRST))), 13.0)


def both(id: str, what: str, rules: Rules, bar: float) -> Iterator[Result]:
    with pinned(), ExitStack() as stack:
        bench = Bench(stack)
        lab = bench.lab(local_pods(rules), rules, fresh_count=LOCAL)
        for i in range(LOCAL, ADDRESSES):
            lab.ipcache(text(FIRST + i), FIRST_IDENTITY + i, peer=True)
        expect(lab, "fresh_flow", syn(text(FIRST)), REDIRECT)
        yield result(id, what, bench.cost(lab, syn(text(FIRST))), bar)


def new_both() -> Iterator[Result]:
    what = "new flow on one node: both ends' policy, conntrack entry written, redirect"
    return both("tc-new-both", what, plain_rules(), 20.0)


def new_worst() -> Iterator[Result]:
    rules = worst_rules()
    if len(rules.shapes()) != PLAIN_SHAPES:
        raise AssertionError(f"not the worst rule set: {len(rules.shapes())} shapes")
    what = "the same, 10 key shapes and CIDR classes at both ends, the last shape allows"
    return both("tc-new-worst", what, rules, 28.0)


def deny() -> Iterator[Result]:
    with pinned(), ExitStack() as stack:
        bench = Bench(stack)
        lab = bench.lab(
            remote_pods(FIRST, ADDRESSES), plain_rules(), fresh_port=81, denial_burst_ns=EVERY_EVENT
        )
        ring = stack.enter_context(RingBuffer(lab.maps["events_v1"]))
        frame = syn(text(FIRST), 81)
        expect(lab, "fresh_flow", frame, DROP)
        delivered = len(ring.read())
        bursts = {name: timed(lab, name, frame, DENIED) for name in PROGRAMS}
        figures: dict[str, list[float]] = {name: [] for name in PROGRAMS}
        for _ in range(ROUNDS):
            for name, burst in bursts.items():
                figures[name].append(burst())
            delivered += len(ring.read())
        if delivered != ROUNDS * DENIED + 1:
            raise AssertionError(f"{delivered} events for {ROUNDS * DENIED + 1} denials")
        cost = costs(figures)
        # A flood of one kind, of which nearly every denial is only counted.
        flood = bench.lab(
            remote_pods(FIRST, ADDRESSES), plain_rules(), fresh_port=81, fresh_count=1
        )
        counted = interleaved(
            {name: timed(flood, name, frame, DENIED) for name in PROGRAMS}, ROUNDS
        )
        found = result("tc-deny", "denied new flow, its event delivered", cost, 12.0)
        found.extra["counted"] = round(costs(counted)["flow"] / cost["empty"], 2)
        yield found


# ---- services ----------------------------------------------------------------------------


def fill_services(lab: Lab, count: int) -> None:
    """Three backends each, of the 1,000 remote pods; one id for one backend, as in the loader."""
    pods = [(text(FIRST + i), 8080) for i in range(ADDRESSES)]
    lab.service(text(FIRST_SERVICE), 80, TCP, pods)
    word = lab.codecs["tg_frontend"]
    for i in range(count):
        base = ADDRESSES + 3 * i
        for k in range(3):
            backend = (3 * i + k) % ADDRESSES
            lab.maps["slots_v1"].update(U32.pack(base + k), U32.pack(backend))
        vip = text(FIRST_SERVICE + i)
        proof = frontend_proof(addr(vip), 80, TCP)
        lab.maps["frontends_v1"].update(
            lab.codecs["tg_frontend_key"].pack(addr=addr(vip), port=80, protocol=TCP),
            word.pack(base=base, count=3, proof=proof),
        )
        lab.ipcache(vip, 2, frontend=True)


def service() -> Iterator[Result]:
    """Clients use ten services, whatever else there is: what is judged as flat is that a table of
    10,000 costs no more than one of ten. "scattered": each packet another one of 10,000, so that
    nothing is found in the CPU's caches; that is the memory's cost and not the table's, has no bar,
    and is said beside the row."""
    shapes = {"few": (10, 10), "many": (10_000, 10), "scattered": (10_000, 10_000)}
    frame = syn(text(FIRST_SERVICE))
    with pinned(), ExitStack() as stack:
        bursts: dict[str, Callable[[], float]] = {}
        for shape, (count, used) in shapes.items():
            lab = Bench(stack).lab(
                remote_pods(FIRST, ADDRESSES),
                plain_rules(8080),
                fresh_base=FIRST_SERVICE,
                fresh_count=used,
            )
            fill_services(lab, count)
            expect(lab, "fresh_flow", frame, PASS)
            bursts |= {f"{shape} {name}": timed(lab, name, frame) for name in PROGRAMS}
        figures = interleaved(bursts, ROUNDS)
    found = {
        shape: costs({name: figures[f"{shape} {name}"] for name in PROGRAMS}) for shape in shapes
    }
    what = "new flow to a service of {}: selected, translated, judged, conntrack entry written"
    many = result("tc-service", what.format("10,000"), found["many"], 19.0)
    scattered = found["scattered"]["flow"]
    yield replace(many, extra={**many.extra, "scattered_ns": round(scattered, 1)})
    yield result("tc-service-10", what.format("10"), found["few"], 19.0)
    few = found["few"]["flow"]
    spread = round(scattered / few, 2)
    yield Result(
        "tc-service-flat",
        f"ten services used, among 10,000 and alone; all 10,000 used at random: {spread}, no bar",
        found["many"]["flow"] / few,
        "ratio",
        f"at 10 services, {few:.1f} ns",
        1.15,
        {"scattered": spread},
    )


ROWS: dict[str, Callable[[], Iterator[Result]]] = {
    "tc-established": established,
    "tc-new-one": new_one,
    "tc-new-both": new_both,
    "tc-new-worst": new_worst,
    "tc-deny": deny,
    "tc-service": service,
}
