"""Asks a server for flows and prints them as they come."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tidegate_observer.client import Client, ObserverError

from tidegate_cli.errors import CliError
from tidegate_cli.observe import request
from tidegate_cli.observe.printer import Printer, json_line

RUN_DIR_SOCKET = "observer.sock"


def observe(args: argparse.Namespace) -> int:
    """Exit code."""
    wanted = request.build(args)
    if args.node:
        # The option of every command: here one more filter.
        for item in wanted.whitelist or [wanted.whitelist.add()]:
            item.node_name.append(args.node)
    if args.print_raw_filters:
        for name, items in (("allowlist", wanted.whitelist), ("denylist", wanted.blacklist)):
            print(f"{name}:")
            for item in items:
                print(f"    - '{json_line(item).strip()}'")
        return 0
    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    printer = Printer(
        args.output,
        sys.stdout,
        color=color,
        time_format=args.time_format,
        nodes=args.print_node_name,
        numeric=args.numeric,
        live=args.follow,
    )
    try:
        with Client(server_of(args)) as client:
            for response in client.flows(wanted):
                said = printer.write(response)
                if said is not None:
                    print(f"tidegate: {said}", file=sys.stderr)
                if args.follow:
                    sys.stdout.flush()
    except ObserverError as error:
        raise CliError(str(error), "is the observer running? `tidegate status`") from error
    finally:
        printer.close()
    return 0


def server_of(args: argparse.Namespace) -> str:
    """Where to ask, as gRPC writes it. CliError."""
    if args.server:
        text = str(args.server)
        return "unix:" + text.removeprefix("unix://") if text.startswith("unix://") else text
    socket = Path(args.run_dir) / RUN_DIR_SOCKET
    if not socket.exists():
        raise CliError(
            f"no observer serves in {args.run_dir}",
            "run `tidegate up DIR` first, or give --server",
        )
    return f"unix:{socket}"
