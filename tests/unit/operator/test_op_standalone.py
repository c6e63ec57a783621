"""The runner: a folder followed, and what happens to it while it is."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tidegate_api.state import Endpoint
from tidegate_operator.objects import World
from tidegate_operator.standalone import Runner, StepResult, compile_folder
from unit.operator.given import pod, policy, put

PATIENCE = 20.0
"""Seconds until a test that waits gives up; nothing is asserted about less."""


def test_step_publishes_and_hooks_before(tmp_path: Path) -> None:
    seen: list[tuple[int, int, bool]] = []

    def hook(before: World, after: World) -> None:
        seen.append((len(before.pods), len(after.pods), (tmp_path / "run/objects").exists()))

    put(tmp_path / "f/a.yaml", pod("a"))
    runner = Runner(tmp_path / "f", tmp_path / "run", on_world=hook)
    first = runner.step()
    assert first.desired is not None
    assert [len(first.world.pods), len(first.written) > 0] == [1, True]
    assert runner.step().written == ()
    assert seen == [(0, 1, False)]


def test_nothing_is_written_before_the_first_complete_read(tmp_path: Path) -> None:
    result = Runner(tmp_path / "absent", tmp_path / "run").step()
    assert (result.desired, result.written) == (None, ())
    assert result.problems[0].severity == "error"
    assert not (tmp_path / "run/objects").exists()


def test_failed_hook_is_tried_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def hook(before: World, after: World) -> None:
        calls.append(len(after.pods))
        if len(calls) == 1:
            raise OSError("no interface")

    put(tmp_path / "f/a.yaml", pod("a"))
    runner = Runner(tmp_path / "f", tmp_path / "run", on_world=hook)
    with pytest.raises(OSError, match="no interface"):
        runner.step()
    assert runner.step().written
    assert calls == [1, 1]


TRAFFIC_POLICY = """\
---
apiVersion: tidegate.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: t}
spec:
  subject: {podSelector: {matchLabels: {app: one}}}
  isolates: [Ingress]
  mode: Enforce
"""
ADMIN_POLICY = """\
---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: c}
spec:
  tier: Admin
  priority: 1
  subject: {pods: {podSelector: {matchLabels: {app: one}}}}
  ingress: [{action: Deny, from: [{namespaces: {}}]}]
