"""The reflector on scripted lists and streams: Replace, order, our own writes, opaque versions."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.waiting import until
from tidegate_kube import (
    Gone,
    KubeError,
    Pace,
    Page,
    Reflector,
    ServerError,
    Unreachable,
    WatchEvent,
    reflector,
    resources,
)
from tidegate_kube.reflector import QUIET_WATCHES, SERVER_ERRORS

SECONDS = 30.0
PACE = Pace(first_delay=0.001, longest_delay=0.002)


def _item(name: str, version: str, value: object = None, uid: str = "u") -> dict[str, Any]:
    meta = {"namespace": "s", "name": name, "resourceVersion": version, "uid": uid}
    return {"metadata": meta, "value": value if value is not None else version}


def _event(type: str, item: dict[str, Any]) -> WatchEvent:
    return WatchEvent(type, msgspec.Raw(json.dumps(item).encode()))


class _Watch:
    def __init__(self, script: list[Any], last: bool) -> None:
        self._script, self._last, self.closed = script, last, threading.Event()

    def __iter__(self) -> Iterator[WatchEvent]:
        for each in self._script:
            if isinstance(each, Exception):
                raise each
            yield each
        if self._last:
            self.closed.wait(SECONDS)

    def close(self) -> None:
        self.closed.set()


class Script:
    """A client that answers lists and watches from a script, then keeps its last watch open.

    A list is (version, items); what follows it up to the next list are watches, as lists of
    events and errors."""

    def __init__(self, *steps: Any) -> None:
        self.steps = list(steps)
        self.asked: list[str] = []
        self.reached = threading.Event()
        if not self.steps:
            self.reached.set()

    def pages(self, *_: Any, **__: Any) -> Iterator[Page]:
        self.asked.append("list")
        step = self.steps.pop(0)
        if isinstance(step, Exception):
            raise step
        version, items = step
        raws = [msgspec.Raw(json.dumps(item).encode()) for item in items]
        half = len(raws) // 2
        yield Page(raws[:half], version, False)
        yield Page(raws[half:], version, True)

    def watch(self, _: Any, version: str, *__: Any, **___: Any) -> _Watch:
        self.asked.append(version)
        step = self.steps.pop(0) if self.steps and isinstance(self.steps[0], list) else []
        if not self.steps:
            self.reached.set()
        return _Watch(step, last=not self.steps)


def _decode(raw: bytes) -> object:
    value = json.loads(raw)["value"]
    if value == "invalid":
        raise ValueError("told to be invalid")
    return value


class Run:
    def __init__(self, *steps: Any) -> None:
        self.script = Script(*steps)
        self.changes = 0
        self.reflector: Reflector[Any] = Reflector(
            self.script,
            resources.PODS,
            _decode,
            self._note,
            pace=PACE,  # type: ignore[arg-type]
        )

    def _note(self) -> None:
        self.changes += 1

    def held(self) -> dict[str, Any]:
        return {name: value for (_, name), value in self.reflector.snapshot().items()}

    def __enter__(self) -> Run:
        self.reflector.start()
        assert self.script.reached.wait(SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self.reflector.stop()
        assert not self.reflector.health().alive

    def ends_with(self, expected: dict[str, Any]) -> None:
        until(lambda: self.held() == expected, f"{expected}, but {self.held()}", SECONDS)


GONE = Gone("watch pods", "too old", code=410)
CUT = Unreachable("watch pods", "cut")


def test_a_list_anew_replaces() -> None:
    steps = [
        ("10", [_item("a", "1"), _item("b", "2"), _item("c", "3")]),
        [_event("MODIFIED", _item("a", "11")), GONE],
        ("20", [_item("b", "2"), _item("c", "15"), _item("d", "16")]),
        [],
    ]
    with Run(*steps) as run:
        run.ends_with({"b": "2", "c": "15", "d": "16"})
        assert run.script.asked == ["list", "10", "list", "20"]
        assert run.changes == 3


def test_resumes_where_it_was() -> None:
    bookmark = _event("BOOKMARK", {"metadata": {"resourceVersion": "15"}})
    steps = [
        ("10", [_item("a", "1")]),
        [_event("ADDED", _item("b", "11")), CUT],
        [_event("DELETED", _item("a", "12")), bookmark],
        [CUT],
        [],
    ]
    with Run(*steps) as run:
        run.ends_with({"b": "11"})
        assert run.script.asked == ["list", "10", "11", "15", "15"]


ROWS: list[tuple[str, list[WatchEvent], dict[str, Any], int]] = [
    ("twice", [_event("MODIFIED", _item("a", "11")), _event("MODIFIED", _item("a", "11"))],
     {"a": "11", "b": "2"}, 1),
    ("an older state of the same object", [_event("MODIFIED", _item("a", "12")),
     _event("MODIFIED", _item("a", "11"))], {"fresh": "9"}, 2),
    ("deleted twice", [_event("DELETED", _item("a", "11")), _event("DELETED", _item("a", "11"))],
     {"b": "2"}, 1),
    ("deleted, but made again since", [_event("DELETED", _item("a", "11")),
     _event("ADDED", _item("a", "12", uid="v")), _event("DELETED", _item("a", "11"))],
     {"fresh": "9"}, 2),
    ("of two objects, late", [_event("MODIFIED", _item("a", "12")),
     _event("MODIFIED", _item("b", "11"))], {"fresh": "9"}, 2),
    ("of one that is gone, late", [_event("DELETED", _item("a", "12")),
     _event("MODIFIED", _item("a", "11"))], {"fresh": "9"}, 2),
    ("from before the list", [_event("ADDED", _item("c", "5"))], {"fresh": "9"}, 2),
    ("deleted without a version of its own", [_event("DELETED", _item("a", "1")),
     _event("MODIFIED", _item("b", "12"))], {"fresh": "9"}, 2),
    ("two at one version", [_event("DELETED", _item("a", "11")),
     _event("DELETED", _item("b", "11"))], {}, 1),
    ("a bookmark from before", [_event("MODIFIED", _item("a", "12")),
     _event("BOOKMARK", {"metadata": {"resourceVersion": "11"}})], {"fresh": "9"}, 2),
    ("not an object", [_event("MODIFIED", {"metadata": []})], {"a": "1", "b": "2"}, 1),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "events", "expected", "lists"), ROWS)
def test_order(reason: str, events: list[WatchEvent], expected: dict[str, Any], lists: int) -> None:
    steps: list[Any] = [("10", [_item("a", "1"), _item("b", "2")]), [*events, CUT]]
    steps += [("20", [_item("fresh", "9")]), []] if lists == 2 else [[]]
    with Run(*steps) as run:
        run.ends_with(expected)
        assert run.script.asked.count("list") == lists, reason


def test_versions_that_are_no_numbers_are_only_compared_for_equality() -> None:
    steps = [
        ("zz", [_item("a", "b")]),
        [
            _event("MODIFIED", _item("a", "a")),
            _event("ADDED", _item("c", "7")),
            _event("MODIFIED", _item("c", "x", "new")),
            _event("DELETED", _item("a", "0")),
        ],
        [],
    ]
    with Run(*steps) as run:
        run.ends_with({"c": "new"})
        assert run.script.asked == ["list", "zz", "0"]
        run.reflector.remember(json.dumps(_item("d", "y")).encode())
        assert "d" not in run.held()


def test_an_invalid_object_is_not_another_of_its_name() -> None:
    steps = [
        ("10", [_item("a", "1"), _item("b", "2"), _item("c", "3", "invalid")]),
        [
            _event("MODIFIED", _item("a", "11", "invalid")),
            _event("DELETED", _item("b", "12")),
            _event("ADDED", _item("b", "13", "invalid", uid="v")),
            GONE,
        ],
        ("20", [_item("a", "14", "invalid", uid="w"), _item("b", "13", "invalid", uid="v")]),
        [],
    ]
    with Run(*steps) as run:
        run.ends_with({})
        assert run.reflector.invalid == {
            ("s", "a"): "told to be invalid", ("s", "b"): "told to be invalid",
        }  # fmt: skip


def test_nor_in_a_stream() -> None:
    event = _event("MODIFIED", _item("a", "11", "invalid", uid="v"))
    with Run(("10", [_item("a", "1")]), [event, CUT], []) as run:
        run.ends_with({})
        assert run.reflector.invalid == {("s", "a"): "told to be invalid"}


def test_a_server_that_only_fails_is_listed_anew_in_the_end() -> None:
    fails = ServerError("watch pods", "internal error", code=500)
    steps = [("10", [_item("a", "1")]), *[[fails]] * SERVER_ERRORS, ("20", []), []]
    with Run(*steps) as run:
        run.ends_with({})
        assert run.script.asked == ["list", *["10"] * SERVER_ERRORS, "list", "20"]


def test_a_position_from_the_future(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that went back waits there, and says nothing."""
    monkeypatch.setattr(reflector, "STEADY_SECONDS", 0.0)
    steps = [("10", [_item("a", "1")]), *[[CUT]] * QUIET_WATCHES, ("5", []), []]
    with Run(*steps) as run:
        run.ends_with({})


