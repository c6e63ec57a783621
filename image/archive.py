"""Trees as reproducible tars, and tars as an image for `docker load` and `ctr images import`."""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EPOCH = int(os.environ.get("SOURCE_DATE_EPOCH", "1580601600"))
"""Time of every file and of the image, so that equal content is an equal image; as in wheels."""
STICKY = ("tmp", "var/tmp")
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


def write_layer(tree: Path, target: Path) -> None:
    """`tree` as a tar: sorted, owned by root, no set-id bits, one time for all."""
    temporary = target.with_suffix(".new")
    with tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as archive:
        for path in sorted(tree.rglob("*")):
            _add(archive, path, str(path.relative_to(tree)))
    temporary.replace(target)


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    info = archive.gettarinfo(path, name)
    if info.islnk():  # a hard link's second name: as a file, so that order is of no account
        info.type, info.linkname, info.size = tarfile.REGTYPE, "", path.stat().st_size
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mtime = EPOCH
    mode = path.lstat().st_mode
    runs = info.isdir() or mode & stat.S_IXUSR
    info.mode = 0o1777 if name in STICKY else 0o755 if runs else 0o644
    if info.isreg():
        with path.open("rb") as file:
            archive.addfile(info, file)
    else:
        archive.addfile(info)


def write_image(
    target: Path, tag: str, layers: Sequence[tuple[str, Path]], config: Mapping[str, Any]
) -> str:
    """`layers`: (what it is, tar), the lowest first. Returns the image's id, "sha256:…"."""
    digests = [_digest(path) for _, path in layers]
    created = datetime.datetime.fromtimestamp(EPOCH, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    whole = {
        "architecture": MACHINES[os.uname().machine],
        "os": "linux",
        "created": created,
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{d}" for d in digests]},
        "history": [{"created": created, "created_by": what} for what, _ in layers],
    }
    data = json.dumps(whole, sort_keys=True).encode()
    number = hashlib.sha256(data).hexdigest()
    paths = [f"{digest}/layer.tar" for digest in digests]
    manifest = [{"Config": f"{number}.json", "RepoTags": [tag], "Layers": paths}]
    temporary = target.with_suffix(".new")
    with tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as archive:
        _file(archive, f"{number}.json", data)
        for name, (_, path) in zip(paths, layers, strict=True):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = path.stat().st_size, EPOCH
            with path.open("rb") as file:
                archive.addfile(info, file)
        _file(archive, "manifest.json", json.dumps(manifest).encode())
    temporary.replace(target)
    return f"sha256:{number}"


def _file(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(data), EPOCH
    archive.addfile(info, io.BytesIO(data))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size(layers: Sequence[Path]) -> int:
    """Bytes of all files of the layers: what an unpacked image takes."""
    total = 0
    for path in layers:
        with tarfile.open(path) as archive:
            total += sum(member.size for member in archive)
    return total


def extract(layers: Sequence[Path], root: Path) -> None:
    """The image's whole file system."""
    # Debian 12's own Python is older than filters; newer ones want to be told.
    how: dict[str, Any] = {"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}
    for path in layers:
        with tarfile.open(path) as archive:
            archive.extractall(root, **how)
