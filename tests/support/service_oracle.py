"""Which endpoints a node may send a Service's traffic to: a second answer, from the words of the
API and of the enhancement proposals, over objects as they are written.

Shares no code with the compiler or with `choice`. Sources of each sentence:

- `Service.spec.internalTrafficPolicy`, `externalTrafficPolicy` (API reference): Local delivers only
  to endpoints on the same node and drops if there is none; an outer address asked from within the
  cluster "will always get Cluster semantics".
- `EndpointConditions` (API reference): `ready` nil is true, `serving` nil is true, `terminating`
  nil is false. `ready` is never true of one that terminates, unless publishNotReadyAddresses says
  so.
- KEP-1669: if no endpoint is ready, those that serve and terminate take the traffic; for Local
  that is decided on each node by itself.
- KEP-2433, KEP-4444 and KEP-3015: hints count if every ready endpoint has one and one of them is
  for here; hints for nodes come before those for zones; else all ready endpoints are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

Tree = dict[str, Any]
Kind = Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalIP"]
Answer = frozenset[str] | Literal["refused", "dropped"]
"""Addresses of endpoints; or what becomes of a connection that nobody takes."""


def answer(
    spec: Tree, endpoints: Sequence[Tree], node: str, zone: str, kind: Kind, inside: bool
) -> Answer:
    """`spec`: of the Service. `endpoints`: of all its slices. `zone` "": the node has no such
    label. `inside`: the client is on the node itself."""
    wants = "internalTrafficPolicy" if kind == "ClusterIP" else "externalTrafficPolicy"
    local = spec.get(wants, "Cluster") == "Local" and (kind == "ClusterIP" or not inside)

    def reachable(one: Tree) -> bool:
        return not local or one.get("nodeName") == node

    anybody = [one for one in endpoints if _is_ready(one) or _is_draining(one)]
    if any(_is_ready(one) for one in anybody if reachable(one)):
        takes = _preferred(endpoints, node, zone, local)
    else:
        takes = _is_draining
    found = frozenset(one["addresses"][0] for one in anybody if reachable(one) and takes(one))
    if found:
        return found
    return "dropped" if local and anybody else "refused"


def _condition(one: Tree, name: str, absent: bool) -> bool:
    value = (one.get("conditions") or {}).get(name)
    return absent if value is None else bool(value)


def _is_ready(one: Tree) -> bool:
    return _condition(one, "ready", True)


def _is_draining(one: Tree) -> bool:
    return (
        not _is_ready(one)
        and _condition(one, "serving", True)
        and _condition(one, "terminating", False)
    )


def _preferred(
    endpoints: Sequence[Tree], node: str, zone: str, local: bool
) -> Callable[[Tree], bool]:
    """Which ready endpoints: hints say where an endpoint wants its traffic from."""
    if local:
        return _is_ready
    for field, here in (("forNodes", node), ("forZones", zone)):
        wants = [
            {item["name"] for item in (one.get("hints") or {}).get(field) or ()}
            for one in endpoints
            if _is_ready(one)
        ]
        if all(wants) and any(here in want for want in wants):
            return _hinted(field, here)
    return _is_ready


def _hinted(field: str, here: str) -> Callable[[Tree], bool]:
    def takes(one: Tree) -> bool:
        names = (one.get("hints") or {}).get(field) or ()
        return _is_ready(one) and any(item["name"] == here for item in names)

    return takes


def controller_hints(distribution: str, node: str, zone: str) -> Tree:
    """What the EndpointSlice controller writes for a ready endpoint (KEP-3015)."""
    if distribution not in ("PreferClose", "PreferSameZone", "PreferSameNode"):
        return {}
    found: Tree = {}
    if zone:
        found["forZones"] = [{"name": zone}]
    if distribution == "PreferSameNode":
        found["forNodes"] = [{"name": node}]
    return found
