"""What is wrong with the input, for people: which file, document and field, and
what to do about it. Shared by reader, world and compiler; no I/O."""

from __future__ import annotations

from typing import Literal

import msgspec

Severity = Literal["error", "warning", "info"]


class Source(msgspec.Struct, frozen=True, order=True):
    """Where an object was written. `document` and `line` count from 1."""

    file: str = ""
    document: int = 0
    line: int = 0


class Problem(msgspec.Struct, frozen=True, kw_only=True, order=True, omit_defaults=True):
    """error: something written is not in force; warning: it is, but may not be
    what was meant; info: something was left out on purpose.

    `file` is relative to the folder; `document_index` and `line` count from 1,
    0 means the whole file; `object` is "Kind namespace/name"; "" = not known."""

    severity: Severity
    file: str = ""
    document_index: int = 0
    line: int = 0
    object: str = ""
    field: str = ""
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        where = self.file
        if self.document_index:
            where += f": document {self.document_index} (line {self.line})"
        parts = [part for part in (where, self.object, self.field, self.message) if part]
        text = f"{self.severity}: " + ": ".join(parts)
        return f"{text}; {self.remedy}" if self.remedy else text


def at(source: Source, severity: Severity, message: str, **rest: str) -> Problem:
    """A problem at `source`; `rest`: object, field, remedy."""
    return Problem(
        severity=severity,
        file=source.file,
        document_index=source.document,
        line=source.line,
        message=message,
        **rest,
    )
