"""Who asks in the truth table's town, wherever it stands, and what happens to those who live there.

`support/truth_town.py` says what is true. Whoever has a town says where its places are, and how a
piece of text becomes objects that are in force."""

from __future__ import annotations

import abc
import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from support import truth_town as t
from support.asking import GRACE_SECONDS, Echoes, Flows, Places, Question
from support.waiting import until

WAIT_SECONDS = 60.0


@dataclass
class Truth(abc.ABC):
    """`places` and `addresses`: of pods, nodes, hosts outside, and "vip"; IPv4, then IPv6, "" where
    there is none. `cidrs`: of nodes' pods."""

    places: Places
    starves: ClassVar[bool] = False
    """Whether pods may be without a CPU for seconds."""
    addresses: dict[str, tuple[str, str]] = field(default_factory=dict, init=False)
    cidrs: dict[str, tuple[str, str]] = field(default_factory=dict, init=False)

    @abc.abstractmethod
    def learn(self, *wanted: str) -> bool:
        """Who is where; whether all `wanted` are among them."""

    @abc.abstractmethod
    def save(self, name: str, text: str) -> None:
        """The objects of `text`, instead of what had this name before."""

    def questions(self, rows: Sequence[t.Row]) -> list[tuple[t.Row, Question]]:
        return [
            (row, Question(row.who, address, row.port, protocol, source))
            for row in rows
            for protocol in ([row.protocol] if row.protocol else ["TCP", "UDP"])
            for address, source in zip(
                self.addresses[row.target], self.source(row.who), strict=True
            )
            if address
        ]

    def source(self, who: str) -> tuple[str, str]:
        """What `who` has to ask from: hosts outside are one that has many addresses."""
        return self.addresses[who] if who in t.OUTSIDE else ("", "")

    def agrees(self, rows: Sequence[t.Row] = t.TABLE) -> None:
        """Soon every row is true: a change takes a moment to reach the nodes."""
        deadline = time.monotonic() + WAIT_SECONDS
        while (wrong := self.wrong(rows)) and time.monotonic() < deadline:
            pass
        assert not wrong, "\n".join(wrong)

    def wrong(
        self, rows: Sequence[t.Row] = t.TABLE, seconds: float = 3.0, grace: float = GRACE_SECONDS
    ) -> list[str]:
        """Rows that are not as expected, an answer being due in so many seconds; one that must not
        come has `grace` more."""
        asked = self.questions(rows)
        expected = [row.allowed for row, _ in asked]
        questions = [question for _, question in asked]
        found = self.places.ask(questions, expected, seconds, grace)
        return [
            f"{row.why}: {q.who} > {row.target} {q.address} {q.port}/{q.protocol}: {got or '-'}"
            for (row, q), got in zip(asked, found, strict=True)
            if got != ("answered" if row.allowed else "")
        ]

    def loses_nothing(self, flows: Flows, but: Set[str] = frozenset()) -> None:
        """Not one datagram was lost, of other flows than those. Where pods were without a CPU for
        so long that answers came late, neighbours and queues may have been: that says nothing."""
        assert flows.lost().keys() <= but or (self.starves and flows.late()), flows.lost()

    def inhabit(self, **changed: str) -> None:
        """Everybody, some otherwise."""
        self.save("inhabitants", "---".join((t.INHABITANTS | changed).values()))


@contextlib.contextmanager
def answered(truth: Truth) -> Iterator[None]:
    """What no pod answers by itself: SCTP, and the hosts outside."""
    with Echoes(truth.places) as echoes:
        for name in ("sctp", "open", "ranged"):
            echoes.serve(name, "SCTP", *t.SCTP_PORTS)
        for name in t.OUTSIDE:
            for protocol in ("TCP", "UDP", "SCTP"):
                echoes.serve(name, protocol, t.OUTER, at=truth.addresses[name])
        yield


def furnish(truth: Truth, netns: str) -> None:
    """Addresses of the hosts outside, and the ways to pods, for a namespace's `eth0` that is on the
    nodes' network."""
    for link in ("lo", "eth0"):
        ip("-n", netns, "link", "set", link, "up")
    for name in t.OUTSIDE:
        for address, bits, more in zip(
            truth.addresses[name], (16, 64), ([], ["nodad"]), strict=True
        ):
            ip("-n", netns, "addr", "add", f"{address}/{bits}", "dev", "eth0", *more)
    for node, pair in truth.cidrs.items():
        for cidr, via in zip(pair, truth.addresses[node], strict=True):
            ip("-n", netns, "route", "add", cidr, "via", via)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


# ---- what changes ---------------------------------------------------------------------------


def labels_change(truth: Truth) -> None:
    """A policy that waits for its pod; then pods and a namespace that have other labels."""
    late = t.policy(
        "late", f"{{from: [{t.FRIENDS}, {{namespaceSelector: {{matchLabels: {{team: blue}}}}}}]}}"
    )
    truth.save("late-policy", late)
    truth.save("late", t.pod("late"))
    until(lambda: truth.learn("late"), "the pod is there", WAIT_SECONDS)
    rows = t.rows("""
near far mate > late:8080/ yes  # the policy was there first
stray alien   > late:8080/ no   # and isolates
""")
    truth.agrees(rows)
    changed = {
        "near": t.pod("near", 1, "role: former"),
        "stray": t.pod("stray", 1, "role: friend"),
        "blue": t.namespace("red"),
    }
    # While it is open, no other namespace has its number.
    with Path(truth.places.paths["near"]).open("rb") as lives, _put_back(truth):
        truth.inhabit(**changed)
        truth.agrees(
            t.rows("""
stray far > late:8080/ yes  # has the label now
stray     > hosted:8080/ yes  # for every policy
near      > late:8080/ no   # has it no more
near      > hosted:8080/ no   # for every policy
mate      > late:8080/ no   # the namespace has another label
mate      > by-team:8080/ no   # for every policy
mate      > by-name:8080/ yes  # and the same name
""")
        )
        number = os.fstat(lives.fileno()).st_ino
        assert Path(truth.places.paths["near"]).stat().st_ino == number, "the same pod"
        truth.save("late", t.pod("late").replace("app: late", "app: free"))
        truth.agrees(t.rows("near stray mate alien > late:8080/ yes  # nobody's subject now"))
    truth.agrees(rows)
    truth.agrees()


