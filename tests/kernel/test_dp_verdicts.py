"""Verdicts of the real programs, a packet a row: who may open a flow to whom."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import frames as f
from support import town as t
from support.lab import DROP, PASS, REDIRECT, SHAPES, U32, Rules, addr
from support.town import ANY, CLASS, DENY, POLICY, POLICY_DENY, Town

pytestmark = pytest.mark.kernel
ICMP = {4: f.ICMP, 6: f.ICMPV6}


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    with t.town() as made:
        yield made


def opening(src: str, dst: str, protocol: int, port: int, version: int) -> bytes:
    """The packet that opens such a flow; protocol 1 is the family's own ICMP."""
    protocol = ICMP[version] if protocol == f.ICMP else protocol
    return f.packet(t.ip_of(src, version), t.ip_of(dst, version), protocol, dport=port)


def terms(*rows: tuple[tuple[int, int, int, int], int, int, int]) -> Rules:
    """(key, precedence, rule, action)"""
    return Rules({key: (precedence, rule, action) for key, precedence, rule, action in rows})


A, C = t.from_("a"), t.from_("c")
TCP, UDP, SCTP = f.TCP, f.UDP, f.SCTP
OPEN = [
    # reason, rules of b's ingress, source, protocol, port, expected reason
    ("no policy: default allow", None, "a", TCP, 80, 0),
    ("isolated, nothing allowed", Rules(), "a", TCP, 80, POLICY),
    ("by identity", t.rules(A), "a", TCP, 80, 0),
    ("by identity: another", t.rules(A), "c", TCP, 80, POLICY),
    ("by identity: every protocol", t.rules(A), "a", f.ICMP, 0, 0),
    ("by identity: a protocol without ports", t.rules(A), "a", 47, 0, 0),
    ("by protocol", t.rules(t.from_("a", TCP)), "a", TCP, 81, 0),
    ("by protocol: another", t.rules(t.from_("a", TCP)), "a", UDP, 81, POLICY),
    ("by protocol: ICMP is another", t.rules(t.from_("a", TCP)), "a", f.ICMP, 0, POLICY),
    ("exact port", t.rules(t.from_("a", TCP, 80)), "a", TCP, 80, 0),
    ("exact port: another", t.rules(t.from_("a", TCP, 80)), "a", TCP, 81, POLICY),
    ("exact port: another protocol", t.rules(t.from_("a", TCP, 80)), "a", UDP, 80, POLICY),
    ("exact port: UDP", t.rules(t.from_("a", UDP, 53)), "a", UDP, 53, 0),
    ("exact port: SCTP", t.rules(t.from_("a", SCTP, 53)), "a", SCTP, 53, 0),
    ("port prefix: first of 80-95", t.rules((300, TCP, 80, 20)), "a", TCP, 80, 0),
    ("port prefix: last of 80-95", t.rules((300, TCP, 80, 20)), "a", TCP, 95, 0),
    ("port prefix: below", t.rules((300, TCP, 80, 20)), "a", TCP, 79, POLICY),
    ("port prefix: above", t.rules((300, TCP, 80, 20)), "a", TCP, 96, POLICY),
    ("one bit of port: upper half", t.rules((300, TCP, 0x8000, 9)), "a", TCP, 0xFFFF, 0),
    ("one bit of port: lower half", t.rules((300, TCP, 0x8000, 9)), "a", TCP, 0x7FFF, POLICY),
    ("any peer", t.rules((ANY, 0, 0, 0)), "a", UDP, 9, 0),
    ("any peer, one port", t.rules((ANY, TCP, 80, 24)), "c", TCP, 80, 0),
    ("any peer, one port: another", t.rules((ANY, TCP, 80, 24)), "c", TCP, 81, POLICY),
    ("ports never match ICMP", t.rules((ANY, 1, 0, 24)), "a", f.ICMP, 0, POLICY),
    (
        "higher precedence wins: deny",
        terms((A, 1, 0, 1), ((ANY, 0, 0, 0), 2, 1, DENY)),
        "a",
        TCP,
        80,
        POLICY_DENY,
    ),
    (
        "higher precedence wins: allow",
        terms((A, 3, 0, 1), ((ANY, 0, 0, 0), 2, 1, DENY)),
        "a",
        TCP,
        80,
        0,
    ),
    (
        "tie: the lowest rule decides, here deny of any",
        terms((A, 2, 5, 1), ((ANY, 0, 0, 0), 2, 4, DENY)),
        "a",
        TCP,
        80,
        POLICY_DENY,
    ),
    (
        "tie: the lowest rule decides, here allow of one",
        terms((A, 2, 3, 1), ((ANY, 0, 0, 0), 2, 4, DENY)),
        "a",
        TCP,
        80,
        0,
    ),
    (
        "precedence is unsigned",
        terms((A, 0xFFFFFFFF, 0, 1), ((ANY, 0, 0, 0), 2, 1, DENY)),
        "a",
        TCP,
        80,
        0,
    ),
    ("deny of another leaves default deny", terms((C, 1, 0, DENY)), "a", TCP, 80, POLICY),
]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("why", "ingress", "src", "protocol", "port", "expected"), OPEN)
def test_ingress_of_a_local_pod(
    town: Town,
    version: int,
    why: str,
    ingress: Rules | None,
    src: str,
    protocol: int,
    port: int,
    expected: int,
) -> None:
    town.open({"b<": ingress} if ingress else {})
    seen = town.send(src + ">", opening(src, "b", protocol, port, version))
    assert expected == seen.reason, why
    assert seen.verdict == (DROP if expected else REDIRECT), why
    assert seen.direction == (t.INGRESS if expected else t.EGRESS), "the end that decided"


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("why", "egress", "dst", "protocol", "port", "expected"), OPEN[1:10])
def test_egress_to_another_node(
    town: Town,
    version: int,
    why: str,
    egress: Rules,
    dst: str,
    protocol: int,
    port: int,
    expected: int,
) -> None:
    """The same rules as b's egress; the peer has the identity the row names, elsewhere."""
    town.open({"b>": egress}, r=t.IDENTITY[dst])
    seen = town.send("b>", opening("b", "r", protocol, port, version))
    assert expected == seen.reason, why
    assert seen.verdict == (DROP if expected else PASS), why
    assert seen.direction == t.EGRESS


