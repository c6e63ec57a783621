"""Tiers, Pass, audit, ICMP, entities and port names: three answers about random rule sets.

The model (`tidegate_cli`, from the terms' prose), the look-up over the loader's entries, and the
program in a dry run. Then what a run that is none leaves behind: events, counters, flows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import UNSET
from support import frames as f
from support import town as t
from support.ca_soak import campaign, scaled
from support.lab import Rules, addr
from support.town import EGRESS, INGRESS, POLICY, POLICY_DENY, Town
from tidegate_api import API_VERSION
from tidegate_api import state as api
from tidegate_bpf import LoadedObject, SkbContext
from tidegate_cli import lookup
from tidegate_cli.model import ECHO, Model, Side, Verdict
from tidegate_loader import addresses, rules

pytestmark = pytest.mark.kernel

WORLDS = scaled(ci=150, soak=1500)
QUESTIONS = 40
NONE = -1
AUDIT = 253
NUMBERS = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1, "ICMPv6": 58}
POLICIES = [api.PolicyRef(kind="K", namespace="n", name=f"p{i}") for i in range(4)]
OTHER = {4: "172.18.0.9", 6: "fd00:9::9"}
API_NODE = {4: "172.18.0.5", 6: "fd00:9::5"}
API_OUT = {4: "192.0.2.44", 6: "2001:db8::44"}
NAMED = {4: "192.0.2.77", 6: "2001:db8::77"}
"""Another node, a node that serves the API, a server of it outside, an address that users named."""
CIDRS = ["0.0.0.0/0", "10.1.0.0/16", "10.1.0.11/32", "172.18.0.0/16", "192.0.2.0/24", "::/0"]
CIDRS += ["fd00:1::/64", "fd00:9::/32", "2001:db8::77/128"]
PEERS = [
    api.PeerSet(name="pods", selector="", identities=[0, 300, 301, 302]),
    api.PeerSet(name="far", selector="", identities=[304, 2000]),
    api.PeerSet(name="nodes", selector="", identities=[], cidrs=["172.18.0.9/32", "fd00:9::5/128"]),
    api.PeerSet(
        name="http",
        selector="",
        identities=[300, 301, 302],
        ports=[
            api.NamedPort(protocol="TCP", port=80, identities=[301]),
            api.NamedPort(protocol="TCP", port=8080, identities=[302]),
            api.NamedPort(protocol="UDP", port=80, identities=[300, 301]),
        ],
    ),
]
PORTS = [1, 80, 81, 8080, 65535]
ICMP = [(8, 0), (8, 1), (13, 0), (128, 0), (129, 0), (3, 1)]


# ---- worlds ------------------------------------------------------------------------------


def term(r: random.Random, number: int) -> api.Term:
    fields: dict[str, Any] = {"rule": number, "audit": False}
    tier = r.choice(["admin", "developer", "developer", "baseline", "audit"])
    if tier in ("developer", "audit"):
        fields["action"] = r.choice(["Allow", "Allow", "Deny"])
        deny = fields["action"] == "Deny"
        fields["precedence"] = api.DEVELOPER_PRECEDENCE + deny
        fields["audit"] = tier == "audit"
    else:
        base = api.ADMIN_PRECEDENCE if tier == "admin" else 0
        fields["precedence"] = base + r.randint(0, 3)
        fields["action"] = r.choice(["Allow", "Deny", "Pass"])
    peers: list[api.Peer] = [api.AnyPeer(), api.CIDRPeer(cidr=r.choice(CIDRS))]
    peers += [api.SetPeer(name=r.choice(["pods", "far", "nodes", "http"]))]
    peers += [api.EntityPeer(entity=r.choice(["host", "remote-node", "kube-apiserver"]))]
    peer = r.choice(peers)
    if isinstance(peer, api.SetPeer) and peer.name == "http" and r.random() < 0.7:
        return api.Term(
            peer=peer, port_name="http", protocol=r.choice([UNSET, "TCP", "UDP"]), **fields
        )
    return api.Term(peer=peer, **_ports(r), **fields)


def _ports(r: random.Random) -> dict[str, Any]:
    shape = r.choice(["any", "protocol", "port", "range", "icmp", "every"])
    if shape == "any":
        return {}
    if shape == "every":
        return {"port": r.choice(PORTS)}
    if shape == "icmp":
        kind, code = r.choice(ICMP)
        found: dict[str, Any] = {"protocol": r.choice(["ICMP", "ICMPv6"])}
        found |= {"icmp_type": kind} if r.random() < 0.7 else {}
        return found | ({"icmp_code": code} if found.get("icmp_type") and r.random() < 0.5 else {})
    found = {"protocol": r.choice(["TCP", "UDP", "SCTP"])}
    if shape == "port":
        found["port"] = r.choice(PORTS)
    if shape == "range":
        found["port"], found["end_port"] = sorted(r.sample([1, 79, 81, 1023, 8080, 65535], 2))
    return found


def rule_set(r: random.Random, direction: Any) -> api.RuleSet:
    isolating = r.choice([0, 0, 1, 2])
    audited = [0] if r.random() < 0.3 else []
    terms = [term(r, number) for number in range(r.randint(0, 7))]
    if isolating:  # as the operator has it: nobody asks the Baseline tier then
        terms = [item for item in terms if item.precedence >= api.DEVELOPER_PRECEDENCE]
    return api.rule_set(
        api.RuleSetSpec(
            format=2,
            direction=direction,
            policies=POLICIES[:isolating],
            others=POLICIES[isolating:],
            rules=[api.Rule(policy=r.randrange(4), index=i) for i in range(7)],
            terms=terms,
            audited=audited,
        )
    )


def entry(text: str, identity: int, node: str = "") -> api.IPCacheEntry:
    cidr = text + ("/128" if ":" in text else "/32")
    return api.IPCacheEntry(cidr=cidr, identity=identity, node=node or UNSET)


class Made:
    """One world, in the maps and as objects. Pod b has both rule sets, the others none."""

    def __init__(self, town: Town, seed: int) -> None:
        r = random.Random(seed)
        self.sets = {way: rule_set(r, way) for way in ("Ingress", "Egress")}
        peers = {item.name: item for item in PEERS}
        self.expanded = {way: rules.expand(held, peers) for way, held in self.sets.items()}
        town.open({"b<": self.lab_rules("Ingress"), "b>": self.lab_rules("Egress")})
        for family in (4, 6):
            ip = t.IP4 if family == 4 else t.IP6
            town.lab.ipcache(ip["n"], 4, peer=True, node=True, own=True)
            town.lab.ipcache(OTHER[family], 4, peer=True, node=True)
            town.lab.ipcache(API_NODE[family], 3, peer=True, node=True)
            town.lab.ipcache(API_OUT[family], 3, peer=True)
            town.lab.ipcache(NAMED[family], 2000)
        self.model = Model.from_objects(self._objects())

    def lab_rules(self, way: str) -> Rules:
        held, spec = self.expanded[way], self.sets[way].spec
        cidr = {addresses.prefix_text(p): n for p, n in held.cidr.items()}
        made = Rules(held.entries, cidr, bool(spec.policies), bool(spec.audited))
        assert made.flags() == held.flags
        return made

    def _objects(self) -> list[api.StateObject]:
        names = {way.lower(): held.metadata.name for way, held in self.sets.items()}
        pods = [
            api.Endpoint(name, "n", name, t.IDENTITY[name], [t.IP4[name], t.IP6[name]])
            for name in "acd"
        ]
        pods.append(api.Endpoint("b", "n", "b", 301, [t.IP4["b"], t.IP6["b"]], **names))
        node = api.NodeState(
            api_version=API_VERSION,
            kind="NodeState",
            metadata=api.Meta(name="one"),
            spec=api.NodeStateSpec(1, "Enforcing", pods, [], [], {}),
        )
        cache = [api.IPCacheEntry(cidr=c, identity=0) for c in ("10.1.0.0/16", "fd00:1::/64")]
        for family in (4, 6):
            ip = t.IP4 if family == 4 else t.IP6
            cache += [entry(ip["n"], 4, "one"), entry(OTHER[family], 4, "two")]
            cache += [entry(API_NODE[family], 3, "two"), entry(API_OUT[family], 3)]
            cache += [entry(NAMED[family], 2000), entry(ip["r"], 304, "two")]
        return [*self.sets.values(), node, _slice("peers", PEERS), _slice("ipcache", cache)]

    def looked(self, way: str, peer: str, number: int, port: int) -> lookup.Look:
        held = self.expanded[way]
        known = self._known(peer)
        question = lookup.Question(
            addr(peer), known.identity, number, port, known.entity(way.lower())
        )
        return lookup.check(_Row(held), _lookups(held), question)

    def _known(self, peer: str) -> lookup.Known:
        identity = self.model.identity(peer, "one")
        node = peer in (t.IP4["n"], t.IP6["n"], *OTHER.values(), *API_NODE.values())
        return lookup.Known(identity, None, node, peer in (t.IP4["n"], t.IP6["n"]))


def _slice(table: Any, items: list[Any]) -> api.StateSlice:
    spec = api.StateSliceSpec(
        format=2, table=table, epoch=1, shard=0, shards=1, revision=1, **{table: items}
    )
    return api.StateSlice(
        api_version=API_VERSION, kind="StateSlice", metadata=api.Meta(name=table), spec=spec
    )


class _Row:
    """A tg_policy row as `lookup` reads one."""

    def __init__(self, held: rules.Expanded) -> None:
        self.flags, self.rule_set, self.slot = held.flags, 1, 0
        self.counts = bytes(map(len, held.shapes))
        self.shapes = b"".join(bytes(s).ljust(rules.MAX_SHAPES, b"\0") for s in held.shapes)


class _Fields:
    def __init__(self, *names: str) -> None:
        self._names = names

    def pack(self, **fields: Any) -> Any:
        return tuple(fields[name] for name in self._names)

    def unpack(self, data: Any) -> Any:
        return SimpleNamespace(**dict(zip(self._names, data, strict=True)))


def _lookups(held: rules.Expanded) -> Any:
    def longest(key: Any) -> bytes | None:
        for bits in range(128, -1, -1):
            number = held.cidr.get((bits, addresses.mask(key[1], bits)))
            if number is not None:
                return number.to_bytes(4, "little")
        return None

    return lookup.Rules(
        held.entries.get,  # type: ignore[arg-type]
        longest if held.cidr else None,
        _Fields("peer", "protocol", "port", "prefix"),
        _Fields("precedence", "rule", "action", "flags"),
        _Fields("bits", "addr"),
    )


# ---- questions ---------------------------------------------------------------------------


def frame_of(src: str, dst: str, protocol: str, port: int, ident: int = 7) -> bytes:
    """`port`: of ICMP type << 8 | code."""
    if protocol not in ECHO:
        return f.packet(src, dst, NUMBERS[protocol], dport=port)
    kind, code, rest = port >> 8, port & 255, ident.to_bytes(2, "big") + bytes(2)
    make = f.icmp(kind, code, rest) if protocol == "ICMP" else f.icmpv6(src, dst, kind, code, rest)
    return f.eth(f.ip(src, dst, NUMBERS[protocol], make))


def question(r: random.Random) -> tuple[str, str, str, int]:
    """(pod b's address, the peer's, protocol, port)."""
    family = r.choice([4, 6])
    ip = t.IP4 if family == 4 else t.IP6
    peers = [ip[x] for x in "acrnwu"] + [m[family] for m in (OTHER, API_NODE, API_OUT, NAMED)]
    own = "ICMP" if family == 4 else "ICMPv6"
    protocol = r.choice(["TCP", "TCP", "UDP", "SCTP", own])
    port = r.choice([1, 79, 80, 81, 500, 8080, 65535])
    if protocol == own:
        kinds = [8, 13, 14] if family == 4 else [128, 130, 143]
        kind, code = r.choice(kinds), r.choice([0, 1])
        # The code of an echo counts as 0.
        port = kind << 8 | (0 if kind in (8, 128) else code)
    return ip["b"], r.choice(peers), protocol, port


def audit_of(side: Side) -> tuple[int, int]:
    if side.audit is None:
        return 0, NONE
    number = side.audit.rule_number
    return (POLICY, NONE) if number is None else (POLICY_DENY, number)


def ask(dry: LoadedObject, program: str, frame: bytes) -> SkbContext:
    context = SkbContext(ifindex=t.IFINDEX["b"], ingress_ifindex=1)
    result = dry.programs[program].test_run(frame, context, data_out_size=len(frame) + 64)
    return SkbContext.from_buffer_copy(result.ctx_out)


def check(made: Made, dry: LoadedObject, r: random.Random) -> None:
    pod, peer, protocol, port = question(r)
    for way, program, ends, at in (
        ("Ingress", "to_pod", (peer, pod), 3),
        ("Egress", "from_pod", (pod, peer), 1),
    ):
        verdict: Verdict = made.model.verdict(*ends, port, protocol)
        side: Side = getattr(verdict, way.lower())
        number = NONE if side.rule_number is None else side.rule_number
        what = (way, ends, protocol, port, made.sets[way])
        look = made.looked(way, peer, NUMBERS[protocol], port)
        assert (look.allowed, look.rule) == (side.allowed, number), what
        assert (look.audit, look.audit_rule if look.audit else NONE) == audit_of(side), what
        after = ask(dry, program, frame_of(*ends, protocol, port))
        reason, bits = after.cb[0] & 255, after.cb[0] >> (16 if way == "Ingress" else 8) & 255
        denial = POLICY_DENY if side.why == "rule" else POLICY
        assert reason == (0 if verdict.allowed else denial), what
        assert after.cb[at + 1] == number & 0xFFFFFFFF, what
        assert (bits, after.priority) == (audit_of(side)[0], audit_of(side)[1] & 0xFFFFFFFF), what


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    with t.town() as made:
        yield made


@pytest.fixture(scope="module")
def dry(town: Town) -> Iterator[LoadedObject]:
    shared = {name: table for name, table in town.lab.maps.items() if name != "scratch"}
    with town.lab.file.load(pins=shared, rodata={**town.lab.rodata, "dry_run": 1}) as copied:
        yield copied


@pytest.mark.parametrize("part", range(3))
def test_model_entries_and_program_agree(town: Town, dry: LoadedObject, part: int) -> None:
    with campaign(f"entries-{part}", "verdicts by entries made at random") as figures:
        for seed in range(part, WORLDS, 3):
            made, r = Made(town, seed), random.Random(seed)
            for _ in range(QUESTIONS):
                check(made, dry, r)
                figures.count += 1


# ---- what a run leaves behind --------------------------------------------------------------

ANY, TCP = t.ANY, f.TCP
MAIN, BELOW, AUDITED = 0, 1 << 5, 2 << 5
DEVELOPER, ADMIN = 1 << 30, 1 << 31


def test_an_audit_denial_is_counted_and_reported_and_passes(town: Town) -> None:
    allow = {(ANY, TCP, 0, 8): (DEVELOPER, 3, 1)}
    deny = {(t.IDENTITY["a"], TCP, 80, AUDITED | 24): (DEVELOPER + 1, 9, 0)}
    town.open({"b<": Rules(allow | deny), "b>": Rules({}, isolated=False, audited=True)})
    town.events()
    before = town.lab.counters()
    a, b, c = t.IP4["a"], t.IP4["b"], t.IP4["c"]
    for hook, frame in (
        ("a>", f.packet(a, b, TCP)),
        ("b>", f.packet(b, c, TCP)),
        ("c>", f.packet(c, b, TCP)),
    ):
        verdict, _, _ = town.lab.run("from_pod", frame, t.IFINDEX[hook[0]])
        assert verdict != 2, hook
    ends = (town.pods["b"].id, 1, AUDIT)
    assert [(e.endpoint, e.flags, AUDIT, e.direction, e.reason, e.rule) for e in town.events()] == [
        (*ends, INGRESS, POLICY_DENY, 9),
        (*ends, EGRESS, POLICY, 0xFFFFFFFF),
    ]
    after = town.lab.counters()
    for direction in (INGRESS, EGRESS):
        assert after[AUDIT, direction] == before.get((AUDIT, direction), 0) + 1
    # A flow that is followed is not judged, so not reported again; a new epoch judges it once.
    town.lab.run("from_pod", t.segment("a", "b", 4, f.ACK), t.IFINDEX["a"])
    assert town.events() == []
    town.lab.bump()
    for _ in range(2):
        town.lab.run("from_pod", t.segment("a", "b", 4, f.ACK), t.IFINDEX["a"])
    assert [e.rule for e in town.events()] == [9]


def test_a_rule_that_logs_is_reported_once_a_flow(town: Town) -> None:
    town.open({"b<": Rules({(ANY, TCP, 0, 8): (DEVELOPER, 4, 1, 1)})})
    town.events()
    for _ in range(2):
        town.lab.run("from_pod", t.segment("a", "b", 4, f.ACK), t.IFINDEX["a"])
    assert [(e.reason, e.flags, e.direction, e.rule) for e in town.events()] == [(0, 2, INGRESS, 4)]


@pytest.mark.parametrize("version", [4, 6])
def test_an_echo_flow_is_judged_the_same_whenever_it_is(town: Town, version: int) -> None:
    """Only the request is allowed; its answers pass, also after the policy moved; an answer that
    nobody asked for does not, nor another type."""
    ip = t.IP4 if version == 4 else t.IP6
    number, ask_type, other = (f.ICMP, 8, 13) if version == 4 else (f.ICMPV6, 128, 140)
    key = (ANY, number, ask_type << 8, 24)
    town.open({"b<": Rules({key: (DEVELOPER, 0, 1)}), "b>": Rules()})
    a, b, name = ip["a"], ip["b"], "ICMP" if version == 4 else "ICMPv6"
    send = {
        "ask": ("a>", f.eth(f.ip(a, b, number, f.echo(a, b, 7)))),
        "answer": ("b>", f.eth(f.ip(b, a, number, f.echo(b, a, 7, reply=True)))),
        "unasked": ("a>", f.eth(f.ip(a, b, number, f.echo(a, b, 9, reply=True)))),
        "other": ("a>", frame_of(a, b, name, other << 8)),
    }
    for _ in range(3):
        assert town.reason(*send["ask"]) == 0
        assert town.reason(*send["answer"]) == 0
        town.lab.bump()
        assert town.reason(*send["answer"]) == 0
        assert town.reason(*send["unasked"]) == POLICY
        assert town.reason(*send["other"]) == POLICY
    town.switch({"b<": Rules({(ANY, number, other << 8, 24): (DEVELOPER, 0, 1)}), "b>": Rules()})
    assert town.reason(*send["ask"]) == POLICY
    assert town.reason(*send["answer"]) == POLICY
    assert town.reason(*send["other"]) == 0
    # Nothing says that a packet of this type the other way would be an answer.
    assert town.reason("b>", frame_of(b, a, name, other << 8)) == POLICY


def test_a_pass_needs_no_lane_below(town: Town) -> None:
    """The Admin tier passes on and nothing is below: the default decides."""
    passes = {(ANY, 0, 0, 0): (ADMIN, 0, 2)}
    for isolated, reason in ((True, POLICY), (False, 0)):
        town.open({"b<": Rules(passes, isolated=isolated)})
        assert town.reason("a>", f.packet(t.IP4["a"], t.IP4["b"], TCP)) == reason


def test_a_source_that_claims_to_be_the_node_is_no_host(town: Town) -> None:
    """This node's address on a packet that was made elsewhere: a node's, and no more."""
    town.open()
    town.lab.ipcache(t.IP4["n"], 4, peer=True, node=True, own=True)
    word = 0x03000000
    for entity, reason in ((word | 3, POLICY), (word | 2, 0)):
        town.switch({"b<": Rules({(entity, 0, 0, 0): (DEVELOPER, 0, 1)}), "b>": Rules()})
        frame = f.packet(t.IP4["n"], t.IP4["b"], TCP, sport=1000 + entity % 7)
        assert town.reason("b<", frame) == reason
        assert town.reason("b<", frame, host=True) == 0
    to_node = f.packet(t.IP4["b"], t.IP4["n"], TCP)
    for entity, reason in ((word | 2, POLICY), (word | 3, 0)):
        town.switch({"b>": Rules({(entity, 0, 0, 0): (DEVELOPER, 0, 1)})})
        assert town.reason("b>", to_node) == reason
