"""Options that every sub-command takes. Imported at start-up: argparse only."""

from __future__ import annotations

import argparse
import os
from typing import Any

FORMS = ("table", "json", "yaml")
DEFAULT_RUN_DIR = "/run/tidegate"
ENVIRONMENT = "TIDEGATE_RUN_DIR"


def add_run_dir(parser: argparse.ArgumentParser, *, top: bool = False) -> None:
    """--run-dir, accepted before and after the sub-command's name."""
    default = os.environ.get(ENVIRONMENT) or DEFAULT_RUN_DIR
    parser.add_argument(
        "--run-dir",
        default=default if top else argparse.SUPPRESS,
        metavar="DIR",
        help=f"run directory (default: {ENVIRONMENT}, else {DEFAULT_RUN_DIR})",
    )


def add_common(parser: argparse.ArgumentParser, *, top: bool = False) -> None:
    """--run-dir, --node and -o."""
    add_run_dir(parser, top=top)
    parser.add_argument(
        "--node",
        default=None if top else argparse.SUPPRESS,
        metavar="NAME",
        help="this node only (default: every node of the run directory)",
    )
    parser.add_argument(
        "-o",
        "--output",
        choices=FORMS,
        default="table" if top else argparse.SUPPRESS,
        help="format (default: table)",
    )


def command(
    subparsers: Any, name: str, text: str, description: str = ""
) -> argparse.ArgumentParser:
    """A sub-command with the common options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=text, description=description or text
    )
    add_common(parser)
    return parser
