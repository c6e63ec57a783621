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
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tidegate_api.state import NodeState, digest
from tidegate_bpf import PermissionDenied
from tidegate_loader import addresses

from tidegate_cli import frame, lookup, reasons, render
from tidegate_cli.dryrun import DryRun, Run
from tidegate_cli.errors import CliError
from tidegate_cli.live import Endpoint, NodeMaps, NodeView
from tidegate_cli.lookup import Look
from tidegate_cli.model import PORT_PROTOCOLS, Answer, Expected, Model, Pod, Side, policy_text
from tidegate_cli.objects import RunObjects

DIRECTIONS = ("egress", "ingress")
POLICY_REASONS = frozenset((133, 181))
NO_BACKEND = 158
SCTP_PORT = 225
ALLOWED, DENIED, DISAGREE = 0, 1, 2

Fact = tuple[str, str, int]
"""(why as in model.Side, RuleSet name, rule number or -1): what answers are compared by."""


def explain(args: argparse.Namespace) -> int:
    port, protocol = (None, "ICMP") if args.icmp else parse_port(args.port)
    run = RunObjects(args.run_dir)
    model = Model.from_objects(run.all())
    expected = model.expected(args.source, args.target, port, protocol, family=args.family)
    with Nodes(run) as nodes:
        found = ask(model, nodes, expected, protocol)
        if found.all_disagreements:
            found.disagreements += nodes.lagging()
    if args.output == "table":
        sys.stdout.write(_text(found))
    else:
        render.structured(_object(found), args.output)
    return found.exit_code


def parse_port(text: str) -> tuple[int, str]:
    """ "80/TCP" → (80, "TCP"). Raises CliError."""
    number, _, protocol = text.partition("/")
    name = protocol.upper() or "TCP"
    if not (number.isascii() and number.isdigit() and 1 <= int(number) <= 65535):
        raise CliError(f"--port {text}: not a port", "give 1 to 65535, as in 80 or 53/UDP")
    if name not in PORT_PROTOCOLS:
        raise CliError(f"--port {text}: not a protocol with ports", "TCP, UDP or SCTP; or --icmp")
    return int(number), name


# ---- the nodes' kernels ------------------------------------------------------------------


@dataclass
class Node:
    """One node's kernel, with its dry run."""

    view: NodeView
    dry_run: DryRun

    def endpoint(self, address: str) -> Endpoint | None:
        return self.view.maps.endpoint_at(addresses.pack(address))


class Nodes:
    """Opens each node once. A context manager."""

    def __init__(self, run: RunObjects) -> None:
        self._run = run
        self._stack = contextlib.ExitStack()
        self._known: dict[str, Node] = {}

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def lagging(self) -> list[str]:
        """Nodes asked that do not enforce the desired state yet: why answers may differ."""
        states = [item for item in self._run.all() if isinstance(item, NodeState)]
        desired = {item.metadata.name: digest(item.spec) for item in states}
        return [
            f"{name}: its loader has not put the desired state in force (`tidegate status`)"
            for name, node in self._known.items()
            if node.view.realised is None or node.view.realised.digest != desired.get(name)
        ]

    def node(self, name: str) -> Node:
        """Raises CliError, BpfError."""
        if name not in self._known:
            maps = self._stack.enter_context(NodeMaps(self._run.pin_dir(name)))
            view = NodeView(name, maps, self._run.realised(name))
            try:
                dry = DryRun(maps, self._run.place(name).netns)
            except PermissionDenied as error:
                raise CliError(
                    f"the dry run cannot be loaded: {error.strerror}", "run as root"
                ) from error
            self._known[name] = Node(view, self._stack.enter_context(dry))
        return self._known[name]


# ---- the answers ------------------------------------------------------------------------


@dataclass
class Explained:
    """One place a packet may end up, and what the three say."""

    source: Pod
    target: Pod | None
    answer: Answer
    source_address: str
    protocol: str
    looks: dict[str, tuple[NodeView, Look]] = field(default_factory=dict)
    """By direction; only ends that are pods."""
    runs: list[tuple[NodeView, Run]] = field(default_factory=list)
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
    """All of it. `service` is the run against the frontend itself."""

    expected: Expected
    protocol: str
    explained: list[Explained]
    service: tuple[NodeView, Run] | None = None
    disagreements: list[str] = field(default_factory=list)

    @property
    def all_disagreements(self) -> list[str]:
        return [*(text for e in self.explained for text in e.disagreements), *self.disagreements]

    @property
    def exit_code(self) -> int:
        if self.all_disagreements:
            return DISAGREE
        return ALLOWED if self.expected.allowed else DENIED


def ask(model: Model, nodes: Nodes, expected: Expected, protocol: str) -> Found:
    """The three answers for everything that `expected` holds. Raises CliError, BpfError."""
    source = model.owner(expected.source)
    assert source is not None  # the model took this address from a pod
    found = Found(expected, protocol, [])
    for answer in expected.answers:
        entry = Explained(source, model.owner(answer.address), answer, expected.source, protocol)
        found.explained.append(entry)
        _ask_maps(nodes, entry)
        _ask_program(nodes, entry)
        _compare(entry)
    if expected.frontend is not None:
        _ask_service(nodes, found, source)
    return found


