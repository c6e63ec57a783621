"""The exception that sub-commands raise for people to read. No imports: `main` needs it early."""

from __future__ import annotations


class CliError(Exception):
    """`CliError(what, remedy)`: printed as `tidegate: what; remedy`, exit code 2."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what}; {remedy}" if remedy else what)
