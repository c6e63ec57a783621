"""`tidegate observe --input-file`: flows that `-o jsonpb` (or `json`) wrote, filtered as a server
would."""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from tidegate_observer import filters
from tidegate_observer.api import flow_pb2, observer_pb2
from tidegate_observer.told import told

from tidegate_cli.errors import CliError
from tidegate_cli.observe.arguments import EVERYTHING

Response = observer_pb2.GetFlowsResponse
STDIN = "-"


def check(args: argparse.Namespace) -> None:
    """CliError: flags that go with a server only."""
    for name in ("follow", "server", "experimental_field_mask"):
        if getattr(args, name, None):
            raise CliError(f"--input-file does not go with --{name.replace('_', '-')}")


def responses(path: str, request: observer_pb2.GetFlowsRequest) -> Iterator[Response]:
    """Those of the file's flows that the request asks for, in the file's order, and what else it
    tells (losses), unless so many are asked for. CliError."""
    found = _wanted(path, _read(path), request)
    if request.number in (0, EVERYTHING):
        return found
    flows = (response for response in found if response.HasField("flow"))
    if request.first:
        return islice(flows, request.number)
    return iter(deque(flows, maxlen=request.number))


def _read(path: str) -> Iterator[str]:
    try:
        if path == STDIN:
            yield from sys.stdin
            return
        with Path(path).open(encoding="utf-8") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"--input-file: {path}: {error}") from None


def _wanted(
    path: str, lines: Iterable[str], request: observer_pb2.GetFlowsRequest
) -> Iterator[Response]:
    chosen = bool(request.whitelist or request.blacklist)
    try:
        white, uuids = filters.split_uuids(request.whitelist)
        test = filters.build(white, request.blacklist)
    except filters.FilterError as error:
        raise CliError(str(error)) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            response = _parse(line)
            if response is None or not _in_time(response, request):
                continue
            asked = not (chosen and response.HasField("flow")) or (
                (uuids is None or response.flow.uuid in uuids) and test(told(response.flow))
            )
        except (ValueError, json_format.ParseError, filters.CostlyError) as error:
            raise CliError(f"{path}:{number}: {error}") from None
        if asked:
            yield response


def _parse(line: str) -> Response | None:
    """None: an event that is no flow. ValueError, ParseError."""
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    if found.keys() & {"agent_event", "agentEvent", "debug_event", "debugEvent"}:
        return None
    if found.keys() & {"flow", "node_status", "nodeStatus", "lost_events", "lostEvents"}:
        return json_format.ParseDict(found, Response())
    flow = json_format.ParseDict(found, flow_pb2.Flow())
    return Response(flow=flow, node_name=flow.node_name, time=flow.time)


def _in_time(response: Any, request: observer_pb2.GetFlowsRequest) -> bool:
    time = response.time.ToNanoseconds()
    if request.HasField("since") and time < request.since.ToNanoseconds():
        return False
    return not (request.HasField("until") and time > request.until.ToNanoseconds())
