"""The generators: deterministic, valid, and adversarial enough to be worth running."""

from __future__ import annotations

import ipaddress
import json
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from support.clusters import (
    MAX_PODS,
    MAX_POLICIES,
    Manifests,
    RandomSource,
    clusters,
    documents,
    pod_key,
    probes,
    random_cluster,
    random_sequence,
    sequences,
    stand_in_addresses,
)
from support.oracle import Oracle, Pod, Verdict

SEEDS = range(150)


def with_addresses(cluster: Manifests) -> dict[str, Any]:
    return {**cluster, "addresses": stand_in_addresses(cluster)}


def campaign(seed: int, count: int = 60) -> list[Verdict]:
    cluster = with_addresses(random_cluster(seed))
    oracle = Oracle(cluster)
    return [
        oracle.verdict(probe.src, probe.dst, probe.port, probe.protocol)
        for probe in probes(cluster, RandomSource(seed), count)
    ]


def check_manifests(cluster: Manifests) -> None:
    """What an API server would check and a generator may get wrong."""
    assert len(cluster["pods"]) <= MAX_PODS
    assert len(cluster["policies"]) <= MAX_POLICIES
    names = [
        (d["kind"], d["metadata"].get("namespace", "default"), d["metadata"]["name"])
        for d in documents(cluster)
    ]
    assert len(set(names)) == len(names)
    for policy in cluster["policies"]:
        spec = policy["spec"]
        for rules, peers in (("ingress", "from"), ("egress", "to")):
            for rule in spec.get(rules) or []:
                for peer in rule.get(peers) or []:
                    check_peer({k: v for k, v in peer.items() if v is not None})
                for port in rule.get("ports") or []:
                    if port.get("endPort") is not None:
                        assert port["port"] <= port["endPort"] <= 65535


def check_peer(peer: dict[str, Any]) -> None:
    assert peer
    if "ipBlock" in peer:
        assert len(peer) == 1
        outer: Any = ipaddress.ip_network(peer["ipBlock"]["cidr"])
        for text in peer["ipBlock"].get("except") or []:
            inner: Any = ipaddress.ip_network(text)
            assert inner.subnet_of(outer)
            assert inner != outer


def test_equal_seeds_equal_clusters() -> None:
    assert random_cluster(7) == random_cluster(7)
    assert random_sequence(7, 5) == random_sequence(7, 5)
    assert random_cluster(7) != random_cluster(8)


def test_random_clusters_are_valid_and_survive_yaml() -> None:
    for seed in SEEDS:
        cluster = random_cluster(seed)
        check_manifests(cluster)
        text = yaml.safe_dump_all(documents(cluster))
        assert documents(cluster) == list(yaml.safe_load_all(text))


def test_the_campaign_meets_every_kind_of_verdict() -> None:
    """No bucket may be so rare that 50,000 verdicts would not exercise it."""
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        for answer in campaign(seed):
            seen["all"] += 1
            seen["allowed" if answer.allowed else "denied"] += 1
            seen["exempt " + answer.exempt] += 1
            seen["by an ingress rule"] += bool(answer.ingress_by)
            seen["by an egress rule"] += bool(answer.egress_by)
            seen["by several rules"] += len(answer.ingress_by) > 1
            seen["both ends isolated, allowed"] += bool(answer.ingress_by and answer.egress_by)
            seen["not isolated"] += not (answer.ingress_isolated_by or answer.egress_isolated_by)
            seen["denied by egress alone"] += bool(
                answer.egress_isolated_by and not answer.egress_by and answer.ingress_by
            )
    rare = {kind: n for kind, n in seen.items() if n * 200 < seen["all"]}
    assert rare == {}
    assert len(seen) == 12


SHAPES = [
    '"policyTypes": null',
    '"policyTypes": []',
    '"ingress": null',
    '"ingress": []',
    '"egress": [{}]',
    '"from": null',
    '"from": []',
    '"to": []',
    '"ports": null',
    '"ports": []',
    '"ports": [{}]',
    '"podSelector": {}',
    '"podSelector": null',
    '"namespaceSelector": {}',
    '"namespaceSelector": null',
    '"matchLabels": null',
    '"matchLabels": {}',
    '"except": null',
    '"except": [',
    '"operator": "In"',
    '"operator": "NotIn"',
    '"operator": "Exists"',
    '"operator": "DoesNotExist"',
    '"endPort": null',
    '"port": "web"',
    '"port": null',
    '"protocol": null',
    '"protocol": "SCTP"',
    '"hostNetwork": true',
    '"labels": null',
    '"labels": {}',
    '"kubernetes.io/metadata.name": ',
    "::/0",
]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_generated(shape: str) -> None:
    assert any(shape in text for text in ALL_TEXT)


ALL_TEXT = [json.dumps(random_cluster(seed)) for seed in range(600)]


def test_probes_are_near_the_policies_and_ask_about_pods() -> None:
    for seed in SEEDS:
        cluster = with_addresses(random_cluster(seed))
        taken = {ip for pair in cluster["addresses"].values() for ip in pair}
        for probe in probes(cluster, RandomSource(seed), 20):
            assert isinstance(probe.src, Pod) or isinstance(probe.dst, Pod)
            assert (probe.port is None) == probe.protocol.startswith("ICMP")
            for end in (probe.src, probe.dst):
                if type(end).__name__ == "Address":
                    assert end.ip not in taken  # type: ignore[union-attr]


def test_each_state_differs_from_the_last_by_one_event() -> None:
    for seed in range(40):
        states = random_sequence(seed, 6)
        assert len(states) == 7
        for before, after in pairwise(states):
            check_manifests(after)
            changed = [kind for kind in before if before[kind] != after[kind]]
            assert len(changed) <= 1
            assert before is not after


def test_stand_in_addresses_are_unique_but_for_the_nodes_own() -> None:
    cluster = random_cluster(3)
    own = [
        ip
        for pod in cluster["pods"]
        if not pod["spec"].get("hostNetwork")
        for ip in stand_in_addresses(cluster)[pod_key(pod)]
    ]
    assert len(set(own)) == len(own) > 0


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(clusters())
def test_hypothesis_clusters_are_valid(cluster: Manifests) -> None:
    check_manifests(cluster)
    oracle = Oracle(with_addresses(cluster))
    for probe in probes(with_addresses(cluster), RandomSource(1), 10):
        oracle.verdict(probe.src, probe.dst, probe.port, probe.protocol)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(sequences(4))
def test_hypothesis_sequences_are_valid(states: list[Manifests]) -> None:
    assert 2 <= len(states) <= 5
    for state in states:
        check_manifests(state)
