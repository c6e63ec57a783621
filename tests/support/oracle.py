"""The verdict oracle: NetworkPolicy v1, read literally.

Each function below is one sentence of the API reference (the field comments of
`networking.k8s.io/v1` and of `LabelSelector`) or of the concept page, applied
to manifests as YAML gives them: plain dicts and lists. It is the second
implementation that judges the compiler, so no Tidegate package may be imported
here, nothing may be precompiled, and speed is no argument.

A cluster is a mapping:

    namespaces  Namespace manifests; one that is missing has only its name's label
    pods        Pod manifests
    policies    NetworkPolicy manifests, valid ones: what an API server accepts
    addresses   "namespace/name" of a pod -> its addresses, at most one a family;
                a host-network pod has its node's
    nodes       optional: "namespace/name" of a pod -> its node's name, where
                `spec.nodeName` does not say

Null and absent are the same everywhere, and so are a null and an empty list
(DESIGN invariant 9). `{}` and an absent selector are not.

Errors: `OracleError` for ends that the cluster does not know.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Manifest = Mapping[str, Any]
Cluster = Mapping[str, Any]
Direction = Literal["Ingress", "Egress"]
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

NAME_LABEL = "kubernetes.io/metadata.name"


class OracleError(Exception):
    """The question names a pod, address or family that the cluster lacks."""


@dataclass(frozen=True, order=True)
class PolicyRef:
    namespace: str
    name: str


@dataclass(frozen=True, order=True)
class RuleRef:
    """`spec.ingress[index]` or `spec.egress[index]` of one policy."""

    namespace: str
    name: str
    index: int


@dataclass(frozen=True, order=True)
class Pod:
    """A pod as source or destination. `family` 4 or 6 says which of its
    addresses the packet carries; 0: the other end's, IPv4 if neither says."""

    namespace: str
    name: str
    family: int = 0

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, order=True)
class Address:
    """An external or a node's address, in text form. The address of a pod that
    is not on the host's network means that pod."""

    ip: str


@dataclass(frozen=True, order=True)
class Host:
    """A process on the node where the other end runs, using the address `ip`."""

    ip: str


End = Pod | Address | Host


@dataclass(frozen=True)
class Verdict:
    """`*_by`: every rule that allows in that direction. `*_isolated_by`: every
    policy that isolates that end; empty means the end's policy allows.
    `exempt`: why policy was not asked, "" if it was."""

    allowed: bool
    egress_by: frozenset[RuleRef] = frozenset()
    ingress_by: frozenset[RuleRef] = frozenset()
    egress_isolated_by: frozenset[PolicyRef] = frozenset()
    ingress_isolated_by: frozenset[PolicyRef] = frozenset()
    exempt: Literal["", "self", "host"] = ""


@dataclass(frozen=True)
class _Party:
    """One end resolved: its address and, if policy knows it as a pod, the pod."""

    ip: IPAddress
    pod: Manifest | None


@dataclass(frozen=True)
class _Traffic:
    """What one direction of policy looks at."""

    peer: _Party
    destination: _Party
    port: int | None
    protocol: str


def verdict(
    cluster: Cluster,
    src: End,
    dst: End,
    port: int | None,
    protocol: str,
) -> Verdict:
    """May `src` open a flow to `dst`? `port` is the destination's, None for
    protocols without ports; `protocol` is "TCP", "UDP", "SCTP", "ICMP" or any
    other name."""
    oracle = Oracle(cluster)
    return oracle.verdict(src, dst, port, protocol)


