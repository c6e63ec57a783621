"""The observer's process: reads the rings, joins, keeps the last flows and serves them."""

from __future__ import annotations

import argparse
import secrets
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import structlog
from tidegate_bpf import BpfError, LayoutError, ObjectFile

from tidegate_observer import history, policylog, rings
from tidegate_observer.collector import Collector, Reader
from tidegate_observer.exposition import Exposition
from tidegate_observer.metrics import Metrics
from tidegate_observer.rundir import RunDirSource
from tidegate_observer.server import About, ObserverService, Server

MAX_HISTORY = 1 << 20

log = structlog.get_logger()


def own_version() -> str:
    try:
        return f"tidegate {version('tidegate')}"
    except PackageNotFoundError:
        return "tidegate (from a source tree)"


def run(args: argparse.Namespace, stop: threading.Event) -> int:
    """Exit code."""
    spec = ObjectFile(args.objects / "pod.o")
    kept = history.History(args.flows)
    readers = [
        Reader(spec, node, pins, RunDirSource(args.run_dir, node, args.state))
        for node, pins in args.node
    ]
    figures = Metrics()
    collector = Collector(readers, kept, figures, _policy_log(args))
    about = About(
        nodes=tuple(reader.node for reader in readers),
        version=own_version(),
        address=args.listen or f"unix:{args.socket}",
        namespaces=collector.namespaces,
        instance=secrets.randbits(64),
    )
    service = ObserverService(kept, about)
    addresses = [f"unix:{args.socket}", *([args.listen] if args.listen else [])]
    with rings.locked(args.socket.with_suffix(".lock")) as alone:
        if not alone:
            log.error("another observer reads these rings", socket=str(args.socket))
            return 1
        try:
            with Server(service, addresses), Exposition(figures, args.metrics) as shown:
                log.info("serving", addresses=addresses, nodes=about.nodes)
                pause = 0.0
                while not stop.wait(pause):
                    pause = collector.step()
                    service.cut_stuck()
                    shown.write(args.metrics_file)
                kept.close()
        finally:
            collector.close()
            args.socket.unlink(missing_ok=True)
    return 0


def _policy_log(args: argparse.Namespace) -> policylog.PolicyLog | None:
    if not args.policy_log:
        return None
    what = args.policy_log_what
    return policylog.PolicyLog(
        policylog.Settings(
            target=args.policy_log,
            allow=what in ("allow", "all"),
            deny=what in ("deny", "all"),
            policies=frozenset(args.policy_log_policy),
            node_name=args.policy_log_node_name,
        )
    )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tidegate-observer", description="Show what flows on a node, as Hubble's API has it."
    )
    add = made.add_argument
    add(
        "--node",
        type=_node,
        action="append",
        required=True,
        metavar="NAME=PINS",
        help="a node and its loader's pins; several, if they are on one machine",
    )
    add("--run-dir", type=Path, required=True, help="where supervisor.json and nodes/ are")
    add("--state", type=Path, help="where the objects in force are (default: RUN_DIR/objects)")
    add("--objects", type=Path, required=True, help="where pod.o is")
    add("--socket", type=Path, required=True, help="Unix socket to serve on")
    add("--listen", default="", metavar="HOST:PORT", help="serve there, too")
    add(
        "--flows",
        type=_flows,
        default=history.DEFAULT_SIZE,
        metavar="N",
        help=f"how many flows are held (default: {history.DEFAULT_SIZE})",
    )
    add("--metrics", default="", metavar="HOST:PORT", help="figures for Prometheus, by HTTP")
    add("--metrics-file", type=Path, metavar="FILE", help="the same, written every 5 s")
    add(
        "--policy-log", default="", metavar="FILE", help="what policies decided; -: standard output"
    )
    add(
        "--policy-log-what",
        choices=("deny", "allow", "all"),
        default="deny",
        help="default: deny",
    )
    add(
        "--policy-log-policy",
        action="append",
        default=[],
        metavar="NS/NAME",
        help="only what this policy decided; may be repeated",
    )
    add("--policy-log-node-name", action="store_true", help="each line names the node")
    return made


def _node(text: str) -> tuple[str, Path]:
    name, equals, pins = text.partition("=")
    if not (name and equals and pins):
        raise argparse.ArgumentTypeError("is NAME=PINS")
    return name, Path(pins)


def _flows(text: str) -> int:
    number = int(text)
    if not 1 <= number <= MAX_HISTORY:
        raise argparse.ArgumentTypeError(f"must be 1 to {MAX_HISTORY}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        return run(args, stop)
    except (BpfError, LayoutError, OSError) as error:
        log.error("cannot go on", error=str(error))
        return 1
