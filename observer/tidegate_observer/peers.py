"""The observers of a cluster, as any one of them tells: what a relay asks flows of.

What was told stays known while nobody answers: a node that is away is one that is missed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping

import structlog

from tidegate_observer.api import peer_pb2
from tidegate_observer.client import ObserverError
from tidegate_observer.relay import Connect

RETRY_SECONDS = 2.0
READY_SECONDS = 5.0
SETTLED_SECONDS = 5.0
"""An observer that was asked anew has named every one by then."""

log = structlog.get_logger()


class PeerService:
    """Asks the Peer service at an address, in a thread, until `close`."""

    def __init__(self, address: str, connect: Connect) -> None:
        self._address = address
        self._connect = connect
        self._known: dict[str, str] = {}
        self._named: dict[str, str] = {}
        """In this answer."""
        self._since = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()

    def __call__(self) -> Mapping[str, str]:
        """Node → address."""
        named, since = self._named, self._since
        if named and time.monotonic() - since > SETTLED_SECONDS:
            # It named all that there are: whom it did not is gone.
            self._known = dict(named)
        return self._known

    def _run(self) -> None:
        told = ""
        while not self._stop.is_set():
            try:
                with self._connect(self._address) as client:
                    client.wait_ready(READY_SECONDS)
                    self._since, self._named = time.monotonic(), {}
                    told = ""
                    self._listen(client.peers())
            except ObserverError as error:
                if str(error) != told:
                    told = str(error)
                    log.warning("no observer says which there are", error=told)
            self._named = {}
            self._stop.wait(RETRY_SECONDS)

    def _listen(self, changes: Iterator[peer_pb2.ChangeNotification]) -> None:
        for change in changes:
            if self._stop.is_set():
                return
            if change.type == peer_pb2.PEER_DELETED:
                self._named = _without(self._named, change.name)
                self._known = _without(self._known, change.name)
            else:
                self._named = {**self._named, change.name: change.address}
                self._known = {**self._known, change.name: change.address}


def _without(peers: dict[str, str], name: str) -> dict[str, str]:
    return {other: address for other, address in peers.items() if other != name}
