"""Names, words and bounds of the machine-written kinds."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from tidegate_api.state import (
    DEVELOPER_PRECEDENCE,
    FORMAT,
    MAX_NAME,
    NEWEST_FORMAT,
    AnyPeer,
    EntityPeer,
    IdentitySpec,
    Meta,
    NamedPort,
    NodeState,
    PeerSet,
    PolicyRef,
    Rule,
    RuleSetSpec,
    SetPeer,
    StateSlice,
    Term,
    encode,
    format_of_peers,
    format_of_rules,
    identity_summary,
    policy_status_name,
)


def test_a_policy_status_is_named_after_its_policy() -> None:
    assert policy_status_name("NetworkPolicy", "web") == "networkpolicy.web"


def test_a_policy_status_name_fits_and_stays_distinct() -> None:
    long = "a" * 240
    names = {policy_status_name("NetworkPolicy", long + end) for end in ("b", "c", "-d", ".e")}
    assert len(names) == 4
    assert {len(name) <= MAX_NAME for name in names} == {True}
    assert {name.startswith("networkpolicy.aaa") for name in names} == {True}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (IdentitySpec(namespace="n", labels={"b": "2", "a": ""}), "a=,b=2"),
        (IdentitySpec(namespace="n", labels={}), ""),
        (
            IdentitySpec(namespace="n", labels={":port/TCP/web": "80", "z": "1"}),
            "z=1,port/TCP/web=80",
        ),
        (IdentitySpec(cidrs=["192.0.2.0/24", "2001:db8::/32"]), "192.0.2.0/24,2001:db8::/32"),
    ],
)
def test_an_identity_in_words(spec: IdentitySpec, words: str) -> None:
    assert identity_summary(spec) == words


def test_an_identity_in_words_has_an_end() -> None:
    words = identity_summary(IdentitySpec(namespace="n", labels={"k": "v" * 400}))
    assert (len(words), words[-1]) == (MAX_NAME, "…")


def test_what_an_api_server_adds_to_metadata_is_read_past() -> None:
    data = b"""{"name": "n", "uid": "u", "managedFields": [], "selfLink": "x", "namespace": "s",
        "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "1",
                             "controller": true}]}"""
    meta = msgspec.json.decode(data, type=Meta)
    assert (meta.uid, meta.namespace) == ("u", "s")
    assert isinstance(meta.owner_references, list)
    assert meta.owner_references[0].kind == "Node"


STATE = {
    "apiVersion": "tidegate.dev/v1alpha1",
    "kind": "NodeState",
    "metadata": {"name": "n"},
    "spec": {
        "format": 1,
        "mode": "Enforcing",
        "endpoints": [],
        "ruleSets": [],
        "peerSets": [],
        "tables": {},
    },
}


def test_offline_states_have_no_term() -> None:
    state = msgspec.convert(STATE, NodeState)
    assert b"term" not in encode(state)
    with_term = {**STATE, "spec": {**STATE["spec"], "term": 7}}  # type: ignore[dict-item]
    assert msgspec.convert(with_term, NodeState).spec.term == 7


@pytest.mark.parametrize(
    "entry",
    [
        {"cidr": "10.0.0.1/32", "identity": 1 << 24},
        {"cidr": "10.0.0.1/32", "identity": -1},
        {"cidr": "1" * 44, "identity": 256},
        {"cidr": "10.0.0.1/32", "identity": 256, "extra": 1},
        {"cidr": "10.0.0.1/32", "identity": 256, "node": None},
    ],
)
def test_a_slice_out_of_bounds_is_not_understood(entry: dict[str, object]) -> None:
    spec = {"format": 1, "table": "ipcache", "epoch": 1, "shard": 0, "shards": 8, "revision": 1}
    item = {**STATE, "kind": "StateSlice", "spec": {**spec, "ipcache": [entry]}}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(item, StateSlice)


A = PolicyRef(kind="NetworkPolicy", namespace="n", name="a")
TERM = Term(peer=AnyPeer(), action="Allow", precedence=DEVELOPER_PRECEDENCE, rule=0)
OLD = RuleSetSpec(
    format=1,
    direction="Ingress",
    policies=[A],
    rules=[Rule(policy=0, index=0)],
    terms=[TERM, replace(TERM, action="Deny", protocol="TCP", port=1, end_port=9)],
)


def test_what_is_not_new_has_the_bytes_it_always_had() -> None:
    assert format_of_rules(OLD) == FORMAT
    assert encode(OLD).decode() == (
        '{"format":1,"direction":"Ingress",'
        '"policies":[{"kind":"NetworkPolicy","namespace":"n","name":"a"}],'
        '"rules":[{"policy":0,"index":0}],'
        '"terms":[{"peer":{"kind":"any"},"action":"Allow","precedence":1073741824,"rule":0},'
        '{"peer":{"kind":"any"},"action":"Deny","precedence":1073741824,"rule":0,'
        '"protocol":"TCP","port":1,"endPort":9}]}'
    )
    old = PeerSet(name="s", selector="any", identities=[256])
    assert format_of_peers([old]) == FORMAT
    assert encode(old) == b'{"name":"s","selector":"any","identities":[256]}'


@pytest.mark.parametrize(
    "changes",
    [
        {"policies": [], "others": [PolicyRef(kind="ClusterNetworkPolicy", name="a")]},
        {"others": [A], "audited": [1]},
        {"rules": [Rule(policy=0, index=0, log=True)]},
        {"terms": [replace(TERM, action="Pass")]},
        {"terms": [replace(TERM, audit=True)]},
        {"terms": [replace(TERM, peer=EntityPeer(entity="host"))]},
        {"terms": [replace(TERM, protocol="ICMP")]},
        {"terms": [replace(TERM, protocol="ICMPv6", icmp_type=0, icmp_code=0)]},
        {"terms": [replace(TERM, peer=SetPeer(name="s"), port_name="http")]},
    ],
    ids=str,
)
def test_a_rule_set_that_says_something_new_is_of_the_newest_format(changes: Any) -> None:
    spec = replace(OLD, **changes)
    assert format_of_rules(spec) == NEWEST_FORMAT
    assert msgspec.json.decode(encode(spec), type=RuleSetSpec) == spec


def test_a_peer_set_that_says_something_new_is_of_the_newest_format() -> None:
    old = PeerSet(name="s", selector="any", identities=[256])
    ports = [NamedPort(protocol="TCP", port=80, identities=[256])]
    for new in (replace(old, cidrs=["192.0.2.1/32"]), replace(old, ports=ports)):
        assert format_of_peers([old, new]) == NEWEST_FORMAT
        assert msgspec.json.decode(encode(new), type=PeerSet) == new


def test_a_cluster_scoped_policy_has_no_namespace() -> None:
    ref = PolicyRef(kind="ClusterNetworkPolicy", name="a")
    assert encode(ref) == b'{"kind":"ClusterNetworkPolicy","name":"a"}'
    assert ref < A
