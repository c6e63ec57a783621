"""`tidegate observe --input-file`: what of a file is shown, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from tidegate_cli.errors import CliError
from tidegate_cli.main import build_parser
from tidegate_cli.observe import command
from tidegate_cli.observe.printer import json_line
from tidegate_observer import messages
from tidegate_observer.api import flow_pb2, observer_pb2
from tidegate_observer.flow import Lost
from unit.observer.flows import SECOND, flow, started


def line(made: flow_pb2.Flow) -> str:
    answer = observer_pb2.GetFlowsResponse(flow=made, node_name=made.node_name, time=made.time)
    return json_line(answer)


FLOWS = [
    messages.flow_message(flow(time=1 * SECOND), "a"),
    messages.flow_message(started(time=2 * SECOND, node="node-2"), "b"),
    messages.flow_message(flow(time=3 * SECOND, protocol=17), "c"),
]
LOST = json_line(
    observer_pb2.GetFlowsResponse(lost_events=messages.lost_message(Lost("n", 4 * SECOND, 5, 0)))
)
EXPORT = json.dumps({"agent_event": {"type": "AGENT_STARTED"}}) + "\n"
TEXT = line(FLOWS[0]) + line(FLOWS[1]) + "\n" + EXPORT + json_line(FLOWS[2]) + LOST


def shown(path: Path | str, *words: str) -> int:
    args = build_parser().parse_args(["observe", "--input-file", str(path), "-o", "jsonpb", *words])
    return command.observe(args)


ROWS = [
    ("", "abcL"),
    ("--all", "abcL"),
    ("--last 2", "bc"),
    ("--first 2", "ab"),
    ("--verdict DROPPED", "acL"),
    ("--not --verdict DROPPED", "bL"),
    ("--verdict DROPPED --last 1", "c"),
    ("--namespace shop --protocol udp", "cL"),
    ("--uuid b", "bL"),
    ("--node node-2", "bL"),
    ("--since 1970-01-01T00:00:02Z --until 1970-01-01T00:00:02Z", "b"),
    ("--cel-expression has(_flow.l4.UDP)||_flow.uuid=='a'", "acL"),
]


@pytest.mark.parametrize(("words", "ids"), ROWS, ids=[r[0] or "nothing" for r in ROWS])
def test_what_is_shown(
    words: str, ids: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "flows.json"
    path.write_text(TEXT)
    assert shown(path, *words.split()) == 0
    made = [json.loads(one) for one in capsys.readouterr().out.splitlines()]
    assert "".join(one["flow"]["uuid"] if "flow" in one else "L" for one in made) == ids


def test_standard_input_comes_out_as_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "".join(map(line, FLOWS))
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert shown("-") == 0
    assert capsys.readouterr().out == text


OTHERS = line(flow_pb2.Flow(uuid="x", verdict=flow_pb2.REDIRECTED, emitter={"name": "Hubble"}))
REFUSED = [
    ("no JSON", line(FLOWS[0]) + "{\n", "", r"flows\.json:2: "),
    ("no object", "[]\n", "", r"flows\.json:1: no JSON object"),
    ("no flow", '{"verdict": 1, "colour": "red"}\n', "", r"flows\.json:1: .*colour"),
    ("no text", b"\xff\n", "", r"flows\.json: .*utf-8"),
    ("another's flow", "\n" + OTHERS, "--verdict DROPPED", r"flows\.json:2: no flow of Tidegate"),
    ("a wrong expression", "", "--cel-expression x", "undeclared"),
    ("two filters with an id", "", "--uuid a --pod web", "uuid"),
    ("a server", "", "--server unix:///x", "--server"),
    ("to come", "", "-f", "--follow"),
    ("a mask", "", "--experimental-field-mask time", "--experimental-field-mask"),
]


@pytest.mark.parametrize(("reason", "text", "words", "said"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refused(reason: str, text: str | bytes, words: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "flows.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CliError, match=said):
        shown(path, *words.split())


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CliError, match="No such file"):
        shown(tmp_path / "none")


def test_anothers_flow_is_shown_where_nothing_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "flows.json"
    path.write_text(OTHERS)
    assert shown(path) == 0
    assert capsys.readouterr().out == OTHERS
