"""A host of the nodes' network that is no node, and in no pod: a container of its own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from kind.run import attempt, run
from rig import pods
from rig.asking import Asker

NAME = "tidegate-e2e-outside"
NETWORK = "kind"
"""Docker's, that kind puts its nodes into."""


@dataclass(frozen=True)
class Host:
    address: str
    address6: str

    def asker(self) -> Asker:
        """Asks from it."""
        return Asker("outside", ["docker", "exec", "-i", NAME, "/probe", "ask"])


@contextlib.contextmanager
def host() -> Iterator[Host]:
    """It answers on TCP port 8080 as pods of the test image do."""
    attempt("docker", "rm", "-f", NAME)
    run("docker", "run", "-d", "--name", NAME, "--network", NETWORK, "--env", "POD=outside",
        pods.build_image(), "serve", "TCP:8080")  # fmt: skip
    try:
        found = json.loads(run("docker", "inspect", NAME))[0]["NetworkSettings"]["Networks"]
        yield Host(found[NETWORK]["IPAddress"], found[NETWORK]["GlobalIPv6Address"])
    finally:
        run("docker", "rm", "-f", NAME)
