"""What a plan starts from, and what it is made of: what the kernel holds, and single changes.

Types only; who may change what in which order is `plan`'s.
"""

from __future__ import annotations

import msgspec

from tidegate_loader.addresses import ZERO, Prefix
from tidegate_loader.maps import Part
from tidegate_loader.plan_services import BackendInForce, FrontendInForce, Held, Index, Resting
from tidegate_loader.rules import Expanded
from tidegate_loader.services import FrontendKey, RangeKey, ServicePart

NODE_IFINDEX, NODE_ADDR = 1, 2

NodeKey = tuple[int, int | bytes]
"""(NODE_IFINDEX, ifindex) or (NODE_ADDR, 16 address bytes)."""
NodeSource = tuple[bytes, bytes]
"""As whom the node sends on: IPv4, IPv6; ZERO: not at all."""

# ---- what the kernel holds ---------------------------------------------------------


class Policy(msgspec.Struct, frozen=True):
    """One direction of an endpoint's policy: struct tg_policy."""

    slot: int
    rule_set: int
    flags: int
    shapes: tuple[tuple[int, ...], ...]
    """Of each lane."""


class NodeEntry(msgspec.Struct, frozen=True):
    """struct tg_endpoint. A policy of None allows."""

    id: int
    identity: int
    ifindex: int
    half_open: int
    pod_mac: bytes
    host_mac: bytes
    ip4: bytes
    ip6: bytes
    ingress: Policy | None
    egress: Policy | None


class RuleSetInForce(msgspec.Struct, frozen=True):
    """A pinned rule set."""

    name: str
    """"" when nobody remembers whose it is: it is then replaced."""
    content: str
    slot: int | None
    """None: not linked into rule_sets_v2 (and cidrs_v1) as it should be."""
    identities: frozenset[int] = frozenset()
    """The peers that it knows by their number."""


class Limits(msgspec.Struct, frozen=True):
    """Entries that each map holds."""

    ipcache: int
    networks: int
    frontends: int
    slots: int
    backends: int
    rule_sets: int
    half_open: int
    ranges: int = 65536
    masquerade: int = 4096


class Actual(msgspec.Struct):
    """What the kernel holds, read back. The loader keeps it between cycles."""

    limits: Limits
    now: int = 0
    """CLOCK_MONOTONIC seconds."""
    epoch: int = 0
    next_id: int = 0
    interrupted: bool = False
    """An apply may have ended before it bumped the epoch."""
    node_table: dict[NodeKey, NodeEntry] | None = None
    """None: no table is in force."""
    uids: dict[str, int] = {}
    """Pod UID -> endpoint id, for every id that may be in force."""
    rule_sets: dict[int, RuleSetInForce] = {}
    half_open: set[int] = set()
    ipcache: dict[bytes, int] = {}
    ipcache_parts: tuple[Part, ...] | None = None
    """The parts that `ipcache` is known to equal; None: compare everything."""
    networks: dict[Prefix, int] = {}
    frontends: dict[FrontendKey, FrontendInForce] = {}
    service_parts: tuple[ServicePart, ...] | None = None
    backends: dict[int, BackendInForce] = {}
    resting: tuple[Resting, ...] = ()
    index: Index | None = None
    """Of frontends, backends and resting; None: nobody keeps it."""
    ranges: frozenset[RangeKey] = frozenset()
    node_addresses: frozenset[bytes] = frozenset()
    node_source: NodeSource = (ZERO, ZERO)
    masquerade: dict[Prefix, int] = {}

    def wake(self, now: int) -> None:
        """Time has passed: some slots have rested."""
        self.now = now
        due = [r for r in self.resting if r.until <= now]
        if due:
            self.resting = tuple(r for r in self.resting if r.until > now)
            if self.index is not None:
                self.index.rested(due)

    def reindex(self) -> None:
        """Of what was read back at `now`. Slots that have rested until then are free in it; were
        the next `wake` to give them back once more, two frontends would get them."""
        self.resting = tuple(r for r in self.resting if r.until > self.now)
        self.index = Index(self.services())

    def services(self) -> Held:
        limits = self.limits
        return Held(
            frontends=self.frontends,
            backends=self.backends,
            resting=self.resting,
            now=self.now,
            max_frontends=limits.frontends,
            max_slots=limits.slots,
            max_backends=limits.backends,
        )


