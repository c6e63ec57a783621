"""The operator's process with the permissions that the manifests give it: it needs all of them,
and no other. What it does here is all that it ever does with the API.

The loader's half needs nodes: it is judged in e2e, by the same comparison.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from manifests.installed import Installed, identity, install
from manifests.rendered import MANIFESTS
from support.permissions import Comparison, Permission, compare
from support.town_api import (
    apply,
    cluster_policy,
    install_cluster_policies,
    node,
    pod,
    remove,
    traffic_policy,
)
from support.waiting import until
from tidegate_kube import AlreadyExists, resources

pytestmark = [pytest.mark.apiserver, pytest.mark.slow]

Json = dict[str, Any]
ACCOUNT = "tidegate-operator"
SECONDS = 90.0
"""Rule sets that nothing uses stay for a minute."""


LOST_RACES = {
    Permission("tidegate.dev", resource, "get")
    for resource in ("identities", "rulesets", "stateslices")
}
"""Asked for only when somebody wrote within the same milliseconds. One function does it for all
kinds; a race for a NodeState is made here, those for the others may or may not happen."""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    with install(tmp_path_factory.mktemp("run")) as found:
        yield found


def _objects() -> list[Json]:
    return list(yaml.safe_load_all((MANIFESTS / "base" / "tidegate.yaml").read_text()))


def _compared(own: Installed) -> Comparison:
    with open(own.server.directory / "audit.log") as log:
        return compare(_objects(), log, ACCOUNT)


class Process:
    """`tidegate-operator` as that account."""

    def __init__(self, own: Installed, directory: Path) -> None:
        self.log = directory / "operator.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        config = own.kubeconfig_of(ACCOUNT, directory / "operator.kubeconfig")
        command = [sys.executable, "-m", "tidegate_operator", f"--kubeconfig={config}"]
        command += ["--namespace=tidegate-system", f"--listen=127.0.0.1:{port}"]
        with open(self.log, "wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, env={**os.environ, "POD_NAME": "operator-1"}
            )

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


class Story:
    """What happens in a cluster, told by an administrator's hand."""

    def __init__(self, own: Installed, process: Process) -> None:
        self.admin = own.client()
        self.process = process

    def wait(self, condition: Callable[[], object], what: str) -> None:
        def alive() -> object:
            assert self.process.process.poll() is None, self.process.log.read_text()[-3000:]
            return condition()

        try:
            until(alive, what, SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.process.log.read_text()[-3000:]}") from error

    def items(self, resource: Any) -> list[Json]:
        return [
            msgspec.json.decode(raw) for page in self.admin.pages(resource) for raw in page.items
        ]

    def names(self, resource: Any) -> set[str]:
        return {item["metadata"]["name"] for item in self.items(resource)}

    def in_use(self) -> list[Json]:
        """The rule sets that some node's state names."""
        named = {n for item in self.items(resources.NODE_STATES) for n in item["spec"]["ruleSets"]}
        return [i for i in self.items(resources.RULE_SETS) if i["metadata"]["name"] in named]

    def endpoints(self, name: str) -> list[str]:
        for item in self.items(resources.NODE_STATES):
            if item["metadata"]["name"] == name:
                return [endpoint["name"] for endpoint in item["spec"]["endpoints"]]
        return []


def _policy(ports: list[Json]) -> Json:
    rule = {"from": [{"podSelector": {"matchLabels": {"app": "a"}}}], "ports": ports}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {"podSelector": {}, "ingress": [rule]},
    }


def _is_forgotten(own: Installed) -> Json:
    """A number that was released in another age, as an operator before this one left it."""
    item = identity("70001", namespace="default", labels={"app": "gone"})
    item["metadata"]["labels"] = {"tidegate.dev/released": "1"}
    # As the operator, for nobody else may; it uses a verb that the process will use as well.
    own.account(ACCOUNT).create(resources.IDENTITIES, msgspec.json.encode(item))
    return item


def _begin(story: Story) -> None:
    """A cluster is there: everything is created, and the taint of a node that waits goes."""
    for number, name in enumerate(("n1", "n2")):
        item = node(name, number)
        item["spec"]["taints"] = [{"key": "tidegate.dev/agent-not-ready", "effect": "NoSchedule"}]
        apply(story.admin, item)
    apply(story.admin, pod("a", "n1", "10.244.0.5", app="a"))
    apply(story.admin, _policy([{"port": 80}]))
    story.wait(lambda: story.endpoints("n1") == ["a"], "the pod is published")
    story.wait(
        lambda: story.names(resources.POLICY_STATUSES) == {"networkpolicy.web"}, "a policy's status"
    )
    story.wait(lambda: "70001" not in story.names(resources.IDENTITIES), "70001 is forgotten")


def _realise(story: Story) -> None:
    """As the loader of n1 says it."""

    def untainted() -> bool:
        item = msgspec.json.decode(story.admin.get(resources.NODE_STATES, "n1"))
        digest = item["metadata"]["annotations"]["tidegate.dev/digest"]
        status = {"realised": digest, "endpoints": 1, "drift": 0, "formats": [1]}
        body = msgspec.json.encode({"status": status})
        story.admin.patch(resources.NODE_STATES, "n1", body, subresource="status")
        return "agent-not-ready" not in story.admin.get(resources.NODES, "n1").decode()

    story.wait(untainted, "the taint goes")


