"""Golden text, end to end: YAML in, the kernel's maps out, in both orders of arrival, down and up.

TIDEGATE_GOLDEN=write writes the golden text anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support import ca_dump, ca_maps, ca_rig
from support.clusters import Manifest

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.yaml"))
NODES = ("node-1", "node-2")


class Bench:
    """One operator and both nodes' maps, from nothing."""

    def __init__(self, folder: Path, nodes: dict[str, ca_rig.Bookkeeper], bpf: Path) -> None:
        self._operator = ca_rig.Operator(folder)
        self._nodes, self._bpf = nodes, bpf

    def step(self, wanted: list[Manifest]) -> str:
        """Bring it up to `wanted`; what the maps then hold, as text."""
        made = self._operator.step(wanted)
        identities = {n: _identity(key) for key, n in made.ledger.live.items()}
        pods = {a: str(name) for name, pod in made.world.pods.items() for a in pod.addresses}
        parts = []
        for name, node in self._nodes.items():
            node.apply(made.state(name), made.interfaces(name))
            found = ca_maps.read(self._bpf / name)
            assert found.problems == []
            parts.append(f"# {name}\n{ca_dump.text(found, identities, pods)}")
        return "\n".join(parts)


def _identity(key: object) -> str:
    labels = ",".join(f"{k}={v}" for k, v in key.labels)  # type: ignore[attr-defined]
    return f"{key.namespace}[{labels}]"  # type: ignore[attr-defined]


@pytest.fixture
def bpf(tmp_path: Path) -> Iterator[Path]:
    with ca_rig.mounted(tmp_path / "bpf") as mounted:
        yield mounted


@pytest.fixture
def bench(tmp_path: Path, bpf: Path) -> Iterator[Bench]:
    folder = tmp_path / "folder"
    folder.mkdir()
    first, second = (bpf / name for name in NODES)
    with ca_rig.from_scratch(first) as one, ca_rig.from_scratch(second) as two:
        yield Bench(folder, dict(zip(NODES, (one, two), strict=True)), bpf)


def _documents(case: str) -> list[Manifest]:
    return list(yaml.safe_load_all((GOLDEN / f"{case}.yaml").read_text()))


def _is_policy(document: Manifest) -> bool:
    return bool(document["kind"] == "NetworkPolicy")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policies_first", [True, False])
def test_documents_to_maps(bench: Bench, case: str, policies_first: bool) -> None:
    documents = _documents(case)
    bench.step([d for d in documents if _is_policy(d) == policies_first])
    found = bench.step(documents)
    golden = GOLDEN / f"{case}.txt"
    if os.environ.get("TIDEGATE_GOLDEN") == "write":
        golden.write_text(found)
    assert golden.read_text() == found


@pytest.mark.parametrize("case", CASES)
def test_down_and_up_again(bench: Bench, case: str) -> None:
    documents = _documents(case)
    empty = bench.step([])
    open_ = bench.step([d for d in documents if not _is_policy(d)])
    full = bench.step(documents)
    assert full == (GOLDEN / f"{case}.txt").read_text()
    assert bench.step([d for d in documents if not _is_policy(d)]) == open_
    assert bench.step(documents) == full
    assert bench.step([]) == empty
    assert "endpoint" not in empty
    assert "frontend" not in empty
