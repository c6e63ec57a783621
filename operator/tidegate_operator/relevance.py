"""What of a pod makes its identity: what selectors in force can tell, and no more than that
where identities are classes.

Whether it is a label or a named port, only what some selector in force names for pods of the
pod's namespace counts. Of a label that counts, the values that some selector names are told
apart; all others are one where a selector asks whether the label is there, else as if it were
not there. No I/O, no clock.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, TypeVar

from tidegate_api import users
from tidegate_api.state import ANY_OTHER, PORT_LABEL

from tidegate_operator.objects import (
    ContainerPort,
    IdentityKey,
    Policy,
    Protocol,
    World,
)

# Labels that differ between the pods of one workload, or change with each release, without
# meaning anything to a policy. One that a selector mentions is relevant anyway.
EXCLUDED = (
    "app.kubernetes.io/version",
    "apps.kubernetes.io/pod-index",
    "argocd.argoproj.io/instance",
    "batch.kubernetes.io/",
    "controller-revision-hash",
    "controller-uid",
    "helm.sh/chart",
    "helm.toolkit.fluxcd.io/",
    "job-name",
    "kustomize.toolkit.fluxcd.io/",
    "pod-template-generation",
    "pod-template-hash",
    "rollouts-pod-template-hash",
    "statefulset.kubernetes.io/pod-name",
)

By = Literal["classes", "labels"]

_K = TypeVar("_K")


@dataclass(frozen=True)
class Settings:
    """How identities are made."""

    by: By = "classes"
    """One for all pods of a namespace that no selector in force tells apart; or one for each
    set of labels."""
    excluded: tuple[str, ...] = EXCLUDED
    """By labels: keys, or prefixes of them that end in "/", which make no identity unless a
    selector mentions them."""

    def excludes(self, key: str) -> bool:
        return key in self.excluded or f"{key.partition('/')[0]}/" in self.excluded


DEFAULTS = Settings()


def label_keys(text: str) -> tuple[str, ...]:
    """Keys, or prefixes that end in "/", separated by commas. Raises ArgumentTypeError."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    for key in found:
        try:
            users.check_label_key(f"{key}a" if key.endswith("/") else key)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return found


PortName = tuple[Protocol, str]


HOLD_SECONDS = 5.0
"""How long pods that no policy tells apart any more still have numbers of their own, at least."""


class Hold:
    """When numbers that were split may be one again: not with the policy that no longer needs
    them, but after, when no node that works still enforces one that does."""

    def __init__(self) -> None:
        self._since: float | None = None
        """None: nothing is held."""

    def due(self, now: float, lagging: Callable[[], bool] = lambda: False) -> bool:
        """`lagging`: is there a living node that does not yet have in force what was published?"""
        if self._since is None or now - self._since < HOLD_SECONDS:
            return False
        return not lagging()

    def built(self, before: World, world: World, now: float) -> None:
        """`world` was built of `before` at `now`, a monotonic clock."""
        if world.relevance is world.asked or world.relevance == world.asked:
            self._since = None
        elif self._since is None or world.asked != before.asked:
            self._since = now


class Use(NamedTuple):
    """What selectors ask of one label."""

    values: frozenset[str]
    presence: bool
    """Whether it is there, whatever its value."""

    def or_(self, other: Use) -> Use:
        if other.values <= self.values and other.presence <= self.presence:
            return self
        return Use(self.values | other.values, self.presence or other.presence)


class Scope(NamedTuple):
    """What selectors look at in the pods of one namespace."""

    labels: Mapping[str, Use]
    """Where identities are made by labels, only of keys that are excluded otherwise."""
    ports: frozenset[PortName]
    """Named container ports that a rule mentions."""

    def or_(self, other: Scope) -> Scope:
        """`self` itself, if it looks at all that `other` does."""
        more = {
            key: use
            for key, theirs in other.labels.items()
            if (use := self.labels.get(key, NEVER).or_(theirs)) is not self.labels.get(key)
        }
        if not more and other.ports <= self.ports:
            return self
        return Scope({**self.labels, **more}, self.ports | other.ports)


NEVER, PRESENT = Use(frozenset(), False), Use(frozenset(), True)
NOTHING = Scope({}, frozenset())


