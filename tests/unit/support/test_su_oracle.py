"""The oracle against answers derived by hand from the API's prose."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from support.oracle import (
    Address,
    End,
    Host,
    Oracle,
    OracleError,
    Pod,
    PolicyRef,
    RuleRef,
    selector_matches,
    verdict,
)

# Two namespaces; web and db in shop, client in both shop and other, a
# host-network agent. Labels repeat across namespaces on purpose.
PODS: dict[str, tuple[dict[str, str], list[str]]] = {
    "shop/web": ({"app": "web"}, ["10.244.0.2", "fd00:10:244::2"]),
    "shop/db": ({"app": "db", "tier": "data"}, ["10.244.1.2", "fd00:10:244:1::2"]),
    "shop/client": ({"app": "client"}, ["10.244.0.3", "fd00:10:244::3"]),
    "other/client": ({"app": "client"}, ["10.244.1.3", "fd00:10:244:1::3"]),
    "other/bare": ({}, ["10.244.1.4"]),
    "shop/agent": ({"app": "client"}, ["172.18.0.2", "fc00::2"]),
}
NODES = {"shop/web": "n0", "shop/client": "n0", "shop/agent": "n0", "shop/db": "n1"}
WEB, DB, CLIENT = Pod("shop", "web"), Pod("shop", "db"), Pod("shop", "client")
OTHER, BARE, AGENT = Pod("other", "client"), Pod("other", "bare"), Pod("shop", "agent")
ENDS: dict[str, End] = {
    "web": WEB,
    "db": DB,
    "client": CLIENT,
    "other": OTHER,
    "bare": BARE,
    "agent": AGENT,
    "other6": Pod("other", "client", 6),
    "web-ip": Address("10.244.0.2"),
    "node": Address("172.18.0.2"),
    "world": Address("192.0.2.7"),
    "world6": Address("2001:db8::1"),
    "host": Host("172.18.0.2"),
}


def cluster(*specs: str, namespace: str = "shop") -> dict[str, Any]:
    """The pods above under policies p0, p1, … whose specs are given as YAML."""
    pods = []
    for key, (labels, _) in PODS.items():
        home, name = key.split("/")
        ports = [
            {"name": "http", "containerPort": 8080},
            {"name": "dns", "containerPort": 53, "protocol": "UDP"},
        ]
        spec: dict[str, Any] = {"containers": [{"name": "c", "ports": ports}]}
        if name == "agent":
            spec["hostNetwork"] = True
        pods.append({"metadata": {"namespace": home, "name": name, "labels": labels}, "spec": spec})
    return {
        "namespaces": [{"metadata": {"name": "shop", "labels": {"team": "shop"}}}],
        "pods": pods,
        "policies": [
            {
                "metadata": {"namespace": namespace, "name": f"p{index}"},
                "spec": yaml.safe_load(spec),
            }
            for index, spec in enumerate(specs)
        ],
        "addresses": {key: addresses for key, (_, addresses) in PODS.items()},
        "nodes": NODES,
    }


def block(cidr: str, *excepts: str) -> str:
    """Ingress to web from a block, as JSON, which is YAML."""
    return to_web(json.dumps({"from": [{"ipBlock": {"cidr": cidr, "except": excepts}}]}))


DENY_INGRESS = "{podSelector: {}, policyTypes: [Ingress]}"
DENY_EGRESS = "{podSelector: {}, policyTypes: [Egress]}"
DENY_BOTH = "{podSelector: {}, policyTypes: [Ingress, Egress]}"


def to_web(rule: str) -> str:
    return f"{{podSelector: {{matchLabels: {{app: web}}}}, ingress: [{rule}]}}"


def from_web(rule: str) -> str:
    return (
        f"{{podSelector: {{matchLabels: {{app: web}}}}, policyTypes: [Egress], egress: [{rule}]}}"
    )


SHOP = "namespaceSelector: {matchLabels: {team: shop}}"
BY_NAME = "namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: other}}"
SHOP_BY_NAME = BY_NAME.replace("other", "shop")
APP_CLIENT = "podSelector: {matchLabels: {app: client}}"
TO_WEB_ALL = to_web("{}")
BY_POD = to_web(f"{{from: [{{{APP_CLIENT}}}]}}")
BY_SHOP = to_web(f"{{from: [{{{SHOP}}}]}}")
BY_OTHER = to_web(f"{{from: [{{{BY_NAME}}}]}}")
ALL_PODS = to_web("{from: [{namespaceSelector: {}}]}")
AND = to_web(f"{{from: [{{{BY_NAME}, {APP_CLIENT}}}]}}")
OR = to_web(f"{{from: [{{{BY_NAME}}}, {{{APP_CLIENT}}}]}}")

ROWS = [
    # reason, policies, "source destination port/protocol", expected
    ("no policy: not isolated", [], "world web 80/TCP", True),
    # deny all
    ("deny all ingress", [DENY_INGRESS], "client web 80/TCP", False),
    ("deny all ingress leaves egress", [DENY_INGRESS], "web world 80/TCP", True),
    ("deny all ingress, other namespace", [DENY_INGRESS], "client other 80/TCP", True),
    ("deny all egress", [DENY_EGRESS], "web world 80/TCP", False),
    ("deny all egress leaves ingress", [DENY_EGRESS], "other web 80/TCP", True),
    ("deny both", [DENY_BOTH], "client web 80/TCP", False),
    ("both ends must allow", [DENY_EGRESS, TO_WEB_ALL], "client web 80/TCP", False),
    ("ICMP is denied too", [DENY_INGRESS], "client web ICMP", False),
    # allow all
    ("allow all ingress", [DENY_INGRESS, TO_WEB_ALL], "world web 80/TCP", True),
    ("allow all is any protocol", [TO_WEB_ALL], "world web ICMP", True),
    ("empty from", [to_web("{from: []}")], "world web 80/UDP", True),
    ("null from", [to_web("{from: null, ports: null}")], "world web 80/SCTP", True),
    ("null rule is the empty rule", [to_web("null")], "world web 80/TCP", True),
    ("no rules", ["{podSelector: {}, ingress: []}"], "client web 80/TCP", False),
    ("null rules", ["{podSelector: {}, ingress: null}"], "client web 80/TCP", False),
    ("absent selector is empty", ["{ingress: []}"], "client web 80/TCP", False),
    ("not selected", [to_web("{from: []}")], "client db 80/TCP", True),
    # policyTypes
    ("absent types: ingress", ["{podSelector: {}}"], "client web 80/TCP", False),
    ("absent types: not egress", ["{podSelector: {}}"], "web world 80/TCP", True),
    ("empty egress is no egress rule", ["{egress: []}"], "web world 80/TCP", True),
    (
        "an egress rule isolates",
        ["{egress: [{to: [{podSelector: {}}]}]}"],
        "web world 80/TCP",
        False,
    ),
    ("egress rules isolate ingress too", ["{egress: [{}]}"], "other web 80/TCP", False),
    ("egress only", ["{policyTypes: [Egress], egress: [{}]}"], "other web 80/TCP", True),
    (
        "rules of a type not named are ignored",
        ["{policyTypes: [Ingress], egress: [{to: [{podSelector: {}}]}]}"],
        "web world 80/TCP",
        True,
    ),
    ("[] types default", ["{policyTypes: [], egress: [{}]}"], "other web 80/TCP", False),
    # peers
    ("podSelector: own namespace", [BY_POD], "client web 80/TCP", True),
    ("podSelector: not another", [BY_POD], "other web 80/TCP", False),
    ("podSelector: labels", [BY_POD], "db web 80/TCP", False),
    (
        "podSelector {}: every pod here",
        [to_web("{from: [{podSelector: {}}]}")],
        "db web 80/TCP",
        True,
    ),
    (
        "podSelector {}: no external",
        [to_web("{from: [{podSelector: {}}]}")],
        "world web 80/TCP",
        False,
    ),
    ("namespaceSelector", [BY_SHOP], "db web 80/TCP", True),
    ("namespaceSelector: other", [BY_SHOP], "other web 80/TCP", False),
    ("name label, Namespace missing", [BY_OTHER], "bare web 80/TCP", True),
    (
        "name label, other labels",
        [to_web(f"{{from: [{{{SHOP_BY_NAME}}}]}}")],
        "db web 80/TCP",
        True,
    ),
    ("name label: not own", [BY_OTHER], "db web 80/TCP", False),
    ("namespaceSelector {}: all pods", [ALL_PODS], "bare web 80/TCP", True),
    ("namespaceSelector {}: no external", [ALL_PODS], "world web 80/TCP", False),
    (
        "null selector is absent",
        [to_web("{from: [{podSelector: {}, namespaceSelector: null}]}")],
        "other web 80/TCP",
        False,
    ),
    ("AND: both", [AND], "other web 80/TCP", True),
    ("AND: namespace only", [AND], "bare web 80/TCP", False),
    ("AND: pod only", [AND], "client web 80/TCP", False),
    ("OR: namespace only", [OR], "bare web 80/TCP", True),
    ("OR: pod only", [OR], "client web 80/TCP", True),
    ("OR: neither", [OR], "db web 80/TCP", False),
    # ipBlock
    ("block", [block("192.0.2.0/24")], "world web 80/TCP", True),
    ("block: outside", [block("192.0.3.0/24")], "world web 80/TCP", False),
    ("block: except", [block("192.0.2.0/24", "192.0.2.0/29")], "world web 80/TCP", False),
    (
        "an except takes nothing from another item",
        [
            to_web(
                "{from: [{ipBlock: {cidr: 192.0.2.0/24, except: [192.0.2.0/29]}},"
                " {ipBlock: {cidr: 192.0.2.7/32}}]}"
            )
        ],
        "world web 80/TCP",
        True,
    ),
    ("block matches pods", [block("10.244.1.0/24")], "other web 80/TCP", True),
    ("block: pod elsewhere", [block("10.244.1.0/24")], "client web 80/TCP", False),
    (
        "except matches pods",
        [from_web("{to: [{ipBlock: {cidr: 0.0.0.0/0, except: [10.244.1.2/32]}}]}")],
        "web db 80/TCP",
        False,
    ),
    ("::/0 is not IPv4", [block("::/0")], "world web 80/TCP", False),
    ("0.0.0.0/0 is not IPv6", [block("0.0.0.0/0")], "world6 web 80/TCP", False),
    ("IPv6 block", [block("2001:db8::/64")], "world6 web 80/TCP", True),
    ("IPv6 of a pod", [block("fd00:10:244:1::/64")], "other6 web 80/TCP", True),
    # ports
    ("port", [to_web("{ports: [{port: 80}]}")], "client web 80/TCP", True),
    ("other port", [to_web("{ports: [{port: 80}]}")], "client web 81/TCP", False),
    ("protocol defaults to TCP", [to_web("{ports: [{port: 80}]}")], "client web 80/UDP", False),
    (
        "null protocol is TCP",
        [to_web("{ports: [{port: 80, protocol: null}]}")],
        "client web 80/TCP",
        True,
    ),
    ("no port: the protocol", [to_web("{ports: [{protocol: UDP}]}")], "client web 9/UDP", True),
    ("no port: only it", [to_web("{ports: [{protocol: UDP}]}")], "client web 9/TCP", False),
    ("empty item: all TCP", [to_web("{ports: [{}]}")], "client web 9/TCP", True),
    ("SCTP", [to_web("{ports: [{port: 80, protocol: SCTP}]}")], "client web 80/SCTP", True),
    (
        "SCTP is not TCP",
        [to_web("{ports: [{port: 80, protocol: SCTP}]}")],
        "client web 80/TCP",
        False,
    ),
    (
        "ports never match ICMP",
        [to_web("{ports: [{protocol: UDP}, {}]}")],
        "client web ICMP",
        False,
    ),
    (
        "peers AND ports",
        [to_web(f"{{from: [{{{APP_CLIENT}}}], ports: [{{port: 80}}]}}")],
        "db web 80/TCP",
        False,
    ),
    (
        "egress: destination's port",
        [from_web("{ports: [{port: 53, protocol: UDP}]}")],
        "web world 53/UDP",
        True,
    ),
    (
        "egress dns only",
        [from_web("{ports: [{port: 53, protocol: UDP}, {port: 53}]}")],
        "web db 5432/TCP",
        False,
    ),
    # union of policies
    ("union: a later policy allows", [DENY_INGRESS, BY_POD, BY_OTHER], "bare web 80/TCP", True),
    # exemptions and host network
    ("a pod reaches itself", [DENY_BOTH], "web web 80/TCP", True),
    ("also by its address", [DENY_BOTH], "web web-ip 80/TCP", True),
    ("from its own node", [DENY_BOTH], "host web 80/TCP", True),
    ("another node's address is no exemption", [DENY_BOTH], "node web 80/TCP", False),
    ("to its node: egress policy", [DENY_EGRESS], "web node 80/TCP", False),
    ("host-network pod, same node", [DENY_INGRESS], "agent web 80/TCP", True),
    ("same node, pod by address", [DENY_INGRESS], "agent web-ip 80/TCP", True),
    ("host-network pod, other node", [DENY_INGRESS], "agent db 80/TCP", False),
    (
        "host-network pod is no peer",
        ["{ingress: [{from: [{podSelector: {}}]}]}"],
        "agent db 80/TCP",
        False,
    ),
    (
        "nor in a namespace",
        ["{ingress: [{from: [{namespaceSelector: {}}]}]}"],
        "agent db 80/TCP",
        False,
    ),
    (
        "block on the node's address",
        ["{ingress: [{from: [{ipBlock: {cidr: 172.18.0.2/32}}]}]}"],
        "agent db 80/TCP",
        True,
    ),
    ("host-network pod is no subject", [DENY_INGRESS], "world agent 80/TCP", True),
    ("nor for egress", [DENY_EGRESS], "agent world 80/TCP", True),
]


@pytest.mark.parametrize(
    ("policies", "flow", "expected"),
    [row[1:] for row in ROWS],
    ids=[row[0] for row in ROWS],
)
def test_recipe(policies: list[str], flow: str, expected: bool) -> None:
    src, dst, port_protocol = flow.split()
    port, _, protocol = port_protocol.rpartition("/")
    answer = verdict(
        cluster(*policies), ENDS[src], ENDS[dst], int(port) if port else None, protocol
    )
    assert expected == answer.allowed


NAMED = [
    # reason, ports, port, protocol, allowed by the API
    ("named port", "{port: http}", 8080, "TCP", True),
    ("named port, other number", "{port: http}", 80, "TCP", False),
    ("named port, other protocol", "{port: dns}", 53, "TCP", False),
    ("named port, UDP", "{port: dns, protocol: UDP}", 53, "UDP", True),
]


@pytest.mark.parametrize(
    ("ports", "port", "protocol", "expected"),
    [row[1:] for row in NAMED],
    ids=[row[0] for row in NAMED],
)
def test_a_port_by_its_name(ports: str, port: int, protocol: str, expected: bool) -> None:
    world = cluster(to_web(f"{{ports: [{ports}]}}"))
    assert expected == verdict(world, CLIENT, WEB, port, protocol).allowed


@pytest.mark.parametrize(("port", "expected"), [(79, False), (80, True), (90, True), (91, False)])
def test_end_port_is_inclusive(port: int, expected: bool) -> None:
    world = cluster(to_web("{ports: [{port: 80, endPort: 90}]}"))
    assert verdict(world, CLIENT, WEB, port, "TCP").allowed == expected


def test_names_every_allowing_rule_and_every_isolating_policy() -> None:
    world = cluster(
        DENY_BOTH, to_web("{ports: [{port: 81}]}, {}, {ports: [{port: 80}]}"), DENY_INGRESS
    )
    world["policies"].append(
        {
            "metadata": {"namespace": "other", "name": "out"},
            "spec": {"policyTypes": ["Egress"], "egress": [{"ports": [{"port": 80}]}]},
        }
    )
    answer = verdict(world, OTHER, WEB, 80, "TCP")
    assert answer.allowed
    assert {RuleRef("shop", "p1", 1), RuleRef("shop", "p1", 2)} == answer.ingress_by
    assert {RuleRef("other", "out", 0)} == answer.egress_by
    assert {PolicyRef("shop", name) for name in ("p0", "p1", "p2")} == answer.ingress_isolated_by
    assert {PolicyRef("other", "out")} == answer.egress_isolated_by


def test_exemptions_are_named() -> None:
    world = cluster(DENY_BOTH)
    assert verdict(world, WEB, WEB, 80, "TCP").exempt == "self"
    host = verdict(world, Host("172.18.0.2"), WEB, 80, "TCP")
    assert (host.exempt, len(host.ingress_isolated_by)) == ("host", 1)
    assert verdict(world, CLIENT, WEB, 80, "TCP").exempt == ""


LABELS = {"app": "web", "empty": ""}
SELECTORS = [
    ("empty", "{}", True),
    ("nulls", "{matchLabels: null, matchExpressions: null}", True),
    ("label", "{matchLabels: {app: web}}", True),
    ("label absent", "{matchLabels: {x: web}}", False),
    ("empty value is a value", "{matchLabels: {empty: ''}}", True),
    ("an absent key is not the empty value", "{matchLabels: {x: ''}}", False),
    ("In", "{matchExpressions: [{key: app, operator: In, values: [db, web]}]}", True),
    ("In, absent", "{matchExpressions: [{key: x, operator: In, values: [web, '']}]}", False),
    ("NotIn", "{matchExpressions: [{key: app, operator: NotIn, values: [web]}]}", False),
    ("NotIn, other", "{matchExpressions: [{key: app, operator: NotIn, values: [db]}]}", True),
    ("NotIn, absent", "{matchExpressions: [{key: x, operator: NotIn, values: [web]}]}", True),
    ("Exists", "{matchExpressions: [{key: empty, operator: Exists}]}", True),
    ("Exists, absent", "{matchExpressions: [{key: x, operator: Exists, values: []}]}", False),
    ("DoesNotExist", "{matchExpressions: [{key: app, operator: DoesNotExist}]}", False),
    ("DoesNotExist, absent", "{matchExpressions: [{key: x, operator: DoesNotExist}]}", True),
    (
        "labels AND expressions",
        "{matchLabels: {app: web}, matchExpressions: [{key: app, operator: NotIn, values: [web]}]}",
        False,
    ),
]


@pytest.mark.parametrize(
    ("selector", "expected"), [r[1:] for r in SELECTORS], ids=[r[0] for r in SELECTORS]
)
def test_selector(selector: str, expected: bool) -> None:
    assert expected == selector_matches(yaml.safe_load(selector), LABELS)


def test_a_pod_cannot_set_its_namespace() -> None:
    world = cluster(to_web(f"{{from: [{{{BY_NAME}}}]}}"))
    world["pods"][2]["metadata"]["labels"] = {"kubernetes.io/metadata.name": "other"}
    assert not verdict(world, CLIENT, WEB, 80, "TCP").allowed


def test_namespace_defaults_to_default() -> None:
    world = cluster("{podSelector: {}}")
    del world["policies"][0]["metadata"]["namespace"]
    world["pods"].append({"metadata": {"name": "x"}, "spec": {}})
    world["addresses"]["default/x"] = ["10.244.1.9"]
    assert not verdict(world, WEB, Pod("default", "x"), 80, "TCP").allowed


@pytest.mark.parametrize(
    ("src", "dst"),
    [
        (Pod("shop", "nobody"), WEB),
        (Address("2001:db8::1"), BARE),  # has no IPv6 address
        (Address("2001:db8::1"), Address("192.0.2.1")),
        (Host("10.244.0.3"), WEB),
    ],
)
def test_unknown_ends_are_errors(src: Any, dst: Any) -> None:
    with pytest.raises(OracleError):
        Oracle(cluster()).verdict(src, dst, 80, "TCP")
