"""`tidegate observe agent-events`: what changed on nodes, in the forms that flows have."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, TextIO

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from tidegate_observer.api import flow_pb2, observer_pb2

from tidegate_cli.errors import CliError
from tidegate_cli.observe import request
from tidegate_cli.observe.printer import json_line, safe, time_text

HEADER = ("TIMESTAMP", "NODE", "TYPE", "DETAILS")


def build(args: argparse.Namespace, now: float | None = None) -> observer_pb2.GetAgentEventsRequest:
    """CliError: flags that make no sense, or that agent events have not."""
    if args.filters or args.allowlist or args.denylist or args.experimental_field_mask:
        raise CliError(
            "agent events have no filters", "--last, --since, --node and --follow choose"
        )
    if args.input_file:
        raise CliError("agent events are not read from files")
    flows = request.build(args, now)
    made = observer_pb2.GetAgentEventsRequest(
        number=flows.number, follow=flows.follow, first=flows.first
    )
    for name in ("since", "until"):
        if flows.HasField(name):
            getattr(made, name).CopyFrom(getattr(flows, name))
    return made


def write(
    response: observer_pb2.GetAgentEventsResponse,
    form: str,
    time_format: str,
    out: TextIO,
    nth: int,
) -> None:
    """One response; `nth`: how many were written before it."""
    if form in ("json", "jsonpb"):
        out.write(json_line(response))
        return
    event = response.agent_event
    cells = (
        time_text(time_format, response.time.seconds, response.time.nanos),
        safe(response.node_name),
        flow_pb2.AgentEventType.Name(event.type),
        safe(details(event)),
    )
    if form == "compact":
        out.write(f"{cells[0]} [{cells[1]}]: {cells[2]} ({cells[3]})\n")
    elif form == "dict":
        out.write("------------\n" if nth else "")
        out.writelines(f"{name:>11}: {cell}\n" for name, cell in zip(HEADER, cells, strict=True))
    else:
        rows = [cells] if nth else [HEADER, cells]
        out.writelines(f"{a:<20}   {b:<20}   {c:<28}   {d}\n" for a, b, c, d in rows)


def details(event: flow_pb2.AgentEvent) -> str:
    """What is said of it, field by field."""
    which = event.WhichOneof("notification")
    return ", ".join(_fields(getattr(event, which))) if which else ""


def _fields(message: Message) -> Iterator[str]:
    for field, value in message.ListFields():
        name = field.name.replace("_", " ")
        values = list(value) if field.is_repeated else [value]
        yield f"{name}: {' '.join(map(_text, values))}"


def _text(value: Any) -> str:
    if isinstance(value, Timestamp):
        return time_text("RFC3339Milli", value.seconds, value.nanos)
    if isinstance(value, flow_pb2.ServiceUpsertNotificationAddr):
        return f"[{value.ip}]:{value.port}" if ":" in value.ip else f"{value.ip}:{value.port}"
    if isinstance(value, Message):  # a number that may be absent
        return str(getattr(value, "value", ""))
    return str(value)
