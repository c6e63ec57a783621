"""What a wheel carries beside Python: the eBPF objects, the list of their sums, the manifests.

They go where the installation's data goes, below lib/tidegate: /usr/lib/tidegate/objects in the
image, PREFIX/lib/tidegate/objects in a virtual environment. An editable installation has none
of it: there the source tree is used.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILD = Path("datapath/build")
OBJECTS = ("pod.o", "sock.o", "net.o", "xdp.o")
TARGET = "lib/tidegate/objects"
MANIFESTS = ("manifests/base/namespace.yaml", "manifests/base/tidegate.yaml")
CRDS = "crds/tidegate.dev_*.yaml"
MANIFESTS_TARGET = "lib/tidegate/manifests"
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
        for path in (*(root / name for name in MANIFESTS), *sorted(root.glob(CRDS))):
            build_data["shared_data"][str(path)] = f"{MANIFESTS_TARGET}/{path.name}"
