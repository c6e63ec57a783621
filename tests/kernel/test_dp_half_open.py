"""A share of half-open flows: which flow a full set forgets, and two CPUs that write at once."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator

import pytest
from support import frames as f
from support import town as t
from support.lab import REDIRECT, U32, WAYS, addr, addr_proof
from support.town import Town, segment
from tidegate_bpf import SkbContext

CT_INSERT = 155
ROUNDS = 40
PROOF = 0xFFFFFF
WORD = 1 << 32


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    with t.town() as made:
        yield made


def flow_hash(ends: tuple[bytes, bytes], ports: tuple[int, int]) -> int:
    """Of a TCP flow, from the definition: ports count as the machine loads them."""
    loaded = sum(struct.unpack("=2H", struct.pack(">2H", *ports)))
    h = sum(map(addr_proof, ends)) * 0x9E3779B1 % WORD
    h ^= (loaded + (f.TCP << 16)) * 0x85EBCA77 % WORD
    return h ^ h >> 15


def syn(sport: int, dport: int = 80) -> bytes:
    frame = bytearray(segment("a", "d", 4, f.SYN))
    struct.pack_into("!HH", frame, 34, sport, dport)
    return bytes(frame)


def one_set(town: Town, count: int) -> tuple[int, list[int]]:
    """(set, source ports of `count` flows that fall into it)."""
    town.open()
    found: dict[int, list[int]] = {}
    ends = addr(t.IP4["a"]), addr(t.IP4["d"])
    for sport in range(20000, 24000):
        number = flow_hash(ends, (sport, 80)) >> 24
        found.setdefault(number, []).append(sport)
        if len(found[number]) == count:
            return number, found[number]
    raise AssertionError("the hash does not spread")


def ports(town: Town) -> dict[int, int]:
    """{source port: way} of a's half-open flows."""
    held = town.lab.half_open(town.share("a"))
    return {max(key.aport, key.bport): way for (_, way), (key, _) in held.items()}


def age_port(town: Town, number: int, sport: int, units: int) -> None:
    share, codec = town.share("a"), town.lab.codecs["tg_half_open_set"]
    row = codec.unpack(share.lookup(U32.pack(number)))
    ways = tuple(
        w._replace(ct=w.ct._replace(seen=w.ct.seen - units))
        if sport in (w.key.aport, w.key.bport)
        else w
        for w in row.way
    )
    share.update(U32.pack(number), codec.pack_row(row._replace(way=ways)))


@pytest.mark.parametrize("oldest", range(WAYS))
def test_a_full_set_forgets_its_oldest(town: Town, oldest: int) -> None:
    number, sports = one_set(town, WAYS + 1)
    for sport in sports[:WAYS]:
        assert town.reason("a>", syn(sport)) == 0
    assert set(town.lab.half_open(town.share("a"))) == {(number, way) for way in range(WAYS)}
    for at, sport in enumerate(sports[:WAYS]):
        age_port(town, number, sport, 30 if at == oldest else 10 + at)
    before = ports(town)
    assert town.reason("a>", syn(sports[WAYS])) == 0
    after = ports(town)
    assert set(after) == set(sports) - {sports[oldest]}
    assert after[sports[WAYS]] == before[sports[oldest]]


def test_an_expired_flow_goes_before_an_older_one(town: Town) -> None:
    """Closed ones live ten units, a SYN's sixty."""
    number, sports = one_set(town, WAYS + 1)
    for sport in sports[:WAYS]:
        assert town.reason("a>", syn(sport)) == 0
    reset = bytearray(syn(sports[2]))
    reset[47] = f.RST
    assert town.reason("a>", bytes(reset)) == 0
    for sport, age in zip(sports, (50, 40, 20, 30), strict=False):
        age_port(town, number, sport, age)
    assert town.reason("a>", syn(sports[WAYS])) == 0
    assert set(ports(town)) == set(sports) - {sports[2]}


def test_a_repeated_syn_takes_its_own_way(town: Town) -> None:
    _, sports = one_set(town, 2)
    assert town.reason("a>", syn(sports[0])) == 0
    assert town.reason("a>", syn(sports[1])) == 0
    before = ports(town)
    assert town.reason("a>", syn(sports[1])) == 0
    assert ports(town) == before


def test_two_cpus_at_once(town: Town) -> None:
    """Each inserts flows of its own into one set, time and again: whenever they rest, every entry
    is one flow's, whole, and none was dropped."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        pytest.skip("one CPU")
    number, sports = one_set(town, 4 * WAYS)
    verdicts: set[int] = set()
    start, rest = threading.Barrier(3), threading.Barrier(3)

    def flood(cpu: int, sports: list[int]) -> None:
        os.sched_setaffinity(0, {cpu})
        program = town.lab.loaded.programs["from_pod"]
        context = SkbContext(ifindex=t.IFINDEX["a"], ingress_ifindex=1)
        for sport in sports * ROUNDS:
            start.wait(10)
            verdicts.add(program.test_run(syn(sport), context, repeat=100).retval)
            rest.wait(10)

    threads = [
        threading.Thread(target=flood, args=(cpu, sports[i::2])) for i, cpu in enumerate(cpus)
    ]
    for thread in threads:
        thread.start()
    wrong = []
    for _ in range(len(sports) // 2 * ROUNDS):
        start.wait(10)
        rest.wait(10)
        wrong += broken(town, number)
    for thread in threads:
        thread.join()
    assert wrong == []
    assert verdicts == {REDIRECT}
    assert not any(town.lab.counters().get((CT_INSERT, side)) for side in (0, 1))


def broken(town: Town, number: int) -> list[str]:
    """What is wrong with a's entries, all of which should lie in set `number`."""
    found, keys = [], set()
    for (at, way), (key, flow) in town.lab.half_open(town.share("a")).items():
        proof = flow_hash((key.a, key.b), (key.aport, key.bport)) & PROOF
        if at != number:
            found.append(f"in set {at}")
        if flow.word != town.lab.epoch << 24 | proof:
            found.append(f"way {way}: {flow.word:#x} is not the word of {key}")
        if key in keys:
            found.append(f"{key} twice")
        keys.add(key)
    return found