# ---- steps -----------------------------------------------------------------------------


class Step(msgspec.Struct, frozen=True):
    """One change. Idempotent; deleting the absent succeeds."""


class ReserveIds(Step, frozen=True):
    next_id: int


class CreateHalfOpen(Step, frozen=True):
    slots: tuple[int, ...]


class CreateRuleSet(Step, frozen=True):
    """Create, fill and pin; nothing refers to it yet."""

    id: int
    slot: int
    expanded: Expanded


class CopyRuleSets(Step, frozen=True):
    """Copies of rule sets, filled and pinned, in which `numbers` (new number -> the one in whose
    place it is) are judged as those are: (id copied, id, slot, has CIDRs)."""

    items: tuple[tuple[int, int, int, bool], ...]
    numbers: dict[int, int]


class PutRuleSets(Step, frozen=True):
    """Link created rule sets into their slots, in one batch: (id, slot, has CIDRs)."""

    items: tuple[tuple[int, int, bool], ...]


class BuildNodeTable(Step, frozen=True):
    entries: dict[NodeKey, NodeEntry]
    uids: dict[str, int]


class SwitchNodeTable(Step, frozen=True):
    """Put the built table in force; returns when no program reads the old one."""


class BumpEpoch(Step, frozen=True):
    epoch: int


class RemoveRuleSets(Step, frozen=True):
    """(id, slot or None)."""

    items: tuple[tuple[int, int | None], ...]


class RemoveHalfOpen(Step, frozen=True):
    slots: tuple[int, ...]


class DeleteIpcache(Step, frozen=True):
    keys: tuple[bytes, ...]


class UpsertIpcache(Step, frozen=True):
    entries: dict[bytes, int]


class DeleteNetworks(Step, frozen=True):
    keys: tuple[Prefix, ...]


class UpsertNetworks(Step, frozen=True):
    entries: dict[Prefix, int]


class WriteNode(Step, frozen=True):
    """The node's own addresses, and as whom it sends on."""

    addresses: frozenset[bytes]
    source: NodeSource


class UpsertMasquerade(Step, frozen=True):
    """In this order: what is left out first."""

    entries: dict[Prefix, int]


class DeleteMasquerade(Step, frozen=True):
    """In this order: what is left out last."""

    keys: tuple[Prefix, ...]


class UpsertRanges(Step, frozen=True):
    keys: tuple[RangeKey, ...]


class DeleteRanges(Step, frozen=True):
    keys: tuple[RangeKey, ...]


class DeleteFrontends(Step, frozen=True):
    keys: tuple[FrontendKey, ...]


class WriteBackends(Step, frozen=True):
    """Nothing refers to these ids."""

    entries: dict[int, BackendInForce]


class WriteSlots(Step, frozen=True):
    """Base -> backend ids; nothing refers to these slots."""

    ranges: dict[int, tuple[int, ...]]


class TurnRings(Step, frozen=True):
    """Positions of rings that programs read meanwhile -> backend ids, and what that makes of the
    frontends that have them."""

    slots: dict[int, int]
    entries: dict[FrontendKey, FrontendInForce]


class UpsertFrontends(Step, frozen=True):
    entries: dict[FrontendKey, FrontendInForce]


class FreeBackends(Step, frozen=True):
    entries: dict[int, BackendInForce]


AnyStep = (
    ReserveIds
    | CreateHalfOpen
    | CreateRuleSet
    | CopyRuleSets
    | PutRuleSets
    | BuildNodeTable
    | SwitchNodeTable
    | BumpEpoch
    | RemoveRuleSets
    | RemoveHalfOpen
    | DeleteIpcache
    | UpsertIpcache
    | DeleteNetworks
    | UpsertNetworks
    | WriteNode
    | UpsertMasquerade
    | DeleteMasquerade
    | UpsertRanges
    | DeleteRanges
    | DeleteFrontends
    | WriteBackends
    | WriteSlots
    | TurnRings
    | UpsertFrontends
    | FreeBackends
)