@dataclass(frozen=True)
class Relevance:
    """Of one world. Equal ones make equal identities of the same pods."""

    settings: Settings = DEFAULTS
    everywhere: Scope = NOTHING
    """What is looked at in pods of any namespace."""
    namespaces: Mapping[str, Scope] = field(default_factory=dict)
    """Of namespaces where more is looked at; `everywhere` included."""

    def of(self, namespace: str) -> Scope:
        return self.namespaces.get(namespace, self.everywhere)

    def key(
        self, namespace: str, labels: Mapping[str, str], ports: Sequence[ContainerPort] = ()
    ) -> IdentityKey:
        """`ports`: where two have a name and a protocol in common, the first counts."""
        scope = self.of(namespace)
        if self.settings.by == "classes":
            found = _seen(scope.labels, labels)
        else:
            excludes = self.settings.excludes
            found = {k: v for k, v in labels.items() if k in scope.labels or not excludes(k)}
        if scope.ports:
            for port in ports:
                if (port.protocol, port.name) in scope.ports:
                    found.setdefault(port_label(port.protocol, port.name), str(port.port))
        return IdentityKey(namespace, tuple(sorted(found.items())))

    def with_(self, other: Relevance) -> Relevance:
        """What tells pods apart wherever one of the two does; `self` itself, if it is that.
        Of settings that differ, `self` alone."""
        if self.settings != other.settings:
            return self
        everywhere = self.everywhere.or_(other.everywhere)
        namespaces = {
            name: self.of(name).or_(other.of(name)).or_(everywhere)
            for name in self.namespaces.keys() | other.namespaces.keys()
        }
        made = replace(self, everywhere=everywhere, namespaces=namespaces)
        return self if made == self else made


def label_sets(world: World) -> dict[IdentityKey, int]:
    """How many numbers the pods of each identity would have by labels."""
    pods = ((pod.identity, pod.labels) for pod in world.pods.values() if not pod.host_network)
    return count_sets(pods, world.relevance.settings)


def count_sets(pods: Iterable[tuple[_K, Mapping[str, str]]], settings: Settings) -> dict[_K, int]:
    """(identity, labels) of pods → identity → their different sets of labels, without those that
    make no number by labels either."""
    sets: dict[_K, set[frozenset[tuple[str, str]]]] = {}
    for identity, labels in pods:
        own = frozenset(item for item in labels.items() if not settings.excludes(item[0]))
        sets.setdefault(identity, set()).add(own)
    return {key: len(found) for key, found in sets.items()}


def _seen(uses: Mapping[str, Use], labels: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for key, value in labels.items():
        use = uses.get(key)
        if use is None:
            continue
        if value in use.values:
            found[key] = value
        elif use.presence:
            found[key] = ANY_OTHER
    return found


def port_label(protocol: Protocol, name: str) -> str:
    """The system label of a named port. No user's label key begins with a colon (DESIGN
    invariant 10)."""
    return f"{PORT_LABEL}{protocol}/{name}"


Named = Iterable[tuple[str, Mapping[str, str]]]
"""(namespace, labels) of Identities that users made."""


def relevance(
    policies: Iterable[Policy], settings: Settings = DEFAULTS, named: Named = ()
) -> Relevance:
    """What selectors of `policies` look at. Of classes, those that users have `named` stay apart
    from others, too."""
    values: dict[str | None, dict[str, set[str]]] = {}
    present: set[tuple[str | None, str]] = set()
    ports: dict[str | None, set[PortName]] = {}
    classes = settings.by == "classes"
    for policy in policies:
        for namespace, key, asked in policy.asks:
            if classes or settings.excludes(key):
                values.setdefault(namespace, {}).setdefault(key, set()).update(asked)
                if not asked:  # Exists and DoesNotExist have none
                    present.add((namespace, key))
        for namespace, protocol, name in policy.port_names:
            ports.setdefault(namespace, set()).add((protocol, name))
    for space, own in named if classes else ():
        for key, value in own.items():
            values.setdefault(space, {}).setdefault(key, set()).add(value)

    def scope(namespace: str | None) -> Scope:
        labels = {
            key: Use(frozenset(found), (namespace, key) in present) if classes else PRESENT
            for key, found in values.get(namespace, {}).items()
        }
        return Scope(labels, frozenset(ports.get(namespace, ())))

    everywhere = scope(None)
    names = (values.keys() | ports.keys()) - {None}
    namespaces = {name: scope(name).or_(everywhere) for name in names if name is not None}
    return Relevance(settings, everywhere, namespaces)
