"""`observe` prints what Hubble's users know, and nothing that a terminal obeys."""

from __future__ import annotations

import io
import json

import pytest
from google.protobuf.json_format import Parse
from tidegate_cli.observe.arguments import TIME_FORMATS
from tidegate_cli.observe.printer import Printer, safe, time_text
from tidegate_observer.api import flow_pb2, observer_pb2
from tidegate_observer.messages import flow_message
from unit.observer.flows import flow

DROP = """{"flow":{"time":"1970-01-01T00:20:34.567800Z","verdict":"DROPPED",
"IP":{"source":"1.1.1.1","destination":"2.2.2.2"},
"l4":{"TCP":{"source_port":31793,"destination_port":8080}},"source":{"identity":4},
"destination":{"identity":12345},"Type":"L3_L4","node_name":"k8s1",
"event_type":{"type":1,"sub_type":133},"is_reply":false,"Summary":"TCP Flags: SYN"}}"""
BEGIN = "Jan  1 00:20:34.567 [k8s1]: 1.1.1.1:31793 (health) -> 2.2.2.2:8080 (ID:12345)"


def response(**changes: object) -> observer_pb2.GetFlowsResponse:
    made = Parse(DROP, observer_pb2.GetFlowsResponse())
    made.flow.MergeFrom(flow_pb2.Flow(**changes))  # type: ignore[arg-type]
    return made


def printed(form: str, *responses: observer_pb2.GetFlowsResponse, **options: bool) -> str:
    out = io.StringIO()
    printer = Printer(form, out, nodes=options.pop("nodes", True), **options)
    for item in responses:
        printer.write(item)
    printer.close()
    return out.getvalue()


POLICY = flow_pb2.Policy(name="my-policy", kind="CiliumNetworkPolicy")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, f"{BEGIN} Policy denied DROPPED (TCP Flags: SYN)"),
        (
            {
                "event_type": flow_pb2.CiliumEventType(type=5),
                "traffic_direction": flow_pb2.EGRESS,
                "egress_denied_by": [POLICY],
            },
            f"{BEGIN} policy-verdict:none EGRESS DENIED BY my-policy (CiliumNetworkPolicy) "
            "(TCP Flags: SYN)",
        ),
        (
            {
                "event_type": flow_pb2.CiliumEventType(type=5),
                "verdict": flow_pb2.FORWARDED,
                "traffic_direction": flow_pb2.INGRESS,
                "policy_match_type": 1,
                "ingress_allowed_by": [POLICY],
            },
            f"{BEGIN} policy-verdict:L3-Only INGRESS ALLOWED BY my-policy (CiliumNetworkPolicy) "
            "(TCP Flags: SYN)",
        ),
    ],
)
def test_compact(changes: dict[str, object], expected: str) -> None:
    assert printed("compact", response(**changes)) == expected + "\n"


def test_compact_of_replies_and_of_what_does_not_say() -> None:
    reply, unknown = response(), response()
    reply.flow.is_reply.value = True
    unknown.flow.ClearField("is_reply")
    text = printed("compact", reply, unknown, nodes=False)
    assert "2.2.2.2:8080 (ID:12345) <- 1.1.1.1:31793 (health)" in text
    assert "1.1.1.1:31793 (health) <> 2.2.2.2:8080 (ID:12345)" in text


def test_tab() -> None:
    assert printed("tab", response(), nodes=False) == (
        "TIMESTAMP             SOURCE          DESTINATION    TYPE            VERDICT   SUMMARY\n"
        "Jan  1 00:20:34.567   1.1.1.1:31793   2.2.2.2:8080   Policy denied   DROPPED   "
        "TCP Flags: SYN\n"
    )


def test_dict() -> None:
    one = (
        "  TIMESTAMP: Jan  1 00:20:34.567\n"
        "       NODE: k8s1\n"
        "     SOURCE: 1.1.1.1:31793\n"
        "DESTINATION: 2.2.2.2:8080\n"
        "       TYPE: Policy denied\n"
        "    VERDICT: DROPPED\n"
        "    SUMMARY: TCP Flags: SYN\n"
    )
    assert printed("dict", response(), response()) == f"{one}------------\n{one}"


def test_json_is_the_flow_and_jsonpb_the_response() -> None:
    wanted = json.loads(DROP)
    assert json.loads(printed("jsonpb", response())) == wanted
    assert json.loads(printed("json", response())) == wanted["flow"]


def test_colours_are_asked_for() -> None:
    assert "\033" not in printed("compact", response())
    assert "\033[31mDROPPED\033[0m" in printed("compact", response(), color=True)


@pytest.mark.parametrize(
    "text",
    ["\033[2J", "a\nb", "a\rb", "\u202eevil", "\x9b31m", "\u2066x", "\x07", "\x00"],
)
@pytest.mark.parametrize("form", ["compact", "tab", "dict", "json", "jsonpb"])
def test_hostile_names_do_nothing(text: str, form: str) -> None:
    end = flow_pb2.Endpoint(namespace="ns", pod_name=text, labels=[f"k8s:a={text}"])
    policy = flow_pb2.Policy(name=text, kind=text)
    hostile = response(source=end, Summary=text, node_name=text, egress_denied_by=[policy])
    out = printed(form, hostile)
    plain = set(out) - {"\n"}
    assert all(character.isprintable() for character in plain)
    assert out.count("\n") <= 9
    assert "\u202e" not in plain


def test_what_people_write_stays() -> None:
    assert safe("café Ελλάδα 日本語") == "café Ελλάδα 日本語"


def test_our_own_flows() -> None:
    made = observer_pb2.GetFlowsResponse(flow=flow_message(flow(), "u"))
    assert printed("compact", made, nodes=False) == (
        "Jan  1 00:16:40.000: shop/web-1:40000 (ID:300) -> data/db-0:5432 (ID:301) "
        "Policy denied DROPPED BY default-deny (NetworkPolicy) (TCP Flags: SYN)\n"
    )


TIMES = {
    "StampMilli": "Feb  3 04:05:06.007",
    "YearMonthDay": "2021-02-03",
    "YearMonthDayHour": "2021-02-03T04Z",
    "YearMonthDayHourMinute": "2021-02-03T04:05Z",
    "RFC3339": "2021-02-03T04:05:06Z",
    "RFC3339Milli": "2021-02-03T04:05:06.007Z",
    "RFC3339Micro": "2021-02-03T04:05:06.007080Z",
    "RFC3339Nano": "2021-02-03T04:05:06.00708Z",
    "RFC1123Z": "Wed, 03 Feb 2021 04:05:06 +0000",
}


def test_forms_of_time_are_hubbles() -> None:
    seconds = 1612325106
    assert {form: time_text(form, seconds, 7_080_000) for form in TIME_FORMATS} == TIMES
    assert time_text("RFC3339Nano", seconds, 0) == "2021-02-03T04:05:06Z"
