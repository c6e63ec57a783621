"""Small adversarial clusters with policies of every kind; on top of `support.clusters`.

What the product makes of nodes (their addresses, who serves the API) is not known here: whoever
uses a cluster adds it under the keys that `support.oracle_tiers` reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from support import clusters
from support.clusters import (
    KEYS,
    NAMED_PORTS,
    NAMESPACES,
    NODE_ADDRESSES,
    PORTS,
    PROTOCOLS,
    VALUES,
    Manifest,
    Manifests,
    RandomSource,
    Source,
)
from support.oracle import Address, End, Host, Pod
from support.oracle_tiers import Packet

MAX_CLUSTER_POLICIES, MAX_OWN_POLICIES = 4, 3
POOLS = ["a", "b"]
OUTSIDE = {"office": ["192.0.2.0/25", "2001:db8::/33"], "partner": ["192.0.2.128/26"]}
ENTITIES = ["world", "host", "remote-node", "kube-apiserver", "cluster"]
ICMP_TYPES = [(8, 0), (3, 1), (3, 3), (128, 0), (0, 0), (255, 255)]


@dataclass(frozen=True)
class Question:
    src: End
    dst: End
    packet: Packet


def random_cluster(seed: int) -> Manifests:
    source = RandomSource(seed)
    cluster = clusters.make_cluster(source)
    for pod in cluster["pods"]:
        if clusters._chance(source, 30):
            pod["spec"]["containers"].append(_other_container(source))
    cluster["node_objects"] = [_node(source, name) for name in ("node-1", "node-2")]
    cluster["identities"] = [
        {
            "apiVersion": "tidegate.dev/v1alpha1",
            "kind": "Identity",
            "metadata": {"name": name},
            "spec": {"cidrs": cidrs},
        }
        for name, cidrs in OUTSIDE.items()
    ]
    cluster["cluster_policies"] = [
        _cluster_policy(source, f"c{n}") for n in range(source.number(0, MAX_CLUSTER_POLICIES))
    ]
    cluster["traffic_policies"] = [
        _own_policy(source, f"t{n}", source.pick(clusters._namespaces(cluster)))
        for n in range(source.number(0, MAX_OWN_POLICIES))
    ]
    return cluster


def documents(cluster: Manifests) -> list[Manifest]:
    return [
        *clusters.documents(cluster),
        *cluster["node_objects"],
        *cluster["identities"],
        *cluster["cluster_policies"],
        *cluster["traffic_policies"],
    ]


def questions(cluster: Any, source: Source, count: int) -> list[Question]:
    """Near the edges of what the policies name. `cluster` has `addresses`; at least one end of
    each is a pod. Empty without pods."""
    keys = [clusters.pod_key(pod).split("/") for pod in cluster["pods"]]
    pods = [Pod(namespace, name) for namespace, name in keys]
    if not pods:
        return []
    every = {"policies": cluster, "addresses": cluster["addresses"]}
    ports = sorted({*clusters._near_ports(every), *_ports_near(cluster)})
    edges = clusters._near_addresses(every)
    for cidr in _cidrs(cluster):
        version = 6 if ":" in cidr else 4
        edges[version] = sorted({*edges[version], *_usable(cidr, cluster)})
    return [_question(source, pods, ports, edges) for _ in range(count)]


def _question(
    source: Source, pods: list[Pod], ports: list[int], edges: dict[int, list[str]]
) -> Question:
    probe = clusters._probe(source, pods, ports, edges)
    packet = Packet(probe.protocol, probe.port)
    if probe.protocol in ("ICMP", "ICMPv6"):
        packet = Packet(probe.protocol, icmp=source.pick(ICMP_TYPES))
    src, dst = probe.src, probe.dst
    if clusters._chance(source, 12) and isinstance(src, Pod):
        family = src.family or 4
        node = source.pick([ip for ip in NODE_ADDRESSES if (":" in ip) == (family == 6)])
        dst = Address(node)
    if isinstance(dst, Host):
        src, dst = dst, src
    return Question(src, dst, packet)


def _ports_near(cluster: Any) -> set[int]:
    found = {
        value
        for field in ("number", "start", "end", "containerPort", "port")
        for value in clusters._find(cluster, field)
        if isinstance(value, int)
    }
    return {port + step for port in found for step in (-1, 0, 1) if 1 <= port + step <= 65535}


def _cidrs(cluster: Any) -> set[str]:
    networks = {text for item in clusters._find(cluster, "networks") for text in item or ()}
    blocks = {block["cidr"] for item in clusters._find(cluster, "cidrs") for block in item
              if isinstance(block, dict)}  # fmt: skip
    excepts = {text for item in clusters._find(cluster, "except") for text in item or ()}
    outside = {text for cidrs in OUTSIDE.values() for text in cidrs}
    return networks | blocks | excepts | outside


def _usable(cidr: str, cluster: Any) -> set[str]:
    block = {"policies": [{"ipBlock": {"cidr": cidr}}], "addresses": cluster["addresses"]}
    return set(clusters._near_addresses(block)[6 if ":" in cidr else 4])


# ---- what there is ---------------------------------------------------------------------------


def _node(source: Source, name: str) -> Manifest:
    labels = {"pool": source.pick(POOLS)} if clusters._chance(source, 70) else {}
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}


def _other_container(source: Source) -> Manifest:
    """The names of the first container's ports, for other protocols than there."""
    ports = [
        {"containerPort": source.pick(PORTS), "protocol": protocol, "name": name}
        for name, protocol in (("web", "UDP"), ("dns", "TCP"))
    ]
    return {"name": "d", "image": "example.org/other", "ports": ports}


