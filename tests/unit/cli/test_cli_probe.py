"""How a node finds the pods that a matrix asks from: rows of what /proc says."""

from __future__ import annotations

import pytest
from tidegate_cli.cluster import errand, probe
from tidegate_cli.connectivity import Destination
from tidegate_cli.errors import CliError
from tidegate_cli.standalone.rundir import Pod

UID = "0f2c6f7e-1b1d-4a53-9a0e-7c2f3f0b9d11"
UNDER = UID.replace("-", "_")


@pytest.mark.parametrize(
    ("reason", "text", "uid", "path"),
    [
        (
            "systemd, cgroup v2",
            f"0::/kubelet.slice/kubelet-kubepods-pod{UNDER}.slice/cri-containerd-ab.scope\n",
            UNDER,
            f"/kubelet.slice/kubelet-kubepods-pod{UNDER}.slice/cri-containerd-ab.scope",
        ),
        (
            "cgroupfs",
            f"0::/kubepods/burstable/pod{UID}/ab\n",
            UNDER,
            f"/kubepods/burstable/pod{UID}/ab",
        ),
        (
            "hybrid: v1 lines around it",
            f"2:cpu:/kubepods/pod{UID}/ab\n0::/kubepods/pod{UID}/ab\n1:name=systemd:/x\n",
            UNDER,
            f"/kubepods/pod{UID}/ab",
        ),
        ("v1 alone", f"2:cpu:/kubepods/pod{UID}/ab\n", UNDER, ""),
        (
            "a process of the node",
            "0::/system.slice/kubelet.service\n",
            "",
            "/system.slice/kubelet.service",
        ),
        ("a name that begins alike", "0::/podman/x\n", "", "/podman/x"),
        ("a kernel thread", "", "", ""),
    ],
)
def test_whose_a_process_is(reason: str, text: str, uid: str, path: str) -> None:
    assert (probe.pod_of(text), probe.unified(text)) == (uid, path), reason


@pytest.mark.parametrize(
    ("reason", "lines", "expected"),
    [
        ("v2", ["30 29 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw"], "/sys/fs/cgroup"),
        (
            "hybrid",
            [
                "31 30 0:27 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd",
                "32 30 0:28 / /sys/fs/cgroup/unified rw shared:11 master:2 - cgroup2 none rw",
            ],
            "/sys/fs/cgroup/unified",
        ),
    ],
)
def test_where_the_hierarchy_is(reason: str, lines: list[str], expected: str) -> None:
    assert probe.cgroup2_mount("\n".join(lines)) == expected, reason


def test_no_hierarchy_is_an_error() -> None:
    with pytest.raises(CliError, match="no cgroup2 mount"):
        probe.cgroup2_mount("30 29 0:26 / /proc rw - proc proc rw")


def pod(uid: str) -> Pod:
    return Pod(
        **{"uid": uid, "namespace": "n", "name": uid, "node": "x", "addresses": [], "ports": []},
        **{"host_network": False, "command": "", "netns": "", "cgroup": "", "ifname": ""},
    )


def target(address: str, port: int) -> Destination:
    return Destination("", 4, address, port, "TCP", (), handshake=True)


def test_a_task_names_each_target_once_and_keeps_the_order() -> None:
    one, two, three = target("10.0.0.1", 80), target("fd00::1", 80), target("10.0.0.1", 443)
    task = probe.task_of([(pod("a"), [one, two]), (pod("b"), [three, one]), (pod("c"), [])], 2.0)
    assert task == probe.Task(
        2.0,
        [("10.0.0.1", 80), ("fd00::1", 80), ("10.0.0.1", 443)],
        {"a": [0, 1], "b": [2, 0]},
    )
    assert probe.decode(probe.encode(task)) == task


@pytest.mark.parametrize("text", ["", "x", "e30=", "not base64!"])
def test_what_is_no_task(text: str) -> None:
    with pytest.raises(CliError, match="no task"):
        probe.decode(text)


def test_a_large_task_fits_into_an_argument() -> None:
    """One argument may have 128 KiB: the most that `matrix` asks of one node."""
    targets = [target(f"10.{n >> 8}.{n & 255}.7", 1024 + n) for n in range(200)]
    task = probe.task_of([(pod(f"{n:036}"), targets) for n in range(100)], 1.0)
    assert len(probe.encode(task)) < 1 << 17


def daemon_set(**container: object) -> dict[str, object]:
    loader = {"name": "loader", "image": "tidegate:dev", "env": [{"name": "X"}], **container}
    spec = {"containers": [loader], "tolerations": [{"operator": "Exists"}], "volumes": ["x"]}
    return {"spec": {"template": {"spec": spec}}}


def test_an_errand_is_of_the_loaders_image_and_of_no_account() -> None:
    made = errand.pod(
        daemon_set(imagePullPolicy="Never"), "node-1", "e", ["tidegate", "probe", "x"]
    )
    spec, container = made["spec"], made["spec"]["containers"][0]
    assert (spec["nodeName"], spec["hostPID"], spec["restartPolicy"]) == ("node-1", True, "Never")
    assert spec["automountServiceAccountToken"] is False
    assert spec["tolerations"] == [{"operator": "Exists"}]
    assert (container["image"], container["imagePullPolicy"]) == ("tidegate:dev", "Never")
    assert container["command"] == ["tidegate", "probe", "x"]
    assert container["env"] == [{"name": "NODE_NAME", "value": "node-1"}]
    assert [volume["hostPath"]["path"] for volume in spec["volumes"]] == ["/"]
    with pytest.raises(CliError, match="no container loader"):
        errand.pod(daemon_set(name="other"), "node-1", "e", [])
