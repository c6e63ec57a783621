"""Output: tables, JSON and YAML. Formats values that others computed; asks nobody anything."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell, three spaces between; the last one is not padded."""
    lines = [tuple(header), *(tuple(map(str, row)) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    out = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        out.append("   ".join(cells).rstrip())
    return "\n".join(out) + "\n"


def structured(value: Any, form: str, stream: TextIO | None = None) -> None:
    """Write `value` (plain lists, dicts, text, numbers) as "json" or "yaml"."""
    out = stream or sys.stdout
    if form == "json":
        json.dump(value, out, indent=2)
        out.write("\n")
        return
    import yaml  # noqa: PLC0415 - slow to import, seldom asked for

    yaml.safe_dump(value, out, sort_keys=False, width=100, allow_unicode=True)


def size(number: int) -> str:
    """Bytes for people: "512 B", "1.5 MiB"."""
    value, units = float(number), ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def host_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def labels(pairs: dict[str, str]) -> str:
    return ",".join(f"{key}={value}" if value else key for key, value in sorted(pairs.items()))


def numbers(used: int, sets: int) -> str:
    """What identities as classes save, in a line."""
    return f"identities: {used} for {sets} sets of labels, {sets - used} saved"
