"""Real packets through `tidegate up`: matrices, revocation, a flood, and loaders killed at work.

Faults it was seen to find: an epoch that is not bumped (revoked flows live on); links made anew
when a loader starts instead of updated in place (forbidden packets in between).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import ca_maps, ca_rig, ca_town, clusters
from support.ca_soak import campaign, scaled
from support.ca_town import Sink, Town, Traffic, ask, node, pod, policy, until
from tidegate_cli.standalone.errors import PrerequisiteError
from tidegate_cli.standalone.loaders import check
from tidegate_loader.local import NodePaths
from tidegate_loader.source import Source
from tidegate_operator import identities, publish, world
from tidegate_operator.compile import compile
from tidegate_operator.manifests import Folder

pytestmark = [pytest.mark.cluster, pytest.mark.kernel, pytest.mark.slow]

FLOODER = Path(__file__).parents[1] / "support" / "ca_flood.py"
NODES = ("node-1", "node-2")


@pytest.fixture
def town(tmp_path: Path) -> Iterator[Town]:
    try:
        check()
    except PrerequisiteError as error:
        pytest.skip(str(error))
    with ca_town.town(tmp_path) as made:
        yield made


def _settle(town: Town) -> None:
    """A small town: `ally` (of another node) and `friend` may reach `server`, others may not."""
    town.save("nodes", node(1), node(2))
    town.save("server", pod("server"))
    town.save("ally", pod("ally", 2, role="ally"))
    town.save("friend", pod("friend", role="friend"))
    town.save("strangers", pod("stranger"), pod("alien", 2))
    town.save("churn", pod("churn", role="a"))
    town.save("policy", policy("server", "server", "ally", "friend"))
    town.up()


# ---- matrix -------------------------------------------------------------------------------


def test_matrix_equals_model_on_generated_clusters(town: Town, tmp_path: Path) -> None:
    with campaign("matrix", "generated clusters") as figures:
        for seed in range(scaled(2, 20)):
            cluster = clusters.random_cluster(1000 + seed)
            town.save("all", *clusters.documents(cluster))
            town.up()
            result = town.tidegate("matrix", "-6")
            if result.returncode:
                figures.failures.append(f"seed {seed}\n{result.stdout}{result.stderr}")
            assert town.tidegate("down").returncode == 0
            assert not town.run_dir.path.exists(), "nothing is left of it, the observer's files too"
            figures.count += 1


# ---- revocation ---------------------------------------------------------------------------


def test_revocation_cuts_established_flows_and_no_others(town: Town) -> None:
    _settle(town)
    with campaign("revocation", "revocations") as figures:
        for turn in range(scaled(2, 20)):
            for revoke, restore in (_changed_rule(town), _relabelled_peer(town)):
                until(lambda: town.reaches("friend", "server", 8080), "friend is let in")
                flow = town.connect("friend", "server", 8080)
                assert flow is not None
                assert ask(flow)
                with Traffic(town, "ally", "server") as kept:
                    revoke()
                    until(lambda f=flow: not ask(f, 0.3), "the flow is cut")
                    assert not town.reaches("friend", "server", 8080)
                    answered = kept.answered
                    until(lambda k=kept, a=answered: k.answered > a + 10, "ally goes on")
                flow.close()
                figures.failures += [f"turn {turn}: {text}" for text in kept.lost]
                restore()
                figures.count += 1


Save = Callable[[], None]


def _changed_rule(town: Town) -> tuple[Save, Save]:
    return (
        lambda: town.save("policy", policy("server", "server", "ally")),
        lambda: town.save("policy", policy("server", "server", "ally", "friend")),
    )


def _relabelled_peer(town: Town) -> tuple[Save, Save]:
    return (
        lambda: town.save("friend", pod("friend", role="former")),
        lambda: town.save("friend", pod("friend", role="friend")),
    )


# ---- a flood ------------------------------------------------------------------------------


def test_a_flood_of_syns_breaks_nobody_elses_flows(town: Town) -> None:
    _settle(town)
    count = scaled(100_000, 1_000_000)
    interfaces, _ = Source(NodePaths(town.run_dir.path, "node-1"), "node-1").interfaces()
    mine = next(i for i in interfaces.values() if i.name == "friend")
    server = town.pod("server")
    with (
        campaign("syn-flood", "SYNs of one pod") as figures,
        Traffic(town, "ally", "server") as kept,
    ):
        old = town.connect("ally", "server", 8080)
        assert old is not None
        with town.inside("friend"):
            argv = [sys.executable, str(FLOODER), mine.pod_mac, mine.host_mac]
            argv += [mine.addresses[0], server.addresses[0], str(count)]
            flood = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        opened = 0
        while flood.poll() is None:
            assert ask(old, 10.0)
            fresh = town.connect("ally", "server", 8080, timeout=10.0)
            assert fresh is not None
            assert ask(fresh, 10.0)
            fresh.close()
            opened += 1
        sent = int(flood.communicate()[0])
        assert ask(old, 10.0)
        old.close()
        assert opened > 3
        answered = kept.answered
        until(lambda: kept.answered > answered + 10, "ally goes on")
        figures.count = sent
        figures.failures += kept.lost
    assert sent == count


# ---- killed loaders -------------------------------------------------------------------------


def test_killed_loaders_break_nothing(town: Town) -> None:
    _settle(town)
    until(lambda: town.reaches("friend", "server", 8080), "friend is let in")
    rng, open_ = random.Random(1), True
    with (
        campaign("sigkill", "SIGKILLs of a loader") as figures,
        Traffic(town, "ally", "server") as kept,
        Sink(town, "server", 7777, "stranger", "alien") as sink,
    ):
        for number in range(scaled(8, 60)):
            victim = NODES[number % 2]
            until(lambda v=victim: v in town.loaders(), "the loader is there")
            _churn(town, rng, rng.random() * 0.4)
            os.kill(town.loaders()[victim], signal.SIGKILL)
            _churn(town, rng, 0.05)
            # What is saved after a kill is enforced by the loader that comes next.
            open_ = not open_
            roles = ("ally", "friend") if open_ else ("ally",)
            town.save("policy", policy("server", "server", *roles))
            until(
                lambda want=open_: town.reaches("friend", "server", 8080) == want,
                f"what is saved after kill {number} is enforced",
            )
            figures.count += 1
        figures.failures += [f"allowed: {text}" for text in kept.lost]
        figures.failures += [f"forbidden packet passed: {got}" for got in sink.got]
        assert kept.answered > 100
        assert sink.tried > 100
        for name in NODES:
            # Addresses follow the node state: what the folder says last is there soon.
            until(lambda n=name: not _differs_from_cold(town, n), f"{name} is as a cold start is")


def _churn(town: Town, rng: random.Random, seconds: float) -> None:
    """Policies and labels of others change all the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        roles = rng.sample(["a", "b", "c"], rng.randint(0, 3))
        town.save("other", policy("other", "stranger", *roles), policy("more", "churn", *roles))
        town.save("churn", pod("churn", role=rng.choice("abc")))
        time.sleep(0.01 + rng.random() * 0.03)


