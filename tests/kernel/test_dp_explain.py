"""What the programs say: the dry copy's answer, the event of a denial, counters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import pytest
from support import frames as f
from support import town as t
from support.lab import DROP, HAIRPIN4, REDIRECT, Rules, addr
from support.town import (
    ANY,
    DENY,
    EGRESS,
    INGRESS,
    NO_BACKEND,
    POLICY,
    POLICY_DENY,
    VIP4,
    VIP6,
    Town,
)
from tidegate_bpf import LoadedObject, SkbContext

pytestmark = pytest.mark.kernel
NOTHING = Rules()
NONE, HOST, SELF = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    with t.town() as made:
        yield made


def copy(town: Town, mode: int) -> LoadedObject:
    """The same object over the same maps; its scratch memory is its own."""
    lab = town.lab
    shared = {name: table for name, table in lab.maps.items() if name != "scratch"}
    return lab.file.load(pins=shared, rodata={**lab.rodata, "dry_run": mode})


@pytest.fixture(scope="module")
def copies(town: Town) -> Iterator[dict[int, LoadedObject]]:
    """{dry_run: the object}; 1 judges as if the flow were new, 2 asks conntrack."""
    with copy(town, 1) as fresh, copy(town, 2) as tracking:
        yield {1: fresh, 2: tracking}


@pytest.fixture
def dry(copies: dict[int, LoadedObject]) -> LoadedObject:
    return copies[1]


def ask(
    copied: LoadedObject, hook: str, data: bytes, host: bool = False
) -> tuple[int, bytes, SkbContext]:
    program = copied.programs["from_pod" if hook[1] == ">" else "to_pod"]
    ifindex = t.IFINDEX.get(hook[0], t.PENDING_IFINDEX)
    context = SkbContext(ifindex=ifindex, ingress_ifindex=0 if host else 1)
    result = program.test_run(data, context, data_out_size=len(data) + 64)
    return result.retval, result.data_out, SkbContext.from_buffer_copy(result.ctx_out)


STATE = ("ct_v2", "answered_v1", "frags_v1", "metrics_v1", "socks_v1", "streams_v1")
"""What the real programs write, besides the half-open shares."""


def dump(town: Town, names: Iterable[str]) -> dict[str, tuple[bytes, bytes]]:
    lab = town.lab
    unread = ("events_v1", "flows_v1", "traces_v1", "scratch")
    tables = {name: lab.maps[name] for name in names if name not in unread}
    tables |= {f"share {key}": share for key, share in lab.shares.items()}
    return {name: table.dump() for name, table in tables.items()}


@contextlib.contextmanager
def unchanged(town: Town, names: Iterable[str] = STATE) -> Iterator[None]:
    """Nothing in the block writes these maps, a half-open flow or an event."""
    town.events()
    town.told()
    before = dump(town, names)
    yield
    assert dump(town, names) == before
    assert town.events() == []
    assert town.told() == []


RULES = {
    "a>": Rules({(t.IDENTITY["b"], f.TCP, 80, 24): (5, 3, 1), (ANY, f.UDP, 0, 8): (5, 4, 1)}),
    "b<": Rules({(t.IDENTITY["a"], 0, 0, 0): (5, 6, 1), (ANY, f.UDP, 9, 24): (6, 7, DENY)}),
}


def questions() -> Iterator[tuple[str, bytes, bool]]:
    for version in (4, 6):
        a, b, c, r, w = (t.ip_of(who, version) for who in "abcrw")
        vip = VIP4 if version == 4 else VIP6
        for dst in (b, c, r, w, a, vip):
            for protocol, port in ((f.TCP, 80), (f.TCP, 81), (f.UDP, 9), (f.UDP, 10), (f.SCTP, 80)):
                yield "a>", f.packet(a, dst, protocol, dport=port), False
        ping = f.ICMP if version == 4 else f.ICMPV6
        yield "c>", f.packet(c, b, ping), False
        yield "c>", f.packet(a, b, f.TCP), False
        for host in (False, True):
            yield "b<", f.packet(r, b, f.TCP), host
        yield "x>", f.packet(a, b, f.TCP), False
    a, b = t.IP4["a"], t.IP4["b"]
    yield "a>", f.eth(f.arp(1, f.MAC_A, a, f.BROADCAST, b), f.ETH_ARP), False
    yield "a>", f.eth(f.arp(1, f.MAC_A, b, f.BROADCAST, a), f.ETH_ARP), False
    yield "a>", f.eth(f.ip(a, b, f.TCP, f.tcp(a, b, 1, 2)), vlans=[1]), False
    for piece in f.fragment4(f.IPv4(a, b, f.UDP, f.udp(a, b, 1, 10, bytes(100))), 64):
        yield "a>", f.eth(piece), False
    quoted = f.ip(b, a, f.TCP, f.tcp(b, a, 80, 40000))
    yield "a>", f.eth(f.ip(a, b, f.ICMP, f.icmp_error(3, 3, quoted))), False


def prepare(town: Town) -> None:
    town.open(RULES)
    for vip, version in ((VIP4, 4), (VIP6, 6)):
        backends = [(t.ip_of(who, version), 80) for who in "bcr"]
        town.lab.service(vip, 80, f.TCP, backends, base=version - 4)
        town.lab.service(vip, 81, f.TCP, [])
    town.events()


def test_the_dry_copy_answers_as_the_program_and_changes_nothing(
    town: Town, dry: LoadedObject
) -> None:
    reasons = set()
    prepare(town)
    with unchanged(town, list(town.lab.maps)):
        answers = [ask(dry, hook, data, host) for hook, data, host in questions()]
    for (hook, data, host), answer in zip(questions(), answers, strict=True):
        verdict, after, context = answer
        prepare(town)
        seen = town.send(hook, data, host=host)
        if seen.reason == NO_BACKEND:
            # The program answers it: what leaves is a refusal. A dry copy only says so.
            assert (verdict, after) == (t.DROP, data), data.hex()
        else:
            assert (verdict, after) == (seen.verdict, seen.data), data.hex()
        assert context.cb[0] == seen.reason
        reasons.add(seen.reason)
        events = town.events()
        if seen.reason in (POLICY, POLICY_DENY):
            at = 1 if seen.direction == EGRESS else 3
            assert (context.cb[at], context.cb[at + 1]) == (events[0].rule_set, events[0].rule)
        flows = [flow for who in t.IFINDEX for flow in town.half_open(who)]
        if flows:
            (flow,) = flows
            asked = [(flow.src_endpoint, flow.src_rule, 2), (flow.dst_endpoint, flow.dst_rule, 4)]
            for endpoint, rule, at in asked:
                assert not endpoint or context.cb[at] == rule
    assert len(reasons) >= 9, "the questions cover most of the reasons"


def test_the_dry_copy_names_rules_and_shapes(town: Town, dry: LoadedObject) -> None:
    prepare(town)
    a, b = t.IP4["a"], t.IP4["b"]
    rows = [
        ("both allow", "a>", f.packet(a, b, f.TCP), (0, 12, 3, 21, 6), 24 | 0 << 8),
        ("denied by a rule", "a>", f.packet(a, b, f.UDP, dport=9), (181, 12, 4, 21, 7), None),
        ("denied by default", "a>", f.packet(a, b, f.TCP, dport=81), (133, 12, NONE, 0, 0), 0),
        ("nobody asked", "c>", f.packet(t.IP4["c"], a, f.TCP), (0, 0, NONE, 0, NONE), 0),
        ("itself", "a>", f.packet(a, a, f.TCP), (0, 0, SELF, 0, SELF), 0),
    ]
    for why, hook, data, expected, mark in rows:
        _, _, context = ask(dry, hook, data)
        assert tuple(context.cb) == expected, why
        assert mark is None or context.mark == mark, why
    _, _, context = ask(dry, "b<", f.packet(t.IP4["n"], b, f.TCP), host=True)
    assert (context.cb[0], context.cb[4]) == (0, HOST)


def test_the_dry_copy_chooses_the_same_backend(town: Town, dry: LoadedObject) -> None:
    prepare(town)
    for sport in range(20000, 20060):
        sent = t.tcp(t.IP4["a"], VIP4, sport, 80, f.SYN)
        assert f.parse(ask(dry, "a>", sent)[1]).dst == f.parse(town.send("a>", sent).data).dst


@pytest.mark.parametrize("mode", [1, 2])
def test_conntrack_is_ignored_unless_asked(
    town: Town, copies: dict[int, LoadedObject], mode: int
) -> None:
    """b may not open flows to a; its answers pass, which only mode 2 is to say."""
    copied = copies[mode]
    town.open({"a<": NOTHING, "b<": t.rules(t.from_("a"))})
    answer = t.segment("a", "b", 4, f.ACK, back=True)
    assert ask(copied, "b>", answer)[2].cb[0] == POLICY
    town.handshake("a", "b", 4)
    for _ in range(2):
        with unchanged(town):
            verdict, _, context = ask(copied, "b>", answer)
        expected = (0, REDIRECT) if mode == 2 else (POLICY, DROP)
        assert (context.cb[0], verdict) == expected
        town.lab.bump()
    town.switch({"a<": NOTHING, "b<": NOTHING})
    for hook, back in (("a>", False), ("b>", True)):
        with unchanged(town):
            asked = ask(copied, hook, t.segment("a", "b", 4, f.ACK, back))
        assert asked[2].cb[0] == POLICY


@pytest.mark.parametrize("mode", [1, 2])
def test_half_open_flows_too(town: Town, copies: dict[int, LoadedObject], mode: int) -> None:
    copied = copies[mode]
    town.open({"a<": NOTHING})
    assert town.reason("a>", t.segment("a", "b", 4, f.SYN)) == 0
    with unchanged(town):
        asked = ask(copied, "b>", t.segment("a", "b", 4, f.SYN | f.ACK, back=True))
    assert asked[2].cb[0] == (0 if mode == 2 else POLICY)


@pytest.mark.parametrize("mode", [1, 2])
def test_a_service_flow_asked_about(town: Town, copies: dict[int, LoadedObject], mode: int) -> None:
    copied = copies[mode]
    town.open({"b<": t.rules(t.from_("a"))})
    town.lab.service(VIP4, 80, f.TCP, [(t.IP4["b"], 8080)])
    a, b = t.IP4["a"], t.IP4["b"]
    assert town.reason("a>", t.tcp(a, VIP4, 40000, 80, f.SYN)) == 0
    assert town.reason("b>", t.tcp(b, a, 8080, 40000, f.SYN | f.ACK)) == 0
    assert town.reason("a>", t.tcp(a, VIP4, 40000, 80, f.ACK)) == 0
    with unchanged(town):
        _, _, context = ask(copied, "a>", t.tcp(a, VIP4, 40000, 80, f.ACK))
    assert context.cb[3] == (21 if mode == 1 else 0), "the rule set, if it was asked anew"
    town.lab.service(VIP4, 80, f.TCP, [(t.IP4["c"], 8080)], base=1)
    for flags in (f.ACK, f.SYN):
        with unchanged(town):
            _, after, _ = ask(copied, "a>", t.tcp(a, VIP4, 40000, 80, flags))
        stays = mode == 2 and flags == f.ACK
        assert f.parse(after).dst == t.IP4["b" if stays else "c"]


# ---- events -----------------------------------------------------------------------------------


def test_event_of_a_denial(town: Town) -> None:
    rows = [
        # reason, hook, frame, reason, direction, endpoint, rule set, rule, identities
        ("egress, default", "a>", "b", f.TCP, 81, POLICY, EGRESS, 1, 12, NONE, (300, 301)),
        ("ingress, by a rule", "a>", "b", f.UDP, 9, POLICY_DENY, INGRESS, 2, 21, 7, (300, 301)),
        ("ingress, another's", "c>", "b", f.TCP, 80, POLICY, INGRESS, 2, 21, NONE, (302, 301)),
        ("from elsewhere", "b<", "b", f.TCP, 80, POLICY, INGRESS, 2, 21, NONE, (304, 301)),
        ("to the world", "a>", "w", f.TCP, 80, POLICY, EGRESS, 1, 12, NONE, (300, 2)),
    ]
    for why, hook, to, protocol, port, *expected, identities in rows:
        for version in (4, 6):
            prepare(town)
            src = t.ip_of("r" if hook == "b<" else hook[0], version)
            dst = t.ip_of(to, version)
            data = f.packet(src, dst, protocol, dport=port)
            seen = town.send(hook, data)
            (event,) = town.events()
            assert seen.direction == event.direction, why
            found = [event.reason, event.direction, event.endpoint, event.rule_set, event.rule]
            assert found == expected, why
            assert (event.src_identity, event.dst_identity) == identities, why
            assert (event.src, event.dst) == (addr(src), addr(dst)), why
            assert (event.sport, event.dport, event.protocol) == (40000, port, protocol), why
            assert event.tcp_flags == (f.SYN if protocol == f.TCP else 0), why
            assert event.ifindex == t.IFINDEX[hook[0]], why
            assert event.time > 0


def test_event_of_a_packet_that_is_nobodys(town: Town) -> None:
    town.open()
    town.events()
    assert town.reason("a>", f.packet(t.IP4["b"], t.IP4["c"], f.UDP)) == t.SOURCE
    assert town.reason("x>", f.packet(t.IP4["b"], t.IP4["c"], f.UDP)) == t.PENDING
    spoofed, pending = town.events()
    assert (spoofed.reason, spoofed.endpoint, spoofed.src) == (t.SOURCE, 1, addr(t.IP4["b"]))
    assert (pending.reason, pending.endpoint, pending.ifindex) == (t.PENDING, 0, 14)


def test_allowed_packets_leave_no_event(town: Town) -> None:
    town.open()
    town.events()
    town.handshake("a", "b", 4)
    assert town.events() == []


def test_translated_denial_names_the_backend(town: Town) -> None:
    town.open({"b<": NOTHING})
    town.lab.service(VIP4, 80, f.TCP, [(t.IP4["b"], 8080)])
    town.events()
    assert town.reason("a>", f.packet(t.IP4["a"], VIP4, f.TCP)) == POLICY
    (event,) = town.events()
    assert (event.dst, event.dport) == (addr(t.IP4["b"]), 8080)
    assert addr(HAIRPIN4) not in (event.src, event.dst)


@pytest.fixture
def unlimited() -> Iterator[Town]:
    """Denials of one kind have no limit."""
    with t.town(denial_burst_ns=1 << 62) as made:
        yield made


def test_a_full_ring_is_counted(unlimited: Town) -> None:
    """Losing an event changes no verdict and is not silent."""
    town = unlimited
    town.open({"b<": NOTHING})
    town.events()
    data = f.packet(t.IP4["a"], t.IP4["b"], f.TCP)
    room = (1 << 20) // (80 + 8)
    before = town.lab.counters()
    for _ in range(room + 100):
        assert town.lab.run("from_pod", data, t.IFINDEX["a"])[0] == DROP
    after = town.lab.counters()
    lost = {key: after[key] - before.get(key, 0) for key in after if key[0] == t.EVENT_LOST}
    denied = after[POLICY, INGRESS] - before.get((POLICY, INGRESS), 0)
    assert denied == room + 100
    events = town.events()
    assert sum(lost.values()) + len(events) == denied
    assert sum(lost.values()) >= 100
    assert town.reason("a>", data) == POLICY
    assert len(town.events()) == 1, "room again"


def test_counters_count_bytes(town: Town) -> None:
    town.open()
    table, codec = town.lab.maps["metrics_v1"], town.lab.codecs["tg_counter"]

    def forwarded() -> int:
        value = table.lookup((0 * 2 + EGRESS).to_bytes(4, "little"))
        return sum(codec.unpack(part[:16]).bytes for part in table.split_per_cpu(value))

    before = forwarded()
    data = t.udp(t.IP4["a"], t.IP4["b"], 1, 2, bytes(100))
    town.send("a>", data)
    assert forwarded() - before == len(data)
