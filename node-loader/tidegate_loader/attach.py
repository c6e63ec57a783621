"""Programs and where they hang: loaded once per object, pinned, replaced in place.

Policy and maps' contents may not live here. All calls act in the calling
thread's network namespace.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tidegate_bpf import (
    AttachType,
    BpfError,
    Link,
    NotSupported,
    ObjectFile,
    Program,
    attach_cgroup,
    attach_tcx,
    clsact,
)

from tidegate_loader import addresses, migrate
from tidegate_loader.local import LocalInterface

OBJECTS = ("pod.o", "sock.o", "net.o")
QUIET = "-quiet"
"""After the hash of an object whose programs were loaded without flow events."""
DSR = "-dsr"
"""The same, for direct server return."""
SUMS = "SHA256SUMS"
"""Beside installed objects: what `sha256sum` prints of each. A source tree has none."""
KNOBS = {
    "hairpin_ip4": addresses.pack("169.254.42.1"),
    "hairpin_ip6": addresses.pack("fd74:6964:6567:6174::1"),
}
"""What programs are loaded with: as whom a pod sees itself through a Service. Never on a wire."""
HOOKS = {"ingress": "from_pod", "egress": "to_pod"}
"""tc's direction at the host side -> program: what leaves the pod is tc ingress."""
UPLINK_HOOKS = {"ingress": "from_net", "egress": "to_net"}
"""The same at an uplink."""
UPLINK = "uplink"
"""Before the interface in the name of an uplink's pins."""

CGROUP_HOOKS = {
    "connect4": AttachType.INET4_CONNECT,
    "connect6": AttachType.INET6_CONNECT,
    "sendmsg4": AttachType.UDP4_SENDMSG,
    "sendmsg6": AttachType.UDP6_SENDMSG,
    "recvmsg4": AttachType.UDP4_RECVMSG,
    "recvmsg6": AttachType.UDP6_RECVMSG,
    "getpeername4": AttachType.INET4_GETPEERNAME,
    "getpeername6": AttachType.INET6_GETPEERNAME,
}

GONE = (errno.ENODEV, errno.ENOENT, errno.ENXIO, errno.ENOLINK)


class UnlistedObject(BpfError):
    """An installed object is not one of those that the installation came with."""


def checked(objects: Path, names: Iterable[str] = OBJECTS) -> dict[str, str]:
    """The objects of these names that are there, with their sha256 in hex. UnlistedObject:
    SHA256SUMS lies beside them and says otherwise, or does not name one of them."""
    found = {
        name: hashlib.sha256((objects / name).read_bytes()).hexdigest()
        for name in names
        if (objects / name).exists()
    }
    try:
        lines = (objects / SUMS).read_text("ascii", "replace").splitlines()
    except FileNotFoundError:
        return found
    listed = {name: hexes for hexes, _, name in (line.partition("  ") for line in lines)}
    for name, full in found.items():
        if listed.get(name) != full:
            what = "is not the one listed" if name in listed else "is not listed"
            text = f"{objects / name} {what} in {SUMS}: its sha256 is {full}; install Tidegate anew"
            raise UnlistedObject(errno.EKEYREJECTED, text)
    return found


