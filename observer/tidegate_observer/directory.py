"""Who is who: addresses, endpoints, identities, rules and Services, by the numbers of one node.

Pure look-ups over what a reader (`rundir`) filled in. May not live here: files, the API server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from msgspec import UNSET
from tidegate_api.service import EVERY_NODE
from tidegate_api.state import FIRST_IDENTITY, AnyPeer, Identity, Reserved, RuleSet

from tidegate_observer.flow import (
    MAPPED,
    Decision,
    End,
    FrontendKey,
    Policy,
    Service,
    address_bytes,
)

NO_RULE = (1 << 32) - 1
"""TG_RULE_NONE as a record holds it: default deny, or no policy."""
SPECIAL = 1 << 31
"""From here on a rule is an enum tg_rule_special."""

NONE, L3_ONLY, L3_L4, L4_ONLY, ALL, L3_PROTO, PROTO_ONLY = range(7)
"""Numbers of `policy_match_type`."""

MAX_RETIRED = 256
"""Rule sets that are kept although they are not in force any more."""

EVERY_NODE_4, EVERY_NODE_6 = map(address_bytes, EVERY_NODE)
"""What a NodePort's frontend has for an address."""

NAMESPACE_LABEL = "k8s:io.kubernetes.pod.namespace"


class Directory:
    """What is known now. `missing` is told what is not ("address", "rule set", "cgroup" or
    "interface", and which); it may fill the directory, and returns whether it did."""

    def __init__(self, missing: Callable[[str, bytes | int], bool] | None = None) -> None:
        self.addresses: dict[bytes, End] = {}
        self.endpoints: dict[int, End] = {}
        self.identities: dict[int, End] = {}
        self.rule_sets: dict[int, RuleSet] = {}
        self.services: dict[FrontendKey, Service] = {}
        self.hosts: Mapping[int, End | None] = {}
        """Cgroup → the pod in the node's network that it is of; None: it is of none."""
        self.interfaces: Mapping[int, str] = {}
        """Names by index, in the node's network namespace."""
        self.current: frozenset[int] = frozenset()
        """Of `rule_sets`, those in force."""
        self._decisions: dict[tuple[int, int, bool], Decision | None] = {}
        self._strangers: dict[int, End] = {}
        self._missing = missing

    def end(self, address: bytes, identity: int, endpoint: int = 0) -> End:
        """Who has the address, as far as the identity that the kernel saw agrees."""
        found = self.endpoints.get(endpoint) if endpoint else None
        if found is None:
            found = self.addresses.get(address)
        if found is not None and found.identity == identity:
            return found
        return self._other(found, address, identity, endpoint)

    def who(self, address: bytes, endpoint: int = 0) -> End:
        """Who has the address, where the kernel does not say by which identity it knew it."""
        found = self.endpoints.get(endpoint) if endpoint else None
        return found or self.addresses.get(address) or self.stranger(Reserved.WORLD)

    def link(self, index: int) -> str:
        """The interface's name; "": it is not known."""
        found = self.interfaces.get(index)
        if found is None and index and self._missing is not None:
            self._missing("interface", index)
            found = self.interfaces.get(index)
        return found or ""

    def host(self, end: End, cgroup: int) -> End:
        """Who on the node itself is at that end, whose address is no pod's, by the cgroup of its
        socket; `end`: it is nobody's."""
        if cgroup not in self.hosts and self._missing is not None:
            self._missing("cgroup", cgroup)
        found = self.hosts.get(cgroup)
        if found is None:
            return end
        return found if found.identity == end.identity else _as(found, end.identity)

    def _other(self, found: End | None, address: bytes, identity: int, endpoint: int) -> End:
        known = self.identities.get(identity)
        outside = known is not None and not known.namespace
        if identity >= FIRST_IDENTITY and not outside:
            if self._missing is not None and self._missing("address", address):
                found = self.endpoints.get(endpoint) or self.addresses.get(address)
            if found is not None and found.pod:
                # It changes identity just now: the kernel's word for the number.
                return found if found.identity == identity else _as(found, identity)
        return self.identities.get(identity) or self.stranger(identity)

    def stranger(self, identity: int) -> End:
        """Somebody of whom only a number is known."""
        found = self._strangers.get(identity)
        if found is None:
            found = self._strangers[identity] = End(identity, labels=reserved_labels(identity))
        return found

    def decision(self, rule_set: int, rule: int, audit: bool = False) -> Decision | None:
        """What a rule of a rule set in force is; None: nothing is known of it. `audit`: of the
        verdict in which policies in audit mode count."""
        key = rule_set, rule, audit
        found = self._decisions.get(key)
        if found is None:
            found = self._decide(rule_set, rule, audit)
            if found is not None:
                self._decisions[key] = found
        return found

    def _decide(self, rule_set: int, rule: int, audit: bool) -> Decision | None:
        if rule >= SPECIAL and rule != NO_RULE:
            return None
        if rule_set not in self.rule_sets and self._missing is not None:
            self._missing("rule set", rule_set)
        item = self.rule_sets.get(rule_set)
        if item is None:
            return None
        names = [Policy(ref.kind, ref.namespace, ref.name) for ref in item.spec.policies]
        others = [Policy(ref.kind, ref.namespace, ref.name) for ref in item.spec.others]
        if rule == NO_RULE:
            isolating = [others[at] for at in item.spec.audited] if audit else names
            return Decision(tuple(isolating), -1)
        if rule >= len(item.spec.rules):
            return None
        made = item.spec.rules[rule]
        names += others
        if made.policy >= len(names):
            return None
        return Decision((names[made.policy],), rule, match_type(item, rule), made.log)

    def in_force(self, numbers: Iterable[int]) -> None:
        """Forgets rule sets that have not been in force for long; their ids are never used again.
        What was recorded before a switch is read after it, so the last ones stay."""
        kept = self.current = frozenset(numbers)
        retired = sorted(number for number in self.rule_sets if number not in kept)
        gone = set(retired[:-MAX_RETIRED])
        for number in gone:
            del self.rule_sets[number]
        for key in [k for k in self._decisions if k[0] in gone]:
            del self._decisions[key]

    def service(self, address: bytes, port: int, protocol: int) -> Service | None:
        """Of a frontend; a NodePort has whatever address of a node it was asked at."""
        found = self.services.get((address, port, protocol))
        if found is None:
            every = EVERY_NODE_4 if address.startswith(MAPPED) else EVERY_NODE_6
            found = self.services.get((every, port, protocol))
        return found


