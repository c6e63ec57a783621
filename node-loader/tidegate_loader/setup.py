"""`tidegate-node-setup`: what a node needs before the loader starts, keeps while it runs, and
loses when Tidegate goes.

    init      a bpffs, the CNI step, the pods that already run      (privileged, and ends)
    watch     keeps the CNI step in place while others rewrite it   (no privileges)
    cleanup   removes everything of Tidegate from the node          (privileged; asks nobody)

Each step may be repeated. May not live here: policy, and any API.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from inotify_simple import INotify, flags  # type: ignore[import-untyped]
from tidegate_bpf import BpfError, bpffs

from tidegate_loader import adopt, conflist, log
from tidegate_loader.conflist import STEP, ConfigError
from tidegate_loader.local import NodePaths

LOOK_SECONDS = 60.0
"""Everything is looked at this often though nothing was seen to change."""
SETTLE_SECONDS = 0.2
"""Files are rewritten in bursts."""
LOADER_SECONDS = 5.0
"""How long the loader of a detached node is waited for at the end."""
CALM_FIRST, CALM_LAST = 1.0, 30.0
"""Seconds between two repairs of a file that somebody else keeps rewriting: doubled each time."""
_PROGRAM = Path("/usr/lib/tidegate") / STEP


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tidegate-node-setup",
        description="Prepare a node for Tidegate, keep it so, or take Tidegate away.",
    )
    parser.add_argument(
        "command",
        choices=("init", "watch", "cleanup"),
        help="init: bpffs, CNI step, running pods; watch: put the CNI step back when it goes; "
        "cleanup: remove everything of Tidegate from the node",
    )
    parser.add_argument(
        "--node",
        default=os.environ.get("NODE_NAME") or None,
        help="name of the node (default: $NODE_NAME)",
    )
    for flag, path, what in (
        ("--run-dir", "/var/lib/tidegate", "state of the loader"),
        ("--pin-dir", "/sys/fs/bpf/tidegate", "what is pinned, a directory on a bpffs"),
        ("--socket", "/run/tidegate/cni.sock", "where the CNI step finds the loader"),
        ("--cni-conf-dir", "/etc/cni/net.d", "CNI configurations"),
        ("--cni-bin-dir", "/opt/cni/bin", "CNI programs"),
        ("--cni-results", "/var/lib/cni/results", "libcni's cache of results"),
        ("--step", str(_PROGRAM), "the CNI step to install"),
        ("--root", "/", "where the node's file system is"),
    ):
        parser.add_argument(
            flag, type=Path, default=Path(path), help=f"{what} (default: %(default)s)"
        )
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning"))
    found = parser.parse_args(argv)
    if not found.node and found.command != "cleanup":
        parser.error("name the node: --node, or NODE_NAME in the environment")
    return found


class Node:
    """The node's paths as this process sees them, and what is done there."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._log = log.logger(options.node or "", options.log_level)
        self.run_dir = self._here(options.run_dir)
        self.pin_dir = self._here(options.pin_dir)
        self.configs = self._here(options.cni_conf_dir)
        self.programs = self._here(options.cni_bin_dir)
        self.results = self._here(options.cni_results)
        self.socket = self._here(options.socket)
        self.paths = NodePaths(self.run_dir, options.node or "")
        self.mounted = self.run_dir / "mounted-bpffs"
        """Exists where the bpffs is of our making."""
        enforcing = NodePaths(options.run_dir, options.node or "").enforcing
        self._entry = conflist.entry(options.pin_dir, options.socket, enforcing)

    def _here(self, path: Path) -> Path:
        return Path(self._options.root) / path.relative_to("/")

    @property
    def detached(self) -> bool:
        """The loader has taken the node out of use: nothing of ours may come back."""
        return self.paths.detached.exists()

    # -- steps ---------------------------------------------------------------------------

    def mount(self) -> None:
        """A bpffs below which the pins are. BpfError, OSError."""
        directory = self.pin_dir.parent
        directory.mkdir(parents=True, exist_ok=True)
        if bpffs.is_bpffs(directory):
            return
        self.mounted.touch()
        bpffs.mount(directory)
        self._log.info("mounted a bpffs", path=str(directory))

    def install(self) -> bool:
        """The program, then who calls it. False: there was nothing to do. OSError."""
        program = self._install_program()
        try:
            changed = conflist.install(self.configs, self._entry)
        except ConfigError as error:
            self._log.warning("the CNI step cannot be installed", error=str(error))
            return program
        if changed is not None:
            self._log.info("the CNI step is in", path=str(changed))
        return program or changed is not None

    def _install_program(self) -> bool:
        target = self.programs / STEP
        data = self._options.step.read_bytes()
        with contextlib.suppress(FileNotFoundError):
            if target.read_bytes() == data and os.access(target, os.X_OK):
                return False
        self.programs.mkdir(parents=True, exist_ok=True)
        # By rename: the old one may be running, and cannot be written to.
        temporary = self.programs / f".{STEP}.tmp"
        temporary.write_bytes(data)
        os.chmod(temporary, 0o755)
        os.replace(temporary, target)
        self._log.info("installed", path=str(target))
        return True

    def adopt(self) -> None:
        """Pods that run and that the loader does not know. OSError."""
        active = conflist.active(self.configs)
        if active is None:
            return
        self.paths.interfaces.mkdir(parents=True, exist_ok=True)
        network = conflist.network(active)
        written, problems = adopt.adopt(self.results, network, self.paths.interfaces)
        for problem in problems:
            self._log.warning("a running pod cannot be taken in", error=problem)
        if written:
            self._log.info("running pods are taken in", pods=written)

    def uninstall(self) -> bool:
        """Who calls the program, then the program. False: there was nothing to do. OSError."""
        changed = conflist.remove(self.configs)
        for path in changed:
            self._log.info("the CNI step is out", path=str(path))
        target = self.programs / STEP
        if not target.exists():
            return bool(changed)
        target.unlink()
        self._log.info("removed", path=str(target))
        return True

    def forget(self) -> None:
        """The end of a detached node: once the loader has ended, its directory is emptied."""
        end = time.monotonic() + LOADER_SECONDS
        while self.paths.realised.exists() and time.monotonic() < end:
            time.sleep(0.1)
        empty(self.run_dir)

    def take_away(self) -> None:
        """Everything in the kernel and on the disk. BpfError, OSError."""
        from tidegate_loader import attach  # noqa: PLC0415  (libbpf: not for `watch`)

        if self.pin_dir.is_dir():
            attach.detach(self.pin_dir, _ifindexes(self.run_dir))
            self.pin_dir.rmdir()
        mount = self.pin_dir.parent
        if self.mounted.exists() and bpffs.is_bpffs(mount):
            # The kernel's own are in every bpffs: maps.debug, progs.debug.
            others = [path.name for path in mount.iterdir() if path.suffix != ".debug"]
            if not others:
                bpffs.unmount(mount)
            else:
                self._log.warning("the bpffs stays, others use it", path=str(mount), names=others)
        for directory in (self.run_dir, self.socket.parent):
            empty(directory)


