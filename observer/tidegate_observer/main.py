"""The observer's process: reads the rings, joins, keeps the last flows and serves them."""

from __future__ import annotations

import argparse
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import structlog
from tidegate_bpf import BpfError, LayoutError, ObjectFile, mounts
from tidegate_kube import AccessError, Client, in_cluster
from tidegate_kube.access import SERVICE_ACCOUNT

from tidegate_observer import history, policylog, rings
from tidegate_observer.collector import Collector, Reader
from tidegate_observer.exposition import Exposition
from tidegate_observer.informer import ClusterPeople
from tidegate_observer.metrics import Metrics
from tidegate_observer.rundir import RunDirSource
from tidegate_observer.server import About, ObserverService, Server
from tidegate_observer.tls import Certificates

AUTO = "auto"
"""`--cgroup auto`."""
MAX_HISTORY = 1 << 20
LOOK_SECONDS = 5.0
"""How often it is looked whether there are certificates by now."""
KNOWN_SECONDS = 20.0
"""How long what the rings hold waits for the API server to say who lives in the cluster."""

log = structlog.get_logger()


def own_version() -> str:
    try:
        return f"tidegate {version('tidegate')}"
    except PackageNotFoundError:
        return "tidegate (from a source tree)"


def log_to_stderr() -> None:
    """Every line as JSON."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def run(args: argparse.Namespace, stop: threading.Event) -> int:
    """Exit code."""
    spec = ObjectFile(args.objects / "pod.o")
    kept = history.History(args.flows)
    people = _people(args)
    beside = args.socket.parent
    cgroup = _cgroup(args.cgroup)
    readers = [
        Reader(
            spec,
            node,
            pins,
            RunDirSource(args.run_dir, node, args.state, people, cgroup, in_node=args.kube),
            beside / f"lost-{node}",
        )
        for node, pins in args.node
    ]
    figures = Metrics()
    collector = Collector(readers, kept, figures, _policy_log(args))
    about = About(
        nodes=tuple(reader.node for reader in readers),
        version=own_version(),
        address=f"unix:{args.socket}",
        namespaces=collector.namespaces,
        peers=_peers(people, args.listen) if people is not None and args.listen else None,
        secure=bool(args.listen),
        agent=collector.agent,
        instance=secrets.randbits(64),
    )
    service = ObserverService(kept, about)
    addresses = [f"unix:{args.socket}"]
    door = Door(service, args.listen, args.tls)
    with rings.locked(args.socket.with_suffix(".lock")) as alone:
        if not alone:
            log.error("another observer reads these rings", socket=str(args.socket))
            return 1
        try:
            with Server(service, addresses), door, Exposition(figures, args.metrics) as shown:
                log.info("serving", addresses=addresses, nodes=about.nodes)
                if people is not None:
                    # What waits in the rings is read when it is known who they are.
                    people.start()
                    people.wait(KNOWN_SECONDS, stop)
                pause = 0.0
                while not stop.wait(pause):
                    pause = collector.step()
                    door.tend()
                    service.streams.cut_stuck()
                    shown.write(args.metrics_file)
                kept.close()
                collector.agent.close()
        finally:
            collector.close()
            if people is not None:
                people.close()
            args.socket.unlink(missing_ok=True)
    return 0


class Door:
    """The TCP address: open from when there are certificates for it, with no other. A context
    manager."""

    def __init__(self, service: ObserverService, address: str, certificates: Path | None) -> None:
        """`address`: "" for none."""
        self._service = service
        self._address = address
        self._certificates = Certificates(certificates) if certificates and address else None
        self._server: Server | None = None
        self._due = 0.0
        self._told = ""

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._server is not None:
            self._server.__exit__()

    def tend(self) -> None:
        """Now and then: opens it if it can be."""
        found = self._certificates
        if found is None or self._server is not None or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + LOOK_SECONDS
        if not found.present:
            return
        try:
            self._server = Server(self._service, [self._address], found).__enter__()
            log.info("serving", addresses=[self._address])
        except (OSError, ValueError) as error:
            if str(error) != self._told:
                self._told = str(error)
                log.warning("cannot serve", address=self._address, error=self._told)


def _peers(people: ClusterPeople, listen: str) -> Callable[[], dict[str, str]]:
    """Node → where its observer listens: all of them at the port that this one does."""
    port = listen.rpartition(":")[2]

    def found() -> dict[str, str]:
        return {
            node: f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
            for node, address in people.observers().items()
        }

    return found


def _people(args: argparse.Namespace) -> ClusterPeople | None:
    """OSError, AccessError: how to reach the API server is not known."""
    if not args.kube:
        return None
    server = args.server_file.read_text().strip() if args.server_file is not None else None
    client = Client(in_cluster(server, args.service_account), "tidegate-observer")
    return ClusterPeople(client, args.namespace)


def _cgroup(told: str | None) -> Path | None:
    found = mounts.cgroup2() if told == AUTO else told
    if told and not found:
        log.warning("no cgroup2 is mounted: pods in the node's network have no names")
    return Path(found) if found else None


def _policy_log(args: argparse.Namespace) -> policylog.PolicyLog | None:
    if not args.policy_log:
        return None
    return policylog.PolicyLog(
        policylog.Settings(
            target=args.policy_log,
            allow=args.policy_log_allow,
            deny=args.policy_log_deny,
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
    add(
        "--cgroup",
        help="cgroup2 directory of the node's pods, to know those in the node's network by; auto: "
        "the top of the cgroup2 mount",
    )
    add("--kube", action="store_true", help="ask the API server for pods and identities")
    add(
        "--server-file",
        type=Path,
        help="file with the API server's URL (default: $KUBERNETES_SERVICE_HOST and _PORT)",
    )
    add(
        "--service-account",
        type=Path,
        default=SERVICE_ACCOUNT,
        help="directory with token and ca.crt (default: %(default)s)",
    )
    add("--namespace", default="tidegate-system", help="of the observers' pods")
    add("--socket", type=Path, required=True, help="Unix socket to serve on")
    add(
        "--listen",
        default="",
        metavar="HOST:PORT",
        help="serve there, too, with TLS, from when its certificates are there; needs --tls",
    )
    add(
        "--tls",
        type=Path,
        metavar="DIR",
        help="tls.crt and tls.key, and ca.crt: whose certificates clients must have",
    )
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
    which = (policylog.ALL, policylog.LISTED, policylog.NONE)
    for name, default in (("deny", policylog.ALL), ("allow", policylog.NONE)):
        add(
            f"--policy-log-{name}",
            choices=which,
            default=default,
            help="listed: of policies named, of rules with log: true (default: %(default)s)",
        )
    add(
        "--policy-log-policy",
        type=_policy,
        action="append",
        default=[],
        metavar="NS/NAME",
        help="a policy that is listed; may be repeated",
    )
    add("--policy-log-node-name", action="store_true", help="each line names the node")
    return made


def _node(text: str) -> tuple[str, Path]:
    name, equals, pins = text.partition("=")
    if not (name and equals and pins):
        raise argparse.ArgumentTypeError("is NAME=PINS")
    return name, Path(pins)


def _policy(text: str) -> str:
    if not text.partition("/")[2]:
        raise argparse.ArgumentTypeError("is NS/NAME, or /NAME of a kind without namespaces")
    return text


def _flows(text: str) -> int:
    number = int(text)
    if not 1 <= number <= MAX_HISTORY:
        raise argparse.ArgumentTypeError(f"must be 1 to {MAX_HISTORY}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    made = parser()
    args = made.parse_args(argv)
    if args.listen and args.tls is None:
        made.error("--listen needs --tls: what is not encrypted is served on the Unix socket only")
    log_to_stderr()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        return run(args, stop)
    except (AccessError, BpfError, LayoutError, OSError) as error:
        log.error("cannot go on", error=str(error))
        return 1
