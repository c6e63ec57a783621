"""Tidegate in the cluster behind a proxy that makes faults; its loaders and its operator alike.

The proxy runs on this machine, where the nodes' network has its gateway; its certificate is the
cluster's own authority's. Everybody stays who he is: tokens are passed on."""

from __future__ import annotations

import contextlib
import json
import ssl
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support import certificates
from support.fault_proxy import FaultProxy, proxied

from kind import cluster
from kind.run import run
from rig import api, authorities, install


@dataclass(frozen=True)
class _Server:
    """The API server as this machine reaches it, and nobody's credentials."""

    port: int
    pem: str

    @property
    def access(self) -> _Server:
        return self

    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cadata=self.pem)


@contextlib.contextmanager
def behind(seed: int) -> Iterator[FaultProxy]:
    """While in it, all of Tidegate asks by way of the proxy, which makes no faults at first."""
    gateway = _gateway()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as directory:
        authority = authorities.of_cluster(Path(directory))
        names = f"subjectAltName=IP:{gateway}\nextendedKeyUsage=serverAuth\n"
        tls.load_cert_chain(*certificates.issue(authority, "proxy", "/CN=tidegate-proxy", names))
        upstream = _Server(cluster.server_port(), authority.read_text())
    with proxied(upstream, seed, gateway, tls) as proxy:
        try:
            _lead(proxy.url)
            yield proxy
        finally:
            proxy.rate = 0.0
            _lead("")


def _gateway() -> str:
    found = json.loads(run("docker", "network", "inspect", "kind"))[0]["IPAM"]["Config"]
    return next(str(c["Gateway"]) for c in found if ":" not in c["Gateway"])


def _lead(server: str) -> None:
    """Has Tidegate ask this server; "": as the nodes' kubelets do."""
    change = {"data": {"apiServer": server}}
    api.patch("configmaps", "tidegate-config", install.NAMESPACE, change)
    install.restart()
