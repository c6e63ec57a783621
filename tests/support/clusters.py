"""Small adversarial clusters: Namespaces, Pods and NetworkPolicies as plain
dicts, ready to be dumped as YAML into a folder.

One generator, two sources of choice: a seeded `random.Random` for campaigns,
hypothesis for cases that shrink. Nothing here knows what a policy means (that
is `support.oracle`) nor how the product reads one; every manifest is one that
an API server would accept.

The product gives pods their addresses (10.244.<node>.0/24, fd00:10:244:<node>::/64),
so CIDRs are drawn around those ranges; `stand_in_addresses` imitates them for
tests that run without the product.
"""

from __future__ import annotations

import copy
import functools
import ipaddress
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from hypothesis import strategies as st
from support.oracle import Address, Cluster, End, Host, Pod

T = TypeVar("T")
Manifest = dict[str, Any]
Manifests = dict[str, list[Manifest]]

MAX_NAMESPACES, MAX_PODS, MAX_POLICIES = 4, 8, 6
NAMESPACES = ["default", "a", "b", "c"]
# Few keys and values, shared by pods and namespaces, so that a selector applied
# to the wrong kind of object shows.
KEYS = ["app", "tier", "example.org/zone"]
VALUES = ["a", "b", "c", ""]
NAME_LABEL = "kubernetes.io/metadata.name"
PROTOCOLS = ["TCP", "UDP", "SCTP"]
PORTS = [80, 81, 443, 53, 1, 65535, 8080, 1023, 1024]
NAMED_PORTS = ["web", "dns"]
NODE_ADDRESSES = ["172.18.0.2", "172.18.0.3", "fc00:f853:ccd:e793::2", "fc00:f853:ccd:e793::3"]
# Nested on purpose; the excepts are drawn from the same list.
CIDRS = [
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.244.0.0/16",
    "10.244.0.0/23",
    "10.244.0.0/24",
    "10.244.1.0/24",
    "10.244.0.0/29",
    "10.244.1.0/29",
    "10.244.0.2/31",
    "10.244.0.2/32",
    "10.244.1.3/32",
    "172.18.0.0/16",
    "172.18.0.2/32",
    "192.0.2.0/24",
    "192.0.2.128/25",
    "192.0.2.200/32",
    "::/0",
    "fd00::/8",
    "fd00:10:244::/48",
    "fd00:10:244::/64",
    "fd00:10:244:1::/64",
    "fd00:10:244::/125",
    "fd00:10:244:1::2/127",
    "fd00:10:244::2/128",
    "fc00:f853:ccd:e793::/64",
    "2001:db8::/32",
    "2001:db8::/33",
    "2001:db8:0:1::/64",
]


class Source(Protocol):
    """Where choices come from. The first option and the lowest number are the
    plainest, so that hypothesis shrinks towards them."""

    def pick(self, options: Sequence[T]) -> T: ...
    def number(self, low: int, high: int) -> int: ...


class RandomSource:
    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self._rng.random() * len(options))]

    def number(self, low: int, high: int) -> int:
        return low + int(self._rng.random() * (high - low + 1))


class _HypothesisSource:
    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self._draw = draw

    def pick(self, options: Sequence[T]) -> T:
        return options[self.number(0, len(options) - 1)]

    def number(self, low: int, high: int) -> int:
        return int(self._draw(st.integers(low, high)))


@dataclass(frozen=True)
class Probe:
    """One question to oracle and product."""

    src: End
    dst: End
    port: int | None
    protocol: str


# ---- what tests call -------------------------------------------------------------


def random_cluster(seed: int) -> Manifests:
    """namespaces, pods and policies; equal seeds give equal clusters."""
    return make_cluster(RandomSource(seed))


def random_sequence(seed: int, events: int) -> list[Manifests]:
    """`events` + 1 successive clusters, each one event away from the last."""
    return make_sequence(RandomSource(seed), events)


