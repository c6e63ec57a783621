"""Talking to an API server: access, requests, one reflector (list and watch with Replace).

Slim enough for the loader, so no pydantic, no kopf and no `kubernetes` here; and what the
objects mean is not known here either: bytes in, bytes out, and a `decode` of the caller's.
Nothing here logs: errors are raised, and what a thread met is in `Reflector.health()`.
"""

from tidegate_kube.access import Access, AccessError, in_cluster
from tidegate_kube.client import Client, Page, Watch, WatchEvent
from tidegate_kube.errors import (
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
    Unreachable,
)
from tidegate_kube.reflector import Health, Pace, Reflector
from tidegate_kube.resources import Resource

__all__ = [
    "Access",
    "AccessError",
    "AlreadyExists",
    "Client",
    "Conflict",
    "Forbidden",
    "Gone",
    "Health",
    "Invalid",
    "KubeError",
    "NotFound",
    "Pace",
    "Page",
    "Reflector",
    "Resource",
    "ServerError",
    "TooManyRequests",
    "Unauthorized",
    "Unreachable",
    "Watch",
    "WatchEvent",
    "in_cluster",
]
