"""Certificates for what is served beyond this machine, and for asking it: both sides show one.

A directory as Kubernetes mounts a Secret of type kubernetes.io/tls: tls.crt and tls.key are one's
own, ca.crt is whose certificates the other side has to have. Read again for every connection, so
new ones are in use without a restart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import grpc
import structlog

OBSERVER_NAME = "observer.tidegate.dev"
"""The name in the certificate of every node's observer: what a node is called says the API server,
and an observer's certificate is the same on all of them."""

log = structlog.get_logger()
Pem = tuple[bytes, bytes, bytes]
"""(key, chain, authorities)"""


class Certificates:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._served: Pem | None = None

    def read(self) -> Pem:
        """OSError: a file is missing."""
        key, chain, authorities = (
            (self.directory / name).read_bytes() for name in ("tls.key", "tls.crt", "ca.crt")
        )
        return key, chain, authorities

    @property
    def present(self) -> bool:
        return all((self.directory / name).is_file() for name in ("tls.key", "tls.crt", "ca.crt"))

    def for_server(self) -> grpc.ServerCredentials:
        """Clients must show a certificate, too. OSError: a file is missing."""
        self._served = self.read()
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._served),
            self._renewed,  # type: ignore[arg-type]  # None is allowed; the stubs do not say so
            require_client_authentication=True,
        )

    def for_client(self) -> grpc.ChannelCredentials:
        """Of what the files hold now. OSError: one is missing."""
        key, chain, authorities = self.read()
        return grpc.ssl_channel_credentials(authorities, key, chain)

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Asked for every connection; None: as before."""
        found = None
        # Between two certificates a file may be missing: what is in use stays.
        with contextlib.suppress(OSError):
            found = self.read()
        if found is None or found == self._served:
            return None
        log.info("certificate renewed", directory=str(self.directory))
        self._served = found
        return _configuration(found)


class ClientCredentials(Protocol):
    """What `client.Client` asks with."""

    def for_client(self) -> grpc.ChannelCredentials:
        """OSError: a file is missing."""


class ClientFiles:
    """Of files that people name one by one."""

    def __init__(self, authorities: Sequence[Path], chain: Path | None, key: Path | None) -> None:
        """`authorities`: none are gRPC's own. `chain`, `key`: None shows nothing."""
        self._authorities = authorities
        self._chain = chain
        self._key = key

    def for_client(self) -> grpc.ChannelCredentials:
        """OSError: a file is missing."""
        trusted = b"".join(path.read_bytes() for path in self._authorities) or None
        files = (self._chain, self._key)
        chain, key = (path.read_bytes() if path else None for path in files)
        return grpc.ssl_channel_credentials(trusted, key, chain)


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    key, chain, authorities = pem
    return grpc.ssl_server_certificate_configuration([(key, chain)], authorities)
