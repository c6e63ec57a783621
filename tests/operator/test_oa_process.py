"""The operator as processes: two at once, killed half-way, and a zombie that says so."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import town_api
from support.apiserver import ApiServer
from support.operator_town import clean, policy
from support.town_api import apply, node, objects, pod
from support.waiting import until
from tidegate_api.state import Identity, NodeState, RuleSet, StateSlice
from tidegate_kube import Client, resources
from tidegate_operator.cluster import main, runner
from tidegate_operator.publish import render
from tidegate_operator.standalone import compile_folder

from .test_oa_compile import _spec, write_out

pytestmark = [pytest.mark.apiserver, pytest.mark.slow]

SECONDS = 60.0
NAMESPACE = "tidegate-system"


class Process:
    def __init__(self, kubeconfig: Path, name: str, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tidegate_operator", "--kubeconfig", str(kubeconfig),
                 "--namespace", NAMESPACE, "--identity", name,
                 "--listen", f"127.0.0.1:{self.port}"],
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def get(self, path: str) -> tuple[int, str]:
        """(status, body); (0, why) without an answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as found:
                return found.status, found.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def ready(self) -> None:
        until(lambda: self.get("/readyz")[0] == 200, "ready", SECONDS)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()


@pytest.fixture
def client(server: ApiServer) -> Iterator[Client]:
    made = server.client()
    clean(made)
    with contextlib.suppress(Exception):
        town_api.remove(made, resources.LEASES, "tidegate-operator", NAMESPACE)
    apply(made, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    yield made
    made.close()


@pytest.fixture
def start(server: ApiServer, tmp_path: Path) -> Iterator[Callable[[str], Process]]:
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
    with contextlib.ExitStack() as held:

        def run(name: str) -> Process:
            made = Process(kubeconfig, name, tmp_path / f"{name}.log")
            held.callback(made.end)
            return made

        yield run


def holder(client: Client) -> str:
    found = json.loads(client.get(resources.LEASES, "tidegate-operator", NAMESPACE))
    return str(found["spec"].get("holderIdentity", ""))


def populate(client: Client, pods: int) -> None:
    for number in range(2):
        apply(client, node(f"n{number}", number))
    apply(client, policy("p", {"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]}))
    for number in range(pods):
        ip = f"10.244.{number % 2}.{5 + number // 2}"
        apply(client, pod(f"p{number}", f"n{number % 2}", ip, app=f"a{number}"))


def published(client: Client) -> dict[tuple[str, str], Any]:
    return {
        (item.kind, name): _spec(item)
        for kind in (RuleSet, StateSlice, NodeState)
        for name, item in objects(client, kind).items()
    }


def wanted(client: Client, folder: Path) -> dict[tuple[str, str], Any]:
    """What a compiler says that never saw this cluster before."""
    folder.mkdir(exist_ok=True)
    write_out(client, folder)
    desired, ledger, _, sizes = compile_folder(folder)
    assert desired is not None
    return {
        (item.kind, item.metadata.name): _spec(item)
        for item in render(desired, ledger, sizes)
        if not isinstance(item, Identity)
    }


def settled(client: Client, folder: Path) -> None:
    """What is published is what a cold compile says, but for rule sets in their grace period."""
    want = wanted(client, folder)

    def equal() -> bool:
        got = published(client)
        extra = {key for key in got.keys() - want.keys() if key[0] == "RuleSet"}
        return {key: spec for key, spec in got.items() if key not in extra} == want

    until(equal, "equal to a cold compile", SECONDS)


def test_killed_while_it_publishes(
    client: Client, start: Callable[[str], Process], tmp_path: Path
) -> None:
    populate(client, 40)
    for already in (3, 20, 45):
        one = start(f"one-{already}")
        until(
            lambda at=already: sum(len(objects(client, k)) for k in town_api.OURS) >= at,  # type: ignore[misc]
            f"{already} objects", SECONDS,
        )  # fmt: skip
        one.process.kill()
        one.process.wait()
    for name, item in objects(client, NodeState).items():
        assert set(item.spec.rule_sets) <= objects(client, RuleSet).keys(), name
    # Its lease lasts until it would have ended: a day is not, a quarter of a minute is.
    start("two").ready()
    settled(client, tmp_path / "cluster")


def test_stopped_leader_is_replaced_and_writes_nothing_when_it_wakes(
    client: Client, start: Callable[[str], Process], tmp_path: Path
) -> None:
    populate(client, 4)
    one = start("one")
    one.ready()
    two = start("two")
    two.ready()
    assert holder(client) == "one"
    one.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    number = 4
    while holder(client) != "two":
        assert time.monotonic() - began < SECONDS
        apply(client, pod(f"p{number}", "n0", f"10.244.0.{50 + number}", app=f"a{number % 7}"))
        number += 1
        time.sleep(0.2)
    settled(client, tmp_path / "cluster")
    terms = {item.spec.term for item in objects(client, NodeState).values()}
    assert max(term for term in terms if isinstance(term, int)) == 2
    one.process.send_signal(signal.SIGCONT)
    for step in range(20):
        apply(client, pod(f"q{step}", "n1", f"10.244.1.{100 + step}", app=f"b{step % 5}"))
    until(lambda: "leader 0.0" in one.get("/metrics")[1], "one knows that it is deposed", SECONDS)
    settled(client, tmp_path / "cluster")
    assert (one.get("/healthz")[0], one.process.poll(), holder(client)) == (200, None, "two")
    # And back again: the one that slept takes over from the one that goes.
    two.process.terminate()
    assert two.process.wait(SECONDS) == 0
    until(lambda: holder(client) == "one", "taken over", SECONDS)
    apply(client, pod("last", "n1", "10.244.1.200", app="last"))
    settled(client, tmp_path / "cluster")


def test_zombies_fail_their_probe(
    server: ApiServer, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = main.parse(["--no-election", "--listen", "127.0.0.1:0"])
    operator = main.Operator(options, server.client().access)
    operator.start()

    def probe() -> tuple[int, str]:
        url = f"http://127.0.0.1:{operator.web.port}/healthz"
        try:
            with urllib.request.urlopen(url, timeout=5) as found:
                return found.status, found.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    try:
        until(lambda: operator.runner.published is not None, "published", SECONDS)
        assert probe() == (200, "ok\n")
        with monkeypatch.context() as patch:
            patch.setattr(runner, "STUCK_SECONDS", -1.0)
            code, text = probe()
            assert (code, "stuck" in text) == (500, True)
        operator.beat()
        with monkeypatch.context() as patch:
            patch.setattr(main, "SILENT_SECONDS", -1.0)
            assert probe() == (500, "the event loop hangs\n")
        operator.watches.pods.stop()
        assert probe() == (500, "the thread that watches pods has ended\n")
    finally:
        operator.stop()


def test_what_is_wrong_with_the_arguments_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--kubeconfig", "/nowhere"]) == 1
    assert "/nowhere" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main.parse(["--listen", "here"])
    assert "'here' is not host:port" in capsys.readouterr().err
