"""The compiled rule sets against the prose of the APIs, for policies of every kind; and faults
seeded into the compiler, each of which the same comparison has to notice."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from support import clusters_tiers
from support.ca_soak import SOAK, Figures, campaign, scaled
from support.clusters import RandomSource
from support.mutants import MUTANTS, Mutant, seeded
from support.oracle_tiers import Judgement
from support.tiers_case import Case, documents
from tidegate_operator import identities, world
from tidegate_operator.compile import Compiler, Desired, compile
from tidegate_operator.identities import EMPTY_LEDGER

QUESTIONS = 60
SEEDS = 2000
"""As many clusters, and a fault has been missed. The rarest is met in the 558th."""
DOCS = Path(__file__).parents[2] / "docs" / "mutations.md"


def test_compiled_rule_sets_say_what_the_prose_says() -> None:
    wanted = scaled(50_000, 400_000)
    met: Counter[str] = Counter()
    with campaign("tiers-oracle", "verdicts") as figures:
        seed = 0
        while figures.count < wanted and not figures.failures:
            _one(seed, figures, met)
            seed += 1
    # Every way to decide was met often enough to mean something.
    few = {what: met[what] for what in WAYS if met[what] < wanted // 2_000}
    assert few == {}


def test_incremental_is_from_scratch() -> None:
    """One compiler through clusters each of which differs from the last in one thing."""
    with campaign("tiers-incremental", "steps") as figures:
        for chain in range(scaled(40, 2_000)):
            _chain(chain, figures)


PARTS = ["namespaces", "pods", "policies", "node_objects", "identities", "cluster_policies"]
PARTS += ["traffic_policies"]


def _chain(chain: int, figures: Figures) -> None:
    choice = RandomSource(chain)
    cluster = clusters_tiers.random_cluster(chain)
    living, before, ledger = Compiler(), world.EMPTY_WORLD, EMPTY_LEDGER
    for step in range(8):
        before = world.build(documents(clusters_tiers.documents(cluster)), previous=before)[0]
        ledger = identities.allocate(before, ledger)
        found, fresh = living.compile(before, ledger), compile(before, ledger)
        for name in Desired.__dataclass_fields__:
            if getattr(found, name) != getattr(fresh, name):
                figures.failures.append(f"chain {chain}, step {step}: {name} differs")
                return
        figures.count += 1
        part = choice.pick(PARTS)
        other = clusters_tiers.random_cluster(choice.number(0, 1 << 20))
        cluster = {**cluster, part: other[part] if choice.number(0, 3) else cluster[part][1:]}


WAYS = [
    f"{direction} {kind} {verdict}"
    for direction in ("Egress", "Ingress")
    for kind in ("ClusterNetworkPolicy", "NetworkPolicy", "TrafficPolicy")
    for verdict in ("allows", "denies")
    if (kind, verdict) != ("NetworkPolicy", "denies")
] + ["Egress default", "Ingress default", "Egress audit", "Ingress audit"]


def _one(seed: int, figures: Figures, met: Counter[str]) -> None:
    case = Case(clusters_tiers.random_cluster(seed))
    for question in case.questions(seed, QUESTIONS):
        wrong = case.check(question)
        if wrong:
            figures.failures.append(f"seed {seed}: {question}\n{wrong}")
            return
        if wrong is not None:
            figures.count += 1
            _note(case.oracle.judge(question.src, question.dst, question.packet), met)


def _note(judgement: Judgement, met: Counter[str]) -> None:
    for direction, side in (("Egress", judgement.egress), ("Ingress", judgement.ingress)):
        kinds = {rule.policy.kind for rule in side.by}
        for kind in kinds:
            met[f"{direction} {kind} {'allows' if side.allowed else 'denies'}"] += 1
        met[f"{direction} default"] += not kinds
        met[f"{direction} audit"] += side.audit is not None


def _is_noticed() -> bool:
    for seed in range(SEEDS):
        case = Case(clusters_tiers.random_cluster(seed))
        if any(case.check(question) for question in case.questions(seed, QUESTIONS)):
            return True
    return False


def _chosen() -> list[Mutant]:
    return MUTANTS if SOAK else MUTANTS[::4]


def test_every_seeded_fault_is_noticed() -> None:
    with campaign("mutations", "faults") as figures:
        for mutant in _chosen():
            figures.count += 1
            if not seeded(mutant, _is_noticed):
                figures.failures.append(mutant.words)


def test_every_seeded_fault_still_has_its_place() -> None:
    """Those that were not chosen, too: an edit that no longer fits its source proves nothing."""
    for mutant in MUTANTS:
        source = Path(*_path(mutant)).read_text()
        assert source.count(mutant.old) == 1, mutant.words


def _path(mutant: Mutant) -> tuple[Path, str]:
    return Path(__file__).parents[2] / "operator", f"{mutant.module.replace('.', '/')}.py"


def test_the_faults_are_listed() -> None:
    listed = re.findall(r"^- (.*)$", DOCS.read_text(), re.MULTILINE)
    assert listed == [mutant.words for mutant in MUTANTS]
    assert len(set(listed)) == len(listed) >= 40