def _ifindexes(run_dir: Path) -> list[int]:
    """Of every interface that may be gated, for kernels without tcx."""
    import msgspec  # noqa: PLC0415

    from tidegate_loader.local import LocalInterface  # noqa: PLC0415

    found = []
    for path in run_dir.glob("nodes/*/interfaces/*.json"):
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            found.append(msgspec.json.decode(path.read_bytes(), type=LocalInterface).ifindex)
    return found


def empty(directory: Path) -> None:
    """Remove a directory with all it holds; one that is a mount point stays, empty."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        directory.rmdir()


class Keeper:
    """`watch`: looks whenever a directory changes."""

    _EVENTS = flags.CLOSE_WRITE | flags.MOVED_TO | flags.MOVED_FROM | flags.DELETE | flags.ONLYDIR

    def __init__(self, node: Node) -> None:
        self._node = node
        self._stop_read, self._stop_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._calm = CALM_FIRST
        self._stopped = False

    def stop(self, *_signal: object) -> None:
        self._stopped = True
        os.write(self._stop_write, b"\0")

    def run(self) -> None:
        with INotify() as notify:
            while not self._stopped:
                ours = self._add(notify)
                if self._look():
                    # Ours again: if it does not stay so, somebody disagrees, and not so fast.
                    self._sleep(self._calm)
                    self._calm = min(self._calm * 2, CALM_LAST)
                elif not self._wait(notify, ours):
                    self._calm = CALM_FIRST

    def _wait(self, notify: INotify, ours: int | None) -> bool:
        """Until something changed, a minute at most. `ours`: the watch of the directory where
        the loader writes all the time; only one file of it matters here."""
        end = time.monotonic() + LOOK_SECONDS
        while not self._stopped and (left := end - time.monotonic()) > 0:
            ready, _, _ = select.select([notify, self._stop_read], [], [], left)
            if notify in ready:
                self._sleep(SETTLE_SECONDS)
                name = self._node.paths.detached.name
                if any(e.wd != ours or e.name == name for e in notify.read(timeout=0)):
                    return True
        return False

    def _add(self, notify: INotify) -> int | None:
        node, added = self._node, None
        for directory in (node.configs, node.programs, node.results, node.paths.node):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                watch = notify.add_watch(str(directory), self._EVENTS)
                added = watch if directory == node.paths.node else added
        return added

    def _look(self) -> bool:
        """Whether anything had to be repaired."""
        node = self._node
        if node.detached:
            return node.uninstall()
        repaired = node.install()
        node.adopt()
        return repaired

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._stopped and (left := end - time.monotonic()) > 0:
            select.select([self._stop_read], [], [], left)


def _init(node: Node) -> None:
    node.mount()
    if node.detached:
        return
    # In this order: a pod that starts meanwhile comes through the step or is found after.
    node.install()
    node.adopt()


def _watch(node: Node) -> None:
    keeper = Keeper(node)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, keeper.stop)
    keeper.run()
    if node.detached:
        node.forget()


def _cleanup(node: Node) -> None:
    node.uninstall()
    node.take_away()


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments(argv)
    try:
        {"init": _init, "watch": _watch, "cleanup": _cleanup}[options.command](Node(options))
    except (BpfError, OSError) as error:
        print(f"tidegate-node-setup {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
