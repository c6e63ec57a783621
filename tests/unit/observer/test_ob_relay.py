"""Two observers and a dead one behind a relay."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from support import waiting
from support.hubble import Hubble
from tidegate_observer import agent, order, relay, server, streams
from tidegate_observer.api import flow_pb2, observer_pb2
from tidegate_observer.client import Client
from tidegate_observer.history import History
from tidegate_observer.order import Order
from tidegate_observer.relay import RelayService
from tidegate_observer.server import About, ObserverService, Server
from unit.observer.flows import SECOND, flow

until = functools.partial(waiting.until, seconds=20.0)
DAY = 86400.0
Rig = tuple[dict[str, History], Hubble]


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(relay, "READY_SECONDS", 1.5)
    histories = {name: History(100) for name in ("node-1", "node-2")}
    peers = {name: f"unix:{tmp_path}/{name}" for name in (*histories, "node-3")}
    servers = [
        Server(
            ObserverService(
                history,
                About((name,), "t", namespaces=lambda: ["a"], started=time.monotonic() - DAY),
            ),
            [peers[name]],
        )
        for name, history in histories.items()
    ]
    address = f"unix:{tmp_path}/relay"
    with servers[0], servers[1], Server(RelayService(lambda: peers, "t"), [address]):
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
    assert status["uptime_ns"] >= DAY * SECOND, "what was seen was not seen since the relay began"
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


def order_of(rows: list[tuple[int, float]], *asked: float) -> list[list[int]]:
    """What is told at each time that it is asked, of (when it happened, when it arrived)."""
    made, told, left = Order(), [], sorted(rows, key=lambda row: row[1])
    for now in asked:
        while left and left[0][1] <= now:
            at, arrived = left.pop(0)
            made.add(at, arrived, observer_pb2.GetFlowsResponse(time={"seconds": at}))
        told.append([answer.time.seconds for answer in made.due(now)])
    return told


def test_an_answer_waits_a_moment_for_earlier_ones() -> None:
    rows = [(5, 0.0), (3, 0.1), (4, 0.2), (9, 0.25)]
    assert order_of(rows, 0.2, 0.35, 0.45, 0.51, 0.56) == [[], [], [3], [4, 5], [9]]


def test_an_answer_whose_time_all_nodes_have_told_waits_no_longer() -> None:
    made = Order()

    def due() -> list[Any]:
        return list(made.due(0.0))

    made.mark("a", 0)
    made.mark("b", 0)
    for at in (5, 3):
        made.add(at, 0.0, at)
    assert due() == []
    made.mark("a", 9)
    assert due() == []
    made.mark("b", 3)
    assert due() == [3]
    made.mark("b", 4)
    assert due() == []
    made.forget("b")
    assert due() == [5]
    made.forget("a")
    made.add(6, 0.0, 6)
    assert due() == []


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is told because it has waited for long."""
    monkeypatch.setattr(order, "WINDOW_SECONDS", 600.0)
    monkeypatch.setattr(order, "HELD_SECONDS", 600.0)


def test_a_quiet_node_keeps_nobodys_flows_back(patient: None, rig: Rig) -> None:
    """Each says how far it is, and the dead one is not waited for."""
    histories, client = rig
    stream = client.ask("/observer.Observer/GetFlows", follow=True, since={"seconds": 1})
    flows = (answer["flow"] for answer in stream if "flow" in answer)
    add(histories, "node-1", 8, 9)
    add(histories, "node-2", 7)
    for history in histories.values():
        history.extend((), 8 * SECOND)
    assert ports([next(flows), next(flows)]) == [7, 8]
    for history in histories.values():
        history.extend((), 9 * SECOND)
    assert ports([next(flows)]) == [9]
    stream.cancel()


def test_who_does_not_ask_is_told_no_marks(rig: Rig, tmp_path: Path) -> None:
    """Hubble's own clients would not know what they are."""
    histories, _ = rig
    request = observer_pb2.GetFlowsRequest(follow=True)
    request.since.seconds = 1
    with Client(f"unix:{tmp_path}/node-1") as client:
        plain, marked = client.flows(request), client.flows(request, 0.02)
        add(histories, "node-1", 5)
        histories["node-1"].extend((), 7 * SECOND)
        kinds = [relay.kind(answer) for answer in (next(marked), next(marked))]
        assert kinds == ["flow", None]
        assert next(plain).flow.l4.TCP.source_port == 5
        add(histories, "node-1", 6)
        assert next(plain).flow.l4.TCP.source_port == 6


def test_a_mark_comes_after_all_that_it_is_of(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "SLICE", 16)
    histories, _ = rig
    request = observer_pb2.GetFlowsRequest(follow=True)
    request.since.seconds = 1
    with Client(f"unix:{tmp_path}/node-1") as client:
        answers = client.flows(request, 0.02)
        told = 0
        for batch in range(1, 40):
            entries = [flow(time=batch * SECOND, source_port=batch)] * 50
            histories["node-1"].extend(entries, batch * SECOND)
            while True:
                answer = next(answers)
                if relay.kind(answer) is not None:
                    told += 1
                    continue
                assert told >= 50 * answer.time.seconds
                if answer.time.seconds == batch:
                    break


