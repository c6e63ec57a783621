"""A cluster of kind: one control plane, two workers, no kube-proxy, and the plainest of networks.

The network is the CNI project's ptp with host-local, a range for each node, and static routes. No
DaemonSet is part of it: what runs in the cluster is Kubernetes, CoreDNS, and what a test brings."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from kind import daemon, golang, node, settings
from kind.run import Failed, attempt, run, say

NAME = "tidegate-e2e"
WORKERS = 2
# IPv4, then IPv6.
POD_RANGES = ("10.244.0.0/16", "fd00:10:244::/56")
SERVICE_RANGES = ("10.96.0.0/16", "fd00:10:96::/112")
READY_SECONDS = 120
POLL_SECONDS = 0.2
MADE_OF = "/kind/made-of"
AUDIT_POLICY = Path(__file__).parents[2] / "tests" / "support" / "audit-policy.yaml"
POLICY_ON_NODE = "/kind/audit-policy.yaml"
AUDIT_LOG = "/var/log/tidegate-audit/audit.log"
CNI_FILE = "/etc/cni/net.d/10-ptp.conflist"
# Restarted with the node, before the kubelet starts pods.
ROUTES_UNIT = """[Unit]
Description=Routes to the pods of other nodes
Before=kubelet.service
[Service]
Type=oneshot
ExecStart=/kind/cni-routes.sh /kind/pod-ranges {node} {ranges}
[Install]
WantedBy=multi-user.target
"""


def kubeconfig() -> Path:
    return settings.cache() / f"{NAME}.kubeconfig"


def kind(*arguments: str | Path) -> str:
    return run(settings.binaries() / "kind", *arguments)


def kubectl(*arguments: str | Path, stdin: str = "") -> str:
    """What kubectl prints. Raises Failed with what it says of an error."""
    return run(
        settings.binaries() / "kubectl", "--kubeconfig", kubeconfig(), *arguments, stdin=stdin
    )


def attempt_kubectl(*arguments: str) -> subprocess.CompletedProcess[str]:
    """kubectl, ended with whatever status."""
    return attempt(settings.binaries() / "kubectl", "--kubeconfig", kubeconfig(), *arguments)


def nodes() -> list[str]:
    """The nodes' names, which are those of their containers; [] where there is no cluster."""
    listed = run("docker", "ps", "-a", "--filter", f"label=io.x-k8s.kind.cluster={NAME}",
                 "--format", "{{.Names}}")  # fmt: skip
    return sorted(listed.split())


def control_plane() -> str:
    return next(name for name in nodes() if name.endswith("control-plane"))


def server_port() -> int:
    """Where this machine reaches the API server, at 127.0.0.1."""
    server = kubectl("config", "view", "-o", "jsonpath={.clusters[0].cluster.server}")
    return int(server.rpartition(":")[2])


def is_up() -> bool:
    """Whether the cluster is there and its API server answers."""
    ready = ("--request-timeout=5s", "get", "--raw", "/readyz")
    return bool(nodes()) and attempt_kubectl(*ready).returncode == 0


def up() -> None:
    """Makes the cluster unless one made of the same is up. Raises Failed; what was begun is then
    removed."""
    daemon.ensure()
    golang.ensure(golang.EVERYTHING)
    image = node.ensure()
    content = _content(image)
    if is_up() and attempt("docker", "exec", nodes()[0], "cat", MADE_OF).stdout == content:
        return
    delete()
    try:
        _create(image)
        _network()
        _write(nodes()[0], MADE_OF, content)
    except BaseException:
        delete()
        raise


def delete() -> None:
    """Removes the cluster, if there is one."""
    if nodes():
        kind("delete", "cluster", "--name", NAME, "--kubeconfig", kubeconfig())
    kubeconfig().unlink(missing_ok=True)


def down() -> None:
    """Removes the cluster, then stops our Docker daemon. Raises Failed where a trace is left."""
    if daemon.answers():
        delete()
    daemon.stop()


def load(*images: str) -> None:
    """Brings images of the Docker daemon into every node."""
    kind("load", "docker-image", "--name", NAME, *images)


def inside(name: str, *command: str, stdin: str = "") -> str:
    """What a command prints that runs on the node."""
    return run("docker", "exec", *(["-i"] if stdin else []), name, *command, stdin=stdin)