def test_a_list_that_is_too_old_for_our_own_write() -> None:
    run = Run(
        ("10", [_item("a", "1"), _item("b", "2")]),
        [GONE],
        ("20", [_item("a", "1"), _item("b", "2")]),
        [_event("MODIFIED", _item("a", "22")), _event("DELETED", _item("new", "23")), CUT],
        [],
    )
    run.reflector.remember(json.dumps(_item("a", "25")).encode())
    run.reflector.remember(json.dumps(_item("new", "24")).encode())
    run.reflector.remember(json.dumps(_item("b", "15")).encode())
    with run:
        # b: what was remembered is older than the list, so the list is right.
        run.ends_with({"a": "25", "b": "2", "new": "24"})
        run.reflector.forget("s", "new", "another")
        assert "new" in run.held()
        run.reflector.forget("s", "new", "u")
        assert "new" not in run.held()


def test_a_server_that_went_back_in_time() -> None:
    """Restored from a backup: smaller versions, and what was made since is gone."""
    steps = [
        ("1000", [_item("a", "900"), _item("b", "950")]),
        [_event("MODIFIED", _item("a", "500", "restored"))],
        ("510", [_item("a", "500", "restored")]),
        [],
    ]
    with Run(*steps) as run:
        run.ends_with({"a": "restored"})


