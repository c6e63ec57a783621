"""`tidegate explain`: one question, three answers that must agree, and what each rests on.

    model     the desired state, read as objects
    maps      the same look-up over the kernel's maps
    program   the node's own program, loaded as a dry run, over a synthetic packet

Changes nothing on the node. May not live here: any of the three answers, only their comparison.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tidegate_api.state import NodeState

from tidegate_cli import edits, judgement, lookup, reasons, render
from tidegate_cli.answer import FROM_POD, TO_POD, Looked, Nodes, Question, Ran, Told, lagging
from tidegate_cli.errors import CliError
from tidegate_cli.judgement import policy_text
from tidegate_cli.model import ECHO, PORT_PROTOCOLS, Answer, AuditDenial, Expected, Model, Pod, Side
from tidegate_cli.objects import RunObjects
from tidegate_cli.target import Place, choose

DIRECTIONS = ("egress", "ingress")
POLICY_REASONS = frozenset((133, 181))
NO_BACKEND = 158
SCTP_PORT = 225
ALLOWED, DENIED, DISAGREE = 0, 1, 2

Fact = tuple[str, str, int]
"""(why as in model.Side, RuleSet name, rule number or -1): what answers are compared by."""


class Asker(Protocol):
    """Who can be asked about nodes: `answer.Nodes`, or a cluster's."""

    def ask(self, wanted: Sequence[tuple[str, Question]]) -> list[Told]: ...

    def digests(self) -> dict[str, str]: ...


def explain(args: argparse.Namespace) -> int:
    port, protocol = parse_port(args.port) if args.icmp is None else parse_icmp(args.icmp)
    place = choose(args)
    objects = place.all()
    model = Model.from_objects(objects)
    expected = model.expected(args.source, args.target, port, protocol, family=args.family)
    with _asker(place) as nodes:
        found = ask(model, nodes, expected, protocol)
        if found.all_disagreements:
            states = [item for item in objects if isinstance(item, NodeState)]
            found.disagreements += lagging(nodes.digests(), states)
    if args.output == "table":
        sys.stdout.write(_text(found))
    else:
        render.structured(_object(found), args.output)
    return found.exit_code


def _asker(place: Place) -> contextlib.AbstractContextManager[Asker]:
    if isinstance(place, RunObjects):
        return Nodes(place)
    return contextlib.nullcontext(place.asker())


def parse_port(text: str) -> tuple[int, str]:
    """ "80/TCP" → (80, "TCP"). Raises CliError."""
    number, _, protocol = text.partition("/")
    name = protocol.upper() or "TCP"
    if not (number.isascii() and number.isdigit() and 1 <= int(number) <= 65535):
        raise CliError(f"--port {text}: not a port", "give 1 to 65535, as in 80 or 53/UDP")
    if name not in PORT_PROTOCOLS:
        raise CliError(f"--port {text}: not a protocol with ports", "TCP, UDP or SCTP; or --icmp")
    return int(number), name


def parse_icmp(text: str) -> tuple[int | None, str]:
    """ "13" or "13/0" → (type << 8 | code, "ICMP"); "" is an echo request. Raises CliError."""
    kind, _, code = text.partition("/")
    numbers = [kind, code or "0"]
    if not text:
        return None, "ICMP"
    if not all(n.isascii() and n.isdigit() and int(n) <= 255 for n in numbers):
        raise CliError(f"--icmp {text}: not a type", "give TYPE or TYPE/CODE, 0 to 255 each")
    return int(numbers[0]) << 8 | int(numbers[1]), "ICMP"


# ---- the answers ------------------------------------------------------------------------


@dataclass
class Explained:
    """One place a packet may end up, and what the three say."""

    source: Pod
    target: Pod | None
    answer: Answer
    source_address: str
    protocol: str
    looks: dict[str, tuple[str, Looked]] = field(default_factory=dict)
    """By direction, with the node; only ends that are pods."""
    runs: list[tuple[str, Ran]] = field(default_factory=list)
    """With the node."""
    edits: dict[str, list[str]] = field(default_factory=dict)
    """By direction: the least to write for the other verdict of that end."""
    disagreements: list[str] = field(default_factory=list)

    def side(self, direction: str) -> Side:
        side: Side = getattr(self.answer.verdict, direction)
        return side

    @property
    def maps_allowed(self) -> bool:
        return all(look.allowed for _, look in self.looks.values())

    @property
    def program_allowed(self) -> bool:
        return all(run.allowed for _, run in self.runs)


