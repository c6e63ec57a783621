"""Truncated and mutated frames: whatever is on the wire, nothing passes that the policy forbids.

The judge of the mutated frames is `forbidden`, from `frames.parse` and the few sentences of this
town's policy; it shares nothing with the datapath and says no only where it is sure.
"""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Iterator

import pytest
from support import frames as f
from support import town as t
from support.ca_soak import campaign, scaled
from support.lab import DROP
from support.town import VIP4, VIP6, Town
from tidegate_bpf import BpfError

pytestmark = pytest.mark.kernel
COUNT = scaled(ci=100_000, soak=1_000_000)
"""Frames a program."""
SHORT = 54
"""Some kernels make no packet of a frame without its whole IP header."""
PORTS = {(f.TCP, 80), (f.UDP, 53)}
RULES = {
    "a>": t.rules(t.from_("b", f.TCP, 80), t.from_("b", f.UDP, 53)),
    "b<": t.rules(
        *(t.from_(who, *which) for who in ("a", "r") for which in ((f.TCP, 80), (f.UDP, 53)))
    ),
}
HOOKS = ["a>", "b<"]


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    with t.town() as made:
        yield made


def prepare(town: Town) -> None:
    """a may reach b's TCP 80 and UDP 53, itself or through a service; so may r. Nothing else."""
    town.open(RULES)
    for vip, version in ((VIP4, 4), (VIP6, 6)):
        town.lab.service(vip, 80, f.TCP, [(t.ip_of("b", version), 80)], base=version)


def run(town: Town, hook: str, frame: bytes) -> tuple[int, bytes]:
    """Verdict and frame after. What the kernel makes no packet of counts as dropped."""
    program = "from_pod" if hook[1] == ">" else "to_pod"
    try:
        verdict, after, _ = town.lab.run(program, frame, t.IFINDEX[hook[0]])
    except BpfError as error:
        if error.errno == errno.EINVAL and len(frame) < SHORT:
            return DROP, frame
        raise
    return verdict, after


# ---- what is sent ---------------------------------------------------------------------------


def flows(src: str, dst: str, protocol: int, dport: int) -> Iterator[bytes]:
    """The same opening packet in many dresses."""
    body = (
        f.tcp(src, dst, 40000, dport, f.SYN, b"payload")
        if protocol == f.TCP
        else f.udp(src, dst, 40000, dport, b"payload " * 4)
    )
    yield f.eth(f.ip(src, dst, protocol, body))
    if ":" not in src:
        yield f.eth(f.IPv4(src, dst, protocol, body, options=b"\x94\x04\0\0\1\1").encode())
        yield from map(f.eth, f.fragment4(f.IPv4(src, dst, protocol, body, ident=9), 24))
        return
    chains = ([f.hop_by_hop()], [f.dest_opts(), f.auth()], [f.routing(0, 0, [dst])])
    for chain in chains:
        yield f.eth(f.IPv6(src, dst, protocol, body, extensions=chain).encode())
    yield from map(f.eth, f.fragment6(f.IPv6(src, dst, protocol, body), 24, 9))


def allowed(hook: str) -> Iterator[bytes]:
    """First fragments before later ones."""
    for version in (4, 6):
        src, dst = t.ip_of("a" if hook == "a>" else "r", version), t.ip_of("b", version)
        for protocol, port in sorted(PORTS):
            yield from flows(src, dst, protocol, port)
    if hook == "a>":
        yield from flows(t.IP4["a"], VIP4, f.TCP, 80)
        yield from flows(t.IP6["a"], VIP6, f.TCP, 80)


def denied(hook: str) -> Iterator[bytes]:
    for version in (4, 6):
        src = t.ip_of("a" if hook == "a>" else "w", version)
        for peer in ("b", "c", "w") if hook == "a>" else ("b",):
            for protocol, port in ((f.TCP, 81), (f.UDP, 80)):
                yield from flows(src, t.ip_of(peer, version), protocol, port)
        ping = f.ICMP if version == 4 else f.ICMPV6
        for protocol in (f.SCTP, ping, 47):
            yield f.packet(src, t.ip_of("b", version), protocol, payload=bytes(20))
        yield f.packet(t.ip_of("c", version), t.ip_of("b", version), f.TCP)


