"""The help texts in the docs are the real ones, and every flag is somewhere in the docs.

A help text is embedded as a code block after the line `<!-- help: PROGRAM WORDS -->`. After a
change of arguments, write them anew with

    python tests/unit/docs/test_dc_help.py
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from tidegate_cli.main import build_parser

DOCS = Path(__file__).parents[3] / "docs"
MODULES = {
    "tidegate-loader": "tidegate_loader",
    "tidegate-node-setup": "tidegate_loader.setup",
    "tidegate-observer": "tidegate_observer",
    "tidegate-relay": "tidegate_observer.relay_main",
    "tidegate-operator": "tidegate_operator",
}
"""Programs that are no part of `tidegate` -> what runs them."""
COLUMNS = "100"
EMBEDDED = re.compile(r"^<!-- help: (.+?) -->\n```text\n(.*?)^```$", re.M | re.S)

# argparse words and wraps its help otherwise in other versions.
same_argparse = pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="the embedded texts are those of Python 3.11"
)


def _parsers(
    parser: argparse.ArgumentParser, name: str
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, sub in action.choices.items():
                yield from _parsers(sub, f"{name} {word}")


def _real_helps() -> dict[str, str]:
    """Every command, group of commands and program -> what its --help prints."""
    environment = {**os.environ, "COLUMNS": COLUMNS}
    # The parser takes its name from argv[0], usage texts from the parser's prog.
    with mock.patch.dict(os.environ, environment), mock.patch.object(sys, "argv", ["tidegate"]):
        helps = {name: p.format_help() for name, p in _parsers(build_parser(), "tidegate")}
    for program, module in MODULES.items():
        helps[program] = subprocess.run(
            [sys.executable, "-m", module, "--help"],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    return helps


@pytest.fixture(scope="module")
def real() -> dict[str, str]:
    return _real_helps()


def _texts() -> dict[Path, str]:
    return {path: path.read_text() for path in sorted(DOCS.rglob("*.md"))}


def _embedded() -> dict[str, str]:
    return {name: text for page in _texts().values() for name, text in EMBEDDED.findall(page)}


@same_argparse
def test_embedded_help_is_the_real_one(real: dict[str, str]) -> None:
    embedded = _embedded()
    assert embedded == {name: real.get(name) for name in embedded}


def test_every_command_and_program_has_its_help_embedded(real: dict[str, str]) -> None:
    groups = {name for name in real if any(other.startswith(f"{name} ") for other in real)}
    assert set(real) - (groups - {"tidegate"}) - set(_embedded()) == set()


def test_every_marker_has_its_block() -> None:
    # One that is spelt otherwise would be compared with nothing.
    for path, page in _texts().items():
        assert page.count("<!-- help:") == len(EMBEDDED.findall(page)), path


def test_every_flag_is_told(real: dict[str, str]) -> None:
    docs = "\n".join(_texts().values())
    told = set(re.findall(r"(?<![\w-])--?[A-Za-z0-9][\w-]*", docs))
    flags = {
        flag
        for text in real.values()
        for flag in re.findall(r"(?<![\w-])--?[A-Za-z0-9][\w-]*", text)
    }
    assert {"-o", "-6", "--node", "--force-clsact"} <= flags
    assert sorted(flags - told) == []


def _write() -> None:
    helps = _real_helps()
    for path, page in _texts().items():
        written = EMBEDDED.sub(
            lambda found: f"<!-- help: {found[1]} -->\n```text\n{helps[found[1]]}```", page
        )
        if written != page:
            path.write_text(written)
            print(f"wrote {path}")


if __name__ == "__main__":
    _write()
