"""Kubeconfigs that are none: one line that says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from tidegate_cli.main import main

CONFIG = """\
clusters: [{name: k, cluster: {server: "https://127.0.0.1:1"}}]
contexts: [{name: c, context: {cluster: k, user: u}}]
users: [{name: u, user: {client-certificate: /none, client-key: /none}}]
"""


@pytest.mark.parametrize(
    ("reason", "text", "said"),
    [
        ("broken YAML", b"x: [", "cannot be read as a kubeconfig"),
        ("a list", b"- a", "cannot be read as a kubeconfig"),
        ("text", b"hello", "cannot be read as a kubeconfig"),
        ("not UTF-8", b"\xff\xfe\x00", "cannot be read as a kubeconfig"),
        ("nothing in it", b"{}", "Expected key current-context"),
        ("no such context", f"current-context: x\n{CONFIG}".encode(), "name x in"),
        ("no such certificate", f"current-context: c\n{CONFIG}".encode(), "/none"),
    ],
)
def test_what_is_no_kubeconfig(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reason: str, text: bytes, said: str
) -> None:
    path = tmp_path / "config"
    path.write_bytes(text)
    assert main(["--kubeconfig", str(path), "status"]) == 2, reason
    found = capsys.readouterr().err
    assert said in found
    assert found.startswith("tidegate: "), found
    assert "; give --kubeconfig" in found
    assert found.count("\n") == 1


def test_no_archive_of_a_cluster_that_does_not_answer(tmp_path: Path) -> None:
    config, archive = tmp_path / "config", tmp_path / "dump.tar.gz"
    user = CONFIG.replace("client-certificate: /none, client-key: /none", "")
    config.write_text(f"current-context: c\n{user}")
    words = ["--kubeconfig", str(config), "sysdump", "--output-file", str(archive)]
    assert main(words) == 2
    assert not archive.exists()
