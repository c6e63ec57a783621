"""Flags of `observe` → what the server is asked."""

from __future__ import annotations

import pytest
from google.protobuf.json_format import MessageToDict
from tidegate_cli.errors import CliError
from tidegate_cli.main import build_parser
from tidegate_cli.observe import request

NOW = 10_000.0

ROWS = [
    ("", {"number": "20"}),
    ("--last 5", {"number": "5"}),
    ("--first 5", {"number": "5", "first": True}),
    ("--follow", {"follow": True}),
    ("--since 1h30m", {"since": "1970-01-01T01:16:40Z"}),
    ("--until 1970-01-01T00:00:09Z --last 1", {"number": "1", "until": "1970-01-01T00:00:09Z"}),
    ("-f --verdict dropped", {"follow": True, "whitelist": [{"verdict": ["DROPPED"]}]}),
    (
        "-f --pod shop/web",
        {
            "follow": True,
            "whitelist": [{"source_pod": ["shop/web"]}, {"destination_pod": ["shop/web"]}],
        },
    ),
    ("-f --from-pod web", {"follow": True, "whitelist": [{"source_pod": ["default/web"]}]}),
    ("-f -A --from-pod web", {"follow": True, "whitelist": [{"source_pod": ["/web"]}]}),
    (
        "-f -n shop",
        {"follow": True, "whitelist": [{"source_pod": ["shop/"]}, {"destination_pod": ["shop/"]}]},
    ),
    (
        "-f --from-namespace shop --from-pod web",
        {"follow": True, "whitelist": [{"source_pod": ["shop/web"]}]},
    ),
    (
        "-f --from-pod a/b --to-port 80 --protocol TCP",
        {
            "follow": True,
            "whitelist": [{"source_pod": ["a/b"], "destination_port": ["80"], "protocol": ["tcp"]}],
        },
    ),
    (
        "-f --not --verdict DROPPED --to-identity kube-apiserver",
        {
            "follow": True,
            "blacklist": [{"verdict": ["DROPPED"]}],
            "whitelist": [{"destination_identity": [7]}],
        },
    ),
    (
        "-f --type trace:to-stack -t drop",
        {
            "follow": True,
            "whitelist": [
                {"event_type": [{"type": 4, "match_sub_type": True, "sub_type": 3}, {"type": 1}]}
            ],
        },
    ),
    (
        "-f --tcp-flags syn,ack",
        {"follow": True, "whitelist": [{"tcp_flags": [{"SYN": True, "ACK": True}]}]},
    ),
    (
        "-f --from-all-namespaces --from-pod web --to-pod db",
        {
            "follow": True,
            "whitelist": [{"source_pod": ["/web"], "destination_pod": ["default/db"]}],
        },
    ),
    (
        "-f --to-all-namespaces --to-pod db --from-cluster default",
        {
            "follow": True,
            "whitelist": [{"destination_pod": ["/db"], "source_cluster_name": ["default"]}],
        },
    ),
    (
        "-f --interface eth0 --snat-ip 10.0.0.0/8",
        {
            "follow": True,
            "whitelist": [{"interface": [{"name": "eth0"}], "source_ip_xlated": ["10.0.0.0/8"]}],
        },
    ),
    (
        '-f --allowlist {"verdict":["DROPPED"]} --denylist {"source_port":["1"]} --protocol udp',
        {
            "follow": True,
            "whitelist": [{"protocol": ["udp"]}, {"verdict": ["DROPPED"]}],
            "blacklist": [{"source_port": ["1"]}],
        },
    ),
    ("-f --experimental-field-mask time,verdict", {"follow": True, "field_mask": "time,verdict"}),
    (
        "-f --cel-expression _flow.verdict==2 --cel-expression true --not --cel-expression false",
        {
            "follow": True,
            "whitelist": [{"experimental": {"cel_expression": ["_flow.verdict==2", "true"]}}],
            "blacklist": [{"experimental": {"cel_expression": ["false"]}}],
        },
    ),
    ("--last 0", {"number": "20"}),
    ("--first 0 --since 1500ms", {"since": "1970-01-01T02:46:38.500Z"}),
    ("--since 1h500us", {"since": "1970-01-01T01:46:39.999500Z"}),
    ("-f --ip-version none", {"follow": True, "whitelist": [{"ip_version": ["IP_NOT_USED"]}]}),
    (
        "-f --ip-trace-id 7 --unencrypted --not --encrypted",
        {
            "follow": True,
            "whitelist": [{"ip_trace_id": ["7"], "encrypted": [False]}],
            "blacklist": [{"encrypted": [True]}],
        },
    ),
    ("-f --ip-translation", {"follow": True}),
    ("-f --type l7", {"follow": True, "whitelist": [{"event_type": [{"type": 129}]}]}),
    ("--since 1970-01-01T00:00:09.123456789Z", {"since": "1970-01-01T00:00:09.123456Z"}),
    ("--since 1970-01-01T02+01:00", {"since": "1970-01-01T01:00:00Z"}),
    ("-f -6", {"follow": True, "whitelist": [{"ip_version": ["IPv6"]}]}),
    (
        "-f --drop-reason policy_denied",
        {"follow": True, "whitelist": [{"drop_reason_desc": ["POLICY_DENIED"]}]},
    ),
    (
        "-f --to-service shop/web --from-workload Job/x",
        {
            "follow": True,
            "whitelist": [
                {
                    "destination_service": ["shop/web"],
                    "source_workload": [{"kind": "Job", "name": "x"}],
                }
            ],
        },
    ),
]


@pytest.mark.parametrize(("words", "expected"), ROWS, ids=[row[0] or "nothing" for row in ROWS])
def test_requests(words: str, expected: dict[str, object]) -> None:
    args = build_parser().parse_args(["observe", *words.split()])
    made = request.build(args, NOW)
    assert MessageToDict(made, preserving_proto_field_name=True) == expected


@pytest.mark.parametrize(
    "words",
    [
        "--verdict maybe",
        "--since yesterday",
        "--first 1 --follow",
        "--type nothing",
        "--identity who",
        "--tcp-flags abc",
        "--reply perhaps",
        "--ip-trace-id x",
        "--verdict DROPPED --not",
        "--type trace:nowhere",
        "--allowlist {",
        '--denylist {"no_such_field":1}',
    ],
)
def test_refused(words: str) -> None:
    args = build_parser().parse_args(["observe", *words.split()])
    with pytest.raises(CliError):
        request.build(args, NOW)


def test_a_time_as_rfc_1123_has_it() -> None:
    assert request.parse_time("Thu, 01 Jan 1970 01:00:09 +0100", NOW) == 9 * 10**9


@pytest.mark.parametrize(
    "words", ["--last=-1", "--first 99999999999999999999", "--last many", "--not --not -4"]
)
def test_refused_at_once(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["observe", *words.split()])
    assert "Traceback" not in capsys.readouterr().err
