"""Limits of policies: each works whole, or is refused with a problem that names the limit."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from support.evaluator import Evaluator
from support.oracle_tiers import Packet
from support.tiers_case import documents
from tidegate_api.state import RuleSetSpec
from tidegate_operator import identities, world
from tidegate_operator.compile import Desired, compile
from tidegate_operator.compile.rules import MAX_RULE_SET_BYTES
from tidegate_operator.identities import EMPTY_LEDGER


def _pod(name: str, **labels: str) -> Any:
    spec = {"containers": [{"name": "c", "image": "x"}]}
    metadata = {"name": name, "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _policy(name: str, rules: list[Any]) -> Any:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": {"podSelector": {"matchLabels": {"app": "web"}}, "ingress": rules},
    }


def _compiled(*manifests: Any) -> tuple[Desired, dict[str, str]]:
    now = world.build(documents([_pod("web", app="web"), _pod("client", app="client"), *manifests]))
    desired = compile(now[0], identities.allocate(now[0], EMPTY_LEDGER))
    return desired, {name.name: pod.addresses[0] for name, pod in now[0].pods.items()}


def _spec(desired: Desired) -> RuleSetSpec:
    (found,) = desired.rule_sets.values()
    return found.spec


def _judge(desired: Desired) -> Evaluator:
    endpoints = {name: node.endpoints for name, node in desired.nodes.items()}
    return Evaluator(desired.rule_sets, endpoints, desired.ipcache.values(), desired.peers)


@functools.cache
def _many_rules(count: int) -> tuple[Desired, dict[str, str]]:
    """`count` rules, of which none is another."""
    rules = [
        {"from": [{"ipBlock": {"cidr": f"198.{18 + n // 65536}.{n // 256 % 256}.{n % 256}/32"}}]}
        for n in range(count)
    ]
    return _compiled(_policy("many", rules))


def test_ten_thousand_rules_are_one_rule_set() -> None:
    desired, _ = _many_rules(10_000)
    assert len(_spec(desired).terms) == len(_spec(desired).rules) == 10_000
    assert [p for p in desired.problems if p.severity == "error"] == []


def test_65537_rules_are_refused_whole_by_name_and_closed() -> None:
    desired, addresses = _many_rules(65_537)
    (problem,) = [p for p in desired.problems if p.severity == "error"]
    assert str(MAX_RULE_SET_BYTES) in problem.message
    assert problem.object == "NetworkPolicy default/many"
    assert [term.action for term in _spec(desired).terms] == ["Deny"]
    judge = _judge(desired)
    for peer in ("198.18.0.0", "198.19.0.0", addresses["client"]):
        assert not judge.side("Ingress", addresses["web"], peer, Packet("TCP", 80)).allowed
    assert judge.side("Ingress", addresses["client"], addresses["web"], Packet("TCP", 80)).allowed


def test_5000_selectors_pick_each_their_own() -> None:
    rules = [
        {"from": [{"podSelector": {"matchLabels": {f"key-{n}": "x"}}}], "ports": [{"port": n + 1}]}
        for n in range(5_000)
    ]
    desired, addresses = _compiled(_policy("many", rules), _pod("one", **{"key-4711": "x"}))
    assert len(desired.peers) == 5_000
    assert [p for p in desired.problems if p.severity == "error"] == []
    judge = _judge(desired)
    allowed = [
        port
        for port in (1, 4711, 4712, 4713, 5000)
        if judge.side("Ingress", addresses["web"], addresses["one"], Packet("TCP", port)).allowed
    ]
    assert allowed == [4712]


def test_1000_networks_with_nested_excepts() -> None:
    blocks = [
        {"cidr": f"198.{18 + n // 256}.{n % 256}.0/24",
         "except": [f"198.{18 + n // 256}.{n % 256}.{8 * part}/29" for part in range(31)]}
        for n in range(1_000)
    ]  # fmt: skip
    blocks[0]["except"] += ["198.18.0.0/30", "198.18.0.1/32"]
    spec = {
        "subject": {"podSelector": {"matchLabels": {"app": "web"}}},
        "isolates": ["Ingress"],
        "mode": "Enforce",
        "ingress": [{"action": "Allow", "peers": [{"cidrs": blocks}], "ports": [{"any": True}]}],
    }
    desired, addresses = _compiled(
        {
            "apiVersion": "tidegate.dev/v1alpha1",
            "kind": "TrafficPolicy",
            "metadata": {"name": "many"},
            "spec": spec,
        }
    )
    assert [p for p in desired.problems if p.severity == "error"] == []
    assert len(_spec(desired).terms) == 1_000
    judge = _judge(desired)
    allowed = {
        peer: judge.side("Ingress", addresses["web"], peer, Packet("UDP", 1)).allowed
        for peer in ("198.18.0.1", "198.18.0.247", "198.18.0.248", "198.21.231.255", "198.21.232.0")
    }
    assert list(allowed.values()) == [False, False, True, True, False]


@pytest.mark.parametrize(("port", "expected"), [(1, True), (65535, True), (0, False)])
def test_all_ports_are_a_range_and_no_more(port: int, expected: bool) -> None:
    desired, addresses = _compiled(_policy("all", [{"ports": [{"port": 1, "endPort": 65535}]}]))
    judge = _judge(desired)
    packet = Packet("TCP", port)
    assert judge.side("Ingress", addresses["web"], "192.0.2.1", packet).allowed == expected
    assert not judge.side("Ingress", addresses["web"], "192.0.2.1", Packet("ICMP")).allowed


def test_a_pod_with_every_label_that_it_may_have() -> None:
    labels = {f"example.com/key-{n}": "v" * 63 for n in range(1_000)}
    wanted = {"matchLabels": {key: labels[key] for key in list(labels)[:200]}}
    desired, addresses = _compiled(
        _policy("deep", [{"from": [{"podSelector": wanted}]}]), _pod("deep", **labels)
    )
    judge = _judge(desired)
    for name, expected in (("deep", True), ("client", False)):
        found = judge.side("Ingress", addresses["web"], addresses[name], Packet("TCP", 1))
        assert found.allowed == expected