@st.composite
def clusters(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Manifests:
    return make_cluster(_HypothesisSource(draw))


@st.composite
def sequences(
    draw: Callable[[st.SearchStrategy[Any]], Any], max_events: int = 8
) -> list[Manifests]:
    source = _HypothesisSource(draw)
    return make_sequence(source, source.number(1, max_events))


def documents(cluster: Manifests) -> list[Manifest]:
    """Every manifest, for `yaml.safe_dump_all`."""
    return [*cluster["namespaces"], *cluster["pods"], *cluster["policies"]]


def stand_in_addresses(cluster: Manifests, nodes: int = 2) -> dict[str, list[str]]:
    """Addresses as the product would give them, round robin over the nodes."""
    addresses: dict[str, list[str]] = {}
    for index, pod in enumerate(cluster["pods"]):
        node, host = index % nodes, 2 + index // nodes
        if pod["spec"].get("hostNetwork"):
            pair = [NODE_ADDRESSES[node], NODE_ADDRESSES[2 + node]]
        else:
            v6 = ipaddress.ip_address(f"fd00:10:244:{node}::{host:x}")
            pair = [f"10.244.{node}.{host}", str(v6)]
        addresses[pod_key(pod)] = pair
    return addresses


def probes(cluster: Cluster, source: Source, count: int) -> list[Probe]:
    """Questions near the edges of what the policies name. `cluster` has
    `addresses`; at least one end of each probe is a pod. Empty without pods."""
    keys = [pod_key(pod).split("/") for pod in cluster["pods"]]
    pods = [Pod(namespace, name) for namespace, name in keys]
    if not pods:
        return []
    ports, edges = _near_ports(cluster), _near_addresses(cluster)
    return [_probe(source, pods, ports, edges) for _ in range(count)]


def pod_key(pod: Manifest) -> str:
    return f"{pod['metadata'].get('namespace', 'default')}/{pod['metadata']['name']}"


# ---- probes ----------------------------------------------------------------------


def _probe(source: Source, pods: list[Pod], ports: list[int], edges: dict[int, list[str]]) -> Probe:
    family = source.pick([4, 6])
    pod = source.pick(pods)
    here = Pod(pod.namespace, pod.name, family)
    there: End
    kind = source.number(0, 9)
    if kind < 6:
        other = source.pick(pods)
        there = Pod(other.namespace, other.name, family)
    elif kind < 9:
        there = Address(source.pick(edges[family]))
    else:
        there = Host(source.pick([ip for ip in NODE_ADDRESSES if (":" in ip) == (family == 6)]))
    protocol = source.pick(["TCP", "TCP", "UDP", "SCTP", "ICMP" if family == 4 else "ICMPv6"])
    port = source.pick(ports) if protocol in PROTOCOLS else None
    if isinstance(there, Host) or source.number(0, 1):
        return Probe(there, here, port, protocol)
    return Probe(here, there, port, protocol)


def _near_ports(cluster: Cluster) -> list[int]:
    """Every port that a policy names and both neighbours."""
    named = {80}
    for item in _find(cluster["policies"], "ports"):
        for entry in item or ():
            named |= {v for v in (entry.get("port"), entry.get("endPort")) if isinstance(v, int)}
    near = {port + step for port in named for step in (-1, 0, 1)}
    return sorted(port for port in near if 1 <= port <= 65535)


def _near_addresses(cluster: Cluster) -> dict[int, list[str]]:
    """First and last address of every CIDR named, and their neighbours outside;
    by family. None is a pod's: those are asked about as pods."""
    found = {
        4: {ipaddress.ip_address("192.0.2.1"), ipaddress.ip_address(NODE_ADDRESSES[0])},
        6: {ipaddress.ip_address("2001:db8::1"), ipaddress.ip_address(NODE_ADDRESSES[2])},
    }
    for block in _find(cluster["policies"], "ipBlock"):
        if block is None:
            continue
        for cidr in [block["cidr"], *(block.get("except") or [])]:
            found[ipaddress.ip_network(cidr).version] |= _edges(cidr)
    taken = {ip for pair in cluster["addresses"].values() for ip in pair}
    # Nobody sends from or to the addresses below 1.0.0.0, multicast or loopback.
    return {
        family: sorted(
            str(ip)
            for ip in ips
            if str(ip) not in taken
            and not (ip.is_multicast or ip.is_loopback or ip.is_unspecified)
            and not (ip.is_reserved and family == 4)
            and not (family == 4 and int(ip) < 1 << 24)
            and not (family == 6 and int(ip) >> 96 == 0)
        )
        for family, ips in found.items()
    }


@functools.cache
def _edges(cidr: str) -> frozenset[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    network = ipaddress.ip_network(cidr)
    first, last = int(network[0]), int(network[-1])
    kind = type(network[0])
    return frozenset(
        kind(value)
        for value in (first - 1, first, first + 1, last, last + 1)
        if 0 <= value < 1 << network.max_prefixlen
    )


def _find(value: Any, field: str) -> Iterator[Any]:
    """Every value of `field` at any depth."""
    if isinstance(value, dict):
        if field in value:
            yield value[field]
        for inner in value.values():
            yield from _find(inner, field)
    elif isinstance(value, list):
        for inner in value:
            yield from _find(inner, field)


# ---- clusters --------------------------------------------------------------------


def make_cluster(source: Source) -> Manifests:
    names = NAMESPACES[: source.number(1, MAX_NAMESPACES)]
    cluster: Manifests = {
        "namespaces": [
            # A folder may use a namespace that it does not define.
            _namespace(source, name)
            for name in names
            if not _chance(source, 10)
        ],
        "pods": [],
        "policies": [],
    }
    for _ in range(source.number(1, MAX_PODS)):
        _add_pod(source, cluster)
    for _ in range(source.number(0, MAX_POLICIES)):
        _add_policy(source, cluster)
    return cluster


def _namespace(source: Source, name: str) -> Manifest:
    metadata: Manifest = {"name": name}
    _set_labels(source, metadata, _some_labels(source))
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}


def _add_pod(source: Source, cluster: Manifests) -> None:
    namespace = source.pick(_namespaces(cluster))
    taken = {pod_key(pod) for pod in cluster["pods"]}
    name = next(f"p{n}" for n in range(len(taken) + 1) if f"{namespace}/p{n}" not in taken)
    metadata: Manifest = {"name": name, "namespace": namespace}
    if namespace == "default" and _chance(source, 50):
        del metadata["namespace"]
    _set_labels(source, metadata, _pod_labels(source))
    spec: Manifest = {"containers": [{"name": "c", "image": "example.org/app"}]}
    if _chance(source, 40):
        name_of = {"TCP": "web", "UDP": "dns"}
        spec["containers"][0]["ports"] = [
            {"containerPort": source.pick(PORTS), "protocol": protocol, "name": name_of[protocol]}
            for protocol in ("TCP", "UDP")
        ]
    if _chance(source, 15):
        spec["hostNetwork"] = True
    cluster["pods"].append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})


