"""Addresses and names that are used again: whoever comes is judged as what he is.

Heirs send datagrams to the server from their first moment on, and the server counts them by the
sender's address. What an heir must not send would pass if he were taken for whom he follows; that
the server hears the heir who may send shows that it would have heard the other."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kind import cluster
from rig import api, asking, cold, flood, install, ipam, pods, town
from rig.asking import Question

pytestmark = pytest.mark.kind
# As many as a flood sends in some milliseconds.
MANY = 1000


class Heirs:
    """On one node a stranger gets a friend's address, on another a friend a stranger's."""

    def __init__(self, place: town.Town, askers: asking.Askers, addresses: dict[str, str]) -> None:
        """`addresses`: role of the heir → the address that he gets."""
        self.server = place.pods["server"]
        self.places = {"stranger": self.server.node, "friend": place.pods["friend-far"].node}
        self.addresses = addresses
        self._asker = askers.of(self.server)
        self._before = self._received()

    def come(self) -> None:
        for role, node in self.places.items():
            made = pods.manifest(f"heir-{role}", town.SPACE, {"role": role}, node)
            pods.apply(pods.flooding(made, self.server.address))

    def judge(self) -> None:
        """Once both run, the friend is heard and the stranger is not."""
        pods.eventually(lambda: len(self._running()) == 2, "the heirs run")
        assert {p.name.partition("-")[2]: p.address for p in self._running()} == self.addresses
        for _ in range(2):
            # Twice: so the stranger has sent for a while, too.
            start = self.heard("friend")
            pods.eventually(
                lambda start=start: self.heard("friend") > start + MANY, "the friend is heard", 30
            )
            assert self.heard("stranger") == 0

    def heard(self, role: str) -> int:
        address = self.addresses[role]
        return self._received().get(address, 0) - self._before.get(address, 0)

    def go(self) -> None:
        names = [f"heir-{role}" for role in self.places]
        pods.remove(town.SPACE, *names)

    def _received(self) -> dict[str, int]:
        return flood.received(self.server, self._asker)

    def _running(self) -> list[pods.Pod]:
        return [p for p in pods.running(town.SPACE).values() if p.name.startswith("heir-")]


def test_an_address_that_was_handed_on_while_the_operator_was_away(
    traffic: None, askers: asking.Askers, place: town.Town
) -> None:
    near, far = place.pods["server"].node, place.pods["friend-far"].node
    pods.apply(
        pods.manifest("gone-friend", town.SPACE, {"role": "friend"}, near),
        pods.manifest("gone-stranger", town.SPACE, {"role": "stranger"}, far),
        set_of("friend", next(n for n in cluster.nodes() if n not in (near, far))),
    )
    found = {pod.name: pod for pod in pods.wait_ready(town.SPACE).values()}
    assert asks(askers, found["gone-friend"], place)
    assert asks(askers, found["named-0"], place)
    addresses = {
        "stranger": found["gone-friend"].address,
        "friend": found["gone-stranger"].address,
    }
    heirs = Heirs(place, askers, addresses)
    with ipam.pinned(near, addresses["stranger"]), ipam.pinned(far, addresses["friend"]):
        with install.operator_away():
            pods.apply(set_of("stranger", found["named-0"].node))
            pods.remove(town.SPACE, "gone-friend", "gone-stranger", "named-0")
            heirs.come()
            for role in heirs.places:
                pods.eventually(
                    lambda role=role: pods.waits(f"heir-{role}", town.SPACE), "said why", 60
                )
            # What runs goes on; those who came have no policy, so they do not start.
            place.served(askers)
            assert not [k for k in pods.running(town.SPACE) if k.startswith(f"{town.SPACE}/heir")]
            assert heirs.heard("stranger") == heirs.heard("friend") == 0
        heirs.judge()
    named = pods.wait_ready(town.SPACE)[f"{town.SPACE}/named-0"]
    assert named.uid != found["named-0"].uid
    assert not asks(askers, named, place), "a name makes no friend"
    cold.settle()
    heirs.go()
    cluster.kubectl("delete", "statefulset", "-n", town.SPACE, "named", "--timeout=60s")


def test_an_address_that_a_completed_job_still_has_in_the_api(
    traffic: None, askers: asking.Askers, place: town.Town
) -> None:
    near, far = place.pods["server"].node, place.pods["friend-far"].node
    pods.apply(job("friend", near), job("stranger", far))
    pods.eventually(lambda: len(ended()) == 2, "the jobs are done")
    addresses = {"stranger": ended()["friend"], "friend": ended()["stranger"]}
    heirs = Heirs(place, askers, addresses)
    with ipam.pinned(near, addresses["stranger"]), ipam.pinned(far, addresses["friend"]):
        heirs.come()
        heirs.judge()
    assert ended() == {"friend": addresses["stranger"], "stranger": addresses["friend"]}
    cold.settle()
    heirs.go()
    cluster.kubectl("delete", "jobs", "-n", town.SPACE, "--all", "--timeout=60s")


def test_a_node_that_is_deleted_and_comes_back_under_its_name(
    traffic: None, askers: asking.Askers, place: town.Town
) -> None:
    name = place.pods["server"].node
    node = json.loads(cluster.kubectl("get", "node", name, "-o", "json"))
    kept = ("name", "labels", "annotations")
    metadata = {key: node["metadata"][key] for key in kept if key in node["metadata"]}
    spec = {key: node["spec"][key] for key in ("podCIDR", "podCIDRs", "providerID")}
    again = {"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": spec}
    cluster.kubectl("delete", "node", name, "--wait=true")
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(again))
    uid = json.loads(cluster.kubectl("get", "node", name, "-o", "json"))["metadata"]["uid"]
    assert uid != node["metadata"]["uid"]

    def owned() -> bool:
        state = install.node_states().get(name, {"metadata": {}})
        return [o["uid"] for o in state["metadata"].get("ownerReferences", ())] == [uid]

    pods.eventually(owned, "the node's state is the new node's", 60)
    cluster.kubectl("wait", "--for=condition=Ready", "node", name, "--timeout=60s")
    place.served(askers)
    place.refused(askers)


def asks(askers: asking.Askers, pod: pods.Pod, place: town.Town) -> bool:
    server = place.pods["server"]
    (answer,) = askers.of(pod).ask([Question(server.address, 80, seconds=town.SERVED_SECONDS)])
    return answer.pod == server.key


def set_of(role: str, node: str) -> pods.Manifest:
    """A StatefulSet of one pod; its pod changes when it is deleted and comes again."""
    template = pods.manifest("named", town.SPACE, {"role": role, "set": "named"}, node)
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": "named", "namespace": town.SPACE},
        "spec": {
            "serviceName": "named",
            "updateStrategy": {"type": "OnDelete"},
            "selector": {"matchLabels": {"set": "named"}},
            "template": {
                "metadata": {"labels": template["metadata"]["labels"]},
                "spec": template["spec"],
            },
        },
    }


def job(role: str, node: str) -> pods.Manifest:
    """A Job whose pod ends at once: it asks nothing."""
    made: Any = pods.manifest("done", town.SPACE, {"role": role}, node)
    (container,) = made["spec"]["containers"]
    container["args"] = ["ask"]
    del container["readinessProbe"]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"done-{role}", "namespace": town.SPACE},
        "spec": {
            "template": {
                "metadata": {"labels": {"role": role}},
                "spec": {**made["spec"], "restartPolicy": "Never"},
            }
        },
    }


def ended() -> dict[str, str]:
    """Role → address, as the API has it, of the pods of jobs that are complete."""
    return {
        pod["metadata"]["labels"]["role"]: pod["status"]["podIP"]
        for pod in api.items("pods")
        if pod["status"]["phase"] == "Succeeded" and pod["status"].get("podIP")
    }
