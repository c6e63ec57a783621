"""A tuple used again: an opening SYN is judged, whatever is known of its tuple, and what the table
still has of an earlier connection has no part in the new one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import frames as f
from support import town as t
from support.frames import ACK, FIN, RST, SYN
from support.lab import Rules, addr
from support.town import POLICY, VIP4, Town, ends, segment

pytestmark = pytest.mark.kernel
A, B, C, D = (t.IP4[name] for name in "abcd")
NOTHING = Rules()
ONE_WAY = {"b<": t.rules(t.from_("a")), "a<": NOTHING, "b>": NOTHING}


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    with t.town() as made:
        yield made


def there(dst: str, port: int, flags: int) -> bytes:
    return t.tcp(A, dst, 40000, port, flags)


def back(src: str, port: int, flags: int) -> bytes:
    return t.tcp(src, A, port, 40000, flags)


def service(town: Town, vip: str, backend: str, base: int = 0) -> None:
    town.lab.service(vip, 80, f.TCP, [(backend, 8080)], base=base)


def no_service(town: Town, vip: str) -> None:
    key = town.lab.codecs["tg_frontend_key"].pack(addr=addr(vip), port=80, protocol=f.TCP)
    town.lab.maps["frontends_v1"].discard(key)


def connect(town: Town, vip: str, backend: str, letter: str) -> None:
    """Through a service, established."""
    assert ends(town.send("a>", there(vip, 80, SYN)).data)[2] == backend
    assert town.reason(letter + ">", back(backend, 8080, SYN | ACK)) == 0
    assert ends(town.send("a>", there(vip, 80, ACK)).data)[2] == backend
    assert len(town.established()) == 2


def live(town: Town) -> list[int]:
    return [flow.flags for flow in town.established() if flow.word]


def test_a_syn_is_judged(town: Town) -> None:
    """The server of an established flow may not open one of its own under it; the flow lives on."""
    town.open(ONE_WAY)
    town.handshake("a", "b", 4)
    assert town.reason("b>", segment("a", "b", 4, SYN, back=True)) == POLICY
    assert town.reason("b>", segment("a", "b", 4, ACK, back=True)) == 0
    assert town.reason("a>", segment("a", "b", 4, ACK)) == 0


def test_a_syn_of_a_live_flow_changes_nothing(town: Town) -> None:
    town.open(ONE_WAY)
    town.handshake("a", "b", 4)
    before = live(town)
    assert town.reason("a>", segment("a", "b", 4, SYN)) == 0
    for flags, answer in ((ACK, True), (ACK, False), (SYN | ACK, True)):
        hook = "b>" if answer else "a>"
        assert town.reason(hook, segment("a", "b", 4, flags, answer)) == 0
    assert live(town) == before


@pytest.mark.parametrize("answer", [SYN | ACK, RST | ACK])
def test_the_answer_is_the_new_flows(town: Town, answer: int) -> None:
    """Closed, it was reached through a service; the new one is not."""
    town.open()
    service(town, VIP4, B)
    connect(town, VIP4, B, "b")
    assert ends(town.send("b>", back(B, 8080, RST)).data)[0] == VIP4
    assert town.reason("a>", there(B, 8080, SYN)) == 0
    assert ends(town.send("b>", back(B, 8080, answer)).data)[0] == B


def test_an_error_is_about_the_new_flow(town: Town) -> None:
    town.open()
    service(town, VIP4, B)
    connect(town, VIP4, B, "b")
    assert town.reason("b>", back(B, 8080, RST)) == 0
    sent = there(B, 8080, SYN)
    assert town.reason("a>", sent) == 0
    error = f.eth(f.ip(t.IP4["n"], A, f.ICMP, f.icmp_error(3, 1, sent[14:])))
    told = f.parse(town.send("a<", error).data).inner
    assert told is not None
    assert (told.dst, told.dport) == (B, 8080)


def test_last_packets_of_a_closed_flow(town: Town) -> None:
    """Nothing newer is known of it: they pass as before."""
    town.open(ONE_WAY)
    town.handshake("a", "b", 4)
    assert town.reason("a>", segment("a", "b", 4, FIN | ACK)) == 0
    assert town.reason("b>", segment("a", "b", 4, FIN | ACK, back=True)) == 0
    assert town.reason("a>", segment("a", "b", 4, ACK)) == 0
    assert town.reason("b>", segment("a", "b", 4, ACK, back=True)) == 0
    assert len(live(town)) == 1


def test_an_old_choice_is_forgotten_with_the_answer(town: Town) -> None:
    """Not with the SYN, which might never be answered."""
    town.open()
    service(town, VIP4, B)
    connect(town, VIP4, B, "b")
    service(town, VIP4, C, base=1)
    assert ends(town.send("a>", there(VIP4, 80, SYN)).data)[2] == C
    assert ends(town.send("a>", there(VIP4, 80, ACK)).data)[2] == B
    assert ends(town.send("c>", back(C, 8080, SYN | ACK)).data)[0] == VIP4
    assert ends(town.send("a>", there(VIP4, 80, ACK)).data)[2] == C


def test_an_address_that_was_a_frontend(town: Town) -> None:
    """The old choice lies under the new flow's own key."""
    town.open()
    service(town, D, B)
    connect(town, D, B, "b")
    no_service(town, D)
    assert ends(town.send("a>", there(D, 80, SYN)).data)[2] == D
    assert ends(town.send("d>", back(D, 80, SYN | ACK)).data)[0] == D
    assert ends(town.send("a>", there(D, 80, ACK)).data)[2] == D
    assert ends(town.send("a>", there(D, 80, ACK)).data)[2] == D
