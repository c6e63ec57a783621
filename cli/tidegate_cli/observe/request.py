"""Flags → GetFlowsRequest, combined as Hubble's command line combines them.

A filter without --from- or --to- means either end: the white list then has two messages, one for
the source and one for the destination; filters that name an end or none are in both.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime

from google.protobuf import json_format
from tidegate_observer.api import flow_pb2, observer_pb2
from tidegate_observer.messages import timestamp

from tidegate_cli.errors import CliError
from tidegate_cli.observe.arguments import EITHER, EVERYTHING, Filter

DEFAULT_COUNT = 20
UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3}
UNITS |= {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
IDENTITIES = {
    "host": 1,
    "world": 2,
    "unmanaged": 3,
    "health": 4,
    "init": 5,
    "remote-node": 6,
    "kube-apiserver": 7,
}
"""Numbers as the API has them."""
EVENT_TYPES = {"drop": 1, "debug": 2, "capture": 3, "trace": 4, "policy-verdict": 5}
EVENT_TYPES |= {"trace-sock": 6, "l7": 129}
TRACE_POINTS = {
    "to-endpoint": 0,
    "to-proxy": 1,
    "to-host": 2,
    "to-stack": 3,
    "to-overlay": 4,
    "from-endpoint": 5,
    "from-proxy": 6,
    "from-host": 7,
    "from-stack": 8,
    "from-overlay": 9,
    "from-network": 10,
    "to-network": 11,
    "from-crypto": 12,
    "to-crypto": 13,
}
FLAGS = ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR", "NS")

_FIELD = {
    "pod": "pod",
    "namespace": "pod",
    "ip": "ip",
    "port": "port",
    "label": "label",
    "identity": "identity",
    "service": "service",
    "workload": "workload",
    "fqdn": "fqdn",
    "cluster": "cluster_name",
}


class Sides:
    """One list of a request while it is made."""

    def __init__(self) -> None:
        self.left, self.right = flow_pb2.FlowFilter(), flow_pb2.FlowFilter()

    def messages(self) -> list[flow_pb2.FlowFilter]:
        """Without what filters nothing, and without a twin."""
        if self.left == self.right:
            return [self.left] if self.left.ByteSize() else []
        return [side for side in (self.left, self.right) if side.ByteSize()]


def build(args: argparse.Namespace, now: float | None = None) -> observer_pb2.GetFlowsRequest:
    """CliError: flags that make no sense."""
    now = time.time() if now is None else now
    if args.negate:
        raise CliError("--not: no filter follows it")
    white, black = lists(args.filters, everywhere=_everywhere(args))
    request = observer_pb2.GetFlowsRequest(
        whitelist=[*white.messages(), *_raw("allowlist", args.allowlist)],
        blacklist=[*black.messages(), *_raw("denylist", args.denylist)],
        follow=args.follow,
    )
    fields = [word.strip() for word in args.experimental_field_mask.split(",") if word.strip()]
    request.field_mask.paths.extend(fields)
    if not fields:
        request.ClearField("field_mask")
    for name in ("since", "until"):
        text = getattr(args, name)
        if text:
            getattr(request, name).CopyFrom(timestamp(parse_time(text, now)))
    # As for Hubble, none is as if it were not said.
    if args.first:
        if args.follow:
            raise CliError("--first and --follow exclude each other")
        request.number, request.first = args.first, True
    elif args.all:
        request.number = EVERYTHING
    elif args.last:
        request.number = args.last
    elif not args.since and not args.follow and not args.input_file:
        request.number = DEFAULT_COUNT
    return request


def _everywhere(args: argparse.Namespace) -> frozenset[str]:
    """Of --pod ("") , --from-pod, --to-pod: those whose pods without a namespace are any's."""
    given = {"from": args.from_all_namespaces, "to": args.to_all_namespaces}
    return frozenset(
        prefix for prefix in ("", "from", "to") if args.all_namespaces or given.get(prefix)
    )


