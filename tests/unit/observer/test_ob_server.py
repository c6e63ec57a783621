"""The services over a real socket, asked by a client that knows only the contract."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from support import waiting
from support.hubble import Hubble
from tidegate_observer import expressions, streams
from tidegate_observer.flow import Counts, Decision, Kind, Lost, Policy
from tidegate_observer.history import History
from tidegate_observer.server import About, ObserverService, Server
from unit.observer.flows import APISERVER, SECOND, SHOP_WEB, WORLD, flow, started

Serving = tuple[History, Hubble, ObserverService]


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    history = History(8)
    about = About(("node-1", "node-2"), "test", namespaces=lambda: ["data", "shop"], instance=7)
    service = ObserverService(history, about)
    address = f"unix:{tmp_path}/s"
    with Server(service, [address]), Hubble(address) as client:
        yield history, client, service
        history.close()


def fill(history: History, count: int) -> None:
    """Flow n from port n at second 1000 + n, odd ones to a node of their own."""
    history.extend(
        flow(source_port=n, time=(1000 + n) * SECOND, node=f"node-{1 + n % 2}")
        for n in range(count)
    )


until = functools.partial(waiting.until, seconds=20.0)


def ports(flows: list[dict[str, Any]]) -> list[int]:
    return [f["l4"]["TCP"]["source_port"] for f in flows]


def at(second: int) -> dict[str, int]:
    return {"seconds": second}


SECOND_NODE = [{"node_name": ["node-2"]}]
ROWS: list[tuple[str, dict[str, Any], list[int]]] = [
    ("everything that is held", {}, [2, 3, 4, 5, 6, 7, 8, 9]),
    ("the last", {"number": 3}, [7, 8, 9]),
    ("the first", {"number": 3, "first": True}, [2, 3, 4]),
    ("the last that are asked for", {"number": 2, "whitelist": SECOND_NODE}, [7, 9]),
    ("but for", {"number": 2, "blacklist": SECOND_NODE}, [6, 8]),
    ("since", {"since": at(1007)}, [7, 8, 9]),
    ("until", {"until": at(1003)}, [2, 3]),
    ("between", {"since": at(1003), "until": at(1005)}, [3, 4, 5]),
    ("the last between", {"since": at(1003), "until": at(1006), "number": 2}, [5, 6]),
    ("the first since", {"since": at(1003), "number": 2, "first": True}, [3, 4]),
    ("more than there are", {"number": 100}, [2, 3, 4, 5, 6, 7, 8, 9]),
    ("none", {"since": at(2000)}, []),
]


@pytest.mark.parametrize(("reason", "request_", "expected"), ROWS, ids=[r[0] for r in ROWS])
def test_which_flows(
    reason: str, request_: dict[str, Any], expected: list[int], serving: Serving
) -> None:
    history, client, _ = serving
    fill(history, 10)
    assert ports(client.flows(**request_)) == expected


def test_what_was_read_late_is_told_in_its_place(serving: Serving) -> None:
    history, client, _ = serving
    for second in (1, 4, 2, 3):
        history.extend([flow(source_port=second, time=second * SECOND)])
    assert ports(client.flows()) == [1, 2, 3, 4]


def test_a_denial_says_all_that_is_known(serving: Serving) -> None:
    history, client, _ = serving
    history.extend([flow(service=SHOP_WEB, cookie=5, cgroup=6)])
    (found,) = client.flows()
    assert found == {
        "time": {"seconds": 1000},
        "verdict": "DROPPED",
        "drop_reason": 133,
        "drop_reason_desc": "POLICY_DENIED",
        "IP": {"source": "10.244.0.5", "destination": "10.244.1.2", "ipVersion": "IPv4"},
        "l4": {"TCP": {"source_port": 40000, "destination_port": 5432, "flags": {"SYN": True}}},
        "source": {
            "ID": 7,
            "identity": 300,
            "namespace": "shop",
            "labels": ["k8s:app=web", "k8s:io.kubernetes.pod.namespace=shop"],
            "pod_name": "web-1",
            "workloads": [{"name": "web", "kind": "Deployment"}],
            "cluster_name": "default",
        },
        "destination": {
            "ID": 7,
            "identity": 301,
            "namespace": "data",
            "labels": ["k8s:app=db", "k8s:io.kubernetes.pod.namespace=data"],
            "pod_name": "db-0",
            "workloads": [{"name": "db", "kind": "Deployment"}],
            "cluster_name": "default",
        },
        "Type": "L3_L4",
        "node_name": "node-1",
        "destination_service": {"name": "web", "namespace": "shop"},
        "event_type": {"type": 1, "sub_type": 133},
        "traffic_direction": "INGRESS",
        "is_reply": {},
        "interface": {"index": 3, "name": "eth0"},
        "socket_cookie": 5,
        "cgroup_id": 6,
        "uuid": "00000000-0000-0007-0000-000000000000",
        "emitter": {"name": "Tidegate"},
        "ingress_denied_by": [
            {"name": "default-deny", "namespace": "data", "kind": "NetworkPolicy"}
        ],
        "Summary": "TCP Flags: SYN",
    }


def test_kinds_of_events(serving: Serving) -> None:
    history, client, _ = serving
    ended = Counts(3, 300, 2, 200, 1_500_000_000, "fin")
    egress = Decision((Policy("NetworkPolicy", "shop", "out"),), 1, 5)
    history.extend(
        [
            started(egress=egress),
            started(ingress=None, destination=WORLD, source=APISERVER),
            started(kind=Kind.END, ingress=None, counts=ended),
            flow(kind=Kind.AUDITED),
            flow(reason=220, ingress=None),
        ]
    )
    first, second, third, fourth, fifth = client.flows()
    assert (first["event_type"], first["policy_match_type"]) == ({"type": 5}, 2)
    assert [p["name"] for p in first["egress_allowed_by"]] == ["out"]
    assert [p["name"] for p in first["ingress_allowed_by"]] == ["allow-web"]
    assert first["trace_reason"] == "NEW"
    assert (second["event_type"], second["trace_observation_point"]) == (
        {"type": 4, "sub_type": 3},
        "TO_STACK",
    )
    assert second["source"] == {"identity": 7, "labels": ["reserved:kube-apiserver"]}
    counts = third["extensions"]["value"]
    assert third["extensions"]["type_url"] == "type.googleapis.com/google.protobuf.Struct"
    entries = client.contract.decode("google.protobuf.Struct", counts)["fields"]
    values = {e["key"]: next(iter(e["value"].values())) for e in entries}
    assert values["replyBytes"] == 200
    assert values["closed"] == "fin"
    assert (fourth["verdict"], fourth["event_type"]) == ("AUDIT", {"type": 5})
    assert fifth["drop_reason_desc"] == "VLAN_FILTERED"


def test_follow(serving: Serving) -> None:
    history, client, _ = serving
    fill(history, 3)
    stream = client.ask("/observer.Observer/GetFlows", number=1, follow=True)
    assert ports([next(stream)["flow"]]) == [2]
    history.extend([flow(source_port=77), Lost("node-1", 5 * SECOND, 9, SECOND)])
    assert ports([next(stream)["flow"]]) == [77]
    assert next(stream)["lost_events"] == {
        "source": "PERF_EVENT_RING_BUFFER",
        "num_events_lost": 9,
        "first": at(1),
        "last": at(5),
    }
    stream.cancel()


def test_follow_without_more_starts_now(serving: Serving) -> None:
    history, client, service = serving
    fill(history, 3)
    stream = client.ask("/observer.Observer/GetFlows", follow=True)
    until(lambda: len(service.streams) == 1, "the stream is there")
    history.extend([flow(source_port=78)])
    assert ports([next(stream)["flow"]]) == [78]
    stream.cancel()


def test_a_slow_client_is_told_and_disconnected(serving: Serving) -> None:
    history, client, service = serving
    fill(history, 1)
    stream = client.ask("/observer.Observer/GetFlows", number=1, follow=True)
    next(stream)
    # The stream holds a slice while its client takes nothing; what fills up meanwhile is gone.
    big = "x" * 60_000
    history.extend(flow(node=big) for _ in range(8))
    for n in range(400):
        history.extend([flow(node=big, source_port=n)])
    with pytest.raises(grpc.RpcError) as raised:
        for _ in stream:
            pass
    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "too slow" in raised.value.details()
    until(lambda: not service.streams, "the stream is gone")


def test_a_client_that_takes_nothing_is_cut(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, client, service = serving
    monkeypatch.setattr(streams, "STUCK_SECONDS", 0.2)
    fill(history, 1)
    stream = client.ask("/observer.Observer/GetFlows", number=1, follow=True)
    next(stream)
    stop = threading.Event()

    def feed() -> None:
        while not stop.wait(0.001):
            history.extend([flow(node="x" * 60_000)])

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        until(lambda: service.streams.cut_stuck() or not service.streams, "the stream is cut")
    finally:
        stop.set()
        feeder.join()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("first and follow", {"first": True, "follow": True}, "exclude"),
    ("an unknown protocol", {"whitelist": [{"protocol": ["x"]}]}, "unknown protocol"),
    ("a field that no flow has", {"field_mask": {"paths": ["nothing"]}}, "field_mask"),
    (
        "CEL",
        {"whitelist": [{"experimental": {"cel_expression": ["a"]}}]},
        "undeclared reference to 'a'",
    ),
]


@pytest.mark.parametrize(("reason", "request_", "said"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refused(reason: str, request_: dict[str, Any], said: str, serving: Serving) -> None:
    with pytest.raises(grpc.RpcError, match=said) as raised:
        serving[1].flows(**request_)
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_an_expression_that_takes_too_long_ends_the_call(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(serving[0], 3)
    wanted = [{"experimental": {"cel_expression": ["_flow.source.pod_name == 'web-1'"]}}]
    assert len(serving[1].flows(whitelist=wanted)) == 3
    monkeypatch.setattr(expressions, "MAX_SECONDS", -1.0)
    with pytest.raises(grpc.RpcError, match="cel_expression: an evaluation took") as raised:
        serving[1].flows(whitelist=wanted)
    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_expression_knows_the_flows_id(serving: Serving) -> None:
    history, client, _ = serving
    fill(history, 5)
    uuid = client.flows()[3]["uuid"]
    asked = {"experimental": {"cel_expression": [f'_flow.uuid == "{uuid}"']}}
    assert ports(client.flows(whitelist=[asked])) == [3]
    assert ports(client.flows(blacklist=[asked], number=2)) == [2, 4]
    assert ports(client.flows(whitelist=[asked | {"source_pod": ["shop/other"]}])) == []


def test_field_mask_and_uuid(serving: Serving) -> None:
    history, client, _ = serving
    fill(history, 3)
    wanted = client.flows()[1]["uuid"]
    mask = {"paths": ["uuid", "source.pod_name"]}
    found = client.flows(whitelist=[{"uuid": [wanted]}], field_mask=mask)
    assert found == [{"uuid": wanted, "source": {"pod_name": "web-1"}}]


def test_flows_a_second_are_those_of_the_last_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: 1000.0)
    monkeypatch.setattr("tidegate_observer.history.time", clock)
    history = History(8)

    def at_second(second: int) -> float:
        clock.monotonic = lambda: 1000.0 + second
        return history.rate()

    assert at_second(0) == 0
    fill(history, 8)
    assert at_second(4) == 2
    assert at_second(50) == 8 / 50
    fill(history, 3)
    assert at_second(100) == 3 / 60
    assert at_second(1000) == 0


def test_the_other_calls(serving: Serving) -> None:
    history, client, _ = serving
    fill(history, 10)
    status = client.ask("/observer.Observer/ServerStatus")
    assert (status["num_flows"], status["max_flows"], status["seen_flows"]) == (8, 8, 10)
    assert status["flows_rate"] > 0
    nodes = client.ask("/observer.Observer/GetNodes")["nodes"]
    assert [(n["name"], n["state"]) for n in nodes] == [
        ("node-1", "NODE_CONNECTED"),
        ("node-2", "NODE_CONNECTED"),
    ]
    spaces = client.ask("/observer.Observer/GetNamespaces")["namespaces"]
    assert [n["namespace"] for n in spaces] == ["data", "shop"]
    assert list(client.ask("/observer.Observer/GetAgentEvents", number=5)) == []
    assert list(client.ask("/observer.Observer/GetDebugEvents", number=5)) == []
    changes = client.ask("/peer.Peer/Notify")
    assert next(changes)["type"] == "PEER_ADDED"
    changes.cancel()
