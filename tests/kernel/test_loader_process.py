"""The loader as a process: gates, upgrades, signals, in a network namespace of its own."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import UNSET
from support import loader_node
from support import loader_world as world
from support.loader_node import TIMEOUT, Node, ip, poll
from support.other_version import compile_object
from tidegate_api import state as api
from tidegate_bpf import Link, ObjectFile, VerifierError, attach_tcx, clsact, mounts, netns
from tidegate_loader import addresses, kernel, log
from tidegate_loader.loader import Loader

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]


MAX_PROGRAMS = 63
"""On an interface in one direction: one less than the kernel's BPF_MPROG_MAX."""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with loader_node.made(tmp_path) as found:
        yield found


def test_gates_stay_when_the_loader_goes_and_come_back_unchanged(node: Node) -> None:
    one = node.add_interface(1)
    node.write(world.example())
    node.start()
    node.wait_for(world.example(), 1)
    before = node.link(one.ifindex), node.link(one.ifindex, "egress")
    assert before[0][1:] == (node.program("from_pod"), one.ifindex)
    assert before[1][1:] == (node.program("to_pod"), one.ifindex)
    epoch = node.realised().epoch
    assert node.stop() == 0
    assert (node.link(one.ifindex), node.link(one.ifindex, "egress")) == before
    node.paths.realised.touch()
    node.start()
    node.add_interface(2)
    node.wait_for(world.example(), 2)
    assert node.link(one.ifindex) == before[0]
    assert node.realised().epoch == epoch + 1
    # Killed while it cleans up, the next one would rightly bump the epoch once more.
    poll("the apply to end", lambda: not node.paths.applying.exists())
    assert node.stop(signal.SIGKILL) == -signal.SIGKILL
    node.start("--once")
    assert node.process is not None
    assert node.process.wait(TIMEOUT) == 0
    assert node.realised().epoch == epoch + 1
    assert node.link(one.ifindex) == before[0]


def test_a_new_object_is_put_in_place_of_the_old(node: Node) -> None:
    one = node.add_interface(1)
    node.write(world.example())
    node.start()
    node.wait_for(world.example(), 1)
    node.stop()
    link, program, _ = node.link(one.ifindex)
    world.stub_object(node.objects, verdict=0)
    node.start()
    poll("the new program", lambda: node.program("from_pod") != program)
    poll("the link to run it", lambda: node.link(one.ifindex)[1] == node.program("from_pod"))
    assert node.link(one.ifindex)[0] == link
    node.wait_for(world.example(), 1)
    assert len(node.realised().rule_sets) == 2
    # The stub's own map changed its size with the verdict: it is nobody else's.
    assert not (node.pin_dir / "maps" / "scratch").exists()


def test_clsact_does_the_same(node: Node) -> None:
    one = node.add_interface(1)
    node.write(world.example())
    node.start("--force-clsact")
    node.wait_for(world.example(), 1)
    with netns.inside(f"/run/netns/{node.namespace}"):
        assert clsact.query(one.ifindex, ingress=True) == node.program("from_pod")
        assert clsact.query(one.ifindex, ingress=False) == node.program("to_pod")
    assert not list((node.pin_dir / "links").iterdir())
    node.stop()
    node.start()
    poll("a link instead", lambda: (node.pin_dir / "links" / f"{one.ifindex}-egress").exists())
    with netns.inside(f"/run/netns/{node.namespace}"):
        poll("no filter", lambda: clsact.query(one.ifindex, ingress=False) is None)