def match_type(item: RuleSet, rule: int) -> int:
    """`policy_match_type` of a rule: what it names of peer, protocol and port."""
    for term in item.spec.terms:
        if term.rule != rule:
            continue
        peer = not isinstance(term.peer, AnyPeer)
        if term.port is not UNSET:
            return L3_L4 if peer else L4_ONLY
        if term.protocol is not UNSET:
            return L3_PROTO if peer else PROTO_ONLY
        return L3_ONLY if peer else ALL
    return NONE


def _as(end: End, identity: int) -> End:
    return End(
        identity, end.id, end.namespace, end.pod, end.labels, end.workload, end.workload_kind
    )


def reserved_labels(identity: int) -> tuple[str, ...]:
    try:
        name = Reserved(identity).name
    except ValueError:
        return ()
    return (f"reserved:{name.lower().replace('_', '-')}",)


def pod_labels(namespace: str, labels: Mapping[str, str]) -> tuple[str, ...]:
    """A pod's own labels as `source:key[=value]`, its namespace among them, sorted."""
    words = [f"k8s:{key}={value}" if value else f"k8s:{key}" for key, value in labels.items()]
    return tuple(sorted([*words, f"{NAMESPACE_LABEL}={namespace}"]))


def identity_end(item: Identity, number: int) -> End:
    """Who an Identity of the ledger stands for, where no pod is known."""
    spec = item.spec
    if spec.cidrs is not UNSET:
        return End(number, labels=tuple(f"cidr:{cidr}" for cidr in spec.cidrs))
    if spec.namespace is UNSET:
        return End(number)
    labels = {} if spec.labels is UNSET else spec.labels
    return End(number, namespace=spec.namespace, labels=pod_labels(spec.namespace, labels))
