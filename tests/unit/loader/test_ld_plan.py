"""Plans: their order, on an in-memory kernel that minds every rule of safety at every step."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import loader_world as world
from tidegate_api import state as api
from tidegate_loader import addresses, maps, plan

LIMITS = plan.Limits(
    ipcache=64, networks=16, frontends=16, slots=40, backends=32, rule_sets=8, half_open=8
)


class Fake:
    """Executes steps on dictionaries, and asserts what the kernel cannot."""

    def __init__(self) -> None:
        self.actual = plan.Actual(limits=LIMITS)
        self.pinned: dict[int, plan.RuleSetInForce] = {}
        self.slots: dict[int, int] = {}
        self.built: plan.BuildNodeTable | None = None

    def execute(self, step: plan.AnyStep) -> None:
        a = self.actual
        match step:
            case plan.ReserveIds(next_id=next_id):
                assert next_id > a.next_id
                a.next_id = next_id
            case plan.BumpEpoch(epoch=epoch):
                assert epoch == a.epoch + 1
                a.epoch, a.interrupted = epoch, False
            case plan.CreateHalfOpen(slots=slots):
                assert not a.half_open & set(slots)
                a.half_open |= set(slots)
            case plan.CreateRuleSet(id=number, slot=slot, expanded=e):
                assert number < a.next_id
                assert number not in a.rule_sets
                assert slot not in self.slots_in_force()
                a.rule_sets[number] = plan.RuleSetInForce(e.name, e.content, None)
            case plan.PutRuleSets(items=items):
                for number, slot, _ in items:
                    r = a.rule_sets[number]
                    a.rule_sets[number] = plan.RuleSetInForce(r.name, r.content, slot)
            case plan.BuildNodeTable():
                self.built = step
            case plan.SwitchNodeTable():
                assert self.built is not None
                a.node_table, a.uids = self.built.entries, self.built.uids
            case plan.RemoveRuleSets(items=items):
                for number, _ in items:
                    a.rule_sets.pop(number, None)
            case plan.RemoveHalfOpen(slots=slots):
                a.half_open -= set(slots)
            case plan.DeleteIpcache(keys=keys):
                for key in keys:
                    a.ipcache.pop(key, None)
            case plan.UpsertIpcache(entries=entries):
                a.ipcache.update(entries)
            case plan.DeleteNetworks(keys=prefixes):
                for prefix in prefixes:
                    a.networks.pop(prefix, None)
            case plan.UpsertNetworks(entries=networks):
                a.networks.update(networks)
            case _:
                self.execute_services(step)

    def execute_services(self, step: plan.AnyStep) -> None:
        a = self.actual
        match step:
            case plan.DeleteFrontends(keys=keys):
                for key in keys:
                    self.rest(a.frontends.pop(key))
            case plan.WriteBackends(entries=backends):
                for number, backend in backends.items():
                    assert number not in self.named(), "a backend in use was written"
                    held = a.backends.get(number)
                    if held is not None and held.key != backend.key:
                        assert held.state == plan.FREE
                        assert held.freed_at + plan.REST_SECONDS <= a.now
                    a.backends[number] = backend
            case plan.WriteSlots(ranges=ranges):
                for base, ids in ranges.items():
                    for index, number in enumerate(ids, base):
                        assert index < LIMITS.slots
                        assert not self.referred(index), "a slot in use was written"
                        self.slots[index] = number
            case plan.UpsertFrontends(entries=frontends):
                for key, frontend in frontends.items():
                    if key in a.frontends:
                        self.rest(a.frontends[key])
                    a.frontends[key] = frontend
            case plan.FreeBackends(entries=backends):
                for number, backend in backends.items():
                    assert number not in self.named(), "a backend in use was freed"
                    a.backends[number] = backend
            case _:
                raise AssertionError(step)

    def rest(self, frontend: plan.FrontendInForce) -> None:
        until = self.actual.now + plan.RANGE_REST_SECONDS
        resting = plan.Resting(frontend.base, frontend.count, until)
        self.actual.resting = (*self.actual.resting, resting)

    def referred(self, index: int) -> bool:
        a = self.actual
        used = [(f.base, f.count) for f in a.frontends.values()]
        used += [(r.base, r.count) for r in a.resting if r.until > a.now]
        return any(base <= index < base + count for base, count in used)

    def named(self) -> set[int]:
        """Backend ids a program can reach."""
        found = self.actual.frontends.values()
        return {self.slots[f.base + i] for f in found for i in range(f.count)}

    def slots_in_force(self) -> set[int]:
        table = self.actual.node_table or {}
        return {p.slot for e in table.values() for p in (e.ingress, e.egress) if p}

    def check(self) -> None:
        """What must hold after every single step."""
        a = self.actual
        for key, entry in (a.node_table or {}).items():
            assert key in plan.node_keys(entry)
            assert set(plan.node_keys(entry)) <= (a.node_table or {}).keys()
            assert entry.half_open in a.half_open
            for policy in (entry.ingress, entry.egress):
                if policy is not None:
                    assert a.rule_sets[policy.rule_set].slot == policy.slot
        for key, frontend in a.frontends.items():
            listed = []
            for index in range(frontend.count):
                backend = a.backends[self.slots[frontend.base + index]]
                assert backend.state == plan.ACTIVE
                assert backend.key[2] == key[2]
                listed.append(backend.key[:2])
            assert tuple(listed) == frontend.backends

    def bring(self, desired: maps.DesiredMaps, stop: int | None = None) -> plan.Plan:
        made = plan.plan(desired, self.actual)
        for step in made.steps[:stop]:
            self.execute(step)
            self.check()
        return made


def _desired(wanted: world.World, *numbers: int) -> maps.DesiredMaps:
    return maps.build(wanted.state(), world.interfaces(*numbers))


@pytest.mark.parametrize("read_back", [104, 105, 107])
def test_slots_are_free_once_whenever_the_kernel_is_read_back(read_back: int) -> None:
    """A frontend's old slots rest until 105; twice in the gaps they went to two frontends."""
    actual = plan.Actual(limits=LIMITS, now=100, resting=(plan.Resting(3, 2, 105),))
    actual.reindex()
    actual.now = read_back
    actual.reindex()
    actual.wake(110)
    assert actual.index is not None
    free = sorted(at for base, count in actual.index.gaps for at in range(base, base + count))
    assert free == list(range(LIMITS.slots))


