"""The relay's process."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import structlog

from tidegate_observer.client import Client
from tidegate_observer.main import log_to_stderr, own_version
from tidegate_observer.peers import PeerService
from tidegate_observer.relay import Peers, RelayService
from tidegate_observer.server import Server
from tidegate_observer.tls import OBSERVER_NAME, Certificates

LOOK_SECONDS = 1.0

log = structlog.get_logger()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tidegate-relay", description="Serve the flows of many observers as one, by time."
    )
    add = made.add_argument
    add(
        "--peer",
        type=_peer,
        action="append",
        default=[],
        metavar="NAME=ADDR",
        help="an observer: unix:PATH or HOST:PORT",
    )
    add(
        "--peer-service",
        default="",
        metavar="ADDR",
        help="ask there, at any observer, which there are",
    )
    add("--peer-tls", type=Path, metavar="DIR", help="what to show them: tls.crt, tls.key, ca.crt")
    add("--socket", type=Path, required=True, help="Unix socket to serve on")
    add("--listen", default="", metavar="HOST:PORT", help="serve there, too; needs --tls")
    add("--tls", type=Path, metavar="DIR", help="the relay's own tls.crt and tls.key, and ca.crt")
    return made


def _peer(text: str) -> tuple[str, str]:
    name, equals, address = text.partition("=")
    if not (name and equals and address):
        raise argparse.ArgumentTypeError("is NAME=ADDR")
    return name, address


def _run(args: argparse.Namespace, stop: threading.Event, stack: contextlib.ExitStack) -> None:
    shown = Certificates(args.peer_tls) if args.peer_tls is not None else None
    own = Certificates(args.tls) if args.tls is not None else None

    def connect(address: str) -> Client:
        return Client(address, None if address.startswith("unix:") else shown, OBSERVER_NAME)

    fixed = dict(args.peer)
    peers: Peers = fixed.copy
    if args.peer_service:
        service = PeerService(args.peer_service, connect)
        service.start()
        stack.callback(service.close)
        peers = service
    relay = RelayService(peers, own_version(), connect)
    addresses = [f"unix:{args.socket}", *([args.listen] if args.listen else [])]
    stack.callback(args.socket.unlink, missing_ok=True)
    with Server(relay, addresses, own):
        log.info("serving", addresses=addresses)
        while not stop.wait(LOOK_SECONDS):
            relay.streams.cut_stuck()


def main(argv: Sequence[str] | None = None) -> int:
    made = parser()
    args = made.parse_args(argv)
    if bool(args.peer) == bool(args.peer_service):
        made.error("either --peer or --peer-service")
    log_to_stderr()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with contextlib.ExitStack() as stack:
        try:
            _run(args, stop, stack)
        except OSError as error:
            log.error("cannot go on", error=str(error))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