# ---- ClusterNetworkPolicy --------------------------------------------------------------------


def _cluster_policy(source: Source, name: str) -> Manifest:
    spec: Manifest = {
        "tier": source.pick(["Admin", "Admin", "Baseline"]),
        # Few of them: equal ones are ordered by name.
        "priority": source.pick([0, 1, 1, 1000]),
        "subject": _pods_of_cluster(source),
    }
    for direction in ("ingress", "egress"):
        if clusters._chance(source, 75):
            count = source.number(0, 3)
            spec[direction] = [_cluster_rule(source, direction) for _ in range(count)]
    return {
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": {"name": name},
        "spec": spec,
    }


def _pods_of_cluster(source: Source) -> Manifest:
    if clusters._chance(source, 50):
        return {"namespaces": _selector(source, namespaces=True)}
    pods: Manifest = {"podSelector": _selector(source)}
    if clusters._chance(source, 60):
        pods["namespaceSelector"] = _selector(source, namespaces=True)
    return {"pods": pods}


def _selector(source: Source, namespaces: bool = False) -> Manifest:
    if clusters._chance(source, 30):
        return {}
    return clusters._selector(source, namespaces)


def _cluster_rule(source: Source, direction: str) -> Manifest:
    action = source.pick(["Accept", "Deny", "Pass"])
    rule: Manifest = {"action": action}
    side = "from" if direction == "ingress" else "to"
    outside = direction == "egress" and clusters._chance(source, 50)
    rule[side] = [
        _egress_peer(source, action) if outside else _pods_of_cluster(source)
        for _ in range(source.number(1, 2))
    ]
    if clusters._chance(source, 60):
        rule["protocols"] = [_protocol(source, not outside) for _ in range(source.number(1, 2))]
    return rule


def _egress_peer(source: Source, action: str) -> Manifest:
    shape = source.pick(["nodes", "networks", "networks", "names"])
    if shape == "nodes":
        empty = clusters._chance(source, 30)
        return {"nodes": {} if empty else {"matchLabels": {"pool": source.pick(POOLS)}}}
    if shape == "names" and action == "Accept":
        return {"domainNames": ["*.example.com"]}
    return {"networks": sorted({source.pick(clusters.CIDRS) for _ in range(source.number(1, 3))})}


