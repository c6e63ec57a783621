"""Agent events: what of a node's change is told, and what of it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from msgspec.structs import replace
from tidegate_observer import agent
from tidegate_observer.agent import Watch
from tidegate_observer.api import flow_pb2, observer_pb2
from tidegate_observer.directory import Directory
from tidegate_observer.flow import Service, address_bytes
from tidegate_observer.history import History
from unit.observer.flows import DB, SECOND, WEB
from unit.observer.test_ob_records import RULES

A, VIP = address_bytes("10.0.0.1"), address_bytes("10.96.0.1")


@dataclass
class Node:
    """A directory that changes as its reader changes it: by new dicts."""

    directory: Directory = field(default_factory=Directory)
    watch: Watch = field(default_factory=lambda: Watch("node-1"))

    def look(self, **changes: Any) -> list[flow_pb2.AgentEvent]:
        for name, value in changes.items():
            setattr(self.directory, name, value)
        return [event.message for event in self.watch.look(self.directory, 5 * SECOND)]


@pytest.fixture
def node() -> Node:
    made = Node()
    (started,) = made.look(endpoints={7: WEB}, addresses={A: WEB})
    assert started.type == flow_pb2.AGENT_STARTED
    assert started.agent_start.time.seconds == 5
    assert made.look() == []
    return made


def test_endpoints_come_change_and_go(node: Node) -> None:
    (made,) = node.look(endpoints={7: WEB, 8: DB})
    assert (made.type, made.endpoint_update.id) == (flow_pb2.ENDPOINT_CREATED, 8)
    assert (made.endpoint_update.namespace, made.endpoint_update.pod_name) == ("data", "db-0")
    (changed,) = node.look(endpoints={7: replace(WEB, identity=999), 8: DB})
    assert changed.type == flow_pb2.ENDPOINT_REGENERATE_SUCCESS
    assert changed.endpoint_regenerate.id == 7
    (gone,) = node.look(endpoints={8: DB})
    assert (gone.type, gone.endpoint_update.pod_name) == (flow_pb2.ENDPOINT_DELETED, "web-1")


def test_addresses_with_the_identity_before(node: Node) -> None:
    (made,) = node.look(addresses={A: DB})
    told = made.ipcache_update
    assert (made.type, told.cidr, told.identity) == (flow_pb2.IPCACHE_UPSERTED, "10.0.0.1/32", 301)
    assert told.old_identity.value == 300
    # Other labels of the same pod are no other address.
    assert node.look(addresses={A: replace(DB, labels=())}) == []
    (gone,) = node.look(addresses={})
    assert (gone.type, gone.ipcache_update.cidr) == (flow_pb2.IPCACHE_DELETED, "10.0.0.1/32")


def test_services_come_and_go_under_one_id(node: Node) -> None:
    (made,) = node.look(services={(VIP, 80, 6): Service("shop", "web")})
    told = made.service_upsert
    assert (made.type, told.namespace, told.name) == (flow_pb2.SERVICE_UPSERTED, "shop", "web")
    assert (told.frontend_address.ip, told.frontend_address.port) == ("10.96.0.1", 80)
    (gone,) = node.look(services={})
    assert (gone.type, gone.service_delete.id) == (flow_pb2.SERVICE_DELETED, told.id)


def test_policies_by_the_rule_sets_in_force(node: Node) -> None:
    node.directory.rule_sets = {9: RULES}
    node.directory.in_force([9])
    made = node.look()
    assert {m.type for m in made} == {flow_pb2.POLICY_UPDATED}
    names = {label for m in made for label in m.policy_update.labels if ".name=" in label}
    assert names == {f"k8s:io.cilium.k8s.policy.name={n}" for n in ("n", "admin", "try")}
    assert [m.policy_update.revision for m in made] == [1, 2, 3]
    # Kept for a while for records that still name it, and not in force any more.
    node.directory.in_force([])
    assert {m.type for m in node.look()} == {flow_pb2.POLICY_DELETED}


def held(count: int) -> History:
    made = agent.history()
    events: list[Any] = [
        agent.AgentEvent("node-1", at * SECOND, flow_pb2.AgentEvent(type=flow_pb2.AGENT_STARTED))
        for at in range(count)
    ]
    made.extend(events)
    return made


def seconds(at: int) -> Any:
    from google.protobuf.timestamp_pb2 import Timestamp  # noqa: PLC0415

    return Timestamp(seconds=at)


ROWS: list[tuple[str, dict[str, Any], list[int]]] = [
    ("all", {}, [0, 1, 2, 3, 4]),
    ("the last", {"number": 2}, [3, 4]),
    ("the first", {"number": 2, "first": True}, [0, 1]),
    ("since", {"since": seconds(3)}, [3, 4]),
    ("until", {"until": seconds(1)}, [0, 1]),
    ("more than there are", {"number": 9}, [0, 1, 2, 3, 4]),
]


@pytest.mark.parametrize(("reason", "fields", "expected"), ROWS)
def test_what_is_asked_for(reason: str, fields: dict[str, Any], expected: list[int]) -> None:
    request = observer_pb2.GetAgentEventsRequest(**fields)
    found = agent.stream(held(5), request, lambda: True)
    assert expected == [answer.time.seconds for answer in found], reason


def test_who_follows_hears_what_comes_and_ends_with_the_server() -> None:
    kept = held(2)
    request = observer_pb2.GetAgentEventsRequest(follow=True, number=1)
    stream = agent.stream(kept, request, lambda: True)
    assert next(stream).time.seconds == 1
    events: list[Any] = [agent.AgentEvent("node-1", 7 * SECOND, flow_pb2.AgentEvent())]
    kept.extend(events)
    assert next(stream).time.seconds == 7
    kept.close()
    assert list(stream) == []
