"""Services in real maps: what is written for a change, what is read back, what survives."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import UNSET, structs
from support import loader_world as world
from support.lab import U32
from tidegate_api import state as api
from tidegate_bpf import Map, ObjectFile, bpffs
from tidegate_loader import (
    addresses,
    apply,
    attach,
    kernel,
    maglev,
    maps,
    plan,
    plan_services,
    services,
)

pytestmark = pytest.mark.kernel
NODE = "172.18.0.2"
UPLINKS = maps.Uplinks(frozenset({addresses.pack(NODE)}), (addresses.pack(NODE), addresses.ZERO))


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


def front(kind: Any, address: str, port: int) -> api.Frontend:
    return api.Frontend(address=address, port=port, protocol="TCP", kind=kind)


def port_of(name: str, number: int, backends: list[tuple[str, str]], **more: Any) -> Any:
    """A ClusterIP and a NodePort; backends as (address, node)."""
    return api.ServicePort(
        namespace="ns",
        name=name,
        type="NodePort",
        frontends=[
            front(UNSET, f"10.96.1.{number}", 80),
            front("NodePort", "0.0.0.0", 30000 + number),
        ],
        backends=[api.Backend(address=a, port=80, node=n) for a, n in sorted(backends)],
        **more,
    )


def state(ports: list[Any], masquerade: list[str] | None = None) -> maps.State:
    found = world.World(services=ports).state()
    spec = structs.replace(found.node.spec, node_port_addresses=[NODE])
    if masquerade is not None:
        spec = structs.replace(spec, masquerade=api.Masquerade(excludes=masquerade))
    return structs.replace(found, node=structs.replace(found.node, spec=spec))


class Node:
    """A loader, without its process; `restart` is another one over the same maps."""

    def __init__(self, objects: Path, pin_dir: Path) -> None:
        attach.Programs(objects, pin_dir, {}).close()
        self.kernel = kernel.Kernel(pin_dir, kernel.Layouts(ObjectFile(objects / "pod.o")))
        self.actual = self.kernel.actual(None, {})
        self.actual.reindex()
        self.builder = maps.Builder()

    def bring(
        self, ports: list[Any], now: int | None = None, masquerade: list[str] | None = None
    ) -> plan.Plan:
        if now is not None:
            self.actual.wake(now)
        self.desired = self.builder.build(state(ports, masquerade), {}, UPLINKS)
        made = plan.plan(self.desired, self.actual)
        assert apply.apply(made, self.kernel, self.actual) == []
        assert plan.plan(self.desired, self.actual).steps == ()
        if not made.left_out:
            self.actual.service_parts = self.desired.services
        return made

    def ids(self) -> dict[services.BackendKey, int]:
        held = self.kernel.read_backends()
        return {b.key: n for n, b in held.items() if b.state == plan.ACTIVE}


def wanted(node: Node) -> dict[services.FrontendKey, services.Wanted]:
    return {k: w for part in node.desired.services for k, w in part.items()}


def index_is_as_new(node: Node) -> None:
    """What was kept of each change equals what a restart would find."""
    actual = node.actual
    assert actual.index is not None
    new = plan_services.Index(actual.services())
    assert actual.index.uses == new.uses
    assert actual.index.idle == new.idle
    assert actual.index.resting == new.resting
    active = {k: n for k, n in new.ids.items() if actual.backends[n].state == plan.ACTIVE}
    assert {k: n for k, n in actual.index.ids.items() if k in active} == active

    def slots(gaps: list[tuple[int, int]]) -> set[int]:
        return {at for base, count in gaps for at in range(base, min(base + count, 5000))}

    due = {at for r in actual.resting if r.until <= actual.now for at in range(r.base, r.count)}
    assert slots(actual.index.gaps) | due == slots(new.gaps) | due


def test_every_kind_is_read_back_as_it_was_meant(objects: Path, pin_dir: Path) -> None:
    node = Node(objects, pin_dir)
    here = [("10.0.0.1", world.NODE), ("10.0.1.1", "other")]
    ports = [
        port_of("plain", 1, here),
        port_of("local", 2, here, external="Local"),
        port_of("inside", 3, here[1:], internal="Local"),
        port_of("sticky", 4, here, affinity=60),
        port_of("none", 5, []),
        port_of("ring", 7, here, algorithm="Maglev", external="Local"),
    ]
    ranged = port_of("ranged", 6, here, source_ranges=["192.0.2.0/24"])
    fronts = [*ranged.frontends, front("LoadBalancer", "198.51.100.1", 80)]
    node.bring([*ports, structs.replace(ranged, frontends=fronts)])
    frontends = node.kernel.read_frontends(node.kernel.read_backends())
    assert {k: f.backends for k, f in frontends.items()} == wanted(node)
    found = {services.frontend_text(k): f.backends for k, f in frontends.items()}
    one, other = ((addresses.pack(a), 80) for a, _ in here)
    assert found["10.96.1.1:80/TCP"] == (one, other)
    local, inside = found[f"{NODE}:30002/TCP"], found["10.96.1.3:80/TCP"]
    assert isinstance(local, services.Special)
    assert isinstance(inside, services.Special)
    assert (local.inside, local.outside, local.elsewhere) == ((one, other), (one,), True)
    assert (inside.inside, inside.elsewhere) == ((), True)
    ringed = node.actual.frontends[addresses.pack(NODE), 30007, 6]
    assert ringed.count == plan_services.SLOT_HEADER + 2 * maglev.RING_SIZE
    (key,) = node.kernel.read_ranges()
    assert key[1:] == addresses.parse_prefix("192.0.2.0/24")
    assert node.kernel.read_node_source() == UPLINKS.source
    node.bring([])
    assert node.kernel.read_frontends({}) == {}
    assert node.kernel.read_ranges() == frozenset()


def test_a_ring_is_turned_where_it_changes(objects: Path, pin_dir: Path) -> None:
    """In place: no slots are taken for it, and those positions are written that have another
    backend, once for each address that has such a ring. Killed half-way it is made anew."""
    node = Node(objects, pin_dir)
    every = [(f"10.0.0.{n}", world.NODE) for n in range(1, 9)]

    def ringed(backends: list[tuple[str, str]]) -> list[Any]:
        made = port_of("ring", 7, backends, algorithm="Maglev")
        more = front("LoadBalancer", "198.51.100.1", 80)
        return [structs.replace(made, frontends=[*made.frontends, more])]

    node.bring(ringed(every))
    keys = [(addresses.pack(a), p, 6) for a, p in ((NODE, 30007), ("198.51.100.1", 80))]
    bases = [node.actual.frontends[key].base for key in keys]
    for backends, most in ((every[1:], 1 / 8 + 0.01), (every, 1 / 8 + 0.01)):
        made = node.bring(ringed(backends))
        (step,) = (s for s in made.steps if isinstance(s, plan.TurnRings))
        assert set(step.entries) == set(keys)
        assert 0 < len(step.slots) <= most * len(keys) * maglev.RING_SIZE
        written = [s for s in made.steps if isinstance(s, plan.WriteSlots)]
        assert sum(len(ids) for s in written for ids in s.ranges.values()) < maglev.RING_SIZE
        assert [node.actual.frontends[key].base for key in keys] == bases
        index_is_as_new(node)
    held = node.kernel.read_frontends(node.kernel.read_backends())
    assert {key: held[key].backends for key in keys} == {key: wanted(node)[key] for key in keys}
    # From here on only half of the next change is written.
    node.desired = node.builder.build(state(ringed(every[:-1])), {}, UPLINKS)
    made = plan.plan(node.desired, node.actual)
    (step,) = (s for s in made.steps if isinstance(s, plan.TurnRings))
    half = dict(list(step.slots.items())[::2])
    table = node.kernel.map("slots_v1")
    table.update_items([(U32.pack(at), U32.pack(number)) for at, number in half.items()])
    node.actual = node.kernel.actual(None, {})
    node.actual.reindex()
    assert any(node.actual.frontends[key].backends is None for key in keys)
    node.bring(ringed(every[:-1]))
    held = node.kernel.read_frontends(node.kernel.read_backends())
    assert {key: held[key].backends for key in keys} == {key: wanted(node)[key] for key in keys}


def test_masquerading_is_read_back_as_it_was_meant(objects: Path, pin_dir: Path) -> None:
    """What is left out is so before anything is masqueraded, and after. Of IPv6 this node has no
    address."""
    node = Node(objects, pin_dir)

    def held() -> dict[str, int]:
        return {
            addresses.prefix_text(p): v
            for p, v in node.kernel.decode_prefixes(node.kernel.map("masquerade_v1")).items()
        }

    always = dict.fromkeys(maps.NEVER_MASQUERADED, 0)
    made = node.bring([], masquerade=["192.0.2.0/24"])
    assert node.desired.outer, "uplinks are looked for"
    assert held() == {"0.0.0.0/0": 1, "::/0": 0, "192.0.2.0/24": 0, **always}
    (step,) = (s for s in made.steps if isinstance(s, plan.UpsertMasquerade))
    assert [v for v in step.entries.values() if v] == [1]
    own = next(prefix for prefix, value in step.entries.items() if value)
    inside = [p for p in step.entries if p[1].startswith(maps.MAPPED) and p != own]
    order = list(step.entries)
    assert max(map(order.index, inside)) < order.index(own)
    made = node.bring([], masquerade=["198.51.100.0/24"])
    assert [type(s).__name__ for s in made.steps] == ["UpsertMasquerade", "DeleteMasquerade"]
    assert held() == {"0.0.0.0/0": 1, "::/0": 0, "198.51.100.0/24": 0, **always}
    node.bring([], masquerade=["0.0.0.0/0"])
    assert set(held().values()) == {0}
    node.bring([], masquerade=[])
    found = node.kernel.actual(None, {})
    found.masquerade[0, addresses.ZERO] = 1
    assert plan.drift(node.actual, found) == 1
    (step,) = plan.plan(node.desired, found).steps
    assert step == plan.UpsertMasquerade({(0, addresses.ZERO): 0})
    made = node.bring([])
    (off,) = (s for s in made.steps if isinstance(s, plan.DeleteMasquerade))
    left = [p for p in off.keys if p[1].startswith(maps.MAPPED) and p != own]
    assert min(map(off.keys.index, left)) > off.keys.index(own)
    assert held() == {}


def test_one_endpoint_costs_its_own_frontends(objects: Path, pin_dir: Path) -> None:
    """Whatever the number of services; and other services' numbers stay."""
    node = Node(objects, pin_dir)
    ports = [port_of(f"s{n}", n, [(f"10.0.{n}.{i}", "other") for i in (1, 2)]) for n in range(200)]
    node.bring(ports)
    before = node.ids()
    ports[7] = port_of("s7", 7, [("10.0.7.1", "other"), ("10.0.7.9", "other")])
    made = node.bring(ports)
    (upsert,) = (s for s in made.steps if isinstance(s, plan.UpsertFrontends))
    assert len(upsert.entries) == 2, "its ClusterIP and its NodePort"
    (written,) = (s for s in made.steps if isinstance(s, plan.WriteBackends))
    (freed,) = (s for s in made.steps if isinstance(s, plan.FreeBackends))
    assert (len(written.entries), len(freed.entries)) == (1, 1)
    after = node.ids()
    assert {k: n for k, n in before.items() if k in after} == {
        k: n for k, n in after.items() if k in before
    }
    index_is_as_new(node)


