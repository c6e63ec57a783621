"""Where nodes and pods lie on this machine: names of namespaces, cgroups and
interfaces, from a run directory's id. Pure."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from tidegate_cli.standalone import netns
from tidegate_cli.standalone.rundir import Node, Pod, RunDir, short_name

# A file name holds 255 bytes; `ip netns` should still be readable.
_MAX_NAME = 100
_IFNAME_HASH_DIGITS = 11


def place_node(
    run_dir: RunDir, cgroup: Path, *, name: str, addresses: list[str], pod_cidrs: list[str]
) -> Node:
    return Node(
        name=name,
        addresses=addresses,
        pod_cidrs=pod_cidrs,
        netns=str(netns.path(run_dir.netns_prefix + short_name(name, _MAX_NAME))),
        cgroup=str(cgroup / name),
    )


def place_pod(run_dir: RunDir, node: Node, pod: Pod) -> Pod:
    """`pod` with its place filled in. `_` is in no Kubernetes name, so that pods'
    namespaces never meet those of nodes."""
    if pod.host_network:
        cgroup = Path(node.cgroup, "host", pod.uid)
        return msgspec.structs.replace(pod, netns=node.netns, cgroup=str(cgroup), ifname="")
    name = short_name(f"{pod.namespace}_{pod.name}", _MAX_NAME)
    digest = hashlib.sha256(f"{run_dir.id}|{pod.uid}".encode()).hexdigest()
    return msgspec.structs.replace(
        pod,
        netns=str(netns.path(run_dir.netns_prefix + name)),
        cgroup=str(Path(node.cgroup, pod.uid)),
        ifname=f"veth{digest[:_IFNAME_HASH_DIGITS]}",
    )
