"""Names, the lock and finding pods; no namespaces."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tidegate_cli.standalone.errors import AlreadyUpError, StandaloneError
from tidegate_cli.standalone.execute import find_pod
from tidegate_cli.standalone.layout import place_node, place_pod
from tidegate_cli.standalone.rundir import Pod, RunDir, locked, short_name, start_time


def pod(namespace: str, name: str) -> Pod:
    return Pod(
        uid=f"{namespace}-{name}",
        namespace=namespace,
        name=name,
        node="n",
        addresses=[],
        ports=[],
        host_network=False,
        command="",
        netns="",
        cgroup="",
        ifname="",
    )


PODS = [pod("shop", "web-1a-0"), pod("shop", "web-1a-1"), pod("shop", "cart"), pod("data", "cart")]


@pytest.mark.parametrize(
    ("reason", "name", "expected"),
    [
        ("whole", "shop/cart", "shop/cart"),
        ("name alone", "web-1a-1", "shop/web-1a-1"),
        ("beginning", "data/c", "data/cart"),
        ("ambiguous name", "cart", "cart is ambiguous: data/cart, shop/cart"),
        ("ambiguous beginning", "web", "web is ambiguous: shop/web-1a-0, shop/web-1a-1"),
        ("none", "x", "no pod x; there are data/cart, shop/cart, shop/web-1a-0, shop/web-1a-1"),
    ],
)
def test_find_pod(reason: str, name: str, expected: str) -> None:
    try:
        found = find_pod(PODS, name).key
    except StandaloneError as error:
        found = str(error)
    assert expected == found, reason


def test_only_one_holds_the_lock(tmp_path: Path) -> None:
    run_dir = RunDir.at(tmp_path / "run")
    with locked(run_dir):
        assert run_dir.lock.is_socket()
        with pytest.raises(AlreadyUpError), locked(run_dir):
            pytest.fail("two holders")
        assert run_dir.lock.is_socket(), "the loser leaves the winner's socket alone"
    assert not run_dir.path.exists()


def test_a_dead_holders_socket_is_taken_over(tmp_path: Path) -> None:
    run_dir = RunDir.at(tmp_path / "run")
    pid = os.fork()
    if pid == 0:
        with locked(run_dir):
            os._exit(0)
    os.waitpid(pid, 0)
    assert run_dir.lock.is_socket()
    with locked(run_dir):
        pass
    assert not run_dir.lock.exists()


def test_the_lock_outlives_its_directory(tmp_path: Path) -> None:
    run_dir = RunDir.at(tmp_path / "run")
    with locked(run_dir):
        shutil.rmtree(run_dir.path)
        with locked(run_dir):
            assert run_dir.lock.is_socket()


def test_too_long_a_path_is_refused() -> None:
    with pytest.raises(StandaloneError, match="use a shorter path"):
        RunDir.at("/" + "x" * 100)


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("node-1", 20, "node-1"),
        ("a/b", 20, "a_b-c14cddc0"),
        ("x" * 30, 20, "xxxxxxxxxxx-7e0a4d44"),
    ],
)
def test_short_name(text: str, limit: int, expected: str) -> None:
    name = short_name(text, limit)
    assert len(name) <= limit
    assert name.split("-")[0] == expected.split("-", maxsplit=1)[0]
    assert (name == text) == (expected == text)


def test_places_differ(tmp_path: Path) -> None:
    """Equal pods of two run directories, and a node named like a pod, share nothing."""
    places = []
    for run_dir in (RunDir.at(tmp_path / "a"), RunDir.at(tmp_path / "b")):
        for name in ("shop", "shop-web"):
            node = place_node(
                run_dir, Path("/cg", run_dir.id), name=name, addresses=[], pod_cidrs=[]
            )
            places += [node.netns, node.cgroup]
        placed = place_pod(run_dir, node, pod("shop", "web"))
        places += [placed.netns, placed.cgroup]
    assert len(places) == len(set(places))


def test_start_time() -> None:
    assert start_time(os.getpid()) == start_time(os.getpid())
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert start_time(pid) is None, "a zombie does not live"
    os.waitpid(pid, 0)
    assert start_time(pid) is None
