"""The loader against real maps, pinned on a bpffs of the test's own."""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import loader_world as world
from tidegate_bpf import Map, ObjectFile, bpffs
from tidegate_loader import addresses, apply, attach, kernel, maps, plan, rules
from tidegate_loader.loader import Loader
from tidegate_loader.local import NodePaths, Realised, RealisedEndpoint, read_realised

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.stub_object(tmp_path_factory.mktemp("objects"))


@pytest.fixture
def pin_dir(tmp_path: Path) -> Iterator[Path]:
    mounted = tmp_path / "bpf"
    mounted.mkdir()
    bpffs.mount(str(mounted))
    try:
        yield mounted / "node"
    finally:
        bpffs.unmount(str(mounted))


class Node:
    """What a loader process is to the kernel; a new one is a restart."""

    def __init__(self, objects: Path, pin_dir: Path, names: dict[int, str] | None = None) -> None:
        attach.Programs(objects, pin_dir, {}).close()
        layouts = kernel.Layouts(ObjectFile(objects / "pod.o"))
        self.kernel = kernel.Kernel(pin_dir, layouts)
        self.actual = self.kernel.actual(None, names or {})

    def plan(self, wanted: world.World, *numbers: int) -> plan.Plan:
        self.desired = maps.build(wanted.state(), world.interfaces(*numbers))
        return plan.plan(self.desired, self.actual)

    def apply(self, wanted: world.World, *numbers: int) -> plan.Plan:
        made = self.plan(wanted, *numbers)
        assert apply.apply(made, self.kernel, self.actual) == []
        return made

    def names(self) -> dict[int, str]:
        return {n: r.name for n, r in self.actual.rule_sets.items()}

    def restart(self, objects: Path, pin_dir: Path) -> Node:
        uids = self.actual.uids
        self.kernel.close()
        node = Node(objects, pin_dir, self.names())
        node.actual.uids = uids
        return node


def test_restart_finds_everything_and_writes_nothing(objects: Path, pin_dir: Path) -> None:
    node = Node(objects, pin_dir)
    made = node.apply(world.example(), 1, 2)
    assert plan.BumpEpoch(1) in made.steps
    assert node.plan(world.example(), 1, 2).steps == ()
    again = node.restart(objects, pin_dir)
    assert again.plan(world.example(), 1, 2).steps == ()
    assert again.actual.epoch == 1


_ONE, _TWO = addresses.pack("10.0.0.1"), addresses.pack("fd00::2")
LIKELY = [
    ("just that, in another order", {_TWO: 301, _ONE: 300}, True),
    ("less", {_ONE: 300}, False),
    ("more", {_ONE: 300, _TWO: 301, bytes(16): 1}, False),
    ("another address", {_ONE: 300, addresses.pack("fd00::3"): 301}, False),
    ("another identity", {_ONE: 300, _TWO: 302}, False),
    ("identities the other way round", {_ONE: 301, _TWO: 300}, False),
    ("one that was wrong before", {_ONE: 300, _TWO: kernel.WRONG}, False),
]


@pytest.mark.parametrize(("reason", "likely", "same"), LIKELY)
def test_likely_entries_are_taken_only_when_they_are_there(
    objects: Path, pin_dir: Path, reason: str, likely: dict[bytes, int], same: bool
) -> None:
    node, there = Node(objects, pin_dir), {_ONE: 300, _TWO: 301}
    packed = b"".join(there)
    values = kernel.ipcache_values(packed, there.values())
    node.kernel.map("ipcache_v1").update_batch(packed, values)
    found = node.kernel.read_ipcache(likely)
    assert (found, found is likely) == (there, same)
    # A value whose proof is another key's is wrong, whatever is likely.
    node.kernel.map("ipcache_v1").update(_TWO, values[:8])
    assert node.kernel.read_ipcache(likely) == {_ONE: 300, _TWO: kernel.WRONG}


