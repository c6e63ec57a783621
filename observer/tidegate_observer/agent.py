"""Agent events of the API: what changed on a node, by what its loader has put in force.

Made by comparing what is known of a node with what was known before, so an event says what is
there now, and what came and went between two looks is not told. What was there when the observer
came makes no events. `number`, `first`, `follow` and times of a request mean what they mean for
flows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import msgspec
from google.protobuf.wrappers_pb2 import UInt32Value

from tidegate_observer.api import flow_pb2, observer_pb2
from tidegate_observer.directory import Directory
from tidegate_observer.flow import End, FrontendKey, Policy, Service, address_text
from tidegate_observer.history import History
from tidegate_observer.meaning import theirs
from tidegate_observer.messages import timestamp

MAX_EVENTS = 4096
"""Held for who asks later."""
SLICE = 256
WAIT_SECONDS = 0.5
_LABEL = "k8s:io.cilium.k8s.policy"
"""Of a policy: where people look for its kind, namespace and name."""

K = TypeVar("K")
V = TypeVar("V")


class AgentEvent(msgspec.Struct, frozen=True):
    node: str
    time: int
    """Nanoseconds since 1970."""
    message: flow_pb2.AgentEvent


def history() -> History:
    return History(MAX_EVENTS)


class Watch:
    """One node's."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._endpoints: Mapping[int, End] = {}
        self._addresses: Mapping[bytes, End] = {}
        self._services: Mapping[FrontendKey, Service] = {}
        self._policies: dict[Policy, frozenset[int]] = {}
        self._revision = 0
        self._started = False

    def look(self, directory: Directory, when: int) -> list[AgentEvent]:
        """What changed since the last look; at the first, that it began."""
        found = list(self._messages(directory, when)) if self._started else [_started(when)]
        self._started = True
        self._endpoints, self._addresses = directory.endpoints, directory.addresses
        self._services, self._policies = directory.services, policies(directory)
        return [AgentEvent(self._node, when, message) for message in found]

    def _messages(self, directory: Directory, when: int) -> Iterator[flow_pb2.AgentEvent]:
        for number, old, end in _changes(self._endpoints, directory.endpoints):
            yield _endpoint(number, old, end)
        for address, old, end in _changes(self._addresses, directory.addresses):
            if end is None or old is None or old.identity != end.identity or old.pod != end.pod:
                yield _address(address, old, end)
        for key, _, service in _changes(self._services, directory.services):
            yield _service(key, service)
        for policy, _, sets in _changes(self._policies, policies(directory)):
            self._revision += 1
            yield _policy(policy, sets is not None, self._revision, directory, sets or ())


def _changes(before: Mapping[K, V], now: Mapping[K, V]) -> Iterator[tuple[K, V | None, V | None]]:
    """(key, before, now) where they differ."""
    if before is now:
        return
    for key, value in now.items():
        old = before.get(key)
        if old is not value and old != value:
            yield key, old, value
    for key, value in before.items():
        if key not in now:
            yield key, value, None


def policies(directory: Directory) -> dict[Policy, frozenset[int]]:
    """Policy → numbers of the rule sets in force that it is in."""
    found: dict[Policy, set[int]] = {}
    for number in directory.current:
        item = directory.rule_sets.get(number)
        for ref in (*item.spec.policies, *item.spec.others) if item is not None else ():
            found.setdefault(Policy(ref.kind, ref.namespace, ref.name), set()).add(number)
    return {policy: frozenset(numbers) for policy, numbers in found.items()}


# ---- messages -------------------------------------------------------------------------------


def _started(when: int) -> flow_pb2.AgentEvent:
    return flow_pb2.AgentEvent(
        type=flow_pb2.AGENT_STARTED,
        agent_start=flow_pb2.TimeNotification(time=timestamp(when)),
    )


