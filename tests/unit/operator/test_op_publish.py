"""The run directory: only what differs, in order, and from where an earlier run ended."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import msgspec
import pytest
import yaml
from tidegate_api.state import NodeState, StateObject, StateSlice, encode, slice_name
from tidegate_operator import identities, publish, store, world
from tidegate_operator.compile import Desired, compile
from tidegate_operator.identities import EMPTY_LEDGER, Ledger
from tidegate_operator.publish import Publisher, read_ledger, render
from tidegate_operator.store import FileStore, path_of
from unit.operator.given import BY_LABELS, documents, pod, policy, service

BASE = (
    pod("a", "{app: a}")
    + pod("b", "{app: b}")
    + policy("p", "{ingress: [{from: [{podSelector: {matchLabels: {app: a}}}]}]}")
    + service("s", "{selector: {app: a}, ports: [{port: 80}]}")
)


class Given:
    """A run directory with one publisher, fed with texts."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.world: world.MadeWorld | None = None
        self.ledger: Ledger = read_ledger(run_dir)
        self.publisher = Publisher(FileStore(run_dir))
        self.desired: Desired | None = None

    def publish(self, text: str) -> list[str]:
        self.world, _ = world.build(documents(text), BY_LABELS, self.world)
        self.ledger = identities.allocate(self.world, self.ledger)
        self.desired = compile(self.world, self.ledger)
        return list(self.publisher.publish(self.desired, self.ledger))

    def files(self) -> dict[str, bytes]:
        objects = self.run_dir / "objects"
        return {
            str(path.relative_to(objects)): path.read_bytes() for path in objects.rglob("*.json")
        }


@pytest.fixture
def run(tmp_path: Path) -> Given:
    return Given(tmp_path)


def _kinds(paths: list[str]) -> list[str]:
    """Directories, tables for slices, in order without repeats."""
    names = [
        path.split("/")[1].split("-")[0] if path.startswith("stateslices") else path.split("/")[0]
        for path in paths
    ]
    return [name for name, before in zip(names, ["", *names], strict=False) if name != before]


def test_first_publish_is_what_render_says(run: Given) -> None:
    paths = run.publish(BASE)
    assert _kinds(paths) == [
        "identities", "rulesets", "peers", "nodestates", "ipcache", "services", "problems.json",
    ]  # fmt: skip
    assert run.desired is not None
    want = {path_of(item): encode(item) for item in render(run.desired, run.ledger)}
    assert {name: data for name, data in run.files().items() if name != "problems.json"} == want


def test_nothing_changed_writes_nothing(run: Given) -> None:
    run.publish(BASE)
    assert run.publish(BASE) == []


def test_restart_goes_on_from_what_is_there(run: Given) -> None:
    run.publish(BASE)
    again = Given(run.run_dir)
    assert (again.ledger.live, again.ledger.released) == (run.ledger.live, {})
    again.world = run.world
    assert again.publish(BASE) == ["problems.json"]
    changed = again.publish(BASE + pod("c", "{app: a}"))
    assert "problems.json" not in changed
    slices = [msgspec.json.decode(again.files()[path], type=StateSlice) for path in changed
              if path.startswith("stateslices")]  # fmt: skip
    assert {item.spec.revision for item in slices} == {2}


def test_released_numbers_survive_a_restart(run: Given) -> None:
    run.publish(BASE)
    run.publish(pod("a", "{app: a}"))
    run.publish("")
    assert len(run.ledger.released) == 2
    again = read_ledger(run.run_dir)
    assert again == run.ledger
    assert list(again.released) == list(run.ledger.released)


COSTS = [
    ("pod with known labels: its node, one ipcache shard a family, its service",
     BASE + pod("c", "{app: a}"), ["nodestates", "ipcache", "services"]),
    ("new labels: also the ledger; no rule set", BASE + pod("c", "{app: c}"),
     ["identities", "nodestates", "ipcache"]),
    ("new labels that a selector picks", BASE + pod("c", "{app: a, x: y}"),
     ["identities", "peers", "nodestates", "ipcache", "services"]),
    ("policy edited: rule set, nodes, then the old rule set goes",
     BASE + policy("q", "{ingress: [{ports: [{port: 1}]}]}"), ["rulesets", "nodestates",
     "rulesets"]),
    ("service edited", BASE.replace("port: 80}]}\n", "port: 81}]}\n"), ["services"]),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "text", "expected"), COSTS)
def test_cost_of_a_change(run: Given, reason: str, text: str, expected: list[str]) -> None:
    run.publish(BASE)
    assert _kinds(run.publish(text)) == expected


