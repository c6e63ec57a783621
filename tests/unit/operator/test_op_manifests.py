"""The folder: styles that people write, broken ones, and what stays in force."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tidegate_operator import disk, manifests, yamldoc
from tidegate_operator.manifests import STAYS, Folder, Input
from unit.operator.given import pod, policy, put, read


def _names(found: Input) -> list[str]:
    return [str(document.key) for document in found.documents]


POD = pod("a")
STYLES = [
    ("missing namespace", "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n"
     "spec: {containers: [{name: c}]}", ["Pod default/a"]),
    ("CRLF", POD.replace("\n", "\r\n") * 1, ["Pod default/a"]),
    ("BOM", "\ufeff" + POD, ["Pod default/a"]),
    ("no final newline, end marker", POD + "...", ["Pod default/a"]),
    ("comments and empty documents", f"# x\n---\n# y\n---\n{POD}\n---\n", ["Pod default/a"]),
    ("content on the marker's line", "--- {apiVersion: v1, kind: Namespace, metadata: {name: n}}",
     ["Namespace n"]),
    ("directive", "%YAML 1.1\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: n}\n",
     ["Namespace n"]),
    ("a marker inside a block scalar ends it, as YAML says",
     "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: n\n  annotations:\n    a: |\n"
     "      x\n---\n" + POD, ["Namespace n", "Pod default/a"]),
    ("anchors and merge keys",
     "apiVersion: v1\nkind: Pod\nmetadata: &m\n  name: a\n  labels: &l {a: b}\nspec:\n"
     "  containers:\n  - &c {name: c}\n  - {<<: *c, name: d}\n", ["Pod default/a"]),
    ("List", "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Namespace, "
     "metadata: {name: n}}\n- {apiVersion: v1, kind: Namespace, metadata: {name: m}}\n",
     ["Namespace m", "Namespace n"]),
    ("typed list", "apiVersion: v1\nkind: NamespaceList\nitems:\n- {metadata: {name: n}}\n",
     ["Namespace n"]),
    ("null items", "apiVersion: v1\nkind: List\nitems:\n", []),
    ("no items", "apiVersion: v1\nkind: PodList\n", []),
    ("exported: status and null timestamp", "apiVersion: v1\nkind: Namespace\nmetadata: "
     "{name: n, creationTimestamp: null, uid: x}\nspec: {finalizers: [k]}\nstatus: {phase: A}\n",
     ["Namespace n"]),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "text", "expected"), STYLES)
def test_styles(tmp_path: Path, reason: str, text: str, expected: list[str]) -> None:
    (tmp_path / "a.yml").write_bytes(text.encode())
    found = Folder(tmp_path).read()
    assert (_names(found), list(found.problems)) == (expected, [])


def test_json_indented_with_tabs(tmp_path: Path) -> None:
    text = '{\n\t"apiVersion": "v1",\n\t"kind": "Namespace",\n\t"metadata": {"name": "n"}\n}\n'
    (tmp_path / "a.json").write_text(text)
    assert _names(Folder(tmp_path).read()) == ["Namespace n"]


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefg", "bcdefgh", strict=True)
)
BROKEN = [
    ("tab", "a:\n\tb: 1\n", 2, "not tabs"),
    ("not closed", "a: [1\nb: 2\n", 2, "check indentation"),
    ("duplicate key", "a: 1\nb: 2\na: 3\n", 3, "remove one"),
    ("key is a boolean", "on: 1\n", 1, "in quotes"),
    ("alias bomb", BOMB, 0, "fewer aliases"),
    ("alias to itself", "a: &a [*a]\n", 1, ""),
    ("unknown tag", "a: !python/name:os.system 1\n", 1, "remove the tag"),
    ("unknown alias", "a: *b\n", 1, ""),
    ("impossible date", "a: 2024-13-45\n", 1, "quote"),
    ("no boolean", "a: !!bool maybe\n", 1, "quote"),
    ("no number", "a: !!int _\n", 1, "quote"),
    ("no date", "a: !!timestamp x\n", 1, "quote"),
    ("too many digits", f"a: {'9' * 5000}\n", 1, "quote"),
    ("items that are no list", "apiVersion: v1\nkind: List\nitems: {}\n", 3, "write a list"),
    ("items of a typed list", "apiVersion: v1\nkind: PodList\nitems: x\n", 3, "write a list"),
    ("control character", "a: \x00\n", 1, ""),
    ("scalar", "hello\n", 1, "write apiVersion"),
    ("no kind", "apiVersion: v1\n", 1, "give it kind"),
]


@pytest.mark.parametrize(("reason", "text", "line", "remedy"), BROKEN)
def test_broken_document_spares_its_neighbours(
    reason: str, text: str, line: int, remedy: str
) -> None:
    found = read(a__yaml=f"{pod('x')}---\n{text}{pod('y')}")
    assert _names(found) == ["Pod default/x", "Pod default/y"]
    assert [problem.severity for problem in found.problems] == ["error"]
    (problem,) = found.problems
    assert remedy in problem.remedy
    assert problem.document_index == 2
    assert len(str(problem)) < 300
    if line:  # where an alias bomb goes off is nobody's business
        assert problem.line == len(pod("x").splitlines()) + 1 + line


def test_lines_and_fields_of_lists() -> None:
    text = """\
    # a comment
    apiVersion: v1
    kind: List
    items:
    - apiVersion: v1
      kind: Pod
      metadata: {name: a}
      spec:
        containers:
        - name: a
          ports:
          - containerPort: 99999
    """
    (problem,) = read(a__yaml=text).problems
    assert problem.field == "items[0].spec.containers[0].ports[0].containerPort"
    assert (problem.line, problem.object) == (12, "Pod default/a")


def test_other_kinds_are_named_once() -> None:
    one = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n"
    found = read(a__yaml=one * 3, b__yaml=one)
    assert [(p.severity, p.object, p.message) for p in found.problems] == [
        ("info", "ConfigMap (v1)", "4 skipped: Tidegate does not read this kind")
    ]


def test_names_of_any_length_are_shown_short() -> None:
    named = "apiVersion: v1\nkind: Pod\nmetadata: {name: %s}\nspec: {containers: [{name: c}]}\n"
    found = read(a__yaml=named % ("a" * 5000)).problems
    assert ["metadata.name" in p.field and len(str(p)) < 400 for p in found] == [True]
    (problem,) = read(a__yaml=named % ("a" * 253) + "x: 1\n").problems
    assert problem.object == f"Pod default/{'a' * 253}"


def test_duplicate_name_first_stays() -> None:
    found = read(a__yaml=pod("x", "{v: one}"), b__yaml=pod("x", "{v: two}"))
    assert [document.object.metadata.labels for document in found.documents] == [{"v": "one"}]
    (problem,) = found.problems
    assert (problem.severity, problem.file) == ("error", "b.yaml")
    assert "a.yaml" in problem.message


def test_empty_folder_is_valid_and_said(tmp_path: Path) -> None:
    found = Folder(tmp_path).read()
    assert (found.complete, found.documents) == (True, ())
    assert [problem.severity for problem in found.problems] == ["warning"]


def test_hidden_files_and_directories_are_skipped(tmp_path: Path) -> None:
    for name in (".a.yaml", ".git/a.yaml", "a.txt", "a.yaml~"):
        put(tmp_path / name, POD)
    put(tmp_path / "deep/er/b.yaml", pod("b"))
    assert _names(Folder(tmp_path).read()) == ["Pod default/b"]


class TestLastValid:
    """Each test: a folder in force, then something happens to it."""

    def test_invalid_document_keeps_its_last_version(self, tmp_path: Path) -> None:
        path, folder = tmp_path / "a.yaml", Folder(tmp_path)
        put(path, policy("p", "{}") + pod("x", "{v: one}"))
        folder.read()
        put(path, policy("p", "{foo: 1}") + pod("x", "{v: two}"))
        found = folder.read()
        assert _names(found) == ["NetworkPolicy default/p", "Pod default/x"]
        assert [document.stale for document in found.documents] == [True, False]
        assert found.documents[1].object.metadata.labels == {"v": "two"}
        assert STAYS in found.problems[0].message
        put(path, policy("p", "{}"))
        again = folder.read()
        assert (_names(again), again.problems) == (["NetworkPolicy default/p"], ())

    def test_never_valid_says_nothing_of_staying(self, tmp_path: Path) -> None:
        put(tmp_path / "a.yaml", policy("p", "{foo: 1}"))
        found = Folder(tmp_path).read()
        assert found.documents == ()
        assert STAYS not in found.problems[0].message

    def test_broken_yaml_may_be_any_missing_object(self, tmp_path: Path) -> None:
        path, folder = tmp_path / "a.yaml", Folder(tmp_path)
        put(path, pod("x") + pod("y") + pod("z"))
        folder.read()
        put(path, pod("x") + "---\na: [\n" + pod("z"))
        assert _names(folder.read()) == ["Pod default/x", "Pod default/y", "Pod default/z"]
        put(path, pod("x"))
        assert _names(folder.read()) == ["Pod default/x"]

    def test_moved_to_another_file_beats_what_is_kept(self, tmp_path: Path) -> None:
        folder = Folder(tmp_path)
        put(tmp_path / "a.yaml", pod("x", "{v: one}"))
        folder.read()
        put(tmp_path / "a.yaml", "a: [")
        put(tmp_path / "b.yaml", pod("x", "{v: two}"))
        (document,) = folder.read().documents
        assert document.object.metadata.labels == {"v": "two"}

    def test_vanished_folder_keeps_everything(self, tmp_path: Path) -> None:
        folder = Folder(tmp_path / "f")
        first = folder.read()
        assert (first.complete, first.documents) == (False, ())
        put(tmp_path / "f/a.yaml", POD)
        assert folder.read().complete
        shutil.rmtree(tmp_path / "f")
        found = folder.read()
        assert _names(found) == ["Pod default/a"]
        assert found.problems[0].severity == "error"
        put(tmp_path / "f/b.yaml", pod("b"))
        assert _names(folder.read()) == ["Pod default/b"]

    def test_removed_file_removes(self, tmp_path: Path) -> None:
        folder = Folder(tmp_path)
        put(tmp_path / "a.yaml", POD)
        put(tmp_path / "b.yaml", pod("b"))
        folder.read()
        (tmp_path / "a.yaml").unlink()
        assert _names(folder.read()) == ["Pod default/b"]

    def test_unreadable_file_keeps_its_objects(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, path = Folder(tmp_path), tmp_path / "a.yaml"
        put(path, POD)
        folder.read()
        monkeypatch.setattr(disk, "MAX_FILE_BYTES", 3)
        found = folder.read()
        assert _names(found) == ["Pod default/a"]
        assert (found.problems[0].severity, found.problems[0].file) == ("error", "a.yaml")
        monkeypatch.undo()
        assert folder.read().problems == ()

    def test_not_utf8_keeps_its_objects(self, tmp_path: Path) -> None:
        folder = Folder(tmp_path)
        put(tmp_path / "a.yaml", POD)
        folder.read()
        (tmp_path / "a.yaml").write_bytes(b"a: 1\nb: \xff\n")
        found = folder.read()
        assert _names(found) == ["Pod default/a"]
        assert found.problems[0].line == 2

    def test_link_to_a_file_that_goes_keeps_its_objects(self, tmp_path: Path) -> None:
        put(tmp_path / "there.yaml", POD)
        (tmp_path / "f").mkdir()
        (tmp_path / "f/a.yaml").symlink_to("../there.yaml")
        folder = Folder(tmp_path / "f")
        assert _names(folder.read()) == ["Pod default/a"]
        (tmp_path / "there.yaml").unlink()
        found = folder.read()
        assert _names(found) == ["Pod default/a"]
        assert "a link to a file that is not there" in found.problems[0].message
        assert manifests.digests(tmp_path / "f") == {"a.yaml": ""} == found.files
        (tmp_path / "f/a.yaml").unlink()
        assert _names(folder.read()) == []

    def test_link_to_a_folder_is_named(self, tmp_path: Path) -> None:
        put(tmp_path / "there/a.yaml", POD)
        put(tmp_path / "f/b.yaml", pod("b"))
        (tmp_path / "f/more").symlink_to("../there")
        found = Folder(tmp_path / "f").read()
        assert _names(found) == ["Pod default/b"]
        assert [(p.severity, p.file) for p in found.problems] == [("warning", "more")]

    def test_fifo_does_not_stop_the_reader(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.yaml")
        found = Folder(tmp_path).read()
        assert "not a regular file" in found.problems[0].message


def test_unchanged_documents_stay_the_same_objects(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    put(tmp_path / "a.yaml", pod("x") + pod("y"))
    before = folder.read().documents
    put(tmp_path / "a.yaml", "# moved down\n" + pod("x") + pod("y", "{v: two}"))
    after = folder.read().documents
    assert [one.object is two.object for one, two in zip(before, after, strict=True)] == [
        True,
        False,
    ]


def test_limit_of_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "MAX_DOCUMENTS", 2)
    put(tmp_path / "a.yaml", pod("a") + pod("b") + pod("c"))
    found = Folder(tmp_path).read()
    assert found.documents == ()
    assert "more than 2 documents" in found.problems[0].message


def test_split_finds_first_lines() -> None:
    chunks = yamldoc.split("a: 1\n---\n# c\nb: 2\n---\n\n...\nc: 3\n")
    assert [chunk.line for chunk in chunks] == [1, 2, 7]
