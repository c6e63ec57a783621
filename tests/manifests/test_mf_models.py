"""What the models accept a real API server admits, what they reject it rejects.

Seen to fail: with `maxLength` of a label's value off by one, without the rule on label keys,
and with a CIDR of zeros before its bits taken by the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from manifests.installed import BY_KIND, Installed, identity, node_state
from pydantic import ValidationError
from support.ca_soak import scaled
from tidegate_api import state, users
from tidegate_kube import Client, Forbidden, Invalid, Resource, resources
from tidegate_operator import publish
from tidegate_operator.standalone import compile_folder

pytestmark = [pytest.mark.apiserver, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
EXAMPLES = scaled(ci=300, soak=3000)
PROPERTY = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)

Json = dict[str, Any]


@pytest.fixture(scope="module")
def admin(installed: Installed) -> Client:
    return installed.client()


@pytest.fixture(scope="module")
def operator(installed: Installed) -> Client:
    return installed.account("tidegate-operator")


def _namespace(item: Json) -> str:
    return str(item["metadata"].get("namespace", ""))


def _refusal(client: Client, item: Json) -> str:
    """Why the server does not admit it; "" if it does. Leaves nothing behind."""
    resource = BY_KIND[item["kind"]]
    try:
        client.create(resource, msgspec.json.encode(item), _namespace(item))
    except (Invalid, Forbidden) as error:
        return str(error)
    client.delete(resource, item["metadata"]["name"], _namespace(item))
    return ""


def _nulls_dropped(value: Any, path: tuple[str, ...] = ()) -> Any:
    """What an API server reads: a null that the schema does not allow is not there. The values
    of an Identity's labels allow it, and a rule refuses it."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if v is not None or path[-1:] == ("labels",)}
        return {key: _nulls_dropped(inner, (*path, key)) for key, inner in kept.items()}
    return [_nulls_dropped(inner, path) for inner in value] if isinstance(value, list) else value


# ---- Identity: what people write ------------------------------------------------------------

ODD: list[Any] = [None, 1, 1.5, True, "x", [], {}, [1], [None], {"a": 1}, {"a": None}]


