"""How full the maps are, counted from the maps themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import town as t
from support.town import Town
from tidegate_bpf import bpffs
from tidegate_observer.pressure import Pressure

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]


@pytest.fixture
def town() -> Iterator[Town]:
    with t.town() as made:
        yield made


@pytest.fixture
def pins(town: Town, tmp_path: Path) -> Iterator[Path]:
    bpffs.mount(tmp_path)
    try:
        (tmp_path / "maps").mkdir()
        (tmp_path / "rule_sets").mkdir()
        for name, held in town.lab.maps.items():
            if "_v" in name:
                held.pin(str(tmp_path / "maps" / name))
        yield tmp_path
    finally:
        bpffs.unmount(tmp_path)


def test_every_map_that_can_fill_says_how_full_it_is(town: Town, pins: Path) -> None:
    town.open()
    town.lab.service(t.VIP4, 80, 6, [(t.IP4["b"], 8080), (t.IP4["c"], 8080), (t.IP4["d"], 8080)])
    town.handshake("a", "b", 4)
    for number in (7, 9):
        town.lab.maps["control_v1"].pin(str(pins / "rule_sets" / str(number)))
    look = Pressure(town.lab.file, pins).look(now=True)
    sizes = {name.rpartition("_v")[0]: held for name, held in town.lab.maps.items() if "_v" in name}
    assert look["ct"] == (1, sizes["ct"].info.max_entries)
    assert look["backends"][0] == 3
    assert look["slots"] == (3, sizes["slots"].info.max_entries)
    assert look["frontends"][0] == 1
    assert look["ipcache_lpm"][0] == 2
    assert look["ipcache"][0] == len(list(sizes["ipcache"].keys()))
    assert look["limits"] == (0, 2048)
    assert look["rule_sets"] == (2, 4096)
    # What cannot fill, or is overwritten by design.
    assert not {"events", "flows", "metrics", "control", "streams", "node"} & look.keys()


def test_it_is_not_counted_at_every_look(town: Town, pins: Path) -> None:
    pressure = Pressure(town.lab.file, pins)
    before = pressure.look()["frontends"]
    key = town.lab.codecs["tg_frontend_key"].pack(addr=bytes(16), port=1, protocol=6)
    town.lab.maps["frontends_v1"].update(key, bytes(8))
    assert pressure.look()["frontends"] == before
    assert pressure.look(now=True)["frontends"] == (before[0] + 1, before[1])
