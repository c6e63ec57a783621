"""`python -m kind COMMAND`, with e2e/ on the module path."""

from __future__ import annotations

import argparse
import sys

from kind import daemon, golang
from kind.run import Failed
from kind.settings import binaries


def kube_apiserver() -> None:
    golang.ensure(golang.APISERVER)
    print(binaries())


def kube_binaries() -> None:
    golang.ensure(golang.EVERYTHING)
    print(binaries())


def docker() -> None:
    daemon.ensure()


def docker_down() -> None:
    daemon.stop()


COMMANDS = {
    "kube-apiserver": (
        kube_apiserver,
        "build etcd, kube-apiserver and kubectl where they are missing",
    ),
    "kube-binaries": (
        kube_binaries,
        "build every program of a cluster, kind and helm where they are missing",
    ),
    "docker": (docker, "start a Docker daemon where none answers"),
    "docker-down": (docker_down, "stop that daemon and put the machine back as it was"),
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
