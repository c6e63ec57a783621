"""Addresses that change their identity while the policy changes. Pure.

A node's reader may find both at once, whatever the order was in which they came: what is in
force is the old number under the old rule sets, what is wanted the new one under the new. The
two are in different maps, and in between the new number under the old rule sets, or the other
way round, would say what neither state says. So each address goes the way on which that cannot
happen (DESIGN invariant 8): before the switch where the old rule sets judge its new number as
they judge its old one, or as the new ones will; after it where the same is true of its old
number; else to a number that is nobody's (`_transits`). Copies of the old rule sets judge that
as the old number, copies of the new ones as the new: the switch from these to those changes all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

import msgspec
from tidegate_api.state import FIRST_IDENTITY, IDENTITY_BITS

from tidegate_loader.plan_steps import (
    NODE_ADDR,
    Actual,
    BuildNodeTable,
    CopyRuleSets,
    CreateRuleSet,
    NodeEntry,
    NodeKey,
    Policy,
    RuleSetInForce,
)
from tidegate_loader.rules import HAS_CIDR, identities_of

NUMBER = (1 << IDENTITY_BITS) - 1
"""Of an ipcache word: the identity."""

Move = tuple[int, int]
"""(old number, new number)."""
Numbers = dict[int, int]
"""Number -> the one as which copies judge it."""


class Stage(msgspec.Struct, frozen=True):
    """A node table that names copies of rule sets."""

    copies: CopyRuleSets
    table: BuildNodeTable


class Moves(msgspec.Struct):
    """What is written of addresses that move, in this order; the rest as if they did not."""

    next_id: int
    before: Stage | None = None
    """The table in force, and copies of its rule sets."""
    first: dict[bytes, int] = {}
    after: Stage | None = None
    """The table that comes, and copies of its rule sets."""
    then: dict[bytes, int] = {}

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in (self.before, self.after) if stage is not None)


_LOST = RuleSetInForce("", "", None)
"""In force, and somebody took its pin away: nothing is known of it."""


class _Sides:
    """The rule sets of each endpoint that is there before and after."""

    def __init__(
        self, actual: Actual, build: BuildNodeTable, created: Iterable[CreateRuleSet]
    ) -> None:
        self._actual = actual
        self._created = {step.id: step.expanded for step in created}
        self._known: dict[int, frozenset[int]] = {}
        was = {entry.id: entry for entry in (actual.node_table or {}).values()}
        self._changed = {
            (old, new)
            for entry in {e.id: e for e in build.entries.values()}.values()
            if entry.id in was
            for old, new in (
                (_number(was[entry.id].ingress), _number(entry.ingress)),
                (_number(was[entry.id].egress), _number(entry.egress)),
            )
            if old != new
        }

    def known(self, number: int | None) -> frozenset[int]:
        """Whom the rule set knows by number; looked for once, as it may have many entries."""
        if number is None:
            return frozenset()
        created = self._created.get(number)
        if created is None:
            return self._actual.rule_sets.get(number, _LOST).identities
        if number not in self._known:
            self._known[number] = identities_of(created.entries)
        return self._known[number]

    def _name(self, number: int | None) -> str:
        if number is None:
            return ""
        created = self._created.get(number)
        return (created or self._actual.rule_sets.get(number, _LOST)).name

    def first(self, move: Move) -> bool:
        """Do the old rule sets judge the new number as the old one, or as the new ones will?"""
        return all(
            self._strange(move, old) or self._same(move[1], old, new) for old, new in self._changed
        )

    def last(self, move: Move) -> bool:
        """Do the new rule sets judge the old number as the new one, or as the old ones did?"""
        return all(
            self._strange(move, new) or self._same(move[0], old, new) for old, new in self._changed
        )

    def _strange(self, move: Move, number: int | None) -> bool:
        return self.known(number).isdisjoint(move)

    def _same(self, peer: int, old: int | None, new: int | None) -> bool:
        """One policy, of which only members of peer sets changed, and not this one."""
        if not self._name(old) == self._name(new) != "":
            return False
        return (peer in self.known(old)) == (peer in self.known(new))


def plan_moves(
    upserts: dict[bytes, int],
    actual: Actual,
    build: BuildNodeTable,
    created: tuple[CreateRuleSet, ...],
    next_id: int,
) -> Moves:
    """Takes out of `upserts` (address -> ipcache word, written after the switch to `build`) what
    has to be written before that. `created`: rule sets that `build` names and nobody yet."""
    nothing = Moves(next_id)
    held, table = actual.ipcache, actual.node_table
    moves = {
        key: (held[key] & NUMBER, word & NUMBER)
        for key, word in upserts.items()
        if key in held and (held[key] ^ word) & NUMBER and held[key] & NUMBER >= FIRST_IDENTITY
    }
    if not moves or table is None:
        return nothing
    sides = _Sides(actual, build, created)
    carried = {word & NUMBER for word in held.values()}
    carried.update(entry.identity for entry in table.values())
    olds: dict[int, set[int]] = {}
    for old, new in moves.values():
        olds.setdefault(new, set()).add(old)
    first, hard = set[bytes](), set[bytes]()
    numbers: Numbers = {}
    for key, (old, new) in moves.items():
        # Whose address the node table has is not looked up in ipcache.
        if new < FIRST_IDENTITY or (NODE_ADDR, key) in table or sides.first((old, new)):
            first.add(key)
        elif new not in carried and len(olds[new]) == 1:
            first.add(key)
            numbers[new] = old
        elif (NODE_ADDR, key) not in build.entries and not sides.last((old, new)):
            hard.add(key)
    taken = carried | {word & NUMBER for word in upserts.values()}
    transits = _transits({moves[key] for key in hard}, taken, actual, created)
    numbers |= {number: old for (old, _), number in transits.items()}
    found = _staged(actual, build, sides, created, next_id, numbers, transits)
    if found is None:
        return nothing  # no room to do better than the order of the rest
    found.first = {
        key: (upserts[key] & ~NUMBER) | transits[moves[key]] if key in hard else upserts[key]
        for key in moves
        if key in first or key in hard
    }
    if found.after is not None:
        found.then = {key: upserts[key] for key in moves if key in hard}
    for key in found.then.keys() | first:
        del upserts[key]
    return found


def _number(policy: Policy | None) -> int | None:
    return policy.rule_set if policy is not None else None


def _transits(
    moves: Iterable[Move], carried: set[int], actual: Actual, created: Iterable[CreateRuleSet]
) -> dict[Move, int]:
    """A number for each, which no address has and no rule set knows: from the highest on, for
    the operator's are anywhere."""
    if not moves:
        return {}
    taken = carried.union(
        *(held.identities for held in actual.rule_sets.values()),
        *(identities_of(step.expanded.entries) for step in created),
    )
    free = (number for number in range(NUMBER, FIRST_IDENTITY, -1) if number not in taken)
    return dict(zip(sorted(moves), free, strict=False))


