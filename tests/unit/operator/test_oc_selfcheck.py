"""What is published is compared with a compile from nothing, and a fault in what the compiler
keeps is found, said and told to the runner. Worlds are those of events, as in
`test_op_incremental`."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs
from tidegate_operator.cluster import kinds
from tidegate_operator.cluster.main import parse
from tidegate_operator.cluster.metrics import Metrics
from tidegate_operator.cluster.selfcheck import SelfCheck, differences
from tidegate_operator.cluster.world import (
    EMPTY_CLUSTER,
    ClusterWorld,
    Snapshot,
    anew,
    build,
    unlike,
)
from tidegate_operator.compile import Compiler, Desired, compile
from tidegate_operator.identities import EMPTY_LEDGER, Ledger, allocate
from unit.operator.test_op_incremental import Events

SECONDS = 30.0
META = {"namespace": "n1", "uid": "u"}
SERVICE = kinds.service(
    msgspec.json.encode(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": META | {"name": "web"},
            "spec": {
                "clusterIP": "10.96.0.7",
                "clusterIPs": ["10.96.0.7"],
                "ports": [{"port": 80}],
            },
        }
    )
)
SLICE = kinds.endpoint_slice(
    msgspec.json.encode(
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "addressType": "IPv4",
            "metadata": META | {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
            "ports": [{"name": "", "port": 8080}],
            "endpoints": [{"addresses": ["10.244.0.5"]}],
        }
    )
)
Given = tuple[ClusterWorld, Ledger]


def _given(snapshot: Snapshot, before: Given = (EMPTY_CLUSTER, EMPTY_LEDGER)) -> Given:
    world, _ = build(snapshot, before[0])
    return world, allocate(world, before[1])


def _checked(given: Given, desired: Desired) -> tuple[Metrics, SelfCheck, list[Any]]:
    metrics, done = Metrics(), threading.Event()
    check = SelfCheck(1e-9, metrics, done.set)
    with capture_logs() as logs:
        check.offer(*given, desired)
        thread = check._thread
        assert thread is not None
        thread.join(SECONDS)
    assert not thread.is_alive()
    assert done.is_set() == bool(logs)
    return metrics, check, logs


def _count(metrics: Metrics, result: str) -> float | None:
    return metrics.registry.get_sample_value(
        "tidegate_operator_self_checks_total", {"result": result}
    )


def _events() -> tuple[Given, Given, Compiler]:
    """Two worlds, one after the other, and a compiler that has come to the first."""
    events, compiler = Events(5), Compiler()
    given: Given = EMPTY_CLUSTER, EMPTY_LEDGER
    for _ in range(60):
        given = _given(events.next(), given)
        compiler.compile(*given)
    mates = [pod for pod in given[0].pods.values() if not pod.host_network and pod.node == "n1"]
    assert len(mates) > 1, "one goes, and its node is compiled anew with the others"
    key = (mates[0].namespace, mates[0].name)
    pods = {name: pod for name, pod in events.snapshot.pods.items() if name != key}
    return given, _given(dataclasses.replace(events.snapshot, pods=pods), given), compiler


def test_what_is_right_is_equal() -> None:
    _, given, compiler = _events()
    metrics, check, logs = _checked(given, compiler.compile(*given))
    assert (_count(metrics, "equal"), _count(metrics, "different")) == (1, 0)
    assert not check.take()
    assert not logs
    seconds = "tidegate_operator_self_check_seconds_count"
    assert metrics.registry.get_sample_value(seconds) == 1


def test_a_held_entry_that_is_wrong_is_found() -> None:
    _, given, compiler = _events()
    for name, held in compiler._pods.items():
        if held[0].node == "n1":
            wrong = (*held[:3], msgspec.structs.replace(held[3], identity=7), held[4])
            compiler._pods[name] = compiler._running.by_node["n1"][name] = wrong
    desired = compiler.compile(*given)
    assert desired != compile(*given)
    metrics, check, logs = _checked(given, desired)
    assert (_count(metrics, "equal"), _count(metrics, "different")) == (0, 1)
    assert [(line["log_level"], line["differing"], line["first"]) for line in logs] == [
        ("error", 1, ["nodes/n1"])
    ]
    assert check.take()
    assert not check.take(), "told once"
    assert not list(differences(Compiler().compile(*given), compile(*given)))


@pytest.mark.parametrize(
    "index",
    ["pods", "claims", "nodes", "policies", "services", "endpoints", "by_service"],
)
def test_an_index_of_the_world_that_went_wrong_is_found_and_made_anew(index: str) -> None:
    """What the compiler makes of a wrong world is right of that world: only the objects tell."""
    (before, _), (after, _), _ = _events()
    first, snapshot = (
        dataclasses.replace(
            world.snapshot,
            services={("n1", "web"): SERVICE},
            slices={("n1", "web-1"): SLICE},
        )
        for world in (before, after)
    )
    snapshot = dataclasses.replace(snapshot, services=first.services, slices=first.slices)
    world, ledger = _given(first)
    held = dict(getattr(world, index))
    held.pop(next(key for key in held if key in getattr(build(snapshot)[0], index)))
    given = _given(snapshot, (dataclasses.replace(world, **{index: held}), ledger))
    right, _ = build(snapshot)
    metrics, check, logs = _checked(given, compile(right, allocate(right, EMPTY_LEDGER)))
    assert _count(metrics, "different") == 1
    assert any(name.startswith(f"world/{index}") for name in logs[0]["first"])
    assert check.take()
    repaired = build(snapshot, anew(given[0]), hold=True)[0]
    assert list(unlike(repaired, right)) == []


def test_another_order_is_found() -> None:
    _, (right, ledger), _ = _events()
    turned = dataclasses.replace(right, pods=dict(reversed(right.pods.items())))
    assert list(unlike(turned, right)) == ["pods/order"]
    assert _count(_checked((turned, ledger), compile(turned, ledger))[0], "different") == 1


def test_numbers_that_nobody_has_or_lacks_are_found() -> None:
    _, (world, ledger), _ = _events()
    key = next(iter(ledger.live))
    for live in (
        {k: n for k, n in ledger.live.items() if k != key},
        {**ledger.live, key._replace(namespace="nowhere"): 4711},
    ):
        wrong = dataclasses.replace(ledger, live=live)
        metrics, _, logs = _checked((world, wrong), compile(world, ledger))
        assert _count(metrics, "different") == 1
        assert logs[0]["first"][0].startswith("ledger/")


def test_numbers_kept_apart_are_no_fault() -> None:
    """No policy tells the pods apart any more, and a node still enforces one that does."""
    _, (world, ledger), _ = _events()
    snapshot = dataclasses.replace(world.snapshot, policies={}, traffic_policies={})
    kept, _ = build(snapshot, world, hold=True)
    assert kept.relevance != kept.asked
    given = kept, allocate(kept, ledger)
    metrics, check, _ = _checked(given, compile(*given))
    assert (_count(metrics, "equal"), check.take()) == (1, False)


def test_every_part_is_compared() -> None:
    given, _, _ = _events()
    whole = compile(*given)
    for table in ("rule_sets", "nodes", "ipcache", "peers"):
        content = dict(getattr(whole, table))
        key = next(iter(content))
        del content[key]
        less = dataclasses.replace(whole, **{table: content})
        assert list(differences(less, whole)) == [f"{table}/{key}"]
        assert list(differences(whole, less)) == [f"{table}/{key}"]
    assert whole.problems
    less = dataclasses.replace(whole, problems=whole.problems[:-1])
    assert list(differences(less, whole)) == [f"problems/{len(less.problems)}"]


def test_what_cannot_be_compiled_anew_is_different() -> None:
    (world, _), _, _ = _events()
    metrics, check, _ = _checked((world, EMPTY_LEDGER), compile(EMPTY_CLUSTER, EMPTY_LEDGER))
    assert _count(metrics, "different") == 1
    assert check.take()


def test_not_before_its_time_and_never_with_0() -> None:
    given = EMPTY_CLUSTER, EMPTY_LEDGER
    for seconds in (0.0, 3600.0):
        check = SelfCheck(seconds, Metrics(), lambda: None)
        check.offer(*given, compile(*given))
        assert check._thread is None


def test_the_option() -> None:
    assert parse([]).verify_every == 600
    assert parse(["--verify-every", "0"]).verify_every == 0
    for text in ("-1", "nan", "inf", "soon"):
        with pytest.raises(SystemExit):
            parse(["--verify-every", text])
