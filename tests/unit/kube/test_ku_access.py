"""Access: what it is read from, that it is read again, and what is said when it cannot be."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import certificates
from tidegate_kube import (
    Access,
    AccessError,
    Client,
    Unreachable,
    in_cluster,
    resources,
    server_address,
)
from tidegate_kube.kubeconfig import from_kubeconfig


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    directory = tmp_path / "serviceaccount"
    directory.mkdir()
    (directory / "token").write_text("first\n")
    (directory / "ca.crt").write_text("")
    return directory


@pytest.mark.parametrize(
    ("host", "server", "expected"),
    [
        ("10.96.0.1", None, "https://10.96.0.1:443"),
        ("fd00::1", None, "https://[fd00::1]:443"),
        ("10.96.0.1", "https://192.0.2.7:6443", "https://192.0.2.7:6443"),
        ("10.96.0.1", "", "https://10.96.0.1:443"),
    ],
)
def test_in_cluster(
    mount: Path, monkeypatch: pytest.MonkeyPatch, host: str, server: str | None, expected: str
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    access = in_cluster(server, mount)
    assert (access.server, access.authorization()) == (expected, "Bearer first")


def test_a_token_is_read_again(mount: Path) -> None:
    access = in_cluster("https://192.0.2.7:6443", mount)
    (mount / "token").write_text("second")
    assert access.authorization() == "Bearer second"
    (mount / "token").unlink()
    with pytest.raises(AccessError, match=r"cannot read .*token"):
        access.authorization()
    (mount / "token").write_text(" \n")
    with pytest.raises(AccessError, match="holds no token"):
        access.authorization()


def test_not_in_a_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(AccessError, match="name the server"):
        in_cluster(mount=tmp_path)
    with pytest.raises(AccessError, match="token is not there"):
        in_cluster("https://192.0.2.7:6443", tmp_path)


def test_stamps_follow_the_links_that_a_kubelet_swaps(tmp_path: Path) -> None:
    for number in ("1", "2"):
        (tmp_path / number).mkdir()
        (tmp_path / number / "ca.crt").write_text("")
    (tmp_path / "data").symlink_to("1")
    access = Access("https://192.0.2.7", ca=tmp_path / "data" / "ca.crt")
    before = access.stamps()
    assert access.stamps() == before
    (tmp_path / "new").symlink_to("2")
    (tmp_path / "new").rename(tmp_path / "data")
    assert access.stamps() != before


def test_unusable_certificates(tmp_path: Path) -> None:
    authority = certificates.make_authority(tmp_path, "ca")
    chain, _ = certificates.issue_client(authority, "one", "system:masters")
    _, other = certificates.issue_client(authority, "two", "system:masters")
    with pytest.raises(AccessError, match="do not fit"):
        Access("https://192.0.2.7", certificate=(chain, other)).tls()
    with pytest.raises(AccessError, match="no PEM certificate"):
        Access("https://192.0.2.7", ca=b"nonsense").tls()
    broken = tmp_path / "broken.crt"
    broken.write_text("nonsense")
    client = Client(Access("https://127.0.0.1:1", ca=broken))
    with pytest.raises(Unreachable, match=r"broken\.crt is no PEM certificate"):
        client.get(resources.NODES, "n")


@pytest.mark.parametrize("server", ["", "192.0.2.7:6443", "ftp://192.0.2.7", "https://h/prefix"])
def test_no_server(server: str) -> None:
    with pytest.raises(AccessError, match="not the address of an API server"):
        Client(Access(server))


# ---- kubeconfig ------------------------------------------------------------------------


def _config(tmp_path: Path, user: dict[str, Any], **cluster: Any) -> Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": "https://192.0.2.7:6443", **cluster}}],
        "users": [{"name": "u", "user": user}],
    }
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(config))
    return path


def _data(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_kubeconfig_with_data(tmp_path: Path) -> None:
    user = {"client-certificate-data": _data(b"chain"), "client-key-data": _data(b"key")}
    path = _config(tmp_path, user, **{"certificate-authority-data": _data(b"ca")})
    assert from_kubeconfig(path) == Access(
        "https://192.0.2.7:6443", ca=b"ca", certificate=(b"chain", b"key")
    )


def test_kubeconfig_with_files(tmp_path: Path) -> None:
    user = {"tokenFile": "sub/token", "token": "old"}
    more = {"certificate-authority": "/etc/ca.crt", "tls-server-name": "kubernetes"}
    assert from_kubeconfig(_config(tmp_path, user, **more)) == Access(
        "https://192.0.2.7:6443",
        ca=Path("/etc/ca.crt"),
        token=tmp_path / "sub/token",
        server_name="kubernetes",
    )
    access = from_kubeconfig(
        _config(tmp_path, {"token": "t"}, **{"insecure-skip-tls-verify": True})
    )
    assert (access.authorization(), access.verify) == ("Bearer t", False)


@pytest.mark.parametrize(
    ("user", "said"),
    [
        ({"exec": {"command": "x"}}, "authenticates by exec"),
        ({"username": "a", "password": "b"}, "authenticates by username"),
        ({"client-certificate-data": "YQ=="}, "go together"),
        ({"client-certificate-data": "?", "client-key-data": "YQ=="}, "not base64"),
    ],
)
def test_kubeconfig_not_supported(tmp_path: Path, user: dict[str, Any], said: str) -> None:
    with pytest.raises(AccessError, match=said):
        from_kubeconfig(_config(tmp_path, user))


def test_kubeconfig_that_leads_nowhere(tmp_path: Path) -> None:
    path = _config(tmp_path, {})
    with pytest.raises(AccessError, match="no context is called 'other'"):
        from_kubeconfig(path, "other")
    path.write_text("current-context: c\ncontexts: [{name: c, context: {cluster: gone}}]")
    with pytest.raises(AccessError, match="no cluster is called 'gone'"):
        from_kubeconfig(path)
    for text, said in (("[", "is not YAML"), ("[]", "is no kubeconfig"), ("{}", "name a context")):
        path.write_text(text)
        with pytest.raises(AccessError, match=said):
            from_kubeconfig(path)
    path.unlink()
    with pytest.raises(AccessError, match="cannot read"):
        from_kubeconfig(path)


# ---- tidegate-server-address -----------------------------------------------------------


def _run(tmp_path: Path, config: Path, *more: str) -> tuple[int, str]:
    target = tmp_path / "run" / "server"
    code = server_address.main(["--kubelet-config", str(config), "--target", str(target), *more])
    return code, target.read_text() if target.exists() else ""


def test_the_kubelets_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIDEGATE_APISERVER", raising=False)
    # Its credentials are not looked at, so they may be of any kind.
    config = _config(tmp_path, {"exec": {"command": "x"}})
    assert _run(tmp_path, config) == (0, "https://192.0.2.7:6443\n")


def test_the_given_server_comes_first(tmp_path: Path) -> None:
    config = tmp_path / "not-there"
    given = _run(tmp_path, config, "--server", "https://k8s.example:6443/")
    assert given == (0, "https://k8s.example:6443\n")


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ("", "cannot read"),
        ("http://192.0.2.7", "not the address"),
        ("192.0.2.7:6443", "not the address"),
        ("https://192.0.2.7:70000", "not the address"),
        ("https://user@192.0.2.7", "not the address"),
    ],
)
def test_no_usable_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], server: str, said: str
) -> None:
    assert _run(tmp_path, tmp_path / "not-there", "--server", server) == (1, "")
    message = capsys.readouterr().err
    assert said in message
    assert "apiServer in the ConfigMap tidegate-config" in message
