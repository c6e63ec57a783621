"""The relay's process."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from tidegate_observer.main import own_version
from tidegate_observer.relay import RelayService
from tidegate_observer.server import Server


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tidegate-relay", description="Serve the flows of many observers as one, by time."
    )
    made.add_argument(
        "--peer",
        type=_peer,
        action="append",
        required=True,
        metavar="NAME=ADDR",
        help="an observer: unix:PATH or HOST:PORT",
    )
    made.add_argument("--socket", type=Path, required=True, help="Unix socket to serve on")
    made.add_argument("--listen", default="", metavar="HOST:PORT", help="serve there, too")
    return made


def _peer(text: str) -> tuple[str, str]:
    name, equals, address = text.partition("=")
    if not (name and equals and address):
        raise argparse.ArgumentTypeError("is NAME=ADDR")
    return name, address


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    addresses = [f"unix:{args.socket}", *([args.listen] if args.listen else [])]
    try:
        with Server(RelayService(dict(args.peer), own_version()), addresses):
            stop.wait()
    except OSError as error:
        print(f"tidegate-relay: {error}", file=sys.stderr)
        return 1
    finally:
        args.socket.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
