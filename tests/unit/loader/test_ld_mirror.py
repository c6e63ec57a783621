"""What of an API object is kept, and when the status is written: without a server."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from msgspec import UNSET
from support import loader_world as world
from support.waiting import until
from tidegate_api import state as api
from tidegate_kube import Client, NotFound
from tidegate_loader import mirror
from tidegate_loader.local import NodePaths
from tidegate_loader.mirror import Reporter, as_file, patch_of


class _Log:
    def warning(self, *_: object, **__: object) -> None:
        pass


class Server:
    """Keeps what is patched; refuses while told to."""

    def __init__(self) -> None:
        self.refuse = False
        self.asked: list[float] = []
        self.taken: list[dict[str, Any]] = []

    def patch(self, _resource: object, _name: str, body: bytes, subresource: str = "") -> bytes:
        assert subresource == "status"
        self.asked.append(time.monotonic())
        if self.refuse:
            raise NotFound("patch nodestates/n/status", "not found", code=404)
        self.taken.append(msgspec.json.decode(body)["status"])
        return b"{}"


def _reporter(server: Server) -> Reporter:
    return Reporter(cast(Client, server), "n", _Log())


def _status(endpoints: int) -> api.NodeStateStatus:
    return api.NodeStateStatus(endpoints=endpoints, formats=[1])


def test_an_object_is_kept_without_what_others_write_into_it() -> None:
    node = world.example().state().node
    plain = msgspec.to_builtins(node)
    noisy = plain | {"status": {"realised": "x", "unknown": 1}}
    noisy["metadata"] = plain["metadata"] | {
        "generation": 3,
        "resourceVersion": "7",
        "managedFields": [{"manager": "m"}],
        "annotations": {"somebody": "else"},
    }
    kept = msgspec.json.decode(as_file(msgspec.json.encode(noisy)))
    assert kept == plain | {"metadata": {"name": world.NODE, "generation": 3}}
    # When endpoints changed is what the loader measures by.
    when = {api.TRIGGER_ANNOTATION: "2026-01-02T03:04:05Z"}
    noisy["metadata"]["annotations"] |= when
    timed = msgspec.json.decode(as_file(msgspec.json.encode(noisy)))
    assert timed["metadata"]["annotations"] == when
    # A field this code does not know is not its to judge: `source` does.
    later = plain | {"spec": plain["spec"] | {"later": {"a": [1]}}}
    assert msgspec.json.decode(as_file(msgspec.json.encode(later)))["spec"] == later["spec"]
    with pytest.raises(msgspec.MsgspecError):
        as_file(b'{"apiVersion":"v1","kind":"Status","metadata":{}}')


def test_a_patch_leaves_nothing_of_what_was_said_before() -> None:
    """A merge patch keeps what it does not name: what is absent has to be named."""
    bare = msgspec.json.decode(patch_of(_status(0)))["status"]
    assert bare["realised"] is bare["peerSets"] is bare["observedGeneration"] is None
    full = api.NodeStateStatus(realised="d", observed_generation=4)
    said = msgspec.json.decode(patch_of(full))["status"]
    assert (said["realised"], said["observedGeneration"]) == ("d", 4)
    assert full.realised is not UNSET
    assert set(said) == {"realised", "observedGeneration", "endpoints", "drift", "formats",
                         "conditions", "peerSets"}  # fmt: skip


def test_changes_within_a_second_are_one() -> None:
    server = Server()
    reporter = _reporter(server)
    reporter.start()
    try:
        reporter.report(_status(0))
        until(lambda: len(server.taken) == 1, "the first at once", 30)
        for count in range(1, 50):
            reporter.report(_status(count))
        until(lambda: len(server.taken) == 2, "the last a second later", 30)
        assert [said["endpoints"] for said in server.taken] == [0, 49]
        assert server.asked[1] - server.asked[0] >= mirror.STATUS_SECONDS
        reporter.report(_status(49))  # nothing new
    finally:
        reporter.close()
    assert len(server.taken) == 2
    assert [_age(said["lastReportTime"]) < 300 for said in server.taken] == [True, True]


def _age(text: str) -> float:
    then = datetime.datetime.fromisoformat(text)
    return abs((datetime.datetime.now(datetime.UTC) - then).total_seconds())


def test_it_reports_though_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would be taken for dead. No second more often than it has to."""
    monkeypatch.setattr(mirror, "REPEAT_SECONDS", 1.5)
    server = Server()
    reporter = _reporter(server)
    reporter.start()
    try:
        reporter.report(_status(5))
        until(lambda: len(server.taken) >= 3, "three reports", 30)
    finally:
        reporter.close()
    texts = {said.pop("lastReportTime") for said in server.taken}
    assert len(texts) >= 3  # each is a change for who watches
    assert all(said == server.taken[0] for said in server.taken)


def test_a_report_is_small() -> None:
    """A hundred nodes write it every 60 to 90 seconds."""
    said = api.Condition(
        type="Ready",
        status="True",
        reason="Realised",
        message="the kernel holds the desired state",
        last_transition_time="2026-01-01T00:00:00Z",
        observed_generation=123,
    )
    full = api.NodeStateStatus(
        realised="d" * 40,
        peer_sets="e" * 40,
        endpoints=110,
        formats=[1, 2],
        conditions=[said],
        observed_generation=123,
        last_report_time="2026-01-01T00:00:00Z",
    )
    assert len(patch_of(full)) <= 512


