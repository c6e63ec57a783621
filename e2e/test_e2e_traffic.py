"""How packets go: both ways of a Service, nodes as sources, and flows that are cut."""

from __future__ import annotations

import time

import pytest

from kind import cluster
from rig import asking, pods, town
from rig.asking import Question

pytestmark = pytest.mark.kind
STILL_SECONDS = 0.5


def test_a_pods_socket_is_translated_when_it_connects(
    askers: asking.Askers, place: town.Town
) -> None:
    friend, server = place.pods["friend-near"], place.pods["server"]
    asker = askers.of(friend)
    stream = asker.begin_stream(Question(place.service, 80, seconds=0.05))
    try:
        assert (server.address, 80) in asking.peers(friend)
        assert (place.service, 80) not in asking.peers(friend)
    finally:
        asker.end_stream(stream)


@pytest.mark.parametrize("name", town.FRIENDS)
def test_what_no_program_at_a_cgroup_sees_is_translated_packet_by_packet(
    place: town.Town, name: str
) -> None:
    friend, server = place.pods[name], place.pods["server"]
    asker = asking.in_network_only(friend)
    try:
        stream = asker.begin_stream(Question(place.service, 80, seconds=0.05))
        assert (place.service, 80) in asking.peers(friend)
        assert (server.address, 80) not in asking.peers(friend)
        answer = asker.end_stream(stream)
        assert answer.detail == ""
    finally:
        asker.close()


@pytest.mark.parametrize("name", town.STRANGERS)
def test_policy_counts_on_the_way_packet_by_packet_too(place: town.Town, name: str) -> None:
    asker = asking.in_network_only(place.pods[name])
    try:
        (answer,) = asker.ask([Question(place.service, 80, seconds=town.DENIED_SECONDS)])
        assert answer.detail == "timed out", answer
    finally:
        asker.close()


def test_a_node_reaches_its_own_pods_and_policy_counts_for_those_of_others(
    place: town.Town,
) -> None:
    server = place.pods["server"]
    for node in cluster.nodes():
        asker = asking.on_node(node)
        try:
            (answer,) = asker.ask([Question(server.address, 80)])
        finally:
            asker.close()
        expected = server.key if node == server.node else ""
        assert answer.pod == expected, (node, answer)


def test_a_node_uses_services_as_its_pods_do(place: town.Town) -> None:
    server = place.pods["server"]
    asker = asking.on_node(server.node)
    try:
        (answer,) = asker.ask([Question(place.service, 80)])
    finally:
        asker.close()
    assert answer.pod == server.key, answer


def stands_still(asker: asking.Asker, stream: int) -> bool:
    """Whether a stream gets no answers any more."""
    before = asker.peek(stream).answered
    time.sleep(STILL_SECONDS)
    return asker.peek(stream).answered == before


@pytest.mark.parametrize("how", ["the peer's labels change", "the rule goes"])
def test_what_is_not_allowed_any_more_is_cut_and_nothing_else(
    askers: asking.Askers, place: town.Town, how: str
) -> None:
    server = place.pods["server"]
    # The strangers are let in for a while.
    pods.apply(town.policy("stranger"))
    asker = askers.of(place.pods["stranger-far"])
    pods.eventually(
        lambda: asker.ask([Question(server.address, 80)])[0].pod == server.key, "let in", 20
    )
    kept = {name: askers.of(place.pods[name]) for name in town.FRIENDS}
    streams = {
        name: each.begin_stream(Question(server.address, 80, seconds=0.02))
        for name, each in kept.items()
    }
    cut = asker.begin_stream(Question(server.address, 80, seconds=0.02))
    try:
        if how == "the rule goes":
            pods.apply(town.policy())
        else:
            pods.relabel("stranger-far", town.SPACE, role="nobody")
        pods.eventually(lambda: stands_still(asker, cut), "the flow is cut", 20)
        for name, each in kept.items():
            assert not stands_still(each, streams[name]), f"{name}'s flow stands still"
    finally:
        ended = {name: each.end_stream(streams[name]) for name, each in kept.items()}
        asker.end_stream(cut)
        pods.apply(town.policy())
        pods.relabel("stranger-far", town.SPACE, role="stranger")
    assert {name: answer.detail for name, answer in ended.items()} == dict.fromkeys(kept, "")
