"""The folder: every manifest below a path, validated, each with its last valid meaning.

What cannot be read or understood never takes away what was in force: a document that
became invalid keeps its last valid version, a policy that never had one fails closed, an
unreadable file, directory or folder keeps everything it held. Only a file or document that is
really gone removes.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError
from tidegate_api.kinds import KINDS, AnyObject
from tidegate_api.users import short

from tidegate_operator import disk, meanings, unread, yamldoc
from tidegate_operator.policies import RulePlace
from tidegate_operator.problems import Problem, Source, at

MAX_DOCUMENTS = 10_000
"""Documents in one file, items of lists included."""
MAX_NAME = 253
"""Characters of a name; longer ones no object has."""
MAX_ERRORS = 10
"""Errors reported for one object."""

BOUNDS = {
    "greater_than_equal": "ge",
    "less_than_equal": "le",
    "too_short": "min_length",
    "too_long": "max_length",
    "string_too_short": "min_length",
    "string_too_long": "max_length",
}
"""pydantic's errors of this sort, and where each says the bound."""

STAYS = "the last valid version stays in force"
CLOSED = (
    "until then it isolates whom it selects, its rules that are not understood allow nothing, and "
    "those that would deny or pass deny everything"
)


class Key(NamedTuple):
    """What makes two documents the same object."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        name = f"{self.namespace}/{self.name}" if self.namespace else self.name
        return f"{self.kind} {name}"


@dataclass(frozen=True, eq=False)
class Closed:
    """A policy that is not as it should be, as far as it can be read: see `unread`."""

    object: meanings.WrittenPolicy
    rules: tuple[RulePlace, ...]
    """Those that are not understood."""


@dataclass(frozen=True, eq=False)
class Document:
    """One valid object. While its text does not change, `object` is the same Python
    object in every read, so readers may cache by identity."""

    key: Key
    object: AnyObject
    source: Source
    stale: bool = False
    """In force although the file no longer says so: its text is invalid now."""
    closed: Closed | None = None
    """Of a policy that was never valid: `object` is what can be read of it."""


@dataclass(frozen=True)
class Input:
    """One read. Not `complete`: the folder was never read, so its emptiness means
    nothing and nothing may be written."""

    documents: tuple[Document, ...]
    problems: tuple[Problem, ...]
    complete: bool
    files: Mapping[str, str] = field(default_factory=dict)
    """File → `digest` of what was read of it; "" of one that cannot be read."""


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digests(path: Path) -> dict[str, str] | None:
    """`Input.files` as a read of the folder would find them now; None: it is not there."""
    listing = disk.listed(path)
    if listing.names is None:
        return None
    found = {}
    for name in listing.names:
        try:
            found[name] = digest(disk.contents(path / name))
        except disk.Gone:  # between listing and reading
            continue
        except (OSError, disk.Unusable):
            found[name] = ""
    return found


@dataclass(frozen=True)
class _Item:
    """One object of a chunk: valid (`object`), or not (`problems`); `key` is None
    where not even the name could be read. Lines count from the chunk's first."""

    line: int
    key: Key | None = None
    object: AnyObject | None = None
    problems: tuple[Problem, ...] = ()
    closed: Closed | None = None
    skipped: tuple[str, str] | None = None
    """(apiVersion, kind) of a kind that is none of ours."""


