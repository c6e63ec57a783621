"""Who may ask an observer over the network: who has a certificate of the right authority."""

from __future__ import annotations

import functools
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import certificates, waiting
from tidegate_observer import peers
from tidegate_observer.api import observer_pb2
from tidegate_observer.client import Client, ObserverError
from tidegate_observer.history import History
from tidegate_observer.main import Door, parser
from tidegate_observer.peers import PeerService
from tidegate_observer.relay import RelayService
from tidegate_observer.server import About, ObserverService, Server
from tidegate_observer.tls import OBSERVER_NAME, Certificates
from unit.observer.flows import flow

until = functools.partial(waiting.until, seconds=30.0)


@dataclass
class Authorities:
    """As the chart makes them: one for who serves, one for who asks."""

    directory: Path
    serving: Path
    asking: Path

    def issue(self, name: str, by: Path, trust: Path, use: str, names: str = OBSERVER_NAME) -> Path:
        """A mounted Secret."""
        found = self.directory / name
        shutil.rmtree(found, ignore_errors=True)
        extensions = f"subjectAltName=DNS:{names}\nextendedKeyUsage={use}\n"
        chain, key = certificates.issue(by, f"{name}-leaf", f"/CN={name}", extensions)
        found.mkdir()
        shutil.copy(chain, found / "tls.crt")
        shutil.copy(key, found / "tls.key")
        shutil.copy(trust, found / "ca.crt")
        return found

    def observer(self, name: str = "observer") -> Path:
        return self.issue(name, self.serving, self.asking, "serverAuth")

    def relay(self, name: str = "relay") -> Path:
        return self.issue(name, self.asking, self.serving, "clientAuth", "relay")


@pytest.fixture
def authorities(tmp_path: Path) -> Authorities:
    made = (certificates.make_authority(tmp_path, name) for name in ("serving", "asking"))
    return Authorities(tmp_path, *made)


@pytest.fixture
def service() -> Iterator[ObserverService]:
    history = History(10)
    history.extend([flow()])
    yield ObserverService(history, About(("n1",), "t"))
    history.close()


def free() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def ask(address: str, shown: Path | None, name: str = OBSERVER_NAME) -> int:
    """How many flows are told. ObserverError."""
    with Client(address, Certificates(shown) if shown else None, name) as client:
        client.wait_ready(2.0)
        request = observer_pb2.GetFlowsRequest(number=10)
        return sum(answer.HasField("flow") for answer in client.flows(request))


def test_only_who_has_a_certificate_of_that_authority_may_ask(
    authorities: Authorities, service: ObserverService
) -> None:
    address = free()
    observer = authorities.observer()
    with Server(service, [address], Certificates(observer)):
        assert ask(address, authorities.relay()) == 1
        a = authorities
        refused = {
            "plain": None,
            "another node's observer": observer,
            "a server's certificate": a.issue("wrong", a.asking, a.serving, "serverAuth"),
            "its own authority": a.issue("other", a.serving, a.serving, "clientAuth"),
        }
        for reason, shown in refused.items():
            with pytest.raises(ObserverError):
                print(reason, ask(address, shown))
        # And who asks believes nobody else.
        with pytest.raises(ObserverError):
            ask(address, authorities.relay(), "another.name")
        with pytest.raises(ObserverError):
            ask(address, a.issue("doubts", a.asking, a.asking, "clientAuth"))
        assert ask(address, authorities.relay()) == 1


def test_without_certificates_nothing_is_served_but_a_unix_socket(
    tmp_path: Path, service: ObserverService, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OSError, match="with certificates only"):
        Server(service, ["127.0.0.1:0"])
    argv = ["--node=n=/p", "--run-dir=/r", "--objects=/o", "--socket=/s", "--listen=:4244"]
    assert parser().parse_args(argv).tls is None
    from tidegate_observer import main  # noqa: PLC0415

    with pytest.raises(SystemExit):
        main.main(argv)
    assert "--listen needs --tls" in capsys.readouterr().err


def test_the_door_opens_when_there_are_certificates_and_takes_new_ones(
    authorities: Authorities, service: ObserverService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate_observer.main.LOOK_SECONDS", 0.0)
    address, mounted = free(), authorities.directory / "mounted"
    relay = authorities.relay()
    with Door(service, address, mounted) as door:
        door.tend()
        with pytest.raises(ObserverError):
            ask(address, relay)
        # Half of a Secret is none, and no file of it stops anything.
        mounted.mkdir()
        (mounted / "tls.crt").write_text("nothing")
        door.tend()
        shutil.rmtree(mounted)
        shutil.copytree(authorities.observer(), mounted)
        door.tend()
        assert ask(address, relay) == 1
        # All is made anew, the authorities too: the old ones count no more.
        authorities.serving = certificates.make_authority(authorities.directory, "serving2")
        authorities.asking = certificates.make_authority(authorities.directory, "asking2")
        renewed = authorities.relay("relay2")
        with pytest.raises(ObserverError):
            ask(address, renewed)
        fresh = authorities.observer("observer2")
        for name in ("tls.key", "tls.crt", "ca.crt"):
            shutil.copy(fresh / name, mounted / name)
        assert ask(address, renewed) == 1
        with pytest.raises(ObserverError):
            ask(address, relay)


def test_a_relay_learns_of_observers_from_any_of_them(
    authorities: Authorities, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "SETTLED_SECONDS", 0.2)
    monkeypatch.setattr(peers, "RETRY_SECONDS", 0.1)
    address, history = free(), History(10)
    known = {"n1": address, "n2": "127.0.0.1:1"}
    about = About(("n1",), "t", peers=lambda: dict(known), secure=True)
    shown, guard = Certificates(authorities.relay()), Certificates(authorities.observer())

    def connect(where: str) -> Client:
        return Client(where, shown, OBSERVER_NAME)

    found = PeerService(address, connect)
    found.start()
    assert dict(found()) == {}
    with Server(ObserverService(history, about), [address], guard):
        until(lambda: dict(found()) == known, "both are known")
        status = RelayService(found, "t", connect)._ask(Client.status)
        assert {name: answer is not None for name, answer in status.items()} == {
            "n1": True,
            "n2": False,
        }
        known["n3"] = "127.0.0.1:2"
        until(lambda: "n3" in found(), "one more is known")
        del known["n2"]
        until(lambda: "n2" not in found(), "one less")
    # Nobody answers: that takes nobody away. One that went meanwhile is forgotten then.
    assert set(found()) == {"n1", "n3"}
    del known["n3"]
    history.close()
    history = History(10)
    gone = threading.Event()
    with Server(ObserverService(history, about), [address], guard):
        until(lambda: set(found()) == {"n1"} or gone.is_set(), "who went is forgotten")
        history.close()
    found.close()
