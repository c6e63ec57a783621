"""What counts as lost, of flows that are watched."""

from __future__ import annotations

import socket

from support.asking import LOST_SECONDS, Flow


def test_late_is_not_lost_and_what_a_later_one_overtakes_is() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        ours.setblocking(False)
        flow, now = Flow("a", ours), 0.0
        flow.turn(now)
        for _ in range(2):
            now += LOST_SECONDS + 0.1
            flow.turn(now)
        assert (flow.number, flow.missing, flow.lost, flow.late) == (3, {1, 2}, 0, 0)
        for number in (1, 2, 3):
            theirs.send(b"default/a %d" % number)
        flow.turn(now)
        assert (flow.number, flow.missing, flow.lost, flow.late) == (4, set(), 0, 2)
        now += LOST_SECONDS + 0.1
        flow.turn(now)
        theirs.send(b"default/a 5")
        flow.turn(now)
        assert (flow.number, flow.lost, flow.late) == (6, 1, 2)
