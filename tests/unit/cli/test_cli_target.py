"""Which cluster a command asks: explicit flags win, two of them are an error."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tidegate_cli import main, target
from tidegate_cli.cluster import api, state
from tidegate_cli.errors import CliError
from tidegate_cli.objects import RunObjects


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is up, no loader, no kubeconfig; a cluster is never really asked."""
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST", "TIDEGATE_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(target, "LOCAL_RUN_DIR", tmp_path / "lib")
    monkeypatch.setattr(target, "LOCAL_PIN_DIR", tmp_path / "pins")
    monkeypatch.setattr(sys, "argv", ["tidegate"])
    monkeypatch.setattr(target, "_go_first", lambda: None)  # this process may stay

    class Fake:
        name, server = "fake", "https://fake"

        def __init__(self, *flags: Any) -> None:
            self.flags = flags

    monkeypatch.setattr(api, "connect", Fake)
    return tmp_path


def parse(*argv: str) -> argparse.Namespace:
    return main.build_parser().parse_args([*argv, "status"])


def lay(machine: Path, *what: str) -> None:
    """`up`, `node`, `config`: things that are there."""
    for name in what:
        match name:
            case "up":
                (machine / "run/objects").mkdir(parents=True)
            case "node":
                (machine / "lib/nodes").mkdir(parents=True)
                (machine / "lib/objects").mkdir()
                (machine / "pins").mkdir()
            case "config":
                (machine / ".kube").mkdir()
                (machine / ".kube/config").write_text("")


def chosen(args: argparse.Namespace, machine: Path) -> str:
    place = target.choose(args)
    if isinstance(place, state.ClusterState):
        kubeconfig, context = place.api.flags  # type: ignore[attr-defined]
        return f"cluster {kubeconfig} {context}"
    assert isinstance(place, RunObjects)
    return f"{place.run_dir.relative_to(machine)} {place.pin_dir('n').relative_to(machine)}"


@pytest.mark.parametrize(
    ("reason", "there", "argv", "expected"),
    [
        ("nothing but a kubeconfig", ["config"], [], "cluster None None"),
        ("what is up comes first", ["up", "node", "config"], [], "run run/bpf/n"),
        ("then the node's own loader", ["node", "config"], [], "lib pins"),
        ("explicit: cluster", ["up", "config"], ["--context", "c"], "cluster None c"),
        ("explicit: file", ["up"], ["--kubeconfig", "f"], "cluster f None"),
        ("explicit: node", ["up", "node", "config"], ["--local"], "lib pins"),
        ("explicit: run directory", ["up", "node"], ["--run-dir", "RUN"], "run run/bpf/n"),
    ],
)
def test_which_is_asked(
    reason: str,
    there: list[str],
    argv: list[str],
    expected: str,
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lay(machine, *there)
    args = parse(*(str(machine / "run") if word == "RUN" else word for word in argv))
    if not args.run_dir_given:
        args.run_dir = str(machine / "run")
    assert chosen(args, machine) == expected, reason


def test_the_plugin_means_the_cluster(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(machine, "up", "node", "config")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/kubectl-tidegate"])
    assert chosen(parse(), machine) == "cluster None None"


def test_inside_the_loaders_pod_it_is_the_first_to_go(machine: Path) -> None:
    """In a process of its own: it cannot be taken back."""
    lay(machine, "node")
    code = (
        "import sys; from pathlib import Path; from tidegate_cli import target\n"
        "target.LOCAL_RUN_DIR = Path(sys.argv[1])\n"
        "target.local(); print(open('/proc/self/oom_score_adj').read())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, machine / "lib"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "1000"


def test_the_environment_is_explicit(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(machine, "up", "config")
    monkeypatch.setenv("TIDEGATE_RUN_DIR", str(machine / "run"))
    assert chosen(parse(), machine) == "run run/bpf/n"


@pytest.mark.parametrize(
    "argv",
    [
        ["--run-dir", "x", "--context", "c"],
        ["--run-dir", "x", "--local"],
        ["--local", "--kubeconfig", "f"],
    ],
)
def test_two_places_are_an_error(argv: list[str], machine: Path) -> None:
    with pytest.raises(CliError, match="give one of them"):
        target.choose(parse(*argv))


def test_nothing_to_ask_is_an_error(machine: Path) -> None:
    args = parse()
    args.run_dir = str(machine / "run")
    with pytest.raises(CliError, match=r"nothing is up in .*, and there is no kubeconfig"):
        target.choose(args)
    with pytest.raises(CliError, match="no loader has its state"):
        target.choose(parse("--local"))


def test_what_was_chosen_is_said(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay(machine, "config")
    args = parse()
    args.run_dir = str(machine / "run")
    target.choose(args)
    assert capsys.readouterr().err == "tidegate: asking cluster fake (https://fake)\n"
    target.choose(parse("--context", "c"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("flag", [["--context", "c"], ["--kubeconfig", "f"], ["--local"]])
@pytest.mark.parametrize("command", [["up", "x"], ["down"], ["exec", "p", "ls"], ["compile", "x"]])
def test_this_machines_commands_know_no_cluster(
    flag: list[str], command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([*flag, *command]) == 2
    assert f"tidegate: {command[0]} does not ask a cluster" in capsys.readouterr().err
