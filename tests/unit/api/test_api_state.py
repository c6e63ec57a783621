"""Names, words and bounds of the machine-written kinds."""

from __future__ import annotations

import msgspec
import pytest
from tidegate_api.state import (
    MAX_NAME,
    IdentitySpec,
    Meta,
    NodeState,
    StateSlice,
    encode,
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
