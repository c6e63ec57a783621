"""Verdicts: oracle, model, decoded map bytes and program must agree.

Seeded clusters as YAML go through the operator and the loader into real maps of two nodes. Each
question is then answered five times: by `support.oracle` (NetworkPolicy read literally), by the
CLI's model of the objects, by `support.ca_maps` over the bytes of the maps, by the dry-run copy
of the program and by the program itself, which also tracks the flow.

Faults it was seen to find, each within seconds: excepts ignored; NotIn that needs its key; a port
prefix one bit short (loader, program); ties given to the highest rule (loader, program); an absent
namespaceSelector read as {}; a namespace without its name's label; endPort read as its first port;
an unknown peer in an ipBlock; unpublished pod addresses taken for world; rules of a protocol that
match every other; egress rules without policyTypes that do not isolate; an identity that forgets a
label; ingress not asked where both ends are local.
"""

from __future__ import annotations

import copy
import ipaddress
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ca_maps, ca_rig, clusters, frames, oracle
from support.ca_maps import HOST, NONE, NOT_ASKED, Answer
from support.ca_soak import Figures, campaign, scaled
from support.oracle import Host, Oracle
from tidegate_api.state import RuleSet
from tidegate_cli.model import Model
from tidegate_cli.model import Side as ModelSide

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

CHUNKS = 2
PROBES = 250
"""Questions a cluster."""
Nodes = dict[str, ca_rig.Node]
_serial = itertools.count()
"""Of flows, across clusters: an echo flow of an earlier one must not be met in reverse."""


@dataclass(frozen=True)
class End:
    """One end of a question, as the product knows it. `node` "": no endpoint of ours."""

    address: str
    key: str = ""
    node: str = ""
    ifindex: int = 0


