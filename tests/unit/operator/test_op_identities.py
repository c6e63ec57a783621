"""The ledger: one number a label set, kept, rested, never given twice."""

from __future__ import annotations

import pytest
from hypothesis import given as hypothesis_given
from hypothesis import settings
from hypothesis import strategies as st
from tidegate_api.state import FIRST_IDENTITY, IDENTITY_BITS
from tidegate_operator import identities
from tidegate_operator.identities import EMPTY_LEDGER, allocate, give_way
from tidegate_operator.objects import IdentityKey, World
from unit.operator.given import make, pod

PODS = {name: pod(name, f"{{app: {name}}}") for name in "abcd"}


def _world(names: frozenset[str] | str) -> World:
    return make("".join(PODS[name] for name in sorted(names)))


def _key(name: str) -> IdentityKey:
    return IdentityKey("default", (("app", name),))


WORLDS = {
    frozenset(names): _world(names) for names in ("", "a", "b", "ab", "ac", "abc", "abcd", "d")
}


def test_equal_labels_share_and_namespaces_do_not() -> None:
    now = make(pod("x", "{a: b}") + pod("y", "{a: b}") + pod("x", "{a: b}", "other"))
    assert len(allocate(now, EMPTY_LEDGER).live) == 2


def test_host_network_pods_have_none() -> None:
    assert allocate(make(pod("x", rest=", hostNetwork: true")), EMPTY_LEDGER).live == {}


def test_prewarming_gets_the_number_of_its_pods() -> None:
    text = "---\napiVersion: tidegate.dev/v1alpha1\nkind: Identity\nmetadata: {name: i}\n"
    text += "spec: {namespace: default, labels: {app: a}}\n"
    first = allocate(make(text), EMPTY_LEDGER)
    second = allocate(make(text + PODS["a"]), first)
    assert second is first
    assert len(first.live) == 1


def test_released_number_returns_to_its_key() -> None:
    first = allocate(_world("ab"), EMPTY_LEDGER)
    second = allocate(_world("a"), first)
    assert len(second.released) == 1
    third = allocate(_world("ab"), second)
    assert (third.live, third.released) == (first.live, {})


def test_oldest_released_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "MAX_RELEASED", 1)
    first = allocate(_world("abc"), EMPTY_LEDGER)
    second = allocate(_world("ab"), first)
    third = allocate(_world("a"), second)
    (key, _), = third.released.values()  # fmt: skip
    assert key.labels == (("app", "b"),)


@settings(max_examples=60, deadline=None)
@hypothesis_given(st.lists(st.sampled_from(sorted(WORLDS, key=sorted)), max_size=8))
def test_numbers_are_distinct_and_stay(states: list[frozenset[str]]) -> None:
    ledger = EMPTY_LEDGER
    meaning: dict[int, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        # Four numbers for four keys: they collide.
        patch.setattr(identities, "FIRST_IDENTITY", (1 << IDENTITY_BITS) - 4)
        for state in states:
            before, ledger = ledger, allocate(WORLDS[state], ledger)
            assert set(ledger.live) == {pod.identity for pod in WORLDS[state].pods.values()}
            numbers = [*ledger.live.values(), *ledger.released]
            assert len(set(numbers)) == len(numbers)
            for key, number in ledger.live.items():
                assert meaning.setdefault(number, key) == key
                assert before.live.get(key, number) == number


def test_numbers_are_in_range() -> None:
    numbers = allocate(_world("abcd"), EMPTY_LEDGER).live.values()
    assert all(FIRST_IDENTITY <= number < 1 << IDENTITY_BITS for number in numbers)


# ---- Counted by time, in a cluster ----------------------------------------------------------

REST = 3600


def test_numbers_rest_for_their_time() -> None:
    first = allocate(_world("ab"), EMPTY_LEDGER, 1000, REST)
    second = allocate(_world("a"), first, 2000, REST)
    assert list(second.released.values()) == [(_key("b"), 2000)]
    assert allocate(_world("a"), second, 2000 + REST, REST) is second
    assert allocate(_world("a"), second, 2001 + REST, REST).released == {}
    back = allocate(_world("ab"), second, 2001 + REST, REST)
    assert back.live == first.live


def test_clock_that_goes_back_shortens_no_rest() -> None:
    ledger = allocate(_world("ab"), EMPTY_LEDGER, 5000, REST)
    ledger = allocate(_world("a"), ledger, 5000, REST)
    ledger = allocate(_world(""), ledger, 100, REST)
    assert [count for _, count in ledger.released.values()] == [5000, 5000]


def test_number_that_is_somebody_elses_is_given_up() -> None:
    ledger = allocate(_world("ab"), EMPTY_LEDGER, 1000, REST)
    number = ledger.live[_key("a")]
    after = allocate(_world("ab"), give_way(ledger, number, _key("d")), 1001, REST)
    assert after.live[_key("b")] == ledger.live[_key("b")]
    assert after.live[_key("a")] != number
    assert after.released[number][0] == _key("d")
    assert allocate(_world("abd"), after, 1002, REST).live[_key("d")] == number


def test_number_that_is_ours_after_all_stays() -> None:
    ledger = allocate(_world("ab"), EMPTY_LEDGER, 1000, REST)
    assert give_way(ledger, ledger.live[_key("a")], _key("a")) is ledger
