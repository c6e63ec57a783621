"""The town of the truth table: who lives there, which policies, and what then is true.

Node-1 has the pods that are asked, so `near` asks on the same node and `far` across nodes. Every
row is asked in IPv4 and in IPv6. Addresses of pods are given by `up`, so policies about them are
made once it has.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NODES = {
    "node-1": ("172.18.0.2", "fc00:f853:ccd:e793::2"),
    "node-2": ("172.18.0.3", "fc00:f853:ccd:e793::3"),
}
OUTSIDE = {
    f"outside-{n}": (f"172.18.0.{n}", f"fc00:f853:ccd:e793::{n:x}") for n in (200, 201, 202, 210)
}
NETWORK = ("172.18.0.0/16", "fc00:f853:ccd:e793::/64")
CORNER = ("172.18.0.192/28", "fc00:f853:ccd:e793::c0/124")
"""outside-200 to -202; -210 is beside it."""
PAIR = ("172.18.0.200/31", "fc00:f853:ccd:e793::c8/127")
"""outside-200 and -201."""
VIP = ("10.96.0.77", "fd00:10:96::4d")
"""Among those that an API server gives to nobody who asks for none."""
EVERY = (8080, 8081, 7000, 7001, 7003, 7004)
OUTER = 6000
"""The port of hosts outside, and of the pods on the host's network."""
SCTP_PORTS = (9000, 9001, 9002, 9003, 9004)


def both(*pairs: tuple[str, str]) -> list[tuple[str, ...]]:
    """A CIDR and excepts of each family, from pairs of the families."""
    return [tuple(pair[family] for pair in pairs) for family in (0, 1)]


def hosts(pair: tuple[str, str]) -> tuple[str, str]:
    return f"{pair[0]}/32", f"{pair[1]}/128"


# ---- who is there -------------------------------------------------------------------------


def pod(name: str, node: int = 1, labels: str = "", space: str = "default") -> str:
    number = 9090 if name == "two" else 8080
    ports = [f"{{name: http, containerPort: {number}}}", "{containerPort: 8080, protocol: UDP}"]
    ports += [f"{{containerPort: {n}}}" for n in (*EVERY, 9090) if n != number]
    ports += ["{containerPort: 8081, protocol: UDP}", "{containerPort: 7001, protocol: UDP}"]
    return f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {space}, labels: {{app: {name}, {labels}}}}}
spec:
  nodeName: node-{node}
  containers: [{{name: c, image: x, ports: [{", ".join(ports)}]}}]
"""


def host_pod(name: str, node: int, labels: str = "") -> str:
    ports = f"[{{containerPort: {OUTER}}}, {{containerPort: {OUTER}, protocol: UDP}}]"
    return f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {name}, {labels}}}}}
spec:
  nodeName: node-{node}
  hostNetwork: true
  containers: [{{name: c, image: x, ports: {ports}}}]
"""


def node(name: str, labels: str = "") -> str:
    return f"""
apiVersion: v1
kind: Node
metadata: {{name: {name}, labels: {{{labels}}}}}
"""


def namespace(team: str = "blue") -> str:
    return f"""
apiVersion: v1
kind: Namespace
metadata: {{name: blue, labels: {{team: {team}}}}}
"""


def office(*cidrs: str) -> str:
    return f"""
apiVersion: tidegate.dev/v1alpha1
kind: Identity
metadata: {{name: office}}
spec: {{cidrs: [{", ".join(map(repr, cidrs))}]}}
"""


