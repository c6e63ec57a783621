"""The CustomResourceDefinitions, made of the types in `state` and `users`. Pure.

A schema says what the types say: required fields, bounds, enums, descriptions. What types
cannot say (immutability, one of several) is in `KINDS`, next to the names and columns of
each kind. No rule walks a list or text without a bound, so CEL's cost has one.

Structural schemas allow no `$ref`, no `null` and no type inside `oneOf`; so a tagged union
is one object with the fields of all its members, and `oneOf` says which go together.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import inspect as types
from pydantic import BaseModel

from tidegate_api import GROUP, VERSION, state, trafficpolicy, users

Schema = dict[str, Any]

READY = '.status.conditions[?(@.type=="Ready")].status'
KEEP = {
    "argocd.argoproj.io/sync-options": "Prune=false,Delete=false,ServerSideApply=true",
    "helm.sh/resource-policy": "keep",
    "kustomize.toolkit.fluxcd.io/prune": "disabled",
}
"""On every CRD. Deleting one deletes every object of its kind, so no tool does it by itself:
`tidegate uninstall` does, once the nodes are clean."""

METADATA: Mapping[str, Schema] = {
    "apiVersion": {"description": "Version of this object's schema.", "type": "string"},
    "kind": {"description": "Kind of this object.", "type": "string"},
    "metadata": {"type": "object"},  # all that an API server allows here
}


@dataclass(frozen=True)
class Rule:
    """A CEL validation on the object at `path`, "" for the whole object."""

    path: str
    rule: str
    message: str


@dataclass(frozen=True)
class Kind:
    """One CRD. `columns`: name, JSONPath, type; the name of the object comes first anyway.
    `wide`: those that only `-o wide` shows."""

    struct: type[msgspec.Struct]
    plural: str
    short: str
    columns: tuple[tuple[str, str, str], ...]
    rules: tuple[Rule, ...] = ()
    wide: tuple[tuple[str, str, str], ...] = ()
    namespaced: bool = False
    people: type[BaseModel] | None = None
    """The model of `spec` where people write it: stricter than the loader needs it."""

    @property
    def name(self) -> str:
        return self.struct.__name__

    @property
    def crd(self) -> str:
        return f"{self.plural}.{GROUP}"


AGE = ("AGE", ".metadata.creationTimestamp", "date")
IMMUTABLE = "self == oldSelf"
LABEL_KEY = "!format.qualifiedName().validate(key).hasValue()"
POLICY_COLUMNS = (
    ("KIND", ".policy.kind", "string"),
    ("POLICY", ".policy.name", "string"),
    ("REALISED", ".status.nodes.realised", "integer"),
    ("NODES", ".status.nodes.total", "integer"),
    ("READY", READY, "string"),
    AGE,
)


class TrafficPolicy(state.Model, frozen=True):
    __doc__ = trafficpolicy.TrafficPolicy.__doc__

    api_version: str
    kind: str
    metadata: state.Meta
    spec: dict[str, str]
    """What the policy says."""


KINDS = (
    Kind(
        state.Identity,
        "identities",
        "tgid",
        # A map prints as JSON, and a name is not a number: so both are in the status in words.
        (
            ("ID", ".status.id", "integer"),
            ("NAMESPACE", ".spec.namespace", "string"),
            ("LABELS", ".status.summary", "string"),
            ("ENDPOINTS", ".status.endpoints", "integer"),
            ("READY", READY, "string"),
            AGE,
        ),
        (
            Rule(
                "",
                "self.metadata.name.matches('^[a-z]') || "
                "(self.metadata.name.matches('^[1-9][0-9]{2,7}$') && "
                f"int(self.metadata.name) >= {state.FIRST_IDENTITY} && "
                f"int(self.metadata.name) < {1 << state.IDENTITY_BITS})",
                "the name must begin with a letter; "
                "numbers from 256 to 16777215 are names of the operator's own",
            ),
            Rule(
                "",
                "!has(self.spec.labels) || (self.metadata.name.matches('^[0-9]') ? "
                f"self.spec.labels.all(key, key.startsWith('{state.PORT_LABEL}') || {LABEL_KEY}) : "
                f"self.spec.labels.all(key, {LABEL_KEY} && "
                f"self.spec.labels[key] != '{state.ANY_OTHER}'))",
                "every key must be a label key: [prefix/]name; "
                "those that begin with :port/, and the value *, are the operator's own",
            ),
            Rule("spec", IMMUTABLE, "spec is immutable: delete the Identity and make another"),
            Rule(
                "spec",
                "has(self.cidrs) ? !has(self.namespace) && !has(self.labels) : "
                "has(self.namespace) && has(self.labels)",
                "give both namespace and labels, or only cidrs",
            ),
        ),
        people=users.IdentitySpec,
    ),
    Kind(
        TrafficPolicy,
        "trafficpolicies",
        "tgp",
        (("MODE", ".spec.mode", "string"), ("ISOLATES", ".spec.isolates", "string"), AGE),
        namespaced=True,
        people=trafficpolicy.TrafficPolicySpec,
    ),
    Kind(
        state.NodeState,
        "nodestates",
        "tgns",
        (
            (
                "DESIRED",
                f".metadata.annotations.{state.DIGEST_ANNOTATION.replace('.', chr(92) + '.')}",
                "string",
            ),
            ("REALISED", ".status.realised", "string"),
            ("ENDPOINTS", ".status.endpoints", "integer"),
            ("DRIFT", ".status.drift", "integer"),
            ("READY", READY, "string"),
            AGE,
        ),
        (
            Rule(
                "spec",
                "!has(oldSelf.term) || has(self.term) && self.term >= oldSelf.term",
                "term never falls: a newer leader has written this node state",
            ),
        ),
    ),
    Kind(
        state.RuleSet,
        "rulesets",
        "tgrs",
        (("DIRECTION", ".spec.direction", "string"), AGE),
        (Rule("spec", IMMUTABLE, "a rule set is named by its content and never edited"),),
        wide=(("POLICIES", ".spec.policies", "string"),),
    ),
    Kind(
        state.StateSlice,
        "stateslices",
        "tgss",
        (
            ("TABLE", ".spec.table", "string"),
            ("EPOCH", ".spec.epoch", "integer"),
            ("SHARD", ".spec.shard", "integer"),
            ("SHARDS", ".spec.shards", "integer"),
            ("REVISION", ".spec.revision", "integer"),
            AGE,
        ),
    ),
    Kind(state.PolicyStatus, "policystatuses", "tgps", POLICY_COLUMNS, namespaced=True),
    Kind(state.ClusterPolicyStatus, "clusterpolicystatuses", "tgcps", POLICY_COLUMNS),
)


def file_name(kind: Kind) -> str:
    return f"{GROUP}_{kind.plural}.yaml"


def definition(kind: Kind) -> Schema:
    """The CustomResourceDefinition as plain data, ready to be written as YAML."""
    columns: list[Schema] = [
        {"name": name, "type": of, "jsonPath": path} for name, path, of in kind.columns
    ]
    columns += [
        {"name": name, "type": of, "jsonPath": path, "priority": 1} for name, path, of in kind.wide
    ]
    version: Schema = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema_of(kind)},
        "additionalPrinterColumns": columns,
    }
    if "status" in kind.struct.__struct_fields__:
        version["subresources"] = {"status": {}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": kind.crd,
            "labels": {"app.kubernetes.io/part-of": "tidegate"},
            "annotations": KEEP,
        },
        "spec": {
            "group": GROUP,
            "names": {
                "kind": kind.name,
                "listKind": f"{kind.name}List",
                "plural": kind.plural,
                "singular": kind.name.lower(),
                "shortNames": [kind.short],
                "categories": ["tidegate"],
            },
            "scope": "Namespaced" if kind.namespaced else "Cluster",
            "versions": [version],
        },
    }


def schema_of(kind: Kind) -> Schema:
    """The kind's whole openAPIV3Schema."""
    info = types.type_info(kind.struct)
    assert isinstance(info, types.StructType)
    fields = {field.encode_name: field for field in info.fields}
    properties: Schema = {}
    for name, field in fields.items():
        if name in METADATA:
            properties[name] = METADATA[name]
            continue
        of = _of_model(kind.people) if name == "spec" and kind.people else _of(field.type)
        properties[name] = {"description": _describe(kind.struct, field.name), **of}
    found: Schema = {
        "description": _text(kind.struct.__doc__),
        "type": "object",
        "required": [n for n, f in fields.items() if f.required and n not in METADATA],
        "properties": properties,
    }
    for rule in kind.rules:
        place = found["properties"][rule.path] if rule.path else found
        place.setdefault("x-kubernetes-validations", []).append(
            {"rule": rule.rule, "message": rule.message}
        )
    return found


