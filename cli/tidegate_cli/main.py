"""The entry point: which sub-command is meant, and errors as one line.

Help must be quick: what is imported here imports argparse and little else. Each sub-command's
parser sets `run`, which imports what it needs.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from typing import Any

from tidegate_cli import commands, matrix
from tidegate_cli.arguments import add_cluster, add_common, add_local
from tidegate_cli.cluster import commands as cluster
from tidegate_cli.errors import CliError
from tidegate_cli.standalone import commands as standalone

EXIT_CODES = """\
exit codes: 0 done, or the answer is yes; 1 the answer is no (denied, a difference, a FAIL), where
the command says so; 2 wrong usage, or it could not be done"""

HERE = ("up", "demo", "down", "exec", "compile")
"""Commands of this machine alone."""

SIGPIPE_EXIT, INTERRUPT_EXIT = 141, 130
"""128 + the signal, as shells have it."""


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_rest: Any) -> None:
        # Slow to import, and asked for once.
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

        try:
            text = version("tidegate")
        except PackageNotFoundError:
            text = "(from a source tree)"
        print(f"{parser.prog} {text}")
        parser.exit()


def _program() -> str:
    started = os.path.basename(sys.argv[0])
    return "kubectl tidegate" if started == "kubectl-tidegate" else "tidegate"


def build_parser() -> argparse.ArgumentParser:
    """Every sub-command's arguments; what they run is imported when it is run."""
    parser = argparse.ArgumentParser(
        prog=_program(),
        description="An eBPF network for Kubernetes that explains every verdict.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(parser, top=True)
    add_cluster(parser, top=True)
    add_local(parser, top=True)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    standalone.add_parser(subparsers)
    matrix.add_parser(subparsers)
    commands.add_parser(subparsers)
    cluster.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        _for_this_machine(args)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except CliError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # What is left in the buffer must not be complained about when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SIGPIPE_EXIT
    except KeyboardInterrupt:
        return INTERRUPT_EXIT
    except OSError as error:
        return _fail(_system_error(error))


def _for_this_machine(args: argparse.Namespace) -> None:
    """CliError: a command that knows no cluster was given one."""
    if args.command in HERE and (args.kubeconfig or args.context or args.local):
        raise CliError(
            f"{args.command} does not ask a cluster",
            "leave --kubeconfig, --context and --local away",
        )


def _system_error(error: OSError) -> str:
    text = error.strerror or str(error)
    if error.filename:
        text = f"{error.filename}: {text}"
    if error.errno in (errno.EPERM, errno.EACCES):
        text += "; run as root (`tidegate doctor` says what is missing)"
    return text


def _fail(text: str) -> int:
    print(f"tidegate: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