def test_numbers_survive_a_restart(objects: Path, pin_dir: Path) -> None:
    ports = [port_of("a", 1, [("10.0.0.1", "x"), ("10.0.0.2", "x")], affinity=60)]
    node = Node(objects, pin_dir)
    node.bring(ports)
    before, frontends = node.ids(), node.actual.frontends
    node.kernel.close()
    again = Node(objects, pin_dir)
    assert again.bring(ports).steps == ()
    assert (again.ids(), again.actual.frontends) == (before, frontends)


def test_a_backend_that_ends_keeps_its_flows(objects: Path, pin_dir: Path) -> None:
    """Listed and not used: its id stays active until it is in no list."""
    both = [("10.0.0.1", "x"), ("10.0.0.2", "x")]
    node = Node(objects, pin_dir)
    node.bring([port_of("a", 1, both)])
    ends = port_of("a", 1, both)
    last = structs.replace(ends.backends[1], state="Terminating")
    node.bring([structs.replace(ends, backends=[ends.backends[0], last])])
    gone = (addresses.pack("10.0.0.2"), 80, 6)
    assert gone in node.ids()
    assert all(gone[:2] not in services.backends_of(w) for w in wanted(node).values())
    node.bring([port_of("a", 1, both[:1])])
    assert gone not in node.ids()


