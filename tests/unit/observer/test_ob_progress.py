"""How far rings have been told outlives whoever told it."""

from __future__ import annotations

from pathlib import Path

from tidegate_observer.progress import Progress
from tidegate_observer.rings import Place


def test_what_was_kept_is_found_though_nobody_closed(tmp_path: Path) -> None:
    first = Progress(tmp_path / "told", 2)
    assert first.untold(0, Place(3, 500)) == 0, "nobody has told of anything"
    first.keep([Place(3, 100), None])
    first.keep([None, Place(4, 50)])
    second = Progress(tmp_path / "told", 2)
    assert (second.untold(0, Place(3, 500)), second.untold(1, Place(4, 50))) == (400, 0)
    assert second.untold(0, Place(9, 500)) == 0, "another ring in its place"
    assert second.untold(0, Place(3, 40)) == 0


def test_a_file_of_another_size_says_nothing(tmp_path: Path) -> None:
    Progress(tmp_path / "told", 1).keep([Place(3, 100)])
    made = Progress(tmp_path / "told", 2)
    assert made.untold(0, Place(3, 500)) == 0
    made.close()
