"""The base layer: files of a few Debian packages, unpacked and pruned. No package manager inside.

Packages come from where this machine's own apt gets Debian's; maintainer scripts do not run. What
they would have done that is needed here is done below.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path


def words(text: str) -> list[str]:
    return text.split()


PACKAGES = (
    *("base-files", "busybox", "ca-certificates", "mount"),
    *("libbpf1", "python3", "libstdc++6"),
)
LEFT_OUT = re.compile(
    # Of Debian's own administration, and of Python modules that are pruned below.
    r"debconf|dpkg|gcc-.*|libacl1|libdb5\.3|libmd0|libncursesw6|libreadline8|libtinfo6|mawk"
    r"|media-types|openssl|original-awk|readline-common|tar"
    r"|libtirpc.*|libnsl2|libkrb5.*|libk5crypto3|libkeyutils1|libcom-err2|libgssapi.*"
)
"""Names of packages that those depend on and that are not unpacked."""

BINARIES = re.compile(r"busybox|mount|umount|python3(\.\d+)?")
"""What stays in bin/; nothing in sbin/ does."""
APPLETS = words("""
awk basename cat chmod clear cp cut date df diff dirname du echo egrep env expr false find grep
gunzip gzip head hexdump hostname id ip kill less ln ls md5sum mkdir mktemp more mv nc nslookup
nproc od pidof ping printf ps pwd readlink realpath rm rmdir sed seq sh sha256sum sleep sort stat
tail tar tee test top touch tr true tty uname uniq uptime vi watch wc which xargs
""")
"""Of busybox, for a person who looks into a container."""

MODULES = words("""
_crypt _curses _curses_panel _dbm _gdbm nis ossaudiodev readline xxlimited xxlimited_35
""")
PACKAGES_OF_PYTHON = words("""
__phello__ curses dbm distutils ensurepip idlelib lib2to3 pydoc_data test tkinter
turtledemo turtle.py venv
""")
"""Of the standard library: what nobody here imports, or what lacks its library."""

SHARES = ("ca-certificates", "common-licenses", "doc")
"""Of usr/share; of doc the copyrights only, which must go with the files."""
ETC = """\
passwd: root:x:0:0:root:/root:/bin/sh
passwd: tidegate:x:65532:65532:tidegate:/:/bin/false
group: root:x:0:
group: tidegate:x:65532:
nsswitch.conf: hosts: files dns
"""
DIRECTORIES = words("""
dev etc/ssl/certs proc root run sys tmp usr/lib/ssl var/lib/dpkg/status.d var/tmp
""")


class BaseError(Exception):
    """The base cannot be made; the message says what to do."""


def download(directory: Path) -> list[Path]:
    """The packages' files, closed under dependencies but for LEFT_OUT. BaseError."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    (directory / "status").touch()
    # Whatever else this machine installs from: the base is Debian's.
    preferences = directory / "preferences"
    preferences.write_text(
        "Package: *\nPin: release o=Debian\nPin-Priority: 900\n\n"
        'Package: *\nPin: origin "*"\nPin-Priority: -1\n'
    )
    options = {
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "1",
        "Dir::State": directory / "state",
        "Dir::State::status": directory / "status",
        "Dir::Cache": directory / "cache",
        "Dir::Etc::preferences": preferences,
        "Dir::Etc::preferencesparts": "/dev/null",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    if shutil.which("apt-get") is None:
        raise BaseError("no apt-get here: build on Debian 12, or `docker build .`")
    _run([*apt, "update"])
    _run([*apt, "-y", "--download-only", "--no-install-recommends", "install", *PACKAGES])
    found = sorted((directory / "cache/archives").glob("*.deb"))
    return [path for path in found if not LEFT_OUT.fullmatch(path.name.partition("_")[0])]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise BaseError(
            f"{' '.join(w for w in command if not w.startswith('-o'))}: {said}\n"
            "the base is made of Debian 12 packages from where this machine's apt gets its own"
        )
    return done.stdout


def unpack(packages: Iterable[Path], root: Path) -> None:
    """Make `root` the base's tree. BaseError."""
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for name in DIRECTORIES:
        (root / name).mkdir(parents=True, exist_ok=True)
    for package in packages:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=-1) as archive:
            extract = ["tar", "-x", "--no-same-owner", "--keep-directory-symlink", "-C", root]
            subprocess.run(extract, stdin=archive.stdout, check=True)
        if archive.returncode:
            raise BaseError(f"{package.name} cannot be unpacked")
        control = _run(["dpkg-deb", "--field", str(package)])
        # Where scanners for vulnerabilities look in an image without dpkg's own files.
        (root / "var/lib/dpkg/status.d" / package.name.partition("_")[0]).write_text(control)
    _certificates(root)
    _prune(root)
    _python(root)
    for line in ETC.splitlines():
        name, _, text = line.partition(": ")
        with (root / "etc" / name).open("a") as file:
            file.write(f"{text}\n")


