"""What leaves a cluster in a sysdump: what is on the list, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tidegate_cli.cluster import sysdump
from tidegate_cli.cluster.redact import ALLOWED, META, OUR_POD, Tree, keep, redact
from tidegate_kube import Access, Client
from tidegate_operator.cluster.watches import Watches

SECRET = "hunter2"
META_OF = {
    "name": "web",
    "namespace": "shop",
    "labels": {"app": "web"},
    "annotations": {"kubectl.kubernetes.io/last-applied-configuration": SECRET},
    "managedFields": [{"manager": SECRET}],
}
CONTAINER = {
    "name": "c",
    "image": "i",
    "command": ["run", f"--password={SECRET}"],
    "args": [SECRET],
    "env": [{"name": "TOKEN", "value": SECRET}],
    "envFrom": [{"secretRef": {"name": SECRET}}],
    "livenessProbe": {"httpGet": {"httpHeaders": [{"name": "auth", "value": SECRET}]}},
}
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": META_OF,
    "spec": {
        "nodeName": "n",
        "containers": [CONTAINER],
        "initContainers": [CONTAINER],
        "ephemeralContainers": [CONTAINER],
        "volumes": [{"name": "v", "secret": {"secretName": SECRET}}],
        "imagePullSecrets": [{"name": SECRET}],
    },
    "status": {"phase": "Running", "containerStatuses": [{"name": "c", "state": {"running": {}}}]},
}


def test_a_pod_keeps_what_explains_and_loses_what_is_secret() -> None:
    found = redact(POD)
    assert found == {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "web", "namespace": "shop", "labels": {"app": "web"}},
        "spec": {
            "nodeName": "n",
            "containers": [{"name": "c", "image": "i"}],
            "initContainers": [{"name": "c", "image": "i"}],
        },
        "status": POD["status"],
    }
    assert SECRET in json.dumps(POD)


@pytest.mark.parametrize(
    ("reason", "item", "expected"),
    [
        ("a Secret has no list", {"kind": "Secret", "data": {"a": "b"}}, None),
        ("nor has a kind of others", {"kind": "Anything", "spec": {"a": 1}}, None),
        ("nor what has no kind", {"data": {"a": "b"}}, None),
        (
            "a ConfigMap but for our key",
            {"kind": "ConfigMap", "data": {"apiServer": "https://a", "password": SECRET}},
            {"data": {"apiServer": "https://a"}},
        ),
        ("data that is no object", {"kind": "ConfigMap", "data": SECRET}, {"data": None}),
        (
            "our annotations stay",
            {
                "kind": "NodeState",
                "metadata": {"annotations": {"tidegate.dev/digest": "d", "x": "y"}},
            },
            {"metadata": {"annotations": {"tidegate.dev/digest": "d"}}},
        ),
        (
            "a workload's environment goes",
            {"kind": "Deployment", "spec": {"template": {"spec": {"containers": [CONTAINER]}}}},
            {
                "spec": {
                    "template": {
                        "spec": {
                            "containers": [
                                {k: CONTAINER[k] for k in ("name", "image", "command", "args")}
                            ]
                        }
                    }
                }
            },
        ),
    ],
)
def test_kinds(reason: str, item: dict[str, Any], expected: dict[str, Any] | None) -> None:
    found = redact(item)
    if expected is None:
        assert found is None, reason
        return
    head = {"apiVersion": "", "kind": item["kind"], "metadata": {}}
    assert found == head | expected, reason


def test_every_kind_that_decides_is_collected_and_has_a_list() -> None:
    watched = {item.resource for item in Watches(Client(Access("http://127.0.0.1:1"))).all}
    collected = {*sysdump.WHOLE_CLUSTER, *sysdump.OF_OURS}
    assert watched <= collected
    assert {resource.kind for resource in collected} == set(ALLOWED)


def test_our_own_pods_keep_their_arguments_and_no_environment() -> None:
    found = redact(POD, ours=True)
    assert found is not None
    (container,) = found["spec"]["containers"]
    assert container["args"] == CONTAINER["args"]
    assert "env" not in container
    assert found["spec"]["volumes"] == [{"name": "v"}]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["spec", "env", "status", "data", "name", "x"]), inner, max_size=4
        )
    ),
    max_leaves=20,
)


@given(JSON, st.sampled_from([META, *ALLOWED.values(), OUR_POD]))
def test_nothing_that_is_not_named_is_kept(value: Any, tree: Tree) -> None:
    def check(found: Any, tree: Tree) -> None:
        if isinstance(found, list):
            for element in found:
                check(element, tree)
        elif isinstance(found, dict):
            assert found.keys() <= tree.keys()
            for name, inner in found.items():
                if tree[name] is not True:
                    check(inner, tree[name])
        else:
            assert found is None

    check(keep(value, tree), tree)


@pytest.mark.parametrize("tree", [*ALLOWED.values(), OUR_POD])
def test_no_list_names_what_holds_secrets(tree: Tree) -> None:
    def names(tree: Tree) -> set[str]:
        inner = [names(value) for value in tree.values() if value is not True]
        return set(tree).union(*inner) if inner else set(tree)

    assert names(tree) & {"env", "envFrom", "stringData", "annotations", "managedFields"} == set()