# ---- From msgspec ------------------------------------------------------------------


def _of(info: types.Type) -> Schema:
    """The schema of one type, without a description."""
    match info:
        case types.StrType():
            return _sparse(
                type="string",
                minLength=info.min_length,
                maxLength=info.max_length,
                pattern=info.pattern,
            )
        case types.BoolType():
            return {"type": "boolean"}
        case types.IntType():
            return _sparse(type="integer", format="int64", minimum=info.ge, maximum=info.le)
        case types.LiteralType():
            return {"type": "string", "enum": list(info.values)}
        case types.ListType():
            return _list(info)
        case types.DictType():
            return _sparse(
                type="object",
                maxProperties=info.max_length,
                additionalProperties=_of(info.value_type),
            )
        case types.StructType():
            return _struct(info)
        case types.UnionType():
            return _union([member for member in info.types if isinstance(member, types.StructType)])
    raise TypeError(f"no schema for {info}")


def _list(info: types.ListType) -> Schema:
    item = _of(info.item_type)
    found = _sparse(type="array", minItems=info.min_length, maxItems=info.max_length, items=item)
    if isinstance(info.item_type, types.StructType) and info.item_type.cls is state.Condition:
        return {**found, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    return {**found, "x-kubernetes-list-type": "atomic"}


def _struct(info: types.StructType) -> Schema:
    found: Schema = {"type": "object"}
    required = [field.encode_name for field in info.fields if field.required]
    if required:
        found["required"] = required
    found["properties"] = _properties(info)
    if info.cls is state.StateSliceSpec:
        found["oneOf"] = [_only("table", name, {name}, set(state.TABLES)) for name in state.TABLES]
    return found


def _properties(info: types.StructType) -> Schema:
    return {
        field.encode_name: {"description": _describe(info.cls, field.name), **_of(field.type)}
        for field in info.fields
    }


def _union(members: list[types.StructType]) -> Schema:
    """One object for all members of a tagged union; a field of two has to be of one type."""
    properties: Schema = {}
    owned: dict[str, set[str]] = {}
    for member in members:
        tag = str(member.tag)
        fields = {field.encode_name: field for field in member.fields}
        owned[tag] = set(fields)
        for name, schema in _properties(member).items():
            if properties.setdefault(name, schema) != schema:
                raise TypeError(f"{name} differs between the members that have it")
    every = set(properties)
    needed = {
        str(member.tag): {field.encode_name for field in member.fields if field.required}
        for member in members
    }
    tag_field = str(members[0].tag_field)
    described = " ".join(f"`{member.tag}`: {_text(member.cls.__doc__)}" for member in members)
    return {
        "type": "object",
        "required": [tag_field],
        "properties": {
            tag_field: {"description": described, "type": "string", "enum": sorted(owned)},
            **properties,
        },
        "oneOf": [
            _only(tag_field, tag, needed[tag], every - owned[tag] | needed[tag]) for tag in owned
        ],
    }


def _only(field: str, value: str, needed: set[str], minded: set[str]) -> Schema:
    """`field` is `value`; of the `minded` fields exactly the `needed` ones are there."""
    found: Schema = {"properties": {field: {"enum": [value]}}}
    if needed:
        found["required"] = sorted(needed)
    if absent := sorted(minded - needed):
        found["not"] = {"anyOf": [{"required": [name]} for name in absent]}
    return found


def _sparse(**values: Any) -> Schema:
    return {key: value for key, value in values.items() if value is not None}


# ---- From pydantic -----------------------------------------------------------------


def _of_model(model: type[BaseModel]) -> Schema:
    """A model as structural schema."""
    source = model.model_json_schema()
    return _object(model, source, source.get("$defs", {}), _models(model))


def _models(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """By name: those of its module, and itself."""
    found = {
        name: item
        for name, item in vars(sys.modules[model.__module__]).items()
        if isinstance(item, type) and issubclass(item, BaseModel)
    }
    return {**found, model.__name__: model}


def _object(
    model: type[BaseModel],
    source: Mapping[str, Any],
    definitions: Mapping[str, Any],
    models: Mapping[str, type[BaseModel]],
) -> Schema:
    found: Schema = {"type": "object"}
    if source.get("required"):
        found["required"] = source["required"]
    if getattr(model, "exactly_one", False):
        found |= {"minProperties": 1, "maxProperties": 1}
    if rules := getattr(model, "cel", ()):
        found["x-kubernetes-validations"] = [
            {"rule": rule, "message": message} for rule, message in rules
        ]
    by_alias = {field.alias or name: name for name, field in model.model_fields.items()}
    found["properties"] = {
        name: {
            "description": _describe(model, by_alias[name]),
            **_structural(schema, definitions, models),
        }
        for name, schema in source["properties"].items()
    }
    return found


def _structural(
    source: Mapping[str, Any],
    definitions: Mapping[str, Any],
    models: Mapping[str, type[BaseModel]],
) -> Schema:
    """JSON Schema as pydantic writes it -> structural: absent is the only null."""
    if "$ref" in source:
        name = source["$ref"].rpartition("/")[2]
        return _object(models[name], definitions[name], definitions, models)
    found = {k: v for k, v in source.items() if k not in ("title", "default", "anyOf", "const")}
    for member in source.get("anyOf", ()):
        if member.get("type") != "null":
            found = {**_structural(member, definitions, models), **found}
    for inner in ("items", "additionalProperties"):
        if inner in found:
            found[inner] = _structural(found[inner], definitions, models)
    if found.get("type") == "array":
        found.setdefault("x-kubernetes-list-type", "atomic")
    return found


# ---- Descriptions --------------------------------------------------------------------


def _text(docstring: str | None) -> str:
    return " ".join((docstring or "").split())


def _describe(holder: type, field: str) -> str:
    """The string below a field in the source. Raises LookupError where there is none."""
    described = _docstrings(holder.__module__).get((holder.__name__, field))
    if described is None:
        raise LookupError(f"{holder.__name__}.{field} has no description")
    return described


@functools.cache
def _docstrings(module: str) -> dict[tuple[str, str], str]:
    """(class, field) -> the string below it."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    found = {}
    for holder in ast.walk(tree):
        if isinstance(holder, ast.ClassDef):
            for field, text in _described(holder):
                found[holder.name, field] = _text(text)
    return found


def _described(holder: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, below in zip(holder.body, holder.body[1:], strict=False):
        match field, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                yield name, text
