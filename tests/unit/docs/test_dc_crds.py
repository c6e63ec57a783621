"""Every field and column of a CRD, every value of the chart and every permission is told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.permissions import ACCOUNTS, granted

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
CRDS = [
    yaml.safe_load(path.read_text()) for path in sorted((ROOT / "crds").glob("tidegate.dev_*.yaml"))
]
OWN = {"apiVersion", "kind", "metadata"}


def _sections() -> dict[str, str]:
    """Kind -> its section of docs/api.md."""
    parts = re.split(r"^## (\w+)$", (DOCS / "api.md").read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _fields(schema: dict[str, Any], path: str = "") -> Iterator[str]:
    for name, inner in schema.get("properties", {}).items():
        if path or name not in OWN:
            yield f"{path}{name}"
            yield from _fields(inner, f"{path}{name}.")
    if "items" in schema:
        yield from _fields(schema["items"], f"{path.removesuffix('.')}[].")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from _fields(schema["additionalProperties"], f"{path}*.")


@pytest.mark.parametrize("crd", CRDS, ids=lambda crd: crd["spec"]["names"]["kind"])
def test_every_field_and_column_is_told(crd: dict[str, Any]) -> None:
    names, version = crd["spec"]["names"], crd["spec"]["versions"][0]
    section = _sections()[names["kind"]]
    told = set(re.findall(r"^\| `([^`]+)` \|", section, re.M))
    fields = set(_fields(version["schema"]["openAPIV3Schema"]))
    assert len(fields) > 3
    assert told == fields
    columns = [column["name"] for column in version["additionalPrinterColumns"]]
    assert [name for name in columns if f"`{name}`" not in section] == []
    for name in (names["plural"], names["shortNames"][0]):
        assert f"`{name}`" in section


def test_every_row_says_something() -> None:
    rows = re.findall(
        r"^\| `[^`]+` \| ([^\n]*) \| ([^|\n]*) \|$", (DOCS / "api.md").read_text(), re.M
    )
    assert len(rows) > 100
    assert [row for row in rows if len(row[1]) < 5] == []


def _leaves(values: dict[str, Any], path: str = "") -> Iterator[str]:
    for name, value in values.items():
        where = f"{path}{name}"
        # What is a map of people's own making is one value.
        if isinstance(value, dict) and value and name != "resources":
            yield from _leaves(value, f"{where}.")
        else:
            yield where


def test_every_value_of_the_chart_is_told() -> None:
    values = yaml.safe_load((ROOT / "manifests/chart/tidegate/values.yaml").read_text())
    told = (DOCS / "install.md").read_text()
    assert [path for path in _leaves(values) if f"`{path}`" not in told] == []


@pytest.mark.parametrize("account", ACCOUNTS)
def test_every_permission_is_told(account: str) -> None:
    page = (DOCS / "permissions.md").read_text()
    section = page.split(f"## ServiceAccount `{account}`")[1].split("\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("| ")]
    objects = yaml.safe_load_all((ROOT / "manifests/base/tidegate.yaml").read_text())
    for grant in granted(objects, account):
        named = [row for row in rows if f"`{grant.resource}`" in row]
        assert named, grant
        same = [row for row in rows if "the same" in row] if grant.group == "tidegate.dev" else []
        assert [r for r in (*named, *same) if re.search(rf"\b{grant.verb}\b", r)], grant


@pytest.mark.parametrize("page", sorted(p.name for p in DOCS.glob("*.md")))
def test_manifests_in_the_docs_are_yaml(page: str) -> None:
    for block in re.findall(r"^```yaml\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S):
        for item in yaml.safe_load_all(block):
            assert {"apiVersion", "kind", "metadata"} <= item.keys()
