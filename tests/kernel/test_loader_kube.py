"""The loader against a real API server: what it takes from there, what it says there, and that
nothing which happens there takes anything away from the node."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import apiserver, loader_api, loader_node
from support import loader_world as world
from support.apiserver import ApiServer
from support.kstatus import kstatus
from support.loader_api import condition, edit, publish, status
from support.loader_node import Node, poll
from tidegate_api import state as api
from tidegate_bpf import ObjectFile
from tidegate_kube import Client, resources
from tidegate_loader import addresses, kernel

pytestmark = [
    pytest.mark.apiserver,
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """Our own: it is killed and started again."""
    with apiserver.running(tmp_path_factory.mktemp("loader-api")) as found:
        loader_api.install(found)
        yield found


@pytest.fixture
def client(server: ApiServer) -> Iterator[Client]:
    found = server.client()
    loader_api.clear(found)
    yield found
    found.close()


@pytest.fixture
def node(server: ApiServer, tmp_path: Path) -> Iterator[Node]:
    with loader_node.made(tmp_path) as found:
        loader_api.account(server, tmp_path / "account")
        (tmp_path / "server").write_text(server.url + "\n")
        yield found


def _start(node: Node, *more: str) -> None:
    base = node.run_dir.parent
    node.start(
        *("--kube", "--server-file", str(base / "server")),
        *("--service-account", str(base / "account"), *more),
    )


def _holds(node: Node, address: str) -> bool:
    """Whether the kernel's ipcache knows an address."""
    layouts = kernel.Layouts(ObjectFile(node.objects / "pod.o"))
    opened = kernel.Kernel(node.pin_dir, layouts)
    try:
        return addresses.pack(address) in opened.read_ipcache()
    finally:
        opened.close()


def test_what_is_published_is_realised_and_reported(client: Client, node: Node) -> None:
    wanted = world.example()
    _start(node)
    # Before anything is published nothing is known, and nothing is done.
    poll("the loader to have looked", lambda: node.realised().status.conditions)
    assert node.realised().digest is msgspec.UNSET
    publish(client, wanted)
    node.wait_for(wanted, 0)
    digest = wanted.state().digest
    poll("the status", lambda: status(client).get("realised") == digest)
    found = status(client)
    ready = condition(client, "Ready")
    assert (ready["status"], ready["reason"]) == ("True", "Realised")
    assert found["formats"] == [api.FORMAT, api.NEWEST_FORMAT]
    assert [c["type"] for c in found["conditions"]] == ["Ready"]
    peers = {item.name: item for item in wanted.peers}
    assert found["peerSets"] == api.PeerDigests().of(peers, peers)
    assert found["lastReportTime"]
    state = loader_api.read(client, resources.NODE_STATES, world.NODE)
    generation = state["metadata"]["generation"]
    assert found["observedGeneration"] == ready["observedGeneration"] == generation
    assert kstatus(state) == ["Current"]


def test_a_change_is_followed_and_what_nobody_names_goes(client: Client, node: Node) -> None:
    wanted = world.example()
    publish(client, wanted)
    _start(node)
    node.wait_for(wanted, 0)
    before = {p.name for p in (node.paths.objects / "rulesets").iterdir()}
    added = world.rule_set(world.term(api.AnyPeer(), 0, "TCP", 99))
    wanted.rule_sets = [added]
    wanted.endpoints = [world.endpoint(1, 300, added.metadata.name)]
    publish(client, wanted)
    node.wait_for(wanted, 0)

    def rule_sets() -> set[str]:
        return {p.name for p in (node.paths.objects / "rulesets").iterdir()}

    assert len(before) == 2
    poll("the old rule sets to go", lambda: rule_sets() == {f"{added.metadata.name}.json"})
    # Later slices bring facts without a new NodeState.
    wanted.ipcache["10.0.7.7/32"] = 301
    wanted.revision += 1
    state = wanted.state()
    for item in state.ipcache:
        spec = msgspec.to_builtins(item.spec)
        edit(client, resources.STATE_SLICES, item.metadata.name, spec=spec)
    poll("the new address", lambda: _holds(node, "10.0.7.7"))


