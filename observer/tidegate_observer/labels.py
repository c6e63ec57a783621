"""Label selectors of the API's filters, over labels written `source:key=value`. Pure.

`key`, `!key`, `key=value`, `key==value`, `key!=value`, `key in (a,b)`, `key notin (a,b)`, several
with commas between. A key with a source (`k8s:app`) means that source only; without one, any.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Selector = Callable[[Sequence[str]], bool]

_KEY = r"[A-Za-z0-9][-A-Za-z0-9_.:/]*"
_VALUE = r"[-A-Za-z0-9_.:/]*"
_TERM = re.compile(
    rf"\s*(?:(?P<absent>!)\s*(?P<absent_key>{_KEY})"
    rf"|(?P<key>{_KEY})\s*(?:(?P<set>in|notin)\s*\((?P<values>[^()]*)\)"
    rf"|(?P<op>==|!=|=)\s*(?P<value>{_VALUE}))?)\s*(?:,|$)"
)


def parse(text: str) -> Selector:
    """ValueError: not a selector."""
    terms: list[Selector] = []
    at = 0
    while at < len(text):
        found = _TERM.match(text, at)
        if found is None or found.end() == at:
            raise ValueError(f"not understood: {text!r} from character {at + 1} on")
        terms.append(_term(found))
        at = found.end()
    if not terms:
        raise ValueError("empty")
    return lambda labels: all(term(labels) for term in terms)


def _term(found: re.Match[str]) -> Selector:
    if found["absent"]:
        key = found["absent_key"]
        return lambda labels: not _held(labels, key)
    key = found["key"]
    if found["set"]:
        wanted = {value.strip() for value in found["values"].split(",")}
        for value in wanted:
            if not re.fullmatch(_VALUE, value):
                raise ValueError(f"not a value: {value!r}")
        return _within(key, wanted, inside=found["set"] == "in")
    if found["op"]:
        return _within(key, {found["value"]}, inside=found["op"] != "!=")
    return lambda labels: bool(_held(labels, key))


def _within(key: str, wanted: set[str], *, inside: bool) -> Selector:
    if inside:
        return lambda labels: any(value in wanted for value in _held(labels, key))
    # A missing label is not in any list.
    return lambda labels: not any(value in wanted for value in _held(labels, key))


def _held(labels: Sequence[str], key: str) -> list[str]:
    """Values of a key."""
    found = []
    for label in labels:
        name, _, value = label.partition("=")
        source, colon, bare = name.partition(":")
        if key in (name, bare) or (key == f"any:{bare}" and colon and source):
            found.append(value)
    return found
