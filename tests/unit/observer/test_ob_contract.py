"""The .proto files are the contract, and what is committed of protoc is of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FieldDescriptor as F
from support.hubble import contract
from tidegate_observer import methods
from tidegate_observer.api import flow_pb2, observer_pb2, peer_pb2, relay_pb2

ROOT = Path(__file__).parents[3]
MODULES = {"flow": flow_pb2, "relay": relay_pb2, "observer": observer_pb2, "peer": peer_pb2}
CONTRACT = contract()
SCALARS = {
    F.TYPE_STRING: "string",
    F.TYPE_BOOL: "bool",
    F.TYPE_DOUBLE: "double",
    F.TYPE_INT32: "int32",
    F.TYPE_INT64: "int64",
    F.TYPE_UINT32: "uint32",
    F.TYPE_UINT64: "uint64",
}


def _find(name, kind):
    package, _, rest = name.partition(".")
    first, *others = rest.split(".")
    module = MODULES[package].DESCRIPTOR
    if not others and kind == "enum":
        return module.enum_types_by_name[first]
    found = module.message_types_by_name[first]
    for other in others:
        nested = found.enum_types_by_name if kind == "enum" else found.nested_types_by_name
        found = nested[other]
    return found


def _type(field):
    if field.message_type is not None:
        return field.message_type.full_name
    return field.enum_type.full_name if field.enum_type is not None else SCALARS[field.type]


@pytest.mark.parametrize("name", [n for n in CONTRACT.messages if not n.startswith("google.")])
def test_a_message_has_the_fields_of_the_contract(name: str) -> None:
    found = {(f.number, f.name, _type(f), f.is_repeated) for f in _find(name, "message").fields}
    assert found == {tuple(field) for field in CONTRACT.messages[name]}


@pytest.mark.parametrize("name", CONTRACT.enums)
def test_an_enum_has_the_values_of_the_contract(name: str) -> None:
    values = {value.number: value.name for value in _find(name, "enum").values}
    assert values == CONTRACT.enums[name]


def test_there_are_no_others() -> None:
    found = {f"{package}.{name}" for package, m in MODULES.items() for name in _names(m.DESCRIPTOR)}
    wanted = {*CONTRACT.enums, *(n for n in CONTRACT.messages if not n.startswith("google."))}
    assert found == {name for name in wanted if name.count(".") == 1}


def _names(module):
    return [*module.message_types_by_name, *module.enum_types_by_name]


def test_every_call_of_the_contract_is_served() -> None:
    served = {m.path: m for m in methods.METHODS}
    assert served.keys() == CONTRACT.calls.keys()
    for path, (request, response, streams) in CONTRACT.calls.items():
        method = served[path]
        names = method.request.DESCRIPTOR.full_name, method.response.DESCRIPTOR.full_name
        assert (*names, method.streams) == (request, response, streams)


def test_the_committed_code_is_made_of_the_proto_files(tmp_path: Path) -> None:
    """By what it describes, so that another version of protoc says the same."""
    where = ROOT / "observer"
    sources = [p.relative_to(where) for p in where.glob("tidegate_observer/api/*.proto")]
    out = tmp_path / "set.bin"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--descriptor_set_out={out}"]
    subprocess.run([*command, *map(str, sources)], cwd=where, check=True)
    made = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    committed = {m.DESCRIPTOR.name: m.DESCRIPTOR for m in MODULES.values()}
    assert {file.name for file in made.file} == set(committed)
    for file in made.file:
        held = descriptor_pb2.FileDescriptorProto()
        committed[file.name].CopyToProto(held)
        assert _bare(held) == _bare(file), f"{file.name}: run `make protos`"


def _bare(file):
    """Without names for JSON, which protoc adds and the runtime does not."""
    text = str(file)
    return [line for line in text.splitlines() if "json_name" not in line]
