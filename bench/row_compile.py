"""compile-*: 1,000 pods, 200 policies, 200 services, generated the same way each time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml
from measure import Result, absolute, pinned
from tidegate_operator import identities, world
from tidegate_operator.compile import Compiler
from tidegate_operator.identities import EMPTY_LEDGER
from tidegate_operator.manifests import Folder, Input
from tidegate_operator.objects import World
from tidegate_operator.world import EMPTY_WORLD

NAMESPACES = 20
PODS, POLICIES, SERVICES = 1000, 200, 200
OPTIONS = world.Options(nodes=10)
"""A node has addresses for some 250 pods."""
APPS = 10
"""Apps in each namespace; five pods, a policy and a service each."""


def meta(name: str, namespace: str, **labels: str) -> dict[str, object]:
    return {"name": name, "namespace": namespace, "labels": labels}


def pod(number: int) -> dict[str, object]:
    namespace, app = f"ns-{number % NAMESPACES}", number // NAMESPACES % APPS
    ports = [{"name": "http", "containerPort": 8080}, {"name": "metrics", "containerPort": 9090}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": meta(f"pod-{number}", namespace, app=f"app-{app}", tier=f"tier-{app % 3}"),
        "spec": {"containers": [{"name": "main", "image": "app", "ports": ports}]},
    }


def policy(number: int) -> dict[str, object]:
    namespace, app = f"ns-{number % NAMESPACES}", number // NAMESPACES
    near = {"podSelector": {"matchLabels": {"tier": f"tier-{app % 3}"}}}
    far = {
        "namespaceSelector": {"matchLabels": {"team": f"team-{number % 4}"}},
        "podSelector": {
            "matchExpressions": [
                {
                    "key": "app",
                    "operator": "In",
                    "values": [f"app-{app}", f"app-{(app + 1) % APPS}"],
                }
            ]
        },
    }
    block = {"ipBlock": {"cidr": "192.0.2.0/24", "except": [f"192.0.2.{number % 16 * 16}/28"]}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": meta(f"policy-{app}", namespace),
        "spec": {
            "podSelector": {"matchLabels": {"app": f"app-{app}"}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [near, far], "ports": [{"port": 8080}]},
                {"from": [block], "ports": [{"port": 9090}]},
            ],
            "egress": [{"to": [near]}, {"ports": [{"port": 53, "protocol": "UDP"}]}],
        },
    }


def service(number: int) -> dict[str, object]:
    namespace, app = f"ns-{number % NAMESPACES}", number // NAMESPACES
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": meta(f"service-{app}", namespace),
        "spec": {"selector": {"app": f"app-{app}"}, "ports": [{"port": 80, "targetPort": "http"}]},
    }


def write(directory: Path) -> None:
    namespaces: list[dict[str, object]] = [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": f"ns-{i}", "labels": {"team": f"team-{i % 4}"}},
        }
        for i in range(NAMESPACES)
    ]
    kinds = {
        "namespaces": namespaces,
        "pods": [pod(i) for i in range(PODS)],
        "policies": [policy(i) for i in range(POLICIES)],
        "services": [service(i) for i in range(SERVICES)],
    }
    for name, items in kinds.items():
        (directory / f"{name}.yaml").write_text(yaml.dump_all(items))


def read(folder: Folder) -> Input:
    found = folder.read()
    if not found.complete or found.problems:
        raise AssertionError(f"the generated manifests are not clean: {found.problems[:3]}")
    return found


def check(built: World, pods: int) -> None:
    if len(built.pods) != pods:
        raise AssertionError(f"{len(built.pods)} pods have a place, not {pods}")


def milliseconds(began: int) -> float:
    return (time.perf_counter_ns() - began) / 1e6


SIZE = f"{PODS:,} pods, {POLICIES} policies, {SERVICES} services"


def cold() -> Iterator[Result]:
    """From the folder: reading and validating included, nothing cached."""
    with tempfile.TemporaryDirectory(prefix="tg-bench-") as directory, pinned():
        write(Path(directory))

        def run() -> float:
            began = time.perf_counter_ns()
            documents = read(Folder(Path(directory))).documents
            now, _ = world.build(documents, OPTIONS, EMPTY_WORLD)
            check(now, PODS)
            ledger = identities.allocate(now, EMPTY_LEDGER)
            Compiler().compile(now, ledger)
            return milliseconds(began)

        what = f"{SIZE}: from YAML files to desired state"
        yield absolute("compile-cold", what, "ms", 2000.0, run)


def one() -> Iterator[Result]:
    with tempfile.TemporaryDirectory(prefix="tg-bench-") as directory, pinned():
        write(Path(directory))
        folder = Folder(Path(directory))
        now, _ = world.build(read(folder).documents, OPTIONS, EMPTY_WORLD)
        ledger = identities.allocate(now, EMPTY_LEDGER)
        compiler = Compiler()
        compiler.compile(now, ledger)
        added = iter(range(PODS, PODS + 1000))

        def run() -> float:
            nonlocal now, ledger
            number = next(added)
            (Path(directory) / f"pod-{number}.yaml").write_text(yaml.dump(pod(number)))
            began = time.perf_counter_ns()
            documents = read(folder).documents
            now, _ = world.build(documents, OPTIONS, now)
            check(now, number + 1)
            ledger = identities.allocate(now, ledger)
            compiler.compile(now, ledger)
            return milliseconds(began)

        what = f"{SIZE}: one pod added, from its YAML file to desired state"
        yield absolute("compile-one", what, "ms", 20.0, run)


ROWS: dict[str, Callable[[], Iterator[Result]]] = {"compile-cold": cold, "compile-one": one}