SERVICE = f"""
apiVersion: v1
kind: Service
metadata: {{name: narcissus}}
spec:
  selector: {{app: narcissus}}
  ipFamilyPolicy: RequireDualStack
  clusterIPs: [{VIP[0]}, "{VIP[1]}"]
  clusterIP: {VIP[0]}
  ports:
  - {{name: t, port: 80, targetPort: 8080}}
  - {{name: u, port: 80, targetPort: 8080, protocol: UDP}}
"""
SERVERS: tuple[str, ...] = (
    "sctp",
    "blocks",
    "nodes",
    "node-two",
    "world",
    "probed",
    "by-name",
    "by-team",
    "own",
)
SERVERS += ("all", "hosted", "ranged", "union", "narcissus", "open", "one", "mute", "to-named")
SERVERS += ("to-hosts", "to-near", "kept", "tiers", "to-tiers", "entities", "to-entities")
INHABITANTS = {
    "node-1": node("node-1"),
    "node-2": node("node-2", "gateway: egress"),
    "blue": namespace(),
    "office": office(*hosts(OUTSIDE["outside-210"])),
    "service": SERVICE,
    **{name: pod(name) for name in SERVERS},
    "two": pod("two", 2),
    "near": pod("near", 1, "role: friend"),
    "far": pod("far", 2, "role: friend"),
    "stray": pod("stray", 1, "role: other"),
    "alien": pod("alien", 2, "role: other"),
    "liar": pod("liar", 1, "team: blue, kubernetes.io/metadata.name: blue"),
    "mate": pod("mate", 1, "role: friend", "blue"),
    "cousin": pod("cousin", 2, "role: other, team: red", "blue"),
    "host-one": host_pod("host-one", 1, "role: friend"),
    "host-two": host_pod("host-two", 2, "role: friend"),
}

# ---- what is said of them -----------------------------------------------------------------


def policy(
    subject: str,
    *ingress: str,
    egress: Sequence[str] | None = None,
    name: str = "",
    types: str = "",
) -> str:
    """Each rule a flow mapping. `egress` None: only ingress is isolated."""
    types = types or ("Ingress" if egress is None else "Egress")
    lines = [f"ingress: [{', '.join(ingress)}]"] if ingress else []
    lines += [f"egress: [{', '.join(egress)}]"] if egress else []
    spec = textwrap.indent("\n".join(lines), "  ")
    return f"""
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: {name or subject}}}
spec:
  podSelector: {{matchLabels: {{app: {subject}}}}}
  policyTypes: [{types}]
{spec}
"""


def pods_with(**labels: str) -> str:
    text = ", ".join(f"{key}: {value}" for key, value in labels.items())
    return f"{{podSelector: {{matchLabels: {{{text}}}}}}}"


def blocks(*each: tuple[str, ...]) -> str:
    """Peers: a CIDR and its excepts each, which may be two, IPv4 and IPv6."""
    return ", ".join(
        f"{{ipBlock: {{cidr: '{cidr}', except: [{', '.join(map(repr, excepts))}]}}}}"
        for cidr, *excepts in each
    )


FRIENDS = pods_with(role="friend")


