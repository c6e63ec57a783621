"""`tidegate lb list`: Services as the kernel has them.

Formats and flag words as Cilium's tools print the same thing; docs/cli.md. May not live here:
reading maps (`live`).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from msgspec import UNSET
from tidegate_api.service import EVERY_NODE, ServicePort
from tidegate_loader import addresses, services
from tidegate_observer import carried

from tidegate_cli import live, render
from tidegate_cli.lists import by_node, gather, protocol_name, values_of
from tidegate_cli.live import NodeView
from tidegate_cli.model import Model
from tidegate_cli.objects import RunObjects
from tidegate_cli.target import Place, choose

WORDS = {
    services.LOCAL: "Local",
    services.INTERNAL_LOCAL: "InternalLocal",
    services.TWO: "two-scopes",
    services.AFFINITY: "sessionAffinity",
}
"""In this order, then `non-routable`, then RANGES."""
KINDS = {"ExternalIP": "ExternalIPs"}
"""Words that people know by another name."""

STATS_KEYS = ("address", "service", "type", "connections", "noBackend")

Key = tuple[str, int, str]
"""(address, or EVERY_NODE's; port; protocol)."""


class Known:
    """Frontends by address, as the table of services has them."""

    def __init__(self, model: Model) -> None:
        self._found: dict[Key, tuple[str, ServicePort]] = {}
        for port in (p for ports in model.services.values() for p in ports):
            for front in port.frontends:
                kind = "ClusterIP" if front.kind is UNSET else KINDS.get(front.kind, front.kind)
                key = (front.address, front.port, front.protocol)
                self._found[key] = (kind, port)

    def find(self, front: live.Frontend) -> tuple[str, ServicePort | None]:
        """(its kind, its service port); ("unknown", None)."""
        protocol = protocol_name(front.protocol)
        every = EVERY_NODE[1 if ":" in front.address else 0]
        for address in (front.address, every):
            found = self._found.get((address, front.port, protocol))
            if found is not None:
                return found
        return "unknown", None


def lb_list(args: argparse.Namespace) -> int:
    place = choose(args)
    known = Known(Model.from_objects(place.all() if isinstance(place, RunObjects) else ()))
    if args.backends:
        found, code = gather(place, args, _backends, "--backends")
        by_node(args, found, ("ID", "BACKEND ADDRESS", "STATE"), values_of)
    elif args.source_ranges:
        found, code = gather(place, args, partial(_ranges, known), "--source-ranges")
        by_node(args, found, ("SERVICE", "RANGE"), values_of)
    elif args.maglev:
        found, code = gather(place, args, _maglev, "--maglev")
        by_node(args, found, ("SERVICE ADDRESS", "BACKEND ADDRESS", "PLACES"), values_of)
    elif args.stats:
        found, code = gather(place, args, partial(_stats, known, place), "--stats")
        header = ("SERVICE ADDRESS", "SERVICE", "TYPE", "CONNECTIONS", "NO BACKEND")
        by_node(args, found, (*header, "PACKETS", "BYTES"), _stats_cells)
    elif args.revnat:
        found, code = gather(place, args, _revnat, "--revnat")
        by_node(args, found, ("ID", "SERVICE ADDRESS"), values_of)
    elif args.frontends:
        found, code = gather(place, args, partial(_frontends, known), "--frontends")
        header = ("SERVICE ADDRESS", "SERVICE", "TYPE", "BASE", "COUNT")
        by_node(args, found, header, values_of)
    else:
        found, code = gather(place, args, partial(_lb, known))
        by_node(args, found, ("SERVICE ADDRESS", "BACKEND ADDRESS (REVNAT_ID) (SLOT)"), _slots)
    return code


def _slots(found: Any) -> Iterable[Sequence[object]]:
    return ((address, text) for address, texts in found.items() for text in texts)


def _name(front: live.Frontend) -> str:
    host = render.host_port(front.address, front.port)
    return f"{host}/{protocol_name(front.protocol)}"


def words_of(kind: str, flags: int) -> list[str]:
    """What is said of a frontend in brackets."""
    found = [kind, *(word for flag, word in WORDS.items() if flags & flag)]
    if kind != "unknown" and not flags & services.OUTSIDE:
        found.append("non-routable")
    if flags & services.RANGES:
        found.append("check source-range")
    return found


def _lb(known: Known, view: NodeView) -> Mapping[str, list[str]]:
    """ "address:port/PROTOCOL (slot)" → what is in it; slot 0 is the frontend itself. Behind a
    list comes that of clients from outside, if it is another. The reverse-NAT id is the number of
    the service port; one that asks for its backends only has none: conntrack holds the frontend."""
    found: dict[str, list[str]] = {}
    for front in view.maps.frontends():
        name = _name(front)
        none = render.host_port("::" if ":" in front.address else "0.0.0.0", 0)
        words = ", ".join(words_of(known.find(front)[0], front.flags))
        found[f"{name} (0)"] = [f"{none} ({front.number}) (0) [{words}]"]
        inside, outside = _once(front, front.backends), _once(front, front.outside)
        for slot, backend in enumerate((*inside, *outside), 1):
            if isinstance(backend, int):
                text = f"backend {backend} not found"
            else:
                where = render.host_port(*backend[1:])
                text = f"{where}/{protocol_name(front.protocol)} ({front.number}) ({slot})"
                if slot > len(inside):
                    text += " [outside]"
            found[f"{name} ({slot})"] = [text]
    return found


def _once(front: live.Frontend, slots: Iterable[live.Slot]) -> tuple[live.Slot, ...]:
    """Each backend of a ring once; else all slots."""
    return tuple(dict.fromkeys(slots) if front.flags & services.RING else slots)


def _maglev(view: NodeView) -> list[dict[str, Any]]:
    """How many places each backend has on a ring."""
    rows = []
    for front in (f for f in view.maps.frontends() if f.flags & services.RING):
        for scope, slots in (("", front.backends), (" (outside)", front.outside)):
            for backend, places in sorted(Counter(slots).items(), key=str):
                if isinstance(backend, int):
                    text = f"backend {backend} not found"
                else:
                    text = render.host_port(*backend[1:])
                rows.append({"address": _name(front) + scope, "backend": text, "places": places})
    return rows


def _frontends(known: Known, view: NodeView) -> list[dict[str, Any]]:
    rows = []
    for front in view.maps.frontends():
        kind, port = known.find(front)
        rows.append(
            {
                "address": _name(front),
                "service": f"{port.namespace}/{port.name}" if port else "-",
                "type": kind if port else "-",
                "base": front.base,
                "count": front.count,
            }
        )
    return rows


def _stats(known: Known, place: Place, view: NodeView) -> list[dict[str, Any]]:
    """Since the node's maps were made; a frontend that goes takes its figures with it. Packets and
    bytes are as the observer has counted them, absent where there is none."""
    counts = view.maps.service_counts()
    name = carried.file_name(view.name)
    passed = carried.read(place.beside_observer(name)) if isinstance(place, RunObjects) else None
    rows = []
    for front in view.maps.frontends():
        kind, port = known.find(front)
        key = (front.address, front.port, front.protocol)
        asked = counts.get(key, (0, 0))
        row = {
            "address": _name(front),
            "service": f"{port.namespace}/{port.name}" if port else "-",
            "type": kind if port else "-",
            "connections": asked[0],
            "noBackend": asked[1],
        }
        if passed is not None:
            amounts = passed.get(key, carried.NOTHING)
            row["packets"], row["bytes"] = amounts.packets, amounts.bytes
            row["replyPackets"], row["replyBytes"] = amounts.reply_packets, amounts.reply_bytes
        rows.append(row)
    return rows


def _stats_cells(rows: Any) -> Iterable[Sequence[object]]:
    """Packets and bytes of both ways."""
    for row in rows:
        ways = (("packets", "replyPackets"), ("bytes", "replyBytes"))
        sums = [row[one] + row[two] if one in row else "-" for one, two in ways]
        yield (*(row[key] for key in STATS_KEYS), *sums)


def _revnat(view: NodeView) -> list[dict[str, Any]]:
    """Service ports that have a number, with each address they answer for."""
    rows = [(f.number, _name(f)) for f in view.maps.frontends() if f.number]
    return [{"id": number, "address": name} for number, name in sorted(rows)]


def _ranges(known: Known, view: NodeView) -> list[dict[str, Any]]:
    names = {}
    for front in view.maps.frontends():
        port = known.find(front)[1]
        if front.number:
            names[front.number] = f"{port.namespace}/{port.name}" if port else str(front.number)
    ranges = view.maps.source_ranges()
    return [{"service": names.get(n, str(n)), "range": cidr} for n, cidr in ranges]


def _backends(view: NodeView) -> list[dict[str, Any]]:
    return [
        {
            "id": number,
            "address": f"{render.host_port(addresses.text(row.addr), row.port)}/"
            + protocol_name(row.protocol),
            "state": "active" if row.state else "resting",
        }
        for number, row in view.maps.backends()
    ]
