"""Operators as processes, and what happens to them: in the end the API holds a cold compile."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.apiserver import ApiServer
from support.ca_soak import campaign, scaled
from support.fault_proxy import ALL_FAULTS, FaultProxy, proxied
from support.operator_process import OperatorProcess
from support.operator_town import Town, clean, policy
from support.town_api import apply, node, pod, remove
from support.waiting import until
from tidegate_api.state import NodeState
from tidegate_kube import Client, Forbidden, KubeError, NotFound, Reflector, Resource, resources

pytestmark = [pytest.mark.apiserver, pytest.mark.slow]

SECONDS = 120.0
HANDOVER_SECONDS = 10.0
"""Sooner than the Lease runs out."""
NODES, PODS, POLICIES = 3, 20, 4


class Churn:
    """Random changes of pods and policies; addresses are used again, names too."""

    def __init__(self, client: Client, seed: int) -> None:
        self.client = client
        self.random = random.Random(seed)
        self.count = 0
        for number in range(NODES):
            apply(client, node(f"n{number}", number))

    def change(self) -> None:
        self.count += 1
        kind = self.random.choice(["pod"] * 5 + ["gone"] * 3 + ["policy"] * 2 + ["lifted"])
        if kind in ("pod", "gone"):
            self._pod(f"p{self.random.randrange(PODS)}", gone=kind == "gone")
        else:
            self._policy(f"q{self.random.randrange(POLICIES)}", lifted=kind == "lifted")

    def _pod(self, name: str, gone: bool) -> None:
        with contextlib.suppress(NotFound):
            remove(self.client, resources.PODS, name, "default")
        if not gone:
            home = self.random.randrange(NODES)
            address = f"10.244.{home}.{self.random.randrange(5, 5 + PODS)}"
            labels = {"app": self.random.choice("abc")}
            apply(self.client, pod(name, f"n{home}", address, **labels))

    def _policy(self, name: str, lifted: bool) -> None:
        if lifted:
            with contextlib.suppress(NotFound):
                remove(self.client, resources.NETWORK_POLICIES, name, "default")
            return
        subject, peer = self.random.choice("abc"), self.random.choice("abc")
        spec = {
            "podSelector": {"matchLabels": {"app": subject}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": peer}}}]}],
        }
        apply(self.client, policy(name, spec))


@pytest.fixture
def client(server: ApiServer) -> Iterator[Client]:
    client = server.client()
    clean(client)
    with contextlib.suppress(NotFound):
        client.delete(resources.LEASES, "tidegate-operator", "default")
    yield client
    client.close()


@contextlib.contextmanager
def _operators(
    kubeconfig: Path, logs: Path, *names: str, more: tuple[str, ...] = ()
) -> Iterator[list[OperatorProcess]]:
    made = [OperatorProcess(kubeconfig, name, logs, *more) for name in names]
    try:
        yield made
    finally:
        for each in made:
            each.kill()


class Reader(Client):
    """Of an operator that only judges: what it would write is noted, and refused."""

    def __init__(self, server: ApiServer) -> None:
        super().__init__(server.access, "judge")
        self.wanted: list[str] = []

    def _refuse(self, resource: Resource, *more: Any, **_: Any) -> bytes:
        self.wanted.append(f"{resource.plural} {more[0]!r:.200}")
        raise Forbidden(f"write {resource.plural}", "only judging", code=403)

    create = update = patch = delete = _refuse


def _cold_compile(server: ApiServer) -> list[str]:
    """What an operator that knows nothing of before would write."""
    reader = Reader(server)
    judge = Town(reader)
    judge.start()
    try:
        until(lambda: judge.runner.published or reader.wanted, "compiled", SECONDS)
        return reader.wanted
    finally:
        judge.stop()
        reader.close()


class Terms:
    """(term, node) of every state that a NodeState of the API went through."""

    def __init__(self, client: Client) -> None:
        self.seen: list[tuple[int, str]] = []
        self._reflector = Reflector(client, resources.NODE_STATES, self._note, lambda: None)

    def _note(self, raw: bytes) -> object:
        item = msgspec.json.decode(raw, type=NodeState)
        self.seen.append((item.spec.term or 0, item.metadata.name))
        return item

    def __enter__(self) -> Terms:
        self._reflector.start()
        until(lambda: self._reflector.synced, "synced", SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._reflector.stop()

    def highest(self) -> int:
        return max((term for term, _ in self.seen), default=0)

    def check(self) -> None:
        """No node's term falls."""
        for name in {name for _, name in self.seen}:
            terms = [term for term, at in self.seen if at == name]
            assert terms == sorted(terms), name


