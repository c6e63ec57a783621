"""The health check for Argo CD in the docs says of real objects what it should."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

PAGE = Path(__file__).parents[3] / "docs" / "gitops.md"
LUA = shutil.which("lua5.4")

pytestmark = pytest.mark.skipif(
    LUA is None, reason="lua5.4 is not installed: run `make .cache/test-packages`"
)


def _script() -> str:
    for block in re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(), re.M | re.S):
        for item in yaml.safe_load_all(block):
            if item["metadata"]["name"] == "argocd-cm":
                custom = yaml.safe_load(item["data"]["resource.customizations"])
                return str(custom["tidegate.dev/*"]["health.lua"])
    raise AssertionError("no health check in docs/gitops.md")


def _lua(value: Any) -> str:
    match value:
        case dict():
            return "{" + ",".join(f"[{_lua(k)}]={_lua(v)}" for k, v in value.items()) + "}"
        case list():
            return "{" + ",".join(map(_lua, value)) + "}"
        case bool():
            return str(value).lower()
        case str():
            return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        case _:
            return str(value)


def _health(obj: dict[str, Any]) -> list[str]:
    program = (
        f"obj = {_lua(obj)}\nlocal function check()\n{_script()}\nend\n"
        'local h = check()\nio.write(h.status, "|", h.message or "")'
    )
    assert LUA is not None
    done = subprocess.run([LUA, "-"], input=program, check=True, capture_output=True, text=True)
    return done.stdout.split("|")


def _condition(of: str, status: str = "True", seen: int = 2) -> dict[str, Any]:
    return {"type": of, "status": status, "message": f"about {of}", "observedGeneration": seen}


def _status(*conditions: dict[str, Any], seen: int = 2) -> dict[str, Any]:
    return {"observedGeneration": seen, "conditions": list(conditions)}


@pytest.mark.parametrize(
    ("why", "status", "health"),
    [
        ("nobody has looked", None, ["Progressing", "not looked at yet"]),
        ("no condition yet", {"endpoints": 0}, ["Progressing", "not looked at yet"]),
        ("in force", _status(_condition("Ready")), ["Healthy", "about Ready"]),
        ("not yet", _status(_condition("Ready", "False")), ["Progressing", "about Ready"]),
        (
            "an older version is in force",
            _status(_condition("Ready", seen=1), seen=1),
            ["Progressing", "a newer version is not looked at yet"],
        ),
        (
            "looked at, not said anew",
            _status(_condition("Ready", seen=1)),
            ["Progressing", "about Ready"],
        ),
        (
            "ready for most, stalled for a part",
            _status(_condition("Ready"), _condition("Stalled")),
            ["Degraded", "about Stalled"],
        ),
        (
            "stalled no more",
            _status(_condition("Ready"), _condition("Stalled", "False")),
            ["Healthy", "about Ready"],
        ),
    ],
)
def test_health(why: str, status: dict[str, Any] | None, health: list[str]) -> None:
    obj = {"metadata": {"generation": 2}} | ({"status": status} if status is not None else {})
    assert _health(obj) == health, why