def configuration() -> dict[str, Any]:
    """What kind is asked for."""
    kubelet: dict[str, Any] = {
        "kind": "KubeletConfiguration",
        # Tests kill the same container again and again.
        "crashLoopBackOff": {"maxContainerRestartPeriod": "2s"},
        "featureGates": {"KubeletCrashLoopBackOffMax": True},
    }
    if not Path("/sys/fs/cgroup/cgroup.controllers").exists():
        # Kubernetes refuses cgroup v1 unless asked.
        kubelet["failCgroupV1"] = False
    return {
        "kind": "Cluster",
        "apiVersion": "kind.x-k8s.io/v1alpha4",
        "name": NAME,
        "networking": {
            "disableDefaultCNI": True,
            "kubeProxyMode": "none",
            "ipFamily": "dual",
            "podSubnet": ",".join(POD_RANGES),
            "serviceSubnet": ",".join(SERVICE_RANGES),
        },
        "nodes": [
            {
                "role": "control-plane",
                "extraMounts": [
                    {
                        "hostPath": str(AUDIT_POLICY),
                        "containerPath": POLICY_ON_NODE,
                        "readOnly": True,
                    }
                ],
            },
            *({"role": "worker"} for _ in range(WORKERS)),
        ],
        "kubeadmConfigPatches": [json.dumps(kubelet), json.dumps(_audited())],
    }


def _audited() -> dict[str, Any]:
    """The API server keeps what Tidegate asks it for, which tests compare with its permissions."""
    directory = AUDIT_LOG.rpartition("/")[0]
    arguments = {
        "audit-policy-file": POLICY_ON_NODE,
        "audit-log-path": AUDIT_LOG,
        "audit-log-maxsize": "1000",  # megabytes: never cut
    }
    volumes = (
        ("audit-policy", POLICY_ON_NODE, "File"),
        ("audit-log", directory, "DirectoryOrCreate"),
    )
    return {
        "kind": "ClusterConfiguration",
        "apiServer": {
            "extraArgs": [{"name": n, "value": v} for n, v in arguments.items()],
            "extraVolumes": [
                {"name": n, "hostPath": path, "mountPath": path, "pathType": kind}
                for n, path, kind in volumes
            ],
        },
    }


def _content(image: str) -> str:
    """Changes with whatever decides how the cluster is."""
    parts = [image, json.dumps(configuration()), (settings.HERE / "cni-routes.sh").read_text()]
    parts += [(settings.HERE / "cluster.py").read_text(), AUDIT_POLICY.read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _create(image: str) -> None:
    say(f"creating the cluster {NAME}: 1 control plane, {WORKERS} workers, no kube-proxy")
    run(
        settings.binaries() / "kind", "create", "cluster", "--image", image,
        "--kubeconfig", kubeconfig(), "--config", "-",
        stdin=json.dumps(configuration()), env={"KIND_EXPERIMENTAL_PROVIDER": "docker"},
    )  # fmt: skip
    os.chmod(kubeconfig(), 0o600)


def _network() -> None:
    """Gives every node its part of the network, and waits until all are Ready."""
    ranges = _pod_ranges()
    lines = "".join(f"{name} {' '.join(pods)}\n" for name, pods in ranges.items())
    script = (settings.HERE / "cni-routes.sh").read_text()
    for name, pods in ranges.items():
        _write(name, "/kind/pod-ranges", lines)
        _write(name, "/kind/cni-routes.sh", script)
        inside(name, "chmod", "755", "/kind/cni-routes.sh")
        unit = ROUTES_UNIT.format(node=name, ranges=" ".join((*POD_RANGES, *SERVICE_RANGES)))
        _write(name, "/etc/systemd/system/cni-routes.service", unit)
        inside(name, "systemctl", "-q", "enable", "--now", "cni-routes.service")
        _write(name, CNI_FILE, json.dumps(_conflist(pods), indent=2))
    kubectl("wait", "--for=condition=Ready", "node", "--all", f"--timeout={READY_SECONDS}s")
    say("all nodes are Ready")


def _pod_ranges() -> dict[str, list[str]]:
    """Node → the ranges of its pods, IPv4 first, once every node has them."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        items = json.loads(kubectl("get", "nodes", "-o", "json"))["items"]
        found = {i["metadata"]["name"]: i["spec"].get("podCIDRs", []) for i in items}
        if len(found) == 1 + WORKERS and all(found.values()):
            return {name: sorted(ranges, key=lambda r: ":" in r) for name, ranges in found.items()}
        if time.monotonic() > deadline:
            raise Failed(f"not every node has ranges for its pods: {found}")
        time.sleep(POLL_SECONDS)


def _conflist(pods: list[str]) -> dict[str, Any]:
    ipam = {
        "type": "host-local",
        # Gone with a restart, as the pods are.
        "dataDir": "/run/cni-ipam-state",
        "ranges": [[{"subnet": subnet}] for subnet in pods],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    }
    return {
        "cniVersion": "1.0.0",
        "name": "ptp",
        "plugins": [
            {"type": "ptp", "ipMasq": False, "mtu": daemon.uplink_mtu(), "ipam": ipam},
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }


def _write(name: str, path: str, text: str) -> None:
    inside(name, "sh", "-c", 'mkdir -p "${1%/*}" && cat > "$1"', "sh", path, stdin=text)