def neighbours(hook: str) -> Iterator[bytes]:
    """ARP, neighbour discovery, and errors about flows there are."""
    own4, own6 = (t.IP4["a"], t.IP6["a"]) if hook == "a>" else (t.IP4["r"], "fe80::1")
    peer = t.IP6["b"]
    yield f.eth(f.arp(1, f.MAC_A, own4, f.BROADCAST, t.IP4["b"]), f.ETH_ARP)
    for kind in (f.NS, f.NA):
        yield f.eth(f.IPv6(own6, peer, f.ICMPV6, f.nd(own6, peer, kind, own6), 255).encode())
    a, b = t.IP4["a"], t.IP4["b"]
    src, dst = (a, b) if hook == "a>" else (t.IP4["w"], b)
    quoted = f.ip(b, a, f.TCP, f.tcp(b, a, 80, 40000, f.ACK))
    yield f.eth(f.ip(src, dst, f.ICMP, f.icmp_error(3, 3, quoted)))
    a, b = t.IP6["a"], t.IP6["b"]
    src, dst = (a, b) if hook == "a>" else (t.IP6["w"], b)
    quoted = f.ip(b, a, f.UDP, f.udp(b, a, 53, 40000, b"x"))
    yield f.eth(f.ip(src, dst, f.ICMPV6, f.icmpv6_error(src, dst, 1, 4, quoted)))


# ---- the judge --------------------------------------------------------------------------------


def forbidden(data: bytes, hook: str) -> str:
    """Why this frame must be dropped, or "" where it may pass."""
    frame = f.parse(f.true_length(data))
    if frame.vlans or frame.ethertype not in (f.ETH_ARP, f.ETH_IPV4, f.ETH_IPV6):
        return "link layer"
    if frame.ethertype == f.ETH_ARP:
        if hook == "b<":
            return ""
        if frame.arp is None:
            return "no ARP"
        return "" if frame.arp.sender_ip in (t.IP4["a"], "0.0.0.0") else "ARP sender"
    if not frame.version:
        return "no IP header"
    if frame.version == 6 and frame.l4 < 0:
        return "extension headers"
    return (
        _bad_header(frame, hook)
        or _bad_neighbour(frame, hook)
        or ("" if _neighbour(frame) or frame.dst in _self(hook) else _bad_flow(frame, hook))
    )


def _self(hook: str) -> set[str]:
    """A pod reaches itself."""
    return {t.IP4["a"], t.IP6["a"]} if hook == "a>" else set()


def _owned(text: str) -> bool:
    link = ":" in text and f.ip_bytes(text)[0] == 0xFE and f.ip_bytes(text)[1] & 0xC0 == 0x80
    return text in (t.IP4["a"], t.IP6["a"]) or link


def _neighbour(frame: f.Frame) -> bool:
    return frame.protocol == f.ICMPV6 and f.RS <= frame.icmp_type <= f.REDIRECT


def _bad_header(frame: f.Frame, hook: str) -> str:
    if frame.problem == "extension header" or len(frame.extensions) > 6:
        return "extension headers"
    if frame.segments_left:
        return "source route"
    if frame.version == 6 and any(
        f.ip_bytes(text)[:12] == bytes(10) + b"\xff\xff" for text in (frame.src, frame.dst)
    ):
        return "mapped address"
    if hook == "a>" and not _owned(frame.src) and not (frame.src == "::" and _neighbour(frame)):
        return "source"
    at = 0
    while at < len(frame.options) and frame.options[at]:
        if frame.options[at] in (131, 137):
            return "source route"
        if frame.options[at] == 1:
            at += 1
            continue
        if at + 1 == len(frame.options) or frame.options[at + 1] < 2:
            return "option"
        at += frame.options[at + 1]
    return ""


def _bad_neighbour(frame: f.Frame, hook: str) -> str:
    if not _neighbour(frame):
        return ""
    if frame.ttl != 255 or f.FRAGMENT in frame.extensions or frame.version == 4:
        return "not from a neighbour"
    if hook == "b<":
        return ""
    if frame.icmp_type not in (f.RS, f.NS, f.NA):
        return "a router's"
    if frame.icmp_type == f.NA and not _owned(frame.target or "::"):
        return "another's address"
    return ""


