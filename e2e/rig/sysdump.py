"""What one wants to read after a failure, as files: objects, logs, the nodes from inside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from kind import cluster
from kind.run import Failed
from rig.install import NAMESPACE

OBJECTS = {
    "pods.txt": ("pods", "-A", "-o", "wide"),
    "nodes.yaml": ("nodes", "-o", "yaml"),
    "events.txt": ("events", "-A", "--sort-by=.lastTimestamp"),
    "tidegate.yaml": ("identities,nodestates,rulesets,stateslices", "-o", "yaml"),
    "policystatuses.yaml": ("policystatuses", "-A", "-o", "yaml"),
    "policies.yaml": ("networkpolicies", "-A", "-o", "yaml"),
    "services.yaml": ("services,endpointslices", "-A", "-o", "yaml"),
    "workloads.yaml": ("daemonsets,deployments,pods", "-n", NAMESPACE, "-o", "yaml"),
    "crds.txt": ("crds",),
}
LOGS = ("tidegate-operator", "tidegate-loader")
ON_NODES = {
    "network.txt": "ip addr; ip route; cat /etc/cni/net.d/*; iptables-save",
    "bpf.txt": "mount | grep -E 'bpf|cgroup'; find /sys/fs/bpf | sort",
    "state.txt": "find /var/lib/tidegate -type f | sort; "
    "for f in /var/lib/tidegate/nodes/*/realised.json; do echo $f; cat $f; done",
    "kubelet.txt": "journalctl -u kubelet -n 300 --no-pager",
    "containerd.txt": "journalctl -u containerd -n 300 --no-pager",
}


def collect(directory: Path) -> None:
    """Writes all that can be had; what cannot is said in its file."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, arguments in OBJECTS.items():
        with _into(directory / name) as write:
            write.append(cluster.kubectl("get", *arguments))
    for name in LOGS:
        for previous in ("false", "true"):
            with _into(directory / f"{name}{'.previous' * (previous == 'true')}.log") as write:
                write.append(
                    cluster.kubectl(
                        "logs", "-n", NAMESPACE, "-l", f"app.kubernetes.io/name={name}",
                        "--all-containers", "--prefix", "--tail=-1", f"--previous={previous}",
                    )
                )  # fmt: skip
    for node in cluster.nodes():
        for name, script in ON_NODES.items():
            with _into(directory / node / name) as write:
                write.append(cluster.inside(node, "sh", "-c", f"{{ {script}; }} 2>&1 || true"))


@contextlib.contextmanager
def _into(path: Path) -> Iterator[list[str]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    parts: list[str] = []
    try:
        yield parts
    except Failed as error:
        parts.append(str(error))
    path.write_text("\n".join(parts))
