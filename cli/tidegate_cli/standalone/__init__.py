"""A small cluster on one machine, out of network namespaces.

`up` builds it from a folder of manifests and follows the folder, `down` removes
it, `exec_in` runs a command inside a pod. Policy is the operator's, the
loaders' and the datapath's: nothing here decides a verdict, and nothing here
changes the namespace it is started in.

    supervisor   the process of `up`: lock, main loop
    feed         the operator's side of it: folder -> objects and layout
    loaders      the loaders' side of it
    observer     the process that shows flows
    cluster      layout -> namespaces, cgroups, links, processes
    network, netlink, netns, cgroups, children, responder, enter    its tools
    teardown, rundir                                                  what is where, and its removal
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from pathlib import Path

    from tidegate_cli.standalone.options import UpOptions
    from tidegate_cli.standalone.teardown import Inventory

# The imports within functions are what keeps `tidegate --help` quick.


def up(options: UpOptions) -> int:
    """Exit code; returns when the cluster is ready (`detach`) or has ended.
    Raises StandaloneError."""
    from tidegate_cli.standalone import feed  # noqa: PLC0415 - see above

    return feed.up(options)


def down(run_dir: Path) -> Inventory:
    """Removes the cluster of `run_dir`; returns what there was. Raises
    StandaloneError."""
    from tidegate_cli.standalone import teardown  # noqa: PLC0415 - see above
    from tidegate_cli.standalone.rundir import RunDir  # noqa: PLC0415

    return teardown.down(RunDir.at(run_dir))


def exec_in(pod: str, argv: Sequence[str], run_dir: Path) -> NoReturn:
    """Replaces this process by `argv` in the pod "namespace/name" (or "name",
    if only one has it) or the node "node/NAME". Raises StandaloneError."""
    from tidegate_cli.standalone import execute  # noqa: PLC0415 - see above

    execute.exec_in(pod, argv, run_dir)
