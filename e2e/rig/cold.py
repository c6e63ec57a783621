"""What the cluster enforces, against a compile that knows nothing of before.

Input is what the API server holds now: nodes, pods, policies, Services. `tidegate compile` makes of
it what ought to be there; compared are the API's objects and what every node's kernel holds, which
the node's own loader reads from its maps. Revisions, terms and rule sets that nobody uses any more
are history, which a cold compile has none of."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tidegate_cli.main import main

from kind import cluster
from rig import api, install, pods

INPUT = ("nodes", "namespaces", "pods", "services", "endpointslices", "networkpolicies")
OBJECTS = ("identities", "nodestates", "rulesets", "stateslices")
HISTORY = ("revision", "term", "tables")
SECONDS = 60.0

VERBS = ("ipcache", "lb", "endpoint")
LISTS = (
    f"from tidegate_cli.main import main\nfor verb in {VERBS!r}: main([verb, 'list', '-o', 'json'])"
)

Objects = dict[tuple[str, str], Any]


def settle(seconds: float = SECONDS) -> None:
    """Waits until nothing differs. AssertionError names what still does."""
    found: list[str] = []

    def equal() -> bool:
        found[:] = differences()
        return not found

    try:
        pods.eventually(equal, "as a cold compile says", seconds)
    except AssertionError as error:
        raise AssertionError("\n".join([str(error), *found[:20]])) from None


def differences() -> list[str]:
    """In words, of the API's objects and of every node's kernel; [] where all is as it ought."""
    wanted = _compiled()
    return sorted([*_of_objects(wanted, _held()), *_of_kernels(wanted)])


def _compiled() -> Objects:
    with tempfile.TemporaryDirectory() as folder:
        found = {"kind": "List", "apiVersion": "v1", "items": _items(INPUT)}
        (Path(folder) / "all.json").write_text(json.dumps(found))
        out, err = io.StringIO(), io.StringIO()
        # In this process, which has it imported: as a command it costs a second of CPU each time.
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["compile", folder, "-o", "json"])
    assert code == 0, err.getvalue()
    return _by_name(json.loads(out.getvalue())["items"])


def _held() -> Objects:
    return _by_name(_items(OBJECTS))


def _items(kinds: Iterable[str]) -> list[Any]:
    return [item for kind in kinds for item in api.items(kind)]


def _by_name(items: list[Any]) -> Objects:
    return {(i["kind"], i["metadata"]["name"]): _plain(i["spec"]) for i in items}


def _plain(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key not in HISTORY}


def _of_objects(wanted: Objects, held: Objects) -> Iterator[str]:
    for name in wanted.keys() | held.keys():
        if name not in held:
            yield f"{name}: not there"
        elif name not in wanted:
            # Numbers rest for an hour and rule sets for a minute before they go.
            if name[0] not in ("Identity", "RuleSet"):
                yield f"{name}: should not be there"
        elif wanted[name] != held[name]:
            yield f"{name}: {held[name]}, cold: {wanted[name]}"


def _of_kernels(wanted: Objects) -> Iterator[str]:
    loaders = install.loaders()
    with ThreadPoolExecutor() as pool:
        lists = dict(zip(loaders, pool.map(_asked, loaders.values()), strict=True))
    for (kind, node), spec in wanted.items():
        if kind != "NodeState":
            continue
        if node not in lists:
            yield f"{node}: no loader"
            continue
        answer = lists[node]
        if answer is None:
            yield f"{node}: its lists came cut"
            continue
        addresses, services, endpoints = answer
        pairs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
            "address": (_addresses(wanted), _kernel_addresses(addresses)),
            "service": (_services(wanted), _kernel_services(services)),
            "endpoint": (_endpoints(spec), {e["pod"]: e["identity"] for e in endpoints}),
        }
        for what, (ought, there) in pairs.items():
            for key in ought.keys() | there.keys():
                if ought.get(key) != there.get(key):
                    yield f"{node}: {what} {key}: {there.get(key)}, cold: {ought.get(key)}"


def _asked(loader: pods.Pod) -> list[Any] | None:
    """What `tidegate VERB list` says in the loader's container: one process for all. None: not
    all of it came, as a busy containerd may be gone before it has passed on what was written."""
    process = f"cold-{time.monotonic_ns()}"
    text = cluster.inside(
        loader.node, "ctr", "-n", "k8s.io", "tasks", "exec", "--exec-id", process,
        loader.container, "python3", "-I", "-c", LISTS,
    )  # fmt: skip
    found, at = [], 0
    for _ in VERBS:
        try:
            item, at = json.JSONDecoder().raw_decode(text, at)
        except json.JSONDecodeError:
            return None
        found.append(item[loader.node])
        at += len(text[at:]) - len(text[at:].lstrip())
    return found


def _table(wanted: Objects, table: str) -> Iterator[Any]:
    for (kind, _), spec in wanted.items():
        if kind == "StateSlice" and spec["table"] == table:
            yield from spec[table]


def _addresses(wanted: Objects) -> dict[str, int]:
    return {entry["cidr"]: entry["identity"] for entry in _table(wanted, "ipcache")}


def _kernel_addresses(rows: list[Any]) -> dict[str, Any]:
    """Without what is there for Services alone."""
    return {
        row["cidr"]: row["identity"] if row["proof"] == "ok" else "wrong proof"
        for row in rows
        if row["flags"] != ["frontend"]
    }


def _services(wanted: Objects) -> dict[str, list[str]]:
    return {
        f"{_place(front['address'], front['port'])}/{front['protocol']}": sorted(
            _place(backend["address"], backend["port"]) for backend in port["backends"]
        )
        for port in _table(wanted, "services")
        for front in port["frontends"]
    }


def _kernel_services(slots: dict[str, list[str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, (text,) in slots.items():
        frontend, _, slot = name.partition(" ")
        backends = found.setdefault(frontend, [])
        if slot != "(0)":
            backends.append(text.split("/")[0])
    return {frontend: sorted(backends) for frontend, backends in found.items()}


def _place(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _endpoints(spec: Any) -> dict[str, int]:
    return {f"{e['namespace']}/{e['name']}": e["identity"] for e in spec["endpoints"]}
