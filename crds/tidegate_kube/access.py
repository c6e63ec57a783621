"""How to reach an API server and who we are there: read again whenever a file of it changes.

A mounted service account's token lives about an hour and its CA may be rotated: whoever
keeps what was read at the start is locked out. May not live here: requests.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where the kubelet mounts a pod's service account."""

Source = bytes | Path
"""Content, or the file it is read from, each time that file changed."""

Stamp = tuple[int, int, int] | None
"""Of a file: time, size, inode. None: not a file, or not there."""


class AccessError(Exception):
    """How to reach the API server is not known, or a file of it is missing or unusable."""


@dataclass(frozen=True)
class Access:
    """`server` is a URL, https://host:port. A client certificate is PEM, key and chain.

    `server_name` is the name in the server's certificate when it is not the URL's host."""

    server: str
    ca: Source | None = None
    token: Source | None = None
    certificate: tuple[Source, Source] | None = None
    """(chain, key)"""
    server_name: str = ""
    verify: bool = True
    """False only if a kubeconfig says insecure-skip-tls-verify."""

    def authorization(self) -> str:
        """The header's value, "" when there is no token. AccessError: cannot be read."""
        if self.token is None:
            return ""
        token = read(self.token).strip()
        if not token:
            raise AccessError(f"{_name(self.token)} holds no token")
        return f"Bearer {token.decode('ascii', 'strict')}"

    def tls(self) -> ssl.SSLContext:
        """A new context of what the files hold now. AccessError: they cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif self.ca is None:
            context.load_default_certs()
        else:
            try:
                context.load_verify_locations(cadata=read(self.ca).decode("ascii"))
            except (ssl.SSLError, ValueError) as error:
                raise AccessError(f"{_name(self.ca)} is no PEM certificate: {error}") from error
        if self.certificate is not None:
            _load_certificate(context, *self.certificate)
        return context

    def stamps(self) -> tuple[Stamp, ...]:
        """Differ from earlier ones when `tls` would give another context."""
        return tuple(stamp(source) for source in (self.ca, *(self.certificate or ())))


def in_cluster(server: str | None = None, mount: Path = SERVICE_ACCOUNT) -> Access:
    """As a pod: its service account, and the address from the environment unless `server`
    says another (as it must while nobody serves ClusterIPs). AccessError: not in a pod."""
    if not server:
        host, port = (os.environ.get(f"KUBERNETES_SERVICE_{part}") for part in ("HOST", "PORT"))
        if not host or not port:
            raise AccessError(
                "KUBERNETES_SERVICE_HOST and _PORT are not set: not in a pod, or name the server"
            )
        server = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    for name in ("token", "ca.crt"):
        if not (mount / name).exists():
            raise AccessError(f"{mount / name} is not there: is a service account mounted?")
    return Access(server=server, ca=mount / "ca.crt", token=mount / "token")


def read(source: Source) -> bytes:
    """AccessError: the file cannot be read."""
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except OSError as error:
        raise AccessError(f"cannot read {source}: {error.strerror}") from error


def stamp(source: Source | None) -> Stamp:
    """Changes when the file does; follows links, as the kubelet swaps those."""
    if not isinstance(source, Path):
        return None
    try:
        info = os.stat(source)
    except OSError:
        return None
    return (info.st_mtime_ns, info.st_size, info.st_ino)


def _load_certificate(context: ssl.SSLContext, chain: Source, key: Source) -> None:
    # ssl takes only paths; a memory file leaves no key on a disk.
    fd = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(read(chain) + b"\n" + read(key))
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    except ssl.SSLError as error:
        raise AccessError(f"{_name(chain)} and {_name(key)} do not fit: {error}") from error
    finally:
        os.close(fd)


def _name(source: Source) -> str:
    return str(source) if isinstance(source, Path) else "the given content"
