"""What a wheel carries beside Python: the eBPF objects, and the list of their sums.

They go where the installation's data goes, as lib/tidegate/objects: /usr/lib/tidegate/objects in
the image, PREFIX/lib/tidegate/objects in a virtual environment. An editable installation has
none of it: there the source tree's own build is used.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILD = Path("datapath/build")
OBJECTS = ("pod.o", "sock.o")
TARGET = "lib/tidegate/objects"
SUMS = "SHA256SUMS"


class ObjectsHook(BuildHookInterface):
    """Raises FileNotFoundError where an object is not compiled: without, nothing is enforced."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or version == "editable":
            return
        root = Path(self.root)
        objects = {name: root / BUILD / name for name in OBJECTS}
        missing = [str(BUILD / name) for name, path in objects.items() if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"{', '.join(missing)} not compiled; run `make objects` first")
        # Not beside the objects: there the next compilation would make a lie of it.
        sums = root / "dist" / SUMS
        sums.parent.mkdir(exist_ok=True)
        sums.write_text(
            "".join(
                f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n"
                for name, path in objects.items()
            )
        )
        for name, path in {**objects, SUMS: sums}.items():
            build_data["shared_data"][str(path)] = f"{TARGET}/{name}"