CIDRS = {
    4: {"all": "0.0.0.0/0", "pods": "10.1.0.0/16", "a": "10.1.0.10/32", "world": "192.0.2.0/24"},
    6: {"all": "::/0", "pods": "fd00:1::/64", "a": "fd00:1::10/128", "world": "2001:db8::/32"},
}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    ("why", "classes", "allowed", "peer", "expected"),
    [
        ("the world by its network", {"world": 7}, 7, "w", 0),
        ("a pod by its address", {"a": 7}, 7, "a", 0),
        ("a pod by its network", {"pods": 7}, 7, "a", 0),
        ("a node by a network", {"all": 7}, 7, "n", 0),
        ("an address outside", {"world": 7}, 7, "a", POLICY),
        ("the longest prefix is the class", {"all": 7, "pods": 8}, 7, "a", POLICY),
        ("the longest prefix is the class, allowed", {"all": 7, "pods": 8}, 8, "a", 0),
        ("an except is class 0", {"all": 7, "pods": 0}, 7, "a", POLICY),
        ("beside an except", {"all": 7, "pods": 0}, 7, "w", 0),
        ("an except within an except's network", {"all": 7, "pods": 0, "a": 7}, 7, "a", 0),
        ("class 0 never matches, even if it had a rule", {"pods": 0}, 0, "a", POLICY),
    ],
)
def test_cidr(
    town: Town,
    version: int,
    why: str,
    classes: dict[str, int],
    allowed: int,
    peer: str,
    expected: int,
) -> None:
    cidr = {CIDRS[version][name]: number for name, number in classes.items()}
    only = t.rules((CLASS | allowed, 0, 0, 0), cidr=cidr)
    town.open({"b>": only})
    assert expected == town.reason("b>", opening("b", peer, TCP, 80, version)), why
    town.open({"b<": only})
    assert expected == town.reason("b<", opening(peer, "b", TCP, 80, version)), why


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    ("why", "key", "expected"),
    [
        ("an unknown peer matches any", (ANY, 0, 0, 0), 0),
        ("an unknown peer matches no identity, not even 0", (0, 0, 0, 0), POLICY),
        ("an unknown peer is not the world", (2, 0, 0, 0), POLICY),
    ],
)
def test_unknown_peer(
    town: Town, version: int, why: str, key: tuple[int, int, int, int], expected: int
) -> None:
    """An address of a pod network that nobody has published has identity 0."""
    town.open({"b<": t.rules(key), "b>": t.rules(key)})
    assert expected == town.reason("b<", opening("u", "b", TCP, 80, version)), why
    assert expected == town.reason("b>", opening("b", "u", TCP, 80, version)), why


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    ("why", "peer", "identity"),
    [("world", "w", 2), ("a node's address", "n", 4), ("a remote pod", "r", 304)],
)
def test_identity_by_address(town: Town, version: int, why: str, peer: str, identity: int) -> None:
    town.open({"b<": t.rules((identity, 0, 0, 0))})
    assert town.reason("b<", opening(peer, "b", TCP, 80, version)) == 0, why
    town.open({"b<": t.rules((identity + 1, 0, 0, 0))})
    assert town.reason("b<", opening(peer, "b", TCP, 80, version)) == POLICY, why


