"""Whatever is killed, deleted or edited: what was in force stays so, and then all is as wanted.

Every test runs while allowed flows are under way, which must not break, and while strangers keep
asking, who must get no answer."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator

import pytest

from kind import cluster
from rig import asking, install, matrix, pods, town
from rig.asking import Question

pytestmark = pytest.mark.kind
KILLS = 3


@pytest.fixture(scope="module")
def place(tidegate: None) -> Iterator[town.Town]:
    made = town.build()
    yield made
    pods.remove_namespaces(town.SPACE)


@pytest.fixture
def traffic(askers: asking.Askers, place: town.Town) -> Iterator[None]:
    """Flows of friends that must live through the test, and strangers that ask all the time."""
    place.served(askers)
    streams = {
        name: askers.of(place.pods[name]).begin_stream(
            Question(place.pods["server"].address, 80, seconds=0.02)
        )
        for name in town.FRIENDS
    }
    with _strangers(place):
        yield
    ended = {n: askers.of(place.pods[n]).end_stream(s) for n, s in streams.items()}
    broken = {name: answer for name, answer in ended.items() if answer.detail}
    assert not broken
    place.served(askers)
    place.refused(askers)
    install.wait_realised()


@contextlib.contextmanager
def _strangers(place: town.Town) -> Iterator[None]:
    """Strangers ask without a pause, in threads of their own; an answer fails the test."""
    end, failures = threading.Event(), []
    own = asking.Askers()

    def ask() -> None:
        while not end.is_set():
            try:
                place.refused(own)
            except AssertionError as error:
                failures.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        own.close()
    assert not failures, failures[:3]


def kill(pod: pods.Pod) -> None:
    """SIGKILL for the pod's first container, by the node's container runtime."""
    cluster.inside(pod.node, "ctr", "-n", "k8s.io", "tasks", "kill", "-s", "SIGKILL", pod.container)


def restarted(find: Callable[[], dict[str, pods.Pod]], before: dict[str, pods.Pod]) -> None:
    """Waits until every one of these pods has another container that runs."""
    pods.eventually(
        lambda: (
            (now := find()).keys() >= before.keys()
            and all(now[k].container != pod.container for k, pod in before.items())
        ),
        "started again",
        120,
    )


def test_loaders_killed(traffic: None, place: town.Town) -> None:
    for _ in range(KILLS):
        before = install.loaders()
        assert set(before) == set(cluster.nodes())
        for pod in before.values():
            kill(pod)
        restarted(install.loaders, before)
    install.wait_ready()


def test_operator_killed(traffic: None, askers: asking.Askers, place: town.Town) -> None:
    before = install.operators()
    for pod in before.values():
        kill(pod)
    restarted(install.operators, before)
    install.wait_ready()


def test_api_server_killed(traffic: None, askers: asking.Askers, place: town.Town) -> None:
    before = pods.running("kube-system", "component=kube-apiserver")
    for pod in before.values():
        kill(pod)
    # New connections need neither it nor anybody who talks to it.
    place.served(askers)
    pods.eventually(cluster.is_up, "the API server is back", 120)
    pods.apply(town.policy("stranger"), town.policy())
    install.wait_ready()


@pytest.mark.parametrize("kind", ["nodestates", "rulesets", "stateslices"])
def test_objects_deleted_by_hand_come_back_and_nothing_falls_open(traffic: None, kind: str) -> None:
    # A rule set that no node uses any more is on its way out, and does not come back.
    used = str(matrix.items("nodestates"))
    before = {name for name in _specs(kind) if kind != "rulesets" or name in used}
    assert before
    cluster.kubectl("delete", kind, "--all", "--wait=false")
    pods.eventually(lambda: _specs(kind).keys() >= before, f"{kind} are back", 60)


def test_a_slice_edited_by_hand_is_repaired(traffic: None) -> None:
    slices = _specs("stateslices").items()
    name, spec = next((n, s) for n, s in slices if n.startswith("ipcache") and "10.244" in str(s))
    empty = {key: [] for key, value in spec.items() if isinstance(value, list)}
    cluster.kubectl("patch", "stateslices", name, "--type=merge", "-p", json.dumps({"spec": empty}))
    pods.eventually(lambda: _without_revision(name) == _plain(spec), "the slice is repaired", 60)


def test_a_pod_that_comes_while_the_operator_is_away_waits_for_it(
    traffic: None, askers: asking.Askers, place: town.Town
) -> None:
    scale = ("scale", "-n", install.NAMESPACE, "deployment/tidegate-operator")
    cluster.kubectl(*scale, "--replicas=0")
    pods.eventually(lambda: not install.operators(), "the operator is gone", 60)
    try:
        late = pods.manifest("late", town.SPACE, {"role": "friend"}, place.pods["server"].node)
        pods.apply(late)
        # What runs goes on; the new one has no policy, so it does not start.
        place.served(askers)
        pods.eventually(lambda: _has_event("late", "FailedCreatePodSandBox"), "said why", 60)
        assert f"{town.SPACE}/late" not in pods.running(town.SPACE)
    finally:
        cluster.kubectl(*scale, "--replicas=1")
    install.wait_ready()
    ready = pods.wait_ready(town.SPACE)
    (answer,) = askers.of(ready[f"{town.SPACE}/late"]).ask(
        [Question(place.pods["server"].address, 80)]
    )
    assert answer.pod == place.pods["server"].key
    cluster.kubectl("delete", "pod", "-n", town.SPACE, "late", "--timeout=60s")


def _specs(kind: str) -> dict[str, dict[str, object]]:
    return {item["metadata"]["name"]: item["spec"] for item in matrix.items(kind)}


def _plain(spec: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in spec.items() if key not in ("revision", "term")}


def _without_revision(name: str) -> dict[str, object]:
    return _plain(_specs("stateslices").get(name, {}))


def _has_event(pod: str, reason: str) -> bool:
    return bool(
        cluster.kubectl(
            "get", "events", "-n", town.SPACE, "-o", "name",
            f"--field-selector=involvedObject.name={pod},reason={reason}",
        )
    )  # fmt: skip
