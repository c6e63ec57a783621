"""The loader's process: wait for a change, make the kernel equal to the state, say so.

    python -m tidegate_loader --node NAME --run-dir DIR --pin-dir DIR --objects DIR

Nothing is decided here but when to do what; see `source`, `maps`, `plan`, `apply`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tidegate_bpf import BpfError, netns

from tidegate_loader import attach, cni, log
from tidegate_loader.loader import Loader
from tidegate_loader.local import NodePaths, leave
from tidegate_loader.source import Source

if TYPE_CHECKING:
    from tidegate_loader.mirror import Mirror

VERIFY_SECONDS = 30.0
"""How often everything is read back and compared."""
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where the kubelet mounts it."""
RETRY_FIRST, RETRY_LAST = 0.1, 5.0
"""Seconds until a failed apply is tried again: doubled up to the last."""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tidegate-loader",
        description="Make this node's eBPF maps equal to its desired state, and keep them so.",
    )
    parser.add_argument(
        "--node",
        default=os.environ.get("NODE_NAME") or None,
        help="name of this node's NodeState (default: $NODE_NAME)",
    )
    parser.add_argument("--run-dir", required=True, type=Path, help="where objects/ and nodes/ are")
    parser.add_argument("--pin-dir", required=True, type=Path, help="directory on a bpffs")
    parser.add_argument(
        "--objects", required=True, type=Path, help="where pod.o, sock.o, net.o and xdp.o are"
    )
    parser.add_argument("--netns", type=Path, help="the node's network namespace")
    parser.add_argument(
        "--cgroup",
        type=Path,
        help="cgroup2 directory of the node's pods; auto: the top of the cgroup2 mount",
    )
    parser.add_argument("--cni-socket", type=Path, help="where the CNI step says what pods come")
    parser.add_argument("--kube", action="store_true", help="take objects/ from the API server")
    parser.add_argument(
        "--server-file",
        type=Path,
        help="file with the API server's URL (default: $KUBERNETES_SERVICE_HOST and _PORT)",
    )
    parser.add_argument(
        "--service-account",
        type=Path,
        default=SERVICE_ACCOUNT,
        help="directory with token and ca.crt (default: %(default)s)",
    )
    parser.add_argument("--force-clsact", action="store_true", help="do not use tcx links")
    parser.add_argument(
        "--no-flow-events",
        dest="flow_events",
        action="store_false",
        help="count no flows, and tell of denials only",
    )
    parser.add_argument(
        "--load-balancer-mode",
        choices=("snat", "dsr"),
        default="snat",
        help="how a client outside reaches a backend on another node: with this node's address, or "
        "with its own and answered from there; the same on every node (default: %(default)s)",
    )
    parser.add_argument(
        "--load-balancer-acceleration",
        choices=("disabled", "native", "best-effort"),
        default="disabled",
        help="XDP at the uplinks: in the driver only, or where it cannot in the kernel's generic "
        "way (default: %(default)s)",
    )
    parser.add_argument("--once", action="store_true", help="apply once; exit 1 if not realised")
    parser.add_argument("--detach", action="store_true", help="remove everything of this node")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning"))
    found = parser.parse_args(argv)
    if not found.node:
        parser.error("name the node: --node, or NODE_NAME in the environment")
    if found.kube and (found.once or found.detach):
        parser.error("--kube is for a loader that stays; --once and --detach work from the disk")
    return found


