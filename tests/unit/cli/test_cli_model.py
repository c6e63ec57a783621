"""The verdict model: rows of what the state says, and every verdict against the oracle's."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import oracle as judge
from support.clusters import Manifests, Probe, RandomSource, clusters, documents, probes
from support.oracle import Address, End, Host, Oracle
from tidegate_api import API_VERSION
from tidegate_api.state import (
    FORMAT,
    AnyPeer,
    Backend,
    CIDRPeer,
    Endpoint,
    Frontend,
    IPCacheEntry,
    Meta,
    NodeState,
    NodeStateSpec,
    Peer,
    PeerSet,
    PolicyRef,
    Rule,
    RuleSet,
    RuleSetSpec,
    ServicePort,
    SetPeer,
    StateObject,
    StateSlice,
    StateSliceSpec,
    Term,
    rule_set,
)
from tidegate_cli.judgement import RuleRef
from tidegate_cli.lookup import ALLOW, MAX_SHAPES, Look, Question, Rules, check
from tidegate_cli.model import Model, ModelError, Side
from tidegate_loader import addresses
from tidegate_loader.rules import PROTOCOLS, expand
from tidegate_operator import identities, publish, world
from tidegate_operator.compile import compile
from tidegate_operator.identities import EMPTY_LEDGER
from tidegate_operator.manifests import Folder
from tidegate_operator.objects import World

A, B = (
    PolicyRef(kind="NetworkPolicy", namespace="n", name="a"),
    PolicyRef(kind="NetworkPolicy", namespace="n", name="b"),
)
POD, PEER, LOST = "10.244.0.2", "10.244.1.2", "10.244.9.9"


def term(peer: Peer, rule: int = 0, **rest: Any) -> Term:
    fields = {"action": "Allow", "precedence": 10, **rest}
    return Term(peer=peer, rule=rule, **fields)


def isolated(direction: str, *terms: Term) -> RuleSet:
    rules = [Rule(policy=0, index=0), Rule(policy=1, index=3)]
    return rule_set(
        RuleSetSpec(
            format=FORMAT, direction=direction, policies=[A, B], rules=rules, terms=list(terms)
        )
    )


def endpoint(name: str, identity: int, address: str, **rule_sets: str) -> Endpoint:
    six = f"fd00::{identity}"
    return Endpoint(f"u-{name}", "n", name, identity, [address, six], **rule_sets)


def part(table: str, **content: Any) -> StateSlice:
    spec = StateSliceSpec(
        format=FORMAT, table=table, epoch=1, shard=0, shards=1, revision=1, **content
    )
    return StateSlice(
        api_version=API_VERSION, kind="StateSlice", metadata=Meta(name=table), spec=spec
    )


def node(name: str, *endpoints: Endpoint) -> NodeState:
    spec = NodeStateSpec(FORMAT, "Enforcing", list(endpoints), [], [], {})
    return NodeState(api_version=API_VERSION, kind="NodeState", metadata=Meta(name=name), spec=spec)


def state(*terms: Term, direction: str = "Ingress") -> list[StateObject]:
    """Pod n/pod on one node is isolated; pod n/peer on the other is not."""
    held = isolated(direction, *terms)
    names = {direction.lower(): held.metadata.name}
    return [
        held,
        node("one", endpoint("pod", 300, POD, **names)),
        node("two", endpoint("peer", 301, PEER)),
        part("peers", peers=[PeerSet("friends", "app=x", [0, 301]), PeerSet("none", "app=y", [])]),
        part(
            "ipcache",
            ipcache=[
                IPCacheEntry(cidr="10.244.0.0/16", identity=0),
                IPCacheEntry(cidr=f"{POD}/32", identity=300, node="one"),
                IPCacheEntry(cidr=f"{PEER}/32", identity=301, node="two"),
            ],
        ),
        part(
            "services",
            services=[
                ServicePort(
                    "n",
                    "svc",
                    "ClusterIP",
                    [Frontend(address="10.96.0.1", port=80, protocol="TCP")],
                    [Backend(POD, 8080), Backend(PEER, 8080)],
                )
            ],
        ),
    ]


@pytest.mark.parametrize(
    ("reason", "terms", "source", "port", "protocol", "expected"),
    [
        ("no term: default deny", [], PEER, 80, "TCP", None),
        ("any peer", [term(AnyPeer())], PEER, 80, "TCP", 0),
        ("any peer, unknown too", [term(AnyPeer())], LOST, 80, "TCP", 0),
        ("no port means ICMP too", [term(AnyPeer())], PEER, None, "ICMP", 0),
        ("member of a set", [term(SetPeer("friends"))], PEER, 80, "TCP", 0),
        ("not a member", [term(SetPeer("none"))], PEER, 80, "TCP", None),
        ("unknown is in no set", [term(SetPeer("friends"))], LOST, 80, "TCP", None),
        ("by address", [term(CIDRPeer("10.244.1.0/24"))], PEER, 80, "TCP", 0),
        ("excepted", [term(CIDRPeer("10.0.0.0/8", [PEER + "/32"]))], PEER, 80, "TCP", None),
        ("IPv4 is not in ::/0", [term(CIDRPeer("::/0"))], PEER, 80, "TCP", None),
        ("unknown has no address", [term(CIDRPeer("0.0.0.0/0"))], LOST, 80, "TCP", None),
        ("world has one", [term(CIDRPeer("0.0.0.0/0"))], "8.8.8.8", 80, "TCP", 0),
        ("the protocol", [term(AnyPeer(), protocol="UDP")], PEER, 80, "TCP", None),
        ("protocol without port", [term(AnyPeer(), protocol="TCP")], PEER, 1, "TCP", 0),
        ("the port", [term(AnyPeer(), protocol="TCP", port=81)], PEER, 80, "TCP", None),
        ("port of every protocol", [term(AnyPeer(), port=80)], PEER, 80, "SCTP", 0),
        ("with a port: no ICMP", [term(AnyPeer(), port=80)], PEER, None, "ICMP", None),
        ("range", [term(AnyPeer(), port=80, end_port=90)], PEER, 90, "TCP", 0),
        ("past the range", [term(AnyPeer(), port=80, end_port=90)], PEER, 91, "TCP", None),
        ("lowest rule", [term(AnyPeer(), 1), term(SetPeer("friends"))], PEER, 80, "TCP", 0),
        (
            "precedence first",
            [term(AnyPeer(), 1, precedence=11), term(SetPeer("friends"))],
            PEER,
            80,
            "TCP",
            1,
        ),
    ],
)
def test_who_is_let_in(
    reason: str,
    terms: list[Term],
    source: str,
    port: int | None,
    protocol: str,
    expected: int | None,
) -> None:
    verdict = Model.from_objects(state(*terms)).verdict(source, POD, port, protocol)
    assert verdict.ingress.rule_number == expected, reason
    assert verdict.allowed == (expected is not None)
    assert verdict.ingress.why == ("default-deny" if expected is None else "rule")
    assert verdict.ingress.policies == (A, B)
    refs = [RuleRef(A, "Ingress", 0), RuleRef(B, "Ingress", 3)]
    assert verdict.ingress.rule == (None if expected is None else refs[expected])


def test_a_deny_that_ranks_higher_wins() -> None:
    terms = [term(AnyPeer()), term(SetPeer("friends"), 1, precedence=11, action="Deny")]
    verdict = Model.from_objects(state(*terms)).verdict(PEER, POD, 80, "TCP")
    assert (verdict.allowed, verdict.ingress.why, verdict.ingress.rule_number) == (False, "rule", 1)


def test_the_node_itself_and_the_pod_itself_are_never_kept_out() -> None:
    model = Model.from_objects(state())
    assert model.verdict("172.18.0.2", POD, 80, "TCP", from_host=True).ingress.why == "host"
    assert not model.verdict("172.18.0.2", POD, 80, "TCP").allowed
    own = model.verdict(POD, POD, 80, "TCP")
    assert (own.allowed, own.egress.why, own.ingress.why) == (True, "self", "self")


def test_egress_is_the_sources() -> None:
    model = Model.from_objects(state(term(CIDRPeer("8.8.8.8/32")), direction="Egress"))
    assert model.verdict(POD, "8.8.8.8", 53, "UDP").allowed
    denied = model.verdict(POD, PEER, 80, "TCP")
    assert (denied.allowed, denied.egress.why, denied.ingress.why) == (
        False,
        "default-deny",
        "default-allow",
    )
    assert model.verdict(PEER, "8.8.8.8", 53, "UDP").ingress.why == "no-endpoint"


def test_a_service_is_judged_at_each_backend() -> None:
    model = Model.from_objects(state(term(AnyPeer(), protocol="TCP", port=80)))
    found = model.expected("peer", "svc", 80, "TCP")
    assert found.frontend == ("10.96.0.1", 80)
    assert [(a.address, a.port, a.verdict.allowed) for a in found.answers] == [
        (POD, 8080, False),
        (PEER, 8080, True),
    ]
    assert found.allowed is None
    assert model.expected("peer", "10.96.0.1", 80, "TCP") == found
    assert model.expected("peer", "n/pod", 80, "TCP").allowed is True
    assert model.expected("peer", "pod/n/pod", 80, "TCP", family=6).source == "fd00::301"


@pytest.mark.parametrize(
    ("source", "target", "port", "said"),
    [
        ("zzz", "pod", 80, "no pod 'zzz'; there are n/peer, n/pod"),
        ("pods", "pod", 80, "did you mean n/pod"),
        ("p", "pod", 80, "is not one: n/peer, n/pod"),
        ("pod", "svc", 81, "has no port 81/TCP; it has 80/TCP"),
        ("pod", "svc/n/none", 80, "no service 'n/none'"),
    ],
)
def test_questions_without_an_answer(source: str, target: str, port: int, said: str) -> None:
    with pytest.raises(ModelError, match=said.replace("(", r"\(")):
        Model.from_objects(state()).expected(source, target, port, "TCP")


# ---- against the oracle, and the look-up against the model --------------------------------

VERDICTS_A_CLUSTER = 40


class _Struct:
    """Stands for a codec: fields in order, as text."""

    def __init__(self, *names: str) -> None:
        self._row = dataclasses.make_dataclass("Row", names)

    def pack(self, **fields: Any) -> bytes:
        values = vars(self._row(**fields)).values()
        return repr(tuple(values)).encode()

    def unpack(self, data: bytes) -> Any:
        return self._row(*eval(data))  # noqa: S307 - what `pack` wrote


RULE_KEY = _Struct("peer", "port", "protocol", "prefix")
RULE = _Struct("precedence", "rule", "action", "flags")
PREFIX = _Struct("bits", "addr")


@dataclasses.dataclass
class _Policy:
    """A tg_policy row."""

    flags: int
    rule_set: int
    slot: int
    shapes: bytes
    counts: bytes


def looked_up(model: Model, side: Side, question: Question) -> Look:
    """What the maps that the loader makes of the side's rule set say."""
    held = expand(model.rule_sets[side.rule_set], model.peers)
    entries = {
        RULE_KEY.pack(peer=w, port=port, protocol=p, prefix=bits): RULE.pack(
            precedence=value[0], rule=value[1], action=value[2], flags=value[3]
        )
        for (w, p, port, bits), value in held.entries.items()
    }

    def longest(key: bytes) -> bytes | None:
        asked = PREFIX.unpack(key)
        for bits in range(128, -1, -1):
            number = held.cidr.get((bits, addresses.mask(asked.addr, bits)))
            if number is not None:
                return number.to_bytes(4, "little")
        return None

    trie = longest if held.cidr else None
    rules = Rules(entries.get, trie, RULE_KEY, RULE, PREFIX)
    shapes = b"".join(bytes(lane).ljust(MAX_SHAPES, b"\0") for lane in held.shapes)
    policy = _Policy(held.flags, 1, 0, shapes, bytes(map(len, held.shapes)))
    return check(policy, rules, question)


