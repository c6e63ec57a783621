"""The verdict model: what the desired state means, computed from the objects alone.

The first of the three answers that must agree (docs/architecture.md, "Verdict"). May not live
here: the kernel, its maps or their encoding, the operator's selectors, files.
"""

from __future__ import annotations

import difflib
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from msgspec import UNSET
from tidegate_api.state import (
    AnyPeer,
    Backend,
    CIDRPeer,
    Endpoint,
    EntityPeer,
    IPCacheEntry,
    NodeState,
    PeerSet,
    PolicyRef,
    Reserved,
    RuleSet,
    RuleSetSpec,
    ServicePort,
    SetPeer,
    StateObject,
    StateSlice,
    Term,
)

from tidegate_cli import judgement
from tidegate_cli.edits import Near
from tidegate_cli.errors import CliError
from tidegate_cli.judgement import Candidate, RuleRef

PORT_PROTOCOLS = frozenset(("TCP", "UDP", "SCTP"))
"""A term with ports only ever matches these."""
ECHO = {"ICMP": 8, "ICMPv6": 128}
"""Types of the echo request."""

MAX_NAMED = 8
"""Names shown where none is like the one given."""

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
Why = Literal["rule", "default-allow", "default-deny", "self", "host", "no-endpoint"]


class ModelError(CliError):
    """The question names what the objects do not hold, or mixes address families."""


@dataclass(frozen=True)
class Side:
    """What one end's policy says. `why`: "rule" (`rule` decided), "default-allow" (no policy
    isolates the end, and no rule matches), "default-deny" (`policies` isolate it and no rule
    matches), "self", "host" (generated on the pod's own node), "no-endpoint" (it is no pod)."""

    allowed: bool
    why: Why
    rule_set: str = ""
    """Name of the RuleSet; empty when none was asked."""
    policies: tuple[PolicyRef, ...] = ()
    """Those that isolate the end in this direction."""
    rule: RuleRef | None = None
    rule_number: int | None = None
    """Index into the RuleSet's spec.rules: what the kernel's maps carry."""
    candidates: tuple[Candidate, ...] = ()
    """Every rule that matches, the first to be heard first."""
    audit: AuditDenial | None = None
    """It passes, and policies in audit mode deny it."""

    @property
    def isolated(self) -> bool:
        return bool(self.policies)


@dataclass(frozen=True)
class AuditDenial:
    """The second verdict. `rule` None: no rule matches, and `policies` would isolate the end."""

    policies: tuple[PolicyRef, ...]
    rule: RuleRef | None
    rule_number: int | None


@dataclass(frozen=True)
class Verdict:
    allowed: bool
    egress: Side
    ingress: Side


@dataclass(frozen=True)
class Pod:
    namespace: str
    name: str
    node: str
    endpoint: Endpoint

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    def address(self, family: int) -> str | None:
        """Its address of family 4 or 6."""
        return next((a for a in self.endpoint.addresses if _ip(a).version == family), None)


@dataclass(frozen=True)
class Answer:
    """The verdict for one place where a packet may end up."""

    address: str
    port: int | None
    verdict: Verdict


@dataclass(frozen=True)
class Expected:
    """What a connection to a target meets. `frontend` is set when it is a service's."""

    source: str
    """Address that the packet carries."""
    frontend: tuple[str, int] | None
    answers: tuple[Answer, ...]
    """One for each backend; empty: a service without a ready backend."""

    @property
    def allowed(self) -> bool | None:
        """None: it depends on the backend."""
        found = {answer.verdict.allowed for answer in self.answers}
        return None if len(found) == 2 else found == {True}