def policies(addresses: Mapping[str, tuple[str, str]], cidrs: Mapping[str, tuple[str, str]]) -> str:
    """`addresses` of pods and nodes; `cidrs` of nodes' pods. Every family's blocks in one rule."""
    pod_net = ("10.244.0.0/16", "fd00:10:244::/56")
    near, alien = hosts(addresses["near"]), hosts(addresses["alien"])
    two = hosts(addresses["node-2"])
    named = "{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: blue}}}"
    team = "{namespaceSelector: {matchLabels: {team: blue}}"
    http = "ports: [{port: http}]"
    eighty = "ports: [{port: 8080}, {port: 8080, protocol: UDP}]"
    found = [
        policy(
            "sctp",
            f"{{from: [{FRIENDS}], ports: [{{port: 9000, protocol: SCTP}},"
            " {port: 9002, endPort: 9003, protocol: SCTP}]}",
        ),
        # The second's one address lies in the hole of the first; the third has another hole.
        policy(
            "blocks",
            f"{{from: [{blocks(*both(pod_net, cidrs['node-2']))}], {eighty}}}",
            f"{{from: [{blocks(*both(alien))}], {eighty}}}",
            f"{{from: [{blocks(*both(pod_net, near))}], ports: [{{port: 8081}}]}}",
        ),
        policy("nodes", f"{{from: [{blocks(*both(NETWORK, two))}]}}"),
        policy("node-two", f"{{from: [{blocks(*both(two))}]}}"),
        policy(
            "world",
            f"{{from: [{blocks(*both(CORNER, PAIR))}]}}",
            f"{{from: [{blocks(*both(hosts(OUTSIDE['outside-201'])))}]}}",
        ),
        policy("probed"),
        policy("by-name", f"{{from: [{named}]}}"),
        policy("by-team", f"{{from: [{team}, podSelector: {{matchLabels: {{role: friend}}}}}}]}}"),
        policy("own", "{from: [{podSelector: {}}]}"),
        policy("all", "{from: [{namespaceSelector: {}}]}"),
        policy("hosted", f"{{from: [{FRIENDS}]}}"),
        policy("host-one"),
        policy("ranged", "{ports: [{port: 7001, endPort: 7003}]}"),
        policy("union", f"{{from: [{FRIENDS}], ports: [{{port: 8080}}]}}"),
        policy("union", f"{{from: [{named}], ports: [{{port: 8081}}]}}", name="union-too"),
        policy("narcissus", types="Ingress, Egress"),
        policy("mute", egress=[]),
        policy(
            "to-named",
            egress=[f"{{to: [{pods_with(app='one')}, {pods_with(app='two')}], {http}}}"],
        ),
        policy(
            "to-hosts",
            egress=[
                f"{{to: [{blocks(*both(NETWORK, PAIR))}]}}",
                f"{{to: [{blocks(*both(hosts(OUTSIDE['outside-201'])))}],"
                f" ports: [{{port: {OUTER}, protocol: SCTP}}]}}",
            ],
        ),
        policy(
            "to-near",
            egress=[f"{{to: [{blocks(*both(near))}], ports: [{{port: 8080, protocol: UDP}}]}}"],
        ),
    ]
    return "---".join([*found, *tiers(), *entities()])


def traffic(
    subject: str, way: str, rules: Sequence[str], isolates: str = "isolates: []", name: str = ""
) -> str:
    return f"""
apiVersion: tidegate.dev/v1alpha1
kind: TrafficPolicy
metadata: {{name: {name or subject}}}
spec:
  subject: {{podSelector: {{matchLabels: {{app: {subject}}}}}}}
  {isolates}
  mode: Enforce
  {way.lower()}: [{", ".join(rules)}]
"""


def in_tier(name: str, tier: str, priority: int, subject: str, *rules: str, way: str) -> str:
    return f"""
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {{name: {name}}}
spec:
  tier: {tier}
  priority: {priority}
  subject: {{pods: {{podSelector: {{matchLabels: {{app: {subject}}}}}}}}}
  {way}: [{", ".join(rules)}]
"""


def tiers() -> list[str]:
    """Of `tiers`, whom the Baseline shuts; of `to-tiers`, who may go to one node and some hosts."""
    blue = "{namespaces: {matchLabels: {team: blue}}}"
    near = "{pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: near}}}}"
    here = "{pods: {podSelector: {matchLabels: {role: friend}}}}"

    def port(protocol: str, number: int) -> str:
        return f"{{{protocol}: {{destinationPort: {{number: {number}}}}}}}"

    outer = port("udp", OUTER)
    http, odd, eight = "{destinationNamedPort: http}", port("tcp", 7004), port("udp", 8080)
    some = "{tcp: {destinationPort: {range: {start: 7000, end: 7001}}}}"
    corner, network = (", ".join(map(repr, pair)) for pair in (CORNER, NETWORK))
    return [
        in_tier("gate", "Admin", 5, "tiers",
            f"{{action: Accept, from: [{blue}], protocols: [{http}]}}",
            f"{{action: Pass, from: [{near}], protocols: [{http}]}}",
            f"{{action: Deny, from: [{blue}, {near}], protocols: [{http}, {eight}]}}",
            f"{{action: Accept, from: [{here}], protocols: [{some}, {http}]}}", way="ingress"),
        in_tier("first", "Admin", 1, "tiers",
            f"{{action: Deny, from: [{here}], protocols: [{port('tcp', 7000)}]}}", way="ingress"),
        in_tier("base", "Baseline", 3, "tiers",
            f"{{action: Accept, from: [{blue}], protocols: [{odd}]}}",
            "{action: Deny, from: [{namespaces: {}}]}", way="ingress"),
        in_tier("out", "Admin", 7, "to-tiers",
            "{action: Accept, to: [{nodes: {matchLabels: {gateway: egress}}}]}",
            f"{{action: Accept, to: [{{networks: [{corner}]}}], protocols: [{outer}]}}",
            f"{{action: Deny, to: [{{networks: [{network}]}}]}}", way="egress"),
    ]  # fmt: skip


