"""`standalone` on real namespaces, without operator and loaders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster.harness import Bare, until
from tidegate_cli.standalone import cgroups, netns, teardown
from tidegate_cli.standalone.errors import NotUpError, StandaloneError
from tidegate_cli.standalone.rundir import RunDir

pytestmark = pytest.mark.cluster

WEB = {"name": "web", "node": 0, "ip": 5, "ports": [[80, "TCP"], [53, "UDP"], [99, "SCTP"]]}
NEAR = {"name": "near", "node": 0, "ip": 6, "ports": [[80, "TCP"]]}
FAR = {"name": "far", "node": 1, "ip": 5, "ports": [[80, "TCP"], [53, "UDP"]]}
HOST = {"name": "agent", "node": 0, "hostNetwork": True, "ports": [[9100, "TCP"], [9101, "UDP"]]}

ASK_TCP = (
    "import http.client, sys; c = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), "
    "timeout=5)\n"
    "for _ in range(2): c.request('GET', '/'); r = c.getresponse(); body = r.read()\n"
    "print(r.status, body.decode())"
)
ASK_UDP = (
    "import socket, sys; s = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else "
    "socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5); "
    "s.connect((sys.argv[1], int(sys.argv[2]))); s.send(b'hello'); print(s.recv(100).decode())"
)


def write(bare: Bare, *pods: dict[str, object], nodes: int = 2) -> None:
    temporary = bare.layout.with_suffix(".tmp")
    temporary.write_text(json.dumps({"nodes": nodes, "pods": pods}))
    temporary.rename(bare.layout)


def get(bare: Bare, pod: str, address: str, port: int) -> dict[str, str]:
    result = bare.run(pod, sys.executable, "-c", ASK_TCP, address, str(port))
    assert result.returncode == 0, result.stderr
    status, _, body = result.stdout.partition(" ")
    assert status == "200"
    answer: dict[str, str] = json.loads(body)
    return answer


def everything(run_dir: RunDir) -> dict[str, object]:
    """What `down` must leave as it was."""
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    routes = subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout
    processes = [
        entry.name
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and str(run_dir.path) in _environment(entry)
    ]
    sysctls = {
        key: Path("/proc/sys/net", key).read_text()
        for key in ("ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv4/conf/all/rp_filter")
    }
    return {
        "inventory": bool(teardown.inventory(run_dir)),
        "run directory": run_dir.path.exists(),
        "links": [line.split(":")[1] for line in links.splitlines()],
        "routes": routes,
        "processes": processes,
        "sysctls": sysctls,
    }


def _environment(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize(
    ("reason", "source", "address", "server", "client"),
    [
        ("same node", "near", "10.244.0.5", "default/web", "10.244.0.6"),
        ("same node, IPv6", "near", "fd00:10:244:0::5", "default/web", "fd00:10:244::6"),
        ("other node keeps the source", "near", "10.244.1.5", "default/far", "10.244.0.6"),
        ("other node, IPv6", "web", "fd00:10:244:1::5", "default/far", "fd00:10:244::5"),
        ("itself", "web", "10.244.0.5", "default/web", "10.244.0.5"),
        ("from a node", "node/node1", "10.244.0.5", "default/web", "172.18.0.3"),
    ],
)
def test_tcp_answers(
    answering: Bare, reason: str, source: str, address: str, server: str, client: str
) -> None:
    assert get(answering, source, address, 80) == {
        "pod": server,
        "address": "10.244.1.5" if server.endswith("far") else "10.244.0.5",
        "client": client,
    }, reason


@pytest.mark.parametrize(
    ("reason", "source", "address", "port", "expected"),
    [
        ("same node", "near", "10.244.0.5", 53, "default/web hello"),
        ("other node, IPv6", "near", "fd00:10:244:1::5", 53, "default/far hello"),
        ("a node's address, from a pod on it", "near", "172.18.0.2", 9101, "default/agent hello"),
        ("a node's IPv6 address", "far", "fc00:f853:ccd:e793::2", 9101, "default/agent hello"),
    ],
)
def test_udp_answers(
    answering: Bare, reason: str, source: str, address: str, port: int, expected: str
) -> None:
    result = answering.run(source, sys.executable, "-c", ASK_UDP, address, str(port))
    assert (result.stdout.strip(), result.stderr) == (expected, ""), reason


@pytest.fixture
def answering(bare: Bare) -> Bare:
    write(bare, WEB, NEAR, FAR, HOST)
    bare.up()
    return bare


def test_exec_runs_in_the_pods_namespace_and_cgroup(answering: Bare) -> None:
    pod = next(pod for pod in answering.state().pods if pod.name == "web")
    result = answering.run("web", "sh", "-c", "cat /proc/self/cgroup; ip -o addr; exit 3")
    assert result.returncode == 3
    assert pod.cgroup.removeprefix(str(cgroups.mount_point())) in result.stdout
    assert "10.244.0.5/32" in result.stdout


@pytest.mark.parametrize(
    ("reason", "pod", "argv", "code", "message"),
    [
        ("no such pod", "nobody", ("true",), 1, "no pod nobody; there are default/agent"),
        ("no such node", "node/x", ("true",), 1, "no node node/x; there are node/node0"),
        ("no such command", "web", ("no-such-command",), 127, "command not found"),
    ],
)
def test_exec_says_what_is_wrong(
    answering: Bare, reason: str, pod: str, argv: tuple[str, ...], code: int, message: str
) -> None:
    result = answering.run(pod, *argv)
    assert (result.returncode, message in result.stderr) == (code, True), reason


def test_down_leaves_nothing(bare: Bare) -> None:
    before = everything(bare.run_dir)
    write(bare, WEB, FAR, HOST)
    bare.up()
    assert teardown.inventory(bare.run_dir).namespaces
    assert bare.process is not None
    there_was = teardown.down(bare.run_dir)
    assert there_was.supervisor == bare.process.pid
    bare.process.communicate()
    assert everything(bare.run_dir) == before
    assert not teardown.down(bare.run_dir), "a second down finds nothing"


def test_sigterm_leaves_nothing(bare: Bare) -> None:
    before = everything(bare.run_dir)
    write(bare, WEB)
    bare.up()
    bare.end(signal.SIGTERM)
    assert everything(bare.run_dir) == before


def test_down_after_the_supervisor_was_killed(bare: Bare) -> None:
    before = everything(bare.run_dir)
    write(bare, WEB | {"command": "sleep 1000"}, FAR)
    bare.up()
    bare.end(signal.SIGKILL)
    there_was = teardown.down(bare.run_dir)
    assert (there_was.supervisor, there_was.processes >= 2) == (None, True)
    assert everything(bare.run_dir) == before


def test_a_killed_supervisor_breaks_no_flow_and_is_replaced(bare: Bare) -> None:
    write(bare, WEB, NEAR)
    bare.up()
    bare.end(signal.SIGKILL)
    assert get(bare, "near", "10.244.0.5", 80)["pod"] == "default/web"
    bare.up()
    assert get(bare, "near", "10.244.0.5", 80)["pod"] == "default/web"


def test_up_that_fails_half_way_cleans_up(bare: Bare) -> None:
    before = everything(bare.run_dir)
    # Node 255 has no pod CIDR that is one: the links between the nodes exist by then.
    write(bare, WEB, nodes=400)
    with pytest.raises(pytest.fail.Exception, match="not ready"):
        bare.up()
    bare.process = None
    assert everything(bare.run_dir) == before


def test_second_up_is_refused(bare: Bare) -> None:
    write(bare, WEB)
    state = bare.up()
    second = Bare(bare.run_dir, bare.layout)
    with pytest.raises(pytest.fail.Exception) as failure:
        second.up()
    message = str(failure.value)
    assert f"AlreadyUpError: already up: process {state.pid} follows {bare.layout}" in message
    assert get(bare, "web", "10.244.0.5", 80)["pod"] == "default/web", "the first one lives on"


def test_somebodys_folder_is_no_run_directory(bare: Bare) -> None:
    bare.run_dir.path.mkdir()
    mine = bare.run_dir.path / "thesis.txt"
    mine.write_text("precious")
    write(bare, WEB)
    with pytest.raises(pytest.fail.Exception, match="choose another --run-dir"):
        bare.up()
    teardown.down(bare.run_dir)
    assert mine.read_text() == "precious"


@pytest.mark.parametrize(
    ("reason", "after", "gone", "there"),
    [
        ("a pod more", (WEB, NEAR, FAR), (), ("web", "near", "far")),
        ("a pod less", (NEAR,), ("web",), ("near",)),
        ("another address", (WEB | {"ip": 9}, NEAR), (), ("web", "near")),
        ("the same name, another pod", (WEB | {"uid": "other"}, NEAR), (), ("web", "near")),
        ("moved to another node", (WEB | {"node": 1}, NEAR), (), ("web", "near")),
        ("none", (), ("web", "near"), ()),
    ],
)
def test_pods_come_and_go(
    bare: Bare,
    reason: str,
    after: tuple[dict[str, object], ...],
    gone: tuple[str, ...],
    there: tuple[str, ...],
) -> None:
    write(bare, WEB, NEAR)
    before = {pod.name: pod for pod in bare.up().pods}
    write(bare, *after)

    def settled() -> bool:
        pods = {pod.name: pod for pod in bare.state().pods}
        wanted = {(str(entry["name"]), f"node{entry['node']}") for entry in after}
        uids = {str(entry.get("uid", f"uid-{entry['name']}")) for entry in after}
        ips = {f"10.244.{entry['node']}.{entry['ip']}" for entry in after}
        return (
            {(pod.name, pod.node) for pod in pods.values()} == wanted
            and {pod.uid for pod in pods.values()} == uids
            and {pod.addresses[0] for pod in pods.values()} == ips
        )

    until(settled, reason)
    for name in gone:
        assert not Path(before[name].netns).exists()
        assert not Path(before[name].cgroup).exists()
        assert not bare.run_dir.interface(before[name].node, before[name].uid).exists()
    pods = {pod.name: pod for pod in bare.state().pods}
    for name in there:
        pod = pods[name]
        assert bare.run_dir.interface(pod.node, pod.uid).exists()
        assert get(bare, f"node/{pod.node}", pod.addresses[0], 80)["pod"] == pod.key


def test_a_command_replaces_the_responder_and_is_kept_alive(bare: Bare) -> None:
    code = (
        "import os,socket; s=socket.create_server(('',80)); s.accept()[0].send(b'%d' % os.getpid())"
    )
    write(bare, WEB | {"command": f'{sys.executable} -c "{code}"'}, NEAR)
    bare.up()
    ask = "import socket; print(socket.create_connection(('10.244.0.5', 80), 1).recv(99).decode())"
    seen: set[str] = set()

    def two_lives() -> bool:
        result = bare.run("near", sys.executable, "-c", ask)
        seen.update(result.stdout.split())
        return len(seen) == 2

    until(two_lives, "the command ran, ended and ran again")


def test_the_responder_is_started_again(bare: Bare) -> None:
    write(bare, WEB, NEAR)
    state = bare.up()
    system = Path(state.cgroup, "_system")
    (pid,) = cgroups.processes(system)
    os.kill(pid, signal.SIGKILL)
    until(lambda: set(cgroups.processes(system)) - {pid}, "another responder")

    def answers() -> bool:
        return bare.run("near", sys.executable, "-c", ASK_TCP, "10.244.0.5", "80").returncode == 0

    until(answers, "it serves the pods of the first")


@pytest.mark.parametrize(
    ("reason", "call"),
    [
        (
            "exec",
            lambda run_dir: __import__("tidegate_cli.standalone").standalone.exec_in(
                "web", ["true"], run_dir.path
            ),
        ),
        ("require", lambda run_dir: run_dir.require()),
    ],
)
def test_nothing_is_up(tmp_path: Path, reason: str, call: Callable[[RunDir], object]) -> None:
    with pytest.raises(NotUpError, match="run `tidegate up DIR` first"):
        call(RunDir.at(tmp_path / reason))


def test_two_run_directories_do_not_meet(bare: Bare, tmp_path: Path) -> None:
    write(bare, WEB)
    bare.up()
    other = RunDir.at(tmp_path / "other")
    assert other.id != bare.run_dir.id
    assert not teardown.down(other)
    assert get(bare, "web", "10.244.0.5", 80)["pod"] == "default/web"
    assert netns.names(other.netns_prefix) == []


def test_a_broken_state_file_is_named(tmp_path: Path) -> None:
    run_dir = RunDir.at(tmp_path)
    run_dir.state.write_text("{")
    with pytest.raises(StandaloneError, match=r"supervisor\.json"):
        run_dir.read()
