"""Base and overlays are the chart, and what runs may do no more than it has to."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from manifests.rendered import (
    CHART,
    LOADER,
    MANIFESTS,
    NAMESPACE,
    OPERATOR,
    ROOT,
    Object,
    Refused,
    chart,
    chart_text,
    containers,
    overlay,
    pod_of,
)
from tidegate_observer.tls import OBSERVER_NAME

pytestmark = pytest.mark.slow

MADE = "# Made by `make manifests` of manifests/chart. Do not edit.\n"


def test_what_is_committed_is_what_the_chart_makes() -> None:
    base = (MANIFESTS / "base" / "tidegate.yaml").read_text()
    assert base == MADE + chart_text("--set", "crds.install=false"), "run `make manifests`"


def test_base_is_the_chart_with_its_namespace() -> None:
    objects = overlay("base")
    namespace = objects.pop(f"Namespace /{NAMESPACE}")
    assert objects == chart()
    made = chart("--set", "createNamespace=true")
    assert made[f"Namespace /{NAMESPACE}"] == namespace


def test_ha_is_the_chart_with_three_operators() -> None:
    objects = overlay("overlays/ha")
    del objects[f"Namespace /{NAMESPACE}"]
    assert objects == chart("--set", "operator.replicas=3")


def test_kind_differs_in_pulling_alone() -> None:
    objects = overlay("overlays/kind")
    del objects[f"Namespace /{NAMESPACE}"]
    assert objects == chart("--set", "image.pullPolicy=Never")


def test_the_overlay_with_a_relay_is_the_chart_with_one() -> None:
    objects = overlay("overlays/relay")
    del objects[f"Namespace /{NAMESPACE}"]
    assert objects == chart("--set", RELAY)


def _certificate(secret: Object, name: str, *options: str) -> str:
    data = base64.b64decode(secret["data"][name])
    command = ["openssl", "x509", "-noout", *options]
    return subprocess.run(command, input=data, check=True, capture_output=True).stdout.decode()


def test_each_certificate_is_of_the_authority_that_the_other_side_trusts() -> None:
    objects = chart("--set", "relay.enabled=true,relay.tls.days=9")
    secrets = {
        name: objects[f"Secret {NAMESPACE}/tidegate-{name}-tls"]
        for name in ("observer", "relay-peer", "relay", "flows-client")
    }
    issuers = {
        name: _certificate(secret, "tls.crt", "-issuer").removeprefix("issuer=").strip()
        for name, secret in secrets.items()
    }
    trusted = {
        name: _certificate(secret, "ca.crt", "-subject").removeprefix("subject=").strip()
        for name, secret in secrets.items()
    }
    assert trusted["observer"] == issuers["relay-peer"]
    assert trusted["relay-peer"] == issuers["observer"]
    assert trusted["relay"] == issuers["flows-client"]
    assert trusted["flows-client"] == issuers["relay"]
    # Nobody who serves may ask with what he serves with, and no client may ask a node.
    assert len({issuers["observer"], issuers["relay-peer"], issuers["flows-client"]}) == 3
    names = _certificate(secrets["observer"], "tls.crt", "-ext", "subjectAltName")
    assert f"DNS:{OBSERVER_NAME}" in names
    for secret in secrets.values():
        assert secret["type"] == "kubernetes.io/tls"
        _certificate(secret, "tls.crt", "-checkend", str(8 * 86400))
        with pytest.raises(subprocess.CalledProcessError):
            _certificate(secret, "tls.crt", "-checkend", str(10 * 86400))


def test_what_is_scraped_is_what_is_served() -> None:
    service, monitor = yaml.safe_load_all((MANIFESTS / "monitoring" / "scrape.yaml").read_text())
    (port,) = service["spec"]["ports"]
    objects = chart("--set", f"observer.metricsPort={port['targetPort']}")
    daemon_set = objects[LOADER]
    labels = daemon_set["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    args = containers(pod_of(objects, LOADER))["observer"]["args"]
    assert f"--metrics=$(HOST_IP):{port['targetPort']}" in args
    assert (
        monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    )
    assert [e["port"] for e in monitor["spec"]["endpoints"]] == [port["name"]]


def test_the_relay_may_do_nothing() -> None:
    pod = pod_of(chart("--set", RELAY), f"Deployment {NAMESPACE}/tidegate-relay")
    assert pod["automountServiceAccountToken"] is False
    assert "hostNetwork" not in pod
    assert pod["securityContext"]["runAsNonRoot"] is True
    security = containers(pod)["relay"]["securityContext"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert (security["readOnlyRootFilesystem"], security["allowPrivilegeEscalation"]) == (
        True,
        False,
    )
    assert not [v for v in pod["volumes"] if "hostPath" in v]


def test_the_charts_crds_are_the_crds() -> None:
    crds = {name: o for name, o in chart().items() if name.startswith("CustomResource")}
    files = [p for p in (ROOT / "crds").glob("*.yaml") if p.name != "kustomization.yaml"]
    assert sorted(yaml.safe_load(p.read_text())["metadata"]["name"] for p in files) == sorted(
        o["metadata"]["name"] for o in crds.values()
    )
    keep = {"helm.sh/resource-policy": "keep", "kustomize.toolkit.fluxcd.io/prune": "disabled"}
    for crd in crds.values():
        annotations = crd["metadata"]["annotations"]
        assert keep.items() <= annotations.items()
        assert "Prune=false" in annotations["argocd.argoproj.io/sync-options"]


# ---- values --------------------------------------------------------------------------


def _leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        where = f"{path}.{name}" if path else name
        if isinstance(value, dict) and value:
            yield from _leaves(value, where)
        else:
            yield where, value


VALUES = dict(_leaves(yaml.safe_load((CHART / "values.yaml").read_text())))


def test_every_value_is_in_the_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    for path in VALUES:
        at = schema
        for step in path.split("."):
            at = at.get("properties", {}).get(step)
            assert at is not None, path
            if at.get("$ref", "").endswith("resources"):
                break


OTHER = {
    "image.pullSecrets": "image.pullSecrets[0].name=other",
    "image.pullPolicy": "image.pullPolicy=Always",
    "apiServer": "apiServer=https://other:6443",
    "kubeletConfig": "kubeletConfig=/other",
    "crds.install": "crds.install=false",
    "createNamespace": "createNamespace=true",
    "services.externalIPs": "services.externalIPs[0]=192.0.2.0/24",
    "services.nodePortAddresses": "services.nodePortAddresses[0]=fd00::/8",
    "services.algorithm": "services.algorithm=maglev",
    "masquerade.enabled": "masquerade.enabled=true",
    "masquerade.nonMasqueradeCIDRs": "masquerade.enabled=true,masquerade.nonMasqueradeCIDRs[0]="
    "192.0.2.0/24",
    "loadBalancer.mode": "loadBalancer.mode=dsr",
    "loadBalancer.acceleration": "loadBalancer.acceleration=best-effort",
    "identities.by": "identities.by=labels",
    "identities.excludedLabels": "identities.excludedLabels[0]=team/",
    "operator.replicas": "operator.replicas=2",
    "operator.logLevel": "operator.logLevel=debug",
    "operator.healthPort": "operator.healthPort=9999",
    "operator.nodeSelector": "operator.nodeSelector.other=x",
    "loader.logLevel": "loader.logLevel=debug",
    "loader.maxUnavailable": "loader.maxUnavailable=3",
    "loader.seccompProfile": "loader.seccompProfile=Unconfined",
    "observer.enabled": "observer.enabled=false",
    "observer.flows": "observer.flows=1000",
    "observer.port": "observer.port=4999",
    "observer.metricsPort": "observer.metricsPort=9965",
    "observer.policyLog.deny": "observer.policyLog.deny=all",
    "observer.policyLog.allow": "observer.policyLog.allow=none",
    "observer.policyLog.policies": "observer.policyLog.policies[0]=data/other",
    "observer.policyLog.directory": "observer.policyLog.directory=/var/log/other",
}


RELAY = "relay.enabled=true,relay.tls.generate=false"
OTHER_RELAY = {
    "relay.enabled": "relay.enabled=false",
    "relay.replicas": "relay.replicas=3",
    "relay.tls.generate": "relay.tls.generate=true",
    "relay.tls.days": "relay.tls.generate=true,relay.tls.days=9",
}


@pytest.mark.parametrize("value", sorted(VALUES))
def test_every_value_changes_something(value: str) -> None:
    if value.startswith("relay."):
        setting = OTHER_RELAY.get(value, f"{value}=other")
        assert chart("--set", f"{RELAY},{setting}") != chart("--set", RELAY)
        return
    setting = OTHER.get(value, f"{value}=/other" if value.startswith("cni.") else f"{value}=other")
    assert chart("--set", setting) != chart()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("operator.replica=2", "replica"),
        ("image.tag=", "tag"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("apiServer=10.0.0.1:6443", "apiServer"),
        ("apiServer=https://10.0.0.1:6443/path", "apiServer"),
        ("kubeletConfig=", "minLength"),
        ("loader.maxUnavailable=0", "maxUnavailable"),
        ("loader.maxUnavailable=0%", "maxUnavailable"),
        ("operator.healthPort=65536", "healthPort"),
        ("services.externalIPs[0]=192.0.2.1", "externalIPs"),
        ("services.algorithm=fastest", "algorithm"),
        ("masquerade.nonMasqueradeCIDRs[0]=192.0.2.1", "nonMasqueradeCIDRs"),
        ("loadBalancer.acceleration=generic", "acceleration"),
        ("loadBalancer.mode=hybrid", "mode"),
        ("cni.binaryDirectory=opt/cni/bin", "binaryDirectory"),
        ("observer.flows=0", "flows"),
        ("observer.port=0", "port"),
        ("relay.enabled=true,observer.enabled=false", "observer"),
        ("observer.policyLog.deny=some", "deny"),
        ("observer.policyLog.policies[0]=web", "policies"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(setting: str, said: str) -> None:
    with pytest.raises(Refused, match=said):
        chart("--set", setting)


def test_a_given_address_needs_no_kubelet_file() -> None:
    objects = chart("--set", "apiServer=https://10.0.0.1:6443,kubeletConfig=")
    assert objects[f"ConfigMap {NAMESPACE}/tidegate-config"]["data"] == {
        "apiServer": "https://10.0.0.1:6443"
    }
    for name in (OPERATOR, LOADER):
        paths = [v.get("hostPath", {}).get("path") for v in pod_of(objects, name)["volumes"]]
        assert "/etc/kubernetes/kubelet.conf" not in paths


# ---- what runs may do ------------------------------------------------------------------


def _every_container() -> list[tuple[str, Object, Object]]:
    objects = overlay("base")
    pods = [pod_of(objects, OPERATOR), pod_of(objects, LOADER)]
    return [(name, pod, c) for pod in pods for name, c in containers(pod).items()]


def test_every_root_is_read_only_and_one_container_is_privileged() -> None:
    found = _every_container()
    assert len(found) == 7
    assert {c["securityContext"]["readOnlyRootFilesystem"] for _, _, c in found} == {True}
    privileged = [n for n, _, c in found if c["securityContext"].get("privileged")]
    assert privileged == ["node-setup"]
    for name, _, container in found:
        if name != "node-setup":
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]


def test_capabilities_are_the_three_and_one_for_the_observer() -> None:
    added = {
        name: container["securityContext"].get("capabilities", {}).get("add")
        for name, _, container in _every_container()
    }
    assert {name: caps for name, caps in added.items() if caps} == {
        "loader": ["BPF", "NET_ADMIN", "PERFMON"],
        "observer": ["BPF"],
    }


def test_operator_is_nobody() -> None:
    pod = pod_of(overlay("base"), OPERATOR)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert "runAsUser" not in containers(pod)["operator"]["securityContext"]


def test_the_loader_sees_four_places_of_the_node() -> None:
    pod = pod_of(overlay("base"), LOADER)
    host = {v["name"]: v["hostPath"]["path"] for v in pod["volumes"] if "hostPath" in v}
    seen = {
        name: sorted(host[m["name"]] for m in c["volumeMounts"] if m["name"] in host)
        for name, c in containers(pod).items()
    }
    assert seen["loader"] == [
        "/run/tidegate",
        "/sys/fs/bpf",
        "/sys/fs/cgroup",
        "/var/lib/tidegate",
    ]
    assert seen["cni"] == ["/etc/cni/net.d", "/opt/cni/bin", "/var/lib/cni", "/var/lib/tidegate"]
    assert seen["observer"] == ["/sys/fs/bpf", "/sys/fs/cgroup", "/var/lib/tidegate"]
    assert seen["server-address"] == ["/etc/kubernetes/kubelet.conf"]


def test_the_observer_changes_nothing_on_the_node() -> None:
    pod = pod_of(overlay("base"), LOADER)
    host = {v["name"] for v in pod["volumes"] if "hostPath" in v}
    mounts = containers(pod)["observer"]["volumeMounts"]
    assert {m["name"]: m.get("readOnly") for m in mounts if m["name"] in host} == {
        "bpffs": True,
        "cgroup": True,
        "state": True,
    }


def test_without_an_observer_nothing_is_left_of_it() -> None:
    objects = chart("--set", "observer.enabled=false")
    pod = pod_of(objects, LOADER)
    assert "observer" not in containers(pod)
    assert "observer" not in [v["name"] for v in pod["volumes"]]
    rules = objects["ClusterRole /tidegate-loader"]["rules"]
    assert {resource for rule in rules for resource in rule["resources"]} == {
        *("nodestates", "nodestates/status", "rulesets", "stateslices"),
    }


def test_two_containers_of_a_node_have_the_token() -> None:
    pod = pod_of(overlay("base"), LOADER)
    assert pod["automountServiceAccountToken"] is False
    having = [
        n for n, c in containers(pod).items() for m in c["volumeMounts"] if m["name"] == "token"
    ]
    assert having == ["loader", "observer"]


@pytest.mark.parametrize("name", [OPERATOR, LOADER])
def test_both_run_anywhere_before_there_is_a_network(name: str) -> None:
    pod = pod_of(overlay("base"), name)
    assert {"operator": "Exists"} in pod["tolerations"]
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "Default")
    assert pod["priorityClassName"].startswith("system-")


def test_nothing_listens_but_on_loopback() -> None:
    ports = [port for _, _, c in _every_container() for port in c.get("ports", ())]
    assert [(port["hostIP"], port["hostPort"]) for port in ports] == [("127.0.0.1", 9180)]