def test_longest_network_is_the_identity(town: Town) -> None:
    town.open({"b<": t.rules((9, 0, 0, 0))})
    town.lab.network("192.0.2.0/28", 9)
    town.lab.network("192.0.0.0/16", 8)
    assert town.reason("b<", opening("w", "b", TCP, 80, 4)) == 0
    assert town.reason("b<", opening("192.0.2.16", "b", TCP, 80, 4)) == POLICY


def test_ipcache_entry_with_another_keys_proof_is_absent(town: Town) -> None:
    """As a reader sees an element that was recycled under it."""
    town.open({"b<": t.rules((304, 0, 0, 0), (2, UDP, 0, 8))})
    foreign = town.lab.maps["ipcache_v1"].lookup(addr(t.IP4["r"]))
    town.lab.maps["ipcache_v1"].update(addr(t.IP4["w"]), foreign)
    assert town.reason("b<", opening("r", "b", TCP, 80, 4)) == 0
    assert town.reason("b<", opening("w", "b", TCP, 80, 4)) == POLICY
    assert town.reason("b<", opening("w", "b", UDP, 80, 4)) == 0, "world, as without an entry"


@pytest.mark.parametrize("what", ["rule_sets_v2", "cidrs_v1"])
def test_missing_rule_set_drops(town: Town, what: str) -> None:
    town.open({"b<": t.rules((CLASS | 1, 0, 0, 0), cidr={"0.0.0.0/0": 1})})
    town.lab.maps[what].discard(U32.pack(0))
    assert town.reason("a>", opening("a", "b", TCP, 80, 4)) == t.NO_RULE_SET
    assert town.reason("b<", opening("w", "b", TCP, 80, 4)) == t.NO_RULE_SET


