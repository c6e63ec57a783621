"""The matrix without a network: what counts as an answer, what differs, what is printed."""

from __future__ import annotations

import json

import pytest
import yaml
from tidegate_api.state import Backend, Frontend, ServicePort
from tidegate_cli import connectivity
from tidegate_cli.connectivity import Cell, Destination
from tidegate_cli.prober import CONNECTED, TIMED_OUT, Result, parse_http
from tidegate_cli.standalone.rundir import Pod, Port, Supervisor


def pod(name: str, number: int, *ports: tuple[int, str], command: str = "") -> Pod:
    return Pod(
        uid=name,
        namespace="default",
        name=name,
        node="node",
        addresses=[f"10.0.0.{number}", f"fd00::{number}"],
        ports=[Port(port=port, protocol=protocol) for port, protocol in ports],
        host_network=False,
        command=command,
        netns="",
        cgroup="",
        ifname="",
    )


A = pod("a", 1, (80, "TCP"))
B = pod("b", 2, (80, "TCP"), (53, "UDP"), (99, "SCTP"))
COMMAND = pod("c", 3, (80, "TCP"), command="sleep 1")
STATE = Supervisor(
    pid=1,
    start_time=1,
    folder="",
    id="x",
    cgroup="",
    ready=True,
    nodes=[],
    pods=[B, A, COMMAND],
)
WEB = ServicePort(
    namespace="default",
    name="web",
    type="ClusterIP",
    frontends=[
        Frontend(address="10.96.0.1", port=8080, protocol="TCP"),
        Frontend(address="fd01::1", port=8080, protocol="TCP"),
    ],
    backends=[Backend(address="10.0.0.1", port=80), Backend(address="10.0.0.2", port=80)],
)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            4,
            [
                ("default/a:80/TCP", "10.0.0.1", False),
                ("default/b:80/TCP", "10.0.0.2", False),
                ("default/b:53/UDP", "10.0.0.2", False),
                ("default/c:80/TCP", "10.0.0.3", True),
                ("svc default/web:8080/TCP", "10.96.0.1", False),
            ],
        ),
        (
            6,
            [
                ("default/a:80/TCP", "fd00::1", False),
                ("default/b:80/TCP", "fd00::2", False),
                ("default/b:53/UDP", "fd00::2", False),
                ("default/c:80/TCP", "fd00::3", True),
                ("svc default/web:8080/TCP", "fd01::1", False),
            ],
        ),
    ],
)
def test_columns(family: int, expected: list[tuple[str, str, bool]]) -> None:
    columns = connectivity.destinations(STATE.pods, {"default/web": [WEB]}, family)
    assert expected == [(c.label, c.address, c.handshake) for c in columns]


ONE = Destination("default/b", 4, "10.0.0.2", 80, "TCP", (("10.0.0.2", 80, "default/b"),), False)
TWO = Destination(
    "svc default/web",
    4,
    "10.96.0.1",
    80,
    "TCP",
    (("10.0.0.1", 80, "default/a"), ("10.0.0.2", 80, "default/b")),
    False,
)
NONE = Destination("svc default/none", 4, "10.96.0.2", 80, "TCP", (), False)


@pytest.mark.parametrize(
    ("reason", "column", "result", "allowed", "mark"),
    [
        ("allowed and answered", ONE, Result("default/b", ""), {"10.0.0.2"}, ". "),
        ("denied and silent", ONE, Result("", TIMED_OUT), set(), "X "),
        ("denied, yet answered", ONE, Result("default/b", ""), set(), ".!"),
        ("allowed, yet silent", ONE, Result("", TIMED_OUT), {"10.0.0.2"}, "X!"),
        ("another pod answered", ONE, Result("default/x", ""), {"10.0.0.2"}, "X!"),
        ("handshake with a command", ONE, Result("", CONNECTED), {"10.0.0.2"}, ". "),
        ("any backend will do", TWO, Result("default/a", ""), {"10.0.0.1", "10.0.0.2"}, ". "),
        ("it depends on the backend: silent", TWO, Result("", TIMED_OUT), {"10.0.0.1"}, "X "),
        ("it depends on the backend: answered", TWO, Result("default/a", ""), {"10.0.0.1"}, ". "),
        ("a pod that is no backend", TWO, Result("default/x", ""), {"10.0.0.1", "10.0.0.2"}, "X!"),
        ("a service without backends", NONE, Result("", TIMED_OUT), set(), "X "),
        ("no backends, yet answered", NONE, Result("default/a", ""), set(), "X "),
    ],
)
def test_mark(
    reason: str, column: Destination, result: Result, allowed: set[str], mark: str
) -> None:
    def judge(source: Pod, address: str, port: int, protocol: str) -> bool | None:
        return address in allowed

    cell = connectivity.cell_of(A, column, result, judge)
    assert mark == connectivity.mark(cell), reason


@pytest.mark.parametrize(
    ("reason", "data", "expected"),
    [
        ("proper", b'HTTP/1.1 200 OK\r\nA: b\r\n\r\n{"pod": "n/a"}\n', Result("n/a", "")),
        ("closed", b"", Result("", "closed without an answer")),
        ("cut", b'HTTP/1.1 200 OK\r\n\r\n{"pod": "n', None),
        ("no JSON", b"SSH-2.0-server\r\n", None),
        ("JSON, no object", b"HTTP/1.1 200 OK\r\n\r\n[1]", None),
        ("no pod", b"HTTP/1.1 200 OK\r\n\r\n{}", None),
    ],
)
def test_parse_http(reason: str, data: bytes, expected: Result | None) -> None:
    result = parse_http(data)
    if expected is None:
        assert (result.pod, result.detail[:10]) == ("", "odd answer"), reason
    else:
        assert expected == result, reason


CELLS = [
    Cell("default/a", ONE, True, False, "default/b"),
    Cell("default/a", TWO, False, True, TIMED_OUT),
    Cell("default/b", ONE, True, True, "default/b"),
    Cell("default/b", TWO, False, None, TIMED_OUT),
]


def test_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert connectivity.render(CELLS, "table") == (
        "IPv4: `.` the right pod answered, `X` it did not\n"
        "\n"
        "   1  default/b:80/TCP  10.0.0.2\n"
        "   2  svc default/web:80/TCP  10.96.0.1\n"
        "\n"
        "          1  2\n"
        "default/a .! X!\n"
        "default/b .  X\n"
        "\n"
        "! default/a -> default/b:80/TCP (10.0.0.2): "
        "the model denies it, but: default/b answered\n"
        "! default/a -> svc default/web:80/TCP (10.96.0.1): "
        "the model allows it, but: timed out\n"
        "4 cells: 2 reached, 2 not; 2 differ from the model"
    )


def test_a_narrow_terminal_gets_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "14")
    lines = connectivity.render(CELLS, "table").splitlines()
    assert [line for line in lines if line.startswith("default/a ")] == [
        "default/a .!",
        "default/a X!",
    ]


@pytest.mark.parametrize(("output", "parse"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_machine_output(output: str, parse: object) -> None:
    assert callable(parse)
    data = parse(connectivity.render(CELLS, output))
    assert data["differences"] == 2
    assert data["cells"][1] == {
        "source": "default/a",
        "destination": "svc default/web",
        "family": 4,
        "address": "10.96.0.1",
        "port": 80,
        "protocol": "TCP",
        "reached": False,
        "expected": True,
        "answer": "timed out",
    }
