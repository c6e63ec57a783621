"""`tidegate observe agent-events`: what is asked, and how it is printed."""

from __future__ import annotations

import io
import json

import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.wrappers_pb2 import UInt32Value
from tidegate_cli.errors import CliError
from tidegate_cli.main import build_parser
from tidegate_cli.observe import agent
from tidegate_observer.api import flow_pb2, observer_pb2

NOW = 10_000.0
ROWS = [
    ("", {"number": "20"}),
    ("--last 5", {"number": "5"}),
    ("--first 5", {"number": "5", "first": True}),
    ("-f --since 1h", {"follow": True, "since": "1970-01-01T01:46:40Z"}),
]


@pytest.mark.parametrize(("words", "expected"), ROWS, ids=[row[0] or "nothing" for row in ROWS])
def test_requests(words: str, expected: dict[str, object]) -> None:
    args = build_parser().parse_args(["observe", "agent-events", *words.split()])
    made = agent.build(args, NOW)
    assert MessageToDict(made, preserving_proto_field_name=True) == expected


@pytest.mark.parametrize("words", ["--verdict DROPPED", "--allowlist {}", "--first 1 --follow"])
def test_refused(words: str) -> None:
    args = build_parser().parse_args(["observe", "agent-events", *words.split()])
    with pytest.raises(CliError):
        agent.build(args, NOW)


RESPONSE = observer_pb2.GetAgentEventsResponse(
    node_name="n\x1b1",
    time={"seconds": 6, "nanos": 7_000_000},
    agent_event=flow_pb2.AgentEvent(
        type=flow_pb2.IPCACHE_UPSERTED,
        ipcache_update=flow_pb2.IPCacheNotification(
            cidr="10.0.0.1/32", identity=300, old_identity=UInt32Value(value=2), pod_name="web"
        ),
    ),
)
TOLD = "cidr: 10.0.0.1/32, identity: 300, old identity: 2, pod name: web"
NODE = "n\\x1b1"
FORMS = {
    "compact": f"Jan  1 00:00:06.007 [n\\x1b1]: IPCACHE_UPSERTED ({TOLD})\n",
    "dict": "  TIMESTAMP: Jan  1 00:00:06.007\n       NODE: n\\x1b1\n"
    f"       TYPE: IPCACHE_UPSERTED\n    DETAILS: {TOLD}\n",
    "tab": f"{'TIMESTAMP':<20}   {'NODE':<20}   {'TYPE':<28}   DETAILS\n"
    f"{'Jan  1 00:00:06.007':<20}   {NODE:<20}   {'IPCACHE_UPSERTED':<28}   {TOLD}\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    out = io.StringIO()
    agent.write(RESPONSE, form, "StampMilli", out, 0)
    assert out.getvalue() == FORMS[form]


def test_json_is_the_response() -> None:
    out = io.StringIO()
    agent.write(RESPONSE, "jsonpb", "StampMilli", out, 0)
    made = json.loads(out.getvalue())
    assert made["agent_event"]["ipcache_update"]["cidr"] == "10.0.0.1/32"


def test_a_services_address_is_one_word() -> None:
    address = flow_pb2.ServiceUpsertNotificationAddr(ip="fd00::1", port=80)
    made = flow_pb2.ServiceUpsertNotification(id=4, frontend_address=address, name="web")
    event = flow_pb2.AgentEvent(type=flow_pb2.SERVICE_UPSERTED, service_upsert=made)
    assert agent.details(event) == "id: 4, frontend address: [fd00::1]:80, name: web"
