"""What the API server was asked, and by whom: its audit log, while it is wanted.

Turned on in the static pod of the control plane, which the kubelet then starts anew, and off
again afterwards. The cluster keeps working meanwhile: nothing of a node needs the API server."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from kind import cluster
from kind.run import run
from rig import pods

POLICY = Path(__file__).parents[2] / "tests" / "support" / "audit-policy.yaml"
MANIFEST = "/etc/kubernetes/manifests/kube-apiserver.yaml"
DIRECTORY = "/var/log/tidegate-audit"
LOG = f"{DIRECTORY}/audit.log"
FLAGS = (f"--audit-policy-file={DIRECTORY}/policy.yaml", f"--audit-log-path={LOG}")
SECONDS = 120.0


@contextlib.contextmanager
def recorded() -> Iterator[int]:
    """`lines` tells what was asked since. Whatever was logged before is gone.

    Yields how many lines were there when the server was ready: until then it refuses what its
    roles allow, because it has not read them yet."""
    node = control_plane()
    before = cluster.inside(node, "cat", MANIFEST)
    cluster.inside(node, "mkdir", "-p", DIRECTORY)
    cluster.inside(node, "rm", "-f", LOG)
    _write(node, f"{DIRECTORY}/policy.yaml", POLICY.read_text())
    try:
        _replace(node, _with_audit(before))
        yield len(lines())
    finally:
        _replace(node, before)
        cluster.inside(node, "rm", "-rf", DIRECTORY)


def lines() -> list[str]:
    """What was logged so far, whole lines only."""
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "audit.log"
        run("docker", "cp", f"{control_plane()}:{LOG}", target)
        return target.read_text().split("\n")[:-1]


def control_plane() -> str:
    return next(name for name in cluster.nodes() if name.endswith("control-plane"))


def _with_audit(manifest: str) -> str:
    pod = yaml.safe_load(manifest)
    container = pod["spec"]["containers"][0]
    container["command"] += FLAGS
    container["volumeMounts"].append({"name": "audit", "mountPath": DIRECTORY})
    volume = {"name": "audit", "hostPath": {"path": DIRECTORY, "type": "Directory"}}
    pod["spec"]["volumes"].append(volume)
    return json.dumps(pod)


def _replace(node: str, manifest: str) -> None:
    """Waits until the kubelet runs it: the mirror pod has its flags, and the server is ready."""
    wanted = yaml.safe_load(manifest)["spec"]["containers"][0]["command"]
    # By rename from another directory: the kubelet never reads half of it.
    _write(node, "/etc/kubernetes/kube-apiserver.new", manifest)
    cluster.inside(node, "mv", "/etc/kubernetes/kube-apiserver.new", MANIFEST)
    pods.eventually(lambda: _runs(node, wanted), "the API server runs as told", SECONDS)


def _runs(node: str, command: list[str]) -> bool:
    name = f"kube-apiserver-{node}"
    got = cluster.attempt_kubectl(
        *("--request-timeout=5s", "-n", "kube-system", "get", "pod", name, "-o", "json")
    )
    if got.returncode:
        return False
    pod = json.loads(got.stdout)
    ready = {c["type"]: c["status"] for c in pod["status"].get("conditions", ())}.get("Ready")
    return pod["spec"]["containers"][0]["command"] == command and ready == "True"


def _write(node: str, path: str, text: str) -> None:
    cluster.inside(node, "cp", "/dev/stdin", path, stdin=text)