@pytest.mark.parametrize("hook", ["x>", "x<"])
def test_pending_interface_drops_everything(town: Town, hook: str) -> None:
    town.open()
    arp = f.eth(f.arp(1, f.MAC_A, "10.1.0.10", f.BROADCAST, "10.1.0.1"), f.ETH_ARP)
    assert town.reason(hook, opening("a", "b", TCP, 80, 4)) == t.PENDING
    assert town.reason(hook, opening("a", "b", TCP, 80, 6)) == t.PENDING
    assert town.reason(hook, arp) == t.PENDING


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    ("why", "rules", "expected", "direction"),
    [
        ("neither is isolated", {}, 0, t.EGRESS),
        ("egress refuses", {"a>": Rules()}, POLICY, t.EGRESS),
        ("ingress refuses", {"b<": Rules()}, POLICY, t.INGRESS),
        (
            "both refuse: the source is asked first",
            {"a>": Rules(), "b<": Rules()},
            POLICY,
            t.EGRESS,
        ),
        (
            "both allow",
            {"a>": t.rules(t.from_("b", TCP, 80)), "b<": t.rules(t.from_("a", TCP, 80))},
            0,
            t.EGRESS,
        ),
        ("a's ingress is not asked", {"a<": Rules()}, 0, t.EGRESS),
        ("b's egress is not asked", {"b>": Rules()}, 0, t.EGRESS),
    ],
)
def test_both_ends_in_one_run(
    town: Town, version: int, why: str, rules: dict[str, Rules], expected: int, direction: int
) -> None:
    town.open(rules)
    sent = opening("a", "b", TCP, 80, version)
    seen = town.send("a>", sent)
    assert (expected, direction) == (seen.reason, seen.direction), why
    if expected:
        assert seen.data == sent
        return
    assert seen.verdict == REDIRECT
    assert seen.data[12:] == sent[12:], "nothing but the MAC addresses differs"
    assert seen.data[:6] == town.pods["b"].mac, "as if it came through the veth pair"
    assert seen.data[6:12] == town.pods["b"].host_mac


def test_remote_peer_goes_to_the_stack_unchanged(town: Town) -> None:
    town.open()
    for version in (4, 6):
        for peer in ("r", "w", "n", "u"):
            sent = opening("a", peer, TCP, 80, version)
            seen = town.send("a>", sent)
            assert (PASS, sent) == (seen.verdict, seen.data), (peer, version)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    ("why", "src", "host", "expected"),
    [
        ("from another node's pod", "r", False, POLICY),
        ("made by this node", "n", True, 0),
        ("a node's address, forwarded", "n", False, POLICY),
        ("made by this node under any address", "w", True, 0),
    ],
)
def test_into_an_isolated_pod(
    town: Town, version: int, why: str, src: str, host: bool, expected: int
) -> None:
    town.open({"b<": Rules()})
    sent = opening(src, "b", TCP, 80, version)
    seen = town.send("b<", sent, host=host)
    assert expected == seen.reason, why
    assert seen.direction == t.INGRESS
    assert seen.data == sent


def test_host_exemption_is_not_for_what_leaves_a_pod(town: Town) -> None:
    town.open({"a>": Rules()})
    assert town.reason("a>", opening("a", "b", TCP, 80, 4), host=True) == POLICY


@pytest.mark.parametrize("version", [4, 6])
def test_a_pod_reaches_itself(town: Town, version: int) -> None:
    town.open({"b<": Rules(), "b>": Rules()})
    seen = town.send("b>", opening("b", "b", TCP, 80, version))
    assert (seen.reason, seen.verdict) == (0, REDIRECT)
    assert seen.data[:6] == town.pods["b"].mac


@pytest.mark.parametrize("version", [4, 6])
def test_a_pods_own_address_does_not_come_from_outside(town: Town, version: int) -> None:
    town.open({"b<": Rules()})
    assert town.reason("b<", opening("b", "b", TCP, 80, version)) == t.SOURCE


def test_most_key_shapes(town: Town) -> None:
    """As many as a rule set may have: the last is found too."""
    entries = {(300, TCP, 0x8000, 9 + n): (1, n, 1) for n in range(SHAPES - 1)}
    entries[(ANY, UDP, 53, 24)] = (1, SHAPES, 1)
    town.open({"b<": Rules(entries)})
    assert town.reason("a>", opening("a", "b", TCP, 0x8001, 4)) == 0
    assert town.reason("a>", opening("a", "b", UDP, 53, 4)) == 0
    assert town.reason("a>", opening("a", "b", TCP, 0x7FFF, 4)) == POLICY
