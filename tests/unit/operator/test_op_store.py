"""Publishing to a store whose writes may fail, be lost or be undone by others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import pytest
from tidegate_api.state import (
    DIGEST_ANNOTATION,
    Identity,
    NodeState,
    RuleSet,
    StateObject,
    StateSlice,
    digest,
    encode,
)
from tidegate_operator import identities, world
from tidegate_operator.compile import compile
from tidegate_operator.identities import EMPTY_LEDGER, Ledger
from tidegate_operator.problems import Problem
from tidegate_operator.publish import Publisher
from tidegate_operator.store import PublishError, path_of, path_to
from unit.operator.given import documents, pod, policy, service

BASE = (
    pod("a", "{app: a}")
    + pod("b", "{app: b}")
    + pod("c", "{app: c}")
    + policy("p", "{podSelector: {matchLabels: {app: a}}, ingress: [{from: [{podSelector: {}}]}]}")
    + policy("q", "{podSelector: {matchLabels: {app: b}}}")
    + service("s", "{selector: {app: a}, ports: [{port: 80}]}")
)


class Store:
    """Holds objects; `refuses` says which it does not take."""

    def __init__(self) -> None:
        self.objects: dict[type, dict[str, Any]] = {}
        self.refuses: Callable[[StateObject], bool] = lambda item: False
        self.log: list[str] = []

    def held(self, kind: type) -> dict[str, Any]:
        return self.objects.setdefault(kind, {})

    def put(self, batch: Sequence[StateObject]) -> Mapping[str, str]:
        failures = {}
        for item in batch:
            if self.refuses(item):
                failures[path_of(item)] = "no"
            else:
                self.held(type(item))[item.metadata.name] = item
                self.log.append(path_of(item))
        return failures

    def drop(self, kind: type, names: Sequence[str]) -> Mapping[str, str]:
        for name in names:
            self.held(kind).pop(name, None)
            self.log.append(f"-{path_to(kind.__name__, name)}")
        return {}

    def report(self, problems: Sequence[Problem]) -> Sequence[str]:
        return ()


class Given:
    def __init__(self, store: Store, grace: float = 0.0) -> None:
        self.store = store
        self.publisher = Publisher(store, grace=grace)
        self.world: world.MadeWorld | None = None
        self.ledger: Ledger = EMPTY_LEDGER

    def publish(self, text: str, now: float = 0.0) -> list[str]:
        self.world, _ = world.build(documents(text), previous=self.world)
        self.ledger = identities.allocate(self.world, self.ledger)
        self.store.log = []
        desired = compile(self.world, self.ledger)
        return list(self.publisher.publish(desired, self.ledger, now=now))


def content(store: Store) -> dict[str, bytes]:
    """Without the revisions, which count writes."""
    found = {}
    for kind, items in store.objects.items():
        for name, item in items.items():
            tree = msgspec.to_builtins(item.spec)
            tree.pop("revision", None)
            for ref in tree.get("tables", {}).values():
                ref.pop("minRevision")
            found[f"{kind.__name__}/{name}"] = encode(tree)
    return found


@pytest.fixture
def want() -> dict[str, bytes]:
    given = Given(Store())
    given.publish(BASE)
    return content(given.store)


def test_one_rule_set_that_is_refused_stops_no_other_node(want: dict[str, bytes]) -> None:
    given = Given(Store())
    given.publish(pod("a", "{app: a}") + pod("b", "{app: b}") + pod("c", "{app: c}"))
    before = dict(given.store.held(NodeState))
    given.store.refuses = lambda item: (
        isinstance(item, RuleSet) and item.spec.policies[0].name == "q"
    )
    with pytest.raises(PublishError, match="rulesets/"):
        given.publish(BASE)
    held = given.store.held(NodeState)
    moved = {name for name in held if held[name] is not before[name]}
    assert moved == {"node-1"}
    assert given.world is not None
    assert {n.name: p.node for n, p in given.world.pods.items()}["b"] == "node-2"
    given.store.refuses = lambda item: False
    given.publish(BASE)
    assert content(given.store) == want


REFUSED: list[tuple[str, type]] = [
    ("an identity: nothing that may name it", Identity),
    ("a peer set's shard: no node that may name it", StateSlice),
]


@pytest.mark.parametrize(("reason", "kind"), REFUSED)
def test_what_everything_depends_on_stops_all(
    reason: str, kind: type, want: dict[str, bytes]
) -> None:
    given = Given(Store())
    given.store.refuses = lambda item: isinstance(item, kind)
    with pytest.raises(PublishError, match="no"):
        given.publish(BASE)
    assert given.store.held(NodeState) == {}
    given.store.refuses = lambda item: False
    given.publish(BASE)
    assert content(given.store) == want


def test_node_that_is_refused_keeps_what_it_names() -> None:
    given = Given(Store())
    given.publish(BASE)
    given.store.refuses = lambda item: isinstance(item, NodeState)
    less = pod("a", "{app: a}") + pod("b", "{app: b}") + pod("c", "{app: c}")
    with pytest.raises(PublishError, match="nodestates"):
        given.publish(less)
    peers = {
        entry.name
        for item in given.store.held(StateSlice).values()
        for entry in item.spec.peers or ()
    }
    for node in given.store.held(NodeState).values():
        assert set(node.spec.rule_sets) <= given.store.held(RuleSet).keys()
        assert set(node.spec.peer_sets) <= peers
    assert any(node.spec.peer_sets for node in given.store.held(NodeState).values())


def test_error_names_few_of_many() -> None:
    given = Given(Store())
    given.store.refuses = lambda item: isinstance(item, RuleSet)
    many = "".join(
        pod(f"p{n}", f"{{app: a{n}}}")
        + policy(f"q{n}", f"{{podSelector: {{matchLabels: {{app: a{n}}}}}}}")
        for n in range(20)
    )
    with pytest.raises(PublishError, match=r"and \d+ more") as caught:
        given.publish(many)
    assert str(caught.value).count("rulesets/") == 10 - str(caught.value).count("nodestates/")


def test_unused_rule_set_stays_for_its_grace_period() -> None:
    given = Given(Store(), grace=60.0)
    given.publish(BASE, now=100.0)
    (old,) = (
        name
        for name, item in given.store.held(RuleSet).items()
        if item.spec.policies[0].name == "q"
    )
    less = BASE.replace(policy("q", "{podSelector: {matchLabels: {app: b}}}"), "")
    given.publish(less, now=110.0)
    assert (old in given.store.held(RuleSet), given.publisher.waiting) == (True, True)
    given.publish(less, now=169.0)
    assert old in given.store.held(RuleSet)
    assert given.publish(less, now=170.0) == [f"rulesets/{old}.json"]
    assert given.publisher.waiting is False


def test_rule_set_that_returns_in_time_is_not_written_again() -> None:
    given = Given(Store(), grace=60.0)
    given.publish(BASE, now=100.0)
    less = BASE.replace(policy("q", "{podSelector: {matchLabels: {app: b}}}"), "")
    given.publish(less, now=110.0)
    assert [path for path in given.publish(BASE, now=120.0) if "rulesets" in path] == []
    assert given.publisher.waiting is False
    # Its time begins anew.
    given.publish(less, now=130.0)
    given.publish(less, now=171.0)
    assert len(given.store.held(RuleSet)) == 2


def _lose(store: Store, kind: type) -> None:
    store.objects[kind] = {}


def _swap(store: Store, kind: type) -> None:
    """Each has another one's content."""
    held = store.held(kind)
    names = sorted(held)
    turned = names[1:] + names[:1]
    store.objects[kind] = {
        name: msgspec.structs.replace(held[name], spec=held[other].spec)
        for name, other in zip(names, turned, strict=True)
    }