def events(histories: dict[str, History], node: str, *seconds: int) -> None:
    message = flow_pb2.AgentEvent(type=flow_pb2.AGENT_STARTED)
    made: Any = [agent.AgentEvent(node, second * SECOND, message) for second in seconds]
    histories[node].extend(made)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [({}, [1, 2, 3, 4]), ({"number": 2}, [3, 4]), ({"number": 1, "first": True}, [1])],
)
def test_agent_events_of_all_nodes(
    tmp_path: Path, request_: dict[str, Any], expected: list[int]
) -> None:
    held = {name: agent.history() for name in ("node-1", "node-2")}
    peers = {name: f"unix:{tmp_path}/{name}" for name in held}
    servers = [
        Server(ObserverService(History(1), About((name,), "t", agent=one)), [peers[name]])
        for name, one in held.items()
    ]
    events(held, "node-1", 1, 4)
    events(held, "node-2", 2, 3)
    address = f"unix:{tmp_path}/relay"
    service = RelayService(lambda: peers, "t")
    with servers[0], servers[1], Server(service, [address]), Hubble(address) as client:
        found = list(client.ask("/observer.Observer/GetAgentEvents", **request_))
        assert [answer["time"]["seconds"] for answer in found] == expected
        assert {answer["agent_event"]["type"] for answer in found} == {"AGENT_STARTED"}
        stream = client.ask("/observer.Observer/GetAgentEvents", follow=True, number=1)
        assert next(stream)["node_name"] in held
        stream.cancel()
        for one in held.values():
            one.close()


@pytest.mark.parametrize(
    ("reason", "of_the_other"), [("a year ahead", 10**9), ("a year behind", -(10**9))]
)
def test_a_clock_that_is_wrong_keeps_nobodys_flows_back(reason: str, of_the_other: int) -> None:
    """Both nodes have a flow every 50 ms; what each tells is out a second later at the latest."""
    made = Order()
    waiting: dict[int, float] = {}
    for tick in range(2000):
        now = tick * 0.05
        for at in (tick, tick + of_the_other):
            made.add(at, now, observer_pb2.GetFlowsResponse(time={"seconds": at}))
            waiting[at] = now
        for answer in made.due(now):
            del waiting[answer.time.seconds]
        assert min(waiting.values()) >= now - order.HELD_SECONDS, reason
    # Nor is memory kept for what was told long ago.
    assert len(made) <= 2 * len(waiting) + order.SLACK + 2


def test_a_clock_that_is_ahead_is_told_once(rig: Rig) -> None:
    histories, client = rig
    stream = client.ask("/observer.Observer/GetFlows", follow=True, since={"seconds": 1})
    ahead = int(time.time()) + 3600
    add(histories, "node-2", ahead, ahead + 1)
    add(histories, "node-1", 5)
    answers: list[dict[str, Any]] = []
    while sum("flow" in a for a in answers) < 3:
        answers.append(next(stream))
    told = [a["node_status"] for a in answers if a.get("node_status", {}).get("message")]
    (wrong,) = [s for s in told if s["state_change"] == "NODE_ERROR"]
    assert wrong["node_names"] == ["node-2"]
    assert re.match(r"its clock is 3\d\d\d\.\d s ahead", wrong["message"])
    stream.cancel()


@pytest.mark.slow
def test_a_client_that_takes_nothing_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And while there is nothing to take, it is not."""
    monkeypatch.setattr(streams, "STUCK_SECONDS", 1.0)
    history = History(50_000)
    peers = {"node-1": f"unix:{tmp_path}/1"}
    service = RelayService(lambda: peers, "t")
    node = Server(ObserverService(history, About(("node-1",), "t")), [peers["node-1"]])
    address = f"unix:{tmp_path}/relay"
    with node, Server(service, [address]), Hubble(address) as client:
        stream = client.ask("/observer.Observer/GetFlows", follow=True)
        next(stream)
        begun = time.monotonic()
        while time.monotonic() < begun + 1.5:
            service.streams.cut_stuck()
            assert len(service.streams) == 1
            time.sleep(0.05)

        def cut() -> bool:
            service.streams.cut_stuck()
            return not service.streams

        # More than the buffers between the two hold.
        history.extend([flow(node="node-1")] * 20_000)
        until(cut, "the stream is cut")
        with pytest.raises(grpc.RpcError):
            list(stream)
        history.close()


def test_nodes_come_and_go_while_one_follows(tmp_path: Path) -> None:
    histories = {name: History(100) for name in ("node-1", "node-2")}
    every = {name: f"unix:{tmp_path}/{name}" for name in histories}
    peers = {"node-1": every["node-1"]}
    servers = [
        Server(ObserverService(held, About((name,), "t")), [every[name]])
        for name, held in histories.items()
    ]
    address = f"unix:{tmp_path}/relay"
    with servers[0], servers[1], Server(RelayService(lambda: dict(peers), "t"), [address]):
        with Hubble(address) as client:
            stream = client.ask("/observer.Observer/GetFlows", follow=True)
            said = (a["node_status"] for a in stream if "node_status" in a)
            states = []
            for change in (None, ("add", "node-2"), ("drop", "node-1")):
                if change == ("add", "node-2"):
                    peers["node-2"] = every["node-2"]
                elif change is not None:
                    del peers["node-1"]
                found = next(said)
                states.append((found["node_names"][0], found["state_change"]))
            assert states == [
                ("node-1", "NODE_CONNECTED"),
                ("node-2", "NODE_CONNECTED"),
                ("node-1", "NODE_GONE"),
            ]
            stream.cancel()
        for held in histories.values():
            held.close()
