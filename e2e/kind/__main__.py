"""`python -m kind COMMAND`, with e2e/ on the module path."""

from __future__ import annotations

import argparse
import sys

from kind import cluster, daemon, golang, settings
from kind.run import Failed


def kube_apiserver() -> None:
    golang.ensure(golang.APISERVER)
    print(settings.binaries())


def kube_binaries() -> None:
    golang.ensure(golang.EVERYTHING)
    print(settings.binaries())


def up() -> None:
    cluster.up()
    print(f"export KUBECONFIG={cluster.kubeconfig()} PATH={settings.binaries()}:$PATH")


COMMANDS = {
    "kube-apiserver": (kube_apiserver, "build etcd, kube-apiserver and kubectl if missing"),
    "kube-binaries": (kube_binaries, "build every program of a cluster, kind and helm if missing"),
    "docker": (daemon.ensure, "start a Docker daemon where none answers"),
    "up": (up, "make the cluster unless it is up"),
    "delete": (cluster.delete, "remove the cluster; the Docker daemon stays"),
    "down": (cluster.down, "remove the cluster, stop our Docker daemon, undo its changes"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="kind", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text)
    try:
        COMMANDS[parser.parse_args().command][0]()
    except Failed as error:
        print(f"kind: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