def _namespaces(cluster: Manifests) -> list[str]:
    """Those defined, and two that may be missing."""
    return sorted({n["metadata"]["name"] for n in cluster["namespaces"]} | {"default", "a"})


def _some_labels(source: Source) -> dict[str, str]:
    return {key: source.pick(VALUES) for key in KEYS if _chance(source, 50)}


def _pod_labels(source: Source) -> dict[str, str]:
    labels = _some_labels(source)
    if _chance(source, 10):  # a pod that pretends to be of another namespace
        labels[NAME_LABEL] = source.pick(NAMESPACES)
    return labels


def _set_labels(source: Source, metadata: Manifest, labels: dict[str, str]) -> None:
    metadata.pop("labels", None)
    if labels or _chance(source, 30):
        metadata["labels"] = labels or source.pick([{}, None])


def _chance(source: Source, percent: int) -> bool:
    return source.number(0, 99) >= 100 - percent


# ---- policies --------------------------------------------------------------------


def _add_policy(source: Source, cluster: Manifests) -> None:
    namespace = source.pick(_namespaces(cluster))
    taken = {(p["metadata"].get("namespace"), p["metadata"]["name"]) for p in cluster["policies"]}
    name = next(f"n{n}" for n in range(len(taken) + 1) if (namespace, f"n{n}") not in taken)
    cluster["policies"].append(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": namespace},
            "spec": _policy_spec(source),
        }
    )


def _policy_spec(source: Source) -> Manifest:
    spec: Manifest = {"podSelector": {} if _chance(source, 40) else _selector(source)}
    if _chance(source, 5):
        del spec["podSelector"]
    types = source.pick(["absent", "null", "empty", "Ingress", "Egress", "both", "both"])
    if types == "null":
        spec["policyTypes"] = None
    elif types == "empty":
        spec["policyTypes"] = []
    elif types != "absent":
        spec["policyTypes"] = ["Ingress", "Egress"] if types == "both" else [types]
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        shape = source.pick(["rules", "rules", "rules", "absent", "null", "empty", "any"])
        if shape == "rules":
            spec[direction] = [_rule(source, peers) for _ in range(source.number(1, 3))]
        elif shape == "any":
            spec[direction] = [{}]
        elif shape != "absent":
            spec[direction] = None if shape == "null" else []
    return spec


def _rule(source: Source, peers: str) -> Manifest:
    rule: Manifest = {}
    for field, make in ((peers, _peer), ("ports", _port)):
        shape = source.pick(["items", "items", "items", "absent", "null", "empty"])
        if shape == "items":
            rule[field] = [make(source) for _ in range(source.number(1, 3))]
        elif shape != "absent":
            rule[field] = None if shape == "null" else []
    return rule


def _peer(source: Source) -> Manifest:
    shape = source.pick(["pod", "namespace", "both", "block", "block"])
    if shape == "block":
        return {"ipBlock": _block(source)}
    peer: Manifest = {}
    if shape in ("pod", "both"):
        peer["podSelector"] = _selector(source)
    if shape in ("namespace", "both"):
        peer["namespaceSelector"] = _selector(source, namespaces=True)
    if shape != "both" and _chance(source, 10):  # a null pointer is an absent one
        peer["namespaceSelector" if shape == "pod" else "podSelector"] = None
    return peer


