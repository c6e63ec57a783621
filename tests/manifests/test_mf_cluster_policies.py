"""What the model of a ClusterNetworkPolicy accepts a real API server admits, under the CRDs that
its project publishes; what such a server admits and the model rejects fails closed.

The first version that has v1alpha2 takes networks with bits to the right of their mask, the newest
does not. What either would prune the model rejects: in a folder it is an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from manifests.installed import Installed, eventually
from manifests.test_mf_models import DELETE, ODD, PROPERTY, REPEAT, _change, _paths
from pydantic import ValidationError
from support import upstream
from tidegate_api.clusterpolicy import MAX_PRIORITY, MAX_RULE_NAME, MAX_RULES, ClusterNetworkPolicy
from tidegate_kube import Client, Invalid, KubeError, resources
from tidegate_operator.cluster import kinds

pytestmark = [pytest.mark.apiserver, pytest.mark.slow]

Json = dict[str, Any]
Path = tuple[str | int, ...]

RED = {"matchLabels": {"team": "red"}}
WEB = {
    "matchExpressions": [
        {"key": "app", "operator": "In", "values": ["web", ""]},
        {"key": "example.com/tier", "operator": "Exists"},
    ]
}
FULL: Json = {
    "tier": "Admin",
    "priority": 10,
    "subject": {"pods": {"namespaceSelector": RED, "podSelector": WEB}},
    "ingress": [
        {
            "name": "some",
            "action": "Pass",
            "from": [
                {"namespaces": RED},
                {"pods": {"namespaceSelector": RED, "podSelector": WEB}},
                {"pods": {"podSelector": {}}},
            ],
            "protocols": [
                {"tcp": {"destinationPort": {"number": 443}}},
                {"udp": {"destinationPort": {"range": {"start": 1, "end": 65535}}}},
                {"sctp": {"destinationPort": {"number": 9}}},
                {"destinationNamedPort": "http"},
            ],
        },
        {"action": "Deny", "from": [{"namespaces": {}}]},
    ],
    "egress": [
        {
            "action": "Deny",
            "to": [
                {"nodes": {"matchLabels": {"gateway": ""}}},
                {"networks": ["10.0.0.0/8", "2001:db8::/32"]},
                {"namespaces": RED},
                {"pods": {"podSelector": WEB}},
            ],
            "protocols": [{"tcp": {"destinationPort": {"number": 443}}}],
        },
        {"action": "Accept", "to": [{"domainNames": ["*.example.com", "a.example.com."]}]},
        {
            "action": "Accept",
            "to": [{"namespaces": {}}],
            "protocols": [{"destinationNamedPort": "http"}],
        },
    ],
}
IN, OUT = ("ingress", 0), ("egress", 0)
PEERS, PROTOCOLS = (*IN, "from"), (*IN, "protocols")
NETWORKS = (*OUT, "to", 1, "networks")
NAMES = ("egress", 1, "to", 0, "domainNames")
TERMS = ("subject", "pods", "podSelector", "matchExpressions")
HOST_BITS = "10.0.0.1/8"


def policy(spec: Any) -> Json:
    return {
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": {"name": "changed"},
        "spec": spec,
    }


def changed(path: Path, how: Any) -> Json:
    item = policy(copy.deepcopy(FULL))
    _set(item, ("spec", *path), how)
    return item


def _set(item: Json, path: Path, how: Any) -> None:
    """Wherever it is, a dict too."""
    if not isinstance(how, dict):
        _change(item, path, how)
        return
    at: Any = item
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = copy.deepcopy(how)


def many(count: int, item: Any) -> list[Any]:
    return [copy.deepcopy(item) for _ in range(count)]


ADMITTED: list[tuple[str, Path, Any]] = [
    ("as it is", (), FULL),
    ("without rules", ("ingress",), DELETE),
    ("with none", ("ingress",), []),
    ("the Baseline", ("tier",), "Baseline"),
    ("the first", ("priority",), 0),
    ("the last", ("priority",), MAX_PRIORITY),
    ("namespaces", ("subject",), {"namespaces": {}}),
    ("no name", (*IN, "name"), DELETE),
    ("an empty name", (*IN, "name"), ""),
    ("the longest name", (*IN, "name"), "a" * MAX_RULE_NAME),
    ("no protocols", (*IN, "protocols"), DELETE),
    ("the most rules", ("ingress",), many(MAX_RULES, FULL["ingress"][1])),
    ("the most peers", PEERS, many(MAX_RULES, {"namespaces": {}})),
    ("the most protocols", PROTOCOLS, many(MAX_RULES, {"destinationNamedPort": "a"})),
    ("the most networks", NETWORKS, [f"10.{n}.0.0/16" for n in range(MAX_RULES)]),
    ("the most names", NAMES, [f"n{n}.example.com" for n in range(MAX_RULES)]),
    ("an odd name", NAMES, ["a_b.C-d.example.com."]),
    ("all of IPv6", NETWORKS, ["::/0"]),
]
REFUSED: list[tuple[str, Path, Any]] = [
    ("no spec", (), DELETE),
    *((f"no {name}", (name,), DELETE) for name in ("tier", "priority", "subject")),
    *((f"a rule without {name}", (*IN, name), DELETE) for name in ("action", "from")),
    ("a rule without to", (*OUT, "to"), DELETE),
    ("an unknown tier", ("tier",), "NetworkPolicy"),
    ("no such priority", ("priority",), MAX_PRIORITY + 1),
    ("a negative one", ("priority",), -1),
    ("a priority as text", ("priority",), "1"),
    ("a subject that says nothing", ("subject",), {}),
    ("a subject that says two things", ("subject", "namespaces"), {}),
    ("pods without labels", ("subject", "pods", "podSelector"), DELETE),
    ("an unknown action", (*IN, "action"), "Allow"),
    ("a name too long", (*IN, "name"), "a" * (MAX_RULE_NAME + 1)),
    ("no peers", PEERS, []),
    ("no protocols", PROTOCOLS, []),
    ("a peer that says nothing", (*PEERS, 0), {}),
    ("a peer that says two things", (*PEERS, 0, "pods"), {"podSelector": {}}),
    ("a protocol that says nothing", (*PROTOCOLS, 0), {}),
    ("a protocol that says two things", (*PROTOCOLS, 0, "destinationNamedPort"), "http"),
    ("tcp that says nothing", (*PROTOCOLS, 0, "tcp"), {}),
    ("no port", (*PROTOCOLS, 0, "tcp", "destinationPort"), {}),
    ("port 0", (*PROTOCOLS, 0, "tcp", "destinationPort", "number"), 0),
    ("port 65536", (*PROTOCOLS, 0, "tcp", "destinationPort", "number"), 65536),
    ("a range of one", (*PROTOCOLS, 1, "udp", "destinationPort", "range", "end"), 1),
    ("half a range", (*PROTOCOLS, 1, "udp", "destinationPort", "range", "end"), DELETE),
    ("no network", NETWORKS, []),
    ("a network twice", NETWORKS, ["10.0.0.0/8", "10.0.0.0/8"]),
    ("an address for a network", NETWORKS, ["10.0.0.1"]),
    ("leading zeros", NETWORKS, ["10.0.0.0/08"]),
    ("a mask for bits", NETWORKS, ["10.0.0.0/255.0.0.0"]),
    ("IPv4 in IPv6", NETWORKS, ["::ffff:10.0.0.0/104"]),
    ("a zone", NETWORKS, ["fe80::%eth0/64"]),
    ("too many bits", NETWORKS, ["10.0.0.0/33"]),
    ("no names", NAMES, []),
    ("a name twice", NAMES, ["example.com", "example.com"]),
    ("one label", NAMES, ["example"]),
    ("a star within", NAMES, ["a.*.com"]),
    ("a port's name with nodes", (*OUT, "protocols", 0), {"destinationNamedPort": "http"}),
    ("too many rules", ("ingress",), many(MAX_RULES + 1, FULL["ingress"][1])),
    ("too many peers", PEERS, many(MAX_RULES + 1, {"namespaces": {}})),
    ("too many networks", NETWORKS, [f"10.{n}.0.0/16" for n in range(MAX_RULES + 1)]),
]
STALLED: list[tuple[str, Path, Any]] = [
    ("a key that is none", (*PEERS, 0, "namespaces"), {"matchLabels": {"-a": "b"}}),
    ("a value that is none", (*PEERS, 0, "namespaces"), {"matchLabels": {"a": "-b"}}),
    ("an unknown operator", (*TERMS, 0, "operator"), "Like"),
    ("In without values", (*TERMS, 0, "values"), []),
    ("Exists with values", (*TERMS, 1, "values"), ["a"]),
    ("names denied", ("egress", 1, "action"), "Deny"),
    ("names passed on", ("egress", 1, "action"), "Pass"),
    ("a peer's In without values", (*PEERS, 1, "pods", "podSelector"),
     {"matchExpressions": [{"key": "a", "operator": "In"}]}),
]  # fmt: skip
"""Selectors, which this CRD says little about; and what only its prose says."""


@pytest.fixture(scope="module", params=[upstream.FIRST, upstream.NEWEST])
def admin(request: pytest.FixtureRequest, installed: Installed) -> Client:
    """One that an API server with the CRD of this version serves."""
    crd = msgspec.json.encode(upstream.cluster_policy_crd(request.param)).decode()
    installed.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=crd)
    client = installed.client()
    probe = changed(NETWORKS, [HOST_BITS])
    eventually(
        lambda: (
            _served(client) and bool(ask(client, probe)[1]) == (request.param != upstream.FIRST)
        ),
        "this version is in force",
    )
    return client


def _served(client: Client) -> bool:
    try:
        list(client.pages(resources.CLUSTER_NETWORK_POLICIES))
    except KubeError:
        return False
    return True


def ask(client: Client, item: Json) -> tuple[Json, str]:
    """What the server holds then, or why it does not admit it. Leaves nothing behind."""
    resource = resources.CLUSTER_NETWORK_POLICIES
    try:
        held = client.create(resource, msgspec.json.encode(item))
    except Invalid as error:
        return {}, str(error)
    client.delete(resource, item["metadata"]["name"])
    return msgspec.json.decode(held), ""


def rejected(item: Json) -> str:
    try:
        ClusterNetworkPolicy.model_validate(item)
    except ValidationError as error:
        return str(error)
    return ""


def fails_closed(held: Json) -> bool:
    """As the operator reads it: rules that it does not understand allow nothing, and an object of
    which it cannot even tell the subject is none, and is reported."""
    try:
        return bool(kinds.cluster_policy(msgspec.json.encode(held)).unread)
    except kinds.DecodeError:
        return True


@pytest.mark.parametrize(("reason", "path", "how"), ADMITTED, ids=[row[0] for row in ADMITTED])
def test_admitted(admin: Client, reason: str, path: Path, how: Any) -> None:
    item = changed(path, how)
    held, refused = ask(admin, item)
    assert (rejected(item), refused) == ("", "")
    assert held["spec"] == item["spec"]


@pytest.mark.parametrize(("reason", "path", "how"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refused(admin: Client, reason: str, path: Path, how: Any) -> None:
    item = changed(path, how)
    assert rejected(item)
    assert ask(admin, item)[1]


@pytest.mark.parametrize(("reason", "path", "how"), STALLED, ids=[row[0] for row in STALLED])
def test_what_this_schema_does_not_say_fails_closed(
    admin: Client, reason: str, path: Path, how: Any
) -> None:
    item = changed(path, how)
    held, refused = ask(admin, item)
    assert rejected(item)
    assert refused == ""
    assert fails_closed(held)


def test_bits_right_of_the_mask(admin: Client) -> None:
    """Where they are admitted they mean the network around them."""
    item = changed(NETWORKS, [HOST_BITS])
    assert rejected(item) == ""
    written = ClusterNetworkPolicy.model_validate(item).spec.egress[0].to[1]
    assert written.networks == ["10.0.0.0/8"]


WRONG: list[Any] = [
    *ODD,
    *("", "a" * 64, "a" * 101, "In", "Exists", "Accept", "Deny", "Pass", "Baseline", "-a", "http"),
    *("10.0.0.0/8", HOST_BITS, "10.0.0.0/08", "::/0", "::ffff:10.0.0.0/104", "*.example.com"),
    *(0, 1, 65535, 65536, 1000, 1001, -1, False, ["10.0.0.0/8"], ["a.b", "a.b"]),
    *({"namespaces": {}}, {"podSelector": {}}, {"number": 1}, [{"namespaces": {}}]),
    *({"networks": ["10.0.0.0/8"]}, {"domainNames": ["a.b"]}, {"unknown": {}}),
    *({"destinationNamedPort": "http"}, {"range": {"start": 1, "end": 2}}),
]


@st.composite
def mutated(draw: Callable[[Any], Any]) -> Json:
    item = policy(copy.deepcopy(FULL))
    for _ in range(draw(st.integers(1, 2))):
        paths = sorted(_paths(item.get("spec"), ("spec",)), key=str)
        path = draw(st.sampled_from(paths)) if "spec" in item else ()
        if path:
            _set(item, path, draw(st.sampled_from([DELETE, REPEAT]) | st.sampled_from(WRONG)))
    return item


def nulls_dropped(value: Any) -> Any:
    """What an API server reads: a null that the schema does not allow is not there."""
    if isinstance(value, dict):
        return {key: nulls_dropped(inner) for key, inner in value.items() if inner is not None}
    return [nulls_dropped(inner) for inner in value] if isinstance(value, list) else value


@PROPERTY
@given(item=mutated())
@example(item=policy(FULL))
def test_a_changed_policy(admin: Client, item: Json) -> None:
    item = nulls_dropped(item)
    model, (held, server) = rejected(item), ask(admin, item)
    if server:
        assert model or HOST_BITS in repr(item), f"server: {server}"
    elif not model:
        assert held["spec"] == item["spec"], "something is gone"
    elif held["spec"] == item["spec"]:
        assert fails_closed(held), f"admitted, and opens: {model}"
