"""What the operator's tests are given: documents from YAML text."""

from __future__ import annotations

import tempfile
import textwrap
from pathlib import Path

from tidegate_operator import identities, world
from tidegate_operator.compile import Desired, compile
from tidegate_operator.identities import EMPTY_LEDGER, Ledger
from tidegate_operator.manifests import Document, Folder, Input
from tidegate_operator.relevance import Settings
from tidegate_operator.world import MadeWorld


def read(**files: str) -> Input:
    """One read of a folder with these files; `a__yaml` is a.yaml."""
    with tempfile.TemporaryDirectory() as directory:
        for name, text in files.items():
            put(Path(directory) / name.replace("__", "."), text)
        return Folder(Path(directory)).read()


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


def documents(text: str) -> tuple[Document, ...]:
    found = read(a__yaml=text)
    errors = [problem for problem in found.problems if problem.severity == "error"]
    assert errors == []
    return found.documents


BY_LABELS = world.Options(identities=Settings(by="labels"))
"""Each set of labels has its number, whatever policies there are."""


def make(text: str, options: world.Options = BY_LABELS) -> MadeWorld:
    return world.build(documents(text), options)[0]


def compiled(text: str) -> tuple[MadeWorld, Ledger, Desired]:
    now = make(text)
    ledger = identities.allocate(now, EMPTY_LEDGER)
    return now, ledger, compile(now, ledger)


def pod(name: str, labels: str = "{}", namespace: str = "default", rest: str = "") -> str:
    return (
        f"---\napiVersion: v1\nkind: Pod\n"
        f"metadata: {{name: {name}, namespace: {namespace}, labels: {labels}}}\n"
        f"spec: {{containers: [{{name: c, ports: [{{containerPort: 80, name: web}}]}}]{rest}}}\n"
    )


def policy(name: str, spec: str, namespace: str = "default") -> str:
    return (
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n"
        f"metadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    )


def service(name: str, spec: str, namespace: str = "default") -> str:
    return (
        f"---\napiVersion: v1\nkind: Service\n"
        f"metadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    )
