"""The whole product on Debian 12's own kernel: no tcx there, so clsact; no skb dynptrs."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import guest

SECONDS = 600
"""Emulated: about a minute on an idle machine."""


@pytest.mark.kernel
@pytest.mark.vm
def test_objects_attach_and_a_matrix_agrees_on_linux_6_1() -> None:
    try:
        result = guest.run(Path(__file__).with_name("smoke.py"), SECONDS)
    except guest.GuestUnavailable as missing:
        pytest.skip(str(missing))
    assert result.code == 0, result.output
    assert "failed: []" in result.output
