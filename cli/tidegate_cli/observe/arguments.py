"""The flags of `observe`, with the names that Hubble's users know. argparse only.

A filter may be given more than once; `--not` turns the one after it into one that leaves out.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from tidegate_cli.arguments import add_cluster, add_local, add_run_dir, number

KINDS = ("flows", "agent-events")
OUTPUTS = ("tab", "table", "compact", "dict", "json", "jsonpb")
TIME_FORMATS = (
    "StampMilli",
    "YearMonthDay",
    "YearMonthDayHour",
    "YearMonthDayHourMinute",
    "RFC3339",
    "RFC3339Milli",
    "RFC3339Micro",
    "RFC3339Nano",
    "RFC1123Z",
)

EVERYTHING = (1 << 63) - 1
"""A number of flows that no server holds."""

EITHER: tuple[str, ...] = (
    "pod",
    "ip",
    "port",
    "label",
    "identity",
    "service",
    "workload",
    "fqdn",
    "namespace",
)
EITHER += ("cluster",)
"""Filters of an end; each has a --from- and a --to- form."""


class Filter(NamedTuple):
    """One filter flag as it was given."""

    left_out: bool
    name: str
    """Without dashes: "from-pod"."""
    value: str


class _Filter(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, *_: Any
    ) -> None:
        found = getattr(namespace, "filters", None) or []
        left_out, namespace.negate = getattr(namespace, "negate", False), False
        text = self.const if self.nargs == 0 else str(value)
        namespace.filters = [*found, Filter(left_out, self.dest, text)]


class _Not(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any
    ) -> None:
        if getattr(namespace, "negate", False):
            parser.error("--not --not: one filter is left out once")
        namespace.negate = True


def add_parser(subparsers: Any, run: Any) -> None:
    text = "flows: who talked to whom, and which rule decided"
    parser = subparsers.add_parser(
        "observe",
        help=text,
        description=f"{text[0].upper()}{text[1:]}. Flags and forms are those of `hubble observe`. "
        "Without --first, --last, --since or --follow: the last 20.",
    )
    add_run_dir(parser)
    add_cluster(parser)
    add_local(parser)
    parser.set_defaults(run=run, filters=[], negate=False)
    parser.add_argument(
        "what",
        nargs="?",
        choices=KINDS,
        default=KINDS[0],
        help="agent-events: what changed on the nodes (default: flows)",
    )
    _which(parser.add_argument_group("which flows"))
    _tls(parser.add_argument_group("certificates for --server HOST:PORT"))
    _filters(parser.add_argument_group("filters"))
    _raw(parser.add_argument_group("filters as the API has them"))
    _form(parser.add_argument_group("output"))


def _count(text: str) -> int:
    return number(text, 0, EVERYTHING)


def _which(group: Any) -> None:
    add = group.add_argument
    ends = group.add_mutually_exclusive_group()
    ends.add_argument("--first", type=_count, metavar="N", help="the first N that are held")
    ends.add_argument("--last", type=_count, metavar="N", help="the last N")
    ends.add_argument("--all", action="store_true", help="every one that is held")
    add("--since", metavar="TIME", help="5m, 1h, or a time as RFC 3339 has it")
    add("--until", metavar="TIME", help="as --since")
    add("-f", "--follow", action="store_true", help="and those to come")
    add("--node", default=argparse.SUPPRESS, metavar="NAME", help="of this node only")
    add("--server", metavar="ADDR", help="ask this one: unix:///PATH, HOST:PORT, tls://HOST:PORT")
    add("--input-file", metavar="FILE", help="of what -o jsonpb wrote, no server's; -: stdin")


def _tls(group: Any) -> None:
    add = group.add_argument
    add("--tls", action="store_true", help="ask by TLS, as any of the others and tls:// say, too")
    add(
        "--tls-ca-cert-files",
        action="append",
        default=[],
        metavar="FILE,...",
        help="whose certificates the server must have (default: those of gRPC)",
    )
    add("--tls-client-cert-file", metavar="FILE", help="what to show it; needs the key, too")
    add("--tls-client-key-file", metavar="FILE", help="the key of that")
    add("--tls-server-name", default="", metavar="NAME", help="that its certificate has")


def _filters(group: Any) -> None:
    def add(*flags: str, help: str, metavar: str | None = None, const: str = "") -> None:
        dest = max(flags, key=len).lstrip("-")
        if metavar is None:
            group.add_argument(
                *flags,
                dest=dest,
                action=_Filter,
                nargs=0,
                const=const,
                help=help,
                default=argparse.SUPPRESS,
            )
        else:
            group.add_argument(
                *flags,
                dest=dest,
                action=_Filter,
                metavar=metavar,
                help=help,
                default=argparse.SUPPRESS,
            )

    group.add_argument("--not", action=_Not, nargs=0, help="leave out what the next filter names")
    words = {
        "pod": ("[NS/]PREFIX", "pods whose names begin so (namespace: default)"),
        "ip": ("IP[/N]", "an address or a network"),
        "port": ("PORT", "a port"),
        "label": ("SELECTOR", "labels: k8s:app=web, 'app in (a,b)', reserved:world"),
        "identity": ("N", "an identity: a number, or host, world, kube-apiserver, remote-node"),
        "service": ("[NS/]PREFIX", "Services whose names begin so"),
        "workload": ("[KIND/]NAME", "what made the pod"),
        "fqdn": ("PATTERN", "names of the DNS (none are known)"),
        "namespace": ("NS", "pods of a namespace; with --pod, the pods' namespace"),
        "cluster": ("NAME", "the end's cluster"),
    }
    short = {"label": ["-l"], "namespace": ["-n"]}
    for name in EITHER:
        metavar, text = words[name]
        add(*short.get(name, []), f"--{name}", metavar=metavar, help=f"either end: {text}")
        add(f"--from-{name}", metavar=metavar, help="of the source")
        add(f"--to-{name}", metavar=metavar, help="of the destination")
    group.add_argument(
        "-A", "--all-namespaces", action="store_true", help="pods without one: of any namespace"
    )
    for prefix in ("from", "to"):
        group.add_argument(
            f"--{prefix}-all-namespaces", action="store_true", help=f"the same of --{prefix}-pod"
        )
    add("--verdict", metavar="WORD", help="FORWARDED, DROPPED, AUDIT, …")
    add("--protocol", metavar="WORD", help="tcp, udp, icmp, icmpv4, icmpv6, sctp")
    add("-t", "--type", metavar="TYPE[:SUB]", help="drop, trace, policy-verdict, trace:to-stack, …")
    add("--drop-reason-desc", metavar="WORD", help="POLICY_DENIED, POLICY_DENY, …")
    add("--drop-reason", metavar="WORD", help="the same")
    add("--traffic-direction", metavar="WORD", help="ingress or egress")
    add("--tcp-flags", metavar="FLAGS", help="syn,ack: all of them set")
    add("-4", "--ipv4", help="IPv4 only", const="v4")
    add("-6", "--ipv6", help="IPv6 only", const="v6")
    add("--ip-version", metavar="V", help="v4, v6 or none")
    add("--reply", metavar="BOOL", help="true: replies (each event is told as its flow began)")
    add("--node-name", metavar="PATTERN", help="[CLUSTER/]NODE, with *")
    add("--node-label", metavar="SELECTOR", help="labels of the node (none are known)")
    add("--interface", metavar="NAME", help="name of the interface, on the node")
    add("--snat-ip", metavar="IP[/N]", help="an address that the source was given (none is known)")
    add("--uuid", metavar="ID", help="the one flow of this id")
    add("--trace-id", metavar="ID", help="of a trace (none are known)")
    add("--ip-trace-id", metavar="N", help="of an option of IP (none is seen)")
    add("--encrypted", help="sent encrypted between nodes (no flow is)", const="true")
    add("--unencrypted", help="sent as it is", const="true")
    for name in ("http-status", "http-method", "http-path", "http-url", "http-header"):
        add(f"--{name}", metavar="VALUE", help="of HTTP (none is seen)")
    add("--cel-expression", metavar="EXPR", help="of CEL, over _flow; see docs/observe.md")
    add("--dns-query", metavar="REGEX", help="of the DNS (none is seen)")


def _raw(group: Any) -> None:
    for name, text in (("allowlist", "to show"), ("denylist", "to leave out")):
        group.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="JSON",
            help=f"a FlowFilter of what {text}; may be repeated",
        )


def _form(group: Any) -> None:
    add = group.add_argument
    add(
        "-o",
        "--output",
        choices=OUTPUTS,
        default=argparse.SUPPRESS,
        help="tab (default), compact, dict, json (flows), jsonpb (responses)",
    )
    add(
        "--json",
        "-j",
        action="store_const",
        const="json",
        dest="output",
        default=argparse.SUPPRESS,
        help="as -o json",
    )
    add("--color", choices=("auto", "always", "never"), default="auto", help="default: auto")
    add("--time-format", choices=TIME_FORMATS, default="StampMilli", help="default: StampMilli")
    add("--print-node-name", action="store_true", help="show the node, too")
    add("--print-policy-names", action="store_true", help="they are shown anyway")
    add("--numeric", action="store_true", help="addresses, not names")
    add(
        "--ip-translation",
        nargs="?",
        choices=("true", "false"),
        default="true",
        const="true",
        help="false: as --numeric",
    )
    add(
        "--experimental-field-mask",
        default="",
        metavar="FIELDS",
        help="only these fields of flows, with commas between",
    )
    add("-s", "--silent-errors", action="store_true", help="say nothing of nodes and losses")
    add("--print-raw-filters", action="store_true", help="print the request's filters and end")
