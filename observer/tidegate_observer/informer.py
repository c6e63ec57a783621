"""Who lives in a cluster, from its API server: pods, as far as flows show them, and identities.

Two reflectors. Of a pod only what a flow shows of it is kept, so what changes beside that (its
conditions, its images) changes nothing here. May not live here: the kernel's numbers (`rundir`).
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Mapping

import msgspec
import structlog
from msgspec import UNSET
from tidegate_api.state import FIRST_IDENTITY, Identity
from tidegate_kube import Client, Reflector
from tidegate_kube.resources import IDENTITIES, PODS

from tidegate_observer.directory import identity_end, pod_labels
from tidegate_observer.flow import End
from tidegate_observer.people import Pod

HASH_LABEL = "pod-template-hash"
OBSERVERS = {"app.kubernetes.io/name": "tidegate-loader"}
"""Labels of the pods that an observer runs in."""
_SCHEDULED = re.compile(r"(.+)-\d{8,10}")
"""A CronJob's Job: the minute it was due follows the CronJob's name."""
STATIC_ANNOTATION = "kubernetes.io/config.hash"
_ENDED = ("Succeeded", "Failed")

log = structlog.get_logger()


class _Owner(msgspec.Struct, frozen=True):
    kind: str = ""
    name: str = ""
    controller: bool = False


class _Meta(msgspec.Struct, frozen=True, rename="camel"):
    name: str
    namespace: str = ""
    uid: str = ""
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    owner_references: list[_Owner] | None = None


class _Spec(msgspec.Struct, frozen=True, rename="camel"):
    node_name: str = ""
    host_network: bool = False


class _Address(msgspec.Struct, frozen=True):
    ip: str = ""


class _Status(msgspec.Struct, frozen=True, rename={"pod_ips": "podIPs"}):
    phase: str = ""
    pod_ips: list[_Address] | None = None


class _Pod(msgspec.Struct, frozen=True):
    metadata: _Meta
    spec: _Spec = _Spec()
    status: _Status = _Status()


_decoder = msgspec.json.Decoder(_Pod)
_identity_decoder = msgspec.json.Decoder(Identity)


def pod(data: bytes) -> Pod:
    """Of an object of the API. MsgspecError: it is none."""
    item = _decoder.decode(data)
    meta, spec, status = item.metadata, item.spec, item.status
    labels = meta.labels or {}
    kind, name = workload(meta)
    ended = status.phase in _ENDED
    return Pod(
        () if ended else tuple(a.ip for a in status.pod_ips or () if a.ip),
        spec.host_network,
        # Thousands of pods have the same ones.
        tuple(map(sys.intern, pod_labels(meta.namespace, labels))),
        sys.intern(name),
        sys.intern(kind),
        sys.intern(spec.node_name),
        OBSERVERS.items() <= labels.items(),
        _cgroup_uid(meta) if spec.host_network else "",
    )


def _cgroup_uid(meta: _Meta) -> str:
    """What the kubelet names a pod's cgroup by: of a static pod it is not the UID that the API
    server has given the pod's mirror."""
    return (meta.annotations or {}).get(STATIC_ANNOTATION) or meta.uid


def workload(meta: _Meta) -> tuple[str, str]:
    """(kind, name) of what people made the pod with: of a ReplicaSet's pod the Deployment, of a
    scheduled Job's the CronJob. ("", ""): nothing did."""
    owner = next((o for o in meta.owner_references or () if o.controller), None)
    if owner is None:
        return "", ""
    made_of = (meta.labels or {}).get(HASH_LABEL, "")
    if owner.kind == "ReplicaSet" and made_of and owner.name.endswith(f"-{made_of}"):
        return "Deployment", owner.name.removesuffix(f"-{made_of}")
    scheduled = _SCHEDULED.fullmatch(owner.name) if owner.kind == "Job" else None
    if scheduled is not None:
        return "CronJob", scheduled[1]
    return owner.kind, owner.name


def identity(data: bytes) -> End | None:
    """None: a user-made one's number is in its status, and not there yet."""
    item = _identity_decoder.decode(data)
    name = item.metadata.name
    told = UNSET if item.status is UNSET else item.status.id
    number = int(name) if name.isdigit() else 0 if told is UNSET else told
    return identity_end(item, number) if number >= FIRST_IDENTITY else None


class ClusterPeople:
    """Implements `people.People`. `start` before the first question, `close` once."""

    def __init__(self, client: Client, namespace: str) -> None:
        """`namespace`: of the observers' pods."""
        self._namespace = namespace
        self._changed = threading.Event()
        self._pods = Reflector(client, PODS, pod, self._changed.set)
        self._identities = Reflector(client, IDENTITIES, identity, self._changed.set)

    def start(self) -> None:
        self._pods.start()
        self._identities.start()

    def close(self) -> None:
        self._pods.stop()
        self._identities.stop()

    def wait(self, seconds: float, stop: threading.Event) -> bool:
        """Until everybody is known; False: not in time, and those who live on the node are known
        by name only, or somebody set `stop`."""
        until = time.monotonic() + seconds
        while not (self._pods.synced and self._identities.synced):
            if time.monotonic() >= until:
                health = self._pods.health()
                log.warning("the API server does not say who is who", error=health.error)
                return False
            if stop.wait(0.05):
                return False
        return True

    # ---- People -----------------------------------------------------------------------------

    def fresh(self) -> bool:
        found = self._changed.is_set()
        self._changed.clear()
        return found

    @property
    def pods(self) -> Mapping[tuple[str, str], Pod]:
        return self._pods.snapshot()

    @property
    def identities(self) -> Mapping[int, End]:
        ends = self._identities.snapshot().values()
        return {end.identity: end for end in ends if end is not None}

    # ---- the other observers ----------------------------------------------------------------

    def observers(self) -> dict[str, str]:
        """Node → address of it, of every node that has an observer's pod, running or not. Empty
        until all pods are known."""
        found: dict[str, str] = {}
        if not self._pods.synced:
            return found
        for (namespace, _), item in sorted(self.pods.items()):
            if namespace == self._namespace and item.observes and item.node and item.addresses:
                found[item.node] = item.addresses[0]
        return found
