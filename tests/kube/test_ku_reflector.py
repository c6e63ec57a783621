"""The reflector against a real API server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import msgspec
import pytest
from kube.given import FAST, Watching, config_map, data_of, namespace
from support.apiserver import ApiServer
from support.waiting import until
from tidegate_kube import Client, resources

pytestmark = pytest.mark.apiserver

CONFIG_MAPS = resources.CONFIG_MAPS
SECONDS = 30.0


@pytest.fixture(scope="module")
def client(apiserver: ApiServer) -> Iterator[Client]:
    client = apiserver.client()
    yield client
    client.close()


@pytest.fixture
def space(client: Client, request: pytest.FixtureRequest) -> str:
    return namespace(client, request.node.name.replace("_", "-").removeprefix("test-"))


def test_list_then_events(client: Client, space: str) -> None:
    for number in range(20):
        client.create(CONFIG_MAPS, config_map(f"c{number}", n=str(number)), space)
    with Watching(client, space) as watching:
        until(lambda: watching.reflector.synced, "synced", SECONDS)
        assert watching.held() == {f"c{number}": {"n": str(number)} for number in range(20)}
        assert watching.changes == 1
        client.create(CONFIG_MAPS, config_map("new", a="1"), space)
        until(lambda: watching.held().get("new") == {"a": "1"}, "created", SECONDS)
        client.patch(CONFIG_MAPS, "new", b'{"data": {"a": "2"}}', space)
        until(lambda: watching.held().get("new") == {"a": "2"}, "changed", SECONDS)
        client.delete(CONFIG_MAPS, "new", space)
        until(lambda: "new" not in watching.held(), "deleted", SECONDS)
        assert watching.changes == 4
        health = watching.reflector.health()
        assert (health.lists, health.restarts, health.error) == (1, 0, "")


def test_a_snapshot_never_changes(client: Client, space: str) -> None:
    client.create(CONFIG_MAPS, config_map("kept", a="1"), space)
    with Watching(client, space) as watching:
        until(lambda: watching.reflector.synced, "synced", SECONDS)
        before = watching.reflector.snapshot()
        assert watching.reflector.snapshot() is before
        client.create(CONFIG_MAPS, config_map("other"), space)
        until(lambda: "other" in watching.held(), "created", SECONDS)
        after = watching.reflector.snapshot()
        assert list(before) == [(space, "kept")]
        assert after[space, "kept"] is before[space, "kept"]


def test_what_decode_does_not_see_changes_nothing(client: Client, space: str) -> None:
    client.create(CONFIG_MAPS, config_map("labelled", a="1"), space)
    with Watching(client, space) as watching:
        until(lambda: watching.reflector.synced, "synced", SECONDS)
        before = watching.reflector.snapshot()
        client.patch(CONFIG_MAPS, "labelled", b'{"metadata": {"labels": {"x": "y"}}}', space)
        client.create(CONFIG_MAPS, config_map("after"), space)
        until(lambda: "after" in watching.held(), "created", SECONDS)
        assert watching.changes == 2
        assert watching.reflector.snapshot()[space, "labelled"] is before[space, "labelled"]


def test_an_invalid_object_keeps_its_last_valid_meaning(client: Client, space: str) -> None:
    client.create(CONFIG_MAPS, config_map("turns", a="1"), space)
    client.create(CONFIG_MAPS, config_map("never", invalid="yes"), space)
    with Watching(client, space) as watching:
        reflector = watching.reflector
        until(lambda: reflector.synced, "synced", SECONDS)
        assert reflector.invalid == {(space, "never"): "told to be invalid: yes"}
        client.patch(CONFIG_MAPS, "turns", b'{"data": {"invalid": "now"}}', space)
        until(lambda: (space, "turns") in reflector.invalid, "invalid", SECONDS)
        assert watching.held() == {"turns": {"a": "1"}}
        client.patch(CONFIG_MAPS, "turns", b'{"data": {"invalid": null, "a": "2"}}', space)
        until(lambda: watching.held() == {"turns": {"a": "2"}}, "valid again", SECONDS)
        client.delete(CONFIG_MAPS, "never", space)
        until(lambda: reflector.invalid == {}, "nothing invalid", SECONDS)
        client.patch(CONFIG_MAPS, "turns", b'{"data": {"invalid": "now"}}', space)
        client.delete(CONFIG_MAPS, "turns", space)
        until(lambda: not watching.held() and not reflector.invalid, "all gone", SECONDS)


def test_selectors(client: Client, space: str) -> None:
    with Watching(client, space, field_selector="metadata.name=mine") as watching:
        until(lambda: watching.reflector.synced, "synced", SECONDS)
        client.create(CONFIG_MAPS, config_map("other"), space)
        client.create(CONFIG_MAPS, config_map("mine", a="1"), space)
        until(lambda: watching.held() == {"mine": {"a": "1"}}, "only mine", SECONDS)
        client.delete(CONFIG_MAPS, "mine", space)
        until(lambda: watching.held() == {}, "deleted", SECONDS)


def test_a_write_of_our_own_is_known_at_once(client: Client, space: str) -> None:
    with Watching(client, space) as watching:
        until(lambda: watching.reflector.synced, "synced", SECONDS)
        for number in range(50):
            body = config_map("own", n=str(number))
            if number == 0:
                answer = client.create(CONFIG_MAPS, body, space)
            else:
                answer = client.patch(CONFIG_MAPS, "own", body, space)
            watching.reflector.remember(answer)
            # An event of an earlier write may arrive now; it must not undo this one.
            assert watching.held() == {"own": {"n": str(number)}}
        uid = msgspec.json.decode(answer)["metadata"]["uid"]
        client.delete(CONFIG_MAPS, "own", space)
        watching.reflector.forget(space, "own", uid)
        client.create(CONFIG_MAPS, config_map("after"), space)
        until(lambda: "after" in watching.held(), "created", SECONDS)
        assert watching.held() == {"after": {}}
        watching.reflector.remember(answer)
        assert watching.held() == {"after": {}}, "older than what the watch has brought"


def test_stops_at_once_and_keeps_what_it_has(client: Client, space: str) -> None:
    client.create(CONFIG_MAPS, config_map("kept", a="1"), space)
    with Watching(client, space) as watching:
        until(lambda: watching.reflector.synced, "synced", SECONDS)
    assert not watching.reflector.health().alive
    assert watching.held() == {"kept": {"a": "1"}}


def test_equal_after_a_list_anew(client: Client, space: str) -> None:
    for number in range(20):
        client.create(CONFIG_MAPS, config_map(f"c{number}", n=str(number)), space)
    decoded: list[str] = []

    def decode(raw: bytes) -> dict[str, str]:
        decoded.append("")
        return data_of(raw)

    pace = replace(FAST, watch=1.0, relist=0.5)
    with Watching(client, space, decode=decode, pace=pace) as watching:
        until(lambda: watching.reflector.synced, "synced", SECONDS)
        before = watching.reflector.snapshot()
        until(lambda: watching.reflector.health().lists >= 3, "listed anew", SECONDS)
        assert watching.reflector.snapshot() is before
        assert (watching.changes, len(decoded)) == (1, 20)
