"""The whole of it: folder -> operator -> loaders -> kernel -> packets."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster.harness import until
from tidegate_cli.standalone import teardown
from tidegate_cli.standalone.errors import PrerequisiteError
from tidegate_cli.standalone.loaders import check
from tidegate_cli.standalone.rundir import RunDir

pytestmark = [pytest.mark.cluster, pytest.mark.kernel]

EXAMPLES = Path(__file__).parents[2] / "examples"
WAIT_SECONDS = 120

CURIOUS = """
apiVersion: v1
kind: Pod
metadata: {name: curious, labels: {app: curious}}
spec: {containers: [{name: main, image: x}]}
"""
OPEN_DOOR = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: server-from-client}
spec: {podSelector: {matchLabels: {app: server}}, ingress: [{}]}
"""


@dataclass
class Full:
    run_dir: RunDir
    folder: Path

    def tidegate(self, *argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tidegate_cli", *argv]
        environment = os.environ | {"TIDEGATE_RUN_DIR": str(self.run_dir.path)}
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            env=environment,
            cwd=cwd,
        )

    def up(self, example: str) -> None:
        shutil.copytree(EXAMPLES / example, self.folder)
        result = self.tidegate("up", str(self.folder), "--detach")
        assert result.returncode == 0, result.stderr
        assert f"ready: following {self.folder}" in result.stdout

    def reached(self) -> dict[tuple[str, str], bool]:
        """(source, destination) -> IPv4 TCP answer; only when all is as the model says."""
        result = self.tidegate("matrix", "-o", "json", "--timeout", "0.3")
        if result.returncode == 2:  # a pod went while it was asking
            return {}
        data = json.loads(result.stdout)
        assert (result.returncode != 0) == (data["differences"] > 0)
        if data["differences"]:
            return {}
        return {(cell["source"], cell["destination"]): cell["reached"] for cell in data["cells"]}


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Full]:
    try:
        check()
    except PrerequisiteError as error:
        pytest.skip(str(error))
    cluster = Full(RunDir.at(tmp_path / "run"), tmp_path / "manifests")
    try:
        yield cluster
    finally:
        teardown.down(cluster.run_dir)


@pytest.mark.parametrize("example", ["minimal", "shop"])
def test_the_kernel_does_what_the_model_says(full: Full, example: str) -> None:
    if example == "shop":
        shown_as_the_readme_says(full)
    else:
        full.up(example)
    result = full.tidegate("matrix", "-6")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "; all as the model says" in result.stdout
    # No number: where a service's backends differ, the cell depends on the one chosen.
    assert " 0 not;" not in result.stdout, "each example denies something"
    down = full.tidegate("down")
    assert down.stdout.startswith("removed supervisor ")
    assert not teardown.inventory(full.run_dir)
    assert full.tidegate("down").stdout.startswith("nothing is up in ")


PRINTED = (
    "identity list",
    "endpoint list",
    "policy get shop/cart --numeric",
    "explain --from shop/web-c9bef4-0 --to svc/shop/cart --port 80",
    "explain --from data/cache --to svc/shop/cart --port 80",
    "lb list --node node-1",
    "lb list --node node-1 --frontends",
    "ipcache list --node node-1",
)
"""Commands whose output on the example is the same each time, and stands in docs/cli.md."""


def shown_as_the_readme_says(full: Full) -> None:
    readme = (EXAMPLES.parent / "README.md").read_text().splitlines()
    first = next(n for n, line in enumerate(readme) if line.startswith("    $ tidegate up"))
    block = [line[4:] for line in readme[first : readme.index("    make test")]]
    shown = [line for line in block if line and line != "…" and not line.startswith("ready: ")]
    assert len(shown) > 40
    # Again it is shown, though it is up; but for what `up` says.
    for said in (shown, shown[next(n for n, x in enumerate(shown) if "identity list" in x) :]):
        result = full.tidegate("demo", "examples/shop", cwd=EXAMPLES.parent)
        assert result.returncode == 0, result.stderr
        found = {_steady(line) for line in result.stdout.splitlines()}
        assert [line for line in said if _steady(line) not in found] == []
    page = (EXAMPLES.parent / "docs/cli.md").read_text()
    for command in PRINTED:
        block = rf"^    \$ tidegate {re.escape(command)}\n((?:    (?!\$ ).*\n|\n(?=    (?!\$ )))+)"
        shown = re.search(block, page, re.M)
        assert shown, command
        out = full.tidegate(*command.split()).stdout
        found = {_steady(line) for line in out.replace(str(full.run_dir.path), "DIR").splitlines()}
        said = shown[1].replace("/run/tidegate", "DIR").replace("    …\n", "").splitlines()
        assert [line for line in said if _steady(line[4:]) not in found] == [], command


def _steady(line: str) -> str:
    """Without what is another one each time: a Service's pod by chance, numbers of rule sets,
    endpoints and interfaces, MACs, how wide a column is."""
    line = re.sub(r"\033\[\d*m", "", line)
    line = re.sub(r"^(node-\d|Endpoint ID:) +\d+ |(?<=/rule_sets/)\d+", r"\1", line)
    line = re.sub(r"\d+ +(\S+ +\S+ +)(?:[0-9A-F]{2}:){5}[0-9A-F]{2}", r"\1", line)
    line = re.sub(r" +", " ", line).strip()
    line = re.sub(r"^(shop/web-.*) [.X]$", r"\1", line)
    return re.sub(r"\d+( \(slot )\d+|\d+( reached, )\d+( not)", r"\1\2\3", line)


def test_saving_a_file_changes_the_kernel(full: Full) -> None:
    full.up("minimal")
    assert full.reached()["default/client", "default/server"]

    (full.folder / "curious.yaml").write_text(CURIOUS)
    until(lambda: ("default/curious", "default/server") in full.reached(), "the new pod asks")
    assert not full.reached()["default/curious", "default/server"]

    (full.folder / "minimal.yaml").write_text(
        (full.folder / "minimal.yaml").read_text().split("apiVersion: networking")[0] + OPEN_DOOR
    )
    until(lambda: full.reached().get(("default/curious", "default/server")), "the door opens")

    (full.folder / "curious.yaml").unlink()
    until(
        lambda: (
            set(full.reached())
            == {
                ("default/client", "default/server"),
                ("default/server", "default/server"),
                ("default/stranger", "default/server"),
            }
        ),
        "the pod goes",
    )


def test_second_up_and_a_missing_folder(full: Full) -> None:
    full.up("minimal")
    second = full.tidegate("up", str(full.folder), "--detach")
    assert second.returncode == 2
    assert f"follows {full.folder}" in second.stderr
    missing = full.tidegate("up", str(full.folder / "nowhere"))
    assert (missing.returncode, "no such folder" in missing.stderr) == (2, True)
    assert full.reached()["default/client", "default/server"], "the first one lives on"


def test_a_killed_loader_is_started_again(full: Full) -> None:
    full.up("minimal")
    state = full.run_dir.read()
    assert state is not None
    for entry in Path("/proc").iterdir():
        command = _cmdline(entry)
        if "tidegate_loader" in command and str(full.run_dir.path) in command:
            os.kill(int(entry.name), 9)
    assert full.reached()["default/client", "default/server"], "the kernel does not need it"
    (full.folder / "curious.yaml").write_text(CURIOUS)
    until(lambda: ("default/curious", "default/server") in full.reached(), "a loader realises it")


def _cmdline(entry: Path) -> list[str]:
    try:
        text = (entry / "cmdline").read_text() if entry.name.isdigit() else ""
    except OSError:
        return []
    return text.split("\0")
