"""Policies of every kind, from YAML to the program: oracle, model, decoded map bytes and program.

As `test_ca_verdicts`, with the clusters of `support.clusters_tiers` and the oracle of
`support.oracle_tiers`: tiers, Pass, deny rules, audit, entities, ICMP types and port names.

Faults it was seen to find, each within seconds: Pass taken for allow, the lane below never asked,
an audit default that forgets `audited`, an echo judged by its port 0 (program); audit rules that
are enforced, a remote node without those that serve the API, a port name stored for every member,
peer sets without their addresses (loader).
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import ca_maps, ca_rig, clusters, clusters_tiers, frames, oracle
from support.ca_maps import HOST, NONE, NOT_ASKED, Answer
from support.ca_soak import Figures, campaign, scaled
from support.clusters_tiers import Question
from support.oracle_tiers import Judgement, Packet, Policy, Rule, Side, TierOracle
from tidegate_api.state import RuleSet
from tidegate_cli.judgement import audited_of, rule_ref
from tidegate_cli.model import Model
from tidegate_cli.model import Side as ModelSide

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

CHUNKS = 2
QUESTIONS = 120
"""A cluster."""
WAYS = ("rule allows", "rule denies", "default allows", "default denies", "audit denies")
Nodes = dict[str, ca_rig.Node]
_serial = itertools.count()
"""Of flows: an echo flow of an earlier cluster must not be met in reverse."""


@dataclass(frozen=True)
class End:
    """One end of a question, as the product knows it. `node` "": no endpoint of ours."""

    address: str
    node: str = ""
    ifindex: int = 0


class Case:
    """One cluster in force on two nodes."""

    def __init__(self, nodes: Nodes, folder: Path, seed: int) -> None:
        self.nodes = nodes
        cluster = clusters_tiers.random_cluster(seed)
        made = ca_rig.Operator(folder).step(clusters_tiers.documents(cluster))
        self.world = made.world
        self.cluster: dict[str, Any] = {
            **cluster,
            "addresses": {str(n): list(pod.addresses) for n, pod in made.world.pods.items()},
            "nodes": {str(n): pod.node for n, pod in made.world.pods.items()},
            "node_addresses": {n: node.addresses for n, node in made.world.nodes.items()},
            "gateways": {n: node.gateways for n, node in made.world.nodes.items()},
            "pod_cidrs": made.world.pod_cidrs,
        }
        self.oracle = TierOracle(self.cluster)
        self.model = Model.from_objects(made.objects)
        self.rule_sets = {r.metadata.name: r for r in made.objects if isinstance(r, RuleSet)}
        self.maps: dict[str, ca_maps.NodeMaps] = {}
        self.ends: dict[str, End] = {}
        for name, node in nodes.items():
            interfaces = made.interfaces(name)
            node.loader.apply(made.state(name), interfaces)
            self.maps[name] = ca_maps.read(node.pin_dir)
            assert self.maps[name].problems == []
            for pod in made.world.pods.values():
                for address in pod.addresses if pod.uid in interfaces else ():
                    self.ends[address] = End(address, name, interfaces[pod.uid].ifindex)

    def check(self, question: Question, met: Counter[str]) -> str | None:
        """What disagrees; "" nothing; None: not a question with one answer."""
        src, dst = question.src, question.dst
        if self.oracle.is_unknown(src) or self.oracle.is_unknown(dst):
            return None
        try:
            wanted = self.oracle.judge(src, dst, question.packet)
        except oracle.OracleError:
            return None
        ends = self._end(src, dst), self._end(dst, src)
        if not _is_judged(question.packet, ":" in ends[0].address):
            return None
        if wanted.exempt == "self" or not (ends[0].node or ends[1].node):
            return None
        _note(wanted, met)
        return "\n".join(self._wrong(ends, question.packet, wanted))

    def _wrong(self, ends: tuple[End, End], packet: Packet, wanted: Judgement) -> Iterator[str]:
        host = wanted.exempt == "host"
        port, protocol = _flow(packet)
        said = self.model.verdict(ends[0].address, ends[1].address, port, protocol, from_host=host)
        if said.allowed != wanted.allowed:
            yield f"allowed {wanted.allowed}: model {said}"
        sides = [(wanted.egress, said.egress), (wanted.ingress, said.ingress)]
        for program, at, maps, dry, real in self._runs(ends, packet, host):
            where = f"{program} at {at}"
            if maps != dry:
                yield f"{where}: maps {maps}, program {dry}"
            if real != dry.allowed:
                yield f"{where}: {real} in force, {dry.allowed} in the dry run"
            for at_side, (by, (expected, model)) in enumerate(
                zip((dry.egress, dry.ingress), sides, strict=True)
            ):
                text = self._side(self.nodes[at.node], by, dry, at_side, expected, model)
                if text:
                    yield f"{where}: {'egress' if at_side == 0 else 'ingress'} {text}"
        if not any(True for _ in self._runs(ends, packet, host)):
            yield "nobody was asked"

    def _runs(
        self, ends: tuple[End, End], packet: Packet, host: bool
    ) -> Iterator[tuple[str, End, Answer, Answer, bool]]:
        """(program, where, what its maps say, the dry run, whether it lets the packet pass)."""
        src, dst = ends
        port, protocol = _flow(packet)
        frame = _frame(src.address, dst.address, packet)
        if src.node:
            maps = self.maps[src.node].from_pod(src.ifindex, dst.address, port, protocol)
            yield self._run("from_pod", src, frame, maps, False, True)
        if dst.node:
            maps = self.maps[dst.node].to_pod(dst.ifindex, src.address, port, protocol, host=host)
            # ICMP that is no echo has no port of its own: what the node may send would open
            # the way for a later question from the same address, from elsewhere.
            own = packet.icmp is None or _is_echo(packet)
            yield self._run("to_pod", dst, frame, maps, host, own or not host)

    def _run(
        self, program: str, at: End, frame: bytes, maps: Answer, host: bool, force: bool
    ) -> tuple[str, End, Answer, Answer, bool]:
        """`force`: run the program in force, too."""
        node = self.nodes[at.node]
        dry, _ = node.judge(program, frame, at.ifindex, host=host)
        real = node.passes(program, frame, at.ifindex, host=host) if force else dry.allowed
        return program, at, maps, dry, real

    def _side(
        self,
        node: ca_rig.Node,
        by: tuple[int, int],
        run: Answer,
        at: int,
        expected: Side,
        model: ModelSide,
    ) -> str:
        """What one end's policy said in the kernel, against the oracle and the model."""
        number, rule = by
        if by == NOT_ASKED or rule == HOST:
            return ""
        if number == 0:
            silent = not (expected.by or expected.isolated_by or model.rule_set)
            return "" if silent else f"no rule set; oracle {expected}, model {model}"
        name = node.rule_set_name(number)
        spec = self.rule_sets[name].spec
        if (name, rule) != (
            model.rule_set,
            NONE if model.rule_number is None else model.rule_number,
        ):
            return f"rule {rule} of {name}; model {model}"
        isolated = {_policy(ref) for ref in spec.policies}
        if rule != NONE and _rule(rule_ref(spec, rule)) not in expected.by:
            return f"by {rule_ref(spec, rule)}; oracle {expected}"
        if rule == NONE and (expected.by or isolated != expected.isolated_by):
            return f"default of {isolated}; oracle {expected}"
        if run.audits[at] == 0:
            return f"no audit; oracle {expected}" if expected.audit and run.allowed else ""
        if expected.audit is None or model.audit is None:
            return f"audit denies; oracle {expected}, model {model}"
        if at == 1 and run.audits[0]:
            return ""  # a run names the rule of the first direction only
        named = (
            {_policy(ref) for ref in audited_of(spec)}
            if run.audit_rule == NONE
            else {_rule(rule_ref(spec, run.audit_rule))}
        )
        return "" if named <= expected.audit else f"audit by {named}; oracle {expected}"

    def _end(self, end: oracle.End, other: oracle.End) -> End:
        if not isinstance(end, oracle.Pod):
            return self.ends.get(end.ip, End(end.ip))
        family = end.family or oracle._family(other) or 4
        text = next(a for a in self.cluster["addresses"][end.key] if (":" in a) == (family == 6))
        return self.ends.get(text, End(text))


