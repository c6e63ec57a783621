"""Services of every kind for clients in pods, on nodes and outside: real packets, real sockets.

The responder of a pod says which pod it is and whom it saw as the client. One cluster of two
nodes for the file; "outside" is a network namespace on the nodes' network, which no node knows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from cluster.harness import until
from cluster.outside import HAIRPIN, NODES, OUTSIDE, Cluster, ip, pod, service, up
from support.asking import Places, Question
from tidegate_loader import datagrams

pytestmark = [pytest.mark.cluster, pytest.mark.kernel]

VIP = {4: "10.96.7.1", 6: "fd00:10:96::7:1"}
HEARD = """
import json, socket, sys, time
found = set()
socks = []
for _ in range(32):
    socks.append(s := socket.socket(10 if ":" in sys.argv[1] else 2, socket.SOCK_DGRAM))
    s.connect((sys.argv[1], int(sys.argv[2])))
    s.send(b"x")
deadline = time.monotonic() + 1
while time.monotonic() < deadline:
    for s in socks:
        s.setblocking(False)
        try:
            found.add(s.recv(4096).decode().split()[0].split("/")[1])
        except OSError:
            pass
    time.sleep(0.02)
print(json.dumps(sorted(found)))
"""


INSIDE, LEGACY = "10.96.200.1", "10.96.200.2"
OTHERS = f"""
apiVersion: v1
kind: Pod
metadata: {{name: ported, labels: {{app: ported}}}}
spec:
  nodeName: node-2
  containers:
  - name: main
    image: x
    ports:
    - {{containerPort: 8080, hostPort: 8085}}
    - {{containerPort: 5353, hostPort: 8086, protocol: UDP}}
---
apiVersion: v1
kind: Pod
metadata: {{name: agent, labels: {{app: agent}}}}
spec:
  nodeName: node-1
  hostNetwork: true
  containers: [{{name: main, image: x, ports: [{{containerPort: 9100}}]}}]
---
apiVersion: v1
kind: Service
metadata: {{name: agents}}
spec:
  type: NodePort
  selector: {{app: agent}}
  ports: [{{port: 80, targetPort: 9100, nodePort: 30160}}]
---
apiVersion: v1
kind: Service
metadata: {{name: inside}}
spec:
  clusterIP: {INSIDE}
  internalTrafficPolicy: Local
  selector: {{app: far}}
  ports: [{{port: 80, targetPort: 8080}}]
---
apiVersion: v1
kind: Service
metadata: {{name: legacy}}
spec:
  type: NodePort
  clusterIP: {LEGACY}
  ports: [{{port: 80, targetPort: 8081, nodePort: 30170}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: legacy-1, labels: {{kubernetes.io/service-name: legacy}}}}
addressType: IPv4
ports: [{{port: 8081, protocol: TCP}}]
endpoints: [{{addresses: ["{OUTSIDE[4]}"]}}]
---
apiVersion: v1
kind: Service
metadata: {{name: once}}
spec:
  type: NodePort
  ipFamilyPolicy: PreferDualStack
  externalTrafficPolicy: Local
  selector: {{app: far}}
  ports: [{{port: 9000, protocol: UDP, nodePort: 30180}}]
