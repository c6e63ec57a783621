"""What an API server answers when it does not do what was asked.

    KubeError                  `.code` (HTTP, 0 if none came), `.reason`, `.message`, `.retry_after`
    ├── Unreachable            no answer, or half of one: refused, timed out, cut, TLS, not HTTP
    ├── Unauthorized           401: the token or certificate is not (or no longer) taken
    ├── Forbidden              403: RBAC or admission says no
    ├── NotFound               404; `.kind_missing`: the server does not serve the kind at all
    ├── Conflict               409: another `resourceVersion`, or a precondition that does not hold
    ├── AlreadyExists          409 to a create
    ├── Gone                   410: that far back the server does not remember
    ├── TooManyRequests        429: come back after `.retry_after` seconds
    ├── Invalid                any other 4xx: will be refused however often it is sent
    └── ServerError            5xx, time-outs that the server reports among them

A failed request says what was asked, as "update nodestates/n1", before what was answered.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

MAX_RETRY_AFTER_SECONDS = 120.0
"""A server, or what stands before it, may not put a client to sleep for longer."""
_SHOWN_BYTES = 200
"""How much is shown of an answer that is no Status."""


class KubeError(Exception):
    """`code` 0: there was no answer. `reason` is a metav1.StatusReason or ""."""

    def __init__(
        self,
        asked: str,
        message: str,
        *,
        code: int = 0,
        reason: str = "",
        retry_after: float | None = None,
    ) -> None:
        said = " ".join(part for part in (str(code or ""), reason) if part)
        super().__init__(f"{asked}: {said}: {message}" if said else f"{asked}: {message}")
        self.asked = asked
        self.message = message
        self.code = code
        self.reason = reason
        self.retry_after = retry_after


class Unreachable(KubeError):
    """No whole answer. A write that ends so may or may not have happened."""


class Unauthorized(KubeError):
    """401."""


class Forbidden(KubeError):
    """403."""


class NotFound(KubeError):
    """404. `kind_missing`: not the object but its kind (a CRD that is not installed)."""

    kind_missing = False


class Conflict(KubeError):
    """409: the object is not at the resourceVersion, or not the UID, that was sent."""


class AlreadyExists(KubeError):
    """409 to a create: the name is taken."""


class Gone(KubeError):
    """410: the resourceVersion or continue token is older than the server's memory."""


class TooManyRequests(KubeError):
    """429. `retry_after`: seconds, None when the server did not say."""


class Invalid(KubeError):
    """400, 405, 413, 415, 422, ...: the request itself is wrong."""


class ServerError(KubeError):
    """5xx."""


class _Details(msgspec.Struct):
    name: str = ""
    kind: str = ""
    retry_after_seconds: int = msgspec.field(default=0, name="retryAfterSeconds")


class _Status(msgspec.Struct):
    """metav1.Status, as far as it is used."""

    kind: str = ""
    status: str = ""
    reason: str = ""
    message: str = ""
    code: int = 0
    details: _Details | None = None


_decoder = msgspec.json.Decoder(_Status)

_BY_CODE: dict[int, type[KubeError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    429: TooManyRequests,
}


def from_answer(asked: str, code: int, headers: Mapping[str, str], body: bytes) -> KubeError:
    """The error that an HTTP answer is. Never raises: what is no Status is shown as text."""
    status = _status(body)
    message = status.message or body[:_SHOWN_BYTES].decode("utf-8", "replace").strip()
    kind = _kind(code, status.reason)
    error = kind(
        asked,
        message or "no message",
        code=code,
        reason=status.reason,
        retry_after=_retry_after(headers, status),
    )
    if isinstance(error, NotFound):
        # For a missing object the details name it; for a kind that is not served there is
        # no Status at all, or one whose details have neither name nor kind.
        details = status.details
        error.kind_missing = details is None or not (details.name or details.kind)
    return error


def from_event(asked: str, body: bytes) -> KubeError:
    """The error that the Status of an ERROR event is."""
    return from_answer(asked, _status(body).code or 500, {}, body)


def _status(body: bytes) -> _Status:
    try:
        status = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _Status()
    # The Status of a time-out names no kind.
    return status if status.kind == "Status" or status.status == "Failure" else _Status()


def _kind(code: int, reason: str) -> type[KubeError]:
    if reason == "AlreadyExists":
        return AlreadyExists
    if reason == "Expired":
        return Gone
    known = _BY_CODE.get(code)
    if known is not None:
        return known
    return Invalid if 400 <= code < 500 else ServerError


def _retry_after(headers: Mapping[str, str], status: _Status) -> float | None:
    """Seconds. The header may be a date: then, and if it is nonsense, the Status decides."""
    given = headers.get("Retry-After", "")
    seconds = float(given) if given.isascii() and given.isdigit() else 0.0
    if not seconds and status.details is not None:
        seconds = float(status.details.retry_after_seconds)
    return min(seconds, MAX_RETRY_AFTER_SECONDS) if seconds > 0 else None
