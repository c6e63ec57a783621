"""Requests to one API server: bytes in, bytes out, typed errors, connections kept and shared.

It repeats nothing by itself, but for two harmless cases: a read whose kept connection turned
out to be dead, and any request whose token had been replaced on disk since it was read. When
to try again, and whether, is the caller's to know.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import msgspec
import urllib3
from urllib3.connection import HTTPConnection
from urllib3.util import parse_url

from tidegate_kube.access import Access, AccessError, Stamp
from tidegate_kube.errors import Unauthorized, Unreachable, from_answer
from tidegate_kube.resources import Resource

REQUEST_SECONDS = 20.0
"""Between two bytes of an answer, and the server's own limit for making it."""
CONNECT_SECONDS = 5.0
POOL_CONNECTIONS = 16
"""Kept open. More at once are made, and closed after use."""
PAGE_OBJECTS = 500
LINE_BYTES = 16 << 20
"""No event is longer: etcd's objects are 1.5 MiB, a few times that as JSON."""

# A dead peer is noticed in half a minute, idle or not.
_SOCKET_OPTIONS = [
    *HTTPConnection.default_socket_options,
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
]

_Pool = urllib3.HTTPConnectionPool
_Response = urllib3.response.BaseHTTPResponse


class _ListMeta(msgspec.Struct, frozen=True):
    resource_version: str = msgspec.field(default="", name="resourceVersion")
    continue_: str = msgspec.field(default="", name="continue")


class _List(msgspec.Struct, frozen=True):
    metadata: _ListMeta
    items: list[msgspec.Raw] | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list. `resource_version` is the whole list's: where to watch from."""

    items: list[msgspec.Raw]
    resource_version: str
    last: bool


class WatchEvent(msgspec.Struct, frozen=True):
    """`type` is ADDED, MODIFIED, DELETED, BOOKMARK or ERROR (`object` is a Status)."""

    type: str
    object: msgspec.Raw


