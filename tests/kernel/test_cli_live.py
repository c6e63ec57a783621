"""The command's own reading of a node's maps, where they are not what it expects."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tidegate_bpf import Map, MapType, ObjectFile, bpffs
from tidegate_cli.errors import CliError
from tidegate_cli.live import NodeMaps, objects_dir

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]


@pytest.fixture
def pin_dir(tmp_path: Path) -> Iterator[Path]:
    mounted = tmp_path / "bpf"
    mounted.mkdir()
    bpffs.mount(str(mounted))
    try:
        for name in ("maps", "half_open"):
            (mounted / "node" / name).mkdir(parents=True)
        yield mounted / "node"
    finally:
        bpffs.unmount(str(mounted))


def pin(path: Path, type: MapType, key: int, value: int) -> None:
    with Map.create(type, key, value, 4) as made:
        made.update(bytes(key), b"\1" * value)
        made.pin(str(path))


@pytest.mark.parametrize("what", ["table", "share"])
def test_maps_of_another_version_are_named(pin_dir: Path, what: str) -> None:
    spec = ObjectFile(objects_dir() / "pod.o").maps["ct_v2"]
    more = 8 if what == "table" else 0
    pin(pin_dir / "maps" / "ct_v2", MapType.HASH, spec.key_size, spec.value_size + more)
    pin(pin_dir / "half_open" / "0", MapType.ARRAY, 4, 128)
    expected = "ct_v2.*of 40 and 136 bytes" if what == "table" else "of 4 and 128 bytes.*4 and 672"
    with NodeMaps(pin_dir) as node, pytest.raises(CliError, match=expected) as raised:
        list(node.flows())
    assert "bring the loader to this version" in str(raised.value)
