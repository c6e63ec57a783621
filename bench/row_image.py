"""image: bytes of all files of the image, as `make image` builds it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from measure import Result, Unmeasurable

ROOT = Path(__file__).resolve().parents[1]
BAR_MB = 150.0


def image() -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "image.tar"
        command = [sys.executable, ROOT / "image/build.py", "--no-load", "--output", target]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unmeasurable(f"the image cannot be built: {done.stderr.strip()}")
        layers = _layers(target)
    total = sum(layers) / 1e6
    extra = {"layers": [round(size / 1e6, 1) for size in layers]}
    yield Result("image", "files of the image", total, "MB", "nothing", BAR_MB, extra)


def _layers(target: Path) -> list[int]:
    """Bytes of each layer's files, the lowest first."""
    found = []
    with tarfile.open(target) as outer:
        for member in outer:
            if member.name.endswith("layer.tar"):
                with tarfile.open(fileobj=outer.extractfile(member)) as layer:
                    found.append(sum(entry.size for entry in layer))
    return found


ROWS: Mapping[str, Callable[[], Iterator[Result]]] = {"image": image}