@dataclass
class _File:
    """What one file last said. `held` is in force, whatever the text says now."""

    data: bytes = b""
    chunks: dict[str, tuple[_Item, ...]] = field(default_factory=dict)
    held: tuple[Document, ...] = ()
    problems: tuple[Problem, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    digest: str = ""
    """Of `data`; "" where that could not be read."""


class Folder:
    """The manifests below `path`. Not thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, _File] = {}
        self._links: tuple[str, ...] = ()
        self._complete = False

    def linked(self) -> tuple[tuple[int, int, int] | None, ...]:
        """What changes with any file elsewhere that a link here pointed to at the last read: no
        watch of the folder tells of it."""
        return tuple(disk.stamp(self._path / name) for name in self._links)

    def read(self) -> Input:
        """Read what is there now. Never raises for what the folder holds."""
        listing = disk.listed(self._path)
        problems = list(listing.problems)
        if listing.names is not None:
            self._complete = True
            self._links = tuple(n for n in listing.names if (self._path / n).is_symlink())
            for gone in set(self._files) - set(listing.names):
                if not any(gone.startswith(f"{held}/") for held in listing.unreadable):
                    del self._files[gone]
            for name in listing.names:
                self._read_file(name)
        documents, late = self._resolve()
        for name in sorted(self._files):
            problems += self._files[name].problems
        problems += late + self._skipped()
        if listing.names is not None and not documents and not self._files:
            text = f"no {', '.join(disk.SUFFIXES)} file here"
            problems.append(
                Problem(severity="warning", message=text, remedy="put manifests into the folder")
            )
        files = {name: item.digest for name, item in self._files.items()}
        return Input(documents, tuple(problems), self._complete, files)

    def _read_file(self, name: str) -> None:
        known = self._files.setdefault(name, _File())
        try:
            data = disk.contents(self._path / name)
        except disk.Gone:  # between listing and reading
            del self._files[name]
            return
        except (OSError, disk.Unusable) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            stays = f"; {STAYS}" if known.held else ""
            problem = Problem(
                severity="error",
                file=name,
                message=f"cannot be read: {reason}{stays}",
                remedy="make it a readable file of our size limit",
            )
            # Forget the text, so that the next readable one is parsed anew.
            self._files[name] = replace(known, data=b"", digest="", problems=(problem,))
            return
        if data != known.data or not known.chunks:
            self._files[name] = replace(_parse_file(name, data, known), digest=digest(data))

    def _resolve(self) -> tuple[tuple[Document, ...], list[Problem]]:
        """One document a key: the first in order of file and place, but what a file
        says now before what another one only used to say."""
        chosen: dict[Key, Document] = {}
        problems = []
        held = [document for name in sorted(self._files) for document in self._files[name].held]
        for stale in (False, True):
            for document in held:
                if document.stale != stale:
                    continue
                first = chosen.setdefault(document.key, document)
                if first is document or stale:
                    continue
                problems.append(
                    at(
                        document.source,
                        "error",
                        f"is defined a second time; the one in {first.source.file}, document "
                        f"{first.source.document} (line {first.source.line}), stays in force",
                        object=str(document.key),
                        field="metadata.name",
                        remedy="rename or remove one of the two",
                    )
                )
        return tuple(sorted(chosen.values(), key=lambda document: document.key)), problems

    def _skipped(self) -> list[Problem]:
        """Kinds that are none of ours, each named once with how many there are."""
        count: dict[tuple[str, str], int] = {}
        for file in self._files.values():
            for kind in file.skipped:
                count[kind] = count.get(kind, 0) + 1
        return [
            Problem(
                severity="info",
                object=f"{kind} ({version})",
                message=f"{number} skipped: Tidegate does not read this kind",
            )
            for (version, kind), number in sorted(count.items())
        ]


# ---- One file -------------------------------------------------------------------------


def _parse_file(name: str, data: bytes, known: _File) -> _File:
    """The file's new meaning, with what `known` held for documents now invalid."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        item = _Item(
            line=data[: error.start].count(b"\n") + 1,
            problems=(Problem(severity="error", message="is not UTF-8", remedy="save as UTF-8"),),
        )
        return _assemble(name, data, known, [(0, item)], {})
    chunks: dict[str, tuple[_Item, ...]] = {}
    items: list[tuple[int, _Item]] = []
    for index, chunk in enumerate(yamldoc.split(text, json=name.endswith(".json")), start=1):
        found = chunks.get(chunk.text) or known.chunks.get(chunk.text)
        chunks[chunk.text] = found or tuple(_parse_chunk(chunk.text))
        for item in chunks[chunk.text]:
            items.append((index, replace(item, line=item.line + chunk.line - 1)))
        if len(items) > MAX_DOCUMENTS:
            problem = Problem(
                severity="error",
                message=f"more than {MAX_DOCUMENTS} documents",
                remedy="split the file",
            )
            return _assemble(name, data, known, [(0, _Item(1, problems=(problem,)))], {})
    return _assemble(name, data, known, items, chunks)


def _assemble(
    name: str,
    data: bytes,
    known: _File,
    items: list[tuple[int, _Item]],
    chunks: dict[str, tuple[_Item, ...]],
) -> _File:
    valid = [
        Document(item.key, item.object, Source(name, index, item.line))
        for index, item in items
        if item.object is not None and item.key is not None
    ]
    keys = {document.key for document in valid}
    broken = [(index, item) for index, item in items if item.problems]
    named = {item.key for _, item in broken if item.key is not None}
    nameless = any(item.key is None for _, item in broken)
    # A document that cannot even be named might be any of those that are missing.
    kept = [
        replace(document, stale=True)
        for document in known.held
        if document.key not in keys
        and (nameless or document.key in named)
        and (document.closed is None or document.key not in named)
    ]
    kept_keys = {document.key for document in kept}
    closed = [
        Document(item.key, item.closed.object, Source(name, index, item.line), closed=item.closed)
        for index, item in broken
        if item.closed is not None and item.key is not None and item.key not in keys | kept_keys
    ]
    closed_keys = {document.key for document in closed}
    problems = []
    for index, item in broken:
        tail = ""
        if item.key in closed_keys:
            tail = f"; {CLOSED}"
        elif item.key in kept_keys or (item.key is None and kept):
            tail = f"; {STAYS}"
        problems += [_placed(problem, name, index, item, tail) for problem in item.problems]
    skipped = tuple(item.skipped for _, item in items if item.skipped is not None)
    return _File(data, chunks, (*valid, *kept, *closed), tuple(problems), skipped)


