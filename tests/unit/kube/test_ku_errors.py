"""An answer is one error of the tree; delays; paths."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tidegate_kube import (
    AlreadyExists,
    Conflict,
    Forbidden,
    Gone,
    Invalid,
    KubeError,
    NotFound,
    ServerError,
    TooManyRequests,
    Unauthorized,
    resources,
)
from tidegate_kube.backoff import Backoff
from tidegate_kube.errors import MAX_RETRY_AFTER_SECONDS, from_answer, from_event


def _status(**more: Any) -> bytes:
    return json.dumps({"kind": "Status", "apiVersion": "v1", "status": "Failure", **more}).encode()


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (400, "BadRequest", Invalid),
        (401, "Unauthorized", Unauthorized),
        (403, "Forbidden", Forbidden),
        (404, "NotFound", NotFound),
        (405, "MethodNotAllowed", Invalid),
        (409, "Conflict", Conflict),
        (409, "AlreadyExists", AlreadyExists),
        (410, "Gone", Gone),
        (410, "Expired", Gone),
        (413, "RequestEntityTooLarge", Invalid),
        (415, "UnsupportedMediaType", Invalid),
        (422, "Invalid", Invalid),
        (429, "TooManyRequests", TooManyRequests),
        (500, "InternalError", ServerError),
        (503, "ServiceUnavailable", ServerError),
        (504, "Timeout", ServerError),
    ],
)
def test_types(code: int, reason: str, expected: type[KubeError]) -> None:
    error = from_answer("get pods/a", code, {}, _status(code=code, reason=reason, message="m"))
    assert type(error) is expected
    assert (error.code, error.reason, error.message) == (code, reason, "m")
    assert str(error) == f"get pods/a: {code} {reason}: m"
    watched = from_event("watch pods", _status(code=code, reason=reason, message="m"))
    assert type(watched) is expected


@pytest.mark.parametrize(
    "body",
    [b"", b"404 page not found\n", b"<html>", b"[]", b"{", b'"x"', b"\xff\xfe", b'{"kind":"Pod"}'],
)
def test_what_is_no_status_is_shown(body: bytes) -> None:
    error = from_answer("get x", 502, {}, body)
    assert type(error) is ServerError
    assert str(error).startswith("get x: 502: ")
    assert from_event("watch x", body).code == 500


def test_a_missing_kind_is_not_a_missing_object() -> None:
    details = {"name": "a", "kind": "pods"}
    rows = [
        (_status(reason="NotFound", details=details), False),
        (_status(reason="NotFound", details={}), True),
        (b"404 page not found\n", True),
    ]
    for body, expected in rows:
        error = from_answer("get x", 404, {}, body)
        assert isinstance(error, NotFound)
        assert error.kind_missing is expected


@pytest.mark.parametrize(
    ("header", "seconds", "expected"),
    [
        ("3", 0, 3.0),
        ("", 7, 7.0),
        ("2", 7, 2.0),
        ("", 0, None),
        ("soon", 4, 4.0),
        ("-1", 0, None),
        ("99999", 0, MAX_RETRY_AFTER_SECONDS),
        ("Wed, 25 Nov 2026 07:28:00 GMT", 0, None),
    ],
)
def test_retry_after(header: str, seconds: int, expected: float | None) -> None:
    body = _status(details={"retryAfterSeconds": seconds})
    headers = {"Retry-After": header} if header else {}
    assert from_answer("get x", 429, headers, body).retry_after == expected


def test_backoff() -> None:
    backoff = Backoff(first=1.0, longest=8.0)
    for whole in (1.0, 2.0, 4.0, 8.0, 8.0, 8.0):
        assert whole / 2 <= backoff.failed() <= whole
    assert 34.0 <= backoff.failed(at_least=30.0) <= 38.0
    backoff.succeeded()
    assert backoff.failed() <= 1.0
    backoff.failures = 10**6
    assert backoff.failed() <= 8.0


def test_paths() -> None:
    pods, nodes, states = resources.PODS, resources.NODES, resources.NODE_STATES
    rows = [
        (pods.path(), "/api/v1/pods"),
        (pods.path("a"), "/api/v1/namespaces/a/pods"),
        (pods.path("a", "b"), "/api/v1/namespaces/a/pods/b"),
        (pods.path("a", "b", "eviction"), "/api/v1/namespaces/a/pods/b/eviction"),
        (nodes.path(name="n"), "/api/v1/nodes/n"),
        (
            states.path(name="n/../x", subresource="status"),
            "/apis/tidegate.dev/v1alpha1/nodestates/n%2F..%2Fx/status",
        ),
    ]
    for path, expected in rows:
        assert path == expected
    with pytest.raises(ValueError, match="needs a namespace"):
        pods.path(name="b")
    with pytest.raises(ValueError, match="has no namespaces"):
        nodes.path("a")
    assert (pods.api_version, states.api_version) == ("v1", "tidegate.dev/v1alpha1")
