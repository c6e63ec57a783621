"""What the observer tells of real traffic, against what the test itself sent: nothing missing,
nothing twice, every policy by its name. The client knows the API's contract and no code of ours.

Faults it was seen to find: a rule set looked up under another's id; records read twice.
"""

from __future__ import annotations

import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ca_town
from support.ca_town import Town, node, pod, policy, until
from support.hubble import Hubble
from tidegate_cli.standalone.errors import PrerequisiteError
from tidegate_cli.standalone.loaders import check

pytestmark = [pytest.mark.cluster, pytest.mark.kernel, pytest.mark.slow]

CAGE = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "cage"},
    "spec": {"podSelector": {"matchLabels": {"app": "caged"}}, "policyTypes": ["Egress"]},
}
FIRST_PORT = 20000
EACH = 5

Told = tuple[str, str, int, int, tuple[str, ...], tuple[str, ...]]
"""source pod, destination pod, source port, destination port, egress and ingress denied by."""


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    try:
        check()
    except PrerequisiteError as error:
        pytest.skip(str(error))
    with ca_town.town(tmp_path_factory.mktemp("observe")) as made:
        made.save("nodes", node(1), node(2))
        pods = [pod("server"), pod("ally", 2, role="ally"), pod("alien", 2), pod("stranger")]
        made.save("pods", *pods, pod("caged", 2))
        made.save("policy", policy("server", "server", "ally"), policy("lock", "server"), CAGE)
        made.up()
        until(lambda: made.run_dir.observer.exists(), "the observer serves")
        yield made


@pytest.fixture
def hubble(town: Town) -> Iterator[Hubble]:
    with Hubble(f"unix:{town.run_dir.observer}") as client:
        yield client


def send(town: Town, source: str, to: str, port: int, family: int) -> None:
    """One datagram from a port that nobody else uses."""
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    with town.inside(source):
        sock = socket.socket(kind, socket.SOCK_DGRAM)
    address = next(a for a in town.pod(to).addresses if (":" in a) == (family == 6))
    with sock:
        sock.bind(("", port))
        sock.sendto(b"x", (address, 8081))


def told(flow: dict[str, Any]) -> Told:
    ports = flow["l4"]["UDP"]
    names = [
        tuple(p["name"] for p in flow.get(f"{d}_denied_by", ())) for d in ("egress", "ingress")
    ]
    ends = flow["source"]["pod_name"], flow["destination"]["pod_name"]
    return (*ends, ports["source_port"], ports["destination_port"], names[0], names[1])


def denied(hubble: Hubble) -> Counter[Told]:
    wanted = [{"verdict": ["DROPPED"], "protocol": ["udp"], "destination_port": ["8081"]}]
    return Counter(told(flow) for flow in hubble.flows(whitelist=wanted))


def deny_some(town: Town, first: int) -> Counter[Told]:
    """Sends what must be denied, and what must not; what should be told of it."""
    expected: Counter[Told] = Counter()
    at = first
    for family in (4, 6):
        for _ in range(EACH):
            for source in ("stranger", "alien"):
                send(town, source, "server", at, family)
                expected[source, "server", at, 8081, (), ("lock", "server")] += 1
                at += 1
            send(town, "caged", "stranger", at, family)
            expected["caged", "stranger", at, 8081, ("cage",), ()] += 1
            send(town, "ally", "server", at, family)
            at += 1
    return expected


def test_every_denial_is_told_once_by_its_policies(town: Town, hubble: Hubble) -> None:
    expected = deny_some(town, FIRST_PORT)
    until(lambda: sum(denied(hubble).values()) >= sum(expected.values()), "all is told")
    assert denied(hubble) == expected


def test_a_policy_that_is_new_is_named_from_the_first_denial_on(town: Town, hubble: Hubble) -> None:
    names = {()}
    for number in range(3):
        names = {max(names), (f"fresh-{number}",)}
        town.save("fresh", policy(f"fresh-{number}", "stranger"))
        first = at = FIRST_PORT + 1000 + 200 * number
        found: set[tuple[str, ...]] = set()
        while (f"fresh-{number}",) not in found:
            send(town, "ally", "stranger", at, 4)
            at += 1
            assert at < first + 200
            found = {t[5] for t in denied(hubble) if t[1] == "stranger" and t[2] >= first}
        assert found <= names - {()}


def test_a_killed_observer_misses_nothing(town: Town, hubble: Hubble) -> None:
    (pid,) = observers(town)
    os.kill(pid, signal.SIGSTOP)
    expected = deny_some(town, FIRST_PORT + 2000)
    os.kill(pid, signal.SIGKILL)
    until(lambda: observers(town) not in ([], [pid]), "another observer is there")
    with Hubble(f"unix:{town.run_dir.observer}") as client:

        def complete() -> bool:
            try:
                return sum(denied(client).values()) >= sum(expected.values())
            except Exception:
                return False  # it does not serve yet

        until(complete, "all is told")
        assert denied(client) == expected


def observers(town: Town) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        argv = ca_town._cmdline(entry)
        if "tidegate_observer" in argv and str(town.run_dir.path) in argv:
            found.append(int(entry.name))
    return found


def test_the_command_line_prints_them(town: Town) -> None:
    send(town, "stranger", "server", FIRST_PORT + 3000, 4)
    words = ["observe", "--last", "1", "-o", "compact", "--port", str(FIRST_PORT + 3000)]

    def shown() -> bool:
        return " Policy denied DROPPED BY lock (NetworkPolicy), server (NetworkPolicy) (UDP)" in (
            town.tidegate(*words).stdout
        )

    until(shown, "the denial is shown")