"""
OLD_SERVER = """
import http.server, json
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"pod": "outside/old", "client": self.client_address[0]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
server = http.server.HTTPServer(("", 8081), Answer)
print("ready", flush=True)
server.serve_forever()
"""
BALANCER = "status: {loadBalancer: {ingress: [{ip: 198.51.100.9, ipMode: VIP}]}}"
FOLDER = "---".join(
    [
        pod("one", "node-1"),
        pod("two", "node-2"),
        pod("far", "node-2", "far"),
        service("web", 30080, f"clusterIP: {VIP[4]}\n  clusterIPs: [{VIP[4]}, '{VIP[6]}']"),
        service("local", 30090, "externalTrafficPolicy: Local", app="far"),
        service("sticky", 30100, "sessionAffinity: ClientIP"),
        service("empty", 30110, app="nobody"),
        service(
            "checked",
            30140,
            "externalTrafficPolicy: Local\n  healthCheckNodePort: 30150",
            app="far",
            status="status: {loadBalancer: {ingress: [{ip: 198.51.100.10}]}}",
        ),
        service("ringed", 30130, notes="tidegate.dev/algorithm: Maglev"),
        service("balanced", 30120, "loadBalancerSourceRanges: [172.18.0.200/32]", status=BALANCER),
        OTHERS,
    ]
)


def admit(cluster: Cluster, who: str) -> None:
    """Only an entity, an address or the pod `far` to the pods of `web`."""
    far = "{matchLabels: {app: far}}"
    peers = {
        "client": cidrs(OUTSIDE),
        "node-1": cidrs(NODES["node-1"]),
        "far": f"{{pods: {{namespaceSelector: {{any: true}}, podSelector: {far}}}}}",
    }
    peer = peers.get(who, f"{{entities: [{who}]}}")
    temporary = cluster.folder / ".policy.tmp"
    temporary.write_text(f"""
apiVersion: tidegate.dev/v1alpha1
kind: TrafficPolicy
metadata: {{name: web}}
spec:
  subject: {{podSelector: {{matchLabels: {{app: web}}}}}}
  isolates: [Ingress]
  mode: Enforce
  ingress: [{{action: Allow, peers: [{peer}], ports: [{{any: true}}]}}]
""")
    temporary.rename(cluster.folder / "policy.yaml")


def cidrs(pair: dict[int, str]) -> str:
    each = ", ".join(
        f"{{cidr: '{text}/{128 if ':' in text else 32}', except: []}}" for text in pair.values()
    )
    return f"{{cidrs: [{each}]}}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with up(tmp_path_factory.mktemp("services"), FOLDER) as found:
        yield found


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("node", ["node-1", "node-2"])
def test_node_port_from_outside(cluster: Cluster, node: str, version: int) -> None:
    """A pod of that node sees the client, one elsewhere sees the node."""
    here, there = ("one", "two") if node == "node-1" else ("two", "one")
    address = NODES[node][version]
    seen = set(cluster.ask("", address, 30080, 24))
    assert seen == {(here, OUTSIDE[version]), (there, address)}
    answered = cluster.ask("", address, 30081, 24, udp=True)
    assert {who for who, _ in answered} == {here, there}
    assert {peer for _, peer in answered} == {address}


def test_node_port_from_pods(cluster: Cluster) -> None:
    """Its own node's is translated as its socket connects, another node's at that node."""
    near = set(cluster.ask("default/one", NODES["node-1"][4], 30080, 24))
    far = set(cluster.ask("default/one", NODES["node-2"][4], 30080, 24))
    assert {who for who, _ in near} == {who for who, _ in far} == {"one", "two"}
    clients = dict(near)
    assert clients["two"].startswith("10.244.")
    assert dict(far)["two"] == clients["two"], "the node of the backend keeps the pod's address"
    assert dict(far)["one"] == NODES["node-2"][4]


def test_traffic_policy_local(cluster: Cluster) -> None:
    assert cluster.ask("", NODES["node-2"][4], 30090, 4) == [("far", OUTSIDE[4])] * 4
    assert cluster.ask("", NODES["node-1"][4], 30090) == [("timeout", "")], "not forwarded"
    (answer,) = cluster.ask("default/one", NODES["node-1"][4], 30090)
    assert answer[0] == "far", "a pod means every backend"


def test_internal_traffic_policy_local(cluster: Cluster) -> None:
    """A pod gets its own node's backend or none, though another node has one; whether its socket
    is translated or its packets are."""
    state = cluster.run_dir.read()
    assert state is not None
    netns = {p.name: Path(p.netns).name for p in state.pods}
    for who, seen in (("two", "far"), ("one", "timeout")):
        assert cluster.ask(f"default/{who}", INSIDE, 80)[0][0] == seen
        assert cluster.ask("", INSIDE, 80, netns=netns[who])[0][0] == seen


def test_host_port(cluster: Cluster) -> None:
    """Of the pod's node only; the pod sees the client. Nobody but Tidegate serves it here."""
    assert cluster.ask("", NODES["node-2"][4], 8085) == [("ported", OUTSIDE[4])]
    assert cluster.ask("", NODES["node-2"][6], 8085) == [("ported", OUTSIDE[6])]
    assert cluster.ask("", NODES["node-2"][4], 8086, udp=True)[0][0] == "ported"
    assert cluster.ask("", NODES["node-1"][4], 8085) == [("ConnectionRefusedError", "")]
    for who in ("one", "two"):
        assert cluster.ask(f"default/{who}", NODES["node-2"][4], 8085)[0][0] == "ported"


