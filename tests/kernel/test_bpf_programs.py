"""Loading objects, dry runs and the ring buffer, against the running kernel."""

from __future__ import annotations

import errno
import select
from collections.abc import Iterator
from pathlib import Path

import pytest
from tidegate_bpf import (
    BpfError,
    LayoutError,
    LoadedObject,
    Map,
    MapType,
    ObjectFile,
    Program,
    RingBuffer,
    SkbContext,
    VerifierError,
    bpffs,
    features,
)
from unit.bpf.compiled import small_object

pytestmark = pytest.mark.kernel

FRAME = bytes(12) + b"\x08\x00" + bytes(50)


@pytest.fixture(scope="module")
def spec() -> ObjectFile:
    return ObjectFile(small_object())


@pytest.fixture
def loaded(spec: ObjectFile) -> Iterator[LoadedObject]:
    with spec.load(rodata={"blob": b"\x55\0\0\0"}) as found:
        yield found


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "bpf"
    path.mkdir()
    bpffs.mount(path)
    yield path
    bpffs.unmount(path)


def test_load_all(spec: ObjectFile, loaded: LoadedObject) -> None:
    assert list(loaded.maps) == list(spec.maps)
    assert loaded.programs.keys() == spec.programs.keys() - {"bad"}
    info = loaded.programs["answer"].info
    assert info.name == "answer"
    assert info.verified_insns > 0
    assert info.xlated_size > 0
    assert len(info.tag) == 16


def test_autoload_and_sizes(spec: ObjectFile) -> None:
    with spec.load(autoload={"look"}, max_entries={"table_v1": 3}) as found:
        assert list(found.programs) == ["look"]
        assert found.maps["table_v1"].info.max_entries == 3


@pytest.mark.parametrize(
    ("reason", "knobs", "program", "expected"),
    [
        ("as compiled", {}, "answer", 7),
        ("set", {"knob": 41}, "answer", 41),
        ("all 32 bits come back as a signed number", {"knob": 0xFFFFFFFF}, "answer", -1),
        ("as compiled, signed", {}, "minus", 1),
        ("negative", {"negative": -9}, "minus", -9),
        ("neighbours are untouched", {"knob": 41}, "minus", 1),
    ],
)
def test_knobs(
    spec: ObjectFile, reason: str, knobs: dict[str, int], program: str, expected: int
) -> None:
    with spec.load(rodata=knobs, autoload={program}) as found:
        assert expected == found.programs[program].test_run(FRAME).retval, reason