def test_what_cannot_be_gated_is_not_said_to_be_in_force(node: Node) -> None:
    """An interface takes so many programs a direction, and others may have them all."""
    one = node.add_interface(1)
    node.write(world.example())
    node.start("--force-clsact")  # for a program to hang there
    node.wait_for(world.example(), 1)
    node.stop()
    in_force = node.realised().digest
    changed = world.example()
    changed.revision += 1
    with (
        netns.inside(f"/run/netns/{node.namespace}"),
        contextlib.ExitStack() as stack,
    ):
        spec = ObjectFile(node.objects / "pod.o")
        pins = {path.name: str(path) for path in (node.pin_dir / "maps").iterdir()}
        for _ in range(MAX_PROGRAMS):
            # None may hang there twice.
            program = spec.load(pins=pins).programs["from_pod"]
            stack.callback(program.close)
            stack.enter_context(attach_tcx(program, one.ifindex, ingress=True))
        node.write(changed)
        node.start()
        poll("a condition", lambda: "cannot attach" in str(node.realised().status.conditions))
        found = node.realised()
        assert found.digest == found.status.realised == in_force != changed.state().digest
        assert {c.type: c.status for c in found.status.conditions}["Ready"] == "False"
        assert not found.endpoints
    node.wait_for(changed, 1)


def test_an_interface_that_goes_takes_its_links_and_endpoint(node: Node) -> None:
    one, two = node.add_interface(1), node.add_interface(2)
    node.write(world.example())
    node.start()
    node.wait_for(world.example(), 2)
    ip("-n", node.namespace, "link", "del", two.ifname)
    (node.paths.interfaces / f"{two.uid}.json").unlink()
    node.wait_for(world.example(), 1)
    assert {p.name for p in (node.pin_dir / "links").iterdir()} == {
        f"{one.ifindex}-ingress",
        f"{one.ifindex}-egress",
    }


def test_a_lost_interface_file_does_not_open_the_gate(node: Node) -> None:
    one = node.add_interface(1)
    node.write(world.example())
    node.start()
    node.wait_for(world.example(), 1)
    (node.paths.interfaces / f"{one.uid}.json").unlink()
    node.wait_for(world.example(), 0)
    assert node.link(one.ifindex)[1:] == (node.program("from_pod"), one.ifindex)


def test_a_saved_file_is_enforced(node: Node) -> None:
    node.add_interface(1)
    wanted = world.example()
    node.write(wanted)
    node.start()
    node.wait_for(wanted, 1)
    switches = node.realised().counters.switches
    for number in range(5):
        added = world.rule_set(world.term(api.AnyPeer(), 0, "TCP", 1000 + number))
        wanted.rule_sets = [*world.example().rule_sets, added]
        wanted.endpoints = [
            world.endpoint(1, 300, added.metadata.name),
            *world.example().endpoints[1:],
        ]
        node.write(wanted)
        node.wait_for(wanted, 1)
    assert node.realised().counters.switches == switches + 5
    assert len(node.realised().rule_sets) == 1


def test_drift_is_repaired_on_a_signal(node: Node) -> None:
    node.write(world.example())
    node.start()
    node.wait_for(world.example(), 0)
    layouts = kernel.Layouts(_spec(node))
    opened = kernel.Kernel(node.pin_dir, layouts)
    opened.map("ipcache_v1").delete(addresses.pack("10.0.0.1"))
    assert node.process is not None
    node.process.send_signal(signal.SIGUSR1)
    poll("the repair", lambda: node.realised().counters.drift == 1)
    assert addresses.pack("10.0.0.1") in opened.read_ipcache()
    opened.close()


def _spec(node: Node) -> kernel.ObjectFile:
    return kernel.ObjectFile(node.objects / "pod.o")


def test_detach_leaves_nothing(node: Node) -> None:
    node.add_interface(1)
    node.write(world.example())
    node.start()
    node.wait_for(world.example(), 1)
    node.stop()
    node.start("--detach")
    assert node.process is not None
    assert node.process.wait(TIMEOUT) == 0
    assert list(node.pin_dir.iterdir()) == []


def test_what_cannot_be_used_is_one_line(node: Node) -> None:
    (node.objects / "pod.o").unlink()
    node.start()
    assert node.process is not None
    assert node.process.wait(TIMEOUT) == 1
    text = node.log.read_text()
    assert "no pod.o in" in text
    assert "Traceback" not in text


def test_idle_memory_is_small(node: Node) -> None:
    """The bar itself is the benchmark's; this keeps heavy imports out."""
    node.write(world.example())
    node.start()
    node.wait_for(world.example(), 0)
    assert node.process is not None
    status = Path(f"/proc/{node.process.pid}/status").read_text()
    rss = next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmRSS"))
    assert rss < 64 * 1024, status


