"""XDP's program at an uplink: hung, replaced in place, taken away."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from support import loader_world as world
from support.loader_node import Node, ip, made
from tidegate_api import state as api
from tidegate_bpf import BpfError, Link, ObjectFile, Program, attach_xdp, netns
from tidegate_loader import xdp

pytestmark = pytest.mark.kernel
BUILD = Path(__file__).parents[2] / "datapath" / "build"
ADDRESS = "172.18.0.2"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with made(tmp_path) as found:
        yield found


@pytest.fixture
def links(node: Node) -> Path:
    found = node.pin_dir / "links"
    found.mkdir(parents=True)
    return found


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    with ObjectFile(BUILD / "xdp.o").load() as loaded:
        yield loaded.programs[xdp.PROGRAM]


def names(links: Path) -> list[str]:
    return sorted(path.name for path in links.iterdir())


def hung(pin: Path) -> tuple[int, int, int | None]:
    with Link.open_pinned(str(pin)) as link:
        return link.info.id, link.info.program_id, link.info.target


def test_on_a_veth_it_is_the_kernels_generic_way(node: Node, links: Path, program: Program) -> None:
    """Which a mode without it does not take; the link stays while its program is replaced."""
    index = node.add_interface(1).ifindex
    with netns.inside(f"/run/netns/{node.namespace}"), ObjectFile(BUILD / "xdp.o").load() as other:
        assert xdp.driver(index) == "veth"
        assert xdp.driver(1) == xdp.driver(4711) == ""
        found = xdp.attach(links, program, [index], xdp.NATIVE)
        assert (found.ways, names(links)) == ({}, [])
        assert "veth" in found.problems[0]
        assert xdp.attach(links, program, [index], xdp.BEST_EFFORT) == ({index: "generic"}, [])
        assert names(links) == [f"xdp-{index}-generic"]
        first = hung(links / f"xdp-{index}-generic")
        assert first[1:] == (program.info.id, index)
        second = other.programs[xdp.PROGRAM]
        # No uplink any more: what hangs there stays, with the program of now.
        assert xdp.attach(links, second, [], xdp.BEST_EFFORT) == ({index: "generic"}, [])
        assert hung(links / f"xdp-{index}-generic") == (first[0], second.info.id, index)
        assert xdp.attach(links, program, [index], xdp.NATIVE).ways == {}
        assert names(links) == []


def test_in_a_driver(
    node: Node, links: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A veth's runs it, too."""
    index = node.add_interface(1).ifindex
    monkeypatch.setattr(xdp, "driver", lambda _index: "mlx5_core")
    with netns.inside(f"/run/netns/{node.namespace}"):
        assert xdp.attach(links, program, [index], xdp.NATIVE) == ({index: "native"}, [])
        assert xdp.attach(links, program, [index], xdp.BEST_EFFORT).ways == {index: "native"}
        assert names(links) == [f"xdp-{index}-native"]
        # lo's driver has none.
        assert xdp.attach(links, program, [1], xdp.BEST_EFFORT).ways == {
            index: "native",
            1: "generic",
        }
        ip("-n", node.namespace, "link", "del", "veth1")
        assert xdp.attach(links, program, [], xdp.BEST_EFFORT) == ({1: "generic"}, [])
        assert names(links) == ["xdp-1-generic"]
        xdp.remove(node.pin_dir)
        assert names(links) == []


def test_somebody_elses_program_stays(node: Node, links: Path, program: Program) -> None:
    index = node.add_interface(1).ifindex
    with netns.inside(f"/run/netns/{node.namespace}"), attach_xdp(program, index, native=False):
        found = xdp.attach(links, program, [index], xdp.BEST_EFFORT)
        assert (found.ways, names(links)) == ({}, [])
        assert f"interface {index}" in found.problems[0]
        with pytest.raises(BpfError) as refused:
            attach_xdp(program, index, native=False)
        assert refused.value.errno == errno.EBUSY


def outer(node: Node) -> int:
    """Writes a state with a Service for clients outside; the node's uplink."""
    node.objects = BUILD
    one = node.add_interface(1)
    ip("-n", node.namespace, "addr", "add", f"{ADDRESS}/16", "dev", "veth1")
    (node.paths.interfaces / f"{one.uid}.json").unlink()
    wanted = world.example()
    front = api.Frontend(address="198.51.100.1", port=80, protocol="TCP", kind="LoadBalancer")
    service = world.service("outer", "10.96.0.9", 80, [("10.244.9.9", 80)])
    service = msgspec.structs.replace(service, frontends=[*service.frontends, front])
    wanted.services.append(service)
    wanted.ipcache[f"{ADDRESS}/32"] = 4
    node.write(wanted)
    return one.ifindex


def once(node: Node, *more: str) -> None:
    """A loader that ends when the state is in force."""
    node.start(*more)
    assert node.process is not None
    assert node.process.wait(120) == 0, node.log.read_text()
    node.process = None


def test_direct_server_return_is_another_program_in_the_same_links(node: Node) -> None:
    pin = node.pin_dir / "links" / f"uplink-{outer(node)}-ingress"
    seen = []
    for mode in ("snat", "dsr", "dsr", "snat"):
        once(node, "--once", "--load-balancer-mode", mode)
        seen.append((hung(pin), node.program("from_pod")))
    assert len({link for (link, _, _), _ in seen}) == 1
    assert len({pod for _, pod in seen}) == 1, "pods' programs know nothing of it"
    first, second, same, last = (program for (_, program, _), _ in seen)
    assert first != second == same != last


def test_a_loader_hangs_it_there_only_where_it_is_asked_for(node: Node) -> None:
    uplink = outer(node)
    asked = ("--once", "--load-balancer-acceleration", "best-effort")
    pin = node.pin_dir / "links" / f"xdp-{uplink}-generic"
    held = node.pin_dir / "progs" / xdp.PROGRAM
    once(node, "--once")
    assert (node.pin_dir / "links" / f"uplink-{uplink}-ingress").exists()
    assert not pin.exists()
    assert not held.exists()
    once(node, *asked)
    first = hung(pin)
    once(node, *asked)
    assert hung(pin) == first, "the link and its program are taken over"
    once(node, "--once")
    assert not pin.exists()
    assert not held.exists()
    once(node, *asked)
    assert pin.exists()
    once(node, "--detach")
    assert not list(node.pin_dir.iterdir())
    with netns.inside(f"/run/netns/{node.namespace}"), ObjectFile(BUILD / "xdp.o").load() as loaded:
        attach_xdp(loaded.programs[xdp.PROGRAM], uplink, native=False).close()