def test_any_sequence_is_as_from_scratch(objects: Path, pin_dir: Path) -> None:
    rng = random.Random(6)
    node, now = Node(objects, pin_dir), kernel.now()

    def made(number: int) -> Any:
        pods = [(f"10.0.0.{i}", rng.choice([world.NODE, "x"])) for i in range(1, 9)]
        more: dict[str, Any] = {}
        if rng.random() < 0.5:
            more = rng.choice([{"affinity": 60}, {"external": "Local"}, {"internal": "Local"}])
        chosen = port_of(f"s{number}", number, rng.sample(pods, rng.randint(0, 6)), **more)
        ends = [
            structs.replace(b, state="Terminating") if rng.random() < 0.2 else b
            for b in chosen.backends
        ]
        return structs.replace(chosen, backends=ends)

    held: dict[int, Any] = {}
    for _ in range(40):
        for number in rng.sample(range(12), 3):
            if rng.random() < 0.3:
                held.pop(number, None)
            else:
                held[number] = made(number)
        now += rng.choice([1, 11, 700])
        node.bring([held[n] for n in sorted(held)], now)
        frontends = node.kernel.read_frontends(node.kernel.read_backends())
        assert {k: f.backends for k, f in frontends.items()} == wanted(node)
        index_is_as_new(node)


def test_what_was_changed_behind_our_back_is_seen(objects: Path, pin_dir: Path) -> None:
    node = Node(objects, pin_dir)
    ports = [port_of("a", 1, [("10.0.0.1", "x"), ("10.0.0.2", "x")], affinity=60)]
    node.bring(ports)
    (special,) = (f for k, f in node.actual.frontends.items() if k[1] == 30001)
    with Map.open_pinned(str(pin_dir / "maps" / "slots_v1")) as slots:
        at = special.base + plan_services.SLOT_HEADER
        one, two = (slots.lookup(kernel.INDEX.pack(at + i)) for i in (0, 1))
        slots.update(kernel.INDEX.pack(at), two)
        slots.update(kernel.INDEX.pack(at + 1), one)
    found = node.kernel.actual(None, {})
    assert plan.drift(node.actual, found) == 1, "programs look for a client's backend by halves"
    found.reindex()
    node.actual = found
    node.bring(ports)
    assert plan.drift(node.actual, node.kernel.actual(None, {})) == 0
