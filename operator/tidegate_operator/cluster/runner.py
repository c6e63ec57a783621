"""When to compile and publish: at once after quiet, then in bursts; again after errors.

Reflectors only poke. One thread works: it takes the snapshot, compiles, publishes. Nothing
is written before every kind has been read whole, nor by a replica that does not lead. What
an error interrupts stays as it is in force and is tried again.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from tidegate_api.state import Identity
from tidegate_kube import Client, KubeError
from tidegate_kube.backoff import Backoff

from tidegate_operator import identities, publish, services
from tidegate_operator.cluster import world
from tidegate_operator.cluster.lead import Lead, term_of
from tidegate_operator.cluster.metrics import Metrics
from tidegate_operator.cluster.reports import Reports
from tidegate_operator.cluster.selfcheck import VERIFY_SECONDS, SelfCheck
from tidegate_operator.cluster.store import KubeStore, NumberTaken
from tidegate_operator.cluster.watches import Watches
from tidegate_operator.cluster.world import EMPTY_CLUSTER, ClusterWorld, Snapshot
from tidegate_operator.compile import Compiler, Desired
from tidegate_operator.identities import EMPTY_LEDGER, Ledger
from tidegate_operator.leader import NotLeader
from tidegate_operator.problems import Problem
from tidegate_operator.relabels import Relabels
from tidegate_operator.relevance import DEFAULTS, Hold, Settings
from tidegate_operator.store import PublishError

QUIET_SECONDS = 0.1
"""After so long without a step, the next change is acted on at once ..."""
DEBOUNCE_SECONDS = 0.02
"""... else changes are gathered for so long."""
IDLE_SECONDS = 5.0
"""The longest time without looking around: for grace periods, resting numbers, leadership."""
STUCK_SECONDS = 60.0
"""Without a sign of life for so long, the runner's thread is taken for stuck."""
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.2, 15.0
GRACE_SECONDS = 60.0
"""How long a rule set stays that no NodeState names: a node may lag behind."""
STOP_SECONDS = 1.0
REST_SECONDS = 3600
"""How long a number is not reused."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Published:
    """What was last published whole."""

    world: ClusterWorld
    desired: Desired
    ledger: Ledger
    problems: tuple[Problem, ...]
    arrived: float
    """When the oldest change in it had arrived (time.monotonic)."""
    at: float
    changed: bool
    """Something was written for it."""


class Runner:
    """`start` and `stop` once. `on_published` is called in the runner's thread after each
    publish that changed anything or came to its end for the first time."""

    def __init__(
        self,
        client: Client,
        watches: Watches,
        lead: Lead,
        metrics: Metrics,
        on_published: Callable[[Published], None] | None = None,
        of_services: services.Settings = services.DEFAULTS,
        settings: Settings = DEFAULTS,
        verify_every: float = VERIFY_SECONDS,
        reports: Reports | None = None,
    ) -> None:
        self._reports = reports or Reports()
        self.watches = watches
        watches.changed = self.poke
        self._client = client
        self._lead = lead
        self._metrics = metrics
        self._on_published = on_published
        self._of_services = of_services
        self._thread = threading.Thread(target=self._run, name="runner", daemon=True)
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._arrived: float | None = None
        self._alive = time.monotonic()
        self._candidate = False
        self._term: int | None = None
        self._store: KubeStore | None = None
        self._publisher: publish.Publisher | None = None
        self._compiler = Compiler()
        self._self_check = SelfCheck(verify_every, metrics, self.poke)
        self._allocator = identities.Allocator()
        self._settings = settings
        self._hold = Hold()
        self._relabels = Relabels()
        self._world = EMPTY_CLUSTER
        self._ledger = EMPTY_LEDGER
        self._done: Snapshot | None = None
        self._backoff = Backoff(FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS)
        self._retry: float | None = None
        """Seconds until an error's step is tried again; None: there was none."""
        self._said: tuple[object, ...] = ()
        self.published: Published | None = None
        self.error = ""
        """Of the last step; "" if it came to its end."""

    # ---- for others ----

    def start(self) -> None:
        self.watches.start()
        self._thread.start()

    def stop(self) -> None:
        """Ends the work, at the next request if one is under way, and hands over."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)
        self._lead.stop()
        self.watches.stop()
        if self._store is not None:
            self._store.close()

    def poke(self) -> None:
        """Something changed."""
        with self._lock:
            if self._arrived is None:
                self._arrived = time.monotonic()
        self._wake.set()

    def faults(self) -> list[str]:
        """Why this process cannot do its work any more and has to be replaced. An API server
        that is away is no such reason."""
        found = []
        if not self._stopping.is_set():
            found = [
                f"the thread that watches {item.resource.plural} has ended"
                for item in self.watches.all
                if not item.health().alive
            ]
            if not self._thread.is_alive():
                found.append("the runner has ended")
            if self._candidate and not self._lead.alive:
                found.append("the thread that holds the lease has ended")
        silent = time.monotonic() - self._alive
        if silent > STUCK_SECONDS:
            found.append(f"the runner is stuck for {silent:.0f} s")
        return found

    def unready(self) -> list[str]:
        """What keeps this replica from doing its part now."""
        found = [f"{name} not read yet, forbidden or gone" for name in self.watches.unsynced()]
        if self.leading() and self.published is None:
            found.append("nothing published yet")
        return found

    def restarts(self) -> dict[str, int]:
        return {item.resource.plural: item.health().restarts for item in self.watches.all}

    def unsynced(self) -> list[str]:
        return self.watches.unsynced()

    def queue_age(self) -> float:
        arrived = self._arrived
        return 0.0 if arrived is None else time.monotonic() - arrived

    def leading(self) -> bool:
        return term_of(self._lead) is not None

    # ---- the thread ----

    def _run(self) -> None:
        last = 0.0
        while not self._stopping.is_set():
            self._alive = time.monotonic()
            # After an error nobody's poke makes it try again sooner.
            failed = self._retry is not None
            pause = IDLE_SECONDS if self._retry is None else self._retry
            woken = (self._stopping if failed else self._wake).wait(pause)
            if self._stopping.is_set():
                return
            if woken and time.monotonic() - last < QUIET_SECONDS:
                self._stopping.wait(DEBOUNCE_SECONDS)
            self._wake.clear()
            try:
                self._turn()
            except NotLeader as error:
                self._say("no longer the leader", error=str(error))
            except (PublishError, KubeError) as error:
                self._failed(error)
            except Exception as error:  # a fault of ours: said, tried again, seen in metrics
                log.exception("step failed")
                self._forget()  # what is kept may be what is wrong
                self._failed(error)
            last = time.monotonic()

    def _failed(self, error: Exception) -> None:
        self._retry = self._backoff.failed()
        self.error = str(error)
        self._metrics.publish_errors.inc()
        log.warning(
            "cannot publish, trying again", error=str(error), failures=self._backoff.failures
        )

    def _turn(self) -> None:
        """One look around, and a step if there is reason for one."""
        unsynced = self.watches.unsynced()
        if unsynced:
            self._say("waiting for complete lists", resources=unsynced)
            return
        if not self._candidate:
            # Who has not read everything could do nothing with a lease; and terms are known now.
            self._candidate = True
            self._lead.start()
        term = term_of(self._lead)
        if term is None:
            self._say("not the leader")
            self._arrived = None
            return
        if term != self._term or self._publisher is None:
            self._begin(term)
        arrived, self._arrived = self._arrived or time.monotonic(), None
        snapshot = self.watches.snapshot()
        if self._self_check.take():
            self._forget()
        if self._idle(snapshot):
            self._offer()
            return
        try:
            self._step(snapshot, arrived)
        except BaseException:
            self._arrived = arrived if self._arrived is None else min(arrived, self._arrived)
            raise
        if not self._wake.is_set():
            self._offer()

    def _forget(self) -> None:
        """All that a step keeps for the next, but for numbers."""
        self._world, self._compiler = world.anew(self._world), Compiler()
        self._allocator, self._done = identities.Allocator(), None

    def _offer(self) -> None:
        """To be checked, while nothing waits to be published."""
        last = self.published
        if last is not None:
            self._self_check.offer(last.world, last.ledger, last.desired)

    def _begin(self, term: int) -> None:
        """Lead, from what is there: another replica may have written since we looked."""
        if self._store is not None:
            self._store.close()
        self._store = KubeStore(self._client, self.watches.ours, self._lead.check, self._counted)
        self._publisher = publish.Publisher(self._store, publish.CLUSTER_SIZES, GRACE_SECONDS, term)
        self._ledger = publish.ledger_of(self._store.held(Identity).values())
        self._term, self._done = term, None
        self._say("leading", term=term)

    def _idle(self, snapshot: Snapshot) -> bool:
        done, publisher = self._done, self._publisher
        assert publisher is not None
        return (
            done is not None
            and self._retry is None
            and _same(done, snapshot)
            and not publisher.waiting
            and not publisher.disturbed()
            and not self._hold.due(time.monotonic(), self._lagging)
            and not self._rested()
        )

    def _lagging(self) -> bool:
        """Is there a node, among the living, that does not have in force what was published?"""
        nodes = self.watches.node_states
        return bool(self._reports.lagging(nodes.snapshot(), nodes.health().failing_since is None))

    def _rested(self) -> bool:
        oldest = next(iter(self._ledger.released.values()), None)
        return oldest is not None and oldest[1] < int(time.time()) - REST_SECONDS

    def _step(self, snapshot: Snapshot, arrived: float) -> None:
        assert self._publisher is not None
        began = time.monotonic()
        before = self._world
        same = world.same_policies(snapshot, before.snapshot)
        hold = not same or not self._hold.due(began, self._lagging)
        reason = not (same and hold) or snapshot.identities is not before.snapshot.identities
        waiting = self._relabels.waiting(
            before.snapshot.pods, snapshot.pods, reason or self._retry is not None, began
        )
        snapshot = world.with_labels(snapshot, waiting)
        now, problems = world.build(snapshot, before, self._settings, self._of_services, hold)
        self._hold.built(before, now, began)
        self._world = now
        built = time.monotonic()
        ledger = self._ledger
        for number, key in self._publisher.strangers().items():
            ledger = identities.give_way(ledger, number, key)
        ledger = self._allocator.allocate(now, ledger, int(time.time()), REST_SECONDS)
        desired = self._compiler.compile(now, ledger)
        compiled = time.monotonic()
        self._ledger = ledger
        found = (*problems, *desired.problems)
        try:
            triggers = world.triggers(before.snapshot, snapshot)
            written = self._publisher.publish(desired, ledger, found, compiled, triggers)
        except NumberTaken as error:
            for name, item in error.taken.items():
                self._ledger = identities.give_way(self._ledger, int(name), publish.key_of(item))
            raise
        ended = time.monotonic()
        for part, seconds in (
            ("world", built - began),
            ("compile", compiled - built),
            ("publish", ended - compiled),
        ):
            self._metrics.step_seconds.labels(part).observe(seconds)
        self._finished(
            Published(now, desired, ledger, found, arrived, ended, bool(written)), len(written)
        )
        if self._done is None:
            # What a cluster is made of lives long: the collector need not look at it again
            # with every burst of changes, which would take longer than the change.
            gc.collect()
            gc.freeze()
        self._done, self._retry, self.error = snapshot, None, ""
        self._backoff.succeeded()
        if waiting:
            self.poke()

    def _finished(self, published: Published, written: int) -> None:
        first, self.published = self.published is None, published
        ledger = published.ledger
        self._metrics.identities.labels("live").set(len(ledger.live))
        self._metrics.identities.labels("resting").set(len(ledger.released))
        for severity in ("error", "warning", "info"):
            count = sum(problem.severity == severity for problem in published.problems)
            self._metrics.problems.labels(severity).set(count)
        if written or first:
            self._metrics.published_seconds.observe(published.at - published.arrived)
            log.info(
                "published",
                objects=written,
                milliseconds=round((published.at - published.arrived) * 1000),
                pods=len(published.world.pods),
                nodes=len(published.world.nodes),
            )
        if self._on_published is not None:
            self._on_published(published)

    def _check(self) -> float:
        if self._stopping.is_set():
            raise NotLeader("stopping")
        return self._lead.check()

    def _counted(self, verb: str, kind: str, size: int) -> None:
        self._alive = time.monotonic()  # a long publish is no stuck one
        self._metrics.written(verb, kind, size)

    def _say(self, event: str, **about: object) -> None:
        """Log what did not change only once."""
        said = (event, repr(about))
        if said != self._said:
            self._said = said
            log.info(event, **about)


def _same(one: Snapshot, other: Snapshot) -> bool:
    return all(getattr(one, name) is getattr(other, name) for name in Snapshot.__dataclass_fields__)
