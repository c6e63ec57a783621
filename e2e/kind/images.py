"""Container images made of files, without a registry and without a base."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

from kind.run import Failed, attempt

REGISTRY_SECONDS = 20
PASSWD = b"root:x:0:0:root:/:/sbin/nologin\nnobody:x:65534:65534:nobody:/:/sbin/nologin\n"


def exists(name: str) -> bool:
    return attempt("docker", "image", "inspect", name).returncode == 0


def can_pull(name: str) -> bool:
    """Whether a registry that has the image can be reached; gives up after REGISTRY_SECONDS."""
    asked = attempt("timeout", str(REGISTRY_SECONDS), "docker", "manifest", "inspect", name)
    return asked.returncode == 0


def from_program(name: str, program: Path, place: str) -> None:
    """An image of one static program that lies at `place` and is its entry point."""
    from_files(name, {place: program}, [f'ENTRYPOINT ["{place}"]', "ENV PATH=/usr/local/bin:/bin"])


def from_files(name: str, files: Mapping[str, Path], changes: list[str]) -> None:
    """An image of executable files, absolute place in the image → file here.

    `changes` are Dockerfile instructions. Raises Failed where Docker refuses."""
    options = [part for change in changes for part in ("--change", change)]
    command = ["docker", "import", *options, "-", name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    # Streamed: a tar file of its own would double what the cache holds for a moment.
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        with process.stdin as pipe, tarfile.open(fileobj=pipe, mode="w|") as tar:
            _add_bytes(tar, "etc/passwd", PASSWD)
            for place, file in files.items():
                tar.add(file, place.lstrip("/"), filter=_owned_by_root)
        said = process.stdout.read().decode(errors="replace")
    if process.returncode != 0:
        raise Failed(f"docker import {name} failed:\n{said}")


def _owned_by_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry


def _add_bytes(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    entry.mode = 0o644
    tar.addfile(entry, io.BytesIO(data))
