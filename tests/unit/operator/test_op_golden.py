"""YAML in, objects out, whole. To accept a change of meaning, delete the .out.yaml file,
run the test once and read what it wrote."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from tidegate_operator import publish
from tidegate_operator.standalone import compile_folder

CASES = Path(__file__).parents[2] / "golden/compile"


@pytest.mark.parametrize("case", sorted(path.name for path in CASES.iterdir() if path.is_dir()))
def test_golden(case: str) -> None:
    desired, ledger, problems, *_ = compile_folder(CASES / case / "in")
    assert desired is not None
    stream = io.StringIO()
    for problem in problems:
        stream.write(f"# {problem}\n")
    publish.write_stream(desired, ledger, stream, "yaml")
    # Shards that hold nothing say nothing.
    documents = stream.getvalue().split("---\n")
    empty = ("ipcache: []\n", "services: []\n", "peers: []\n")
    got = "---\n".join(text for text in documents if not text.endswith(empty))
    expected = CASES / case / "out.yaml"
    if not expected.exists():
        expected.write_text(got)
        pytest.fail(f"{expected.name} was not there: written, read it and commit it")
    assert got == expected.read_text()