def entities() -> list[str]:
    """Of `entities` and `to-entities`, whom nothing but a TrafficPolicy isolates."""

    def rule(action: str, peer: str, port: str) -> str:
        return f"{{action: {action}, peers: [{peer}], ports: [{port}]}}"

    def tcp(port: int) -> str:
        return f"{{protocol: TCP, port: {port}}}"

    cidrs = ", ".join(
        f"{{cidr: '{cidr}', except: ['{hole}']}}" for cidr, hole in zip(CORNER, PAIR, strict=True)
    )
    near = "{pods: {namespaceSelector: {any: true}, podSelector: {matchLabels: {app: near}}}}"
    into = [
        rule("Allow", "{entities: [remote-node]}", tcp(8080)),
        rule("Allow", "{entities: [world]}", tcp(8081)),
        rule("Allow", "{entities: [cluster]}", tcp(7001)),
        rule("Allow", f"{{cidrs: [{cidrs}]}}", tcp(7003)),
        rule("Allow", "{identity: office}", tcp(7004)),
        rule("Deny", near, "{any: true}"),
        rule("Allow", "{any: true}", "{protocol: UDP, range: {start: 8081, end: 8090}}"),
    ]
    out = [
        rule("Allow", "{entities: [host]}", tcp(OUTER)),
        rule("Allow", "{entities: [world]}", f"{{protocol: UDP, port: {OUTER}}}"),
    ]
    return [
        traffic("entities", "Ingress", into, "isolates: [Ingress]"),
        traffic("to-entities", "Egress", out, "isolates: [Egress]"),
    ]


# ---- what is said of `kept`, whose flows are cut one by one --------------------------------

Each = Mapping[str, tuple[str, str]]


def kept(addresses: Each, cidrs: Each, *, changed: int = 0) -> str:
    """Who may reach `kept`: near and mate by their labels, far, alien and two by an ipBlock, hosts
    outside by another, and one by an Identity. `changed` 1, 2: what cuts some of them."""
    far, ports = cidrs["node-2"], "ports: [{any: true}]"
    alien = hosts(addresses["alien"])
    near = [] if changed == 1 else ["{from: [" + pods_with(app="near", role="friend") + "]}"]
    corner = both(CORNER, PAIR) if changed == 1 else both(CORNER)
    nodes = both(far, alien) if changed == 2 else both(far)
    found = [
        policy(
            "kept",
            *near,
            "{from: [{namespaceSelector: {matchLabels: {team: blue}}}]}",
            f"{{from: [{blocks(*corner)}]}}",
            f"{{from: [{blocks(*nodes)}]}}",
        ),
        traffic("kept", "Ingress", [f"{{action: Allow, peers: [{{identity: office}}], {ports}}}"]),
    ]
    if changed == 1:
        udp = "{port: 1, endPort: 65535, protocol: UDP}"
        found.append(policy("far", egress=[f"{{to: [{pods_with(app='kept')}], ports: [{udp}]}}"]))
    if changed == 2:
        pods = "{pods: {namespaceSelector: {any: true}, podSelector: {matchLabels: {app: far}}}}"
        deny = f"{{action: Deny, peers: [{pods}], {ports}}}"
        found += [traffic("kept", "Ingress", [deny], name="no-far"), ADMIN_DENY]
    return "---".join(found)


ADMIN_DENY = """
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: no-mate}
spec:
  tier: Admin
  priority: 1
  subject: {pods: {podSelector: {matchLabels: {app: kept}}}}
  ingress:
  - {action: Deny, from: [{pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: mate}}}}]}
"""

