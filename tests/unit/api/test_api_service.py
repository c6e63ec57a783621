"""The table of services: what each format can say, and which backends a node uses."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import UNSET
from msgspec.structs import replace
from tidegate_api.choice import choose, healthy
from tidegate_api.service import _LATER, Backend, Frontend, ServicePort, format_of
from tidegate_api.state import encode

FRONTEND = Frontend(address="10.96.0.1", port=80, protocol="TCP")
BACKEND = Backend(address="10.244.0.2", port=8080)
PORT = ServicePort(
    namespace="shop", name="web", type="ClusterIP", frontends=[FRONTEND], backends=[BACKEND]
)


def test_what_format_1_can_say_has_the_bytes_that_it_had() -> None:
    assert (format_of(PORT), encode(PORT)) == (
        1,
        b'{"namespace":"shop","name":"web","type":"ClusterIP","frontends":[{"address":"10.96.0.1",'
        b'"port":80,"protocol":"TCP","portName":""}],"backends":[{"address":"10.244.0.2",'
        b'"port":8080}]}',
    )


LATER: list[tuple[type, dict[str, Any]]] = [
    (Frontend, {"kind": "NodePort"}),
    (Backend, {"node": "a"}),
    (Backend, {"zones": ["z"]}),
    (Backend, {"nodes": ["a"]}),
    (Backend, {"state": "Terminating"}),
    (ServicePort, {"affinity": 10800}),
    (ServicePort, {"internal": "Local"}),
    (ServicePort, {"external": "Local"}),
    (ServicePort, {"source_ranges": ["192.0.2.0/24"]}),
    (ServicePort, {"algorithm": "Maglev"}),
    (ServicePort, {"health_check_port": 30001}),
]


@pytest.mark.parametrize(("kind", "fields"), LATER)
def test_each_later_field_needs_format_2(kind: type, fields: dict[str, Any]) -> None:
    made = {
        Frontend: lambda: replace(PORT, frontends=[replace(FRONTEND, **fields)]),
        Backend: lambda: replace(PORT, backends=[replace(BACKEND, **fields)]),
        ServicePort: lambda: replace(PORT, **fields),
    }[kind]()
    assert format_of(made) == 2


def test_every_later_field_is_known() -> None:
    """A field that may be absent came later than the format without it."""
    absent = {
        (kind, name)
        for kind in (Frontend, Backend, ServicePort)
        for name, default in zip(
            kind.__struct_fields__[::-1], kind.__struct_defaults__[::-1], strict=False
        )
        if default is UNSET
    }
    assert absent == {(kind, name) for kind, names in _LATER.items() for name in names}
    assert absent == {(kind, name) for kind, fields in LATER for name in fields}


def backend(last: int, **fields: Any) -> Backend:
    return Backend(address=f"10.244.0.{last}", port=8080, **fields)


def test_nobody_is_refused_and_others_nodes_are_not_told() -> None:
    local = replace(PORT, backends=[backend(2, node="a")], internal="Local")
    assert choose(local, UNSET, "a").backends == (backend(2, node="a"),)
    assert choose(local, UNSET, "b") == ((), "Drop")
    assert choose(replace(local, backends=[]), UNSET, "b") == ((), "Reject")
    assert choose(replace(PORT, backends=[]), UNSET, "b") == ((), "Reject")


def test_a_health_check_counts_ready_backends_of_the_node() -> None:
    ports = [
        replace(PORT, backends=[backend(2, node="a"), backend(3, node="b")]),
        replace(PORT, backends=[backend(2, node="a"), backend(4, node="a", state="Terminating")]),
    ]
    assert healthy(ports, "a") == {"10.244.0.2"}
    assert healthy(ports, "c") == frozenset()
