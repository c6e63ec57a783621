"""Nodes whose loader is too old for what is published for them. Pure.

Such a node keeps what it had in force and says `Stalled`; this is what to say of it elsewhere. A
loader that has said nothing yet, or that has in force what is wanted, is not too old; unless it
says so: what is in force may be the work of a newer one before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import UNSET
from tidegate_api.state import DIGEST_ANNOTATION, NodeState, NodeStateStatus, RuleSet, StateSlice

from tidegate_operator.cluster.kinds import Broken, Held

Key = tuple[str, str]


def unread(
    states: Mapping[Key, Held[NodeState] | Broken],
    rule_sets: Mapping[Key, Held[RuleSet] | Broken],
    slices: Mapping[Key, Held[StateSlice] | Broken],
) -> dict[str, str]:
    """Node → why its loader cannot put in force what is published for it."""
    of_rule_sets = {name: item.item.spec.format for (_, name), item in _held(rule_sets)}
    of_tables: dict[str, set[int]] = {}
    for _, item in _held(slices):
        of_tables.setdefault(item.item.spec.table, set()).add(item.item.spec.format)
    everything = {*of_rule_sets.values(), *(n for found in of_tables.values() for n in found)}
    found = {}
    for (_, name), item in _held(states):
        spec, status = item.item.spec, item.item.status
        wanted = (item.item.metadata.annotations or {}).get(DIGEST_ANNOTATION)
        if status is UNSET or not status.formats:
            continue
        if status.realised == wanted and not _says_so(status):
            continue
        reads = set(status.formats)
        if everything | {spec.format} <= reads:
            continue
        used = {spec.format, *(of_rule_sets.get(name, spec.format) for name in spec.rule_sets)}
        used.update(*(of_tables.get(table, ()) for table in spec.tables))
        if not used <= reads:
            found[name] = (
                f"the loader of node {name} reads {_words(reads)}, not {_words(used - reads)}, in "
                "which this is published: upgrade it; what was in force there stays"
            )
    return found


def _held(items: Mapping[Key, Any]) -> list[tuple[Key, Held[Any]]]:
    return [(key, item) for key, item in items.items() if isinstance(item, Held)]


def _says_so(status: NodeStateStatus) -> bool:
    return any(
        condition.type == "Stalled" and condition.reason == "UnknownFormat"
        for condition in status.conditions
    )


def _words(formats: set[int]) -> str:
    return f"format {' and '.join(map(str, sorted(formats)))}"
