"""Applications given as folders of manifests, run with the test image instead of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kind import cluster
from rig import pods

WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job")
# What a field of these kinds asks for cannot be had on a small cluster of tests.
LEFT_OUT = ("HorizontalPodAutoscaler", "PersistentVolumeClaim")


def documents(folder: Path, namespace: str) -> list[pods.Manifest]:
    """Every manifest of a folder, with its namespace said, and the test image in its pods."""
    found: list[pods.Manifest] = []
    for path in sorted(folder.rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if document and document["kind"] not in LEFT_OUT:
                found.append(_prepared(document, namespace))
    # A namespace must be there before what lies in it.
    return sorted(found, key=lambda d: d["kind"] != "Namespace")


def _prepared(document: pods.Manifest, namespace: str) -> pods.Manifest:
    result: dict[str, Any] = dict(document)
    if document["kind"] != "Namespace":
        result["metadata"] = {"namespace": namespace, **document["metadata"]}
    if document["kind"] in WORKLOADS:
        spec = dict(document["spec"])
        spec["template"] = pods.serving(spec["template"], ())
        spec["template"]["spec"].pop("serviceAccountName", None)
        spec["template"]["spec"].pop("volumes", None)
        result["spec"] = spec
    elif document["kind"] == "Pod":
        result = pods.serving(result, ())
    return result


def run(folder: Path, namespace: str) -> list[str]:
    """Applies the folder, in `namespace` what says none; the namespaces it uses, once all their
    workloads are ready."""
    wanted = documents(folder, namespace)
    spaces = sorted({d["metadata"]["namespace"] for d in wanted if d["kind"] != "Namespace"})
    for space in spaces:
        if cluster.attempt_kubectl("get", "namespace", space).returncode:
            cluster.kubectl("create", "namespace", space)
    pods.apply(*wanted)
    for document in wanted:
        if document["kind"] in ("Deployment", "StatefulSet", "DaemonSet"):
            metadata = document["metadata"]
            cluster.kubectl(
                "rollout", "status", "-n", metadata["namespace"],
                f"{document['kind'].lower()}/{metadata['name']}", "--timeout=120s",
            )  # fmt: skip
    return spaces
