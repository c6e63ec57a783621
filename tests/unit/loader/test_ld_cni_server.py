"""The socket where the CNI step asks: what is answered when, and what becomes of the files."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import loader_world as world
from support.waiting import until
from tidegate_loader import cni
from tidegate_loader.cni import InForce, Server
from tidegate_loader.local import LocalInterface

ONE = world.interface(1, ifindex=11)
NOTHING = InForce({}, frozenset(), "")


class Asked:
    """One connection."""

    def __init__(self, path: Path, said: bytes) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))  # in its turn: without a timeout it waits
        self._socket.settimeout(30)
        self._socket.sendall(said)

    def answer(self) -> dict[str, Any]:
        """Empty: hung up on."""
        with self._socket, self._socket.makefile("rb") as lines:
            line = lines.readline()
        return dict(json.loads(line)) if line else {}

    def hang_up(self) -> None:
        self._socket.close()


class Desk:
    def __init__(self, directory: Path) -> None:
        self.path = directory / "run" / "cni.sock"
        self.files = directory / "interfaces"
        self.files.mkdir()
        self.pokes = 0
        self.server = Server(self.path, self.files, self._poke, lambda: "the server is away")
        self.server.start()

    def _poke(self) -> None:
        self.pokes += 1

    def ask(self, command: str, wait_ms: int = 60_000, **more: Any) -> Asked:
        return Asked(
            self.path, msgspec.json.encode({"command": command, "waitMs": wait_ms} | more) + b"\n"
        )

    def held(self) -> dict[str, LocalInterface]:
        return {
            path.stem: msgspec.json.decode(path.read_bytes(), type=LocalInterface)
            for path in self.files.glob("*.json")
        }


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.server.close()
    assert not made.path.exists()


def test_the_socket_is_roots_alone(desk: Desk) -> None:
    assert desk.path.stat().st_mode & 0o777 == 0o600


def test_an_arrival_waits_for_its_very_interface(desk: Desk) -> None:
    desk.server.tell(InForce({"uid-1": 10}, frozenset({"uid-1"}), ""))
    asked = desk.ask("ADD", interface=ONE)
    until(lambda: desk.held() == {"uid-1": ONE}, "the file", 30)
    # The pod's sandbox of before is in force, not this one.
    early = desk.ask("CHECK", 1, interface=ONE).answer()
    assert early == {
        "ok": False,
        "error": "its policy is not in force on this node yet; the server is away",
    }
    desk.server.tell(InForce({"uid-1": 11}, frozenset({"uid-1"}), ""))
    assert asked.answer() == {"ok": True}
    assert desk.ask("CHECK", interface=ONE).answer() == {"ok": True}


def test_at_the_end_of_patience_the_reason_is_told(desk: Desk) -> None:
    desk.server.tell(InForce({}, frozenset(), "nodestates/n.json is not there"))
    assert desk.ask("ADD", 1, interface=ONE).answer()["error"] == (
        "the operator has not published this pod (UID uid-1) yet; "
        "nodestates/n.json is not there; the server is away"
    )


def test_nobody_waits_on_a_detached_node(desk: Desk) -> None:
    asked = desk.ask("ADD", interface=ONE)
    desk.server.tell(InForce({}, frozenset(), "", detached=True))
    assert asked.answer() == {"ok": True}


def test_a_question_that_is_none(desk: Desk) -> None:
    rows: list[tuple[bytes, str]] = [
        (b"\n", "does not understand"),
        (b"{}\n", "does not understand"),
        (b"\xff\n", "does not understand"),
        (b'{"command":"DEL","uid":"../x"}\n', "no pod UID"),
        (b'{"command":"DEL","uid":""}\n', "no pod UID"),
        (b"x" * (cni.MAX_LINE + 1), "longer than"),
    ]
    for bad in ({"uid": "../../etc/x"}, {"pod_mac": "x"}, {"addresses": ["10.0.0.1/24"]}):
        interface = msgspec.structs.replace(ONE, **bad)
        said = {"command": "ADD", "waitMs": 1, "interface": interface}
        rows.append((msgspec.json.encode(said) + b"\n", "does not understand"))
    for said, phrase in rows:
        answer = Asked(desk.path, said).answer()
        assert (answer["ok"], phrase in answer["error"]) == (False, True), said[:60]
    assert desk.held() == {}


def test_those_who_hang_up_are_in_nobodys_way(desk: Desk) -> None:
    for _ in range(cni.MAX_CONNECTIONS + 20):
        Asked(desk.path, b'{"command":').hang_up()
        desk.ask("ADD", interface=ONE).hang_up()
    assert desk.ask("ALIVE").answer() == {"ok": True}


def test_more_than_may_wait_at_once_wait_their_turn(desk: Desk) -> None:
    waiting = [desk.ask("ADD", interface=ONE) for _ in range(cni.MAX_CONNECTIONS)]
    later = desk.ask("ALIVE")
    desk.server.tell(InForce({"uid-1": 11}, frozenset(), ""))
    assert [asked.answer()["ok"] for asked in waiting] == [True] * cni.MAX_CONNECTIONS
    assert later.answer() == {"ok": True}


def test_a_loop_that_is_stuck_is_told(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    assert desk.ask("ALIVE").answer() == {"ok": True}
    monkeypatch.setattr(cni, "ALIVE_SECONDS", -1.0)
    assert "has been stuck" in desk.ask("ALIVE").answer()["error"]


def test_a_departure_is_remembered_until_its_file_is_gone(desk: Desk) -> None:
    desk.ask("ADD", 1, interface=ONE).answer()
    assert desk.ask("DEL", uid="uid-1").answer() == {"ok": True}
    assert (desk.server.left(), desk.pokes) == ({"uid-1"}, 1)
    desk.server.keep_left(frozenset({"uid-1"}))
    assert desk.server.left() == {"uid-1"}
    desk.server.forget(ONE)
    assert (desk.server.left(), desk.held()) == (frozenset(), {})
    desk.server.forget(ONE)  # once more is no error
    # One that never had a file is not waited for.
    desk.ask("DEL", uid="uid-2").answer()
    desk.server.keep_left(frozenset())
    assert desk.server.left() == frozenset()


def test_a_file_that_is_anothers_by_now_stays(desk: Desk) -> None:
    """The pod's next sandbox came while its last one was being forgotten."""
    desk.ask("ADD", 1, interface=ONE).answer()
    desk.ask("DEL", uid="uid-1").answer()
    again = world.interface(1, ifindex=12)
    desk.ask("ADD", 1, interface=again).answer()
    assert desk.server.left() == frozenset()
    desk.server.forget(ONE)
    assert desk.held() == {"uid-1": again}


def test_addresses_are_kept_in_canonical_form(desk: Desk) -> None:
    given = msgspec.structs.replace(ONE, addresses=["fd00:0::1", "10.0.0.1"])
    desk.ask("ADD", 1, interface=given).answer()
    assert desk.held()["uid-1"].addresses == ["10.0.0.1", "fd00::1"]
