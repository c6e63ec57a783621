"""What every machine-written type is made of: the base class, and texts and numbers with
their bounds. `state` says what the rules are."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Protocol = Literal["TCP", "UDP", "SCTP"]

IDENTITY_BITS = 24
MAX_NAME = 253

# Bounds are for what comes from outside: a decoder checks them, a constructor does not.
Text = Annotated[str, msgspec.Meta(max_length=1024)]
Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME)]
Address = Annotated[str, msgspec.Meta(max_length=39)]
Network = Annotated[str, msgspec.Meta(max_length=43)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << IDENTITY_BITS) - 1)]
"""Of an identity."""
MAX_COUNT = (1 << 53) - 1
"""As far as every reader of JSON counts exactly."""

Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
Shards = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
Time = Annotated[str, msgspec.Meta(max_length=40)]
"""RFC 3339, UTC."""


class Model(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    rename="camel",
):
    """Base of every machine-written type. Unknown fields are an error: an
    object we do not understand never moves the node (DESIGN invariant 4)."""
