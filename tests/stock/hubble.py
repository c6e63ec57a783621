"""`make stock-hubble`: Hubble's own command, built from its module, against our observer.

No part of `make test`: the build takes minutes and needs a Go module proxy. Brings examples/shop up
in a run directory of its own, sends traffic, and compares what `hubble` prints with what `tidegate
observe` prints of the same request. Exits 1 at a difference.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("TIDEGATE_CACHE") or Path.home() / ".cache" / "tidegate")
VERSION = "v1.18.2"
MODULE = "github.com/cilium/cilium"


def built() -> Path:
    target = CACHE / f"hubble-{VERSION}"
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "go.mod").write_text("module stock\n\ngo 1.24\n")
        go = {"cwd": directory, "check": True}
        subprocess.run(["go", "get", f"{MODULE}/hubble@{VERSION}"], **go)  # type: ignore[call-overload]
        command = ["go", "build", "-mod=mod", "-o", str(target), f"{MODULE}/hubble"]
        subprocess.run(command, **go)  # type: ignore[call-overload]
    return target


def output(*words: str | Path) -> str:
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return done.stdout


def flows(text: str) -> list[dict[str, Any]]:
    """By id; without the emitter, which this version of Hubble does not know."""
    found = [json.loads(line).get("flow", {}) for line in text.splitlines()]
    for flow in found:
        flow.pop("emitter", None)
    return sorted(filter(None, found), key=lambda flow: str(flow["uuid"]))


QUESTIONS = (
    ["--verdict", "DROPPED"],
    ["--from-label", "app=web", "--protocol", "tcp"],
    ["--to-pod", "data/orders-db-0", "--not", "--verdict", "FORWARDED"],
    ["--type", "drop", "--ip-version", "v4"],
    ["--to-service", "shop/catalogue"],
    ["--identity", "world"],
    ["--node-name", "node-1", "--traffic-direction", "egress"],
    ["--from-namespace", "shop", "--to-namespace", "data", "--port", "5432"],
    ["-n", "shop", "--service", "web"],
    ["--all-namespaces", "--pod", "web"],
    ["--label", "app in (web,cart)", "--tcp-flags", "syn", "--tcp-flags", "fin"],
    ["--not", "--from-label", "app=web", "--not", "--protocol", "tcp"],
    ["--ip", "10.244.0.0/24", "--type", "trace:to-endpoint"],
    ["--ipv6", "--protocol", "icmp"],
    ["--ip-version", "none"],
    ["--to-workload", "StatefulSet/orders-db", "--drop-reason-desc", "POLICY_DENIED"],
    ["--cluster", "default", "--type", "policy-verdict"],
    ["--cel-expression", "_flow.verdict == Verdict.DROPPED && _flow.uuid != ''"],
    ["--denylist", '{"verdict":["DROPPED"]}', "--allowlist", '{"source_label":["k8s:app=web"]}'],
    ["--since", "1h30m", "--until", "1ms", "--identity", "host"],
)


def main() -> int:
    hubble = built()
    tidegate = Path(sys.executable).parent / "tidegate"
    differences = 0
    with tempfile.TemporaryDirectory(prefix="tgh") as directory:
        run = ["--run-dir", directory]
        output(tidegate, *run, "up", ROOT / "examples/shop", "--detach")
        try:
            output(tidegate, *run, "matrix")
            server = f"unix://{directory}/observer.sock"
            ask = [hubble, "--server", server]
            for words in (["status"], ["list", "nodes"], ["list", "namespaces"]):
                print(output(*ask, *words))
            for words in QUESTIONS:
                theirs = flows(output(*ask, "observe", "--last", "500", "-o", "json", *words))
                ours = flows(
                    output(tidegate, *run, "observe", "--last", "500", "-o", "jsonpb", *words)
                )
                equal = theirs == ours
                differences += not equal
                print(f"{'equal' if equal else 'DIFFER'} {len(theirs):4} flows: {' '.join(words)}")
            print(output(*ask, "observe", "--last", "10"))
        finally:
            output(tidegate, *run, "down")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
