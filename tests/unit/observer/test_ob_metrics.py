"""Figures: what is counted, that labels stay few, and that the text is Prometheus'."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tidegate_observer import metrics, standing
from tidegate_observer.agent import AgentEvent
from tidegate_observer.api import flow_pb2
from tidegate_observer.exposition import Exposition
from tidegate_observer.flow import Counts, Decision, End, Kind, Lost, Policy, Service
from tidegate_observer.metrics import Metrics
from tidegate_observer.rundir import RunDirSource
from unit.observer.flows import DB, SECOND, SHOP_WEB, WEB, WORLD, flow, started
from unit.observer.test_ob_records import RULES

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(made: Metrics) -> Samples:
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(made.text().decode())
        for s in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float | None:
    return found.get((name, tuple(sorted(labels.items()))))


def test_what_is_counted() -> None:
    made = Metrics()
    ended = Counts(3, 300, 2, 200, 20_000_000, "rst")
    made.add(
        [
            flow(),
            flow(destination=WORLD),
            started(service=SHOP_WEB, destination_port=8080),
            started(kind=Kind.END, service=SHOP_WEB, counts=ended),
            Lost("node-1", 2 * SECOND, 9, SECOND),
            Lost("node-1", 2 * SECOND, 4, SECOND, queued=True),
        ]
    )
    made.programs = {(133, 1): (5, 500), (133, 0): (2, 200), (0, 1): (9, 900), (254, 0): (7, 0)}
    made.programs |= {(230, 0): (3, 300), (231, 1): (4, 400)}
    found = samples(made)
    drop = {"type": "Drop", "subtype": "POLICY_DENIED", "verdict": "DROPPED"}
    assert value(found, "hubble_flows_processed_total", **drop) == 2
    assert value(found, "hubble_drop_total", reason="POLICY_DENIED", protocol="TCP") == 2
    assert value(found, "hubble_flows_to_world_total", protocol="TCP", verdict="DROPPED") == 1
    assert value(found, "hubble_port_distribution_total", protocol="TCP", port="8080") == 1
    assert value(found, "hubble_tcp_flags_total", flag="SYN", family="IPv4") == 4
    assert value(found, "hubble_lost_events_total", source="PERF_EVENT_RING_BUFFER") == 9
    assert value(found, "hubble_lost_events_total", source="OBSERVER_EVENTS_QUEUE") == 4
    one = {"reason": "POLICY_DENIED", "direction": "EGRESS"}
    assert value(found, "cilium_drop_count_total", **one) == 5
    assert value(found, "cilium_drop_bytes_total", **one) == 500
    assert value(found, "cilium_forward_count_total", direction="EGRESS") == 9
    by = {"kind": "NetworkPolicy", "namespace": "data", "policy": "default-deny"}
    assert (
        value(
            found, "tidegate_policy_denied_total", **by, direction="ingress", reason="POLICY_DENIED"
        )
        == 2
    )
    web = {"namespace": "shop", "service": "web"}
    assert value(found, "tidegate_service_connections_total", **web) == 1
    assert value(found, "tidegate_service_resets_total", **web) == 1
    name = "tidegate_service_duration_seconds_bucket"
    assert value(found, name, **web, le="0.01") == 0
    assert value(found, name, **web, le="0.05") == 1
    for way, packets in (("request", 3), ("reply", 2)):
        assert value(found, "tidegate_service_packets_total", **web, way=way) == packets
        assert value(found, "tidegate_service_bytes_total", **web, way=way) == 100 * packets
    dropped = [key for key in found if "cilium_drop_count_total" in str(key)]
    assert len(dropped) == 2, "what is merely counted is no drop"
    assert value(found, "tidegate_flows_ended_total", how="rst") == 1
    assert not [key for key in found if "254" in str(key)]


def test_what_is_in_force(tmp_path: Path) -> None:
    node = tmp_path / "nodes" / "n"
    node.mkdir(parents=True)
    ends = {
        str(number): {"id": number, "namespace": "a", "name": "p", "identity": 300} | sets
        for number, sets in enumerate(
            ({}, {"ingress": 9}, {"egress": 9}, {"ingress": 9, "egress": 8})
        )
    }
    (node / "realised.json").write_text(json.dumps({"endpoints": ends}))
    source = RunDirSource(tmp_path, "n")
    source.refresh()
    source.directory.rule_sets, source.directory.current = {9: RULES}, frozenset({9})
    cidr = End(301, labels=("cidr:198.51.100.0/24",))
    source.directory.identities = {300: WEB, 301: cidr, 302: DB}
    made = Metrics()
    made.changes.standing = standing.look([source, source])
    types = ["POLICY_UPDATED", "POLICY_DELETED", "ENDPOINT_CREATED", "ENDPOINT_DELETED"]
    types += ["IPCACHE_UPSERTED", "SERVICE_DELETED", "AGENT_STARTED"]
    made.changes.add(
        AgentEvent("n", 1, flow_pb2.AgentEvent(type=flow_pb2.AgentEventType.Value(name)))
        for name in types
    )
    found = samples(made)
    assert value(found, "cilium_endpoint") == 8
    assert value(found, "cilium_endpoint_state", endpoint_state="ready") == 8
    for word in standing.ENFORCEMENTS:
        name = "cilium_policy_endpoint_enforcement_status"
        assert value(found, name, enforcement=word) == 2
    assert value(found, "cilium_policy") == 3
    assert value(found, "cilium_policy_max_revision") == 2
    assert value(found, "cilium_policy_change_total", outcome="success") == 2
    assert value(found, "cilium_endpoint_regenerations_total", outcome="success") == 1
    assert value(found, "cilium_identity", type="cluster_local") == 2
    assert value(found, "cilium_identity", type="cidr") == 1
    assert value(found, "cilium_ipcache_events_total", type="upsert") == 1
    assert value(found, "cilium_ipcache_events_total", type="delete") == 0
    assert value(found, "cilium_services_events_total", action="delete") == 1


def test_network_programming_latency() -> None:
    made = Metrics()
    name = "kubeproxy_network_programming_duration_seconds"
    assert value(samples(made), f"{name}_count") == 0
    made.programming = ([2, 0, 3, *([0] * (len(metrics.PROGRAMMING) - 3)), 1], 12.5)
    found = samples(made)
    assert value(found, f"{name}_bucket", le="0.25") == 2
    assert value(found, f"{name}_bucket", le="1.0") == 5
    assert value(found, f"{name}_bucket", le="300.0") == 5
    assert value(found, f"{name}_bucket", le="+Inf") == value(found, f"{name}_count") == 6
    assert value(found, f"{name}_sum") == 12.5


@pytest.mark.parametrize("limit", ["MAX_POLICIES", "MAX_SERVICES", "MAX_PORTS"])
def test_labels_are_bounded(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, limit, 5)
    made = Metrics()
    for number in range(100):
        policy = Policy("NetworkPolicy", "data", f"p{number}")
        made.add(
            [
                flow(ingress=Decision((policy,), -1)),
                started(service=Service("s", f"svc{number}"), destination_port=1000 + number),
            ]
        )
    name = {
        "MAX_POLICIES": "tidegate_policy_denied_total",
        "MAX_SERVICES": "tidegate_service_connections_total",
        "MAX_PORTS": "hubble_port_distribution_total",
    }[limit]
    mine = {key: count for key, count in samples(made).items() if key[0] == name}
    assert len(mine) == 6
    assert sum(mine.values()) == 100
    assert max(mine.values()) == 95


def test_served_by_http() -> None:
    made = Metrics()
    made.add([flow()])
    with Exposition(made, "127.0.0.1:0") as shown:
        assert shown._server is not None
        port = shown._server.server_address[1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            assert b"hubble_drop_total" in answer.read()


def test_golden_signals_of_a_service() -> None:
    made = Metrics()
    ended = Counts(1, 1, 1, 1, 20_000_000, "fin", 300_000, 2_000_000)
    unanswered = Counts(1, 1, 0, 0, 0, "idle")
    for counts in (ended, ended, unanswered):
        made.add([started(kind=Kind.END, service=SHOP_WEB, counts=counts)])
    made.add([flow(service=SHOP_WEB, reason=158, ingress=None, more=3)])
    found = samples(made)
    web = {"namespace": "shop", "service": "web"}
    for name, low, high in (("handshake", "0.0001", "0.0005"), ("first_byte", "0.001", "0.005")):
        bucket = f"tidegate_service_{name}_seconds_bucket"
        assert value(found, bucket, **web, le=low) == 0
        assert value(found, bucket, **web, le=high) == value(found, bucket, **web, le="+Inf") == 2
    assert value(found, "tidegate_service_duration_seconds_bucket", **web, le="+Inf") == 3
    assert value(found, "tidegate_service_refused_total", **web) == 3


def test_denials_that_were_only_counted_are_in_the_figures() -> None:
    made = Metrics()
    made.add([flow(), flow(more=41)])
    found = samples(made)
    drops = [n for key, n in found.items() if key[0] == "hubble_drop_total"]
    denied = [n for key, n in found.items() if key[0] == "tidegate_policy_denied_total"]
    assert drops == denied == [42]