_list_decoder = msgspec.json.Decoder(_List)
_event_decoder = msgspec.json.Decoder(WatchEvent)
_object_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Client:
    """Thread-safe. Every method raises KubeError.

    `timeout` of a call bounds each wait of it (connecting, a silence of the server) and is
    sent to the server as its limit; AccessError is reported as Unreachable, as the file may
    come back."""

    def __init__(
        self, access: Access, user_agent: str = "tidegate", timeout: float = REQUEST_SECONDS
    ) -> None:
        url = parse_url(access.server)
        if url.scheme not in ("http", "https") or not url.host or (url.path or "/") != "/":
            raise AccessError(f"{access.server!r} is not the address of an API server")
        self._access = access
        self._https = url.scheme == "https"
        self._host = url.host.strip("[]")
        self._port = url.port or (443 if self._https else 80)
        self._timeout = timeout
        self._headers = {"User-Agent": user_agent, "Accept": "application/json"}
        self._lock = threading.Lock()
        self._pool: _Pool | None = None
        self._stamps: tuple[Stamp, ...] = ()

    @property
    def access(self) -> Access:
        return self._access

    def close(self) -> None:
        """Closes what is idle; calls after it open anew."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    # ---- one object ----

    def get(
        self, resource: Resource, name: str, namespace: str = "", *, timeout: float | None = None
    ) -> bytes:
        return self._call("GET", resource, namespace, name, timeout=timeout)

    def create(
        self,
        resource: Resource,
        body: bytes,
        namespace: str = "",
        *,
        name: str = "",
        subresource: str = "",
        timeout: float | None = None,
    ) -> bytes:
        """With `name` and `subresource` it posts there, as for a token or an eviction."""
        return self._call(
            "POST", resource, namespace, name, subresource, body=body, timeout=timeout
        )

    def update(
        self,
        resource: Resource,
        name: str,
        body: bytes,
        namespace: str = "",
        subresource: str = "",
        *,
        timeout: float | None = None,
    ) -> bytes:
        """Send metadata.resourceVersion with it: without, the last writer wins."""
        return self._call("PUT", resource, namespace, name, subresource, body=body, timeout=timeout)

    def patch(
        self,
        resource: Resource,
        name: str,
        body: bytes,
        namespace: str = "",
        subresource: str = "",
        *,
        kind: str = "merge",
        field_manager: str = "",
        force: bool = False,
        timeout: float | None = None,
    ) -> bytes:
        """`kind`: merge, json, strategic, or apply (server-side; JSON is YAML enough)."""
        media = {
            "merge": "application/merge-patch+json",
            "json": "application/json-patch+json",
            "strategic": "application/strategic-merge-patch+json",
            "apply": "application/apply-patch+yaml",
        }[kind]
        query = {"fieldManager": field_manager, "force": "true" if force else ""}
        return self._call(
            "PATCH",
            resource,
            namespace,
            name,
            subresource,
            body=body,
            media=media,
            query=query,
            timeout=timeout,
        )

    def delete(
        self,
        resource: Resource,
        name: str,
        namespace: str = "",
        *,
        uid: str | None = None,
        resource_version: str | None = None,
        grace: int | None = None,
        timeout: float | None = None,
    ) -> bytes:
        """Conflict if the object is not (any more) the one named by `uid` or version.
        `grace`: seconds, where not the object's own; a pod is deleted at once with 0."""
        conditions = {"uid": uid, "resourceVersion": resource_version}
        given = {key: value for key, value in conditions.items() if value is not None}
        options: dict[str, Any] = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "propagationPolicy": "Background",
        }
        if given:
            options["preconditions"] = given
        if grace is not None:
            options["gracePeriodSeconds"] = grace
        body = msgspec.json.encode(options)
        return self._call("DELETE", resource, namespace, name, body=body, timeout=timeout)

    def raw(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> bytes:
        """A path that is no object: /version, /readyz, /apis, /openapi/v3."""
        asked = f"{method} {path}"
        return _whole(self._send(method, path, asked, query=query, timeout=timeout), asked)

    # ---- many objects ----

    def pages(
        self,
        resource: Resource,
        namespace: str = "",
        *,
        field_selector: str = "",
        label_selector: str = "",
        limit: int = PAGE_OBJECTS,
        timeout: float | None = None,
    ) -> Iterator[Page]:
        """One consistent list, newest state, `limit` objects at a time (0: all at once).
        Gone while iterating: the server forgot the list half-way; begin again."""
        asked = f"list {resource.plural}"
        token = ""
        while True:
            query = {
                "fieldSelector": field_selector,
                "labelSelector": label_selector,
                "limit": str(limit or ""),
                "continue": token,
            }
            path = resource.path(namespace)
            answer = self._send("GET", path, asked, query=query, timeout=timeout)
            try:
                found = _list_decoder.decode(_whole(answer, asked))
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise Unreachable(asked, f"the answer is no list: {error}") from error
            token = found.metadata.continue_
            yield Page(found.items or [], found.metadata.resource_version, not token)
            if not token:
                return

    def watch(
        self,
        resource: Resource,
        resource_version: str,
        namespace: str = "",
        *,
        field_selector: str = "",
        label_selector: str = "",
        seconds: float,
        silence: float,
    ) -> Watch:
        """What happens after `resource_version`, for `seconds` at most. `silence`: seconds
        without a byte (bookmarks come once a minute) after which the watch counts as dead."""
        asked = f"watch {resource.plural}"
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(max(1, round(seconds))),
            "fieldSelector": field_selector,
            "labelSelector": label_selector,
        }
        answer = self._send(
            "GET", resource.path(namespace), asked, query=query, read=silence, timeout=None
        )
        return Watch(answer, asked)

    # ---- the wire ----

    def _call(
        self,
        method: str,
        resource: Resource,
        namespace: str,
        name: str,
        subresource: str = "",
        **how: Any,
    ) -> bytes:
        what = "/".join(part for part in (resource.plural, namespace, name, subresource) if part)
        asked = f"{_VERBS[method]} {what}"
        path = resource.path(namespace, name, subresource)
        body = _whole(self._send(method, path, asked, **how), asked)
        try:
            _object_decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            # What stands between may answer with a page of its own. Whether a write was done is
            # as open as if nothing had come.
            raise Unreachable(asked, f"not an object of the API: {error}") from error
        return body

    def _send(
        self,
        method: str,
        path: str,
        asked: str,
        *,
        query: Mapping[str, str] | None = None,
        body: bytes | None = None,
        media: str = "application/json",
        timeout: float | None = None,
        read: float | None = None,
    ) -> _Response:
        """The answer, its body unread. Not-2xx raises. `read`: of a watch, which has no
        limit of its own on the server but the one in its query."""
        wait = self._timeout if timeout is None else timeout
        given = {key: value for key, value in (query or {}).items() if value}
        if read is None:
            given["timeout"] = f"{max(wait, 0.001):.3f}s"
        target = f"{path}?{urlencode(given)}" if given else path
        limits = urllib3.Timeout(connect=min(CONNECT_SECONDS, wait), read=read or wait)
        headers = dict(self._headers)
        if body is not None:
            headers["Content-Type"] = media
        attempt = functools.partial(self._once, method, target, asked, body, limits)
        identity = self._authorization(asked)
        try:
            return attempt(headers | identity)
        except Unauthorized:
            # Rotated between our reading the file and the server's reading the header?
            again = self._authorization(asked)
            if again == identity:
                raise
            return attempt(headers | again)

    def _once(
        self,
        method: str,
        target: str,
        asked: str,
        body: bytes | None,
        limits: urllib3.Timeout,
        headers: dict[str, str],
    ) -> _Response:
        request = functools.partial(
            self._connections(asked).urlopen,
            method,
            target,
            body=body,
            headers=headers,
            timeout=limits,
            retries=False,
            redirect=False,
            preload_content=False,
            decode_content=False,
        )
        try:
            try:
                answer = request()
            except urllib3.exceptions.ProtocolError:
                # The server may have closed a kept connection as we took it. A write is not
                # repeated: it may have been done.
                if method != "GET":
                    raise
                answer = request()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Unreachable(asked, _cause(error)) from error
        if 200 <= answer.status < 300:
            return answer
        raise from_answer(asked, answer.status, answer.headers, _whole(answer, asked))

    def _authorization(self, asked: str) -> dict[str, str]:
        try:
            value = self._access.authorization()
        except (AccessError, UnicodeDecodeError) as error:
            raise Unreachable(asked, str(error)) from error
        return {"Authorization": value} if value else {}

    def _connections(self, asked: str) -> _Pool:
        """The pool; a new one when the CA or certificate has changed on disk."""
        with self._lock:
            if self._pool is not None and self._access.stamps() == self._stamps:
                return self._pool
            stamps = self._access.stamps()
            try:
                fresh = self._make_pool()
            except AccessError as error:
                # Half-way through a rotation: what worked goes on until it does not.
                if self._pool is None:
                    raise Unreachable(asked, str(error)) from error
                return self._pool
            before, self._pool, self._stamps = self._pool, fresh, stamps
        if before is not None:
            before.close()
        return fresh

    def _make_pool(self) -> _Pool:
        common: dict[str, Any] = {
            "host": self._host,
            "port": self._port,
            "maxsize": POOL_CONNECTIONS,
            "block": False,
            "socket_options": _SOCKET_OPTIONS,
        }
        if not self._https:
            return urllib3.HTTPConnectionPool(**common)
        if self._access.server_name:
            common["server_hostname"] = common["assert_hostname"] = self._access.server_name
        if not self._access.verify:
            common["cert_reqs"], common["assert_hostname"] = "CERT_NONE", False
        return urllib3.HTTPSConnectionPool(ssl_context=self._access.tls(), **common)


