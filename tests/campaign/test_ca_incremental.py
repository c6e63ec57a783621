"""Incremental equals from scratch, from the folder to the kernel.

One operator and one loader live through a random sequence of events; after each, what their
node's maps hold must equal what a new compiler and a new loader make of the same world, but for
ids, slots and the epoch. Now and then the loader starts again in between, or reads everything back.

Faults it was seen to find: peer sets that keep identities that are gone; frontends never deleted;
a half-open share that outlives its endpoint; subjects remembered by the number of policies;
endpoint ids used again.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
from support import ca_maps, ca_rig, clusters
from support.ca_soak import Figures, campaign, scaled
from support.lab import BUILD
from tidegate_api.state import encode
from tidegate_loader import attach
from tidegate_loader.loader import Loader
from tidegate_loader.local import (
    LocalInterface,
    NodePaths,
    Realised,
    read_realised,
    write_atomic,
)
from tidegate_operator import publish
from tidegate_operator.compile import compile
from tidegate_operator.objects import World
from tidegate_operator.standalone import Runner, StepResult

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

EVENTS = 15
"""Of one sequence."""
NODES = ("node-1", "node-2")


class Quiet:
    """A log that nobody reads."""

    def info(self, *_: object, **__: object) -> None: ...

    warning = error = info


class Services:
    """Services that come, change and go beside the cluster's events."""

    def __init__(self, seed: int) -> None:
        self._source = clusters.RandomSource(seed)
        self._held: dict[str, clusters.Manifest] = {}

    def next(self) -> list[clusters.Manifest]:
        source = self._source
        name = source.pick(["s1", "s2", "s3"])
        if source.number(0, 2) == 0:
            self._held.pop(name, None)
        else:
            self._held[name] = self._service(name)
        return list(self._held.values())

    def _service(self, name: str) -> clusters.Manifest:
        source = self._source
        ports = [
            {
                "name": f"p{n}",
                "port": 80 + n,
                "protocol": protocol,
                "targetPort": source.pick(clusters.PORTS),
            }
            for n, protocol in enumerate(["TCP", "UDP"][: source.number(1, 2)])
        ]
        selector = {source.pick(clusters.KEYS): source.pick(clusters.VALUES)}
        # A namespace moves the Service: another object of the same name.
        metadata = {"name": name, "namespace": source.pick(["default", "a"])}
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"selector": selector, "ports": ports},
        }


class Living:
    """The operator's side, and one node's loader, which remember."""

    def __init__(self, directory: Path, bpf: Path) -> None:
        self.folder, self.run_dir, self._bpf = directory / "folder", directory / "run", bpf
        self.folder.mkdir(parents=True)
        self.run_dir.mkdir()
        self._runner = Runner(self.folder, self.run_dir, on_world=self._on_world)
        self.interfaces: dict[str, dict[str, LocalInterface]] = {node: {} for node in NODES}
        self._objects = directory / "objects"
        self._objects.mkdir()
        (self._objects / "pod.o").symlink_to(BUILD / "pod.o")
        self.loaders: dict[str, Loader] = {}

    def step(self, wanted: list[clusters.Manifest]) -> StepResult:
        ca_rig.write(self.folder, wanted)
        result = self._runner.step()
        for node in NODES:
            if node not in self.loaders:
                self.start(node)
            self.loaders[node].cycle()
            assert self.loaders[node].realised_now, self.realised(node).status
        return result

    def realised(self, node: str) -> Realised:
        found = read_realised(NodePaths(self.run_dir, node).realised)
        assert found is not None
        return found

    def start(self, node: str) -> None:
        """Again, or for the first time."""
        if node in self.loaders:
            self.loaders[node].close()
        options = argparse.Namespace(
            node=node,
            objects=self._objects,
            pin_dir=self._bpf / node,
            cgroup=None,
            force_clsact=False,
            flow_events=True,
            load_balancer_mode="snat",
            load_balancer_acceleration="disabled",
        )
        self.loaders[node] = Loader(NodePaths(self.run_dir, node), options, Quiet())

    def close(self) -> None:
        """Nothing stays attached: the kernel takes 63 programs a hook, and this was one of many."""
        for node, loader in self.loaders.items():
            loader.close()
            attach.detach(self._bpf / node, [])

    def _on_world(self, _before: World, after: World) -> None:
        """What the CNI step does; an interface number may come back as another pod's."""
        for node, held in self.interfaces.items():
            directory = NodePaths(self.run_dir, node).interfaces
            directory.mkdir(parents=True, exist_ok=True)
            pods = {p.uid: p for p in after.pods.values() if p.node == node and not p.host_network}
            for uid in held.keys() - pods.keys():
                del held[uid]
                (directory / f"{uid}.json").unlink()
            for uid, pod in pods.items():
                if uid not in held or held[uid].addresses != list(pod.addresses):
                    held.pop(uid, None)
                    held[uid] = ca_rig.interface(pod, _free(held, node))
                    write_atomic(directory / f"{uid}.json", encode(held[uid]))


