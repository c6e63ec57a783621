"""The node's objects, from the API server into `objects/`, and the node's status back to it.

On a cluster this stands where publish stands on one machine: behind `objects/` nothing knows
the difference. Whatever becomes of the API server or of its objects, a file goes only after a
newer state that does not name it is in force. May not live here: what objects mean (`source`
judges them), the kernel.
"""

from __future__ import annotations

import datetime
import os
import random
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from tidegate_api.state import TRIGGER_ANNOTATION, NodeStateStatus, RuleSet, digest, encode
from tidegate_kube import Client, Invalid, KubeError, NotFound, Reflector
from tidegate_kube.backoff import Backoff
from tidegate_kube.resources import NODE_STATES, RULE_SETS, STATE_SLICES, Resource

from tidegate_loader.local import NodePaths, write_atomic

RETRY_FIRST, RETRY_LAST = 1.0, 30.0
"""Seconds until a request that failed is tried again: doubled up to the last, half at random."""
STATUS_SECONDS = 1.0
"""Statuses are written no more often than this..."""
REPEAT_SECONDS = 60.0
"""...and this often though nothing changed, half as long again at random: the operator counts on
nodes that it hears of, and somebody may have edited it."""
END_SECONDS = 1.0
"""How long a request under way may hold up the end."""
HEALTH_SECONDS = 2.0
"""How often it is looked at what the reflectors met."""
RESYNC_SECONDS = 600.0
"""After so long without one of the two kinds the operator may count this node as dead, and wait
for it no longer: nothing moves until both are as they are now."""
UNREACHED_SECONDS = 10.0
"""After so long without the API server, pods that wait are told of it."""

KINDS: Mapping[str, Resource] = {
    "rulesets": RULE_SETS,
    "stateslices": STATE_SLICES,
    "nodestates": NODE_STATES,
}
"""Directory of `objects/` -> kind."""


class _Noted(msgspec.Struct, frozen=True, omit_defaults=True):
    trigger: str | UnsetType = msgspec.field(name=TRIGGER_ANNOTATION, default=UNSET)


