"""The bench's arithmetic: a wrong percentile or bar would make every figure worthless."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[3] / "bench"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


measure = load("measure")


@pytest.mark.parametrize(
    ("reason", "values", "share", "expected"),
    [
        ("nearest rank of 200", list(map(float, range(1, 201))), 0.99, 198.0),
        ("of 100", list(map(float, range(1, 101))), 0.99, 99.0),
        ("order does not matter", [3.0, 1.0, 2.0], 0.5, 2.0),
        ("all of it is the largest", [1.0, 2.0, 3.0], 1.0, 3.0),
        ("nothing of it is the smallest", [1.0, 2.0, 3.0], 0.0, 1.0),
        ("one value", [7.0], 0.99, 7.0),
    ],
)
def test_percentile(reason: str, values: list[float], share: float, expected: float) -> None:
    assert expected == measure.percentile(values, share), reason


@pytest.mark.parametrize(
    ("reason", "value", "expected"),
    [("below", 3.9, True), ("at the bar", 4.0, True), ("above", 4.0001, False)],
)
def test_bar(reason: str, value: float, expected: bool) -> None:
    line = measure.Result("x", "what", value, "ratio", "y", 4.0, {"runs": [1]}).line()
    assert expected == line["ok"], reason
    assert list(line) == ["id", "what", "value", "unit", "against", "bar", "ok", "runs"]


@pytest.mark.parametrize(
    ("reason", "value", "expected"),
    [("below", 1.1499, False), ("at the bar", 1.15, True), ("above", 3.0, True)],
)
def test_bar_from_below(reason: str, value: float, expected: bool) -> None:
    line = measure.Result("x", "what", value, "ratio", "y", 1.15, at_least=True).line()
    assert expected == line["ok"], reason
    assert line["at least"] is True


def test_pairs_are_of_the_same_round() -> None:
    """A machine that got twice as slow for one of three rounds changes no ratio."""
    figures = {"ours": [1.0, 2.0, 1.0], "theirs": [3.0, 6.0, 3.0]}
    assert measure.paired(figures, "theirs", "ours") == 3.0
    with pytest.raises(ValueError, match="argument"):
        measure.paired({"ours": [1.0], "theirs": [1.0, 2.0]}, "theirs", "ours")


def test_rounds_alternate() -> None:
    order: list[str] = []

    def variant(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = measure.interleaved({n: (lambda n=n: variant(n)) for n in "ab"}, 3)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert found == {"a": [1.0, 3.0, 5.0], "b": [2.0, 4.0, 6.0]}


def test_absolute_is_the_median_and_keeps_its_runs() -> None:
    values = iter([5.0, 1.0, 9.0, 2.0, 3.0])
    line = measure.absolute("x", "what", "ms", 3.0, lambda: next(values)).line()
    assert (line["value"], line["ok"], line["runs"]) == (3.0, True, [5.0, 1.0, 9.0, 2.0, 3.0])
    assert len(line["calibration"]["runs"]) == 5


def test_every_row_of_the_table_has_a_measurement() -> None:
    """Without running any: the ids that `make bench` promises."""
    named = "".join(path.read_text() for path in BENCH.glob("row_*.py"))
    promised = [
        "tc-established",
        "tc-new-one",
        "tc-new-both",
        "tc-new-worst",
        "tc-deny",
        "tc-service",
        "rr-local",
        "connect-clusterip",
        "apply-latency",
        "loader-cold",
        "loader-noop",
        "loader-one",
        "loader-switch",
        "loader-rss",
        "map-memory",
        "compile-cold",
        "compile-one",
        "svc-maglev",
        "svc-change",
        "svc-change-cluster",
        "svc-change-cpu",
        "svc-change-cpu-cluster",
        "svc-cold",
        "svc-connect",
        "svc-connect-flat",
        "svc-nodeport",
        "svc-nodeport-far",
        "svc-rate-local",
        "svc-rate-remote",
        "svc-xdp",
        "e2e-policy",
        "e2e-endpoints",
        "first-packet",
        "op-cold",
        "op-one",
        "op-rss",
        "bytes-pod",
        "bytes-labels",
        "loader-kind",
        "image",
        "op-ready",
    ]
    assert [name for name in promised if f'"{name}"' not in named] == []
