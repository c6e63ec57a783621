"""Runs a Python script of this checkout on Debian 12's own kernel, under emulation.

The guest is that kernel (from its Debian package), busybox as init, and this very Python with
the packages the product needs at run time, at the same paths as here. No network device, no
disk: what it prints on the serial line is all that comes back.
"""

from __future__ import annotations

import contextlib
import gzip
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "guest"
MACHINES = {
    "x86_64": ("amd64", "qemu-system-x86_64", ["-machine", "q35"], "ttyS0"),
    "aarch64": ("arm64", "qemu-system-aarch64", ["-machine", "virt"], "ttyAMA0"),
}
MODULES = ("veth", "llc", "stp", "bridge", "sch_ingress", "cls_bpf")
TREES = ("crds", "operator", "node-loader", "observer", "cli", "datapath/build", "examples")
TREES += ("tests/vm",)
# Not needed to run the product; half of what is installed.
SKIPPED = re.compile(
    r"^(mypy|mypyc|ruff|pip|pytest|_pytest|hypothesis|xdist|setuptools|importlinter|grimp|"
    r"pygments|rich|lxml|grpc|grpc_tools|google|.*\.dist-info)"
)
SKIPPED_STDLIB = {
    "test",
    "idlelib",
    "tkinter",
    "ensurepip",
    "lib2to3",
    "turtledemo",
    "site-packages",
}
MARK = "guest-exit-code:"

INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /run /tmp
/bin/busybox ln -s busybox /bin/sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t cgroup2 cgroup2 /sys/fs/cgroup
for m in {modules}; do /bin/busybox insmod /modules/$m.ko; done
/bin/busybox ip link set lo up
export PATH={path}:/bin HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
cd {root}
{python} {script}
echo {mark}$?
/bin/busybox poweroff -f
"""


class GuestUnavailable(Exception):
    """What this machine lacks to run the guest; a test skips with it."""


@dataclass(frozen=True)
class Result:
    code: int
    output: str


def kernel() -> tuple[Path, Path]:
    """(kernel image, folder of modules) of Debian's newest 6.1 kernel, cached."""
    arch = _machine()[0]
    unpacked = CACHE / "kernel"
    if not (unpacked / ".done").exists():
        depends = _output("apt-cache", "depends", f"linux-image-cloud-{arch}")
        name = re.search(r"Depends: (linux-image-\S+)", depends)
        if name is None:
            raise GuestUnavailable(f"no Debian package linux-image-cloud-{arch}")
        shutil.rmtree(unpacked, ignore_errors=True)
        unpacked.mkdir(parents=True)
        subprocess.run(
            ["apt-get", "-o", "APT::Sandbox::User=root", "download", "-qq", name[1]],
            cwd=CACHE,
            check=True,
        )
        package = next(CACHE.glob(f"{name[1]}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", package, unpacked], check=True)
        package.unlink()
        (unpacked / ".done").touch()
    return next(unpacked.glob("boot/vmlinuz-*")), next(unpacked.glob("lib/modules/*"))


def run(script: Path, timeout: float) -> Result:
    """Run `script` (under one of TREES) as root in the guest.

    Raises GuestUnavailable, RuntimeError (timed out, no exit code seen) with what it printed."""
    _arch, qemu, machine, console = _machine()
    for tool in (qemu, "busybox", "cpio"):
        if shutil.which(tool) is None:
            raise GuestUnavailable(f"{tool} is not installed")
    image, modules = kernel()
    with tempfile.TemporaryDirectory() as work:
        initramfs = _initramfs(Path(work), modules, script)
        serial = Path(work) / "serial"
        with serial.open("wb") as out:
            timed_out = _boot(
                [
                    qemu, *machine, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2",
                    "-m", "2048", "-nographic", "-no-reboot", "-nic", "none",
                    "-kernel", str(image), "-initrd", str(initramfs),
                    "-append", f"console={console} quiet panic=-1 loglevel=3",
                ],
                out,
                timeout,
            )  # fmt: skip
        output = serial.read_text(errors="replace").replace("\r", "")
    if timed_out:
        raise RuntimeError(f"the guest was still running after {timeout:.0f} s:\n{output[-4000:]}")
    code = re.search(rf"^{MARK}(\d+)$", output, re.MULTILINE)
    if code is None:
        raise RuntimeError(f"the guest did not finish:\n{output[-4000:]}")
    return Result(int(code[1]), output)


