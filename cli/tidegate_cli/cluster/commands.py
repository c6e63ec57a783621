"""The sub-commands `install`, `uninstall` and `sysdump`: arguments only."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from tidegate_cli.arguments import add_cluster, number

MAX_WAIT = 86400.0


def add_parser(subparsers: Any) -> None:
    _install(subparsers)
    _uninstall(subparsers)
    _sysdump(subparsers)


def _command(subparsers: Any, name: str, text: str, more: str) -> argparse.ArgumentParser:
    about = f"{text[0].upper()}{text[1:]}. {more}"
    parser: argparse.ArgumentParser = subparsers.add_parser(name, help=text, description=about)
    add_cluster(parser)

    def run(args: argparse.Namespace) -> int:
        module = importlib.import_module(f"tidegate_cli.cluster.{name}")
        code: int = getattr(module, name)(args)
        return code

    parser.set_defaults(run=run)
    return parser


def _install(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "install",
        "put Tidegate into a cluster, and wait until every node enforces",
        "Applies manifests server-side; again after a change is an upgrade. Exit code 1: it is not "
        "in force in time; what is wrong is said.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "-f",
        "--filename",
        action="append",
        metavar="FILE",
        help="manifests: a file, a folder, or - (default: those that came with this command)",
    )
    kustomize = "a kustomization, built by kubectl: manifests/overlays/ha"
    source.add_argument("-k", "--kustomize", metavar="DIR", help=kustomize)
    parser.add_argument("--image", help="run this image instead of the one in the manifests")
    server = "the API server's address as nodes reach it (default: as the node's kubelet has it)"
    parser.add_argument("--api-server", metavar="URL", help=server)
    force = "take over fields that another manager of the objects has set"
    parser.add_argument("--force-conflicts", action="store_true", help=force)
    _wait(parser, "until it is in force; 0: not at all", 300)


def _uninstall(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "uninstall",
        "take Tidegate out of a cluster, and off every node",
        "Ends enforcement on every node (mode Detached), waits until that is so, cleans the nodes, "
        "then deletes everything of Tidegate, its kinds last. Pods keep running.",
    )
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    force = "go on where a node does not answer; what stays on it is named"
    parser.add_argument("--force", action="store_true", help=force)
    _wait(parser, "for each step", 120)


def _sysdump(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "sysdump",
        "collect everything needed to debug into one archive",
        "Objects, logs and what every node's kernel holds. Of objects only fields on a list are "
        "kept: no Secret, no environment, no annotation of others.",
    )
    output = "archive to write (default: tidegate-sysdump-TIME.tar.gz)"
    parser.add_argument("--output-file", metavar="FILE", help=output)


def _wait(parser: argparse.ArgumentParser, what: str, seconds: int) -> None:
    parser.add_argument(
        "--wait",
        type=_seconds,
        default=float(seconds),
        metavar="SECONDS",
        help=f"how long to wait {what} (default: {seconds})",
    )


def _seconds(text: str) -> float:
    return number(text, 0.0, MAX_WAIT, " seconds")
