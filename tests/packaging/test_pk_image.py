"""The image: what is in it, what is not, and that the parts run inside it.

Built as `make image` does, without Docker; looked into by changing the root, in a user namespace.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
from tidegate_loader.attach import SUMS, checked

ROOT = Path(__file__).parents[2]
LIMIT = 150_000_000
"""Bytes of all files."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="missing tool: apt-get"),
]


def build(*options: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "image/build.py", "--no-load", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("image") / "image.tar"
    build("--output", target)
    return target


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("rootfs")
    build("--rootfs", target)
    return target


@pytest.fixture(scope="module")
def files(rootfs: Path) -> list[str]:
    return sorted(str(path.relative_to(rootfs)) for path in rootfs.rglob("*"))


def inside(rootfs: Path, *command: str) -> str:
    """Standard output of a command with the image as its root; no /proc, no network."""
    done = subprocess.run(
        ["unshare", "--map-root-user", "--root", rootfs, "--wd", "/", *command],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONUTF8": "1"},
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def test_it_is_small(image: Path) -> None:
    with tarfile.open(image) as archive:
        layers = [member for member in archive if member.name.endswith("layer.tar")]
    assert len(layers) == 3
    assert 50_000_000 < sum(layer.size for layer in layers) <= LIMIT


@pytest.mark.parametrize(
    ("reason", "pattern"),
    [
        ("package managers", r"/(apt-get|pip3?|setuptools|ensurepip|wheel)(/|$|-)|bin/(apt|dpkg)"),
        ("compilers and debuggers", r"/bin/(cc|gcc|g\+\+|clang|ld|as|make|gdb|bpftool)(-\d+)?$"),
        ("headers and static libraries", r"\.(h|a|pyx|pxd)$"),
        ("tests", r"(^|/)(tests?|test_\w+\.pyc?)(/|$)(?<!bin/test)"),
        ("manuals and other languages", r"/share/(man|locale|info|lintian)(/|$)"),
        ("what only developers need", r"/(pytest|hypothesis|mypy|ruff|hatchling)(/|$)"),
    ],
)
def test_it_does_not_hold(reason: str, pattern: str, files: list[str]) -> None:
    assert [name for name in files if re.search(pattern, name)] == [], reason
    # The pattern finds such things where they are.
    samples = {
        "package managers": "usr/bin/apt-get",
        "compilers and debuggers": "usr/bin/gcc-12",
        "headers and static libraries": "usr/lib/libc.a",
        "tests": "usr/lib/python3.11/test/__init__.py",
        "manuals and other languages": "usr/share/man/man8/mount.8.gz",
        "what only developers need": "usr/lib/python3/dist-packages/pytest/__init__.py",
    }
    assert re.search(pattern, samples[reason])


def test_it_has_what_is_needed(rootfs: Path, files: list[str]) -> None:
    wanted = {"etc/passwd", "etc/os-release", "etc/ssl/certs/ca-certificates.crt", "usr/bin/sh"}
    wanted |= {"usr/bin/mount", "usr/bin/umount", "usr/share/doc/libbpf1/copyright", "tmp"}
    with (ROOT / "pyproject.toml").open("rb") as file:
        wanted |= {f"usr/bin/{name}" for name in tomllib.load(file)["project"]["scripts"]}
    assert wanted - set(files) == set()
    built = ROOT / "node-loader/cni/build/tidegate-cni"
    copied = rootfs / "usr/lib/tidegate/tidegate-cni"
    assert copied.exists() == built.exists()
    if built.exists():
        assert copied.read_bytes() == built.read_bytes()
        assert os.access(copied, os.X_OK)


def test_nothing_runs_as_somebody_else(image: Path) -> None:
    """No set-id bits, no writable files for others, all owned by root, one time for all."""
    wrong, seen = [], 0
    with tarfile.open(image) as outer:
        for layer in (m for m in outer if m.name.endswith("layer.tar")):
            with tarfile.open(fileobj=outer.extractfile(layer)) as inner:
                for member in inner:
                    seen += 1
                    sticky = member.name in ("tmp", "var/tmp")
                    bad = member.mode & 0o7022 and not sticky and not member.issym()
                    if bad or member.uid or member.gid or member.mtime != 1580601600:
                        wrong.append(member.name)
    assert seen > 1000
    assert wrong == []


def test_the_user_is_not_root(image: Path) -> None:
    with tarfile.open(image) as archive:
        (manifest,) = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
        config = json.load(archive.extractfile(manifest["Config"]))  # type: ignore[arg-type]
    assert manifest["RepoTags"] == ["tidegate:dev"]
    assert config["config"]["User"] == "65532:65532"


def test_the_dockerfile_says_the_same(image: Path) -> None:
    """Who builds with Docker gets the same settings; the files are of the same script."""
    with tarfile.open(image) as archive:
        (manifest,) = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
        config = json.load(archive.extractfile(manifest["Config"]))["config"]  # type: ignore[arg-type]
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    said = dict(line.split(maxsplit=1) for line in lines if line.split(maxsplit=1)[1:])
    assert said["ENV"].split() == config["Env"]
    assert said["USER"] == config["User"]
    assert json.loads(said["CMD"]) == config["Cmd"]
    labels = dict(word.split("=", 1) for word in shlex.split(said["LABEL"]))
    assert labels == config["Labels"]
    assert "image/build.py --rootfs" in said["RUN"]


def test_equal_input_is_an_equal_image(image: Path, tmp_path: Path) -> None:
    build("--output", tmp_path / "again.tar")
    assert image.read_bytes() == (tmp_path / "again.tar").read_bytes()


def test_every_library_is_there(rootfs: Path) -> None:
    plain = [path for path in rootfs.rglob("*") if path.is_file() and not path.is_symlink()]
    binaries = [path for path in plain if path.read_bytes()[:4] == b"\x7fELF"]
    dynamic = [p for p in binaries if p.suffix != ".o" and p.name != "tidegate-cni"]
    (loader,) = rootfs.glob("usr/lib/*/ld-linux*.so*")
    names = ["/" + str(path.relative_to(rootfs)) for path in dynamic if path != loader]
    assert len(names) > 50
    script = f'for f in "$@"; do echo "$f"; /{loader.relative_to(rootfs)} --list "$f" 2>&1; done'
    listed = inside(rootfs, "sh", "-c", script, "sh", *names)
    lines = listed.splitlines()
    assert sum("libc.so.6 => " in line for line in lines) > 50, listed[:2000]
    assert [line for line in lines if "not found" in line or "error" in line] == []


@pytest.mark.parametrize("name", ["tidegate", "kubectl-tidegate", "tidegate-loader"])
def test_the_commands_run(name: str, rootfs: Path) -> None:
    assert inside(rootfs, name, "--help").startswith("usage: ")


def test_every_script_starts(rootfs: Path) -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        scripts = tomllib.load(file)["project"]["scripts"]
    for name in scripts:
        assert "usage: " in inside(rootfs, name, "--help"), name


def imported(rootfs: Path, module: str) -> set[str]:
    """Top-level names that are loaded after an import, by the image's interpreter."""
    code = f"import sys, {module}; print(*sorted({{n.partition('.')[0] for n in sys.modules}}))"
    return set(inside(rootfs, "python3", "-I", "-c", code).split())


def test_the_loader_imports_nothing_of_the_operator(rootfs: Path) -> None:
    found = imported(rootfs, "tidegate_loader.main")
    assert {"tidegate_loader", "tidegate_bpf", "msgspec"} <= found
    assert (
        found & {"pydantic", "kopf", "kubernetes", "yaml", "aiohttp", "tidegate_operator"} == set()
    )


def test_kopf_does_not_find_the_client_of_the_command_line(rootfs: Path) -> None:
    found = imported(rootfs, "kopf, pydantic, prometheus_client, watchfiles, structlog, urllib3")
    assert "kopf" in found
    assert "kubernetes" not in found


def test_the_command_line_finds_its_client(rootfs: Path) -> None:
    modules = "kubernetes.client, kubernetes.config, kubernetes.stream, pyroute2"
    code = f"import sys; sys.path.append('/usr/lib/tidegate/cli'); import {modules}"
    inside(rootfs, "python3", "-I", "-c", code)
    start = (rootfs / "usr/bin/tidegate").read_text()
    assert '"/usr/lib/tidegate/cli"' in start
    assert "tidegate/cli" not in (rootfs / "usr/bin/tidegate-loader").read_text()


def test_modules_come_compiled(rootfs: Path) -> None:
    """Where this runs files cannot be written: what is not compiled would be at each start."""
    script = "import sys, tidegate_loader.main, kopf, ssl; print(*{getattr(m, '__cached__', None) "
    script += "for m in sys.modules.values()} - {None})"
    cached = inside(rootfs, "python3", "-I", "-c", script).split()
    assert len(cached) > 200
    assert [path for path in cached if not (rootfs / path.lstrip("/")).is_file()] == []


def test_the_objects_are_the_ones_listed(rootfs: Path) -> None:
    objects = rootfs / "usr/lib/tidegate/objects"
    assert (objects / SUMS).is_file()
    assert set(checked(objects)) == {"net.o", "pod.o", "sock.o"}
    code = "from tidegate_cli.live import objects_dir; print(objects_dir())"
    assert inside(rootfs, "python3", "-I", "-c", code) == "/usr/lib/tidegate/objects\n"


def test_a_folder_compiles_inside(rootfs: Path) -> None:
    folder = rootfs / "tmp/minimal"
    shutil.copytree(ROOT / "examples/minimal", folder)
    try:
        assert "kind: RuleSet" in inside(rootfs, "tidegate", "compile", "/tmp/minimal")
    finally:
        shutil.rmtree(folder)


def test_every_dependency_is_pinned() -> None:
    """image/constraints.txt names what the project asks for; `make image-pins` writes it."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    asked = list(project["dependencies"])
    for extra in ("operator", "loader", "cli"):
        asked += project["optional-dependencies"][extra]
    lines = (ROOT / "image/constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines}
    names = {re.split(r"[\[<>=!~ ]", line)[0].lower().replace("_", "-") for line in asked}
    assert names - pinned - {"tidegate"} == set()