class _Signals:
    """SIGTERM and SIGINT stop, SIGUSR1 asks for a read-back."""

    def __init__(self) -> None:
        self.stop = False
        self.verify = False
        self.wake_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def poke(self) -> None:
        """Wake the loop, from any thread."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._write_fd, b"\0")

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.verify = True
        else:
            self.stop = True


def _run(loader: Loader, paths: NodePaths, signals: _Signals, turned: Callable[[], None]) -> None:
    loader.cycle()
    # Imported when the state is in force: what a start imports delays it.
    from tidegate_loader.watch import Watch  # noqa: PLC0415

    watch = Watch(paths, signals.wake_fd)
    retry = RETRY_FIRST
    loader.cycle()  # for what came before there was a watch
    verified = time.monotonic()
    while not signals.stop:
        turned()
        due = verified + VERIFY_SECONDS - time.monotonic()
        unsettled = loader.dirty or loader.waiting or loader.leaving
        changed = watch.wait(max(0.0, min(due, retry) if unsettled else due))
        if signals.stop:
            break
        if signals.verify or time.monotonic() >= verified + VERIFY_SECONDS:
            signals.verify, verified = False, time.monotonic()
            loader.verify()
        elif changed or unsettled or loader.leaving:
            loader.cycle()
        retry = RETRY_FIRST if changed else min(retry * 2, RETRY_LAST)
    watch.close()


def _serve(
    options: argparse.Namespace,
    paths: NodePaths,
    logger: Any,
    stack: contextlib.ExitStack,
    api: Mirror | None,
) -> bool:
    """Until a signal ends it. Whether the node was detached at the end."""
    signals = _Signals()
    arrivals = None
    if options.cni_socket is not None:
        # Before the programs are there: pods may ask and wait.
        trouble = api.trouble if api is not None else str
        arrivals = cni.Server(options.cni_socket, paths.interfaces, signals.poke, trouble)
        arrivals.start()
        stack.callback(arrivals.close)
    loader = Loader(paths, options, logger, arrivals, api)
    stack.callback(loader.close)

    def turned() -> None:
        if arrivals is not None and (api is None or api.alive):
            arrivals.turned()

    _run(loader, paths, signals, turned)
    return loader.detached


def _mirror(
    options: argparse.Namespace, paths: NodePaths, logger: Any, stack: contextlib.ExitStack
) -> Mirror:
    """Started: its threads stay in the network namespace that the API server is reached from.
    OSError: nobody says where that is, or who we are."""
    # TLS and HTTP take longer to import than all the rest: only where they are used.
    from tidegate_kube import AccessError, Client, in_cluster  # noqa: PLC0415

    from tidegate_loader.mirror import Mirror  # noqa: PLC0415

    server = None
    if options.server_file is not None:
        server = options.server_file.read_text().strip()
    try:
        client = Client(in_cluster(server, options.service_account), "tidegate-loader")
    except AccessError as error:
        raise OSError(str(error)) from error
    found = Mirror(client, paths, options.node, logger)
    found.start()
    stack.callback(found.close)
    return found


def _hint() -> str:
    """What a kernel's refusal does not say: which capability it was about."""
    from tidegate_bpf import features  # noqa: PLC0415

    found = features.capabilities()
    return "" if found.ok else f" ({found.detail}; {found.remedy})"


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments(argv)
    # Cycles are few and small here, a hundred thousand addresses are neither.
    gc.set_threshold(100_000, 50, 1000)
    gc.enable()
    logger = log.logger(options.node, options.log_level)
    paths = NodePaths(options.run_dir, options.node)
    with contextlib.ExitStack() as stack:
        try:
            api = _mirror(options, paths, logger, stack) if options.kube else None
            if options.netns is not None:
                stack.enter_context(netns.inside(options.netns))
            paths.interfaces.mkdir(parents=True, exist_ok=True)
            if options.detach:
                interfaces, _ = Source(paths, options.node).interfaces()
                attach.detach(options.pin_dir, [i.ifindex for i in interfaces.values()])
                return 0
            if options.once:
                loader = Loader(paths, options, logger)
                stack.callback(loader.close)
                loader.cycle()
                return 0 if loader.realised_now else 1
            detached = _serve(options, paths, logger, stack, api)
        except (BpfError, OSError) as error:
            print(f"tidegate-loader: {error}{_hint()}", file=sys.stderr)
            return 1
    if detached and options.kube:
        leave(paths)
        logger.info("stopped, nothing is left")
    else:
        logger.info("stopped, everything stays in force")
    return 0