# ---- what is true then --------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """`protocol` "": TCP and UDP. `target` may be a pod, a node, a host outside, or "vip"."""

    why: str
    who: str
    target: str
    port: int
    protocol: str
    allowed: bool


def rows(text: str) -> list[Row]:
    """Lines of: who who… > target:port/protocol yes|no  why."""
    found = []
    for line in text.strip().splitlines():
        line, _, why = line.partition("#")
        whos, _, rest = line.partition(">")
        to, allowed = rest.split()
        place, _, protocol = to.partition("/")
        target, _, port = place.partition(":")
        found += [
            Row(why.strip(), who, target, int(port), protocol, {"yes": True, "no": False}[allowed])
            for who in whos.split()
        ]
    return found


TABLE = rows("""
near far                 > sctp:9000/SCTP     yes  # SCTP is a protocol of its own
near far                 > sctp:9001/SCTP     no   # beside the port
near far                 > sctp:9002/SCTP     yes  # the first of a range
near far                 > sctp:9003/SCTP     yes  # the last of a range
near far                 > sctp:9004/SCTP     no   # past the range
stray alien              > sctp:9000/SCTP     no   # not from everybody
near far                 > sctp:8080/         no   # SCTP is neither TCP nor UDP
near                     > ranged:9002/SCTP   no   # TCP is not SCTP
stray alien              > open:9001/SCTP     yes  # nobody isolates
near stray               > blocks:8080/       yes  # an ipBlock matches pods
far                      > blocks:8080/       no   # except matches pods
alien                    > blocks:8080/       yes  # what another rule allows lies in the hole
mate                     > blocks:8080/       yes  # whatever the namespace
stray far                > blocks:8081/TCP    yes  # each rule has its own holes
near                     > blocks:8081/TCP    no   # and this one's is one pod
outside-210 node-2       > blocks:8080/       no   # nodes are not in the pods' network
outside-200 outside-210  > nodes:8080/        yes  # hosts of the nodes' network
node-2                   > nodes:8080/        no   # except matches a node
node-1                   > nodes:8080/        yes  # the pod's own node is let in
near far                 > nodes:8080/        no   # pods have no node's address
node-2                   > node-two:8080/     yes  # an ipBlock matches a node
outside-200 far near     > node-two:8080/     no   # and only it, not its pods
outside-202              > world:8080/        yes  # in the block
outside-200              > world:8080/        no   # in its hole
outside-201              > world:8080/        yes  # in the hole, but allowed by itself
outside-210 node-2 near  > world:8080/        no   # beside the block
node-1                   > probed:8080/       yes  # what the node itself makes: a probe
node-2 outside-200       > probed:8080/       no   # another node is not the host
near far mate            > probed:8080/       no   # nobody else
mate cousin              > by-name:8080/      yes  # the namespace's default label
near liar                > by-name:8080/      no   # a pod's label is not its namespace's
mate                     > by-team:8080/      yes  # namespace and pod
cousin                   > by-team:8080/      no   # the namespace alone
near liar                > by-team:8080/      no   # the pod alone
near far stray liar      > own:8080/          yes  # an absent namespaceSelector: one's own
mate cousin outside-200  > own:8080/          no   # is not every namespace
near alien mate cousin   > all:8080/          yes  # an empty namespaceSelector: every pod
outside-200 node-2       > all:8080/          no   # but nothing else
near far                 > hosted:8080/       yes  # pods with the label
node-2                   > hosted:8080/       no   # not those on their host's network
near far outside-200     > node-1:6000/       yes  # which no policy isolates either
near far outside-200     > ranged:7001/TCP    yes  # the first of a range
near far outside-200     > ranged:7003/TCP    yes  # its last
near far outside-200     > ranged:7000/TCP    no   # before it
near far outside-200     > ranged:7004/TCP    no   # after it
near far outside-200     > ranged:7001/UDP    no   # ports are TCP's if nothing is said
near far                 > union:8080/TCP     yes  # by one of two policies
near far                 > union:8081/TCP     no   # not by the other
mate cousin              > union:8081/TCP     yes  # by the other
mate cousin              > union:8080/TCP     no   # not by the one
narcissus                > narcissus:8080/    yes  # a pod reaches itself
narcissus                > vip:80/            yes  # and by its Service
near far mate            > vip:80/            no   # others do not
narcissus                > open:8080/         no   # egress is isolated too
near far                 > mute:8080/         yes  # answers need no egress
mute                     > near:8080/         no   # nothing else goes out
mute                     > far:8080/          no   # across nodes
mute                     > outside-200:6000/  no   # nor to hosts
mute                     > node-1:6000/       no   # nor to its own node
to-named                 > one:8080/TCP       yes  # the number that the name has there
to-named                 > one:9090/TCP       no   # that it has elsewhere
to-named                 > two:9090/TCP       yes  # another number on another pod
to-named                 > two:8080/TCP       no   # its own other port
to-named                 > near:8080/TCP      no   # somebody else with the name
to-named                 > one:8080/UDP       no   # the name is TCP's
to-hosts                 > outside-202:6000/  yes  # egress to hosts
to-hosts                 > outside-200:6000/  no   # except
to-hosts                 > outside-201:6000/  no   # except, for these protocols
to-hosts                 > outside-201:6000/SCTP yes # filled for one protocol
to-hosts                 > outside-200:6000/SCTP no # for one host
to-hosts                 > node-2:6000/       yes  # a node, and who shares its network
to-hosts                 > far:8080/          no   # its pods are not there
to-near                  > near:8080/UDP      yes  # an ipBlock of one pod
to-near                  > near:8080/TCP      no   # by protocol
to-near                  > stray:8080/UDP     no   # of one
mate cousin              > tiers:8080/TCP     yes  # Admin accepts: a port by its name
mate cousin              > tiers:8080/UDP     no   # Admin denies later in order
near                     > tiers:8080/        no   # Admin passes or denies, the Baseline denies
far                      > tiers:8080/TCP     yes  # Admin accepts, a pod of its labels
far                      > tiers:7001/TCP     yes  # a range
far                      > tiers:7000/TCP     no   # a higher priority denies
stray                    > tiers:8081/        no   # the Baseline denies
mate cousin              > tiers:7004/TCP     yes  # the Baseline accepts before
near                     > tiers:7004/TCP     no   # and not everybody
outside-200 node-2       > tiers:8081/        yes  # which are no pods
to-tiers                 > node-2:6000/       yes  # a node by its labels
to-tiers                 > node-1:6000/       no   # not another
to-tiers                 > outside-202:6000/UDP yes # a network
to-tiers                 > outside-202:6000/TCP no # for one protocol
to-tiers                 > outside-210:6000/  no   # another network
node-2                   > entities:8080/TCP  yes  # remote-node
outside-200 far          > entities:8080/TCP  no   # which is neither of these
outside-200 outside-210  > entities:8081/TCP  yes  # world, those with an Identity too
node-2 far               > entities:8081/TCP  no   # which is no node and no pod
far mate node-2          > entities:7001/TCP  yes  # cluster
outside-210              > entities:7001/TCP  no   # which is not outside
outside-202              > entities:7003/TCP  yes  # a CIDR set
outside-200 outside-210 far > entities:7003/TCP no # its hole, and beside it
outside-210              > entities:7004/TCP  yes  # a host with an Identity
outside-202              > entities:7004/TCP  no   # and no other
near                     > entities:7001/TCP  no   # a deny outranks an allow
near                     > entities:8081/UDP  no   # whatever it allows
far outside-200 node-2   > entities:8081/UDP  yes  # anybody
node-1                   > entities:8080/TCP  yes  # the host is let in
to-entities              > node-1:6000/TCP    yes  # host: its own node
to-entities              > node-2:6000/TCP    no   # not another
to-entities              > outside-200:6000/UDP yes # world
to-entities              > node-2:6000/UDP    no   # no node is
near far stray mate liar > open:8080/         yes  # nobody isolates
node-1 node-2 outside-200 > open:8080/        yes  # from everywhere
""")