def test_identities_that_changed_places_are_never_taken_for_the_same() -> None:
    """Whatever the addresses' hashes are."""
    for number in range(500):
        one, two = (addresses.pack(f"10.{n}.{number >> 8}.{number & 255}") for n in (1, 2))
        swapped = {one: 301, two: 300}
        assert not kernel._same_entries(one + two, [300, 301], swapped)
        assert kernel._same_entries(two + one, [300, 301], swapped)


def test_what_the_datapath_would_read(objects: Path, pin_dir: Path) -> None:
    node = Node(objects, pin_dir)
    node.apply(world.example(), 1, 2)
    table = node.kernel.read_node_table()
    assert table is not None
    assert {key for key in table if key[0] == plan.NODE_IFINDEX} == {(1, 11), (1, 12)}
    policy = table[1, 11].ingress
    assert policy is not None
    (inner,) = kernel.INDEX.unpack(
        node.kernel.map("rule_sets_v2").lookup(kernel.INDEX.pack(policy.slot))
    )
    with Map.open_pinned(str(pin_dir / "rule_sets" / str(policy.rule_set))) as pinned:
        assert pinned.info.id == inner
        assert node.kernel.decode_rules(pinned)[301, 6, 80, 24] == (100, 0, rules.ALLOW, 0)
    with Map.open_pinned(str(pin_dir / "cidrs" / str(policy.rule_set))) as trie:
        key = node.kernel.layouts.prefix.pack_row((128, addresses.pack("192.0.2.65")))
        assert trie.lookup(key) == kernel.INDEX.pack(0)
        key = node.kernel.layouts.prefix.pack_row((128, addresses.pack("192.0.2.1")))
        assert trie.lookup(key) == kernel.INDEX.pack(1)


def test_a_policy_change_moves_the_epoch_once_and_frees_the_old(
    objects: Path, pin_dir: Path
) -> None:
    node = Node(objects, pin_dir)
    node.apply(world.example(), 1, 2)
    before = set(node.actual.rule_sets)
    changed = world.example()
    changed.peers = [world.peer_set("web", 301)]
    made = node.apply(changed, 1, 2)
    assert [type(s) for s in made.steps].count(plan.BumpEpoch) == 1
    assert len(node.actual.rule_sets) == 2
    assert len(before - set(node.actual.rule_sets)) == 1
    assert {p.name for p in (pin_dir / "rule_sets").iterdir()} == {
        str(n) for n in node.actual.rule_sets
    }
    assert node.restart(objects, pin_dir).plan(changed, 1, 2).steps == ()


def _variants() -> list[tuple[str, world.World, tuple[int, ...]]]:
    moved = world.example()
    moved.ipcache = moved.ipcache | {"10.0.0.2/32": 302, "10.0.1.10/32": 303}
    del moved.ipcache["10.0.1.9/32"]
    moved.peers = [world.peer_set("web", 303)]
    moved.services = [world.service("a", "10.96.0.1", 80, [("10.0.0.2", 8080)])]
    relabelled = _relabelled(moved)
    empty = world.World()
    return [
        ("first", world.example(), (1, 2)),
        ("everything moves", moved, (1, 2)),
        ("a label and a policy at once", relabelled, (1, 2)),
        ("an interface less", moved, (2,)),
        ("nothing", empty, ()),
    ]


def _relabelled(before: world.World) -> world.World:
    """10.0.1.10 has the number of others now, which another policy allows instead."""
    ingress = world.rule_set(*before.rule_sets[0].spec.terms, name="other")
    made = copy.deepcopy(before)
    made.ipcache["10.0.1.10/32"] = 302
    made.peers = [world.peer_set("web", 302)]
    made.rule_sets = [ingress, made.rule_sets[1]]
    made.endpoints[0] = world.endpoint(1, 300, *(r.metadata.name for r in made.rule_sets))
    return made


