"""Services of every kind, from YAML to what nodes read: frontends, policies, hints, who has an
address that two claim; and that a changed world costs no more and says no other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given as given_
from hypothesis import settings
from hypothesis import strategies as st
from msgspec import UNSET
from tidegate_api.state import Frontend, Masquerade, ServicePort
from tidegate_operator import identities, publish, services
from tidegate_operator.cluster.main import parse
from tidegate_operator.compile import Compiler, Desired, compile
from tidegate_operator.compile.services import ServiceTable
from tidegate_operator.identities import EMPTY_LEDGER
from tidegate_operator.objects import Backend, EndpointPort, Endpoints, ObjectName, Outside, Service
from tidegate_operator.objects import ServicePort as Port
from tidegate_operator.problems import Problem
from tidegate_operator.world import EMPTY_WORLD, Options, build
from unit.operator.given import documents, pod, read, service

OPEN = Options(services=services.Settings(external_ips=("192.0.2.0/24", "2001:db8::/32")))
NODES = "".join(
    f"---\napiVersion: v1\nkind: Node\n"
    f"metadata: {{name: n{i}, labels: {{topology.kubernetes.io/zone: z{i}}}}}\n"
    for i in (1, 2)
)
PODS = pod("a", "{a: b}", rest=", nodeName: n1") + pod("b", "{a: b}", rest=", nodeName: n2")


def made(text: str, options: Options = OPEN) -> tuple[Desired, tuple[Problem, ...]]:
    now, problems = build(documents(NODES + text), options)
    desired = compile(now, identities.allocate(now, EMPTY_LEDGER))
    return desired, (*problems, *desired.problems)


def one(spec: str, rest: str = "", options: Options = OPEN) -> ServicePort:
    text = service("s", spec) + rest
    [port] = made(PODS + text, options)[0].services["default/s"]
    return port


def words(front: Frontend) -> str:
    kind = "" if front.kind is UNSET else f" {front.kind}"
    return f"{front.address}:{front.port}{kind}"


BASE = "selector: {a: b}, clusterIP: 10.96.0.99"
LB = "status: {loadBalancer: {ingress: [%s]}}\n"
FRONTENDS = [
    ("ClusterIP", f"{{{BASE}, ports: [{{port: 80}}]}}", "", ["10.96.0.99:80"]),
    ("its own node port", f"{{type: NodePort, {BASE}, ports: [{{port: 80, nodePort: 31000}}]}}",
     "", ["10.96.0.99:80", "0.0.0.0:31000 NodePort"]),
    ("an external IP", f"{{{BASE}, externalIPs: [192.0.2.7], ports: [{{port: 80}}]}}",
     "", ["10.96.0.99:80", "192.0.2.7:80 ExternalIP"]),
    ("one that is not allowed", f"{{{BASE}, externalIPs: [198.51.100.7], ports: [{{port: 80}}]}}",
     "", ["10.96.0.99:80"]),
    ("of a family that the Service has not",
     f"{{{BASE}, externalIPs: ['2001:db8::7'], ports: [{{port: 80}}]}}", "", ["10.96.0.99:80"]),
    ("a load balancer, no node ports",
     f"{{type: LoadBalancer, allocateLoadBalancerNodePorts: false, {BASE}, ports: [{{port: 80}}]}}",
     LB % "{ip: 203.0.113.5}, {hostname: x}", ["10.96.0.99:80", "203.0.113.5:80 LoadBalancer"]),
    ("one that proxies",
     f"{{type: LoadBalancer, allocateLoadBalancerNodePorts: false, {BASE}, ports: [{{port: 80}}]}}",
     LB % "{ip: 203.0.113.5, ipMode: Proxy}", ["10.96.0.99:80"]),
    ("status of a Service that is no load balancer", f"{{{BASE}, ports: [{{port: 80}}]}}",
     LB % "{ip: 203.0.113.5}", ["10.96.0.99:80"]),
    ("both, at one address",
     f"{{type: LoadBalancer, externalIPs: [192.0.2.7], {BASE},"
     " ports: [{port: 80, nodePort: 31000}]}", LB % "{ip: 192.0.2.7}",
     ["10.96.0.99:80", "192.0.2.7:80 LoadBalancer", "0.0.0.0:31000 NodePort"]),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "spec", "rest", "expected"), FRONTENDS)
def test_frontends(reason: str, spec: str, rest: str, expected: list[str]) -> None:
    assert [words(front) for front in one(spec, rest).frontends] == expected


NOTHING = [
    ("headless", service("s", "{clusterIP: None, selector: {a: b}, ports: [{port: 80}]}")),
    ("ExternalName", service("s", "{type: ExternalName, externalName: example.org}")),
    ("another proxy's",
     service("s", "{selector: {a: b}, ports: [{port: 80}]}").replace(
         "namespace: default",
         "namespace: default, labels: {service.kubernetes.io/service-proxy-name: other}")),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "text"), NOTHING)
def test_nothing_is_programmed(reason: str, text: str) -> None:
    desired, problems = made(PODS + text)
    assert (desired.services, problems) == ({}, ())


def test_both_families_have_ports_of_their_own() -> None:
    spec = (
        "{type: NodePort, ipFamilyPolicy: RequireDualStack, selector: {a: b},"
        " ports: [{port: 80, nodePort: 31000, targetPort: web}]}"
    )
    ports = made(PODS + service("s", spec))[0].services["default/s"]
    assert [port.frontends[1].address for port in ports] == ["0.0.0.0", "::"]
    assert [{":" in b.address for b in port.backends} for port in ports] == [{False}, {True}]


FIELDS = [
    ("no affinity", "", {}),
    ("affinity", "sessionAffinity: ClientIP,", {"affinity": 10_800}),
    ("affinity for a while", "sessionAffinity: ClientIP,"
     " sessionAffinityConfig: {clientIP: {timeoutSeconds: 5}},", {"affinity": 5}),
    ("internal", "internalTrafficPolicy: Local,", {"internal": "Local"}),
    ("external, of a Service that is not reached from outside",
     "externalTrafficPolicy: Local,", {}),
    ("external", "type: NodePort, externalTrafficPolicy: Local,", {"external": "Local"}),
    ("source ranges of what is no load balancer", "loadBalancerSourceRanges: [192.0.2.0/24],", {}),
    ("source ranges", "type: LoadBalancer, loadBalancerSourceRanges: [' 192.0.2.0/24'],"
     " healthCheckNodePort: 31999,", {"source_ranges": ["192.0.2.0/24"]}),
    ("everybody", "type: LoadBalancer, loadBalancerSourceRanges: [0.0.0.0/0, 192.0.2.0/24],", {}),
    ("ranges of the other family", "type: LoadBalancer, loadBalancerSourceRanges: ['::1/128'],",
     {}),
    ("health check", "type: LoadBalancer, externalTrafficPolicy: Local,"
     " healthCheckNodePort: 31999,", {"external": "Local", "health_check_port": 31999}),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "fields", "expected"), FIELDS)
def test_fields(reason: str, fields: str, expected: Mapping[str, Any]) -> None:
    port = one(f"{{{fields} selector: {{a: b}}, ports: [{{port: 80}}]}}")
    names = ("affinity", "internal", "external", "source_ranges", "algorithm", "health_check_port")
    found = {name: getattr(port, name) for name in names}
    assert {name: value for name, value in found.items() if value is not UNSET} == expected


@pytest.mark.parametrize(
    ("by_default", "annotation", "expected"),
    [
        (False, "", UNSET),
        (False, "Maglev", "Maglev"),
        (True, "", "Maglev"),
        (True, "Random", UNSET),
        (True, "Fastest", "Maglev"),
    ],
)
def test_algorithm(by_default: bool, annotation: str, expected: object) -> None:
    text = service("s", "{selector: {a: b}, ports: [{port: 80}]}")
    if annotation:
        key = services.ALGORITHM_ANNOTATION
        text = text.replace(
            "namespace: default", f"namespace: default, annotations: {{{key}: {annotation}}}"
        )
    options = Options(services=services.Settings(maglev=by_default))
    desired, problems = made(PODS + text, options)
    [port] = desired.services["default/s"]
    assert (port.algorithm, len(problems)) == (expected, annotation == "Fastest")


HINTS = [
    ("none", "", (UNSET, UNSET)),
    ("close", "trafficDistribution: PreferClose,", (["z1"], UNSET)),
    ("zone", "trafficDistribution: PreferSameZone,", (["z1"], UNSET)),
    ("node", "trafficDistribution: PreferSameNode,", (["z1"], ["n1"])),
    ("Local, where hints count for nothing",
     "internalTrafficPolicy: Local, trafficDistribution: PreferSameNode,", (UNSET, UNSET)),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "fields", "expected"), HINTS)
def test_derived_hints(reason: str, fields: str, expected: object) -> None:
    backend = one(f"{{{fields} selector: {{a: b}}, ports: [{{port: 80}}]}}").backends[0]
    assert (backend.zones, backend.nodes) == expected


def test_a_zone_is_told_only_where_a_service_asks() -> None:
    spec = "{%s selector: {a: b}, ports: [{port: 80}]}"
    plain, _ = made(PODS + service("s", spec % ""))
    near, _ = made(PODS + service("s", spec % "trafficDistribution: PreferSameZone,"))
    assert [node.zone for node in plain.nodes.values()] == ["", ""]
    assert [node.zone for node in near.nodes.values()] == ["z1", "z2"]
    formats = [publish.node_object("n1", found.nodes["n1"], {}).spec.format for found in
               (plain, near)]  # fmt: skip
    assert formats == [1, 2]


SLICE = """
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: s-%d, labels: {kubernetes.io/service-name: s}}
addressType: IPv4
endpoints: [%s]
ports: [{port: 8080}]
"""
CONDITIONS = [
    ("nothing said", "", [UNSET]),
    ("ready", "conditions: {ready: true}", [UNSET]),
    ("not ready", "conditions: {ready: false}", []),
    ("null is ready", "conditions: {ready: null, serving: null}", [UNSET]),
    ("ends and serves", "conditions: {ready: false, serving: true, terminating: true}",
     ["Terminating"]),
    ("ends, of serving nothing said", "conditions: {ready: false, terminating: true}",
     ["Terminating"]),
    ("ends and no longer serves", "conditions: {ready: false, serving: false, terminating: true}",
     []),
    ("serves and is not ready", "conditions: {ready: false, serving: true}", []),
    ("published while it is not ready", "conditions: {ready: true, serving: false,"
     " terminating: true}", [UNSET]),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "conditions", "expected"), CONDITIONS)
def test_conditions(reason: str, conditions: str, expected: list[object]) -> None:
    text = SLICE % (1, f"{{addresses: [192.0.2.1], {conditions}}}")
    port = one("{ports: [{port: 80}]}", text)
    assert [backend.state for backend in port.backends] == expected


def test_an_endpoint_in_two_slices_is_one_and_the_ready_one_counts() -> None:
    end = "conditions: {ready: false, terminating: true}"
    text = SLICE % (1, f"{{addresses: [192.0.2.1], {end}}}") + SLICE % (
        2,
        "{addresses: [192.0.2.1]}",
    )
    port = one("{ports: [{port: 80}]}", text)
    assert [(b.address, b.state) for b in port.backends] == [("192.0.2.1", UNSET)]


def test_hints_that_not_every_ready_endpoint_has_are_left_out() -> None:
    some = "{addresses: [192.0.2.1], hints: {forZones: [{name: z2}, {name: z1}]}}"
    port = one("{ports: [{port: 80}]}", SLICE % (1, f"{some}, {{addresses: [192.0.2.2]}}"))
    assert [b.zones for b in port.backends] == [UNSET, UNSET]
    ending = "{addresses: [192.0.2.2], conditions: {ready: false, terminating: true}}"
    port = one("{ports: [{port: 80}]}", SLICE % (1, f"{some}, {ending}"))
    assert [b.zones for b in port.backends] == [["z1", "z2"], UNSET]


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.1.1", "0.0.0.0", "224.0.0.1"])
def test_special_addresses_are_no_endpoints(address: str) -> None:
    found = read(a__yaml=SLICE % (1, f"{{addresses: [{address}]}}"))
    assert ([p.severity for p in found.problems], found.documents) == (["error"], ())
    assert "unspecified, loopback or link-local" in found.problems[0].message


def test_a_service_without_endpoints_is_there() -> None:
    desired, problems = made(service("s", "{ports: [{port: 80}]}"))
    [port] = desired.services["default/s"]
    assert (len(port.frontends), port.backends) == (1, [])
    assert [problem.field for problem in problems] == ["spec.selector"]


# ---- numbers of the node -------------------------------------------------------------


def test_node_ports_are_given_kept_and_distinct() -> None:
    spec = "{type: NodePort, selector: {a: b}, ports: [{port: 80}]}"
    names = [f"s{i}" for i in range(20)]
    first, _ = build(documents("".join(service(name, spec) for name in names)))
    given = {str(n): s.ports[0].node_port for n, s in first.services.items()}
    assert len(set(given.values())) == 20
    assert all(30_000 <= number < 32_768 for number in given.values())
    taken = spec.replace("80", f"80, nodePort: {given['default/s3']}")
    second, _ = build(
        documents("".join(service(name, spec) for name in names[:10]) + service("t", taken)),
        Options(),
        first,
    )
    after = {str(n): s.ports[0].node_port for n, s in second.services.items()}
    assert after["default/t"] == given["default/s3"] != after["default/s3"]
    stay = set(names[:10]) - {"s3"}
    assert {after[f"default/{n}"] == given[f"default/{n}"] for n in stay} == {True}


def test_a_load_balancer_with_local_policy_gets_a_health_check_port() -> None:
    spec = (
        "{type: LoadBalancer, externalTrafficPolicy: Local, selector: {a: b}, ports: [{port: 80}]}"
    )
    port = one(spec)
    assert port.health_check_port is not UNSET
    assert port.health_check_port != port.frontends[-1].port


PRIMARY = [
    ("the first of each family", (), ("10.0.0.1", "fd00::1")),
    ("those inside", ("10.0.0.2/32", "2001:db8::/32"), ("10.0.0.2",)),
]


@pytest.mark.parametrize(("reason", "cidrs", "expected"), PRIMARY)
def test_node_port_addresses(reason: str, cidrs: tuple[str, ...], expected: object) -> None:
    addresses = ("10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2")
    assert services.port_addresses(addresses, services.Settings(node_ports=cidrs)) == expected


def test_host_ports_are_the_nodes() -> None:
    text = (
        "---\napiVersion: v1\nkind: Pod\nmetadata: {name: h}\nspec: {nodeName: n1, containers:"
        " [{name: c, ports: [{containerPort: 53, hostPort: 5353, protocol: UDP},"
        " {containerPort: 80, hostPort: 8080, hostIP: 172.18.0.2},"
        " {containerPort: 81, hostPort: 81, hostIP: 0.0.0.0}]}]}\n"
    )
    desired, _ = made(text)
    [endpoint] = desired.nodes["n1"].endpoints
    found = msgspec.to_builtins(endpoint.host_ports)
    assert found == [
        {"port": 81, "protocol": "TCP", "target": 81},
        {"port": 5353, "protocol": "UDP", "target": 53},
        {"port": 8080, "protocol": "TCP", "target": 80, "address": "172.18.0.2"},
    ]
    assert desired.nodes["n1"].port_addresses == ("172.18.0.2", "fc00:f853:ccd:e793::2")
    assert desired.nodes["n2"].port_addresses == ()
    item = publish.node_object("n1", desired.nodes["n1"], {})
    assert (item.spec.format, publish._says(item.spec, desired.nodes["n1"], {})) == (2, True)


def test_masquerading_is_said_to_every_node_or_to_none() -> None:
    """Off, the bytes are those of before."""
    for excludes, form in ((None, 1), ((), 2), (("192.0.2.0/24",), 2)):
        options = Options(services=services.Settings(masquerade=excludes))
        desired, _ = made(PODS, options)
        for name in ("n1", "n2"):
            spec = publish.node_object(name, desired.nodes[name], {}).spec
            assert spec.format == form
            assert spec.masquerade == (
                UNSET if excludes is None else Masquerade(excludes=list(excludes))
            )
            assert publish._says(spec, desired.nodes[name], {})
            other = replace(desired.nodes[name], masquerade=("203.0.113.0/24",))
            assert not publish._says(spec, other, {})


def test_the_operator_is_told_by_flags() -> None:
    assert parse([]).services.masquerade is None
    assert parse(["--masquerade"]).services.masquerade == ()
    given = ["--masquerade", "--non-masquerade-cidrs=192.0.2.0/24,10.0.0.0/8"]
    assert parse(given).services.masquerade == ("10.0.0.0/8", "192.0.2.0/24")
    assert parse(given[1:]).services.masquerade is None


# ---- who has what two claim ----------------------------------------------------------


def claim(name: str, since: str = "", port: str = "port: 80, nodePort: 31000") -> str:
    text = service(
        name,
        f"{{type: NodePort, externalIPs: [192.0.2.7], selector: {{a: b}}, ports: [{{{port}}}]}}",
    )
    stamp = f"namespace: default, creationTimestamp: '{since}'"
    return text.replace("namespace: default", stamp) if since else text


CLAIMS = [
    ("the name", [("a", ""), ("b", "")], "a"),
    ("the older", [("a", "2026-02-01T00:00:00Z"), ("b", "2026-01-01T00:00:00Z")], "b"),
    ("whose age is known", [("a", ""), ("b", "2026-01-01T00:00:00Z")], "b"),
]


@pytest.mark.parametrize(("reason", "claims", "winner"), CLAIMS)
def test_two_claim_one_address(reason: str, claims: list[tuple[str, str]], winner: str) -> None:
    desired, problems = made(PODS + "".join(claim(*one) for one in claims))
    outer = {
        name: [words(f) for p in ports for f in p.frontends if f.kind is not UNSET]
        for name, ports in desired.services.items()
    }
    full = ["192.0.2.7:80 ExternalIP", "0.0.0.0:31000 NodePort"]
    [loser] = {name for name, _ in claims} - {winner}
    assert outer == {f"default/{winner}": full, f"default/{loser}": []}
    assert [(p.object, p.field) for p in problems] == [
        (f"Service default/{loser}", "spec.externalIPs"),
        (f"Service default/{loser}", "spec.ports"),
    ]
    assert all(f"belongs to Service default/{winner}" in p.message for p in problems)


def test_a_cluster_ip_is_nobody_elses() -> None:
    own = service("z", "{clusterIP: 10.96.0.7, selector: {a: b}, ports: [{port: 80}]}")
    other = service("a", "{externalIPs: [10.96.0.7], selector: {a: b}, ports: [{port: 80}]}")
    options = Options(services=services.Settings(external_ips=("0.0.0.0/0",)))
    desired, problems = made(PODS + own + other, options)
    assert [words(f) for f in desired.services["default/z"][0].frontends] == ["10.96.0.7:80"]
    assert len(desired.services["default/a"][0].frontends) == 1
    assert [p.object for p in problems] == ["Service default/a"]


# ---- the same, whatever came before ---------------------------------------------------

NAMES = ("a", "b", "c", "d")


@st.composite
def tables(draw: st.DrawFn) -> dict[ObjectName, tuple[Service, Endpoints]]:
    found = {}
    for index, name in enumerate(NAMES):
        if not draw(st.booleans()):
            continue
        item = Service(
            name=ObjectName("x", name),
            type="NodePort",
            selector=None,
            ports=(Port(80, "TCP", "", 80, draw(st.sampled_from((0, 31000, 31001)))),),
            cluster_ips=draw(st.sampled_from(((), (f"10.96.0.{index + 1}",)))),
            origin=None,
            outside=draw(
                st.sampled_from(((), (Outside("ExternalIP", f"10.96.0.{draw(ONE_TO_4)}"),)))
            ),
            since=draw(st.sampled_from(("", "2026-01-01T00:00:00Z"))),
        )
        backends = draw(st.sampled_from(((), (Backend("10.244.0.2", 80, "n", ("z",)),))))
        ports = (EndpointPort(80, "TCP", 4, backends),) if item.cluster_ips else ()
        found[item.name] = (item, Endpoints(ports))
    return found


ONE_TO_4 = st.integers(1, 4)


@settings(max_examples=150, deadline=None)
@given_(st.lists(tables(), min_size=1, max_size=4))
def test_a_table_does_not_remember(
    states: list[dict[ObjectName, tuple[Service, Endpoints]]],
) -> None:
    running = ServiceTable()
    for state in states:
        items = {name: item for name, (item, _) in state.items()}
        endpoints = {name: found for name, (_, found) in state.items()}
        running.update(items, endpoints)
        fresh = ServiceTable()
        fresh.update(items, endpoints)
        assert list(running.entries.items()) == list(fresh.entries.items())
        assert running.problems({}) == fresh.problems({})
        assert (running.asks_zones, running.asks_node_ports) == (
            fresh.asks_zones,
            fresh.asks_node_ports,
        )


def test_a_changed_folder_says_what_a_fresh_one_says() -> None:
    texts = [
        PODS + claim("a") + claim("b"),
        PODS + claim("b"),
        PODS + claim("a", "2026-01-01T00:00:00Z") + claim("b"),
        PODS,
        claim("b") + claim("a"),
    ]
    compiler, before, ledger = Compiler(), EMPTY_WORLD, EMPTY_LEDGER
    for text in texts:
        before, _ = build(documents(NODES + text), OPEN, before)
        ledger = identities.allocate(before, ledger)
        assert compiler.compile(before, ledger) == compile(before, ledger)


def test_one_endpoint_changes_one_entry() -> None:
    text = "".join(
        service(f"s{i}", f"{{selector: {{a: b{i}}}, ports: [{{port: 80}}]}}") for i in range(50)
    )
    text += "".join(pod(f"p{i}", f"{{a: b{i}}}", rest=", nodeName: n1") for i in range(50))
    first, _ = build(documents(NODES + text), OPEN)
    ledger = identities.allocate(first, EMPTY_LEDGER)
    compiler = Compiler()
    one_before = compiler.compile(first, ledger).services
    second, _ = build(documents(NODES + text + pod("q", "{a: b7}")), OPEN, first)
    after = compiler.compile(second, identities.allocate(second, ledger)).services
    assert [name for name in after if after[name] is not one_before[name]] == ["default/s7"]