"""


@pytest.mark.parametrize(
    "text",
    [policy("n", "{podSelector: {matchLabels: {app: one}}}"), TRAFFIC_POLICY, ADMIN_POLICY],
    ids=["NetworkPolicy", "TrafficPolicy", "ClusterNetworkPolicy"],
)
def test_numbers_never_merge_in_the_step_in_which_a_policy_goes(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(tmp_path / "f", tmp_path / "run")
    put(tmp_path / "f/pods.yaml", pod("a", "{app: one}") + pod("b"))
    put(tmp_path / "f/policy.yaml", text)
    first = runner.step()
    assert not [problem for problem in first.problems if problem.severity == "error"]
    monkeypatch.setattr(runner._hold, "due", lambda _now: True)  # of another, before
    (tmp_path / "f/policy.yaml").unlink()
    counts = [len({p.identity for p in step.world.pods.values()}) for step in
              (first, runner.step(), runner.step())]  # fmt: skip
    assert counts == [2, 2, 1]


Wait = Callable[[Callable[[StepResult], bool]], StepResult]


@pytest.fixture
def follow(tmp_path: Path) -> Iterator[Wait]:
    """Follows tmp_path/f; the value waits for a step that satisfies a condition."""
    results: queue.Queue[StepResult] = queue.Queue()
    stop = threading.Event()
    runner = Runner(tmp_path / "f", tmp_path / "run")
    thread = threading.Thread(target=runner.watch, args=(stop, results.put))

    def wait(condition: Callable[[StepResult], bool]) -> StepResult:
        if not thread.is_alive():
            thread.start()
        while True:
            result = results.get(timeout=PATIENCE)
            if condition(result):
                return result

    yield wait
    stop.set()
    if thread.ident is not None:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def _pods(*names: str) -> Callable[[StepResult], bool]:
    return lambda result: [name.name for name in result.world.pods] == list(names)


def test_follows_saves_in_every_style(tmp_path: Path, follow: Wait) -> None:
    folder = tmp_path / "f"
    put(folder / "a.yaml", pod("a"))
    follow(_pods("a"))
    put(folder / "a.yaml", pod("b"))  # truncated and written
    follow(_pods("b"))
    put(tmp_path / "new", pod("c"))
    (tmp_path / "new").rename(folder / "a.yaml")  # renamed over
    follow(_pods("c"))
    put(folder / "deep/er/d.yaml", pod("d"))  # in a new directory
    follow(_pods("c", "d"))
    (folder / "a.yaml").unlink()
    follow(_pods("d"))


def test_follows_what_a_link_points_to(tmp_path: Path, follow: Wait) -> None:
    put(tmp_path / "there.yaml", pod("a"))
    (tmp_path / "f").mkdir()
    (tmp_path / "f/a.yaml").symlink_to("../there.yaml")
    follow(_pods("a"))
    put(tmp_path / "there.yaml", pod("b"))
    follow(_pods("b"))  # the step after the watch began may see this one
    put(tmp_path / "there.yaml", pod("c"))
    follow(_pods("c"))


def test_invalid_save_keeps_and_says(tmp_path: Path, follow: Wait) -> None:
    put(tmp_path / "f/a.yaml", pod("a") + policy("p", "{}"))
    first = follow(_pods("a"))
    put(tmp_path / "f/a.yaml", pod("a") + policy("p", "{foo: 1}"))
    result = follow(lambda result: any(p.severity == "error" for p in result.problems))
    assert result.world.policies == first.world.policies


def test_folder_that_vanishes_and_returns(tmp_path: Path, follow: Wait) -> None:
    folder = tmp_path / "f"
    put(folder / "a.yaml", pod("a"))
    follow(_pods("a"))
    shutil.rmtree(folder)
    gone = follow(lambda result: any("folder" in p.message for p in result.problems))
    assert _pods("a")(gone)
    put(folder / "b.yaml", pod("b"))
    follow(_pods("b"))
    put(folder / "c.yaml", pod("c"))
    follow(_pods("b", "c"))


def test_folder_that_comes_late(tmp_path: Path, follow: Wait) -> None:
    assert follow(lambda result: True).desired is None
    put(tmp_path / "f/a.yaml", pod("a"))
    follow(_pods("a"))


def test_compile_folder(tmp_path: Path) -> None:
    put(tmp_path / "a.yaml", pod("a"))
    desired, ledger, problems, *_ = compile_folder(tmp_path)
    assert desired is not None
    assert (len(desired.nodes), len(ledger.live), problems) == (2, 1, ())
    assert compile_folder(tmp_path / "absent")[0] is None


def test_labels_that_change_with_a_policy_wait_for_it(tmp_path: Path) -> None:
    """Published at once, neither would open no gap: a node could meet the new label's number
    under the old policy, or the old one under the new."""
    seen: list[tuple[str, int]] = []

    def hook(_: World, after: World) -> None:
        seen.extend((item.labels["app"], len(after.policies)) for item in after.pods.values())

    put(tmp_path / "f/a.yaml", pod("a", "{app: old}"))
    runner = Runner(tmp_path / "f", tmp_path / "run", on_world=hook)
    first = runner.step()
    put(tmp_path / "f/a.yaml", pod("a", "{app: new}"))
    put(tmp_path / "f/b.yaml", policy("p", "{podSelector: {matchLabels: {app: new}}}"))
    result = runner.step()
    assert seen == [("old", 0), ("old", 1), ("new", 1)]
    (before,) = (endpoint.identity for endpoint in _endpoints(first))
    (after,) = (endpoint.identity for endpoint in _endpoints(result))
    assert before != after
    assert runner.step().written == ()
    # Alone they wait for nothing.
    put(tmp_path / "f/a.yaml", pod("a", "{app: other}"))
    runner.step()
    assert seen[3:] == [("other", 1)]


def _endpoints(result: StepResult) -> list[Endpoint]:
    assert result.desired is not None
    return [one for node in result.desired.nodes.values() for one in node.endpoints]
