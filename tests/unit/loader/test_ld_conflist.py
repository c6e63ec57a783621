"""Our entry in CNI configurations: put in, kept, taken out, and everything else left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tidegate_loader import conflist

ENTRY = conflist.entry(Path("/pins"), Path("/s/cni.sock"), Path("/run/enforcing"))
PTP = {"type": "ptp", "ipam": {"type": "host-local"}, "mtu": 1400}
PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}}
LIST = {"cniVersion": "0.3.1", "name": "net", "plugins": [PTP, PORTMAP]}
SINGLE = {"cniVersion": "1.0.0", "name": "net", **PTP}


def _write(directory: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name).write_text(text)


def _held(directory: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(directory.iterdir()):
        try:
            found[path.name] = json.loads(path.read_text())
        except ValueError:
            found[path.name] = path.read_text()
    return found


def test_the_entry_names_what_the_step_reads() -> None:
    """The step's keys are spelled in C; here is what they are."""
    source = Path(__file__).parents[3] / "node-loader" / "cni" / "main.c"
    for key in ENTRY.keys() - {"type"}:
        assert f'"{key}"' in source.read_text()


ACTIVE = [
    ("nothing there", {}, None),
    ("one list", {"10-a.conflist": LIST}, "10-a.conflist"),
    ("the first by name", {"20-b.conflist": LIST, "10-a.conf": SINGLE}, "10-a.conf"),
    ("not JSON is passed over", {"05-x.conflist": "{", "10-a.conflist": LIST}, "10-a.conflist"),
    ("nor what has no plugins", {"05-x.conflist": {}, "10-a.conflist": LIST}, "10-a.conflist"),
    ("nor other endings", {"05-x.conflist.bak": LIST, "10-a.json": SINGLE}, "10-a.json"),
    ("nor hidden files", {".05-x.conflist": LIST, "10-a.conflist": LIST}, "10-a.conflist"),
    ("nor a list of nonsense", {"1.conflist": {"plugins": [1]}, "2.conf": SINGLE}, "2.conf"),
]


@pytest.mark.parametrize(("reason", "files", "expected"), ACTIVE, ids=lambda v: str(v)[:24])
def test_the_active_file(
    tmp_path: Path, reason: str, files: dict[str, Any], expected: str | None
) -> None:
    _write(tmp_path, files)
    found = conflist.active(tmp_path)
    assert (found.name if found else None) == expected, reason


def test_in_at_the_end_and_out_again(tmp_path: Path) -> None:
    _write(tmp_path, {"10-a.conflist": LIST, "20-b.conflist": LIST})
    path = tmp_path / "10-a.conflist"
    path.chmod(0o600)
    assert conflist.install(tmp_path, ENTRY) == path
    assert _held(tmp_path) == {
        "10-a.conflist": LIST | {"plugins": [PTP, PORTMAP, ENTRY]},
        "20-b.conflist": LIST,
    }
    assert path.stat().st_mode & 0o777 == 0o600
    stamp = path.stat().st_mtime_ns
    assert conflist.install(tmp_path, ENTRY) is None
    assert path.stat().st_mtime_ns == stamp
    assert conflist.remove(tmp_path) == [path]
    assert _held(tmp_path) == {"10-a.conflist": LIST, "20-b.conflist": LIST}
    assert conflist.remove(tmp_path) == []


def test_an_entry_of_another_version_is_replaced(tmp_path: Path) -> None:
    old = {"type": "tidegate-cni", "pinDir": "/old"}
    _write(tmp_path, {"10-a.conflist": LIST | {"plugins": [PTP, old, PORTMAP]}})
    conflist.install(tmp_path, ENTRY)
    assert _held(tmp_path)["10-a.conflist"]["plugins"] == [PTP, PORTMAP, ENTRY]


@pytest.mark.parametrize("name", ["10-a.conf", "10-a.json"])
def test_a_single_plugin_becomes_a_list_and_comes_back(tmp_path: Path, name: str) -> None:
    _write(tmp_path, {name: SINGLE, "20-b.conflist": LIST})
    target = conflist.install(tmp_path, ENTRY)
    assert target is not None
    assert target == conflist.active(tmp_path)
    assert json.loads(target.read_text()) == {
        "cniVersion": "1.0.0",
        "name": "net",
        "plugins": [PTP, ENTRY],
    }
    # Its owner writes it again, changed: the list follows.
    changed = SINGLE | {"mtu": 9000}
    _write(tmp_path, {name: changed})
    if name.endswith(".conf"):  # .json comes after .conflist, so nobody would read it
        conflist.install(tmp_path, ENTRY)
        assert json.loads(target.read_text())["plugins"][0]["mtu"] == 9000
        conflist.remove(tmp_path)
        assert _held(tmp_path) == {name: changed, "20-b.conflist": LIST}


def test_what_has_no_chains_is_refused(tmp_path: Path) -> None:
    for version in ({"cniVersion": "0.2.0"}, {"cniVersion": "new"}, {"cniVersion": ""}):
        _write(tmp_path, {"10-a.conflist": LIST | version})
        with pytest.raises(conflist.ConfigError, match=r"10-a.conflist: cniVersion"):
            conflist.install(tmp_path, ENTRY)
        assert _held(tmp_path)["10-a.conflist"] == LIST | version


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
plugins = st.dictionaries(st.text(), json_values).map(lambda d: d | {"type": "other"})


@given(st.dictionaries(st.text(), json_values), st.lists(plugins, min_size=1), st.integers(0, 3))
def test_whatever_the_list_is_it_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    more: dict[str, Any],
    listed: list[dict[str, Any]],
    times: int,
) -> None:
    directory = tmp_path_factory.mktemp("net.d")
    given_list = more | {"cniVersion": "1.0.0", "name": "n", "plugins": listed}
    _write(directory, {"1.conflist": given_list})
    for _ in range(times + 1):
        conflist.install(directory, ENTRY)
    assert _held(directory)["1.conflist"] == given_list | {"plugins": [*listed, ENTRY]}
    conflist.remove(directory)
    assert _held(directory) == {"1.conflist": given_list}
    assert list(_held(directory)["1.conflist"]) == list(given_list)
