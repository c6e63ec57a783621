"""Which eBPF objects the loader takes: in an installation, those that it came with."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest
from tidegate_loader import attach


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


POD, SOCK = b"pod's programs", b"sock's programs"
POD_LINE, SOCK_LINE = f"{sha(POD)}  pod.o\n", f"{sha(SOCK)}  sock.o\n"


def lay(directory: Path, sums: str | None, **objects: bytes) -> Path:
    for name, data in objects.items():
        (directory / f"{name}.o").write_bytes(data)
    if sums is not None:
        (directory / "SHA256SUMS").write_text(sums)
    return directory


@pytest.mark.parametrize(
    ("reason", "sums", "objects", "expected"),
    [
        ("a source tree", None, {"pod": POD}, {"pod.o": sha(POD)}),
        (
            "an installation",
            POD_LINE + SOCK_LINE,
            {"pod": POD, "sock": SOCK},
            {"pod.o": sha(POD), "sock.o": sha(SOCK)},
        ),
        ("one listed and not there", POD_LINE + SOCK_LINE, {"pod": POD}, {"pod.o": sha(POD)}),
        ("other files are listed too", POD_LINE + "0  README\n", {"pod": POD}, {"pod.o": sha(POD)}),
    ],
)
def test_objects_that_are_taken(
    reason: str,
    sums: str | None,
    objects: dict[str, bytes],
    expected: dict[str, str],
    tmp_path: Path,
) -> None:
    assert attach.checked(lay(tmp_path, sums, **objects)) == expected, reason


@pytest.mark.parametrize(
    ("reason", "sums", "what"),
    [
        ("changed after the installation", f"{sha(SOCK)}  pod.o\n", "is not the one listed in"),
        ("put there by somebody", SOCK_LINE, "is not listed in"),
        ("the list was emptied", "", "is not listed in"),
        ("a line without its sum", "pod.o\n", "is not listed in"),
        ("half a sum", f"{sha(POD)[:32]}  pod.o\n", "is not the one listed in"),
        ("not text", "\0\N{SNOWMAN}\n", "is not listed in"),
    ],
)
def test_objects_that_are_refused(reason: str, sums: str, what: str, tmp_path: Path) -> None:
    objects = lay(tmp_path, sums, pod=POD)
    pins = tmp_path / "pins"
    with pytest.raises(attach.UnlistedObject) as caught:
        attach.Programs(objects, pins, {})
    assert caught.value.errno == errno.EKEYREJECTED
    assert f"{objects / 'pod.o'} {what} SHA256SUMS" in str(caught.value), reason
    assert not pins.exists(), "refused, but something was done"
