"""`tidegate trace`: which packets the programs tell of one by one. Writes the one map that says so;
what it asks for ends by itself.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from typing import Any

from tidegate_api.base import IDENTITY_BITS
from tidegate_bpf import Codec
from tidegate_loader import addresses

from tidegate_cli.errors import CliError
from tidegate_cli.lists import by_node, gather
from tidegate_cli.live import ZERO, NodeView
from tidegate_cli.lookup import PROTOCOLS
from tidegate_cli.target import choose

FILTER = "trace_filter_v1"
MAX_SECONDS = 3600
MAX_IDENTITY = (1 << IDENTITY_BITS) - 1
HEADER = ("SECONDS LEFT", "ADDRESSES", "IDENTITY", "PORT", "PROTOCOL")
PROTOCOL_NUMBERS = {name.lower(): number for name, number in PROTOCOLS.items()}


def start(args: argparse.Namespace) -> int:
    """Exit code."""
    if not 1 <= args.seconds <= MAX_SECONDS:
        raise CliError(f"--for {args.seconds}: not from 1 to {MAX_SECONDS} seconds", "ask again")
    if args.protocol is not None and args.protocol not in PROTOCOL_NUMBERS:
        known = ", ".join(sorted(PROTOCOL_NUMBERS))
        raise CliError(f"--protocol {args.protocol}: not known", f"one of {known}")
    if args.port is not None and not 1 <= args.port <= 0xFFFF:
        raise CliError(f"--port {args.port}: not a port", "from 1 to 65535")
    if args.identity is not None and not 1 <= args.identity <= MAX_IDENTITY:
        text = f"--identity {args.identity}: not an identity"
        raise CliError(text, f"from 1 to {MAX_IDENTITY}; `tidegate identity list` has them")
    if (args.pod, args.ip, args.identity, args.port, args.protocol) == (None,) * 5:
        raise CliError("every packet would be told of", "name a pod, an address, a port …")
    wanted = _addresses(args.ip) if args.ip is not None else []

    def read(view: NodeView) -> list[dict[str, Any]]:
        ends = wanted
        if args.pod is not None:
            ends = [
                raw
                for e in view.maps.endpoints()
                if view.pod_name(e.row.id) == args.pod
                for raw in (e.row.ip4, e.row.ip6)
                if raw != addresses.ZERO
            ]
            if not ends:  # It lives elsewhere.
                return []
        _write(view, args, ends)
        return _shown(view)

    words = ["--for", str(args.seconds)]
    for name in ("pod", "ip", "identity", "port", "protocol"):
        value = getattr(args, name)
        words += [f"--{name}", str(value)] if value is not None else []
    return _answer(args, read, words)


def stop(args: argparse.Namespace) -> int:
    """Exit code."""

    def read(view: NodeView) -> list[dict[str, Any]]:
        opened = view.maps.map(FILTER)
        opened.update(ZERO, bytes(opened.info.value_size))
        return _shown(view)

    return _answer(args, read)


def show(args: argparse.Namespace) -> int:
    """Exit code."""
    return _answer(args, _shown)


def _answer(args: argparse.Namespace, read: Any, words: Sequence[str] = ()) -> int:
    found, code = gather(choose(args), args, read, *words)
    by_node(args, found, HEADER, _cells)
    pod = getattr(args, "pod", None)
    if args.verb == "start" and pod is not None and not any(found.values()):
        raise CliError(f"no pod {pod} on the nodes that were asked", "give NAMESPACE/NAME")
    return code


def _cells(rows: Any) -> Iterable[Sequence[object]]:
    for row in rows:
        ends = ",".join(row["addresses"]) or "-"
        yield (
            row["secondsLeft"],
            ends,
            *(row[n] or "-" for n in ("identity", "port", "protocol")),
        )


def _addresses(text: str) -> list[bytes]:
    try:
        return [addresses.pack(text)]
    except ValueError as error:
        raise CliError(f"--ip {text}: not an address", "one address, IPv4 or IPv6") from error


def _codec(view: NodeView) -> Codec:
    return Codec(view.maps.spec.layout("tg_trace_filter"))


def _write(view: NodeView, args: argparse.Namespace, ends: Sequence[bytes]) -> None:
    value = _codec(view).pack(
        until=time.monotonic_ns() + args.seconds * 10**9,
        ip4=next((end for end in ends if addresses.is_v4(end)), addresses.ZERO),
        ip6=next((end for end in ends if not addresses.is_v4(end)), addresses.ZERO),
        identity=args.identity or 0,
        port=args.port or 0,
        protocol=PROTOCOL_NUMBERS[args.protocol] if args.protocol else 0,
    )
    view.maps.map(FILTER).update(ZERO, value)


def _shown(view: NodeView) -> list[dict[str, Any]]:
    """What is traced now: one row, or none."""
    row = _codec(view).unpack(view.maps.map(FILTER).lookup(ZERO))
    left = row.until - time.monotonic_ns()
    if left <= 0:
        return []
    names = {number: name for name, number in PROTOCOLS.items()}
    return [
        {
            "secondsLeft": left // 10**9,
            "addresses": [addresses.text(a) for a in (row.ip4, row.ip6) if a != addresses.ZERO],
            "identity": row.identity,
            "port": row.port,
            "protocol": names.get(row.protocol, ""),
        }
    ]