def _differs_from_cold(town: Town, name: str) -> bool:
    """The node's maps against a new operator and a new loader over the folder as it is. No pod
    came or went, so addresses are the same."""
    read = Folder(town.folder).read()
    now, _ = world.build(read.documents)
    ledger = identities.allocate(now, publish.read_ledger(town.run_dir.path))
    desired = compile(now, ledger)
    made = ca_rig.Compiled(now, ledger, desired, publish.render(desired, ledger))
    interfaces, _ = Source(NodePaths(town.run_dir.path, name), name).interfaces()
    pins = town.run_dir.bpf
    found = ca_maps.read(pins / name)
    with ca_rig.from_scratch(pins / "cold") as cold:
        cold.apply(made.state(name), interfaces)
        expected = ca_maps.read(pins / "cold")
    return bool(found.problems) or found.content() != expected.content()


# ---- an address that comes back ---------------------------------------------------------------


def test_an_address_that_comes_back_as_another_pod_brings_no_flow_with_it(town: Town) -> None:
    _settle(town)
    with campaign("reused-address", "addresses used again") as figures:
        address = town.pod("friend").addresses[0]
        flow = town.udp("friend", 5000)
        server = (town.pod("server").addresses[0], 8081)
        flow.connect(server)
        flow.settimeout(1.0)
        flow.send(b"x")
        assert flow.recv(4096)
        flow.close()
        (town.folder / "friend.yaml").unlink()
        # Addresses are given in turn: others take all the rest first.
        town.save("filler", _filler(248))
        until(lambda: len(_pods(town)) > 248, "the others are there")
        (town.folder / "filler.yaml").unlink()
        until(lambda: len(_pods(town)) < 10, "the others are gone")
        for number in range(20):
            town.save("heir", pod(f"heir{number}"))
            until(lambda n=number: f"default/heir{n}" in _pods(town), "an heir is there")
            if _pods(town)[f"default/heir{number}"] == address:
                break
        heir_name = f"heir{number}"
        assert town.pod(heir_name).addresses[0] == address
        with Traffic(town, "ally", "server") as kept:
            heir = town.udp(heir_name, 5000)
            heir.settimeout(0.2)
            for _ in range(20):
                heir.sendto(b"x", server)
            with pytest.raises(TimeoutError):
                heir.recv(4096)
            heir.close()
        figures.count += 1
        figures.failures += kept.lost


def _pods(town: Town) -> dict[str, str]:
    state = town.run_dir.read()
    assert state is not None
    return {p.key: p.addresses[0] for p in state.pods}


def _filler(count: int) -> dict[str, object]:
    template = pod("filler")
    spec = {
        "replicas": count,
        "selector": {"matchLabels": {"app": "filler"}},
        "template": {"metadata": template["metadata"], "spec": template["spec"]},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "filler"},
        "spec": spec,
    }
