"""Pods of the test image, and questions asked from inside them.

A pod is asked by a process inside its container that the node's container runtime starts, not by
`kubectl exec`: so it can be asked while the API server is away, and many times without much ado."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from support.waiting import until

from kind import cluster, golang, images, settings

IMAGE = "tidegate-probe:dev"
READY_SECONDS = 90.0
ANSWER_SECONDS = 1.0
# How long an asker may take beyond what its questions may.
GRACE_SECONDS = 30.0
# So many lines fit into a pipe that nobody reads yet.
MAX_LINES = 200
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
    """The id that the container runtime knows its first container by."""
    uid: str
    host_network: bool

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def address(self) -> str:
        return self.addresses[0]


@dataclass(frozen=True)
class Question:
    """What `probe ask` reads; see e2e/probe/ask.go."""

    address: str
    port: int = 0
    protocol: str = "TCP"
    op: str = "probe"
    seconds: float = ANSWER_SECONDS
    path: str = ""
    stream: int = 0


@dataclass(frozen=True)
class Answer:
    pod: str
    detail: str
    client: str = ""
    body: str = ""
    addresses: tuple[str, ...] = ()
    answered: int = 0
    gap: float = 0.0


class Asker:
    """A process in a pod that answers questions as long as this object is open."""

    _ids = itertools.count(1)

    def __init__(self, pod: Pod) -> None:
        self.pod = pod
        self._process = subprocess.Popen(
            ["docker", "exec", "-i", pod.node, "ctr", "-n", "k8s.io", "tasks", "exec",
             "--exec-id", f"ask-{time.monotonic_ns()}", pod.container, "/probe", "ask"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Every question's answer, in their order; all are under way at once."""
        answers: list[Answer] = []
        for start in range(0, len(questions), MAX_LINES):
            ids = [self._send(q) for q in questions[start : start + MAX_LINES]]
            found = dict(self._receive() for _ in ids)
            answers += [found[i] for i in ids]
        return answers

    def begin_stream(self, question: Question) -> int:
        """Opens a connection on which requests follow each other every `seconds`; its number.

        The first must be answered."""
        number = self._send(dataclasses.replace(question, op="stream"))
        _, first = self._receive()
        assert not first.detail, f"{self.pod.key} -> {question.address}: {first.detail}"
        return number

    def end_stream(self, number: int) -> Answer:
        """How it went: how many answers, the longest gap, what ended it early."""
        self._send(Question("", op="stop", stream=number))
        return self._receive()[1]

    def close(self) -> None:
        process = self._process
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()

    def _send(self, question: Question) -> int:
        number = next(self._ids)
        assert self._process.stdin is not None
        line = json.dumps({"id": number, **dataclasses.asdict(question)}).encode() + b"\n"
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # why it ended is said where its answer is read
        return number

    def _receive(self) -> tuple[int, Answer]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, said = self._process.communicate()
            raise AssertionError(f"cannot ask from {self.pod.key}: {said.decode().strip()}")
        fields = json.loads(line)
        number = fields.pop("id")
        return number, Answer(**{**fields, "addresses": tuple(fields.get("addresses", ()))})


@dataclass
class Askers:
    """One asker a pod, opened when first needed."""

    _open: dict[str, Asker] = field(default_factory=dict)

    def of(self, pod: Pod) -> Asker:
        if pod.container not in self._open:
            self._open[pod.container] = Asker(pod)
        return self._open[pod.container]

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


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
    document = {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
    cluster.kubectl(
        "apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(document)
    )


def running(namespace: str = "", selector: str = "") -> dict[str, Pod]:
    """key → pod: those that run and are not about to end; of one namespace, or of all."""
    where = ["-n", namespace] if namespace else ["-A"]
    text = cluster.kubectl("get", "pods", *where, "-l", selector, "-o", "json")
    found = (parse(item) for item in json.loads(text)["items"])
    return {pod.key: pod for pod in found if pod is not None}


def parse(item: Manifest) -> Pod | None:
    """The pod of an API object; None where it does not run, or is about to end."""
    metadata, status = item["metadata"], item["status"]
    containers = status.get("containerStatuses") or [{}]
    identifier = containers[0].get("containerID", "").removeprefix("containerd://")
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


def wait_ready(*namespaces: str) -> dict[str, Pod]:
    """The pods of these namespaces, once all of them are Ready."""
    for namespace in namespaces:
        cluster.kubectl(
            "wait", "-n", namespace, "--for=condition=Ready", "pods", "--all",
            f"--timeout={READY_SECONDS:.0f}s",
        )  # fmt: skip
    return {key: pod for n in namespaces for key, pod in running(n).items()}


def remove_namespaces(*names: str) -> None:
    """Deletes namespaces and waits until they are gone."""
    cluster.kubectl("delete", "namespace", "--ignore-not-found", "--timeout=120s", *names)


def eventually(condition: Any, what: str, seconds: float = READY_SECONDS) -> None:
    """Waits until `condition()` holds."""
    until(condition, what, seconds)


@functools.cache
def build_image() -> str:
    """Builds the test image; its name. Needs Go."""
    program = golang.build_local("probe", settings.HERE.parent / "probe")
    images.from_program(IMAGE, program, "/probe")
    return IMAGE