def test_a_fault_in_changed_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    run = Run(("10", []), [])

    def broken() -> None:
        raise RuntimeError("a fault")

    run.reflector._changed = broken
    run.reflector.start()
    until(lambda: not run.reflector.health().alive, "ends", SECONDS)
    assert len(seen) == 1


@given(st.integers(0, 2**32), st.integers(1, 60))
def test_any_stream_with_any_repetitions_and_cuts(seed: int, length: int) -> None:
    """A true history, delivered with repetitions, cut anywhere, swapped anywhere: equal."""
    rng = random.Random(seed)
    now: dict[str, dict[str, Any]] = {}
    history: list[WatchEvent] = []
    for version in range(11, 11 + length):
        name = rng.choice("abcd")
        if name in now and rng.random() < 0.3:
            gone = now.pop(name)
            gone = _item(name, str(version), uid=gone["metadata"]["uid"])
            history.append(_event("DELETED", gone))
            continue
        uid = now[name]["metadata"]["uid"] if name in now else f"u{version}"
        now[name], before = _item(name, str(version), uid=uid), now.get(name)
        history.append(_event("MODIFIED" if before else "ADDED", now[name]))

    class Server(Script):
        """Answers from the history, faithfully but for repetitions, cuts and swaps."""

        cuts = rng.randrange(6)

        def pages(self, *_: Any, **__: Any) -> Iterator[Page]:
            at = rng.randrange(len(history) + 1) if self.cuts else len(history)
            state: dict[str, Any] = {}
            for event in history[:at]:
                item = json.loads(bytes(event.object))
                if event.type == "DELETED":
                    del state[item["metadata"]["name"]]
                else:
                    state[item["metadata"]["name"]] = item
            raws = [msgspec.Raw(json.dumps(item).encode()) for item in state.values()]
            yield Page(raws, str(10 + at), True)

        def watch(self, _: Any, version: str, *__: Any, **___: Any) -> _Watch:
            script: list[Any] = list(history[int(version) - 10 :])
            if not self.cuts:
                self.reached.set()
                return _Watch(script, last=True)
            self.cuts -= 1
            script = script[: rng.randrange(len(script) + 1)]
            for _ in range(rng.randrange(3)):
                if script:
                    script.insert(rng.randrange(len(script) + 1), rng.choice(script))
            if len(script) > 1 and rng.random() < 0.5:
                at = rng.randrange(len(script) - 1)
                script[at : at + 2] = script[at + 1], script[at]
            return _Watch([*script, CUT], last=False)

    run = Run()
    run.reflector._client = Server()  # type: ignore[assignment]
    run.reflector.start()
    try:
        run.ends_with({name: item["value"] for name, item in now.items()})
    finally:
        run.reflector.stop()


def test_kube_errors_say_what_was_asked() -> None:
    error = KubeError("get pods/a", "nothing")
    assert str(error) == "get pods/a: nothing"