def test_the_order_of_a_start_from_nothing() -> None:
    made = Fake().bring(_desired(world.example(), 1, 2))
    assert [type(s).__name__ for s in made.steps] == [
        "ReserveIds",
        "CreateHalfOpen",
        "CreateRuleSet",
        "CreateRuleSet",
        "PutRuleSets",
        "BuildNodeTable",
        "SwitchNodeTable",
        "UpsertNetworks",
        "UpsertIpcache",
        "BumpEpoch",
        "WriteBackends",
        "WriteSlots",
        "UpsertFrontends",
    ]


def test_the_order_of_the_end() -> None:
    fake = Fake()
    fake.bring(_desired(world.example(), 1, 2))
    made = fake.bring(_desired(world.World()))
    assert [type(s).__name__ for s in made.steps] == [
        "DeleteIpcache",
        "DeleteNetworks",
        "BuildNodeTable",
        "SwitchNodeTable",
        "BumpEpoch",
        "DeleteFrontends",
        "FreeBackends",
        "RemoveRuleSets",
        "RemoveHalfOpen",
    ]
    assert fake.actual.node_table == {}


def _with(**changes: object) -> world.World:
    found = world.example()
    for name, value in changes.items():
        setattr(found, name, value)
    return found


_BASE = world.example()
BUMPS = [
    ("an address is new", _with(ipcache=_BASE.ipcache | {"10.3.0.1/32": 300}), False),
    ("an address moved", _with(ipcache=_BASE.ipcache | {"10.0.1.9/32": 303}), True),
    (
        "an address is gone",
        _with(ipcache={k: v for k, v in _BASE.ipcache.items() if k != "10.0.1.9/32"}),
        True,
    ),
    ("a network is new", _with(ipcache=_BASE.ipcache | {"203.0.113.0/24": 901}), True),
    (
        "a service is new",
        _with(services=[*_BASE.services, world.service("c", "10.7.7.7", 1)]),
        False,
    ),
    ("a peer is new", _with(peers=[world.peer_set("web", 301, 302, 303)]), True),
]


