"""Versions and places. They go together: etcd and CoreDNS are what this kubeadm asks for."""

from __future__ import annotations

import os
from pathlib import Path

KUBERNETES = "v1.36.3"
ETCD = "v3.6.8"
COREDNS = "v1.14.2"
CNI_PLUGINS = "v1.9.1"
KIND = "v0.33.0"
HELM = "v3.22.0"

HERE = Path(__file__).parent


def cache() -> Path:
    """Where everything built is kept: $TIDEGATE_CACHE, else ~/.cache/tidegate."""
    given = os.environ.get("TIDEGATE_CACHE")
    return Path(given).absolute() if given else Path.home() / ".cache" / "tidegate"


def binaries() -> Path:
    """The directory of the built programs, one for each version of Kubernetes."""
    return cache() / f"k8s-{KUBERNETES}" / "bin"
