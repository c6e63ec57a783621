"""What an operator has told people, read from the API server."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from support.kstatus import kstatus
from support.operator_town import SECONDS, Town
from support.waiting import until
from tidegate_kube import NotFound, resources

NAME = "networkpolicy.p"
"""The status of policy p in namespace default."""


def held(town: Town, name: str = NAME) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(
            town.client.get(resources.POLICY_STATUSES, name, "default")
        )
    except NotFound:
        return {}
    return found


def conditions(found: dict[str, Any]) -> dict[str, str]:
    return {c["type"]: c["status"] for c in found.get("status", {}).get("conditions", [])}


def counts(found: dict[str, Any]) -> tuple[int, int]:
    nodes = found.get("status", {}).get("nodes", {})
    return nodes.get("realised", -1), nodes.get("total", -1)


def say(town: Town, want: dict[str, str], nodes: tuple[int, int]) -> dict[str, Any]:
    """Wait until the status says so, of the object's own newest generation."""

    def done() -> bool:
        found = held(town)
        return (conditions(found), counts(found)) == (want, nodes) and found["status"][
            "observedGeneration"
        ] == found["metadata"]["generation"]

    until(done, f"{want} {nodes}", SECONDS)
    found = held(town)
    assert kstatus(found) == [READ_AS[tuple(name for name in want if name not in SILENT)]]
    return found


REALISING = {"Ready": "False", "Reconciling": "True"}
READY = {"Ready": "True"}
STALLED = {"Ready": "False", "Stalled": "True"}
SILENT = {"NodesSilent": "True"}
"""Beside one of the others."""
READ_AS = {
    tuple(REALISING): "InProgress",
    tuple(READY): "Current",
    tuple(STALLED): "Failed",
}
"""By kstatus, and so by Flux and `flux wait`."""


def events(town: Town) -> list[tuple[str, str, str]]:
    found = [
        msgspec.json.decode(raw)
        for page in town.client.pages(resources.EVENTS)
        for raw in page.items
    ]
    return sorted((e["regarding"]["name"], e["type"], e["reason"]) for e in found)


def identities(town: Town) -> dict[str, dict[str, Any]]:
    found = [
        msgspec.json.decode(raw)
        for page in town.client.pages(resources.IDENTITIES)
        for raw in page.items
    ]
    return {item["metadata"]["name"]: item for item in found}
