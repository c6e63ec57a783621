"""Mutated frames at a node's uplink: what comes from outside reaches a pod, or leaves the node
again, through a Service only, and a pod as its policy says.

The judge reads frames with `frames.parse` and knows the few sentences of this town; it shares
nothing with the datapath and says no only where it is sure.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest
from support import edge as e
from support import frames as f
from support import town as t
from support.ca_soak import campaign, scaled
from support.edge import NODE4, NODE6, Edge
from support.lab import DROP, PASS, REDIRECT
from tidegate_bpf import BpfError

pytestmark = pytest.mark.kernel
COUNT = scaled(ci=100_000, soak=1_000_000)
SEEDS = 2
HERE, THERE, SHUT = 30080, 30053, 30081
"""Node ports: TCP to pod b, UDP to r on another node, TCP to port 81 of b, which nobody may."""
NODES = {NODE4, NODE6}
PODS = {t.ip_of("b", version) for version in (4, 6)}
LOCAL = {t.ip_of(who, version) for who in t.IFINDEX for version in (4, 6)}


@pytest.fixture(scope="module")
def edge() -> Iterator[Edge]:
    with e.edge() as found:
        yield found


def prepare(edge: Edge) -> None:
    edge.open()
    edge.town.switch({"b<": t.rules((t.ANY, f.TCP, 80, 24))})
    for at, node in enumerate((NODE4, NODE6)):
        version = 4 + 2 * at
        pod, away = t.ip_of("b", version), t.ip_of("r", version)
        edge.service(node, HERE, f.TCP, [(pod, 80)], base=1 + 3 * at, number=7 + at)
        edge.service(node, THERE, f.UDP, [(away, 53)], base=2 + 3 * at, number=9 + at)
        edge.service(node, SHUT, f.TCP, [(pod, 81)], base=3 + 3 * at, number=11 + at)


def corpus() -> Iterator[bytes]:
    for version, node in ((4, NODE4), (6, NODE6)):
        client, pod, away = (t.ip_of(who, version) for who in "wbr")
        for flags in (f.SYN, f.ACK, f.ACK | f.FIN):
            yield t.tcp(client, node, 40000, HERE, flags, b"payload")
        yield t.tcp(client, node, 40001, SHUT, f.SYN, b"")
        yield t.udp(client, node, 40000, THERE, b"payload " * 4)
        yield t.tcp(client, pod, 40000, 80, f.SYN, b"")
        yield t.udp(client, pod, 40000, 53, b"x" * 9)
        yield t.tcp(pod, node, 40000, HERE, f.SYN, b"")
        yield t.tcp(away, node, 53, 10007, f.ACK, b"")
        body = f.udp(client, node, 40000, THERE, b"payload " * 8)
        if version == 4:
            yield from map(f.eth, f.fragment4(f.IPv4(client, node, f.UDP, body, ident=9), 24))
            quoted = f.ip(node, client, f.TCP, f.tcp(node, client, HERE, 40000, f.ACK))
            yield f.eth(f.ip(client, node, f.ICMP, f.icmp_error(3, 3, quoted)))
        else:
            yield from map(f.eth, f.fragment6(f.IPv6(client, node, f.UDP, body), 24, 9))
            yield f.eth(f.IPv6(client, node, f.UDP, body, extensions=[f.hop_by_hop()]).encode())
            quoted = f.ip(node, client, f.TCP, f.tcp(node, client, HERE, 40000, f.ACK))
            yield f.eth(f.ip(client, node, f.ICMPV6, f.icmpv6_error(client, node, 1, 4, quoted)))


def wrong(before: bytes, verdict: int, after: bytes) -> str:
    """What must not become of a frame, or ""."""
    was, now = f.parse(f.true_length(before)), f.parse(f.true_length(after))
    if verdict == PASS:
        return "" if after == before else "passed, but changed"
    if verdict == DROP:
        return "" if was.dst in NODES else "dropped, but of no Service"
    if verdict != REDIRECT:
        return "no verdict of ours"
    if was.dst not in NODES:
        return "redirected, but of no Service"
    if was.inner is not None:
        return ""
    if now.dst in PODS and was.src in LOCAL:
        return "from outside as one of the node's pods"
    if now.dst in PODS and not now.offset:
        if (now.protocol, now.dport) != (f.TCP, 80):
            return "a port of the pod that is forbidden"
        return "" if was.dport == HERE else "the pod, but not by its Service"
    if was.offset:
        return ""  # as the first fragment that went before
    if now.dst in {was.src, t.ip_of("r", 4), t.ip_of("r", 6)} | NODES:
        return ""
    return "" if was.protocol == f.UDP and was.dport == THERE else "left the node for nobody"


@pytest.mark.parametrize("seed", range(SEEDS))
def test_nothing_from_outside_gets_past_services_and_policy(edge: Edge, seed: int) -> None:
    """Translations, conntrack and fragments live on from frame to frame."""
    prepare(edge)
    frames, rng = list(corpus()), random.Random(seed)
    outcomes: Counter[str] = Counter()
    run, context = edge.programs["from_net"].test_run, edge.context()
    with campaign(f"fuzz-uplink-{seed}", "mutated frames at an uplink") as figures:
        for number in range(COUNT // SEEDS):
            frame = f.mutate(rng.choice(frames), rng) if number >= len(frames) else frames[number]
            figures.count += 1
            try:
                result = run(frame, context, data_out_size=len(frame) + 128)
            except BpfError:  # the kernel makes no packet of it
                continue
            why = wrong(frame, result.retval, result.data_out)
            assert not why, (why, frame.hex(), result.data_out.hex())
            outcomes[f"{result.retval}"] += 1
    assert all(outcomes[str(verdict)] > COUNT // 200 for verdict in (PASS, DROP, REDIRECT)), (
        outcomes
    )
