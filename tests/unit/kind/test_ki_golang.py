"""What is built, and what is not built again."""

from __future__ import annotations

from pathlib import Path

import pytest

from kind import golang, settings
from kind.run import Failed

MODULE = golang.Module("example.org/m", "v1.0.0", {"tool": "cmd/tool"}, ("-X a.b=c",))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, on a machine without Go: whoever builds fails."""
    monkeypatch.setenv("TIDEGATE_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def put(stamp: str) -> None:
    directory = settings.binaries()
    (directory.parent / "stamps").mkdir(parents=True)
    directory.mkdir()
    (directory / "tool").write_bytes(b"\x7fELF")
    (directory.parent / "stamps/tool").write_text(stamp)


def test_a_program_of_the_wanted_version_is_left_alone(cache: Path) -> None:
    put(MODULE.stamp())
    golang.ensure([MODULE])
    assert (settings.binaries() / "tool").read_bytes() == b"\x7fELF"


@pytest.mark.parametrize(
    "stamp",
    [
        "example.org/m@v0.9.0 -X a.b=c\n",
        "example.org/m@v1.0.0 -X a.b=d\n",
        "",
    ],
)
def test_another_version_other_flags_or_no_stamp_mean_a_build(cache: Path, stamp: str) -> None:
    put(stamp)
    with pytest.raises(Failed, match="there is no `go` on the PATH"):
        golang.ensure([MODULE])


def test_every_program_has_one_module_and_the_apiserver_set_is_part_of_all() -> None:
    names = [name for module in golang.EVERYTHING for name in module.programs]
    assert len(names) == len(set(names))
    assert {n for m in golang.APISERVER for n in m.programs} == {
        "etcd",
        "kube-apiserver",
        "kubectl",
    }
    assert all(module in golang.EVERYTHING for module in golang.APISERVER)