def _free(held: dict[str, LocalInterface], node: str) -> int:
    """Both nodes are in one namespace here, so each has its half of the interfaces."""
    half = ca_rig.INTERFACES // 2
    first = ca_rig.FIRST_IFINDEX + half * NODES.index(node)
    taken = {i.ifindex for i in held.values()}
    return next(n for n in range(first, first + half) if n not in taken)


class Ids:
    """What each id ever meant: none is reused while the pins live."""

    def __init__(self) -> None:
        self._meant: dict[tuple[str, int], Any] = {}

    def check(self, found: ca_maps.NodeMaps, uids: dict[int, str]) -> list[str]:
        now: dict[tuple[str, int], Any] = {}
        for row in found.node.values():
            now["endpoint", row.id] = uids[row.id]
            for policy in (row.ingress, row.egress):
                if policy.flags:
                    now["rule set", policy.rule_set] = found.rules_of(policy)
        return [
            f"{key} was {self._meant[key]}, is {value}"
            for key, value in now.items()
            if self._meant.setdefault(key, value) != value
        ]


def _left_over(pin_dir: Path, found: ca_maps.NodeMaps) -> list[str]:
    """Pins of what the node table no longer names."""
    rows = found.node.values()
    wanted = {
        "rule_sets": {p.rule_set for r in rows for p in (r.ingress, r.egress) if p.flags},
        "half_open": {r.half_open for r in rows},
    }
    wrong = []
    for name, numbers in wanted.items():
        pinned = {int(path.name) for path in (pin_dir / name).iterdir()}
        if pinned != numbers:
            wrong.append(f"{name}: pinned {pinned}, in force {numbers}")
    if len({r.half_open for r in rows}) != len({r.id for r in rows}):
        wrong.append("two endpoints share their half-open flows")
    return wrong


def test_a_sequence_of_events_ends_as_its_last_world_does(tmp_path: Path) -> None:
    wanted = scaled(80, 1500)
    with (
        ca_rig.namespace(),
        ca_rig.mounted(tmp_path / "bpf") as bpf,
        campaign("incremental", "events") as figures,
    ):
        seed = 0
        while figures.count < wanted and not figures.failures:
            _sequence(tmp_path / str(seed), bpf / str(seed), seed, figures)
            seed += 1


def _sequence(directory: Path, bpf: Path, seed: int, figures: Figures) -> None:
    living = Living(directory, bpf)
    services, source, ids = Services(seed), clusters.RandomSource(~seed), {n: Ids() for n in NODES}
    try:
        for at, cluster in enumerate(clusters.random_sequence(seed, EVENTS)):
            result = living.step([*clusters.documents(cluster), *services.next()])
            assert result.desired is not None
            for node in NODES:
                wrong = _compare(living, result, node, bpf, ids[node])
                figures.failures += [f"seed {seed}, event {at}, {node}: {text}" for text in wrong]
            if figures.failures:
                return
            figures.count += 1
            disturb = source.number(0, 9)
            if disturb == 0:
                living.start(source.pick(NODES))
            elif disturb == 1:
                node = source.pick(NODES)
                living.loaders[node].verify()
                assert living.realised(node).counters.drift == 0
    finally:
        living.close()


def _compare(living: Living, result: StepResult, node: str, bpf: Path, ids: Ids) -> list[str]:
    desired = compile(result.world, result.ledger)
    objects = publish.render(desired, result.ledger)
    made = ca_rig.Compiled(result.world, result.ledger, desired, objects)
    found = ca_maps.read(bpf / node)
    with ca_rig.from_scratch(bpf / "fresh") as fresh:
        fresh.apply(made.state(node), living.interfaces[node])
        expected = ca_maps.read(bpf / "fresh")
    uids = {e.id: uid for uid, e in living.realised(node).endpoints.items()}
    wrong = [*found.problems, *ids.check(found, uids), *_left_over(bpf / node, found)]
    now, then = found.content(), expected.content()
    for part, value in then.items():
        if now[part] != value:
            wrong.append(f"{part}: {now[part]}\nfrom scratch: {value}")
    return wrong