def number_of(protocol: str, address: str) -> int:
    """The protocol's number; ICMP is of the address's family."""
    if protocol == "ICMP" and ":" in address:
        protocol = "ICMPv6"
    return lookup.PROTOCOLS[protocol]


def _ends(nodes: Nodes, entry: Explained) -> Iterator[tuple[str, Node, Endpoint | None, str]]:
    """(direction, node, its endpoint, the peer's address) of each end that is a pod."""
    ends = [("egress", entry.source, entry.source_address, entry.answer.address)]
    if entry.target is not None:
        ends.append(("ingress", entry.target, entry.answer.address, entry.source_address))
    for direction, pod, own, peer in ends:
        node = nodes.node(pod.node)
        yield direction, node, node.endpoint(own), peer


def _ask_maps(nodes: Nodes, entry: Explained) -> None:
    flow = (number_of(entry.protocol, entry.answer.address), entry.answer.port or 0)
    for direction, node, endpoint, peer in _ends(nodes, entry):
        if endpoint is None:
            entry.disagreements.append(_absent(node, entry, direction))
            continue
        look = lookup.ask(node.view.maps, endpoint, direction, addresses.pack(peer), flow)
        entry.looks[direction] = node.view, look


def _absent(node: Node, entry: Explained, direction: str) -> str:
    pod = entry.source if direction == "egress" else entry.target
    name = pod.key if pod is not None else ""
    return f"maps: {name} is not in the node table of {node.view.name} (`tidegate status`)"


def _ask_program(nodes: Nodes, entry: Explained) -> None:
    """From the source pod; on another node also into the target pod."""
    for direction, node, endpoint, _ in _ends(nodes, entry):
        if endpoint is None or (direction == "ingress" and not _crosses(entry)):
            continue
        packet = _packet(entry, endpoint, direction, entry.answer.address, entry.answer.port)
        run = node.dry_run.from_pod if direction == "egress" else node.dry_run.to_pod
        entry.runs.append((node.view, run(endpoint, packet)))


def _crosses(entry: Explained) -> bool:
    return entry.target is not None and entry.target.node != entry.source.node


def _packet(
    entry: Explained, endpoint: Endpoint, direction: str, address: str, port: int | None
) -> bytes:
    macs = (endpoint.row.pod_mac, endpoint.row.host_mac)
    if direction == "ingress":
        macs = macs[::-1]
    protocol = number_of(entry.protocol, address)
    return frame.opening(macs, entry.source_address, address, protocol, port or 0)


def _ask_service(nodes: Nodes, found: Found, source: Pod) -> None:
    """The program's run against the frontend: the backend it picks must be one of the model's, and
    the verdict that backend's."""
    assert found.expected.frontend is not None
    address, port = found.expected.frontend
    node = nodes.node(source.node)
    endpoint = node.endpoint(found.expected.source)
    if endpoint is None:
        return
    protocol = number_of(found.protocol, address)
    macs = (endpoint.row.pod_mac, endpoint.row.host_mac)
    packet = frame.opening(macs, found.expected.source, address, protocol, port)
    run = node.dry_run.from_pod(endpoint, packet)
    found.service = node.view, run
    where = f"program against {render.host_port(address, port)}"
    if not found.explained:
        if run.reason != NO_BACKEND:
            text = f"{where}: {reasons.text(run.reason)}; the model knows no backend"
            found.disagreements.append(text)
        return
    if run.reason == SCTP_PORT:  # a limit of the path per packet, shown; sockets do not meet it
        return
    picked = frame.destination(run.frame, protocol)
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


def fact_of_rule(view: NodeView, rule_set: int, rule: int) -> Fact:
    """From what the kernel speaks: a rule set's id and a rule or enum tg_rule_special."""
    if rule == lookup.SELF:
        return "self", "", -1
    if rule == lookup.HOST:
        return "host", "", -1
    if not rule_set:
        return "default-allow", "", -1
    name = view.rule_set_name(rule_set) or f"unknown id {rule_set}"
    return ("default-deny", name, -1) if rule == lookup.NONE else ("rule", name, rule)


def _compare(entry: Explained) -> None:
    verdict = entry.answer.verdict
    for direction, (view, look) in entry.looks.items():
        _match(entry, "maps", direction, fact_of_rule(view, look.rule_set, look.rule))
    for view, run in entry.runs:
        if not run.allowed and run.reason not in POLICY_REASONS:
            text = f"program: {run.program} on {view.name} dropped it: {reasons.text(run.reason)}"
            entry.disagreements.append(text)
            continue
        for direction in _asked(entry, run):
            _match(entry, "program", direction, fact_of_rule(view, *getattr(run, direction)))
    answers = {"maps": entry.maps_allowed, "program": entry.program_allowed}
    for who, allowed in answers.items():
        if allowed != verdict.allowed and not entry.disagreements:
            words = "allowed" if allowed else "denied"
            entry.disagreements.append(f"{who}: {words}; the model says otherwise")


