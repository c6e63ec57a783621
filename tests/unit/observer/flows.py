"""Flows for tests, a keyword for what matters."""

from __future__ import annotations

from typing import Any

from tidegate_observer.directory import pod_labels
from tidegate_observer.flow import Decision, End, Flow, Kind, Policy, Service, address_bytes

SECOND = 10**9


def pod(name: str, namespace: str = "shop", identity: int = 300, **labels: str) -> End:
    words = pod_labels(namespace, labels or {"app": name.partition("-")[0]})
    return End(identity, 7, namespace, name, words, name.partition("-")[0], "Deployment")


WEB, DB = pod("web-1", identity=300), pod("db-0", "data", 301)
WORLD = End(2, labels=("reserved:world",))
APISERVER = End(3, labels=("reserved:kube-apiserver",))
DENY = Decision((Policy("NetworkPolicy", "data", "default-deny"),), -1)
ALLOW = Decision((Policy("NetworkPolicy", "data", "allow-web"),), 0, 2)


def flow(**fields: Any) -> Flow:
    """A TCP SYN from shop/web-1 to data/db-0, denied there by default-deny."""
    values: dict[str, Any] = {
        "node": "node-1",
        "time": 1_000 * SECOND,
        "kind": Kind.DENIED,
        "reason": 133,
        "direction": 0,
        "source_address": "10.244.0.5",
        "destination_address": "10.244.1.2",
        "source_port": 40000,
        "destination_port": 5432,
        "protocol": 6,
        "tcp_flags": 2,
        "interface": 3,
        "interface_name": "eth0",
        "source": WEB,
        "destination": DB,
        "ingress": DENY,
    }
    values |= fields
    for name in ("source_address", "destination_address"):
        values[name] = address_bytes(values[name])
    values["kind"] = int(values["kind"])
    return Flow(**values)


def started(**fields: Any) -> Flow:
    return flow(**{"kind": Kind.START, "reason": 0, "ingress": ALLOW} | fields)


SHOP_WEB = Service("shop", "web")
