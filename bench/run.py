"""`make bench`: measures what "How fast" promises and writes bench/results.json.

    python bench/run.py [--only id,…] [--output FILE]

A row that cannot be measured is absent from the file and named on standard error; nothing is
ever filled in. Exits 1 when a bar is missed or a row could not be measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [
    str(ROOT / part)
    for part in ("tests", "tests/support", "crds", "operator", "node-loader", "observer", "cli")
]

from measure import Result, Unmeasurable  # noqa: E402

MODULES = (
    "row_datapath",
    "row_policy",
    "row_packets",
    "row_loader",
    "row_maglev",
    "row_services",
    "row_proxy",
    "row_change",
    "row_compile",
    "row_cluster",
    "row_image",
    "row_operator",
    "row_policy_cost",
    "row_kind",
    "row_flows",
    "row_flow_loss",
    "row_xdp",
)


def report(line: dict[str, object]) -> None:
    mark = "ok    " if line["ok"] else "MISSED"
    print(
        f"{mark} {line['id']:20} {line['value']:>10} {line['unit']:6}"
        f" {'>= ' if 'at least' in line else 'bar'} {line['bar']:<7}"
        f" {line['what']} (against {line['against']})",
        flush=True,
    )


def measure(wanted: set[str]) -> tuple[list[Result], int]:
    """(results, rows that could not be measured). A failing row stops no other."""
    results: list[Result] = []
    failed = 0
    for module in MODULES:
        rows = importlib.import_module(module).ROWS
        for name, run in rows.items():
            if wanted and name not in wanted:
                continue
            try:
                for result in run():
                    results.append(result)
                    report(result.line())
            except Unmeasurable as why:
                failed += 1
                print(f"absent {name}: {why}", file=sys.stderr, flush=True)
            except Exception:
                failed += 1
                print(f"absent {name}:", file=sys.stderr)
                traceback.print_exc()
    return results, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="ids of rows, separated by commas")
    parser.add_argument("--output", type=Path, default=HERE / "results.json")
    options = parser.parse_args()
    if os.geteuid():
        parser.error("needs root: it loads eBPF programs")
    missing = [name for name in ("bench.o", "rr") if not (HERE / "build" / name).exists()]
    if missing:
        parser.error(f"bench/build has no {', '.join(missing)}: run `make bench`")
    # Namespaces, maps and processes of a row go with it, also when this is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    wanted = set(filter(None, options.only.split(",")))
    results, failed = measure(wanted)
    lines = [result.line() for result in results]
    if wanted and options.output.exists():
        fresh = {line["id"] for line in lines}
        kept = [old for old in json.loads(options.output.read_text()) if old["id"] not in fresh]
        lines = kept + lines
    options.output.write_text(json.dumps(lines, indent=1) + "\n")
    return 1 if failed or not all(line["ok"] for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
