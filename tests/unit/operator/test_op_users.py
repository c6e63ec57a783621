"""What people write: upstream defaults, and errors that name field and remedy."""

from __future__ import annotations

import pytest
from tidegate_operator.objects import NAME_LABEL, PodPeer, Requirement, Selector
from tidegate_operator.policies import policy as normalise
from tidegate_operator.world import ObjectName
from unit.operator.given import documents, policy, read

DIRECTIONS = [
    ("nothing written", "{}", {"Ingress"}),
    ("null lists are absent lists", "{ingress: null, egress: null, policyTypes: null}",
     {"Ingress"}),
    ("empty lists are absent lists", "{ingress: [], egress: [], policyTypes: []}", {"Ingress"}),
    ("an egress rule adds Egress", "{egress: [{}]}", {"Ingress", "Egress"}),
    ("policyTypes rules alone", "{policyTypes: [Egress]}", {"Egress"}),
    ("rules of a type not named do not isolate", "{policyTypes: [Egress], ingress: [{}]}",
     {"Egress"}),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "spec", "expected"), DIRECTIONS)
def test_isolation(reason: str, spec: str, expected: set[str]) -> None:
    assert documents(policy("p", spec))[0].object.spec.isolates() == expected


ANY = Selector()
A = Selector((Requirement("a", "In", ("b",)),))
PEERS = [
    ("absent list is any peer", "{}", None),
    ("null list is any peer", "{from: null}", None),
    ("empty list is any peer", "{from: []}", None),
    ("{} pods of the own namespace", "{from: [{podSelector: {}}]}", PodPeer("default", None, ANY)),
    ("{} namespaces: every pod", "{from: [{namespaceSelector: {}}]}", PodPeer(None, ANY, ANY)),
    ("both: and", "{from: [{namespaceSelector: {}, podSelector: {matchLabels: {a: b}}}]}",
     PodPeer(None, ANY, A)),
    ("null selector is absent", "{from: [{namespaceSelector: null, podSelector: {}}]}",
     PodPeer("default", None, ANY)),
    ("matchLabels is In", "{from: [{podSelector: {matchLabels: {a: b}}}]}",
     PodPeer("default", None, A)),
    ("In with repeats is the same", "{from: [{podSelector: {matchExpressions: "
     "[{key: a, operator: In, values: [b, b]}]}}]}", PodPeer("default", None, A)),
    ("a namespace by its name label", f"{{from: [{{namespaceSelector: {{matchLabels: "
     f"{{{NAME_LABEL}: x}}}}}}]}}", PodPeer("x", None, ANY)),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "rule", "expected"), PEERS)
def test_peers(reason: str, rule: str, expected: PodPeer | None) -> None:
    document = documents(policy("p", f"{{ingress: [{rule}]}}"))[0]
    rules = normalise(ObjectName("default", "p"), document.object).ingress
    assert rules is not None
    assert rules[0].peers == (None if expected is None else (expected,))


MATCHES = [
    ("In, present", Requirement("a", "In", ("x", "y")), {"a": "y"}, True),
    ("In, absent", Requirement("a", "In", ("x",)), {}, False),
    ("NotIn, absent", Requirement("a", "NotIn", ("x",)), {}, True),
    ("NotIn, other", Requirement("a", "NotIn", ("x",)), {"a": "y"}, True),
    ("NotIn, same", Requirement("a", "NotIn", ("x",)), {"a": "x"}, False),
    ("Exists, empty value", Requirement("a", "Exists"), {"a": ""}, True),
    ("DoesNotExist", Requirement("a", "DoesNotExist"), {"a": ""}, False),
]


@pytest.mark.parametrize(("reason", "requirement", "labels", "expected"), MATCHES)
def test_requirement(
    reason: str, requirement: Requirement, labels: dict[str, str], expected: bool
) -> None:
    assert requirement.matches(labels) is expected


def _rule(text: str) -> str:
    return f"{{ingress: [{text}]}}"


