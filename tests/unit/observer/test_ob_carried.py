"""What flows to each frontend have carried: counted once, kept over a restart, gone with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tidegate_observer import carried
from tidegate_observer.carried import Amounts, Carried
from tidegate_observer.flow import Counts, Flow, FrontendKey, Kind, address_bytes
from unit.observer.flows import SHOP_WEB, started

WEB: FrontendKey = (address_bytes("10.96.0.1"), 80, 6)
NAMES: FrontendKey = (address_bytes("fd00::a"), 53, 17)
SHOWN = {WEB: ("10.96.0.1", 80, 6), NAMES: ("fd00::a", 53, 17)}


def serves(*keys: FrontendKey) -> Callable[[bytes, int, int], bool]:
    return lambda *key: key in keys


def counts(packets: int, replies: int) -> Counts:
    return Counts(packets, 100 * packets, replies, 200 * replies, 1, "fin")


def ended(key: FrontendKey | None, packets: int, replies: int) -> Flow:
    return started(kind=Kind.END, service=SHOP_WEB, counts=counts(packets, replies), asked=key)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / carried.file_name("node-1")


def test_nobody_counts(path: Path) -> None:
    assert carried.read(path) is None
    path.write_text("[[")
    assert carried.read(path) is None


def test_flows_that_ended_and_those_under_way(path: Path) -> None:
    made = Carried(path)
    made.add([ended(WEB, 3, 2), ended(WEB, 1, 0), ended(None, 7, 7), started(asked=WEB)])
    made.write([(WEB, counts(10, 5)), (NAMES, counts(1, 1))], serves(WEB, NAMES))
    assert carried.read(path) == {
        SHOWN[WEB]: Amounts(14, 1400, 7, 1400),
        SHOWN[NAMES]: Amounts(1, 100, 1, 200),
    }
    made.add([ended(WEB, 11, 6)])
    made.write([], serves(WEB, NAMES))
    assert carried.read(path) == {SHOWN[WEB]: Amounts(15, 1500, 8, 1600)}, (
        "the flow that ended is one"
    )


def test_another_observer_goes_on(path: Path) -> None:
    first = Carried(path)
    first.add([ended(NAMES, 2, 1)])
    first.write([], serves(WEB, NAMES))
    second = Carried(path)
    second.add([ended(NAMES, 1, 1)])
    second.write([], serves(WEB, NAMES))
    assert carried.read(path) == {SHOWN[NAMES]: Amounts(3, 300, 2, 400)}


def test_a_frontend_that_goes_takes_its_figures_with_it(path: Path) -> None:
    made = Carried(path)
    made.add([ended(WEB, 1, 1), ended(NAMES, 1, 1)])
    made.write([(WEB, counts(1, 1))], serves(NAMES))
    assert carried.read(path) == {SHOWN[NAMES]: Amounts(1, 100, 1, 200)}
    made.write([], serves(WEB, NAMES))
    assert carried.read(path) == {SHOWN[NAMES]: Amounts(1, 100, 1, 200)}


def test_no_more_than_fit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carried, "MAX_FRONTENDS", 1)
    made = Carried(path)
    made.add([ended(WEB, 1, 1), ended(NAMES, 1, 1), ended(WEB, 1, 1)])
    made.write([], serves(WEB, NAMES))
    assert carried.read(path) == {SHOWN[WEB]: Amounts(2, 200, 2, 400)}
