"""Two of the three answers, on the node that is asked: its maps, and a dry run of its program.

Questions and answers are plain data, so that it is all the same whether the node is a directory on
this machine or a pod in a cluster. Changes nothing. May not live here: what the answers should be,
and what people see of them (`explain`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
from tidegate_api.state import NodeState, digest
from tidegate_bpf import PermissionDenied
from tidegate_loader import addresses

from tidegate_cli import frame, lookup
from tidegate_cli.dryrun import NOT_ASKED, DryRun, Run
from tidegate_cli.errors import CliError
from tidegate_cli.live import Endpoint, NodeMaps, NodeView
from tidegate_cli.lookup import Look
from tidegate_cli.objects import RunObjects
from tidegate_cli.target import choose

FROM_POD, TO_POD = "from_pod", "to_pod"


class Question(msgspec.Struct, frozen=True):
    """One end of a flow that is to be opened. `own` is the end's address, `peer` the other's;
    `port` the destination's, of ICMP type << 8 | code; `direction` "egress" or "ingress", as the
    end sees it."""

    own: str
    peer: str
    direction: str
    protocol: int
    port: int
    look: bool = True
    """Ask the maps."""
    program: str = ""
    """Run this one; "": none."""


class Looked(msgspec.Struct, frozen=True):
    """What the maps say, see `lookup.Look`; key and value in hexadecimal, "" at a default, with
    their fields by name."""

    allowed: bool
    rule_set: int
    name: str
    """Of the RuleSet object; "" when the loader does not say."""
    rule: int
    slot: int
    missing: bool
    key: str = ""
    value: str = ""
    key_fields: dict[str, Any] = {}
    value_fields: dict[str, Any] = {}
    audit: int = 0
    """Reason of the denial if policies in audit mode counted; 0: none. `audit_rule`: its rule."""
    audit_rule: int = lookup.NONE


class Ended(msgspec.Struct, frozen=True):
    """One direction as a program settled it: a rule set's id, its name, a rule."""

    rule_set: int
    name: str
    rule: int
    allowed: bool = True
    audit: int = 0
    """As of `Looked`."""


class Ran(msgspec.Struct, frozen=True):
    """What the program did with the packet; `address` and `port`: where it is bound for now."""

    program: str
    allowed: bool
    reason: int
    egress: Ended
    ingress: Ended
    address: str
    port: int
    audit_rule: int = lookup.NONE
    """Of egress, if that is denied by audit, else of ingress."""


class Told(msgspec.Struct, frozen=True):
    """`present`: the address is in the node table; nothing was asked otherwise."""

    present: bool
    look: Looked | None = None
    run: Ran | None = None


class Answers(msgspec.Struct, frozen=True):
    """`digest`: of the state in force; "" when the loader does not say."""

    digest: str
    told: list[Told]


