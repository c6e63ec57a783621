"""Pods of the test image."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kind import cluster, golang, images, settings
from kind.run import Failed, run
from rig import api

IMAGE = "tidegate-probe:dev"
READY_SECONDS = 180.0
GONE_SECONDS = 300.0
PORTS = ("TCP:80", "TCP:8080", "UDP:53")

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A running pod, as the API tells of it."""

    namespace: str
    name: str
    node: str
    addresses: tuple[str, ...]
    container: str
    """The id that the container runtime knows its container by."""
    uid: str
    host_network: bool

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def address(self) -> str:
        return self.addresses[0]


def manifest(
    name: str,
    namespace: str = "default",
    labels: Mapping[str, str] | None = None,
    node: str = "",
    ports: Iterable[str] = PORTS,
) -> Manifest:
    """A pod that answers on `ports`; on `node`, if that is said."""
    return serving(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "labels": dict(labels or {})},
            "spec": {"nodeName": node} if node else {},
        },
        ports,
    )


def serving(pod: Manifest, ports: Iterable[str]) -> Manifest:
    """A pod or pod template whose containers are replaced by one of the test image that answers.

    Container ports with names keep theirs."""
    spec = dict(pod["spec"])
    containers = spec.get("containers", [])
    declared = [p for c in containers for p in c.get("ports") or []]
    wanted = {*ports, *(f"{p.get('protocol', 'TCP')}:{p['containerPort']}" for p in declared)}
    first = sorted(p for p in wanted if p.startswith("TCP:"))[:1]
    spec["containers"] = [
        {
            "name": "probe",
            "image": IMAGE,
            "imagePullPolicy": "Never",
            "args": ["serve", *sorted(w for w in wanted if not w.startswith("SCTP:"))],
            "ports": declared,
            "env": [
                {"name": "NAMESPACE", "valueFrom": _field("metadata.namespace")},
                {"name": "NAME", "valueFrom": _field("metadata.name")},
                {"name": "POD", "value": "$(NAMESPACE)/$(NAME)"},
            ],
            **({"readinessProbe": _probe(first[0])} if first else {}),
        }
    ]
    spec.pop("initContainers", None)
    spec["terminationGracePeriodSeconds"] = 1
    spec["enableServiceLinks"] = False
    return {**pod, "spec": spec}


def _field(path: str) -> Manifest:
    return {"fieldRef": {"fieldPath": path}}


def _probe(port: str) -> Manifest:
    return {
        "tcpSocket": {"port": int(port.removeprefix("TCP:"))},
        "periodSeconds": 1,
        "failureThreshold": 5,
    }


def apply(*manifests: Manifest) -> None:
    """As `kubectl apply --server-side`; this test's fields win over a former test's."""
    api.apply(*manifests)


def running(namespace: str = "", selector: str = "", container: str = "") -> dict[str, Pod]:
    """key → pod: those that run and are not about to end; of one namespace, or of all. Which
    container of theirs is meant has to be said where there are several."""
    listed = api.items("pods", namespace, labels=selector)
    found = (parse(item, container) for item in listed)
    return {pod.key: pod for pod in found if pod is not None}


def parse(item: Manifest, container: str = "") -> Pod | None:
    """The pod of an API object; None where it does not run, or is about to end."""
    metadata, status = item["metadata"], item["status"]
    # Kubernetes lists them by name, not as the pod's specification does.
    identifiers = [
        s.get("containerID", "").removeprefix("containerd://")
        for s in status.get("containerStatuses", ())
        if container in ("", s["name"])
    ]
    identifier = identifiers[0] if identifiers else ""
    if status.get("phase") != "Running" or not identifier or "deletionTimestamp" in metadata:
        return None
    return Pod(
        namespace=metadata["namespace"],
        name=metadata["name"],
        node=item["spec"]["nodeName"],
        addresses=tuple(a["ip"] for a in status.get("podIPs", ())),
        container=identifier,
        uid=metadata["uid"],
        host_network=bool(item["spec"].get("hostNetwork")),
    )


def kill(pod: Pod) -> None:
    """SIGKILL for the pod's container, by the node's container runtime."""
    cluster.inside(pod.node, "ctr", "-n", "k8s.io", "tasks", "kill", "-s", "SIGKILL", pod.container)


def signal(node: str, program: str, number: str) -> None:
    """Sends it to the node's processes of this name."""
    cluster.inside(node, "pkill", f"-{number}", "-x", program)


def waits(name: str, namespace: str) -> bool:
    """Whether the kubelet has said that this pod's network cannot be had."""
    fields = f"involvedObject.name={name},reason=FailedCreatePodSandBox"
    return bool(api.items("events", namespace, fields=fields))


def flooding(pod: Manifest, address: str) -> Manifest:
    """The pod of `manifest`, sending datagrams to port 53 there from its first moment on."""
    container = pod["spec"]["containers"][0]
    container["args"] = ["flood", address, "53"]
    del container["readinessProbe"]
    pod["spec"]["terminationGracePeriodSeconds"] = 0
    return pod


def wait_ready(*namespaces: str) -> dict[str, Pod]:
    """The pods of these namespaces, once all of them are Ready."""
    for namespace in namespaces:
        eventually(lambda n=namespace: _all_ready(n), f"the pods of {namespace} are ready")
    return {key: pod for n in namespaces for key, pod in running(n).items()}


def remove(namespace: str, *names: str) -> None:
    """Deletes pods without waiting for their kubelets, as `kubectl delete --force` does."""
    metadata = [{"name": name, "namespace": namespace} for name in names]
    api.delete(*({"apiVersion": "v1", "kind": "Pod", "metadata": m} for m in metadata), grace=0)


def relabel(name: str, namespace: str, **labels: str | None) -> None:
    """Gives the pod these labels; None takes one away."""
    api.patch("pods", name, namespace, {"metadata": {"labels": labels}})


def _all_ready(namespace: str) -> bool:
    found = api.items("pods", namespace)
    return bool(found) and all(api.is_true(pod, "Ready") for pod in found)


def remove_namespaces(*names: str, wait: bool = True) -> None:
    """Deletes namespaces, and waits until they are gone where that is asked for."""
    gone = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": n}} for n in names]
    api.delete(*gone, seconds=GONE_SECONDS if wait else 0)


def eventually(condition: Any, what: str, seconds: float = READY_SECONDS) -> None:
    """Waits until `condition()` holds."""
    api.wait(condition, what, seconds)


@functools.cache
def build_image() -> str:
    """Builds the test image; its name. Needs Go, and iperf3 of this machine, which is in it."""
    program = golang.build_local("probe", settings.HERE.parent / "probe")
    images.from_files(
        IMAGE, {"/probe": program, **with_libraries("iperf3")}, ['ENTRYPOINT ["/probe"]']
    )
    return IMAGE


def with_libraries(name: str) -> dict[str, Path]:
    """A program of this machine as /NAME of an image, and what it is linked with; Failed."""
    program = shutil.which(name)
    if program is None:
        raise Failed(f"there is no {name}: `make e2e` installs it")
    words = run("ldd", program).split()
    libraries = [Path(word) for word in words if word.startswith("/")]
    found = {str(library): library.resolve() for library in libraries}
    return {f"/{name}": Path(program), **found}
