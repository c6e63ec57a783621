"""`maps.build` on small states, and its memory of parts."""

from __future__ import annotations

import ast
import os
import random
from pathlib import Path

import msgspec
import pytest
from support import loader_world as world
from tidegate_api import state as api
from tidegate_loader import addresses, maps, services
from tidegate_loader.maps import FRONTEND, LOCAL, NODE, OWN, PEER

FLAGS = {"L": LOCAL, "F": FRONTEND, "P": PEER, "N": NODE, "O": OWN}
GOLDEN = world.ROOT / "tests" / "golden" / "maps"


def dump(found: maps.DesiredMaps) -> str:
    """The desired maps as lines a person can read."""
    lines = []
    for e in found.endpoints:
        shown = [addresses.text(a) for a in (e.ip4, e.ip6) if a != addresses.ZERO]
        lines.append(f"endpoint {e.name} {e.identity} if{e.ifindex} {' '.join(shown)}")
    for expanded in sorted(found.rule_sets.values(), key=lambda x: x.content):
        shapes = [[hex(s) for s in lane] for lane in expanded.shapes if lane]
        lines.append(f"rule set {expanded.content} flags {expanded.flags} shapes {shapes}")
        lines += [f"  {k} -> {v}" for k, v in sorted(expanded.entries.items())]
        lines += [
            f"  {addresses.prefix_text(p)} class {n}" for p, n in sorted(expanded.cidr.items())
        ]
    entries = {k: v for part in found.ipcache for k, v in part.items()}
    for key, word in sorted(entries.items()):
        flags = [name for name, flag in FLAGS.items() if word & flag]
        lines.append(
            f"ipcache {addresses.text(key)} {word & maps.IDENTITY_MASK} {''.join(flags)}".rstrip()
        )
    for prefix, identity in sorted(found.networks.items()):
        lines.append(f"network {addresses.prefix_text(prefix)} {identity}")
    for part in found.services:
        for frontend, backends in sorted(part.items()):
            listed = " ".join(f"{addresses.text(a)}:{p}" for a, p in backends)
            lines.append(f"frontend {services.frontend_text(frontend)} -> {listed}".rstrip())
    lines += [f"pending {uid}" for uid in found.pending]
    lines += [f"problem {text}" for text in found.problems]
    return "\n".join(lines) + "\n"


def _dual_stack() -> world.World:
    found = world.example()
    both = world.service("a", "10.96.0.1", 80, [("10.0.0.1", 80), ("fd00::1", 80)])
    six = api.Frontend(address="fd00:96::1", port=80, protocol="TCP")
    found.services = [
        api.ServicePort(
            namespace="ns",
            name="a",
            type="ClusterIP",
            frontends=[*both.frontends, six],
            backends=both.backends,
        )
    ]
    found.ipcache = found.ipcache | {"::/0": 900}
    return found


def _frontend_on_known_addresses() -> world.World:
    found = world.example()
    found.services = [
        world.service("on-a-pod", "10.0.0.2", 80, [("10.0.0.1", 80)]),
        world.service("in-a-network", "198.51.100.7", 80),
    ]
    return found


CASES = [
    ("example", world.example(), (1, 2)),
    ("pending", world.example(), (2,)),
    ("dual-stack", _dual_stack(), (1, 2)),
    ("frontends", _frontend_on_known_addresses(), (1, 2)),
    ("empty", world.World(), ()),
]


@pytest.mark.parametrize(("name", "wanted", "numbers"), CASES, ids=[c[0] for c in CASES])
def test_golden(name: str, wanted: world.World, numbers: tuple[int, ...]) -> None:
    path = GOLDEN / f"{name}.txt"
    found = dump(maps.build(wanted.state(), world.interfaces(*numbers)))
    if os.environ.get("TIDEGATE_GOLDEN") == "write":
        path.write_text(found)
    assert path.read_text() == found


def test_unchanged_parts_are_the_same_objects() -> None:
    wanted = world.example()
    wanted.shards = 4
    builder, state = maps.Builder(), wanted.state()
    first = builder.build(state, world.interfaces(1, 2))
    again = builder.build(state, world.interfaces(1, 2))
    assert all(a is b for a, b in zip(first.ipcache, again.ipcache, strict=True))
    assert all(a is b for a, b in zip(first.services, again.services, strict=True))
    assert all(first.rule_sets[n] is again.rule_sets[n] for n in first.rule_sets)
    shards = list(state.ipcache)
    wanted.ipcache = wanted.ipcache | {"10.3.3.3/32": 305}
    index = api.shard_of("10.3.3.3/32", 4)
    shards[index] = wanted.state().ipcache[index]
    changed = maps.State(
        state.node, state.digest, state.rule_sets, state.peers, tuple(shards), state.services
    )
    moved = builder.build(changed, world.interfaces(1, 2))
    differing = [
        i for i, (a, b) in enumerate(zip(first.ipcache, moved.ipcache, strict=True)) if a is not b
    ]
    assert differing == [index]


