"""The relay in the cluster, with certificates that are given, and a way to it for this machine."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import yaml
from support import certificates
from support.hubble import Hubble
from tidegate_observer.tls import OBSERVER_NAME

from kind import cluster, settings
from rig import install, pods

MANIFEST = install.ROOT / "manifests/overlays/relay/relay.yaml"
NAME = "hubble-relay.tidegate-system.svc"
CLIENT = "tidegate-flows-client-tls"
ROLLOUT_SECONDS = 90

Files = dict[str, bytes]
"""tls.crt, tls.key, ca.crt"""


def _secret(name: str, files: Files) -> pods.Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": install.NAMESPACE},
        "type": "kubernetes.io/tls",
        "data": {key: base64.b64encode(value).decode() for key, value in files.items()},
    }


def make_secrets(directory: Path) -> dict[str, Files]:
    """Name → files, as docs/observe.md says which are needed."""
    servers, relays, clients = (
        certificates.make_authority(directory, name) for name in ("servers", "relays", "clients")
    )
    rows = {
        "tidegate-observer-tls": (servers, relays, "serverAuth", OBSERVER_NAME),
        "tidegate-relay-peer-tls": (relays, servers, "clientAuth", "relay"),
        "tidegate-relay-tls": (servers, clients, "serverAuth", NAME),
        CLIENT: (clients, servers, "clientAuth", "client"),
    }
    found = {}
    for name, (authority, trusted, use, host) in rows.items():
        extensions = f"subjectAltName=DNS:{host}\nextendedKeyUsage={use}\n"
        chain, key = certificates.issue(authority, name, f"/CN={host}", extensions)
        found[name] = {
            "tls.crt": chain.read_bytes(),
            "tls.key": key.read_bytes(),
            "ca.crt": trusted.read_bytes(),
        }
    return found


@contextlib.contextmanager
def installed(directory: Path) -> Iterator[Files]:
    """While in it there is one, and it is ready; what a client shows it."""
    secrets = make_secrets(directory)
    objects = list(yaml.safe_load_all(MANIFEST.read_text()))
    try:
        pods.apply(*(_secret(name, files) for name, files in secrets.items()), *objects)
        cluster.kubectl(
            *("rollout", "status", "-n", install.NAMESPACE, "deployment/tidegate-relay"),
            f"--timeout={ROLLOUT_SECONDS}s",
        )
        # A Secret that comes later reaches a pod when the kubelet looks at the pod next.
        cluster.kubectl(
            *("annotate", "pods", "-n", install.NAMESPACE, "--overwrite"),
            *("-l", "app.kubernetes.io/name=tidegate-loader", f"tidegate.dev/e2e={time.time()}"),
        )
        yield secrets[CLIENT]
    finally:
        everything = [f"secret/{name}" for name in secrets]
        everything += [f"{item['kind']}/{item['metadata']['name']}" for item in objects]
        cluster.kubectl(
            "delete", "-n", install.NAMESPACE, "--ignore-not-found", "--wait=false", *everything
        )


@contextlib.contextmanager
def forwarded(shown: Files) -> Iterator[Hubble]:
    """A client of it, by a port of this machine that kubectl forwards."""
    credentials = grpc.ssl_channel_credentials(shown["ca.crt"], shown["tls.key"], shown["tls.crt"])
    command: list[str | Path] = [
        settings.binaries() / "kubectl",
        "--kubeconfig",
        cluster.kubeconfig(),
    ]
    command += ["port-forward", "-n", install.NAMESPACE, "service/hubble-relay", ":443"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("Forwarding from 127.0.0.1:"), line
            port = line.split(":")[1].split()[0]
            with Hubble(f"127.0.0.1:{port}", credentials, NAME) as client:
                yield client
        finally:
            process.terminate()


def names(nodes: object) -> dict[str, str]:
    """Node → its state, of an answer to GetNodes."""
    found = json.loads(json.dumps(nodes))
    return {node["name"]: node.get("state", "") for node in found.get("nodes", ())}
