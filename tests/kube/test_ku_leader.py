"""The Lease on a real API server: one leads, and who leads no longer writes no longer."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from kube import candidate
from kube.given import FAST
from structlog.testing import capture_logs
from support.apiserver import WITH_US, ApiServer, install_crds
from support.waiting import until
from tidegate_kube import Client, Conflict, Invalid, NotFound, Reflector, resources
from tidegate_operator.leader import Leader, NotLeader, Timing

pytestmark = pytest.mark.apiserver

QUICK = Timing(lease=3.0, renew=2.0, retry=0.3, margin=0.3)
HANDOVER_SECONDS = 10.0
"""Sooner than the Lease runs out."""
SECONDS = 60.0


@pytest.fixture(scope="module")
def client(apiserver: ApiServer) -> Iterator[Client]:
    client = apiserver.client()
    yield client
    client.close()


class Candidate:
    """A Leader in a thread, and what it told."""

    def __init__(self, client: Client, lease: str, identity: str, floor: int = 0) -> None:
        self.told: list[object] = []
        self.leader = Leader(
            client,
            identity,
            namespace="default",
            name=lease,
            gained=self.told.append,
            lost=self.told.append,
            floor=lambda: floor,
            timing=QUICK,
        )
        self.leader.start()


@pytest.fixture
def candidate_of(
    client: Client, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Candidate]]:
    made: list[Candidate] = []
    lease = request.node.name.replace("_", "-")

    def make(identity: str, **more: Any) -> Candidate:
        made.append(Candidate(client, lease, identity, **more))
        return made[-1]

    make.lease = lease  # type: ignore[attr-defined]
    yield make
    for each in made:
        each.leader.stop()


def _spec(client: Client, name: str) -> dict[str, Any]:
    spec: dict[str, Any] = msgspec.json.decode(client.get(resources.LEASES, name, "default"))[
        "spec"
    ]
    return spec


def test_one_leads_and_hands_over(client: Client, candidate_of: Any) -> None:
    one = candidate_of("one")
    until(lambda: one.leader.leading, "one leads", SECONDS)
    two = candidate_of("two")
    spec = _spec(client, candidate_of.lease)
    assert (spec["holderIdentity"], spec["leaseTransitions"], spec["leaseDurationSeconds"]) == (
        "one", 1, 3,
    )  # fmt: skip
    assert 0 < one.leader.check() <= (QUICK.lease - QUICK.margin) / 2
    with pytest.raises(NotLeader, match="does not lead"):
        two.leader.check()
    renewed = spec["renewTime"]
    until(lambda: _spec(client, candidate_of.lease)["renewTime"] != renewed, "renewed", SECONDS)
    until(lambda: not two.leader.error, "two looks on", SECONDS)
    one.leader.stop()
    with pytest.raises(NotLeader):
        one.leader.check()
    assert not one.leader.error, "released"
    until(lambda: two.leader.leading, "two leads", SECONDS)
    assert two.leader.term == 2
    assert (one.told, two.told) == ([1, "released"], [2])
    spec = _spec(client, candidate_of.lease)
    assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("two", 2)


def test_who_cannot_renew_stops_before_another_begins(
    apiserver: ApiServer, candidate_of: Any, client: Client
) -> None:
    """The leader's requests fail, it does not know why; nobody else may lead before it stopped."""
    cut = apiserver.client()
    deaf = Candidate(cut, candidate_of.lease, "deaf")
    until(lambda: deaf.leader.leading, "leads", SECONDS)
    other = candidate_of("other")
    # From now on it reaches nobody.
    cut.close()
    object.__setattr__(cut, "_port", 1)
    stopped = begun = 0.0
    deadline = time.monotonic() + SECONDS
    while not begun and time.monotonic() < deadline:
        leads = deaf.leader.leading
        now = time.monotonic()
        if not leads and not stopped:
            stopped = now
        if other.leader.leading:
            begun = time.monotonic()
        time.sleep(0.005)
    assert stopped, "never stopped"
    assert begun, "never taken over"
    assert stopped < begun
    until(lambda: len(deaf.told) == 2, "was told", SECONDS)
    assert "refused" in str(deaf.told[1])
    assert (other.told, deaf.leader.alive) == ([2], True)
    deaf.leader.stop()


def test_terms_never_fall(client: Client, candidate_of: Any) -> None:
    lease = candidate_of.lease
    one = candidate_of("one", floor=7)
    until(lambda: one.leader.leading, "leads", SECONDS)
    assert one.leader.term == 8
    client.delete(resources.LEASES, lease, "default")
    until(lambda: len(one.told) == 3, "led, lost, leads again", SECONDS)
    assert one.told == [8, "the lease was deleted", 9]
    one.leader.stop()
    assert _spec(client, lease)["holderIdentity"] == ""
    again = candidate_of("one")
    until(lambda: again.leader.leading, "leads", SECONDS)
    assert again.leader.term == 10


