"""What Tidegate asked the API server for: its audit log, which the cluster keeps from its start."""

from __future__ import annotations

from kind import cluster


def size() -> int:
    """Bytes of the log so far; 0 where nothing was asked yet."""
    script = 'stat -c %s "$1" 2>/dev/null || echo 0'
    return int(cluster.inside(cluster.control_plane(), "sh", "-c", script, "sh", cluster.AUDIT_LOG))


def lines(since: int) -> list[str]:
    """What was asked since the log had this size, whole lines only."""
    found = cluster.inside(
        cluster.control_plane(), "tail", "-c", f"+{since + 1}", cluster.AUDIT_LOG
    )
    return found.split("\n")[:-1]