KINDS = (RuleSet, StateSlice, NodeState, Identity)
HARM = [(f"{how.__name__} {kind.__name__}", how, kind) for how in (_lose, _swap) for kind in KINDS]


@pytest.mark.parametrize(("reason", "how", "kind"), HARM)
def test_what_others_did_is_seen_and_repaired(
    reason: str, how: Callable[[Store, type], None], kind: type, want: dict[str, bytes]
) -> None:
    given = Given(Store())
    given.publish(BASE)
    assert given.publisher.disturbed() is False
    how(given.store, kind)
    assert given.publisher.disturbed() is True
    given.publish(BASE)
    assert content(given.store) == want
    assert given.publisher.disturbed() is False
    assert given.publish(BASE) == []


def test_other_peoples_labels_are_left_alone() -> None:
    given = Given(Store())
    given.publish(BASE)
    for kind in (RuleSet, StateSlice, NodeState, Identity):
        held = given.store.held(kind)
        for name, item in held.items():
            labels = {**(item.metadata.labels or {}), "example.com/mine": "x"}
            meta = msgspec.structs.replace(item.metadata, labels=labels)
            held[name] = msgspec.structs.replace(item, metadata=meta)
    assert given.publisher.disturbed() is False
    assert given.publish(BASE) == []


def test_term_is_written_only_with_what_changes_anyway() -> None:
    given = Given(Store())
    given.publish(BASE)
    given.publisher = Publisher(given.store, term=7)
    assert given.publish(BASE) == []
    given.publish(BASE + pod("d", "{app: a}"))
    terms = [node.spec.term for node in given.store.held(NodeState).values()]
    assert sorted(map(str, terms)) == ["7", "UNSET"]


def test_strangers_are_numbers_that_the_ledger_does_not_know() -> None:
    given = Given(Store())
    given.publish(BASE)
    known = next(iter(given.store.held(Identity).values()))
    spec = msgspec.structs.replace(known.spec, labels={"app": "late"})
    meta = msgspec.structs.replace(known.metadata, name="777")
    given.store.held(Identity)["777"] = msgspec.structs.replace(known, spec=spec, metadata=meta)
    (number,) = given.publisher.strangers()
    assert (number, given.publisher.strangers()[777].labels) == (777, (("app", "late"),))


def test_revision_that_no_table_will_reach_is_repaired() -> None:
    """By hand, while no operator ran: the node would wait for it for ever."""
    given = Given(Store())
    given.publish(BASE)
    held = given.store.held(NodeState)
    node = held["node-1"]
    far = {
        table: msgspec.structs.replace(ref, min_revision=10**9)
        for table, ref in node.spec.tables.items()
    }
    spec = msgspec.structs.replace(node.spec, tables=far)
    meta = msgspec.structs.replace(node.metadata, annotations={DIGEST_ANNOTATION: digest(spec)})
    held["node-1"] = msgspec.structs.replace(node, spec=spec, metadata=meta)
    given.publisher = Publisher(given.store)
    assert given.publish(BASE) == ["nodestates/node-1.json"]
    assert {ref.min_revision for ref in held["node-1"].spec.tables.values()} == {1}