class _Meta(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    generation: int | UnsetType = UNSET
    annotations: _Noted | UnsetType = UNSET


class _Object(msgspec.Struct, frozen=True, rename="camel"):
    """What of an object is kept: status and bookkeeping would only make it look changed."""

    api_version: str
    kind: str
    metadata: _Meta
    spec: msgspec.Raw


class _Spec(msgspec.Struct, frozen=True, rename="camel"):
    rule_sets: list[str] = []


class _Named(msgspec.Struct, frozen=True):
    """As much of a NodeState as tells what it needs, of whatever format it is."""

    spec: _Spec


_decoder = msgspec.json.Decoder(_Object)
_named_decoder = msgspec.json.Decoder(_Named)
_rule_set_decoder = msgspec.json.Decoder(RuleSet)


def as_file(data: bytes) -> bytes:
    """An object of the API as `objects/` holds it. MsgspecError: it is none of ours."""
    found = _decoder.decode(data)
    if found.metadata.annotations == _Noted():
        meta = msgspec.structs.replace(found.metadata, annotations=UNSET)
        found = msgspec.structs.replace(found, metadata=meta)
    return encode(found)


class Mirror:
    """Owns the reflectors, a thread that writes files, and one that writes the status."""

    def __init__(self, client: Client, paths: NodePaths, node: str, logger: Any) -> None:
        self._client = client
        self._objects = paths.objects
        self._node = node
        self._log = logger
        self._wake = threading.Event()
        self._ended = False
        self.guard = threading.Lock()
        """Held while files are written: who reads under it sees whole states."""
        self._nodes = Reflector(
            client, NODE_STATES, as_file, self._wake.set, field_selector=f"metadata.name={node}"
        )
        self._slices = Reflector(client, STATE_SLICES, as_file, self._wake.set)
        self._verified: set[str] = set()
        """Names of rule sets whose files are known to be good."""
        self._written: dict[str, bytes] = {}
        self._put_last: Mapping[tuple[str, str], bytes] = {}
        """The shards that are all in their files."""
        self._changed: set[str] | None = None
        """Files written or removed since `changes` was asked; None: any may have been."""
        self._in_force: frozenset[str] | None = None
        self._collected: object = None
        self._awaited: dict[str, int] = {}
        """Kinds that have to be listed before anything moves: how often they were before."""
        self._backoff = Backoff(RETRY_FIRST, RETRY_LAST)
        self._told = ""
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._reporter = Reporter(client, node, logger)

    def start(self) -> None:
        for name in KINDS:
            (self._objects / name).mkdir(parents=True, exist_ok=True)
        for each in (self._nodes, self._slices, self._thread, self._reporter):
            each.start()

    def close(self) -> None:
        """End the threads, waiting a bounded time; files stay."""
        self._ended = True
        self._wake.set()
        self._reporter.close()
        for reflector in (self._nodes, self._slices):
            reflector.stop()
        self._thread.join(END_SECONDS)

    @property
    def alive(self) -> bool:
        """All of its threads run."""
        reflecting = self._nodes.health().alive and self._slices.health().alive
        return reflecting and self._thread.is_alive() and self._reporter.is_alive()

    def trouble(self) -> str:
        """What keeps news from coming, for people; "" when nothing does."""
        found = self._failing()
        return f"no news from the API server for {found[0]:.0f} s: {found[1]}" if found else ""

    def _failing(self) -> tuple[float, str] | None:
        """(seconds, why) of the kind that has been failing for long."""
        for reflector in (self._nodes, self._slices):
            health = reflector.health()
            if health.failing_since is not None:
                silent = time.monotonic() - health.failing_since
                if silent > UNREACHED_SECONDS:
                    return silent, health.error
        return None

    def changes(self) -> frozenset[str] | None:
        """Files, relative to `objects/`, written or removed since this was asked before; None:
        it was not, so all may be. To be asked under `guard`, and by one reader."""
        found, self._changed = self._changed, set()
        return None if found is None else frozenset(found)

    def _note(self, file: str) -> None:
        """Before it is written: what fails half-way may have changed it, too."""
        if self._changed is not None:
            self._changed.add(file)

    def realised(self, names: frozenset[str]) -> None:
        """The newest state is in force and consists of these files, relative to `objects/`."""
        if names != self._in_force:
            self._in_force = names
            self._wake.set()

    def report(self, status: NodeStateStatus) -> None:
        """The node's status as of now."""
        self._reporter.report(status)

    # -- the thread that writes files ---------------------------------------------------

    def _run(self) -> None:
        retry: float | None = None
        while True:
            woken = self._wake.wait(HEALTH_SECONDS)
            self._wake.clear()
            if self._ended:
                return
            if self._resync() or woken or (retry is not None and time.monotonic() >= retry):
                wait = self._pass()
                retry = time.monotonic() + wait if wait else None
            self._tell()

    def _pass(self) -> float:
        """0, or the seconds until it should be done again."""
        try:
            if self._nodes.synced and self._slices.synced and not self._awaited:
                self._write()
            self._collect()
        except KubeError as error:
            self._log.warning("a rule set could not be read", error=str(error))
            return self._backoff.failed(error.retry_after)
        except OSError as error:  # a full disk: what is in force stays
            self._log.warning("objects could not be written", error=str(error))
            return RETRY_LAST
        self._backoff.succeeded()
        return 0.0

    def _resync(self) -> bool:
        """Notes of which kind so little is known that it may not be put beside what is new of the
        other, as a number may mean something else by now: it has to be listed first. True: all
        that was awaited has come."""
        now, awaited = time.monotonic(), bool(self._awaited)
        for reflector in (self._nodes, self._slices):
            health, plural = reflector.health(), reflector.resource.plural
            since = health.failing_since
            if plural in self._awaited and health.lists > self._awaited[plural]:
                del self._awaited[plural]
            elif since is not None and now - since > RESYNC_SECONDS:
                reflector.relist()
                self._awaited.setdefault(plural, health.lists)
        return awaited and not self._awaited

    def _tell(self) -> None:
        """Log what goes wrong when it begins and when it ends."""
        failing = self._failing()
        said = [f"no news from the API server: {failing[1]}"] if failing else []
        for reflector in (self._nodes, self._slices):
            plural = reflector.resource.plural
            said += [f"{plural}/{name}: {why}" for (_, name), why in reflector.invalid.items()]
        told = "; ".join(sorted(said))
        if told != self._told:
            self._told = told
            self._log.warning(told or "the API server's objects are read again")

    def _write(self) -> None:
        """As publish does: what is named before what names it. KubeError: a rule set that is
        not here could not be read; everything else was written, for `source` to judge."""
        state = self._nodes.snapshot().get(("", self._node))
        snapshot = self._slices.snapshot()
        # What is the very object that it was needs no second look: of thousands one is new.
        slices = {key[1]: d for key, d in snapshot.items() if self._put_last.get(key) is not d}
        fetched, error = self._fetch(_rule_sets_of(state)) if state is not None else ({}, None)
        peers = {n: d for n, d in slices.items() if n.startswith("peers-")}
        with self.guard:
            for name, data in fetched.items():
                self._note(f"rulesets/{name}.json")
                write_atomic(self._objects / "rulesets" / f"{name}.json", data)
            for name, data in peers.items():
                self._put(f"stateslices/{name}", data)
            if state is not None:
                self._put(f"nodestates/{self._node}", state)
            for name, data in slices.items():
                self._put(f"stateslices/{name}", data)
            self._put_last = snapshot
        # Who was not there, or not reached, may be now.
        self._reporter.try_again()
        if error is not None:
            raise error

    def _fetch(self, names: list[str]) -> tuple[dict[str, bytes], KubeError | None]:
        """Those that are not here, or not good, and the first failure. A bad one is handed on,
        for `source` to say what is bad about it, and asked for again."""
        found: dict[str, bytes] = {}
        failed: KubeError | None = None
        for name in names:
            path = self._objects / "rulesets" / f"{name}.json"
            if name in self._verified or _is_good(_read(path), name):
                self._verified.add(name)
                continue
            try:
                data = self._client.get(RULE_SETS, name)
                found[name] = as_file(data)
                if not _is_good(found[name], name):
                    asked = f"get {RULE_SETS.plural}/{name}"
                    failed = failed or Invalid(asked, "the name is not its content's")
            except msgspec.MsgspecError as error:
                failed = failed or Invalid(f"get {RULE_SETS.plural}/{name}", str(error))
            except KubeError as error:
                failed = failed or error
                if not isinstance(error, NotFound):
                    break
        return found, failed

    def _put(self, relative: str, data: bytes) -> None:
        if self._written.get(relative) == data:
            return
        path = self._objects / f"{relative}.json"
        if relative in self._written or _read(path) != data:
            self._note(f"{relative}.json")
            write_atomic(path, data)
        self._written[relative] = data

    def _collect(self) -> None:
        """Remove files that neither the state in force nor the newest one names."""
        in_force = self._in_force
        state = self._nodes.snapshot().get(("", self._node))
        slices = self._slices.snapshot()
        seen = (in_force, state, slices.keys())
        if in_force is None or state is None or self._collected == seen:
            return
        kept = {f"rulesets/{name}.json" for name in _rule_sets_of(state)}
        kept |= {f"stateslices/{name}.json" for _, name in slices} | in_force
        with self.guard:
            for directory in ("rulesets", "stateslices"):
                for file in os.listdir(self._objects / directory):
                    if file.endswith(".json") and f"{directory}/{file}" not in kept:
                        self._note(f"{directory}/{file}")
                        (self._objects / directory / file).unlink(missing_ok=True)
                        self._written.pop(f"{directory}/{file.removesuffix('.json')}", None)
        self._verified &= {Path(path).stem for path in kept if path.startswith("rulesets/")}
        self._collected = seen


def _rule_sets_of(state: bytes) -> list[str]:
    try:
        return _named_decoder.decode(state).spec.rule_sets
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return []


def _is_good(data: bytes | None, name: str) -> bool:
    """Whether it is the rule set of that name. One of a later format cannot be checked here,
    and is not for this loader to use."""
    try:
        return data is not None and digest(_rule_set_decoder.decode(data).spec) == name
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Reporter(threading.Thread):
    """Writes the status: soon after it changed, and now and then though it did not. Each time
    says when it was, so that who does not hear of a node knows."""

    def __init__(self, client: Client, node: str, logger: Any) -> None:
        super().__init__(daemon=True, name="status")
        self._client = client
        self._node = node
        self._log = logger
        self._wake = threading.Event()
        self._ended = False
        self._again = False
        self._status: NodeStateStatus | None = None
        self._sent: NodeStateStatus | None = None
        self._backoff = Backoff(RETRY_FIRST, RETRY_LAST)
        self._failed = ""

    def report(self, status: NodeStateStatus) -> None:
        if status != self._status:
            self._status = status
            self._wake.set()

    def try_again(self) -> None:
        """There is news from the API server: do not sit out the pause after a failure."""
        self._again = True

    def close(self) -> None:
        self._ended = True
        self._wake.set()
        self.join(END_SECONDS)

    def run(self) -> None:
        """A change is sent at once, the next one a second later."""
        due: float | None = None
        while not self._ended:
            self._wake.wait(None if due is None else max(0.0, due - time.monotonic()))
            self._wake.clear()
            status = self._status
            overdue = due is not None and time.monotonic() >= due
            if self._ended or status is None or (status == self._sent and not overdue):
                continue
            self._again = False
            pause = self._send(status)
            self._rest(STATUS_SECONDS, pause)
            due = time.monotonic() + (0 if pause else REPEAT_SECONDS * random.uniform(1.0, 1.5))

    def _rest(self, least: float, most: float) -> None:
        """`least` seconds, and up to `most` unless there is news."""
        begun = time.monotonic()
        while not self._ended and (past := time.monotonic() - begun) < max(least, most):
            if past >= least and self._again:
                self._backoff.succeeded()
                return
            time.sleep(0.1)

    def _send(self, status: NodeStateStatus) -> float:
        """0, or the seconds until it may be tried again."""
        try:
            body = patch_of(msgspec.structs.replace(status, last_report_time=_now()))
            self._client.patch(NODE_STATES, self._node, body, subresource="status")
        except KubeError as error:
            if type(error).__name__ != self._failed:
                self._failed = type(error).__name__
                self._log.warning("the status could not be written", error=str(error))
            return self._backoff.failed(error.retry_after)
        self._sent, self._failed = status, ""
        self._backoff.succeeded()
        return 0.0


def patch_of(status: NodeStateStatus) -> bytes:
    """A merge patch that makes the object's status this one: null removes what is absent."""
    absent = {
        name: None
        for name, field in (("realised", status.realised),
                            ("peerSets", status.peer_sets),
                            ("observedGeneration", status.observed_generation))
        if field is UNSET
    }  # fmt: skip
    return encode({"status": msgspec.to_builtins(status) | absent})