def _block(source: Source) -> Manifest:
    cidr = source.pick(CIDRS)
    block: Manifest = {"cidr": cidr}
    inside = _strictly_inside(cidr)
    if inside and _chance(source, 60):
        block["except"] = [source.pick(inside) for _ in range(source.number(1, 3))]
    elif _chance(source, 20):
        block["except"] = source.pick([[], None])
    return block


@functools.cache
def _strictly_inside(cidr: str) -> tuple[str, ...]:
    """The API wants an except within its cidr, and longer."""
    outer = ipaddress.ip_network(cidr)
    inside = []
    for text in CIDRS:
        inner = ipaddress.ip_network(text)
        if inner.version == outer.version and inner != outer and inner.subnet_of(outer):  # type: ignore[arg-type]
            inside.append(text)
    return tuple(inside)


def _port(source: Source) -> Manifest:
    item: Manifest = {}
    protocol = source.pick(["absent", "null", *PROTOCOLS, "TCP"])
    if protocol != "absent":
        item["protocol"] = None if protocol == "null" else protocol
    shape = source.pick(["number"] * 6 + ["absent", "null", "named", "range"])
    if shape in ("number", "range"):
        item["port"] = source.pick(PORTS)
    elif shape == "named":
        item["port"] = source.pick(NAMED_PORTS)
    elif shape == "null":
        item["port"] = None
    if shape == "range":
        item["endPort"] = min(65535, item["port"] + source.pick([0, 1, 1000]))
    elif _chance(source, 5):
        item["endPort"] = None
    return item


def _selector(source: Source, namespaces: bool = False) -> Manifest:
    selector: Manifest = {}
    shape = source.pick(["labels", "expressions", "both", "empty", "nulls"])
    if shape in ("labels", "both"):
        if namespaces and _chance(source, 40):
            selector["matchLabels"] = {NAME_LABEL: source.pick(NAMESPACES)}
        else:
            selector["matchLabels"] = {source.pick(KEYS): source.pick(VALUES)}
    if shape in ("expressions", "both"):
        keys = [*KEYS, NAME_LABEL] if namespaces else KEYS
        selector["matchExpressions"] = [
            _expression(source, keys) for _ in range(source.number(1, 2))
        ]
    if shape == "nulls":
        selector = {
            "matchLabels": source.pick([None, {}]),
            "matchExpressions": source.pick([None, []]),
        }
    return selector


def _expression(source: Source, keys: Sequence[str]) -> Manifest:
    key = source.pick(keys)
    operator = source.pick(["In", "NotIn", "Exists", "DoesNotExist"])
    item: Manifest = {"key": key, "operator": operator}
    if operator in ("In", "NotIn"):
        values = NAMESPACES if key == NAME_LABEL else VALUES
        item["values"] = [source.pick(values) for _ in range(source.number(1, 2))]
    elif _chance(source, 30):
        item["values"] = source.pick([[], None])
    return item


# ---- events ----------------------------------------------------------------------


def make_sequence(source: Source, events: int) -> list[Manifests]:
    states = [make_cluster(source)]
    for _ in range(events):
        state = copy.deepcopy(states[-1])
        source.pick(EVENTS)(source, state)
        states.append(state)
    return states


def _remove(kind: str) -> Callable[[Source, Manifests], None]:
    def event(source: Source, cluster: Manifests) -> None:
        if cluster[kind]:
            cluster[kind].remove(source.pick(cluster[kind]))

    return event


def _bounded_add(
    add: Callable[[Source, Manifests], None], kind: str, limit: int
) -> Callable[[Source, Manifests], None]:
    def event(source: Source, cluster: Manifests) -> None:
        if len(cluster[kind]) >= limit:
            cluster[kind].remove(source.pick(cluster[kind]))
        add(source, cluster)

    return event


def _relabel_pod(source: Source, cluster: Manifests) -> None:
    if cluster["pods"]:
        _set_labels(source, source.pick(cluster["pods"])["metadata"], _pod_labels(source))


def _edit_policy(source: Source, cluster: Manifests) -> None:
    if cluster["policies"]:
        source.pick(cluster["policies"])["spec"] = _policy_spec(source)


def _relabel_namespace(source: Source, cluster: Manifests) -> None:
    if cluster["namespaces"]:
        _set_labels(source, source.pick(cluster["namespaces"])["metadata"], _some_labels(source))


def _restart_pod(source: Source, cluster: Manifests) -> None:
    """Same name, other labels and ports: an address may come back as another."""
    if cluster["pods"]:
        cluster["pods"].remove(source.pick(cluster["pods"]))
        _add_pod(source, cluster)


EVENTS: list[Callable[[Source, Manifests], None]] = [
    _relabel_pod,
    _bounded_add(_add_pod, "pods", MAX_PODS),
    _remove("pods"),
    _restart_pod,
    _bounded_add(_add_policy, "policies", MAX_POLICIES),
    _edit_policy,
    _remove("policies"),
    _relabel_namespace,
]