def test_moving_address_bridges_old_and_new_number(
    run: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relabelled pod that the policy picks before and after: never a moment without it."""
    text = BASE + pod("c", "{app: a, x: one}")
    run.publish(text)
    seen: list[set[int]] = []
    write = store._write

    def spy(path: Path, data: bytes) -> None:
        if path.name.startswith("peers"):
            found = msgspec.json.decode(data, type=StateSlice).spec.peers
            seen.append({number for item in found or () for number in item.identities})
        write(path, data)

    monkeypatch.setattr(store, "_write", spy)
    old = set(run.ledger.live.values())
    paths = run.publish(text.replace("x: one", "x: two"))
    new = set(run.ledger.live.values()) - old
    gone = set(run.ledger.released)
    assert _kinds(paths) == ["identities", "peers", "ipcache", "nodestates", "peers"]
    assert [gone <= seen[0], new <= seen[0]] == [True, True]
    assert [gone & seen[1], new <= seen[1]] == [set(), True]


def test_removals_come_after_what_named_them(run: Given) -> None:
    run.publish(BASE)
    paths = run.publish(pod("a", "{app: a}") + pod("b", "{app: b}"))
    assert _kinds(paths) == ["nodestates", "services", "peers", "rulesets"]
    assert not list((run.run_dir / "objects/rulesets").iterdir())


def test_node_waits_for_the_peers_it_names_and_not_for_facts(run: Given) -> None:
    run.publish(BASE)
    name = policy("q", "{ingress: [{from: [{podSelector: {matchLabels: {app: b}}}]}]}")
    run.publish(BASE + name)
    node = msgspec.json.decode(run.files()["nodestates/node-1.json"], type=NodeState)
    assert {table: ref.min_revision for table, ref in node.spec.tables.items()} == {
        "peers": 2, "ipcache": 1, "services": 1,
    }  # fmt: skip


def test_damaged_files_are_written_anew(run: Given) -> None:
    run.publish(BASE)
    before = run.files()
    damaged = [name for name in before if name.startswith(("rulesets", "nodestates"))]
    for name in damaged:
        (run.run_dir / "objects" / name).write_bytes(b"{")
    again = Given(run.run_dir)
    again.world = run.world
    again.publish(BASE)
    for name in damaged:
        kind = json.loads(again.files()[name])["kind"]
        assert kind in ("RuleSet", "NodeState")


class Killed(BaseException):
    pass


def _grown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "MIN_SHARDS", 1)
    monkeypatch.setattr(publish, "SHARD_ENTRIES", 2)


def _assert_nodes_name_what_is_there(run: Given) -> None:
    files = run.files()
    for name, data in files.items():
        if not name.startswith("nodestates"):
            continue
        for table, ref in msgspec.json.decode(data, type=NodeState).spec.tables.items():
            names = [slice_name(table, ref.epoch, n, ref.shards) for n in range(ref.shards)]
            held = [msgspec.json.decode(files[f"stateslices/{n}.json"], type=StateSlice)
                    for n in names]  # fmt: skip
            assert max(item.spec.revision for item in held) >= ref.min_revision


def test_table_that_outgrew_its_shards_is_written_beside_them(
    run: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.publish(BASE)
    _grown(monkeypatch)
    more = "".join(pod(f"more-{n}", "{app: a}") for n in range(40))
    again = Given(run.run_dir)
    again.world = run.world
    paths = again.publish(BASE + more)
    assert _kinds(paths) == ["ipcache", "nodestates", "ipcache", "services", "ipcache",
                             "problems.json"]  # fmt: skip
    held = [item for name in again.files() if name.startswith("stateslices/ipcache")
            for item in [msgspec.json.decode(again.files()[name], type=StateSlice)]]  # fmt: skip
    assert {(item.spec.epoch, item.spec.shards, len(held)) for item in held} == {(2, 64, 64)}
    assert again.desired is not None
    assert sorted(e.cidr for item in held for e in item.spec.ipcache or ()) == sorted(
        again.desired.ipcache
    )
    _assert_nodes_name_what_is_there(again)
    assert again.publish(BASE + more) == []
    # Smaller again: the shards stay.
    assert _kinds(again.publish(BASE)) == ["nodestates", "ipcache", "services"]


@pytest.mark.parametrize("allowed", [*range(12), 30, 63, 64, 65, 66, 67, 70, 90, 140, 150])
def test_killed_while_resharding(run: Given, monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    """At every moment node states name whole tables, and the next run ends where it would have."""
    run.publish(BASE)
    _grown(monkeypatch)
    text = BASE + "".join(pod(f"more-{n}", "{app: a}") for n in range(40))
    done = 0
    put, drop = FileStore._put, FileStore._drop

    def counted() -> None:
        nonlocal done
        done += 1
        if done > allowed:
            raise Killed

    def spy_put(self: FileStore, item: StateObject) -> None:
        counted()
        put(self, item)

    def spy_drop(self: FileStore, name: str) -> None:
        counted()
        drop(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "_put", spy_put)
        patch.setattr(FileStore, "_drop", spy_drop)
        with contextlib.suppress(Killed):
            run.publish(text)
    _assert_nodes_name_what_is_there(run)
    again = Given(run.run_dir)
    again.world = run.world
    again.publish(text)
    _assert_nodes_name_what_is_there(again)
    kept = [name for name in again.files() if name.startswith("stateslices/ipcache")]
    assert len(kept) == 64
    assert again.desired is not None
    held = [msgspec.json.decode(again.files()[name], type=StateSlice) for name in kept]
    found = sorted(e.cidr for item in held for e in item.spec.ipcache or ())
    assert found == sorted(again.desired.ipcache)


def test_unwritable_directory_is_a_publish_error(tmp_path: Path) -> None:
    (tmp_path / "objects").write_text("in the way")
    with pytest.raises(publish.PublishError, match="objects"):
        Given(tmp_path).publish(BASE)


def test_streams_hold_the_same_objects() -> None:
    now, _ = world.build(documents(BASE))
    ledger = identities.allocate(now, EMPTY_LEDGER)
    desired = compile(now, ledger)
    want = [json.loads(encode(item)) for item in render(desired, ledger)]
    for form in ("yaml", "json"):
        stream = io.StringIO()
        publish.write_stream(desired, ledger, stream, form)  # type: ignore[arg-type]
        text = stream.getvalue()
        got = json.loads(text)["items"] if form == "json" else list(yaml.safe_load_all(text))
        assert got == want
        assert "&id" not in text
