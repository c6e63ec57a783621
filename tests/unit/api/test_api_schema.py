"""The committed CRDs are those of the types, and say all that the types say."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
import yaml
from tidegate_api import state, users
from tidegate_api.schema import KINDS, Kind, definition, file_name

ROOT = Path(__file__).parents[3]
KIND_NAMES = [kind.name for kind in KINDS]


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("crds_generate", ROOT / "crds" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_committed_is_what_the_types_make() -> None:
    made = _generator().files()
    assert {path.name for path in made} >= {"api.md", "kustomization.yaml"}
    stale = [p.name for p, text in made.items() if not p.exists() or p.read_text() != text]
    assert stale == [], "run `make crds`"


def test_nothing_else_is_committed() -> None:
    names = {file_name(kind) for kind in KINDS} | {"kustomization.yaml"}
    assert {path.name for path in (ROOT / "crds").glob("*.yaml")} == names


def _schemas(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from _schemas(inner, f"{path}.{name}")
    for name in ("items", "additionalProperties"):
        if name in schema:
            yield from _schemas(schema[name], f"{path}[]")


def _committed(kind: Kind) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "crds" / file_name(kind)).read_text())
    return loaded


def _schema(kind: Kind) -> dict[str, Any]:
    found: dict[str, Any] = _committed(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_yaml_and_definition_agree(kind: Kind) -> None:
    assert _committed(kind) == definition(kind)


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_every_field_has_a_type_and_nothing_is_open(kind: Kind) -> None:
    for path, schema in _schemas(_schema(kind), kind.name):
        assert schema.get("type"), path
        assert not {key for key in schema if "preserve-unknown" in key}, path
        # Null is dropped, but for a label's: there a rule refuses it.
        label = path == "Identity.spec.labels[]" or path.endswith(".matchLabels[]")
        assert ("nullable" in schema) == label, path
        if schema["type"] == "array":
            assert schema["x-kubernetes-list-type"] in ("atomic", "map", "set"), path
        if schema["type"] == "integer":
            assert {"minimum", "maximum"} <= schema.keys(), path
        if schema["type"] == "object" and "properties" not in schema:
            assert "additionalProperties" in schema or path == f"{kind.name}.metadata"


def _bounded(schema: dict[str, Any]) -> bool:
    bound = {"array": "maxItems", "string": "maxLength"}.get(schema["type"])
    if "additionalProperties" in schema:
        bound = "maxProperties"
    return bound is None or bound in schema or "enum" in schema


@pytest.mark.parametrize("name", ["Identity", "TrafficPolicy"])
def test_a_rule_of_people_walks_nothing_without_a_bound(name: str) -> None:
    kind = next(kind for kind in KINDS if kind.name == name)
    spec = _schema(kind)["properties"]["spec"]
    assert [path for path, schema in _schemas(spec, "spec") if not _bounded(schema)] == []


def test_columns_are_those_that_were_promised() -> None:
    columns = {kind.name: [name for name, _, _ in kind.columns] for kind in KINDS}
    identity = ["ID", "NAMESPACE", "LABELS", "ENDPOINTS", "READY", "AGE"]
    assert columns["Identity"] == identity
    node = ["DESIRED", "REALISED", "ENDPOINTS", "DRIFT", "READY", "AGE"]
    assert columns["NodeState"] == node


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_every_column_prints_a_field_that_there_is(kind: Kind) -> None:
    schema = _schema(kind)
    known = {
        path.removeprefix(kind.name).replace("[]", "") for path, _ in _schemas(schema, kind.name)
    }
    for _, path, _ in (*kind.columns, *kind.wide):
        if not path.startswith(".metadata."):
            assert re.sub(r"\[.*?\]", "", path) in known, path


def test_conditions_are_a_map_by_type() -> None:
    found = 0
    for kind in KINDS:
        for path, schema in _schemas(_schema(kind), kind.name):
            if path.endswith(".conditions"):
                found += 1
                assert schema["x-kubernetes-list-map-keys"] == ["type"]
                assert "observedGeneration" in schema["items"]["properties"]
    assert found == 4


def test_both_models_of_an_identity_have_the_same_fields() -> None:
    fields = {field.encode_name for field in msgspec.structs.fields(state.IdentitySpec)}
    assert {f.alias or n for n, f in users.IdentitySpec.model_fields.items()} == fields


def test_kinds_match_the_resources_of_the_client() -> None:
    assert len({kind.plural for kind in KINDS}) == len({kind.short for kind in KINDS}) == 7
    assert [k.name for k in KINDS if k.namespaced] == ["TrafficPolicy", "PolicyStatus"]