def test_a_file_that_somebody_takes_away_is_missed(client: Client, node: Node) -> None:
    """It reads again what it has written itself, and now and then everything; what it could
    not read it remembers."""
    wanted = world.example()
    publish(client, wanted)
    _start(node)
    node.wait_for(wanted, 0)
    poll("the status", lambda: condition(client, "Ready").get("status") == "True")
    path = node.paths.objects / "stateslices" / f"{api.slice_name('peers', 1, 0, 2)}.json"
    data = path.read_bytes()
    path.unlink()
    assert node.process is not None
    node.process.send_signal(signal.SIGUSR1)
    poll("it to be missed", lambda: condition(client, "Stalled").get("reason") == "Missing")
    path.write_bytes(data)
    poll("it to be back", lambda: not condition(client, "Stalled"))
    node.wait_for(wanted, 0)


DELETED = ["nodestates", "stateslices", "rulesets"]


@pytest.mark.parametrize("plural", DELETED)
def test_deleting_objects_removes_nothing(client: Client, node: Node, plural: str) -> None:
    one = node.add_interface(1)
    wanted = world.example()
    publish(client, wanted)
    _start(node)
    node.wait_for(wanted, 1)
    epoch, link = node.realised().epoch, node.link(one.ifindex)
    resource = loader_api.PLURALS[plural]
    for page in client.pages(resource):
        for raw in page.items:
            client.delete(resource, msgspec.json.decode(raw)["metadata"]["name"])
    # The watch has brought it when it brings what comes after it; so does a restart.
    marker = world.World(shards=1, ipcache={"10.9.9.9/32": 300}).state().ipcache[0]
    client.create(resources.STATE_SLICES, api.encode(marker))
    poll(
        "the marker",
        (node.paths.objects / "stateslices" / f"{marker.metadata.name}.json").exists,
    )
    for _ in range(2):
        assert (node.realised().epoch, node.link(one.ifindex)) == (epoch, link)
        assert _holds(node, "10.0.0.1")
        node.wait_for(wanted, 1)
        node.stop()
        node.paths.realised.touch()
        _start(node)
    # Repaired, it goes on.
    wanted.ipcache["10.0.7.8/32"] = 301
    wanted.revision += 1
    publish(client, wanted)
    node.wait_for(wanted, 1)
    poll("the new address", lambda: _holds(node, "10.0.7.8"))


def test_a_whole_kind_that_goes_removes_nothing(
    server: ApiServer, client: Client, node: Node
) -> None:
    wanted = world.example()
    publish(client, wanted)
    _start(node)
    node.wait_for(wanted, 0)
    crd = "stateslices.tidegate.dev"
    held = loader_api.read(client, resources.CRDS, crd)
    try:
        client.delete(resources.CRDS, crd)
        poll("the kind to be gone", lambda: "no news" in _log(node) or "404" in _log(node))
        assert _holds(node, "10.0.0.1")
        node.stop()
        _start(node)
        node.wait_for(wanted, 0)
        assert _holds(node, "10.0.0.1")
    finally:
        body = {k: held[k] for k in ("apiVersion", "kind", "spec")}
        body["metadata"] = {"name": crd}
        poll("the old kind to be gone", lambda: _create(client, body))
        loader_api.served(client, resources.STATE_SLICES)
    wanted.ipcache["10.0.7.9/32"] = 301
    publish(client, wanted)
    poll("the new address", lambda: _holds(node, "10.0.7.9"))


def _create(client: Client, body: dict[str, Any]) -> bool:
    try:
        client.create(resources.CRDS, msgspec.json.encode(body))
    except Exception:
        return False
    return True


def _log(node: Node) -> str:
    return node.log.read_text()


STALLED = [
    ("a later format", {"format": 3}, "UnknownFormat", "format 3"),
    ("a rule set nobody wrote", {"ruleSets": ["0" * 40]}, "Missing", "rulesets/0000"),
    ("a table not yet written", {"tables": {}}, "Missing", "no table"),
]


def _says(client: Client, reason: str, phrase: str) -> bool:
    told = condition(client, "Stalled")
    return told.get("reason") == reason and phrase in told["message"]


