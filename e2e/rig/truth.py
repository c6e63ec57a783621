"""The truth table's town (`support/truth_town.py`) on the cluster: its objects and pods, and a host
outside on the nodes' network, with many addresses.

What asks is this process, from the networks of the pods and nodes that the table names."""

from __future__ import annotations

import contextlib
import ipaddress
import json
from collections.abc import Iterator
from pathlib import Path

import yaml
from support import truth, truth_town, upstream
from support.asking import Places
from support.truth import ip

from kind import cluster
from kind.run import run
from rig import api, asking, pods

SPACE = "truth"
SPACES = (SPACE, "blue")
API_SERVICE = "10.96.0.1"
OUTSIDE = "tge-outside"
"""The host's network namespace, and its link at the bridge."""
UNSPACED = ("Namespace", "Node", "Identity", "ClusterNetworkPolicy", "CustomResourceDefinition")
Objects = dict[tuple[str, str], pods.Manifest]
"""(kind, namespace/name) → what was applied"""


class Truth(truth.Truth):
    """node-1 and node-2 are the workers; `control` is the third node, and `api` is its Service."""

    # Those without requests have the smallest share of one: on a busy machine they were seen to be
    # silent for ten seconds, whatever is allowed. That each flow goes on is asserted even so.
    starves = True

    def __init__(self) -> None:
        super().__init__(Places({}))
        control, *workers = sorted(cluster.nodes(), key=lambda name: "worker" in name)
        self.nodes = {"control": control, "node-1": workers[0], "node-2": workers[1]}
        self._saved: dict[str, Objects] = {}
        self._networks = _networks()
        self._containers: dict[str, str] = {}
        for name, real in self.nodes.items():
            pid = run("docker", "inspect", "-f", "{{.State.Pid}}", real).strip()
            self.places.paths[name] = f"/proc/{pid}/ns/net"
        for item in api.items("nodes"):
            name = next(n for n, real in self.nodes.items() if real == item["metadata"]["name"])
            found = [a["address"] for a in item["status"]["addresses"] if a["type"] == "InternalIP"]
            self.addresses[name] = _pair(found)
            self.cidrs[name] = _pair(item["spec"]["podCIDRs"])
        for name, pair in truth_town.OUTSIDE.items():
            self.addresses[name] = _pair([self._here(address) for address in pair])
            self.places.paths[name] = f"/run/netns/{OUTSIDE}"
        self.addresses |= {"vip": truth_town.VIP, "api": (API_SERVICE, "")}

    def learn(self, *wanted: str) -> bool:
        self.pods = {p.name: p for p in pods.running().values() if p.namespace in SPACES}
        for name, pod in self.pods.items():
            # Looked for once: that takes a while.
            if not pod.host_network and self._containers.get(name) != pod.container:
                self.places.paths[name] = f"/proc/{asking.pid(pod)}/ns/net"
                self.addresses[name] = _pair(list(pod.addresses))
                self._containers[name] = pod.container
        return self.pods.keys() >= set(wanted)

    def save(self, name: str, text: str) -> None:
        """What is the same as before is not applied again; what is there no more goes last."""
        found = self._objects(text)
        before = self._saved.get(name, {})
        changed = [item for key, item in found.items() if before.get(key) != item]
        gone = [item for key, item in before.items() if key not in found]
        self._saved[name] = found
        # What an Identity says is said once.
        again = [i for i in changed if i["kind"] == "Identity" and (i["kind"], _key(i)) in before]
        if again:
            _delete(again)
        if changed:
            pods.apply(*changed)
        if gone:
            _delete(gone[::-1])

    def forget(self) -> None:
        """All of it, but for nodes."""
        gone = [item for found in self._saved.values() for item in found.values()]
        self._saved.clear()
        pods.apply(*({**item, "metadata": {"name": item["metadata"]["name"]}}
                     for item in gone if item["kind"] == "Node"))  # fmt: skip
        _delete([item for item in gone if item["kind"] in ("Identity", "ClusterNetworkPolicy")])
        # Dozens of pods take their time, and nobody else uses these names.
        pods.remove_namespaces(*SPACES, wait=False)

    def _objects(self, text: str) -> Objects:
        items = [self._placed(d) for d in yaml.safe_load_all(self._here(text)) if d]
        # A namespace must be there before what lies in it.
        items.sort(key=lambda item: item["kind"] != "Namespace")
        return {(item["kind"], _key(item)): item for item in items}

    def _placed(self, item: pods.Manifest) -> pods.Manifest:
        """On this cluster's nodes, in a namespace of its own."""
        if item["kind"] not in UNSPACED:
            item["metadata"] = {"namespace": SPACE} | item["metadata"]
            if item["metadata"]["namespace"] == "default":
                item["metadata"]["namespace"] = SPACE
        if item["kind"] == "Node":
            item["metadata"]["name"] = self.nodes[item["metadata"]["name"]]
        if item["kind"] == "Pod":
            item["spec"]["nodeName"] = self.nodes[item["spec"]["nodeName"]]
            item = pods.serving(item, ())
        return item

    def _here(self, text: str) -> str:
        """With the addresses of this cluster's network of nodes."""
        for theirs, ours in self._networks:
            text = text.replace(theirs, ours)
        return text