def _certificates(root: Path) -> None:
    bundle = root / "etc/ssl/certs/ca-certificates.crt"
    found = sorted((root / "usr/share/ca-certificates").rglob("*.crt"))
    if not found:
        raise BaseError("the package ca-certificates holds no certificate")
    bundle.write_bytes(b"".join(path.read_bytes() for path in found))
    (root / "usr/lib/ssl/cert.pem").symlink_to("/etc/ssl/certs/ca-certificates.crt")
    shutil.rmtree(root / "usr/share/ca-certificates")


def _prune(root: Path) -> None:
    for path in (root / "usr/bin").iterdir():
        if not BINARIES.fullmatch(path.name):
            path.unlink()
    for applet in APPLETS:
        (root / "usr/bin" / applet).symlink_to("busybox")
    remove((root / "usr/sbin").iterdir())
    remove(path for path in (root / "usr/share").iterdir() if path.name not in SHARES)
    for path in (root / "usr/share/doc").rglob("*"):
        if not path.is_dir() and path.name != "copyright":
            path.unlink()
    keep = {"debian_version", "ssl", "os-release"}
    remove(path for path in (root / "etc").iterdir() if path.name not in keep)
    # Conversions of glibc's, its auditors, and what base-files lays out for a whole system.
    remove(root.glob("usr/lib/*/gconv"))
    remove(root.glob("usr/lib/*/audit"))
    stray = {"bin", "dev", "etc", "lib", "lib64", "proc", "root", "run", "sbin", "sys", "tmp"}
    remove(path for path in root.iterdir() if path.name not in stray | {"usr", "var"})
    remove(path for path in (root / "var").iterdir() if path.name not in {"lib", "tmp"})
    remove(path for path in (root / "var/lib").iterdir() if path.name != "dpkg")
    remove((root / "root").iterdir())
    remove(root / "usr" / name for name in ("games", "include", "local", "src"))


def _python(root: Path) -> None:
    library = stdlib(root)
    remove(library / name for name in PACKAGES_OF_PYTHON)
    for module in (*MODULES, "_test*", "_ctypes_test"):
        remove(library.glob(f"lib-dynload/{module}.*so"))
    remove(library.glob("config-*"))
    remove((root / "usr/lib/python3/dist-packages").iterdir())
    remove(root.glob("usr/lib/valgrind"))
    (library / "EXTERNALLY-MANAGED").unlink(missing_ok=True)


def stdlib(root: Path) -> Path:
    """usr/lib/python3.N of a base."""
    (found,) = root.glob("usr/lib/python3.*")
    return found


def remove(paths: Iterable[Path]) -> None:
    """Files and whole trees, where they are there."""
    for path in list(paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):
            path.unlink()


def python(root: Path, *arguments: str | Path) -> str:
    """Run the base's own interpreter from outside, without root's rights and chroot."""
    machine = os.uname().machine
    (loader,) = root.glob(f"usr/lib/{machine}-linux-gnu/ld-linux*.so*")
    libraries = [str(p) for p in root.glob(f"usr/lib/{machine}-linux-gnu")]
    command = [loader, "--library-path", ":".join(libraries), root / "usr/bin/python3"]
    environment = {"PYTHONHOME": str(root / "usr"), "PYTHONHASHSEED": "0", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [*command, "-S", "-B", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BaseError(f"the base's python3 {arguments}: {done.stdout}{done.stderr}")
    return done.stdout