@pytest.mark.parametrize(
    ("reason", "change", "expected", "phrase"), STALLED, ids=lambda v: str(v)[:24]
)
def test_what_is_not_understood_moves_nothing_and_says_so(
    client: Client,
    node: Node,
    reason: str,
    change: dict[str, Any],
    expected: str,
    phrase: str,
) -> None:
    wanted = world.example()
    publish(client, wanted)
    _start(node)
    node.wait_for(wanted, 0)
    epoch = node.realised().epoch
    held = loader_api.read(client, resources.NODE_STATES, world.NODE)
    edit(client, resources.NODE_STATES, world.NODE, spec=held["spec"] | change)
    # A file that is being replaced may be missing for a moment: the same reason, in other words.
    poll(reason, lambda: _says(client, expected, phrase))
    found, told = status(client), condition(client, "Stalled")
    assert told["observedGeneration"] == held["metadata"]["generation"] + 1
    assert condition(client, "Ready")["status"] == "False"
    assert kstatus(loader_api.read(client, resources.NODE_STATES, world.NODE)) == ["Failed"]
    assert found["realised"] == wanted.state().digest
    assert node.realised().epoch == epoch
    assert _holds(node, "10.0.0.1")
    edit(client, resources.NODE_STATES, world.NODE, spec=held["spec"])
    poll("it to be over", lambda: not condition(client, "Stalled"))
    assert condition(client, "Ready")["status"] == "True"


def test_a_forged_rule_set_is_refused_until_it_is_mended(client: Client, node: Node) -> None:
    wanted = world.example()
    publish(client, wanted)
    _start(node)
    node.wait_for(wanted, 0)
    epoch = node.realised().epoch
    right = world.rule_set(world.term(api.AnyPeer(), 0, "TCP", 99))
    forged = msgspec.structs.replace(right, spec=wanted.rule_sets[0].spec)
    client.create(resources.RULE_SETS, api.encode(forged))
    wanted.rule_sets = [right]
    wanted.endpoints = [world.endpoint(1, 300, right.metadata.name)]
    publish(client, wanted)
    poll("it to be said", lambda: condition(client, "Stalled").get("reason") == "Unverified")
    assert node.realised().epoch == epoch
    client.delete(resources.RULE_SETS, right.metadata.name)
    client.create(resources.RULE_SETS, api.encode(right))
    node.wait_for(wanted, 0)
    poll("it to be over", lambda: not condition(client, "Stalled"))


def test_without_the_api_server_it_works_from_its_disk(
    server: ApiServer, client: Client, node: Node
) -> None:
    one = node.add_interface(1)
    wanted = world.example()
    publish(client, wanted)
    _start(node)
    node.wait_for(wanted, 1)
    node.stop(signal.SIGKILL)
    server.kill()
    try:
        node.paths.realised.unlink()
        two = node.add_interface(2)
        _start(node)
        node.wait_for(wanted, 2)
        assert node.link(one.ifindex)[2] == one.ifindex
        assert node.link(two.ifindex)[2] == two.ifindex
    finally:
        server.start()
    # It comes back, and so does the loader, by itself.
    wanted.ipcache["10.0.7.7/32"] = 301
    wanted.revision += 1
    publish(client, wanted)
    node.wait_for(wanted, 2)
    poll("the new address", lambda: _holds(node, "10.0.7.7"))
    poll("the status", lambda: status(client).get("endpoints") == 2)


def test_a_status_that_somebody_edited_is_written_again(client: Client, node: Node) -> None:
    """After the next transition at the latest; once a minute otherwise."""
    wanted = world.example()
    publish(client, wanted)
    _start(node)
    node.wait_for(wanted, 0)
    digest = wanted.state().digest
    poll("the status", lambda: status(client).get("realised") == digest)
    body = {"status": {"realised": "forged", "conditions": []}}
    client.patch(resources.NODE_STATES, world.NODE, msgspec.json.encode(body), subresource="status")
    node.add_interface(1)
    poll("the status", lambda: status(client).get("realised") == digest)
    assert condition(client, "Ready")["status"] == "True"


def test_new_members_of_peer_sets_are_reported_though_the_state_is_as_it_was(
    client: Client, node: Node
) -> None:
    wanted = world.example()
    publish(client, wanted)
    _start(node)
    node.wait_for(wanted, 0)
    poll("the status", lambda: status(client).get("realised") == wanted.state().digest)
    before = status(client)
    wanted.peers = [world.peer_set("web", 301, 302, 303)]
    wanted.revision += 1
    for item in world.slices("peers", wanted.peers, wanted.shards, wanted.revision):
        spec = msgspec.to_builtins(item.spec)
        edit(client, resources.STATE_SLICES, item.metadata.name, spec=spec)
    now = api.PeerDigests().of(["web"], {"web": wanted.peers[0]})
    poll("the report", lambda: status(client)["peerSets"] == now)
    assert status(client)["realised"] == before["realised"]
    assert before["peerSets"] != now


