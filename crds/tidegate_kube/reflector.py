"""One kind of objects, held here as the API server holds it.

List, then watch from there; when the watch cannot be resumed, list again and *replace*: what
the new list does not name is gone, whether or not anybody saw it go. What the caller finds
is a mapping of decoded objects; that an object was added, changed or deleted is nothing to
act on, so only `changed()` is called. May not live here: what objects mean.

What is relied upon. Resource versions are compared for equality. Where both are decimal
numbers, as the API promises for what it serves itself, the smaller is the older; that is used
only to notice that a stream brings something twice, late or out of order, never to decide
which of two lists is right.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import msgspec

from tidegate_kube.backoff import Backoff
from tidegate_kube.client import PAGE_OBJECTS, Client, Watch, WatchEvent
from tidegate_kube.errors import (
    Forbidden,
    Gone,
    Invalid,
    KubeError,
    NotFound,
    ServerError,
    Unreachable,
    from_event,
)
from tidegate_kube.resources import Resource

REMEMBER_SECONDS = 60.0
"""How long a write of our own counts as newer than lists that do not know it. Only a server
that went back in time (restored from a backup) needs this limit."""
STEADY_SECONDS = 10.0
"""A watch that lived this long was a good one: the next failure is a first one."""
SERVER_ERRORS = 5
"""As many one after the other, and the position watched from is given up."""
SHORT_SECONDS = 1.0
"""A watch that ended sooner, without a message, was refused in effect."""
QUIET_WATCHES = 2
"""As many that were steady but without one message, not even a bookmark: the position may be
one that the server has not reached and is waiting for."""
STOP_SECONDS = 5.0

Key = tuple[str, str]
"""(namespace, name); "" for kinds without namespaces."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Pace:
    """Seconds, but for `page` (objects; 0: a list is one answer)."""

    watch: float = 300.0
    """A watch is asked for this long, up to half longer at random."""
    silence: float = 90.0
    """Without a byte for so long a watch is taken for dead and resumed: bookmarks come once
    a minute. Resuming costs one request, whether or not it was."""
    relist: float = 3600.0
    """Listed anew this often at the latest: heals what no protocol can notice."""
    first_delay: float = 0.2
    longest_delay: float = 15.0
    page: int = PAGE_OBJECTS


@dataclass(frozen=True)
class Health:
    """Times are of time.monotonic()."""

    synced: bool
    alive: bool
    """The thread runs. False after `stop`, or a fault in `changed`."""
    last_contact: float | None
    """When the server last sent anything: an event, a bookmark, a page."""
    failing_since: float | None
    """None: the last request succeeded, or is a watch in progress."""
    error: str
    """The last one, kept after it has passed."""
    lists: int
    """Complete ones."""
    restarts: int
    """Watches that ended otherwise than by their time."""


class _Meta(msgspec.Struct, frozen=True):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = msgspec.field(default="", name="resourceVersion")


class _Object(msgspec.Struct, frozen=True):
    metadata: _Meta


_head_decoder = msgspec.json.Decoder(_Object)
_ABSENT: Any = object()


@dataclass(frozen=True, slots=True)
class _Head:
    """Which object, and which state of it."""

    version: str
    uid: str


@dataclass(slots=True)
class _List(Generic[_T]):
    """A list while it is being read. A head without a value is of an object that never had
    a valid one."""

    values: dict[Key, _T] = field(default_factory=dict)
    heads: dict[Key, _Head] = field(default_factory=dict)
    invalid: dict[Key, str] = field(default_factory=dict)
    version: str = ""


class _OutOfOrder(Exception):
    """The stream brought what cannot follow what it had brought before."""


