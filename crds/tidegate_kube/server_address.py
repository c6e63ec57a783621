"""`tidegate-server-address`: the API server's address for a node that has no kube-proxy.

Runs as an init container. Copies one field, `clusters[].cluster.server`, of the node's kubelet
kubeconfig into a file; nothing else of that file (it names credentials) is looked at or kept.
Where an address is given (`--server`, TIDEGATE_APISERVER), that one is written.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

from tidegate_kube.access import AccessError
from tidegate_kube.kubeconfig import server_of

KUBELET_CONFIG = Path("/etc/kubernetes/kubelet.conf")
TARGET = Path("/run/tidegate-apiserver/server")


def checked(server: str) -> str:
    """The URL without a trailing slash. AccessError: not https://host[:port]."""
    parts = urlsplit(server)
    try:
        usable = parts.scheme == "https" and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment or parts.username:
        raise AccessError(f"{server!r} is not the address of an API server: https://host:port")
    return server.rstrip("/")


def write(path: Path, server: str) -> None:
    """By atomic rename: who finds the file finds all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(server + "\n")
    fresh.rename(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tidegate-server-address",
        description="Write the API server's address into a file that other containers read.",
    )
    parser.add_argument(
        "--server",
        default=os.environ.get("TIDEGATE_APISERVER", ""),
        help="the address, if it is known (default: $TIDEGATE_APISERVER)",
    )
    parser.add_argument(
        "--kubelet-config",
        type=Path,
        default=KUBELET_CONFIG,
        help="else it is read from this kubeconfig (default: %(default)s)",
    )
    parser.add_argument(
        "--target", type=Path, default=TARGET, help="the file to write (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        server = checked(options.server or server_of(options.kubelet_config))
        write(options.target, server)
    except AccessError as error:
        print(f"{error}; set apiServer in the ConfigMap tidegate-config", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"cannot write {options.target}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"the API server is at {server}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
