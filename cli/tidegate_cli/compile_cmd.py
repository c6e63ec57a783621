"""`tidegate compile`: the objects of a folder, as the cluster would store them.

No kernel, no root, no run directory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tidegate_cli.errors import CliError

ERROR_EXIT = 2


def add_parser(subparsers: Any) -> None:
    text = "print the objects of a folder; no kernel, no root"
    about = (
        "Print Identity, RuleSet, StateSlice and NodeState objects of the manifests in DIR. What "
        "is wrong with them goes to stderr. Exit code 2: some document is in error; the objects "
        "of the others are printed all the same."
    )
    parser = subparsers.add_parser("compile", help=text, description=about)
    parser.add_argument("folder", metavar="DIR", help="folder of manifests")
    parser.add_argument("-o", "--output", choices=("yaml", "json"), default="yaml", help="format")
    parser.add_argument("--nodes", type=int, metavar="N", help="how many nodes (default: as up)")
    parser.set_defaults(run=compile_folder)


def compile_folder(args: argparse.Namespace) -> int:
    # Late: help must not wait for pydantic.
    from tidegate_operator import publish, standalone, world  # noqa: PLC0415

    folder = Path(args.folder)
    if not folder.is_dir():
        raise CliError(f"{folder} is no folder", "give the folder that holds the manifests")
    options = world.Options(nodes=args.nodes) if args.nodes is not None else world.DEFAULTS
    desired, ledger, problems = standalone.compile_folder(folder, options)
    if desired is not None:
        publish.write_stream(desired, ledger, sys.stdout, args.output)
    for problem in problems:
        print(problem, file=sys.stderr)
    wrong = desired is None or any(problem.severity == "error" for problem in problems)
    return ERROR_EXIT if wrong else 0