@dataclass
class Found:
    """All of it. `service` is the run against the frontend itself, with its node."""

    expected: Expected
    protocol: str
    explained: list[Explained]
    service: tuple[str, Ran] | None = None
    disagreements: list[str] = field(default_factory=list)

    @property
    def all_disagreements(self) -> list[str]:
        return [*(text for e in self.explained for text in e.disagreements), *self.disagreements]

    @property
    def exit_code(self) -> int:
        if self.all_disagreements:
            return DISAGREE
        return ALLOWED if self.expected.allowed else DENIED


def ask(model: Model, nodes: Asker, expected: Expected, protocol: str) -> Found:
    """The three answers for everything that `expected` holds. Raises CliError, BpfError."""
    source = model.owner(expected.source)
    assert source is not None  # the model took this address from a pod
    found = Found(expected, protocol, [])
    wanted: list[tuple[str, Question]] = []
    ends: list[tuple[Explained, str]] = []
    for answer in expected.answers:
        entry = Explained(source, model.owner(answer.address), answer, expected.source, protocol)
        found.explained.append(entry)
        _edit(model, entry)
        for direction, node, question in _questions(entry):
            ends.append((entry, direction))
            wanted.append((node, question))
    if expected.frontend is not None:
        address, port = expected.frontend
        number = number_of(protocol, address)
        asked = Question(expected.source, address, "egress", number, port, False, FROM_POD)
        wanted.append((source.node, asked))
    told = nodes.ask(wanted)
    for (entry, direction), (node, _), answered in zip(ends, wanted, told, strict=False):
        _take(entry, direction, node, answered)
    for entry in found.explained:
        _compare(entry)
    if expected.frontend is not None and told[-1].run is not None:
        found.service = source.node, told[-1].run
        _judge_service(found, told[-1].run)
    return found


def _edit(model: Model, entry: Explained) -> None:
    """Where an end's policy has the say: of a denied flow at each end that denies."""
    verdict = entry.answer.verdict
    ends = {"egress": entry.source, "ingress": entry.target}
    for direction, subject in ends.items():
        side = entry.side(direction)
        if subject is None or side.why in ("self", "host", "no-endpoint"):
            continue
        if side.allowed and not verdict.allowed:
            continue
        inward = direction == "ingress"
        name = entry.source.key if inward else _target_name(entry)
        address = entry.source_address if inward else entry.answer.address
        flow = edits.Flow(subject.key, name, _flow_words(entry), direction.capitalize())
        asked = entry.answer.port, entry.protocol
        near = model.near(flow.direction, subject, address, asked)
        spec = model.spec(flow.direction, subject)
        entry.edits[direction] = edits.smallest(spec, side.candidates, near, flow)


def _flow_words(entry: Explained) -> str:
    port = entry.answer.port
    if entry.protocol != "ICMP":
        return f"{port}/{entry.protocol}"
    if port is None:
        return "ICMP echo requests"
    return f"ICMP type {port >> 8} code {port & 0xFF}"


def number_of(protocol: str, address: str) -> int:
    """The protocol's number; ICMP is of the address's family."""
    if protocol == "ICMP" and ":" in address:
        protocol = "ICMPv6"
    return lookup.PROTOCOLS[protocol]


def _questions(entry: Explained) -> list[tuple[str, str, Question]]:
    """(direction, node, question) of each end that is a pod. The program is run from the source;
    on another node also into the target."""
    number = number_of(entry.protocol, entry.answer.address)
    port = entry.answer.port
    if port is None:
        port = ECHO["ICMPv6" if ":" in entry.answer.address else "ICMP"] << 8
    here, there = entry.source_address, entry.answer.address
    asked = Question(here, there, "egress", number, port, program=FROM_POD)
    found = [("egress", entry.source.node, asked)]
    if entry.target is not None:
        program = TO_POD if _crosses(entry) else ""
        asked = Question(there, here, "ingress", number, port, program=program)
        found.append(("ingress", entry.target.node, asked))
    return found


def _take(entry: Explained, direction: str, node: str, told: Told) -> None:
    if not told.present:
        pod = entry.source if direction == "egress" else entry.target
        name = pod.key if pod is not None else ""
        text = f"maps: {name} is not in the node table of {node} (`tidegate status`)"
        entry.disagreements.append(text)
    if told.look is not None:
        entry.looks[direction] = node, told.look
    if told.run is not None:
        entry.runs.append((node, told.run))


