"""A real API server on loopback: etcd and kube-apiserver, RBAC on, no controllers.

The fixture `apiserver` is for everybody and lives as long as the test session: leave nothing
in it that others would trip over. Whoever kills or restarts one starts an own one.
Nothing makes service accounts, endpoints or namespaces' finalizers go: there are no controllers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import yaml
from support import certificates
from support.waiting import until
from tidegate_kube import Access, Client, KubeError, Resource, resources

KUBERNETES = "v1.36.3"
_CACHE = Path(os.environ.get("TIDEGATE_CACHE") or Path.home() / ".cache" / "tidegate")
BINARIES = _CACHE / f"k8s-{KUBERNETES}" / "bin"
READY_SECONDS = 240.0
WITH_US = ("setpriv", "--pdeathsig", "KILL")
"""Before a command: it ends when the test run does, also when that is killed."""
CRDS = Path(__file__).parents[2] / "crds"


def binary(name: str) -> Path:
    """Skips where it is not built."""
    path = BINARIES / name
    if not path.exists():
        pytest.skip(f"{name} of Kubernetes {KUBERNETES} is not built: run `make kube-binaries`")
    return path


@contextlib.contextmanager
def running(directory: Path, *flags: str) -> Iterator[ApiServer]:
    """One of your own; `flags` are kube-apiserver's. Logs stay in `directory`."""
    server = ApiServer(directory, flags)
    try:
        server.start_etcd()
        server.start()
        yield server
    finally:
        server.stop()


class ApiServer:
    """The two processes, and ways to speak to them."""

    def __init__(self, directory: Path, flags: tuple[str, ...] = ()) -> None:
        self.directory = directory
        self._flags = flags
        self._etcd_binary, self._binary = binary("etcd"), binary("kube-apiserver")
        self._etcd: subprocess.Popen[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._etcd_port, self._peer_port, self.port = free_ports(3)
        self.ca = certificates.make_authority(directory, "ca")
        self._serving = certificates.issue_server(self.ca, "server")
        self._client_ca = certificates.make_authority(directory, "client-ca")
        self._accounts = certificates.make_key(directory / "accounts.key")
        chain, key = certificates.issue_client(self._client_ca, "admin", "system:masters")
        self.access = Access(server=self.url, ca=self.ca, certificate=(chain, key))
        """As an administrator."""

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def etcd_url(self) -> str:
        return f"http://127.0.0.1:{self._etcd_port}"

    def client(self, access: Access | None = None) -> Client:
        return Client(access or self.access, "tidegate-test")

    # ---- life ----

    def start_etcd(self) -> None:
        url, peer = self.etcd_url, f"http://127.0.0.1:{self._peer_port}"
        self._etcd = self._spawn(
            "etcd",
            [
                str(self._etcd_binary),
                f"--data-dir={self.directory / 'etcd'}",
                f"--listen-client-urls={url}",
                f"--advertise-client-urls={url}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster=default={peer}",
                "--unsafe-no-fsync=true",
                "--log-level=warn",
            ],
        )

    def start(self) -> None:
        """kube-apiserver, and waits until it is ready."""
        certificate, key = self._serving
        self._process = self._spawn(
            "kube-apiserver",
            [
                str(self._binary),
                f"--etcd-servers={self.etcd_url}",
                "--bind-address=127.0.0.1",
                f"--secure-port={self.port}",
                f"--tls-cert-file={certificate}",
                f"--tls-private-key-file={key}",
                f"--client-ca-file={self._client_ca}",
                f"--service-account-key-file={self._accounts}",
                f"--service-account-signing-key-file={self._accounts}",
                "--service-account-issuer=https://kubernetes.default.svc",
                "--authorization-mode=Node,RBAC",
                "--service-cluster-ip-range=10.96.0.0/16",
                "--endpoint-reconciler-type=none",
                # Without controllers no namespace gets its default service account.
                "--disable-admission-plugins=ServiceAccount",
                "--allow-privileged=true",
                "--profiling=false",
                *self._flags,
            ],
        )
        self._await_ready()

    def kill(self) -> None:
        """SIGKILL to kube-apiserver; etcd goes on."""
        _end(self._process, signal.SIGKILL)
        self._process = None

    def terminate(self) -> None:
        """SIGTERM to kube-apiserver, which ends its watches in good order."""
        _end(self._process, signal.SIGTERM)
        self._process = None

    def pause_etcd(self) -> None:
        assert self._etcd is not None
        self._etcd.send_signal(signal.SIGSTOP)

    def resume_etcd(self) -> None:
        assert self._etcd is not None
        self._etcd.send_signal(signal.SIGCONT)

    def change_ca(self) -> Path:
        """From the next start it serves under another CA, whose certificate is returned."""
        fresh = certificates.make_authority(self.directory, "ca2")
        self._serving = certificates.issue_server(fresh, "server2")
        return fresh

    def stop(self) -> None:
        # Neither has anything worth an orderly end.
        _end(self._process, signal.SIGKILL)
        _end(self._etcd, signal.SIGKILL)

    def _spawn(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with open(self.directory / f"{name}.log", "ab") as log:
            return subprocess.Popen(
                [*WITH_US, *command], stdout=log, stderr=log, start_new_session=True
            )

    def _await_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        with contextlib.closing(self.client()) as client:
            while not _ready(client):
                for name, process in (("etcd", self._etcd), ("kube-apiserver", self._process)):
                    assert process is not None
                    assert process.poll() is None, f"{name} ended:\n{self._tail(name)}"
                assert time.monotonic() < deadline, f"never ready:\n{self._tail('kube-apiserver')}"
                time.sleep(0.05)

    def _tail(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text(errors="replace")[-3000:]

    # ---- who speaks to it ----

    def token(self, account: str, namespace: str = "default", seconds: int = 3600) -> str:
        """A service account's, which is made if it is not there. RBAC decides what it may."""
        client = self.client()
        body = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account}}
        create(client, resources.SERVICE_ACCOUNTS, body, namespace)
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": seconds},
        }
        answer = client.create(
            resources.SERVICE_ACCOUNTS,
            msgspec.json.encode(request),
            namespace,
            name=account,
            subresource="token",
        )
        client.close()
        return str(msgspec.json.decode(answer)["status"]["token"])

    def account(self, account: str, namespace: str = "default") -> Access:
        """Access as that service account."""
        return Access(server=self.url, ca=self.ca, token=self.token(account, namespace).encode())

    def kubeconfig(self, path: Path) -> Path:
        """The administrator's, for programs that read one."""
        assert self.access.certificate is not None
        chain, key = self.access.certificate
        cluster = {"server": self.url, "certificate-authority": str(self.ca)}
        user = {"client-certificate": str(chain), "client-key": str(key)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "admin", "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
            "current-context": "test",
        }
        path.write_text(json.dumps(config))
        return path


