"""`tidegate matrix`: arguments only. `connectivity` measures, compares, prints."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidegate_cli.arguments import add_cluster, command, number
from tidegate_cli.errors import CliError

DEFAULT_SECONDS = 1.0
MAX_SECONDS = 60.0


@dataclass(frozen=True)
class MatrixOptions:
    run_dir: Path
    ipv6: bool = False
    """Probe IPv6 too."""
    output: str = "table"
    """One of `arguments.FORMS`."""
    seconds: float = DEFAULT_SECONDS
    node: str | None = None
    """From this node's pods only."""


def add_parser(subparsers: Any) -> None:
    parser = command(
        subparsers,
        "matrix",
        "open real connections between all pods and services, and compare with the model",
        description="Connects from inside every pod to every declared TCP and UDP port of every "
        "pod and service. `.` = the right pod answered, `X` = it did not, `!` = differs from the "
        "model. Exits 1 if a cell differs. With --node: from inside that node's pods. In a "
        "cluster: TCP only, by a privileged pod on each node that is gone again afterwards.",
    )
    add_cluster(parser)
    only = "only this namespace's pods and services; more than one may be given (cluster)"
    parser.add_argument("-n", "--namespace", action="append", metavar="NAME", help=only)
    parser.add_argument("-6", dest="ipv6", action="store_true", help="probe IPv6 too")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=DEFAULT_SECONDS,
        metavar="SECONDS",
        help="how long to wait for each answer (default: %(default)g)",
    )
    parser.set_defaults(run=_main)


def _seconds(text: str) -> float:
    return number(text, 0.05, MAX_SECONDS, " seconds")


def _main(arguments: argparse.Namespace) -> int:
    # Late, as `--help` must be quick.
    from tidegate_cli import connectivity, target  # noqa: PLC0415
    from tidegate_cli.objects import RunObjects  # noqa: PLC0415

    place = target.choose(arguments)
    if not isinstance(place, RunObjects):
        from tidegate_cli.cluster import matrix as cluster  # noqa: PLC0415

        families = (4, 6) if arguments.ipv6 else (4,)
        chosen = arguments.namespace or []
        cells = cluster.of_cluster(place, chosen, families, arguments.timeout, arguments.node)
        print(connectivity.render(cells, arguments.output))
        return 1 if any(cell.differs for cell in cells) else 0
    if arguments.namespace:
        raise CliError("--namespace is for a cluster", "give --context, or leave it away")
    return run(
        MatrixOptions(
            run_dir=Path(arguments.run_dir),
            ipv6=arguments.ipv6,
            output=arguments.output,
            seconds=arguments.timeout,
            node=arguments.node,
        )
    )


def run(options: MatrixOptions) -> int:
    """Prints the matrix; 1 if a cell differs from the model. Raises CliError."""
    # Late, as `--help` must be quick.
    from tidegate_cli import connectivity  # noqa: PLC0415

    cells = connectivity.of_cluster(
        options.run_dir, (4, 6) if options.ipv6 else (4,), options.seconds, options.node
    )
    print(connectivity.render(cells, options.output))
    return 1 if any(cell.differs for cell in cells) else 0
