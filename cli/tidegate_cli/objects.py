"""The objects of a run directory, read whole. Files and decoding only: no kernel, no verdict."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec
from tidegate_api.state import Identity, NodeState, RuleSet, StateObject, StateSlice
from tidegate_loader.local import NodePaths, Realised

from tidegate_cli.errors import CliError

_KINDS: dict[str, type[RuleSet] | type[StateSlice] | type[NodeState] | type[Identity]] = {
    "identities": Identity,
    "rulesets": RuleSet,
    "stateslices": StateSlice,
    "nodestates": NodeState,
}

T = TypeVar("T")


class NodePlace(msgspec.Struct, frozen=True):
    """What supervisor.json says of a node; other members pass."""

    name: str
    netns: str = ""
    addresses: list[str] = []


class OwnPod(msgspec.Struct, frozen=True, rename="camel"):
    """A pod as people know it: with its own labels, of which an identity has only those that
    some selector asks for. Other members pass."""

    namespace: str
    name: str
    labels: dict[str, str] = {}
    addresses: list[str] = []
    host_network: bool = False

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


class _Supervisor(msgspec.Struct, frozen=True, rename="camel"):
    folder: str = ""
    nodes: list[NodePlace] = []
    pods: list[OwnPod] = []
    excluded_labels: list[str] | None = None


class Problem(msgspec.Struct, frozen=True):
    """One entry of objects/problems.json; field names as the operator writes them."""

    severity: str
    message: str
    file: str = ""
    document_index: int = 0
    line: int = 0
    object: str = ""
    field: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        parts = [p for p in (where, self.object, self.field, self.message) if p]
        return f"{self.severity}: " + ": ".join(parts) + (f"; {self.remedy}" if self.remedy else "")


class Followed(msgspec.Struct, frozen=True):
    """objects/folder.json: the content of the folder that what is published is the whole of."""

    files: dict[str, str] = {}
    """File → digest of its content."""
    policies: list[str] = []
    """ "Kind namespace/name"."""


OBSERVER_DIR = Path("/run/tidegate-observer")
"""Where a node's observer has its socket, in a cluster."""


class RunObjects:
    """`run_dir` as it is now. Raises CliError: there is none, or a file is no object of ours."""

    def __init__(self, run_dir: str | Path, pin_dir: Path | None = None) -> None:
        """`pin_dir`: of the one node that this is the directory of."""
        self.run_dir = Path(run_dir)
        self._pin_dir = pin_dir
        if not (self.run_dir / "objects").is_dir():
            raise CliError(f"nothing is up in {self.run_dir}", "run `tidegate up DIR` first")

    def beside_observer(self, name: str) -> Path:
        """A file that the observer keeps beside its socket."""
        return (OBSERVER_DIR if self._pin_dir is not None else self.run_dir) / name

    def nodes(self, only: str | None = None) -> list[str]:
        """Names of the nodes that have a NodeState, sorted. CliError: `only` is none of them."""
        found = sorted(p.stem for p in (self.run_dir / "objects/nodestates").glob("[!.]*.json"))
        if only is None:
            return found
        if only not in found:
            raise CliError(f"no node {only!r}", f"--node takes one of: {', '.join(found) or '-'}")
        return [only]

    def all(self) -> list[StateObject]:
        """Every object, by kind and name."""
        found: list[StateObject] = []
        for directory, kind in _KINDS.items():
            for path in sorted((self.run_dir / "objects" / directory).glob("[!.]*.json")):
                item = _read(path, kind)
                if item is not None:  # removed while we read
                    found.append(item)
        return found

    def problems(self) -> list[Problem]:
        """What the reader and the compiler say about the input."""
        return _read(self.run_dir / "objects/problems.json", list[Problem]) or []

    def folder(self) -> str:
        """The folder that `up` follows; "" on a cluster's node."""
        return self._supervisor().folder

    def followed(self) -> Followed:
        return _read(self.run_dir / "objects/folder.json", Followed) or Followed()

    def realised(self, node: str) -> Realised | None:
        """None: the node's loader has not written anything yet."""
        return _read(NodePaths(self.run_dir, node).realised, Realised)

    def place(self, node: str) -> NodePlace:
        """Where the node is on this machine; an empty `netns` is the caller's own."""
        return next((p for p in self.places() if p.name == node), NodePlace(node))

    def places(self) -> list[NodePlace]:
        return self._supervisor().nodes

    def pods(self) -> list[OwnPod]:
        """None on a cluster's node: only the API knows their labels."""
        return self._supervisor().pods

    def label_sets(self) -> dict[int, int]:
        """Number → how many numbers its pods would have by labels. Empty where `pods` is."""
        known = self._supervisor()
        if not known.pods:
            return {}
        # What it imports takes longer than all else here.
        from tidegate_operator.relevance import EXCLUDED, Settings, count_sets  # noqa: PLC0415

        states = [item for item in self.all() if isinstance(item, NodeState)]
        numbers = {
            f"{endpoint.namespace}/{endpoint.name}": endpoint.identity
            for state in states
            for endpoint in state.spec.endpoints
        }
        excluded = EXCLUDED if known.excluded_labels is None else tuple(known.excluded_labels)
        return count_sets(
            ((numbers[pod.key], pod.labels) for pod in known.pods if pod.key in numbers),
            Settings("labels", excluded),
        )

    def _supervisor(self) -> _Supervisor:
        found = _read(self.run_dir / "supervisor.json", _Supervisor)
        return found if found is not None else _Supervisor()

    def pin_dir(self, node: str) -> Path:
        return self._pin_dir or self.run_dir / "bpf" / node


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise CliError(f"{path}: {error}", "is this run directory of another version?") from error