@dataclass
class Model:
    """One desired state. Build it with `from_objects`; it is not changed afterwards."""

    pods: dict[str, Pod] = field(default_factory=dict)
    """By "namespace/name"."""
    services: dict[str, list[ServicePort]] = field(default_factory=dict)
    """By "namespace/name"."""
    rule_sets: dict[str, RuleSet] = field(default_factory=dict)
    peers: dict[str, PeerSet] = field(default_factory=dict)
    _members: dict[str, frozenset[int]] = field(default_factory=dict)
    _owners: dict[IPAddress, Pod] = field(default_factory=dict)
    _hosts: dict[IPAddress, int] = field(default_factory=dict)
    _nodes: dict[IPAddress, str] = field(default_factory=dict)
    """Addresses of nodes -> whose."""
    _networks: dict[tuple[int, int], dict[int, int]] = field(default_factory=dict)
    _frontends: dict[tuple[IPAddress, int, str], ServicePort] = field(default_factory=dict)

    @classmethod
    def from_objects(cls, objects: Iterable[StateObject]) -> Model:
        """The model of NodeStates, RuleSets and StateSlices; other kinds are passed over."""
        model = cls()
        for item in objects:
            if isinstance(item, NodeState):
                model._add_node(item)
            elif isinstance(item, RuleSet):
                model.rule_sets[item.metadata.name] = item
            elif isinstance(item, StateSlice):
                model._add_slice(item)
        return model

    # ---- questions -------------------------------------------------------------

    def verdict(
        self, src: str, dst: str, port: int | None, protocol: str, *, from_host: bool = False
    ) -> Verdict:
        """May `src` open a flow to `dst`? Both are addresses, after any service translation;
        `port` is the destination's, None for protocols without ports; `protocol` is "TCP",
        "UDP", "SCTP" or any other name. "ICMP" is that of the addresses' family; its `port` is
        type << 8 | code, None an echo request. `from_host`: generated on the node of `dst`
        itself. Raises ModelError."""
        source, target = _ip(src), _ip(dst)
        port, protocol = _defaults(target, port, protocol)
        if source.version != target.version:
            raise ModelError(f"{src} and {dst} are of different address families")
        sender = None if from_host else self._owners.get(source)
        receiver = self._owners.get(target)
        if sender is not None and sender is receiver:
            same = Side(True, "self")
            return Verdict(True, same, same)
        egress = self._side("Egress", sender, target, port, protocol)
        if from_host and receiver is not None:
            ingress = Side(True, "host")
        else:
            ingress = self._side("Ingress", receiver, source, port, protocol)
        return Verdict(egress.allowed and ingress.allowed, egress, ingress)

    def expected(
        self, source: str, target: str, port: int | None, protocol: str, *, family: int = 0
    ) -> Expected:
        """The verdict from pod `source` to `target`: a pod, a service (each backend is judged) or
        an address, which may be a frontend's. Names are "namespace/name" or, where only one has
        it, "name"; "pod/…" and "svc/…" say which kind. `family`: 4, 6, or 0 for the target's
        first that both ends have. Raises ModelError."""
        sender = self.pod(source.removeprefix("pod/"))
        for address in self._target_addresses(target, port, protocol):
            version = _ip(address).version
            own = sender.address(version)
            if own is not None and family in (0, version):
                return self._expected(own, address, port, protocol)
        raise ModelError(f"{source} and {target} have no address family in common")

    def near(
        self, direction: str, subject: Pod, peer: str, flow: tuple[int | None, str]
    ) -> list[Near]:
        """Rules that would let the flow pass if they had one more port, or one more peer; `flow`
        is (port, protocol), as of `verdict`."""
        spec = self.spec(direction, subject)
        if spec is None:
            return []
        port, protocol = _defaults(_ip(peer), *flow)
        other = self._other(direction, subject, _ip(peer))
        found: dict[Near, None] = {}
        for term in spec.terms:
            if term.action != "Allow" or term.audit:
                continue
            ports = self._port_matches(term, other, port, protocol)
            if ports != self._matches(term, other):
                near = Near(judgement.rule_ref(spec, term.rule), "peers" if ports else "ports")
                found[near] = None
        return list(found)

    def spec(self, direction: str, subject: Pod) -> RuleSetSpec | None:
        """Of the rule set that has a say; None: there is none. ModelError: it is missing."""
        name = getattr(subject.endpoint, direction.lower())
        if name is UNSET:
            return None
        rule_set = self.rule_sets.get(name)
        if rule_set is None:
            raise ModelError(f"{subject.key} names rule set {name}, which is not there")
        return rule_set.spec

    def pod(self, text: str) -> Pod:
        """The pod "namespace/name", or the only one whose name is or begins with `text`. Raises
        ModelError."""
        return self.pods[_find("pod", text, self.pods)]

    def service(self, text: str) -> list[ServicePort]:
        """The service, named as in `pod`. Raises ModelError."""
        return self.services[_find("service", text, self.services)]

    def backends(self, address: str, port: int, protocol: str) -> list[Backend] | None:
        """What is behind a frontend; None: it is none."""
        found = self._frontends.get((_ip(address), port, protocol))
        return None if found is None else found.backends

    def service_of(self, address: str, port: int, protocol: str) -> ServicePort | None:
        return self._frontends.get((_ip(address), port, protocol))

    def owner(self, address: str) -> Pod | None:
        return self._owners.get(_ip(address))

    def identity(self, address: str, node: str) -> int:
        """Who has an address, as `node` knows it."""
        return self._identity(_ip(address), node)

    # ---- building --------------------------------------------------------------

    def _add_node(self, state: NodeState) -> None:
        for endpoint in state.spec.endpoints:
            pod = Pod(endpoint.namespace, endpoint.name, state.metadata.name, endpoint)
            self.pods[pod.key] = pod
            self._owners.update((_ip(address), pod) for address in endpoint.addresses)

    def _add_slice(self, item: StateSlice) -> None:
        for entry in item.spec.ipcache or ():
            self._add_address(entry)
        for peer_set in item.spec.peers or ():
            self.peers[peer_set.name] = peer_set
            # 0 is "unknown": it matches terms for any peer only.
            self._members[peer_set.name] = frozenset(peer_set.identities) - {Reserved.UNKNOWN}
        for service in item.spec.services or ():
            self.services.setdefault(f"{service.namespace}/{service.name}", []).append(service)
            for frontend in service.frontends:
                if frontend.kind == "NodePort":  # at addresses that differ from node to node
                    continue
                key = (_ip(frontend.address), frontend.port, frontend.protocol)
                self._frontends[key] = service

    def _add_address(self, entry: IPCacheEntry) -> None:
        network = _network(entry.cidr)
        if network.prefixlen == network.max_prefixlen:
            self._hosts[network.network_address] = entry.identity
            of_node = entry.identity == Reserved.REMOTE_NODE or (
                entry.identity == Reserved.KUBE_APISERVER and entry.node is not UNSET
            )
            if of_node:
                self._nodes[network.network_address] = entry.node or ""
        else:
            table = self._networks.setdefault((network.version, network.prefixlen), {})
            table[int(network.network_address)] = entry.identity

    # ---- verdict ---------------------------------------------------------------

    def _target_addresses(self, target: str, port: int | None, protocol: str) -> list[str]:
        kind, _, rest = target.partition("/")
        # A namespace may be called pod or svc: what is there under the whole text comes first.
        if rest and target not in self.pods and target not in self.services:
            if kind == "pod":
                return self.pod(rest).endpoint.addresses
            if kind == "svc":
                return self._service_addresses(rest, port, protocol)
        if _is_address(target):
            return [target]
        if _exact(target, self.services) and not _exact(target, self.pods):
            return self._service_addresses(target, port, protocol)
        return self.pod(target).endpoint.addresses

    def _service_addresses(self, text: str, port: int | None, protocol: str) -> list[str]:
        fronts = [f for entry in self.service(text) for f in entry.frontends]
        ports = [f for f in fronts if f.kind is UNSET]
        found = [f.address for f in ports if (f.port, f.protocol) == (port, protocol)]
        if not found:
            known = ", ".join(sorted({f"{f.port}/{f.protocol}" for f in ports})) or "none"
            raise ModelError(f"service {text} has no port {port}/{protocol}; it has {known}")
        return found

    def _expected(self, source: str, address: str, port: int | None, protocol: str) -> Expected:
        backends = self.backends(address, port, protocol) if port is not None else None
        if backends is None:
            verdict = self.verdict(source, address, port, protocol)
            return Expected(source, None, (Answer(address, port, verdict),))
        answers = tuple(
            Answer(b.address, b.port, self.verdict(source, b.address, b.port, protocol))
            for b in backends
        )
        return Expected(source, (address, port or 0), answers)

    def _side(
        self, direction: str, subject: Pod | None, peer: IPAddress, port: int | None, protocol: str
    ) -> Side:
        if subject is None:
            return Side(True, "no-endpoint")
        spec = self.spec(direction, subject)
        if spec is None:
            return Side(True, "default-allow")
        name = getattr(subject.endpoint, direction.lower())
        other = self._other(direction, subject, peer)
        matching = (
            term
            for term in spec.terms
            if self._port_matches(term, other, port, protocol) and self._matches(term, other)
        )
        found = judgement.candidates(spec, matching)
        first, then = judgement.enforced(spec, found), judgement.second(spec, found)
        by, policies = first.by, tuple(spec.policies)
        audit = None
        if first.allowed and not then.allowed:
            ref, number = (then.by.rule, then.by.number) if then.by else (None, None)
            audit = AuditDenial(judgement.audited_of(spec), ref, number)
        if by is None:
            why: Why = "default-allow" if first.allowed else "default-deny"
            return Side(first.allowed, why, name, policies, None, None, found, audit)
        return Side(first.allowed, "rule", name, policies, by.rule, by.number, found, audit)

    def _other(self, direction: str, subject: Pod, peer: IPAddress) -> _Peer:
        identity = self._identity(peer, subject.node)
        return _Peer(peer, identity, self._node_bits(direction, subject, peer))

    def _node_bits(self, direction: str, subject: Pod, peer: IPAddress) -> frozenset[str]:
        """The entities that the peer is for a subject in one direction."""
        found = set()
        if self._identity(peer, subject.node) == Reserved.KUBE_APISERVER:
            found.add("kube-apiserver")
        node = self._nodes.get(peer)
        if node is not None:
            own = direction == "Egress" and node == subject.node
            found.add("host" if own else "remote-node")
        return frozenset(found)

    def _matches(self, term: Term, peer: _Peer) -> bool:
        match term.peer:
            case AnyPeer():
                return True
            case SetPeer(name=name):
                known = peer.identity != Reserved.UNKNOWN
                return peer.identity in self._members.get(name, ()) or (
                    known and any(peer.address in _network(c) for c in self._networks_of(name))
                )
            case CIDRPeer(cidr=cidr, excepts=excepts):
                if peer.identity == Reserved.UNKNOWN:
                    return False
                return peer.address in _network(cidr) and not any(
                    peer.address in _network(e) for e in excepts
                )
            case EntityPeer(entity=entity):
                return entity in peer.entities

    def _networks_of(self, name: str) -> list[str]:
        held = self.peers.get(name)
        return held.cidrs if held is not None else []

    def _port_matches(self, term: Term, peer: _Peer, port: int | None, protocol: str) -> bool:
        if term.port_name is not UNSET and isinstance(term.peer, SetPeer):
            held = self.peers.get(term.peer.name)
            named = held.ports if held is not None else []
            return term.protocol in (UNSET, protocol) and any(
                (n.protocol, n.port) == (protocol, port)
                and peer.identity in n.identities
                and peer.identity != Reserved.UNKNOWN
                for n in named
            )
        return _port_matches(term, port, protocol)

    def _identity(self, address: IPAddress, node: str) -> int:
        """The node's own endpoint, else who the ipcache says, else world."""
        owner = self._owners.get(address)
        if owner is not None and owner.node == node:
            return owner.endpoint.identity
        held = self._hosts.get(address)
        if held is not None:
            return held
        for length in range(address.max_prefixlen - 1, -1, -1):
            table = self._networks.get((address.version, length))
            if table is None:
                continue
            shift = address.max_prefixlen - length
            held = table.get(int(address) >> shift << shift)
            if held is not None:
                return held
        return Reserved.WORLD


