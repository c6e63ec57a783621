"""A cluster without the operator and the loaders: only what `standalone` makes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.harness import Bare
from tidegate_cli.standalone import teardown
from tidegate_cli.standalone.rundir import RunDir


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Bare]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    cluster = Bare(RunDir.at(tmp_path / "run"), tmp_path / "layout.json")
    try:
        yield cluster
    finally:
        if cluster.process is not None:
            cluster.process.kill()
            cluster.process.communicate()
        teardown.down(cluster.run_dir)