@pytest.mark.parametrize(("reason", "changed", "expected"), BUMPS, ids=[b[0] for b in BUMPS])
def test_what_moves_the_epoch(reason: str, changed: world.World, expected: bool) -> None:
    fake = Fake()
    fake.bring(_desired(world.example(), 1, 2))
    made = fake.bring(_desired(changed, 1, 2))
    assert made.steps
    assert (fake.actual.epoch == 2) is expected
    assert (plan.BumpEpoch(2) in made.steps) is expected


def test_a_revocation_and_a_move_come_before_the_switch_and_an_address_after() -> None:
    fake = Fake()
    fake.bring(_desired(world.example(), 1, 2))
    changed = world.example()
    del changed.ipcache["10.0.1.9/32"]
    changed.ipcache["10.0.0.2/32"] = 303
    changed.ipcache["10.0.1.10/32"] = 303
    changed.peers = [world.peer_set("web", 303)]
    names = [type(s).__name__ for s in fake.bring(_desired(changed, 1, 2)).steps]
    order = ["DeleteIpcache", "UpsertIpcache", "SwitchNodeTable", "UpsertIpcache", "BumpEpoch"]
    assert [n for n in names if n in order] == order


def test_an_interrupted_apply_bumps_even_when_nothing_differs() -> None:
    fake = Fake()
    desired = _desired(world.example(), 1, 2)
    fake.bring(desired)
    fake.actual.interrupted = True
    assert plan.plan(desired, fake.actual).steps == (plan.BumpEpoch(2),)


def test_a_backend_id_rests_before_another_backend_gets_it() -> None:
    fake = Fake()
    fake.bring(_desired(_with(services=[world.service("a", "10.9.0.1", 1, [("10.0.0.1", 1)])])))
    other = _desired(_with(services=[world.service("a", "10.9.0.1", 1, [("10.0.0.2", 1)])]))
    fake.bring(other)
    assert {n: b.state for n, b in fake.actual.backends.items()} == {1: plan.FREE, 2: plan.ACTIVE}
    fake.actual.now = plan.REST_SECONDS
    third = _desired(_with(services=[world.service("a", "10.9.0.1", 1, [("10.0.0.3", 1)])]))
    fake.bring(third)
    assert fake.actual.backends[1].key[0] == addresses.pack("10.0.0.3")


def test_full_maps_leave_out_the_last_in_order_and_keep_the_rest_whole() -> None:
    wanted = world.example()
    wanted.ipcache |= {f"10.5.0.{n}/32": 300 for n in range(1, 100)}
    wanted.services = [
        world.service(f"s{n}", f"10.96.1.{n}", 80, [("10.0.0.1", 80)]) for n in range(40)
    ]
    fake = Fake()
    made = fake.bring(_desired(wanted, 1, 2))
    assert made.left_out > plan.MAX_PROBLEMS
    assert len(made.problems) == plan.MAX_PROBLEMS + 1
    assert len(fake.actual.ipcache) == LIMITS.ipcache
    assert len(fake.actual.frontends) == LIMITS.frontends
    kept = dict(fake.actual.ipcache)
    assert fake.bring(_desired(wanted, 1, 2)).steps == ()
    assert fake.actual.ipcache == kept


def test_what_has_no_room_for_new_backends_keeps_the_old_ones() -> None:
    def many(count: int) -> maps.DesiredMaps:
        backends = [("10.0.0.1", n) for n in range(1, count + 1)]
        return _desired(world.World(services=[world.service("a", "10.9.0.1", 1, backends)]))

    fake = Fake()
    fake.bring(many(25))
    made = fake.bring(many(20))  # 25 + 20 slots are more than there are
    assert made.left_out == 1
    (frontend,) = fake.actual.frontends.values()
    assert frontend.count == 25
    assert all(b.state == plan.ACTIVE for b in fake.actual.backends.values())