class Oracle:
    """`verdict` for many questions about one cluster, which must not change."""

    def __init__(self, cluster: Cluster) -> None:
        self._pods = {_key(pod): pod for pod in _items(cluster, "pods")}
        self._policies = _items(cluster, "policies")
        self._nodes: Mapping[str, str] = cluster.get("nodes") or {}
        self._namespace_labels = {
            _name(namespace): _labels(namespace) | {NAME_LABEL: _name(namespace)}
            for namespace in _items(cluster, "namespaces")
        }
        self._addresses = {
            key: [_address(text) for text in texts]
            for key, texts in (cluster.get("addresses") or {}).items()
        }
        self._owner = {
            address: self._pods[key]
            for key, addresses in self._addresses.items()
            if key in self._pods and not _on_host_network(self._pods[key])
            for address in addresses
        }

    def verdict(self, src: End, dst: End, port: int | None, protocol: str) -> Verdict:
        source, destination = self._parties(src, dst)
        # "A pod cannot block access to itself."
        if source.pod is not None and source.pod is destination.pod:
            return Verdict(True, exempt="self")
        egress = _Traffic(destination, destination, port, protocol)
        ingress = _Traffic(source, destination, port, protocol)
        egress_isolated_by, egress_by = self._direction("Egress", source, egress)
        ingress_isolated_by, ingress_by = self._direction("Ingress", destination, ingress)
        # Ingress is allowed "if the traffic source is the pod's local node".
        # The field comments give egress no such exception.
        from_host = destination.pod is not None and self._is_local_node(src, dst)
        # "Both the egress policy on the source pod and the ingress policy on
        # the destination pod need to allow the traffic."
        allowed = (not egress_isolated_by or bool(egress_by)) and (
            from_host or not ingress_isolated_by or bool(ingress_by)
        )
        return Verdict(
            allowed,
            egress_by,
            ingress_by,
            egress_isolated_by,
            ingress_isolated_by,
            "host" if from_host else "",
        )

    # ---- who is who --------------------------------------------------------

    def _parties(self, src: End, dst: End) -> tuple[_Party, _Party]:
        family = _family(src) or _family(dst) or 4
        if (_family(src) or family) != family or (_family(dst) or family) != family:
            raise OracleError(f"{src} and {dst} are of different address families")
        return self._party(src, family), self._party(dst, family)

    def _party(self, end: End, family: int) -> _Party:
        if isinstance(end, Pod):
            manifest = self._pods.get(end.key)
            if manifest is None:
                raise OracleError(f"no pod {end.key}")
            for address in self._addresses.get(end.key, ()):
                if address.version == family:
                    return _Party(address, None if _on_host_network(manifest) else manifest)
            raise OracleError(f"pod {end.key} has no IPv{family} address")
        address = _address(end.ip)
        if isinstance(end, Host) and address in self._owner:
            raise OracleError(f"{end.ip} is a pod's address, not a node's")
        return _Party(address, self._owner.get(address))

    def _is_local_node(self, src: End, dst: End) -> bool:
        if isinstance(src, Host):
            return True
        if not (isinstance(src, Pod) and _on_host_network(self._pods[src.key])):
            return False
        if isinstance(dst, Address):
            dst = self._pod_end(_address(dst.ip))
        if not isinstance(dst, Pod):
            return False
        node = self._node(src.key)
        return node != "" and node == self._node(dst.key)

    def _pod_end(self, address: IPAddress) -> End:
        pod = self._owner.get(address)
        return Address(str(address)) if pod is None else Pod(_namespace(pod), _name(pod))

    def _node(self, key: str) -> str:
        spec = self._pods[key].get("spec") or {}
        return spec.get("nodeName") or self._nodes.get(key) or ""

    # ---- policies ----------------------------------------------------------

    def _direction(
        self, direction: Direction, subject: _Party, traffic: _Traffic
    ) -> tuple[frozenset[PolicyRef], frozenset[RuleRef]]:
        """The policies that isolate the subject, and the rules that allow."""
        isolated_by: set[PolicyRef] = set()
        allowed_by: set[RuleRef] = set()
        if subject.pod is None:
            return frozenset(), frozenset()
        for policy in self._policies:
            if direction not in _policy_types(policy) or not _selects(policy, subject.pod):
                continue
            isolated_by.add(PolicyRef(_namespace(policy), _name(policy)))
            for index, rule in enumerate(_rules(policy, direction)):
                if self._allows(policy, direction, rule, traffic):
                    allowed_by.add(RuleRef(_namespace(policy), _name(policy), index))
        return frozenset(isolated_by), frozenset(allowed_by)

    def _allows(
        self, policy: Manifest, direction: Direction, rule: Manifest, traffic: _Traffic
    ) -> bool:
        """The traffic must match both `ports` and `from` (or `to`); each, if
        empty or missing, matches all."""
        ports = _items(rule, "ports")
        peers = _items(rule, "from" if direction == "Ingress" else "to")
        if not peers:
            return not ports or any(self._port_matches(item, traffic) for item in ports)
        for peer in peers:
            if not self._peer_matches(policy, peer, traffic.peer):
                continue
            # Only pods have ports with names; a block is addresses, whoever has them.
            nameless = direction == "Egress" and peer.get("ipBlock") is not None
            if not ports or any(self._port_matches(item, traffic, nameless) for item in ports):
                return True
        return False

    def _peer_matches(self, policy: Manifest, item: Manifest, peer: _Party) -> bool:
        block = item.get("ipBlock")
        if block is not None:
            return _block_matches(block, peer.ip)
        pod_selector, namespace_selector = item.get("podSelector"), item.get("namespaceSelector")
        if peer.pod is None or (pod_selector is None and namespace_selector is None):
            return False
        namespace = _namespace(peer.pod)
        if namespace_selector is None:
            in_namespace = namespace == _namespace(policy)
        else:
            labels = self._namespace_labels.get(namespace, {NAME_LABEL: namespace})
            in_namespace = selector_matches(namespace_selector, labels)
        if not in_namespace:
            return False
        return pod_selector is None or selector_matches(pod_selector, _labels(peer.pod))

    def _port_matches(self, item: Manifest, traffic: _Traffic, nameless: bool = False) -> bool:
        """`protocol` defaults to TCP; without `port`, every port of it."""
        port, end_port = item.get("port"), item.get("endPort")
        if nameless and isinstance(port, str):
            return False
        if (item.get("protocol") or "TCP") != traffic.protocol:
            return False
        if port is None:
            return True
        if traffic.port is None:
            return False
        if isinstance(port, str):
            return traffic.port in _named_ports(traffic.destination.pod, port, traffic.protocol)
        return bool(port <= traffic.port <= (port if end_port is None else end_port))