def _networks() -> list[tuple[str, str]]:
    """How addresses of the town's network of nodes begin, and those of Docker's."""
    found = json.loads(run("docker", "network", "inspect", "kind"))[0]["IPAM"]["Config"]
    four, six = (ipaddress.ip_network(n) for n in _pair([config["Subnet"] for config in found]))
    assert (four.prefixlen, six.prefixlen) == (16, 64), (four, six)
    return [
        (str(ipaddress.ip_network(theirs)[0]).rpartition(mark)[0] + mark, ours + mark)
        for theirs, ours, mark in (
            (truth_town.NETWORK[0], str(four[0]).rpartition(".")[0], "."),
            (truth_town.NETWORK[1], str(six[0]).removesuffix(":"), ":"),
        )
    ]


def _pair(found: list[str]) -> tuple[str, str]:
    """IPv4 first."""
    four, six = sorted(found, key=lambda text: ":" in text)
    return four, six


def _key(item: pods.Manifest) -> str:
    metadata = item["metadata"]
    return f"{metadata.get('namespace', '')}/{metadata['name']}"


def _delete(items: list[pods.Manifest]) -> None:
    api.delete(*items, seconds=pods.GONE_SECONDS)


@contextlib.contextmanager
def town() -> Iterator[Truth]:
    """Its pods live and answer, and no policy is there yet; everything is gone afterwards."""
    pods.remove_namespaces(*SPACES)
    crd = upstream.cluster_policy_crd()
    name = crd["metadata"]["name"]
    _leave()  # what a run left that was killed
    ip("netns", "add", OUTSIDE)
    try:
        pods.apply(crd, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE}})
        api.wait(
            lambda: api.is_true(api.find("customresourcedefinitions", name) or {}, "Established"),
            f"{name} is served", 60,
        )  # fmt: skip
        made = Truth()
        try:
            made.inhabit()
            _join()
            truth.furnish(made, OUTSIDE)
            pods.wait_ready(*SPACES)
            made.learn()
            with truth.answered(made):
                yield made
        finally:
            made.forget()
    finally:
        _delete([crd])
        _leave()


def _join() -> None:
    """At the bridge that the nodes are at, too."""
    network = json.loads(run("docker", "network", "inspect", "kind"))[0]["Id"]
    ip("link", "add", OUTSIDE, "type", "veth", "peer", "eth0", "netns", OUTSIDE)
    ip("link", "set", OUTSIDE, "master", f"br-{network[:12]}", "up")


def _leave() -> None:
    """The link by itself: whoever has a copy of this machine's mounts keeps a namespace alive."""
    if Path("/sys/class/net", OUTSIDE).exists():
        ip("link", "del", OUTSIDE)
    if Path("/run/netns", OUTSIDE).exists():
        ip("netns", "del", OUTSIDE)
