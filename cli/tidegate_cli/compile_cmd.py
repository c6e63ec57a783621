"""`tidegate compile`: the objects of a folder, as the cluster would store them.

No kernel, no root, no run directory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tidegate_operator import publish, standalone, world
from tidegate_operator.relevance import EXCLUDED, Settings

from tidegate_cli import render
from tidegate_cli.errors import CliError

ERROR_EXIT = 2


def compile_folder(args: argparse.Namespace) -> int:
    folder = Path(args.folder)
    if not folder.is_dir():
        raise CliError(f"{folder} is no folder", "give the folder that holds the manifests")
    settings = Settings(args.identities, args.excluded_labels or EXCLUDED)
    options = world.Options(nodes=args.nodes, identities=settings)
    desired, ledger, problems, sizes, sets = standalone.compile_folder(folder, options)
    if desired is not None:
        publish.write_stream(desired, ledger, sys.stdout, args.output, sizes)
        print(render.numbers(len(sets), sum(sets.values())), file=sys.stderr)
    for problem in problems:
        print(problem, file=sys.stderr)
    wrong = desired is None or any(problem.severity == "error" for problem in problems)
    return ERROR_EXIT if wrong else 0
