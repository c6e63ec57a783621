"""Runs inside the guest: every object loads and attaches there, and a matrix agrees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

OPTIONS = ("--load-balancer-acceleration", "best-effort", "--load-balancer-mode", "dsr")
"""With which programs are loaded that else are not."""
EXAMPLE = Path(__file__).parents[2] / "examples" / "minimal"


def tidegate(*arguments: str) -> int:
    print("$ tidegate", *arguments, flush=True)
    return subprocess.run(
        [sys.executable, "-m", "tidegate_cli", *arguments], check=False
    ).returncode


def main() -> int:
    steps = (
        ("doctor",),
        ("up", str(EXAMPLE), "--detach", "--wait", "300", "--no-observer", *OPTIONS),
        ("status",),
        ("matrix", "-6"),
        ("down",),
    )
    failed = [step for step in steps if tidegate(*step)]
    print("failed:", failed, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