class Listed:
    """A reflector that the test cuts off."""

    def __init__(self, plural: str, held: dict[tuple[str, str], bytes]) -> None:
        self.resource = SimpleNamespace(plural=plural)
        self.synced = True
        self.invalid: dict[object, str] = {}
        self.failing_since: float | None = None
        self.lists = 1
        self.asked = False
        self.held = held

    def health(self) -> SimpleNamespace:
        return SimpleNamespace(failing_since=self.failing_since, lists=self.lists, error="away")

    def snapshot(self) -> dict[tuple[str, str], bytes]:
        return self.held

    def relist(self) -> None:
        self.asked = True

    def listed(self) -> None:
        self.lists += 1
        self.failing_since = None


def _mirror(tmp_path: Path) -> tuple[mirror.Mirror, Listed, Listed]:
    found = mirror.Mirror(cast(Client, None), NodePaths(tmp_path, "n"), "n", _Log())
    for name in mirror.KINDS:
        (tmp_path / "objects" / name).mkdir(parents=True)
    nodes = Listed("nodestates", {("", "n"): b'{"spec":{}}'})
    slices = Listed("stateslices", {("", "ipcache-e1-0-of-1"): b"old"})
    found._nodes, found._slices = cast(Any, nodes), cast(Any, slices)
    return found, nodes, slices


@pytest.mark.parametrize("first", ["nodestates", "stateslices"])
def test_after_long_absence_nothing_moves_before_both_kinds_are_listed(
    first: str, tmp_path: Path
) -> None:
    """New addresses beside an old state, or the other way round, may mix up what numbers mean."""
    found, nodes, slices = _mirror(tmp_path)
    path = tmp_path / "objects" / "stateslices" / "ipcache-e1-0-of-1.json"
    assert (found._resync(), found._pass(), path.read_bytes()) == (False, 0.0, b"old")
    both = [nodes, slices] if first == "nodestates" else [slices, nodes]
    for item in both:
        item.failing_since = time.monotonic() - mirror.RESYNC_SECONDS - 1
    assert not found._resync()
    assert [item.asked for item in both] == [True, True]
    slices.held = {("", "ipcache-e1-0-of-1"): b"new"}
    for item in both:  # a watch that goes on where it was has not told everything yet
        item.failing_since = None
    assert (found._resync(), found._pass(), path.read_bytes()) == (False, 0.0, b"old")
    both[0].listed()
    assert (found._resync(), found._pass(), path.read_bytes()) == (False, 0.0, b"old")
    both[1].listed()
    assert (found._resync(), found._pass(), path.read_bytes()) == (True, 0.0, b"new")


def test_after_short_absence_news_are_taken_as_they_come(tmp_path: Path) -> None:
    found, nodes, slices = _mirror(tmp_path)
    nodes.failing_since = time.monotonic() - mirror.RESYNC_SECONDS / 2
    slices.held = {("", "ipcache-e1-0-of-1"): b"new"}
    assert (found._resync(), found._pass(), nodes.asked) == (False, 0.0, False)
    assert (tmp_path / "objects/stateslices/ipcache-e1-0-of-1.json").read_bytes() == b"new"


def test_it_knows_what_it_has_written(tmp_path: Path) -> None:
    """And what it has removed; before it is asked for the first time, anything."""
    found, nodes, slices = _mirror(tmp_path)
    nodes.held = {}
    found._pass()
    assert [found.changes(), found.changes()] == [None, frozenset()]
    held = {("", "ipcache-e1-0-of-2"): b"a", ("", "ipcache-e1-1-of-2"): b"b"}
    nodes.held, slices.held = {("", "n"): b'{"spec":{}}'}, dict(held)
    found._pass()
    files = {f"stateslices/{name}.json" for _, name in held}
    assert found.changes() == files | {"nodestates/n.json"}
    slices.held = held | {("", "ipcache-e1-1-of-2"): b"c"}
    found._pass()
    slices.held = dict(slices.held)
    found._pass()
    assert found.changes() == {"stateslices/ipcache-e1-1-of-2.json"}
    found.realised(frozenset(files))
    found._pass()
    assert found.changes() == {"stateslices/ipcache-e1-0-of-1.json"}, "nobody names it: removed"
    assert not (tmp_path / "objects/stateslices/ipcache-e1-0-of-1.json").exists()
    slices.held = {("", "ipcache-e1-0-of-2"): b"a"}
    found._pass()
    assert found.changes() == frozenset(), "it goes when no state in force names it"
    found.realised(frozenset({"stateslices/ipcache-e1-0-of-2.json"}))
    found._pass()
    assert found.changes() == {"stateslices/ipcache-e1-1-of-2.json"}
    slices.held = dict(held)
    found._pass()
    assert found.changes() == {"stateslices/ipcache-e1-1-of-2.json"}, "written anew"
    assert (tmp_path / "objects/stateslices/ipcache-e1-1-of-2.json").read_bytes() == b"b"


def test_news_end_the_pause_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A NodeState that is made half an hour after its node has its status soon."""
    monkeypatch.setattr(mirror, "RETRY_FIRST", 3600.0)
    monkeypatch.setattr(mirror, "RETRY_LAST", 3600.0)
    server = Server()
    server.refuse = True
    reporter = _reporter(server)
    reporter.start()
    try:
        reporter.report(_status(5))
        until(lambda: len(server.asked) == 1, "the refusal", 30)
        server.refuse = False
        reporter.try_again()
        until(lambda: len(server.taken) == 1, "the status", 30)
    finally:
        reporter.close()
