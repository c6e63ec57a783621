"""JSON lines on standard error. No decisions, no files."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


def logger(node: str, level: str) -> Any:
    """A structlog logger bound to the node's name."""
    return structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        node=node,
    )