class Case:
    """One cluster in force on two nodes."""

    def __init__(self, nodes: Nodes, folder: Path, cluster: clusters.Manifests) -> None:
        self.nodes = nodes
        self.made = ca_rig.compile_cluster(folder, cluster)
        self.cluster = ca_rig.oracle_cluster(cluster, self.made)
        self.oracle = Oracle(self.cluster)
        self.blind = Oracle(_without_blocks(self.cluster))
        self.model = Model.from_objects(self.made.objects)
        self.rule_sets = {r.metadata.name: r for r in self.made.objects if isinstance(r, RuleSet)}
        self.maps: dict[str, ca_maps.NodeMaps] = {}
        self.ends: dict[str, End] = {}
        for name, node in nodes.items():
            interfaces = self.made.interfaces(name)
            node.loader.apply(self.made.state(name), interfaces)
            self.maps[name] = ca_maps.read(node.pin_dir)
            assert self.maps[name].problems == []
            for pod in self.made.world.pods.values():
                if pod.uid in interfaces:
                    key, index = f"{pod.namespace}/{pod.name}", interfaces[pod.uid].ifindex
                    for address in pod.addresses:
                        self.ends[address] = End(address, key, name, index)
        self._pod_networks = [ipaddress.ip_network(c) for c in self.made.world.pod_cidrs]
        nodes_networks = [c for n in self.made.world.nodes.values() for c in n.pod_cidrs]
        # The node's own address inside its pods' network.
        self._gateways = {ipaddress.ip_network(c)[1] for c in nodes_networks}

    def check(self, probe: clusters.Probe) -> str | None:
        """What disagrees; "" nothing; None: neither end is a pod of ours."""
        family = max(_family(probe.src), _family(probe.dst))
        src, dst = self._end(probe.src, family), self._end(probe.dst, family)
        if not src.node and not dst.node:
            return None
        unknown = self._unknown(src) or self._unknown(dst)
        judge = self.blind if unknown else self.oracle
        wanted = judge.verdict(probe.src, probe.dst, probe.port, probe.protocol)
        host = bool(dst.node) and self._from_host(probe.src, dst)
        assert host == (wanted.exempt == "host"), probe
        runs = list(self._runs(src, dst, probe, host))
        said = self.model.verdict(
            src.address, dst.address, probe.port, probe.protocol, from_host=host
        )
        wrong = [text for run in runs if (text := self._compare(run, wanted, said))]
        allowed = {
            "oracle": wanted.allowed,
            "model": said.allowed,
            "maps": all(run.maps.allowed for run in runs),
            "dry run": all(run.dry.allowed for run in runs),
            "program": all(run.real for run in runs),
        }
        if len(set(allowed.values())) != 1:
            wrong.append(f"allowed: {allowed}")
        return "\n".join(wrong)

    # ---- the program and the maps ----------------------------------------------------

    def _runs(self, src: End, dst: End, probe: clusters.Probe, host: bool) -> Iterator[Run]:
        number = ca_maps.NUMBERS[probe.protocol]
        sport = 20000 + next(_serial) % 40000
        frame = frames.packet(src.address, dst.address, number, sport, probe.port or 0)
        if src.node:
            maps = self.maps[src.node].from_pod(
                src.ifindex, dst.address, probe.port, probe.protocol
            )
            yield self._run("from_pod", src, frame, maps, False)
        if dst.node and src != dst:
            maps = self.maps[dst.node].to_pod(
                dst.ifindex, src.address, probe.port, probe.protocol, host=host
            )
            yield self._run("to_pod", dst, frame, maps, host)

    def _run(self, program: str, at: End, frame: bytes, maps: Answer, host: bool) -> Run:
        node = self.nodes[at.node]
        dry, _ = node.judge(program, frame, at.ifindex, host=host)
        real = node.passes(program, frame, at.ifindex, host=host)
        return Run(program, at, maps, dry, real)

    # ---- comparing -------------------------------------------------------------------

    def _compare(self, run: Run, wanted: oracle.Verdict, said: Any) -> str:
        if run.maps != run.dry:
            return f"{run.program} at {run.at}: maps {run.maps}, program {run.dry}"
        if wanted.exempt == "self":
            return ""
        node = self.nodes[run.at.node]
        sides = (
            ("egress", run.dry.egress, wanted.egress_isolated_by, wanted.egress_by, said.egress),
            (
                "ingress",
                run.dry.ingress,
                wanted.ingress_isolated_by,
                wanted.ingress_by,
                said.ingress,
            ),
        )
        for name, answer, isolated_by, by, model in sides:
            text = self._side(node, answer, isolated_by, by, model)
            if text:
                return f"{run.program} at {run.at}: {name} {text}"
        return ""

    def _side(
        self,
        node: ca_rig.Node,
        answer: tuple[int, int],
        isolated_by: frozenset[oracle.PolicyRef],
        by: frozenset[oracle.RuleRef],
        model: ModelSide,
    ) -> str:
        number, rule = answer
        if answer == NOT_ASKED or rule == HOST:
            return ""
        if number == 0:
            if isolated_by or model.isolated or rule != NONE:
                return f"not isolated in the kernel; oracle {isolated_by}, model {model}"
            return ""
        name = node.rule_set_name(number)
        spec = self.rule_sets[name].spec
        if name != model.rule_set or (None if rule == NONE else rule) != model.rule_number:
            return f"kernel: rule {rule} of {name}; model {model}"
        isolating = {oracle.PolicyRef(p.namespace, p.name) for p in spec.policies}
        if isolating != isolated_by:
            return f"isolated by {isolating}, oracle {isolated_by}"
        if rule == NONE:
            return f"default deny; oracle allows by {by}" if by else ""
        at = spec.rules[rule]
        policy = spec.policies[at.policy]
        if oracle.RuleRef(policy.namespace, policy.name, at.index) not in by:
            return f"allowed by {policy} rule {at.index}; oracle {by}"
        return ""

    # ---- ends ------------------------------------------------------------------------

    def _end(self, end: oracle.End, family: int) -> End:
        if not isinstance(end, oracle.Pod):
            return self.ends.get(end.ip, End(end.ip))
        for address in self.cluster["addresses"][end.key]:
            if (":" in address) == (family == 6):
                return self.ends.get(address, End(address))
        raise AssertionError(end)

    def _unknown(self, end: End) -> bool:
        """In a pod CIDR and nobody's: matches rules for any peer only (DESIGN, invariant 4)."""
        ip = ipaddress.ip_address(end.address)
        inside = any(ip.version == net.version and ip in net for net in self._pod_networks)
        return inside and not end.node and ip not in self._gateways

    def _from_host(self, src: oracle.End, dst: End) -> bool:
        if isinstance(src, Host):
            return True
        if not isinstance(src, oracle.Pod):
            return False
        pod = self.made.world.pods[src.namespace, src.name]  # type: ignore[index]
        return pod.host_network and pod.node == dst.node


