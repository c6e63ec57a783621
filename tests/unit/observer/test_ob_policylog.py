"""The policy log in GKE's shape, its counting, its limits and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from tidegate_cli.main import build_parser
from tidegate_observer import main
from tidegate_observer.flow import Kind
from tidegate_observer.messages import flow_message
from tidegate_observer.policylog import PolicyLog, Settings
from unit.observer.flows import ALLOW, DENY, SECOND, WORLD, flow, pod, started


def made(tmp_path: Path, **settings: Any) -> tuple[PolicyLog, Path]:
    target = tmp_path / "log" / "policy_action.log"
    return PolicyLog(Settings(target=str(target), **settings)), target


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_denial_in_the_shape_that_people_know(tmp_path: Path) -> None:
    log, path = made(tmp_path)
    log.add([flow(time=1592084542 * SECOND + 292379064)], 0.0)
    log.flush(1.0, every=True)
    assert lines(path) == [
        {
            "connection": {
                "src_ip": "10.244.0.5",
                "dest_ip": "10.244.1.2",
                "src_port": 40000,
                "dest_port": 5432,
                "protocol": "tcp",
                "direction": "ingress",
            },
            "disposition": "deny",
            "src": {
                "pod_name": "web-1",
                "workload_kind": "Deployment",
                "workload_name": "web",
                "pod_namespace": "shop",
                "namespace": "shop",
            },
            "dest": {
                "pod_name": "db-0",
                "workload_kind": "Deployment",
                "workload_name": "db",
                "pod_namespace": "data",
                "namespace": "data",
            },
            "count": 1,
            "policies": [{"kind": "NetworkPolicy", "name": "default-deny", "namespace": "data"}],
            "timestamp": "2020-06-13T21:42:22.292379064Z",
        }
    ]


def test_denials_of_one_kind_are_counted(tmp_path: Path) -> None:
    log, path = made(tmp_path)
    log.add([flow(source_port=n) for n in range(7)] + [flow(destination_port=1)], 10.0)
    log.flush(14.0)
    assert lines(path) == []
    log.flush(15.0)
    assert [line["count"] for line in lines(path)] == [7, 1]
    log.flush(30.0)
    assert len(lines(path)) == 2


def test_what_is_logged_is_asked_for(tmp_path: Path) -> None:
    flows = [flow(), started(), started(ingress=None), started(kind=Kind.END), flow(ingress=None)]
    rows: list[tuple[dict[str, Any], list[str]]] = [
        ({}, ["deny"]),
        ({"allow": "all"}, ["allow", "deny"]),
        ({"allow": "all", "deny": "none"}, ["allow"]),
        ({"allow": "listed", "policies": frozenset({"data/allow-web"})}, ["allow", "deny"]),
        ({"allow": "listed", "deny": "none", "policies": frozenset({"data/other"})}, []),
        ({"deny": "listed", "policies": frozenset({"data/default-deny"})}, ["deny"]),
        ({"deny": "listed", "policies": frozenset({"data/allow-web"})}, []),
    ]
    for number, (settings, expected) in enumerate(rows):
        log, path = made(tmp_path / str(number), **settings)
        log.add(flows, 0.0)
        log.flush(0.0, every=True)
        assert [line["disposition"] for line in lines(path)] == expected, settings


def test_a_rule_that_asks_for_it_is_logged_unless_nothing_is(tmp_path: Path) -> None:
    asked = replace(ALLOW, log=True), replace(DENY, log=True)
    flows = [started(ingress=asked[0]), flow(ingress=asked[1]), started(), flow()]
    for which, expected in (("listed", ["allow", "deny"]), ("none", [])):
        log, path = made(tmp_path / which, allow=which, deny=which)
        log.add(flows, 0.0)
        log.flush(0.0, every=True)
        assert [line["disposition"] for line in lines(path)] == expected


def test_an_allowed_connection_names_its_policies_and_its_node(tmp_path: Path) -> None:
    log, path = made(tmp_path, allow="all", node_name=True)
    log.add([started(source=WORLD, ingress=ALLOW)], 0.0)
    (line,) = lines(path)
    assert line["src"] == {"instance": "world"}
    assert (line["node_name"], line["policies"][0]["name"]) == ("node-1", "allow-web")


def test_limits_are_kept_and_said(tmp_path: Path) -> None:
    log, path = made(tmp_path, allow="all", max_rate=3, max_aggregated=2)
    log.add([started() for _ in range(5)], 100.0)
    log.add([flow(destination_port=n) for n in range(4)], 101.0)
    log.flush(101.5, every=True)
    found = lines(path)
    assert [line.get("disposition") for line in found] == ["allow"] * 3 + ["deny"] * 2 + [None]
    assert found[-1] == {"suppressed": 4}


def test_files_are_moved_away(tmp_path: Path) -> None:
    log, path = made(tmp_path, allow="all", max_bytes=1500, backups=2, max_rate=10_000)
    for number in range(20):
        log.add([started(source_port=number)], float(number))
    names = sorted(p.name for p in path.parent.iterdir())
    assert names == ["policy_action.log", "policy_action.log.1", "policy_action.log.2"]
    assert all(p.stat().st_size <= 1500 for p in path.parent.iterdir())
    assert lines(path)[-1]["connection"]["src_port"] == 19


def test_hostile_names_stay_in_their_line(tmp_path: Path) -> None:
    log, path = made(tmp_path)
    log.add([flow(source=pod('x"\n{"disposition":"allow"}\x1b[2J\u202e'))], 0.0)
    log.flush(0.0, every=True)
    (line,) = lines(path)
    assert line["disposition"] == "deny"
    assert path.read_text().rstrip("\n").isprintable()


def test_denials_that_were_only_counted_are_in_the_count(tmp_path: Path) -> None:
    log, path = made(tmp_path)
    log.add([flow(), flow(more=41)], 0.0)
    log.flush(1.0, every=True)
    assert [line["count"] for line in lines(path)] == [42]


def test_a_policy_is_named_with_its_namespace(capsys: pytest.CaptureFixture[str]) -> None:
    """By a name alone nothing would ever be listed, and nobody would be told."""
    argv = ["--node=n=/p", "--run-dir=/r", "--objects=/o", "--socket=/s"]
    named = [f"--policy-log-policy={name}" for name in ("data/lock", "/admin")]
    assert main.parser().parse_args([*argv, *named]).policy_log_policy == ["data/lock", "/admin"]
    for wrong in ("lock", "data/", ""):
        with pytest.raises(SystemExit):
            main.parser().parse_args([*argv, f"--policy-log-policy={wrong}"])
        with pytest.raises(SystemExit):
            build_parser().parse_args(["up", "dir", f"--policy-log-policy={wrong}"])
    assert capsys.readouterr().err.count("is NS/NAME") == 6


def test_the_flow_that_is_logged_says_by_whom() -> None:
    """Its end is no line of the log."""
    rule = replace(ALLOW, log=True)
    start, end = (flow_message(started(ingress=rule, kind=k), "") for k in (Kind.START, Kind.END))
    assert (list(start.policy_log), list(end.policy_log)) == (["NetworkPolicy data/allow-web"], [])
    assert start.ingress_allowed_by == end.ingress_allowed_by
