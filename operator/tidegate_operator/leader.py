"""One of several replicas writes: a Lease elects it, its own clock deposes it.

A Lease alone does not stop a leader that slept: it wakes, believes it leads, and writes. So
`check()` before every write asks a clock of this machine, never the Lease; it also says how
long that write's request may take, so that none is on its way when the next leader begins.
What was handed to the kernel before a process was stopped can still arrive; such a write is
refused by its resourceVersion or by `spec.term`, which never falls, or else the new leader
sees an object it did not write, and repairs it.

Times in the Lease are for people. What counts: a leader is dead when its Lease has not changed
for `leaseDurationSeconds` of the *observer's* clock.
"""

from __future__ import annotations

import datetime
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog
from tidegate_kube import AlreadyExists, Client, Conflict, KubeError, NotFound, Reflector, resources

log = structlog.get_logger()

RELEASE_SECONDS = 1.5
"""For the request that hands over; who asked for SIGTERM waits for it."""
RENEW_REQUEST_SECONDS = 3.0
STOP_SECONDS = 5.0


class NotLeader(Exception):
    """Another replica writes, or may: nothing may be written here."""


@dataclass(frozen=True)
class Timing:
    """Seconds; lease > renew > retry."""

    lease: float = 15.0
    """Another may take over when the Lease has not changed for so long."""
    renew: float = 10.0
    """A leader that could not renew for so long does not write any more."""
    retry: float = 2.0
    """How often a leader renews and a candidate looks."""
    margin: float = 1.0
    """Before the end of the lease every request of ours has ended."""