def test_its_own_old_lease_it_takes_at_once(client: Client, candidate_of: Any) -> None:
    """A container that was killed comes back under its pod's name."""
    lease = {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": candidate_of.lease},
        "spec": {
            "holderIdentity": "one",
            "leaseDurationSeconds": 3600,
            "leaseTransitions": 4,
            "renewTime": "2026-01-01T00:00:00.000000Z",
        },
    }
    client.create(resources.LEASES, msgspec.json.encode(lease), "default")
    other = candidate_of("other")
    one = candidate_of("one")
    until(lambda: one.leader.leading, "leads", SECONDS)
    assert one.leader.term == 5
    assert not other.leader.leading


def test_a_label_on_the_lease_is_no_change_of_leader(client: Client, candidate_of: Any) -> None:
    one = candidate_of("one")
    until(lambda: one.leader.leading, "leads", SECONDS)
    for number in range(5):
        body = {"metadata": {"labels": {"x": str(number)}}}
        client.patch(resources.LEASES, candidate_of.lease, msgspec.json.encode(body), "default")
        before = _spec(client, candidate_of.lease)["renewTime"]
        until(
            lambda before=before: _spec(client, candidate_of.lease)["renewTime"] != before,
            "renewed",
            SECONDS,
        )
    assert one.told == [1]
    found = msgspec.json.decode(client.get(resources.LEASES, candidate_of.lease, "default"))
    assert found["metadata"]["labels"] == {"x": "4"}


def test_a_lease_taken_by_hand_is_given_up(client: Client, candidate_of: Any) -> None:
    one = candidate_of("one")
    until(lambda: one.leader.leading, "leads", SECONDS)
    body = b'{"spec": {"holderIdentity": "somebody", "leaseTransitions": 2}}'
    client.patch(resources.LEASES, candidate_of.lease, body, "default")
    until(lambda: one.told[1:2] == ["somebody holds the lease"], "gave up", SECONDS)
    # And takes it when somebody, who is nobody, did not renew it.
    until(lambda: one.leader.leading, "leads again", SECONDS)
    assert one.leader.term == 3


def test_stops_whatever_it_was_doing(apiserver: ApiServer) -> None:
    nobody = apiserver.client(apiserver.account("no-lease"))
    with capture_logs() as said:
        one = Candidate(nobody, "forbidden", "one")
        until(lambda: "403" in one.leader.error, "is refused", SECONDS)
        until(lambda: said, "it is said", SECONDS)
    assert (said[0]["log_level"], said[0]["error"]) == ("warning", one.leader.error)
    assert one.leader.alive
    one.leader.stop()
    assert not one.leader.alive
    assert one.told == []


# ---- Processes ------------------------------------------------------------------------


class Process:
    """A candidate.py."""

    def __init__(self, kubeconfig: Path, identity: str, timing: Timing, logs: Path) -> None:
        self.identity = identity
        self._log = logs / f"{identity}.jsonl"
        seconds = [str(timing.lease), str(timing.renew), str(timing.retry)]
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                [*WITH_US, sys.executable, candidate.__file__, str(kubeconfig), identity, *seconds],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def said(self, what: str) -> list[dict[str, Any]]:
        lines = [line for line in self._log.read_text().splitlines() if line.startswith("{")]
        return [line for line in map(json.loads, lines) if line["what"] == what]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stopped(self) -> bool:
        status = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return status == "T"


class History:
    """Every state of the NodeState that the API server went through: (term, writer)."""

    def __init__(self, client: Client) -> None:
        self.writes: list[tuple[int, str]] = []
        self.problems: list[str] = []
        self.reflector: Reflector[Any] = Reflector(
            client, resources.NODE_STATES, self._note, lambda: None, pace=FAST
        )

    def _note(self, raw: bytes) -> object:
        item = msgspec.json.decode(raw)
        self.writes.append((item["spec"]["term"], item["metadata"]["labels"]["writer"]))
        return item

    def check(self) -> None:
        """Terms only rise, and each has one writer."""
        terms = [term for term, _ in self.writes]
        assert terms == sorted(terms)
        writers = dict(self.writes)
        assert set(self.writes) == set(writers.items())


