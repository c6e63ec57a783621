"""`tidegate-operator`: one process of the operator in a cluster.

kopf is the shell: it starts and stops us, listens to signals and keeps an event loop that a
probe watches. It watches no object: the many kinds come through reflectors, which survive
what kopf does not.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from tidegate_kube import Access, AccessError, Client, in_cluster
from tidegate_kube.access import read as read_source
from tidegate_kube.kubeconfig import from_kubeconfig

from tidegate_operator import relevance, services
from tidegate_operator.cluster.lead import Alone, Lead
from tidegate_operator.cluster.metrics import Metrics
from tidegate_operator.cluster.reports import Reports
from tidegate_operator.cluster.runner import Runner
from tidegate_operator.cluster.selfcheck import VERIFY_SECONDS
from tidegate_operator.cluster.shell import kopf
from tidegate_operator.cluster.statuses import Statuses
from tidegate_operator.cluster.watches import Watches
from tidegate_operator.cluster.web import Web, verdict
from tidegate_operator.leader import Leader

DEFAULT_LISTEN = "127.0.0.1:9180"
DEFAULT_NAMESPACE = "tidegate-system"
LEASE = "tidegate-operator"
BEAT_SECONDS = 1.0
SILENT_SECONDS = 30.0
"""Without a beat for so long kopf's event loop hangs."""
KOPF_RETRY_SECONDS = 5.0

log = structlog.get_logger()


@dataclass(frozen=True)
class Options:
    server: str | None
    server_file: Path | None
    kubeconfig: Path | None
    namespace: str
    identity: str
    elect: bool
    taint_nodes: bool
    listen: tuple[str, int]
    log_level: str
    services: services.Settings
    identities: relevance.Settings
    verify_every: float


def parse(arguments: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(
        prog="tidegate-operator",
        description="Compile the cluster's policies, services and identities to the desired "
        "state of every node, and keep it published.",
    )
    parser.add_argument("--server", help="URL of the API server, instead of the pod's environment")
    parser.add_argument(
        "--server-file", type=Path, help="a file that holds that URL; absent or empty: no such"
    )
    parser.add_argument("--kubeconfig", type=Path, help="outside a pod: how to reach the cluster")
    parser.add_argument(
        "--namespace",
        default=os.environ.get("TIDEGATE_NAMESPACE", DEFAULT_NAMESPACE),
        help="where the Lease lies (default: %(default)s)",
    )
    parser.add_argument(
        "--identity",
        default=os.environ.get("POD_NAME") or f"{socket.gethostname()}-{os.getpid()}",
        help="what this replica is called in the Lease (default: $POD_NAME, or host and pid)",
    )
    parser.add_argument(
        "--no-election", action="store_true", help="lead at once: there is only one replica"
    )
    parser.add_argument(
        "--taint-nodes",
        action="store_true",
        help="put the taint tidegate.dev/agent-not-ready on Linux nodes whose loader has never "
        "put a state in force (it is always taken away when one has)",
    )
    parser.add_argument(
        "--listen",
        type=_address,
        default=_address(DEFAULT_LISTEN),
        help=f"address of /healthz, /readyz and /metrics (default: {DEFAULT_LISTEN})",
    )
    parser.add_argument(
        "--external-ips",
        type=cidrs,
        default=(),
        metavar="CIDR,...",
        help="serve spec.externalIPs of Services inside these networks (default: none, as whoever "
        "may write a Service could take any address with them)",
    )
    parser.add_argument(
        "--nodeport-addresses",
        type=cidrs,
        default=(),
        metavar="CIDR,...",
        help="the addresses of a node that answer for NodePorts and host ports are those inside "
        "these networks (default: its primary address of each family)",
    )
    parser.add_argument(
        "--service-algorithm",
        choices=("random", "maglev"),
        default="random",
        help="how a new connection gets its backend, where a Service does not say it in the "
        "annotation tidegate.dev/algorithm (default: %(default)s)",
    )
    parser.add_argument(
        "--masquerade",
        action="store_true",
        help="what pods send outside the cluster leaves with their node's address (default: with "
        "their own)",
    )
    parser.add_argument(
        "--non-masquerade-cidrs",
        type=cidrs,
        default=(),
        metavar="CIDR,...",
        help="with --masquerade: networks outside to which pods keep their own addresses, beside "
        "link-local and multicast ones (default: none)",
    )
    parser.add_argument(
        "--identities",
        choices=("classes", "labels"),
        default="classes",
        help="one number for all pods of a namespace that no policy tells apart, or one for each "
        "set of labels (default: %(default)s)",
    )
    parser.add_argument(
        "--excluded-labels",
        type=relevance.label_keys,
        default=relevance.EXCLUDED,
        metavar="KEY,...",
        help="with --identities=labels: label keys, or prefixes that end in /, that make no number "
        "unless a policy mentions them (default: those that common tools put on pods)",
    )
    parser.add_argument(
        "--verify-every",
        type=_seconds,
        default=VERIFY_SECONDS,
        metavar="SECONDS",
        help="compare what is published with what a compile from nothing comes to so often, beside "
        "the publishing; 0: never (default: %(default).0f)",
    )
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning"), default="info", help="of JSON lines"
    )
    found = parser.parse_args(arguments)
    return Options(
        server=found.server,
        server_file=found.server_file,
        kubeconfig=found.kubeconfig,
        namespace=found.namespace,
        identity=found.identity,
        elect=not found.no_election,
        taint_nodes=found.taint_nodes,
        listen=found.listen,
        log_level=found.log_level,
        services=services.Settings(
            external_ips=found.external_ips,
            node_ports=found.nodeport_addresses,
            maglev=found.service_algorithm == "maglev",
            masquerade=tuple(sorted(set(found.non_masquerade_cidrs))) if found.masquerade else None,
        ),
        identities=relevance.Settings(found.identities, found.excluded_labels),
        verify_every=found.verify_every,
    )


