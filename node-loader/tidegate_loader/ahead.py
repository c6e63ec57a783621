"""What a start does beside the loading of programs, which holds no lock of the interpreter.

Each thread here ends by itself and is waited for by who started it; what goes wrong in one is
said by the cycle that comes to the same. Nothing may live here that a start cannot do without.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path

from tidegate_bpf import Map, Program

from tidegate_loader.attach import Attacher
from tidegate_loader.kernel import ipcache_values
from tidegate_loader.local import LocalInterface
from tidegate_loader.maps import Builder, MapsError, Part
from tidegate_loader.rules import RuleSetError
from tidegate_loader.source import Source, Stalled


class Foresight(threading.Thread):
    """Fills the memories of a source and a builder, which are its own until it is joined.

    What is wrong with the state is said by the cycle that comes to it."""

    def __init__(self, source: Source, builder: Builder) -> None:
        super().__init__(daemon=True)
        self._source = source
        self._builder = builder
        self.interfaces: Mapping[str, LocalInterface] = {}
        """Those that the first cycle will gate."""
        self.parts: tuple[Part, ...] = ()
        self.ipcache: dict[bytes, int] | None = None
        """All parts: what the kernel holds if nothing changed since it was last written."""

    def run(self) -> None:
        with contextlib.suppress(Stalled, MapsError, RuleSetError, OSError):
            interfaces, _ = self._source.interfaces()
            state = self._source.state()
            if state.node.spec.mode == "Detached":
                return
            self.interfaces = interfaces
            self.parts = self._builder.build(state, interfaces).ipcache
            merged: dict[bytes, int] = {}
            for part in self.parts:
                merged.update(part)
            self.ipcache = merged


class Gating(threading.Thread):
    """Attaches to the pods' interfaces: each new link waits for an RCU grace period, and takes
    no CPU meanwhile."""

    def __init__(self, attacher: Attacher, foresight: Foresight) -> None:
        super().__init__(daemon=True)
        self._attacher = attacher
        self._foresight = foresight

    def run(self) -> None:
        self._foresight.join()
        now = {uid: i for uid, i in self._foresight.interfaces.items() if not i.adopted}
        with contextlib.suppress(OSError):
            self._attacher.interfaces(now)


class Empty:
    """A node on which nothing is in force yet: gates and addresses need only the first object."""

    def __init__(self, pin_dir: Path, foresight: Foresight, force_clsact: bool) -> None:
        self._pin_dir = pin_dir
        self._foresight = foresight
        self._clsact = force_clsact
        self._gating: Gating | None = None
        self._filling: threading.Thread | None = None

    @property
    def started(self) -> bool:
        """It is such a node, and the gates are being attached."""
        return self._gating is not None

    def start(self, programs: Mapping[str, Program]) -> None:
        """`programs`: the gates; the maps that all objects share are pinned."""
        self._gating = Gating(Attacher(self._pin_dir, programs, self._clsact), self._foresight)
        self._filling = threading.Thread(target=self._fill, daemon=True)
        self._gating.start()
        self._filling.start()

    def filled(self) -> None:
        """Wait until the addresses are in."""
        if self._filling is not None:
            self._filling.join()

    def join(self) -> None:
        """Wait for everything."""
        self.filled()
        if self._gating is not None:
            self._gating.join()

    def _fill(self) -> None:
        """Until there is a node table no program looks at addresses. What does not go in is
        found by who reads them back."""
        self._foresight.join()
        entries = self._foresight.ipcache or {}
        packed = b"".join(entries)
        with (
            contextlib.suppress(OSError),
            Map.open_pinned(str(self._pin_dir / "maps" / "ipcache_v1")) as opened,
        ):
            if len(entries) <= opened.info.max_entries:
                opened.update_batch(packed, ipcache_values(packed, entries.values()))
