"""A replica in small: a Leader that writes one NodeState as often as it may.

    python candidate.py KUBECONFIG IDENTITY LEASE RENEW RETRY

Prints one JSON line for whatever happens. SIGTERM: hands over and ends. SIGUSR1: stops itself
(SIGSTOP) at the worst moment, after `check` has said yes and before the write is sent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

import msgspec
from tidegate_kube import AlreadyExists, Client, KubeError, NotFound, resources
from tidegate_kube.kubeconfig import from_kubeconfig
from tidegate_operator.leader import Leader, NotLeader, Timing

NODE = "fenced"
LEASE = ("default", "tidegate-operator")


def say(what: str, **more: object) -> None:
    # The clock that all processes of a machine share.
    print(json.dumps({"at": time.monotonic(), "what": what, **more}), flush=True)


def node_state(identity: str, term: int, count: int, version: str = "") -> bytes:
    meta: dict[str, object] = {"name": NODE, "labels": {"writer": identity, "count": str(count)}}
    if version:
        meta["resourceVersion"] = version
    spec = {
        "format": 1,
        "mode": "Enforcing",
        "endpoints": [],
        "ruleSets": [],
        "peerSets": [],
        "tables": {},
        "term": term,
    }
    body = {
        "apiVersion": resources.NODE_STATES.api_version,
        "kind": "NodeState",
        "metadata": meta,
        "spec": spec,
    }
    return msgspec.json.encode(body)


class Writer:
    def __init__(self, client: Client, identity: str, timing: Timing) -> None:
        self.client, self.identity = client, identity
        self.ends = threading.Event()
        self.sleeps = threading.Event()
        self.leader = Leader(
            client,
            identity,
            namespace=LEASE[0],
            name=LEASE[1],
            gained=lambda term: say("gained", term=term),
            lost=lambda reason: say("lost", reason=reason),
            timing=timing,
        )

    def run(self) -> None:
        self.leader.start()
        say("runs")
        count = 0
        while not self.ends.wait(0.02):
            count += 1
            try:
                self.write(count)
            except NotLeader:
                continue
            except KubeError as error:
                say("refused", kind=type(error).__name__, message=str(error))
        self.leader.stop()
        say("ended")

    def write(self, count: int) -> None:
        version = self._version()
        seconds, term = self.leader.check(), self.leader.term
        if self.sleeps.is_set():
            self.sleeps.clear()
            say("sleeps", term=term)
            os.kill(os.getpid(), signal.SIGSTOP)
        if not version:
            self._create(node_state(self.identity, term, count), seconds)
            return
        body = node_state(self.identity, term, count, version)
        self.client.update(resources.NODE_STATES, NODE, body, timeout=seconds)
        say("wrote", term=term, count=count)

    def _version(self) -> str:
        try:
            found = msgspec.json.decode(self.client.get(resources.NODE_STATES, NODE))
        except NotFound:
            return ""
        return str(found["metadata"]["resourceVersion"])

    def _create(self, body: bytes, seconds: float) -> None:
        try:
            self.client.create(resources.NODE_STATES, body, timeout=seconds)
        except AlreadyExists:
            say("refused", kind="AlreadyExists", message="")


def main() -> None:
    path, identity, *seconds = sys.argv[1:]
    lease, renew, retry = map(float, seconds)
    timing = Timing(lease=lease, renew=renew, retry=retry, margin=lease / 15)
    writer = Writer(Client(from_kubeconfig(path), "candidate"), identity, timing)
    signal.signal(signal.SIGTERM, lambda *_: writer.ends.set())
    signal.signal(signal.SIGUSR1, lambda *_: writer.sleeps.set())
    writer.run()


if __name__ == "__main__":
    main()