def test_the_memory_never_changes_the_result() -> None:
    """Each state after each other, by one builder and from scratch."""
    builder = maps.Builder()
    for _ in range(2):
        for _, wanted, numbers in [*CASES, *reversed(CASES)]:
            state, known = wanted.state(), world.interfaces(*numbers)
            assert builder.build(state, known) == maps.build(state, known)


def test_services_that_change_by_shards_are_as_from_scratch() -> None:
    """Endpoints come and go under the frontends that are there; frontends come, go, and are
    claimed twice, also across shards. Unchanged shards are the very same objects, as `source`
    has them."""
    dice = random.Random(6)
    builder, wanted = maps.Builder(), world.World(shards=4)
    held: tuple[api.StateSlice, ...] = ()
    kept = 0
    found: maps.DesiredMaps | None = None
    for _ in range(400):
        known = {item.name: item for item in wanted.services}
        name = dice.choice("abcdefghij")
        if dice.random() < 0.1:
            known.pop(name, None)
        else:
            old = known.get(name)
            address = f"10.96.0.{dice.randrange(8)}"
            if old is not None and dice.random() < 0.9:
                address = old.frontends[0].address
            backends = sorted((f"10.0.0.{dice.randrange(9)}", 80) for _ in range(3))
            known[name] = world.service(name, address, 80, backends[: dice.randrange(4)])
        wanted.services = list(known.values())
        state = wanted.state()
        if held:
            pairs = zip(held, state.services, strict=True)
            same = tuple(old if old == new else new for old, new in pairs)
            state = msgspec.structs.replace(state, services=same)
        held = state.services
        before, found = found, builder.build(state, {})
        assert found == maps.build(state, {})
        kept += before is not None and before.service_names is found.service_names
    assert 100 < kept < 400, "most changes are of endpoints, and cost no look at the others"


REFUSED = [
    ("host bits", {"10.0.0.1/8": 300}),
    ("no prefix", {"10.0.0.1": 300}),
    ("not an address", {"10.0.0.300/32": 300}),
    ("too long", {"10.0.0.0/33": 300}),
]


@pytest.mark.parametrize(("reason", "entries"), REFUSED)
def test_nonsense_is_refused_whole(reason: str, entries: dict[str, int]) -> None:
    wanted = world.World(ipcache=entries)
    with pytest.raises(maps.MapsError):
        maps.build(wanted.state(), {})


def test_of_two_claims_the_lower_uid_has_it() -> None:
    wanted = world.World(endpoints=[world.endpoint(1, 300), world.endpoint(2, 301)])
    known = world.interfaces(1, 2)
    known["uid-2"] = world.interface(2, ifindex=11)
    found = maps.build(wanted.state(), known)
    assert [e.uid for e in found.endpoints] == ["uid-1"]
    assert found.pending == ("uid-2",)
    assert len(found.problems) == 1


def test_one_frontend_of_two_services() -> None:
    wanted = world.World(
        services=[
            world.service("a", "10.96.0.1", 80, [("10.0.0.1", 1)]),
            world.service("b", "10.96.0.1", 80, [("10.0.0.2", 2)]),
        ],
        shards=1,
    )
    found = maps.build(wanted.state(), {})
    assert sum(map(len, found.services)) == 1
    assert found.service_names == {"10.96.0.1:80/TCP": "ns/a"}
    assert len(found.problems) == 1


def test_two_services_in_two_shards() -> None:
    names = [n for n in "abcdefgh" if api.shard_of(f"ns/{n}", 2) == 0][:1]
    names += [n for n in "abcdefgh" if api.shard_of(f"ns/{n}", 2) == 1][:1]
    wanted = world.World(services=[world.service(n, "10.96.0.1", 80) for n in names])
    found = maps.build(wanted.state(), {})
    assert sum(map(len, found.services)) == 1
    assert found.service_names == {"10.96.0.1:80/TCP": f"ns/{names[0]}"}
    assert len(found.problems) == 1


@pytest.mark.parametrize("module", ["maps", "plan", "rules"])
def test_pure_modules_import_nothing_impure(module: str) -> None:
    path = Path(maps.__file__).with_name(f"{module}.py")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    assert not {n.split(".")[0] for n in found} & {"os", "io", "time", "ctypes", "tidegate_bpf"}
