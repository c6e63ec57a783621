"""The node's CNI configuration, and our step in it.

A container runtime uses the first file of the directory, by name, that is a configuration.
Where that is a list, our entry is put at its end; where it is a single plugin, a list of that
plugin and our step takes its place, and the file is kept under a name that no runtime reads.
May not live here: waiting, and anything of Kubernetes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STEP = "tidegate-cni"
"""Our entry's `type`, and the name of the program."""
KEPT = ".tidegate-kept"
"""Behind the name of a single plugin's file whose place a list has taken."""
_LISTS, _SINGLES = (".conflist",), (".conf", ".json")

Config = dict[str, Any]


class ConfigError(Exception):
    """The configuration cannot take our step; the message says which file, and why."""


def entry(pin_dir: Path, socket: Path, enforcing: Path) -> Config:
    """Our step's configuration."""
    return {
        "type": STEP,
        "pinDir": str(pin_dir),
        "socket": str(socket),
        "enforcingFile": str(enforcing),
    }


def active(directory: Path) -> Path | None:
    """The file that a runtime uses now; None: there is none yet."""
    return next((path for path in _files(directory) if _plugins(path) is not None), None)


def network(path: Path) -> str:
    """The configuration's name, under which results are cached."""
    return str((_read(path) or {}).get("name", ""))


def install(directory: Path, wanted: Config) -> Path | None:
    """Put our entry into the active file. The file that was changed; None: it was all in
    place, or there is no configuration yet. ConfigError, OSError."""
    path = active(directory)
    if path is None:
        return None
    held = _read(path) or {}
    if path.suffix in _LISTS:
        others = [p for p in held["plugins"] if p.get("type") != STEP]
        plugins = [*others, wanted]
        if held["plugins"] == plugins:
            return None
        _check_version(path, held)
        _write(path, held | {"plugins": plugins})
        return path
    _check_version(path, held)
    single = {key: value for key, value in held.items() if key not in ("cniVersion", "name")}
    common = {key: held[key] for key in ("cniVersion", "name") if key in held}
    target = path.with_suffix(".conflist")
    _write(target, common | {"plugins": [single, wanted]})
    os.replace(path, path.with_name(path.name + KEPT))
    return target


def remove(directory: Path) -> list[Path]:
    """Take our entry out of every file; what was changed. OSError."""
    changed = []
    for path in _files(directory):
        plugins = _plugins(path)
        if path.suffix not in _LISTS or not any(p.get("type") == STEP for p in plugins or ()):
            continue
        kept = _kept(path)
        if kept is not None:
            os.replace(kept, kept.with_name(kept.name.removesuffix(KEPT)))
            path.unlink()
        else:
            others = [p for p in plugins or () if p.get("type") != STEP]
            _write(path, (_read(path) or {}) | {"plugins": others})
        changed.append(path)
    return changed


def _kept(path: Path) -> Path | None:
    """The single plugin's file whose place the list `path` took."""
    names = (path.with_name(f"{path.stem}{suffix}{KEPT}") for suffix in _SINGLES)
    return next((name for name in names if name.exists()), None)


def _check_version(path: Path, held: Config) -> None:
    version = str(held.get("cniVersion", ""))
    parts = version.split(".")
    if (
        len(parts) != 3
        or not all(p.isdigit() for p in parts)
        or (
            int(parts[0]),
            int(parts[1]),
        )
        < (0, 3)
    ):
        raise ConfigError(
            f"{path}: cniVersion {version or 'is absent: that'} is older than 0.3.0, "
            "which has no chained plugins"
        )


def _files(directory: Path) -> Iterator[Path]:
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return
    for name in names:
        path = directory / name
        if path.suffix in _LISTS + _SINGLES and not name.startswith("."):
            yield path


def _read(path: Path) -> Config | None:
    """None: gone, half written or no JSON object."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _plugins(path: Path) -> list[Config] | None:
    """A file's plugins; None: it is no configuration, and runtimes pass it over."""
    held = _read(path) or {}
    if path.suffix in _SINGLES:
        return [held] if isinstance(held.get("type"), str) else None
    plugins = held.get("plugins")
    if not isinstance(plugins, list) or not plugins:
        return None
    return plugins if all(isinstance(p, dict) for p in plugins) else None


def _write(path: Path, config: Config) -> None:
    """By rename, under a name that no runtime reads; the mode stays what it was."""
    temporary = path.with_name(f".{path.name}.tidegate")
    temporary.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
    os.chmod(temporary, mode)
    os.replace(temporary, path)
