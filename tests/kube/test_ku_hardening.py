"""What happens to API servers, done to a real one: the reflector comes back by itself."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from kube.given import FAST, Watching, config_map, data_of, listed, namespace
from support.apiserver import ApiServer, create, install_crds, running
from support.fault_proxy import proxied
from support.waiting import until
from tidegate_kube import (
    Access,
    Client,
    Gone,
    KubeError,
    NotFound,
    Resource,
    ServerError,
    Unreachable,
    resources,
)

pytestmark = [pytest.mark.apiserver, pytest.mark.slow]

CONFIG_MAPS = resources.CONFIG_MAPS
ROLES = Resource("rbac.authorization.k8s.io", "v1", "clusterroles", "ClusterRole", False)
BINDINGS = Resource(
    "rbac.authorization.k8s.io", "v1", "clusterrolebindings", "ClusterRoleBinding", False
)
SECONDS = 60.0
SHORT = dataclasses.replace(FAST, watch=2.0)
"""A server that is asked to end waits until its watches have."""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """May be killed. Forgets its past after a second."""
    directory = tmp_path_factory.mktemp("own-apiserver")
    with running(directory, "--etcd-compaction-interval=1s") as server:
        yield server


@pytest.fixture
def client(own: ApiServer) -> Iterator[Client]:
    client = own.client()
    yield client
    client.close()


@pytest.fixture
def space(client: Client, request: pytest.FixtureRequest) -> str:
    name = request.node.name.replace("_", "-").removeprefix("test-")[:60].rstrip("-")
    return namespace(client, name)


def _equal(watching: Watching, client: Client, space: str) -> bool:
    return watching.reflector.synced and watching.held() == listed(client, space)


def _fill(client: Client, space: str, count: int = 20) -> None:
    for number in range(count):
        client.create(CONFIG_MAPS, config_map(f"c{number}", n=str(number)), space)


def _forgotten(client: Client, space: str, version: str) -> bool:
    """The server does not remember `version` any more."""
    query = {"resourceVersion": version, "resourceVersionMatch": "Exact", "limit": "1"}
    try:
        client.raw("GET", CONFIG_MAPS.path(space), query=query)
    except Gone:
        return True
    # Compaction moves only when there is something to compact.
    client.patch(CONFIG_MAPS, "moving", config_map("moving", at=str(time.time())), space,
                 kind="apply", field_manager="test")  # fmt: skip
    return False


def _version(client: Client, space: str) -> str:
    return next(iter(client.pages(CONFIG_MAPS, space))).resource_version


def test_killed_and_restarted(own: ApiServer, client: Client, space: str) -> None:
    _fill(client, space)
    with Watching(own.client(), space) as watching:
        reflector = watching.reflector
        until(lambda: reflector.synced, "synced", SECONDS)
        before = reflector.snapshot()
        own.kill()
        until(lambda: reflector.health().failing_since, "notices", SECONDS)
        assert reflector.health().error
        assert reflector.synced, "what is held is still the last that was true"
        assert reflector.snapshot() is before
        own.start()
        # Through a client of its own: the reflector may not be there yet.
        client.delete(CONFIG_MAPS, "c3", space)
        client.create(CONFIG_MAPS, config_map("new", a="1"), space)
        until(lambda: _equal(watching, client, space), "equal", SECONDS)
        until(lambda: reflector.health().failing_since is None, "well again", SECONDS)
        after = reflector.snapshot()
        assert after[space, "c7"] is before[space, "c7"]


def test_terminated_and_restarted_many_times(own: ApiServer, client: Client, space: str) -> None:
    _fill(client, space, 5)
    with Watching(own.client(), space, pace=SHORT) as watching:
        until(lambda: watching.reflector.synced, "synced", SECONDS)
        for turn in range(2):
            own.terminate()
            own.start()
            client.patch(CONFIG_MAPS, "c1", config_map("c1", turn=str(turn)), space)
            until(lambda: _equal(watching, client, space), "equal", SECONDS)


def test_vanished_while_nobody_watched(own: ApiServer, client: Client, space: str) -> None:
    """Deleted, and the server has forgotten when: 410, a new list, and they are gone."""
    _fill(client, space)
    with (
        proxied(own, seed=1) as proxy,
        Watching(Client(Access(server=proxy.url)), space) as watching,
    ):
        reflector = watching.reflector
        until(lambda: reflector.synced, "synced", SECONDS)
        before = reflector.snapshot()
        proxy.blocked = True
        proxy.cut_all()
        until(lambda: reflector.health().failing_since, "cut off", SECONDS)
        version = _version(client, space)
        for number in range(0, 20, 2):
            client.delete(CONFIG_MAPS, f"c{number}", space)
        client.delete(CONFIG_MAPS, "c1", space)
        client.create(CONFIG_MAPS, config_map("c1", again="yes"), space)
        until(lambda: _forgotten(client, space, version), "compacted", SECONDS)
        # Only a server that has just started has nothing of the past in its memory.
        own.terminate()
        own.start()
        lists = reflector.health().lists
        proxy.blocked = False
        until(lambda: _equal(watching, client, space), "equal", SECONDS)
        assert reflector.health().lists == lists + 1
        after = reflector.snapshot()
        assert after[space, "c1"] == {"again": "yes"}
        assert after[space, "c3"] is before[space, "c3"]


def test_forgotten_half_way_through_a_list(tmp_path: Path) -> None:
    """A continue token that is too old: the list begins again, all at once."""
    with running(tmp_path, "--etcd-compaction-interval=1s", "--watch-cache=false") as server:
        client = server.client()
        space = namespace(client, "half-way")
        _fill(client, space)
        pages = client.pages(CONFIG_MAPS, space, limit=2)
        version = next(pages).resource_version
        until(lambda: _forgotten(client, space, version), "compacted", SECONDS)
        with pytest.raises(Gone):
            next(pages)

        slow = threading.Event()

        def decode(raw: bytes) -> dict[str, str]:
            if not slow.is_set():
                slow.set()
                version = _version(client, space)
                until(lambda: _forgotten(client, space, version), "compacted", SECONDS)
            return data_of(raw)

        with Watching(server.client(), space, decode=decode) as watching:
            until(lambda: _equal(watching, client, space), "equal", SECONDS)
            health = watching.reflector.health()
            assert (health.lists, health.error) == (1, "")
            client.delete(CONFIG_MAPS, "c3", space)
            until(lambda: _equal(watching, client, space), "equal", SECONDS)


def test_a_watch_that_died_without_a_word(own: ApiServer, client: Client, space: str) -> None:
    _fill(client, space, 3)
    pace = dataclasses.replace(FAST, silence=1.5)
    with (
        proxied(own, seed=2) as proxy,
        Watching(Client(Access(server=proxy.url)), space, pace=pace) as watching,
    ):
        reflector = watching.reflector
        until(lambda: reflector.synced, "synced", SECONDS)
        proxy.mute_all = True
        client.create(CONFIG_MAPS, config_map("new"), space)
        until(lambda: "timed out" in reflector.health().error, "noticed", SECONDS)
        proxy.mute_all = False
        until(lambda: _equal(watching, client, space), "equal", SECONDS)
        assert reflector.health().lists == 1, "resumed where it was"


def test_etcd_stands_still(own: ApiServer, client: Client, space: str) -> None:
    _fill(client, space, 3)
    with Watching(own.client(), space) as watching:
        until(lambda: watching.reflector.synced, "synced", SECONDS)
        own.pause_etcd()
        try:
            with pytest.raises((ServerError, Unreachable)):
                client.create(CONFIG_MAPS, config_map("late"), space, timeout=1.0)
        finally:
            own.resume_etcd()
        until(lambda: _written(client, space, "after"), "writes again", SECONDS)
        until(lambda: _equal(watching, client, space), "equal", SECONDS)
        assert watching.reflector.synced


def _written(client: Client, space: str, name: str) -> bool:
    try:
        create(client, CONFIG_MAPS, msgspec.json.decode(config_map(name)), space)
    except KubeError:
        return False
    return True


def test_token_rotated(own: ApiServer, client: Client, space: str, tmp_path: Path) -> None:
    """The old one is refused from now on; the file has the new one a moment later."""
    _allow(client, "rotating", space)
    file = tmp_path / "token"
    file.write_text(own.token("rotating", space))
    access = dataclasses.replace(own.access, certificate=None, token=file)
    pace = dataclasses.replace(FAST, watch=1.0)
    with Watching(own.client(access), space, pace=pace) as watching:
        reflector = watching.reflector
        until(lambda: reflector.synced, "synced", SECONDS)
        # Made again under its name: tokens of the one before are worth nothing.
        client.delete(resources.SERVICE_ACCOUNTS, "rotating", space)
        fresh = own.token("rotating", space)
        until(lambda: "401" in reflector.health().error, "refused", SECONDS)
        assert reflector.synced
        client.create(CONFIG_MAPS, config_map("new"), space)
        link = tmp_path / "new-token"
        link.write_text(fresh)
        link.rename(file)
        until(lambda: _equal(watching, client, space), "equal", SECONDS)
        until(lambda: reflector.health().failing_since is None, "well again", SECONDS)


def test_ca_rotated(tmp_path: Path) -> None:
    """First the bundle has both, then the server uses the new one; and the other way round."""
    with running(tmp_path) as server:
        bundle = tmp_path / "bundle.crt"
        bundle.write_bytes(server.ca.read_bytes())
        access = dataclasses.replace(server.access, ca=bundle)
        client = server.client(access)
        with Watching(server.client(access), "default", pace=SHORT) as watching:
            until(lambda: watching.reflector.synced, "synced", SECONDS)
            fresh = server.change_ca()
            server.terminate()
            server.access = dataclasses.replace(server.access, ca=fresh)
            server.start()
            until(
                lambda: "certificate verify failed" in watching.reflector.health().error,
                "does not trust it",
                SECONDS,
            )
            with pytest.raises(Unreachable, match="certificate verify failed"):
                client.get(CONFIG_MAPS, "new", "default")
            bundle.write_bytes(server.ca.read_bytes() + fresh.read_bytes())
            client.create(CONFIG_MAPS, config_map("new"), "default")
            until(lambda: "new" in watching.held(), "trusts it", SECONDS)


def _allow(client: Client, account: str, space: str) -> None:
    """Lists and watches ConfigMaps everywhere."""
    rules = [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["list", "watch"]}]
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
            "metadata": {"name": f"{space}-{account}"}, "rules": rules}  # fmt: skip
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": f"{space}-{account}"},
        "roleRef": {
            "apiGroup": "rbac.authorization.k8s.io",
            "kind": "ClusterRole",
            "name": f"{space}-{account}",
        },
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": space}],
    }
    create(client, ROLES, role)
    create(client, BINDINGS, binding)


def test_forbidden_for_a_while(own: ApiServer, client: Client, space: str) -> None:
    """Not synced, and never empty."""
    _fill(client, space, 3)
    _allow(client, "watcher", space)
    access = own.account("watcher", space)
    pace = dataclasses.replace(FAST, watch=1.0)
    with Watching(own.client(access), space, pace=pace) as watching:
        reflector = watching.reflector
        until(lambda: reflector.synced, "synced", SECONDS)
        before, changes = reflector.snapshot(), watching.changes
        client.delete(BINDINGS, f"{space}-watcher")
        until(lambda: not reflector.synced, "not synced", SECONDS)
        assert reflector.snapshot() is before
        assert "403" in reflector.health().error
        until(lambda: watching.changes == changes + 1, "told once", SECONDS)
        client.delete(CONFIG_MAPS, "c1", space)
        _allow(client, "watcher", space)
        until(lambda: _equal(watching, client, space), "equal", SECONDS)
        assert watching.held().keys() == {"c0", "c2"}


def test_crd_deleted_and_made_again(own: ApiServer, client: Client) -> None:
    install_crds(client, "nodestates")
    create(client, resources.NODE_STATES, _node_state("n1", 1))

    def decode(raw: bytes) -> Any:
        return msgspec.json.decode(raw)["spec"]["term"]

    with Watching(own.client(), "", resources.NODE_STATES, decode) as watching:
        reflector = watching.reflector
        until(lambda: watching.held() == {"n1": 1}, "held", SECONDS)
        client.delete(resources.CRDS, "nodestates.tidegate.dev")
        until(lambda: not reflector.synced, "not synced", SECONDS)
        assert "404" in reflector.health().error
        with pytest.raises(NotFound) as missing:
            client.get(resources.NODE_STATES, "n1")
        assert missing.value.kind_missing
        install_crds(client, "nodestates")
        until(lambda: reflector.synced, "synced again", SECONDS)
        create(client, resources.NODE_STATES, _node_state("n2", 2))
        until(lambda: watching.held() == {"n2": 2}, "the new one", SECONDS)


def test_crd_that_is_not_there_yet(own: ApiServer, client: Client) -> None:
    with Watching(own.client(), "", resources.RULE_SETS, len) as watching:
        until(lambda: "404" in watching.reflector.health().error, "asked", SECONDS)
        assert not watching.reflector.synced
        install_crds(client, "rulesets")
        until(lambda: watching.reflector.synced, "synced", SECONDS)


def _node_state(name: str, term: int) -> dict[str, Any]:
    return {
        "apiVersion": "tidegate.dev/v1alpha1",
        "kind": "NodeState",
        "metadata": {"name": name},
        "spec": {
            "format": 1,
            "mode": "Enforcing",
            "endpoints": [],
            "ruleSets": [],
            "peerSets": [],
            "tables": {},
            "term": term,
        },
    }
