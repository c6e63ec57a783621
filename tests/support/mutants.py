"""Plausible faults of the compiler: each is one edit of its source.

`seeded` runs something in a child process in which the compiler has the fault.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = "tidegate_operator"


@dataclass(frozen=True)
class Mutant:
    """`words`: the fault, as docs/mutations.md lists it."""

    words: str
    module: str
    old: str
    new: str


def _in(module: str, *faults: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(words, f"{ROOT}.{module}", old, new) for words, old, new in faults]


MUTANTS = [
    *_in(
        "policies",
        (
            "an absent namespaceSelector is read as {}",
            "        return PodPeer(namespace, None, pods)\n",
            "        return PodPeer(None, Selector(), pods)\n",
        ),
        (
            "except is ignored",
            "tuple(str(net) for net in ordered))",
            "())",
        ),
        (
            "a prefix is one bit too short",
            "BlockPeer(str(ipaddress.ip_network(cidr)),",
            "BlockPeer(str(ipaddress.ip_network(cidr).supernet()),",
        ),
        (
            "an empty list of peers is nobody",
            "    if not written:\n        return None\n    return tuple(_peer(",
            "    if not written:\n        return ()\n    return tuple(_peer(",
        ),
        (
            "an empty list of ports is none",
            "    if not written:\n        return None\n    return tuple(PolicyPort(",
            "    if not written:\n        return ()\n    return tuple(PolicyPort(",
        ),
        ("endPort is ignored", "port.port, port.end_port)", "port.port)"),
        (
            "matchExpressions are ignored",
            "for part in written.match_expressions",
            "for part in written.match_expressions[:0]",
        ),
        (
            "matchLabels ask only whether the label is there",
            'Requirement(key, "In", (value,)) for key, value in written.match_labels.items()',
            'Requirement(key, "Exists") for key, value in written.match_labels.items()',
        ),
        (
            "podSelector beside a namespace's name is ignored",
            "return PodPeer(only, None, pods)",
            "return PodPeer(only, None, Selector())",
        ),
        (
            "policyTypes are ignored",
            "isolates = spec.isolates()",
            'isolates = frozenset({"Ingress", "Egress"})',
        ),
        (
            "only the first except counts",
            "tuple(str(net) for net in ordered))",
            "tuple(str(net) for net in ordered[:1]))",
        ),
        (
            "an except is half of what it says",
            "{ipaddress.ip_network(text) for text in excepts}",
            "{next(n.subnets()) for n in map(ipaddress.ip_network, excepts)}",
        ),
        (
            "every port of a NetworkPolicy is TCP's",
            "PolicyPort(port.protocol, port.port, port.end_port)",
            'PolicyPort("TCP", port.port, port.end_port)',
        ),
        (
            "a namespace by its default label is every one",
            "return PodPeer(only, None, pods)\n    return",
            "return PodPeer(None, Selector(), pods)\n    return",
        ),
    ),
    *_in(
        "cluster_policies",
        (
            "the Admin and Baseline tiers are swapped",
            "tier=spec.tier,",
            'tier="Admin" if spec.tier == "Baseline" else "Baseline",',
        ),
        ("priorities are ignored", "priority=spec.priority,", "priority=0,"),
        ("higher priority values come first", "=spec.priority,", "=-spec.priority,"),
        ("Accept only leaves the tier", '"Accept": "Allow"', '"Accept": "Pass"'),
        ("Pass accepts", '"Pass": "Pass"', '"Pass": "Allow"'),
        ("Pass denies", '"Pass": "Pass"', '"Pass": "Deny"'),
        (
            "protocols are ignored",
            "if written.protocols is not None:",
            "if written.protocols is not None and False:",
        ),
        ("a range is its first port", "port.range.start, port.range.end)", "port.range.start)"),
        (
            "a named port is TCP's",
            "PolicyPort(None, written.destination_named_port)",
            'PolicyPort("TCP", written.destination_named_port)',
        ),
        ("UDP is read as TCP", '_numbered("UDP", ', '_numbered("TCP", '),
        (
            "a selector of nodes selects all",
            "NodePeer(selector(written.nodes))",
            "NodePeer(Selector())",
        ),
        (
            "only the first network counts",
            "for cidr in written.networks or ():",
            "for cidr in (written.networks or ())[:1]:",
        ),
        (
            "namespaceSelector of pods is ignored",
            "selector(written.pods.namespace_selector)",
            "Selector()",
        ),
        (
            "podSelector of pods is ignored",
            "selector(written.pods.pod_selector)",
            "Selector()",
        ),
        (
            "a subject is everybody",
            "subject=_pods(spec.subject),",
            "subject=pods_in(Selector(), Selector()),",
        ),
        ("Deny only leaves the tier", '"Deny": "Deny"', '"Deny": "Pass"'),
        (
            "a peer's namespaces are all",
            "pods_in(selector(written.namespaces), Selector())",
            "pods_in(Selector(), Selector())",
        ),
        ("networks match nothing", "yield block(cidr, ())", "yield block(cidr, (cidr,))"),
        ("SCTP is read as UDP", '_numbered("SCTP", ', '_numbered("UDP", '),
    ),
    *_in(
        "traffic_policies",
        ("a TrafficPolicy isolates nobody", "=frozenset(spec.isolates),", "=frozenset(),"),
        (
            "a TrafficPolicy isolates always",
            "=frozenset(spec.isolates),",
            '=frozenset({"Ingress", "Egress"}),',
        ),
        ("audit mode is enforced", 'audit=spec.mode == "Audit",', "audit=False,"),
        ("Deny allows", "        written.action,\n", '        "Allow",\n'),
        (
            "any among the peers is overlooked",
            "if not any(peer.any for peer in written.peers):",
            "if True:",
        ),
        ("ICMP and ICMPv6 are swapped", 'family == "IPv4"', 'family == "IPv6"'),
        ("the code of an ICMP message is ignored", "icmp_code=written.icmp.code,", ""),
        (
            "a range of a TrafficPolicy is its first port",
            "written.range.start, written.range.end)",
            "written.range.start)",
        ),
        (
            "except of a TrafficPolicy is ignored",
            "block(item.cidr, item.except_)",
            "block(item.cidr, ())",
        ),
        (
            "only the first entity counts",
            "for entity in written.entities or ():",
            "for entity in (written.entities or ())[:1]:",
        ),
        (
            "the subject of a TrafficPolicy is the namespace",
            "_selector(spec.subject.pod_selector)",
            "Selector()",
        ),
        (
            "selectors of namespaces and pods are swapped",
            "_selector(written.pods.namespace_selector), _selector(written.pods.pod_selector)",
            "_selector(written.pods.pod_selector), _selector(written.pods.namespace_selector)",
        ),
        ("the type of an ICMP message is ignored", "icmp_type=written.icmp.type,", ""),
        (
            "the name of a port is ignored",
            "written.port if written.port is not None else written.port_name",
            "written.port",
        ),
        ("log is ignored", "        written.log,\n", "        False,\n"),
    ),
    *_in(
        "compile.precedence",
        (
            "a deny does not outrank an allow",
            'DEVELOPER_PRECEDENCE + (action == "Deny")',
            "DEVELOPER_PRECEDENCE",
        ),
        (
            "an allow outranks a deny",
            'DEVELOPER_PRECEDENCE + (action == "Deny")',
            'DEVELOPER_PRECEDENCE + (action == "Allow")',
        ),
        (
            "Baseline counts where a developer isolates",
            "if any(isolating(policy, direction) for policy in found):",
            "if False:",
        ),
        (
            "Admin is silent where a developer isolates",
            'if policy.tier != "Baseline"]',
            'if policy.tier != "Admin"]',
        ),
        (
            "policies of a tier are ordered by name alone",
            "key=lambda policy: (policy.priority, policy.name)):",
            "key=lambda policy: policy.name):",
        ),
        ("rules of a tier have no order", "below[policy.tier] -= 1", "pass"),
        (
            "a policy in audit mode isolates",
            "direction in policy.isolates and not policy.audit",
            "direction in policy.isolates",
        ),
        (
            "of equal priorities the last name comes first",
            "key=lambda policy: (policy.priority, policy.name)):",
            "key=lambda policy: (policy.priority, [-ord(c) for c in policy.name.name])):",
        ),
    ),
    *_in(
        "compile.rules",
        (
            "who would isolate in audit mode is forgotten",
            "if policy.audit and direction in policy.isolates",
            "if False",
        ),
        (
            "rules in audit mode are enforced",
            "        audit=key.audit,\n",
            "        audit=False,\n",
        ),
        (
            "a range ends one port early",
            "end_port=match.end_port if",
            "end_port=match.end_port - 1 if",
        ),
        (
            "ICMP type 0 is every type",
            "match.icmp_type if match.icmp_type >= 0",
            "match.icmp_type if match.icmp_type > 0",
        ),
        ("other nodes are this node", '"entity", peer.entity, ()', '"entity", "host", ()'),
        (
            "a narrower allow outranks a wider deny",
            "key = _Key(match, precedence,",
            'key = _Key(match, precedence + 2 * ("/3" in match.peer and policy.tier[0] == "D"),',
        ),
        (
            "the ports of a rule's last peer count for all",
            "for port in rule.ports:\n            if not",
            "for port in rule.ports[:1]:\n            if not",
        ),
        (
            "a range starts one port late",
            "port=port.port or 0,\n        end_port",
            "port=(port.port or 0) + ((port.end_port or 0) > (port.port or 0)),\n        end_port",
        ),
        (
            "a named port has the number of another protocol's",
            "number = ports.get((protocol, port.port))",
            "number = next((n for (_, name), n in ports.items() if name == port.port), None)",
        ),
        (
            "the API's servers are other nodes",
            'return "entity", peer.entity, ()',
            'return "entity", peer.entity.replace("kube-apiserver", "remote-node"), ()',
        ),
        ("every rule logs where one does", "log=(number, index) in logged", "log=bool(logged)"),
    ),
    *_in(
        "compile.peers",
        (
            "a pod's label passes for its namespace's",
            "peer.namespaces.matches(self._namespaces[key.namespace])",
            "peer.namespaces.matches({**self._namespaces[key.namespace], **self._labels[key]})",
        ),
        (
            "hosts outside are pods",
            "        if key.cidrs:  # hosts outside are no pods, whatever a selector says\n"
            "            return False\n",
            "        if key.cidrs:\n            return True\n",
        ),
        (
            "named hosts outside are not of the world",
            'bool(key.cidrs) == (peer.entity == "world")',
            'not key.cidrs and peer.entity == "cluster"',
        ),
        (
            "nodes are not of the cluster",
            "Reserved.KUBE_APISERVER, Reserved.REMOTE_NODE)",
            "Reserved.KUBE_APISERVER)",
        ),
        ("one identity is every one outside", "made.key == key", "bool(key.cidrs)"),
        (
            "a node has one address",
            "for text in node.addresses}",
            "for text in node.addresses[:1]}",
        ),
    ),
    *_in(
        "objects",
        (
            "In matches where the label is absent",
            "return value is not None and value in self.values",
            "return value is None or value in self.values",
        ),
        (
            "NotIn wants the label",
            "return value is None or value not in self.values",
            "return value is not None and value not in self.values",
        ),
        (
            "DoesNotExist is Exists",
            "                return value is None\n",
            "                return value is not None\n",
        ),
        (
            "one requirement of a selector is enough",
            "return all(requirement.matches(labels) for requirement in self.requirements)",
            "return not self.requirements or any(r.matches(labels) for r in self.requirements)",
        ),
        (
            "a policy that isolates nobody has no say",
            "direction in self.isolates or bool(self.rules(direction))",
            "direction in self.isolates",
        ),
        (
            "the directions are swapped",
            'self.ingress if direction == "Ingress"',
            'self.ingress if direction == "Egress"',
        ),
    ),
    *_in(
        "compile.compiler",
        (
            "a policy of the cluster looks at every namespace",
            "if within.matches(labels):",
            "if True:",
        ),
        (
            "a subject's labels are ignored",
            "policy.subject.pods.matches(labels)",
            "True",
        ),
    ),
]


def seeded(mutant: Mutant, check: Callable[[], bool]) -> bool:
    """Whether `check`, run in a child with the fault, returns True or fails."""
    source = Path(str(importlib.import_module(mutant.module).__file__)).read_text()
    if source.count(mutant.old) != 1:
        raise LookupError(f"{mutant.words}: {source.count(mutant.old)} places in {mutant.module}")
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, 1):
            raise RuntimeError(f"{mutant.words}: the child ended with {code}")
        return code == 0
    try:
        _take(sys.modules[mutant.module], source.replace(mutant.old, mutant.new))
    except BaseException:
        traceback.print_exc()
        os._exit(2)
    try:
        os._exit(0 if check() else 1)
    except BaseException:  # a compiler that fails is one that was caught
        os._exit(0)


def _take(module: ModuleType, source: str) -> None:
    """Run the module's source anew, and give everybody who has something of it the new one."""
    before = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    exec(compile(source, str(module.__file__), "exec"), vars(module))  # noqa: S102
    new = {id(value): vars(module)[name] for name, value in before.items() if name in vars(module)}
    for name, other in list(sys.modules.items()):
        if not name.startswith((ROOT, "support")) or other is module:
            continue
        for key, value in list(vars(other).items()):
            if id(value) in new and new[id(value)] is not value:
                setattr(other, key, new[id(value)])
