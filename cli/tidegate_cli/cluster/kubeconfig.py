"""Whether there is a kubeconfig; reading it is the client library's."""

from __future__ import annotations

import os
from pathlib import Path


def present() -> bool:
    """One is where it is looked for: KUBECONFIG, else ~/.kube/config."""
    named = [Path(p) for p in os.environ.get("KUBECONFIG", "").split(os.pathsep) if p]
    return any(place.is_file() for place in named or [Path.home() / ".kube/config"])
