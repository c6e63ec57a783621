"""Arguments of every sub-command but `up`, `down`, `exec` and `matrix`.

argparse only: `--help` must not wait for what the command itself imports. A command's function is
looked up when it is run.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

from tidegate_cli.arguments import add_cluster, add_identities, add_local, command, node_count
from tidegate_cli.observe import arguments as observe

MAX_WAIT = 86400
"""Seconds."""

Runner = Callable[[argparse.Namespace], int]


def add_parser(subparsers: Any) -> None:
    """Each parser sets `run`: a function from the parsed arguments to the exit code."""
    _status(subparsers)
    _explain(subparsers)
    _answer(subparsers)
    _probe(subparsers)
    _lists(subparsers)
    _trace(subparsers)
    _compile(subparsers)
    _doctor(subparsers)
    observe.add_parser(subparsers, _later("observe.command", "observe"))


def _later(module: str, name: str) -> Runner:
    def run(args: argparse.Namespace) -> int:
        function: Runner = getattr(importlib.import_module(f"tidegate_cli.{module}"), name)
        return function(args)

    return run


def _command(
    subparsers: Any, name: str, run: Runner, text: str, more: str = ""
) -> argparse.ArgumentParser:
    about = f"{text[0].upper()}{text[1:]}. {more}"
    parser = command(subparsers, name, text, description=about)
    add_cluster(parser)
    add_local(parser)
    parser.set_defaults(run=run)
    return parser


def _status(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "status",
        _later("status", "status"),
        "what each node enforces, and if that is as it should",
        "Exit code 1: some node does not enforce its desired state.",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="memory of each map")


def _explain(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "explain",
        _later("explain", "explain"),
        "why a packet passes or not: three answers that must agree",
        "Asks the model, the kernel's maps and a dry-run copy of the program about a packet that "
        "would open a flow. Exit code 0: allowed, to every backend; 1: denied; 2: the answers "
        "disagree, or could not be had. Changes nothing.",
    )
    source = "namespace/name, or the name or beginning that only one pod has"
    parser.add_argument("--from", dest="source", metavar="POD", required=True, help=source)
    target = "a pod, a service (pod/NAMESPACE/NAME or svc/NAMESPACE/NAME to say which), an address"
    parser.add_argument("--to", dest="target", metavar="TARGET", required=True, help=target)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--port", metavar="N[/PROTO]", help="TCP (default), UDP or SCTP")
    what.add_argument(
        "--icmp",
        nargs="?",
        const="",
        metavar="TYPE[/CODE]",
        help="ICMP of this type; without a type an echo request",
    )
    parser.add_argument("--family", type=int, choices=(4, 6), default=0, help="IPv4 or IPv6")


def _answer(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "answer",
        _later("answer", "answer"),
        "what explain asks of a node; JSON in, JSON out",
        "Used by `tidegate explain` inside the loader's pod.",
    )
    parser.add_argument("questions", metavar="JSON", help="list of questions")


def _probe(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "probe",
        _later("cluster.probe", "probe"),
        "what matrix asks of a node; prints JSON",
        "Used by `tidegate matrix` in its pod on the node.",
    )
    parser.add_argument("task", metavar="TASK", help="who connects to whom")


def _lists(subparsers: Any) -> None:
    found = {}
    for name, verb, text, function in (
        ("identity", "list", "the ledger of identity numbers", "identity_list"),
        ("endpoint", "list", "pods in each node's table in force", "endpoint_list"),
        ("policy", "get", "the rules in force at a pod", "policy_get"),
        ("lb", "list", "services: frontends and their backends", "lb_list"),
        ("ct", "list", "tracked flows: established and half-open", "ct_list"),
        ("ipcache", "list", "addresses and networks with their identities", "ipcache_list"),
        ("metrics", "list", "packets and bytes by reason and direction", "metrics_list"),
    ):
        group = subparsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        verbs = group.add_subparsers(dest="verb", metavar="COMMAND", required=True)
        if name == "policy":
            _policy_wait(verbs)
        module = "balancer" if name == "lb" else "lists"
        found[name] = _command(verbs, verb, _later(module, function), text)
    policy, lb = found["policy"], found["lb"]
    policy.add_argument("pod", nargs="?", help="namespace/name; default: every pod")
    policy.add_argument("-n", "--numeric", action="store_true", help="identity numbers")
    only = lb.add_mutually_exclusive_group()
    only.add_argument("--frontends", action="store_true", help="frontends only")
    only.add_argument("--backends", action="store_true", help="backends only")
    only.add_argument("--revnat", action="store_true", help="numbers and the addresses they have")
    only.add_argument("--maglev", action="store_true", help="rings: how many places each has")
    only.add_argument(
        "--stats", action="store_true", help="how often each was asked, and nobody was there"
    )
    only.add_argument("--source-ranges", action="store_true", help="who may use what from outside")


def _policy_wait(verbs: Any) -> None:
    parser = _command(
        verbs,
        "wait",
        _later("policy_wait", "policy_wait"),
        "until policies are in force as they are now",
        "Waits until the status of each policy tells of the object as it is in the API server, and "
        "says that it is in force on every node that counts; so it may follow `kubectl apply` at "
        "once. Of what `tidegate up` follows: until every node has in force what the folder holds. "
        "Progress goes to stderr. Exit code 0: in force; 1: not in time, or never, as the policy "
        "cannot be enforced as it is written; 2: there is no such policy, or nobody to ask.",
    )
    names = "KIND/NAME or KIND/NAMESPACE/NAME, as networkpolicy/web; netpol, tgp, cnp for short"
    parser.add_argument("policies", nargs="*", metavar="POLICY", help=names)
    files = "the policies in these manifests: a file, a folder, or -"
    parser.add_argument("-f", "--filename", action="append", metavar="FILE", help=files)
    space = "of policies that do not say theirs (default: default)"
    parser.add_argument("-n", "--namespace", metavar="NAME", help=space)
    parser.add_argument(
        "--timeout",
        type=_duration,
        default=60.0,
        metavar="TIME",
        help="how long to wait, in seconds or as 90s, 2m, 1h; 0: look once (default: 60)",
    )


def _duration(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    if not number.isdecimal() or int(number) * unit > MAX_WAIT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 30, 90s or 2m")
    return float(int(number) * unit)


def _trace(subparsers: Any) -> None:
    text = "tell of packets one by one, for a while"
    group = subparsers.add_parser("trace", help=text, description=f"{text[0].upper()}{text[1:]}.")
    verbs = group.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    more = "See them with `tidegate observe --follow --type trace`."
    start = _command(
        verbs, "start", _later("trace", "start"), "begin, in place of what is traced now", more
    )
    add = start.add_argument
    add("--pod", metavar="NS/NAME", help="what this pod sends or gets")
    add("--ip", metavar="IP", help="an end has this address")
    add("--identity", type=int, metavar="N", help="an end has this identity, by its address")
    add("--port", type=int, metavar="PORT", help="an end has this port")
    add("--protocol", metavar="WORD", help="tcp, udp, icmp, icmpv6, sctp")
    add(
        "--for",
        dest="seconds",
        type=int,
        default=60,
        metavar="SECONDS",
        help="for how long, at most 3600 (default: 60)",
    )
    _command(verbs, "stop", _later("trace", "stop"), "stop at once")
    _command(verbs, "list", _later("trace", "show"), "what is traced on each node")


def _compile(subparsers: Any) -> None:
    text = "print the objects of a folder; no kernel, no root"
    about = (
        "Print Identity, RuleSet, StateSlice and NodeState objects of the manifests in DIR. What "
        "is wrong with them goes to stderr. Exit code 2: some document is in error; the objects "
        "of the others are printed all the same."
    )
    parser = subparsers.add_parser("compile", help=text, description=about)
    parser.add_argument("folder", metavar="DIR", help="folder of manifests")
    parser.add_argument("-o", "--output", choices=("yaml", "json"), default="yaml", help="format")
    parser.add_argument(
        "--nodes", type=node_count, metavar="N", help="how many nodes (default: as up)"
    )
    add_identities(parser)
    parser.set_defaults(run=_later("compile_cmd", "compile_folder"))


def _doctor(subparsers: Any) -> None:
    _command(
        subparsers,
        "doctor",
        _later("doctor", "doctor"),
        "what this machine has and lacks, with the remedy",
        "Exit code 1: something that is needed is missing.",
    )