@contextlib.contextmanager
def _pair(apiserver: ApiServer, client: Client, path: Path, timing: Timing) -> Iterator[Any]:
    install_crds(client, "nodestates")
    for resource, name, space in (
        (resources.LEASES, candidate.LEASE[1], candidate.LEASE[0]),
        (resources.NODE_STATES, candidate.NODE, ""),
    ):
        with contextlib.suppress(NotFound):
            client.delete(resource, name, space)
    kubeconfig = apiserver.kubeconfig(path / "kubeconfig")
    history = History(client)
    history.reflector.start()
    processes = []
    try:
        for identity in ("one", "two"):
            processes.append(Process(kubeconfig, identity, timing, path))
            until(lambda: processes[0].said("wrote"), "one writes", SECONDS)
        yield *processes, history
    finally:
        for each in processes:
            each.process.kill()
            each.process.wait()
        history.reflector.stop()


def _count(history: History, writer: str) -> int:
    return sum(1 for _, who in list(history.writes) if who == writer)


def test_a_late_write_is_refused(apiserver: ApiServer, client: Client, tmp_path: Path) -> None:
    """Stopped between the check and the write, for longer than the lease, while two writes."""
    with _pair(apiserver, client, tmp_path, QUICK) as (one, two, history):
        one.signal(signal.SIGUSR1)
        until(one.stopped, "one sleeps", SECONDS)
        until(lambda: len(two.said("wrote")) > 10, "two writes", SECONDS)
        # Creating an object of a CRD that is seconds old is refused too, for a while.
        mine, before = _count(history, "one"), len(one.said("refused"))
        one.signal(signal.SIGCONT)
        until(lambda: len(one.said("refused")) > before, "its late write is refused", SECONDS)
        assert [line["kind"] for line in one.said("refused")[before:]] == ["Conflict"]
        until(lambda: one.said("lost"), "one knows", SECONDS)
        more = len(two.said("wrote")) + 10
        until(lambda: len(two.said("wrote")) > more, "two goes on", SECONDS)
        history.check()
        assert _count(history, "one") == mine
        assert one.said("gained") == one.said("gained")[:1], "one leads no more"


def test_a_late_write_without_a_version_is_refused_by_its_term(client: Client) -> None:
    """Even a writer that asks for nothing: the API server itself knows that terms rise."""
    install_crds(client, "nodestates")
    with contextlib.suppress(NotFound):
        client.delete(resources.NODE_STATES, candidate.NODE)
    made = client.create(resources.NODE_STATES, candidate.node_state("two", 2, 1))
    stale = msgspec.json.decode(made)["metadata"]["resourceVersion"]
    late = msgspec.json.decode(candidate.node_state("one", 1, 1))
    with pytest.raises(Invalid, match="term never falls"):
        client.patch(resources.NODE_STATES, candidate.NODE, msgspec.json.encode(late))
    client.patch(resources.NODE_STATES, candidate.NODE, b'{"metadata": {"labels": {"a": "b"}}}')
    with pytest.raises(Conflict):
        client.update(
            resources.NODE_STATES, candidate.NODE, candidate.node_state("two", 2, 2, stale)
        )
    client.delete(resources.NODE_STATES, candidate.NODE)


def test_handover_on_sigterm(apiserver: ApiServer, client: Client, tmp_path: Path) -> None:
    with _pair(apiserver, client, tmp_path, Timing()) as (one, two, history):
        until(lambda: two.said("runs"), "two is a candidate", SECONDS)
        begun = time.monotonic()
        one.signal(signal.SIGTERM)
        until(lambda: two.said("wrote"), "two writes", HANDOVER_SECONDS)
        print(f"handover: {two.said('wrote')[0]['at'] - begun:.2f} s")
        one.process.wait()
        assert [line["what"] for line in one.said("ended")] == ["ended"]
        history.check()


@pytest.mark.slow
def test_stopped_for_thirty_seconds_under_churn(
    apiserver: ApiServer, client: Client, tmp_path: Path
) -> None:
    """As released: default times, the leader stopped at any moment, and then back."""
    with _pair(apiserver, client, tmp_path, Timing()) as (one, two, history):
        one.signal(signal.SIGSTOP)
        begun = time.monotonic()
        until(lambda: two.said("wrote"), "two took over", SECONDS)
        print(f"failover: {time.monotonic() - begun:.1f} s")
        threading.Event().wait(max(0.0, begun + 30.0 - time.monotonic()))
        mine = _count(history, "one")
        one.signal(signal.SIGCONT)
        until(lambda: one.said("lost"), "one knows", SECONDS)
        more = len(two.said("wrote")) + 50
        until(lambda: len(two.said("wrote")) > more, "two goes on", SECONDS)
        history.check()
        assert _count(history, "one") == mine
        two.signal(signal.SIGKILL)
        until(lambda: len(one.said("gained")) == 2, "one took over", SECONDS)
        until(lambda: history.writes[-1] == (3, "one"), "one writes", SECONDS)
        history.check()
