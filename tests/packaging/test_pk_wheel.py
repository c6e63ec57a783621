"""The wheel, installed as a user does: the commands run, the eBPF objects are found and listed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def run(*command: str | Path) -> str:
    """Standard output. Outside the source tree, so that nothing is imported from there."""
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel and what its extras ask for."""
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", directory],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = directory.glob("tidegate-*.whl")
    run(sys.executable, "-m", "venv", directory / "venv")
    run(directory / "venv/bin/pip", "install", "--quiet", "--no-compile", f"{wheel}[cli]")
    return directory / "venv"


def test_the_commands_run(installed: Path) -> None:
    assert run(installed / "bin/tidegate", "--help").startswith("usage: tidegate ")
    assert "tidegate" in run(installed / "bin/kubectl-tidegate", "--version")
    assert run(installed / "bin/tidegate-loader", "--help").startswith("usage: tidegate-loader ")


def test_a_folder_compiles_to_the_same_bytes(installed: Path) -> None:
    folder = ROOT / "examples/minimal"
    mine = run(installed / "bin/tidegate", "compile", folder)
    assert "kind: RuleSet" in mine
    assert mine == run(sys.executable, "-m", "tidegate_cli", "compile", folder)


def test_the_objects_are_found_and_are_the_ones_listed(installed: Path) -> None:
    code = (
        "from tidegate_cli.live import objects_dir\n"
        "from tidegate_loader.attach import SUMS, checked\n"
        "print(objects_dir(), (objects_dir() / SUMS).is_file(), *checked(objects_dir()))\n"
    )
    found = run(installed / "bin/python", "-I", "-c", code).split()
    assert found == [str(installed / "lib/tidegate/objects"), "True", "pod.o", "sock.o", "net.o"]
    built, copied = ROOT / "datapath/build", Path(found[0])
    for name in ("net.o", "pod.o", "sock.o", "xdp.o"):
        assert (built / name).read_bytes() == (copied / name).read_bytes()