def build(cluster: Manifests) -> tuple[World, Model]:
    with tempfile.TemporaryDirectory() as directory:
        text = yaml.safe_dump_all(documents(cluster))
        Path(directory, "all.yaml").write_text(text)
        read = Folder(Path(directory)).read()
    now, _ = world.build(read.documents, world.Options(nodes=2))
    ledger = identities.allocate(now, EMPTY_LEDGER)
    return now, Model.from_objects(publish.render(compile(now, ledger), ledger))


def place(now: World, end: End, family: int) -> str:
    if not isinstance(end, judge.Pod):
        return end.ip
    found = now.pods[(end.namespace, end.name)]  # type: ignore[index]
    return next(a for a in found.addresses if (":" in a) == (family == 6))


def on_its_node(now: World, src: End, dst: str) -> bool:
    """Whether the packet is made by the node on which its receiver lives."""
    if isinstance(src, Host):
        return True
    if not isinstance(src, judge.Pod):
        return False
    pod = now.pods[(src.namespace, src.name)]  # type: ignore[index]
    there = [p.node for p in now.pods.values() if dst in p.addresses and not p.host_network]
    return pod.host_network and [pod.node] == there


def family_of(probe: Probe) -> int:
    return next(
        (
            6 if ":" in end.ip else 4
            for end in (probe.src, probe.dst)
            if not isinstance(end, judge.Pod)
        ),
        getattr(probe.src, "family", 0) or 4,
    )


