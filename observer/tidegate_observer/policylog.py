"""Connections that policies allowed or denied, one JSON object a line, as GKE's nodes log them.

An allowed connection is one line when it starts; denials of one kind are one line with a count.
What is held back, written a second and kept on disk is bounded, and what did not fit is said.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tidegate_observer import icmp
from tidegate_observer.flow import ICMP, ICMPV6, SCTP, TCP, UDP, End, Flow, Kind, address_text

PROTOCOLS = {TCP: "tcp", UDP: "udp", SCTP: "sctp", ICMP: "icmp", ICMPV6: "icmp"}
DIRECTIONS = ("ingress", "egress")
STDOUT = "-"
ALL, LISTED, NONE = "all", "listed", "none"


@dataclass(frozen=True)
class Settings:
    """What is logged, and where to."""

    target: str
    """A file, or STDOUT."""
    allow: str = NONE
    deny: str = ALL
    """ALL; LISTED: what `policies` decided, and a rule that asks for it; or NONE."""
    policies: frozenset[str] = frozenset()
    """Each "namespace/name" ("/name" for cluster-scoped kinds)."""
    node_name: bool = False
    aggregation_seconds: float = 5.0
    """For how long denials of one kind are counted before they are written."""
    max_aggregated: int = 10_000
    """Kinds of denials counted at once."""
    max_rate: int = 500
    """Lines a second."""
    max_bytes: int = 10 << 20
    """Of the file, before it is moved away."""
    backups: int = 3


@dataclass
class _Denial:
    line: dict[str, Any]
    since: float


class PolicyLog:
    """`add` flows, `flush` now and then. OSError: the file cannot be written."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._denials: dict[tuple[Any, ...], _Denial] = {}
        self._second = 0
        self._written = 0
        self.suppressed = 0
        """Lines that were too many for a second, and denials of too many kinds."""
        self._said = 0

    def add(self, flows: Iterable[Flow], now: float) -> None:
        """`now`: seconds of any clock that only goes forward."""
        for flow in flows:
            if flow.kind == Kind.DENIED:
                self._denied(flow, now)
            elif flow.kind == Kind.START:
                self._allowed(flow, now)

    def _denied(self, flow: Flow, now: float) -> None:
        decision = flow.egress or flow.ingress
        if decision is None or not self._wanted(flow, self._settings.deny):
            return
        key = (
            flow.source_address,
            flow.destination_address,
            icmp.type_code(flow) if icmp.is_icmp(flow) else flow.destination_port,
            flow.protocol,
            flow.direction,
            decision.policies,
        )
        held = self._denials.get(key)
        if held is not None:
            held.line["count"] += flow.more or 1
        elif len(self._denials) < self._settings.max_aggregated:
            self._denials[key] = _Denial(self._line(flow, "deny"), now)
        else:
            self.suppressed += 1

    def _allowed(self, flow: Flow, now: float) -> None:
        decided = [d for d in (flow.egress, flow.ingress) if d is not None and d.rule >= 0]
        if decided and self._wanted(flow, self._settings.allow):
            self._write([self._line(flow, "allow")], now)

    def _wanted(self, flow: Flow, which: str) -> bool:
        if which != LISTED:
            return which == ALL
        wanted = self._settings.policies
        decisions = [d for d in (flow.egress, flow.ingress) if d is not None]
        return any(
            d.log or any(f"{p.namespace}/{p.name}" in wanted for p in d.policies) for d in decisions
        )

    def _line(self, flow: Flow, disposition: str) -> dict[str, Any]:
        when = datetime.fromtimestamp(flow.time // 10**9, UTC)
        found: dict[str, Any] = {
            "connection": {
                "src_ip": address_text(flow.source_address),
                "dest_ip": address_text(flow.destination_address),
                **_ports(flow),
                "protocol": PROTOCOLS.get(flow.protocol, str(flow.protocol)),
                "direction": DIRECTIONS[flow.direction & 1],
            },
            "disposition": disposition,
            "src": _end(flow.source),
            "dest": _end(flow.destination),
            "count": flow.more or 1,
        }
        policies = [
            {"kind": p.kind, "name": p.name, **({"namespace": p.namespace} if p.namespace else {})}
            for d in (flow.egress, flow.ingress)
            if d is not None
            for p in d.policies
        ]
        if policies:
            found["policies"] = policies
        if self._settings.node_name:
            found["node_name"] = flow.node
        found["timestamp"] = f"{when:%Y-%m-%dT%H:%M:%S}.{flow.time % 10**9:09}Z"
        return found

    def flush(self, now: float, *, every: bool = False) -> None:
        """Writes denials that were counted for long enough, or every one."""
        limit = now - self._settings.aggregation_seconds
        due = [key for key, held in self._denials.items() if every or held.since <= limit]
        lines = [self._denials.pop(key).line for key in due]
        if self.suppressed > self._said:
            lines.append({"suppressed": self.suppressed - self._said})
            self._said = self.suppressed
        self._write(lines, now)

    def _write(self, lines: list[dict[str, Any]], now: float) -> None:
        if int(now) != self._second:
            self._second, self._written = int(now), 0
        room = self._settings.max_rate - self._written
        if len(lines) > room:
            self.suppressed += len(lines) - max(room, 0)
            lines = lines[: max(room, 0)]
        if not lines:
            return
        self._written += len(lines)
        # Names are whatever people called their pods: json escapes what is not ASCII.
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        if self._settings.target == STDOUT:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        path = Path(self._settings.target)
        self._rotate(path, len(text))
        with path.open("a", encoding="ascii") as file:
            file.write(text)

    def _rotate(self, path: Path, more: int) -> None:
        """FILE → FILE.1 → FILE.2 …, where the next lines would not fit."""
        try:
            if path.stat().st_size + more <= self._settings.max_bytes:
                return
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            return
        for number in range(self._settings.backups - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{path}.{number}", f"{path}.{number + 1}")
        if self._settings.backups:
            os.replace(path, f"{path}.1")
        else:
            path.unlink()


def _ports(flow: Flow) -> dict[str, int]:
    """ICMP has none: type and code stand for them."""
    if icmp.is_icmp(flow):
        kind, code = icmp.type_code(flow)
        return {"icmp_type": kind, "icmp_code": code}
    return {"src_port": flow.source_port, "dest_port": flow.destination_port}


def _end(end: End) -> dict[str, str]:
    if not end.pod:
        name = end.labels[0].partition(":")[2] if end.labels else str(end.identity)
        return {"instance": name}
    found = {"pod_name": end.pod, "pod_namespace": end.namespace, "namespace": end.namespace}
    if end.workload:
        found |= {"workload_kind": end.workload_kind, "workload_name": end.workload}
    return found