def test_a_label_and_a_policy_that_change_at_once_are_one_switch(
    objects: Path, pin_dir: Path
) -> None:
    """Who is allowed before and after always is, and all others turn with one step."""
    node, before = Node(objects, pin_dir), world.example()
    moves, comes, goes = (addresses.pack(f"10.0.1.{n}") for n in (10, 11, 12))
    before.ipcache |= {"10.0.1.10/32": 303, "10.0.1.11/32": 302, "10.0.1.12/32": 303}
    before.peers = [world.peer_set("web", 303)]
    node.apply(before, 1, 2)
    after = _relabelled(before)
    made, writer = node.plan(after, 1, 2), apply.Writer(node.kernel, node.actual)
    seen = [[_allows(node, address) for address in (moves, comes, goes)]]
    for step in made.steps:
        writer.execute(step)
        found = [_allows(node, address) for address in (moves, comes, goes)]
        seen += [found] if found != seen[-1] else []
    assert seen == [[True, False, True], [True, True, False]]
    assert [type(step) for step in made.steps].count(plan.SwitchNodeTable) == 3
    assert node.plan(after, 1, 2).steps == ()
    assert node.restart(objects, pin_dir).plan(after, 1, 2).steps == ()


def test_addresses_that_move_under_a_rule_set_whose_pin_is_gone(
    objects: Path, pin_dir: Path
) -> None:
    node, before = Node(objects, pin_dir), world.example()
    before.ipcache |= {"10.0.1.10/32": 303}
    node.apply(before, 1, 2)
    for pin in [*(pin_dir / "rule_sets").iterdir(), *(pin_dir / "cidrs").iterdir()]:
        pin.unlink()
    node = node.restart(objects, pin_dir)
    after = _relabelled(before)
    node.apply(after, 1, 2)
    assert node.restart(objects, pin_dir).plan(after, 1, 2).steps == ()


def _allows(node: Node, address: bytes) -> bool:
    """Does pod 1 let the address in, as a program would read it now?"""
    table = node.kernel.read_node_table()
    assert table is not None
    policy = table[plan.NODE_IFINDEX, 11].ingress
    assert policy is not None
    number = node.kernel.read_ipcache_keys([address])[address] & plan.NUMBER
    with Map.open_pinned(str(node.kernel.pin_dir / "rule_sets" / str(policy.rule_set))) as pinned:
        return any(key[0] == number for key in node.kernel.decode_rules(pinned))


def test_killed_after_any_step_the_next_start_completes(objects: Path, tmp_path: Path) -> None:
    """A child dies after each step of each change; the parent then starts anew."""
    for index, (reason, _wanted, _numbers) in enumerate(_variants()):
        step = 0
        while step >= 0:
            mounted = tmp_path / f"bpf-{index}-{step}"
            mounted.mkdir()
            bpffs.mount(str(mounted))
            try:
                step = _kill_after(objects, mounted / "node", index, step, reason)
            finally:
                bpffs.unmount(str(mounted))


def _kill_after(objects: Path, pin_dir: Path, index: int, step: int, reason: str) -> int:
    """Apply the variants before `index`, kill the loader in `index` after `step` steps; the
    step to try next, -1 when there are no more."""
    variants = _variants()
    node = Node(objects, pin_dir)
    for _, wanted, numbers in variants[:index]:
        node.apply(wanted, *numbers)
    _, wanted, numbers = variants[index]
    old = node.kernel.read_node_table()
    made = node.plan(wanted, *numbers)
    tables = [old, *(s.entries for s in made.steps if isinstance(s, plan.BuildNodeTable))]
    child = os.fork()
    if child == 0:
        writer = apply.Writer(node.kernel, node.actual)
        for one in made.steps[:step]:
            writer.execute(one)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    again = node.restart(objects, pin_dir)
    table = again.kernel.read_node_table()
    assert table in tables, reason
    for entry in (table or {}).values():
        for policy in (entry.ingress, entry.egress):
            if policy is not None:
                assert again.actual.rule_sets[policy.rule_set].slot == policy.slot, reason
    again.actual.interrupted = True
    made_again = again.apply(wanted, *numbers)
    assert any(isinstance(s, plan.BumpEpoch) for s in made_again.steps), reason
    assert again.plan(wanted, *numbers).steps == (), reason
    assert again.restart(objects, pin_dir).plan(wanted, *numbers).steps == (), reason
    again.kernel.close()
    return step + 1 if step < len(made.steps) else -1