class Watch:
    """The events of one watch, until the server ends it. Iterate in one thread; `close` may
    come from another and ends the iteration."""

    def __init__(self, answer: _Response, asked: str) -> None:
        self._answer = answer
        self._asked = asked
        self._closed = False

    def __iter__(self) -> Iterator[WatchEvent]:
        """Unreachable: cut, silent for too long, or not what a watch sends."""
        rest = b""
        try:
            for chunk in self._answer.read_chunked():
                *lines, rest = (rest + chunk).split(b"\n") if rest else chunk.split(b"\n")
                if len(rest) > LINE_BYTES:
                    raise Unreachable(self._asked, f"an event longer than {LINE_BYTES} bytes")
                for line in lines:
                    if line.strip():
                        yield _event_decoder.decode(line)
            if rest.strip():
                raise Unreachable(self._asked, "the last event was cut")
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Unreachable(self._asked, f"not an event: {error}") from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            if not self._closed:
                raise Unreachable(self._asked, _cause(error)) from error
        finally:
            self._answer.close()

    def close(self) -> None:
        self._closed = True
        # Not `close`: a thread that waits for bytes would not be woken. Errors: it has ended.
        with contextlib.suppress(ValueError, RuntimeError, OSError):
            self._answer.shutdown()


_VERBS = {
    "GET": "get",
    "POST": "create",
    "PUT": "update",
    "PATCH": "patch",
    "DELETE": "delete",
}


def _whole(answer: _Response, asked: str) -> bytes:
    try:
        body = answer.read()
    except (urllib3.exceptions.HTTPError, OSError) as error:
        answer.close()
        raise Unreachable(asked, _cause(error)) from error
    answer.release_conn()
    return body


def _cause(error: BaseException) -> str:
    """The reason in words, without the object's address that urllib3 puts before it."""
    if isinstance(error, urllib3.exceptions.ReadTimeoutError):
        return "timed out waiting for the answer"
    if type(error) is urllib3.exceptions.ConnectTimeoutError:
        return "timed out connecting"
    text = str(error)
    return text.split(">: ", 1)[-1] if ">: " in text else text