class Programs:
    """The node's loaded programs, by name, with the maps they use pinned in maps/."""

    def __init__(
        self,
        objects: Path,
        pin_dir: Path,
        known: Mapping[str, str],
        kept: Path | None = None,
        *,
        flow_events: bool = True,
        dsr: bool = False,
        more: Iterable[str] = (),
        meanwhile: Callable[[Mapping[str, Program]], None] | None = None,
    ) -> None:
        """`known`: object file -> hash of what is pinned (`Realised.objects`). Objects
        that are not there are left out; `more`: others than those of every node. `kept`:
        where the objects last loaded are kept, so that maps of their layouts can be read;
        None: what those hold is not carried over.
        `meanwhile`: called with the first object's programs where nothing was pinned, once
        they and the maps that all objects share are; it has to return at once.
        LayoutError, VerifierError, BpfError; UnlistedObject: nothing has been loaded or
        replaced."""
        self.hashes: dict[str, str] = {}
        self.specs: dict[str, ObjectFile] = {}
        self.programs: dict[str, Program] = {}
        sums = checked(objects, (*OBJECTS, *more))
        for name in ("maps", "progs", "links"):
            (pin_dir / name).mkdir(parents=True, exist_ok=True)
        empty = not any(any((pin_dir / name).iterdir()) for name in ("maps", "links"))
        for name, full in sums.items():
            # Programs with other knobs are other programs.
            spec = self.specs[name] = ObjectFile(objects / name)
            options = {"flow_events": int(flow_events), "dsr": int(dsr)}
            suffix = ("" if flow_events else QUIET) + (DSR if dsr and "dsr" in spec.rodata else "")
            self.hashes[name] = full[:32] + suffix
            pinned = None
            if known.get(name) == self.hashes[name]:
                pinned = _open_all(pin_dir, spec)
            self.programs.update(pinned or _load(pin_dir, spec, options))
            if empty and meanwhile is not None and name == OBJECTS[0]:
                meanwhile(dict(self.programs))
        self.migrations = self._migrations(pin_dir / "maps", kept)
        """Maps of other layouts that a loader before this one left, and their successors."""
        self._kept = kept
        if not self.migrations:
            self._keep()

    def _migrations(self, maps: Path, kept: Path | None) -> list[migrate.Migration]:
        found = []
        for name, spec in self.specs.items():
            pairs = list(migrate.superseded(maps, _shared(spec)))
            before = migrate.kept(kept, name) if pairs and kept is not None else None
            specs = (before, spec) if before is not None else None
            found += [migrate.Migration(old, new, specs) for old, new in pairs]
        return found

    def _keep(self) -> None:
        if self._kept is not None:
            for spec in self.specs.values():
                migrate.keep(self._kept, spec.path)

    def migrated(self) -> None:
        """Nothing uses the old maps any more."""
        # First: killed between the two, the next loader would not know the layout of what is
        # pinned, and every flow would begin anew at the next move.
        self._keep()
        for migration in self.migrations:
            migration.forget()
        self.migrations = []

    def close(self) -> None:
        for program in self.programs.values():
            program.close()


def _open_all(pin_dir: Path, spec: ObjectFile) -> dict[str, Program] | None:
    """The pinned programs of an object; None unless they and all its maps are there."""
    if not all((pin_dir / "maps" / name).exists() for name in _shared(spec)):
        return None
    try:
        return {n: Program.open_pinned(str(pin_dir / "progs" / n)) for n in spec.programs}
    except BpfError as error:
        if error.errno == errno.ENOENT:
            return None
        raise


def _shared(spec: ObjectFile) -> list[str]:
    """Maps whose name carries a layout version; others are the loaded programs' own."""
    return [name for name in spec.maps if migrate.stem(name)]


def knobs(spec: ObjectFile) -> dict[str, int | bytes]:
    """Those of KNOBS that the object has."""
    return {name: value for name, value in KNOBS.items() if name in spec.rodata}


def _load(pin_dir: Path, spec: ObjectFile, options: Mapping[str, int]) -> dict[str, Program]:
    maps = pin_dir / "maps"
    shared = _shared(spec)
    held = {name: str(maps / name) for name in shared if (maps / name).exists()}
    values = knobs(spec) | {k: value for k, value in options.items() if k in spec.rodata}
    loaded = spec.load(pins=held, rodata=values)
    for name, made in loaded.maps.items():
        if name in shared and name not in held:
            made.pin(str(maps / name))
        made.close()
    for name, program in loaded.programs.items():
        pin_over(program, pin_dir / "progs" / name)
    return loaded.programs


def pin_over(owner: Program | Link, path: Path) -> None:
    """Pin, replacing what is pinned there in one rename."""
    temporary = path.with_name(f"{path.name}_new")
    temporary.unlink(missing_ok=True)
    owner.pin(str(temporary))
    os.replace(temporary, path)


