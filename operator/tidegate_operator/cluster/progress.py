"""How far what was published is in force on the nodes. Pure: no I/O, no clock.

Each publish has a number. A node that reports a digest has in force what every publish said
of it up to the last one with that digest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tidegate_operator.objects import PolicyName

KEPT_DIGESTS = 64
"""Of one node: states that it may still be about to realise."""

PolicyKey = tuple[PolicyName, str, int]
"""(name, UID, generation): an edited policy is another one."""


@dataclass(frozen=True)
class Count:
    realised: int
    total: int


class Progress:
    """What was published when, and how far each node is."""

    def __init__(self) -> None:
        self.number = 0
        self._digests: dict[str, dict[str, int]] = {}
        self._reached: dict[str, int] = {}
        self._since: dict[PolicyKey, dict[str, int]] = {}

    def published(
        self, digests: Mapping[str, str], policies: Mapping[PolicyKey, Iterable[str]]
    ) -> None:
        """`digests`: of every node's state; `policies`: the nodes where each matters."""
        self.number += 1
        for name in self._digests.keys() - digests.keys():
            del self._digests[name]
            self._reached.pop(name, None)
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

    def realised(self, digests: Mapping[str, str]) -> None:
        """What each node says that it has in force. A digest that is not known says nothing."""
        for name, digest in digests.items():
            number = self._digests.get(name, {}).get(digest)
            if number is not None:
                self._reached[name] = number

    def everywhere(self) -> int:
        """The newest publish that every node has in force."""
        return min((self._reached.get(name, 0) for name in self._digests), default=self.number)

    def of(self, key: PolicyKey) -> Count:
        since = self._since.get(key, {})
        done = sum(self._reached.get(name, 0) >= number for name, number in since.items())
        return Count(done, len(since))

    def behind(self, key: PolicyKey) -> list[str]:
        """The nodes where it matters and is not in force yet."""
        since = self._since.get(key, {})
        return sorted(name for name, number in since.items() if self._reached.get(name, 0) < number)