def test_a_rule_set_past_its_limit_is_refused_by_name_and_moves_nothing(
    client: Client, node: Node
) -> None:
    node.add_interface(1)
    wanted = world.example()
    publish(client, wanted)
    _start(node)
    node.wait_for(wanted, 1)
    in_force = wanted.state().digest
    protocols: tuple[api.Protocol, ...] = ("TCP", "UDP", "SCTP")
    wide = [world.term(api.SetPeer(name="web"), 0, p, 1, end_port=50) for p in protocols]
    added = world.rule_set(*wide)
    wanted.peers = [world.peer_set("web", *range(300, 300 + 10_000))]
    wanted.rule_sets = [added]
    wanted.endpoints = [world.endpoint(1, 300, added.metadata.name)]
    wanted.revision += 1
    publish(client, wanted)
    poll("the refusal", lambda: condition(client, "Stalled").get("reason") == "Refused")
    assert "more than 200000 map entries" in condition(client, "Stalled")["message"]
    assert status(client)["realised"] == in_force
    wanted.peers = [world.peer_set("web", 301)]
    wanted.revision += 1
    publish(client, wanted)
    poll("what fits", lambda: status(client).get("realised") == wanted.state().digest)
    assert not condition(client, "Stalled")


def test_detached_is_a_way_there_and_back(client: Client, node: Node) -> None:
    one = node.add_interface(1)
    wanted = world.example()
    publish(client, wanted)
    _start(node)
    node.wait_for(wanted, 1)
    wanted.mode = "Detached"
    publish(client, wanted)
    digest = wanted.state().digest
    poll("it to be said", lambda: status(client).get("realised") == digest)
    assert status(client)["endpoints"] == 0
    assert condition(client, "Ready")["status"] == "True"
    assert not any(node.pin_dir.iterdir())
    # At its end it leaves nothing but the word for it, and a restart does not bring it back.
    node.stop()
    assert not node.paths.objects.exists()
    assert list(node.paths.node.iterdir()) == [node.paths.detached]
    _start(node)
    poll("a new report", lambda: node.realised().status.conditions)
    assert not any(p for p in node.pin_dir.rglob("*") if p.is_file())
    wanted.mode = "Enforcing"
    publish(client, wanted)
    # As the node's set-up does, from what libcni remembers.
    world.write_object(node.paths.interfaces, one.uid, one)
    node.wait_for(wanted, 1)


def test_a_quiet_loader_writes_nothing(client: Client, node: Node) -> None:
    """Its own status comes back to it as an event and is no news."""
    wanted = world.example()
    publish(client, wanted)
    _start(node)
    node.wait_for(wanted, 0)
    poll("the status", lambda: status(client).get("realised") == wanted.state().digest)

    def version() -> str:
        found = loader_api.read(client, resources.NODE_STATES, world.NODE)
        return str(found["metadata"]["resourceVersion"])

    before, stamp = version(), node.paths.realised.stat().st_mtime_ns
    body = {"metadata": {"annotations": {"somebody": "else"}}}
    client.patch(resources.NODE_STATES, world.NODE, msgspec.json.encode(body))
    assert node.process is not None
    for _ in range(3):  # whole cycles, at once
        node.process.send_signal(signal.SIGUSR1)
    marker = world.World(shards=1).state().ipcache[0]
    client.create(resources.STATE_SLICES, api.encode(marker))
    poll(
        "the marker",
        (node.paths.objects / "stateslices" / f"{marker.metadata.name}.json").exists,
    )
    assert int(version()) > int(before)
    after = version()
    assert version() == after
    assert node.paths.realised.stat().st_mtime_ns == stamp


def test_it_asks_for_nothing_it_may_not(client: Client, node: Node) -> None:
    """Its role has no verb more than it uses: each of them taken away is missed."""
    wanted = world.example()
    publish(client, wanted)
    role = loader_api.ROLES
    granted = loader_api.rules()
    for rule in granted:
        rules = [r for r in granted if r is not rule]
        edit(client, role, "loader", rules=rules)
        try:
            _start(node)
            poll(f"{rule} to be missed", lambda: "403 Forbidden" in _log(node))
        finally:
            edit(client, role, "loader", rules=granted)
            node.stop(signal.SIGKILL)
        node.log.write_text("")
        for path in (node.paths.objects / "rulesets").iterdir():
            path.unlink()