def _endpoint(number: int, old: End | None, end: End | None) -> flow_pb2.AgentEvent:
    """Created, deleted, or with another identity or other labels: under another policy."""
    told = end if end is not None else old
    assert told is not None
    if old is not None and end is not None:
        return flow_pb2.AgentEvent(
            type=flow_pb2.ENDPOINT_REGENERATE_SUCCESS,
            endpoint_regenerate=flow_pb2.EndpointRegenNotification(id=number, labels=told.labels),
        )
    return flow_pb2.AgentEvent(
        type=flow_pb2.ENDPOINT_CREATED if old is None else flow_pb2.ENDPOINT_DELETED,
        endpoint_update=flow_pb2.EndpointUpdateNotification(
            id=number, labels=told.labels, pod_name=told.pod, namespace=told.namespace
        ),
    )


def _address(address: bytes, old: End | None, end: End | None) -> flow_pb2.AgentEvent:
    told = end if end is not None else old
    assert told is not None
    text = address_text(address)
    return flow_pb2.AgentEvent(
        type=flow_pb2.IPCACHE_UPSERTED if end is not None else flow_pb2.IPCACHE_DELETED,
        ipcache_update=flow_pb2.IPCacheNotification(
            cidr=f"{text}/{128 if ':' in text else 32}",
            identity=theirs(told.identity),
            old_identity=UInt32Value(value=theirs(old.identity)) if old is not None else None,
            namespace=told.namespace,
            pod_name=told.pod,
        ),
    )


def _service(key: FrontendKey, service: Service | None) -> flow_pb2.AgentEvent:
    address, port, _protocol = key
    number = zlib.crc32(repr(key).encode())
    if service is None:
        return flow_pb2.AgentEvent(
            type=flow_pb2.SERVICE_DELETED,
            service_delete=flow_pb2.ServiceDeleteNotification(id=number),
        )
    return flow_pb2.AgentEvent(
        type=flow_pb2.SERVICE_UPSERTED,
        service_upsert=flow_pb2.ServiceUpsertNotification(
            id=number,
            frontend_address=flow_pb2.ServiceUpsertNotificationAddr(
                ip=address_text(address), port=port
            ),
            name=service.name,
            namespace=service.namespace,
        ),
    )


def _policy(
    policy: Policy, there: bool, revision: int, directory: Directory, sets: Any
) -> flow_pb2.AgentEvent:
    items = [directory.rule_sets[number] for number in sets if number in directory.rule_sets]
    words = [f"{_LABEL}.derived-from={policy.kind}", f"{_LABEL}.name={policy.name}"]
    if policy.namespace:
        words.append(f"{_LABEL}.namespace={policy.namespace}")
    return flow_pb2.AgentEvent(
        type=flow_pb2.POLICY_UPDATED if there else flow_pb2.POLICY_DELETED,
        policy_update=flow_pb2.PolicyUpdateNotification(
            labels=words,
            revision=revision,
            rule_count=sum(len(item.spec.rules) for item in items),
        ),
    )


# ---- asked for ------------------------------------------------------------------------------


def stream(
    held: History, request: observer_pb2.GetAgentEventsRequest, active: Callable[[], bool]
) -> Iterator[observer_pb2.GetAgentEventsResponse]:
    """Until all is told, or with `follow` until it is not active."""
    since = _nanoseconds(request, "since")
    until = _nanoseconds(request, "until")
    end = held.added
    if request.follow and not request.number and since is None:
        at = end
    elif request.first or not request.number:
        at = held.oldest
    else:
        at = max(held.oldest, end - request.number)
    left = request.number if request.first and not request.follow else 0
    told = 0
    while request.follow or at < end:
        start, found = held.slice(at, min(at + SLICE, held.added if request.follow else end))
        for event in cast("list[AgentEvent]", found):
            if (since or 0) <= event.time <= (until or event.time):
                yield _response(event)
                told += 1
                if told == left:
                    return
        at = start + len(found)
        if not found and (not active() or held.closed or not request.follow):
            return
        if not found:
            held.wait(at, WAIT_SECONDS)


def _nanoseconds(request: observer_pb2.GetAgentEventsRequest, name: str) -> int | None:
    if not request.HasField(name):
        return None
    value = getattr(request, name)
    return int(value.seconds * 10**9 + value.nanos)


def _response(event: AgentEvent) -> observer_pb2.GetAgentEventsResponse:
    return observer_pb2.GetAgentEventsResponse(
        agent_event=event.message, node_name=event.node, time=timestamp(event.time)
    )
