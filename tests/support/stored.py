"""Services and EndpointSlices straight into the etcd of an API server of ours: 10,000 in seconds,
where asking the server for each takes minutes of a small machine's time.

They are as the server would have completed them and kept them, each ClusterIP with the IPAddress
that says whose it is. Nothing checks them: for fillers, whose kind was admitted before.
"""

from __future__ import annotations

import base64
import itertools
import json
import time
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

AT_ONCE = 100
"""etcd takes 128 operations in one transaction."""
TIMEOUT_SECONDS = 60.0

Tree = Mapping[str, Any]


def store(etcd: str, trees: Sequence[Tree]) -> None:
    """What is there under their names is replaced. `etcd`: its URL; `trees`: of `sites.service`,
    each new to the server. OSError."""
    rows = (row for tree in trees for row in _rows(tree))
    while found := list(itertools.islice(rows, AT_ONCE)):
        body = json.dumps({"success": [{"requestPut": put} for put in found]}).encode()
        request = urllib.request.Request(f"{etcd}/v3/kv/txn", body)
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            if not json.load(answer).get("succeeded"):
                raise OSError("etcd refused what was to be stored")


def _rows(tree: Tree) -> Iterator[dict[str, str]]:
    meta = {"uid": str(uuid.uuid4()), "creationTimestamp": _now(), **tree["metadata"]}
    namespace, name = meta["namespace"], meta["name"]
    if tree["kind"] == "EndpointSlice":
        meta["generation"] = 1
        yield _put(f"endpointslices/{namespace}/{name}", {**tree, "metadata": meta})
        return
    spec = {
        "type": "ClusterIP",
        "sessionAffinity": "None",
        "internalTrafficPolicy": "Cluster",
        "ipFamilies": ["IPv4"],
        "ipFamilyPolicy": "SingleStack",
        **tree["spec"],
    }
    service = {**tree, "metadata": meta, "spec": spec, "status": {"loadBalancer": {}}}
    yield _put(f"services/specs/{namespace}/{name}", service)
    yield _put(f"ipaddresses/{spec['clusterIP']}", _address(spec["clusterIP"], namespace, name))


def _address(address: str, namespace: str, name: str) -> Tree:
    labels = {
        "ipaddress.kubernetes.io/ip-family": "IPv4",
        "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io",
    }
    whose = {"group": "", "resource": "services", "namespace": namespace, "name": name}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "IPAddress",
        "metadata": {
            "name": address,
            "uid": str(uuid.uuid4()),
            "creationTimestamp": _now(),
            "labels": labels,
        },
        "spec": {"parentRef": whose},
    }


def _now() -> str:
    """The server takes an old IPAddress away whose Service it has not yet seen, a new one not."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _put(key: str, value: Tree) -> dict[str, str]:
    texts = {"key": f"/registry/{key}", "value": json.dumps(value)}
    return {name: base64.b64encode(text.encode()).decode() for name, text in texts.items()}