def clock() -> float:
    """Seconds that also pass while the machine is suspended, unlike CLOCK_MONOTONIC's."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class _Hold:
    """Led in `term`; `since` is when the request that last renewed it was sent."""

    term: int
    since: float


class Leader:
    """A candidate, and the leader while `check` does not raise. Thread-safe.

    `identity` belongs to one process at a time: its own old Lease it takes at once, in a new
    term. `floor` gives the highest term found anywhere: a Lease that was deleted by hand must
    not begin again below it. `gained(term)` and `lost(reason)` are called in the thread here,
    in turns, and must return at once; `lost` tells what has happened: `check` raises."""

    def __init__(
        self,
        client: Client,
        identity: str,
        *,
        namespace: str,
        name: str,
        gained: Callable[[int], None],
        lost: Callable[[str], None],
        floor: Callable[[], int] = lambda: 0,
        timing: Timing | None = None,
    ) -> None:
        self._client = client
        self._identity = identity
        self._namespace = namespace
        self._name = name
        self._gained = gained
        self._lost = lost
        self._floor = floor
        self._timing = timing or Timing()
        self._hold: _Hold | None = None
        self._lease: dict[str, Any] = {}
        self._observed = ("", 0.0)
        self._highest = 0
        self._error = ""
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leader", daemon=True)
        # Only to be woken when the holder changes: a candidate looks for itself.
        self._watch = Reflector(
            client,
            resources.LEASES,
            _holder,
            self._wake.set,
            namespace=namespace,
            field_selector=f"metadata.name={name}",
        )

    # ---- for the caller ----

    def start(self) -> None:
        self._watch.start()
        self._thread.start()

    def stop(self) -> None:
        """Hands over at once: stop writing before. Waits a bounded time."""
        self._stopping.set()
        self._wake.set()
        self._watch.stop()
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)

    def check(self) -> float:
        """Before every write. Seconds that each wait of its request may take: half of what
        is left, as connecting and the answer are waited for one after the other.
        NotLeader: do not write."""
        hold, now = self._hold, clock()
        if hold is None:
            raise NotLeader("this replica does not lead")
        if now >= hold.since + self._timing.renew:
            raise NotLeader(f"the lease was last renewed {now - hold.since:.1f} s ago")
        return (hold.since + self._timing.lease - self._timing.margin - now) / 2

    @property
    def leading(self) -> bool:
        try:
            self.check()
        except NotLeader:
            return False
        return True

    @property
    def term(self) -> int:
        """Of the present leadership; higher than any before it. NotLeader."""
        hold = self._hold
        if hold is None:
            raise NotLeader("this replica does not lead")
        return hold.term

    @property
    def error(self) -> str:
        """Why the last look at the Lease, or renewal, failed; "" if it did not."""
        return self._error

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    # ---- the thread ----

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                wait = self._step()
                self._say("")
            except KubeError as error:
                self._say(str(error))
                wait = min(self._timing.retry, error.retry_after or self._timing.retry) / 2
            self._wake.wait(wait * random.uniform(0.9, 1.1))
        self._release()

    def _say(self, error: str) -> None:
        """What keeps the Lease from being seen or renewed, each time that it is another."""
        before, self._error = self._error, error
        if error and error != before:
            log.warning("the lease cannot be had", lease=self._name, error=error)
        elif before and not error:
            log.info("the lease can be had again", lease=self._name)

    def _step(self) -> float:
        """Seconds until the next."""
        hold = self._hold
        if hold is not None and clock() >= hold.since + self._timing.renew:
            self._lose(f"not renewed for {self._timing.renew:.0f} s: {self._error or 'slept'}")
            hold = None
        if hold is not None:
            self._renew(hold)
            return self._timing.retry
        return self._try()

    def _renew(self, hold: _Hold) -> None:
        sent = clock()
        # An answer that comes after `check` has given up is of no use.
        left = min(RENEW_REQUEST_SECONDS, hold.since + self._timing.renew - sent)
        try:
            ours = self._put_ours(hold.term, left, self._identity)
        except NotFound:
            # A new Lease is a new term, for whoever makes it.
            self._lose("the lease was deleted")
            self._wake.set()
            return
        if ours:
            self._hold = _Hold(hold.term, sent)
        else:
            self._lose(f"{_holder_of(self._lease) or 'nobody'} holds the lease")

    def _try(self) -> float:
        """Takes the Lease if it is to be had; seconds until the next try."""
        try:
            found = self._get()
        except NotFound:
            self._take({})
            return self._timing.retry
        now = clock()
        version = str(found["metadata"]["resourceVersion"])
        if self._observed[0] != version:
            self._observed = (version, now)
        spec = found.get("spec") or {}
        left = self._observed[1] + _duration(spec, self._timing.lease) - now
        if _holder_of(found) not in ("", self._identity) and left > 0:
            return min(self._timing.retry, left)
        self._take(found)
        return self._timing.retry

    def _take(self, found: dict[str, Any]) -> None:
        """`found` is empty: there is no Lease. Quietly nothing if somebody was faster."""
        term = max(_term_of(found), self._highest, self._floor()) + 1
        sent = clock()
        try:
            if found:
                self._put(found, term, RENEW_REQUEST_SECONDS, self._identity)
            else:
                self._create(term)
        except (Conflict, AlreadyExists):
            return
        self._highest = term
        self._hold = _Hold(term, sent)
        self._gained(term)

    def _lose(self, reason: str) -> None:
        self._hold = None
        self._lost(reason)

    def _release(self) -> None:
        hold, self._hold = self._hold, None
        if hold is None:
            return
        try:
            self._put_ours(hold.term, RELEASE_SECONDS, "")
        except KubeError as error:
            self._error = str(error)
        self._lost("released")

    # ---- the Lease ----

    def _get(self) -> dict[str, Any]:
        body = self._client.get(
            resources.LEASES, self._name, self._namespace, timeout=RENEW_REQUEST_SECONDS
        )
        found: dict[str, Any] = msgspec.json.decode(body)
        self._highest = max(self._highest, _term_of(found))
        return found

    def _create(self, term: int) -> None:
        lease = {
            "apiVersion": resources.LEASES.api_version,
            "kind": resources.LEASES.kind,
            "metadata": {"name": self._name, "namespace": self._namespace},
            "spec": self._spec({}, term, self._identity),
        }
        body = msgspec.json.encode(lease)
        answer = self._client.create(
            resources.LEASES, body, self._namespace, timeout=RENEW_REQUEST_SECONDS
        )
        self._lease = msgspec.json.decode(answer)

    def _put_ours(self, term: int, timeout: float, holder: str) -> bool:
        """Renews or releases. False: another holds it, or held it since."""
        try:
            self._put(self._lease, term, timeout, holder)
        except Conflict:
            # Changed by somebody else (a label, say), or by a request whose answer was lost?
            self._lease = self._get()
            if _holder_of(self._lease) != self._identity or _term_of(self._lease) != term:
                return False
            self._put(self._lease, term, timeout, holder)
        return True

    def _put(self, found: dict[str, Any], term: int, timeout: float, holder: str) -> None:
        """With the resourceVersion that was found: of two who try, one is refused."""
        lease = found | {"spec": self._spec(found.get("spec") or {}, term, holder)}
        body = msgspec.json.encode(lease)
        answer = self._client.update(
            resources.LEASES, self._name, body, self._namespace, timeout=timeout
        )
        self._lease = msgspec.json.decode(answer)

    def _spec(self, before: dict[str, Any], term: int, holder: str) -> dict[str, Any]:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        same = before.get("leaseTransitions") == term
        return before | {
            "holderIdentity": holder,
            "leaseDurationSeconds": max(1, round(self._timing.lease)),
            "leaseTransitions": term,
            "acquireTime": before.get("acquireTime", now) if same else now,
            "renewTime": now,
        }


def _holder(raw: bytes) -> str:
    return _holder_of(msgspec.json.decode(raw))


def _holder_of(lease: dict[str, Any]) -> str:
    return str((lease.get("spec") or {}).get("holderIdentity") or "")


def _term_of(lease: dict[str, Any]) -> int:
    return int((lease.get("spec") or {}).get("leaseTransitions") or 0)


def _duration(spec: dict[str, Any], otherwise: float) -> float:
    """Of whoever holds it, who may be of another version."""
    return float(spec.get("leaseDurationSeconds") or otherwise)
