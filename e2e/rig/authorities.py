"""The cluster's certificate authority, and another in its place."""

from __future__ import annotations

import re
import ssl
import subprocess
from pathlib import Path

from support import certificates

from kind import cluster
from rig import pods

PKI = "/etc/kubernetes/pki"
SECONDS = 60.0


def of_cluster(directory: Path) -> Path:
    """The authority's certificate, copied to `directory` with its key beside it."""
    for name in ("ca.crt", "ca.key"):
        (directory / name).write_text(
            cluster.inside(cluster.control_plane(), "cat", f"{PKI}/{name}")
        )
    return directory / "ca.crt"


class Served:
    """What the API server shows of itself, from another authority until `close`."""

    def __init__(self, directory: Path) -> None:
        """`directory`: an empty one of the caller's."""
        self._node = cluster.control_plane()
        self._before = {name: self._read(name) for name in ("apiserver.crt", "apiserver.key")}
        self._directory = directory
        self.authority = certificates.make_authority(directory, "another")

    def change(self) -> None:
        """Waits until the server shows the other one's certificate."""
        found = certificates.issue(
            self.authority, "apiserver", "/CN=kube-apiserver", f"subjectAltName={self._names()}\n"
        )
        new = dict(zip(self._before, (path.read_text() for path in found), strict=True))
        self._replace(new)
        pods.eventually(self._is_shown, "the server has another certificate", SECONDS)

    def close(self) -> None:
        self._replace(self._before)
        pods.eventually(cluster.is_up, "the server has its own certificate again", SECONDS)

    def _is_shown(self) -> bool:
        try:
            ssl.get_server_certificate(
                ("127.0.0.1", cluster.server_port()), ca_certs=str(self.authority), timeout=2.0
            )
        except (OSError, ssl.SSLError):
            return False
        return True

    def _names(self) -> str:
        """Of the certificate before, as an extension says them."""
        command = ["openssl", "x509", "-noout", "-ext", "subjectAltName"]
        text = subprocess.run(
            command, input=self._before["apiserver.crt"], capture_output=True, text=True, check=True
        ).stdout
        return ",".join(
            f"{'IP' if kind == 'IP Address' else 'DNS'}:{name}"
            for kind, name in re.findall(r"(DNS|IP Address):([^,\s]+)", text)
        )

    def _read(self, name: str) -> str:
        return cluster.inside(self._node, "cat", f"{PKI}/{name}")

    def _replace(self, files: dict[str, str]) -> None:
        for name, text in files.items():
            cluster.inside(self._node, "cp", "/dev/stdin", f"{PKI}/{name}", stdin=text)
        pods.signal(self._node, "kube-apiserver", "KILL")
