"""The third answer: the node's own program, loaded once more as a dry run, over a synthetic packet.

Over the same pinned maps, never attached, writes nothing. May not live here: what the answer should
be.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from tidegate_bpf import LoadedObject, ObjectFile, SkbContext, netns
from tidegate_loader.attach import knobs

from tidegate_cli.live import Endpoint, NodeMaps, objects_dir, signed

DROP = 2
"""TC_ACT_SHOT; what is not dropped passes or is redirected."""
NOT_ASKED = (0, 0)
_PINNED = re.compile(r"_v\d+$")
"""A pinned map's name carries its layout's version. What has none is a program's own work space."""


@dataclass(frozen=True)
class Run:
    """What the program answered: `reason` is an enum tg_reason; each side (rule set id, rule)
    with enum tg_rule_special; NOT_ASKED is a side that was not. `audits`: reasons for which
    egress and ingress would be denied if policies in audit mode counted, 0: none; `audit_rule`:
    of the first of them."""

    program: str
    allowed: bool
    reason: int
    egress: tuple[int, int]
    ingress: tuple[int, int]
    frame: bytes
    """As it left the program."""
    audits: tuple[int, int] = (0, 0)
    audit_rule: int = -1


class DryRun:
    """The copy of one node's program. A context manager."""

    def __init__(self, maps: NodeMaps, namespace: str) -> None:
        """`namespace`: path of the node's network namespace; "" is the caller's own."""
        self._namespace = namespace
        pins = {name: path for name, path in maps.pins().items() if _PINNED.search(name)}
        spec = ObjectFile(objects_dir() / "pod.o")
        self._loaded: LoadedObject = spec.load(pins=pins, rodata={**knobs(spec), "dry_run": 1})

    def __enter__(self) -> DryRun:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._loaded.close()

    def from_pod(self, endpoint: Endpoint, frame: bytes) -> Run:
        """The frame leaves the pod."""
        return self._run("from_pod", endpoint.row.ifindex, endpoint.row.ifindex, frame)

    def to_pod(self, endpoint: Endpoint, frame: bytes) -> Run:
        """The frame, from another node, enters the pod."""
        with self._inside():
            uplink = _other_interface(endpoint.row.ifindex)
        return self._run("to_pod", endpoint.row.ifindex, uplink, frame)

    def _run(self, program: str, ifindex: int, came_from: int, frame: bytes) -> Run:
        context = SkbContext(ifindex=ifindex, ingress_ifindex=came_from)
        with self._inside():
            result = self._loaded.programs[program].test_run(frame, context)
        context = SkbContext.from_buffer_copy(result.ctx_out)
        answer = context.cb
        return Run(
            program,
            result.retval != DROP,
            answer[0] & 0xFF,
            (answer[1], signed(answer[2])),
            (answer[3], signed(answer[4])),
            result.data_out,
            (answer[0] >> 8 & 0xFF, answer[0] >> 16 & 0xFF),
            signed(context.priority),
        )

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        if not self._namespace:
            yield
            return
        with netns.inside(self._namespace):
            yield


def _other_interface(ifindex: int) -> int:
    """Any interface but this one: the program only asks whether the packet came from outside."""
    return next((i for i, name in socket.if_nameindex() if i != ifindex and name != "lo"), 1)
