"""Reading the run directory: whole or not at all, only what changed, and bursts as one."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from support import loader_world as world
from tidegate_api import state as api
from tidegate_loader.local import NodePaths, Realised, RealisedFile, read_realised
from tidegate_loader.source import Source, Stalled
from tidegate_loader.watch import Watch


@pytest.fixture
def paths(tmp_path: Path) -> NodePaths:
    found = NodePaths(tmp_path, world.NODE)
    found.interfaces.mkdir(parents=True)
    return found


def _source(paths: NodePaths) -> Source:
    return Source(paths, world.NODE)


def test_a_complete_state_is_what_was_written(paths: NodePaths) -> None:
    world.example().write(paths.objects.parent)
    found = _source(paths).state()
    assert found == world.example().state()


def test_nothing_changed_is_the_same_object(paths: NodePaths) -> None:
    world.example().write(paths.objects.parent)
    source = _source(paths)
    first = source.state()
    assert source.state() is first
    changed = world.example()
    changed.ipcache = changed.ipcache | {"10.3.3.3/32": 305}
    changed.write(paths.objects.parent)
    second = source.state()
    assert second is not first
    assert second.node is first.node
    same = [a is b for a, b in zip(first.ipcache, second.ipcache, strict=True)]
    assert sorted(same) == [False, True]


def _edit(path: str, change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        file = root / path
        data = msgspec.json.decode(file.read_bytes())
        change(data)
        file.write_bytes(msgspec.json.encode(data))

    return edit


def _spec(key: str, value: object) -> Callable[[dict[str, object]], object]:
    return lambda d: d["spec"].update({key: value})  # type: ignore[attr-defined]


def _rename_rule_set(root: Path) -> None:
    """Content that is not its name's: another rule set under the same name."""
    (name, other) = sorted((root / "rulesets").iterdir())
    name.write_bytes(other.read_bytes())


_SHARD = "stateslices/peers-e1-0-of-2.json"
_NODE = "nodestates/node-1.json"
BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("no node state", lambda r: (r / _NODE).unlink(), "Missing"),
    ("no shard", lambda r: (r / _SHARD).unlink(), "Missing"),
    ("half a file", lambda r: (r / _SHARD).write_bytes(b'{"api'), "Unreadable"),
    ("not text", lambda r: (r / _SHARD).write_bytes(b"\xff\xfe"), "Unreadable"),
    ("null", _edit(_NODE, _spec("endpoints", None)), "Unreadable"),
    ("unknown field", _edit(_NODE, _spec("colour", 1)), "Unreadable"),
    ("newer format", _edit(_NODE, _spec("format", 3)), "UnknownFormat"),
    ("newer shard", _edit(_SHARD, _spec("format", 3)), "UnknownFormat"),
    ("another shard", _edit(_SHARD, _spec("shard", 1)), "Unverified"),
    ("no table", _edit(_NODE, _spec("tables", {})), "Missing"),
    ("no peer set", _edit(_NODE, _spec("peerSets", ["nobody"])), "Incomplete"),
    ("no rule set", _edit(_NODE, _spec("ruleSets", [])), "Incomplete"),
    (
        "not the revision yet",
        _edit(
            _NODE,
            _spec(
                "tables",
                {t: {"epoch": 1, "shards": 2, "minRevision": 9} for t in api.TABLES},
            ),
        ),
        "Incomplete",
    ),
    ("a forged rule set", _rename_rule_set, "Unverified"),
]


@pytest.mark.parametrize(("reason", "spoil", "expected"), BROKEN, ids=[b[0] for b in BROKEN])
def test_incomplete_is_stalled(
    paths: NodePaths, reason: str, spoil: Callable[[Path], object], expected: str
) -> None:
    world.example().write(paths.objects.parent)
    spoil(paths.objects)
    with pytest.raises(Stalled) as raised:
        _source(paths).state()
    assert raised.value.reason == expected


def test_of_shards_those_written_are_read_and_no_others(paths: NodePaths) -> None:
    """Who writes them knows; once somebody else may have, all are looked at."""
    changed = world.example()
    changed.write(paths.objects.parent)
    source = _source(paths)
    first = source.state()
    changed.ipcache = changed.ipcache | {"10.3.3.3/32": 305}
    changed.write(paths.objects.parent)
    assert source.state(frozenset()) is first
    assert source.state({"nodestates/node-1.json", "stateslices/nobody.json"}) is first
    shard = api.shard_of("10.3.3.3/32", changed.shards)
    name = api.slice_name("ipcache", 1, shard, changed.shards)
    assert source.state({f"stateslices/{name}.json"}) == changed.state()
    (paths.objects / f"stateslices/{name}.json").unlink()  # by hand
    assert source.state(frozenset()) == changed.state()
    for written in (None, frozenset[str]()):
        with pytest.raises(Stalled, match="is not there"):
            source.state(written)


def test_the_newest_shard_may_be_put_back(paths: NodePaths) -> None:
    """A table is as new as the newest of its shards, whichever was read last."""
    changed = world.example()
    changed.revision = 5
    changed.write(paths.objects.parent)
    source = _source(paths)
    source.state()
    for number, reason in ((0, ""), (1, "Incomplete")):
        path = f"stateslices/{api.slice_name('ipcache', 1, number, 2)}.json"
        _edit(path, _spec("revision", 4))(paths.objects)
        try:
            source.state({path})
            found = ""
        except Stalled as error:
            found = error.reason
        assert found == reason