def compare(now: World, model: Model, asked: Oracle, probe: Probe) -> bool:
    """False: not comparable. Asserts that model, oracle and maps agree."""
    family = family_of(probe)
    src, dst = place(now, probe.src, family), place(now, probe.dst, family)
    from_host = on_its_node(now, probe.src, dst)
    for own, peer in ((src, dst), (dst, src)):
        owner = model.owner(own)
        # The oracle knows no address that belongs to nobody yet.
        if owner is not None and model.identity(peer, owner.node) == 0:
            return False
    found = model.verdict(src, dst, probe.port, probe.protocol, from_host=from_host)
    wanted = asked.verdict(probe.src, probe.dst, probe.port, probe.protocol)
    assert found.allowed == wanted.allowed, probe
    if wanted.exempt == "self":
        assert found.egress.why == found.ingress.why == "self"
        return True
    sides: Mapping[str, Side] = {"egress": found.egress, "ingress": found.ingress}
    for direction, side in sides.items():
        by = {(r.namespace, r.name, r.index) for r in getattr(wanted, f"{direction}_by")}
        held = {(p.namespace, p.name) for p in getattr(wanted, f"{direction}_isolated_by")}
        if side.why == "host":
            continue
        assert {(p.namespace, p.name) for p in side.policies} == held, probe
        if side.rule is not None:
            policy = side.rule.policy
            assert (policy.namespace, policy.name, side.rule.index) in by, probe
        else:
            assert not by, probe
        if side.rule_set:
            own, peer = (src, dst) if direction == "egress" else (dst, src)
            owner = model.owner(own)
            assert owner is not None
            number = PROTOCOLS.get(probe.protocol, 1)
            who = model.identity(peer, owner.node)
            look = looked_up(
                model, side, Question(addresses.pack(peer), who, number, probe.port or 0)
            )
            rule = -1 if side.rule_number is None else side.rule_number
            assert (look.allowed, look.rule) == (side.allowed, rule), probe
            assert look.value is None or RULE.unpack(look.value).action == ALLOW
    return True


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(clusters(), st.integers(0, 1 << 30))
def test_model_oracle_and_maps_agree(cluster: Manifests, seed: int) -> None:
    now, model = build(cluster)
    given_addresses = {str(name): list(pod.addresses) for name, pod in now.pods.items()}
    whole: dict[str, Any] = {
        **cluster,
        "addresses": given_addresses,
        "nodes": {str(name): pod.node for name, pod in now.pods.items()},
    }
    asked = Oracle(whole)
    for probe in probes(whole, RandomSource(seed), VERDICTS_A_CLUSTER):
        if isinstance(probe.dst, Address) and probe.dst.ip in ("0.0.0.0", "::"):
            continue
        compare(now, model, asked, probe)
