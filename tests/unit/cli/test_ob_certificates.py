"""`tidegate observe --server` over the network, with the flags that `hubble` has for it."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import certificates
from tidegate_cli.main import main
from tidegate_observer.history import History
from tidegate_observer.server import About, ObserverService, Server
from tidegate_observer.tls import Certificates
from unit.observer.flows import flow


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Where, and the directory of the files."""
    tmp_path = tmp_path_factory.mktemp("certificates")
    serving, asking = (certificates.make_authority(tmp_path, name) for name in ("a", "b"))
    chain, key = certificates.issue_server(serving, "relay")
    certificates.issue_client(asking, "me", "people")
    mounted = tmp_path / "tls"
    mounted.mkdir()
    for source, name in ((chain, "tls.crt"), (key, "tls.key"), (asking, "ca.crt")):
        shutil.copy(source, mounted / name)
    history = History(4)
    history.extend([flow()])
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    service = ObserverService(history, About(("node-1",), "t"))
    with Server(service, [f"127.0.0.1:{port}"], Certificates(mounted)):
        yield f"127.0.0.1:{port}", tmp_path
        history.close()


@pytest.fixture
def address(served: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(served[1])
    return served[0]


AUTHORITY, OWN = "--tls-ca-cert-files=a.crt", "--tls-client-cert-file=me.crt"
REFUSED = "tidegate: "
"""By whom, and when, is gRPC's affair."""
ALL = [AUTHORITY, OWN, "--tls-client-key-file=me.key"]


@pytest.mark.parametrize(
    ("reason", "server", "words", "said"),
    [
        ("the scheme", "tls://{}", ALL, ""),
        ("the flag", "{}", ["--tls", *ALL], ""),
        ("files without either", "{}", ALL, ""),
        ("one of several authorities", "{}", ["--tls-ca-cert-files=b.crt,a.crt", *ALL[1:]], ""),
        ("another name of its", "{}", [*ALL, "--tls-server-name=kubernetes"], ""),
        ("not its name", "{}", [*ALL, "--tls-server-name=other"], REFUSED),
        ("plain text", "{}", [], REFUSED),
        ("nothing shown", "tls://{}", [AUTHORITY], REFUSED),
        ("an authority of another", "{}", ["--tls-ca-cert-files=b.crt", *ALL[1:]], REFUSED),
        ("half of it", "{}", [AUTHORITY, OWN], "go together"),
        ("no such file", "{}", ["--tls-ca-cert-files=none.crt"], "none.crt"),
        ("a Unix socket", "unix:///s", ALL, "HOST:PORT only"),
        ("no server", "", ["--tls"], "HOST:PORT only"),
    ],
)
def test_who_may_ask(
    address: str,
    capsys: pytest.CaptureFixture[str],
    reason: str,
    server: str,
    words: list[str],
    said: str,
) -> None:
    code = main(["observe", "-o", "compact", f"--server={server.format(address)}", *words])
    shown, told = capsys.readouterr()
    assert (code, "shop/web-1" in shown) == ((2, False) if said else (0, True)), told
    assert said in told


def test_who_is_there_and_refuses_is_not_asked_whether_it_runs(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["observe", f"--server=tls://{address}", *ALL]
    assert main([*words, "--protocol=tpc"]) == 2
    refused = capsys.readouterr().err
    assert "invalid argument: unknown protocol 'tpc'" in refused
    assert "running" not in refused
    assert main(["observe", "--server=unix:///nowhere"]) == 2
    assert "is the observer running?" in capsys.readouterr().err
