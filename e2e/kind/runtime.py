#!/usr/bin/python3 -IS
"""An OCI runtime where root lacks capabilities: rewrites what is asked, then becomes runc.

Docker asks for every capability it knows where a container is privileged, and runc fails as a whole
if one of them is not to be had (CAP_SYS_RESOURCE, often); an older Docker does not know the newest
ones, which are then missing. Here privileged means: all that there is. Raised resource limits and
negative OOM scores need CAP_SYS_RESOURCE and are left out without it.

Stands alone: dockerd runs it by its path, for every container and every exec."""

import json
import os
import sys
from pathlib import Path

# Bit numbers of linux/capability.h.
NAMES = """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP
    LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER
    SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE
    SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP
    MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF
    CHECKPOINT_RESTORE
"""
RUNC = "runc"


def available(status: str) -> list[str]:
    """The capabilities of the bounding set in the text of /proc/self/status, by full name."""
    line = next(x for x in status.splitlines() if x.startswith("CapBnd:"))
    bits = int(line.split()[1], 16)
    return [f"CAP_{name}" for bit, name in enumerate(NAMES.split()) if bits >> bit & 1]


def fitted(process: dict, have: list[str]) -> dict:  # type: ignore[type-arg]
    """The `process` of an OCI configuration, asking for nothing that cannot be had."""
    result = dict(process)
    asked = process.get("capabilities") or {}
    result["capabilities"] = {
        kind: have if "CAP_SYS_ADMIN" in names else [n for n in names if n in have]
        for kind, names in asked.items()
    }
    if "CAP_SYS_RESOURCE" not in have:
        result.pop("rlimits", None)
        if (process.get("oomScoreAdj") or 0) < 0:
            del result["oomScoreAdj"]
    return result


def option(arguments: list[str], *names: str) -> str | None:
    """The value of an option that is written `--name value` or `--name=value`."""
    for here, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if here in names:
            return following
        for name in names:
            if here.startswith(name + "="):
                return here[len(name) + 1 :]
    return None


def rewrite(arguments: list[str], have: list[str]) -> None:
    if "create" in arguments or "run" in arguments:
        path = Path(option(arguments, "--bundle", "-b") or ".") / "config.json"
        config = json.loads(path.read_text())
        config["process"] = fitted(config["process"], have)
        replace(path, config)
    elif "exec" in arguments and (given := option(arguments, "--process", "-p")):
        path = Path(given)
        replace(path, fitted(json.loads(path.read_text()), have))


def replace(path: Path, content: object) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content))
    new.rename(path)


if __name__ == "__main__":
    rewrite(sys.argv[1:], available(Path("/proc/self/status").read_text()))
    os.execvp(RUNC, [RUNC, *sys.argv[1:]])