def _settled(server: ApiServer, leader: OperatorProcess) -> None:
    """Until the API holds what a cold compile would write."""
    wanted: list[str] = []

    def nothing() -> bool:
        wanted[:] = _cold_compile(server)
        return not wanted

    deadline = time.monotonic() + SECONDS
    while not nothing():
        assert time.monotonic() < deadline, f"{wanted}; {leader.tail()}"
        time.sleep(0.5)


def test_behind_a_proxy_that_makes_faults(
    server: ApiServer, client: Client, tmp_path: Path
) -> None:
    wanted = scaled(ci=60, soak=600)
    with (
        campaign("operator-faults", "faults between an operator and its API server") as figures,
        proxied(server, seed=6) as proxy,
    ):
        kubeconfig = _plain(tmp_path / "kubeconfig", proxy.url)
        churn = Churn(client, seed=6)
        with _operators(kubeconfig, tmp_path, "one") as (one,):
            one.start()
            while figures.count < wanted:
                kinds = churn.random.sample(sorted(ALL_FAULTS), churn.random.randrange(1, 6))
                proxy.kinds, proxy.rate = frozenset(kinds), 0.15
                for _ in range(churn.random.randrange(20, 60)):
                    churn.change()
                proxy.rate = 0.0
                _settled(server, one)
                assert one.running(), one.tail()
                figures.count = proxy.count
        print(f"{churn.count} changes; {dict(sorted(proxy.faults.items()))}")


def _plain(path: Path, url: str) -> Path:
    config: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "proxy", "cluster": {"server": url}}],
        "users": [{"name": "nobody", "user": {}}],
        "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "nobody"}}],
        "current-context": "proxy",
    }
    path.write_bytes(msgspec.json.encode(config))
    return path


def test_killed_in_the_middle(server: ApiServer, client: Client, tmp_path: Path) -> None:
    """SIGKILL while it publishes, and again; it comes back under its name."""
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
    churn = Churn(client, seed=7)
    with Terms(client) as terms, _operators(kubeconfig, tmp_path, "one") as (one,):
        for _ in range(scaled(ci=4, soak=20)):
            one.start()
            before = terms.highest()
            until(lambda before=before: _moved(churn, terms, before), "writes", SECONDS)
            one.kill()
        one.start()
        _settled(server, one)
        terms.check()


def _moved(churn: Churn, terms: Terms, before: int) -> bool:
    """Changes until somebody with a higher term writes."""
    churn.change()
    return terms.highest() > before


def test_stopped_for_thirty_seconds_under_churn(
    server: ApiServer, client: Client, tmp_path: Path
) -> None:
    """A leader that slept through its Lease: what it writes late is refused or undone."""
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
    churn = Churn(client, seed=8)
    with Terms(client) as terms, _operators(kubeconfig, tmp_path, "one", "two") as (one, two):
        one.start()
        until(lambda: _moved(churn, terms, 0), "one writes", SECONDS)
        first = terms.highest()
        two.start()
        until(two.ready, "two is a candidate", SECONDS)
        for _ in range(20):
            churn.change()
        one.signal(signal.SIGSTOP)
        begun = time.monotonic()
        until(lambda: _moved(churn, terms, first), "two took over", SECONDS)
        print(f"failover: {time.monotonic() - begun:.1f} s")
        while time.monotonic() < begun + 30.0:
            churn.change()
            time.sleep(0.05)
        one.signal(signal.SIGCONT)
        until(lambda: one.said("lost the lease"), "one knows", SECONDS)
        for _ in range(50):
            churn.change()
        _settled(server, two)
        terms.check()
        second = terms.highest()
        assert second == first + 1, "one did not lead again"
        begun = time.monotonic()
        two.signal(signal.SIGTERM)
        until(lambda: _moved(churn, terms, second), "one took over", HANDOVER_SECONDS)
        print(f"handover: {time.monotonic() - begun:.2f} s")
        assert two.end() == 0
        _settled(server, one)
        terms.check()


def test_etcd_stands_still(server: ApiServer, client: Client, tmp_path: Path) -> None:
    """For longer than the Lease: nobody can renew it, nobody can take it, then somebody leads."""
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
    churn = Churn(client, seed=10)
    with Terms(client) as terms, _operators(kubeconfig, tmp_path, "one", "two") as both:
        for each in both:
            each.start()
        until(lambda: _moved(churn, terms, 0), "one of them writes", SECONDS)
        until(lambda: all(each.ready() for each in both), "both are ready", SECONDS)
        server.pause_etcd()
        try:
            until(lambda: any(e.said("lost the lease") for e in both), "gives up", SECONDS)
        finally:
            server.resume_etcd()
        until(lambda: _written(churn), "takes writes again", SECONDS)
        for _ in range(30):
            churn.change()
        _settled(server, both[0])
        assert all(each.running() for each in both)
        terms.check()


