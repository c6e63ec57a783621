"""flow-loss: 50,000 new flows a second, and how many of their events the observer does not get.

The programs are the real ones and so is the observer's process, on the machine's other CPUs; it
looks through the table of flows meanwhile, as it does every ten seconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from measure import Result, Unmeasurable, pinned
from row_datapath import FIRST, Bench, plain_rules, remote_pods, syn, text
from tidegate_bpf import SkbContext, bpffs

ROOT = Path(__file__).resolve().parents[1]
OFFERED = 50_000
"""New flows a second."""
SECONDS = 12
STEP = 0.02
LATE = 0.1
"""Seconds that are made up for: a burst of five thousand flows."""
PEERS = 1000
WAIT_SECONDS = 30.0
LOST = 254
MAPS = ("events_v1", "flows_v1", "metrics_v1", "ct_v2", "limits_v1", "limits_said_v1")


@contextmanager
def observer(directory: Path) -> Iterator[Path]:
    """Its socket, over the pins in `directory`; nothing is known of who is who."""
    socket = directory / "socket"
    command = [
        sys.executable,
        "-m",
        "tidegate_observer",
        *("--node", f"node-1={directory / 'pins'}", "--run-dir", str(directory)),
        *("--objects", str(ROOT / "datapath/build"), "--socket", str(socket)),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError("the observer does not serve")
            time.sleep(0.05)
        yield socket
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def offer(run: Callable[[int], object]) -> tuple[int, float, float]:
    """Flows, the seconds in which they were offered, and those in which this process did not run:
    what it missed is not made up for, as that would be many times the rate for a moment."""
    each = round(OFFERED * STEP)
    offered, stalled = 0, 0.0
    began = time.monotonic()
    while (now := time.monotonic() - began) < SECONDS:
        behind = now - offered / OFFERED
        if behind > LATE:
            stalled += behind - LATE
            began += behind - LATE
        if behind > 0:
            run(each)
            offered += each
        else:
            time.sleep(STEP / 4)
    return offered, time.monotonic() - began, stalled


def loss() -> Iterator[Result]:
    if os.geteuid():
        raise Unmeasurable("needs root")
    from tidegate_observer.client import Client  # noqa: PLC0415

    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pins = directory / "pins"
        pins.mkdir()
        bpffs.mount(pins)
        stack.callback(bpffs.unmount, pins)
        (pins / "maps").mkdir()
        lab = Bench(stack).lab(remote_pods(FIRST, PEERS), plain_rules())
        for name in MAPS:
            lab.maps[name].pin(str(pins / "maps" / name))
        socket = stack.enter_context(observer(directory))
        client = stack.enter_context(Client(f"unix:{socket}"))
        run = lab.loaded.programs["fresh_flow"].test_run
        frame, context = syn(text(FIRST)), SkbContext(ifindex=1, ingress_ifindex=1)
        with pinned():
            offered, took, stalled = offer(lambda count: run(frame, context, count))
        lost = sum(count for (reason, _), count in lab.counters().items() if reason == LOST)
        deadline = time.monotonic() + WAIT_SECONDS
        while (seen := client.status().seen_flows) < offered - lost:
            if time.monotonic() > deadline:
                raise AssertionError(f"{seen} events of {offered} flows, {lost} lost")
            time.sleep(0.2)
    rate = offered / took
    if rate < OFFERED * 0.95 or stalled > SECONDS:
        why = f"only {rate:,.0f} flows/s could be offered, and none for {stalled:.1f} s"
        raise Unmeasurable(why)
    yield Result(
        "flow-loss",
        f"events lost of {OFFERED:,} new flows/s for {SECONDS} s",
        float(lost),
        "events",
        "none",
        0.0,
        {
            "offered": offered,
            "per_second": round(rate),
            "seen": seen,
            "stalled_seconds": round(stalled, 2),
        },
    )


ROWS: dict[str, Callable[[], Iterator[Result]]] = {"flow-loss": loss}
