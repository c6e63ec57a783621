"""The verdict oracle for all kinds of policies: the APIs' prose, read literally.

On top of `support.oracle` (NetworkPolicy): ClusterNetworkPolicy v1alpha2 as the field comments
of its Go types say it, and TrafficPolicy as docs/api.md and docs/policy.md say it. The same
rules hold as there: manifests as plain dicts, no Tidegate package, no speed.

The cluster also has, each optional:

    cluster_policies  ClusterNetworkPolicy manifests, valid ones
    traffic_policies  TrafficPolicy manifests, valid ones
    identities        user-made Identity manifests with cidrs that overlap nothing
    node_objects      Node manifests (their labels)
    node_addresses    node's name -> its addresses (status.addresses)
    gateways          node's name -> other addresses of its own
    apiservers        addresses that serve the API
    pod_cidrs         every address that a pod may have
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from support import oracle
from support.oracle import (
    NAME_LABEL,
    Cluster,
    Direction,
    End,
    Manifest,
    OracleError,
    selector_matches,
)

Action = Literal["Allow", "Deny", "Pass"]


@dataclass(frozen=True, order=True)
class Policy:
    kind: str
    namespace: str
    name: str


@dataclass(frozen=True, order=True)
class Rule:
    policy: Policy
    index: int


@dataclass(frozen=True)
class Side:
    """One end's policy. `by`: the rules any of which may be named, () for a default;
    `isolated_by`: who makes the default a denial. `audit`: what else policies in audit mode
    would have denied (their rules, or themselves for a default), None: nothing."""

    allowed: bool
    by: frozenset[Rule] = frozenset()
    isolated_by: frozenset[Policy] = frozenset()
    audit: frozenset[Rule | Policy] | None = None


ALLOWED = Side(True)


@dataclass(frozen=True)
class Judgement:
    allowed: bool
    egress: Side
    ingress: Side
    exempt: Literal["", "self", "host"] = ""


@dataclass(frozen=True)
class Packet:
    """What a flow opens with. `port`: the destination's, None for other protocols than TCP, UDP
    and SCTP; `icmp`: (type, code)."""

    protocol: str
    port: int | None = None
    icmp: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Flow:
    """A packet as one direction of one subject sees it."""

    direction: Direction
    subject: Manifest
    peer: oracle._Party
    destination: oracle._Party
    packet: Packet

    @property
    def named_of(self) -> Manifest | None:
        """Who gives port names their numbers: the pod that is connected to."""
        return self.destination.pod


class TierOracle(oracle.Oracle):
    """`judge` for many questions about one cluster, which must not change."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self._tiers = {
            tier: sorted(
                (p for p in oracle._items(cluster, "cluster_policies") if _spec(p)["tier"] == tier),
                key=lambda p: (_spec(p)["priority"], oracle._name(p)),
            )
            for tier in ("Admin", "Baseline")
        }
        self._own = oracle._items(cluster, "traffic_policies")
        self._identities = {
            oracle._name(item): _spec(item)["cidrs"]
            for item in oracle._items(cluster, "identities")
        }
        self._node_labels = {
            oracle._name(item): oracle._labels(item)
            for item in oracle._items(cluster, "node_objects")
        }
        self._status_addresses = _addresses(cluster.get("node_addresses") or {})
        self._all_addresses = {
            name: found | _addresses(cluster.get("gateways") or {}).get(name, set())
            for name, found in self._status_addresses.items()
        }
        self._apiservers = {oracle._address(text) for text in cluster.get("apiservers") or ()}
        self._pod_cidrs = cluster.get("pod_cidrs") or ()

    def judge(self, src: End, dst: End, packet: Packet) -> Judgement:
        """May `src` open a flow to `dst`?"""
        source, destination = self._parties(src, dst)
        if source.pod is not None and source.pod is destination.pod:
            return Judgement(True, ALLOWED, ALLOWED, "self")
        egress = self._side("Egress", source.pod, destination, destination, packet)
        if destination.pod is not None and self._is_local_node(src, dst):
            return Judgement(egress.allowed, egress, ALLOWED, "host")
        ingress = self._side("Ingress", destination.pod, source, destination, packet)
        return Judgement(egress.allowed and ingress.allowed, egress, ingress)

    def is_unknown(self, end: End) -> bool:
        """Whether it is an address among the pods' that nobody has."""
        if not isinstance(end, oracle.Address):
            return False
        ip = oracle._address(end.ip)
        inside = any(oracle._contains(cidr, ip) for cidr in self._pod_cidrs)
        return inside and ip not in self._owner and self._node_of(ip) is None

    # ---- the order of judgement ----------------------------------------------------

    def _side(
        self,
        direction: Direction,
        subject: Manifest | None,
        peer: oracle._Party,
        destination: oracle._Party,
        packet: Packet,
    ) -> Side:
        if subject is None:
            return ALLOWED
        flow = _Flow(direction, subject, peer, destination, packet)
        enforced = self._verdict(flow, audit=False)
        audited = self._verdict(flow, audit=True)
        if not enforced.allowed or audited.allowed:
            return enforced
        found: frozenset[Rule | Policy] = audited.by or audited.isolated_by
        return Side(True, enforced.by, enforced.isolated_by, found)

    def _verdict(self, flow: _Flow, audit: bool) -> Side:
        """`audit`: as if policies in audit mode were enforced."""
        # "If Admin tier has made a final decision (Accept or Deny) on a connection, then no
        # further evaluation is done."
        decided = self._cluster_tier("Admin", flow)
        if decided is not None:
            return decided
        isolated_by, allowing, denying = self._developers(flow, audit)
        if denying:
            return Side(False, frozenset(denying), isolated_by)
        if allowing:
            return Side(True, frozenset(allowing), isolated_by)
        # "v1.NetworkPolicy always makes a final decision for selected pods."
        if isolated_by:
            return Side(False, isolated_by=isolated_by)
        decided = self._cluster_tier("Baseline", flow)
        return decided if decided is not None else ALLOWED

    def _cluster_tier(self, tier: str, flow: _Flow) -> Side | None:
        """By priority; within a policy in the order in which rules are written. None: no
        decision, because no rule matches or because the first that does is Pass."""
        for policy in self._tiers[tier]:
            if not self._is_cluster_subject(policy, flow.subject):
                continue
            for index, rule in enumerate(oracle._items(_spec(policy), flow.direction.lower())):
                if not self._cluster_rule(rule, flow):
                    continue
                if rule["action"] == "Pass":
                    return None
                at = Rule(Policy("ClusterNetworkPolicy", "", oracle._name(policy)), index)
                return Side(rule["action"] == "Accept", frozenset((at,)))
        return None

    def _developers(
        self, flow: _Flow, audit: bool
    ) -> tuple[frozenset[Policy], set[Rule], set[Rule]]:
        """(who isolates, rules that allow, rules that deny) of NetworkPolicy and TrafficPolicy."""
        traffic = oracle._Traffic(
            flow.peer, flow.destination, flow.packet.port, flow.packet.protocol
        )
        subject = oracle._Party(flow.peer.ip, flow.subject)
        by, rules = self._direction(flow.direction, subject, traffic)
        isolated = {Policy("NetworkPolicy", ref.namespace, ref.name) for ref in by}
        allowing = {
            Rule(Policy("NetworkPolicy", ref.namespace, ref.name), ref.index) for ref in rules
        }
        denying: set[Rule] = set()
        for policy in self._own:
            spec = _spec(policy)
            if spec["mode"] == "Audit" and not audit:
                continue
            if oracle._namespace(policy) != oracle._namespace(flow.subject):
                continue
            if not _own_selects(spec["subject"]["podSelector"], oracle._labels(flow.subject)):
                continue
            ref = Policy("TrafficPolicy", oracle._namespace(policy), oracle._name(policy))
            if flow.direction in spec["isolates"]:
                isolated.add(ref)
            for index, rule in enumerate(oracle._items(spec, flow.direction.lower())):
                if self._own_rule(rule, flow):
                    of = denying if rule["action"] == "Deny" else allowing
                    of.add(Rule(ref, index))
        return frozenset(isolated), allowing, denying

    # ---- ClusterNetworkPolicy ---------------------------------------------------------

    def _is_cluster_subject(self, policy: Manifest, pod: Manifest) -> bool:
        """ "Host-networked pods are not included in subject selection": they are no pods here."""
        return self._is_cluster_pod(_spec(policy)["subject"], pod)

    def _is_cluster_pod(self, item: Manifest, pod: Manifest | None) -> bool:
        """`namespaces` or `pods` of a subject or peer."""
        if pod is None:
            return False
        if item.get("namespaces") is not None:
            return selector_matches(item["namespaces"], self._labels_of_namespace(pod))
        pods = item.get("pods")
        if pods is None:
            return False
        # "If empty, it selects all Namespaces."
        spaces = pods.get("namespaceSelector") or {}
        return selector_matches(spaces, self._labels_of_namespace(pod)) and selector_matches(
            pods["podSelector"], oracle._labels(pod)
        )

    def _cluster_rule(self, rule: Manifest, flow: _Flow) -> bool:
        """ "If any element matches ... then the specified action is applied"; without
        `protocols`, whatever the protocol."""
        protocols = rule.get("protocols")
        if protocols is not None and not any(self._cluster_port(p, flow) for p in protocols):
            return False
        return any(
            self._cluster_peer(peer, flow)
            for peer in rule["from" if flow.direction == "Ingress" else "to"]
        )

    def _cluster_peer(self, item: Manifest, flow: _Flow) -> bool:
        ip = flow.peer.ip
        if item.get("nodes") is not None:
            # "By matching on the IPs present in the node.Status.Addresses field."
            return any(
                ip in addresses and selector_matches(item["nodes"], self._node_labels[name])
                for name, addresses in self._status_addresses.items()
            )
        if item.get("networks") is not None:
            return any(oracle._contains(cidr, ip) for cidr in item["networks"])
        if item.get("domainNames") is not None:
            return False  # reported, and allows nothing
        return self._is_cluster_pod(item, flow.peer.pod)

    def _cluster_port(self, item: Manifest, flow: _Flow) -> bool:
        name = item.get("destinationNamedPort")
        packet = flow.packet
        if name is not None:
            return any(
                packet.protocol == protocol
                and packet.port in oracle._named_ports(flow.named_of, name, protocol)
                for protocol in ("TCP", "UDP", "SCTP")
            )
        (protocol,) = item
        if packet.protocol != protocol.upper() or packet.port is None:
            return False
        port = item[protocol]["destinationPort"]
        if "range" in port:
            return bool(port["range"]["start"] <= packet.port <= port["range"]["end"])
        return bool(packet.port == port["number"])

    # ---- TrafficPolicy ------------------------------------------------------------------

    def _own_rule(self, rule: Manifest, flow: _Flow) -> bool:
        return any(
            self._own_peer(peer, flow) and self._own_port(port, peer, flow)
            for peer in rule["peers"]
            for port in rule["ports"]
        )

    def _own_peer(self, item: Manifest, flow: _Flow) -> bool:
        (kind,) = item
        match kind:
            case "any":
                return True
            case "pods":
                return self._own_pods(item["pods"], flow.peer.pod)
            case "entities":
                return any(self._is_entity(name, flow) for name in item["entities"])
            case "cidrs":
                return any(oracle._block_matches(block, flow.peer.ip) for block in item["cidrs"])
            case "identity":
                cidrs = self._identities.get(item["identity"], ())
                outside = flow.peer.pod is None and self._node_of(flow.peer.ip) is None
                return outside and any(oracle._contains(cidr, flow.peer.ip) for cidr in cidrs)
        raise OracleError(f"no such peer: {kind}")

    def _own_pods(self, item: Manifest, pod: Manifest | None) -> bool:
        return (
            pod is not None
            and _own_selects(item["namespaceSelector"], self._labels_of_namespace(pod))
            and _own_selects(item["podSelector"], oracle._labels(pod))
        )

    def _is_entity(self, name: str, flow: _Flow) -> bool:
        ip, node = flow.peer.ip, self._node_of(flow.peer.ip)
        api = ip in self._apiservers
        match name:
            case "kube-apiserver":
                return api
            case "cluster":
                return flow.peer.pod is not None or node is not None or api
            case "world":
                inside = any(oracle._contains(cidr, ip) for cidr in self._pod_cidrs)
                return flow.peer.pod is None and node is None and not api and not inside
        # What this node makes itself never gets here at ingress: it is not asked about.
        own = flow.direction == "Egress" and node == self._node(oracle._key(flow.subject))
        return node is not None and own == (name == "host")

    def _own_port(self, item: Manifest, peer: Manifest, flow: _Flow) -> bool:
        packet = flow.packet
        if "any" in item:
            return True
        if "icmp" in item:
            return _icmp_matches(item["icmp"], packet)
        if packet.protocol != item["protocol"] or packet.port is None:
            return False
        if "portName" in item:
            pods = (
                flow.direction == "Ingress"
                or "any" in peer
                or "pods" in peer
                or ("cluster" in peer.get("entities", ()))
            )
            named = oracle._named_ports(flow.named_of, item["portName"], packet.protocol)
            return pods and packet.port in named
        if "range" in item:
            return bool(item["range"]["start"] <= packet.port <= item["range"]["end"])
        return bool(item["port"] == packet.port)

    # ---- who is who ------------------------------------------------------------------------

    def _labels_of_namespace(self, pod: Manifest) -> Mapping[str, str]:
        namespace = oracle._namespace(pod)
        return self._namespace_labels.get(namespace, {NAME_LABEL: namespace})

    def _node_of(self, ip: oracle.IPAddress) -> str | None:
        """The node whose own address it is."""
        for name, addresses in self._all_addresses.items():
            if ip in addresses:
                return name
        return None


def _icmp_matches(item: Manifest, packet: Packet) -> bool:
    if packet.protocol != ("ICMP" if item["family"] == "IPv4" else "ICMPv6"):
        return False
    if "any" in item:
        return True
    assert packet.icmp is not None
    kind, code = packet.icmp
    return bool(kind == item["type"] and ("anyCode" in item or code == item["code"]))


def _own_selects(selector: Manifest, labels: Mapping[str, str]) -> bool:
    """`any`, or exactly one of the other two."""
    return "any" in selector or selector_matches(selector, labels)


def _spec(manifest: Manifest) -> Any:
    return manifest["spec"]


def _addresses(of: Mapping[str, Sequence[str]]) -> dict[str, set[oracle.IPAddress]]:
    return {name: {oracle._address(text) for text in texts} for name, texts in of.items()}


def ends(judgement: Judgement) -> Iterator[tuple[Direction, Side]]:
    yield "Egress", judgement.egress
    yield "Ingress", judgement.ingress