def cidrs(text: str) -> tuple[str, ...]:
    """Networks, separated by commas; "" is none."""
    try:
        return tuple(str(ipaddress.ip_network(part.strip())) for part in text.split(",") if part)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not host:port")
    return host.strip("[]"), int(port)


def access_of(options: Options) -> Access:
    """AccessError: not known."""
    if options.kubeconfig is not None:
        return from_kubeconfig(options.kubeconfig)
    server = options.server
    if not server and options.server_file is not None and options.server_file.exists():
        server = options.server_file.read_text().strip()
    return in_cluster(server or None)


class Operator:
    """The parts of one process, and when they start and stop."""

    def __init__(self, options: Options, access: Access) -> None:
        """OSError: the address to listen on cannot be had."""
        self.metrics = Metrics()
        self.client = Client(access, user_agent="tidegate-operator")
        self.watches = Watches(self.client)
        self.lead = self._lead(options)
        reports = Reports()
        self.statuses = Statuses(
            self.client, self.watches, self.lead, self.metrics, options.taint_nodes, reports
        )
        self.runner = Runner(
            self.client,
            self.watches,
            self.lead,
            self.metrics,
            self.statuses.published,
            options.services,
            options.identities,
            options.verify_every,
            reports,
        )
        self.watches.changed = self._changed
        self.metrics.watch(self.runner)
        self.web = Web(
            options.listen,
            {
                "/healthz": lambda: verdict(self.faults()),
                "/readyz": lambda: verdict(self.faults() + self.runner.unready()),
                "/metrics": lambda: (True, "text/plain; version=0.0.4", self.metrics.text()),
            },
        )
        self._beat: float | None = None

    def _lead(self, options: Options) -> Lead:
        if not options.elect:
            return Alone()
        return Leader(
            self.client,
            options.identity,
            namespace=options.namespace,
            name=LEASE,
            gained=lambda _: self._changed(),
            lost=lambda reason: log.warning("lost the lease", reason=reason),
            floor=self.watches.highest_term,
        )

    def _changed(self) -> None:
        self.runner.poke()
        self.statuses.poke()

    def beat(self) -> None:
        """Called by the event loop while it turns."""
        self._beat = time.monotonic()

    def faults(self) -> list[str]:
        found = self.runner.faults()
        if self._beat is not None and not self.statuses.alive:
            found.append("the thread that writes statuses has ended")
        if self._beat is not None and time.monotonic() - self._beat > SILENT_SECONDS:
            found.append("the event loop hangs")
        return found

    def start(self) -> None:
        self.web.start()
        self.statuses.start()
        self.runner.start()

    def stop(self) -> None:
        self.statuses.stop()
        self.runner.stop()
        self.web.stop()
        self.client.close()


class _Forever:
    """kopf's delays between tries: without an end, as an API server may be away for long."""

    def __iter__(self) -> Iterator[float]:
        while True:
            yield KOPF_RETRY_SECONDS


def shell(operator: Operator, access: Access) -> kopf.OperatorRegistry:
    """kopf's handlers: of its own life only, none of objects."""
    registry = kopf.OperatorRegistry()
    beating: list[asyncio.Task[None]] = []

    async def beat() -> None:
        while True:
            operator.beat()
            await asyncio.sleep(BEAT_SECONDS)

    @kopf.on.startup(registry=registry)
    async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        settings.peering.standalone = True
        settings.posting.enabled = False
        settings.scanning.disabled = True
        settings.networking.error_backoffs = _Forever()
        beating.append(asyncio.create_task(beat()))
        await asyncio.to_thread(operator.start)

    @kopf.on.cleanup(registry=registry)
    async def stop(**_: Any) -> None:
        for task in beating:
            task.cancel()  # or kopf waits for it
        await asyncio.to_thread(operator.stop)

    @kopf.on.login(registry=registry)
    def login(**_: Any) -> kopf.ConnectionInfo:
        return _connection(access)

    return registry


def _connection(access: Access) -> kopf.ConnectionInfo:
    token = access.authorization().removeprefix("Bearer ") or None
    found: dict[str, Any] = {"server": access.server, "insecure": not access.verify}
    if access.ca is not None:
        found["ca_data"] = read_source(access.ca)
    if token is not None:
        found.update(scheme="Bearer", token=token)
    if access.certificate is not None:
        chain, key = access.certificate
        found.update(certificate_data=read_source(chain), private_key_data=read_source(key))
    return kopf.ConnectionInfo(**found)


def configure_logs(level: str) -> None:
    """JSON lines on standard output, kopf's and other libraries' too."""
    shared: list[Callable[..., Any]] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("tidegate").setLevel(level.upper())
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # warns of watches, which are many
    logging.getLogger("kopf").setLevel(logging.INFO if level == "debug" else logging.WARNING)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=lambda *_: logging.getLogger("tidegate"),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    configure_logs(options.log_level)
    try:
        access = access_of(options)
        operator = Operator(options, access)
    except (AccessError, OSError) as error:
        print(f"{error}; see --server, --kubeconfig and --listen", file=sys.stderr)
        return 1
    log.info("starting", identity=options.identity, server=access.server)
    kopf.run(
        registry=shell(operator, access),
        standalone=True,
        clusterwide=True,
    )
    log.info("stopped")
    return 0
