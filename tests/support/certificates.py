"""Certificates for servers on loopback, made by the openssl command."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def _openssl(*arguments: str | Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: run `make test` once, or install it")
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def make_key(path: Path) -> Path:
    _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path)
    return path


def make_authority(directory: Path, name: str) -> Path:
    """`<name>.crt` and `<name>.key`; the certificate's path."""
    key, certificate = make_key(directory / f"{name}.key"), directory / f"{name}.crt"
    subject = f"/CN={name}"
    _openssl("req", "-x509", "-new", "-key", key, "-subj", subject, "-days", "2", "-out",
             certificate)  # fmt: skip
    return certificate


def issue(authority: Path, name: str, subject: str, extensions: str) -> tuple[Path, Path]:
    """(certificate, key) beside the authority's, signed by it."""
    directory = authority.parent
    key, request = make_key(directory / f"{name}.key"), directory / f"{name}.csr"
    certificate, extra = directory / f"{name}.crt", directory / f"{name}.ext"
    extra.write_text(extensions)
    _openssl("req", "-new", "-key", key, "-subj", subject, "-out", request)
    _openssl("x509", "-req", "-in", request, "-CA", authority, "-CAkey",
             authority.with_suffix(".key"), "-CAcreateserial", "-days", "2", "-extfile", extra,
             "-out", certificate)  # fmt: skip
    return certificate, key


def issue_server(authority: Path, name: str) -> tuple[Path, Path]:
    names = "subjectAltName=IP:127.0.0.1,DNS:localhost,DNS:kubernetes"
    return issue(authority, name, f"/CN={name}", f"{names}\nextendedKeyUsage=serverAuth\n")


def issue_client(authority: Path, name: str, group: str) -> tuple[Path, Path]:
    return issue(authority, name, f"/O={group}/CN={name}", "extendedKeyUsage=clientAuth\n")
