"""One generated cluster, compiled, held against the oracle of all kinds of policies."""

from __future__ import annotations

from typing import Any

from support import clusters, clusters_tiers, oracle
from support.clusters_tiers import Question
from support.evaluator import Answer, Direction, Evaluator
from support.oracle_tiers import Policy, Rule, Side, TierOracle
from tidegate_api.kinds import KINDS
from tidegate_operator import identities, world
from tidegate_operator.compile import Desired, compile
from tidegate_operator.identities import EMPTY_LEDGER
from tidegate_operator.manifests import Document, Key
from tidegate_operator.problems import Source
from tidegate_operator.world import MadeWorld


def documents(manifests: list[Any]) -> tuple[Document, ...]:
    """As a folder gives them, without a folder."""
    found = []
    for tree in manifests:
        model = KINDS[tree["apiVersion"], tree["kind"]]
        item = model.model_validate(tree)
        namespace = (item.metadata.namespace or "default") if model.namespaced else ""
        key = Key(tree["kind"], namespace, item.metadata.name)
        found.append(Document(key, item, Source("generated.yaml", 1, 1)))
    return tuple(sorted(found, key=lambda document: document.key))


def made(cluster: Any) -> tuple[MadeWorld, Desired]:
    now = world.build(documents(clusters_tiers.documents(cluster)))[0]
    return now, compile(now, identities.allocate(now, EMPTY_LEDGER))


class Case:
    def __init__(self, cluster: Any) -> None:
        self.world, desired = made(cluster)
        self.evaluator = Evaluator(
            desired.rule_sets,
            {name: node.endpoints for name, node in desired.nodes.items()},
            desired.ipcache.values(),
            desired.peers,
        )
        self.cluster = {
            **cluster,
            "addresses": {str(n): list(pod.addresses) for n, pod in self.world.pods.items()},
            "nodes": {str(n): pod.node for n, pod in self.world.pods.items()},
            "node_addresses": {n: node.addresses for n, node in self.world.nodes.items()},
            "gateways": {n: node.gateways for n, node in self.world.nodes.items()},
            "pod_cidrs": self.world.pod_cidrs,
        }
        self.oracle = TierOracle(self.cluster)

    def questions(self, seed: int, count: int) -> list[Question]:
        return clusters_tiers.questions(self.cluster, clusters.RandomSource(seed), count)

    def check(self, question: Question) -> str | None:
        """What is wrong, "" for nothing; None: not a question with one answer."""
        src, dst = question.src, question.dst
        if self.oracle.is_unknown(src) or self.oracle.is_unknown(dst):
            return None
        try:
            expected = self.oracle.judge(src, dst, question.packet)
        except oracle.OracleError:
            return None
        if expected.exempt == "self":
            return None
        addresses = self._address(src, dst), self._address(dst, src)
        wrong = self._compare("Egress", addresses, expected.egress, question, src)
        if not wrong and expected.exempt != "host":
            wrong = self._compare("Ingress", addresses[::-1], expected.ingress, question, dst)
        return wrong

    def _compare(
        self,
        direction: Direction,
        addresses: tuple[str, str],
        expected: Side,
        question: Question,
        subject: oracle.End,
    ) -> str:
        if isinstance(subject, oracle.Host):
            return ""
        found = self.evaluator.side(direction, *addresses, question.packet)
        if not _agree(found, expected):
            return f"{direction}: {found}, not {expected}"
        if found.by is not None and found.log != self._logs(direction, _rule(found.by)):
            return f"{direction}: {found} has another `log`"
        return ""

    def _logs(self, direction: Direction, rule: Rule) -> bool:
        """As the rule is written."""
        for item in self.cluster["traffic_policies"]:
            named = Policy("TrafficPolicy", item["metadata"]["namespace"], item["metadata"]["name"])
            if named == rule.policy:
                written = item["spec"][direction.lower()][rule.index]
                return bool(written.get("log", False))
        return False

    def _address(self, end: oracle.End, other: oracle.End) -> str:
        if not isinstance(end, oracle.Pod):
            return end.ip
        family = end.family or (oracle._family(other) or 4)
        return next(
            text for text in self.cluster["addresses"][end.key] if (":" in text) == (family == 6)
        )


def _agree(found: Answer, expected: Side) -> bool:
    """The rule that is named is one of those that may be; the policies are the same."""
    by = frozenset() if found.by is None else frozenset((_rule(found.by),))
    isolated = frozenset(Policy(ref.kind, ref.namespace, ref.name) for ref in found.isolated_by)
    return (
        found.allowed == expected.allowed
        and bool(by) == bool(expected.by)
        and by <= expected.by
        and (found.by is not None or isolated == expected.isolated_by)
        and _audits(found, expected)
    )


def _audits(found: Answer, expected: Side) -> bool:
    if found.audit is None or expected.audit is None:
        return found.audit is expected.audit
    match found.audit:
        case (ref, int() as index):
            return _rule((ref, index)) in expected.audit  # type: ignore[arg-type]
    return {Policy(r.kind, r.namespace, r.name) for r in found.audit} == expected.audit  # type: ignore[union-attr]


def _rule(by: Any) -> Rule:
    ref, index = by
    return Rule(Policy(ref.kind, ref.namespace, ref.name), index)
