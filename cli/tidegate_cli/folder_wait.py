"""Of policies in a folder that `tidegate up` follows: whether what the folder holds now is what is
published, and every loader has that in force."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import UNSET
from tidegate_api.state import (
    DIGEST_ANNOTATION,
    NodeState,
    PeerDigests,
    PeerSet,
    StateObject,
    StateSlice,
)
from tidegate_operator import manifests

from tidegate_cli.errors import CliError
from tidegate_cli.objects import Problem, RunObjects
from tidegate_cli.policy_wait import Look, Target


class Folder:
    """CliError: nothing is up there that follows one."""

    def __init__(self, run: RunObjects) -> None:
        self._run = run
        folder = run.folder()
        if not folder:
            raise CliError(
                f"{run.run_dir} is a node's, and follows no folder",
                "ask the cluster: --kubeconfig, or --context",
            )
        self._folder = Path(folder)
        self._digests = PeerDigests()

    def looks(self, targets: Sequence[Target]) -> dict[Target, Look]:
        # Where no policy is named, all of it is meant.
        wanted = [*targets] or [Target("Folder", "", str(self._folder))]
        now, told = manifests.digests(self._folder), self._run.followed()
        if now is None:
            return dict.fromkeys(wanted, Look(f"{self._folder} is not there"))
        changed = sorted(k for k in now.keys() | told.files.keys()
                         if now.get(k) != told.files.get(k))  # fmt: skip
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            return dict.fromkeys(wanted, Look(f"{changed[0]}{more}: not taken over yet"))
        for target in targets:
            if str(target) not in told.policies and not self._problems(target):
                raise CliError(f"there is no {target} in {self._folder}", "write it first")
        behind = self.missing(wanted)
        return {target: self._look(target, behind) for target in wanted}

    def _look(self, target: Target, behind: Mapping[str, str]) -> Look:
        problems = self._problems(target)
        if problems:
            return Look("; ".join(map(str, problems)), failed=True)
        total = len(self._run.nodes())
        text = f"in force on {total - len(behind)} of {total} nodes"
        nodes = {"realised": total - len(behind), "total": total}
        if behind:
            return Look(f"{text}, not yet on {', '.join(behind)}", more={"nodes": nodes})
        return Look(text, True, more={"nodes": nodes})

    def _problems(self, target: Target) -> list[Problem]:
        """Errors of the policy; of the whole folder where none is named."""
        return [
            problem
            for problem in self._run.problems()
            if problem.severity == "error"
            and (target.kind == "Folder" or problem.object == str(target))
        ]

    def missing(self, _targets: Sequence[Target]) -> dict[str, str]:
        """Node → why. A node has all in force, or not."""
        objects = self._run.all()
        peers = _peers(objects)
        found = {}
        for state in objects:
            if isinstance(state, NodeState):
                text = self._why(state, peers)
                if text:
                    found[state.metadata.name] = text
        return found

    def _why(self, state: NodeState, peers: Mapping[str, PeerSet]) -> str:
        held = self._run.realised(state.metadata.name)
        if held is None:
            return "its loader has said nothing yet"
        wanted = (state.metadata.annotations or {}).get(DIGEST_ANNOTATION)
        members = self._digests.of(state.spec.peer_sets, peers)
        if held.digest == wanted and held.peer_sets in (members, UNSET):
            return ""
        for condition in held.status.conditions:
            if (condition.type, condition.status) in (("Stalled", "True"), ("Ready", "False")):
                return condition.message
        return "it is on its way"


def _peers(objects: Sequence[StateObject]) -> dict[str, PeerSet]:
    """Of the newest epoch of their table."""
    found: dict[str, PeerSet] = {}
    slices = [item for item in objects if isinstance(item, StateSlice)]
    for item in sorted(slices, key=lambda item: item.spec.epoch):
        found.update((peer.name, peer) for peer in item.spec.peers or ())
    return found
