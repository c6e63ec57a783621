"""JSON lines on standard error. No decisions, no files."""

from __future__ import annotations

import sys
from typing import Any

_LEVELS = {"debug": 10, "info": 20, "warning": 30}
"""As in the standard library's logging, which structlog imports, and with it only."""


def logger(node: str, level: str) -> Any:
    """A structlog logger bound to the node's name, made when its first line is written."""
    return _Lazy(node, _LEVELS[level])


class _Lazy:
    """Importing structlog costs as much as starting all the rest: the state comes first."""

    def __init__(self, node: str, level: int) -> None:
        self._node = node
        self._level = level
        self._made: Any = None

    def _log(self, method: str, event: str, fields: dict[str, Any]) -> None:
        if _LEVELS[method] < self._level:
            return
        if self._made is None:
            self._made = _structlog(self._node)
        getattr(self._made, method)(event, **fields)

    def info(self, event: str, **fields: Any) -> None:
        self._log("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._log("warning", event, fields)


def _structlog(node: str) -> Any:
    # Optional to structlog, and half of its memory: only for lines that people read.
    missing = object()
    rich = sys.modules.get("rich", missing)
    sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        import structlog  # noqa: PLC0415
    finally:
        if rich is missing:
            del sys.modules["rich"]
        else:
            sys.modules["rich"] = rich  # type: ignore[assignment]
    return structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(0),
        node=node,
    )
