"""Access from a kubeconfig. Never imported by the loader: it needs YAML."""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import Any

import yaml

from tidegate_kube.access import Access, AccessError, Source


def default_path() -> Path:
    """$KUBECONFIG (its first file) or ~/.kube/config."""
    named = os.environ.get("KUBECONFIG", "").split(os.pathsep)[0]
    return Path(named) if named else Path.home() / ".kube" / "config"


def from_kubeconfig(path: Path | str, context: str | None = None) -> Access:
    """The access of `context`, else of the current context. Files are relative to the
    kubeconfig's directory. AccessError: unreadable, a name leads nowhere, or the user
    authenticates in a way that is not supported here (exec plug-ins, passwords)."""
    path = Path(path)
    config = _load(path)
    chosen, entry = _context(path, config, context)
    cluster = _named(path, config, "clusters", "cluster", str(entry.get("cluster", "")))
    user = _named(path, config, "users", "user", str(entry.get("user", "")))
    for unsupported in ("exec", "auth-provider", "username"):
        if user.get(unsupported):
            raise AccessError(
                f"{path}: the user of context {chosen} authenticates by {unsupported}, "
                "which is not supported here: use a token or a client certificate"
            )
    return Access(
        server=_server(path, cluster),
        ca=_source(path, cluster, "certificate-authority"),
        token=_token(path, user),
        certificate=_certificate(path, user),
        server_name=str(cluster.get("tls-server-name") or ""),
        verify=not cluster.get("insecure-skip-tls-verify", False),
    )


def server_of(path: Path) -> str:
    """Only the address that the current context names. AccessError as above."""
    config = _load(path)
    _, entry = _context(path, config, None)
    return _server(path, _named(path, config, "clusters", "cluster", str(entry.get("cluster", ""))))


def _server(path: Path, cluster: dict[str, Any]) -> str:
    if not cluster.get("server"):
        raise AccessError(f"{path}: the cluster has no server")
    return str(cluster["server"])


def _context(path: Path, config: dict[str, Any], name: str | None) -> tuple[str, dict[str, Any]]:
    chosen = name or config.get("current-context")
    if not chosen:
        raise AccessError(f"{path} has no current-context: name a context")
    return str(chosen), _named(path, config, "contexts", "context", str(chosen))


def _load(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise AccessError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise AccessError(f"{path} is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise AccessError(f"{path} is no kubeconfig")
    return config


def _named(path: Path, config: dict[str, Any], group: str, key: str, name: str) -> dict[str, Any]:
    """The `key` of the entry called `name` in the list `group`."""
    for entry in config.get(group) or []:
        if isinstance(entry, dict) and entry.get("name") == name:
            found = entry.get(key) or {}
            if isinstance(found, dict):
                return found
    raise AccessError(f"{path}: no {key} is called {name!r}")


def _source(path: Path, entry: dict[str, Any], key: str) -> Source | None:
    """`<key>-data` in base64, else the file that `<key>` names."""
    data, file = entry.get(f"{key}-data"), entry.get(key)
    if data:
        try:
            return base64.b64decode(str(data), validate=True)
        except binascii.Error as error:
            raise AccessError(f"{path}: {key}-data is not base64") from error
    return path.parent / str(file) if file else None


def _token(path: Path, user: dict[str, Any]) -> Source | None:
    # As in client-go, the file wins: the token beside it is what it held once.
    if user.get("tokenFile"):
        return path.parent / str(user["tokenFile"])
    return str(user["token"]).encode() if user.get("token") else None


def _certificate(path: Path, user: dict[str, Any]) -> tuple[Source, Source] | None:
    chain, key = (_source(path, user, f"client-{part}") for part in ("certificate", "key"))
    if (chain is None) != (key is None):
        raise AccessError(f"{path}: client-certificate and client-key go together")
    return (chain, key) if chain is not None and key is not None else None
