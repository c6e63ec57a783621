"""Our own kinds in the API server, as the Publisher's store.

What is there comes from reflectors, so that what people edit or delete by hand is seen and
repaired. A batch is written concurrently; it ends when every answer is there. Every write is
preceded by the check that we still lead, and sends the version it replaces.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import msgspec
from tidegate_api.state import Identity, NodeState, RuleSet, StateObject, StateSlice, encode
from tidegate_kube import (
    AlreadyExists,
    Client,
    Conflict,
    Invalid,
    KubeError,
    NotFound,
    Reflector,
    Resource,
    TooManyRequests,
    resources,
)

from tidegate_operator.cluster.kinds import Broken, Held
from tidegate_operator.problems import Problem
from tidegate_operator.store import PublishError, T, alike, path_of, path_to

WORKERS = 8
"""Requests at once: as many as one API server answers without queueing the others' long."""
REQUEST_SECONDS = 8.0
TRIES = 4
"""Of one request that the server was too busy for."""
RETRY_SECONDS = 1.0
"""Before the second try where the server does not say."""

RESOURCES: dict[type[StateObject], Resource] = {
    Identity: resources.IDENTITIES,
    RuleSet: resources.RULE_SETS,
    StateSlice: resources.STATE_SLICES,
    NodeState: resources.NODE_STATES,
}


class NumberTaken(PublishError):
    """Somebody else gave the number of an Identity to other pods: the numbers have to be
    allocated anew, with what the API server holds."""

    def __init__(self, taken: Mapping[str, Identity]) -> None:
        super().__init__(f"identities {', '.join(sorted(taken))} stand for something else")
        self.taken = taken


Ours = Reflector[Any]
"""Of one of our own kinds: Held, Broken, or (of Identity) what users made."""


