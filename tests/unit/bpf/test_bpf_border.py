"""Errors and mount tables: text in, values out."""

from __future__ import annotations

import errno

import pytest
from tidegate_bpf import BpfError, NotSupported, PermissionDenied
from tidegate_bpf.errors import ENOTSUPP, error, last_useful_line
from tidegate_bpf.mounts import Mount, highest, parse


@pytest.mark.parametrize(
    ("reason", "log", "expected"),
    [
        ("statistics last", "0: (bf) r1\nR1 invalid\nprocessed 3 insns (limit 1)\n", "R1 invalid"),
        ("blank lines", "a\nR1 invalid\n\n  \n", "R1 invalid"),
        ("timing lines", "no\nverification time 9 usec\nstack depth 0\nprocessed 1 insns", "no"),
        ("nothing at all", "", "rejected without a log"),
    ],
)
def test_last_useful_line(reason: str, log: str, expected: str) -> None:
    assert expected == last_useful_line(log), reason


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.EPERM, PermissionDenied),
        (errno.EACCES, PermissionDenied),
        (errno.EOPNOTSUPP, NotSupported),
        (ENOTSUPP, NotSupported),
        (errno.EBUSY, BpfError),
    ],
)
def test_errno_decides_the_class(code: int, kind: type[BpfError]) -> None:
    found = error(code, "do it")
    assert type(found) is kind
    assert found.errno == code
    assert "do it" in str(found)


def test_mountinfo() -> None:
    text = (
        "25 1 0:23 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw\n"
        "31 1 0:40 / /run/with\\040space\\134x rw shared:5 master:2 - bpf bpf rw,mode=700\n"
    )
    assert parse(text) == [
        Mount("/sys/fs/cgroup/unified", "cgroup2", (0, 23), "/"),
        Mount("/run/with space\\x", "bpf", (0, 40), "/"),
    ]


TOPS = [
    ("a machine", {"/sys/fs/cgroup": "/"}, "/sys/fs/cgroup"),
    ("none", {}, None),
    ("own namespace, the node's beside it", {"/sys/fs/cgroup": "/", "/n": "/../../.."}, "/n"),
    ("no namespace of its own", {"/sys/fs/cgroup": "/kubepods/pod1/c1", "/n": "/"}, "/n"),
    ("a sibling's and its own", {"/a": "/../x", "/b": "/"}, "/a"),
    ("deeper names are no higher", {"/a": "/../a/b/c", "/b": "/"}, "/b"),
]


@pytest.mark.parametrize(("reason", "roots", "expected"), TOPS, ids=lambda v: str(v)[:24])
def test_the_highest_mount(reason: str, roots: dict[str, str], expected: str | None) -> None:
    found = [Mount(path, "cgroup2", (0, 23), root) for path, root in roots.items()]
    assert expected == highest(found), reason
