"""What `support.stored` puts into etcd is what the API server makes of the same."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
from support import sites, stored, town_api, waiting
from support.apiserver import ApiServer
from tidegate_kube import Client, KubeError, Resource, resources

pytestmark = pytest.mark.apiserver

OWN = ("uid", "resourceVersion", "creationTimestamp", "managedFields")
"""What two objects of the same content differ in."""
ADDRESSES = Resource("networking.k8s.io", "v1", "ipaddresses", "IPAddress", False)
VIP = "10.96.77.1"
KINDS = ((resources.SERVICES, "stored"), (resources.ENDPOINT_SLICES, "stored"), (ADDRESSES, VIP))


def held(client: Client) -> list[dict[str, Any]]:
    found = []
    for resource, name in KINDS:
        namespace = "default" if resource.namespaced else ""
        found.append(json.loads(client.get(resource, name, namespace)))
        for word in OWN:
            found[-1]["metadata"].pop(word, None)
    return found


def listed(client: Client, resource: Resource, name: str) -> bool:
    return any(
        msgspec.json.decode(raw)["metadata"]["name"] == name
        for page in client.pages(resource)
        for raw in page.items
    )


def test_what_is_stored_is_what_the_server_would_keep(apiserver: ApiServer) -> None:
    trees = sites.service("stored", VIP, [sites.ready("10.244.0.3"), sites.ready("10.244.1.2")])
    with contextlib.closing(apiserver.client()) as client:
        for tree in trees:
            town_api.apply(client, tree)
        made = held(client)
        for resource, name in KINDS[:2]:
            town_api.remove(client, resource, name, "default")
        waiting.until(lambda: not any(listed(client, *kind) for kind in KINDS), "all is gone", 30)
        stored.store(apiserver.etcd_url, trees)
        waiting.until(lambda: all(listed(client, *kind) for kind in KINDS), "all is listed", 30)
        assert held(client) == made
        body = {**trees[0], "metadata": {"name": "another", "namespace": "default"}}
        with pytest.raises(KubeError, match="already allocated"):
            client.create(resources.SERVICES, msgspec.json.encode(body), "default")
        for resource, name in KINDS[:2]:
            town_api.remove(client, resource, name, "default")
