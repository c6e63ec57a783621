"""The chart and the overlays as plain objects, made by the programs that users run."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path
from typing import Any

import yaml
from support.apiserver import KUBERNETES, binary

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"
CHART = MANIFESTS / "chart" / "tidegate"
NAMESPACE = "tidegate-system"

Object = dict[str, Any]


class Refused(Exception):
    """helm said no; the message is helm's."""


@functools.cache
def chart_text(*options: str) -> str:
    """`helm template` with options like --set. Raises Refused."""
    command = [str(binary("helm")), "template", "tidegate", str(CHART)]
    command += ["--namespace", NAMESPACE, "--kube-version", KUBERNETES, *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise Refused(done.stderr)
    return done.stdout


def chart(*options: str) -> dict[str, Object]:
    return by_name(chart_text(*options))


@functools.cache
def overlay_text(name: str) -> str:
    """`kubectl kustomize` of base or overlays/NAME."""
    command = [str(binary("kubectl")), "kustomize", str(MANIFESTS / name)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def overlay(name: str) -> dict[str, Object]:
    return by_name(overlay_text(name))


def by_name(text: str) -> dict[str, Object]:
    """ "Kind namespace/name" -> object. No two of a name."""
    found: dict[str, Object] = {}
    # By libyaml: in Python half a second of CPU goes into one chart, and there are a hundred.
    for item in yaml.load_all(text, yaml.CSafeLoader):
        if item is None:
            continue
        metadata = item["metadata"]
        name = f"{item['kind']} {metadata.get('namespace', '')}/{metadata['name']}"
        assert name not in found, name
        found[name] = item
    return found


def pod_of(objects: dict[str, Object], name: str) -> Object:
    """The pod spec of an object that makes pods."""
    spec: Object = objects[name]["spec"]["template"]["spec"]
    return spec


OPERATOR = f"Deployment {NAMESPACE}/tidegate-operator"
LOADER = f"DaemonSet {NAMESPACE}/tidegate-loader"


def containers(pod: Object) -> dict[str, Object]:
    return {c["name"]: c for c in (*pod.get("initContainers", ()), *pod["containers"])}
