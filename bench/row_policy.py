"""policy-scale, policy-lookup, policy-load: what a rule set costs, by its size.

Maps are filled by hand (tests/support/lab.py) but for policy-load, which is the loader's.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import loader_world as world
from lab import PASS, U32, Rules, prefix
from measure import Result, absolute, interleaved, pinned
from row_datapath import (
    ADDRESSES,
    FIRST,
    FIRST_IDENTITY,
    PROGRAMS,
    ROUNDS,
    TCP,
    Bench,
    costs,
    expect,
    plain_rules,
    remote_pods,
    syn,
    text,
    timed,
)
from row_loader import OBJECTS
from tidegate_api import state as api
from tidegate_bpf import ObjectFile, bpffs
from tidegate_loader import apply, attach, kernel, maps, plan

SMALL, LARGE = 100, 10_000
PREFIXES = 1000
ENTRIES = 50_000


def rules_of(count: int) -> Rules:
    """`count` rules of one subject, one of them for each address that is asked about; the rest
    for peers and ports that are not."""
    entries = {(FIRST_IDENTITY + i, TCP, 80, 24): (1, i, 1) for i in range(min(count, ADDRESSES))}
    for i in range(len(entries), count):
        entries[2_000_000 + i, TCP, 1 + i % 60_000, 24] = (1, i, 1)
    return Rules(entries)  # type: ignore[arg-type]


def scale() -> Iterator[Result]:
    """The same flows, from addresses that both rule sets allow."""
    with pinned(), ExitStack() as stack:
        labs = {}
        for count in (SMALL, LARGE):
            labs[count] = Bench(stack).lab(
                remote_pods(FIRST, SMALL), rules_of(count), fresh_count=SMALL
            )
            expect(labs[count], "fresh_flow", syn(text(FIRST)), PASS)
        frame = syn(text(FIRST))
        figures = interleaved(
            {
                f"{count} {name}": timed(lab, name, frame)
                for count, lab in labs.items()
                for name in PROGRAMS
            },
            ROUNDS,
        )
        cost = {
            count: costs({name: figures[f"{count} {name}"] for name in PROGRAMS}) for count in labs
        }
    small, large = cost[SMALL]["flow"], cost[LARGE]["flow"]
    what = f"new flow, {LARGE:,} rules in the subject's set"
    extra = {"ns": {str(count): round(found["flow"], 1) for count, found in cost.items()}}
    against = f"{SMALL} rules, {small:.1f} ns"
    yield Result("policy-scale", what, large / small, "ratio", against, 1.4, extra)


def lookup() -> Iterator[Result]:
    """Who is at the address, the subject's rule set, its one key shape; against a look-up of the
    same address in a trie of 1,000 prefixes, by a program that does nothing else."""
    with pinned(), ExitStack() as stack:
        lab = Bench(stack).lab(remote_pods(FIRST, ADDRESSES), plain_rules())
        key = lab.codecs["tg_prefix"]
        for i in range(PREFIXES):
            bits, raw = prefix(f"{text(FIRST + i)}/32")
            lab.maps["ipcache_lpm_v1"].update(key.pack(bits=bits, addr=raw), U32.pack(7))
        frame = syn(text(FIRST))
        programs = ("empty", "fresh_only", "bare_lpm", "one_verdict")
        for name in programs:
            expect(lab, name, frame, PASS)
        figures = interleaved({name: timed(lab, name, frame) for name in programs}, ROUNDS)
        least = {name: min(values) for name, values in figures.items()}
    trie = least["bare_lpm"] - least["fresh_only"]
    verdict = least["one_verdict"] - least["fresh_only"]
    what = "first-packet verdict of one end: identity, rule set, key"
    extra = {"ns": {"trie": round(trie, 1), "verdict": round(verdict, 1)}}
    against = f"a bare LPM of {PREFIXES:,} prefixes, {trie:.1f} ns"
    yield Result("policy-lookup", what, verdict / trie, "ratio", against, 5.0, extra)


class Node:
    """A node of two pods in maps of its own; `subject` gives the first one's rule set."""

    def __init__(self, pin_dir: Path) -> None:
        attach.Programs(OBJECTS, pin_dir, {}).close()
        layouts = kernel.Layouts(ObjectFile(OBJECTS / "pod.o"))
        self.kernel = kernel.Kernel(pin_dir, layouts)
        self.actual = self.kernel.actual(None, {})

    def apply(self, rule_set: api.RuleSet, peers: list[api.PeerSet]) -> None:
        name = rule_set.metadata.name
        endpoints = [world.endpoint(1, 256, name), world.endpoint(2, 257)]
        state = world.World(endpoints=endpoints, rule_sets=[rule_set], peers=peers).state()
        desired = maps.build(state, world.interfaces(1, 2))
        problems = apply.apply(plan.plan(desired, self.actual), self.kernel, self.actual)
        if problems or plan.plan(desired, self.actual).steps:
            raise AssertionError(f"not in force: {problems}")


def load() -> Iterator[Result]:
    """From decoded objects to the switched node table, all of it read back and compared."""
    small = world.rule_set(world.term(api.AnyPeer(), 0, "TCP", 1))
    many = [world.term(api.SetPeer(name=f"p{i}"), i, "TCP", 80 + i) for i in range(500)]
    peers = [world.peer_set(f"p{i}", *range(256, 256 + ENTRIES // 500)) for i in range(500)]
    large = world.rule_set(*many)
    with pinned(), tempfile.TemporaryDirectory() as directory:
        mounted = Path(directory) / "bpf"
        mounted.mkdir()
        bpffs.mount(str(mounted))
        try:
            node = Node(mounted / "node")

            def run() -> float:
                node.apply(small, [])
                began = time.perf_counter()
                node.apply(large, peers)
                return time.perf_counter() - began

            what = f"a subject's rule set of {ENTRIES:,} entries: expanded, loaded, switched"
            yield absolute("policy-load", what, "s", 1.0, run)
        finally:
            bpffs.unmount(str(mounted))


ROWS = {"policy-scale": scale, "policy-lookup": lookup, "policy-load": load}
