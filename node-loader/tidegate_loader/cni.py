"""The socket at which the CNI step says which pods come and go, and waits for their policy.

A thread of its own: a pod's start never waits for the loader's loop, and the loop never for a
pod's start. It writes `LocalInterface` files, which wake the loop, and answers from what the
loop last said is in force. May not live here: the kernel, and what a policy means.

One line of JSON each way, one question a connection:

    {"command": "ADD" | "CHECK", "interface": LocalInterface, "waitMs": n}   answered when in force
    {"command": "DEL", "uid": UID}                                            answered at once
    {"command": "ALIVE"}                                                      answered at once
    {"ok": true} | {"ok": false, "error": "why, for people"}
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from tidegate_api.state import Model, encode

from tidegate_loader.local import LocalInterface, write_atomic

MAX_LINE = 64 << 10
MAX_CONNECTIONS = 256
"""Pods that start at once; more wait in the socket's queue."""
MAX_WAIT_SECONDS = 100.0
ALIVE_SECONDS = 120.0
"""A loop that has not turned for so long is stuck; it turns every half minute without any work."""
HELLO_SECONDS = 5.0
"""A connection that has said nothing by then is closed."""
_UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


class Arrival(Model, frozen=True, tag_field="command", tag="ADD"):
    interface: LocalInterface
    wait_ms: int


class Check(Model, frozen=True, tag_field="command", tag="CHECK"):
    interface: LocalInterface
    wait_ms: int


class Departure(Model, frozen=True, tag_field="command", tag="DEL"):
    uid: str
    wait_ms: int = 0


class Alive(Model, frozen=True, tag_field="command", tag="ALIVE"):
    """The kubelet's probe: is the loop still turning?"""

    wait_ms: int = 0


class InForce(msgspec.Struct, frozen=True):
    """What the loop last saw; replaced whole, never changed."""

    endpoints: Mapping[str, int]
    """UID -> ifindex of the endpoints in the node table."""
    published: frozenset[str]
    """UIDs that the newest complete NodeState names."""
    message: str
    """What stands in the way of the node being ready, if anything does."""
    detached: bool = False
    """Nothing is enforced here, on purpose: no pod waits."""


