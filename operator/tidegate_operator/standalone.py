"""The operator without a cluster: a folder in, a run directory out, step by step.

Holds what one step hands to the next (world, ledger, caches) and follows the folder.
Makes no pods: whoever runs them hooks into `on_world`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import watchfiles

from tidegate_operator import identities, meanings, publish, world
from tidegate_operator.cluster import dump
from tidegate_operator.cluster import world as cluster_world
from tidegate_operator.compile import Compiler, Desired
from tidegate_operator.identities import EMPTY_LEDGER, Ledger
from tidegate_operator.manifests import Folder, Input
from tidegate_operator.objects import IdentityKey, World
from tidegate_operator.problems import Problem
from tidegate_operator.relabels import relabelled
from tidegate_operator.relevance import Hold, label_sets
from tidegate_operator.store import FileStore
from tidegate_operator.world import EMPTY_WORLD, MadeWorld

QUIET_MS = 5
"""A save is over when the folder was quiet so long ..."""
BURST_MS = 50
"""... or when it has gone on for this long."""
SETTLE_SECONDS = 0.05
"""How long something must be gone to count as removed: editors truncate and rename."""
POLL_SECONDS = 0.2
"""How often a folder that vanished, or was replaced, is looked for."""

OnWorld = Callable[[MadeWorld, MadeWorld], None]


@dataclass(frozen=True)
class StepResult:
    """What one step found and did. `desired` None: the folder was never read, or could
    not be; nothing was written."""

    world: MadeWorld
    ledger: Ledger
    desired: Desired | None
    problems: tuple[Problem, ...]
    written: tuple[str, ...]
    """Paths below `objects/` written or removed, in order."""


class Runner:
    """One folder, one run directory. Not thread-safe; `watch` runs in the caller's thread.

    `on_world(before, after)` is called when the world changed, before anything of it is
    published: a new pod's interface is there before its policy is, and a removed pod is
    gone before its policy goes."""

    def __init__(
        self,
        folder: Path,
        run_dir: Path,
        options: world.Options = world.DEFAULTS,
        on_world: OnWorld | None = None,
    ) -> None:
        self._path = folder
        self._folder = Folder(folder)
        self._store = FileStore(run_dir)
        self._publisher = publish.Publisher(self._store)
        self._compiler = Compiler()
        self._allocator = identities.Allocator()
        self._options = options
        self._on_world = on_world
        self._hold = Hold()
        self._read: Input | None = None
        self._linked: tuple[object, ...] = ()
        self.world = EMPTY_WORLD
        self.ledger = publish.read_ledger(run_dir)

    def step(self) -> StepResult:
        """Read, build, allocate, compile, publish, once. Raises publish.PublishError, and
        whatever `on_world` raises; the next step tries again."""
        return self._apply(self._folder.read())

    def _apply(self, read: Input) -> StepResult:
        if not read.complete:
            return StepResult(self.world, self.ledger, None, read.problems, ())
        before, began = self.world, time.monotonic()
        same = self._same_policies(read)
        hold = not same or not self._hold.due(began)
        now, problems = world.build(read.documents, self._options, before, hold)
        self._hold.built(before, now, began)
        reason = not same or now.relevance != before.relevance
        waiting = relabelled(before.pods, now.pods) if reason else {}
        said = (*read.problems, *problems)
        written: tuple[str, ...] = ()
        if waiting:
            written = self._publish(world.with_labels(now, waiting), said)[1]
        desired, more = self._publish(now, said)
        written, found = (*written, *more), (*said, *desired.problems)
        keys = [item.key for item in read.documents if item.key.kind in meanings.POLICY_KINDS]
        self._store.follow(read.files, [str(key) for key in keys])
        self._read = read
        return StepResult(now, self.ledger, desired, found, written)

    def _publish(
        self, now: MadeWorld, said: tuple[Problem, ...]
    ) -> tuple[Desired, tuple[str, ...]]:
        """(what `now` comes to, what was written for it)."""
        if self._on_world is not None and now != self.world:
            self._on_world(self.world, now)
        self.world = now
        self.ledger = self._allocator.allocate(now, self.ledger)
        desired = self._compiler.compile(now, self.ledger)
        found = (*said, *desired.problems)
        return desired, self._publisher.publish(desired, self.ledger, found)

    def _same_policies(self, read: Input) -> bool:
        """Are they those of the last step?"""
        return self._read is not None and _policies(self._read) == _policies(read)

    # ---- following ----

    def watch(
        self, stop: threading.Event, on_step: Callable[[StepResult], None] | None = None
    ) -> None:
        """Step now and after every change of the folder, until `stop` is set. A folder
        that vanishes keeps its meaning and is looked for. Raises as `step` does."""
        report = on_step if on_step is not None else _ignore
        while not stop.is_set():
            root = _root(self._path)
            report(self._settled(stop))
            if root is None:
                while not stop.wait(POLL_SECONDS) and _root(self._path) is None:
                    pass
                continue
            try:
                self._follow(stop, root, report)
            except FileNotFoundError:  # gone between looking and watching
                continue

    def _follow(
        self,
        stop: threading.Event,
        root: tuple[int, int],
        report: Callable[[StepResult], None],
    ) -> None:
        changes = watchfiles.watch(
            self._path,
            watch_filter=None,
            debounce=BURST_MS,
            step=QUIET_MS,
            stop_event=stop,
            rust_timeout=int(POLL_SECONDS * 1000),
            yield_on_timeout=True,
            raise_interrupt=False,
        )
        first = True
        for changed in changes:
            if _root(self._path) != root:
                return
            # The first time-out also: something may have changed before the watch began.
            due = first or self._hold.due(time.monotonic())
            if changed or due or self._folder.linked() != self._linked:
                report(self._settled(stop))
            first = False

    def _settled(self, stop: threading.Event) -> StepResult:
        """One step; but what seems to be removed must still be gone a moment later."""
        # Taken before the read, or a change in between would go unseen.
        self._linked = self._folder.linked()
        read = self._folder.read()
        if self._read is not None:
            now = {document.key for document in read.documents}
            if any(document.key not in now for document in self._read.documents):
                stop.wait(SETTLE_SECONDS)
                read = self._folder.read()
        return self._apply(read)


def _policies(read: Input) -> list[object]:
    return [item.object for item in read.documents if item.key.kind in meanings.POLICY_KINDS]


def _ignore(_: StepResult) -> None:
    pass


def _root(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino)


class Compiled(NamedTuple):
    """`desired` None: the folder could not be read."""

    desired: Desired | None
    ledger: Ledger
    problems: tuple[Problem, ...]
    sizes: publish.Sizes = publish.FOLDER_SIZES
    sets: Mapping[IdentityKey, int] = {}
    """See `relevance.label_sets`."""


def compile_folder(folder: Path, options: world.Options = world.DEFAULTS) -> Compiled:
    """What `tidegate compile` prints: one read of `folder`, numbers from scratch. Of a folder
    that holds a cluster, its real nodes and pods: what the operator publishes there."""
    read = Folder(folder).read()
    if not read.complete:
        return Compiled(None, EMPTY_LEDGER, read.problems)
    now: World
    if dump.is_cluster(read.documents):
        snapshot, odd = dump.snapshot_of(read.documents)
        now, problems = cluster_world.build(snapshot)
        problems, sizes = (*odd, *problems), publish.CLUSTER_SIZES
    else:
        now, problems = world.build(read.documents, options)
        sizes = publish.FOLDER_SIZES
    ledger = identities.allocate(now, EMPTY_LEDGER)
    desired = Compiler().compile(now, ledger)
    found = (*read.problems, *problems, *desired.problems)
    return Compiled(desired, ledger, found, sizes, label_sets(now))