def _random_world(rng: random.Random) -> tuple[world.World, list[int]]:
    sets = [
        world.rule_set(
            world.term(api.SetPeer(name=rng.choice("ab")), 0, "TCP", rng.choice([80, 81])),
            world.term(api.CIDRPeer(cidr=rng.choice(["10.0.0.0/8", "192.0.2.0/24"])), 1),
        )
        for _ in range(rng.randint(0, 3))
    ]
    unique = {r.metadata.name: r for r in sets}
    numbers = sorted(rng.sample(range(1, 6), rng.randint(0, 5)))
    found = world.World(
        endpoints=[
            world.endpoint(
                n, 300 + rng.randint(0, 3), rng.choice([None, *unique]), rng.choice([None, *unique])
            )
            for n in numbers
        ],
        rule_sets=list(unique.values()),
        peers=[world.peer_set(n, *rng.sample(range(300, 305), 2)) for n in "ab"],
        ipcache={f"10.0.0.{n}/32": 300 + rng.randint(0, 4) for n in rng.sample(range(9), 5)}
        | {rng.choice(["10.0.0.0/8", "::/0", "192.0.2.0/24"]): rng.randint(0, 3)},
        services=[
            world.service(
                name,
                f"10.0.0.{rng.randint(0, 5)}",
                rng.choice([80, 443]),
                [(f"10.0.0.{n}", 80) for n in sorted(rng.sample(range(9), rng.randint(0, 4)))],
            )
            for name in "xyz"[: rng.randint(0, 3)]
        ],
    )
    return found, [n for n in numbers if rng.random() < 0.8]


def _settled(desired: maps.DesiredMaps, fake: Fake) -> None:
    made = plan.plan(desired, fake.actual)
    if not made.left_out:
        assert made.steps == ()
        merged = {k: v for part in desired.ipcache for k, v in part.items()}
        assert fake.actual.ipcache == merged
        assert fake.actual.networks == desired.networks
        listed = {k: v for part in desired.services for k, v in part.items()}
        assert {k: f.backends for k, f in fake.actual.frontends.items()} == listed
        assert fake.actual.uids.keys() == {e.uid for e in desired.endpoints}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_any_sequence_converges_and_is_whole_at_every_step(seed: int, remember: bool) -> None:
    """Killed at random steps too; with and without the memory of confirmed parts."""
    rng = random.Random(seed)
    fake, builder = Fake(), maps.Builder()
    for _ in range(6):
        wanted, numbers = _random_world(rng)
        desired = builder.build(wanted.state(), world.interfaces(*numbers))
        fake.actual.now += rng.choice([1, 20, 700])
        if rng.random() < 0.3:
            fake.bring(desired, stop=rng.randint(0, 10))
            fake.actual.ipcache_parts = fake.actual.service_parts = None
            continue
        made = fake.bring(desired)
        while made.left_out and made.steps:  # what was removed has made room
            made = fake.bring(desired)
        _settled(desired, fake)
        if remember and not made.left_out:
            fake.actual.ipcache_parts = desired.ipcache
            fake.actual.service_parts = desired.services


def test_the_memory_of_parts_and_a_full_comparison_plan_the_same() -> None:
    rng = random.Random(7)
    fake, builder = Fake(), maps.Builder()
    for _ in range(40):
        wanted, numbers = _random_world(rng)
        desired = builder.build(wanted.state(), world.interfaces(*numbers))
        fake.actual.now += 700
        quick = plan.plan(desired, fake.actual)
        parts = fake.actual.ipcache_parts, fake.actual.service_parts
        fake.actual.ipcache_parts = fake.actual.service_parts = None
        assert plan.plan(desired, fake.actual) == quick
        fake.actual.ipcache_parts, fake.actual.service_parts = parts
        fake.bring(desired)
        if not quick.left_out:
            fake.actual.ipcache_parts = desired.ipcache
            fake.actual.service_parts = desired.services


CHANGES: list[tuple[str, Callable[[plan.Actual], object], int]] = [
    ("nothing", lambda a: None, 0),
    ("an address", lambda a: a.ipcache.update({addresses.pack("10.0.0.1"): 1}), 1),
    ("an address more", lambda a: a.ipcache.update({bytes(16): 1}), 1),
    ("a network less", lambda a: a.networks.popitem(), 1),
    ("a half-open share", lambda a: a.half_open.pop(), 1),
    ("a frontend", lambda a: a.frontends.popitem(), 1),
    ("a backend", lambda a: a.backends.popitem(), 1),
    ("the node table", lambda a: a.node_table and a.node_table.popitem(), 1),
    ("the epoch", lambda a: setattr(a, "epoch", 9), 1),
]


@pytest.mark.parametrize(("reason", "change", "expected"), CHANGES, ids=[c[0] for c in CHANGES])
def test_drift(reason: str, change: Callable[[plan.Actual], object], expected: int) -> None:
    one, two = Fake(), Fake()
    for fake in (one, two):
        fake.bring(_desired(world.example(), 1, 2))
    change(two.actual)
    assert plan.drift(one.actual, two.actual) == expected