@dataclass(frozen=True)
class Run:
    program: str
    at: End
    maps: Answer
    dry: Answer
    real: bool


def _family(end: oracle.End) -> int:
    if isinstance(end, oracle.Pod):
        return end.family
    return 6 if ":" in end.ip else 4


def _without_blocks(cluster: dict[str, Any]) -> dict[str, Any]:
    """The same policies where no ipBlock matches anybody: {} selects pods only."""
    changed = copy.deepcopy(cluster)
    for policy in changed["policies"]:
        for field, peers in (("ingress", "from"), ("egress", "to")):
            for rule in policy["spec"].get(field) or []:
                for peer in (rule or {}).get(peers) or []:
                    if peer.get("ipBlock") is not None:
                        peer["ipBlock"] = None
                        peer["podSelector"] = {}
    return changed


# ---- a failure made small ----------------------------------------------------------------


def _fails(nodes: Nodes, folder: Path, cluster: Any, probe: clusters.Probe) -> str:
    return Case(nodes, folder, cluster).check(probe) or ""


def reproduction(nodes: Nodes, folder: Path, cluster: Any, probe: clusters.Probe) -> str:
    """The cluster without the policies, rules, peers and ports that the failure can do without.
    Pods stay: their number decides addresses."""
    small = copy.deepcopy(cluster)
    progress = True
    while progress:
        progress = False
        for cut in list(_cuts(small)):
            undo = copy.deepcopy(small)
            cut(small)
            if _fails(nodes, folder, small, probe):
                progress = True
                break
            small = undo
    text = yaml.safe_dump_all(clusters.documents(small), sort_keys=False)
    return f"{probe}\n{_fails(nodes, folder, small, probe)}\n{text}"


def _cuts(cluster: Any) -> Iterator[Callable[[Any], object]]:
    for at, policy in enumerate(cluster["policies"]):
        yield lambda c, at=at: c["policies"].pop(at)
        for field, peers in (("ingress", "from"), ("egress", "to")):
            rules = policy["spec"].get(field) or []
            for number, rule in enumerate(rules):
                if len(rules) > 1:
                    yield lambda c, a=at, f=field, n=number: c["policies"][a]["spec"][f].pop(n)
                for part in (peers, "ports"):
                    for item in range(len((rule or {}).get(part) or []) - 1):
                        yield lambda c, a=at, f=field, n=number, p=part, i=item: c["policies"][a][
                            "spec"
                        ][f][n][p].pop(i)


# ---- the campaign --------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_five_answers_agree(chunk: int, tmp_path: Path) -> None:
    wanted = scaled(50_000, 1_000_000) // CHUNKS
    folder = tmp_path / "folder"
    folder.mkdir()
    with (
        ca_rig.bench(tmp_path) as nodes,
        campaign(f"verdict-oracle-{chunk}", "verdicts") as figures,
    ):
        seed = chunk
        while figures.count < wanted and not figures.failures:
            _one(nodes, folder, seed, figures)
            seed += CHUNKS


def _one(nodes: Nodes, folder: Path, seed: int, figures: Figures) -> None:
    cluster = clusters.random_cluster(seed)
    case = Case(nodes, folder, cluster)
    for probe in clusters.probes(case.cluster, clusters.RandomSource(seed), PROBES):
        wrong = case.check(probe)
        if wrong:
            small = reproduction(nodes, folder, cluster, probe)
            figures.failures.append(f"seed {seed}: {probe}\n{wrong}\n--- reduced:\n{small}")
            return
        figures.count += wrong is not None