def _staged(
    actual: Actual,
    build: BuildNodeTable,
    sides: _Sides,
    created: Iterable[CreateRuleSet],
    next_id: int,
    numbers: Numbers,
    transits: Mapping[Move, int],
) -> Moves | None:
    """Both stages, if something has to be copied for them; None: there are not enough slots."""
    table = actual.node_table or {}
    taken = {p.slot for p in _policies(table)} | {step.slot for step in created}
    taken |= {r.slot for r in actual.rule_sets.values() if r.slot is not None}
    slots = (slot for slot in range(actual.limits.rule_sets) if slot not in taken)
    found = Moves(max(1, next_id))
    later = {number: new for (_, new), number in transits.items()}
    for side, judged, uids in ((table, numbers, actual.uids), (build.entries, later, build.uids)):
        concerned = {*judged, *judged.values()}
        copied = {
            p.rule_set: p
            for p in _policies(side)
            if judged and not concerned.isdisjoint(sides.known(p.rule_set))
        }
        if not copied:
            continue
        places = dict(zip(sorted(copied), zip(itertools.count(found.next_id), slots), strict=False))
        if len(places) < len(copied):
            return None
        found.next_id += len(copied)
        copies = CopyRuleSets(
            tuple((n, *places[n], bool(copied[n].flags & HAS_CIDR)) for n in sorted(copied)),
            dict(sorted(judged.items())),
        )
        entries = {key: _with_copies(entry, places) for key, entry in side.items()}
        stage = Stage(copies, BuildNodeTable(entries, uids))
        if judged is numbers:
            found.before = stage
        else:
            found.after = stage
    if not found.stages:
        found.next_id = next_id
    return found


def _policies(table: Mapping[NodeKey, NodeEntry]) -> Iterator[Policy]:
    for entry in table.values():
        for policy in (entry.ingress, entry.egress):
            if policy is not None:
                yield policy


def _with_copies(entry: NodeEntry, places: Mapping[int, tuple[int, int]]) -> NodeEntry:
    def copy(policy: Policy | None) -> Policy | None:
        if policy is None or policy.rule_set not in places:
            return policy
        number, slot = places[policy.rule_set]
        return msgspec.structs.replace(policy, rule_set=number, slot=slot)

    return msgspec.structs.replace(entry, ingress=copy(entry.ingress), egress=copy(entry.egress))
