"""One small set of pods that the tests of traffic and of faults share.

`server` may be asked by those whose role is `friend`, on ports 80 and, by UDP, 53; `stranger` may
not ask it. Each of them has a twin on another node. A Service of the same name stands before
`server`."""

from __future__ import annotations

from dataclasses import dataclass

from kind import cluster
from rig import api, pods
from rig.asking import Answer, Askers, Question
from rig.pods import Manifest, Pod

SPACE = "town"
FRIENDS = ("friend-near", "friend-far")
STRANGERS = ("stranger-near", "stranger-far")
# Long enough for a packet to be sent again more than once.
DENIED_SECONDS = 0.7
SERVED_SECONDS = 3.0


@dataclass(frozen=True)
class Town:
    pods: dict[str, Pod]
    """By name."""
    service: str
    """The ClusterIP."""

    def refused(self, askers: Askers) -> None:
        """No stranger gets an answer, by the pod's address or by the Service's."""
        where = (self.pods["server"].address, self.service)
        for name in STRANGERS:
            answers = askers.of(self.pods[name]).ask(
                [Question(address, 80, seconds=DENIED_SECONDS) for address in where]
            )
            assert not [a for a in answers if a.pod], f"{name} got an answer: {answers}"

    def served(self, askers: Askers) -> None:
        """Every friend gets an answer by both."""
        for name in FRIENDS:
            answers = self.answers(askers, name)
            assert [a.pod for a in answers] == [f"{SPACE}/server"] * 2, f"{name}: {answers}"

    def is_served(self, askers: Askers) -> bool:
        """Whether every friend does."""
        expected = [f"{SPACE}/server"] * 2
        return all([a.pod for a in self.answers(askers, n)] == expected for n in FRIENDS)

    def answers(self, askers: Askers, friend: str) -> list[Answer]:
        """What a friend gets by the pod's address, and by the Service's."""
        where = (self.pods["server"].address, self.service)
        return askers.of(self.pods[friend]).ask(
            [Question(address, 80, seconds=SERVED_SECONDS) for address in where]
        )


_built: tuple[Town, object] | None = None
"""The town that is there, and how it looked when it was new."""


def build() -> Town:
    """A town that is new, or as new: that of tests before, where they left it as it was, pods and
    all."""
    global _built
    if _built is None or _look() != _built[1]:
        made = _make()
        _built = made, _look()
    return _built[0]


def _look() -> object:
    """What there is in its namespace, as far as a test may have changed it."""
    return [
        (
            item["metadata"]["uid"], item["metadata"].get("labels"), item.get("spec"),
            pods.parse(item) if kind == "pods" else None,
        )
        for kind in ("pods", "services", "networkpolicies", "trafficpolicies")
        for item in api.items(kind, SPACE)
    ]  # fmt: skip


def _make() -> Town:
    pods.remove_namespaces(SPACE)
    near, far = [n for n in cluster.nodes() if "worker" in n][:2]
    pods.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE}},
        policy(),
        pods.manifest("server", SPACE, {"app": "server"}, near),
        *(pods.manifest(n, SPACE, {"role": "friend"}, _node(n, near, far)) for n in FRIENDS),
        *(pods.manifest(n, SPACE, {"role": "stranger"}, _node(n, near, far)) for n in STRANGERS),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "server", "namespace": SPACE},
            "spec": {"selector": {"app": "server"}, "ports": [{"port": 80}]},
        },
    )
    found = pods.wait_ready(SPACE)
    service = api.find("services", "server", SPACE)
    assert service is not None
    return Town({pod.name: pod for pod in found.values()}, service["spec"]["clusterIP"])


def policy(*roles: str) -> Manifest:
    """Who may ask the server: friends, and those of these roles."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "server", "namespace": SPACE},
        "spec": {
            "podSelector": {"matchLabels": {"app": "server"}},
            "policyTypes": ["Ingress"],
            "ingress": [
                {
                    "from": [
                        {"podSelector": {"matchLabels": {"role": role}}}
                        for role in ("friend", *roles)
                    ],
                    "ports": [{"port": 80}, {"port": 53, "protocol": "UDP"}],
                }
            ],
        },
    }


def _node(name: str, near: str, far: str) -> str:
    return near if name.endswith("near") else far
