"""svc-xdp: what a translated packet costs XDP's program at an uplink, beside tc's.

By BPF_PROG_TEST_RUN, on the fixtures of the tests (`support.edge`): the programs alone, without
what XDP saves its packets, the making of an skb. Links of namespaces say nothing of that.
"""

from __future__ import annotations

import statistics
import struct
from collections.abc import Callable, Iterator

from measure import Result, interleaved, pinned
from support import edge as e
from support import frames as f
from support import town as t
from support.edge import NODE4, NODE6, Edge
from tidegate_bpf import SkbContext

RUNS = 1000
"""Of one packet each: before it repeats, the kernel patches its own text for XDP, and the first
repetitions pay for that."""
ROUNDS = 5
PORT = 30080
ENDS = {4: (t.IP4["w"], NODE4, t.IP4["r"]), 6: (t.IP6["w"], NODE6, t.IP6["r"])}
"""Client, node, backend."""


def context(program: str, frame: bytes) -> bytes | SkbContext:
    if program == "from_wire":
        return struct.pack("=6I", 0, len(frame), 0, e.UPLINK, 0, 0)  # struct xdp_md
    return SkbContext(ifindex=e.UPLINK, ingress_ifindex=e.UPLINK)


def runs(edge: Edge, program: str, frame: bytes) -> Callable[[], float]:
    """Nanoseconds of a packet, the median's."""
    loaded, given = edge.programs[program], context(program, frame)

    def run() -> float:
        return statistics.median(
            loaded.test_run(frame, given, data_out_size=256).duration_ns for _ in range(RUNS)
        )

    return run


def xdp() -> Iterator[Result]:
    with pinned(), e.edge(xdp=True) as edge:
        for version, name in ((4, "svc-xdp"), (6, "svc-xdp-6")):
            client, node, backend = ENDS[version]
            edge.open()
            edge.service(node, PORT, f.TCP, [(backend, 8080)])
            edge.send(t.tcp(client, node, 40000, PORT, f.SYN, b""))
            frame = t.tcp(client, node, 40000, PORT, f.ACK, b"x" * 64)
            variants = {}
            for hook, program in (("xdp", "from_wire"), ("tc", "from_net")):
                found = edge.programs[program].test_run(frame, context(program, frame))
                assert f.parse(found.data_out).dst == backend, "it is the work that is timed"
                variants[hook] = runs(edge, program, frame)
            cost = {k: statistics.median(v) for k, v in interleaved(variants, ROUNDS).items()}
            yield Result(
                name,
                f"XDP, a known flow's IPv{version} packet: translated, routed, sent back out",
                cost["xdp"] / cost["tc"],
                "ratio",
                f"tc's program: {cost['tc']:.0f} ns; no bar is asked for, twice is a fault",
                2.0,
                {"xdp_ns": cost["xdp"], "tc_ns": cost["tc"]},
            )


ROWS: dict[str, Callable[[], Iterator[Result]]] = {"svc-xdp": xdp}
