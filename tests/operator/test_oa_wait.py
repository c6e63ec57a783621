"""`tidegate policy wait` against a real API server: right after an apply, before anybody has seen
it; and what it says of nodes that lack it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.apiserver import ApiServer
from support.operator_town import Town, policy, populate
from support.told import NAME, READY, conditions, held, say
from support.town_api import apply, remove
from support.waiting import until
from tidegate_cli.main import main
from tidegate_kube import resources

pytestmark = pytest.mark.apiserver

SECONDS = 60.0
LOGGED = re.compile(r"\d{4}-\d\d-\d\d ")
Wait = Callable[..., tuple[int, str, str]]


@pytest.fixture
def wait(server: ApiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Wait:
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")

    def asked(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["--kubeconfig", str(kubeconfig), "policy", "wait", *argv])
        said = capsys.readouterr()
        # The operator logs in this process, too.
        out = [line for line in said.out.splitlines(True) if not LOGGED.match(line)]
        return code, "".join(out), said.err

    return asked


def test_what_was_ready_before_the_edit_is_not_taken_for_it(
    town: Town, wait: Wait, tmp_path: Path
) -> None:
    populate(town)
    town.settled()
    for name in ("n1", "n2"):
        town.realise(name)
    say(town, READY, (2, 2))
    code, out, _ = wait("netpol/p", "--timeout=60")
    assert (code, out) == (0, "NetworkPolicy default/p: in force on 2 of 2 nodes\n")
    town.stop()  # nobody looks at the next edit
    apply(town.client, policy("p", {"podSelector": {}}))
    assert conditions(held(town)) == READY, "what a wait for Ready alone would be told"
    code, out, err = wait("netpol/p", "--timeout=0")
    assert (code, out) == (1, "")
    assert "tells of generation 1, not of 2" in err
    # Now somebody does; loaders follow, one after the other.
    town.restart()
    (tmp_path / "p.yaml").write_bytes(msgspec.json.encode(policy("p", {"podSelector": {}})))
    found: list[tuple[int, str, str]] = []
    asking = threading.Thread(
        target=lambda: found.append(wait("-f", str(tmp_path / "p.yaml"), "--timeout=10m"))
    )
    asking.start()
    try:
        until(lambda: held(town)["policy"]["generation"] == 2, "the new one is seen", SECONDS)
        town.settled()
        town.realise("n1")
        until(lambda: held(town)["status"]["nodes"] == {"realised": 1, "total": 2}, "1", SECONDS)
        assert asking.is_alive()
        town.realise("n2")
        asking.join(SECONDS)
    finally:
        assert not asking.is_alive()
    ((code, out, err),) = found
    assert (code, out) == (0, "NetworkPolicy default/p: in force on 2 of 2 nodes\n")
    assert "tells of generation 1, not of 2" in err or "in force on" in err


def test_nodes_that_lack_it_are_named_with_their_reason(town: Town, wait: Wait) -> None:
    populate(town)
    town.settled()
    town.realise("n1")
    stalled: dict[str, Any] = {
        "type": "Stalled",
        "status": "True",
        "reason": "Refused",
        "message": "a rule set is too large",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    town.realise("n2", "before", conditions=[stalled])
    until(lambda: held(town).get("status", {}).get("nodes", {}).get("realised") == 1, "1", SECONDS)
    code, out, err = wait("netpol/default/p", "--timeout=0")
    assert (code, out) == (1, "")
    assert "not in force after 0 seconds" in err
    assert "  n2: a rule set is too large" in err
    assert "  n1:" not in err
    code, out, _ = wait("netpol/default/p", "--timeout=0", "-o", "json")
    found = json.loads(out)
    (row,) = found["policies"]
    assert (code, row["inForce"], row["nodes"]) == (1, False, {"realised": 1, "total": 2})
    assert found["missing"] == [{"node": "n2", "message": "a rule set is too large"}]


def test_one_that_cannot_be_enforced_as_written_ends_it(town: Town, wait: Wait) -> None:
    populate(town)
    block = {"ipBlock": {"cidr": "192.0.2.0/24"}}
    odd = {"podSelector": {}, "egress": [{"to": [block], "ports": [{"port": "web"}]}]}
    apply(town.client, policy("p", odd))
    code, _, err = wait("netpol/p", "--timeout=10m")
    assert code == 1
    assert "not as written" in err


def test_what_is_not_there_is_no_policy(town: Town, wait: Wait) -> None:
    populate(town)
    for argv, words in (
        (["netpol/nobody"], "there is no NetworkPolicy default/nobody"),
        (["cnp/nobody"], "there is no ClusterNetworkPolicy nobody"),
        ([], "no policy is named"),
    ):
        code, _, err = wait(*argv, "--timeout=10m")
        assert (code, words in err) == (2, True)


def test_one_made_anew_under_its_name(town: Town, wait: Wait) -> None:
    """Its generation is 1 again: the status of the one before it would fit."""
    populate(town)
    town.settled()
    for name in ("n1", "n2"):
        town.realise(name)
    say(town, READY, (2, 2))
    town.stop()
    remove(town.client, resources.NETWORK_POLICIES, "p", "default")
    apply(town.client, policy("p", {"podSelector": {}}))
    assert held(town, NAME)["policy"]["generation"] == 1
    code, _, err = wait("netpol/p", "--timeout=0")
    assert (code, "of one before it, of the same name" in err) == (1, True)