LONG = "x" * 5000
ERRORS = [
    ("misspelt field", "{podSelektor: {}}", "spec.podSelektor", "did you mean podSelector?"),
    ("misspelt deep field", _rule("{form: []}"), "spec.ingress[0].form", "did you mean from?"),
    ("host bits v4", _rule("{from: [{ipBlock: {cidr: 10.1.2.3/8}}]}"),
     "spec.ingress[0].from[0].ipBlock.cidr", "write 10.0.0.0/8"),
    ("host bits v6", _rule("{from: [{ipBlock: {cidr: 'fd00::1/64'}}]}"),
     "spec.ingress[0].from[0].ipBlock.cidr", "write fd00::/64"),
    ("no prefix length", _rule("{from: [{ipBlock: {cidr: 10.0.0.1}}]}"),
     "spec.ingress[0].from[0].ipBlock.cidr", "write address/bits"),
    ("netmask", _rule("{from: [{ipBlock: {cidr: 10.0.0.0/255.0.0.0}}]}"),
     "spec.ingress[0].from[0].ipBlock.cidr", "write address/bits"),
    ("except outside", _rule("{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/9]}}]}"),
     "spec.ingress[0].from[0].ipBlock", "within 10.0.0.0/8"),
    ("except the whole", _rule("{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}"),
     "spec.ingress[0].from[0].ipBlock", "within 10.0.0.0/8"),
    ("except of other family", _rule("{from: [{ipBlock: {cidr: 10.0.0.0/8, except: ['::/1']}}]}"),
     "spec.ingress[0].from[0].ipBlock", "within 10.0.0.0/8"),
    ("empty peer", _rule("{from: [{}]}"), "spec.ingress[0].from[0]", "leave the list out"),
    ("block and pods", _rule("{from: [{ipBlock: {cidr: 10.0.0.0/8}, podSelector: {}}]}"),
     "spec.ingress[0].from[0]", "two entries"),
    ("port too high", _rule("{ports: [{port: 70000}]}"), "spec.ingress[0].ports[0].port", "1 to"),
    ("port 0", _rule("{ports: [{port: 0}]}"), "spec.ingress[0].ports[0].port", "1 to 65535"),
    ("port as text", _rule("{ports: [{port: '80'}]}"), "spec.ingress[0].ports[0].port",
     "without quotes: 80"),
    ("port is a boolean", _rule("{ports: [{port: yes}]}"), "spec.ingress[0].ports[0].port", "1 to"),
    ("protocol in lower case", _rule("{ports: [{protocol: tcp}]}"),
     "spec.ingress[0].ports[0].protocol", "'TCP'"),
    ("endPort below port", _rule("{ports: [{port: 80, endPort: 79}]}"), "spec.ingress[0].ports[0]",
     "80 to 65535"),
    ("endPort alone", _rule("{ports: [{endPort: 79}]}"), "spec.ingress[0].ports[0]", "first port"),
    ("In without values", "{podSelector: {matchExpressions: [{key: a, operator: In}]}}",
     "spec.podSelector.matchExpressions[0]", "at least one value"),
    ("Exists with values",
     "{podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}}",
     "spec.podSelector.matchExpressions[0]", "remove values"),
    ("unknown operator", "{podSelector: {matchExpressions: [{key: a, operator: Gt}]}}",
     "spec.podSelector.matchExpressions[0].operator", "'In'"),
    ("5,000 characters", f"{{podSelector: {{matchLabels: {{a: {LONG}}}}}}}",
     "spec.podSelector.matchLabels", "at most 63"),
    ("64 characters of key", f"{{podSelector: {{matchLabels: {{{'k' * 64}: a}}}}}}",
     "spec.podSelector.matchLabels", "at most 63"),
    ("prefix too long", f"{{podSelector: {{matchLabels: {{{'p' * 254}/k: a}}}}}}",
     "spec.podSelector.matchLabels", "at most 253"),
    ("boolean label", "{podSelector: {matchLabels: {a: yes}}}",
     "spec.podSelector.matchLabels.a", 'quote it: "yes"'),
    ("number label", "{podSelector: {matchLabels: {a: 010}}}",
     "spec.podSelector.matchLabels.a", 'quote it: "010"'),
    ("list for a map", "{podSelector: []}", "spec.podSelector", "a map"),
    ("map for a list", "{ingress: {}}", "spec.ingress", "a list"),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "spec", "field", "remedy"), ERRORS)