class Kernel:
    """One node's kernel, opened once, with its dry run. A context manager. CliError, BpfError."""

    def __init__(self, run: RunObjects, node: str) -> None:
        self._stack = contextlib.ExitStack()
        try:
            maps = self._stack.enter_context(NodeMaps(run.pin_dir(node)))
            self.view = NodeView(node, maps, run.realised(node))
            try:
                dry_run = DryRun(maps, run.place(node).netns)
            except PermissionDenied as error:
                what = f"the dry run cannot be loaded: {error.strerror}"
                raise CliError(what, "run as root") from error
            self._dry_run = self._stack.enter_context(dry_run)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    @property
    def digest(self) -> str:
        return (self.view.realised.digest or "") if self.view.realised else ""

    def tell(self, question: Question) -> Told:
        endpoint = self.view.maps.endpoint_at(addresses.pack(question.own))
        if endpoint is None:
            return Told(False)
        return Told(
            True,
            self._look(endpoint, question) if question.look else None,
            self._run(endpoint, question) if question.program else None,
        )

    def _look(self, endpoint: Endpoint, asked: Question) -> Looked:
        flow = (asked.protocol, asked.port)
        maps = self.view.maps
        look = lookup.ask(maps, endpoint, asked.direction, addresses.pack(asked.peer), flow)
        return self._looked(look)

    def _looked(self, look: Look) -> Looked:
        found = Looked(
            allowed=look.allowed,
            rule_set=look.rule_set,
            name=self.view.rule_set_name(look.rule_set) if look.rule_set else "",
            rule=look.rule,
            slot=look.slot,
            missing=look.missing,
            audit=look.audit,
            audit_rule=look.audit_rule,
        )
        if look.key is None or look.value is None:
            return found
        layouts = self.view.maps.layouts
        return msgspec.structs.replace(
            found,
            key=look.key.hex(" "),
            value=look.value.hex(" "),
            key_fields=layouts.rule_key.unpack(look.key)._asdict(),
            value_fields=layouts.rule.unpack(look.value)._asdict(),
        )

    def _run(self, endpoint: Endpoint, asked: Question) -> Ran:
        macs = (endpoint.row.pod_mac, endpoint.row.host_mac)
        ends = (asked.own, asked.peer)
        if asked.program == TO_POD:
            macs, ends = macs[::-1], ends[::-1]
        packet = frame.opening(macs, *ends, asked.protocol, asked.port)
        run = self._dry_run.to_pod if asked.program == TO_POD else self._dry_run.from_pod
        return self._ran(run(endpoint, packet), asked.protocol)

    def _ran(self, run: Run, protocol: int) -> Ran:
        address, port = frame.destination(run.frame, protocol)
        return Ran(
            program=run.program,
            allowed=run.allowed,
            reason=run.reason,
            # Ingress is asked only of what egress lets pass.
            egress=self._ended(run.egress, run.allowed or run.ingress != NOT_ASKED, run.audits[0]),
            ingress=self._ended(run.ingress, run.allowed, run.audits[1]),
            address=address,
            port=port,
            audit_rule=run.audit_rule,
        )

    def _ended(self, side: tuple[int, int], allowed: bool, audit: int) -> Ended:
        rule_set, rule = side
        name = self.view.rule_set_name(rule_set) if rule_set else ""
        return Ended(rule_set, name, rule, allowed, audit)


class Nodes:
    """The nodes of a run directory. Opens each once. A context manager."""

    def __init__(self, run: RunObjects) -> None:
        self._run = run
        self._stack = contextlib.ExitStack()
        self._known: dict[str, Kernel] = {}

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def ask(self, wanted: Sequence[tuple[str, Question]]) -> list[Told]:
        """The answers of (node, question), in their order. CliError, BpfError."""
        return [self._kernel(node).tell(question) for node, question in wanted]

    def digests(self) -> dict[str, str]:
        """Of each node asked so far: the state that it has in force."""
        return {name: kernel.digest for name, kernel in self._known.items()}

    def _kernel(self, node: str) -> Kernel:
        if node not in self._known:
            self._known[node] = self._stack.enter_context(Kernel(self._run, node))
        return self._known[node]


def lagging(digests: dict[str, str], states: Sequence[NodeState]) -> list[str]:
    """Nodes that do not enforce the desired state yet: why answers may differ."""
    desired = {item.metadata.name: digest(item.spec) for item in states}
    return [
        f"{name}: its loader has not put the desired state in force (`tidegate status`)"
        for name, held in digests.items()
        if held != desired.get(name)
    ]


def answer(args: argparse.Namespace) -> int:
    """`tidegate --local answer QUESTIONS`: JSON in, JSON out."""
    run = choose(args)
    if not isinstance(run, RunObjects):
        raise CliError("answer is for inside the loader's pod", "use `tidegate explain`")
    try:
        questions = msgspec.json.decode(args.questions, type=list[Question])
    except msgspec.MsgspecError as error:
        raise CliError(f"no questions: {error}", "are both of the same version?") from error
    names = run.nodes(args.node)
    if len(names) != 1:
        raise CliError(f"{len(names)} nodes are here", "say which with --node")
    with Kernel(run, names[0]) as kernel:
        told = [kernel.tell(question) for question in questions]
        found = Answers(kernel.digest, told)
    json.dump(msgspec.to_builtins(found), sys.stdout)
    return 0
