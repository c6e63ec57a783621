"""Two observers and a dead one behind a relay."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import waiting
from support.hubble import Hubble
from tidegate_observer import relay
from tidegate_observer.history import History
from tidegate_observer.relay import RelayService
from tidegate_observer.server import About, ObserverService, Server
from unit.observer.flows import SECOND, flow

until = functools.partial(waiting.until, seconds=20.0)
Rig = tuple[dict[str, History], Hubble]


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(relay, "READY_SECONDS", 0.5)
    histories = {name: History(100) for name in ("node-1", "node-2")}
    peers = {name: f"unix:{tmp_path}/{name}" for name in (*histories, "node-3")}
    servers = [
        Server(
            ObserverService(history, About((name,), "t", namespaces=lambda: ["a"])), [peers[name]]
        )
        for name, history in histories.items()
    ]
    address = f"unix:{tmp_path}/relay"
    with servers[0], servers[1], Server(RelayService(peers, "t"), [address]):
        with Hubble(address) as client:
            yield histories, client
        for history in histories.values():
            history.close()


def add(histories: dict[str, History], node: str, *seconds: int) -> None:
    histories[node].extend(
        flow(node=node, time=second * SECOND, source_port=second) for second in seconds
    )


def ports(flows: list[dict[str, Any]]) -> list[int]:
    return [f["l4"]["TCP"]["source_port"] for f in flows]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({}, [1, 2, 3, 4, 5, 6]),
        ({"number": 3}, [4, 5, 6]),
        ({"number": 2, "first": True}, [1, 2]),
        ({"since": {"seconds": 5}}, [5, 6]),
        ({"whitelist": [{"node_name": ["node-2"]}]}, [2, 4, 5]),
    ],
)
def test_flows_of_all_nodes_in_the_order_of_time(
    request_: dict[str, Any], expected: list[int], rig: Rig
) -> None:
    histories, client = rig
    add(histories, "node-1", 1, 3, 6)
    add(histories, "node-2", 2, 4, 5)
    assert ports(client.flows(**request_)) == expected


def test_a_dead_node_is_told(rig: Rig) -> None:
    histories, client = rig
    add(histories, "node-1", 1)
    answers = list(client.ask("/observer.Observer/GetFlows", number=5))
    (told,) = [a["node_status"] for a in answers if "node_status" in a]
    assert (told["state_change"], told["node_names"]) == ("NODE_UNAVAILABLE", ["node-3"])
    status = client.ask("/observer.Observer/ServerStatus")
    assert status["num_connected_nodes"] == {"value": 2}
    assert status["unavailable_nodes"] == ["node-3"]
    assert (status["num_flows"], status["max_flows"]) == (1, 200)
    nodes = client.ask("/observer.Observer/GetNodes")["nodes"]
    assert [(n["name"], n["state"]) for n in nodes] == [
        ("node-1", "NODE_CONNECTED"),
        ("node-2", "NODE_CONNECTED"),
        ("node-3", "NODE_UNAVAILABLE"),
    ]
    assert client.ask("/observer.Observer/GetNamespaces")["namespaces"] == [
        {"cluster": "default", "namespace": "a"}
    ]


def test_follow_merges_what_comes(rig: Rig) -> None:
    histories, client = rig
    add(histories, "node-1", 1)
    stream = client.ask("/observer.Observer/GetFlows", number=1, follow=True)
    flows = (answer["flow"] for answer in stream if "flow" in answer)
    assert ports([next(flows)]) == [1]
    add(histories, "node-2", 9)
    add(histories, "node-1", 8)
    assert ports([next(flows), next(flows)]) == [8, 9]
    stream.cancel()


def test_a_filter_that_a_node_refuses_is_told(rig: Rig) -> None:
    answers = list(rig[1].ask("/observer.Observer/GetFlows", whitelist=[{"protocol": ["nothing"]}]))
    assert len(answers) == 3
    assert any("unknown protocol" in a["node_status"]["message"] for a in answers)