def _crosses(entry: Explained) -> bool:
    return entry.target is not None and entry.target.node != entry.source.node


def _judge_service(found: Found, run: Ran) -> None:
    """The program's run against the frontend: the backend it picks must be one of the model's, and
    the verdict that backend's."""
    assert found.expected.frontend is not None
    where = f"program against {render.host_port(*found.expected.frontend)}"
    if not found.explained:
        if run.reason != NO_BACKEND:
            text = f"{where}: {reasons.text(run.reason)}; the model knows no backend"
            found.disagreements.append(text)
        return
    if run.reason == SCTP_PORT:  # a limit of the path per packet, shown; sockets do not meet it
        return
    picked = run.address, run.port
    entry = next((e for e in found.explained if (e.answer.address, e.answer.port) == picked), None)
    if entry is None:
        text = f"{where}: picked {render.host_port(*picked)}, which is no backend of the model's"
        found.disagreements.append(text)
        return
    verdict = entry.answer.verdict
    allowed = verdict.egress.allowed if _crosses(entry) else verdict.allowed
    if run.allowed != allowed:
        found.disagreements.append(f"{where}: {_run_words(run)}; the model says otherwise")


# ---- do they agree? -----------------------------------------------------------------------


def fact_of_side(side: Side) -> Fact:
    return side.why, side.rule_set, -1 if side.rule_number is None else side.rule_number


def fact_of_rule(rule_set: int, name: str, rule: int, allowed: bool) -> Fact:
    """From what the kernel speaks: a rule set's id, its name, a rule or enum tg_rule_special, and
    what came of it."""
    if rule == lookup.SELF:
        return "self", "", -1
    if rule == lookup.HOST:
        return "host", "", -1
    if not rule_set:
        return "default-allow", "", -1
    name = name or f"unknown id {rule_set}"
    if rule == lookup.NONE:
        return "default-allow" if allowed else "default-deny", name, -1
    return "rule", name, rule


def _compare(entry: Explained) -> None:
    verdict = entry.answer.verdict
    for direction, (_, look) in entry.looks.items():
        fact = fact_of_rule(look.rule_set, look.name, look.rule, look.allowed)
        _match(entry, "maps", direction, fact, (look.audit, look.audit_rule))
    for node, run in entry.runs:
        if not run.allowed and run.reason not in POLICY_REASONS:
            text = f"program: {run.program} on {node} dropped it: {reasons.text(run.reason)}"
            entry.disagreements.append(text)
            continue
        for direction in _asked(entry, run):
            end = getattr(run, direction)
            fact = fact_of_rule(end.rule_set, end.name, end.rule, end.allowed)
            # The program names one rule: of the first direction that audit denies.
            first = direction == "egress" or not run.egress.audit
            rule = run.audit_rule if end.audit and first else None
            _match(entry, "program", direction, fact, (end.audit, rule))
    answers = {"maps": entry.maps_allowed, "program": entry.program_allowed}
    for who, allowed in answers.items():
        if allowed != verdict.allowed and not entry.disagreements:
            words = "allowed" if allowed else "denied"
            entry.disagreements.append(f"{who}: {words}; the model says otherwise")


def _asked(entry: Explained, run: Ran) -> list[str]:
    """The directions that this run had to settle."""
    if run.program == TO_POD:
        return ["ingress"]
    # A run ends where egress denies; the other end is then not asked.
    both = entry.target is not None and not _crosses(entry) and entry.side("egress").allowed
    return ["egress", "ingress"] if both else ["egress"]


def _match(
    entry: Explained, who: str, direction: str, fact: Fact, audit: tuple[int, int | None]
) -> None:
    """`audit`: (reason, its rule; None: not told)."""
    side = entry.side(direction)
    wanted = fact_of_side(side)
    if fact != wanted:
        text = f"{who}: {direction} {_fact_words(fact)}; model: {_fact_words(wanted)}"
        entry.disagreements.append(text)
    reason, rule = audit
    number = audit_of_side(side)
    if (reason != 0) != (number is not None) or (rule is not None and reason and rule != number):
        heard = f"rule {rule}, reason {reason}" if reason else "nothing"
        text = f"{who}: {direction}, audit denies by {heard}; model: {side.audit or 'nothing'}"
        entry.disagreements.append(text)