def test_what_is_told_is_as_from_scratch(paths: NodePaths) -> None:
    """Whatever is written, spoiled, taken away or put back, in any order."""
    dice = random.Random(6)
    files, world_ = paths.objects / "stateslices", world.example()
    world_.shards = 4
    world_.write(paths.objects.parent)
    source, stalled = _source(paths), 0
    source.state()
    spoiled: dict[Path, bytes] = {}
    for step in range(400):
        before = {path: path.read_bytes() for path in files.iterdir()}
        match dice.randrange(6):
            case 0:
                spoiled.update({path: before[path] for path in dice.sample(sorted(before), 1)})
                path = next(reversed(spoiled))
                path.write_bytes(b"{") if dice.randrange(2) else path.unlink()
            case 1 | 2 if spoiled:
                path, data = spoiled.popitem()
                path.write_bytes(data)
            case 3:
                world_.revision = max(1, world_.revision + dice.choice([-1, 1]))
                world_.write(paths.objects.parent)
                spoiled.clear()
            case _:
                number = dice.randrange(50)
                cidr = f"10.4.4.{number}/32"
                if cidr in world_.ipcache:
                    world_.ipcache = {k: v for k, v in world_.ipcache.items() if k != cidr}
                else:
                    world_.ipcache = world_.ipcache | {cidr: 300 + step}
                if not spoiled:
                    world_.write(paths.objects.parent)
        after = {path: path.read_bytes() for path in files.iterdir()}
        both = before.keys() | after.keys()
        written = {f"stateslices/{p.name}" for p in both if before.get(p) != after.get(p)}
        told = written if dice.random() < 0.9 else None
        try:
            fresh: object = _source(paths).state()
        except Stalled as error:
            fresh, stalled = error.reason, stalled + 1
        try:
            found: object = source.state(told)
        except Stalled as error:
            found = error.reason
        assert found == fresh, step
    assert 20 < stalled < 380


def test_last_good_is_a_whole_copy(paths: NodePaths) -> None:
    world.example().write(paths.objects.parent)
    source = _source(paths)
    source.keep(source.state())
    changed = world.example()
    changed.rule_sets, changed.endpoints, changed.revision = [], [], 2
    changed.write(paths.objects.parent)
    assert _source(paths).last_good() == world.example().state()
    source.keep(source.state())
    assert _source(paths).last_good() == changed.state()
    assert list((paths.lastgood / "rulesets").iterdir()) == []


def test_last_good_follows_a_shard_under_the_same_node_state(paths: NodePaths) -> None:
    """Only what was read again is looked at, and what could not be copied is tried again."""
    changed = world.example()
    changed.write(paths.objects.parent)
    source = _source(paths)
    source.keep(source.state())
    for number in (3, 4):
        changed.ipcache = changed.ipcache | {f"10.3.3.{number}/32": 305}
        changed.write(paths.objects.parent)
        state = source.state()
        if number == 4:
            os.rename(paths.lastgood / "stateslices", paths.lastgood / "away")
            (paths.lastgood / "stateslices").touch()
            with pytest.raises(NotADirectoryError):
                source.keep(state)
            os.unlink(paths.lastgood / "stateslices")
            os.rename(paths.lastgood / "away", paths.lastgood / "stateslices")
        source.keep(state)
        assert _source(paths).last_good() == changed.state()


def test_interfaces(paths: NodePaths) -> None:
    source = _source(paths)
    for number in (1, 2):
        world.write_object(paths.interfaces, f"uid-{number}", world.interface(number))
    found, problems = source.interfaces()
    assert found == world.interfaces(1, 2)
    assert problems == []
    assert source.interfaces()[0] is found
    (paths.interfaces / "uid-1.json").write_bytes(b"{")
    (paths.interfaces / "uid-2.json").unlink()
    (paths.interfaces / ".uid-3.tmp").write_bytes(b"{")
    found, problems = source.interfaces()
    assert found == world.interfaces(1), "an unreadable file means what it meant"
    assert len(problems) == 1
    for path in paths.interfaces.iterdir():
        path.unlink()
    paths.interfaces.rmdir()
    assert source.interfaces()[0] == world.interfaces(1)


def test_watch_sees_directories_that_come_later(paths: NodePaths) -> None:
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK)
    watch = Watch(paths, read_fd)
    assert not watch.wait(0)
    world.example().write(paths.objects.parent)
    assert watch.wait(5)
    while watch.wait(0):
        pass
    path = paths.objects / "nodestates" / "node-1.json"
    world.write_object(path.parent, "node-1", world.World().state().node)
    assert watch.wait(5)
    assert not watch.wait(0)
    # What the loader itself writes wakes nobody.
    world.write_object(paths.node, "realised", {})
    world.write_object(paths.objects, "problems", {})
    assert not watch.wait(0.05)
    os.write(write_fd, b"x")
    assert not watch.wait(5)
    watch.close()
    os.close(read_fd)
    os.close(write_fd)


def test_what_is_realised_is_written_when_it_changes(paths: NodePaths) -> None:
    """Names, most of it, are encoded when they are others; what is read is what was meant."""
    file, path = RealisedFile(paths.realised), paths.realised
    made = Realised(node="n", epoch=1, services={"10.0.0.1:80/TCP": "ns/a"}, digest="d")
    names = {"10.0.0.1:80/TCP": "ns/b", "[fd00::1]:53/UDP": "ns/\u00e9"}
    for wanted in (
        made,
        msgspec.structs.replace(made, epoch=2),
        msgspec.structs.replace(made, services=names),
        msgspec.structs.replace(made, services=names, digest=msgspec.UNSET),
        msgspec.structs.replace(made, services={}),
        Realised(node="n", epoch=0),
        made,
    ):
        file.write(wanted)
        assert read_realised(path) == wanted
        assert msgspec.json.decode(path.read_bytes()) == msgspec.to_builtins(wanted)
        path.unlink()
        file.write(msgspec.structs.replace(wanted))
        assert not path.exists(), "equal: nothing to write"
