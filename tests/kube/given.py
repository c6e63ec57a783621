"""Small objects and a reflector that counts, for the tests beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from tidegate_kube import Client, Pace, Reflector, Resource, resources

FAST = Pace(watch=20.0, silence=20.0, first_delay=0.02, longest_delay=0.5, page=7)
"""Small machines, few objects: pages that are really pages, and no long waits."""


def config_map(name: str, **data: str) -> bytes:
    return msgspec.json.encode(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}
    )


def data_of(raw: bytes) -> dict[str, str]:
    """A ConfigMap's data. ValueError if it has the key `invalid`."""
    data: dict[str, str] = msgspec.json.decode(raw).get("data") or {}
    if "invalid" in data:
        raise ValueError(f"told to be invalid: {data['invalid']}")
    return data


def namespace(client: Client, name: str) -> str:
    """Makes a namespace for one test: `name` must be nobody else's."""
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
    client.create(resources.NAMESPACES, msgspec.json.encode(body))
    return name


class Watching:
    """A reflector of ConfigMaps' data (or of what `decode` makes), started; counts `changed`."""

    def __init__(
        self,
        client: Client,
        namespace: str,
        resource: Resource = resources.CONFIG_MAPS,
        decode: Any = data_of,
        **more: Any,
    ) -> None:
        self.changes = 0
        more.setdefault("pace", FAST)
        self.reflector: Reflector[Any] = Reflector(
            client, resource, decode, self._note, namespace=namespace, **more
        )

    def _note(self) -> None:
        self.changes += 1

    def __enter__(self) -> Watching:
        self.reflector.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.reflector.stop()

    def held(self) -> dict[str, Any]:
        """Name to value."""
        return {name: value for (_, name), value in self.reflector.snapshot().items()}


def listed(client: Client, namespace: str) -> Mapping[str, dict[str, str]]:
    """What is really there."""
    found = {}
    for page in client.pages(resources.CONFIG_MAPS, namespace):
        for raw in page.items:
            item = msgspec.json.decode(raw)
            found[item["metadata"]["name"]] = item.get("data") or {}
    return found
