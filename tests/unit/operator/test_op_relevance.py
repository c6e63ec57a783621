"""What of a pod makes its identity, in a folder and in a cluster alike."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tidegate_operator import identities
from tidegate_operator.cluster import kinds
from tidegate_operator.cluster import world as cluster_world
from tidegate_operator.cluster.world import Snapshot
from tidegate_operator.identities import EMPTY_LEDGER
from tidegate_operator.manifests import Document
from tidegate_operator.objects import IdentityKey, ObjectName
from tidegate_operator.publish import key_of, ledger_objects
from tidegate_operator.relevance import Settings
from tidegate_operator.world import Options, build
from unit.operator.given import BY_LABELS, documents, make, policy

POD = """---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {space}, labels: {{a: b}}}}
spec:
  containers: [{containers}]
  initContainers: [{init}]
"""


def pod(name: str, *ports: str, space: str = "default", init: str = "") -> str:
    containers = ", ".join(
        f"{{name: c{n}, image: i, ports: [{text}]}}" for n, text in enumerate(ports)
    )
    return POD.format(name=name, space=space, containers=containers, init=init)


WEB = "{name: web, containerPort: 80}"
INGRESS = "{podSelector: {matchLabels: {a: b}}, ingress: [{ports: [{port: web}]}]}"
EGRESS = "{podSelector: {matchLabels: {a: b}}, policyTypes: [Egress], egress: [%s]}"
OTHER = "{to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: other}}}], %s}"
RUNNING = "{name: i, image: i, restartPolicy: Always, ports: [%s]}"

PORTS = [
    ("no rule names it", "", [WEB], {}),
    ("a subject's, at ingress", INGRESS, [WEB], {":port/TCP/web": "80"}),
    ("another protocol", INGRESS, ["{name: web, containerPort: 80, protocol: UDP}"], {}),
    ("another name", INGRESS, ["{name: http, containerPort: 80}"], {}),
    ("the first of two containers'", INGRESS,
     ["{name: web, containerPort: 9}", WEB], {":port/TCP/web": "9"}),
    ("a peer's, at egress", EGRESS % "{to: [{podSelector: {}}], ports: [{port: web}]}", [WEB],
     {":port/TCP/web": "80"}),
    ("anybody's, at egress", EGRESS % "{ports: [{port: web}]}", [WEB], {":port/TCP/web": "80"}),
    ("one of another namespace's", EGRESS % OTHER % "ports: [{port: web}]", [WEB], {}),
    ("of no pod, but of a block", EGRESS % "{to: [{ipBlock: {cidr: 10.0.0.0/8}}], "
     "ports: [{port: web}]}", [WEB], {}),
]  # fmt: skip


def in_cluster(given: tuple[Document, ...]) -> dict[ObjectName, IdentityKey]:
    found: dict[str, dict[Any, Any]] = {}
    fields = {"Pod": ("pods", kinds.pod), "NetworkPolicy": ("policies", kinds.network_policy)}
    for document in given:
        field, decode = fields[document.key.kind]
        tree = document.object.model_dump(by_alias=True, exclude_unset=True, mode="json")
        if document.key.kind == "Pod":
            tree["spec"].setdefault("nodeName", "n")
        key = (document.key.namespace, document.key.name)
        found.setdefault(field, {})[key] = decode(json.dumps(tree).encode())
    world, _ = cluster_world.build(Snapshot(**found), None, BY_LABELS.identities)
    return {name: item.identity for name, item in world.pods.items()}


def in_folder(given: tuple[Document, ...]) -> dict[ObjectName, IdentityKey]:
    world, _ = build(given, BY_LABELS)
    return {name: item.identity for name, item in world.pods.items()}


@pytest.mark.parametrize("made", [in_folder, in_cluster])
@pytest.mark.parametrize(("reason", "spec", "ports", "expected"), PORTS)
def test_named_ports(
    reason: str, spec: str, ports: list[str], expected: dict[str, str], made: Any
) -> None:
    text = pod("x", *ports) + (policy("p", spec) if spec else "")
    (key,) = made(documents(text)).values()
    assert key == IdentityKey("default", tuple(sorted({**expected, "a": "b"}.items())))


@pytest.mark.parametrize("made", [in_folder, in_cluster])
def test_init_containers_have_ports_while_they_run(made: Any) -> None:
    ended = RUNNING.replace(" restartPolicy: Always,", "") % WEB
    text = pod("ended", "", init=ended) + pod("runs", "", init=RUNNING % WEB)
    found = made(documents(text + policy("p", INGRESS)))
    ports = {name.name: dict(key.labels).get(":port/TCP/web") for name, key in found.items()}
    assert ports == {"ended": None, "runs": "80"}


def test_pods_of_one_name_and_two_numbers_are_two() -> None:
    text = pod("x", WEB) + pod("y", WEB) + pod("z", "{name: web, containerPort: 81}")
    keys = [item.identity for item in make(text + policy("p", INGRESS)).pods.values()]
    assert (len(set(keys)), keys[0]) == (2, keys[1])
    assert len({item.identity for item in make(text).pods.values()}) == 1


def test_a_key_is_what_its_object_says() -> None:
    world = make(pod("x", WEB) + policy("p", INGRESS))
    ledger = identities.allocate(world, EMPTY_LEDGER)
    (item,) = ledger_objects(ledger).values()
    assert key_of(item) == next(iter(ledger.live))


def test_a_label_counts_in_the_namespaces_where_a_selector_looks() -> None:
    selector = "podSelector: {matchExpressions: [{key: job-name, operator: Exists}]}"
    pods = [
        pod(name, WEB, space=space).replace("a: b", f"job-name: {name}")
        for space in ("default", "other")
        for name in ("x", "y")
    ]
    own = policy("p", f"{{{selector}}}")
    far = policy("p", f"{{podSelector: {{}}, ingress: [{{from: [{{namespaceSelector: {{}}, "
                      f"{selector}}}]}}]}}")  # fmt: skip
    counts = []
    for text in ("", own, far):
        world = make("".join(pods) + text)
        counts.append(len({item.identity for item in world.pods.values()}))
    assert counts == [2, 3, 4]


def test_what_is_excluded_is_a_setting() -> None:
    given = documents(pod("x", "") + pod("y", "").replace("a: b", "a: b, team/x: c"))
    for excluded, expected in (((), 2), (("team/",), 1), (("team/x",), 1), (("team",), 2)):
        options = Options(identities=Settings("labels", excluded))
        world, _ = build(given, options)
        assert len({item.identity for item in world.pods.values()}) == expected


ASKED = [
    ("nothing", [], [{}]),
    ("values", ["{key: app, operator: In, values: [a]}"], [{"app": "a"}, {}]),
    ("not values", ["{key: app, operator: NotIn, values: [a]}"], [{"app": "a"}, {}]),
    ("presence", ["{key: app, operator: Exists}"], [{"app": "*"}, {}]),
    ("absence", ["{key: app, operator: DoesNotExist}"], [{"app": "*"}, {}]),
    ("both", ["{key: app, operator: In, values: [a]}", "{key: app, operator: Exists}"],
     [{"app": "a"}, {"app": "*"}, {}]),
    ("another label", ["{key: tier, operator: Exists}"], [{}]),
]  # fmt: skip


def _asking(conditions: list[str]) -> str:
    return "".join(
        policy(f"p{n}", f"{{podSelector: {{matchExpressions: [{text}]}}}}")
        for n, text in enumerate(conditions)
    )


@pytest.mark.parametrize(("reason", "conditions", "expected"), ASKED)
def test_classes(reason: str, conditions: list[str], expected: list[dict[str, str]]) -> None:
    labels = ("app: a", "app: b", "app: c, other: x", "")
    pods = [pod(f"x{n}", "").replace("a: b", text) for n, text in enumerate(labels)]
    world = make("".join(pods) + _asking(conditions), Options())
    found = {item.identity for item in world.pods.values()}
    assert found == {IdentityKey("default", tuple(sorted(one.items()))) for one in expected}


def test_pods_that_an_identity_is_made_for_are_told_from_others() -> None:
    given = "---\napiVersion: tidegate.dev/v1alpha1\nkind: Identity\nmetadata: {name: i}\n"
    given += "spec: {namespace: default, labels: {a: b}}\n"
    world = make(pod("x", "") + pod("y", "").replace("a: b", "a: c") + given, Options())
    first, second = (item.identity for item in world.pods.values())
    assert (world.identities["i"].key, second) == (first, IdentityKey("default", ()))


def test_what_was_told_apart_is_held() -> None:
    pods = pod("x", "") + pod("y", "").replace("a: b", "a: c")
    split = documents(pods + policy("p", "{podSelector: {matchLabels: {a: b}}}"))
    first, _ = build(split)
    held, _ = build(documents(pods), Options(), first, hold=True)
    merged, _ = build(documents(pods), Options(), held)
    counts = [len({p.identity for p in world.pods.values()}) for world in (first, held, merged)]
    assert (counts, held.relevance != held.asked) == ([2, 2, 1], True)
