"""Write what is made of the types in tidegate_api: the CRDs, and docs/api.md.

`make crds` runs it; a test compares what is committed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tidegate_api.schema import KINDS, Kind, definition, file_name
from tidegate_api.state import MAX_COUNT

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "api.md"
CHART = HERE.parent / "manifests" / "chart" / "tidegate" / "files" / "crds"
"""The chart has them too: Helm reads nothing outside a chart, and warns at symbolic links."""
HEADER = "# Made by `make crds` from crds/tidegate_api. Do not edit.\n"

INTRODUCTION = """\
# The API

Group `tidegate.dev`, version `v1alpha1`. This page is made of the CRDs; `kubectl explain` tells the
same. All kinds are in category `tidegate`: `kubectl get tidegate -A` lists everything.

An Identity is the one kind here that people write too. The others are written by the operator and
the nodes' loaders alone: read them and wait on them; what is edited in them is written anew.

- `[]` and absent differ, and null is never written. `tidegate compile` refuses null; an API server
  takes it for absence, but refuses it as the value of a label.
- Lists are atomic and sorted by their writer; conditions are a map by `type`.
- `Ready` is always there once the writer has looked. `Reconciling` and `Stalled` are there only
  while true. With `observedGeneration` in the status and in each condition, `kubectl wait`, Flux
  and Argo CD need no rule of their own.
- Unknown fields are refused by `kubectl` and by `tidegate compile`. A client that asks for no field
  validation has them dropped, which never widens what an object says.
"""


class _Dumper(yaml.SafeDumper):
    """Lists indented, no aliases: the way people write manifests."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: object) -> bool:
        return True


def files() -> dict[Path, str]:
    """Path -> text of everything that is generated."""
    crds = {file_name(kind): HEADER + _dump(definition(kind)) for kind in KINDS}
    found = {place / name: text for place in (HERE, CHART) for name, text in crds.items()}
    names = "".join(f"  - {file_name(kind)}\n" for kind in KINDS)
    found[HERE / "kustomization.yaml"] = (
        f"{HEADER}apiVersion: kustomize.config.k8s.io/v1beta1\n"
        f"kind: Kustomization\nresources:\n{names}"
    )
    found[DOCS] = INTRODUCTION + "".join(_page(kind) for kind in KINDS)
    return found


def _dump(data: object) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)


# ---- docs/api.md ----------------------------------------------------------------------


def _page(kind: Kind) -> str:
    made = definition(kind)["spec"]
    schema = made["versions"][0]["schema"]["openAPIV3Schema"]
    columns = ", ".join(f"`{name}`" for name, _, _ in kind.columns)
    if kind.wide:
        columns += f"; with `-o wide` {', '.join(f'`{name}`' for name, _, _ in kind.wide)}"
    rows = "".join(_row(*row) for row in _fields(schema, ""))
    return (
        f"\n## {kind.name}\n\n{schema['description']}\n\n"
        f"{made['scope']}, `{kind.plural}`, short `{kind.short}`. Columns: {columns}.\n\n"
        f"| field | type | |\n| --- | --- | --- |\n{rows}{_rules(schema)}"
    )


def _row(path: str, schema: dict[str, Any], required: bool) -> str:
    must = "" if required else ", optional"
    return f"| `{path}` | {_type(schema)}{must} | {_cell(schema['description'])} |\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " \\| ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "array":
        return f"list of {_type(schema['items'])}{_bound(schema, 'Items')}"
    if "additionalProperties" in schema:
        return f"map to {_type(schema['additionalProperties'])}{_bound(schema, 'Properties')}"
    if schema["type"] == "integer":
        least, most = schema["minimum"], schema["maximum"]
        return f"integer from {least}" + (f" to {most:,}" if most < MAX_COUNT else "")
    return str(schema["type"]) + _bound(schema, "Length", " characters")


def _bound(schema: dict[str, Any], what: str, unit: str = "") -> str:
    most = schema.get(f"max{what}")
    return f" (at most {most:,}{unit})" if most is not None else ""


def _fields(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """(path, schema, required) of every field below, those of Kubernetes' own left out."""
    for name, inner in schema.get("properties", {}).items():
        if not path and name in ("apiVersion", "kind", "metadata"):
            continue
        where = f"{path}.{name}" if path else name
        yield where, inner, name in schema.get("required", ())
        if inner["type"] == "array":
            yield from _fields(inner["items"], f"{where}[]")
        elif isinstance(inner.get("additionalProperties"), dict):
            yield from _fields(inner["additionalProperties"], f"{where}.*")
        else:
            yield from _fields(inner, where)


def _rules(schema: dict[str, Any]) -> str:
    messages = [rule["message"] for rule in _validations(schema)]
    lines = "".join(f"- {message}\n" for message in messages)
    return f"\nThe API server refuses what breaks one of these:\n\n{lines}" if lines else ""


def _validations(schema: dict[str, Any]) -> Iterator[dict[str, str]]:
    yield from schema.get("x-kubernetes-validations", ())
    for inner in schema.get("properties", {}).values():
        yield from _validations(inner)
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            yield from _validations(schema[name])


def main() -> int:
    for path, text in files().items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"wrote {path.relative_to(HERE.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
