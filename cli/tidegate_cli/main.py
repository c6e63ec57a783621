"""The entry point: which sub-command is meant, and errors as one line.

A sub-command's module is imported only when its name is on the command line, so that help is
quick: nothing but argparse may be imported here.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from tidegate_cli.arguments import add_common, add_run_dir
from tidegate_cli.errors import CliError

COMMANDS: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "tidegate_cli.standalone.commands",
        {
            "up": "make a cluster on this machine from a folder of manifests",
            "down": "remove it, leaving nothing",
            "exec": "run a command in a pod",
        },
    ),
    (
        "tidegate_cli.status",
        {"status": "what each node enforces, and whether that is what it should"},
    ),
    (
        "tidegate_cli.explain",
        {"explain": "why a packet passes or not: three answers that must agree"},
    ),
    ("tidegate_cli.matrix", {"matrix": "try every connection and compare with the model"}),
    (
        "tidegate_cli.lists",
        {
            "identity": "identities and who has them",
            "endpoint": "pods in the kernel's node tables",
            "policy": "the rules in the kernel's maps",
            "lb": "services in the kernel's maps",
            "ct": "tracked flows",
            "ipcache": "who has which address",
            "metrics": "packets forwarded and dropped, by reason",
        },
    ),
    ("tidegate_cli.compile_cmd", {"compile": "print the objects of a folder; no kernel, no root"}),
    ("tidegate_cli.doctor", {"doctor": "what this machine has and lacks"}),
)
"""Module → its sub-commands; the module has `add_parser(subparsers)`, whose parsers set `run`."""

EXIT_CODES = """\
exit codes: 0 done, or the answer is yes; 1 the answer is no (denied, a difference, a FAIL), where
the command says so; 2 wrong usage, or it could not be done"""

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


def build_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the sub-commands that `words` may mean; the others have only their help."""
    parser = argparse.ArgumentParser(
        prog=_program(),
        description="An eBPF network for Kubernetes that explains every verdict.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(parser, top=True)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module, names in COMMANDS:
        if names.keys() & set(words):
            importlib.import_module(module).add_parser(subparsers)
            for name in names:
                # A module that did not ask for the common options.
                with contextlib.suppress(argparse.ArgumentError):
                    add_run_dir(subparsers.choices[name])
        else:
            for name, text in names.items():
                subparsers.add_parser(name, help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = build_parser(words).parse_args(words)
    try:
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
