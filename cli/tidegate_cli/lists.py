"""The list commands: the kernel's maps as people are used to seeing them.

Formats as Cilium's tools print the same thing; docs/cli.md. A node of a cluster answers with what
the same command prints as JSON there; only names that no node knows are added here. May not live
here: reading maps (`live`), verdicts.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from msgspec import UNSET
from tidegate_api.state import (
    Identity,
    NodeState,
    Reserved,
    RuleSet,
    StateObject,
    identity_labels,
)

from tidegate_cli import live, lookup, reasons, render
from tidegate_cli.errors import CliError
from tidegate_cli.judgement import audited_of, policy_text, rule_ref, tier_of
from tidegate_cli.live import BEGAN_A, Flow, NodeView
from tidegate_cli.model import Model
from tidegate_cli.objects import OwnPod, RunObjects
from tidegate_cli.target import Place, choose

PROTOCOL_NAMES = {number: name for name, number in lookup.PROTOCOLS.items()}
RELEASED_LABEL = "tidegate.dev/released"
NAMESPACE_LABEL = "k8s:io.kubernetes.pod.namespace"
ACTIONS = {lookup.DENY: "Deny", lookup.ALLOW: "Allow", lookup.PASS: "Pass"}
ENTITY_BITS = {
    lookup.ENTITY_OWN: "this node",
    lookup.ENTITY_NODE: "node",
    lookup.ENTITY_API: "kube-apiserver",
}
SPECIAL = {lookup.NONE: "default", lookup.HOST: "host", lookup.SELF: "self"}
FLAGS = {
    0x02: "Replied",
    0x04: "FinOrig",
    0x08: "FinReply",
    0x10: "Rst",
    0x20: "Nat",
    0x40: "Service",
    0x80: "Hairpin",
}
IPCACHE_FLAGS = {
    0x01000000: "local",
    0x02000000: "frontend",
    0x04000000: "peer",
    0x08000000: "node",
    0x10000000: "own",
}


# ---- who is who --------------------------------------------------------------------


def identity_words(objects: Iterable[StateObject]) -> dict[int, list[str]]:
    """Number → its labels as `source:key[=value]`; reserved ones too."""
    found = {int(n): [f"reserved:{n.name.lower().replace('_', '-')}"] for n in Reserved}
    for item in objects:
        if isinstance(item, Identity) and item.metadata.name.isdigit():
            found[int(item.metadata.name)] = _words(item)
    return found


def _words(item: Identity) -> list[str]:
    spec = item.spec
    if spec.cidrs is not UNSET:
        return [f"cidr:{cidr}" for cidr in spec.cidrs]
    words = [f"{NAMESPACE_LABEL}={spec.namespace}"] if spec.namespace else []
    return words + _k8s(identity_labels(spec))


def own_words(pods: Iterable[OwnPod]) -> dict[str, list[str]]:
    """Address → the labels of the pod that has it, as `identity_words` has them: its own, whatever
    of them its identity has."""
    return {
        address: [f"{NAMESPACE_LABEL}={pod.namespace}", *_k8s(pod.labels)]
        for pod in pods
        if not pod.host_network
        for address in pod.addresses
    }


def _k8s(labels: Mapping[str, str]) -> list[str]:
    return [f"k8s:{key}={value}" if value else f"k8s:{key}" for key, value in labels.items()]


def identity_list(args: argparse.Namespace) -> int:
    place = choose(args)
    objects, sets = place.all(), place.label_sets()
    states = [item for item in objects if isinstance(item, NodeState)]
    if args.node is not None:
        place.nodes(args.node)  # or it would be a list of identities that nobody has
        states = [item for item in states if item.metadata.name == args.node]
    used = Counter(endpoint.identity for state in states for endpoint in state.spec.endpoints)
    rows: list[dict[str, Any]] = []
    for item in objects:
        if not (isinstance(item, Identity) and item.metadata.name.isdigit()):
            continue
        number = int(item.metadata.name)
        rows.append(
            {
                "id": number,
                "namespace": item.spec.namespace or "",
                "labels": identity_labels(item.spec),
                "cidrs": item.spec.cidrs or [],
                "endpoints": used[number],
                "labelSets": sets.get(number, 0),
                "released": RELEASED_LABEL in (item.metadata.labels or {}),
            }
        )
    rows.sort(key=lambda row: (row["namespace"], row["id"]))
    if args.output != "table":
        render.structured(rows, args.output)
        return 0
    header = ("ID", "NAMESPACE", "LABELS", "ENDPOINTS", "LABEL SETS", "STATE")
    cells = [
        (
            row["id"],
            row["namespace"] or "-",
            ",".join(row["cidrs"]) or render.labels(row["labels"]) or "-",
            row["endpoints"],
            row["labelSets"] or "-",
            "released" if row["released"] else "live",
        )
        for row in rows
    ]
    sys.stdout.write(render.table(header, cells))
    if sets:
        print(f"\n{render.numbers(len(sets), sum(sets.values()))}")
    return 0


# ---- one node after the other ---------------------------------------------------------


def gather(
    place: Place,
    args: argparse.Namespace,
    read: Callable[[NodeView], Any],
    *words: str,
    only: str | None = None,
) -> tuple[dict[str, Any], int]:
    """(what `read` gives, by node; exit code); of the node --node, else `only`, else all. In a
    cluster each node says it itself, being asked the same command and `words`; one that cannot
    be asked is told of, and the code is 2."""
    if isinstance(place, RunObjects):
        return {view.name: read(view) for view in live.views(place, args.node or only)}, 0
    asked = place.ask(
        place.nodes(args.node or only),
        lambda _node: [args.command, args.verb, *words],
    )
    for text in asked.failed.values():
        print(f"tidegate: {text}", file=sys.stderr)
    # A loader's run directory is its node's alone.
    return {node: answer[node] for node, answer in asked.answers.items()}, 2 if asked.failed else 0


def by_node(
    args: argparse.Namespace,
    found: dict[str, Any],
    header: Sequence[str],
    cells: Callable[[Any], Iterable[Sequence[object]]],
) -> None:
    """Structured output: what was found, by node name; with --node that node's alone. Table:
    `cells` of it, with a first column NODE unless --node is given."""
    if args.output != "table":
        _structured(args, found)
    elif args.node is not None:
        sys.stdout.write(render.table(header, cells(found[args.node]) if found else ()))
    else:
        rows = [(node, *row) for node, value in found.items() for row in cells(value)]
        sys.stdout.write(render.table(("NODE", *header), rows))


def _structured(args: argparse.Namespace, found: dict[str, Any]) -> None:
    render.structured(found.get(args.node) if args.node is not None else found, args.output)


def endpoint_list(args: argparse.Namespace) -> int:
    def read(view: NodeView) -> list[dict[str, Any]]:
        return [
            {
                "id": e.row.id,
                "pod": view.pod_name(e.row.id),
                "labels": {},
                "identity": e.row.identity,
                "ingressEnforcement": bool(e.row.ingress.flags & lookup.ISOLATED),
                "egressEnforcement": bool(e.row.egress.flags & lookup.ISOLATED),
                "ifindex": e.row.ifindex,
                "addresses": e.addresses,
                "mac": e.row.pod_mac.hex(":").upper(),
                "nodemac": e.row.host_mac.hex(":").upper(),
            }
            for e in view.maps.endpoints()
        ]

    header = (
        "ENDPOINT",
        "POD",
        "IDENTITY",
        "INGRESS ENFORCEMENT",
        "EGRESS ENFORCEMENT",
        "IFINDEX",
        "IPV4",
        "IPV6",
        "MAC",
        "LABELS",
    )

    def cells(rows: Any) -> Iterable[Sequence[object]]:
        for row in rows:
            four = next((a for a in row["addresses"] if ":" not in a), "-")
            six = next((a for a in row["addresses"] if ":" in a), "-")
            enforced = [
                "Enabled" if row[f"{d}Enforcement"] else "Disabled" for d in ("ingress", "egress")
            ]
            identity, pod = row["identity"], row["pod"] or "-"
            labels = render.labels(row["labels"]) or "-"
            yield row["id"], pod, identity, *enforced, row["ifindex"], four, six, row["mac"], labels

    place = choose(args)
    found, code = gather(place, args, read)
    own = {pod.key: dict(sorted(pod.labels.items())) for pod in place.pods()}
    for row in (row for rows in found.values() for row in rows):
        row["labels"] = own.get(row["pod"], {})
    by_node(args, found, header, cells)
    return code


def ipcache_list(args: argparse.Namespace) -> int:
    place = choose(args)
    words, own = identity_words(place.all()), own_words(place.pods())

    def read(view: NodeView) -> list[dict[str, Any]]:
        return [
            {
                "cidr": prefix,
                "identity": identity,
                "labels": [],
                "flags": [name for bit, name in IPCACHE_FLAGS.items() if flags & bit],
                "proof": "ok" if good else "wrong",
            }
            for prefix, identity, flags, good in view.maps.ipcache()
        ]

    def cells(rows: Any) -> Iterable[Sequence[object]]:
        for row in rows:
            flags = [*row["flags"], *(["WRONG-PROOF"] if row["proof"] != "ok" else [])]
            labels = ",".join(row["labels"]) or "-"
            yield row["cidr"], row["identity"], ",".join(flags) or "-", labels

    found, code = gather(place, args, read)
    for row in (row for rows in found.values() for row in rows):
        address = row["cidr"].removesuffix("/32").removesuffix("/128")
        row["labels"] = own.get(address) or words.get(row["identity"], [])
    by_node(args, found, ("IP PREFIX/ADDRESS", "IDENTITY", "FLAGS", "LABELS"), cells)
    return code


def metrics_list(args: argparse.Namespace) -> int:
    def read(view: NodeView) -> list[dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for (reason, direction), (packets, size) in sorted(view.maps.metrics().items()):
            entry = found.setdefault(
                reason, {"reason": reason, "description": reasons.text(reason), "values": {}}
            )
            name = reasons.DIRECTIONS[direction].lower()
            entry["values"][name] = {"packets": packets, "bytes": size}
        return list(found.values())

    def cells(rows: Any) -> Iterable[Sequence[object]]:
        for row in rows:
            for direction, count in row["values"].items():
                yield row["description"], direction.upper(), count["packets"], count["bytes"]

    found, code = gather(choose(args), args, read)
    by_node(args, found, ("REASON", "DIRECTION", "PACKETS", "BYTES"), cells)
    return code


def values_of(rows: Any) -> Iterable[Sequence[object]]:
    """Rows whose cells are their values."""
    return (tuple(row.values()) for row in rows)


def protocol_name(number: int) -> str:
    return PROTOCOL_NAMES.get(number, str(number))


# ---- flows ----------------------------------------------------------------------------


def ct_list(args: argparse.Namespace) -> int:
    def read(view: NodeView) -> list[dict[str, Any]]:
        flows = sorted(view.maps.flows(), key=lambda f: (f.protocol, f.source, f.destination))
        return [flow_object(flow, view) for flow in flows]

    found, code = gather(choose(args), args, read)
    if args.output != "table":
        _structured(args, found)
        return code
    for node, flows in found.items():
        prefix = "" if args.node is not None else f"{node}: "
        sys.stdout.writelines(f"{prefix}{flow_line(flow)}\n" for flow in flows)
    return code


def flow_line(flow: dict[str, Any]) -> str:
    """One line of a `flow_object`; `expires` in seconds from now, `expired` where the programs
    take it as absent."""
    parts = [
        flow["protocol"],
        flow["direction"],
        f"{flow['source']} -> {flow['destination']}",
        "expired" if flow["expired"] else f"expires={flow['leftSeconds']:.0f}s",
        f"LastSeen={flow['ageSeconds']:.0f}s",
        f"Packets={flow['packets']} Bytes={flow['bytes']}",
        f"RxPackets={flow['replyPackets']} RxBytes={flow['replyBytes']}",
        f"Flags={flow['flagBits']:#06x} [ {' '.join([*flow['flags'], ''])}]",
    ]
    if "nat" in flow:
        parts.append(f"NAT={flow['nat']} BackendID={flow['backend']}")
    for name in ("Src", "Dst"):
        end, rule = name.lower(), flow[f"{name.lower()}Rule"]
        if flow[f"{end}Endpoint"]:
            pod = flow[f"{end}Pod"] or flow[f"{end}Endpoint"]
            parts.append(f"{name}={pod} {name}Rule={SPECIAL.get(rule, rule)}")
    return " ".join([*parts, f"({flow['kind']})"])


def flow_object(flow: Flow, view: NodeView) -> dict[str, Any]:
    found: dict[str, Any] = {
        "protocol": protocol_name(flow.protocol),
        "direction": "SVC" if flow.flags & live.SERVICE else "OUT" if flow.src_endpoint else "IN",
        "source": render.host_port(*flow.source),
        "destination": render.host_port(*flow.destination),
        "kind": flow.kind,
        "flags": [word for bit, word in FLAGS.items() if flow.flags & bit],
        "flagBits": flow.flags & ~BEGAN_A,
        "ageSeconds": round(flow.age, 1),
        "leftSeconds": round(flow.left, 1),
        "expired": flow.left < 0,
        "srcEndpoint": flow.src_endpoint,
        "dstEndpoint": flow.dst_endpoint,
        "srcPod": view.pod_name(flow.src_endpoint),
        "dstPod": view.pod_name(flow.dst_endpoint),
        "srcRule": flow.src_rule,
        "dstRule": flow.dst_rule,
        "packets": flow.packets,
        "bytes": flow.bytes,
        "replyPackets": flow.reply_packets,
        "replyBytes": flow.reply_bytes,
        "epoch": flow.epoch,
    }
    if flow.nat is not None:
        found |= {"nat": render.host_port(*flow.nat), "backend": flow.backend}
    return found


# ---- policy ------------------------------------------------------------------------------

POLICY_HEADER = (
    "POLICY",
    "DIRECTION",
    "LABELS (source:key[=value])",
    "PORT/PROTO",
    "PROXY PORT",
    "AUTH TYPE",
    "BYTES",
    "PACKETS",
    "PREFIX",
    "TIER",
    "PRECEDENCE",
    "RULE",
)


def policy_get(args: argparse.Namespace) -> int:
    place = choose(args)
    objects = place.all()
    words = identity_words(objects)
    rule_sets = {i.metadata.name: i for i in objects if isinstance(i, RuleSet)}
    pod = Model.from_objects(objects).pod(args.pod) if args.pod else None

    def read(view: NodeView) -> list[dict[str, Any]]:
        return [
            _endpoint_policy(view, endpoint, words, rule_sets)
            for endpoint in view.maps.endpoints()
            if pod is None or view.pod_name(endpoint.row.id) == pod.key
        ]

    only = pod.node if pod is not None else None
    found, code = gather(place, args, read, *([pod.key] if pod else ()), only=only)
    for rule in (r for entries in found.values() for e in entries for r in e["rules"]):
        if rule["peer"].isdigit():  # an identity: its node need not know its labels
            rule["labels"] = _labels_of(int(rule["peer"]), words)
    if pod is not None and not code and not any(found.values()):
        raise CliError(f"pod {pod.key} is in no node table", "`tidegate status` says why")
    if args.output != "table":
        _structured(args, found)
        return code
    blocks = [_policy_block(e, args.numeric) for entries in found.values() for e in entries]
    sys.stdout.write("\n".join(blocks))
    return code


def _labels_of(identity: int, words: dict[int, list[str]]) -> list[str]:
    return words.get(identity, [f"unknown:{identity}"])


def _policy_block(entry: dict[str, Any], numeric: bool) -> str:
    header = list(POLICY_HEADER)
    if numeric:
        header[2] = "IDENTITY"
    cells = [
        (
            f"Audit {rule['policy']}" if rule["audit"] else rule["policy"],
            rule["direction"],
            rule["peer"] if numeric else ",".join(rule["labels"]),
            rule["port"],
            "NONE",
            "disabled",
            "-",
            "-",
            rule["prefix"],
            rule["tier"] or "-",
            rule["precedence"] or "-",
            rule["rule"],
        )
        for rule in entry["rules"]
    ]
    head = f"Endpoint ID: {entry['id']} ({entry['pod'] or 'unknown pod'})\n"
    paths = "".join(f"Path: {path}\n" for path in entry["paths"])
    return f"{head}{paths}\n{render.table(header, cells)}"


def _endpoint_policy(
    view: NodeView,
    endpoint: live.Endpoint,
    words: dict[int, list[str]],
    rule_sets: dict[str, RuleSet],
) -> dict[str, Any]:
    rules: list[dict[str, Any]] = []
    paths = []
    for direction in ("Ingress", "Egress"):
        policy = getattr(endpoint.row, direction.lower())
        if not policy.flags & lookup.HAS_RULES:
            rules.append(_rule(direction, "Allow", "ANY", ["ANY"], "no policy selects the pod"))
            continue
        paths.append(str(view.maps.pin_dir / "rule_sets" / str(policy.rule_set)))
        rule_set = rule_sets.get(view.rule_set_name(policy.rule_set))
        classes = view.maps.classes(policy)
        for key, value in view.maps.rules(policy):
            peer, labels = _peer(key.peer, words, classes)
            action = ACTIONS[value.action]
            rule = _rule(direction, action, peer, labels, rule_text(rule_set, value.rule))
            rule |= {"port": _port(key), "prefix": key.prefix & 31}
            rule |= {"precedence": value.precedence, "tier": tier_of(value.precedence)}
            rule |= {"audit": key.prefix >> 5 == lookup.AUDIT, "log": bool(value.flags)}
            rules.append(rule | {"ruleIndex": value.rule})
        rules += _defaults(direction, policy.flags, rule_set)
    return {
        "id": endpoint.row.id,
        "pod": view.pod_name(endpoint.row.id),
        "paths": paths,
        "rules": rules,
    }


def _defaults(direction: str, flags: int, rule_set: RuleSet | None) -> list[dict[str, Any]]:
    """What becomes of a flow that no rule decides; then what audit says of it."""
    spec = rule_set.spec if rule_set is not None else None
    found = []
    if not flags & lookup.ISOLATED:
        found.append(_rule(direction, "Allow", "ANY", ["ANY"], "no policy isolates the pod"))
    else:
        names = map(policy_text, spec.policies) if spec is not None else ["unknown"]
        found.append(_rule(direction, "Deny", "ANY", ["ANY"], f"default: {', '.join(names)}"))
    if flags & lookup.AUDITED:
        names = map(policy_text, audited_of(spec)) if spec is not None else ["unknown"]
        rule = _rule(direction, "Deny", "ANY", ["ANY"], f"default: {', '.join(names)}")
        found.append(rule | {"audit": True})
    return found


def _rule(direction: str, action: str, peer: str, labels: list[str], rule: str) -> dict[str, Any]:
    return {
        "policy": action,
        "direction": direction,
        "peer": peer,
        "labels": labels,
        "port": "ANY",
        "prefix": 0,
        "tier": "",
        "precedence": 0,
        "audit": False,
        "log": False,
        "rule": rule,
    }


def _peer(
    word: int, words: dict[int, list[str]], classes: list[tuple[str, int]]
) -> tuple[str, list[str]]:
    """(numeric text, labels) of a key's peer word."""
    kind = word & ~lookup.IDENTITY_MASK
    if kind == lookup.WORD_ENTITY:
        bits = word & lookup.IDENTITY_MASK
        text = "+".join(name for bit, name in ENTITY_BITS.items() if bits & bit)
        return text, [f"entity:{text}"]
    if kind == lookup.WORD_ANY:
        return "ANY", ["ANY"]
    if kind == lookup.WORD_CLASS:
        number = word & lookup.IDENTITY_MASK
        prefixes = [f"cidr:{prefix}" for prefix, held in classes if held == number]
        return f"class {number}", prefixes or [f"class {number}"]
    return str(word), _labels_of(word, words)


def _port(key: Any) -> str:
    """ "8080/TCP"; a partial port is 0xPORT/BITS/PROTOCOL. Of ICMP type.code/PROTOCOL."""
    bits = key.prefix & 31
    if not bits:
        return "ANY"
    protocol = protocol_name(key.protocol)
    if bits == 8:
        return f"ANY/{protocol}"
    if protocol in ("ICMP", "ICMPv6"):
        code = "*" if bits == 16 else key.port & 0xFF
        return f"{key.port >> 8}.{code}/{protocol}"
    if bits == 24:
        return f"{key.port}/{protocol}"
    return f"{key.port:#x}/{bits - 8}/{protocol}"


def rule_text(rule_set: RuleSet | None, number: int) -> str:
    """The policy and rule behind a rule number of a rule set."""
    if rule_set is None or number >= len(rule_set.spec.rules):
        return f"rule {number} of an unknown rule set"
    spec = rule_set.spec
    return str(rule_ref(spec, number))