def test_more_entries_than_fit_are_left_out_and_said(objects: Path, pin_dir: Path) -> None:
    node = Node(objects, pin_dir)
    limits = node.actual.limits
    node.actual.limits = plan.Limits(2, 1, 1, limits.slots, limits.backends, 8, 8)
    made = node.apply(world.example(), 1, 2)
    assert made.left_out == len(made.problems) > 0
    assert len(node.actual.ipcache) == 2
    assert len(node.actual.frontends) == 1
    assert node.plan(world.example(), 1, 2).steps == ()


@pytest.fixture
def paths(tmp_path: Path) -> NodePaths:
    found = NodePaths(tmp_path / "run", world.NODE)
    found.interfaces.mkdir(parents=True)
    return found


def _options(objects: Path, pin_dir: Path) -> argparse.Namespace:
    return argparse.Namespace(
        node=world.NODE,
        objects=objects,
        pin_dir=pin_dir,
        force_clsact=False,
        cgroup=None,
        flow_events=True,
        load_balancer_mode="snat",
        load_balancer_acceleration="disabled",
    )


class _Log:
    def __getattr__(self, _name: str) -> object:
        return lambda *_args, **_more: None


def _loader(paths: NodePaths, objects: Path, pin_dir: Path) -> Loader:
    return Loader(paths, _options(objects, pin_dir), _Log())


def test_realised_says_what_is_in_force(paths: NodePaths, objects: Path, pin_dir: Path) -> None:
    wanted = world.example()
    wanted.write(paths.objects.parent)
    loader = _loader(paths, objects, pin_dir)
    loader.cycle()
    found = read_realised(paths.realised)
    assert isinstance(found, Realised)
    assert found.digest == wanted.state().digest
    assert found.services == {"10.96.0.1:80/TCP": "ns/a", "10.96.0.2:53/TCP": "ns/b"}
    assert found.endpoints == {}
    assert [(c.type, c.status) for c in found.status.conditions] == [("Ready", "True")]
    assert not paths.applying.exists()
    loader.close()


BROKEN = [
    ("a shard is gone", "stateslices/ipcache-e1-0-of-2.json", None, "Missing"),
    ("a shard is empty", "stateslices/ipcache-e1-0-of-2.json", b"", "Unreadable"),
    ("the node state is gone", "nodestates/node-1.json", None, "Missing"),
    ("the node state is null", "nodestates/node-1.json", b"null", "Unreadable"),
]


@pytest.mark.parametrize(("reason", "path", "data", "expected"), BROKEN, ids=lambda v: str(v)[:24])
def test_what_is_missing_removes_nothing(
    paths: NodePaths,
    objects: Path,
    pin_dir: Path,
    reason: str,
    path: str,
    data: bytes | None,
    expected: str,
) -> None:
    world.example().write(paths.objects.parent)
    loader = _loader(paths, objects, pin_dir)
    loader.cycle()
    before = copy.deepcopy(loader._actual)
    if data is None:
        (paths.objects / path).unlink()
    else:
        (paths.objects / path).write_bytes(data)
    loader.cycle()
    found = read_realised(paths.realised)
    assert found is not None
    stalled = next(c for c in found.status.conditions if c.type == "Stalled")
    assert (stalled.status, stalled.reason) == ("True", expected), reason
    assert plan.drift(before, loader._actual) == 0
    loader.close()
    # A restart finds the last good copy and still moves nothing.
    again = _loader(paths, objects, pin_dir)
    again.cycle()
    assert plan.drift(before, again._actual) == 0
    again.close()


def test_detached_removes_everything(paths: NodePaths, objects: Path, pin_dir: Path) -> None:
    wanted = world.example()
    wanted.write(paths.objects.parent)
    loader = _loader(paths, objects, pin_dir)
    loader.cycle()
    wanted.mode, wanted.revision = "Detached", 2
    wanted.write(paths.objects.parent)
    loader.cycle()
    assert [p for p in pin_dir.rglob("*") if p.is_file()] == []
    wanted.mode, wanted.revision = "Enforcing", 3
    wanted.write(paths.objects.parent)
    loader.cycle()
    found = read_realised(paths.realised)
    assert found is not None
    assert found.digest == wanted.state().digest
    assert len(loader._actual.ipcache) == 6
    loader.close()


