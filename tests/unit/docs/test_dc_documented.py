"""What the code has, the docs tell: reasons, limits, commands; and `operator/` shadows nothing."""

from __future__ import annotations

import argparse
import operator
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tidegate_bpf import ObjectFile
from tidegate_cli import reasons
from tidegate_cli.main import build_parser
from tidegate_observer.metrics import Metrics as ObserverMetrics
from tidegate_operator.cluster.metrics import Metrics

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
OBJECT = ObjectFile(ROOT / "datapath" / "build" / "pod.o")


def test_every_drop_reason_is_documented() -> None:
    rows = re.findall(r"^\| (\d+) \| ([^|]+?) \|", (DOCS / "drop-reasons.md").read_text(), re.M)
    enum = set(OBJECT.enums["tg_reason"].values()) - {256}
    assert {int(number) for number, _ in rows} == enum
    assert {int(number): text for number, text in rows} == reasons.TEXT


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("endpoints a node", OBJECT.enums["tg_limits"]["TG_MAX_ENDPOINTS"]),
        ("rule sets in force on a node", OBJECT.enums["tg_limits"]["TG_MAX_RULE_SETS"]),
        ("key shapes of one rule set", OBJECT.enums["tg_limits"]["TG_MAX_SHAPES"]),
        ("tracked flows a node", OBJECT.maps["ct_v2"].max_entries),
        (
            "translated flows with one answer so far, a node",
            OBJECT.maps["answered_v1"].max_entries,
        ),
        ("frontends", OBJECT.maps["frontends_v1"].max_entries),
        ("fragmented packets in flight a node", OBJECT.maps["frags_v1"].max_entries),
        ("TCP sockets translated at connect", OBJECT.maps["streams_v1"].max_entries),
        ("peers of datagram sockets translated", OBJECT.maps["socks_v1"].max_entries),
    ],
)
def test_limits_are_documented_as_they_are(what: str, value: int) -> None:
    assert f"| {what} | {value:,} |" in (DOCS / "limits.md").read_text()


def _commands(parser: argparse.ArgumentParser, path: str = "tidegate") -> list[str]:
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                found += [f"{path} {name}", *_commands(sub, f"{path} {name}")]
    return found


def test_every_command_is_documented() -> None:
    text = (DOCS / "cli.md").read_text()
    leaves = [c for c in _commands(build_parser()) if c not in {"tidegate " + g for g in GROUPS}]
    assert [command for command in leaves if f"`{command}" not in text] == []


class _Nothing:
    """An operator that has not begun."""

    def restarts(self) -> dict[str, int]:
        return {}

    def unsynced(self) -> list[str]:
        return []

    def queue_age(self) -> float:
        return 0.0

    def leading(self) -> bool:
        return False


def test_every_metric_of_the_operator_is_documented() -> None:
    metrics = Metrics()
    metrics.watch(_Nothing())
    real = {
        metric.name + ("_total" if metric.type == "counter" else "")
        for metric in metrics.registry.collect()
    }
    rows = re.findall(r"^\| `(tidegate_operator_\w+)`", (DOCS / "operator.md").read_text(), re.M)
    assert set(rows) == real


def test_every_metric_of_the_observer_is_documented() -> None:
    real = {
        metric.name + ("_total" if metric.type == "counter" else "")
        for metric in ObserverMetrics().collect()
    }
    text = (DOCS / "observe.md").read_text()
    rows = re.findall(r"^\| (`(?:hubble|cilium|kubeproxy|tidegate)_[^|]+) \|", text, re.M)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == real


GROUPS = ("identity", "endpoint", "policy", "lb", "ct", "ipcache", "metrics")


def test_operator_directory_shadows_nothing() -> None:
    assert not [p.name for p in (ROOT / "operator").glob("*.py")]
    assert operator.add(1, 1) == 2
    for where in (ROOT, ROOT / "operator"):
        done = subprocess.run(
            [sys.executable, "-c", "import operator; operator.itemgetter"], cwd=where, check=False
        )
        assert done.returncode == 0