def _boot(command: list[str], out: BinaryIO, timeout: float) -> bool:
    """Whether it timed out."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, timeout=timeout, check=False
        )
        return False
    return True


def _machine() -> tuple[str, str, list[str], str]:
    try:
        return MACHINES[platform.machine()]
    except KeyError:
        raise GuestUnavailable(f"no guest for {platform.machine()}") from None


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _initramfs(work: Path, modules: Path, script: Path) -> Path:
    root = work / "root"
    _copy_python(root)
    for tree in TREES:
        if (ROOT / tree).exists():
            shutil.copytree(ROOT / tree, _in(root, ROOT / tree), ignore=_ignore_caches)
    (root / "modules").mkdir(parents=True)
    for name in MODULES:
        for found in modules.rglob(f"{name}.ko*"):
            shutil.copy(found, root / "modules" / f"{name}.ko")
    (root / "bin").mkdir(exist_ok=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, root / "bin" / "busybox")
    init = root / "init"
    init.write_text(
        INIT.format(
            modules=" ".join(MODULES),
            path=Path(sys.executable).parent,
            root=ROOT,
            python=sys.executable,
            script=script,
            mark=MARK,
        )
    )
    init.chmod(0o755)
    names = _output("find", str(root), "-mindepth", "1", "-printf", "%P\\n")
    archive = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"],
        input=names.encode(), cwd=root, capture_output=True, check=True,
    )  # fmt: skip
    packed = work / "initramfs.gz"
    packed.write_bytes(gzip.compress(archive.stdout, 1))
    return packed


def _in(root: Path, path: Path) -> Path:
    """`path` in the guest; makes its folder."""
    inside = root / path.relative_to("/")
    inside.parent.mkdir(parents=True, exist_ok=True)
    return inside


def _ignore_caches(_folder: str, names: list[str]) -> set[str]:
    return {n for n in names if n in {"__pycache__"} | SKIPPED_STDLIB}


def _copy_python(root: Path) -> None:
    """Interpreter, standard library, run-time packages, and every shared library they need."""
    interpreter = Path(sys.executable).resolve()
    shutil.copy(interpreter, _in(root, interpreter))
    for link in {Path(sys.executable), Path(sys.prefix) / "bin" / "python3"}:
        inside = _in(root, link)
        if not inside.exists():
            inside.symlink_to(interpreter)
    paths = sysconfig.get_paths()
    stdlib = Path(sysconfig.get_paths(vars={"base": sys.base_prefix})["stdlib"])
    stdlib = Path(sys.base_prefix) / "lib" / stdlib.name
    shutil.copytree(
        stdlib,
        _in(root, stdlib),
        ignore=lambda folder, names: (
            {n for n in names if n in SKIPPED_STDLIB or n.startswith("config-")}
            if Path(folder) == stdlib
            else set()
        ),
    )
    packages = Path(paths["purelib"])
    shutil.copytree(
        packages,
        _in(root, packages),
        ignore=lambda folder, names: (
            {n for n in names if SKIPPED.match(n)} if Path(folder) == packages else set()
        ),
    )
    if sys.prefix != sys.base_prefix:
        shutil.copy(Path(sys.prefix) / "pyvenv.cfg", _in(root, Path(sys.prefix) / "pyvenv.cfg"))
        tool = Path(sys.prefix) / "bin" / "tidegate"
        shutil.copy(tool, _in(root, tool))
    binaries = [interpreter, *stdlib.rglob("*.so"), *packages.rglob("*.so*")]
    _copy_libraries(root, [b for b in binaries if _in(root, b).exists()])


def _copy_libraries(root: Path, binaries: list[Path]) -> None:
    cache = _output("ldconfig", "-p")
    libbpf = re.search(r"libbpf\.so\.1 .*=> (\S+)", cache)
    if libbpf is None:
        raise GuestUnavailable("libbpf.so.1 is not installed")
    wanted = {Path(libbpf[1])}
    for binary in [*binaries, Path(libbpf[1])]:
        listed = subprocess.run(["ldd", binary], capture_output=True, text=True, check=False)
        wanted |= {Path(p) for p in re.findall(r"(/\S+) \(0x", listed.stdout)}
    for library in wanted:
        shutil.copy(library.resolve(), _in(root, library))
    config = _in(root, Path("/etc/ld.so.cache"))
    shutil.copy("/etc/ld.so.cache", config)
