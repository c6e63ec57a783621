"""The layers above the base: Python packages, unpacked from wheels and compiled ahead."""

from __future__ import annotations

import configparser
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from email.parser import HeaderParser
from pathlib import Path

import debian

HERE = Path(__file__).resolve().parent
CONSTRAINTS = HERE / "constraints.txt"
"""name==version of everything that the image installs; `build.py --pin` writes it."""
EXTRAS = ("operator", "loader", "observer")
CLI = "cli"
CLI_SITE = "usr/lib/tidegate/cli"
"""Where packages are that only the command line asks for: kopf imports Kubernetes' client, which is
larger than all the rest, where it finds it."""
SITE = "usr/lib/python3/dist-packages"
TARGET_GLIBC = (17, 28, 34, 36)
"""2.x of manylinux tags that Debian 12 (2.36) runs."""
UNUSED = re.compile(
    r"(^|/)(tests?|benchmarks?)/|(^|/)test_\w+\.py$|\.(pyi|pyx|pxd|pxi|c|h|hpp|cpp)$"
)
META = ("METADATA", "entry_points.txt")
CEL_UNUSED = re.compile(r"cel_expr_python/ext/")
"""Extensions of the language, each with the whole runtime in it once more."""
KUBERNETES_UNUSED = re.compile(r"kubernetes/(aio|docs|e2e_test)/")
SCRIPT = """\
#!/usr/bin/python3 -I
import sys
{path}from {module} import {function}
sys.exit({function}())
"""


def build(root: Path, target: Path) -> Path:
    """The project's own wheel, made from the tree `root`. BaseError."""
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise debian.BaseError(f"the wheel cannot be built: {done.stderr.strip()}")
    (wheel,) = target.glob("*.whl")
    return wheel


def requirements(wheel: Path, extras: Iterable[str]) -> list[str]:
    """What the wheel asks for with `extras`, each as pip takes it; sorted. Itself left out."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    found = set()
    for line in metadata.get_all("Requires-Dist", []):
        what, _, marker = (part.strip() for part in line.partition(";"))
        extra = re.fullmatch(r"extra == ['\"](.+)['\"]", marker)
        if not marker or (extra and extra[1] in extras):
            found.add(what)
    return sorted(what for what in found if not what.startswith(f"{metadata['Name']}["))


def download(asked: Sequence[str], target: Path, python: str, pinned: bool = True) -> list[Path]:
    """Wheels of `asked` and what they ask for. `python`: "3.11". BaseError."""
    machine = os.uname().machine
    platforms = [f"--platform=manylinux_2_{n}_{machine}" for n in TARGET_GLIBC]
    command = [sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:", *platforms]
    command += [f"--platform=manylinux2014_{machine}", f"--python-version={python}"]
    command += ["--implementation=cp", f"--dest={target}"]
    command += [f"--constraint={CONSTRAINTS}"] if pinned else []
    done = subprocess.run([*command, *asked], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise debian.BaseError(f"pip cannot get what the image needs: {done.stderr.strip()}")
    return sorted(target.glob("*.whl"))


def pins(wheels: Iterable[Path]) -> str:
    """constraints.txt of these very wheels."""
    names = (path.name.split("-")[:2] for path in wheels)
    return "".join(f"{n.lower().replace('_', '-')}=={v}\n" for n, v in sorted(names))


def unpack(wheel: Path, root: Path, site: str = SITE) -> None:
    """Lay a wheel's files out in `root` as an installation into /usr has them, Python in `site`."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            place = _place(name, site)
            if place is None:
                continue
            path = root / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name))


def _place(name: str, site: str) -> str | None:
    """Where a wheel's file goes; None: nowhere."""
    if name.endswith("/"):
        return None
    first, _, rest = name.partition("/")
    if first.endswith(".dist-info"):
        keep = rest in META or rest.lower().startswith(("licen", "copying", "notice"))
        return f"{site}/{name}" if keep else None
    if first.endswith(".data"):
        scheme, _, inner = rest.partition("/")
        return {"data": f"usr/{inner}", "purelib": f"{site}/{inner}"}.get(scheme)
    unused = any(p.match(name) for p in (CEL_UNUSED, KUBERNETES_UNUSED)) or UNUSED.search(name)
    return None if unused else f"{site}/{name}"


def scripts(root: Path) -> None:
    """Commands of the packages in SITE, in usr/bin."""
    (root / "usr/bin").mkdir(parents=True, exist_ok=True)
    for entry_points in (root / SITE).glob("*.dist-info/entry_points.txt"):
        parser = configparser.ConfigParser(delimiters=("=",))
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        parser.read_string(entry_points.read_text())
        for name, entry in parser["console_scripts"].items():
            module, _, function = (part.strip() for part in entry.partition(":"))
            script = root / "usr/bin" / name
            path = f'sys.path.append("/{CLI_SITE}")\n' if "cli" in module else ""
            script.write_text(SCRIPT.format(module=module, function=function, path=path))
            script.chmod(0o755)


def compile_all(base: Path, root: Path, directory: Path) -> None:
    """Write .pyc beside each .py below `directory`, by the base's interpreter. They are never
    compared with their source: an image's files do not change. BaseError."""
    debian.python(
        base,
        *("-m", "compileall", "-q", "-j1", "--invalidation-mode=unchecked-hash"),
        *("-s", root, "-p", "/", directory),
    )


def without_sources(directory: Path) -> None:
    """Only what `compile_all` wrote, where an import finds it without the .py; for what is large
    and not ours to debug."""
    for cache in list(directory.rglob("__pycache__")):
        for compiled in cache.iterdir():
            compiled.rename(cache.parent / f"{compiled.name.partition('.')[0]}.pyc")
        cache.rmdir()
    for path in list(directory.rglob("*.py")):
        path.unlink()


def strip(directory: Path) -> None:
    """Without symbols and debug information, which some wheels bring. BaseError."""
    libraries = sorted(path for path in directory.rglob("*.so") if path.is_file())
    command = ["strip", "--strip-unneeded", *map(str, libraries)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise debian.BaseError("missing tool: strip (of binutils)") from None
    if done.returncode:
        raise debian.BaseError(f"strip: {done.stderr.strip()}")


def key(*parts: object) -> str:
    """A short name for content."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