def _written(churn: Churn) -> bool:
    try:
        churn.change()
    except KubeError:
        return False
    return True


def test_two_without_an_election(server: ApiServer, client: Client, tmp_path: Path) -> None:
    """Against all advice: both write, and what is there is still one cold compile."""
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
    churn = Churn(client, seed=9)
    more = ("--no-election",)
    with _operators(kubeconfig, tmp_path, "one", "two", more=more) as both:
        for each in both:
            each.start()
        for _ in range(100):
            churn.change()
        _settled(server, both[0])
        assert all(each.running() for each in both)


class Blows:
    """What befalls two operators and their API server; `one_more` is one of it, at random, over
    when it returns."""

    def __init__(
        self, server: ApiServer, proxy: FaultProxy, churn: Churn, operators: list[OperatorProcess]
    ) -> None:
        self.server, self.proxy, self.churn, self.operators = server, proxy, churn, operators
        self.random = churn.random
        self.count: Counter[str] = Counter()

    def one_more(self) -> None:
        blow = self.random.choice(
            [
                self.faults,
                self.unreachable,
                self.server_killed,
                self.server_restarted,
                self.etcd_still,
                self.operator_killed,
                self.operator_stopped,
            ]
        )
        self.count[blow.__name__] += 1
        blow()

    def _changes(self) -> None:
        for _ in range(self.random.randrange(5, 40)):
            with contextlib.suppress(KubeError):
                self.churn.change()

    def _a_while(self, most: float) -> None:
        """Changes, and time: of both sides of a Lease."""
        until_then = time.monotonic() + self.random.uniform(0.0, most)
        self._changes()
        time.sleep(max(0.0, until_then - time.monotonic()))

    def faults(self) -> None:
        kinds = self.random.sample(sorted(ALL_FAULTS), self.random.randrange(1, 6))
        self.proxy.kinds, self.proxy.rate = frozenset(kinds), 0.15
        self._changes()
        self.proxy.rate = 0.0

    def unreachable(self) -> None:
        self.proxy.blocked = True
        self.proxy.cut_all()
        self._a_while(25.0)
        self.proxy.blocked = False

    def server_killed(self) -> None:
        self._changes()
        self.server.kill()
        time.sleep(self.random.uniform(0.0, 10.0))
        self.server.start()
        self._changes()

    def server_restarted(self) -> None:
        self._changes()
        self.server.terminate()
        self.server.start()
        self._changes()

    def etcd_still(self) -> None:
        self.server.pause_etcd()
        try:
            time.sleep(self.random.uniform(0.0, 20.0))
        finally:
            self.server.resume_etcd()
        until(lambda: _written(self.churn), "takes writes again", SECONDS)
        self._changes()

    def operator_killed(self) -> None:
        which = self.random.choice(self.operators)
        self._changes()
        which.kill()
        self._a_while(20.0)
        which.start()

    def operator_stopped(self) -> None:
        which = self.random.choice(self.operators)
        which.signal(signal.SIGSTOP)
        try:
            self._a_while(25.0)
        finally:
            which.signal(signal.SIGCONT)
        self._changes()


# Of an API server that is killed the proxy may keep a socket that nobody closes.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_hour_of_it(server: ApiServer, client: Client, tmp_path: Path) -> None:
    """One thing after the other; after each, what is there is one cold compile, no node's term has
    fallen, and both operators run. They do not grow."""
    seconds = scaled(ci=60, soak=3600)
    with (
        campaign("operator-hour", "blows to two operators and their API server") as figures,
        proxied(server, seed=11) as proxy,
        Terms(client) as terms,
        _operators(_plain(tmp_path / "kubeconfig", proxy.url), tmp_path, "one", "two") as both,
    ):
        blows = Blows(server, proxy, Churn(client, seed=11), both)
        for each in both:
            each.start()
        until(lambda: all(each.ready() for each in both), "both are ready", SECONDS)
        resident: list[float] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            blows.one_more()
            figures.count += 1
            _settled(server, both[0])
            assert all(each.running() for each in both), [each.tail() for each in both]
            terms.check()
            resident.append(max(each.resident() for each in both))
        print(
            f"{dict(blows.count)}; {proxy.count} faults; MiB: {resident[0]:.0f}, {resident[-1]:.0f}"
        )
        quarter = max(len(resident) // 4, 1)
        assert max(resident[-quarter:]) < 1.3 * max(resident[:quarter])