def audit_of_side(side: Side) -> int | None:
    """The rule by which audit denies, lookup.NONE by default; None: it does not."""
    if side.audit is None:
        return None
    return lookup.NONE if side.audit.rule_number is None else side.audit.rule_number


# ---- output -------------------------------------------------------------------------------


def _fact_words(fact: Fact) -> str:
    why, rule_set, rule = fact
    words = why.replace("-", " ")
    if rule >= 0:
        words += f" {rule}"
    return f"{words} of rule set {rule_set[:12]}" if rule_set else words


def _run_words(run: Ran) -> str:
    word = "allowed" if run.allowed else "denied"
    return f"{word}, reason {run.reason} ({reasons.text(run.reason)})"


def _side_words(side: Side, name: str) -> str:
    names = ", ".join(map(policy_text, side.policies))
    match side.why:
        case "rule":
            return str(side.rule)
        case "default-deny":
            return f"default deny: no rule matches, and {name} is isolated by {names}"
        case "default-allow" if side.rule_set:
            return f"no rule decides, and no policy isolates {name}"
        case "default-allow":
            return f"no policy selects {name}"
        case "self":
            return "a pod always reaches itself"
        case "host":
            return "generated on the pod's own node"
        case "no-endpoint":
            return f"{name} is no pod: it has no policy"


def _word(allowed: bool | None) -> str:
    return "DEPENDS ON THE BACKEND" if allowed is None else "ALLOWED" if allowed else "DENIED"


def _text(found: Found) -> str:
    out = []
    if found.expected.frontend is not None:
        name = render.host_port(*found.expected.frontend)
        count = len(found.explained)
        out.append(f"service {name}/{found.protocol}: {count} backend{'s' * (count != 1)}\n")
        if not found.explained:
            out.append(f"DENIED   {reasons.text(NO_BACKEND)}\n")
    out += [_entry_text(entry) for entry in found.explained]
    if found.service is not None:
        picked = ""
        node, run = found.service
        if run.reason not in (NO_BACKEND, SCTP_PORT):
            picked = f", sent to {render.host_port(run.address, run.port)}"
        out.append(f"program against the service, on {node}: {_run_words(run)}{picked}\n")
    wrong = found.all_disagreements
    out += [f"DISAGREE  {text}\n" for text in wrong] or ["the answers agree\n"]
    return "\n".join(out)


def _entry_text(entry: Explained) -> str:
    verdict, target = entry.answer.verdict, _target_name(entry)
    where = render.host_port(entry.answer.address, entry.answer.port or 0)
    if entry.answer.port is None:
        where = entry.answer.address
    node = f", {entry.target.node}" if entry.target else ""
    names = {"egress": entry.source.key, "ingress": target}
    lines = [
        f"{entry.source.key} ({entry.source_address}, {entry.source.node}) -> "
        f"{target} ({where}/{entry.protocol}{node})",
        "",
        f"{_word(verdict.allowed)}",
    ]
    for direction in DIRECTIONS:
        side = entry.side(direction)
        word = "allowed" if side.allowed else "denied "
        lines.append(f"  {direction:<8}{word}  {_side_words(side, names[direction])}")
        if side.audit is not None:
            lines.append(f"{_PAD}audit    {_audit_words(side.audit)}")
        if direction in entry.looks:
            lines += _look_lines(*entry.looks[direction])
        lines += _walk_lines(side)
        label = "to deny" if side.allowed else "to allow"
        for text in entry.edits.get(direction, ()):
            lines.append(f"{_PAD}{label:<9}{text}")
            label = "and"
    lines += ["", f"  model     {'allowed' if verdict.allowed else 'denied'}"]
    lines.append(f"  maps      {'allowed' if entry.maps_allowed else 'denied'}")
    for where, run in entry.runs:
        lines.append(f"  program   {_run_words(run)}: {run.program} on {where}")
    return "\n".join(lines) + "\n"


_PAD = " " * 10


def _audit_words(audit: AuditDenial) -> str:
    if audit.rule is not None:
        return f"passes, and would be denied by {audit.rule}"
    names = ", ".join(map(policy_text, audit.policies))
    return f"passes, and would be denied: no rule matches, and {names} would isolate it"


