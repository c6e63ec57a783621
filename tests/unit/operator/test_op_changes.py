"""What differs between two mappings, however they came to be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tidegate_operator.changes import changed, gone

VALUES = [object() for _ in range(3)]
KEYS = [f"key-{number}" for number in range(6)]


@st.composite
def steps(draw: st.DrawFn) -> tuple[dict[str, object], dict[str, object]]:
    """A mapping; and a copy with some edits, or another one."""
    entries = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES))
    old = draw(entries)
    now = dict(old) if draw(st.booleans()) else draw(entries)
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=3)):
        # Equal keys that are other objects, too.
        now["".join(list(key))] = draw(st.sampled_from(VALUES))
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=2)):
        now.pop(key, None)
    return old, now


@given(steps())
def test_what_differs(both: tuple[dict[str, object], dict[str, object]]) -> None:
    old, now = both
    assert changed(old, now) == [key for key in now if now[key] is not old.get(key)]
    assert gone(old, now) == [key for key in old if key not in now]
    assert (changed(now, now), gone(now, now)) == ([], [])
