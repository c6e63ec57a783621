"""`tidegate policy wait`: what is meant, when it is true, and that an old status does not count."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import UNSET, structs
from tidegate_api import API_VERSION
from tidegate_api.state import (
    DIGEST_ANNOTATION,
    Condition,
    Meta,
    NodeState,
    NodeStateSpec,
    NodeStateStatus,
    PeerDigests,
    StateSlice,
    encode,
)
from tidegate_cli import policy_wait
from tidegate_cli.cluster import policy_status
from tidegate_cli.errors import CliError
from tidegate_cli.main import build_parser, main
from tidegate_cli.objects import RunObjects
from tidegate_cli.policy_wait import Look, Target
from tidegate_loader.local import NodePaths, Realised, RealisedFile
from tidegate_operator.standalone import Runner
from unit.operator.given import pod, policy, put

WEB = Target("NetworkPolicy", "shop", "web")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("networkpolicy/web", ("NetworkPolicy", "default", "web")),
        ("netpol/shop/web", ("NetworkPolicy", "shop", "web")),
        ("networkpolicies.networking.k8s.io/web", ("NetworkPolicy", "default", "web")),
        ("TGP/web", ("TrafficPolicy", "default", "web")),
        ("cnp/web.all", ("ClusterNetworkPolicy", "", "web.all")),
    ],
)
def test_a_policy_is_named_as_kubectl_takes_it(text: str, expected: tuple[str, str, str]) -> None:
    assert policy_wait.parse(text, "default") == expected


@pytest.mark.parametrize("text", ["web", "pod/web", "netpol/", "netpol/a/b/c", "cnp/shop/web", ""])
def test_what_names_none(text: str) -> None:
    with pytest.raises(CliError):
        policy_wait.parse(text, "default")


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("30", 30), ("90s", 90), ("2m", 120), ("1h", 3600)]
)
def test_times(text: str, seconds: float) -> None:
    given = build_parser().parse_args(["policy", "wait", "netpol/a", "--timeout", text])
    assert given.timeout == seconds


@pytest.mark.parametrize("text", ["-1", "soon", "1d", "", "s", "25h", "1.5"])
def test_no_times(text: str) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["policy", "wait", "netpol/a", f"--timeout={text}"])


POLICY = {"uid": "u2", "generation": 3}


def status(
    uid: str = "u2", told: int = 3, own: int = 5, seen: int = 5, **conditions: str
) -> dict[str, Any]:
    listed = [{"type": k, "status": v, "message": f"{k} is {v}"} for k, v in conditions.items()]
    return {
        "metadata": {"generation": own},
        "policy": {"uid": uid, "generation": told},
        "status": {
            "observedGeneration": seen,
            "nodes": {"realised": 1, "total": 2},
            "conditions": listed,
        },
    }


@pytest.mark.parametrize(
    ("reason", "found", "done", "failed", "words"),
    [
        ("in force", status(Ready="True"), True, False, "Ready is True"),
        ("on its way", status(Ready="False", Reconciling="True"), False, False, "Ready is False"),
        ("stalled", status(Ready="False", Stalled="True"), False, True, "Ready is False"),
        ("silent nodes", status(Ready="True", NodesSilent="True"), True, False, "NodesSilent is"),
        ("none yet", None, False, False, "not looked at it"),
        ("of the one before the edit", status(told=2, Ready="True"), False, False,
         "tells of generation 2, not of 3"),
        ("of an edit after", status(told=4, Ready="True"), True, False, "Ready is True"),
        ("of another of that name", status(uid="u1", told=9, Ready="True"), False, False,
         "one before it, of the same name"),
        ("conditions of before", status(seen=4, Ready="True"), False, False, "not looked at it"),
        ("stalled, before the edit", status(told=2, Ready="False", Stalled="True"), False, False,
         "tells of generation 2"),
        ("no conditions", status(), False, False, "not looked at it"),
    ],
)  # fmt: skip
def test_a_status_counts_for_the_object_as_it_is(
    reason: str, found: dict[str, Any] | None, done: bool, failed: bool, words: str
) -> None:
    look = policy_status.look_of(POLICY, found)
    assert (look.done, look.failed) == (done, failed)
    assert words in look.text


NOW = datetime.datetime(2026, 1, 1, 0, 1, tzinfo=datetime.UTC)


def node_state(status: NodeStateStatus | Any) -> NodeState:
    spec = NodeStateSpec(format=1, mode="Enforcing", endpoints=[], rule_sets=[], peer_sets=[],
                         tables={})  # fmt: skip
    meta = Meta(name="n1", annotations={DIGEST_ANNOTATION: "wanted"})
    return NodeState(
        api_version=API_VERSION, kind="NodeState", metadata=meta, spec=spec, status=status
    )


def condition(kind: str, on: str, message: str) -> Condition:
    return Condition(type=kind, status=on, reason="R", message=message, last_transition_time="T")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (UNSET, "its loader has said nothing of it"),
        (NodeStateStatus(realised="wanted"), ""),
        (NodeStateStatus(realised="before", last_report_time="2026-01-01T00:00:00Z"),
         "its loader has said nothing of it (reported 60 s ago)"),
        (NodeStateStatus(realised="before", conditions=[
            condition("Ready", "False", "pending"), condition("Stalled", "True", "too large")]),
         "too large"),
        (NodeStateStatus(realised="before", conditions=[condition("Ready", "False", "pending")]),
         "pending"),
    ],
)  # fmt: skip
def test_why_a_node_lacks_it(status: Any, expected: str) -> None:
    assert policy_status.why(node_state(status), NOW) == expected


def test_it_ends_when_all_are_in_force_and_says_each_step_once() -> None:
    other = Target("TrafficPolicy", "shop", "t")
    steps: Iterator[dict[Target, Look]] = iter(
        [
            {WEB: Look("one"), other: Look("done", True)},
            {WEB: Look("one"), other: Look("done", True)},
            {WEB: Look("two"), other: Look("lost")},
            {WEB: Look("done", True), other: Look("done", True)},
        ]
    )
    said: list[str] = []
    found = policy_wait.wait([WEB, other], lambda _: next(steps), 3600, said.append)
    assert found == {WEB: Look("done", True), other: Look("done", True)}
    assert said == [f"{WEB}: one", f"{WEB}: two", f"{other}: lost"]


def test_what_never_comes_true_is_not_waited_for() -> None:
    look = Look("not as written", failed=True)
    assert policy_wait.wait([WEB], lambda _: {WEB: look}, 3600, lambda _: None) == {WEB: look}


def test_when_the_time_is_over_the_last_look_counts() -> None:
    looks = iter([Look("one"), Look("two")])
    found = policy_wait.wait([WEB], lambda _: {WEB: next(looks)}, 0.01, lambda _: None)
    assert found == {WEB: Look("two")}
    assert policy_wait.wait([WEB], lambda _: {WEB: Look("x")}, 0, lambda _: None) == {
        WEB: Look("x")
    }


# ---- a folder ------------------------------------------------------------------------------


class Up:
    """What `up` leaves of a folder, and loaders that realise what they are told to."""

    def __init__(self, base: Path) -> None:
        self.folder, self.run_dir = base / "in", base / "run"
        self.runner = Runner(self.folder, self.run_dir)
        put(self.folder / "pods.yaml", pod("a", "{app: a}") + pod("b", "{app: b}"))
        put(self.folder / "policy.yaml", policy("p", "{podSelector: {}}"))
        self.runner.step()
        (self.run_dir / "supervisor.json").write_bytes(encode({"folder": str(self.folder)}))

    def realise(self, *nodes: str, peers: bool = True) -> None:
        run = RunObjects(self.run_dir)
        objects = run.all()
        sets = {
            peer.name: peer
            for item in objects
            if isinstance(item, StateSlice)
            for peer in item.spec.peers or ()
        }
        for item in objects:
            if isinstance(item, NodeState) and item.metadata.name in (nodes or run.nodes()):
                path = NodePaths(self.run_dir, item.metadata.name).realised
                before = run.realised(item.metadata.name)
                digest = (item.metadata.annotations or {})[DIGEST_ANNOTATION]
                made = Realised(
                    node=item.metadata.name,
                    epoch=1,
                    digest=digest,
                    peer_sets=PeerDigests().of(item.spec.peer_sets, sets),
                )
                if not peers and before is not None:
                    made = structs.replace(made, peer_sets=before.peer_sets)
                RealisedFile(path).write(made)


@pytest.fixture
def up(tmp_path: Path) -> Up:
    return Up(tmp_path)


def asked(up: Up, capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["--run-dir", str(up.run_dir), "policy", "wait", "--timeout=0", *argv])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_a_folder_is_in_force_when_every_loader_has_what_it_holds_now(
    up: Up, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = asked(up, capsys)
    assert (code, "node-1: its loader has said nothing yet" in text) == (1, True)
    up.realise("node-1")
    code, text = asked(up, capsys, "netpol/p")
    assert (code, "in force on 1 of 2 nodes, not yet on node-2" in text) == (1, True)
    up.realise()
    for argv in ([], ["netpol/p"], ["-f", str(up.folder / "policy.yaml")]):
        code, text = asked(up, capsys, *argv)
        assert (code, "in force on 2 of 2 nodes" in text) == (0, True)
    # Saved, and not taken over: what the nodes have is not what the folder says.
    put(up.folder / "policy.yaml", policy("p", "{podSelector: {matchLabels: {app: a}}}"))
    code, text = asked(up, capsys, "netpol/p")
    assert (code, "policy.yaml: not taken over yet" in text) == (1, True)
    up.runner.step()
    code, text = asked(up, capsys, "netpol/p")
    assert (code, "not yet on node-1, node-2" in text or "in force on 1" in text) == (1, True)
    up.realise()
    assert asked(up, capsys, "netpol/p")[0] == 0
    (up.folder / "policy.yaml").unlink()
    assert "policy.yaml: not taken over yet" in asked(up, capsys)[1]
    up.runner.step()
    up.realise()
    assert asked(up, capsys)[0] == 0
    code, text = asked(up, capsys, "netpol/p")
    assert (code, "there is no NetworkPolicy default/p" in text) == (2, True)


def test_new_members_of_peers_count_too(up: Up, capsys: pytest.CaptureFixture[str]) -> None:
    """Then no node's state is another."""
    red = "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: red}}}]}]}"
    put(up.folder / "policy.yaml", policy("p", red))
    up.runner.step()
    up.realise()
    assert asked(up, capsys)[0] == 0
    states = {path: path.read_bytes() for path in (up.run_dir / "objects/nodestates").iterdir()}
    put(
        up.folder / "space.yaml",
        "{apiVersion: v1, kind: Namespace, metadata: {name: default, labels: {team: red}}}",
    )
    up.runner.step()
    assert states == {path: path.read_bytes() for path in states}
    up.realise(peers=False)
    assert asked(up, capsys)[0] == 1
    up.realise()
    assert asked(up, capsys)[0] == 0


def test_a_policy_that_is_not_as_written_is_not_waited_for(
    up: Up, capsys: pytest.CaptureFixture[str]
) -> None:
    up.realise()
    put(up.folder / "policy.yaml", policy("p", "{podSelectr: {}}"))
    up.runner.step()
    up.realise()
    code = main(["--run-dir", str(up.run_dir), "-o", "json", "policy", "wait", "netpol/p",
                 "--timeout=1h"])  # fmt: skip
    out = json.loads(capsys.readouterr().out)
    assert code == 1
    assert [row["inForce"] for row in out["policies"]] == [False]
    assert "podSelectr" in out["policies"][0]["message"]


def test_a_nodes_own_directory_follows_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "objects").mkdir()
    assert main(["--run-dir", str(tmp_path), "policy", "wait", "netpol/p"]) == 2
    assert "follows no folder" in capsys.readouterr().err


def test_manifests_without_a_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text(pod("a"))
    assert main(["policy", "wait", "-f", str(tmp_path)]) == 2
    assert "no policy in these manifests" in capsys.readouterr().err
