"""The fixtures of `support.operator_town`, for the tests of this directory."""

from support.operator_town import server, town

__all__ = ["server", "town"]
