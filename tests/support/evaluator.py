"""What a compiled state means, read from the docstrings of `tidegate_api.state` alone.

Neither the compiler nor the loader nor the CLI's model is used here, so that a compiled state
can be held against `support.oracle_tiers` without any of them.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from msgspec import UNSET
from support.oracle_tiers import Packet
from tidegate_api.state import (
    ADMIN_PRECEDENCE,
    DEVELOPER_PRECEDENCE,
    AnyPeer,
    CIDRPeer,
    Endpoint,
    EntityPeer,
    IPCacheEntry,
    PeerSet,
    PolicyRef,
    Reserved,
    RuleSet,
    RuleSetSpec,
    SetPeer,
    Term,
)

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Direction = Literal["Ingress", "Egress"]


@dataclass(frozen=True)
class Answer:
    """`by`: (policy, index of the rule), None for a default. `isolated_by`: who makes the default
    a denial. `audit`: what policies in audit mode would have denied, as `by` or as the policies;
    None: nothing."""

    allowed: bool
    by: tuple[PolicyRef, int] | None = None
    isolated_by: tuple[PolicyRef, ...] = ()
    audit: tuple[PolicyRef, int] | tuple[PolicyRef, ...] | None = None
    log: bool = False
    """The rule `by` asks for a report."""


@dataclass(frozen=True)
class _Peer:
    ip: IPAddress
    identity: int
    entities: frozenset[str]


class Evaluator:
    def __init__(
        self,
        rule_sets: Mapping[str, RuleSet],
        endpoints: Mapping[str, Iterable[Endpoint]],
        ipcache: Iterable[IPCacheEntry],
        peers: Mapping[str, PeerSet],
    ) -> None:
        """`endpoints`: by the node's name."""
        self._rule_sets = rule_sets
        self._peers = peers
        self._members = {name: frozenset(item.identities) for name, item in peers.items()}
        self._endpoints = {
            _ip(address): (endpoint, node)
            for node, found in endpoints.items()
            for endpoint in found
            for address in endpoint.addresses
        }
        self._hosts: dict[IPAddress, IPCacheEntry] = {}
        self._networks: list[tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, int]] = []
        for entry in ipcache:
            network = _network(entry.cidr)
            if network.prefixlen == network.max_prefixlen:
                self._hosts[network.network_address] = entry
            else:
                self._networks.append((network, entry.identity))
        self._networks.sort(key=lambda item: -item[0].prefixlen)

    def side(self, direction: Direction, subject: str, peer: str, packet: Packet) -> Answer:
        """What the policy of who has the address `subject` says of a flow with `peer`."""
        held = self._endpoints.get(_ip(subject))
        if held is None:
            return Answer(True)
        endpoint, node = held
        name = endpoint.ingress if direction == "Ingress" else endpoint.egress
        if name is UNSET:
            return Answer(True)
        spec = self._rule_sets[name].spec
        assert spec.direction == direction
        other = self._peer(direction, node, _ip(peer))
        matching = [term for term in spec.terms if self._matches(term, other, packet)]
        enforced = _verdict(spec, [term for term in matching if not term.audit], False)
        if not enforced.allowed or not (spec.audited or any(t.audit for t in spec.terms)):
            return enforced
        second = _verdict(spec, matching, bool(spec.audited))
        if second.allowed:
            return enforced
        return replace(enforced, audit=second.by or second.isolated_by)

    def identity(self, address: str) -> int:
        return self._identity(_ip(address))

    def _identity(self, ip: IPAddress) -> int:
        held = self._hosts.get(ip)
        if held is not None:
            return held.identity
        for network, identity in self._networks:
            if ip.version == network.version and ip in network:
                return identity
        return Reserved.WORLD

    def _peer(self, direction: Direction, node: str, ip: IPAddress) -> _Peer:
        entities = set()
        held = self._hosts.get(ip)
        if held is not None and held.identity == Reserved.KUBE_APISERVER:
            entities.add("kube-apiserver")
        nodes = (Reserved.REMOTE_NODE, Reserved.KUBE_APISERVER)
        if held is not None and held.node is not UNSET and held.identity in nodes:
            own = direction == "Egress" and held.node == node
            entities.add("host" if own else "remote-node")
        return _Peer(ip, self._identity(ip), frozenset(entities))

    def _matches(self, term: Term, peer: _Peer, packet: Packet) -> bool:
        return self._is_peer(term, peer) and self._is_port(term, peer, packet)

    def _is_peer(self, term: Term, peer: _Peer) -> bool:
        match term.peer:
            case AnyPeer():
                return True
            case EntityPeer(entity=entity):
                return entity in peer.entities
            case SetPeer(name=name):
                return peer.identity in self._members[name] or any(
                    _inside(cidr, peer.ip) for cidr in self._peers[name].cidrs
                )
            case CIDRPeer(cidr=cidr, excepts=excepts):
                return _inside(cidr, peer.ip) and not any(_inside(e, peer.ip) for e in excepts)

    def _is_port(self, term: Term, peer: _Peer, packet: Packet) -> bool:
        if term.protocol is not UNSET and term.protocol != packet.protocol:
            return False
        if term.port_name is not UNSET:
            assert isinstance(term.peer, SetPeer)
            return any(
                (named.protocol, named.port) == (packet.protocol, packet.port)
                and peer.identity in named.identities
                for named in self._peers[term.peer.name].ports
            )
        if term.icmp_type is not UNSET:
            kind, code = packet.icmp or (-1, -1)
            return kind == term.icmp_type and term.icmp_code in (UNSET, code)
        if term.port is UNSET:
            return True
        last = term.port if term.end_port is UNSET else term.end_port
        return packet.port is not None and term.port <= packet.port <= last


def _verdict(spec: RuleSetSpec, matching: list[Term], without_baseline: bool) -> Answer:
    owners = [*spec.policies, *spec.others]
    isolated = tuple(spec.policies)
    if without_baseline:
        isolated += tuple(spec.others[index] for index in spec.audited)
        matching = [term for term in matching if term.precedence >= DEVELOPER_PRECEDENCE]
    admin = [term for term in matching if term.precedence >= ADMIN_PRECEDENCE]
    others = [term for term in matching if term.precedence < ADMIN_PRECEDENCE]
    for group in (admin, others):
        if not group:
            continue
        best = max(group, key=lambda term: (term.precedence, -term.rule))
        if best.action != "Pass":
            rule = spec.rules[best.rule]
            by = (owners[rule.policy], rule.index)
            return Answer(best.action == "Allow", by, isolated, log=rule.log)
    return Answer(not isolated, None, isolated)


def _inside(cidr: str, ip: IPAddress) -> bool:
    network = _network(cidr)
    return network.version == ip.version and ip in network


@functools.cache
def _ip(text: str) -> IPAddress:
    return ipaddress.ip_address(text)


@functools.cache
def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(text)