def _protocol(source: Source, named: bool) -> Manifest:
    if named and clusters._chance(source, 25):
        return {"destinationNamedPort": source.pick(NAMED_PORTS)}
    port = source.pick(PORTS)
    match: Manifest = {"number": port}
    if clusters._chance(source, 40) and port < 65535:
        match = {"range": {"start": port, "end": min(65535, port + source.pick([1, 9, 1000]))}}
    return {source.pick(["tcp", "udp", "sctp"]): {"destinationPort": match}}


# ---- TrafficPolicy -----------------------------------------------------------------------------


def _own_policy(source: Source, name: str, namespace: str) -> Manifest:
    spec: Manifest = {
        "subject": {"podSelector": _own_selector(source)},
        "isolates": source.pick([[], ["Ingress"], ["Egress"], ["Ingress", "Egress"]]),
        "mode": source.pick(["Enforce", "Enforce", "Audit"]),
    }
    for direction in ("ingress", "egress"):
        if clusters._chance(source, 80):
            spec[direction] = [_own_rule(source) for _ in range(source.number(1, 3))]
    return {
        "apiVersion": "tidegate.dev/v1alpha1",
        "kind": "TrafficPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


def _own_selector(source: Source, namespaces: bool = False) -> Manifest:
    shape = source.pick(["any", "labels", "expressions"])
    if shape == "any":
        return {"any": True}
    if shape == "labels":
        if namespaces and clusters._chance(source, 50):
            return {"matchLabels": {clusters.NAME_LABEL: source.pick(NAMESPACES)}}
        return {"matchLabels": {source.pick(KEYS): source.pick(VALUES)}}
    return {
        "matchExpressions": [
            {key: value for key, value in clusters._expression(source, KEYS).items() if value}
            for _ in range(source.number(1, 2))
        ]
    }


def _own_rule(source: Source) -> Manifest:
    rule: Manifest = {
        "action": source.pick(["Allow", "Deny"]),
        "peers": [_own_peer(source) for _ in range(source.number(1, 2))],
        "ports": [_own_port(source) for _ in range(source.number(1, 2))],
    }
    if clusters._chance(source, 20):
        rule["log"] = True
    return rule


def _own_peer(source: Source) -> Manifest:
    shape = source.pick(["any", "pods", "pods", "entities", "entities", "cidrs", "cidrs", "id"])
    match shape:
        case "any":
            return {"any": True}
        case "pods":
            spaces, pods = _own_selector(source, namespaces=True), _own_selector(source)
            return {"pods": {"namespaceSelector": spaces, "podSelector": pods}}
        case "entities":
            count = source.number(1, 2)
            return {"entities": sorted({source.pick(ENTITIES) for _ in range(count)})}
        case "id":
            return {"identity": source.pick([*OUTSIDE, "nobody"])}
    blocks = []
    for _ in range(source.number(1, 2)):
        cidr = source.pick(clusters.CIDRS)
        inside = clusters._strictly_inside(cidr)
        count = source.number(0, 2) if inside else 0
        blocks.append({"cidr": cidr, "except": [source.pick(inside) for _ in range(count)]})
    return {"cidrs": blocks}


def _own_port(source: Source) -> Manifest:
    shape = source.pick(["any", "port", "port", "range", "name", "icmp", "icmp"])
    match shape:
        case "any":
            return {"any": True}
        case "port":
            return {"protocol": source.pick(PROTOCOLS), "port": source.pick(PORTS)}
        case "range":
            first = source.pick(PORTS)
            last = min(65535, first + source.pick([0, 1, 1000]))
            return {"protocol": source.pick(PROTOCOLS), "range": {"start": first, "end": last}}
        case "name":
            return {"protocol": source.pick(["TCP", "UDP"]), "portName": source.pick(NAMED_PORTS)}
    icmp: Manifest = {"family": source.pick(["IPv4", "IPv6"])}
    kind, code = source.pick(ICMP_TYPES)
    match source.pick(["any", "type", "code"]):
        case "any":
            icmp["any"] = True
        case "type":
            icmp |= {"type": kind, "anyCode": True}
        case _:
            icmp |= {"type": kind, "code": code}
    return {"icmp": icmp}
