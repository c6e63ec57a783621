"""The command line's edges: help, errors, pipes, names."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tidegate_bpf import ObjectFile
from tidegate_cli import main, reasons
from tidegate_cli.errors import CliError
from tidegate_observer import tracked

ROOT = Path(__file__).parents[3]
HEAVY = {"msgspec", "pydantic", "yaml", "structlog", "watchfiles", "pyroute2", "ctypes", "json"}
HEAVY |= {"kubernetes", "urllib3", "ssl"}


def commands(parser: argparse.ArgumentParser) -> Iterator[list[str]]:
    """The words of every command, of groups of them too."""
    yield []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from ([name, *words] for words in commands(inner))


COMMANDS = list(commands(main.build_parser()))


def python(code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def tidegate(*argv: str) -> subprocess.CompletedProcess[str]:
    return python("import sys; from tidegate_cli.main import main; sys.exit(main())", *argv)


def test_help_imports_nothing_heavy() -> None:
    assert len(COMMANDS) > 30
    code = (
        "import contextlib, io, sys\n"
        "from tidegate_cli.main import main\n"
        "for words in eval(sys.argv[1]):\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        with contextlib.suppress(SystemExit):\n"
        "            main([*words, '--help'])\n"
        "    assert 'usage: ' in out.getvalue(), words\n"
        "print(*sys.modules, sep='\\n')\n"
    )
    found = python(code, repr(COMMANDS))
    assert found.returncode == 0, found.stderr
    loaded = set(found.stdout.split())
    ours = {name for name in loaded if name.startswith("tidegate_")}
    assert loaded & HEAVY == set()
    assert {name.partition(".")[0] for name in ours} == {"tidegate_cli"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compile", "f", "--nodes=-5"], "must be 1 to 64"),
        (["compile", "f", "--nodes=2.5"], "must be 1 to 64"),
        (["up", "f", "--nodes=many"], "must be 1 to 64"),
        (["up", "f", "--wait=nan"], "must be 1.0 to 3600.0 seconds"),
        (["matrix", "--timeout=x"], "must be 0.05 to 60.0 seconds"),
        (["install", "--wait=-1"], "must be 0.0 to 86400.0 seconds"),
        (["observe", "--last=-1"], "must be 0 to "),
    ],
)
def test_numbers_out_of_bounds(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.main(words)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("number", ["-1", "0", "16777216"])
def test_a_number_that_is_no_identity_is_not_traced(
    number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--run-dir", str(tmp_path), "trace", "start", f"--identity={number}"]
    assert main.main(words) == 2
    assert "not an identity; from 1 to 16777215" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("started", "name"), [("tidegate", "tidegate"), ("kubectl-tidegate", "kubectl tidegate")]
)
def test_the_name_is_the_one_it_was_started_by(
    started: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/{started}", "--version"])
    with pytest.raises(SystemExit, match="0"):
        main.main()
    assert capsys.readouterr().out.startswith(f"{name} ")


def test_errors_are_one_line_with_the_remedy(tmp_path: Path) -> None:
    found = tidegate("--run-dir", str(tmp_path), "status")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == f"tidegate: nothing is up in {tmp_path}; run `tidegate up DIR` first\n"


@pytest.mark.parametrize(
    "argv", [["--run-dir", "DIR", "status"], ["status", "--run-dir", "DIR"], ["status"]]
)
def test_the_run_directory_is_taken_before_and_after_the_command(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--run-dir" not in argv:
        monkeypatch.setenv("TIDEGATE_RUN_DIR", str(tmp_path))
    found = tidegate(*(str(tmp_path) if word == "DIR" else word for word in argv))
    assert str(tmp_path) in found.stderr


def test_a_closed_pipe_is_no_complaint(tmp_path: Path) -> None:
    (tmp_path / "pod.yaml").write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n")
    code = "import sys; from tidegate_cli.main import main; sys.exit(main())"
    read, write = os.pipe()
    os.close(read)
    try:
        found = subprocess.run(
            [sys.executable, "-c", code, "compile", str(tmp_path)],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    finally:
        os.close(write)
    assert (found.returncode, found.stderr) == (main.SIGPIPE_EXIT, "")


def test_every_reason_has_a_text() -> None:
    path = ROOT / "datapath" / "build" / "pod.o"
    if not path.exists():
        pytest.skip("the eBPF objects are not built")
    known = dict(ObjectFile(path).enums["tg_reason"])
    del known["TG_REASON_MAX"]
    assert set(known.values()) == set(reasons.TEXT)
    assert len(set(reasons.TEXT.values())) == len(reasons.TEXT)


def test_the_page_about_reasons_has_the_same_texts() -> None:
    page = (ROOT / "docs" / "drop-reasons.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", page, re.MULTILINE)
    assert {int(number): text for number, text in rows} == reasons.TEXT


def test_life_times_are_the_programs() -> None:
    text = (ROOT / "datapath/include/tidegate/conntrack.h").read_text()
    found = re.findall(r"^const volatile __u32 (\w+_life) = (\d+);", text, re.MULTILINE)
    assert {name: int(value) for name, value in found} == tracked.LIVES


def test_no_remedy_no_semicolon() -> None:
    assert (str(CliError("a")), str(CliError("a", "b"))) == ("a", "a; b")