class KubeStore:
    """Used by one thread. `check` raises when we may not write (any more), and else says how
    long each wait of the next request may take."""

    def __init__(
        self,
        client: Client,
        reflectors: Mapping[type[StateObject], Ours],
        check: Callable[[], float],
        counted: Callable[[str, str, int], None] | None = None,
    ) -> None:
        """`counted(verb, kind, bytes)` is called for every write that succeeded."""
        self._client = client
        self._reflectors = reflectors
        self._check = check
        self._counted = counted or (lambda verb, kind, size: None)
        self._views: dict[type[StateObject], _View] = {kind: _View() for kind in reflectors}
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="publish")
        self.problems: tuple[Problem, ...] = ()
        """Of the last publish that came to its end."""

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def held(self, kind: type[T]) -> Mapping[str, T]:
        view = self._views[kind]
        view.follow(self._reflectors[kind].snapshot())
        return cast(Mapping[str, T], view.items)

    def put(self, batch: Sequence[StateObject]) -> Mapping[str, str]:
        failures = self._each(batch, self._put_one, path_of)
        taken: dict[str, Identity] = {}
        for item in batch:
            path = path_of(item)
            if path not in failures:
                self._views[type(item)].items[item.metadata.name] = item
            elif isinstance(failures[path], _Taken):
                taken[item.metadata.name] = cast(_Taken, failures[path]).there
        if taken:
            raise NumberTaken(taken)
        return {path: str(error) for path, error in failures.items()}

    def drop(self, kind: type[T], names: Sequence[str]) -> Mapping[str, str]:
        def one(name: str) -> None:
            self._drop_one(kind, name)

        failures = self._each(names, one, lambda name: path_to(kind.__name__, name))
        for name in names:
            if path_to(kind.__name__, name) not in failures:
                self._views[kind].items.pop(name, None)
        return {path: str(error) for path, error in failures.items()}

    def report(self, problems: Sequence[Problem]) -> Sequence[str]:
        self.problems = tuple(problems)
        return ()

    # ---- requests ----

    def _each(
        self, batch: Sequence[Any], work: Callable[[Any], None], name: Callable[[Any], str]
    ) -> dict[str, Exception]:
        """The errors of single objects by path. PublishError, or what `check` raises: of all."""
        self._check()
        futures = {name(item): self._pool.submit(work, item) for item in batch}
        errors = {path: future.exception() for path, future in futures.items()}
        failures: dict[str, Exception] = {}
        for path, error in errors.items():
            match error:
                case None:
                    continue
                case Conflict() | Invalid() | _Taken():
                    failures[path] = error
                case KubeError():
                    raise PublishError(str(error)) from error
                case _:
                    raise error
        return failures

    def _put_one(self, item: StateObject) -> None:
        kind = type(item)
        resource, name = RESOURCES[kind], item.metadata.name
        there = self._reflectors[kind].snapshot().get(("", name))
        if there is not None:
            self._replace(item, there)
            return
        body = encode(item)
        try:
            answer = self._send(lambda left: self._client.create(resource, body, timeout=left))
        except AlreadyExists:
            found = self._look(item)
            if found is None:
                raise Conflict(f"create {resource.plural}/{name}", "it comes and goes") from None
            self._take(item, found)
            return
        self._done("create", item, body, answer)

    def _replace(self, item: StateObject, there: Held[Any] | Broken) -> None:
        """Raises Conflict when it is no more as `there` has it. But a newer status makes no
        other object of it: a loader reports at its own times, and a state that waits for the next
        publish is behind all that this one writes."""
        resource, name = RESOURCES[type(item)], item.metadata.name
        left = TRIES
        while True:
            try:
                return self._update(resource, item, there.version)
            except NotFound:
                self._reflectors[type(item)].forget("", name, there.uid)
                raise Conflict(f"update {resource.plural}/{name}", "it is gone") from None
            except Conflict:
                found, left = self._look(item), left - 1
                if not left or found is None or not _same_but_for_status(found, there):
                    raise
                there = found
            except Invalid:
                if isinstance(item, NodeState):
                    raise
                return self._in_its_place(resource, item, there.uid)

    def _in_its_place(self, resource: Resource, item: StateObject, uid: str) -> None:
        """What is there may not be changed, and its content is not ours."""
        self._delete(type(item), item.metadata.name, uid)
        body = encode(item)
        answer = self._send(lambda left: self._client.create(resource, body, timeout=left))
        self._done("update", item, body, answer)

    def _update(self, resource: Resource, item: StateObject, version: str) -> None:
        meta = msgspec.structs.replace(item.metadata, resource_version=version)
        body = encode(msgspec.structs.replace(item, metadata=meta))
        answer = self._send(
            lambda left: self._client.update(resource, item.metadata.name, body, timeout=left)
        )
        self._done("update", item, body, answer)

    def _take(self, item: StateObject, there: Held[Any] | Broken) -> None:
        """`there` has the name. An Identity of the same meaning is adopted, one of another
        keeps its number; anything else of ours is replaced."""
        if isinstance(there, Held):
            if alike(there.item, item):
                return
            if isinstance(item, Identity) and there.item.spec != item.spec:
                raise _Taken(there.item)
        self._replace(item, there)

    def _there(self, kind: type[StateObject], name: str) -> Held[Any] | Broken | None:
        found = self._reflectors[kind].snapshot().get(("", name))
        return found if isinstance(found, Held | Broken) else None

    def _look(self, item: StateObject) -> Held[Any] | Broken | None:
        """Take over what the server holds now; None if it is not there."""
        kind, name = type(item), item.metadata.name
        try:
            data = self._send(lambda left: self._client.get(RESOURCES[kind], name, timeout=left))
        except NotFound:
            return None
        self._reflectors[kind].remember(data)
        return self._there(kind, name)

    def _drop_one(self, kind: type[StateObject], name: str) -> None:
        there = self._there(kind, name)
        if there is not None:
            self._delete(kind, name, there.uid)

    def _delete(self, kind: type[StateObject], name: str, uid: str) -> None:
        resource = RESOURCES[kind]
        try:
            self._send(lambda left: self._client.delete(resource, name, uid=uid, timeout=left))
        except (NotFound, Conflict):  # it is gone, and maybe another has its name
            pass
        else:
            self._counted("delete", resource.kind, 0)
        self._reflectors[kind].forget("", name, uid)

    def _done(self, verb: str, item: StateObject, body: bytes, answer: bytes) -> None:
        self._reflectors[type(item)].remember(answer)
        self._counted(verb, item.kind, len(body))

    def _send(self, request: Callable[[float], bytes]) -> bytes:
        """Again, if the server was too busy; every time only if we still lead."""
        for attempt in range(1, TRIES + 1):
            left = min(self._check(), REQUEST_SECONDS)
            try:
                return request(left)
            except TooManyRequests as error:
                if attempt == TRIES:
                    raise
                time.sleep(min(error.retry_after or RETRY_SECONDS * attempt, REQUEST_SECONDS))
        raise AssertionError("unreachable")


def _same_but_for_status(one: Held[Any] | Broken, other: Held[Any] | Broken) -> bool:
    if not (isinstance(one, Held) and isinstance(other, Held)):
        return False
    return one.uid == other.uid and alike(one.item, other.item)


class _Taken(Exception):
    def __init__(self, there: Identity) -> None:
        super().__init__("the number stands for something else")
        self.there = there


class _View:
    """name -> object: what we put, as long as the reflector holds its equal."""

    def __init__(self) -> None:
        self.items: dict[str, Any] = {}
        self._seen: Mapping[tuple[str, str], object] = {}

    def follow(self, snapshot: Mapping[tuple[str, str], object]) -> None:
        if snapshot is self._seen:
            return
        for key, held in snapshot.items():
            if self._seen.get(key) is held or not isinstance(held, Held):
                continue
            ours = self.items.get(key[1])
            if ours is None or not alike(held.item, ours):
                self.items[key[1]] = held.item
        names = {name for (_, name), held in snapshot.items() if isinstance(held, Held)}
        for name in self.items.keys() - names:
            del self.items[name]
        self._seen = snapshot