def test_drift_is_repaired_and_counted(paths: NodePaths, objects: Path, pin_dir: Path) -> None:
    world.example().write(paths.objects.parent)
    loader = _loader(paths, objects, pin_dir)
    loader.cycle()
    epoch = loader._actual.epoch
    with Map.open_pinned(str(pin_dir / "maps" / "ipcache_v1")) as ipcache:
        key = addresses.pack("10.0.0.2")
        ipcache.update(key, kernel.INDEX.pack(addresses.addr_proof(key)) + kernel.INDEX.pack(9))
        ipcache.delete(addresses.pack("10.0.1.9"))
        ipcache.update(addresses.pack("10.9.9.9"), bytes(8))
    with Map.open_pinned(str(pin_dir / "maps" / "frontends_v1")) as frontends:
        frontends.delete(next(iter(frontends.keys())))
    loader.verify()
    found = read_realised(paths.realised)
    assert found is not None
    assert (found.counters.drift, found.status.drift) == (4, 4)
    assert loader._actual.ipcache[addresses.pack("10.0.0.2")] & maps.IDENTITY_MASK == 301
    assert addresses.pack("10.9.9.9") not in loader._actual.ipcache
    assert loader._actual.epoch > epoch
    loader.verify()
    assert found.counters == read_realised(paths.realised).counters  # type: ignore[union-attr]
    loader.close()


def test_ids_that_these_maps_never_gave_mean_nothing(objects: Path, pin_dir: Path) -> None:
    """A realised.json that outlived its pins must not give one id to two pods."""
    node = Node(objects, pin_dir)
    node.apply(world.example(), 1, 2)
    known = {
        uid: RealisedEndpoint(
            id=number, ifindex=1, half_open=0, namespace="", name="", identity=1, addresses=[]
        )
        for uid, number in (*node.actual.uids.items(), ("uid-9", node.actual.next_id))
    }
    realised = Realised(node=world.NODE, epoch=1, endpoints=known)
    assert node.kernel.actual(realised, {}).uids == node.actual.uids


def test_detached_stays_detached_without_objects(
    paths: NodePaths, objects: Path, pin_dir: Path
) -> None:
    wanted = world.example()
    wanted.write(paths.objects.parent)
    loader = _loader(paths, objects, pin_dir)
    loader.cycle()
    wanted.mode, wanted.revision = "Detached", 2
    wanted.write(paths.objects.parent)
    loader.cycle()
    for path in paths.objects.rglob("*.json"):
        path.unlink()
    again = _loader(paths, objects, pin_dir)
    again.cycle()
    assert not (pin_dir / "maps").exists()
    again.close()


def test_ids_survive_a_restart_and_are_not_reused(objects: Path, pin_dir: Path) -> None:
    node = Node(objects, pin_dir)
    wanted = world.example()
    node.apply(wanted, 1, 2)
    ids, backends = dict(node.actual.uids), dict(node.actual.backends)
    node = node.restart(objects, pin_dir)
    wanted.endpoints = [*wanted.endpoints, world.endpoint(3, 302)]
    wanted.services = [*wanted.services, world.service("c", "10.96.0.3", 80, [("10.0.0.1", 8080)])]
    node.apply(wanted, 1, 2, 3)
    assert {uid: node.actual.uids[uid] for uid in ids} == ids
    assert node.actual.uids["uid-3"] not in ids.values()
    assert node.actual.backends == backends
    wanted.endpoints = wanted.endpoints[:2]
    gone = node.actual.uids["uid-3"]
    node.apply(wanted, 1, 2)
    wanted.endpoints = [*wanted.endpoints, world.endpoint(3, 302)]
    node.apply(wanted, 1, 2, 3)
    assert node.actual.uids["uid-3"] > gone