@contextlib.contextmanager
def _put_back(truth: Truth) -> Iterator[None]:
    try:
        yield
    finally:
        truth.inhabit()
        truth.save("late", t.pod("late"))


CLIENTS = ("near", "far", "mate", "alien", "two", "outside-200", "outside-202", "outside-210")
CUTS = {
    # near: the receiver's rule. far: its own egress, TCP only. mate: its namespace's label.
    # outside-200: the block has a hole now.
    1: {
        *("near TCP", "near UDP", "far TCP", "mate TCP", "mate UDP"),
        *("outside-200 TCP", "outside-200 UDP"),
    },
    # near: its own label. far: a TrafficPolicy. mate: the Admin tier. alien: the block has a hole.
    # outside-210: the Identity has no such address any more.
    2: {
        f"{who} {kind}"
        for who in ("near", "far", "mate", "alien", "outside-210")
        for kind in ("TCP", "UDP")
    },
}
"""Which flows each change of `truth_town.kept` cuts."""


def flows_are_cut(truth: Truth, changed: int) -> None:
    """Established flows that are allowed no more, from either end's policy; the rest go on without
    a datagram lost."""
    cut = CUTS[changed]
    truth.save("kept", t.kept(truth.addresses, truth.cidrs))
    truth.agrees(_kept(set()))
    with Flows() as flows:
        for number, who in enumerate(CLIENTS):
            for kind in ("TCP", "UDP"):
                # One family each, so that both are there.
                family = (number + (kind == "UDP")) % 2
                to, source = truth.addresses["kept"][family], truth.source(who)[family]
                flows.open(truth.places, f"{who} {kind}", Question(who, to, 8080, kind, source))
        until(lambda: min(flows.counts().values()) > 5, "all are answered", WAIT_SECONDS)
        try:
            truth.save("kept", t.kept(truth.addresses, truth.cidrs, changed=changed))
            if changed == 1:
                truth.inhabit(blue=t.namespace("red"))
            else:
                near = t.pod("near", 1, "role: former")
                truth.inhabit(near=near, office=t.office("172.18.0.211/32"))
            truth.agrees(_kept(cut))
            deadline = time.monotonic() + WAIT_SECONDS
            while (silent := flows.silent()) != cut and time.monotonic() < deadline:
                pass
            assert silent == cut
            ended = flows.counts()
            until(lambda: flows.silent() == cut, "the rest goes on", WAIT_SECONDS)
            assert {name for name in cut if flows.counts()[name] != ended[name]} == set()
            truth.loses_nothing(flows, cut)
        finally:
            truth.inhabit()
            truth.save("kept", "")
    truth.agrees(t.rows(f"{' '.join(CLIENTS)} > kept:8080/ yes  # nobody isolates"))


def _kept(cut: set[str]) -> list[t.Row]:
    """New connections have the same fate."""
    return [
        t.Row("as the flow", who, "kept", 8080, kind, f"{who} {kind}" not in cut)
        for who in CLIENTS
        for kind in ("TCP", "UDP")
    ]


def policies_are_widened(truth: Truth) -> None:
    """Which interrupts nothing: more peers, another kind of peer for the same pods, more ports, one
    more policy, none."""
    ports = "ports: [{port: 8080}, {port: 8080, protocol: UDP}]"
    wide = "ports: [{port: 8000, endPort: 9000}, {port: 1, endPort: 65535, protocol: UDP}]"
    other, near = t.pods_with(role="other"), t.pods_with(app="near")
    far, everybody = t.blocks(*t.both(truth.cidrs["node-2"])), "from: [{namespaceSelector: {}}]"
    steps = {
        "stray > kept:8080/": t.policy("kept", f"{{from: [{t.FRIENDS}, {other}], {ports}}}"),
        "alien > kept:8080/": t.policy("kept", f"{{from: [{near}, {far}], {ports}}}"),
        "mate > kept:8081/UDP": t.policy("kept", f"{{{everybody}, {wide}}}"),
        "mate > kept:7000/TCP": "---".join(
            [t.policy("kept", f"{{{everybody}}}"), t.policy("kept", name="more")]
        ),
        "outside-200 > kept:8080/": "",
    }
    truth.save("kept", t.policy("kept", f"{{from: [{t.FRIENDS}], {ports}}}"))
    truth.agrees(t.rows("near far > kept:8080/ yes\nstray > kept:8080/ no"))
    with Flows() as flows:
        for who in ("near", "far"):
            for kind in ("TCP", "UDP"):
                to = truth.addresses["kept"][kind == "UDP"]
                flows.open(truth.places, f"{who} {kind}", Question(who, to, 8080, kind))
        for opened, text in steps.items():
            truth.save("kept", text)
            truth.agrees(t.rows(f"{opened} yes # is what it adds"))
            until(lambda: flows.silent() == set(), opened, WAIT_SECONDS)
        truth.loses_nothing(flows)
