"""How far what was published is in force on the nodes. Pure: no I/O, no clock.

Each publish has a number. A node that reports a digest has in force what every publish said
of it up to the last one with that digest. Peer sets change without a change of the node's state,
so of them a node reports a digest of its own. They do so often, and are in force a moment later:
only of a node that stays behind with them is it said.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tidegate_operator.cluster.world import every_policy
from tidegate_operator.objects import PolicyName

if TYPE_CHECKING:
    from tidegate_operator.cluster.runner import Published

KEPT_DIGESTS = 64
"""Of one node: states that it may still be about to realise."""
PEERS_SECONDS = 5.0
"""So long a node may take for a change of the peer sets that it names, without a word."""

PolicyKey = tuple[PolicyName, str, int]
"""(name, UID, generation): an edited policy is another one."""


@dataclass(frozen=True)
class Count:
    realised: int
    total: int


@dataclass(frozen=True)
class Standing:
    """How far one policy is."""

    count: Count
    """Of the nodes where it matters, without those that are silent."""
    behind: list[str]
    """Those of them where it is not in force as it is meant now; sorted."""
    silent: list[str]
    """Nodes where it matters that are not counted; sorted."""


@dataclass
class _Peers:
    """Of one node: digest of its peer sets -> when they came to be so. Newest last; none before
    the one that it reported last."""

    wanted: dict[str, float] = field(default_factory=dict)
    reported: bool = True
    """The first of them is in force."""


def policies_on_nodes(what: Published) -> dict[PolicyKey, frozenset[str]]:
    """Where each policy matters: the nodes with a pod that it selects."""
    of_rule_set = {
        name: [
            PolicyName(ref.kind, ref.namespace, ref.name)
            for ref in (*item.spec.policies, *item.spec.others)
        ]
        for name, item in what.desired.rule_sets.items()
    }
    nodes: dict[PolicyName, set[str]] = {}
    for node, content in what.desired.nodes.items():
        for name in {policy for item in content.rule_sets for policy in of_rule_set[item]}:
            nodes.setdefault(name, set()).add(node)
    return {
        (name, facts.target.uid, facts.target.generation): frozenset(nodes.get(name, ()))
        for name, facts in every_policy(what.world.snapshot)
    }


class Progress:
    """What was published when, and how far each node is."""

    def __init__(self) -> None:
        self.number = 0
        self._digests: dict[str, dict[str, int]] = {}
        self._reached: dict[str, int] = {}
        self._since: dict[PolicyKey, dict[str, int]] = {}
        self._peers: dict[str, _Peers] = {}
        self._late: frozenset[str] = frozenset()
        self._silent: frozenset[str] = frozenset()

    def published(
        self, digests: Mapping[str, str], policies: Mapping[PolicyKey, Iterable[str]]
    ) -> None:
        """`digests`: of every node's state; `policies`: the nodes where each matters."""
        self.number += 1
        for name in self._digests.keys() - digests.keys():
            del self._digests[name]
            self._reached.pop(name, None)
            self._peers.pop(name, None)
        for name, digest in digests.items():
            known = self._digests.setdefault(name, {})
            known.pop(digest, None)
            known[digest] = self.number
            while len(known) > KEPT_DIGESTS:
                del known[next(iter(known))]
        since = {}
        for key, nodes in policies.items():
            before = self._since.get(key, {})
            since[key] = {name: before.get(name, self.number) for name in nodes}
        self._since = since

    def peers(self, digests: Mapping[str, str], now: float) -> None:
        """`digests`: node -> of the peer sets that it names, as they were published at `now`."""
        for name, digest in digests.items():
            known = self._peers.setdefault(name, _Peers())
            if not known.wanted or digest != next(reversed(known.wanted)):
                known.wanted.pop(digest, None)
                known.wanted[digest] = now
            while len(known.wanted) > KEPT_DIGESTS:
                del known.wanted[next(iter(known.wanted))]
                known.reported = False

    def realised(self, digests: Mapping[str, str], silent: Collection[str] = ()) -> None:
        """What each node says that it has in force. A digest that is not known says nothing.
        What a node said that is `silent` now is void, until it says it again."""
        self._silent = frozenset(silent)
        for name in self._silent:
            self._reached.pop(name, None)
        for name, digest in digests.items():
            number = self._digests.get(name, {}).get(digest)
            if number is not None and name not in self._silent:
                self._reached[name] = number

    def realised_peers(self, digests: Mapping[str, str], now: float) -> None:
        """The same of peer sets, of nodes that tell of them. `now`: to know who is behind."""
        late = set()
        for name, digest in digests.items():
            known = self._peers.get(name)
            if known is None:
                continue
            if digest in known.wanted:
                while next(iter(known.wanted)) != digest:
                    del known.wanted[next(iter(known.wanted))]
                known.reported = True
            elif len(known.wanted) == 1:
                known.reported = False
            waiting = list(known.wanted.values())[known.reported :]
            if waiting and now - waiting[0] >= PEERS_SECONDS:
                late.add(name)
        self._late = frozenset(late)

    def everywhere(self) -> int:
        """The newest publish that every node has in force; but for the silent."""
        counted = self._digests.keys() - self._silent
        return min((self._reached.get(name, 0) for name in counted), default=self.number)

    def of(self, key: PolicyKey) -> Standing:
        since = self._since.get(key, {})
        counted = sorted(since.keys() - self._silent)
        behind = [
            name
            for name in counted
            if self._reached.get(name, 0) < since[name] or name in self._late
        ]
        count = Count(len(counted) - len(behind), len(counted))
        return Standing(count, behind, sorted(since.keys() & self._silent))
