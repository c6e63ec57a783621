"""Desired state: NodeState, RuleSet and StateSlice, and the Identity ledger.

The same objects whether they come from an API server or from a folder. They
are written by machines and read by machines, so the rules are strict:

* `[]` and absent differ, null is never written (DESIGN invariant 9): an
  optional field is `UNSET`, never `None`.
* Every list is sorted, so that equal content has equal bytes and names.
* Addresses are in canonical text form (RFC 5952 for IPv6), ports are ints in
  host order.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from tidegate_api import API_VERSION

FORMAT = 1
"""The `spec.format` that this code writes. Loaders read N and N-1."""

Protocol = Literal["TCP", "UDP", "SCTP"]


class Reserved(IntEnum):
    """Identity numbers below 256; DESIGN, "identity"."""

    UNKNOWN = 0
    HOST = 1
    WORLD = 2
    KUBE_APISERVER = 3
    REMOTE_NODE = 4
    HEALTH = 5


FIRST_IDENTITY = 256
IDENTITY_BITS = 24


class Model(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    rename="camel",
):
    """Base of every machine-written type. Unknown fields are an error: an
    object we do not understand never moves the node (DESIGN invariant 4)."""


class Meta(Model, forbid_unknown_fields=False, frozen=True):
    """The part of ObjectMeta that Tidegate reads or writes."""

    name: str
    labels: dict[str, str] | UnsetType = UNSET
    generation: int | UnsetType = UNSET
    resource_version: str | UnsetType = UNSET


# ---- RuleSet ----------------------------------------------------------------


class PolicyRef(Model, order=True, frozen=True):
    """The object a rule came from; `namespace` is "" for cluster-scoped kinds."""

    kind: str
    namespace: str
    name: str


class Rule(Model, order=True, frozen=True):
    """One rule of one policy: `policies[policy]`, and the rule's index in that
    object's ingress or egress list."""

    policy: int
    index: int


class AnyPeer(Model, tag_field="kind", tag="any", frozen=True):
    """Every peer, known or not."""


class SetPeer(Model, tag_field="kind", tag="set", frozen=True):
    """The members of a peer set; `name` is the set's content name."""

    name: str


class CIDRPeer(Model, tag_field="kind", tag="cidr", frozen=True):
    """Addresses, whoever has them: pods, nodes and externals alike."""

    cidr: str
    excepts: list[str] = []


Peer = AnyPeer | SetPeer | CIDRPeer


class Term(Model, frozen=True):
    """peer x protocol x ports -> action. Absent `protocol` is every protocol,
    absent `port` every port (and then also protocols without ports)."""

    peer: Peer
    action: Literal["Allow", "Deny"]
    precedence: int
    """Higher wins; among equals the lowest `rule` is named. 32 bits."""
    rule: int
    """Index into `RuleSetSpec.rules`."""
    protocol: Protocol | UnsetType = UNSET
    port: int | UnsetType = UNSET
    end_port: int | UnsetType = UNSET
    """Inclusive; absent: the one `port`."""


class RuleSetSpec(Model, frozen=True):
    """The policy of one subject in one direction. A subject has a rule set iff
    some policy isolates it in this direction; no terms = nothing is allowed."""

    format: int
    direction: Literal["Ingress", "Egress"]
    policies: list[PolicyRef]
    """The policies that isolate the subject, sorted: what "default deny" names."""
    rules: list[Rule]
    terms: list[Term]


class RuleSet(Model, frozen=True):
    api_version: str
    kind: Literal["RuleSet"]
    metadata: Meta
    spec: RuleSetSpec


# ---- StateSlice ---------------------------------------------------------------


class IPCacheEntry(Model, frozen=True):
    """Who has an address. `cidr` is a host prefix (/32, /128) or a network.

    `identity` 0 on a network means "no pod has been published here yet": it is
    how every cluster pod CIDR is kept from counting as world."""

    cidr: str
    identity: int
    node: str | UnsetType = UNSET
    """The node the pod runs on; absent for networks and node addresses."""


class PeerSet(Model, frozen=True):
    """The identities that a selector picks now."""

    name: str
    """Content name: hash of the normalised selector."""
    selector: str
    """The normalised selector in words, for people."""
    identities: list[int]


class Frontend(Model, frozen=True):
    address: str
    port: int
    protocol: Protocol
    port_name: str = ""