def test_socket_programs_attach_to_a_cgroup(node: Node) -> None:
    root = mounts.cgroup2()
    if root is None:
        pytest.skip("cgroup2 is not mounted")
    source = node.objects / "sock.bpf.c"
    source.write_text(
        world.STUB.split('SEC("tc")')[0].replace("SCRATCH", "8")
        + 'SEC("cgroup/connect4") int connect4(struct bpf_sock_addr *c) { return 1; }'
    )
    compile_object(source, node.objects / "sock.o")
    cgroup = Path(root) / node.namespace
    cgroup.mkdir()
    try:
        node.write(world.example())
        node.start("--cgroup", str(cgroup))
        node.wait_for(world.example(), 0)
        with Link.open_pinned(str(node.pin_dir / "links" / "cgroup-connect4")) as link:
            assert link.info.target == cgroup.stat().st_ino
            before = link.info.id
        node.stop()
        node.start("--cgroup", str(cgroup), "--once")
        assert node.process is not None
        assert node.process.wait(TIMEOUT) == 0
        with Link.open_pinned(str(node.pin_dir / "links" / "cgroup-connect4")) as link:
            assert link.info.id == before
    finally:
        cgroup.rmdir()


REFUSED = r"""
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
SEC("tc") int from_net(struct __sk_buff *skb) { return *(volatile int *)(long)skb->len; }
char _license[] SEC("license") = "GPL";
"""


def test_an_object_that_does_not_load_is_named_and_the_next_start_finds_its_way(node: Node) -> None:
    """The first object's gates and addresses may be there already."""
    node.add_interface(1)
    node.write(world.example())
    source = node.objects / "net.bpf.c"
    source.write_text(REFUSED)
    compile_object(source, node.objects / "net.o")
    node.start("--once")
    assert node.process is not None
    assert node.process.wait(TIMEOUT) == 1
    assert "from_net" in node.log.read_text()
    assert not node.realised().endpoints
    assert not (node.pin_dir / "node_table").exists()
    (node.objects / "net.o").unlink()
    node.start()
    node.wait_for(world.example(), 1)


def test_an_empty_node_that_refuses_an_object_is_left_without_threads_and_descriptors(
    node: Node,
) -> None:
    node.add_interface(1)
    node.write(world.example())
    source = node.objects / "net.bpf.c"
    source.write_text(REFUSED)
    compile_object(source, node.objects / "net.o")
    options = argparse.Namespace(
        node=world.NODE, pin_dir=node.pin_dir, objects=node.objects, force_clsact=False,
        cgroup=None, flow_events=True, load_balancer_mode="snat",
        load_balancer_acceleration="disabled",
    )  # fmt: skip

    def left() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    with netns.inside(f"/run/netns/{node.namespace}"):
        before = left()
        with pytest.raises(VerifierError, match="from_net"):
            Loader(node.paths, options, log.logger(world.NODE, "warning"))
        assert left() == before


def test_how_long_a_change_of_endpoints_took_is_written_down(node: Node) -> None:
    """Once, of what says when it changed."""
    wanted = world.example()
    node.write(wanted)
    node.start()
    node.wait_for(wanted, 0)
    assert node.realised().programming is UNSET
    wanted.services = [world.service("late", "10.96.9.9", 80, [("10.0.0.9", 80)])]
    wanted.revision = 2
    peers, state = wanted.peers, wanted.state()
    for item in (
        *world.slices("peers", peers, wanted.shards, 2),
        *state.ipcache,
        *(world.triggered(item) for item in state.services),
    ):
        world.write_object(node.run_dir / "objects" / "stateslices", item.metadata.name, item)
    world.write_object(node.run_dir / "objects" / "nodestates", world.NODE, state.node)

    def measured() -> int:
        found = node.realised().programming
        return 0 if found is UNSET else sum(found.counts)

    poll("it is measured", lambda: measured() == wanted.shards)
    assert node.process is not None
    node.process.send_signal(signal.SIGUSR1)
    node.wait_for(wanted, 0)
    assert measured() == wanted.shards
