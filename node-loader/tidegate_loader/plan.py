"""From what the maps should hold and what they do hold, to the ordered list of changes.

Pure: no kernel, clock or I/O; the time is `Actual.now`. Ids, slots and ranges
are allocated here. The order of the steps is the order of safety, and lives in
`_in_order` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import msgspec

from tidegate_loader import addresses
from tidegate_loader.addresses import ZERO, Prefix
from tidegate_loader.maps import FRONTEND, DesiredEndpoint, DesiredMaps, Part, same_parts
from tidegate_loader.plan_moves import NUMBER, Moves, Stage, plan_moves
from tidegate_loader.plan_services import (
    ACTIVE,
    FREE,
    RANGE_REST_SECONDS,
    REST_SECONDS,
    BackendInForce,
    FrontendInForce,
    Index,
    Resting,
    ServicesPlan,
    changes,
    plan_services,
)
from tidegate_loader.plan_steps import (
    NODE_ADDR,
    NODE_IFINDEX,
    Actual,
    AnyStep,
    BuildNodeTable,
    BumpEpoch,
    CopyRuleSets,
    CreateHalfOpen,
    CreateRuleSet,
    DeleteFrontends,
    DeleteIpcache,
    DeleteMasquerade,
    DeleteNetworks,
    DeleteRanges,
    FreeBackends,
    Limits,
    NodeEntry,
    NodeKey,
    NodeSource,
    Policy,
    PutRuleSets,
    RemoveHalfOpen,
    RemoveRuleSets,
    ReserveIds,
    RuleSetInForce,
    Step,
    SwitchNodeTable,
    TurnRings,
    UpsertFrontends,
    UpsertIpcache,
    UpsertMasquerade,
    UpsertNetworks,
    UpsertRanges,
    WriteBackends,
    WriteNode,
    WriteSlots,
)
from tidegate_loader.rules import Expanded
from tidegate_loader.services import RangeKey

# A plan, from `Actual` to its steps, as those know it who make one or carry it out.
__all__ = [
    "ACTIVE",
    "FREE",
    "NODE_ADDR",
    "NODE_IFINDEX",
    "NUMBER",
    "RANGE_REST_SECONDS",
    "REST_SECONDS",
    "Actual",
    "AnyStep",
    "BackendInForce",
    "BuildNodeTable",
    "BumpEpoch",
    "CopyRuleSets",
    "CreateHalfOpen",
    "CreateRuleSet",
    "DeleteFrontends",
    "DeleteIpcache",
    "DeleteMasquerade",
    "DeleteNetworks",
    "DeleteRanges",
    "FreeBackends",
    "FrontendInForce",
    "Limits",
    "NodeEntry",
    "NodeKey",
    "NodeSource",
    "Policy",
    "PutRuleSets",
    "RemoveHalfOpen",
    "RemoveRuleSets",
    "ReserveIds",
    "Resting",
    "RuleSetInForce",
    "Step",
    "SwitchNodeTable",
    "TurnRings",
    "UpsertFrontends",
    "UpsertIpcache",
    "UpsertMasquerade",
    "UpsertNetworks",
    "UpsertRanges",
    "WriteBackends",
    "WriteNode",
    "WriteSlots",
]

MAX_PROBLEMS = 10
"""Problems reported one by one; the rest are counted."""

WORLD_FRONTEND = 2 | FRONTEND

_K = TypeVar("_K")
_V = TypeVar("_V")
_Sortable = TypeVar("_Sortable", bytes, tuple[int, bytes], tuple[int, int, bytes])


class Plan(msgspec.Struct, frozen=True):
    steps: tuple[AnyStep, ...]
    problems: tuple[str, ...]
    """What does not fit, at most MAX_PROBLEMS and one that counts the rest."""
    left_out: int
    """How many entries were left out."""


def plan(desired: DesiredMaps, actual: Actual) -> Plan:
    """The changes that make the kernel equal to `desired`; none when it is."""
    problems: list[str] = []
    policy = _plan_policy(desired, actual, problems)
    facts = _plan_facts(desired, actual, problems)
    if policy.build is not None:
        _move(policy, facts, actual)
    services = _plan_services(desired, actual, problems)
    outside = _plan_outside(desired, actual, problems)
    left_out = len(problems)
    if left_out > MAX_PROBLEMS:
        problems[MAX_PROBLEMS:] = [f"and {left_out - MAX_PROBLEMS} more"]
    steps = tuple(_in_order(policy, facts, services, outside, actual))
    return Plan(steps, tuple(problems), left_out)


class _PolicyPlan(msgspec.Struct):
    next_id: int
    half_open: tuple[int, ...]
    create: tuple[CreateRuleSet, ...]
    build: BuildNodeTable | None
    remove_rule_sets: tuple[tuple[int, int | None], ...]
    remove_half_open: tuple[int, ...]
    moves: Moves = msgspec.field(default_factory=lambda: Moves(0))


class _FactsPlan(msgspec.Struct):
    delete_hosts: tuple[bytes, ...]
    upsert_hosts: dict[bytes, int]
    delete_networks: tuple[Prefix, ...]
    upsert_networks: dict[Prefix, int]
    bump: bool


class _OutsidePlan(msgspec.Struct):
    """What frontends for clients outside, and packets to there, rely on."""

    node: WriteNode | None
    masquerade: dict[Prefix, int]
    unmasquerade: tuple[Prefix, ...]
    upsert: tuple[RangeKey, ...]
    delete: tuple[RangeKey, ...]


def _in_order(
    policy: _PolicyPlan,
    facts: _FactsPlan,
    services: ServicesPlan,
    outside: _OutsidePlan,
    actual: Actual,
) -> Iterator[AnyStep]:
    """The one order of writes. Referents first, removals reversed:

    1. Ids are reserved before anything carries them: a killed loader wastes some.
    2. Addresses that lose their identity go first: a revocation must not wait for a build.
    3. Addresses move from one identity to another under rule sets that judge both alike: those in
       force, or copies of them, or copies of those to come (`plan_moves`).
    4. Whatever the new node table names exists and is linked before it is.
    5. One pointer swap puts the new policy in force; it returns when nobody reads the old one.
    6. Then addresses come: the rule sets in force know them.
    7. Then the epoch: flows are re-evaluated against what is now there, all of it.
    8. The node has its addresses before pods' packets leave with them. Services: frontends go
       before what they name, come after it. Who may use one is known before it asks, and until
       it asks no more.
    9. What only the old node tables named goes last.
    """
    if policy.next_id != actual.next_id:
        yield ReserveIds(policy.next_id)
    if facts.delete_hosts:
        yield DeleteIpcache(facts.delete_hosts)
    if facts.delete_networks:
        yield DeleteNetworks(facts.delete_networks)
    yield from _staged(policy.moves.before)
    if policy.moves.first:
        yield UpsertIpcache(policy.moves.first)
    if policy.half_open:
        yield CreateHalfOpen(policy.half_open)
    yield from policy.create
    if policy.create:
        yield PutRuleSets(tuple((c.id, c.slot, bool(c.expanded.cidr)) for c in policy.create))
    yield from _staged(policy.moves.after)
    if policy.moves.then:
        yield UpsertIpcache(policy.moves.then)
    if policy.build is not None:
        yield policy.build
        yield SwitchNodeTable()
    if facts.upsert_networks:
        yield UpsertNetworks(facts.upsert_networks)
    if facts.upsert_hosts:
        yield UpsertIpcache(facts.upsert_hosts)
    if policy.build is not None or facts.bump or actual.interrupted:
        yield BumpEpoch(actual.epoch + 1)
    if outside.node is not None:
        yield outside.node
    if outside.masquerade:
        yield UpsertMasquerade(outside.masquerade)
    if outside.unmasquerade:
        yield DeleteMasquerade(outside.unmasquerade)
    if outside.upsert:
        yield UpsertRanges(outside.upsert)
    if services.delete:
        yield DeleteFrontends(services.delete)
    if services.backends:
        yield WriteBackends(services.backends)
    if services.slots:
        yield WriteSlots(services.slots)
    if services.rings:
        yield TurnRings(services.turned, services.rings)
    if services.upsert:
        yield UpsertFrontends(services.upsert)
    if services.free:
        yield FreeBackends(services.free)
    if outside.delete:
        yield DeleteRanges(outside.delete)
    if policy.remove_rule_sets:
        yield RemoveRuleSets(policy.remove_rule_sets)
    if policy.remove_half_open:
        yield RemoveHalfOpen(policy.remove_half_open)


def _staged(stage: Stage | None) -> Iterator[AnyStep]:
    if stage is not None:
        yield stage.copies
        yield PutRuleSets(tuple((new, slot, cidr) for _, new, slot, cidr in stage.copies.items))
        yield stage.table
        yield SwitchNodeTable()


# ---- policy: the node table and what it names ---------------------------------------------


def _smallest_free(taken: set[int], limit: int) -> Iterator[int]:
    return (n for n in range(limit) if n not in taken)


class _RuleSets:
    """Where each wanted rule set is or will be: name -> (id, slot)."""

    def __init__(self, wanted: Mapping[str, Expanded], actual: Actual, next_id: int) -> None:
        self.placed: dict[str, tuple[int, int]] = {}
        self.next_id = next_id
        for number, held in sorted(actual.rule_sets.items()):
            expanded = wanted.get(held.name)
            if expanded and held.slot is not None and held.content == expanded.content:
                self.placed.setdefault(held.name, (number, held.slot))
        # A slot in use by the table in force is not free, whatever is in it.
        linked = {r.slot for r in actual.rule_sets.values() if r.slot is not None}
        in_force = {
            p.slot for e in (actual.node_table or {}).values() for p in (e.ingress, e.egress) if p
        }
        free = _smallest_free(linked | in_force, actual.limits.rule_sets)
        created = []
        for name, expanded in sorted(wanted.items()):
            if name in self.placed:
                continue
            slot = next(free, None)
            if slot is None:
                break
            self.placed[name] = (self.next_id, slot)
            created.append(CreateRuleSet(self.next_id, slot, expanded))
            self.next_id += 1
        self.created = tuple(created)


def _policy(name: str | None, sets: _RuleSets, wanted: Mapping[str, Expanded]) -> Policy | None:
    if name is None:
        return None
    number, slot = sets.placed[name]
    return Policy(slot, number, wanted[name].flags, wanted[name].shapes)


def _plan_policy(desired: DesiredMaps, actual: Actual, problems: list[str]) -> _PolicyPlan:
    sets = _RuleSets(desired.rule_sets, actual, max(1, actual.next_id))
    held = {entry.id: entry for entry in (actual.node_table or {}).values()}
    next_id = sets.next_id
    free_slots = _smallest_free(
        {entry.half_open for entry in held.values()} | actual.half_open, actual.limits.half_open
    )
    entries: dict[NodeKey, NodeEntry] = {}
    uids: dict[str, int] = {}
    for endpoint in desired.endpoints:
        who = f"{endpoint.namespace}/{endpoint.name}"
        if any(n is not None and n not in sets.placed for n in (endpoint.ingress, endpoint.egress)):
            problems.append(f"endpoint {who}: no room for its rule set")
            continue
        number = actual.uids.get(endpoint.uid)
        before = held.get(number) if number is not None else None
        slot = before.half_open if before else next(free_slots, None)
        if slot is None:
            problems.append(f"endpoint {who}: the node holds {actual.limits.half_open} endpoints")
            continue
        if number is None:
            number, next_id = next_id, next_id + 1
        uids[endpoint.uid] = number
        entry = _node_entry(endpoint, number, slot, sets, desired.rule_sets)
        entries.update((key, entry) for key in node_keys(entry))
    slots = {entry.half_open for entry in entries.values()}
    used = {p.rule_set for e in entries.values() for p in (e.ingress, e.egress) if p}
    return _PolicyPlan(
        next_id=next_id if next_id > max(1, actual.next_id) else actual.next_id,
        half_open=tuple(sorted(slots - actual.half_open)),
        create=tuple(c for c in sets.created if c.id in used),
        build=BuildNodeTable(entries, uids) if entries != actual.node_table else None,
        remove_rule_sets=tuple(
            (number, r.slot) for number, r in sorted(actual.rule_sets.items()) if number not in used
        ),
        remove_half_open=tuple(sorted(actual.half_open - slots)),
    )


def _node_entry(
    endpoint: DesiredEndpoint,
    number: int,
    half_open: int,
    sets: _RuleSets,
    wanted: Mapping[str, Expanded],
) -> NodeEntry:
    return NodeEntry(
        id=number,
        identity=endpoint.identity,
        ifindex=endpoint.ifindex,
        half_open=half_open,
        pod_mac=endpoint.pod_mac,
        host_mac=endpoint.host_mac,
        ip4=endpoint.ip4,
        ip6=endpoint.ip6,
        ingress=_policy(endpoint.ingress, sets, wanted),
        egress=_policy(endpoint.egress, sets, wanted),
    )


def _move(policy: _PolicyPlan, facts: _FactsPlan, actual: Actual) -> None:
    """Addresses that change their identity with the policy: see `plan_moves`."""
    assert policy.build is not None
    moves = plan_moves(facts.upsert_hosts, actual, policy.build, policy.create, policy.next_id)
    policy.moves, policy.next_id = moves, moves.next_id
    policy.remove_rule_sets += tuple(
        (number, slot) for stage in moves.stages for _, number, slot, _ in stage.copies.items
    )


def node_keys(entry: NodeEntry) -> list[NodeKey]:
    """The keys under which the node table holds an endpoint."""
    keys: list[NodeKey] = [(NODE_IFINDEX, entry.ifindex)]
    keys.extend((NODE_ADDR, address) for address in (entry.ip4, entry.ip6) if address != ZERO)
    return keys


# ---- facts: who has which address ------------------------------------------------------------


def _host_changes(desired: DesiredMaps, actual: Actual) -> tuple[list[bytes], dict[bytes, int]]:
    """(addresses to delete, entries to write). Parts known to be in force are not looked into."""
    held = actual.ipcache
    if actual.ipcache_parts is None:
        if sum(map(len, desired.ipcache)) == len(held) and all(
            list(map(held.get, part)) == list(part.values()) for part in desired.ipcache
        ):
            return [], {}
        wanted: dict[bytes, int] = {}
        for part in desired.ipcache:
            wanted.update(part)
        if not held:
            return [], wanted
        gone = [key for key in held if key not in wanted]
        return gone, {k: v for k, v in wanted.items() if held.get(k) != v}
    known = actual.ipcache_parts
    before = {id(part) for part in known}
    after = {id(part) for part in desired.ipcache}
    new: list[Part] = []
    upserts: dict[bytes, int] = {}
    for index, part in enumerate(desired.ipcache):
        if id(part) in before:
            continue
        new.append(part)
        old = known[index] if index < len(known) else {}
        upserts.update((k, v) for k, v in part.items() - old.items() if held.get(k) != v)
    left = [part.keys() for part in known if id(part) not in after]
    kept: set[bytes] = set().union(*new)
    gone = [key for keys in left for key in keys - kept if key in held]
    return gone, upserts


def _fit(what: str, new: Iterable[_Sortable], room: int, problems: list[str]) -> set[_Sortable]:
    """Of keys that are not in the map yet, those that do not fit: the last in order."""
    keys = sorted(new)
    left = keys[max(room, 0) :]
    problems.extend(f"{what} is full: no room for {_name(key)}" for key in left)
    return set(left)


def _name(key: object) -> str:
    match key:
        case bytes():
            return addresses.text(key)
        case (int() as bits, bytes() as address):
            return addresses.prefix_text((bits, address))
        case (int(), int() as bits, bytes() as address):
            return addresses.prefix_text((bits, address))
        case _:
            return str(key)


def _plan_facts(desired: DesiredMaps, actual: Actual, problems: list[str]) -> _FactsPlan:
    gone, hosts = _host_changes(desired, actual)
    limit = actual.limits
    if len(actual.ipcache) - len(gone) + len(hosts) > limit.ipcache:
        new = [k for k in hosts if k not in actual.ipcache]
        room = limit.ipcache - len(actual.ipcache) + len(gone)
        for key in _fit("ipcache", new, room, problems):
            del hosts[key]
    lost = tuple(sorted(p for p in actual.networks if p not in desired.networks))
    networks = {p: v for p, v in desired.networks.items() if actual.networks.get(p) != v}
    if len(desired.networks) > limit.networks:
        fresh = [p for p in networks if p not in actual.networks]
        room = limit.networks - len(actual.networks) + len(lost)
        for prefix in _fit("ipcache for networks", fresh, room, problems):
            del networks[prefix]
    moved = any(
        key in actual.ipcache and (actual.ipcache[key] ^ value) & ~FRONTEND
        for key, value in hosts.items()
    )
    revoked = any(actual.ipcache[key] != WORLD_FRONTEND for key in gone)
    bump = bool(moved or revoked or lost or networks)
    return _FactsPlan(tuple(sorted(gone)), hosts, lost, networks, bump)


# ---- services ----------------------------------------------------------------------------------


def _plan_services(desired: DesiredMaps, actual: Actual, problems: list[str]) -> ServicesPlan:
    index = actual.index
    same = same_parts(desired.services, actual.service_parts)
    if same and (index is None or not index.idle):
        return ServicesPlan()
    gone, upserts = changes(desired.services, actual.service_parts, actual.frontends)
    held = actual.services()
    return plan_services(gone, upserts, desired.draining, held, index or Index(held), problems)


def _plan_outside(desired: DesiredMaps, actual: Actual, problems: list[str]) -> _OutsidePlan:
    node = None
    if (desired.node_addresses, desired.node_source) != (actual.node_addresses, actual.node_source):
        node = WriteNode(desired.node_addresses, desired.node_source)
    masquerade = {p: v for p, v in desired.masquerade.items() if actual.masquerade.get(p) != v}
    lost = [p for p in actual.masquerade if p not in desired.masquerade]
    fresh = [p for p in masquerade if p not in actual.masquerade]
    room = actual.limits.masquerade - len(actual.masquerade)
    for prefix in _fit("masquerade", fresh, room, problems) if len(fresh) > room else ():
        del masquerade[prefix]
    # The roots are the shortest: they are what masquerades.
    upserts = dict(sorted(masquerade.items(), reverse=True))
    found = _OutsidePlan(node, upserts, tuple(sorted(lost)), (), ())
    if desired.ranges == actual.ranges:
        return found
    new = desired.ranges - actual.ranges
    room = actual.limits.ranges - len(actual.ranges)
    left = _fit("source ranges", new, room, problems) if len(new) > room else set()
    found.upsert = tuple(sorted(new - left))
    found.delete = tuple(sorted(actual.ranges - desired.ranges))
    return found


# ---- drift ----------------------------------------------------------------------------------


def drift(expected: Actual, found: Actual) -> int:
    """How many entries differ between what was left in the kernel and what is there now."""
    return (
        _differing(expected.node_table or {}, found.node_table or {})
        + _differing(expected.rule_sets, found.rule_sets)
        + len(expected.half_open ^ found.half_open)
        + _differing(expected.ipcache, found.ipcache)
        + _differing(expected.networks, found.networks)
        + _differing(expected.frontends, found.frontends)
        + _differing(expected.backends, found.backends)
        + len(expected.ranges ^ found.ranges)
        + len(expected.node_addresses ^ found.node_addresses)
        + (expected.node_source != found.node_source)
        + _differing(expected.masquerade, found.masquerade)
        + (expected.epoch != found.epoch)
    )


def _differing(one: Mapping[_K, _V], two: Mapping[_K, _V]) -> int:
    if one == two:
        return 0
    return sum(1 for key in one.keys() | two.keys() if one.get(key) != two.get(key))
