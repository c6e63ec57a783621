"""YAML text to plain data, one document at a time, with the line of every field.

Stricter than a YAML loader: duplicate keys, keys that are no text, and documents that
grow past a limit by their aliases are errors. Knows nothing of Kubernetes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from tidegate_api.users import short

MAX_DEPTH = 64
MAX_VALUES = 200_000
"""Values in one document after its aliases are expanded."""

_MARKER = re.compile(r"^(?:---|\.\.\.)(?=[ \t\r]|$)")
_JSON_INDENT = re.compile(r"^[ \t]+", re.MULTILINE)
_MERGE = "tag:yaml.org,2002:merge"
_STRING = "tag:yaml.org,2002:str"
_PLAIN = {
    f"tag:yaml.org,2002:{name}"
    for name in ("null", "bool", "int", "float", "str", "timestamp", "binary", "seq", "map")
}


class DocumentError(Exception):
    """The text is not a document we can read. `line` counts from 1 in the text given."""

    def __init__(self, line: int, message: str, remedy: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message
        self.remedy = remedy


@dataclass(frozen=True)
class Chunk:
    """The text of one document; `line` is the file's line of its first line."""

    line: int
    text: str


def split(text: str, *, json: bool = False) -> list[Chunk]:
    """Cut a stream at its document markers, so that a broken document cannot hide
    its neighbours. A marker at column 0 ends a document wherever it stands, so
    this is exact. Chunks without content are left out."""
    text = text.removeprefix("\ufeff")
    if json:  # tabs may indent JSON but not YAML
        text = _JSON_INDENT.sub(lambda match: " " * len(match[0]), text)
    chunks, lines, first = [], [], 1
    for number, line in enumerate(text.split("\n"), start=1):
        if not _MARKER.match(line):
            lines.append(line)
            continue
        chunks.append(Chunk(first, "\n".join(lines)))
        # What follows a marker on its line belongs to the document.
        lines, first = ["   " + line[3:] if line.startswith("---") else ""], number
    chunks.append(Chunk(first, "\n".join(lines)))
    return [chunk for chunk in chunks if _has_content(chunk.text)]


def _has_content(text: str) -> bool:
    for line in text.split("\n"):
        bare = line.strip()
        if bare and not bare.startswith(("#", "%")):
            return True
    return False


@dataclass(frozen=True)
class Loaded:
    data: Any
    """dict, list, str, int, float, bool, None, date, datetime or bytes."""
    root: yaml.Node | None

    def node(self, path: Sequence[str | int]) -> yaml.Node | None:
        """The node at `path`, or the deepest one on the way that exists."""
        node = self.root
        for step in path:
            found = _child(node, step)
            if found is None:
                break
            node = found
        return node

    def line(self, path: Sequence[str | int]) -> int:
        node = self.node(path)
        return node.start_mark.line + 1 if node is not None else 1

    def written(self, path: Sequence[str | int]) -> str:
        """The text of the scalar at `path` as it was written, "" if there is none."""
        node = self.node(path)
        return str(node.value) if isinstance(node, yaml.ScalarNode) else ""


def _child(node: yaml.Node | None, step: str | int) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == step:
                return value  # type: ignore[no-any-return]
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step]  # type: ignore[no-any-return]
    return None


def load(text: str) -> Loaded:
    """Parse one document. Raises DocumentError."""
    loader = yaml.CSafeLoader(text)
    try:
        root = loader.get_single_node()
        data = _Builder(loader).build(root, 0) if root is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "cannot be parsed"
        tab = "\\t" in problem or "tab" in problem or _tab_at(text, mark)
        raise DocumentError(
            mark.line + 1 if mark else 1,
            f"broken YAML: {problem}",
            "indent with spaces, not tabs" if tab else "check indentation, quotes and colons there",
        ) from None
    except yaml.YAMLError as error:
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        raise DocumentError(
            line, f"broken YAML: {str(error).splitlines()[0]}", "save the file as plain UTF-8 text"
        ) from None
    except RecursionError:
        raise DocumentError(
            1, f"nested deeper than {MAX_DEPTH} levels", "flatten the document"
        ) from None
    finally:
        loader.dispose()
    return Loaded(data, root)


def _tab_at(text: str, mark: yaml.Mark | None) -> bool:
    lines = text.split("\n")
    if mark is None or mark.line >= len(lines):
        return False
    line = lines[mark.line]
    return "\t" in line[: len(line) - len(line.lstrip())]


class _Builder:
    """Nodes to data, counting what aliases multiply."""

    def __init__(self, loader: yaml.CSafeLoader) -> None:
        self._loader = loader
        self._left = MAX_VALUES

    def build(self, node: yaml.Node, depth: int) -> Any:
        line = node.start_mark.line + 1
        self._left -= 1
        if self._left < 0:
            raise DocumentError(
                line,
                f"more than {MAX_VALUES} values after expanding aliases",
                "split the document, or write fewer aliases",
            )
        if depth > MAX_DEPTH:
            raise DocumentError(line, f"nested deeper than {MAX_DEPTH} levels", "flatten it")
        if node.tag not in _PLAIN:
            raise DocumentError(line, f"tag {node.tag} has no meaning here", "remove the tag")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, depth + 1) for item in node.value]
        try:
            return self._loader.construct_object(node)
        except (ValueError, LookupError, AttributeError):
            # A date or number that there is not, or !!bool, !!int and !!timestamp of something
            # else: PyYAML's own accidents.
            text = f"{short(node.value)!r} is no {node.tag.rpartition(':')[2]}"
            raise DocumentError(line, text, "quote the value") from None

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag == _MERGE:
                for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(source, yaml.MappingNode):
                        raise DocumentError(line, "<< merges something that is no map", "remove it")
                    merged = {**self._mapping(source, depth + 1), **merged}
                continue
            if not isinstance(key, yaml.ScalarNode) or key.tag != _STRING:
                text = f"key {short(str(key.value))!r} is not text"
                raise DocumentError(line, text, "write text, in quotes if need be")
            if key.value in own:
                text = f"key {short(key.value)!r} appears twice"
                raise DocumentError(line, text, "remove one of them")
            own[key.value] = self.build(value, depth + 1)
        return {**merged, **own}
