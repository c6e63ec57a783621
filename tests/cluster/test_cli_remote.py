"""The command line against a cluster: the same answers as on the nodes themselves.

The API server is real, and so are the kernels: two nodes of `tidegate up`, whose objects are put
into the API. Only the exec is not: there is no kubelet here, so what it would run in the loader's
pod runs in the node's network namespace instead, told where that node's state is.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec
import pytest
from cluster.test_cli_cluster import cluster
from support import apiserver as server
from support.waiting import until
from tidegate_api.state import Identity, NodeState
from tidegate_cli.cluster.api import Api, Ran
from tidegate_cli.cluster.state import KINDS
from tidegate_cli.main import main
from tidegate_cli.objects import RunObjects
from tidegate_kube import Client, Resource, resources

__all__ = ["cluster"]
pytestmark = [pytest.mark.cluster, pytest.mark.apiserver, pytest.mark.slow]

NAMESPACE = "tidegate-system"
LOCAL = (
    "import sys; from pathlib import Path; from tidegate_cli import main, target\n"
    "target.LOCAL_RUN_DIR, target.LOCAL_PIN_DIR = map(Path, sys.argv[1:3])\n"
    "sys.exit(main.main(sys.argv[3:]))\n"
)
LOADER = {
    "apiVersion": "v1",
    "kind": "Pod",
    "spec": {"containers": [{"name": "loader", "image": "tidegate:dev"}]},
}


@dataclass
class Remote:
    """A cluster as the command line sees it."""

    run: RunObjects
    kubeconfig: Path
    client: Client
    directory: Path
    commands: list[tuple[str, list[str]]]
    """What was run on which node."""

    def execute(
        self, _api: Api, _namespace: str, pod: str, _container: str, argv: list[str]
    ) -> Ran:
        node = pod.removeprefix("tidegate-loader-")
        self.commands.append((node, argv))
        assert argv[:2] == ["tidegate", "--local"]
        command = ["nsenter", f"--net={self.run.place(node).netns}", sys.executable, "-c", LOCAL]
        command += [str(self.directory / node), str(self.run.pin_dir(node)), *argv[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return Ran(done.returncode, done.stdout, done.stderr)

    def mirror(self, node: str) -> None:
        """The node's own run directory, as its loader keeps it: of NodeStates only its own, and
        no identities."""
        own, whole = self.directory / node, self.run.run_dir
        (own / "objects/nodestates").mkdir(parents=True)
        (own / "nodes").mkdir()
        for name in ("rulesets", "stateslices"):
            (own / "objects" / name).symlink_to(whole / "objects" / name)
        state = f"objects/nodestates/{node}.json"
        (own / state).symlink_to(whole / state)
        (own / "nodes" / node).symlink_to(whole / "nodes" / node)


def put(client: Client, resource: Resource, body: dict[str, object], status: object = None) -> None:
    """Creates an object, and what its status is."""
    meta = cast("dict[str, str]", body["metadata"])
    namespace = meta.get("namespace", NAMESPACE) if resource.namespaced else ""
    made = json.loads(client.create(resource, msgspec.json.encode(body), namespace))
    if status is not None:
        made["status"] = msgspec.to_builtins(status)
        name = str(made["metadata"]["name"])
        data = msgspec.json.encode(made)
        client.update(resource, name, data, namespace, subresource="status")


@pytest.fixture(scope="module")
def remote(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    directory = tmp_path_factory.mktemp("remote")
    run = RunObjects(cluster)
    by_kind = {kind: resource for resource, kind in KINDS.items()}
    with server.running(tmp_path_factory.mktemp("api")) as api:
        client = api.client()
        server.install_crds(client)
        put(client, resources.NAMESPACES, {"metadata": {"name": NAMESPACE}})
        for name in {pod.namespace for pod in run.pods()}:
            put(client, resources.NAMESPACES, {"metadata": {"name": name}})
        for pod in run.pods():
            meta = {"name": pod.name, "namespace": pod.namespace, "labels": pod.labels}
            addresses = [{"ip": text} for text in pod.addresses]
            body = {**LOADER, "metadata": meta}
            put(client, resources.PODS, body, {"podIPs": addresses, "podIP": pod.addresses[0]})
        sets = run.label_sets()
        for item in run.all():
            body = msgspec.to_builtins(item)
            body.pop("status", None)
            held = run.realised(item.metadata.name) if isinstance(item, NodeState) else None
            status: object = held.status if held else None
            if isinstance(item, Identity):
                status = {"labelSets": sets.get(int(item.metadata.name), 0)}
            put(client, by_kind[type(item)], body, status)
        found = Remote(run, api.kubeconfig(directory / "config"), client, directory, [])
        for node in run.nodes():
            labels = {"app.kubernetes.io/name": "tidegate-loader"}
            meta = {"name": f"tidegate-loader-{node}", "labels": labels}
            spec = {**LOADER["spec"], "nodeName": node}  # type: ignore[dict-item]
            running = {"containerStatuses": [status_of("loader")], "phase": "Running"}
            put(client, resources.PODS, {**LOADER, "metadata": meta, "spec": spec}, running)
            found.mirror(node)
        try:
            yield found
        finally:
            client.close()


def status_of(name: str) -> dict[str, object]:
    state = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    image = {"image": "tidegate:dev", "imageID": ""}
    return {"name": name, "ready": True, "restartCount": 0, **image, "state": state}


@pytest.fixture(autouse=True)
def no_kubelet(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    remote.commands.clear()
    monkeypatch.setattr(Api, "execute", lambda *arguments: remote.execute(*arguments))


TIMES = re.compile(r"(expires|LastSeen)=\d+s|expired|\d+(\.\d+)? +\d+(\.\d+)?$", re.MULTILINE)
"""What goes on between two questions."""


def both(
    remote: Remote, capsys: pytest.CaptureFixture[str], *argv: str
) -> tuple[tuple[int, str], tuple[int, str]]:
    """(exit code, output) of a command in the run directory, and in the cluster."""
    found = []
    for flags in (["--run-dir", str(remote.run.run_dir)], ["--kubeconfig", str(remote.kubeconfig)]):
        capsys.readouterr()
        code = main([*flags, *argv])
        found.append((code, capsys.readouterr().out))
    return found[0], found[1]


@pytest.mark.parametrize(
    "argv",
    [
        ["identity", "list"],
        ["endpoint", "list"],
        ["endpoint", "list", "--node", "node-1"],
        ["policy", "get"],
        ["policy", "get", "a/web-2"],
        ["policy", "get", "client", "-n"],
        ["lb", "list"],
        ["lb", "list", "--frontends"],
        ["lb", "list", "--backends", "--node", "node-2"],
        ["ipcache", "list"],
        ["explain", "--from", "a/client", "--to", "a/web-2", "--port", "8080"],
        ["explain", "--from", "a/client", "--to", "svc/a/web", "--port", "80"],
        ["explain", "--from", "a/client", "--to", "svc/a/nobody", "--port", "80"],
        ["explain", "--from", "b/closed", "--to", "a/other", "--icmp"],
        ["explain", "--from", "a/client", "--to", "8.8.8.8", "--port", "53/UDP"],
        ["explain", "--from", "a/other", "--to", "a/client", "--port", "9/SCTP", "--family", "6"],
        ["status"],
        ["status", "-v", "--node", "node-2"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("form", ["table", "json"])
def test_a_cluster_says_what_its_nodes_say(
    argv: list[str], form: str, remote: Remote, capsys: pytest.CaptureFixture[str]
) -> None:
    (code, out), (far_code, far_out) = both(remote, capsys, "-o", form, *argv)
    assert code < 2
    assert out
    if argv[0] == "status":  # the cluster's has its operator too
        far_out = far_out.removeprefix("operator: 0 of 0 ready, no leader\n")
        out = out.partition("\n\n1 problem with the input")[0]
        if form == "json":
            far, near = json.loads(far_out), json.loads(out)
            assert far.pop("operator") == {"replicas": 0, "ready": 0, "leader": ""}
            assert [len(report.pop("problems")) for report in (far, near)] == [0, 1]
            assert (far_code, far) == (code, near)
            return
        out, far_out = out.rstrip(), far_out.rstrip()
    if argv[0] == "policy":  # paths are the nodes' own
        assert far_out.count("rule_sets/") == out.count("rule_sets/")
    assert (far_code, far_out) == (code, out)


def test_flows_and_counters_come_from_every_node(
    remote: Remote, capsys: pytest.CaptureFixture[str]
) -> None:
    (_, out), (code, far) = both(remote, capsys, "ct", "list")
    assert (code, TIMES.sub("", far)) == (0, TIMES.sub("", out))
    (_, out), (code, far) = both(remote, capsys, "metrics", "list", "-o", "json")
    assert code == 0
    assert json.loads(far).keys() == json.loads(out).keys() == set(remote.run.nodes())


def test_a_pod_is_asked_for_on_its_node_only(
    remote: Remote, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--kubeconfig", str(remote.kubeconfig), "policy", "get", "web-2"])
    assert [node for node, _ in remote.commands] == ["node-2"]
    remote.commands.clear()
    argv = ["explain", "--from", "client", "--to", "web-1", "--port", "80"]
    main(["--kubeconfig", str(remote.kubeconfig), *argv])
    assert [node for node, _ in remote.commands] == ["node-1"], "one question each, both at once"
    capsys.readouterr()


def test_a_node_that_cannot_be_asked_is_told_of(
    remote: Remote, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Api, namespace: str, pod: str, container: str, argv: list[str]) -> Ran:
        if pod.endswith("node-2"):
            return Ran(1, "", "tidegate: no maps are pinned\n")
        return remote.execute(self, namespace, pod, container, argv)

    monkeypatch.setattr(Api, "execute", refuse)
    argv = ["--kubeconfig", str(remote.kubeconfig)]
    assert main([*argv, "endpoint", "list", "-o", "json"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out).keys() == {"node-1"}
    assert said.err == "tidegate: node-2: no maps are pinned\n"
    assert main([*argv, "status"]) == 0  # the API has its report
    assert "node-2: node-2: no maps are pinned" in capsys.readouterr().out
    question = ["explain", "--from", "a/other", "--to", "a/web-1", "--port", "80"]
    assert main([*argv, *question]) == 2
    assert "no maps are pinned" in capsys.readouterr().err


def test_doctor_goes_through_cluster_and_nodes(
    remote: Remote, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--kubeconfig", str(remote.kubeconfig), "doctor", "-o", "json"]) == 1
    lines = {line["name"]: line for line in json.loads(capsys.readouterr().out)}
    grades = {name: line["grade"] for name, line in lines.items()}
    assert grades["Kubernetes"] == grades["kinds"] == grades["in force"] == "ok"
    assert (grades["operator"], grades["loader"]) == ("FAIL", "FAIL")
    for node in remote.run.nodes():
        assert grades[f"{node} bpffs"] == grades[f"{node} verifier pod.o"] == "ok"
        assert f"{node} network namespaces" not in grades


def test_an_object_of_another_version_is_a_problem_and_no_more(
    remote: Remote, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "e" * 40
    spec = {"format": 1, "direction": "Ingress", "policies": [], "rules": [], "terms": []}
    body = {"apiVersion": "tidegate.dev/v1alpha1", "kind": "RuleSet", "metadata": {"name": name}}
    crd = "rulesets.tidegate.dev"
    path = "spec/versions/0/schema/openAPIV3Schema/properties/spec"
    loosen = {"op": "add", "path": f"/{path}/x-kubernetes-preserve-unknown-fields", "value": True}
    remote.client.patch(resources.CRDS, crd, msgspec.json.encode([loosen]), kind="json")
    try:
        made = msgspec.json.encode({**body, "spec": {**spec, "later": 1}})

        def stored() -> bool:
            """A server that has not taken up the schema yet leaves the field out."""
            remote.client.create(resources.RULE_SETS, made)
            if "later" in json.loads(remote.client.get(resources.RULE_SETS, name))["spec"]:
                return True
            remote.client.delete(resources.RULE_SETS, name)
            return False

        until(stored, "an object with the field", 30)
        assert main(["--kubeconfig", str(remote.kubeconfig), "identity", "list"]) == 0
        said = capsys.readouterr()
        assert "app=closed" in said.out or "app=web" in said.out
        assert f"RuleSet {name} is left out, it is of another version" in said.err
    finally:
        remote.client.delete(resources.RULE_SETS, name)
        server.install_crds(remote.client)