@pytest.mark.parametrize(
    ("reason", "arguments", "message"),
    [
        ("unknown knob", {"rodata": {"none": 1}}, "no knob none"),
        ("too large", {"rodata": {"knob": 1 << 32}}, "knob knob"),
        ("sign", {"rodata": {"knob": -1}}, "knob knob"),
        ("bytes of another length", {"rodata": {"blob": b"1"}}, "1 bytes, not 4"),
        ("unknown program", {"autoload": {"none"}}, "no none"),
        ("unknown map", {"max_entries": {"none": 1}}, "no none"),
    ],
)
def test_load_refuses(
    spec: ObjectFile, reason: str, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(LayoutError) as caught:
        spec.load(**arguments)  # type: ignore[arg-type]
    assert message in str(caught.value), reason


@pytest.mark.parametrize("log_level", [0, 1])  # at 1 programs that pass leave a log too
def test_verifier_error(
    spec: ObjectFile, capfd: pytest.CaptureFixture[str], log_level: int
) -> None:
    with pytest.raises(VerifierError) as caught:
        spec.load(autoload={"answer", "bad"}, log_level=log_level)
    assert caught.value.program == "bad"
    assert "invalid mem access 'map_value_or_null'" in str(caught.value)
    assert "processed" in caught.value.log
    assert "processed" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_pinned_maps_are_reused(spec: ObjectFile, pins: Path) -> None:
    path = str(pins / "table")
    with spec.load(autoload={"look"}) as first:
        first.maps["table_v1"].pin(path)
        first.maps["table_v1"].update(bytes(4), bytes(first.maps["table_v1"].value_stride))
        outer = first.maps["outer_v1"].dup()
    with outer, spec.load(autoload={"look"}, pins={"table_v1": path, "outer_v1": outer}) as second:
        assert len(list(second.maps["table_v1"].items())) == 1
        assert second.maps["outer_v1"].info.id == outer.info.id
        assert second.programs["look"].test_run(FRAME).retval == 1000
        with Map.create(MapType.HASH, 4, 8, 1) as inner:
            inner.update(bytes(4), (5).to_bytes(8, "little"))
            outer.update(bytes(4), inner)
        assert second.programs["look"].test_run(FRAME).retval == 1005


@pytest.mark.parametrize(
    ("kind", "sizes", "what"),
    [
        (MapType.HASH, (4, 8), "value_size"),
        (MapType.HASH, (8, 0), "key_size"),
        (MapType.LRU_HASH, (4, 0), "type"),
    ],
)
def test_pin_of_another_shape(
    spec: ObjectFile, kind: MapType, sizes: tuple[int, int], what: str
) -> None:
    key_size, value_size = sizes[0], sizes[1] or spec.maps["table_v1"].value_size
    with (
        Map.create(kind, key_size, value_size, 4) as other,
        pytest.raises(LayoutError, match=f"map table_v1: {what} is"),
    ):
        spec.load(pins={"table_v1": other})


def test_run_takes_and_gives_context_and_frame(loaded: LoadedObject) -> None:
    given = SkbContext(mark=41, ingress_ifindex=1, priority=3)
    run = loaded.programs["rewrite"].test_run(FRAME, given, repeat=1)
    after = SkbContext.from_buffer_copy(run.ctx_out)
    assert run.retval == 0
    assert (after.mark, after.cb[0], after.priority) == (42, 1, 3)
    assert run.data_out == b"\x55" + FRAME[1:]
    assert loaded.programs["rewrite"].test_run(FRAME).ctx_out == b""


def test_run_errors(loaded: LoadedObject) -> None:
    program = loaded.programs["answer"]
    for reason, data, context, code in [
        ("short frame", bytes(13), None, errno.EINVAL),
        ("a field that may not be set", FRAME, SkbContext(hash=1), errno.EINVAL),
        ("no such interface", FRAME, SkbContext(ifindex=0x7FFFFFF), errno.ENODEV),
    ]:
        with pytest.raises(BpfError) as caught:
            program.test_run(data, context)
        assert caught.value.errno == code, reason


def test_program_pin(loaded: LoadedObject, pins: Path) -> None:
    path = str(pins / "prog")
    loaded.programs["answer"].pin(path)
    with Program.open_pinned(path) as again:
        assert again.info == loaded.programs["answer"].info


def test_ring_buffer(loaded: LoadedObject) -> None:
    emit = loaded.programs["emit"]
    with RingBuffer(loaded.maps["ring_v1"]) as ring:
        assert ring.read() == []
        poller = select.poll()
        poller.register(ring.fileno(), select.POLLIN)
        for mark in (1, 99, 2):  # 99 is discarded
            assert emit.test_run(FRAME, SkbContext(mark=mark)).retval == 0
        assert poller.poll(5000)
        assert [r[8:12] for r in ring.read(1)] == [b"\1\0\0\0"]
        assert [r[8:12] for r in ring.read()] == [b"\2\0\0\0"]
        # Many times round: positions wrap, records lie across the end.
        for number in range(1000):
            assert emit.test_run(FRAME, SkbContext(mark=number + 100)).retval == 0
            (record,) = ring.read()
            assert len(record) == 16
            assert int.from_bytes(record[8:12], "little") == number + 100


def test_full_ring_is_given_back(loaded: LoadedObject) -> None:
    emit = loaded.programs["emit"]
    with RingBuffer(loaded.maps["ring_v1"]) as ring:
        emit.test_run(FRAME, repeat=1000)
        assert emit.test_run(FRAME).retval == 1
        assert len(ring.read()) == 4096 // 24
        assert emit.test_run(FRAME).retval == 0
        assert len(ring.read()) == 1
    ring.close()


def test_probes() -> None:
    for probe in (features.library(), features.batch(), features.capabilities(), features.jit()):
        assert probe.ok, probe
    tcx = features.tcx()
    assert tcx.ok or "clsact" in tcx.remedy
    assert features.cgroup2().ok
    assert not features.bpffs_at("/proc").ok
    assert "mount -t bpf" in features.bpffs_at("/proc").remedy
