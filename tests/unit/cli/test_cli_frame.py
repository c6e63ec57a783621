"""The synthetic packet, read back by the other implementation."""

from __future__ import annotations

import pytest
from support import frames
from tidegate_cli import frame

MACS = (bytes.fromhex("02000000000a"), bytes.fromhex("02000000000b"))


@pytest.mark.parametrize(("src", "dst"), [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")])
@pytest.mark.parametrize("protocol", [frame.TCP, frame.UDP, frame.SCTP, 0])
def test_a_frame_is_whole_and_opens_a_flow(src: str, dst: str, protocol: int) -> None:
    number = protocol or (frame.ICMPV6 if ":" in src else frame.ICMP)
    kind = 128 if ":" in src else 8
    data = frame.opening(MACS, src, dst, number, 8080 if protocol else kind << 8 | 3)
    found = frames.parse(data)
    assert found.problem == ""
    assert (found.eth_src, found.eth_dst) == (frames.MAC_A, frames.MAC_B)
    assert (found.src, found.dst, found.protocol) == (src, dst, number)
    assert found.l4_check == "ok"
    assert ":" in src or found.ip_check == "ok"
    if protocol:
        assert (found.sport, found.dport) == (frame.SOURCE_PORT, 8080)
        assert frame.destination(data, protocol) == (dst, 8080)
    else:
        assert (found.icmp_type, found.icmp_code) == (kind, 3)
        assert frame.destination(data, number) == (dst, 0)
    if protocol == frame.TCP:
        assert found.tcp_flags == frames.SYN