def create(client: Client, resource: Resource, body: object, namespace: str = "") -> bytes:
    """Creates it, or returns what is there under its name."""
    data = msgspec.json.encode(body)
    try:
        return client.create(resource, data, namespace)
    except KubeError as error:
        if error.reason != "AlreadyExists":
            raise
    name = msgspec.json.decode(data)["metadata"]["name"]
    return client.get(resource, name, namespace)


def install_crds(client: Client, names: str = "*") -> None:
    """Those of crds/ whose file names match, again if they are there; returns once served."""
    for path in sorted(CRDS.glob(f"tidegate.dev_{names}.yaml")):
        crd = yaml.safe_load(path.read_bytes())
        name = crd["metadata"]["name"]
        client.patch(
            resources.CRDS,
            name,
            msgspec.json.encode(crd),
            kind="apply",
            field_manager="test",
            force=True,
        )
        spec = crd["spec"]
        served = Resource(spec["group"], "v1alpha1", spec["names"]["plural"], "", False)
        until(lambda served=served: _served(client, served), f"{name} is served", READY_SECONDS)


def _served(client: Client, resource: Resource) -> bool:
    try:
        list(client.pages(resource))
    except KubeError:
        return False
    return True


def _ready(client: Client) -> bool:
    try:
        client.raw("GET", "/readyz", timeout=2.0)
        client.get(resources.NAMESPACES, "default", timeout=2.0)
    except KubeError:
        return False
    return True


def free_ports(count: int) -> list[int]:
    """Of loopback; taken together, so that they differ."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _end(process: subprocess.Popen[bytes] | None, how: signal.Signals) -> None:
    if process is None:
        return
    process.send_signal(how)
    process.send_signal(signal.SIGCONT)
    process.wait()


@pytest.fixture(scope="session")
def apiserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with running(tmp_path_factory.mktemp("apiserver")) as server:
        yield server