@dataclass(frozen=True)
class _Peer:
    """The other side of a flow, as the subject's node knows it."""

    address: IPAddress
    identity: int
    entities: frozenset[str]


def _defaults(peer: IPAddress, port: int | None, protocol: str) -> tuple[int | None, str]:
    """ICMP is of the addresses' family, and an echo request if nobody says what."""
    if protocol == "ICMP" and peer.version == 6:
        protocol = "ICMPv6"
    if protocol in ECHO and port is None:
        port = ECHO[protocol] << 8
    return port, protocol


def _port_matches(term: Term, port: int | None, protocol: str) -> bool:
    if term.protocol is UNSET and term.port is UNSET:
        return True
    if protocol in ECHO:
        return term.protocol == protocol and _icmp_matches(term, port or 0)
    if protocol not in PORT_PROTOCOLS or term.protocol not in (UNSET, protocol):
        return False
    if term.port is UNSET:
        return True
    last = term.port if term.end_port is UNSET else term.end_port
    return port is not None and term.port <= port <= last


def _icmp_matches(term: Term, port: int) -> bool:
    return term.icmp_type in (UNSET, port >> 8) and term.icmp_code in (UNSET, port & 0xFF)


def _exact(text: str, known: Iterable[str]) -> list[str]:
    """ "namespace/name" itself, or every one with this name."""
    return [key for key in known if text in (key, key.partition("/")[2])]


def _find(kind: str, text: str, known: Mapping[str, object]) -> str:
    begins = [k for k in known if k.startswith(text) or k.partition("/")[2].startswith(text)]
    found = _exact(text, known) or (begins if text else [])
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelError(f"{kind} {text!r} is not one: {', '.join(sorted(found))}")
    raise ModelError(f"no {kind} {text!r}{_hint(text, known)}")


def _hint(text: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(text, list(known), n=1, cutoff=0.4)
    if close:
        return f"; did you mean {close[0]}?"
    more = f", and {len(known) - MAX_NAMED} more" if len(known) > MAX_NAMED else ""
    return f"; there are {', '.join(sorted(known)[:MAX_NAMED])}{more}" if known else ""


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


@cache
def _ip(text: str) -> IPAddress:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise ModelError(f"not an address: {text!r}") from None


@cache
def _network(text: str) -> IPNetwork:
    return ipaddress.ip_network(text)
