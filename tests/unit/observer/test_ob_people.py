"""Who lives in a cluster, of the API's own objects; and a node's directory made of it."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tidegate_api.state import (
    API_VERSION,
    Identity,
    IdentitySpec,
    IPCacheEntry,
    Meta,
    StateSlice,
    StateSliceSpec,
    encode,
)
from tidegate_observer import informer
from tidegate_observer.directory import NAMESPACE_LABEL
from tidegate_observer.flow import End, address_bytes
from tidegate_observer.people import Pod
from tidegate_observer.rundir import RunDirSource

SPACE = f"{NAMESPACE_LABEL}=shop"


def pod(**fields: Any) -> bytes:
    """A pod as the API writes it, with much that nobody asks for."""
    owners = fields.pop("owners", [])
    labels = fields.pop("labels", {"app": "web"})
    item = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "web-6f9c-x2",
            "namespace": "shop",
            "uid": "u",
            "labels": labels,
            "ownerReferences": [{"apiVersion": "v1", "uid": "o", **o} for o in owners],
            "managedFields": [{"manager": "kubelet"}],
        },
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "env": [{"value": "secret"}]}]},
        "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}]},
    }
    for path, value in fields.items():
        section, _, name = path.partition("_")
        item[section][name] = value  # type: ignore[index]
    return json.dumps(item).encode()


REPLICA_SET = {"kind": "ReplicaSet", "name": "web-6f9c", "controller": True}
HASHED = {"app": "web", "pod-template-hash": "6f9c"}
ROWS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("a bare pod", {}, {"addresses": ("10.0.0.1",), "node": "n1"}),
    ("no labels at all", {"labels": None}, {"labels": (SPACE,)}),
    ("both families", {"status_podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]},
     {"addresses": ("10.0.0.1", "fd00::1")}),
    ("no address yet", {"status_podIPs": None}, {"addresses": ()}),
    ("it has ended: the address may be another's", {"status_phase": "Succeeded"},
     {"addresses": ()}),
    ("it has failed", {"status_phase": "Failed"}, {"addresses": ()}),
    ("of the node's network", {"spec_hostNetwork": True}, {"host_network": True, "uid": "u"}),
    ("a static pod's cgroup has its file's hash",
     {"spec_hostNetwork": True, "metadata_annotations": {informer.STATIC_ANNOTATION: "f00d"}},
     {"uid": "f00d"}),
    ("of its own network: its address says who it is", {}, {"uid": ""}),
    ("of a Deployment", {"owners": [REPLICA_SET], "labels": HASHED},
     {"workload": "web", "workload_kind": "Deployment"}),
    ("of a ReplicaSet that nothing made", {"owners": [REPLICA_SET]},
     {"workload": "web-6f9c", "workload_kind": "ReplicaSet"}),
    ("of a CronJob", {"owners": [{"kind": "Job", "name": "tidy-29123456", "controller": True}]},
     {"workload": "tidy", "workload_kind": "CronJob"}),
    ("of a Job", {"owners": [{"kind": "Job", "name": "tidy", "controller": True}]},
     {"workload": "tidy", "workload_kind": "Job"}),
    ("who merely owns it made nothing", {"owners": [{"kind": "Node", "name": "n1"}]},
     {"workload": ""}),
    ("an observer", {"labels": informer.OBSERVERS}, {"observes": True}),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "fields", "expected"), ROWS, ids=[r[0] for r in ROWS])
def test_what_is_kept_of_a_pod(
    reason: str, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = informer.pod(pod(**fields))
    assert {name: getattr(found, name) for name in expected} == expected


def test_a_pods_labels_are_its_own_and_its_namespace_is_not_one_of_them() -> None:
    found = informer.pod(pod(labels={"app": "web", NAMESPACE_LABEL: "data", "bare": ""}))
    assert found.labels.count(SPACE) == 1
    assert {"k8s:app=web", "k8s:bare"} <= set(found.labels)


def test_what_is_not_shown_changes_nothing() -> None:
    before = informer.pod(pod())
    conditions = [{"type": "Ready", "status": "True"}]
    assert informer.pod(pod(status_conditions=conditions, metadata_resourceVersion="9")) == before


def _identity(name: str, spec: IdentitySpec, **status: Any) -> bytes:
    meta = Meta(name=name)
    item = Identity(api_version=API_VERSION, kind="Identity", metadata=meta, spec=spec)
    return json.dumps({**msgspec.to_builtins(item), **status}).encode()


def test_what_an_identity_stands_for() -> None:
    made = _identity("300", IdentitySpec(namespace="shop", labels={"app": "web"}))
    assert informer.identity(made) == End(300, namespace="shop", labels=("k8s:app=web", SPACE))
    cidrs = IdentitySpec(cidrs=["198.51.100.0/24"])
    assert informer.identity(_identity("partner", cidrs)) is None
    assert informer.identity(_identity("partner", cidrs, status={"id": 900})) == End(
        900, labels=("cidr:198.51.100.0/24",)
    )


class Somebody:
    """People who say what they are told to."""

    def __init__(self) -> None:
        self.pods: Mapping[tuple[str, str], Pod] = {}
        self.identities: Mapping[int, End] = {}
        self.changed = True

    def fresh(self) -> bool:
        found, self.changed = self.changed, False
        return found


def test_a_directory_joins_addresses_with_people(tmp_path: Path) -> None:
    people = Somebody()
    source = RunDirSource(tmp_path, "n1", people=people)
    entries = [IPCacheEntry(cidr="10.0.0.1/32", identity=300, node="n2")]
    spec = StateSliceSpec(format=1, table="ipcache", epoch=1, shard=0, shards=1, revision=1,
                          ipcache=entries)  # fmt: skip
    item = StateSlice(
        api_version=API_VERSION, kind="StateSlice", metadata=Meta(name="s"), spec=spec
    )
    (tmp_path / "objects" / "stateslices").mkdir(parents=True)
    (tmp_path / "objects" / "stateslices" / "s.json").write_bytes(encode(item))
    people.pods = {
        ("shop", "web"): Pod(("10.0.0.1",), labels=("k8s:app=web",), workload="web"),
        ("shop", "host"): Pod(("192.0.2.1",), host_network=True),
    }
    people.identities = {900: End(900, labels=("cidr:198.51.100.0/24",))}
    assert source.refresh()
    directory = source.directory
    found = directory.end(address_bytes("10.0.0.1"), 300)
    assert found == End(300, 0, "shop", "web", ("k8s:app=web",), "web")
    assert address_bytes("192.0.2.1") not in directory.addresses
    # Nothing new is nothing to do, and who stays the same is the same object.
    assert not source.refresh()
    people.pods, people.changed = dict(people.pods), True
    assert source.refresh()
    assert directory.end(address_bytes("10.0.0.1"), 300) is found
    # One outside is not waited for: no pod will have the address.
    waited = dict(source._waited)
    assert directory.end(address_bytes("198.51.100.7"), 900) == people.identities[900]
    assert source._waited == waited
    people.pods, people.changed = {}, True
    source.refresh()
    assert directory.end(address_bytes("10.0.0.1"), 300).pod == ""


def test_pods_in_the_nodes_network_are_known_by_their_cgroups(tmp_path: Path) -> None:
    uid = "0a1b2c3d-0000-4000-8000-00000000cafe"
    group = tmp_path / "cgroup" / f"pod{uid}" / "container"
    people = Somebody()
    source = RunDirSource(tmp_path, "n1", people=people, cgroup=tmp_path / "cgroup")
    made = Pod(host_network=True, uid=uid, labels=("k8s:app=proxy",), workload="proxy")
    people.pods = {("kube-system", "proxy-x"): made}
    assert source.refresh()
    group.mkdir(parents=True)
    nobody = End(1, labels=("reserved:host",))
    found = source.directory.host(nobody, group.stat().st_ino)
    labels = ("k8s:app=proxy", "reserved:host")
    assert found == End(1, 0, "kube-system", "proxy-x", labels, "proxy")
    assert source.directory.host(nobody, (tmp_path / "cgroup").stat().st_ino) is nobody
    people.pods, people.changed = {}, True
    assert source.refresh()
    assert source.directory.host(nobody, group.stat().st_ino) is nobody


def test_interfaces_have_names(tmp_path: Path) -> None:
    directory = tmp_path / "nodes" / "n1" / "interfaces"
    source = RunDirSource(tmp_path, "n1", people=Somebody())
    link = source.directory.link
    assert (link(0), link(7)) == ("", "")
    directory.mkdir(parents=True)
    for index, name in ((8, "veth8"), (9, "veth9")):
        # At once: the first look may have been within the same tick of the clock.
        text = f'{{"uid":"u{index}","ifname":"{name}","ifindex":{index}}}'
        (directory / f"u{index}.json").write_text(text)
        assert link(index) == name
    (directory / "u8.json").unlink()
    source._interfaces_seen = 0
    source.refresh()
    assert (link(8), link(9)) == ("", "veth9")
    (loopback,) = (index for index, name in socket.if_nameindex() if name == "lo")
    assert link(loopback) == ""
    beside = RunDirSource(tmp_path, "n1", people=Somebody(), in_node=True)
    assert (beside.directory.link(loopback), beside.directory.link(9)) == ("lo", "veth9")
