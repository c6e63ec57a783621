"""`make image`: the image out of Debian packages and wheels; no registry, no daemon, no root.

Three layers: Debian's files, other people's Python packages, ours. The lower two are kept in the
cache and made anew only when what they are made of changes, so a change of ours takes seconds.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import archive
import debian
import wheels

ROOT = Path(__file__).resolve().parents[1]
CNI = ROOT / "node-loader/cni/build/tidegate-cni"
CNI_TARGET = "usr/lib/tidegate/tidegate-cni"
KEPT = 3
"""Generations of a layer in the cache: branches that differ do not chase each other out."""
CONFIG = {
    "Cmd": ["tidegate", "--help"],
    "Env": [
        "PATH=/usr/local/bin:/usr/bin:/bin",
        "PYTHONDONTWRITEBYTECODE=1",
        "PYTHONUTF8=1",
    ],
    "Labels": {
        "org.opencontainers.image.title": "tidegate",
        "org.opencontainers.image.description": "operator, node loader and command line",
        "org.opencontainers.image.licenses": "Apache-2.0",
    },
    "User": "65532:65532",
    "WorkingDir": "/",
}


class Cache:
    """Layers by name and key: NAME-KEY/tree and NAME-KEY/layer.tar. One build at a time."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._lock = (directory / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # Of builds that were killed: nobody else is at work now.
        debian.remove(directory.glob("new-*"))

    def find(self, name: str, key: str) -> Path | None:
        found = self.directory / f"{name}-{key}"
        if not (found / "layer.tar").exists():
            return None
        os.utime(found)
        return found

    def keep(self, name: str, key: str, made: Path) -> Path:
        """Take over a directory that holds tree/; add the tar; forget old generations."""
        archive.write_layer(made / "tree", made / "layer.tar")
        target = self.directory / f"{name}-{key}"
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
        old = sorted(self.directory.glob(f"{name}-*"), key=lambda p: -p.stat().st_mtime)
        debian.remove(old[KEPT:])
        return target

    def fresh(self) -> Path:
        """An empty directory on the cache's file system."""
        return Path(tempfile.mkdtemp(prefix="new-", dir=self.directory))


def say(text: str) -> None:
    print(f"\033[1m==>\033[0m {text}", flush=True)


def source(name: str) -> bytes:
    return (Path(__file__).with_name(name)).read_bytes()


def base_layer(cache: Cache, refresh: bool) -> Path:
    key = wheels.key(os.uname().machine, source("debian.py"), source("archive.py"))
    found = None if refresh else cache.find("base", key)
    if found is None:
        say("base layer: Debian packages (kept in the cache; --refresh gets them anew)")
        made = cache.fresh()
        packages = debian.download(made / "apt")
        debian.unpack(packages, made / "tree")
        debian.remove([made / "apt"])
        wheels.compile_all(made / "tree", made / "tree", debian.stdlib(made / "tree"))
        found = cache.keep("base", key, made)
    return found


def python_version(base: Path) -> str:
    return debian.stdlib(base / "tree").name.removeprefix("python")


def python_layer(cache: Cache, base: Path, wheel: Path, refresh: bool) -> Path:
    asked = [wheels.requirements(wheel, extras) for extras in (wheels.EXTRAS, [wheels.CLI])]
    version, pinned = python_version(base), wheels.CONSTRAINTS.read_bytes()
    key = wheels.key(asked, version, pinned, source("wheels.py"), source("archive.py"))
    found = None if refresh else cache.find("python", key)
    if found is None:
        say("Python packages")
        made = cache.fresh()
        tree, work = made / "tree", made / "wheels"
        common = wheels.download(asked[0], work, version)
        more = [p for p in wheels.download(asked[0] + asked[1], work, version) if p not in common]
        for path in common:
            wheels.unpack(path, tree)
        for path in more:
            wheels.unpack(path, tree, wheels.CLI_SITE)
        wheels.compile_all(base / "tree", tree, tree)
        wheels.strip(tree)
        wheels.without_sources(tree / wheels.CLI_SITE / "kubernetes")
        debian.remove([work])
        found = cache.keep("python", key, made)
    return found


def own_layer(work: Path, base: Path, wheel: Path) -> Path:
    tree = work / "tree"
    wheels.unpack(wheel, tree)
    wheels.scripts(tree)
    if CNI.is_file():
        shutil.copy(CNI, tree / CNI_TARGET)
    wheels.compile_all(base / "tree", tree, tree / wheels.SITE)
    archive.write_layer(tree, work / "layer.tar")
    return work / "layer.tar"


def load(image: Path) -> bool:
    """Hand the image to Docker; False: there is none that answers."""
    if shutil.which("docker") is None:
        return False
    if subprocess.run(["docker", "version"], capture_output=True, check=False).returncode:
        return False
    subprocess.run(["docker", "load", "-q", "-i", image], check=True)
    return True


def arguments() -> argparse.Namespace:
    home = os.environ.get("TIDEGATE_CACHE") or Path.home() / ".cache/tidegate"
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tag", default="tidegate:dev")
    parser.add_argument("--output", type=Path, default=ROOT / "dist/tidegate-image.tar")
    parser.add_argument("--cache", type=Path, default=Path(home) / "image")
    parser.add_argument("--rootfs", type=Path, help="unpack the image there, and do no more")
    parser.add_argument("--refresh", action="store_true", help="get Debian's packages anew")
    parser.add_argument("--no-load", action="store_true", help="do not hand it to Docker")
    parser.add_argument("--pin", action="store_true", help="write constraints.txt anew; no image")
    return parser.parse_args()


def pin(work: Path, base: Path, wheel: Path) -> None:
    asked = wheels.requirements(wheel, [*wheels.EXTRAS, wheels.CLI])
    found = wheels.download(asked, work / "wheels", python_version(base), pinned=False)
    wheels.CONSTRAINTS.write_text(wheels.pins(found))
    say(f"wrote {wheels.CONSTRAINTS.relative_to(ROOT)}: {len(found)} packages")


def make(options: argparse.Namespace, work: Path) -> None:
    cache = Cache(options.cache)
    wheel = wheels.build(ROOT, work / "wheel")
    base = base_layer(cache, options.refresh)
    if options.pin:
        pin(work, base, wheel)
        return
    python = python_layer(cache, base, wheel, options.refresh)
    own = own_layer(work / "own", base, wheel)
    layers = [base / "layer.tar", python / "layer.tar", own]
    if options.rootfs:
        archive.extract(layers, options.rootfs)
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    named = zip(("Debian packages", "Python packages", "Tidegate"), layers, strict=True)
    number = archive.write_image(options.output, options.tag, list(named), CONFIG)
    megabytes = archive.size(layers) / 1e6
    say(f"{options.tag} {number[:19]} {megabytes:.0f} MB in {options.output}")
    if not options.no_load and not load(options.output):
        say(f"no Docker answers here; later: docker load -i {options.output}")


def main() -> int:
    options = arguments()
    try:
        with tempfile.TemporaryDirectory(prefix="tidegate-image-") as work:
            (Path(work) / "own").mkdir()
            make(options, Path(work))
    except debian.BaseError as error:
        print(f"image: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