class Reflector(Generic[_T]):
    """One thread that lists and watches. All methods may be called from any thread.

    `decode` turns an object's JSON into a value; whatever it raises is about that object
    only, which keeps its last valid value and is named in `invalid`. A value equal to the
    one held is dropped, so decode no more than you use. `changed` is called, in the
    reflector's thread and without a lock, after snapshot(), synced or invalid changed.
    `optional`: a kind that the server does not serve has no objects, until it does; if it was
    served before, those that were held then stay."""

    def __init__(
        self,
        client: Client,
        resource: Resource,
        decode: Callable[[bytes], _T],
        changed: Callable[[], None],
        *,
        namespace: str = "",
        field_selector: str = "",
        label_selector: str = "",
        pace: Pace | None = None,
        optional: bool = False,
    ) -> None:
        self.resource = resource
        self._client = client
        self._decode = decode
        self._changed = changed
        self._namespace = namespace
        self._field_selector = field_selector
        self._label_selector = label_selector
        self._pace = pace or Pace()
        self._optional = optional
        self._backoff = Backoff(self._pace.first_delay, self._pace.longest_delay)
        self._thread = threading.Thread(
            target=self._run, name=f"reflect-{resource.plural}", daemon=True
        )
        self._stopping = threading.Event()
        # The thread's alone; others read what health() tells.
        self._position: str | None = None
        self._listed_at = 0.0
        self._quiet_watches = 0
        self._synced = False
        self._last_contact: float | None = None
        self._failing_since: float | None = None
        self._error = ""
        self._lists = 0
        self._restarts = 0
        # Under the lock.
        self._lock = threading.Lock()
        self._values: dict[Key, _T] = {}
        self._heads: dict[Key, _Head] = {}
        self._invalid: dict[Key, str] = {}
        self._remembered: dict[Key, float] = {}
        self._brought = ""
        self._taken: Mapping[Key, _T] | None = None
        self._watch: Watch | None = None

    # ---- for the caller ----

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, waiting a bounded time; what is held stays readable."""
        self._stopping.set()
        with self._lock:
            watch = self._watch
        if watch is not None:
            watch.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(STOP_SECONDS)

    @property
    def synced(self) -> bool:
        """A complete list has been read, and the kind has not been forbidden or gone since; or
        it is optional, and not served."""
        return self._synced

    @property
    def invalid(self) -> Mapping[Key, str]:
        """Objects that cannot be decoded, and why."""
        with self._lock:
            return dict(self._invalid)

    def snapshot(self) -> Mapping[Key, _T]:
        """What is held: never changes, and is the same mapping until something does.
        Costs nothing; the first change after it costs one shallow copy."""
        with self._lock:
            if self._taken is None:
                self._taken = MappingProxyType(self._values)
            return self._taken

    def remember(self, data: bytes) -> None:
        """The server's answer to a write of ours: held from now on, unless the watch has
        brought as much already. `changed` is not called. Ignored when versions cannot be
        compared: then the watch brings it, a moment later."""
        key, head = _head(data)
        with self._lock:
            held = self._heads.get(key)
            known = (self._brought, held.version if held is not None else "")
            if all(not version or _older(version, head.version) for version in known):
                self._take(key, head, data)
                self._remembered[key] = time.monotonic()

    def forget(self, namespace: str, name: str, uid: str) -> None:
        """A deletion of ours that the server has confirmed. `changed` is not called."""
        key = (namespace, name)
        with self._lock:
            held = self._heads.get(key)
            if held is not None and held.uid == uid:
                self._drop(key)

    def health(self) -> Health:
        return Health(
            synced=self._synced,
            alive=self._thread.is_alive(),
            last_contact=self._last_contact,
            failing_since=self._failing_since,
            error=self._error,
            lists=self._lists,
            restarts=self._restarts,
        )

    def relist(self) -> None:
        """Read everything anew before watching again; a watch in progress goes on."""
        self._listed_at = -math.inf

    # ---- the thread ----

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                if self._position is None or self._relist_due():
                    self._position = self._list()
                    self._listed_at = time.monotonic()
                self._follow(self._position)
            except KubeError as error:
                self._stopping.wait(self._failed(error))
            except _OutOfOrder as error:
                self._position = None
                cause = Unreachable(f"watch {self.resource.plural}", str(error))
                self._stopping.wait(self._failed(cause))

    def _relist_due(self) -> bool:
        return time.monotonic() - self._listed_at >= self._pace.relist

    def _failed(self, error: KubeError) -> float:
        """Notes it, decides whether the position is lost, says how long to wait."""
        delay = self._backoff.failed(error.retry_after)
        missing = isinstance(error, Forbidden | NotFound)
        worn = isinstance(error, ServerError) and self._backoff.failures % SERVER_ERRORS == 0
        if missing or worn or isinstance(error, Gone | Invalid):
            self._position = None
        self._error = str(error)
        if self._failing_since is None:
            self._failing_since = time.monotonic()
        # A server answers NotFound only once it knows all that it serves, Unavailable before.
        synced = self._synced and not missing
        if self._optional and isinstance(error, NotFound):
            synced = True
        if synced != self._synced:
            self._synced = synced
            self._changed()
        return delay

    def _contact(self) -> None:
        self._last_contact = time.monotonic()
        self._failing_since = None

    # ---- list ----

    def _list(self) -> str:
        """Replaces what is held; returns the position to watch from."""
        try:
            fresh = self._read_list(self._pace.page)
        except Gone:
            # Forgotten half-way: the objects change faster than we page. All at once, then.
            fresh = self._read_list(0)
        if self._replace(fresh):
            self._changed()
        return fresh.version

    def _read_list(self, limit: int) -> _List[_T]:
        fresh: _List[_T] = _List()
        for page in self._client.pages(
            self.resource,
            self._namespace,
            field_selector=self._field_selector,
            label_selector=self._label_selector,
            limit=limit,
        ):
            self._contact()
            for raw in page.items:
                self._read(bytes(raw), fresh)
            fresh.version = page.resource_version
        return fresh

    def _read(self, data: bytes, fresh: _List[_T]) -> None:
        key, head = _head(data)
        with self._lock:
            held = self._heads.get(key)
            if held == head:
                self._carry(key, fresh)
                return
            before = self._values.get(key, _ABSENT)
            same_object = held is not None and held.uid == head.uid
        fresh.heads[key] = head
        value, problem = self._decoded(data)
        if problem:
            fresh.invalid[key] = problem
            if same_object and before is not _ABSENT:
                fresh.values[key] = before
        else:
            fresh.values[key] = before if before is not _ABSENT and before == value else value

    def _carry(self, key: Key, fresh: _List[_T]) -> None:
        """Into `fresh` as it is held. Under the lock."""
        fresh.heads[key] = self._heads[key]
        if key in self._values:
            fresh.values[key] = self._values[key]
        if key in self._invalid:
            fresh.invalid[key] = self._invalid[key]

    def _replace(self, fresh: _List[_T]) -> bool:
        """Whether snapshot, invalid or synced changed."""
        with self._lock:
            self._outlast(fresh)
            same = _identical(self._values, fresh.values)
            changed = not (same and self._invalid == fresh.invalid and self._synced)
            if not same:
                self._values, self._taken = fresh.values, None
            self._heads, self._invalid = fresh.heads, fresh.invalid
            self._brought = fresh.version
        self._synced = True
        self._lists += 1
        return changed

    def _outlast(self, fresh: _List[_T]) -> None:
        """Our own writes that the list is too old to know stay. Under the lock."""
        now = time.monotonic()
        self._remembered = {
            key: when
            for key, when in self._remembered.items()
            if now - when < REMEMBER_SECONDS
            and key in self._heads
            and _older(fresh.version, self._heads[key].version)
        }
        for key in self._remembered:
            fresh.invalid.pop(key, None)
            self._carry(key, fresh)

    # ---- watch ----

    def _follow(self, position: str) -> None:
        """One watch, to its end. KubeError, _OutOfOrder: it ended badly."""
        begun, messages = time.monotonic(), 0
        watch = self._open(position)
        try:
            for event in watch:
                self._contact()
                self._event(event)
                messages += 1
        except (KubeError, _OutOfOrder):
            self._restarts += 1
            raise
        finally:
            with self._lock:
                self._watch = None
            watch.close()
            lived = time.monotonic() - begun
            self._judge(messages, lived)
        if not messages and lived < SHORT_SECONDS and not self._stopping.is_set():
            raise Unreachable(f"watch {self.resource.plural}", "ended as soon as it began")

    def _judge(self, messages: int, lived: float) -> None:
        """What a watch that has ended says about the next."""
        if messages or lived >= STEADY_SECONDS:
            self._backoff.succeeded()
        if messages:
            self._quiet_watches = 0
        elif lived >= STEADY_SECONDS:
            self._quiet_watches += 1
        if self._quiet_watches >= QUIET_WATCHES:
            self._position, self._quiet_watches = None, 0

    def _open(self, position: str) -> Watch:
        watch = self._client.watch(
            self.resource,
            position,
            self._namespace,
            field_selector=self._field_selector,
            label_selector=self._label_selector,
            seconds=self._pace.watch * random.uniform(1.0, 1.5),
            silence=self._pace.silence,
        )
        with self._lock:
            self._watch = watch
        if self._stopping.is_set():
            watch.close()
        self._contact()
        return watch

    def _event(self, event: WatchEvent) -> None:
        data = bytes(event.object)
        if event.type == "ERROR":
            raise from_event(f"watch {self.resource.plural}", data)
        key, head = _head(data)
        if event.type == "BOOKMARK":
            if _older(head.version, self._brought):
                raise _OutOfOrder("a bookmark went backwards")
            self._advance(head.version)
            return
        with self._lock:
            changed = self._apply(event.type, key, head, data)
        if changed:
            self._changed()

    def _apply(self, type: str, key: Key, head: _Head, data: bytes) -> bool:
        """Whether anything visible changed. Under the lock.

        _OutOfOrder: the event is older than one before it; what else came late, or never,
        cannot be known. One that is no newer than what is held says nothing: the last event
        once more, or one from before a write of our own."""
        if _older(head.version, self._brought):
            raise _OutOfOrder(f"{'/'.join(filter(None, key))} came late")
        self._advance(head.version)
        held = self._heads.get(key)
        if held is not None and _older(head.version, held.version):
            return False
        if type == "DELETED":
            return self._drop(key)
        if held == head:
            return False
        return self._take(key, head, data)

    def _advance(self, version: str) -> None:
        self._position = self._brought = version

    def _take(self, key: Key, head: _Head, data: bytes) -> bool:
        """Holds a newer state of an object; whether anything visible changed. Under the lock."""
        held = self._heads.get(key)
        self._heads[key] = head
        before = self._values.get(key, _ABSENT)
        value, problem = self._decoded(data)
        if not problem:
            changed = self._invalid.pop(key, None) is not None
            if before is _ABSENT or before != value:
                self._own()[key] = value
                return True
            return changed
        changed = self._invalid.get(key) != problem
        self._invalid[key] = problem
        if before is not _ABSENT and held is not None and held.uid != head.uid:
            # The last valid meaning was that of another object under the same name.
            del self._own()[key]
            return True
        return changed

    def _drop(self, key: Key) -> bool:
        """Under the lock."""
        self._heads.pop(key, None)
        self._remembered.pop(key, None)
        changed = self._invalid.pop(key, None) is not None
        if key in self._values:
            del self._own()[key]
            return True
        return changed

    def _own(self) -> dict[Key, _T]:
        """The values, to be changed: a copy if somebody holds them. Under the lock."""
        if self._taken is not None:
            self._values, self._taken = self._values.copy(), None
        return self._values

    def _decoded(self, data: bytes) -> tuple[_T, str]:
        """(value, "") or (nothing, what is wrong)."""
        try:
            return self._decode(data), ""
        except Exception as error:  # whatever it is, it is about this object only
            return _ABSENT, f"{error}" or type(error).__name__


def _head(data: bytes) -> tuple[Key, _Head]:
    try:
        meta = _head_decoder.decode(data).metadata
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Unreachable("read an object", f"not an object of the API: {error}") from error
    return (meta.namespace, meta.name), _Head(meta.resource_version, meta.uid)


def _older(one: str, other: str) -> bool:
    """Whether `one` is known to come before `other`: both are numbers, and it is smaller."""
    return one.isdecimal() and other.isdecimal() and int(one) < int(other)


def _identical(one: Mapping[Key, object], other: Mapping[Key, object]) -> bool:
    """The same keys with the very same values."""
    return len(one) == len(other) and all(
        other.get(key, _ABSENT) is value for key, value in one.items()
    )