def _policy(ref: Any) -> Policy:
    return Policy(ref.kind, ref.namespace, ref.name)


def _rule(ref: Any) -> Rule:
    return Rule(_policy(ref.policy), ref.index)


def _is_judged(packet: Packet, six: bool) -> bool:
    """Errors belong to the flow that they quote, neighbour discovery to nobody's policy, and a
    family carries its own ICMP only."""
    if packet.icmp is None:
        return True
    other = (1, 2, 3, 4, 133, 134, 135, 136, 137) if six else (3, 4, 5, 11, 12)
    return (packet.protocol == "ICMPv6") == six and packet.icmp[0] not in other


def _flow(packet: Packet) -> tuple[int | None, str]:
    """(port, protocol) as the product asks: of ICMP type << 8 | code, and an echo's code is 0."""
    if packet.icmp is None:
        return packet.port, packet.protocol
    kind, code = packet.icmp
    return kind << 8 | (0 if _is_echo(packet) else code), packet.protocol


def _is_echo(packet: Packet) -> bool:
    """Or the answer to one."""
    kinds = (0, 8) if packet.protocol == "ICMP" else (128, 129)
    return packet.icmp is not None and packet.icmp[0] in kinds


def _frame(src: str, dst: str, packet: Packet) -> bytes:
    number = ca_maps.NUMBERS[packet.protocol]
    sport = 20000 + next(_serial) % 40000
    if packet.icmp is None:
        return frames.packet(src, dst, number, sport, packet.port or 0)
    kind, code = packet.icmp
    rest = sport.to_bytes(2, "big") + bytes(2)
    made = (
        frames.icmpv6(src, dst, kind, code, rest) if ":" in src else frames.icmp(kind, code, rest)
    )
    return frames.eth(frames.ip(src, dst, number, made))


def _note(judgement: Judgement, met: Counter[str]) -> None:
    for side in (judgement.egress, judgement.ingress):
        how = "rule" if side.by else "default"
        met[f"{how} {'allows' if side.allowed else 'denies'}"] += 1
        met["audit denies"] += side.audit is not None


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_four_answers_agree_on_every_kind(chunk: int, tmp_path: Path) -> None:
    wanted = scaled(12_000, 200_000) // CHUNKS
    folder = tmp_path / "folder"
    folder.mkdir()
    met: Counter[str] = Counter()
    with (
        ca_rig.bench(tmp_path) as nodes,
        campaign(f"tier-verdicts-{chunk}", "verdicts") as figures,
    ):
        seed = chunk
        while figures.count < wanted and not figures.failures:
            _one(nodes, folder, seed, figures, met)
            seed += CHUNKS
    assert {way: met[way] for way in WAYS if met[way] < wanted // 500} == {}


def _one(nodes: Nodes, folder: Path, seed: int, figures: Figures, met: Counter[str]) -> None:
    case = Case(nodes, folder, seed)
    source = clusters.RandomSource(seed)
    for question in clusters_tiers.questions(case.cluster, source, QUESTIONS):
        wrong = case.check(question, met)
        if wrong:
            figures.failures.append(f"seed {seed}: {question}\n{wrong}")
            return
        figures.count += wrong is not None
