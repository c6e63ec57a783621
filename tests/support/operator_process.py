"""The operator as a process of its own, as its container runs it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import urllib3
from support.apiserver import WITH_US, free_ports


class OperatorProcess:
    """`identity` is its name in the Lease, which lies in namespace default."""

    def __init__(self, kubeconfig: Path, identity: str, logs: Path, *more: str) -> None:
        self._port = free_ports(1)[0]
        self._command = [
            *WITH_US,
            *(sys.executable, "-m", "tidegate_operator"),
            f"--kubeconfig={kubeconfig}",
            "--namespace=default",
            f"--identity={identity}",
            f"--listen=127.0.0.1:{self._port}",
            *more,
        ]
        self._log = logs / f"{identity}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def end(self) -> int:
        """After a signal that ends it: the exit code."""
        assert self._process is not None
        return self._process.wait()

    def kill(self) -> None:
        """Whatever state it is in."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def resident(self) -> float:
        """Memory, MiB."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def ready(self) -> bool:
        """Has read everything; leads, or would."""
        try:
            answer = urllib3.request(
                "GET", f"http://127.0.0.1:{self._port}/readyz", retries=False, timeout=2.0
            )
        except urllib3.exceptions.HTTPError:
            return False
        return answer.status == 200

    def said(self, event: str) -> list[dict[str, Any]]:
        """Its log lines of that event."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        decoded = [json.loads(line) for line in lines if line.startswith("{")]
        return [line for line in decoded if line.get("event") == event]

    def tail(self) -> str:
        return self._log.read_text()[-3000:]