def _walk_lines(side: Side) -> list[str]:
    """Every rule that matches, in the order in which they are heard; none where one is all."""
    steps = judgement.walk(side.candidates)
    if len(steps) < 2 and all(step.fate == "decides" for step in steps):
        return []
    return [
        f"{_PAD}{step.candidate.tier:<10}{step.candidate.action:<6}{step.fate:<11}"
        f"{step.candidate.rule}"
        for step in steps
    ]


def _target_name(entry: Explained) -> str:
    return entry.target.key if entry.target is not None else entry.answer.address


def _look_lines(node: str, look: Looked) -> list[str]:
    """The map entry that a verdict rests on, decoded and in hexadecimal."""
    if not look.rule_set:
        return []
    pad = _PAD
    place = f"rule set {look.rule_set} (slot {look.slot}) on {node}"
    if look.missing:
        return [f"{pad}{place}: not in the map"]
    if not look.key:
        return [f"{pad}{place}: no entry matches"]
    return [
        f"{pad}{place}",
        f"{pad}key    {look.key}   {_fields(look.key_fields)}",
        f"{pad}value  {look.value}   {_fields(look.value_fields)}",
    ]


def _fields(row: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in row.items())


def _object(found: Found) -> dict[str, Any]:
    front = found.expected.frontend
    out: dict[str, Any] = {
        "allowed": found.expected.allowed,
        "agree": not found.all_disagreements,
        "disagreements": found.all_disagreements,
        "answers": [_entry_object(entry) for entry in found.explained],
    }
    if front is not None:
        out["service"] = {"frontend": f"{render.host_port(*front)}/{found.protocol}"}
    if found.service is not None:
        out["service"]["program"] = _run_object(*found.service)
    return out


def _entry_object(entry: Explained) -> dict[str, Any]:
    return {
        "from": {
            "pod": entry.source.key,
            "address": entry.source_address,
            "node": entry.source.node,
        },
        "to": {
            "pod": entry.target.key if entry.target else "",
            "address": entry.answer.address,
            "node": entry.target.node if entry.target else "",
        },
        "port": entry.answer.port,
        "protocol": entry.protocol,
        "model": {
            "allowed": entry.answer.verdict.allowed,
            **{
                direction: _side_object(entry.side(direction), entry.edits.get(direction, []))
                for direction in DIRECTIONS
            },
        },
        "maps": {
            "allowed": entry.maps_allowed,
            **{d: _look_object(*entry.looks[d]) for d in DIRECTIONS if d in entry.looks},
        },
        "program": {
            "allowed": entry.program_allowed,
            "runs": [_run_object(node, run) for node, run in entry.runs],
        },
    }


def _side_object(side: Side, edits: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"allowed": side.allowed, "why": side.why}
    if side.rule_set:
        found |= {"ruleSet": side.rule_set, "policies": [policy_text(p) for p in side.policies]}
    if side.rule is not None:
        found |= {"rule": str(side.rule), "ruleNumber": side.rule_number}
    if side.candidates:
        found["walk"] = [
            {
                "tier": step.candidate.tier,
                "action": step.candidate.action,
                "fate": step.fate,
                "rule": str(step.candidate.rule),
                "ruleNumber": step.candidate.number,
            }
            for step in judgement.walk(side.candidates)
        ]
    if side.audit is not None:
        found["audit"] = {
            "policies": [policy_text(p) for p in side.audit.policies],
            "rule": "" if side.audit.rule is None else str(side.audit.rule),
        }
    if edits:
        found["toDeny" if side.allowed else "toAllow"] = edits
    return found


def _look_object(node: str, look: Looked) -> dict[str, Any]:
    found: dict[str, Any] = {"allowed": look.allowed, "node": node}
    if look.rule_set:
        found |= {"ruleSetId": look.rule_set, "ruleSet": look.name}
        found |= {"slot": look.slot, "rule": look.rule}
    if look.key:
        found["key"] = {"hex": look.key.replace(" ", ""), **look.key_fields}
        found["value"] = {"hex": look.value.replace(" ", ""), **look.value_fields}
    return found


def _run_object(node: str, run: Ran) -> dict[str, Any]:
    return {
        "node": node,
        "program": run.program,
        "allowed": run.allowed,
        "reason": run.reason,
        "description": reasons.text(run.reason),
        "egress": {"ruleSetId": run.egress.rule_set, "rule": run.egress.rule},
        "ingress": {"ruleSetId": run.ingress.rule_set, "rule": run.ingress.rule},
    }
