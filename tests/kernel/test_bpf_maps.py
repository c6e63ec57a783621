"""Every map type in use, against the running kernel."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tidegate_bpf import BpfError, LayoutError, Map, MapFull, MapType, bpffs
from tidegate_bpf.maps import EXIST, NO_PREALLOC, NOEXIST, possible_cpus

pytestmark = pytest.mark.kernel

KEYED = [
    (MapType.HASH, 0),
    (MapType.HASH, NO_PREALLOC),
    (MapType.LRU_HASH, 0),
    (MapType.LPM_TRIE, NO_PREALLOC),
    (MapType.PERCPU_HASH, 0),
]
INDEXED = [(MapType.ARRAY, 0), (MapType.PERCPU_ARRAY, 0)]


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "bpf"
    path.mkdir()
    bpffs.mount(path)
    yield path
    bpffs.unmount(path)


def key(number: int) -> bytes:
    """A key that is also an LPM prefix: 32 bits, all of them significant."""
    return (32).to_bytes(4, "little") + number.to_bytes(4, "big")


def value(a_map: Map, number: int) -> bytes:
    copies = a_map.value_stride // 8
    return bytes(number.to_bytes(8, "little") * copies)


@pytest.mark.parametrize(("kind", "flags"), KEYED)
def test_keyed_round_trip(kind: MapType, flags: int) -> None:
    with Map.create(kind, 8, 8, 4096, flags=flags, name="tgb_keyed") as a_map:
        assert (a_map.info.type, a_map.info.flags, a_map.info.name) == (kind, flags, "tgb_keyed")
        with pytest.raises(KeyError):
            a_map.lookup(key(1))
        a_map.update(key(1), value(a_map, 11))
        assert a_map.lookup(key(1)) == value(a_map, 11)
        with pytest.raises(KeyError):
            a_map.delete(key(2))
        assert not a_map.discard(key(2))
        assert a_map.discard(key(1))
        assert dict(a_map.items()) == {}


@pytest.mark.parametrize(("kind", "flags"), KEYED)
def test_keyed_batches(kind: MapType, flags: int) -> None:
    with Map.create(kind, 8, 8, 32768, flags=flags) as a_map:
        wanted = {key(i): value(a_map, i) for i in range(10_000)}  # more than one dump's batch
        assert a_map.update_items(wanted.items()) == 10_000
        assert dict(a_map.items()) == wanted
        assert set(a_map.keys()) == wanted.keys()
        # Absent keys first, last and between: none may stop the rest.
        doomed = [key(99_999), key(5), key(99_998), key(99_997), key(6), key(88_888)]
        assert a_map.delete_batch(b"".join(doomed)) == 2
        assert dict(a_map.items()) == {k: v for k, v in wanted.items() if k not in doomed}
        assert a_map.update_batch(b"", b"") == 0
        assert a_map.delete_batch(b"") == 0


@pytest.mark.parametrize(("kind", "flags"), INDEXED)
def test_indexed(kind: MapType, flags: int) -> None:
    with Map.create(kind, 4, 8, 16, flags=flags) as a_map:
        keys = [i.to_bytes(4, "little") for i in range(16)]
        a_map.update_items((k, value(a_map, i)) for i, k in enumerate(keys[:10]))
        expected = [(k, value(a_map, i if i < 10 else 0)) for i, k in enumerate(keys)]
        assert list(a_map.items()) == expected
        with pytest.raises(KeyError):
            a_map.lookup((16).to_bytes(4, "little"))


def test_per_cpu_values() -> None:
    with Map.create(MapType.PERCPU_ARRAY, 4, 12, 1) as a_map:
        assert a_map.value_stride == 16 * possible_cpus()
        each = [bytes([cpu + 1]) * 12 for cpu in range(possible_cpus())]
        a_map.update(bytes(4), b"".join(one + bytes(4) for one in each))
        assert a_map.lookup_per_cpu(bytes(4)) == each


def test_longest_prefix_wins() -> None:
    with Map.create(MapType.LPM_TRIE, 8, 4, 8, flags=NO_PREALLOC) as trie:
        trie.update((8).to_bytes(4, "little") + bytes((10, 0, 0, 0)), b"wide")
        trie.update((16).to_bytes(4, "little") + bytes((10, 1, 0, 0)), b"slim")
        assert trie.lookup(key(0x0A010203)) == b"slim"
        assert trie.lookup(key(0x0A020203)) == b"wide"
        with pytest.raises(KeyError):
            trie.lookup(key(0x0B000000))


@pytest.mark.parametrize("kind", [MapType.ARRAY_OF_MAPS, MapType.HASH_OF_MAPS])
def test_map_in_map(kind: MapType) -> None:
    keys = [i.to_bytes(4, "little") for i in range(4)]
    with (
        Map.create(MapType.HASH, 4, 8, 1) as one,
        Map.create(MapType.HASH, 4, 8, 64) as two,
        Map.create(kind, 4, 4, 4, inner=one) as outer,
    ):
        outer.update(keys[0], one)
        assert int.from_bytes(outer.lookup(keys[0]), "little") == one.info.id
        assert outer.update_items([(keys[1], two), (keys[2], one)]) == 2
        found = {k: int.from_bytes(v, "little") for k, v in outer.items()}
        assert found == {keys[0]: one.info.id, keys[1]: two.info.id, keys[2]: one.info.id}
        two.update(keys[0], b"12345678")
        with Map.from_id(two.info.id) as again:
            assert again.lookup(keys[0]) == b"12345678"
        assert outer.delete_batch(keys[2] + keys[3] + keys[1]) == 2
        outer.delete(keys[0])
        assert list(outer.items()) == []


def test_map_in_map_refuses_another_shape() -> None:
    with (
        Map.create(MapType.HASH, 4, 8, 1) as one,
        Map.create(MapType.HASH, 4, 16, 1) as other,
        Map.create(MapType.ARRAY_OF_MAPS, 4, 4, 4, inner=one) as outer,
        pytest.raises(BpfError) as caught,
    ):
        outer.update(bytes(4), other)
    assert caught.value.errno == errno.EINVAL


def test_full() -> None:
    with Map.create(MapType.HASH, 8, 8, 4) as a_map:
        keys = b"".join(key(i) for i in range(9))
        with pytest.raises(MapFull) as batch:
            a_map.update_batch(keys, bytes(9 * 8))
        assert batch.value.done == 4
        with pytest.raises(MapFull):
            a_map.update(key(99), bytes(8))
    with Map.create(MapType.LPM_TRIE, 8, 8, 1, flags=NO_PREALLOC) as trie:
        trie.update(key(1), bytes(8))
        with pytest.raises(MapFull):
            trie.update(key(2), bytes(8))


def test_update_flags() -> None:
    with Map.create(MapType.HASH, 8, 8, 4) as a_map:
        with pytest.raises(KeyError):
            a_map.update(key(1), bytes(8), EXIST)
        a_map.update(key(1), bytes(8), NOEXIST)
        with pytest.raises(BpfError) as caught:
            a_map.update(key(1), bytes(8), NOEXIST)
        assert caught.value.errno == errno.EEXIST


def test_wrong_sizes_never_reach_the_kernel() -> None:
    with Map.create(MapType.HASH, 8, 8, 4) as a_map:
        for call in (
            lambda: a_map.lookup(bytes(7)),
            lambda: a_map.update(bytes(9), bytes(8)),
            lambda: a_map.update(bytes(8), bytes(7)),
            lambda: a_map.delete(bytes(1)),
            lambda: a_map.update_batch(bytes(16), bytes(8)),
            lambda: a_map.update_batch(bytes(15), bytes(16)),
            lambda: a_map.delete_batch(bytes(15)),
        ):
            with pytest.raises(LayoutError):
                call()


def test_pin_dup_and_close(pins: Path) -> None:
    path = str(pins / "a")
    with Map.create(MapType.HASH, 8, 8, 4) as a_map:
        a_map.pin(path)
        a_map.update(key(1), b"12345678")
        twin = a_map.dup()
        with pytest.raises(BpfError) as caught:
            a_map.pin(path)
        assert caught.value.errno == errno.EEXIST
    a_map.close()
    with pytest.raises(ValueError, match="closed"):
        a_map.lookup(key(1))
    assert twin.lookup(key(1)) == b"12345678"
    twin.close()
    with Map.open_pinned(path) as again:
        assert again.lookup(key(1)) == b"12345678"
        assert again.info.id == a_map.info.id
    with pytest.raises(BpfError) as absent:
        Map.open_pinned(str(pins / "b"))
    assert absent.value.errno == errno.ENOENT


def test_bpffs(pins: Path, tmp_path: Path) -> None:
    assert bpffs.is_bpffs(pins)
    assert not bpffs.is_bpffs(tmp_path)
    assert not bpffs.is_bpffs(tmp_path / "absent")


def test_freeze_and_memory() -> None:
    with Map.create(MapType.ARRAY, 4, 8, 1024) as a_map:
        assert a_map.memory() >= 8 * 1024
        a_map.freeze()
        with pytest.raises(BpfError):
            a_map.update(bytes(4), bytes(8))


def test_a_dense_dump_ends_behind_what_is_there() -> None:
    with Map.create(MapType.ARRAY, 4, 8, 100_000) as array:
        for index in (0, 3, 9_000):
            array.update(index.to_bytes(4, sys.byteorder), b"\1" * 8)
        keys, values = array.dump(dense=True)
        assert len(keys) // 4 == len(values) // 8 < 100_000
        assert values[9_000 * 8 : 9_001 * 8] == b"\1" * 8
        assert array.dump()[1].startswith(values)