class Attacher:
    """Attaches the programs; every call may be repeated."""

    def __init__(self, pin_dir: Path, programs: Mapping[str, Program], force_clsact: bool) -> None:
        self._links = pin_dir / "links"
        self._programs = programs
        self._clsact = force_clsact

    def interfaces(
        self, wanted: Mapping[str, LocalInterface], *, move: bool = True
    ) -> tuple[dict[str, LocalInterface], list[str]]:
        """(those that are gated now, what went wrong). An interface that is not
        there (any more) is left out without a word: that is an event, not an error.
        `move`: gates that hang already get the programs of now."""
        gated: dict[str, LocalInterface] = {}
        problems: list[str] = []
        for uid, interface in sorted(wanted.items()):
            try:
                if socket.if_nametoindex(interface.ifname) != interface.ifindex:
                    continue
                self._interface(interface.ifindex, move)
                gated[uid] = interface
            except BpfError as error:
                if error.errno not in GONE:
                    problems.append(f"cannot attach to {interface.ifname}: {error}")
            except OSError:
                continue
        self._forget_gone({i.ifindex for i in gated.values()}, move)
        return gated, problems

    def uplinks(self, wanted: Iterable[int], *, move: bool = True) -> list[str]:
        """Attach to the uplinks; what went wrong. Where a program hangs it stays, so that the
        flows it translates do: on an interface that is no uplink it only looks."""
        problems = []
        here = {int(p.name.split("-")[1]) for p in self._links.glob(f"{UPLINK}-*")}
        for ifindex in sorted(here.union(wanted)):
            try:
                self._interface(ifindex, move, UPLINK_HOOKS, f"{UPLINK}-{ifindex}")
            except BpfError as error:
                if error.errno not in GONE:
                    problems.append(f"cannot attach to interface {ifindex}: {error}")
                    continue
                for path in self._links.glob(f"{UPLINK}-{ifindex}-*"):
                    path.unlink(missing_ok=True)
        return problems

    def _interface(
        self,
        ifindex: int,
        move: bool,
        hooks: Mapping[str, str] = HOOKS,
        name_of_pin: str = "",
    ) -> None:
        for direction, name in hooks.items():
            program = self._programs[name]
            pin = self._links / f"{name_of_pin or ifindex}-{direction}"
            ingress = direction == "ingress"
            if not self._clsact:
                try:
                    self._tcx(program, pin, ifindex, ingress, move)
                    continue
                except NotSupported:
                    self._clsact = True
            found = clsact.query(ifindex, ingress=ingress)
            if found is None or (move and found != program.info.id):
                clsact.attach(program, ifindex, ingress=ingress)
            pin.unlink(missing_ok=True)

    def _tcx(self, program: Program, pin: Path, ifindex: int, ingress: bool, move: bool) -> None:
        if adopt(program if move else None, pin, ifindex):
            return
        with attach_tcx(program, ifindex, ingress=ingress) as link:
            pin_over(link, pin)
        # A loader that was told to use clsact may have been here before.
        clsact.detach(ifindex, ingress=ingress)

    def _forget_gone(self, present: set[int], move: bool) -> None:
        """Unpin links whose interface is gone. A link to a living interface stays,
        whatever became of its file: without it the pod would be ungated."""
        for path in self._links.iterdir():
            index, _, direction = path.name.partition("-")
            if not index.isdigit() or int(index) in present:
                continue
            program = self._programs[HOOKS[direction]] if move and direction in HOOKS else None
            try:
                gone = not adopt(program, path, int(index))
            except BpfError as error:
                gone = error.errno == errno.ENOENT
            if gone:
                path.unlink(missing_ok=True)

    def cgroup(self, directory: Path) -> None:
        """Attach the socket programs to a cgroup2 directory. OSError."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            identifier = os.fstat(fd).st_ino
            for name, where in CGROUP_HOOKS.items():
                program = self._programs.get(name)
                pin = self._links / f"cgroup-{name}"
                if program is None or adopt(program, pin, identifier):
                    continue
                with attach_cgroup(program, fd, where) as link:
                    pin_over(link, pin)
        finally:
            os.close(fd)


def adopt(program: Program | None, pin: Path, target: int) -> bool:
    """Use the pinned link, with `program` put in place (None: whatever it runs stays);
    False: there is none for this target."""
    try:
        with Link.open_pinned(str(pin)) as link:
            found = link.info
            if found.target != target:
                pin.unlink(missing_ok=True)
                return False
            if program is not None and found.program_id != program.info.id:
                link.update(program)
            return True
    except BpfError as error:
        if error.errno in GONE:
            return False
        raise


def detach(pin_dir: Path, ifindexes: Iterable[int]) -> None:
    """Remove everything of this node from the kernel: links, filters, pins."""
    for ifindex in ifindexes:
        for ingress in (True, False):
            clsact.detach(ifindex, ingress=ingress)
    _detach_uplinks(pin_dir)
    for directory, _, files in os.walk(pin_dir, topdown=False):
        for name in files:
            os.unlink(os.path.join(directory, name))
        if Path(directory) != pin_dir:
            os.rmdir(directory)


def _detach_uplinks(pin_dir: Path) -> None:
    """Filters of ours, wherever they hang: which interfaces were uplinks is written nowhere."""
    for direction, name in UPLINK_HOOKS.items():
        try:
            with Program.open_pinned(str(pin_dir / "progs" / name)) as program:
                number = program.info.id
        except BpfError:
            continue
        ingress = direction == "ingress"
        for ifindex, _ in socket.if_nameindex():
            if clsact.query(ifindex, ingress=ingress) == number:
                clsact.detach(ifindex, ingress=ingress)
