"""What the model of a TrafficPolicy accepts a real API server admits, and what it rejects the
server rejects; but for the few things that a schema cannot say at a bounded cost, and those fail
closed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from manifests.installed import Installed
from manifests.test_mf_models import DELETE, ODD, PROPERTY, REPEAT, _change, _paths
from pydantic import ValidationError
from tidegate_api.trafficpolicy import MAX_PEERS, MAX_RULES, MAX_TERMS, MAX_VALUES, TrafficPolicy
from tidegate_kube import Client, Invalid, resources
from tidegate_operator.cluster import kinds

pytestmark = [pytest.mark.apiserver, pytest.mark.slow]

Json = dict[str, Any]
Path = tuple[str | int, ...]

TCP = {"protocol": "TCP", "port": 443}
FULL: Json = {
    "subject": {
        "podSelector": {
            "matchExpressions": [
                {"key": "app", "operator": "In", "values": ["web", ""]},
                {"key": "example.com/tier", "operator": "Exists"},
            ]
        }
    },
    "isolates": ["Ingress", "Egress"],
    "mode": "Audit",
    "ingress": [
        {
            "action": "Deny",
            "log": True,
            "peers": [
                {
                    "pods": {
                        "namespaceSelector": {"matchLabels": {"team": "red"}},
                        "podSelector": {"any": True},
                    }
                },
                {"entities": ["world", "host"]},
                {"cidrs": [{"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}]},
                {"identity": "office"},
                {"any": True},
            ],
            "ports": [
                TCP,
                {"protocol": "UDP", "range": {"start": 1, "end": 65535}},
                {"protocol": "SCTP", "portName": "http"},
                {"icmp": {"family": "IPv4", "type": 8, "code": 0}},
                {"icmp": {"family": "IPv6", "type": 128, "anyCode": True}},
                {"icmp": {"family": "IPv6", "any": True}},
                {"any": True},
            ],
        }
    ],
    "egress": [{"action": "Allow", "peers": [{"any": True}], "ports": [{"any": True}]}],
}
RULE, PEERS, PORTS = ("ingress", 0), ("ingress", 0, "peers"), ("ingress", 0, "ports")
LABELS: Path = (*PEERS, 0, "pods", "namespaceSelector", "matchLabels")
TERMS: Path = ("subject", "podSelector", "matchExpressions")
BLOCK: Path = (*PEERS, 2, "cidrs", 0)


def policy(spec: Any) -> Json:
    return {
        "apiVersion": "tidegate.dev/v1alpha1",
        "kind": "TrafficPolicy",
        "metadata": {"name": "changed", "namespace": "default"},
        "spec": spec,
    }


def changed(path: Path, how: Any) -> Json:
    spec = copy.deepcopy(FULL)
    whole = {"spec": spec}
    at: Any = whole
    for step in ("spec", *path)[:-1]:
        at = at[step]
    last = ("spec", *path)[-1]
    if how is DELETE:
        del at[last]
    else:
        at[last] = how
    made = policy(spec)
    del made["spec"]
    return made | whole


def many(count: int, item: Any) -> list[Any]:
    return [item] * count


ADMITTED: list[tuple[str, Path, Any]] = [
    ("as it is", (), FULL),
    ("without rules", ("ingress",), DELETE),
    ("with none", ("ingress",), []),
    ("isolates nobody", ("isolates",), []),
    ("isolates one", ("isolates",), ["Egress"]),
    ("enforced", ("mode",), "Enforce"),
    ("not logged", (*RULE, "log"), DELETE),
    ("everybody", ("subject", "podSelector"), {"any": True}),
    ("an empty value", (*LABELS, "team"), ""),
    ("a long key", LABELS, {f"{'a' * 63}.b/{'n' * 63}": "x"}),
    ("the most labels", LABELS, {f"k{n}": "v" for n in range(MAX_TERMS)}),
    ("the most expressions", TERMS, many(MAX_TERMS, {"key": "a", "operator": "Exists"})),
    ("no values", TERMS, [{"key": "a", "operator": "DoesNotExist", "values": []}]),
    ("the most values", (*TERMS, 0, "values"), [f"v{n}" for n in range(MAX_VALUES)]),
    ("every entity", (*PEERS, 1, "entities"),
     ["world", "host", "remote-node", "kube-apiserver", "cluster"]),
    ("no excepts", (*BLOCK, "except"), []),
    ("IPv6", BLOCK, {"cidr": "2001:db8::/32", "except": ["2001:db8:1::/48"]}),
    ("all of it", BLOCK, {"cidr": "0.0.0.0/0", "except": []}),
    ("the most peers", PEERS, many(MAX_PEERS, {"any": True})),
    ("the most ports", PORTS, many(MAX_PEERS, {"any": True})),
    ("the most rules", ("egress",), many(MAX_RULES, FULL["egress"][0])),
    ("one port as a range", (*PORTS, 1, "range"), {"start": 7, "end": 7}),
    ("a long port name", (*PORTS, 2, "portName"), "a" * 15),
]  # fmt: skip
REFUSED: list[tuple[str, Path, Any]] = [
    ("no spec", (), DELETE),
    *((f"no {name}", (name,), DELETE) for name in ("subject", "isolates", "mode")),
    *((f"a rule without {name}", (*RULE, name), DELETE) for name in ("action", "peers", "ports")),
    ("no peer", PEERS, []),
    ("no port", PORTS, []),
    ("a selector that says nothing", ("subject", "podSelector"), {}),
    ("a selector that says two things", ("subject", "podSelector"),
     {"any": True, "matchLabels": {"a": "b"}}),
    ("any: false", ("subject", "podSelector"), {"any": False}),
    ("any: 1", ("subject", "podSelector"), {"any": 1}),
    ("any: 1.0", ("egress", 0, "ports", 0, "any"), 1.0),
    ("no labels", LABELS, {}),
    ("too many labels", LABELS, {f"k{n}": "v" for n in range(MAX_TERMS + 1)}),
    ("a null value", (*LABELS, "team"), None),
    ("a key that is none", LABELS, {"-a": "b"}),
    ("a key that is none, asked for", (*TERMS, 0, "key"), "-a"),
    ("a key with a prefix too long", (*TERMS, 1, "key"), f"{'a.' * 127}a/n"),
    ("a system key, asked for", (*TERMS, 0, "key"), ":port/TCP/http"),
    ("a system key", LABELS, {":port/TCP/http": "80"}),
    ("a value that is none", (*LABELS, "team"), "-a"),
    ("a value too long", (*LABELS, "team"), "a" * 64),
    ("a number", (*LABELS, "team"), 1),
    ("In without values", (*TERMS, 0, "values"), []),
    ("Exists with values", (*TERMS, 1, "values"), ["a"]),
    ("an unknown operator", (*TERMS, 0, "operator"), "Like"),
    ("too many expressions", TERMS, many(MAX_TERMS + 1, {"key": "a", "operator": "Exists"})),
    ("too many values", (*TERMS, 0, "values"), [f"v{n}" for n in range(MAX_VALUES + 1)]),
    ("a direction twice", ("isolates",), ["Ingress", "Ingress"]),
    ("an unknown direction", ("isolates",), ["Both"]),
    ("an unknown mode", ("mode",), "Off"),
    ("an unknown action", (*RULE, "action"), "Pass"),
    ("log as text", (*RULE, "log"), "yes"),
    ("too many rules", ("egress",), many(MAX_RULES + 1, FULL["egress"][0])),
    ("too many peers", PEERS, many(MAX_PEERS + 1, {"any": True})),
    ("too many ports", PORTS, many(MAX_PEERS + 1, {"any": True})),
    ("a peer that says nothing", (*PEERS, 4), {}),
    ("a peer that says two things", (*PEERS, 4), {"any": True, "identity": "a"}),
    ("pods without their namespaces", (*PEERS, 0, "pods", "namespaceSelector"), DELETE),
    ("no entity", (*PEERS, 1, "entities"), []),
    ("an entity twice", (*PEERS, 1, "entities"), ["host", "host"]),
    ("an unknown entity", (*PEERS, 1, "entities"), ["internet"]),
    ("no except", (*BLOCK, "except"), DELETE),
    ("no network", (*PEERS, 2, "cidrs"), []),
    ("an address for a network", (*BLOCK, "cidr"), "10.0.0.1"),
    ("text for a network", (*BLOCK, "cidr"), "office"),
    ("no name of an identity", (*PEERS, 3, "identity"), "Office"),
    ("port 0", (*PORTS, 0, "port"), 0),
    ("port 65536", (*PORTS, 0, "port"), 65536),
    ("a port as text", (*PORTS, 0, "port"), "443"),
    ("a port without its protocol", (*PORTS, 0, "protocol"), DELETE),
    ("a protocol without ports", (*PORTS, 0, "port"), DELETE),
    ("an unknown protocol", (*PORTS, 0, "protocol"), "ICMP"),
    ("a port and a range", (*PORTS, 1, "port"), 1),
    ("a range backwards", (*PORTS, 1, "range"), {"start": 2, "end": 1}),
    ("half a range", (*PORTS, 1, "range"), {"start": 2}),
    ("a port name too long", (*PORTS, 2, "portName"), "a" * 16),
    ("a port name that is none", (*PORTS, 2, "portName"), "Http"),
    ("any and a port", (*PORTS, 0, "any"), True),
    ("a type without a code", (*PORTS, 3, "icmp", "code"), DELETE),
    ("a code without a type", (*PORTS, 3, "icmp", "type"), DELETE),
    ("a code and any code", (*PORTS, 3, "icmp", "anyCode"), True),
    ("any and a type", (*PORTS, 5, "icmp", "type"), 1),
    ("no family", (*PORTS, 5, "icmp", "family"), DELETE),
    ("type 256", (*PORTS, 3, "icmp", "type"), 256),
]  # fmt: skip
STALLED: list[tuple[str, Path, Any]] = [
    ("host bits", (*BLOCK, "cidr"), "10.0.0.1/8"),
    ("too many bits", (*BLOCK, "cidr"), "10.0.0.0/33"),
    ("no address", (*BLOCK, "cidr"), "10.0.0.999/8"),
    ("an except outside", (*BLOCK, "except"), ["11.0.0.0/16"]),
    ("an except of the other family", (*BLOCK, "except"), ["2001:db8::/32"]),
]
"""What would take CEL over a million networks."""


@pytest.fixture(scope="module")
def admin(installed: Installed) -> Client:
    return installed.client()


def refusal(client: Client, item: Json) -> str:
    """Why the server does not admit it; "" if it does. Leaves nothing behind."""
    resource = resources.TRAFFIC_POLICIES
    try:
        client.create(resource, msgspec.json.encode(item), "default")
    except Invalid as error:
        return str(error)
    client.delete(resource, item["metadata"]["name"], "default")
    return ""


def rejected(item: Json) -> str:
    try:
        TrafficPolicy.model_validate(item)
    except ValidationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("reason", "path", "how"), ADMITTED, ids=[row[0] for row in ADMITTED])
def test_admitted(admin: Client, reason: str, path: Path, how: Any) -> None:
    item = changed(path, how)
    assert (rejected(item), refusal(admin, item)) == ("", "")


@pytest.mark.parametrize(("reason", "path", "how"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refused(admin: Client, reason: str, path: Path, how: Any) -> None:
    item = changed(path, how)
    assert rejected(item)
    assert refusal(admin, item)


def fails_closed(item: Json) -> bool:
    """As the operator reads it: what the model rejects is a rule that is not understood."""
    meta = {**item["metadata"], "uid": "u", "generation": 1}
    facts = kinds.traffic_policy(msgspec.json.encode({**item, "metadata": meta}))
    return bool(facts.unread)


@pytest.mark.parametrize(("reason", "path", "how"), STALLED, ids=[row[0] for row in STALLED])
def test_what_a_schema_cannot_say_fails_closed(
    admin: Client, reason: str, path: Path, how: Any
) -> None:
    item = changed(path, how)
    assert rejected(item)
    assert refusal(admin, item) == ""
    assert fails_closed(item)


WRONG: list[Any] = [
    *ODD,
    *("", "a" * 64, "a" * 254, "In", "Exists", "TCP", "Enforce", "Ingress", "world", "-a"),
    *("10.0.0.0/8", "10.0.0.1/8", "::/0", 0, 255, 256, 65535, 65536, -1, False),
    *({"any": True}, {"any": False}, [{"any": True}], ["Ingress"], ["world", "world"]),
]


@st.composite
def mutated(draw: Callable[[Any], Any]) -> Json:
    item = policy(copy.deepcopy(FULL))
    for _ in range(draw(st.integers(1, 2))):
        paths = sorted(_paths(item.get("spec"), ("spec",)), key=str)
        path = draw(st.sampled_from(paths)) if "spec" in item else ()
        if path:
            _change(item, path, draw(st.sampled_from([DELETE, REPEAT, *WRONG])))
    return item


def nulls_dropped(value: Any, path: Path = ()) -> Any:
    """What an API server reads: a null that the schema does not allow is not there. A label's value
    may be one, and a rule refuses it."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if v is not None or path[-1:] == ("matchLabels",)}
        return {key: nulls_dropped(inner, (*path, key)) for key, inner in kept.items()}
    return [nulls_dropped(inner, path) for inner in value] if isinstance(value, list) else value


@PROPERTY
@given(item=mutated())
@example(item=policy(FULL))
def test_a_changed_policy(admin: Client, item: Json) -> None:
    item = nulls_dropped(item)
    model, server = rejected(item), refusal(admin, item)
    if model and not server:
        assert fails_closed(item), f"admitted, and opens: {model}"
        assert "cidr" in model, model
    else:
        assert bool(model) == bool(server), (
            f"model: {model or 'accepts'}; server: {server or 'admits'}"
        )