class Backend(Model, order=True, frozen=True):
    address: str
    port: int


class ServicePort(Model, frozen=True):
    """One port of one Service: frontends that share one backend list."""

    namespace: str
    name: str
    type: str
    frontends: list[Frontend]
    backends: list[Backend]


class StateSliceSpec(Model, frozen=True):
    """One shard of a table; exactly one of the three lists is present, and it
    is the one that `table` names."""

    format: int
    table: Literal["ipcache", "services", "peers"]
    epoch: int
    shard: int
    shards: int
    revision: int
    """The table's revision when this shard was last written."""
    ipcache: list[IPCacheEntry] | UnsetType = UNSET
    services: list[ServicePort] | UnsetType = UNSET
    peers: list[PeerSet] | UnsetType = UNSET


class StateSlice(Model, frozen=True):
    api_version: str
    kind: Literal["StateSlice"]
    metadata: Meta
    spec: StateSliceSpec


# ---- NodeState ------------------------------------------------------------------


class Endpoint(Model, frozen=True):
    """One pod on the node. Its addresses come from the node (CNI) first; those
    the API knows are repeated here so that a restart needs no CNI."""

    uid: str
    namespace: str
    name: str
    identity: int
    addresses: list[str]
    ingress: str | UnsetType = UNSET
    """Name of its RuleSet; absent: no policy selects it, default allow."""
    egress: str | UnsetType = UNSET


class TableRef(Model, frozen=True):
    epoch: int
    shards: int
    min_revision: int


class NodeStateSpec(Model, frozen=True):
    format: int
    mode: Literal["Enforcing", "Detached"]
    endpoints: list[Endpoint]
    rule_sets: list[str]
    """Names of every RuleSet the endpoints use, sorted."""
    peer_sets: list[str]
    """Names of every peer set those rule sets use, sorted."""
    tables: dict[str, TableRef]


class Condition(Model, frozen=True):
    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str
    last_transition_time: str
    observed_generation: int | UnsetType = UNSET


class NodeStateStatus(Model, frozen=True):
    realised: str | UnsetType = UNSET
    """Digest of the NodeState spec in force, read back from the kernel."""
    endpoints: int = 0
    drift: int = 0
    """Entries found changed behind the loader's back and repaired, in all."""
    formats: list[int] = []
    conditions: list[Condition] = []


class NodeState(Model, frozen=True):
    api_version: str
    kind: Literal["NodeState"]
    metadata: Meta
    spec: NodeStateSpec
    status: NodeStateStatus | UnsetType = UNSET


# ---- Identity --------------------------------------------------------------------


class IdentitySpec(Model, frozen=True):
    """What an allocated number stands for. Exactly (namespace, labels) or cidrs."""

    namespace: str | UnsetType = UNSET
    labels: dict[str, str] | UnsetType = UNSET
    cidrs: list[str] | UnsetType = UNSET


class Identity(Model, frozen=True):
    """Allocated identities are named by their decimal number."""

    api_version: str
    kind: Literal["Identity"]
    metadata: Meta
    spec: IdentitySpec


StateObject = RuleSet | StateSlice | NodeState | Identity

TABLES = ("ipcache", "services", "peers")


# ---- Bytes and names ---------------------------------------------------------------

_encoder = msgspec.json.Encoder(order="deterministic")


def encode(value: object) -> bytes:
    """Canonical JSON: equal content, equal bytes."""
    return _encoder.encode(value)


def digest(value: object) -> str:
    """The first 40 hex digits of SHA-256 over the canonical JSON; fits a
    Kubernetes name with room for a prefix."""
    return hashlib.sha256(encode(value)).hexdigest()[:40]


def shard_of(key: str, shards: int) -> int:
    """A key's shard: SHA-256 mod n, n a power of two. The key of an ipcache
    entry is its `cidr`, of a service "namespace/name", of a peer set its name."""
    if shards < 1 or shards & (shards - 1):
        raise ValueError(f"shards must be a power of two, not {shards}")
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") & (shards - 1)


def slice_name(table: str, epoch: int, shard: int, shards: int) -> str:
    return f"{table}-e{epoch}-{shard}-of-{shards}"


def rule_set(spec: RuleSetSpec) -> RuleSet:
    """A RuleSet named by its content."""
    return RuleSet(
        api_version=API_VERSION, kind="RuleSet", metadata=Meta(name=digest(spec)), spec=spec
    )