def _raw(name: str, texts: Sequence[str]) -> list[flow_pb2.FlowFilter]:
    try:
        return [json_format.Parse(text, flow_pb2.FlowFilter()) for text in texts]
    except json_format.ParseError as error:
        raise CliError(f"--{name}: {error}", '{"verdict":["DROPPED"]}') from None


def lists(
    filters: Sequence[Filter], *, everywhere: frozenset[str] = frozenset()
) -> tuple[Sides, Sides]:
    """(white, black)."""
    made = Sides(), Sides()
    for left_out in (False, True):
        of_list = [item for item in filters if item.left_out == left_out]
        for item in _with_namespaces(of_list, everywhere):
            _add(made[left_out], item)
    return made


def _with_namespaces(filters: Sequence[Filter], everywhere: frozenset[str]) -> list[Filter]:
    """Namespaces joined to the pods beside them: "shop" and "web" are "shop/web", and "shop" alone
    "shop/", every pod of it."""
    found = []
    for item in filters:
        prefix, kind = _split(item.name)
        if kind == "namespace":
            if not any(_split(o.name) == (prefix, "pod") for o in filters):
                found.append(item._replace(value=f"{item.value}/"))
        elif kind in ("pod", "service") and "/" not in item.value:
            spaces = [o.value for o in filters if _split(o.name) == (prefix, "namespace")]
            spaces = spaces or ([""] if prefix in everywhere else ["default"])
            found += [item._replace(value=f"{space}/{item.value}") for space in spaces]
        else:
            found.append(item)
    return found


def _split(name: str) -> tuple[str, str]:
    for prefix in ("from", "to"):
        if name.startswith(f"{prefix}-") and name[len(prefix) + 1 :] in EITHER:
            return prefix, name[len(prefix) + 1 :]
    return "", name


def _add(sides: Sides, item: Filter) -> None:
    prefix, kind = _split(item.name)
    if kind in _FIELD:
        field = _FIELD[kind]
        value = _value(field, item.value)
        if prefix == "":
            getattr(sides.left, f"source_{field}").append(value)
            getattr(sides.right, f"destination_{field}").append(value)
        else:
            end = "source" if prefix == "from" else "destination"
            for side in (sides.left, sides.right):
                getattr(side, f"{end}_{field}").append(value)
        return
    for side in (sides.left, sides.right):
        _common(side, kind, item.value)


def _value(field: str, text: str) -> object:
    if field == "identity":
        known = IDENTITIES.get(text.removeprefix("reserved:"))
        if known is None and not re.fullmatch(r"\d{1,9}", text):
            raise CliError(f"not an identity: {text!r}", f"a number, or {', '.join(IDENTITIES)}")
        return int(text) if known is None else known
    if field == "workload":
        kind, _, name = text.rpartition("/")
        return flow_pb2.Workload(kind=kind, name=name)
    return text


def _enum(flag: str, kind: object, text: str) -> int:
    values: dict[str, int] = dict(kind.items())  # type: ignore[attr-defined]
    word = text.upper().replace("-", "_").replace(" ", "_")
    if word not in values:
        raise CliError(f"--{flag}: {text!r} is none of {', '.join(values)}")
    return values[word]


