"""Options that every sub-command takes. Imported at start-up: argparse only."""

from __future__ import annotations

import argparse
import os
from typing import Any, TypeVar

N = TypeVar("N", int, float)
MAX_NODES = 64
FORMS = ("table", "json", "yaml")
DEFAULT_RUN_DIR = "/run/tidegate"
ENVIRONMENT = "TIDEGATE_RUN_DIR"


class _RunDir(argparse.Action):
    """Remembers that the flag was given: `target` lets explicit flags win."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, *_: Any
    ) -> None:
        namespace.run_dir, namespace.run_dir_given = value, True


def add_run_dir(parser: argparse.ArgumentParser, *, top: bool = False) -> None:
    """--run-dir, accepted before and after the sub-command's name."""
    default = os.environ.get(ENVIRONMENT) or DEFAULT_RUN_DIR
    if top:
        parser.set_defaults(run_dir_given=bool(os.environ.get(ENVIRONMENT)))
    parser.add_argument(
        "--run-dir",
        action=_RunDir,
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
        help="this node only (default: every node)",
    )
    parser.add_argument(
        "-o",
        "--output",
        choices=FORMS,
        default="table" if top else argparse.SUPPRESS,
        help="format (default: table)",
    )


def add_cluster(parser: argparse.ArgumentParser, *, top: bool = False) -> None:
    """--kubeconfig and --context."""
    for flag, metavar, text in (
        ("--kubeconfig", "FILE", "ask the cluster of this file (default: KUBECONFIG, else yours)"),
        ("--context", "NAME", "ask the cluster of this context of the kubeconfig"),
    ):
        default = None if top else argparse.SUPPRESS
        parser.add_argument(flag, default=default, metavar=metavar, help=text)


def add_local(parser: argparse.ArgumentParser, *, top: bool = False) -> None:
    """--local."""
    parser.add_argument(
        "--local",
        action="store_true",
        default=False if top else argparse.SUPPRESS,
        help="ask this node's loader; inside its pod, or on its node",
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


def number(text: str, least: N, most: N, unit: str = "") -> N:
    """Of the bounds' type. Raises ArgumentTypeError: argparse shows its text, and of any other
    error only the function's name."""
    try:
        found = type(least)(text)
        if least <= found <= most:
            return found
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be {least} to {most}{unit}")


def node_count(text: str) -> int:
    return number(text, 1, MAX_NODES)


def _label_keys(text: str) -> tuple[str, ...]:
    # What it imports takes longer than any other `--help`.
    from tidegate_operator.relevance import label_keys  # noqa: PLC0415

    return label_keys(text)


def add_load_balancer(parser: argparse.ArgumentParser) -> None:
    """What the loaders of a cluster are started with."""
    parser.add_argument(
        "--load-balancer-mode",
        choices=("snat", "dsr"),
        default="snat",
        help="how a client outside reaches a backend on another node (default: %(default)s)",
    )
    parser.add_argument(
        "--load-balancer-acceleration",
        choices=("disabled", "native", "best-effort"),
        default="disabled",
        help="XDP at the nodes' uplinks (default: %(default)s)",
    )


def _policy(text: str) -> str:
    if not text.partition("/")[2]:
        raise argparse.ArgumentTypeError("is NS/NAME, or /NAME of a kind without namespaces")
    return text


def add_policy_log(parser: argparse.ArgumentParser) -> None:
    """What log/policy_action.log has, with the observer's flags for it."""
    for what, default in (("deny", "all"), ("allow", "none")):
        parser.add_argument(
            f"--policy-log-{what}",
            choices=("all", "listed", "none"),
            default=default,
            help=f"what policies {what}, in log/policy_action.log; listed: of policies named, of "
            "rules with log: true (default: %(default)s)",
        )
    parser.add_argument(
        "--policy-log-policy",
        type=_policy,
        action="append",
        default=[],
        metavar="NS/NAME",
        help="a policy that is listed; may be repeated",
    )


def add_identities(parser: argparse.ArgumentParser) -> None:
    """How pods get their numbers."""
    parser.add_argument(
        "--identities",
        choices=("classes", "labels"),
        default="classes",
        help="one number for all pods of a namespace that no policy tells apart, or one for each "
        "set of labels (default: %(default)s)",
    )
    parser.add_argument(
        "--excluded-labels",
        type=_label_keys,
        metavar="KEY,...",
        help="with --identities=labels: label keys, or prefixes that end in /, that make no number "
        "unless a policy mentions them (default: those that common tools put on pods)",
    )


def _networks(text: str) -> tuple[str, ...]:
    import ipaddress  # noqa: PLC0415  (as above)

    try:
        return tuple(
            sorted({str(ipaddress.ip_network(part.strip())) for part in text.split(",") if part})
        )
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_masquerade(parser: argparse.ArgumentParser) -> None:
    """With whose address pods' packets leave."""
    parser.add_argument(
        "--masquerade",
        action="store_true",
        help="what pods send outside the cluster leaves with their node's address",
    )
    parser.add_argument(
        "--non-masquerade-cidrs",
        type=_networks,
        default=(),
        metavar="CIDR,...",
        help="with --masquerade: networks outside to which pods keep their own addresses",
    )
