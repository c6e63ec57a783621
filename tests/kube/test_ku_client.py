"""Requests against a real API server: what comes back, and every error as its own type."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import msgspec
import pytest
from kube.given import config_map, namespace
from support.apiserver import ApiServer
from support.fault_proxy import proxied
from tidegate_kube import (
    Access,
    AlreadyExists,
    Client,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    Unauthorized,
    Unreachable,
    resources,
)

pytestmark = pytest.mark.apiserver

CONFIG_MAPS = resources.CONFIG_MAPS


@pytest.fixture(scope="module")
def client(apiserver: ApiServer) -> Iterator[Client]:
    client = apiserver.client()
    yield client
    client.close()


@pytest.fixture(scope="module")
def space(client: Client) -> str:
    return namespace(client, "ku-client")


def _meta(body: bytes) -> dict[str, str]:
    meta: dict[str, str] = msgspec.json.decode(body)["metadata"]
    return meta


def test_life_of_an_object(client: Client, space: str) -> None:
    made = client.create(CONFIG_MAPS, config_map("life", a="1"), space)
    read = client.get(CONFIG_MAPS, "life", space)
    assert msgspec.json.decode(read) == msgspec.json.decode(made)
    body = msgspec.json.decode(made) | {"data": {"a": "2"}}
    updated = client.update(CONFIG_MAPS, "life", msgspec.json.encode(body), space)
    assert msgspec.json.decode(updated)["data"] == {"a": "2"}
    patched = client.patch(CONFIG_MAPS, "life", b'{"data": {"b": "3"}}', space)
    assert msgspec.json.decode(patched)["data"] == {"a": "2", "b": "3"}
    applied = client.patch(
        CONFIG_MAPS, "life", config_map("life", c="4"), space, kind="apply", field_manager="test"
    )
    assert msgspec.json.decode(applied)["data"] == {"a": "2", "b": "3", "c": "4"}
    client.delete(CONFIG_MAPS, "life", space, uid=_meta(made)["uid"])
    with pytest.raises(NotFound) as gone:
        client.get(CONFIG_MAPS, "life", space)
    assert not gone.value.kind_missing
    assert str(gone.value) == (
        'get configmaps/ku-client/life: 404 NotFound: configmaps "life" not found'
    )


def test_status_subresource_is_its_own(client: Client) -> None:
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "ku-client"}}
    made = msgspec.json.decode(client.create(resources.NODES, msgspec.json.encode(node)))
    made["status"] = {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}
    body = msgspec.json.encode(made)
    answer = client.update(resources.NODES, "ku-client", body, subresource="status")
    assert msgspec.json.decode(answer)["status"]["addresses"] == made["status"]["addresses"]
    client.delete(resources.NODES, "ku-client")


def test_conflicts(client: Client, space: str) -> None:
    made = client.create(CONFIG_MAPS, config_map("conflict"), space)
    with pytest.raises(AlreadyExists):
        client.create(CONFIG_MAPS, config_map("conflict"), space)
    client.patch(CONFIG_MAPS, "conflict", b'{"data": {"a": "1"}}', space)
    with pytest.raises(Conflict):
        client.update(CONFIG_MAPS, "conflict", made, space)
    with pytest.raises(Conflict):
        client.delete(CONFIG_MAPS, "conflict", space, uid="00000000-0000-0000-0000-000000000000")
    version = _meta(made)["resourceVersion"]
    with pytest.raises(Conflict):
        client.delete(CONFIG_MAPS, "conflict", space, resource_version=version)


def test_refused(client: Client, space: str, apiserver: ApiServer) -> None:
    with pytest.raises(Invalid, match="BadRequest"):
        client.create(CONFIG_MAPS, b"{", space)
    with pytest.raises(Invalid, match="RFC 1123"):
        client.create(CONFIG_MAPS, config_map("No Name"), space)
    with pytest.raises(NotFound) as missing:
        client.get(dataclasses.replace(CONFIG_MAPS, plural="nothings"), "x", space)
    assert missing.value.kind_missing
    with pytest.raises(NotFound) as missing:
        client.get(dataclasses.replace(resources.NODE_STATES, group="nobody.example"), "x")
    assert missing.value.kind_missing
    nobody = apiserver.client(apiserver.account("nobody"))
    with pytest.raises(Forbidden, match="list pods: 403"):
        list(nobody.pages(resources.PODS))
    stranger = apiserver.client(
        dataclasses.replace(apiserver.access, certificate=None, token=b"forged")
    )
    with pytest.raises(Unauthorized):
        stranger.get(CONFIG_MAPS, "x", space)


def test_pages(client: Client, space: str) -> None:
    for number in range(5):
        body = msgspec.json.decode(config_map(f"page-{number}"))
        body["metadata"]["labels"] = {"paged": "yes"}
        client.create(CONFIG_MAPS, msgspec.json.encode(body), space)
    pages = list(client.pages(CONFIG_MAPS, space, label_selector="paged=yes", limit=2))
    assert [len(page.items) for page in pages] == [2, 2, 1]
    assert [page.last for page in pages] == [False, False, True]
    assert len({page.resource_version for page in pages}) == 1
    names = [_meta(bytes(raw))["name"] for page in pages for raw in page.items]
    assert names == [f"page-{number}" for number in range(5)]
    one = list(client.pages(CONFIG_MAPS, space, field_selector="metadata.name=page-3"))
    assert [_meta(bytes(raw))["name"] for raw in one[0].items] == ["page-3"]


def test_a_page_is_no_object(apiserver: ApiServer, client: Client, space: str) -> None:
    """As a proxy answers that has nothing better."""
    client.create(CONFIG_MAPS, config_map("behind"), space)
    with proxied(apiserver, seed=1) as proxy:
        behind = Client(Access(proxy.url))
        proxy.kinds, proxy.rate = frozenset({"page"}), 1.0
        calls: list[Callable[[], object]] = [
            lambda: behind.get(CONFIG_MAPS, "behind", space),
            lambda: behind.create(CONFIG_MAPS, config_map("never"), space),
            lambda: behind.update(CONFIG_MAPS, "behind", config_map("behind"), space),
            lambda: behind.delete(CONFIG_MAPS, "behind", space),
        ]
        for call in calls:
            with pytest.raises(Unreachable, match="not an object of the API"):
                call()
        proxy.rate = 0.0
        assert _meta(behind.get(CONFIG_MAPS, "behind", space))["name"] == "behind"
        behind.close()


def test_unreachable(apiserver: ApiServer) -> None:
    nowhere = apiserver.client(dataclasses.replace(apiserver.access, server="https://127.0.0.1:1"))
    with pytest.raises(Unreachable, match="refused"):
        nowhere.get(CONFIG_MAPS, "x", "default")
    stranger = apiserver.client(dataclasses.replace(apiserver.access, ca=None))
    with pytest.raises(Unreachable, match="certificate verify failed"):
        stranger.get(CONFIG_MAPS, "x", "default")
    misnamed = apiserver.client(dataclasses.replace(apiserver.access, server_name="other.example"))
    with pytest.raises(Unreachable, match=r"other\.example"):
        misnamed.get(CONFIG_MAPS, "x", "default")
    renamed = apiserver.client(dataclasses.replace(apiserver.access, server_name="kubernetes"))
    assert b"gitVersion" in renamed.raw("GET", "/version")
