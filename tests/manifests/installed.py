"""An API server with Tidegate's manifests applied the way users apply them, and who speaks to it.

There are no controllers and no kubelets, so nothing runs: this is about what is admitted.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from manifests.rendered import MANIFESTS, NAMESPACE, ROOT
from support.apiserver import ApiServer, binary, create, running
from tidegate_kube import Access, Client, Forbidden, KubeError, resources

BY_KIND = {
    resource.kind: resource
    for resource in (
        resources.IDENTITIES,
        resources.NODE_STATES,
        resources.RULE_SETS,
        resources.STATE_SLICES,
        resources.POLICY_STATUSES,
        resources.CLUSTER_POLICY_STATUSES,
        resources.TRAFFIC_POLICIES,
    )
}
WAIT_SECONDS = 60.0


@dataclass
class Installed:
    server: ApiServer
    kubeconfig: Path
    applied: str
    """What kubectl said when the base was applied, the first time."""
    clients: list[Client] = field(default_factory=list)

    def kubectl(
        self, *arguments: str, stdin: str = "", check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        return kubectl(self.kubeconfig, *arguments, stdin=stdin, check=check)

    def client(self, access: Access | None = None) -> Client:
        """Of an administrator, or as told; closed with the server."""
        self.clients.append(self.server.client(access))
        return self.clients[-1]

    def account(self, name: str, namespace: str = NAMESPACE) -> Client:
        """As a service account of Tidegate's, with a token that is bound to no pod."""
        return self.client(self.server.account(name, namespace))

    def kubeconfig_of(self, account: str, path: Path) -> Path:
        """For a process that is to run as a service account of Tidegate's."""
        token = self.server.token(account, NAMESPACE)
        cluster = {"server": self.server.url, "certificate-authority": str(self.server.ca)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": account, "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": account}}],
            "current-context": "test",
        }
        path.write_bytes(msgspec.json.encode(config))
        return path

    def loader(self, node: str) -> Client:
        """As the loader of a node: with a token as the kubelet gets it for the pod there."""
        admin = self.client()
        meta = {"name": node}
        create(admin, resources.NODES, {"apiVersion": "v1", "kind": "Node", "metadata": meta})
        account = {"apiVersion": "v1", "kind": "ServiceAccount"}
        account["metadata"] = {"name": "tidegate-loader"}  # type: ignore[assignment]
        create(admin, resources.SERVICE_ACCOUNTS, account, NAMESPACE)
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"tidegate-loader-{node}", "namespace": NAMESPACE},
            "spec": {
                "nodeName": node,
                "serviceAccountName": "tidegate-loader",
                "containers": [{"name": "loader", "image": "tidegate:dev"}],
            },
        }
        made = msgspec.json.decode(create(admin, resources.PODS, pod, NAMESPACE))["metadata"]
        bound = {"kind": "Pod", "apiVersion": "v1", "name": made["name"], "uid": made["uid"]}
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"boundObjectRef": bound},
        }
        answer = admin.create(
            resources.SERVICE_ACCOUNTS,
            msgspec.json.encode(request),
            NAMESPACE,
            name="tidegate-loader",
            subresource="token",
        )
        token = msgspec.json.decode(answer)["status"]["token"]
        return self.client(Access(server=self.server.url, ca=self.server.ca, token=token.encode()))


def kubectl(
    config: Path, *arguments: str, stdin: str = "", check: bool = True
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(binary("kubectl")), f"--kubeconfig={config}", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def eventually(happens: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not happens():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.1)


def identity(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "tidegate.dev/v1alpha1",
        "kind": "Identity",
        "metadata": {"name": name},
        "spec": spec or {"namespace": "default", "labels": {"app": name}},
    }


def node_state(name: str, **spec: Any) -> dict[str, Any]:
    empty = {"endpoints": [], "ruleSets": [], "peerSets": [], "tables": {}}
    return {
        "apiVersion": "tidegate.dev/v1alpha1",
        "kind": "NodeState",
        "metadata": {"name": name},
        "spec": {"format": 1, "mode": "Enforcing", **empty, **spec},
    }


def _policies_in_force(client: Client) -> bool:
    """Admission policies are compiled some time after they are there."""
    probe = msgspec.json.encode(identity("300"))
    try:
        client.create(resources.IDENTITIES, probe)
    except Forbidden:
        return True
    except KubeError:  # the kind itself is not served yet
        return False
    client.delete(resources.IDENTITIES, "300")
    return False


@contextlib.contextmanager
def install(directory: Path) -> Iterator[Installed]:
    """A server of one's own with everything applied; its audit log is `directory`/audit.log."""
    audit = f"--audit-policy-file={ROOT / 'tests' / 'support' / 'audit-policy.yaml'}"
    log = f"--audit-log-path={directory / 'audit.log'}"
    with running(directory, audit, log) as server:
        config = server.kubeconfig(directory / "kubeconfig")
        done = kubectl(
            config,
            *("apply", "--server-side", "--validate=strict"),
            *("-k", str(MANIFESTS / "base")),
            check=False,
        )
        found = Installed(server, config, done.stdout + done.stderr)
        if done.returncode == 0:
            client = found.client()
            eventually(lambda: _policies_in_force(client), "a decimal Identity is denied")
        yield found
        for client in found.clients:
            client.close()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """One for each module: they leave objects behind."""
    with install(tmp_path_factory.mktemp("installed")) as found:
        yield found
