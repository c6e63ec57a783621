"""Expressions of CEL (https://github.com/google/cel-spec) over the message that tells a flow.

As Hubble declares them: `_flow` is a `flow.Flow`, names are looked up in the package `flow`
(`Verdict.DROPPED`), the result is a bool, and types are checked before anything is evaluated.
Importing this takes the library into memory (4 MiB); `filters` does when a filter needs it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

from cel_expr_python import cel
from google.protobuf import descriptor_pool

from tidegate_observer.api import flow_pb2

MAX_BYTES = 4096
"""Of one expression."""
MAX_MACROS = 8
MAX_SPREAD = 16
"""`+` and `,` of an expression with two macros or more, beyond the comma of each. A macro names a
value that its body may join to itself or list, so each can multiply what the next one works on:
without a limit a line of text makes gigabytes. That macros repeat 10,000 times at most, in all, is
the library's own limit."""
MAX_SECONDS = 0.05
"""CPU time of one evaluation: one that needs more holds up everything else in the process."""

_MACRO = re.compile(r"\b(?:all|exists|exists_one|existsOne|map|filter|bind)\b(?=\s*(?:\(|//))")


class ExpressionError(ValueError):
    """It cannot be compiled, or might cost too much; the text says which and why."""


class CostlyError(Exception):
    """An evaluation took longer than `MAX_SECONDS`."""


def build(texts: Sequence[str]) -> Callable[[flow_pb2.Flow], bool]:
    """True where one of them is. An evaluation that fails (a division by zero) is no match.
    ExpressionError; what is returned: CostlyError."""
    environment = cel.NewEnv(
        descriptor_pool.Default(),
        variables={"_flow": cel.Type(flow_pb2.Flow.DESCRIPTOR.full_name)},
        container=flow_pb2.DESCRIPTOR.package,
    )
    compiled = [_compile(environment, text) for text in texts]

    def test(message: flow_pb2.Flow) -> bool:
        values = {"_flow": message}
        for expression in compiled:
            start = time.thread_time()
            try:
                found = expression.eval(data=values).value()
            except (RuntimeError, MemoryError):
                found = None
            if time.thread_time() - start > MAX_SECONDS:
                raise CostlyError(f"an evaluation took more than {MAX_SECONDS} s")
            if found is True:
                return True
        return False

    return test


def _compile(environment: cel.Env, text: str) -> cel.Expression:
    size = len(text.encode())
    if size > MAX_BYTES:
        raise ExpressionError(f"{size} bytes, at most {MAX_BYTES}")
    # Also inside strings: to tell them apart would be one more thing to be fooled by.
    macros = len(_MACRO.findall(text))
    if macros > MAX_MACROS:
        raise ExpressionError(f"{macros} macros, at most {MAX_MACROS}")
    if macros > 1 and text.count("+") + text.count(",") - macros > MAX_SPREAD:
        raise ExpressionError(f"with two macros or more at most {MAX_SPREAD} of '+' and ','")
    try:
        made = environment.compile(text)
    except RuntimeError as error:
        raise ExpressionError(str(error)) from None
    if made.return_type() != cel.Type.BOOL:
        raise ExpressionError(f"it makes {made.return_type().name()}, not a bool: {text[:80]!r}")
    return made
