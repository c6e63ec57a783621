"""`tidegate install`: the manifests into the cluster, then wait, and say what is wrong."""

from __future__ import annotations

import argparse
import sys
import time

from tidegate_cli.cluster import manifests, progress
from tidegate_cli.cluster.api import Api, connect
from tidegate_cli.cluster.manifests import Kinds, Object
from tidegate_cli.errors import CliError

SERVED_SECONDS = 60.0
CRD = "CustomResourceDefinition"


def install(args: argparse.Namespace) -> int:
    """0: in force on every node (or --wait 0); 1: not in time."""
    items = manifests.read(args.filename, args.kustomize)
    manifests.adapt(items, args.image, args.api_server)
    api = connect(args.kubeconfig, args.context)
    print(f"installing into {api.name} ({api.server})")
    kinds = Kinds(api)
    crds = [item for item in items if item["kind"] == CRD]
    rest = [item for item in items if item["kind"] != CRD]
    _apply(api, kinds, crds, args.force_conflicts)
    _await_served(api, kinds, crds)
    _apply(api, kinds, rest, args.force_conflicts)
    if not args.wait:
        return 0
    found = progress.wait(args.wait, lambda: progress.counts(api), _say)
    if found and all(count.whole for count in found):
        print("every node enforces; `tidegate status` shows it")
        return 0
    print(f"not in force after {args.wait:g} seconds:", file=sys.stderr)
    for text in progress.troubles(api) or ["nothing is reported to be wrong: it may need longer"]:
        print(f"  {text}", file=sys.stderr)
    return 1


def _say(text: str) -> None:
    print(text, flush=True)


def _apply(api: Api, kinds: Kinds, items: list[Object], force: bool) -> None:
    """Says what changed; what did not is counted."""
    unchanged = 0
    for item in items:
        outcome = manifests.apply(api, kinds, item, force)
        if outcome == "unchanged":
            unchanged += 1
        else:
            _say(f"{outcome} {manifests.name_of(item)}")
    if unchanged:
        _say(f"{unchanged} objects unchanged")


def _await_served(api: Api, kinds: Kinds, crds: list[Object]) -> None:
    """Until the API serves the new kinds. CliError: it does not; says what the CRD says."""
    deadline = time.monotonic() + SERVED_SECONDS
    for crd in crds:
        path = kinds.path(crd)
        while True:
            found = (api.find(path) or {}).get("status", {}).get("conditions") or ()
            if any(c["type"] == "Established" and c["status"] == "True" for c in found):
                break
            if time.monotonic() >= deadline:
                said = "; ".join(c.get("message", "") for c in found if c["status"] != "True")
                raise CliError(f"{manifests.name_of(crd)} is not served: {said}")
            time.sleep(progress.POLL_SECONDS)
