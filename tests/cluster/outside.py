"""A cluster of two nodes and a client outside it, for tests of Services with real sockets.

The responder of a pod says which pod it is and whom it saw as the client. "Outside" is a network
namespace on the nodes' network, which no node knows.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tidegate_cli.standalone import teardown
from tidegate_cli.standalone.errors import PrerequisiteError
from tidegate_cli.standalone.loaders import check
from tidegate_cli.standalone.rundir import RunDir

OUTSIDE = {4: "172.18.0.200", 6: "fc00:f853:ccd:e793::200"}
NODES = {
    "node-1": {4: "172.18.0.2", 6: "fc00:f853:ccd:e793::2"},
    "node-2": {4: "172.18.0.3", 6: "fc00:f853:ccd:e793::3"},
}
HAIRPIN = {4: "169.254.42.1", 6: "fd74:6964:6567:6174::1"}
ASK = """
import json, socket, sys
family, kind, host, port, count = sys.argv[1:]
found = []
for _ in range(int(count)):
    s = socket.socket(int(family), int(kind))
    s.settimeout(1.5)
    try:
        s.connect((host, int(port)))
        if s.type == socket.SOCK_STREAM:
            s.sendall(b"GET / HTTP/1.1\\r\\nConnection: close\\r\\n\\r\\n")
            data = b""
            while chunk := s.recv(4096):
                data += chunk
            body = json.loads(data.split(b"\\r\\n\\r\\n", 1)[1])
            found.append([body["pod"].split("/")[1], body["client"]])
        else:
            s.send(b"x")
            found.append([s.recv(4096).decode().split()[0].split("/")[1], s.getpeername()[0]])
    except TimeoutError:
        found.append(["timeout", ""])
    except OSError as error:
        found.append([type(error).__name__, ""])
    s.close()
print(json.dumps(found))
"""


def pod(name: str, node: str, app: str = "web") -> str:
    ports = "[{containerPort: 8080}, {containerPort: 5353, protocol: UDP}]"
    return f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {app}}}}}
spec: {{nodeName: {node}, containers: [{{name: main, image: x, ports: {ports}}}]}}
"""


def service(
    name: str, port: int, more: str = "", app: str = "web", status: str = "", notes: str = ""
) -> str:
    return f"""
apiVersion: v1
kind: Service
metadata: {{name: {name}, annotations: {{{notes}}}}}
spec:
  type: {"LoadBalancer" if status else "NodePort"}
  selector: {{app: {app}}}
  ipFamilyPolicy: RequireDualStack
  ports:
  - {{name: t, port: 80, targetPort: 8080, nodePort: {port}}}
  - {{name: u, port: 53, targetPort: 5353, protocol: UDP, nodePort: {port + 1}}}
  {more}
{status}
"""


@dataclass
class Cluster:
    run_dir: RunDir
    folder: Path
    client: str

    def tidegate(self, *argv: str) -> str:
        command = [sys.executable, "-m", "tidegate_cli", *argv]
        environment = os.environ | {"TIDEGATE_RUN_DIR": str(self.run_dir.path)}
        found = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert found.returncode == 0, found.stderr
        return found.stdout

    def ask(
        self, who: str, host: str, port: int, count: int = 1, udp: bool = False, netns: str = ""
    ) -> list[tuple[str, str]]:
        """(pod that answered or what went wrong, whom it saw; over UDP who it seemed to be).
        `who`: a pod, or "" for outside; with `netns`, there, where no socket is translated."""
        family, kind = ("10" if ":" in host else "2"), ("2" if udp else "1")
        argv = [sys.executable, "-c", ASK, family, kind, host, str(port), str(count)]
        if who:
            return [tuple(x) for x in json.loads(self.tidegate("exec", who, "--", *argv))]
        argv = ["ip", "netns", "exec", netns or self.client, *argv]
        found = subprocess.run(argv, capture_output=True, text=True, check=True)
        return [tuple(x) for x in json.loads(found.stdout)]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def up(base: Path, folder: str, *options: str) -> Iterator[Cluster]:
    """Of the manifests in `folder`; skips where `tidegate up` cannot work."""
    try:
        check()
    except PrerequisiteError as error:
        pytest.skip(str(error))
    found = Cluster(RunDir.at(base / "run"), base / "manifests", f"tgc-{os.getpid()}")
    found.folder.mkdir()
    (found.folder / "all.yaml").write_text(folder)
    ip("netns", "add", found.client)
    try:
        found.tidegate("up", str(found.folder), "--detach", "--nodes", "2", *options)
        fabric = f"{found.run_dir.netns_prefix}_fabric"
        ip("-n", fabric, *f"link add out type veth peer eth0 netns {found.client}".split())
        ip("-n", fabric, "link", "set", "out", "master", "br0", "up")
        ip("-n", found.client, "link", "set", "lo", "up")
        ip("-n", found.client, "link", "set", "eth0", "up")
        ip("-n", found.client, "addr", "add", f"{OUTSIDE[4]}/16", "dev", "eth0")
        ip("-n", found.client, "addr", "add", f"{OUTSIDE[6]}/64", "dev", "eth0", "nodad")
        ip("-n", found.client, "route", "add", "198.51.100.0/24", "via", NODES["node-1"][4])
        yield found
    finally:
        ip("netns", "del", found.client)
        teardown.down(found.run_dir)
