"""install, uninstall and sysdump against a real API server.

No controller and no kubelet is there, so nothing that is installed starts: which is what half of
these tests are about.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import yaml
from support import apiserver as server
from tidegate_cli.cluster import uninstall
from tidegate_cli.cluster.api import Api, Ran, connect
from tidegate_cli.main import main
from tidegate_kube import Client, NotFound, resources

pytestmark = [pytest.mark.apiserver, pytest.mark.slow]

NAMESPACE = "tidegate-system"
ROOT = Path(__file__).parents[2]


@dataclass
class Cluster:
    kubeconfig: Path
    client: Client

    def run(self, *argv: str) -> int:
        return main(["--kubeconfig", str(self.kubeconfig), *argv])

    @property
    def api(self) -> Api:
        return connect(str(self.kubeconfig), None)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with server.running(tmp_path) as api:
        client = api.client()
        try:
            yield Cluster(api.kubeconfig(tmp_path / "config"), client)
        finally:
            client.close()


def created(text: str) -> set[str]:
    return {line.partition(" ")[2] for line in text.splitlines() if line.startswith("created ")}


def test_install_again_and_uninstall(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["install", "--wait", "0", "--image", "registry.test/tidegate:1"]
    assert cluster.run(*argv, "--api-server", "https://10.0.0.1:6443") == 0
    made = created(capsys.readouterr().out)
    assert {
        f"Namespace {NAMESPACE}",
        "CustomResourceDefinition nodestates.tidegate.dev",
        f"DaemonSet {NAMESPACE}/tidegate-loader",
        f"Deployment {NAMESPACE}/tidegate-operator",
    } <= made
    daemon_set = cluster.api.get(f"/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/tidegate-loader")
    spec = daemon_set["spec"]["template"]["spec"]
    images = {c["image"] for c in (*spec["initContainers"], *spec["containers"])}
    assert images == {"registry.test/tidegate:1"}
    data = cluster.client.get(resources.CONFIG_MAPS, "tidegate-config", NAMESPACE)
    assert json.loads(data)["data"]["apiServer"] == "https://10.0.0.1:6443"

    # The same again changes nothing; another image is an upgrade of two objects.
    assert cluster.run(*argv, "--api-server", "https://10.0.0.1:6443") == 0
    said = capsys.readouterr().out
    assert created(said) == set()
    unchanged = [int(line.split()[0]) for line in said.splitlines() if "unchanged" in line]
    assert sum(unchanged) == len(made)
    argv[-1] = "registry.test/tidegate:2"
    assert cluster.run(*argv, "--api-server", "https://10.0.0.1:6443") == 0
    said = capsys.readouterr().out
    assert sorted(line for line in said.splitlines() if line.startswith("configured")) == [
        f"configured DaemonSet {NAMESPACE}/tidegate-loader",
        f"configured Deployment {NAMESPACE}/tidegate-operator",
    ]

    # Of everything that was made, nothing stays but the namespace, which no controller empties.
    assert cluster.run("uninstall", "--yes", "--wait", "5") == 1
    said = capsys.readouterr()
    assert said.err == "tidegate: its namespace is still being deleted\n"
    gone = {line.removeprefix("deleted ") for line in said.out.splitlines() if "deleted" in line}
    assert made - gone == set()
    assert cluster.api.find("/apis/tidegate.dev/v1alpha1") is None
    with pytest.raises(NotFound):
        cluster.client.get(resources.CRDS, "identities.tidegate.dev")


def test_uninstall_where_nothing_is(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster.run("uninstall", "--yes") == 0
    assert capsys.readouterr().out == "Tidegate is gone\n"
    assert cluster.run("uninstall") == 2  # there is nobody to ask
    assert "give --yes" in capsys.readouterr().err


def test_a_node_that_does_not_let_go_stops_the_uninstall(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cluster.run("install", "--wait", "0") == 0
    spec = {"format": 1, "mode": "Enforcing", "endpoints": [], "ruleSets": [], "peerSets": []}
    body = {
        "apiVersion": "tidegate.dev/v1alpha1",
        "kind": "NodeState",
        "metadata": {"name": "node-1"},
        "spec": {**spec, "tables": {}},
    }
    cluster.client.create(resources.NODE_STATES, msgspec.json.encode(body))
    capsys.readouterr()
    assert cluster.run("uninstall", "--yes", "--wait", "1") == 2
    said = capsys.readouterr()
    assert "not detached after 1 seconds: node-1" in said.err
    held = json.loads(cluster.client.get(resources.NODE_STATES, "node-1"))
    assert held["spec"]["mode"] == "Detached", "it was told"
    # The loaders, which have to do it, are still wanted.
    cluster.api.get(f"/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/tidegate-loader")
    assert cluster.run("uninstall", "--yes", "--wait", "5", "--force") == 1
    assert "node-1 was not detached by its loader" in capsys.readouterr().err
    assert cluster.api.find("/apis/tidegate.dev/v1alpha1") is None


@pytest.mark.parametrize(
    ("reason", "digest_of", "generation", "expected"),
    [
        ("nothing reported", None, None, False),
        ("the digest of this spec", "Detached", None, True),
        ("of the one before", "Enforcing", None, False),
        ("seen, and nothing is left", None, 2, True),
        ("not seen yet", None, 1, False),
    ],
)
def test_when_a_node_has_let_go(
    reason: str, digest_of: str | None, generation: int | None, expected: bool
) -> None:
    from tidegate_api import state as api  # noqa: PLC0415

    def spec(mode: str) -> api.NodeStateSpec:
        return api.NodeStateSpec(
            format=1,
            mode=mode,
            endpoints=[],
            rule_sets=[],
            peer_sets=[],
            tables={},  # type: ignore[arg-type]
        )

    ready = api.Condition(
        type="Ready", status="True", reason="r", message="", last_transition_time="t"
    )
    status = api.NodeStateStatus(conditions=[ready])
    if digest_of is not None:
        status = msgspec.structs.replace(status, realised=api.digest(spec(digest_of)))
    if generation is not None:
        status = msgspec.structs.replace(status, observed_generation=generation)
    item = api.NodeState(
        api_version="tidegate.dev/v1alpha1",
        kind="NodeState",
        metadata=api.Meta(name="n", generation=2),
        spec=spec("Detached"),
        status=status,
    )
    assert uninstall.detached(item) is expected, reason


def test_what_is_wrong_is_said(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    """A loader that cannot get its image, one that ends, and an operator that nobody makes."""
    assert cluster.run("install", "--wait", "0") == 0
    for name, node, status in (
        ("loader-a", "node-a", waiting("ImagePullBackOff", "no such image")),
        ("loader-b", "node-b", ended(3)),
        ("loader-c", "node-c", waiting("ContainerCreating", "")),
    ):
        pod(cluster, name, node, status)
    capsys.readouterr()
    assert cluster.run("install", "--wait", "0.1") == 1
    said = capsys.readouterr()
    assert "operator 0/1, loaders 0/1, nodes in force 0/0" in said.out
    assert (
        f"pod {NAMESPACE}/loader-a on node-a: container loader: ImagePullBackOff: no such image"
        in said.err
    )
    assert f"pod {NAMESPACE}/loader-b on node-b: container loader ended with 3" in said.err
    assert "loader-c" not in said.err


def waiting(reason: str, message: str) -> dict[str, object]:
    return {"state": {"waiting": {"reason": reason, "message": message}}}


def ended(code: int) -> dict[str, object]:
    return {"state": {"terminated": {"exitCode": code}}}


def pod(cluster: Cluster, name: str, node: str, status: dict[str, object]) -> None:
    secret = {"name": "PASSWORD", "value": "hunter2"}
    container = {"name": "loader", "image": "tidegate:dev", "env": [secret]}
    body = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/name": "tidegate-loader"}},
        "spec": {"nodeName": node, "containers": [container]},
    }
    made = json.loads(cluster.client.create(resources.PODS, msgspec.json.encode(body), NAMESPACE))
    whole = {"name": "loader", "ready": False, "restartCount": 1, "image": "", "imageID": ""}
    made["status"] = {"phase": "Pending", "containerStatuses": [{**whole, **status}]}
    data = msgspec.json.encode(made)
    cluster.client.update(resources.PODS, name, data, NAMESPACE, subresource="status")


def test_fields_of_another_manager_are_not_taken_over_unasked(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cluster.run("install", "--wait", "0") == 0
    meta = {"name": "tidegate-config", "namespace": NAMESPACE}
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"apiServer": "x"}}
    cluster.client.patch(
        resources.CONFIG_MAPS,
        "tidegate-config",
        msgspec.json.encode(body),
        NAMESPACE,
        kind="apply",
        field_manager="gitops",
        force=True,
    )
    assert cluster.run("install", "--wait", "0") == 2
    said = capsys.readouterr().err
    assert f"ConfigMap {NAMESPACE}/tidegate-config" in said
    assert "gitops" in said
    assert "--force-conflicts" in said
    assert cluster.run("install", "--wait", "0", "--force-conflicts") == 0


def test_kubectl_may_follow_and_go_before(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """`kubectl apply --server-side -k` of the same is no other manager."""
    base = str(ROOT / "manifests/base")
    command = [server.binary("kubectl"), f"--kubeconfig={cluster.kubeconfig}"]
    command += ["apply", "--server-side", "-k", base]
    for _ in range(2):
        assert cluster.run("install", "--wait", "0") == 0
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "created" not in capsys.readouterr().out.partition("unchanged")[2]


@pytest.mark.parametrize(
    ("reason", "text", "said"),
    [
        ("no YAML", "{", "a.yaml: "),
        ("no object", "[1]", "a document is no Kubernetes object"),
        ("nothing", "---\n", "there is no object in the manifests"),
        (
            "a kind that nobody serves",
            "{apiVersion: x.test/v1, kind: Odd, metadata: {name: a}}",
            "does not know Odd of x.test/v1",
        ),
    ],
)
def test_manifests_that_cannot_be_applied(
    reason: str,
    text: str,
    said: str,
    apiserver: server.ApiServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a.yaml").write_text(text)
    config = apiserver.kubeconfig(tmp_path / "config")
    argv = ["--kubeconfig", str(config), "install", "-f", str(tmp_path / "a.yaml")]
    assert main(argv) == 2, reason
    assert said in capsys.readouterr().err


def test_a_sysdump_has_what_is_needed_and_no_secret(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def execute(_api: Api, _namespace: str, name: str, _container: str, argv: list[str]) -> Ran:
        if argv[0] == "cat":
            return Ran(0, '{"node": "node-a"}', "")
        return Ran(0, json.dumps({"asked": argv}), "") if "ct" not in argv else Ran(2, "", "broken")

    monkeypatch.setattr(Api, "execute", execute)
    assert cluster.run("install", "--wait", "0") == 0
    pod(cluster, "loader-a", "node-a", {"ready": True, "state": {"running": {}}})
    spec = {"format": 1, "mode": "Enforcing", "endpoints": [], "ruleSets": [], "peerSets": []}
    state = {"kind": "NodeState", "metadata": {"name": "node-a"}, "spec": {**spec, "tables": {}}}
    state["apiVersion"] = "tidegate.dev/v1alpha1"
    cluster.client.create(resources.NODE_STATES, msgspec.json.encode(state))
    for kind, data in (
        ("Secret", {"stringData": {"k": "hunter2"}}),
        ("ConfigMap", {"data": {"k": "hunter2"}}),
    ):
        body = yaml.safe_dump({"apiVersion": "v1", "kind": kind, "metadata": {"name": "s"}, **data})
        (tmp_path / f"{kind}.yaml").write_text(body)
        path = f"/api/v1/namespaces/{NAMESPACE}/{kind.lower()}s"
        cluster.api.create(path, yaml.safe_load(body))
    for who in ("tidegate.dev/operator", "hunter2"):
        said = {"metadata": {"name": f"e-{len(who)}"}, "type": "Warning", "reason": "NodesSilent"}
        said |= {"reportingController": who, "reportingInstance": "a", "action": "Report"}
        said |= {"note": "silent", "eventTime": "2024-01-01T00:00:00.000000Z"}
        said["regarding"] = {"apiVersion": "v1", "kind": "Node", "name": "node-a"}
        path = "/apis/events.k8s.io/v1/namespaces/default/events"
        cluster.api.create(path, {"apiVersion": "events.k8s.io/v1", "kind": "Event", **said})
    target = tmp_path / "dump.tar.gz"
    capsys.readouterr()
    assert cluster.run("sysdump", "--output-file", str(target)) == 1
    with tarfile.open(target) as archive:
        files = {
            member.name.partition("/")[2]: archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
        }
    assert {
        "versions.json",
        "doctor.txt",
        "troubles.txt",
        "errors.txt",
        "objects/nodestates.json",
        "objects/pods.json",
        "objects/trafficpolicies.json",
        "objects/clusterpolicystatuses.json",
        f"objects/daemonsets.{NAMESPACE}.json",
        f"objects/configmaps.{NAMESPACE}.json",
        "nodes/node-a/endpoint-list.json",
        "nodes/node-a/realised.json",
    } <= files.keys()
    assert b"hunter2" not in b"".join(files.values())
    assert b"ct list: node-a: broken" in files["errors.txt"]
    # That there are no ClusterNetworkPolicies is no lack: nobody has to install their CRD.
    assert b"objects/" not in files["errors.txt"]
    assert json.loads(files["nodes/node-a/lb-list-backends.json"])["asked"][-1] == "--backends"
    (event,) = json.loads(files["objects/events.json"])
    assert (event["regarding"]["name"], event["note"]) == ("node-a", "silent")
    (held,) = json.loads(files["objects/pods.json"])
    assert held["spec"]["nodeName"] == "node-a"