class _Connection:
    """One question on its way."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.received = b""
        self.asked: Arrival | Check | None = None
        self.deadline = time.monotonic() + HELLO_SECONDS


class Server(threading.Thread):
    """Owns the socket. OSError when it cannot be bound."""

    def __init__(
        self,
        path: Path,
        interfaces: Path,
        poke: Callable[[], None],
        trouble: Callable[[], str] = str,
    ) -> None:
        """`interfaces`: the directory of LocalInterface files. `poke` wakes the loop.
        `trouble`: what keeps news from coming, "" when nothing does."""
        super().__init__(daemon=True, name="cni")
        self._path = path
        self._interfaces = interfaces
        self._poke = poke
        self._trouble = trouble
        self._lock = threading.Lock()
        """Over interface files and `_left`: no file is removed while its successor is written."""
        self._left: set[str] = set()
        self._in_force = InForce({}, frozenset(), "the loader has only just started")
        self._turned = time.monotonic()
        self._decoder = msgspec.json.Decoder(Arrival | Check | Departure | Alive)
        self._listener = _listen(path)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._connections: dict[socket.socket, _Connection] = {}
        self._listening = False
        self._ended = False

    # -- the loop's side ---------------------------------------------------------------

    def tell(self, in_force: InForce) -> None:
        """What is in force now; pods that waited for it are answered."""
        if in_force != self._in_force:
            self._in_force = in_force
            self._wake()

    def turned(self) -> None:
        """The loop is alive."""
        self._turned = time.monotonic()

    def left(self) -> frozenset[str]:
        """UIDs of pods that are being taken down: nobody needs their interface files."""
        with self._lock:
            return frozenset(self._left)

    def forget(self, interface: LocalInterface) -> None:
        """Remove the file of an interface that is gone, unless it is another's by now."""
        path = self._interfaces / f"{interface.uid}.json"
        with self._lock:
            with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError):
                held = msgspec.json.decode(path.read_bytes(), type=LocalInterface)
                if held.ifindex != interface.ifindex or held.ifname != interface.ifname:
                    return
                path.unlink()
            self._left.discard(interface.uid)

    def keep_left(self, uids: frozenset[str]) -> None:
        """Those of `left` that still have a file; others have nothing to be forgotten."""
        with self._lock:
            self._left &= uids

    def close(self) -> None:
        """End the thread and remove the socket. Pods that wait are cut off and ask again."""
        self._ended = True
        self._wake()
        self.join()
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._path.unlink(missing_ok=True)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"\0")

    # -- the thread's side ---------------------------------------------------------------

    def run(self) -> None:
        while not self._ended:
            self._accept_or_not()
            for key, _ in self._selector.select(self._patience()):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fd == self._wake_read:
                    os.read(self._wake_read, 4096)
                else:
                    self._read(self._connections[key.fileobj])  # type: ignore[index]
            self._answer_all()
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._listener.close()
        self._selector.close()

    def _accept_or_not(self) -> None:
        room = len(self._connections) < MAX_CONNECTIONS
        if room and not self._listening:
            self._selector.register(self._listener, selectors.EVENT_READ)
        elif self._listening and not room:
            self._selector.unregister(self._listener)
        self._listening = room

    def _patience(self) -> float | None:
        due = min((c.deadline for c in self._connections.values()), default=None)
        return None if due is None else max(0.0, due - time.monotonic())

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            made, _ = self._listener.accept()
            made.setblocking(False)
            self._connections[made] = _Connection(made)
            self._selector.register(made, selectors.EVENT_READ)

    def _drop(self, connection: _Connection) -> None:
        self._connections.pop(connection.socket, None)
        self._selector.unregister(connection.socket)
        connection.socket.close()

    def _read(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(MAX_LINE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or connection.asked is not None:
            self._drop(connection)  # gone, or it does not keep to one question
            return
        connection.received += data
        line, end, _ = connection.received.partition(b"\n")
        if end:
            self._take(connection, line)
        elif len(connection.received) > MAX_LINE:
            self._answer(connection, f"the question is longer than {MAX_LINE} bytes")

    def _take(self, connection: _Connection, line: bytes) -> None:
        try:
            asked = self._decoder.decode(line)
            if isinstance(asked, Alive):
                self._answer(connection, self._stuck())
                return
            if isinstance(asked, Departure):
                self._departure(_checked_uid(asked.uid))
                self._answer(connection)
                return
            if isinstance(asked, Arrival):
                self._arrival(_checked(asked.interface))
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
            self._answer(connection, f"the loader does not understand the CNI step: {error}")
        except OSError as error:
            self._answer(connection, f"the loader cannot keep the pod's interface: {error}")
        else:
            connection.asked = asked
            wait = min(max(0.0, asked.wait_ms / 1000), MAX_WAIT_SECONDS)
            connection.deadline = time.monotonic() + wait

    def _arrival(self, interface: LocalInterface) -> None:
        with self._lock:
            write_atomic(self._interfaces / f"{interface.uid}.json", encode(interface))
            self._left.discard(interface.uid)

    def _stuck(self) -> str:
        quiet = time.monotonic() - self._turned
        return (
            f"the loader's loop has been stuck for {quiet:.0f} s" if quiet > ALIVE_SECONDS else ""
        )

    def _departure(self, uid: str) -> None:
        with self._lock:
            self._left.add(uid)
        self._poke()

    def _answer_all(self) -> None:
        now, in_force = time.monotonic(), self._in_force
        for connection in list(self._connections.values()):
            asked = connection.asked
            if asked is None:
                if now >= connection.deadline:
                    self._drop(connection)
            elif in_force.detached or _is_in_force(asked.interface, in_force):
                self._answer(connection)
            elif now >= connection.deadline:
                self._answer(connection, self._why_not(asked.interface, in_force))

    def _why_not(self, interface: LocalInterface, in_force: InForce) -> str:
        if interface.uid in in_force.published:
            why = "its policy is not in force on this node yet"
        else:
            why = f"the operator has not published this pod (UID {interface.uid}) yet"
        return "; ".join(filter(None, (why, in_force.message, self._trouble())))

    def _answer(self, connection: _Connection, error: str = "") -> None:
        said: dict[str, Any] = {"ok": False, "error": error} if error else {"ok": True}
        with contextlib.suppress(OSError):  # it went away; the line is shorter than any buffer
            connection.socket.send(encode(said) + b"\n")
        self._drop(connection)


def _is_in_force(interface: LocalInterface, in_force: InForce) -> bool:
    return in_force.endpoints.get(interface.uid) == interface.ifindex


def _checked(interface: LocalInterface) -> LocalInterface:
    """With addresses in canonical form. ValueError: what would not be understood when read."""
    _checked_uid(interface.uid)
    for mac in (interface.pod_mac, interface.host_mac):
        if not _MAC.fullmatch(mac):
            raise ValueError(f"{mac!r} is no MAC address")
    addresses = sorted(str(ipaddress.ip_address(a)) for a in interface.addresses)
    return msgspec.structs.replace(interface, addresses=addresses)


def _checked_uid(uid: str) -> str:
    if not _UID.fullmatch(uid):
        raise ValueError(f"{uid!r} is no pod UID")
    return uid


def _listen(path: Path) -> socket.socket:
    """For root alone. A socket that a killed loader left behind is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(temporary))
        os.chmod(temporary, 0o600)
        listener.listen(MAX_CONNECTIONS)
        os.replace(temporary, path)
    except BaseException:
        listener.close()
        raise
    listener.setblocking(False)
    return listener