def _bad_flow(frame: f.Frame, hook: str) -> str:
    """The policy's sentences."""
    sources = {t.ip_of(who, v) for who in "ar" for v in (4, 6)}
    here = {t.IP4["b"], t.IP6["b"]}
    to_here = frame.dst in here or hook == "b<"
    if frame.inner is not None:
        return _bad_error(frame, hook)
    if frame.protocol not in (f.TCP, f.UDP):
        return "protocol"
    if frame.protocol == f.TCP and 0 < frame.offset < 24:
        return "overlap"
    to_service = frame.dst in (VIP4, VIP6) and frame.protocol == f.TCP and hook == "a>"
    if not (to_here or to_service):
        return "destination"
    if hook == "b<" and frame.src not in sources:
        return "peer"
    if frame.offset:
        return ""  # as the first fragment that went before
    if frame.dport < 0:
        return "transport header"
    return "" if (frame.protocol, frame.dport) in PORTS else "port"


def _bad_error(frame: f.Frame, hook: str) -> str:
    """It must quote a flow that the policy allows, to whoever sent the quoted packet."""
    at = 2 if frame.version == 4 else 4  # the quoted length, which nothing needs to be true
    quote = frame.payload[:at] + b"\x7f\xff" + frame.payload[at + 2 :]
    inner = f.parse_ip(quote, quoted=True)
    if frame.offset or inner.src != frame.dst:
        return "error to another"
    if hook == "a>" and not _owned(inner.dst):
        return "error about another"
    if (inner.protocol, inner.sport) not in PORTS and (inner.protocol, inner.dport) not in PORTS:
        return "error about no flow"
    return ""


# ---- truncations -------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", HOOKS)
def test_no_truncation_of_a_denied_frame_passes(town: Town, hook: str) -> None:
    prepare(town)
    for whole in denied(hook):
        for cut in (whole, *f.truncations(whole)):
            assert run(town, hook, cut)[0] == DROP, (whole.hex(), len(cut))


@pytest.mark.parametrize("hook", HOOKS)
def test_no_allowed_frame_passes_with_half_its_headers(town: Town, hook: str) -> None:
    prepare(town)
    for whole in allowed(hook):
        parsed = f.parse(whole)
        header = 0 if parsed.offset else 20 if parsed.protocol == f.TCP else 8
        passed = []
        for cut in (whole, *f.truncations(whole)):
            if run(town, hook, cut)[0] != DROP:
                passed.append(len(cut))
        assert passed, whole.hex()
        assert passed[0] == len(whole), whole.hex()
        assert passed[-1] >= parsed.l4 + header, whole.hex()


# ---- mutations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("hook", HOOKS)
def test_no_forbidden_frame_passes(town: Town, hook: str, seed: int) -> None:
    """Conntrack, fragments and services live on from frame to frame."""
    prepare(town)
    corpus = [*allowed(hook), *denied(hook), *neighbours(hook)]
    for frame in corpus:
        assert run(town, hook, frame)[0] == DROP or not forbidden(frame, hook), frame.hex()
    rng = random.Random(seed)
    before = town.lab.counters()
    outcomes: Counter[str] = Counter()
    with campaign(f"fuzz-{hook[0]}-{seed}", "mutated frames at a pod's interface") as figures:
        for _ in range(COUNT // 2):
            figures.count += 1
            frame = f.mutate(rng.choice(corpus), rng)
            verdict, after = run(town, hook, frame)
            why = forbidden(frame, hook)
            assert verdict == DROP or not why, (why, frame.hex())
            outcomes[why or ("passed" if verdict != DROP else "dropped")] += 1
            if verdict != DROP and f.parse(frame).valid:
                assert f.parse(after).valid, frame.hex()
    seen = {reason for reason, _ in town.lab.counters().items() - before.items()}
    assert len({reason for reason, _ in seen}) >= 12, "the mutations reach most of the code"
    assert outcomes["passed"] > COUNT // 40, outcomes
    assert len(outcomes) >= 8, outcomes
