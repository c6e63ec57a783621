"""What an observer needs on a node: to own the pins, and no capability; not to write them. And what
it says when it comes back."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from support import frames, loader_node
from support import loader_world as world
from support.hubble import Hubble
from support.loader_node import TIMEOUT, Node, ip, poll
from tidegate_bpf import Map, netns
from tidegate_observer.collector import COUNTER, LOST_REASON

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

READ_ONLY = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
POWERLESS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with loader_node.made(tmp_path) as found:
        found.objects = world.ROOT / "datapath" / "build"
        yield found


@contextlib.contextmanager
def observing(node: Node, directory: Path) -> Iterator[Path]:
    """Its socket. It sees the pins read-only, and has no capability; its log is beside it. It is
    killed in the end."""
    found = directory / "observer.sock"
    found.unlink(missing_ok=True)
    command = ["unshare", "-m", "sh", "-ec", READ_ONLY, "-", str(node.mount), *POWERLESS]
    command += [sys.executable, "-m", "tidegate_observer", "--node", f"{world.NODE}={node.pin_dir}"]
    command += ["--run-dir", str(node.run_dir), "--objects", str(node.objects)]
    command += ["--socket", str(found), "--metrics-file", str(directory / "figures")]
    with (directory / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        poll("the observer to serve", found.exists)
        yield found
    finally:
        process.kill()
        process.wait(TIMEOUT)


@pytest.fixture
def observer(node: Node, tmp_path: Path) -> Iterator[Path]:
    with observing(node, tmp_path) as found:
        yield found


def _spoof(node: Node) -> None:
    """A packet of pod 1 from an address that is not its own."""
    frame = frames.packet("10.9.9.9", "10.0.0.2", frames.UDP)
    with netns.inside(f"/run/netns/{node.namespace}"):
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with sock:
        sock.bind(("p1", 0))
        sock.send(frame)


def test_no_capability_is_needed_and_pins_are_read_only(node: Node, observer: Path) -> None:
    """It came before the loader had loaded anything, and sees what is there from then on."""
    wanted = world.example()
    one = node.add_interface(1)
    ip("-n", node.namespace, "link", "set", "p1", "up")
    ip("-n", node.namespace, "link", "set", one.ifname, "up")
    node.write(wanted)
    node.start()
    node.wait_for(wanted, 1)
    with Hubble(f"unix:{observer}") as client:

        def told() -> bool:
            _spoof(node)
            try:
                flows = list(client.flows(whitelist=[{"verdict": ["DROPPED"]}]))
            except grpc.RpcError:
                return False
            return any(f["IP"]["source"] == "10.9.9.9" for f in flows)

        poll("the denial to be told", told)
    figures = observer.with_name("figures")
    poll(
        "the programs' counters to be read",
        lambda: figures.exists() and "\ncilium_drop_count_total{" in figures.read_text(),
    )
    assert "cannot read" not in observer.with_name("log").read_text()


def _lose(node: Node, count: int) -> None:
    """As the programs count what finds a ring full."""
    key = (LOST_REASON * 2).to_bytes(4, sys.byteorder)
    with Map.open_pinned(str(node.pin_dir / "maps" / "metrics_v1")) as counters:
        rows = counters.split_per_cpu(counters.lookup(key))
        packets, size = COUNTER.unpack(rows[0])
        counters.update(key, b"".join([COUNTER.pack(packets + count, size), *rows[1:]]))


def _lost(socket_path: Path) -> list[int]:
    with Hubble(f"unix:{socket_path}") as client:
        try:
            answers = list(client.ask("/observer.Observer/GetFlows"))
        except grpc.RpcError:
            return []
    return [a["lost_events"]["num_events_lost"] for a in answers if "lost_events" in a]


def test_what_was_lost_while_there_was_none_is_told_by_the_next(node: Node, tmp_path: Path) -> None:
    wanted = world.example()
    node.write(wanted)
    node.start()
    node.wait_for(wanted, 0)
    # Before anybody looked: of that nobody can say when it was.
    _lose(node, 5)
    with observing(node, tmp_path) as found:
        poll("it has looked", (tmp_path / f"lost-{world.NODE}").exists)
        _lose(node, 3)
        poll("the loss is told", lambda: _lost(found) == [3])
    _lose(node, 4)
    with observing(node, tmp_path) as found:
        poll("the loss is told", lambda: _lost(found) == [4])


OPEN = """
import errno, os, sys
from tidegate_bpf import BpfError, Map
user = int(sys.argv[1])
os.setgroups([])
os.setresgid(user, user, user)
os.setresuid(user, user, user)
try:
    Map.open_pinned(sys.argv[2]).close()
except BpfError as error:
    print(errno.errorcode[error.errno])
"""


@pytest.mark.parametrize(
    ("reason", "user", "expected"),
    [("root opens them, without capabilities", 0, ""), ("nobody else", 65532, "EACCES")],
)
def test_pins_are_their_owners(
    node: Node, tmp_path: Path, reason: str, user: int, expected: str
) -> None:
    """Which is why an observer is root, as the loader is (docs/permissions.md)."""
    wanted = world.example()
    node.write(wanted)
    node.start()
    node.wait_for(wanted, 0)
    # Whoever asks must get as far as the pin.
    for place in (tmp_path, *tmp_path.parents[:2], node.mount, node.pin_dir, node.pin_dir / "maps"):
        place.chmod(place.stat().st_mode | 0o055)
    pin = node.pin_dir / "maps" / "flows_v1"
    kept = "-all,+setuid,+setgid"
    command = ["setpriv", f"--bounding-set={kept}", "--inh-caps=-all", "--no-new-privs"]
    done = subprocess.run(
        [*command, sys.executable, "-c", OPEN, str(user), str(pin)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == (expected, ""), reason