def test_policy_errors(reason: str, spec: str, field: str, remedy: str) -> None:
    found = read(a__yaml=policy("p", spec))
    assert [problem.field for problem in found.problems] == [field]
    (problem,) = found.problems
    assert remedy in problem.remedy
    assert (problem.file, problem.document_index, problem.object) == (
        "a.yaml",
        1,
        "NetworkPolicy default/p",
    )
    assert len(str(problem)) < 400


def _object(kind: str, version: str, name: str, rest: str) -> str:
    return f"kind: {kind}\napiVersion: {version}\nmetadata: {{name: {name}}}\n{rest}\n"


OBJECTS = [
    ("number first", _object("Identity", "tidegate.dev/v1alpha1", "'1'",
     "spec: {cidrs: [1.0.0.0/8]}"),
     "begin it with a letter"),
    ("neither", _object("Identity", "tidegate.dev/v1alpha1", "a", "spec: {}"), "only cidrs"),
    ("both", _object("Identity", "tidegate.dev/v1alpha1", "a",
     "spec: {namespace: a, labels: {}, cidrs: [1.0.0.0/8]}"), "only cidrs"),
    ("null in our own kind", _object("Identity", "tidegate.dev/v1alpha1", "a",
     "spec: {cidrs: [1.0.0.0/8], labels: null}"), "leave labels out"),
    ("service without ports", _object("Service", "v1", "a", "spec: {}"), "at least one port"),
    ("unnamed ports", _object("Service", "v1", "a", "spec: {ports: [{port: 1}, {port: 2}]}"),
     "name every port"),
    ("misspelt service field", _object("Service", "v1", "a", "spec: {port: [{port: 1}]}"),
     "did you mean ports?"),
    ("upper case name", _object("Namespace", "v1", "A", ""), "lower-case"),
    ("text for a number", _object("Deployment", "apps/v1", "a", "spec: {replicas: '3', "
     "selector: {}, template: {spec: {containers: [{name: a}]}}}"), "without quotes: 3"),
    ("replicas below 0", _object("Deployment", "apps/v1", "a", "spec: {replicas: -1, "
     "selector: {}, template: {spec: {containers: [{name: a}]}}}"), "write at least 0"),
    ("too many rules", _object("ClusterNetworkPolicy", "policy.networking.k8s.io/v1alpha2", "a",
     "spec: {tier: Admin, priority: 1, subject: {namespaces: {}}, ingress: ["
     + ",".join(["{action: Deny, from: [{namespaces: {}}]}"] * 26) + "]}"), "write at most 25"),
    ("selector misses template", _object("Deployment", "apps/v1", "a", "spec: {selector: "
     "{matchLabels: {a: b}}, template: {spec: {containers: [{name: a}]}}}"), "add a: 'b'"),
    ("old version", _object("NetworkPolicy", "extensions/v1beta1", "a", "spec: {}"),
     "use apiVersion networking.k8s.io/v1"),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "text", "remedy"), OBJECTS)
def test_object_errors(reason: str, text: str, remedy: str) -> None:
    found = read(a__yaml=text)
    assert [problem.severity for problem in found.problems] == ["error"]
    assert any(remedy in problem.remedy for problem in found.problems)
    assert found.documents == ()


def test_unknown_fields_of_workloads_pass() -> None:
    text = _object("Pod", "v1", "a", "spec: {containers: [{name: a, foo: 1}], bar: 2}")
    assert len(documents(text)) == 1