def _often(good: list[Any], other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Seven times in eight one of the good ones, so that whole objects are good often enough."""
    return st.integers(0, 7).flatmap(lambda n: st.sampled_from(good) if n else other)


LABEL_TEXT = _often(
    ["", "web", "a-b_c.d", "a" * 63, "A", "0"],
    st.sampled_from(["-a", "a-", "a" * 64, "ä", "a b", "a\n"]) | st.text("ab0-_.A/", max_size=5),
)
LABEL_KEYS = _often(
    ["app", "example.com/app", f"{'a' * 63}.b/{'n' * 63}", f"{'a.' * 126}a/n", "A.b_c"],
    st.sampled_from(
        [
            ":port/TCP/web",
            "Example.com/app",
            "a/b/c",
            "/app",
            "app/",
            f"{'a.' * 127}a/n",
            "n" * 64,
            "a..b/c",
            "",
        ]
    )
    | st.text("ab0-_.A/", min_size=1, max_size=6),
)
CIDRS = _often(
    [
        "192.0.2.0/24",
        "192.0.2.1/32",
        "0.0.0.0/0",
        "2001:db8::/32",
        "2001:DB8::/32",
        "2001:0db8:0000::/32",
        "::/0",
        "::10.0.0.0/120",
    ],
    st.sampled_from(
        [
            "192.0.2.1/24",
            "010.0.0.0/8",
            "10.0.0.0/08",
            "10.0.0.0/33",
            "10.0.0.0/-1",
            "10.0.0.0/+8",
            "10.0.0/8",
            "10.0.0.0",
            "10.0.0.0/255.0.0.0",
            "2001:db8::1/32",
            "::ffff:10.0.0.0/104",
            "::ffff:0:0/96",
            "fe80::%1/64",
            "fe80::1%eth0/128",
            " 10.0.0.0/8",
            "10.0.0.0/8\n",
            "",
            "/",
            "1.2.3.4/٣",
        ]
    )
    | st.builds("{}/{}".format, st.ip_addresses(), st.integers(0, 129))
    | st.builds(str, st.ip_addresses(v=4)),
)
NAMESPACES = _often(
    ["default", "a", "a" * 63, "0"],
    st.sampled_from(["a" * 64, "A", "a.b", "-a", "", "a_b", "a\n"]),
)
NAMES = _often(
    ["partner", "a", "a.b-c", "a" * 253],
    st.sampled_from(
        ["0", "00a", "256", "300", "1a", "A", "a_b", "-a", "a.", ".a", "a..b", "a" * 254]
    )
    | st.text("ab0.-", min_size=1, max_size=4),
)


def _mostly(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 15).flatmap(lambda n: good if n else st.sampled_from(ODD))


PARTS = {
    "namespace": _mostly(NAMESPACES),
    "labels": _mostly(st.dictionaries(LABEL_KEYS, LABEL_TEXT, max_size=3)),
    "cidrs": _mostly(st.lists(CIDRS, min_size=1, max_size=3)),
}
SPECS = st.one_of(
    st.fixed_dictionaries({"namespace": PARTS["namespace"], "labels": PARTS["labels"]}),
    st.fixed_dictionaries({"cidrs": PARTS["cidrs"]}),
    st.fixed_dictionaries({}, optional=PARTS),
)


def _model_says(item: Json) -> str:
    try:
        users.Identity.model_validate(item)
    except ValidationError as error:
        return str(error)
    return ""


@PROPERTY
@given(name=NAMES, spec=SPECS)
@example(name="a", spec={"cidrs": ["10.0.0.0/8"] * users.MAX_CIDRS})
@example(name="a", spec={"cidrs": ["10.0.0.0/8"] * (users.MAX_CIDRS + 1)})
@example(name="a", spec={"namespace": "a", "labels": {f"k{n}": "v" for n in range(128)}})
@example(name="a", spec={"namespace": "a", "labels": {f"k{n}": "v" for n in range(129)}})
@example(name="a", spec={"cidrs": []})
def test_an_identity(admin: Client, name: str, spec: Json) -> None:
    item = {**identity(name), "spec": spec}
    model, server = _model_says(_nulls_dropped(item)), _refusal(admin, item)
    assert bool(model) == bool(server), f"model: {model or 'accepts'}; server: {server or 'admits'}"


@pytest.mark.parametrize(
    "spec",
    [
        {"cidrs": ["10.0.0.0/8"], "namespace": None},
        {"namespace": "a", "labels": {}, "cidrs": None},
        {"namespace": "a", "labels": {"app": None}},
    ],
)
def test_null_is_nothing_that_a_model_takes(spec: Json) -> None:
    # The server drops the first two, which is what absence means anyway.
    assert "null" in _model_says({**identity("a"), "spec": spec}) or "string" in _model_says(
        {**identity("a"), "spec": spec}
    )


def test_the_strategy_makes_both() -> None:
    seen = {"good": 0, "bad": 0}

    @settings(max_examples=200, database=None, derandomize=True)
    @given(NAMES, SPECS)
    def count(name: str, spec: Json) -> None:
        seen["bad" if _model_says({**identity(name), "spec": spec}) else "good"] += 1

    count()
    assert min(seen.values()) > 30


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "cidr"), ["10.0.0.0/8"]),
        (("spec", "podSelector"), {}),
        (("metadata", "label"), {"a": "b"}),
        (("extra",), 1),
    ],
)
def test_an_unknown_field_is_no_news_to_anybody(
    installed: Installed, path: tuple[str, ...], value: object
) -> None:
    item = identity("unknown", namespace="a", labels={})
    at = item
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    assert path[-1] in _model_says(item)
    done = installed.kubectl(
        *("create", "--validate=strict", "-f", "-"),
        stdin=msgspec.json.encode(item).decode(),
        check=False,
    )
    assert done.returncode != 0
    assert "unknown field" in done.stderr
    assert path[-1] in done.stderr


def test_what_a_careless_client_has_dropped_never_widens(installed: Installed) -> None:
    # Misspelt and unvalidated, the field is dropped; what is left says nothing and is refused.
    item = {**identity("pruned"), "spec": {"cidr": ["10.0.0.0/8"]}}
    with pytest.raises(Invalid, match="give both namespace and labels, or only cidrs"):
        installed.client().create(resources.IDENTITIES, msgspec.json.encode(item))


# ---- the kinds that machines write --------------------------------------------------------------


def _folders() -> list[Path]:
    cases = sorted(p / "in" for p in (ROOT / "tests" / "golden" / "compile").iterdir())
    return [*cases, *sorted((ROOT / "examples").iterdir())]


def _compiled(folder: Path) -> list[state.StateObject]:
    desired, ledger, *_ = compile_folder(folder)
    assert desired is not None
    return publish.render(desired, ledger)


@pytest.mark.parametrize("folder", _folders(), ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_compiled_comes_back_byte_for_byte(operator: Client, folder: Path) -> None:
    objects = _compiled(folder)
    assert {item.kind for item in objects} >= {"NodeState", "StateSlice"}
    made: list[state.StateObject] = []
    try:
        for item in objects:
            resource = BY_KIND[item.kind]
            operator.create(resource, state.encode(item))
            made.append(item)
            read = operator.get(resource, item.metadata.name)
            held = msgspec.json.decode(read, type=type(item))
            assert state.encode(held.spec) == state.encode(item.spec)
    finally:
        for item in made:
            operator.delete(BY_KIND[item.kind], item.metadata.name)


def _policy_status(kind: str) -> Json:
    target = {"kind": "NetworkPolicy", "name": "web", "uid": "u", "generation": 3}
    metadata = {"name": "networkpolicy.web"}
    if kind == "PolicyStatus":
        metadata["namespace"] = "default"
    return {
        "apiVersion": "tidegate.dev/v1alpha1",
        "kind": kind,
        "metadata": metadata,
        "policy": target,
    }


def _machine_objects() -> list[Json]:
    """One or two of each kind, as full as the examples make them."""
    found: dict[str, list[tuple[int, Json]]] = {}
    for folder in _folders():
        for item in _compiled(folder):
            if item.kind != "Identity":
                data = state.encode(item)
                table = item.spec.table if isinstance(item, state.StateSlice) else ""
                found.setdefault(item.kind + table, []).append(
                    (len(data), msgspec.json.decode(data))
                )
    fullest = [max(items, key=lambda item: item[0])[1] for items in found.values()]
    wanted = node_state(
        "terms", term=7, tables={"peers": {"epoch": 1, "shards": 8, "minRevision": 0}}
    )
    kinds = [_policy_status("PolicyStatus"), _policy_status("ClusterPolicyStatus")]
    return [_trimmed(item) for item in (*fullest, wanted, *kinds)]


def _trimmed(value: Any) -> Any:
    """Lists cut to three, so that a change somewhere is a change of every field soon."""
    if isinstance(value, dict):
        return {key: _trimmed(inner) for key, inner in value.items()}
    return [_trimmed(inner) for inner in value[:3]] if isinstance(value, list) else value


MACHINE = _machine_objects()
TYPES = {t.__name__: t for t in (*state.StateObject.__args__, state.PolicyStatus)} | {
    "ClusterPolicyStatus": state.ClusterPolicyStatus
}


def _paths(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    yield path
    inner: Any = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    for step, below in inner:
        yield from _paths(below, (*path, step))


WRONG: list[Any] = [
    *(None, True, "", "x", "x" * 64, "x" * 300, "Ingress", "TCP", "peers"),
    *(-1, 0, 1, 255, 65535, 65536, 1 << 24, 1 << 32, 1 << 53, 1 << 62, 1.5),
    *([], {}, [[]], [None], [1], [{}], {"kind": "any"}, {"kind": "set"}, {"kind": "nobody"}),
    *({"kind": "set", "name": "x"}, {"kind": "cidr", "cidr": "10.0.0.0/8"}),
    {"kind": "any", "cidr": "10.0.0.0/8"},
]
DELETE, REPEAT = object(), object()


def _change(item: Json, path: tuple[str | int, ...], how: Any) -> bool:
    """In place; False if `how` does not fit what is there."""
    at: Any = item
    for step in path[:-1]:
        at = at[step]
    if how is DELETE:
        if isinstance(at, list):
            return False
        del at[path[-1]]
    elif how is REPEAT:
        if not isinstance(at[path[-1]], list) or not at[path[-1]]:
            return False
        at[path[-1]] += at[path[-1]]
    elif isinstance(how, dict) and how and path[-1] != "peer":
        return False  # fields that are unknown elsewhere, which a server drops
    else:
        at[path[-1]] = copy.deepcopy(how)
    return True


def _decodes(item: Json) -> str:
    try:
        msgspec.json.decode(msgspec.json.encode(item), type=TYPES[item["kind"]])
    except msgspec.ValidationError as error:
        return str(error)
    return ""


@st.composite
def _changed(draw: Callable[[Any], Any]) -> Json:
    item: Json = copy.deepcopy(draw(st.sampled_from(MACHINE)))
    root = "policy" if "policy" in item else "spec"
    for _ in range(draw(st.integers(1, 2))):
        paths = sorted(_paths(item.get(root), (root,)), key=str)
        path = draw(st.sampled_from(paths)) if root in item else ()
        if path:
            _change(item, path, draw(st.sampled_from([DELETE, REPEAT, *WRONG])))
    item["metadata"]["name"] = "changed"
    return item


@PROPERTY
@given(item=_changed())
def test_a_changed_object(operator: Client, admin: Client, item: Json) -> None:
    client = admin if item["kind"] == "ClusterPolicyStatus" else operator
    model, server = _decodes(_nulls_dropped(item)), _refusal(client, item)
    assert bool(model) == bool(server), f"model: {model or 'accepts'}; server: {server or 'admits'}"


CONDITION = {
    "type": "Ready",
    "status": "True",
    "reason": "Realised",
    "message": "",
    "lastTransitionTime": "2026-01-01T00:00:00Z",
    "observedGeneration": 1,
}
STATUSES: dict[str, Json] = {
    "NodeState": {
        "realised": "0" * 40,
        "endpoints": 1,
        "drift": 0,
        "formats": [1],
        "conditions": [CONDITION],
        "observedGeneration": 1,
    },
    "Identity": {
        "id": 300,
        "summary": "a=b",
        "endpoints": 1,
        "conditions": [CONDITION],
        "observedGeneration": 1,
    },
    "PolicyStatus": {
        "nodes": {"realised": 1, "total": 2},
        "conditions": [CONDITION],
        "observedGeneration": 1,
    },
}
HOLDERS = {
    "NodeState": node_state("status"),
    "Identity": identity("status"),
    "PolicyStatus": _policy_status("PolicyStatus"),
}


@st.composite
def _changed_status(draw: Callable[[Any], Any]) -> tuple[str, Json]:
    kind = draw(st.sampled_from(sorted(STATUSES)))
    item = {"status": copy.deepcopy(STATUSES[kind])}
    if draw(st.integers(0, 9)):
        path = draw(st.sampled_from(sorted(_paths(item["status"], ("status",)), key=str)))
        _change(item, path, draw(st.sampled_from([DELETE, *WRONG])))
    return kind, item


@pytest.fixture(scope="module")
def holders(operator: Client) -> dict[str, Json]:
    return {
        kind: msgspec.json.decode(
            operator.create(BY_KIND[kind], msgspec.json.encode(item), _namespace(item))
        )
        for kind, item in HOLDERS.items()
    }


@PROPERTY
@given(change=_changed_status())
def test_a_changed_status(
    admin: Client, operator: Client, holders: dict[str, Json], change: tuple[str, Json]
) -> None:
    kind, status = change
    held = holders[kind]
    resource: Resource = BY_KIND[kind]
    name, namespace = held["metadata"]["name"], _namespace(held)
    client = admin if kind == "NodeState" else operator
    item = {k: v for k, v in held.items() if k != "status"} | status
    now = msgspec.json.decode(admin.get(resource, name, namespace))["metadata"]
    item["metadata"] = {**held["metadata"], "resourceVersion": now["resourceVersion"]}
    model, server = _decodes(_nulls_dropped(item)), ""
    try:
        client.update(resource, name, msgspec.json.encode(item), namespace, "status")
    except (Invalid, Forbidden) as error:
        server = str(error)
    assert bool(model) == bool(server), f"model: {model or 'accepts'}; server: {server or 'admits'}"