def _placed(problem: Problem, file: str, index: int, item: _Item, tail: str) -> Problem:
    """`problem` of a chunk, with its place in the file. The chunk's own problem carries
    its line relative to the item."""
    return Problem(
        severity=problem.severity,
        file=file,
        document_index=index,
        line=item.line + problem.line,
        object=problem.object,
        field=problem.field,
        message=problem.message + tail,
        remedy=problem.remedy,
    )


# ---- Documents -----------------------------------------------------------------------


def _error(message: str, remedy: str, *, line: int = 0, what: str = "", at: str = "") -> Problem:
    return Problem(
        severity="error", line=line, object=what, field=at, message=message, remedy=remedy
    )


def _parse_chunk(text: str) -> Iterator[_Item]:
    try:
        loaded = yamldoc.load(text)
    except yamldoc.DocumentError as error:
        yield _Item(error.line, problems=(_error(error.message, error.remedy),))
        return
    if loaded.data is None:
        return
    yield from _parse_object(loaded, loaded.data, (), ("", ""))


def _parse_object(
    loaded: yamldoc.Loaded, data: Any, path: tuple[str | int, ...], implied: tuple[str, str]
) -> Iterator[_Item]:
    """`implied`: apiVersion and kind that items of a typed list need not repeat."""
    line = loaded.line(path)
    where = _field(path)
    if not isinstance(data, dict):
        text = f"is {_kind_of(data)}, not an object"
        problem = _error(text, "write apiVersion, kind and metadata", at=where)
        yield _Item(line, problems=(problem,))
        return
    version, kind = data.get("apiVersion") or implied[0], data.get("kind") or implied[1]
    if not isinstance(version, str) or not isinstance(kind, str) or not version or not kind:
        missing = "kind" if isinstance(version, str) and version else "apiVersion"
        problem = _error(
            "is not a Kubernetes object", f"give it {missing}", at=_field((*path, missing))
        )
        yield _Item(line, problems=(problem,))
        return
    of = (version, kind.removesuffix("List"))
    # A kind of somebody else's may end in List, too, and mean something else by items.
    ours = kind == "List" or (kind.endswith("List") and of in KINDS)
    if ours or (kind.endswith("List") and isinstance(data.get("items"), list)):
        listed = [] if data.get("items") is None else data["items"]
        if not isinstance(listed, list):
            problem = _error(
                f"is {_kind_of(listed)}, not a list",
                "write a list",
                line=loaded.line((*path, "items")) - line,
                what=kind,
                at=_field((*path, "items")),
            )
            yield _Item(line, problems=(problem,))
            return
        for index, item in enumerate(listed):
            below = (*path, "items", index)
            yield from _parse_object(loaded, item, below, ("", "") if kind == "List" else of)
        return
    model = KINDS.get((version, kind))
    if model is not None:
        body = {**data, "apiVersion": version, "kind": kind}
        yield _validate(loaded, body, path, model)
        return
    versions = [known for known, name in KINDS if name == kind]
    if not versions:
        yield _Item(line, skipped=(short(version), short(kind)))
        return
    problem = _error(
        f"{kind} of {version} is not read",
        f"use apiVersion {versions[0]}",
        what=kind,
        at=_field((*path, "apiVersion")),
    )
    yield _Item(line, _key(data, kind), problems=(problem,))


def _key(data: dict[str, Any], kind: str) -> Key | None:
    metadata = data.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or not isinstance(name, str) or not name:
        return None
    namespaced = next((m.namespaced for (_, k), m in KINDS.items() if k == kind), True)
    namespace = metadata.get("namespace") or "default"
    return Key(kind, str(namespace) if namespaced else "", name)


def _called(key: Key) -> str:
    return str(key) if len(key.name) <= MAX_NAME else f"{key.kind} {short(key.name)}"


