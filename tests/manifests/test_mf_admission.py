"""What a real API server makes of the manifests: they apply, and each may do its own alone."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from manifests.installed import Installed, eventually, identity, node_state
from manifests.rendered import overlay
from support.apiserver import binary
from tidegate_kube import Client, Forbidden, Invalid, KubeError, Resource, resources

pytestmark = [pytest.mark.apiserver, pytest.mark.slow]

IDENTITIES, NODE_STATES = resources.IDENTITIES, resources.NODE_STATES


def _create(client: Client, resource: Resource, item: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = msgspec.json.decode(client.create(resource, msgspec.json.encode(item)))
    return made


def _set_status(client: Client, resource: Resource, name: str, status: object) -> dict[str, Any]:
    item = msgspec.json.decode(client.get(resource, name))
    body = msgspec.json.encode({**item, "status": status})
    made: dict[str, Any] = msgspec.json.decode(
        client.update(resource, name, body, subresource="status")
    )
    return made


def test_one_apply_is_enough(installed: Installed) -> None:
    lines = [line for line in installed.applied.splitlines() if line]
    assert len(lines) == len(overlay("base")), installed.applied
    assert {line.rpartition(" ")[2] for line in lines} == {"serverside-applied"}


def test_applying_again_changes_nothing(installed: Installed) -> None:
    before = installed.kubectl("get", "crd,ds,deploy,validatingadmissionpolicy", "-A", "-o", "json")
    installed.kubectl("apply", "--server-side", "--validate=strict", "-k", "manifests/base")
    after = installed.kubectl("get", "crd,ds,deploy,validatingadmissionpolicy", "-A", "-o", "json")
    versions = [
        [item["metadata"]["resourceVersion"] for item in msgspec.json.decode(text)["items"]]
        for text in (before.stdout, after.stdout)
    ]
    assert versions[0] == versions[1]


@pytest.mark.parametrize("name", ["overlays/kind", "overlays/ha", "cleanup"])
def test_overlays_apply(installed: Installed, name: str) -> None:
    installed.kubectl(
        *("apply", "--server-side", "--validate=strict", "--dry-run=server"),
        *("-k", f"manifests/{name}"),
    )


def test_another_tool_may_apply_the_same(installed: Installed) -> None:
    # Without a conflict: what one has defaulted is what the other has written.
    installed.kubectl(
        *("apply", "--server-side", "--field-manager=other", "-k", "manifests/base"),
    )


@contextlib.contextmanager
def _controller(installed: Installed, name: str) -> Iterator[None]:
    """One controller of kube-controller-manager runs."""
    command = [str(binary("kube-controller-manager")), f"--kubeconfig={installed.kubeconfig}"]
    command += [f"--controllers={name}", "--leader-elect=false", "--secure-port=0"]
    with open(installed.server.directory / "controllers.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_who_may_view_sees_what_became_of_policies(installed: Installed) -> None:
    def may(what: str, *where: str) -> bool:
        asked = ("auth", "can-i", *what.split(), "--as=viewer", *where)
        return installed.kubectl(*asked, check=False).stdout.strip() == "yes"

    grant = ("create", "rolebinding", "viewer", "--clusterrole=view", "--user=viewer")
    installed.kubectl(*grant, "-n", "default")
    with _controller(installed, "clusterrole-aggregation-controller"):
        eventually(lambda: may("get policystatuses", "-n", "default"), "the role is aggregated")
    assert may("watch policystatuses", "-n", "default")
    assert not may("get policystatuses", "-n", "kube-system")
    assert not may("delete policystatuses", "-n", "default")
    assert not may("list identities", "-A")
    assert may("list trafficpolicies", "-n", "default")
    assert not may("create trafficpolicies", "-n", "default")


def test_who_may_edit_writes_traffic_policies(installed: Installed) -> None:
    def may(who: str, what: str, where: str) -> bool:
        asked = ("auth", "can-i", *what.split(), f"--as={who}", "-n", where)
        return installed.kubectl(*asked, check=False).stdout.strip() == "yes"

    for role in ("edit", "admin"):
        grant = ("create", "rolebinding", f"an-{role}", f"--clusterrole={role}", f"--user={role}")
        installed.kubectl(*grant, "-n", "default")
    with _controller(installed, "clusterrole-aggregation-controller"):
        for role in ("edit", "admin"):
            eventually(
                lambda who=role: may(who, "create trafficpolicies", "default"),  # type: ignore[misc]
                "the role is aggregated",
            )
            assert may(role, "delete trafficpolicies", "default")
            assert not may(role, "create trafficpolicies", "kube-system")
            assert not may(role, "create identities", "default")
            assert not may(role, "update policystatuses", "default")


def test_no_policy_has_an_expression_of_wrong_type(installed: Installed) -> None:
    # Kubernetes' own controller type-checks expressions where the kind is known.
    def checked() -> list[dict[str, Any]]:
        listed = installed.kubectl("get", "validatingadmissionpolicy", "-o", "json").stdout
        items = msgspec.json.decode(listed)["items"]
        return [i["status"]["typeChecking"] for i in items if "typeChecking" in i.get("status", {})]

    with _controller(installed, "validatingadmissionpolicy-status-controller"):
        eventually(lambda: len(checked()) == 2, "both policies are type-checked")
    assert [
        found["expressionWarnings"] for found in checked() if "expressionWarnings" in found
    ] == []


# ---- decimal names -------------------------------------------------------------------


def test_numbers_are_the_operators(installed: Installed) -> None:
    operator, admin = installed.account("tidegate-operator"), installed.client()
    made = _create(operator, IDENTITIES, identity("70001", namespace="a", labels={}))
    assert made["metadata"]["name"] == "70001"
    with pytest.raises(Forbidden, match="operator's alone"):
        _create(admin, IDENTITIES, identity("70002"))
    made["metadata"]["labels"] = {"tidegate.dev/released": "1"}
    with pytest.raises(Forbidden, match="operator's alone"):
        admin.update(IDENTITIES, "70001", msgspec.json.encode(made))
    operator.update(IDENTITIES, "70001", msgspec.json.encode(made))


PORT = ":port/TCP/web"


@pytest.mark.parametrize("key", [PORT, ":port/SCTP/a-b", ":port/UDP/123456789012345"])
def test_system_labels_are_the_operators(installed: Installed, key: str) -> None:
    operator, admin = installed.account("tidegate-operator"), installed.client()
    labels = {"app": "web", key: "80"}
    made = _create(operator, IDENTITIES, identity("70003", namespace="a", labels=labels))
    assert made["spec"]["labels"] == labels
    operator.delete(IDENTITIES, "70003")
    for client in (operator, admin):
        with pytest.raises(Invalid, match="are the operator's own"):
            _create(client, IDENTITIES, identity("mine", namespace="a", labels=labels))


@pytest.mark.parametrize("key", [":ports/TCP/web", ":a", ":", "port:/a"])
def test_other_keys_with_a_colon_are_nobodys(installed: Installed, key: str) -> None:
    operator = installed.account("tidegate-operator")
    with pytest.raises(Invalid, match="every key must be a label key"):
        _create(operator, IDENTITIES, identity("70004", namespace="a", labels={key: "80"}))


def test_people_make_identities_with_names(installed: Installed) -> None:
    made = _create(installed.client(), IDENTITIES, identity("partner", cidrs=["192.0.2.0/24"]))
    assert made["spec"] == {"cidrs": ["192.0.2.0/24"]}


def test_the_status_of_an_identity_is_the_operators(installed: Installed) -> None:
    admin, operator = installed.client(), installed.account("tidegate-operator")
    _create(admin, IDENTITIES, identity("watched"))
    status = {"id": 70010, "endpoints": 2, "summary": "app=watched", "conditions": []}
    with pytest.raises(Forbidden, match="operator alone"):
        _set_status(admin, IDENTITIES, "watched", status)
    assert _set_status(operator, IDENTITIES, "watched", status)["status"] == status


@pytest.mark.parametrize("name", ["255", "007", "16777216", "1a", "99999999999999999999"])
def test_not_every_number_is_a_name_for_anybody(installed: Installed, name: str) -> None:
    with pytest.raises((Invalid, Forbidden)):
        _create(installed.account("tidegate-operator"), IDENTITIES, identity(name))


# ---- a node's own state ------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_nodes(installed: Installed) -> tuple[Client, Client]:
    operator = installed.account("tidegate-operator")
    for name in ("node-a", "node-b"):
        _create(operator, NODE_STATES, node_state(name))
    return installed.loader("node-a"), installed.loader("node-b")


STATUS = {"realised": "0" * 40, "endpoints": 1, "drift": 0, "formats": [1], "conditions": []}


def _report(loader: Client, name: str) -> dict[str, Any]:
    body = msgspec.json.encode({"status": STATUS})
    made: dict[str, Any] = msgspec.json.decode(
        loader.patch(NODE_STATES, name, body, subresource="status")
    )
    return made


def test_a_loader_writes_its_own_status(two_nodes: tuple[Client, Client]) -> None:
    for name, loader in zip(("node-a", "node-b"), two_nodes, strict=True):
        assert _report(loader, name)["status"] == STATUS


def test_a_loader_writes_no_other_status(two_nodes: tuple[Client, Client]) -> None:
    with pytest.raises(Forbidden, match="NodeState node-b is written by the loader on that node"):
        _report(two_nodes[0], "node-b")


def test_a_status_brings_nothing_else_along(two_nodes: tuple[Client, Client]) -> None:
    # A patch of the subresource that tries to change the rest leaves the rest as it is.
    body = {"status": STATUS, "spec": {"mode": "Detached"}, "metadata": {"labels": {"a": "b"}}}
    answer = two_nodes[0].patch(
        NODE_STATES, "node-a", msgspec.json.encode(body), subresource="status"
    )
    item = msgspec.json.decode(answer)
    assert item["spec"]["mode"] == "Enforcing"
    assert "labels" not in item["metadata"]


def test_a_token_bound_to_no_pod_writes_no_status(
    installed: Installed, two_nodes: tuple[Client, Client]
) -> None:
    with pytest.raises(Forbidden, match="written by the loader on that node"):
        _report(installed.account("tidegate-loader"), "node-a")


def _loader_may_not(client: Client) -> list[str]:
    """What succeeded of all that a loader has no business with."""
    state = msgspec.json.encode(node_state("node-a", mode="Detached"))
    attempts = {
        "create a NodeState": lambda: client.create(NODE_STATES, state),
        "update a NodeState": lambda: client.update(NODE_STATES, "node-a", state),
        "delete a NodeState": lambda: client.delete(NODE_STATES, "node-a"),
        "create an Identity": lambda: client.create(
            IDENTITIES, msgspec.json.encode(identity("stolen"))
        ),
        "list Identities": lambda: list(client.pages(IDENTITIES)),
        "list Pods": lambda: list(client.pages(resources.PODS)),
        "get a Node": lambda: client.get(resources.NODES, "node-a"),
        "list Leases": lambda: list(client.pages(resources.LEASES)),
        "list ConfigMaps": lambda: list(client.pages(resources.CONFIG_MAPS)),
    }
    done = []
    for what, attempt in attempts.items():
        try:
            attempt()
        except Forbidden:
            continue
        except KubeError as error:
            what = f"{what}: {error}"
        done.append(what)
    return done


def test_a_loaders_token_opens_nothing_else(two_nodes: tuple[Client, Client]) -> None:
    # These two are the observer's, which is in the same pod and so has the same account.
    assert _loader_may_not(two_nodes[0]) == ["list Identities", "list Pods"]


def test_a_loader_with_too_many_rights_is_still_held(installed: Installed) -> None:
    # The policy stands by itself: whatever RBAC is widened to by mistake.
    installed.kubectl(
        *("create", "clusterrolebinding", "too-wide", "--clusterrole=cluster-admin"),
        "--serviceaccount=tidegate-system:tidegate-loader",
    )
    try:
        loader = installed.loader("node-c")
        state = msgspec.json.encode(node_state("node-c"))
        with pytest.raises(Forbidden, match="nothing but the status"):
            loader.create(NODE_STATES, state)
    finally:
        installed.kubectl("delete", "clusterrolebinding", "too-wide")


# ---- what a spec may become ---------------------------------------------------------------


def test_term_never_falls(installed: Installed) -> None:
    operator = installed.account("tidegate-operator")
    _create(operator, NODE_STATES, node_state("terms"))

    def write(**spec: Any) -> None:
        held = msgspec.json.decode(operator.get(NODE_STATES, "terms"))
        item = {**node_state("terms", **spec), "metadata": held["metadata"]}
        operator.update(NODE_STATES, "terms", msgspec.json.encode(item))

    for term in (3, 3, 4):
        write(term=term)
    for spec in ({"term": 3}, {}):
        with pytest.raises(Invalid, match="term never falls"):
            write(**spec)
    write(term=5)


def test_the_spec_of_an_identity_stays(installed: Installed) -> None:
    admin = installed.client()
    held = _create(admin, IDENTITIES, identity("stays"))
    held["spec"]["labels"]["more"] = "x"
    with pytest.raises(Invalid, match="immutable"):
        admin.update(IDENTITIES, "stays", msgspec.json.encode(held))


# ---- what is no object of ours ------------------------------------------------------------


def test_an_object_too_large_is_refused(installed: Installed) -> None:
    operator = installed.account("tidegate-operator")
    entries = [
        {"cidr": f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}/32", "identity": 300}
        for n in range(90_000)
    ]
    spec = {"format": 1, "table": "ipcache", "epoch": 1, "shard": 0, "shards": 8, "revision": 1}
    item = {
        **node_state("huge"),
        "kind": "StateSlice",
        "metadata": {"name": "huge"},
        "spec": {**spec, "ipcache": entries},
    }
    with pytest.raises(KubeError, match=r"(?i)too large|limit"):
        _create(operator, resources.STATE_SLICES, item)


def test_an_object_of_a_version_to_come_is_named(installed: Installed) -> None:
    item = {**identity("future"), "apiVersion": "tidegate.dev/v2"}
    done = installed.kubectl(
        *("create", "-f", "-"), stdin=msgspec.json.encode(item).decode(), check=False
    )
    assert 'no matches for kind "Identity" in version "tidegate.dev/v2"' in done.stderr


def test_a_format_to_come_is_for_the_loader_to_judge(installed: Installed) -> None:
    # The API takes it, so that a newer operator can write it; a loader says Stalled.
    operator = installed.account("tidegate-operator")
    assert _create(operator, NODE_STATES, node_state("newer", format=99))["spec"]["format"] == 99
