"""What the verifier walks of each program: a node waits for it when a loader starts.

A function that is verified at each of its calls, with all that is known there, costs as many times
as there are ways to it; one that is verified on its own (`tg_global`) once.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tidegate_bpf import ObjectFile

pytestmark = pytest.mark.kernel

BUILD = Path(__file__).parents[2] / "datapath" / "build"
MOST = 90_000
"""Instructions: about twice what the largest program takes on Linux 6.18."""


CASES = [
    pytest.param(name, options, id=" ".join([name, *options]))
    for name in ("pod.o", "net.o", "sock.o", "xdp.o")
    for options in ({}, {"dsr": 1})
    if options.keys() <= ObjectFile(BUILD / name).rodata.keys()
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_verifier_has_little_to_walk(name: str, options: dict[str, int]) -> None:
    with ObjectFile(BUILD / name).load(rodata=options) as loaded:
        walked = {n: p.info.verified_insns for n, p in loaded.programs.items()}
    assert walked
    assert {n: count for n, count in walked.items() if not 0 < count <= MOST} == {}
