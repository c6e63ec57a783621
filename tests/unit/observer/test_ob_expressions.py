"""Expressions of CEL as filters: rows of (expression, flow, whether it is shown), and refusals."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from tidegate_observer import expressions, filters
from tidegate_observer.api import flow_pb2
from unit.observer.flows import flow, started

F = flow_pb2.FlowFilter

ROWS: list[tuple[str, dict[str, Any], bool]] = [
    ("true", {}, True),
    ("false", {}, False),
    ("_flow.verdict == Verdict.DROPPED", {}, True),
    ("_flow.verdict == flow.Verdict.FORWARDED", {}, False),
    ("_flow.verdict == 2", {}, True),
    ('_flow.source.namespace == "shop" && _flow.destination.namespace != "shop"', {}, True),
    ('_flow.source.pod_name.startsWith("web-")', {}, True),
    ("_flow.l4.TCP.destination_port == uint(5432)", {}, True),
    ("_flow.l4.TCP.destination_port > 6000u", {}, False),
    ("has(_flow.l4.TCP) && _flow.l4.TCP.flags.SYN", {}, True),
    ("has(_flow.l4.TCP)", {"protocol": 17}, False),
    ('_flow.source.labels.exists(l, l == "k8s:app=web")', {}, True),
    ('_flow.source.labels.all(l, l == "k8s:app=web")', {}, False),
    ('_flow.ingress_denied_by.exists(p, p.name == "default-deny")', {}, True),
    ("_flow.IP.source.matches('^10[.]')", {}, True),
    ("_flow.IP.ipVersion == IPVersion.IPv6", {"source_address": "fd00::5"}, True),
    ('_flow.time < timestamp("1970-01-01T01:00:00Z")', {}, True),
    ("_flow.is_reply == false", {}, True),
    ("_flow.traffic_direction in [TrafficDirection.INGRESS]", {}, True),
    # What cannot be evaluated is no match, unless it does not matter.
    ("1 / (_flow.l4.TCP.source_port == 0u ? 1 : 0) == 1", {}, False),
    ("1 / 0 == 1 || true", {}, True),
]


def only(*texts: str, **fields: Any) -> F:
    return F(experimental=F.Experimental(cel_expression=texts), **fields)


@pytest.mark.parametrize(("text", "fields", "shown"), ROWS, ids=[r[0] for r in ROWS])
def test_expressions(text: str, fields: dict[str, Any], shown: bool) -> None:
    assert filters.build([only(text)], [])(flow(**fields)) == shown
    assert filters.build([], [only(text)])(flow(**fields)) != shown


def test_one_of_several_is_enough_and_other_fields_count_too() -> None:
    assert filters.build([only("false", "_flow.verdict == Verdict.DROPPED")], [])(flow())
    assert not filters.build([only("false", "_flow.verdict == Verdict.DROPPED")], [])(started())
    assert not filters.build([only("true", source_port=["1"])], [])(flow())
    assert filters.build([F(experimental=F.Experimental())], [])(flow())


DOUBLED = '["a"].exists(x, [x + x].exists(y, [y + y].exists(z, {})))'
REFUSED = [
    ("syntax", ["_flow.verdict =="], "Syntax error"),
    ("no such variable", ["flow.verdict == 2"], "undeclared reference"),
    ("no such field", ["_flow.nothing == 1"], "undefined field 'nothing'"),
    ("types that cannot be compared", ["_flow.l4.TCP.destination_port == 80"], "no matching"),
    ("not a bool", ["_flow.verdict"], "not a bool"),
    ("nothing", [""], "Syntax error"),
    ("one of several", ["true", "1"], "not a bool"),
    ("too long", ["true" + " " * 4096], "4100 bytes, at most 4096"),
    ("too deep", ["(" * 1500 + "true" + ")" * 1500], "recursion limit"),
    ("too many", ["true"] * 17, "at most 16"),
    ("macros", [" || ".join(["[1].exists(x, x == 1)"] * 9)], "9 macros"),
    ("growth", [DOUBLED.format("size(z" + " + z" * 20 + ") > 1")], "of '\\+' and ','"),
]


@pytest.mark.parametrize(("reason", "texts", "said"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refused(reason: str, texts: list[str], said: str) -> None:
    with pytest.raises(filters.FilterError, match=said):
        filters.build([only(*texts)], [])


def test_a_later_versions_experiment_is_refused() -> None:
    wanted = F(experimental=F.Experimental.FromString(b"\x10\x01"))
    with pytest.raises(filters.FilterError, match="experimental, field 2"):
        filters.build([wanted], [])


def test_a_loop_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library counts repetitions: one evaluation that reaches its limit is no match."""
    monkeypatch.setattr(expressions, "MAX_SECONDS", 600.0)
    longest = "[" + ",".join("1" * 2000) + "]"
    assert filters.build([only(f"{longest}.all(x, x == 1)")], [])(flow())
    few = "[1, 1, 1, 1, 1, 1, 1]"
    nested = f"{few}.all(a, {few}.all(b, a == b))"
    assert filters.build([only(nested)], [])(flow())
    joined = "[[1, 1]].exists(a, [a+a+a+a].exists(b, [b+b+b+b].exists(c, [c+c+c].exists(d, {}))))"
    twice = "(d + d + d).all(e, d.all(f, e == f))"
    assert not filters.build([only(joined.format(twice))], [])(flow())


def test_one_that_takes_too_long_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "MAX_SECONDS", -1.0)
    with pytest.raises(filters.CostlyError, match="cel_expression"):
        filters.build([only("true")], [])(flow())


def test_the_library_is_loaded_when_it_is_needed() -> None:
    code = "import sys, tidegate_observer.server, tidegate_cli.observe.command\n"
    code += "assert not [name for name in sys.modules if name.startswith('cel_expr')]"
    subprocess.run([sys.executable, "-c", code], check=True)