# ---- sentences that need no cluster ------------------------------------------


def selector_matches(selector: Manifest, labels: Mapping[str, str]) -> bool:
    """LabelSelector: `matchLabels` and `matchExpressions` are ANDed; an empty
    selector matches everything."""
    return all(
        key in labels and labels[key] == value
        for key, value in (selector.get("matchLabels") or {}).items()
    ) and all(_requirement(item, labels) for item in _items(selector, "matchExpressions"))


def _requirement(item: Manifest, labels: Mapping[str, str]) -> bool:
    key, values = item["key"], item.get("values") or []
    match item["operator"]:
        case "In":
            return key in labels and labels[key] in values
        case "NotIn":  # also matches where the key is absent
            return key not in labels or labels[key] not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
    raise OracleError(f"no such operator: {item['operator']!r}")


def _policy_types(policy: Manifest) -> Sequence[str]:
    """Unspecified: always Ingress, and Egress if there is any egress rule."""
    types = _items(policy.get("spec") or {}, "policyTypes")
    if types:
        return types
    return ["Ingress", "Egress"] if _rules(policy, "Egress") else ["Ingress"]


def _rules(policy: Manifest, direction: Direction) -> Sequence[Manifest]:
    spec = policy.get("spec") or {}
    # A null item of a list of structs is the empty struct to the API's decoder.
    return [rule or {} for rule in _items(spec, direction.lower())]


def _selects(policy: Manifest, pod: Manifest) -> bool:
    """A policy applies to pods of its own namespace; `spec.podSelector`, if
    not specified, is the empty selector."""
    if _namespace(policy) != _namespace(pod):
        return False
    return selector_matches((policy.get("spec") or {}).get("podSelector") or {}, _labels(pod))


def _block_matches(block: Manifest, ip: IPAddress) -> bool:
    """In `cidr` and in none of `except`; an address is only in networks of its
    own family. Whose address it is does not matter."""
    return _contains(block["cidr"], ip) and not any(
        _contains(text, ip) for text in _items(block, "except")
    )


def _contains(cidr: str, ip: IPAddress) -> bool:
    network = _network(cidr)
    return network.version == ip.version and ip in network


def _named_ports(pod: Manifest | None, name: str, protocol: str) -> Iterator[int]:
    if pod is None:
        return
    for container in _items(pod.get("spec") or {}, "containers"):
        for port in _items(container, "ports"):
            if port.get("name") == name and (port.get("protocol") or "TCP") == protocol:
                yield port["containerPort"]


# ---- manifests -----------------------------------------------------------------


def _items(manifest: Manifest, field: str) -> Sequence[Any]:
    return manifest.get(field) or []


def _name(manifest: Manifest) -> str:
    return str(manifest["metadata"]["name"])


def _namespace(manifest: Manifest) -> str:
    return manifest["metadata"].get("namespace") or "default"


def _key(manifest: Manifest) -> str:
    return f"{_namespace(manifest)}/{_name(manifest)}"


def _labels(manifest: Manifest) -> dict[str, str]:
    return manifest["metadata"].get("labels") or {}


def _on_host_network(pod: Manifest) -> bool:
    return bool((pod.get("spec") or {}).get("hostNetwork"))


def _family(end: End) -> int:
    return end.family if isinstance(end, Pod) else _address(end.ip).version


@functools.cache
def _address(text: str) -> IPAddress:
    return ipaddress.ip_address(text)


@functools.cache
def _network(text: str) -> IPNetwork:
    return ipaddress.ip_network(text)
