"""Policies that tell apart what was one, and let it be one again, beside real traffic: nothing that
is allowed all along is lost, nothing that is forbidden all along arrives.

Pods have labels that no policy mentions, so allies, strangers and servers are one class each. Then
policies come and go that mention one such label after the other; none of them changes what the
pods that are asked about may do, but each gives them other numbers.

Faults it was seen to find: addresses that move without copies of rule sets and without the new
number in the sets of policies that go.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import ca_town
from support.ca_soak import campaign, scaled
from support.ca_town import Sink, Town, Traffic, node, pod, policy, until
from tidegate_api.state import NodeState, digest
from tidegate_cli.standalone.errors import PrerequisiteError
from tidegate_cli.standalone.loaders import check
from tidegate_loader.local import read_realised
from tidegate_operator.publish import read_ledger
from tidegate_operator.store import read_all

pytestmark = [pytest.mark.cluster, pytest.mark.kernel, pytest.mark.slow]

NODES = ("node-1", "node-2")
KEYS = 5
"""Splits on top of one another before all is one again."""
TOTAL_RETRANS = 100
"""Where struct tcp_info has tcpi_total_retrans (linux/tcp.h)."""
EGRESS = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "allies-to-servers"},
    "spec": {
        "podSelector": {"matchLabels": {"role": "ally"}},
        "policyTypes": ["Egress"],
        "egress": [{"to": [{"podSelector": {"matchLabels": {"app": "server"}}}]}],
    },
}


@pytest.fixture
def town(tmp_path: Path) -> Iterator[Town]:
    try:
        check()
    except PrerequisiteError as error:
        pytest.skip(str(error))
    with ca_town.town(tmp_path) as made:
        made.save("nodes", node(1), node(2))
        one, other = ({f"t{n}": value for n in range(KEYS)} for value in ("x", "y"))
        made.save(
            "pods",
            pod("server-1", 1, app="server", **one),
            pod("server-2", 2, app="server", **other),
            pod("friend", 1, app="client", role="ally", **one),
            pod("ally", 2, app="client", role="ally", **other),
            pod("stranger", 1, app="client", role="other", **one),
            pod("alien", 2, app="client", role="other", **other),
            pod("bystander", 2, **one),
        )
        made.save("policies", policy("servers", "server", "ally"), EGRESS)
        made.up()
        yield made


def _splitting(number: int) -> dict[str, Any]:
    """By turns as peers of a pod that nobody is asked about, and as subjects."""
    some = {"podSelector": {"matchLabels": {f"t{number}": "x"}}}
    if number % 2 == 0:
        made = policy(f"split-{number}", "bystander")
        made["spec"]["ingress"] = [{"from": [some]}]
        return made
    made = policy(f"split-{number}", "", "ally")
    made["spec"] |= some
    return made


def _classes(town: Town) -> dict[str, dict[str, str]] | None:
    """pod -> labels of its class, as every node has it in force; None: not yet."""
    path = town.run_dir.path
    keys = {number: dict(key.labels) for key, number in read_ledger(path).live.items()}
    found = {}
    states = read_all(path / "objects", NodeState)
    for name in NODES:
        realised = read_realised(town.run_dir.realised(name))
        if name not in states or realised is None:
            return None
        spec = states[name].spec
        if realised.digest != digest(spec):
            return None
        for one in spec.endpoints:
            if one.identity not in keys:
                return None
            found[one.name] = keys[one.identity]
    return found


def _apart(town: Town, key: str) -> bool:
    found = _classes(town)
    return found is not None and all(
        found[one].get(key) == "x" and key not in found[other]
        for one, other in (("friend", "ally"), ("stranger", "alien"), ("server-1", "server-2"))
    )


def _one(town: Town) -> bool:
    found = _classes(town)
    return found is not None and not any(f"t{n}" in c for c in found.values() for n in range(KEYS))


class Connects:
    """New connections all the time, one after the other: `ok` must come about at the first SYN,
    `never` must not at all. `wrong`: what went otherwise."""

    def __init__(self, town: Town, ok: list[tuple[str, str]], never: list[tuple[str, str]]) -> None:
        self._town = town
        self._end = threading.Event()
        rounds = ((ok, self._allowed), (never, self._forbidden))
        self._threads = [
            threading.Thread(target=self._repeat, args=(pairs, attempt))
            for pairs, attempt in rounds
        ]
        self.made = self.refused = 0
        self.wrong: list[str] = []

    def __enter__(self) -> Connects:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, pairs: list[tuple[str, str]], attempt: Any) -> None:
        while not self._end.wait(0.005):
            for source, to in pairs:
                attempt(source, to)

    def _allowed(self, source: str, to: str) -> None:
        made = self._town.connect(source, to, 8080, timeout=10.0)
        if made is None:
            self.wrong.append(f"{source} -> {to}: no connection")
            return
        with made:
            info = made.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        (again,) = struct.unpack_from("=I", info, TOTAL_RETRANS)
        if again:
            self.wrong.append(f"{source} -> {to}: the first SYN was lost")
        self.made += 1

    def _forbidden(self, source: str, to: str) -> None:
        made = self._town.connect(source, to, 8080, timeout=0.03)
        if made is not None:
            made.close()
            self.wrong.append(f"{source} -> {to}: connected")
        self.refused += 1


def test_split_and_merged_classes_lose_and_admit_nothing(town: Town) -> None:
    until(lambda: _one(town), "no label is mentioned yet")
    with (
        campaign("splits", "splits of classes under traffic") as figures,
        Traffic(town, "friend", "server-2") as kept,
        Connects(
            town,
            [("ally", "server-1"), ("friend", "server-1"), ("ally", "server-2")],
            [("stranger", "server-2"), ("alien", "server-1"), ("ally", "bystander")],
        ) as connects,
        Sink(town, "server-1", 7777, "stranger", "alien") as one,
        Sink(town, "server-2", 7777, "stranger", "alien") as two,
        Sink(town, "bystander", 7777, "friend", "ally") as three,
    ):
        cycles = scaled(2, 20)
        for cycle in range(cycles):
            for number in range(KEYS):
                town.save("split", _splitting(number))
                key = f"t{number}"
                until(partial(_apart, town, key), f"split by {key} is in force")
                figures.count += 1
            town.save("split")
            if cycle < cycles - 1:
                until(lambda: _one(town), "classes are one again")
        figures.failures += [f"allowed: {text}" for text in kept.lost]
        figures.failures += connects.wrong
        sinks = (one, two, three)
        figures.failures += [f"forbidden packet passed: {got}" for s in sinks for got in s.got]
        assert min(kept.answered, connects.made, connects.refused, *(s.tried for s in sinks)) > 50
        # And they would have noticed.
        town.save("open", policy("open", "server", "other"))
        until(lambda: one.got and two.got and connects.wrong, "what passes is seen")
