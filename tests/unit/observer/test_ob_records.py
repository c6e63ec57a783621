"""Records as the programs write them → flows, joined with who is who."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from tidegate_api.state import (
    API_VERSION,
    AnyPeer,
    Meta,
    PolicyRef,
    Rule,
    RuleSet,
    RuleSetSpec,
    Term,
)
from tidegate_bpf import Codec, ObjectFile
from tidegate_observer.directory import EVERY_NODE_4, L4_ONLY, NO_RULE, Directory
from tidegate_observer.flow import Kind, Service, address_bytes
from tidegate_observer.messages import flow_message
from tidegate_observer.records import Denials, Flows
from unit.observer.flows import DB, WEB, flow

SPEC = ObjectFile(Path(__file__).parents[3] / "datapath" / "build" / "pod.o")
NOBODY = bytes(16)
A, B, VIP = map(address_bytes, ("10.0.0.1", "fd00::2", "10.96.0.1"))

RULES = RuleSet(
    api_version=API_VERSION,
    kind="RuleSet",
    metadata=Meta(name="r"),
    spec=RuleSetSpec(
        format=2,
        direction="Ingress",
        policies=[PolicyRef(kind="NetworkPolicy", namespace="data", name="n")],
        others=[
            PolicyRef(kind="ClusterNetworkPolicy", name="admin"),
            PolicyRef(kind="TrafficPolicy", namespace="data", name="try"),
        ],
        audited=[1],
        rules=[Rule(policy=0, index=0), Rule(policy=1, index=3)],
        terms=[Term(peer=AnyPeer(), action="Allow", precedence=1, rule=1, protocol="TCP", port=80)],
    ),
)


@pytest.fixture
def directory() -> Directory:
    made = Directory()
    made.addresses = {A: WEB, B: DB}
    made.rule_sets = {9: RULES}
    made.services = {(VIP, 80, 6): Service("data", "svc")}
    made.interfaces = {5: "veth5"}
    return made


def record(struct: str, **fields: Any) -> bytes:
    codec = Codec(SPEC.layout(struct))
    values: dict[str, Any] = dict.fromkeys(codec.names, 0)
    for name in ("src", "dst", "frontend"):
        if name in values:
            values[name] = NOBODY
    data = codec.pack(**(values | fields))
    return bytes(8) + data


def denial(directory: Directory, **fields: Any) -> Any:
    plain = {"time": 5, "src": A, "dst": B, "sport": 1000, "dport": 80, "protocol": 6}
    plain |= {"reason": 133, "src_identity": 300, "dst_identity": 301}
    (found,) = Denials(SPEC, "node-1").flows(record("tg_event", **(plain | fields)), 100, directory)
    return found


def names(decision: Any) -> list[str]:
    return [policy.name for policy in decision.policies]


def test_a_denial(directory: Directory) -> None:
    found = denial(directory, rule_set=9, rule=NO_RULE, tcp_flags=2, ifindex=4)
    assert (found.node, found.time, found.kind, found.reason) == ("node-1", 105, Kind.DENIED, 133)
    assert (found.source, found.destination) == (WEB, DB)
    assert (found.source_port, found.destination_port) == (1000, 80)
    assert names(found.ingress) == ["n"]
    assert found.egress is None


def test_a_denial_by_a_rule_of_the_other_end(directory: Directory) -> None:
    found = denial(directory, rule_set=9, rule=1, direction=1)
    assert (names(found.egress), found.ingress) == (["admin"], None)
    assert (found.egress.rule, found.egress.match) == (1, L4_ONLY)


def test_an_audit_names_the_policies_in_audit_mode(directory: Directory) -> None:
    found = denial(directory, rule_set=9, rule=NO_RULE, flags=1)
    assert (found.kind, names(found.ingress)) == (Kind.AUDITED, ["try"])


def test_what_a_rule_wants_logged_is_no_event_of_its_own(directory: Directory) -> None:
    data = record("tg_event", flags=2)
    assert Denials(SPEC, "n").flows(data, 0, directory) == []


def test_who_has_an_address_is_believed_if_the_identity_agrees(directory: Directory) -> None:
    assert denial(directory).source is WEB
    world = denial(directory, src_identity=2).source
    assert (world.identity, world.pod, world.labels) == (2, "", ("reserved:world",))
    changing = denial(directory, src_identity=999).source
    assert changing == replace(WEB, identity=999)


def test_strangers_cost_no_memory(directory: Directory) -> None:
    ends = {
        id(denial(directory, src=n.to_bytes(16, "big"), src_identity=2).source) for n in range(1000)
    }
    assert len(ends) == 1


def test_what_is_missing_is_asked_for() -> None:
    made: list[tuple[str, Any]] = []

    def missing(what: str, which: Any) -> bool:
        made.append((what, which))
        if what == "rule set":
            directory.rule_sets[which] = RULES
        return what == "rule set"

    directory = Directory(missing)
    assert names(denial(directory, rule_set=9, rule=NO_RULE).ingress) == ["n"]
    assert ("rule set", 9) in made
    assert ("address", A) in made


def test_a_start_and_an_end(directory: Directory) -> None:
    plain = {"src": A, "dst": B, "sport": 1000, "dport": 8080, "protocol": 6, "start": 3}
    start = record(
        "tg_flow_event",
        **plain,
        time=3,
        ifindex=5,
        cookie=7,
        cgroup=8,
        frontend=VIP,
        frontend_port=80,
        src_identity=300,
        dst_identity=301,
        src_rule=NO_RULE,
        dst_rule_set=9,
        dst_rule=0,
        direction=1,
    )
    end = record(
        "tg_flow_event",
        **plain,
        time=50,
        kind=1,
        tcp_flags=0x11,
        packets=5,
        bytes=400,
        reply_packets=4,
        reply_bytes=300,
        src_identity=NO_RULE,
        dst_identity=NO_RULE,
    )
    first, last = Flows(SPEC, "node-1", 9).flows(start + end, 0, directory)
    assert (first.kind, first.cookie, first.cgroup, first.direction) == (Kind.START, 7, 8, 1)
    assert first.service == Service("data", "svc")
    assert first.asked == last.asked == (VIP, 80, 6)
    assert (first.egress, names(first.ingress)) == (None, ["n"])
    assert (last.kind, last.source, last.destination) == (Kind.END, WEB, DB)
    assert (last.egress, names(last.ingress)) == (None, ["n"])
    assert (first.interface_name, last.interface_name) == ("veth5", "")
    counts = last.counts
    assert (counts.packets, counts.bytes, counts.nanoseconds, counts.closed) == (5, 400, 47, "fin")


def test_a_node_port_is_asked_at_a_nodes_address(directory: Directory) -> None:
    """Which only the kernel knows: what goes to its port anywhere else is for no Service."""
    node = bytes(10) + b"\xff\xff\xac\x12\x00\x02"
    directory.services[EVERY_NODE_4, 30080, 6] = Service("data", "outer")
    plain = {"src": A, "dst": B, "sport": 1000, "dport": 30080, "protocol": 6, "start": 3}
    asked = record("tg_flow_event", **plain, frontend=node, frontend_port=30080)
    other = record("tg_flow_event", **plain)
    first, last = Flows(SPEC, "node-1").flows(asked + other, 0, directory)
    assert (first.service, first.asked) == (Service("data", "outer"), (node, 30080, 6))
    assert (last.service, last.asked) == (None, None)


def test_rule_sets_outlive_their_switch_for_a_while(directory: Directory) -> None:
    directory.rule_sets = dict.fromkeys(range(1, 1001), RULES)
    directory.in_force([1000])
    assert 1000 in directory.rule_sets
    assert 999 in directory.rule_sets
    assert 1 not in directory.rule_sets
    assert len(directory.rule_sets) == 257


def test_denials_that_were_only_counted_say_how_many() -> None:
    made = flow_message(flow(more=41), "1")
    assert made.Summary.endswith("; 41 more like this one")
    assert made.aggregate.ingress_flow_count == 41
    assert not flow_message(flow(), "1").HasField("aggregate")
