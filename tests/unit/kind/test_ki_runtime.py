"""What the OCI runtime asks for where root lacks a capability."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kind import runtime

ALL = 0x1FFFFFFFFFF
WITHOUT_RESOURCE = ALL & ~(1 << 24)


def have(bits: int) -> list[str]:
    return runtime.available(f"Name:\tx\nCapBnd:\t{bits:016x}\n")


def test_the_bounding_set_by_name() -> None:
    assert have(1) == ["CAP_CHOWN"]
    assert have(1 << 39) == ["CAP_BPF"]
    assert "CAP_SYS_RESOURCE" not in have(WITHOUT_RESOURCE)
    assert len(have(ALL)) == 41


@pytest.mark.parametrize(
    ("reason", "asked", "expected"),
    [
        ("what cannot be had is left out", ["CAP_CHOWN", "CAP_SYS_RESOURCE"], ["CAP_CHOWN"]),
        ("privileged means all there is", ["CAP_SYS_ADMIN"], have(WITHOUT_RESOURCE)),
        ("nothing stays nothing", [], []),
    ],
)
def test_capabilities(reason: str, asked: list[str], expected: list[str]) -> None:
    fitted = runtime.fitted({"capabilities": {"bounding": asked}}, have(WITHOUT_RESOURCE))
    assert fitted["capabilities"]["bounding"] == expected, reason


@pytest.mark.parametrize(
    ("reason", "process", "bits", "expected"),
    [
        ("limits need it", {"rlimits": [1], "oomScoreAdj": -9}, WITHOUT_RESOURCE, {}),
        ("a worse score does not", {"oomScoreAdj": 9}, WITHOUT_RESOURCE, {"oomScoreAdj": 9}),
        ("with it all stays", {"rlimits": [1], "oomScoreAdj": -9}, ALL, None),
    ],
)
def test_limits_and_scores(
    reason: str, process: dict[str, object], bits: int, expected: dict[str, object] | None
) -> None:
    fitted = runtime.fitted(process, have(bits))
    del fitted["capabilities"]
    assert fitted == (process if expected is None else expected), reason


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (["--root", "/r", "create", "--bundle", "{}", "id"], "config.json"),
        (["create", "--bundle={}", "id"], "config.json"),
        (["exec", "--process", "{}/process.json", "id"], "process.json"),
    ],
)
def test_the_file_that_runc_will_read_is_rewritten(
    tmp_path: Path, arguments: list[str], file: str
) -> None:
    process = {"args": ["x"], "capabilities": {"effective": ["CAP_SYS_RESOURCE"]}}
    whole = {"process": process} if file == "config.json" else process
    (tmp_path / file).write_text(json.dumps(whole))
    runtime.rewrite([a.format(tmp_path) for a in arguments], have(WITHOUT_RESOURCE))
    written = json.loads((tmp_path / file).read_text())
    fitted = written["process"] if file == "config.json" else written
    assert fitted == {"args": ["x"], "capabilities": {"effective": []}}