def _asked(entry: Explained, run: Run) -> list[str]:
    """The directions that this run had to settle."""
    if run.program == "to_pod":
        return ["ingress"]
    # A run ends where egress denies; the other end is then not asked.
    both = entry.target is not None and not _crosses(entry) and entry.side("egress").allowed
    return ["egress", "ingress"] if both else ["egress"]


def _match(entry: Explained, who: str, direction: str, fact: Fact) -> None:
    wanted = fact_of_side(entry.side(direction))
    if fact != wanted:
        text = f"{who}: {direction} {_fact_words(fact)}; model: {_fact_words(wanted)}"
        entry.disagreements.append(text)


# ---- output -------------------------------------------------------------------------------


def _fact_words(fact: Fact) -> str:
    why, rule_set, rule = fact
    words = why.replace("-", " ")
    if rule >= 0:
        words += f" {rule}"
    return f"{words} of rule set {rule_set[:12]}" if rule_set else words


def _run_words(run: Run) -> str:
    word = "allowed" if run.allowed else "denied"
    return f"{word}, reason {run.reason} ({reasons.text(run.reason)})"


def _side_words(side: Side, name: str) -> str:
    names = ", ".join(map(policy_text, side.policies))
    match side.why:
        case "rule":
            return str(side.rule)
        case "default-deny":
            return f"default deny: no rule matches, and {name} is isolated by {names}"
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
        view, run = found.service
        if run.reason not in (NO_BACKEND, SCTP_PORT):
            protocol = number_of(found.protocol, found.expected.source)
            picked = f", sent to {render.host_port(*frame.destination(run.frame, protocol))}"
        out.append(f"program against the service, on {view.name}: {_run_words(run)}{picked}\n")
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
        if direction in entry.looks:
            lines += _look_lines(*entry.looks[direction])
    lines += ["", f"  model     {'allowed' if verdict.allowed else 'denied'}"]
    lines.append(f"  maps      {'allowed' if entry.maps_allowed else 'denied'}")
    for view, run in entry.runs:
        lines.append(f"  program   {_run_words(run)}: {run.program} on {view.name}")
    return "\n".join(lines) + "\n"


def _target_name(entry: Explained) -> str:
    return entry.target.key if entry.target is not None else entry.answer.address


def _look_lines(view: NodeView, look: Look) -> list[str]:
    """The map entry that a verdict rests on, decoded and in hexadecimal."""
    if not look.rule_set:
        return []
    pad = " " * 10
    place = f"rule set {look.rule_set} (slot {look.slot}) on {view.name}"
    if look.missing:
        return [f"{pad}{place}: not in the map"]
    if look.key is None or look.value is None:
        return [f"{pad}{place}: no entry matches"]
    layouts = view.maps.layouts
    key, value = layouts.rule_key.unpack(look.key), layouts.rule.unpack(look.value)
    return [
        f"{pad}{place}",
        f"{pad}key    {look.key.hex(' ')}   {_fields(key)}",
        f"{pad}value  {look.value.hex(' ')}   {_fields(value)}",
    ]


def _fields(row: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in row._asdict().items())


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
            **{direction: _side_object(entry.side(direction)) for direction in DIRECTIONS},
        },
        "maps": {
            "allowed": entry.maps_allowed,
            **{d: _look_object(*entry.looks[d]) for d in DIRECTIONS if d in entry.looks},
        },
        "program": {
            "allowed": entry.program_allowed,
            "runs": [_run_object(view, run) for view, run in entry.runs],
        },
    }


def _side_object(side: Side) -> dict[str, Any]:
    found: dict[str, Any] = {"allowed": side.allowed, "why": side.why}
    if side.rule_set:
        found |= {"ruleSet": side.rule_set, "policies": [policy_text(p) for p in side.policies]}
    if side.rule is not None:
        found |= {"rule": str(side.rule), "ruleNumber": side.rule_number}
    return found


def _look_object(view: NodeView, look: Look) -> dict[str, Any]:
    found: dict[str, Any] = {"allowed": look.allowed, "node": view.name}
    if look.rule_set:
        found |= {"ruleSetId": look.rule_set, "ruleSet": view.rule_set_name(look.rule_set)}
        found |= {"slot": look.slot, "rule": look.rule}
    if look.key is not None and look.value is not None:
        layouts = view.maps.layouts
        for name, codec, data in (
            ("key", layouts.rule_key, look.key),
            ("value", layouts.rule, look.value),
        ):
            found[name] = {"hex": data.hex(), **codec.unpack(data)._asdict()}
    return found


def _run_object(view: NodeView, run: Run) -> dict[str, Any]:
    return {
        "node": view.name,
        "program": run.program,
        "allowed": run.allowed,
        "reason": run.reason,
        "description": reasons.text(run.reason),
        "egress": {"ruleSetId": run.egress[0], "rule": run.egress[1]},
        "ingress": {"ruleSetId": run.ingress[0], "rule": run.ingress[1]},
    }