def _go_on(story: Story) -> None:
    """Pods and policies change, a label set comes and goes."""
    apply(story.admin, pod("b", "n2", "10.244.1.5", app="b"))
    story.wait(lambda: story.endpoints("n2") == ["b"], "another pod is published")
    # Addresses have no port names: the status and an event say so.
    odd = _policy([{"port": 80}])
    block = {"ipBlock": {"cidr": "192.0.2.0/24"}}
    odd["spec"]["egress"] = [{"to": [block], "ports": [{"port": "http"}]}]
    odd["spec"]["policyTypes"] = ["Ingress", "Egress"]
    apply(story.admin, odd)
    story.wait(lambda: story.items(resources.EVENTS), "an event about the policy")
    remove(story.admin, resources.PODS, "b", "default")
    story.wait(lambda: story.endpoints("n2") == [], "the pod is gone")


def _other_kinds(story: Story) -> None:
    """Policies of the cluster, whose CRD comes late, and of our own kind."""
    install_cluster_policies(story.admin)
    rule = {"action": "Deny", "from": [{"namespaces": {}}]}
    spec = {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}, "ingress": [rule]}
    apply(story.admin, cluster_policy("all", spec))

    def statuses() -> list[int]:
        found = story.items(resources.CLUSTER_POLICY_STATUSES)
        return [item["policy"]["generation"] for item in found if "status" in item]

    story.wait(lambda: statuses() == [1], "a cluster policy's status")
    apply(story.admin, cluster_policy("all", {**spec, "priority": 2}))
    story.wait(lambda: statuses() == [2], "the status of the edited one")
    everybody = {"peers": [{"any": True}], "ports": [{"any": True}]}
    apply(
        story.admin,
        traffic_policy(
            "deny",
            {
                "subject": {"podSelector": {"any": True}},
                "isolates": [],
                "mode": "Enforce",
                "egress": [{"action": "Deny", **everybody}],
            },
        ),
    )
    story.wait(lambda: "trafficpolicy.deny" in story.names(resources.POLICY_STATUSES), "its status")
    remove(story.admin, resources.TRAFFIC_POLICIES, "deny", "default")
    remove(story.admin, resources.CLUSTER_NETWORK_POLICIES, "all")
    story.wait(lambda: statuses() == [], "the cluster policy's status is gone")


def _edit_by_hand(story: Story) -> None:
    """What people do to objects that are not theirs is undone."""
    admin = story.admin
    held = next(iter(story.in_use()))
    name = held["metadata"]["name"]
    admin.delete(resources.RULE_SETS, name)
    fake = {k: v for k, v in held.items() if k != "metadata"} | {"metadata": {"name": name}}
    fake["spec"] = {**fake["spec"], "policies": []}
    with contextlib.suppress(AlreadyExists):  # it was quicker
        admin.create(resources.RULE_SETS, msgspec.json.encode(fake))
    story.wait(
        lambda: held["spec"] in [item["spec"] for item in story.items(resources.RULE_SETS)],
        "a rule set is repaired",
    )
    stray = next(iter(story.items(resources.STATE_SLICES)))
    stray["metadata"] = {"name": "peers-e9-0-of-8", "labels": stray["metadata"]["labels"]}
    admin.create(resources.STATE_SLICES, msgspec.json.encode(stray))
    story.wait(
        lambda: "peers-e9-0-of-8" not in story.names(resources.STATE_SLICES), "a stray slice goes"
    )


def _race(story: Story, own: Installed) -> None:
    """Somebody writes at the same moment: the operator looks again at what is there now."""

    def looked(kind: str) -> bool:
        asked = _compared(own).asked
        return any(each.resource == kind and each.verb == "get" for each in asked)

    for turn in range(40):
        if looked("nodestates"):
            return
        # The policy tells these two apart, so that the node's state changes each time.
        apply(story.admin, pod("c", "n1", "10.244.0.7", app="az"[turn % 2]))
        for stroke in range(60):
            patch = {"metadata": {"labels": {"touched": f"{turn}-{stroke}"}}}
            story.admin.patch(resources.NODE_STATES, "n1", msgspec.json.encode(patch))
    raise AssertionError("the operator never lost a race")


def _end(story: Story) -> None:
    """Everything goes away."""
    remove(story.admin, resources.NETWORK_POLICIES, "web", "default")
    story.admin.delete(resources.NODES, "n2")
    story.wait(lambda: story.names(resources.POLICY_STATUSES) == set(), "its status is gone")
    story.wait(lambda: story.names(resources.NODE_STATES) == {"n1"}, "a node's state is gone")
    story.wait(lambda: story.names(resources.RULE_SETS) == set(), "unused rule sets are gone")


def test_the_operator_uses_all_it_may_and_asks_for_nothing_else(
    own: Installed, tmp_path: Path
) -> None:
    _is_forgotten(own)
    process = Process(own, tmp_path)
    try:
        story = Story(own, process)
        _begin(story)
        _realise(story)
        _go_on(story)
        _other_kinds(story)
        _edit_by_hand(story)
        _race(story, own)
        _end(story)
    finally:
        process.stop()
    found = _compared(own)
    assert "\n".join(map(str, found.refused)) == ""
    assert "\n".join(map(str, set(found.unused) - LOST_RACES)) == ""
