"""Asks a server for flows and prints them as they come."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from tidegate_observer.api import observer_pb2
from tidegate_observer.client import Client, ObserverError, UnreachableError
from tidegate_observer.relay import merged
from tidegate_observer.tls import ClientFiles

from tidegate_cli.cluster.kubeconfig import present
from tidegate_cli.errors import CliError
from tidegate_cli.objects import OBSERVER_DIR
from tidegate_cli.observe import agent, files, request
from tidegate_cli.observe.printer import Printer, json_line
from tidegate_cli.standalone.errors import StandaloneError
from tidegate_cli.standalone.rundir import RunDir, is_alive
from tidegate_cli.target import as_plugin, choose

RUN_DIR_SOCKET = "observer.sock"
NODE_SOCKET = OBSERVER_DIR / RUN_DIR_SOCKET
"""In a node's loader pod."""

TLS = "tls://"
STARTING_SECONDS = 15.0
"""For the observer to start, after `up --detach` has said that all is ready."""
POLL_SECONDS = 0.05

Request: TypeAlias = observer_pb2.GetFlowsRequest | observer_pb2.GetAgentEventsRequest
Answers: TypeAlias = Iterator[Any]
"""GetFlowsResponse, or GetAgentEventsResponse."""


def observe(args: argparse.Namespace) -> int:
    """Exit code."""
    if args.what == "agent-events":
        return _agent_events(args)
    if args.input_file:
        files.check(args)
    wanted = request.build(args)
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
        numeric=args.numeric or args.ip_translation == "false",
        live=args.follow,
    )
    # No server is "", not None, which is a cluster's nodes.
    server = "" if args.input_file else server_of(args)
    try:
        with contextlib.ExitStack() as stack:
            for response in _answers(args, server, wanted, stack):
                said = printer.write(response)
                if said is not None and not args.silent_errors:
                    print(f"tidegate: {said}", file=sys.stderr)
                if args.follow:
                    sys.stdout.flush()
    except ObserverError as error:
        raise _failed(error) from error
    finally:
        printer.close()
    _leave(server)
    return 0


def _agent_events(args: argparse.Namespace) -> int:
    wanted, server = agent.build(args), server_of(args)
    try:
        with contextlib.ExitStack() as stack:
            written = 0
            for response in _answers(args, server, wanted, stack):
                if not isinstance(response, observer_pb2.GetAgentEventsResponse):
                    # Of a node that does not answer.
                    said = Printer("compact", sys.stdout).write(response)
                    if said is not None and not args.silent_errors:
                        print(f"tidegate: {said}", file=sys.stderr)
                    continue
                agent.write(response, args.output, args.time_format, sys.stdout, written)
                written += 1
                if args.follow:
                    sys.stdout.flush()
    except ObserverError as error:
        raise _failed(error) from error
    _leave(server)
    return 0


def _failed(error: ObserverError) -> CliError:
    there = not isinstance(error, UnreachableError)
    return CliError(str(error), "" if there else "is the observer running? `tidegate status`")


def _leave(server: str | None) -> None:
    if server is None:
        # A node that does not answer leaves threads inside gRPC, and an interpreter that ends
        # meanwhile may be aborted by one: all is said, and nothing is left to clean up.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _answers(
    args: argparse.Namespace, server: str | None, wanted: Request, stack: contextlib.ExitStack
) -> Answers:
    """What the one server says, or every node of a cluster in the order of time."""
    if server is None:
        # Slow to import, and not needed for what is on this machine.
        from tidegate_cli.cluster.flows import Observers  # noqa: PLC0415
        from tidegate_cli.cluster.state import ClusterState  # noqa: PLC0415

        place = choose(args)
        assert isinstance(place, ClusterState)
        found = stack.enter_context(Observers(place, args.node))
        agents = isinstance(wanted, observer_pb2.GetAgentEventsRequest)
        ask = Client.agent_events if agents else None
        return merged(found.peers, wanted, lambda: True, found.connect, ask)
    if isinstance(wanted, observer_pb2.GetAgentEventsRequest):
        events: Answers = stack.enter_context(_client(args, server)).agent_events(wanted)
        if args.node:
            events = (response for response in events if response.node_name == args.node)
        return events
    if args.node:
        # The option of every command: here one more filter.
        for item in wanted.whitelist or [wanted.whitelist.add()]:
            item.node_name.append(args.node)
    if args.input_file:
        return files.responses(args.input_file, wanted)
    return stack.enter_context(_client(args, server)).flows(wanted)


def _client(args: argparse.Namespace, server: str) -> Client:
    """CliError; ObserverError: a certificate's file is missing."""
    files = [Path(name) for text in args.tls_ca_cert_files for name in text.split(",") if name]
    own = (args.tls_client_cert_file, args.tls_client_key_file)
    if any(own) != all(own):
        raise CliError("--tls-client-cert-file and --tls-client-key-file go together")
    if not _asks_tls(args):
        return Client(server)
    chain, key = (Path(name) if name else None for name in own)
    return Client(server, ClientFiles(files, chain, key), args.tls_server_name)


def _asks_tls(args: argparse.Namespace) -> bool:
    words = (args.tls, args.tls_ca_cert_files, args.tls_server_name)
    own = (args.tls_client_cert_file, args.tls_client_key_file)
    return any(words) or any(own) or (args.server or "").startswith(TLS)


def server_of(args: argparse.Namespace) -> str | None:
    """Where to ask, as gRPC writes it; None: the nodes of a cluster. CliError."""
    if _asks_tls(args) and (not args.server or args.server.startswith("unix:")):
        raise CliError("certificates are for --server HOST:PORT only")
    if args.server:
        text = str(args.server).removeprefix(TLS)
        return "unix:" + text.removeprefix("unix://") if text.startswith("unix://") else text
    cluster = args.kubeconfig is not None or args.context is not None or as_plugin()
    if args.local or (NODE_SOCKET.exists() and not (cluster or args.run_dir_given)):
        if not NODE_SOCKET.exists():
            raise CliError(
                f"no observer serves at {NODE_SOCKET}",
                "--local is for inside the container `observer` of a node's loader pod",
            )
        return f"unix:{NODE_SOCKET}"
    socket = Path(args.run_dir) / RUN_DIR_SOCKET
    if not (cluster and not args.run_dir_given) and _serves(Path(args.run_dir), socket):
        return f"unix:{socket}"
    if args.run_dir_given or not (cluster or present()):
        raise CliError(
            f"no observer serves in {args.run_dir}",
            "run `tidegate up DIR` first, without --no-observer, or give --server, or the "
            "--kubeconfig of a cluster",
        )
    return None


def _serves(run_dir: Path, socket: Path) -> bool:
    """Is it there; the observer of an `up` that lives is waited for, as it starts last."""
    deadline = time.monotonic() + STARTING_SECONDS
    while not socket.exists():
        if not _is_up(run_dir) or time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _is_up(run_dir: Path) -> bool:
    try:
        state = RunDir.at(run_dir).read()
    except StandaloneError:
        return False
    return state is not None and is_alive(state)
