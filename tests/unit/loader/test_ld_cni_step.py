"""The CNI step's border to a container runtime: what it takes, and what it says to the rest."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from support import cni_step

RESULT = {"cniVersion": "1.0.0", "interfaces": [], "ips": [{"address": "10.0.0.1/24"}]}
POD = {"CNI_ARGS": "K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p;K8S_POD_UID=u", "CNI_IFNAME": "eth0"}
ADD = {"CNI_COMMAND": "ADD", "CNI_NETNS": "/nowhere/netns", **POD}


def _config(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {
        "cniVersion": "1.0.0",
        "name": "net",
        "type": "tidegate-cni",
        "pinDir": str(tmp_path / "bpf"),
        "socket": str(tmp_path / "cni.sock"),
        "prevResult": RESULT,
        "timeoutSeconds": 1,
    } | more


def _pin(tmp_path: Path) -> None:
    (tmp_path / "bpf" / "progs").mkdir(parents=True)
    for name in ("from_pod", "to_pod"):
        (tmp_path / "bpf" / "progs" / name).touch()


def test_version() -> None:
    found = cni_step.call("VERSION", "")
    assert found.output == {
        "cniVersion": "1.1.0",
        "supportedVersions": ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"],
    }


REFUSED = [
    ("not JSON", "{", {}, 6, "not JSON"),
    ("not an object", "[]", {}, 6, "not an object"),
    ("a key twice", '{"name":"a","name":"b"}', {}, 6, "duplicate"),
    ("a later version", {"cniVersion": "2.0.0"}, {}, 1, "2.0.0 is not supported"),
    ("no time at all", {"timeoutSeconds": 0}, {}, 7, "from 1 to 100"),
    ("a path that is none", {"pinDir": 7}, {}, 7, "pinDir must be a string"),
    ("first in its chain", {"prevResult": None}, {}, 7, "must come after the plugin"),
    ("no namespace named", {}, {"CNI_NETNS": ""}, 4, "CNI_NETNS is not set"),
    ("no interface named", {}, {"CNI_IFNAME": ""}, 4, "CNI_IFNAME is not set"),
    ("an unknown command", {}, {"CNI_COMMAND": "JUMP"}, 4, "JUMP is unknown"),
    ("no command", {}, {"CNI_COMMAND": ""}, 4, "CNI_COMMAND is not set"),
]


@pytest.mark.parametrize(
    ("reason", "given", "environment", "code", "phrase"), REFUSED, ids=lambda v: str(v)[:24]
)
def test_what_is_refused(
    tmp_path: Path,
    reason: str,
    given: dict[str, Any] | str,
    environment: dict[str, str],
    code: int,
    phrase: str,
) -> None:
    text = given if isinstance(given, str) else _config(tmp_path, **given)
    found = cni_step.call("ADD", text, **(ADD | environment))
    assert (found.code, found.output["code"]) == (1, code), reason
    assert phrase in found.message
    assert found.output["cniVersion"] in ("1.0.0", "1.1.0")


PINNED_REFUSED = [
    ("a runtime that gives no UID", {"CNI_ARGS": "K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p"}, 4, "UID"),
    ("a namespace that is gone", {}, 4, "/nowhere/netns"),
]


@pytest.mark.parametrize(
    ("reason", "environment", "code", "phrase"), PINNED_REFUSED, ids=lambda v: str(v)[:24]
)
def test_what_is_refused_where_policy_is_enforced(
    tmp_path: Path, reason: str, environment: dict[str, str], code: int, phrase: str
) -> None:
    _pin(tmp_path)
    found = cni_step.call("ADD", _config(tmp_path), **(ADD | environment))
    assert (found.code, found.output["code"]) == (1, code), reason
    assert phrase in found.message


def test_nothing_is_changed_where_tidegate_is_not_loaded(tmp_path: Path) -> None:
    """Whatever the plugins before it said comes out, to the last digit and in its order."""
    result = {
        "cniVersion": "1.0.0",
        "zeta": [1, 18446744073709551615 // 4, 0.5, "é", None, {"b": 1, "a": []}],
        "interfaces": [{"name": "x", "mtu": 1500}],
        "ips": [],
        "routes": [{"dst": "0.0.0.0/0", "priority": 4294967295}],
    }
    for version in ("0.3.1", "0.4.0", "1.0.0", "1.1.0"):
        given = _config(tmp_path, cniVersion=version, prevResult=result)
        process = cni_step.start("ADD", given, **ADD)
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert json.loads(out) == result | {"cniVersion": version}
        assert list(json.loads(out)) == list(result)


def test_what_is_no_pod_of_kubernetes_passes(tmp_path: Path) -> None:
    _pin(tmp_path)
    found = cni_step.call("ADD", _config(tmp_path), **(ADD | {"CNI_ARGS": ""}))
    assert found.code == 0
    assert found.output == RESULT


def test_after_a_reboot_no_pod_starts_before_the_programs(tmp_path: Path) -> None:
    marker = tmp_path / "enforcing"
    given = _config(tmp_path, enforcingFile=str(marker))
    assert cni_step.call("ADD", given, **ADD).code == 0
    assert cni_step.call("STATUS", given).code == 0
    marker.touch()
    found = cni_step.call("ADD", given, **ADD)
    assert (found.code, found.output["code"]) == (1, 11)
    assert "has not loaded the programs yet" in found.message
    assert cni_step.call("STATUS", given).output["code"] == 50
    waiting = cni_step.start("ADD", given | {"timeoutSeconds": 20}, **ADD)
    _pin(tmp_path)
    # It goes on as soon as they are there: to the pod's namespace, which this test has not.
    assert cni_step.finish(waiting).output["code"] == 4


@pytest.mark.parametrize("command", ["DEL", "GC", "STATUS"])
def test_taking_down_never_fails(tmp_path: Path, command: str) -> None:
    _pin(tmp_path)
    for environment in ({}, POD, POD | {"CNI_NETNS": ""}):
        found = cni_step.call(command, _config(tmp_path), **environment)
        assert (found.code, found.output) == (0, {})


def test_the_probe(tmp_path: Path) -> None:
    path = tmp_path / "cni.sock"

    def probe() -> subprocess.CompletedProcess[str]:
        command = [str(cni_step.STEP), "alive", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    gone = probe()
    assert gone.returncode == 1
    assert "does not answer" in gone.stderr
    answers = [b'{"ok":true}\n', b'{"ok":false,"error":"stuck"}\n']
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            for answer in answers:
                made, _ = listener.accept()
                with made:
                    assert json.loads(made.recv(4096))["command"] == "ALIVE"
                    made.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        assert probe().returncode == 0
        stuck = probe()
        thread.join()
    assert (stuck.returncode, stuck.stderr) == (1, "stuck\n")


def test_it_needs_nothing_of_the_node() -> None:
    """No program header names an interpreter: no library of the node's is asked for."""
    data = cni_step.STEP.read_bytes()
    (offset,) = struct.unpack_from("=Q", data, 32)
    size, count = struct.unpack_from("=HH", data, 54)
    kinds = [struct.unpack_from("=I", data, offset + i * size)[0] for i in range(count)]
    assert 1 in kinds  # something is loaded
    assert 3 not in kinds