def _validate(
    loaded: yamldoc.Loaded,
    data: dict[str, Any],
    path: tuple[str | int, ...],
    model: type[AnyObject],
) -> _Item:
    line = loaded.line(path)
    key = _key(data, data["kind"])
    try:
        return _Item(line, key, model.model_validate(data))
    except ValidationError as error:
        what = _called(key) if key else str(data["kind"])
        details = error.errors(include_url=False)
        problems = [
            _explain(detail, loaded, path, (model, what)) for detail in details[:MAX_ERRORS]
        ]
        if len(details) > MAX_ERRORS:
            text = f"and {len(details) - MAX_ERRORS} more errors"
            problems.append(_error(text, "repair the first ones", what=what))
        return _Item(
            line,
            key,
            problems=tuple(_relative(problem, line) for problem in problems),
            closed=_closed(data, error, model) if key is not None else None,
        )


def _closed(data: dict[str, Any], error: ValidationError, model: type[AnyObject]) -> Closed | None:
    """None: no policy, or not even whom it selects can be told."""
    if not issubclass(model, meanings.WrittenPolicy):
        return None
    tree = copy.deepcopy(data)
    try:
        rules = unread.leave(tree, error, model)
        return Closed(model.model_validate(tree), rules)
    except (unread.Unreadable, ValidationError):
        return None


def _relative(problem: Problem, base: int) -> Problem:
    """`problem` with its line counted from `base` instead of from 1."""
    return Problem(
        severity=problem.severity,
        line=max(problem.line - base, 0),
        object=problem.object,
        field=problem.field,
        message=problem.message,
        remedy=problem.remedy,
    )


# ---- What pydantic found, in our words ---------------------------------------------------


def _explain(
    detail: Any,
    loaded: yamldoc.Loaded,
    path: tuple[str | int, ...],
    about: tuple[type[BaseModel], str],
) -> Problem:
    model, what = about
    spot = tuple(detail["loc"])
    full = (*path, *spot)
    message, remedy = _words(detail, loaded.written(full), model)
    return _error(message, remedy, line=loaded.line(full), what=what, at=_field(full))


def _words(detail: Any, written: str, model: type[BaseModel]) -> tuple[str, str]:
    """(message, remedy) for one pydantic error."""
    kind, value = detail["type"], detail["input"]
    context = detail.get("ctx", {})
    if kind == "tidegate":
        return context["message"], context["remedy"]
    if kind == "extra_forbidden":
        name = str(detail["loc"][-1])
        close = difflib.get_close_matches(name, _field_names(model, detail["loc"][:-1]), n=1)
        hint = f"did you mean {close[0]}?" if close else "remove it or check its spelling"
        return f"unknown field {name!r}", hint
    if kind == "missing":
        return "is missing", f"give {detail['loc'][-1]}"
    if kind == "string_type" and isinstance(value, bool | int | float | date):
        shown = short(written or str(value))
        return f"{shown} is {_kind_of(value)} in YAML, not text", f'quote it: "{shown}"'
    if kind in ("literal_error", "enum"):
        return f"{str(value)[:60]!r} is not a value of this field", f"use {context['expected']}"
    if kind in ("int_type", "int_parsing") and isinstance(value, str) and value.isdigit():
        return f"{short(value)!r} is text, not a number", f"write it without quotes: {short(value)}"
    if kind in BOUNDS:
        bound = context[BOUNDS[kind]]
        word = "least" if BOUNDS[kind] in ("ge", "min_length") else "most"
        if "actual_length" in context:
            return f"has {context['actual_length']}", f"write at {word} {bound}"
        return f"{short(str(value))} is out of bounds", f"write at {word} {bound}"
    expected = {
        "int_type": "a number",
        "bool_type": "true or false",
        "string_type": "text",
        "list_type": "a list",
        "dict_type": "a map",
        "model_type": "a map",
        "model_attributes_type": "a map",
    }.get(kind)
    if expected:
        return f"is {_kind_of(value)}, not {expected}", f"write {expected}"
    return str(detail["msg"]), "see the field's description in the Kubernetes API"


def _field_names(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """The fields of the type at `path` below `model`, for spelling hints."""
    for step in path:
        if isinstance(step, int):
            continue
        for name, info in model.model_fields.items():
            if (info.alias or name) == step:
                model = _model_in(info.annotation) or model
    return [info.alias or name for name, info in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(part) for part in get_args(annotation))
    return next((model for model in found if model is not None), None)


def _kind_of(value: object) -> str:
    if value is None:
        return "empty"
    names = (
        (bool, "a boolean"),
        (int | float, "a number"),
        (str, "text"),
        (list, "a list"),
        (dict, "a map"),
        (date, "a date"),
    )
    return next((name for kind, name in names if isinstance(value, kind)), "something else")


def _field(path: tuple[str | int, ...]) -> str:
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif any(mark in step for mark in "./["):
            text += f"[{step[:60]!r}]"
        else:
            text += f".{step[:60]}" if text else step[:60]
    return text