def _common(side: flow_pb2.FlowFilter, name: str, text: str) -> None:
    """A filter that is of no end."""
    match name:
        case "verdict":
            side.verdict.append(_enum(name, flow_pb2.Verdict, text))  # type: ignore[arg-type]
        case "protocol":
            side.protocol.append(text.lower())
        case "type":
            side.event_type.append(_event_type(text))
        case "drop-reason" | "drop-reason-desc":
            side.drop_reason_desc.append(
                _enum(name, flow_pb2.DropReason, text)  # type: ignore[arg-type]
            )
        case "traffic-direction":
            side.traffic_direction.append(
                _enum(name, flow_pb2.TrafficDirection, text)  # type: ignore[arg-type]
            )
        case "tcp-flags":
            words = [word.strip().upper() for word in text.split(",")]
            if not set(words) <= set(FLAGS):
                raise CliError(f"--tcp-flags: {text!r}", f"of {', '.join(FLAGS)}")
            side.tcp_flags.append(flow_pb2.TCPFlags(**dict.fromkeys(words, True)))
        case "ipv4" | "ipv6" | "ip-version":
            versions = {"v4": flow_pb2.IPv4, "4": flow_pb2.IPv4, "v6": flow_pb2.IPv6}
            versions |= {"6": flow_pb2.IPv6, "none": flow_pb2.IP_NOT_USED}
            if text.lower() not in versions:
                raise CliError(f"--ip-version: {text!r} is none of v4, v6, none")
            side.ip_version.append(versions[text.lower()])
        case "reply":
            if text.lower() not in ("true", "false"):
                raise CliError(f"--reply: {text!r} is neither true nor false")
            side.reply.append(text.lower() == "true")
        case "node-name":
            side.node_name.append(text)
        case "node-label":
            side.node_labels.append(text)
        case "interface":
            side.interface.add(name=text)
        case "snat-ip":
            side.source_ip_xlated.append(text)
        case "uuid":
            side.uuid.append(text)
        case "ip-trace-id":
            if not re.fullmatch(r"\d{1,19}", text):
                raise CliError(f"--ip-trace-id: {text!r} is no number")
            side.ip_trace_id.append(int(text))
        case "encrypted" | "unencrypted":
            side.encrypted.append(name == "encrypted")
        case "trace-id":
            side.trace_id.append(text)
        case "cel-expression":
            side.experimental.cel_expression.append(text)
        case "dns-query":
            side.dns_query.append(text)
        case _:
            _http(side, name, text)


def _http(side: flow_pb2.FlowFilter, name: str, text: str) -> None:
    match name:
        case "http-status":
            side.http_status_code.append(text)
        case "http-method":
            side.http_method.append(text)
        case "http-path":
            side.http_path.append(text)
        case "http-url":
            side.http_url.append(text)
        case "http-header":
            key, _, value = text.partition(":")
            side.http_header.add(key=key.strip(), value=value.strip())
        case _:
            raise CliError(f"--{name} is not known")


def _event_type(text: str) -> flow_pb2.EventTypeFilter:
    word, colon, sub = text.partition(":")
    if word not in EVENT_TYPES:
        raise CliError(f"--type: {word!r} is none of {', '.join(EVENT_TYPES)}")
    made = flow_pb2.EventTypeFilter(type=EVENT_TYPES[word])
    if colon:
        if sub.isdigit():
            made.sub_type = int(sub)
        elif word == "trace" and sub in TRACE_POINTS:
            made.sub_type = TRACE_POINTS[sub]
        elif word == "drop":
            made.sub_type = _enum("type", flow_pb2.DropReason, sub)
        else:
            raise CliError(f"--type: {word} has no {sub!r}")
        made.match_sub_type = True
    return made


def parse_time(text: str, now: float) -> int:
    """Nanoseconds since 1970 of "5m" (ago), "1h30m", or a time as RFC 3339 or RFC 1123 (with the
    zone in digits) have it. CliError."""
    if text == "now":
        return int(now * 10**9)
    parts = re.findall(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|[smhd])", text)
    if parts and "".join(a + b for a, b in parts) == text:
        ago = sum(float(number) * UNITS[unit] for number, unit in parts)
        return max(0, int((now - ago) * 10**9))
    # Of nine digits Python would take six, and refuses others than three or six.
    text = re.sub(r"(\.\d{6})\d{1,3}(?=Z|[+-]|$)", r"\1", text)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        try:
            found = parsedate_to_datetime(text)
        except ValueError:
            raise CliError(f"not a time: {text!r}", "5m, 1h30m, 2024-05-01T10:00:00Z") from None
    if found.tzinfo is None:
        found = found.astimezone()
    return max(0, int(found.timestamp() * 10**6) * 1000)
