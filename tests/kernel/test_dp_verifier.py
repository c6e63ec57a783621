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


@pytest.mark.parametrize("options", [{}, {"dsr": 1}], ids=["default", "dsr"])
@pytest.mark.parametrize("name", ["pod.o", "net.o", "sock.o", "xdp.o"])
def test_the_verifier_has_little_to_walk(name: str, options: dict[str, int]) -> None:
    file = ObjectFile(BUILD / name)
    knobs = {knob: value for knob, value in options.items() if knob in file.rodata}
    if options and not knobs:
        pytest.skip("it has no such option")
    with file.load(rodata=knobs) as loaded:
        walked = {n: p.info.verified_insns for n, p in loaded.programs.items()}
    assert walked
    assert {n: count for n, count in walked.items() if not 0 < count <= MOST} == {}
