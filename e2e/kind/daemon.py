"""The Docker daemon: the running one, else one of our own, which `stop` ends without a trace."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

from kind import machine, runtime
from kind.run import Failed, attempt, run, say
from kind.settings import cache

START_SECONDS = 60.0
STOP_SECONDS = 60.0
POLL_SECONDS = 0.2
# Each node runs systemd and a kubelet, and each of them watches files by several instances.
INOTIFY_INSTANCES = 1024
RUNTIME_NAME = "tidegate-fitted"


def directory() -> Path:
    return cache() / "docker"


def answers() -> bool:
    return attempt("docker", "version", "--format", "{{.Server.Version}}").returncode == 0


def ensure() -> None:
    """Starts a daemon where none answers. Raises Failed where it does not come up."""
    if answers():
        return
    if not shutil.which("dockerd"):
        raise Failed("no Docker daemon answers, and there is no `dockerd` to start one")
    directory().mkdir(parents=True, exist_ok=True)
    machine.save(_before())
    _raise_inotify_limit()
    # In a session of its own and no child of ours: it outlives us.
    log = directory() / "log"
    run("setsid", "--fork", "sh", "-c", 'exec "$@" > "$0" 2>&1', log, *_command())
    deadline = time.monotonic() + START_SECONDS
    while not answers():
        if time.monotonic() > deadline:
            said = log.read_text(errors="replace")
            raise Failed(f"dockerd did not come up; it said last:\n{said[-2000:]}")
        time.sleep(POLL_SECONDS)
    say(f"started dockerd, process {_pid()}; its data lies in {directory()}")


def stop() -> None:
    """Ends the daemon if it is ours, and puts the machine's settings and firewall back.

    Raises Failed where something is not as it was before the daemon started."""
    _end(_pid())
    before = machine.load(_before())
    if before is None:
        return
    machine.restore(before)
    left = machine.differences(before, machine.observe())
    _before().unlink()
    if left:
        raise Failed(
            "not as it was before dockerd started (unless others changed it):\n" + "\n".join(left)
        )
    say("dockerd is stopped; settings and firewall rules are as they were")


def _before() -> Path:
    return directory() / "before.json"


def _command() -> list[str]:
    script = directory() / "runtime"
    shutil.copy(runtime.__file__, script)
    script.chmod(0o755)
    return [
        "dockerd",
        "--data-root", str(directory() / "data"),
        "--pidfile", str(directory() / "pid"),
        "--mtu", str(uplink_mtu()),
        "--add-runtime", f"{RUNTIME_NAME}={script}",
        "--default-runtime", RUNTIME_NAME,
    ]  # fmt: skip


def uplink_mtu() -> int:
    """Containers must not send what the machine's own uplink cannot carry."""
    words = run("ip", "-o", "route", "show", "default").split()
    device = words[words.index("dev") + 1] if "dev" in words else "lo"
    return min(1500, int(Path(f"/sys/class/net/{device}/mtu").read_text()))


def _raise_inotify_limit() -> None:
    limit = Path("/proc/sys/fs/inotify/max_user_instances")
    if int(limit.read_text()) < INOTIFY_INSTANCES:
        limit.write_text(str(INOTIFY_INSTANCES))


def _pid() -> int | None:
    """Our daemon's process; None where it does not run."""
    try:
        pid = int((directory() / "pid").read_text())
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ValueError):
        return None
    return pid if name == "dockerd" else None


def _end(pid: int | None) -> None:
    if pid is None:
        return
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while _pid() is not None and _is_alive(pid):
        if time.monotonic() > deadline:
            raise Failed(f"dockerd, process {pid}, does not end")
        time.sleep(POLL_SECONDS)


def _is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
