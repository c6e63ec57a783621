"""What of an API object is kept, and when the status is written: without a server."""

from __future__ import annotations

import time
from typing import Any, cast

import msgspec
import pytest
from msgspec import UNSET
from support import loader_world as world
from support.waiting import until
from tidegate_api import state as api
from tidegate_kube import Client, NotFound
from tidegate_loader import mirror
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
    # A field this code does not know is not its to judge: `source` does.
    later = plain | {"spec": plain["spec"] | {"later": {"a": [1]}}}
    assert msgspec.json.decode(as_file(msgspec.json.encode(later)))["spec"] == later["spec"]
    with pytest.raises(msgspec.MsgspecError):
        as_file(b'{"apiVersion":"v1","kind":"Status","metadata":{}}')


def test_a_patch_leaves_nothing_of_what_was_said_before() -> None:
    """A merge patch keeps what it does not name: what is absent has to be named."""
    bare = msgspec.json.decode(patch_of(_status(0)))["status"]
    assert bare["realised"] is bare["observedGeneration"] is None
    full = api.NodeStateStatus(realised="d", observed_generation=4)
    said = msgspec.json.decode(patch_of(full))["status"]
    assert (said["realised"], said["observedGeneration"]) == ("d", 4)
    assert full.realised is not UNSET
    assert set(said) == {"realised", "observedGeneration", "endpoints", "drift", "formats",
                         "conditions"}  # fmt: skip


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