def test_a_backend_in_the_hosts_network(cluster: Cluster) -> None:
    """On the node that is asked it sees the client, else that node."""
    assert cluster.ask("", NODES["node-1"][4], 30160) == [("agent", OUTSIDE[4])]
    assert cluster.ask("", NODES["node-2"][4], 30160) == [("agent", NODES["node-2"][4])]
    for who in ("one", "two"):
        (seen,) = cluster.ask(f"default/{who}", NODES["node-1"][4], 30160)
        assert seen[0] == "agent"
        assert seen[1].startswith("10.244.")


def test_a_backend_outside_the_cluster(cluster: Cluster) -> None:
    """By an EndpointSlice that people wrote."""
    enter = ["ip", "netns", "exec", cluster.client, sys.executable, "-c", OLD_SERVER]
    server = subprocess.Popen(enter, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        for node in ("node-1", "node-2"):
            seen = cluster.ask("", NODES[node][4], 30170)
            assert seen == [("old", NODES[node][4])]
        # To pods it needs a way back: nothing is masqueraded here.
        ip("-n", cluster.client, "route", "add", "10.244.0.0/24", "via", NODES["node-1"][4])
        (answer,) = cluster.ask("default/one", LEGACY, 80)
        assert answer[0] == "old"
        assert answer[1].startswith("10.244.0.")
    finally:
        server.kill()
        server.communicate()


ANSWERS_ONCE = """
import socket, sys
s = socket.socket(socket.AF_INET6 if sys.argv[1] == "6" else socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("", 9000))
print("ready", flush=True)
s.connect(s.recvfrom(100)[1])
print("asked", flush=True)
sys.stdin.readline()
s.send(b"nobody is there any more")
s.settimeout(20)
try:
    s.recv(100)
except OSError as error:
    print(type(error).__name__)
"""
ASKS_AND_ENDS = """
import socket, sys
s = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
s.sendto(b"?", (sys.argv[1], 30180))
"""


@pytest.mark.parametrize("version", [4, 6])
def test_an_error_about_the_first_answer(cluster: Cluster, version: int) -> None:
    """Of a client outside that sends one datagram and is gone before it is answered: its stack
    tells the NodePort so, and the pod hears it."""
    state = cluster.run_dir.read()
    assert state is not None
    (far,) = (Path(p.netns).name for p in state.pods if p.name == "far")
    enter = ["ip", "netns", "exec"]
    server = subprocess.Popen(
        [*enter, far, sys.executable, "-c", ANSWERS_ONCE, str(version)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        asks = [sys.executable, "-c", ASKS_AND_ENDS, NODES["node-2"][version]]
        subprocess.run([*enter, cluster.client, *asks], check=True, timeout=60)
        assert server.stdout.readline() == "asked\n"
        assert server.communicate("go\n", timeout=60)[0] == "ConnectionRefusedError\n"
    finally:
        server.kill()
        server.communicate()


SENDS = """
import errno, socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(0.2)
last, connected = None, False
while True:
    try:
        if not connected:
            s.connect((sys.argv[1], 53))
            connected = True
        s.send(b"x")
        said = s.recv(4096).decode().split()[0].split("/")[1] + " " + s.getpeername()[0]
    except TimeoutError:
        continue
    except OSError as error:
        said = errno.errorcode[error.errno]
        connected = connected and said == "ECONNREFUSED"
    if said != last:
        print(said, flush=True)
        last = said
    time.sleep(0.05)
"""


@pytest.mark.parametrize("who", ["default/far", "node/node-2"])
def test_a_connected_datagram_socket_outlives_its_backend(
    cluster: Cluster, tmp_path: Path, who: str
) -> None:
    """A pod's is connected once and goes on sending: to another backend when its own is the
    Service's no more (though it still runs), it is refused when there is none, and served again
    after. A node's is told that it has to connect again, where this kernel can do that."""
    of_node = who.startswith("node/")
    if of_node and not datagrams.supported().ok:
        pytest.skip(datagrams.supported().detail)
    path, address = cluster.folder / "datagrams.yaml", "10.96.200.3"
    pods = {"here": "node-2", "there": "node-1"}

    def serve(*names: str) -> None:
        labelled = (pod(n, at, "datagrams" if n in names else "idle") for n, at in pods.items())
        spec = f"{{clusterIP: {address}, selector: {{app: datagrams}}, ports: [{port}]}}"
        head = "apiVersion: v1\nkind: Service\nmetadata: {name: datagrams}\n"
        written = cluster.folder / ".datagrams"
        written.write_text("---".join([*labelled, f"\n{head}spec: {spec}\n"]))
        written.rename(path)  # at once: half of it would be another state

    port = "{port: 53, targetPort: 5353, protocol: UDP}"
    serve(*pods)
    until(
        lambda: cluster.ask("default/far", address, 53, udp=True)[0][0] in pods,
        "the Service is there",
    )
    said = tmp_path / "said"
    command = [sys.executable, "-m", "tidegate_cli", "exec", who, "--"]
    with said.open("w") as file:
        sender = subprocess.Popen(
            [*command, sys.executable, "-c", SENDS, address],
            stdout=file,
            env=os.environ | {"TIDEGATE_RUN_DIR": str(cluster.run_dir.path)},
        )

    def last() -> str:
        return (said.read_text().splitlines() or [""])[-1]

    try:
        until(lambda: last().endswith(f" {address}"), "it is answered")
        first = last().split()[0]
        (other,) = pods.keys() - {first}
        for names, expected in (
            ((other,), f"{other} {address}"),
            ((), "ECONNREFUSED"),
            ((first,), f"{first} {address}"),
            ((other,), f"{other} {address}"),
        ):
            serve(*names)
            until(lambda expected=expected: last() == expected, expected)
        lines = set(said.read_text().splitlines())
        assert bool(lines & {"ECONNABORTED", "EDESTADDRREQ"}) == of_node
    finally:
        sender.kill()
        sender.communicate()
        path.unlink()


def test_health_check_port(cluster: Cluster) -> None:
    """As a load balancer asks from outside: which nodes have an endpoint of their own."""
    code = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=3).status)"
    for node, status in (("node-1", "503"), ("node-2", "200")):
        url = f"http://{NODES[node][4]}:30150/"
        argv = ["ip", "netns", "exec", cluster.client, sys.executable, "-c", code, url]
        found = subprocess.run(argv, capture_output=True, text=True)
        assert status in found.stdout + found.stderr, node


def test_load_balancer_and_its_source_ranges(cluster: Cluster) -> None:
    """The address is nobody's; the client has a route to a node for it."""
    seen = cluster.ask("", "198.51.100.9", 80, 16)
    assert {who for who, _ in seen} == {"one", "two"}
    ip("-n", cluster.client, "addr", "add", "172.18.0.201/16", "dev", "eth0")
    source = ("route", "change", "198.51.100.0/24", "via", NODES["node-1"][4], "src")
    ip("-n", cluster.client, *source, "172.18.0.201")
    assert cluster.ask("", "198.51.100.9", 80) == [("timeout", "")]
    assert cluster.ask("", NODES["node-1"][4], 30120)[0][0] in ("one", "two"), "a NodePort has none"
    ip("-n", cluster.client, *source, OUTSIDE[4])
    assert cluster.ask("", "198.51.100.9", 80)[0][0] in ("one", "two")
    assert "Denied by LB src range check" in cluster.tidegate("metrics", "list", "--node", "node-1")


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("udp", [False, True])
def test_what_nobody_serves_is_refused_at_once(cluster: Cluster, udp: bool, version: int) -> None:
    """From outside, by a pod's socket, and per packet out of a pod."""
    address, port = NODES["node-1"][version], 30111 if udp else 30110
    state = cluster.run_dir.read()
    assert state is not None
    (one,) = (Path(p.netns).name for p in state.pods if p.name == "one")
    refused = [("ConnectionRefusedError", "")]
    assert cluster.ask("", address, port, udp=udp) == refused
    assert cluster.ask("default/one", address, port, udp=udp) == refused
    assert cluster.ask("", address, port, udp=udp, netns=one) == refused


def test_per_packet_out_of_a_pod(cluster: Cluster) -> None:
    """A pod whose sockets are not translated; itself it sees as a reserved address."""
    state = cluster.run_dir.read()
    assert state is not None
    (one,) = (Path(p.netns).name for p in state.pods if p.name == "one")
    seen = dict(cluster.ask("", NODES["node-1"][4], 30080, 24, netns=one))
    assert seen.keys() == {"one", "two"}
    assert seen["one"] == HAIRPIN[4]
    assert seen["two"].startswith("10.244.")


def test_maglev(cluster: Cluster) -> None:
    found = {who for who, _ in cluster.ask("", NODES["node-1"][4], 30130, 24)}
    assert found == {"one", "two"}
    rings = json.loads(cluster.tidegate("lb", "list", "--maglev", "-o", "json"))
    rows = [row for node in rings.values() for row in node]
    assert len(rows) == 2 * 2 * 2 * 2, "nodes, families, protocols, backends"
    assert sum(row["places"] for row in rows) == 8 * 16384
    node_1, node_2 = (
        sorted((row["backend"], row["places"]) for row in rings[node]) for node in sorted(rings)
    )
    assert node_1 == node_2, "every node has the same ring"


def test_affinity(cluster: Cluster) -> None:
    for who in ("", "default/one"):
        for port, udp in ((30100, False), (30101, True)):
            seen = {found for found, _ in cluster.ask(who, NODES["node-1"][4], port, 12, udp)}
            assert len(seen) == 1, (who, port)
            assert seen <= {"one", "two"}


SEES = [
    # reason, who asks, what (a node's port or the ClusterIP), whom the policy lets in, who answers
    ("outside, to a pod of this node: the client", "outside", "node-1", "world", {"one"}),
    ("outside, to another node's: that node", "outside", "node-1", "remote-node", {"two"}),
    ("outside: the client's own address", "outside", "node-1", "client", {"one"}),
    ("that node's own address", "outside", "node-1", "node-1", {"two"}),
    ("which is never the host", "outside", "node-1", "host", set()),
    ("a pod elsewhere, to a pod of this node: the pod", "far", "node-1", "far", {"one"}),
    ("the same, back to its own node: this node", "far", "node-1", "remote-node", {"two"}),
    ("a pod, by the ClusterIP: the pod", "far", "vip", "far", {"one", "two"}),
    ("a pod, by a port of its own node: the pod", "far", "node-2", "far", {"one", "two"}),
    ("which is no node", "far", "vip", "remote-node", set()),
    ("a pod and itself: itself, whatever the policy", "one", "vip", "world", {"one"}),
    ("a pod with the policy's labels and the other", "one", "vip", "far", {"one"}),
]


def test_what_policy_sees(cluster: Cluster) -> None:
    """The table of docs/services.md, per packet, in both families. Each row is asked until its
    policy is in force."""
    state = cluster.run_dir.read()
    assert state is not None
    places = Places({p.name: p.netns for p in state.pods})
    places.paths["outside"] = f"/run/netns/{cluster.client}"

    def answers(who: str, to: str, expected: set[str]) -> bool:
        pairs = [(VIP[v], 53) if to == "vip" else (NODES[to][v], 30081) for v in (4, 6)]
        questions = [Question(who, *pair, "UDP") for pair in pairs]
        return places.heard(questions, expected, 2.0) == [expected, expected]

    try:
        for admitted in dict.fromkeys(row[3] for row in SEES):
            admit(cluster, admitted)
            for why, who, to, _, expected in (row for row in SEES if row[3] == admitted):
                until(partial(answers, who, to, expected), f"{why}: {expected or 'nobody'}")
        # What the node itself asks, by its sockets.
        for admitted, named in (("far", ["one"]), ("remote-node", ["one", "two"])):
            admit(cluster, admitted)
            for address in VIP.values():
                argv = ["exec", "node/node-1", "--", sys.executable, "-c", HEARD, address, "53"]
                until(
                    lambda w=argv, n=named: json.loads(cluster.tidegate(*w)) == n,
                    f"host for its own pod, another node for the other: {named}",
                )
    finally:
        (cluster.folder / "policy.yaml").unlink(missing_ok=True)
    until(partial(answers, "outside", "node-1", {"one", "two"}), "nobody is isolated")


def test_lists_say_it(cluster: Cluster) -> None:
    text = cluster.tidegate("lb", "list", "--node", "node-1")
    for word in ("[NodePort]", "[NodePort, Local, two-scopes]", "[NodePort, sessionAffinity]"):
        assert word in text
    assert "[LoadBalancer, check source-range]" in text
    cluster.ask("", NODES["node-1"][4], 30110)
    rows = json.loads(cluster.tidegate("lb", "list", "--node", "node-1", "--stats", "-o", "json"))
    by = {row["address"]: row for row in rows}
    assert by[f"{NODES['node-1'][4]}:30110/TCP"]["noBackend"] > 0
    assert by[f"{NODES['node-1'][4]}:30110/TCP"]["connections"] == 0
    cluster.ask("", NODES["node-1"][4], 30080)
    assert by[f"{NODES['node-1'][4]}:30080/TCP"]["service"] == "default/web"
    ranges = cluster.tidegate("lb", "list", "--node", "node-1", "--source-ranges")
    assert "default/balanced" in ranges
    assert "172.18.0.200/32" in ranges


def test_lists_say_what_was_carried(cluster: Cluster) -> None:
    """From outside and by a node's own process to a pod of that node, and by a pod's sockets."""
    asked = (
        ("node-1", f"{NODES['node-1'][4]}:30080/TCP", ("", NODES["node-1"][4], 30080), {"one"}),
        ("node-1", f"{VIP[4]}:80/TCP", ("default/agent", VIP[4], 80), {"one"}),
        ("node-2", f"{VIP[4]}:80/TCP", ("default/far", VIP[4], 80), {"one", "two"}),
    )

    def row(node: str, frontend: str) -> dict[str, int]:
        text = cluster.tidegate("lb", "list", "--node", node, "--stats", "-o", "json")
        (found,) = (row for row in json.loads(text) if row["address"] == frontend)
        return {
            key: found.get(key, 0) for key in ("packets", "bytes", "replyPackets", "replyBytes")
        }

    for node, frontend, question, counted in asked:
        before = row(node, frontend)
        answers = [who for who, _ in cluster.ask(*question, 16)]
        assert set(answers) == {"one", "two"}
        some = sum(who in counted for who in answers)

        place = node, frontend

        def more(
            place: tuple[str, str] = place, before: dict[str, int] = before, some: int = some
        ) -> bool:
            """Of each connection four packets at least go there, and three back."""
            after = row(*place)
            least = {"packets": 4, "bytes": 250, "replyPackets": 3, "replyBytes": 250}
            return all(after[key] - before[key] >= some * by for key, by in least.items())

        until(more, f"{node} has counted {some} connections")
    text = cluster.tidegate("lb", "list", "--node", "node-1", "--stats")
    assert text.split("\n")[0].split()[-2:] == ["PACKETS", "BYTES"]
