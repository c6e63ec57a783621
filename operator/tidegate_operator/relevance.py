"""What of a pod makes its identity: what selectors in force can tell, and no more than that
where identities are classes.

Whether it is a label or a named port, only what some selector in force names for pods of the
pod's namespace counts. No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tidegate_api.state import PORT_LABEL

from tidegate_operator.objects import (
    ContainerPort,
    IdentityKey,
    Policy,
    Protocol,
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


@dataclass(frozen=True)
class Settings:
    """How identities are made."""

    excluded: tuple[str, ...] = EXCLUDED
    """Label keys, or prefixes of them that end in "/", which make no identity unless a selector
    mentions them."""

    def excludes(self, key: str) -> bool:
        return key in self.excluded or f"{key.partition('/')[0]}/" in self.excluded


DEFAULTS = Settings()

PortName = tuple[Protocol, str]


class Scope(NamedTuple):
    """What selectors look at in the pods of one namespace."""

    labels: frozenset[str]
    """Excluded label keys that a selector mentions all the same."""
    ports: frozenset[PortName]
    """Named container ports that a rule mentions."""


NOTHING = Scope(frozenset(), frozenset())


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
        scope, excludes = self.of(namespace), self.settings.excludes
        found = {
            key: value for key, value in labels.items() if key in scope.labels or not excludes(key)
        }
        if scope.ports:
            for port in ports:
                if (port.protocol, port.name) in scope.ports:
                    found.setdefault(port_label(port.protocol, port.name), str(port.port))
        return IdentityKey(namespace, tuple(sorted(found.items())))


def port_label(protocol: Protocol, name: str) -> str:
    """The system label of a named port. No user's label key begins with a colon (DESIGN
    invariant 10)."""
    return f"{PORT_LABEL}{protocol}/{name}"


def relevance(policies: Iterable[Policy], settings: Settings = DEFAULTS) -> Relevance:
    labels: dict[str | None, set[str]] = {}
    ports: dict[str | None, set[PortName]] = {}
    for policy in policies:
        for namespace, selector in policy.selectors:
            keys = {part.key for part in selector.requirements if settings.excludes(part.key)}
            if keys:
                labels.setdefault(namespace, set()).update(keys)
        for namespace, protocol, name in policy.port_names:
            ports.setdefault(namespace, set()).add((protocol, name))
    everywhere = Scope(frozenset(labels.get(None, ())), frozenset(ports.get(None, ())))
    namespaces = {
        name: Scope(
            everywhere.labels | labels.get(name, set()), everywhere.ports | ports.get(name, set())
        )
        for name in labels.keys() | ports.keys()
        if name is not None
    }
    return Relevance(settings, everywhere, namespaces)
