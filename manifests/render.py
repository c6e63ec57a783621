"""Write manifests/base/tidegate.yaml: the chart with its default values; and of the relay, which is
off by default, overlays/relay/relay.yaml.

Namespace and CRDs are not in it: the base has the one beside it and the others from crds/.
`make manifests` runs it, a test compares. Needs the helm that `make kube-binaries` builds.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kind.settings import KUBERNETES, binaries

HERE = Path(__file__).parent
CHART = HERE / "chart" / "tidegate"
BASE = HERE / "base" / "tidegate.yaml"
RELAY = HERE / "overlays" / "relay" / "relay.yaml"
NAMESPACE = "tidegate-system"
HEADER = "# Made by `make manifests` of manifests/chart. Do not edit.\n"


def template(*options: str) -> str:
    """The chart as `helm template` renders it, with options like --set."""
    command = [str(binaries() / "helm"), "template", "tidegate", str(CHART)]
    command += ["--namespace", NAMESPACE, "--kube-version", KUBERNETES, *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return done.stdout


def base() -> str:
    return HEADER + template("--set", "crds.install=false")


def relay() -> str:
    """Its certificates are given: what is committed is nobody's secret."""
    options = ("--set", "relay.enabled=true", "--set", "relay.tls.generate=false")
    return HEADER + template(*options, "--show-only", "templates/relay.yaml")


if __name__ == "__main__":
    BASE.write_text(base())
    RELAY.write_text(relay())
    sys.exit(0)
