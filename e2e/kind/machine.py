"""What Docker and the kubelets in its containers change on the machine, and putting it back.

A `State` is taken before the first of them starts and lies on disk until everything is undone, so
that a run which died is undone by the next."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from kind.run import attempt, run

PROC_SYS = Path("/proc/sys")
# Set by dockerd (forwarding), by kubelets (kernel, vm), by systemd in the nodes (fs, kernel), or by
# ourselves (inotify). Others keep what somebody may have set in the meantime.
CHANGED_SETTINGS = re.compile(
    r"^(fs/(file-max|nr_open|protected_\w+|inotify/\w+)|user/max_inotify_\w+"
    r"|kernel/(panic|panic_on_oops|sysrq|core_\w+|pid_max|keys/\w+)"
    r"|vm/(overcommit_memory|panic_on_oom|max_map_count)"
    r"|net/ipv4/ip_forward|net/ipv[46]/conf/[^/]+/\w+)$"
)
# Counters and clocks: no setting of anybody's.
VOLATILE = re.compile(
    r"^(kernel/random/|kernel/ns_last_pid|kernel/pty/nr|kernel/perf_event_max_sample_rate"
    r"|kernel/perf_cpu_time_max_percent"
    r"|fs/(dentry-state|file-nr|inode-nr|inode-state|aio-nr|quota/)|vm/stat_refresh"
    r"|net/netfilter/nf_conntrack_count)"
)
BRIDGE = r"(docker0|br-[0-9a-f]{12})"
# dockerd's chains, whatever names its bridges, and the hairpin of a published port.
DOCKER_RULE = re.compile(rf"DOCKER|\b{BRIDGE}\b|-s (\S+)/32 -d \2/32 .*-j MASQUERADE")
COUNTERS = re.compile(r" *\[[0-9:]+\]")
FIREWALLS = ("iptables", "ip6tables")


@dataclass(frozen=True)
class State:
    """The machine's settings: path below /proc/sys → value; firewall → its rules as saved."""

    boot: str
    settings: dict[str, str]
    rules: dict[str, list[str]]


def observe() -> State:
    return State(
        boot=(PROC_SYS / "kernel/random/boot_id").read_text().strip(),
        settings=dict(_settings()),
        rules={f: _rules(f) for f in FIREWALLS},
    )


def save(path: Path) -> None:
    """Remembers the machine as it is, unless an earlier state of this boot is remembered."""
    if load(path) is None:
        path.write_text(json.dumps(asdict(observe())))


def load(path: Path) -> State | None:
    """The remembered state; None where there is none, or one from before a reboot."""
    try:
        state = State(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    boot = (PROC_SYS / "kernel/random/boot_id").read_text().strip()
    return state if state.boot == boot else None


def restore(before: State) -> None:
    """Undoes what a stopped dockerd and its containers left: bridges, rules, settings, cgroups."""
    for link in re.findall(rf"^\d+: {BRIDGE}:", run("ip", "-o", "link"), re.MULTILINE):
        run("ip", "link", "delete", link)
    for firewall in FIREWALLS:
        wanted = without_docker(_rules(firewall), before.rules[firewall])
        run(f"{firewall}-restore", stdin="\n".join(wanted) + "\n")
    _restore_settings(before.settings)
    for directory in Path("/sys/fs/cgroup").glob("*/docker"):
        _remove_cgroups(directory)


def _restore_settings(before: Mapping[str, str]) -> None:
    # In order of name: `conf/all` sets every interface's value, so it comes before them.
    for name, value in sorted(before.items()):
        path = PROC_SYS / name
        # What cannot be put back is found by `differences`.
        with contextlib.suppress(OSError):
            if CHANGED_SETTINGS.match(name) and path.read_text().strip() != value:
                path.write_text(value)


def differences(before: State, after: State) -> list[str]:
    """What is not as it was, as lines for people. Interfaces that are gone are no difference."""
    found = [
        f"setting {name}: was {value!r}, is {after.settings[name]!r}"
        for name, value in sorted(before.settings.items())
        if after.settings.get(name, value) != value
    ]
    for firewall in FIREWALLS:
        was, now = (meaningful(s.rules[firewall]) for s in (before, after))
        found += [f"{firewall}: gone: {rule}" for rule in was if rule not in now]
        found += [f"{firewall}: left: {rule}" for rule in now if rule not in was]
    return found


def without_docker(now: Iterable[str], before: Iterable[str]) -> list[str]:
    """The saved rules `now` less those of Docker, with the chain policies of `before`.

    What Docker did not make stays, even if it came in the meantime."""
    kept = set(before)
    policies = {
        (table, rule.split()[0]): rule for table, rule in _by_table(before) if rule[0] == ":"
    }
    result = []
    for table, rule in _by_table(now):
        if rule[0] == ":":
            rule = policies.get(
                (table, rule.split()[0]), rule.replace("FORWARD DROP", "FORWARD ACCEPT")
            )
        if rule in kept or not DOCKER_RULE.search(rule):
            result.append(rule)
    return result


def meaningful(rules: Iterable[str]) -> list[str]:
    """Rules with the table before each; without counters, comments, and chains that do nothing."""
    return sorted(
        f"{table} {COUNTERS.sub('', rule)}"
        for table, rule in _by_table(rules)
        if rule[0] in ":-" and not re.match(r":[A-Z]+ ACCEPT", rule)
    )


def _by_table(rules: Iterable[str]) -> Iterator[tuple[str, str]]:
    table = ""
    for rule in rules:
        if rule.startswith("*"):
            table = rule[1:]
        if rule and not rule.startswith("#"):
            yield table, rule


def _rules(firewall: str) -> list[str]:
    saved = attempt(f"{firewall}-save")
    return saved.stdout.splitlines() if saved.returncode == 0 else []


def _settings() -> Iterator[tuple[str, str]]:
    for path in PROC_SYS.rglob("*"):
        name = str(path.relative_to(PROC_SYS))
        if VOLATILE.match(name) or not path.is_file() or not path.stat().st_mode & 0o200:
            continue
        # Some can be written only, some not by us.
        with contextlib.suppress(OSError, UnicodeDecodeError):
            yield name, path.read_text().strip()


def _remove_cgroups(directory: Path) -> None:
    for child in sorted(directory.rglob("*"), reverse=True):
        if child.is_dir():
            with contextlib.suppress(OSError):
                child.rmdir()
    with contextlib.suppress(OSError):
        directory.rmdir()
