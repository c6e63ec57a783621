"""doctor and compile: what is missing or wrong is a line, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tidegate_bpf import BpfError, PermissionDenied
from tidegate_bpf.features import Probe
from tidegate_cli import doctor
from tidegate_cli.doctor import Line, graded
from tidegate_cli.main import main

POD = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: c}]}\n"


def denied() -> Probe:
    raise PermissionDenied(1, "load: Operation not permitted")


def yes() -> Probe:
    return Probe("thing", True, "there", "")


def no() -> Probe:
    return Probe("thing", False, "gone", "get it")


@pytest.mark.parametrize(
    ("probe", "bad", "text"),
    [
        (yes, "FAIL", "ok    thing: there"),
        (no, "FAIL", "FAIL  thing: gone; get it"),
        (no, "warn", "warn  thing: gone; get it"),
        (lambda: Probe("x", False, "[Errno 1] no", "try"), "warn", "warn  x: no; try"),
        (denied, "FAIL", "FAIL  denied: load: Operation not permitted"),
    ],
)
def test_a_probe_is_a_line(probe: Any, bad: Any, text: str) -> None:
    assert str(graded(probe, bad)) == text


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ([Line("ok", "a", "b")], 0),
        ([Line("warn", "a", "b", "c")], 0),
        ([Line("ok", "a", "b"), Line("FAIL", "a", "b", "c")], 1),
    ],
)
def test_only_a_fail_fails(
    lines: list[Line],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda _run_dir: lines)
    assert main(["doctor", "-o", "json"]) == code
    assert [entry["grade"] for entry in json.loads(capsys.readouterr().out)] == [
        line.grade for line in lines
    ]


def test_an_object_that_cannot_be_loaded_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pod.o"
    assert doctor._object(str(path)).grade == "FAIL"
    path.write_text("")

    class Refused:
        def __init__(self, _path: str) -> None:
            raise self.error

        error: BpfError = PermissionDenied(1, "not permitted")

    monkeypatch.setattr(doctor, "ObjectFile", Refused)
    assert "CAP_BPF" in doctor._object(str(path)).remedy
    Refused.error = BpfError(22, "program p: bad")
    assert doctor._object(str(path)).detail == "program p: bad"


def compiled(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    code = main(["compile", str(folder), *more])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_compile_prints_every_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = POD.replace("name: a", "name: b, labels: {app: b}")
    (tmp_path / "a.yaml").write_text(f"{POD}---\n{other}")
    code, out, err = compiled(tmp_path, capsys, "--nodes", "3")
    kinds = [document["kind"] for document in yaml.safe_load_all(out)]
    assert (code, err) == (0, "identities: 1 for 2 sets of labels, 1 saved\n")
    assert kinds.count("NodeState") == 3
    assert {"Identity", "StateSlice"} <= set(kinds)
    _, out, _ = compiled(tmp_path, capsys, "--nodes", "3", "-o", "json")
    assert [item["kind"] for item in json.loads(out)["items"]] == kinds


def test_compile_says_what_is_wrong_and_prints_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text(POD)
    (tmp_path / "b.yaml").write_text("apiVersion: v1\nkind: Pod\nmetadata: {name: B!}\n")
    code, out, err = compiled(tmp_path, capsys)
    assert code == 2
    assert "b.yaml" in err
    assert "kind: Identity" in out
    assert compiled(tmp_path / "none", capsys)[0] == 2
