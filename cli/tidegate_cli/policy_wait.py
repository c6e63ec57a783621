"""`tidegate policy wait`: until policies are in force as they are now, on every node that counts.

Free of the race between apply and status: what is waited for is the object as it is in the API
server (or in the folder that `up` follows), not what a status happens to tell of. May not live
here: how a cluster or a run directory is looked at.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tidegate_cli import render
from tidegate_cli.errors import CliError
from tidegate_cli.objects import RunObjects
from tidegate_cli.target import choose

FIRST_SECONDS, LAST_SECONDS = 0.1, 1.0
"""Between two looks: doubled up to the last."""
KINDS = {
    "NetworkPolicy": ("networkpolicy", "networkpolicies", "netpol"),
    "TrafficPolicy": ("trafficpolicy", "trafficpolicies", "tgp"),
    "ClusterNetworkPolicy": ("clusternetworkpolicy", "clusternetworkpolicies", "cnp"),
}
CLUSTER_KINDS = ("ClusterNetworkPolicy",)
NAMESPACE = "default"


class Target(NamedTuple):
    """A policy; `namespace` is "" of those of the cluster."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {'/'.join(part for part in self[1:] if part)}"


@dataclass(frozen=True)
class Look:
    """How far one policy is."""

    text: str
    """In a line: what is in force, or what is waited for."""
    done: bool = False
    failed: bool = False
    """It will not come true as it is written."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """For programs."""


Looks = Callable[[Sequence[Target]], Mapping[Target, Look]]
"""Of all at once. Raises CliError: one of them is not there."""
Missing = Callable[[Sequence[Target]], Mapping[str, str]]
"""Node → what it does not have in force, and why."""


def policy_wait(args: argparse.Namespace) -> int:
    """0: in force; 1: not in time, or never as it is written."""
    named = [parse(text, args.namespace or NAMESPACE) for text in args.policies]
    targets = list(dict.fromkeys([*named, *_of_files(args)]))
    place = choose(args)
    looks: Looks
    missing: Missing
    if isinstance(place, RunObjects):
        from tidegate_cli import folder_wait  # noqa: PLC0415 - slow, as is the other

        folder = folder_wait.Folder(place)  # without a name all of it is meant
        looks, missing = folder.looks, folder.missing
    else:
        from tidegate_cli.cluster import policy_status  # noqa: PLC0415

        if not targets:
            raise CliError("no policy is named", "name some, or give the --filename of manifests")
        statuses = policy_status.Statuses(place)
        looks, missing = statuses.looks, statuses.missing
    ended = wait(targets, looks, args.timeout)
    return _told(args, ended, {} if _all_done(ended) else missing(list(ended)))


def _of_files(args: argparse.Namespace) -> list[Target]:
    if not args.filename:
        return []
    from tidegate_cli.cluster import manifests  # noqa: PLC0415

    items = manifests.read(args.filename, None)
    found = list(dict.fromkeys(_targets_of(items, args.namespace or NAMESPACE)))
    if not found:
        raise CliError("there is no policy in these manifests")
    return found


def _targets_of(items: Iterable[Mapping[str, Any]], namespace: str) -> Iterable[Target]:
    for item in items:
        kind = str(item["kind"])
        if kind == "List":
            yield from _targets_of(item.get("items") or (), namespace)
        elif kind in KINDS:
            meta = item["metadata"]
            space = "" if kind in CLUSTER_KINDS else str(meta.get("namespace") or namespace)
            yield Target(kind, space, str(meta["name"]))


def parse(text: str, namespace: str) -> Target:
    """KIND/NAME or KIND/NAMESPACE/NAME; kinds as kubectl takes them. CliError: it is neither."""
    written, _, rest = text.partition("/")
    space, _, name = rest.rpartition("/")
    short = written.lower().partition(".")[0]
    kind = next((kind for kind, words in KINDS.items() if short in words), None)
    if kind is None or not name or "/" in space:
        known = ", ".join(words[0] for words in KINDS.values())
        raise CliError(f"{text!r} is no policy", f"write KIND/NAME, where KIND is one of {known}")
    if kind in CLUSTER_KINDS:
        if space:
            raise CliError(f"{text!r}: a {kind} has no namespace", f"write {short}/{name}")
        return Target(kind, "", name)
    return Target(kind, space or namespace, name)


def wait(
    targets: Sequence[Target],
    looks: Looks,
    timeout: float,
    say: Callable[[str], None] | None = None,
) -> dict[Target, Look]:
    """The last look at each: all are done, one never will be, or the time is over."""
    tell = say or (lambda text: print(text, file=sys.stderr, flush=True))
    deadline, pause = time.monotonic() + timeout, FIRST_SECONDS
    told: dict[Target, str] = {}
    while True:
        found = dict(looks(targets))
        for target, look in found.items():
            if not look.done and told.get(target) != look.text:
                told[target] = look.text
                tell(f"{target}: {look.text}")
        left = deadline - time.monotonic()
        if _all_done(found) or any(look.failed for look in found.values()) or left <= 0:
            return found
        time.sleep(min(pause, left))
        pause = min(pause * 2, LAST_SECONDS)


def _all_done(found: Mapping[Target, Look]) -> bool:
    return all(look.done for look in found.values())


def _told(
    args: argparse.Namespace, found: Mapping[Target, Look], missing: Mapping[str, str]
) -> int:
    code = 0 if _all_done(found) else 1
    if args.output != "table":
        rows = [
            {**target._asdict(), "inForce": look.done, "message": look.text, **look.more}
            for target, look in found.items()
        ]
        nodes = [{"node": node, "message": text} for node, text in missing.items()]
        render.structured({"policies": rows, "missing": nodes}, args.output)
        return code
    for target, look in found.items():
        if look.done:
            print(f"{target}: {look.text}")
    failed = any(look.failed for look in found.values())
    if code:
        why = "not as written" if failed else f"not in force after {args.timeout:g} seconds"
        print(f"tidegate: {why}", file=sys.stderr)
        for node, text in missing.items():
            print(f"  {node}: {text}", file=sys.stderr)
    return code
