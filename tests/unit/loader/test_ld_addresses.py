"""Address text, bytes and proofs."""

from __future__ import annotations

import ipaddress
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tidegate_loader import addresses

_any = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).filter(
    lambda a: a.version == 4 or a.ipv4_mapped is None
)
MASK = 0xFFFFFFFF


@given(_any)
def test_text_and_bytes(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    packed = addresses.pack(str(address))
    assert len(packed) == 16
    assert packed[-len(address.packed) :] == address.packed
    assert addresses.text(packed) == str(address)


@given(st.one_of(st.lists(st.ip_addresses(v=4)), st.lists(_any, max_size=20)))
def test_proofs_in_bulk(found: list[ipaddress.IPv4Address | ipaddress.IPv6Address]) -> None:
    packed = [addresses.pack(str(a)) for a in found]
    proofs = addresses.addr_proofs(b"".join(packed))
    expected = [addresses.addr_proof(address) for address in packed]
    assert [int.from_bytes(proofs[i : i + 4], sys.byteorder) for i in range(0, len(proofs), 4)] == (
        expected
    )


def test_the_proof_is_the_written_formula() -> None:
    w3 = int.from_bytes(bytes([10, 1, 2, 3]), "little")
    expected = (0xFFFF0000 * 0xC2B2AE3D & MASK) ^ w3
    assert addresses.addr_proof(addresses.pack("10.1.2.3")) == expected
    word = int.from_bytes((80).to_bytes(2, "big"), "little") | 6 << 16
    x = expected ^ (word * 0x27D4EB2F & MASK)
    assert addresses.frontend_proof(addresses.pack("10.1.2.3"), 80, 6) == (x ^ x >> 16) & 0xFFFF


PREFIXES = [
    ("v4", "10.0.0.0/8", (104, "10.0.0.0")),
    ("v4 all", "0.0.0.0/0", (96, "0.0.0.0")),
    ("v6 all", "::/0", (0, "::")),
    ("v6 host", "fd00::1/128", (128, "fd00::1")),
]


@pytest.mark.parametrize(("reason", "text", "expected"), PREFIXES)
def test_prefixes(reason: str, text: str, expected: tuple[int, str]) -> None:
    found = addresses.parse_prefix(text)
    assert found == (expected[0], addresses.pack(expected[1]))
    assert addresses.prefix_text(found) == text


WRONG = ["10.0.0.1/8", "10.0.0.0", "10.0.0.0/", "10.0.0.0/33", "::1/127", "x/8", "10.0.0.0/-1", ""]


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_prefix(text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        addresses.parse_prefix(text)
