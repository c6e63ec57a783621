"""Desired state: NodeState, RuleSet and StateSlice, the Identity ledger, and what
became of each policy.

The same objects whether they come from an API server or from a folder. They
are written by machines and read by machines, so the rules are strict:

* `[]` and absent differ, null is never written (DESIGN invariant 9): an
  optional field is `UNSET`, never `None`.
* Every list is sorted, so that equal content has equal bytes and names.
* Addresses are in canonical text form (RFC 5952 for IPv6), ports are ints in
  host order.

The CRDs are made of these types (`schema`): their bounds, and the string below each
field as its description. So a bound here is one that an API server enforces too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, UnsetType

from tidegate_api import API_VERSION
from tidegate_api.base import (
    IDENTITY_BITS,
    MAX_COUNT,
    MAX_NAME,
    Address,
    Count,
    Model,
    Name,
    Network,
    Number,
    Port,
    Protocol,
    Shards,
    Text,
    Time,
)
from tidegate_api.service import Backend, Frontend, HostPort, ServicePort

# Those of the other two modules that are parts of the objects here.
__all__ = [
    "IDENTITY_BITS",
    "MAX_COUNT",
    "MAX_NAME",
    "Backend",
    "Frontend",
    "HostPort",
    "Model",
    "Protocol",
    "ServicePort",
]

FORMAT = 1
"""The lowest `spec.format`: what every object has that says nothing newer. An object is written
with the lowest format that can say it, so a new writer changes nothing for an old reader until
something new is used (`format_of_rules`, `format_of_peers`, `service.format_of`)."""
NEWEST_FORMAT = 2
"""Policies that isolate nobody, tiers, Pass, audit, log, ICMP, entities, named ports, and peer
sets with addresses or ports; and of Services what `service.format_of` lists."""

TermProtocol = Literal["TCP", "UDP", "SCTP", "ICMP", "ICMPv6"]
Entity = Literal["host", "remote-node", "kube-apiserver"]

DEVELOPER_PRECEDENCE = 1 << 30
"""Of every allow in the developer tier; a deny there has one more. Below it: Baseline."""
ADMIN_PRECEDENCE = 1 << 31
"""The lowest of the Admin tier."""


class Reserved(IntEnum):
    """Identity numbers below 256; DESIGN, "identity"."""

    UNKNOWN = 0
    HOST = 1
    WORLD = 2
    KUBE_APISERVER = 3
    REMOTE_NODE = 4
    HEALTH = 5


FIRST_IDENTITY = 256

PORT_LABEL = ":port/"
"""Begins the key of a system label of an allocated Identity: `:port/TCP/http`, whose value is
the number of that named container port. No user's label key has a colon."""

ANY_OTHER = "*"
"""As value of a label of an allocated Identity: any that no selector in force names. No label
that a user can write has it."""

DIGEST_ANNOTATION = "tidegate.dev/digest"
"""On a NodeState: the digest of its spec. `status.realised` says the same digest once
the spec is in force."""


TRIGGER_ANNOTATION = "tidegate.dev/last-change-trigger-time"
"""On a StateSlice of services that was written because endpoints have changed: when the first of
them did (RFC 3339), as its EndpointSlice's `endpoints.kubernetes.io/last-change-trigger-time` says.
No part of the spec: what is compiled does not depend on it."""


class OwnerReference(Model, forbid_unknown_fields=False, frozen=True):
    """The object without which this one goes: an API server collects it."""

    api_version: str
    kind: str
    name: str
    uid: str


class Meta(Model, forbid_unknown_fields=False, frozen=True):
    """The part of ObjectMeta that Tidegate reads or writes. Only an API server sets
    `uid`, `generation`, `resource_version` and the two times."""

    name: str
    namespace: str | UnsetType = UNSET
    """Absent for cluster-scoped kinds."""
    labels: dict[str, str] | UnsetType = UNSET
    annotations: dict[str, str] | UnsetType = UNSET
    owner_references: list[OwnerReference] | UnsetType = UNSET
    finalizers: list[str] | UnsetType = UNSET
    uid: str | UnsetType = UNSET
    generation: int | UnsetType = UNSET
    resource_version: str | UnsetType = UNSET
    creation_timestamp: str | UnsetType = UNSET
    deletion_timestamp: str | UnsetType = UNSET


# ---- Conditions ---------------------------------------------------------------


class Condition(Model, frozen=True):
    """One statement about the object. `Ready` is always there once the writer has looked;
    `Reconciling` and `Stalled` are there only while true."""

    type: Annotated[str, msgspec.Meta(max_length=64)]
    """`Ready`, `Reconciling` or `Stalled`, or one more specific."""
    status: Literal["True", "False", "Unknown"]
    """Whether it is so."""
    reason: Annotated[str, msgspec.Meta(max_length=128)]
    """Why, in one word for machines."""
    message: Annotated[str, msgspec.Meta(max_length=32768)]
    """Why, and what to do, for people."""
    last_transition_time: Time
    """When `status` last changed."""
    observed_generation: Count | UnsetType = UNSET
    """The `metadata.generation` that this was said of."""


# ---- RuleSet ----------------------------------------------------------------


class PolicyRef(Model, order=True, kw_only=True, omit_defaults=True, frozen=True):
    """The object a rule came from."""

    kind: Annotated[str, msgspec.Meta(max_length=63)]
    """Kind of the policy object."""
    namespace: Annotated[str, msgspec.Meta(max_length=63)] = ""
    """Its namespace; absent for cluster-scoped kinds."""
    name: Name
    """Its name."""


class Rule(Model, order=True, omit_defaults=True, frozen=True):
    """One rule of one policy."""

    policy: Count
    """Index into `policies`, continued in `others`."""
    index: Count
    """Index of the rule in that object's ingress or egress list."""
    log: bool = False
    """Whether every new flow that the rule decides is to be reported."""


class AnyPeer(Model, tag_field="kind", tag="any", frozen=True):
    """Every peer, known or not."""


class SetPeer(Model, tag_field="kind", tag="set", frozen=True):
    """The members of a peer set."""

    name: Name
    """Content name of the peer set."""


class CIDRPeer(Model, tag_field="kind", tag="cidr", frozen=True):
    """Addresses, whoever has them: pods, nodes and externals alike."""

    cidr: Network
    """The network."""
    excepts: list[Network] = msgspec.field(default_factory=list)
    """Networks inside it that do not belong to the peer."""


class EntityPeer(Model, tag_field="kind", tag="entity", frozen=True):
    """What only the node can tell: its own addresses from those of other nodes."""

    entity: Entity
    """`host`: made on the subject's node, or sent to an address of it. `remote-node`: any other
    node's address. `kube-apiserver`: an address that serves the API; one that is a node's is
    `host` or `remote-node` as well."""


Peer = AnyPeer | SetPeer | CIDRPeer | EntityPeer


class Term(Model, omit_defaults=True, frozen=True):
    """peer x protocol x ports -> action. Absent `protocol` is every protocol,
    absent `port` every port (and then also protocols without ports)."""

    peer: Peer
    """Who is on the other side."""
    action: Literal["Allow", "Deny", "Pass"]
    """What becomes of a flow that matches. `Pass`: the rest of the term's tier is skipped."""
    precedence: Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]
    """Higher wins; among equals the lowest `rule` is named. 32 bits. Its tier is readable from
    it: Baseline below 2^30, developer below 2^31, Admin above."""
    rule: Count
    """Index into `rules`."""
    protocol: TermProtocol | UnsetType = UNSET
    """Absent: every protocol."""
    port: Port | UnsetType = UNSET
    """Absent: every port, and protocols without ports."""
    end_port: Port | UnsetType = UNSET
    """Inclusive; absent: the one `port`."""
    port_name: Annotated[str, msgspec.Meta(max_length=63)] | UnsetType = UNSET
    """The port has this name at the peer, whose peer set says which numbers that is for whom: its
    `ports`, and of them those of `protocol`, if there is one. There is then no `port`."""
    icmp_type: Annotated[int, msgspec.Meta(ge=0, le=255)] | UnsetType = UNSET
    """Of ICMP or ICMPv6; absent: every type."""
    icmp_code: Annotated[int, msgspec.Meta(ge=0, le=255)] | UnsetType = UNSET
    """Of the type; absent: every code."""
    audit: bool = False
    """Of a policy in audit mode: only the second verdict knows it."""


class RuleSetSpec(Model, omit_defaults=True, frozen=True):
    """The policy of one subject in one direction. A subject has a rule set iff some policy
    counts for it in this direction.

    The verdict: of the terms that match and are not `audit`, the highest of the Admin tier
    decides, unless it is Pass or there is none; then the highest of all others, unless it is
    Pass or there is none; then `policies` deny, and where they are empty the flow is allowed.

    The second verdict, where some term is `audit` or `audited` is not empty, counts those terms
    as well; if `audited` is not empty it leaves the Baseline tier out and denies where nothing
    matches. Where only the second denies, the flow passes, and the denial is reported."""

    format: Count
    """Version of the meaning of this spec."""
    direction: Literal["Ingress", "Egress"]
    """As the subject sees it."""
    policies: list[PolicyRef]
    """The policies that isolate the subject, sorted: what "default deny" names. Empty: what no
    term decides is allowed."""
    rules: list[Rule]
    """The rules that terms came from."""
    terms: list[Term]
    """What is allowed or denied, sorted."""
    others: list[PolicyRef] = msgspec.field(default_factory=list)
    """Policies that isolate nobody and have a say all the same: of the Admin and Baseline tiers,
    those that only allow and deny, and those in audit mode; sorted, absent if there is none."""
    audited: list[Count] = msgspec.field(default_factory=list)
    """Which of `others` are in audit mode and would isolate the subject; absent if none does."""


class RuleSet(Model, frozen=True):
    """The policy of one subject in one direction as terms. Named by the hash of its
    content, holds no identity number, never edited."""

    api_version: str
    kind: Literal["RuleSet"]
    metadata: Meta
    spec: RuleSetSpec
    """Content that the name is the hash of."""


# ---- StateSlice ---------------------------------------------------------------

TABLES = ("ipcache", "services", "peers")


class IPCacheEntry(Model, frozen=True, gc=False):
    """Who has an address. There are a hundred thousand, and they hold no object that could hold
    them: the garbage collector need not look."""

    cidr: Network
    """A host prefix (/32, /128) or a network."""
    identity: Number
    """Its identity. 0 on a network means "no pod has been published here yet": it is
    how every cluster pod CIDR is kept from counting as world."""
    node: Name | UnsetType = UNSET
    """The node the pod runs on; absent for networks and node addresses."""


class NamedPort(Model, order=True, frozen=True):
    """What one port name means, and for whom."""

    protocol: Protocol
    """Of the container port."""
    port: Port
    """Its number."""
    identities: list[Number]
    """The members for whom it has this number, sorted."""


class PeerSet(Model, omit_defaults=True, frozen=True):
    """Who a selector picks now: identities, or addresses; a peer that is either belongs to it."""

    name: Name
    """Content name: hash of the normalised selector."""
    selector: str
    """The normalised selector in words, for people."""
    identities: list[Number]
    """Its members now, sorted."""
    cidrs: list[Network] = msgspec.field(default_factory=list)
    """Its members by address, whoever has it, sorted: nodes that the selector picks."""
    ports: list[NamedPort] = msgspec.field(default_factory=list)
    """Of a set that was made for one port name: its numbers at the members, sorted. A member may
    have several, or none."""


class StateSliceSpec(Model, frozen=True):
    """One shard of a table; exactly one of the three lists is present, and it
    is the one that `table` names."""

    format: Count
    """Version of the meaning of this spec."""
    table: Literal["ipcache", "services", "peers"]
    """The table that this is a shard of."""
    epoch: Count
    """Counts resharding; shards of two epochs may be there at once."""
    shard: Count
    """Which shard this is, from 0."""
    shards: Shards
    """How many there are in this epoch, a power of two."""
    revision: Count
    """The table's revision when this shard was last written."""
    ipcache: list[IPCacheEntry] | UnsetType = UNSET
    """Addresses; only in the table of that name."""
    services: list[ServicePort] | UnsetType = UNSET
    """Services; only in the table of that name."""
    peers: list[PeerSet] | UnsetType = UNSET
    """Peer sets; only in the table of that name."""

    def __post_init__(self) -> None:
        present = [table for table in TABLES if getattr(self, table) is not UNSET]
        if present != [self.table]:
            raise ValueError(f"a slice of {self.table} has {', '.join(present) or 'no list'}")


class StateSlice(Model, frozen=True):
    """One shard of a table that many nodes share, selected by label
    `tidegate.dev/table`."""

    api_version: str
    kind: Literal["StateSlice"]
    metadata: Meta
    spec: StateSliceSpec
    """The shard."""


# ---- NodeState ------------------------------------------------------------------


class Endpoint(Model, frozen=True):
    """One pod on the node. Its addresses come from the node (CNI) first; those
    the API knows are repeated here so that a restart needs no CNI."""

    uid: Annotated[str, msgspec.Meta(max_length=128)]
    """Of the pod: what an endpoint is keyed by."""
    namespace: Annotated[str, msgspec.Meta(max_length=63)]
    """Of the pod."""
    name: Name
    """Of the pod."""
    identity: Number
    """The identity number that peers know it by."""
    addresses: list[Address]
    """Those that the API knows, IPv4 first; may be none yet."""
    ingress: Name | UnsetType = UNSET
    """Name of its RuleSet; absent: no policy selects it, default allow."""
    egress: Name | UnsetType = UNSET
    """Name of its RuleSet; absent: no policy selects it, default allow."""
    host_ports: list[HostPort] | UnsetType = UNSET
    """Ports of the node that lead to the pod, sorted; absent: none."""


class TableRef(Model, frozen=True):
    """What a node must have read of a table before it moves."""

    epoch: Count
    """The epoch to read."""
    shards: Shards
    """How many shards make the table whole."""
    min_revision: Count
    """A revision that has to be seen before this state may be applied."""


class Masquerade(Model, frozen=True):
    """What pods of the node send outside the cluster leaves with the node's address."""

    excludes: list[Network]
    """Networks outside the cluster to which pods keep their own addresses, sorted."""


class NodeStateSpec(Model, frozen=True):
    """What one node enforces."""

    format: Count
    """Version of the meaning of this spec; a loader says in `status.formats` which it reads."""
    mode: Literal["Enforcing", "Detached"]
    """`Detached` removes everything of Tidegate from the node's kernel; nothing else does."""
    endpoints: list[Endpoint]
    """The pods of the node, sorted."""
    rule_sets: list[Name]
    """Names of every RuleSet the endpoints use, sorted."""
    peer_sets: list[Name]
    """Names of every peer set those rule sets use, sorted."""
    tables: dict[str, TableRef]
    """Table name -> what of it is needed."""
    term: Count | UnsetType = UNSET
    """Counts leaders: of the one that wrote this. Never falls, so that a leader which was
    deposed cannot overwrite its successor. Absent where nothing elects a leader."""
    zone: Annotated[str, msgspec.Meta(max_length=63)] | UnsetType = UNSET
    """Where the node is (`topology.kubernetes.io/zone`); absent: nowhere, or no Service asks."""
    node_port_addresses: list[Address] | UnsetType = UNSET
    """Addresses of the node that answer for NodePorts and host ports, IPv4 first; absent: there
    is no such port."""
    masquerade: Masquerade | UnsetType = UNSET
    """Absent: what pods send outside leaves as they send it."""


class NodeStateStatus(Model, forbid_unknown_fields=False, frozen=True):
    """What the node's loader found in the kernel."""

    # A loader is upgraded first: what a newer one says more is no reason not to hear the rest.

    realised: Annotated[str, msgspec.Meta(max_length=64)] | UnsetType = UNSET
    """Digest of the NodeState spec in force, read back from the kernel."""
    endpoints: Count = 0
    """Endpoints in force."""
    peer_sets: Annotated[str, msgspec.Meta(max_length=64)] | UnsetType = UNSET
    """Digest of the peer sets in force that the NodeState names, with their members: these change
    without a change of the spec."""
    drift: Count = 0
    """Entries found changed behind the loader's back and repaired, in all."""
    formats: list[Count] = msgspec.field(default_factory=list)
    """The formats of specs that this loader reads."""
    conditions: list[Condition] = msgspec.field(default_factory=list)
    """`Ready`: the newest spec is in force. `Stalled`: something that has to be mended.
    `KubeProxy`: its rules are on the node too."""
    observed_generation: Count | UnsetType = UNSET
    """The newest `metadata.generation` that the loader has looked at."""
    last_report_time: Time | UnsetType = UNSET
    """When the loader wrote this; it does so at least every 90 seconds while it lives."""


class NodeState(Model, frozen=True):
    """What one node enforces: its endpoints, their rule sets, and which tables it needs
    at which revision. Named after its Node, and owned by it."""

    api_version: str
    kind: Literal["NodeState"]
    metadata: Meta
    spec: NodeStateSpec
    """What is wanted; the operator's."""
    status: NodeStateStatus | UnsetType = UNSET
    """What is in force; the loader's."""


# ---- Identity --------------------------------------------------------------------


class IdentitySpec(Model, frozen=True):
    """What a number stands for. Exactly (namespace, labels) or cidrs."""

    namespace: Name | UnsetType = UNSET
    """The pods' namespace."""
    labels: dict[str, str] | UnsetType = UNSET
    """The pods' identity-relevant labels, all of them."""
    cidrs: list[Network] | UnsetType = UNSET
    """Networks outside the cluster, without host bits."""

    def __post_init__(self) -> None:
        pods = (self.namespace is not UNSET, self.labels is not UNSET)
        if pods != ((self.cidrs is UNSET),) * 2:
            raise ValueError("an Identity is either namespace with labels, or cidrs")


class IdentityStatus(Model, frozen=True):
    """What the operator made of it."""

    id: Number | UnsetType = UNSET
    """The number. For an Identity with a decimal name it is the name."""
    summary: Text | UnsetType = UNSET
    """What it stands for in words: its labels, or its CIDRs."""
    endpoints: Count = 0
    """Pods that have this identity now."""
    label_sets: Count | UnsetType = UNSET
    """Sets of labels that these pods have: numbers that it would take by labels."""
    conditions: list[Condition] = msgspec.field(default_factory=list)
    """`Ready`: the number is known to every node that needs it. `Stalled`: it overlaps
    another one."""
    observed_generation: Count | UnsetType = UNSET
    """The newest `metadata.generation` that the operator has looked at."""


class Identity(Model, frozen=True):
    """One number for pods that are alike, or for networks outside. Allocated ones are
    named by their decimal number, by the operator alone; user-made ones by a name that
    begins with a letter."""

    api_version: str
    kind: Literal["Identity"]
    metadata: Meta
    spec: IdentitySpec
    """What the number stands for; never changed."""
    status: IdentityStatus | UnsetType = UNSET
    """The operator's."""


# ---- PolicyStatus ------------------------------------------------------------------


class PolicyTarget(Model, frozen=True):
    """The policy object that a PolicyStatus tells of."""

    kind: Annotated[str, msgspec.Meta(max_length=63)]
    """Its kind: NetworkPolicy."""
    name: Name
    """Its name; its namespace is the PolicyStatus's own."""
    uid: Annotated[str, msgspec.Meta(max_length=128)]
    """Its UID: one that was deleted and made again is another policy."""
    generation: Count
    """Its `metadata.generation` that `status` tells of. A new one makes a new generation of
    the PolicyStatus, so `status.observedGeneration` and waiting work as for any object."""


class NodeCount(Model, frozen=True):
    """Over the nodes where the policy matters."""

    realised: Count
    """Those where it is in force."""
    total: Count
    """Those where it has to be: nodes with a pod that it selects."""


class PolicyStatusStatus(Model, frozen=True):
    """How far the policy is in force."""

    nodes: NodeCount | UnsetType = UNSET
    """How many nodes have it in force."""
    conditions: list[Condition] = msgspec.field(default_factory=list)
    """`Ready`: in force on every node where it matters. `Reconciling`: not yet.
    `Stalled`: part of it cannot be expressed, or a node cannot realise it."""
    observed_generation: Count | UnsetType = UNSET
    """The PolicyStatus's own `metadata.generation` that this was said of."""


class PolicyStatus(Model, frozen=True):
    """What became of one policy object: in its namespace, named by `policy_status_name`.
    What `kubectl wait --for=condition=Ready` and GitOps tools can wait on."""

    api_version: str
    kind: Literal["PolicyStatus"]
    metadata: Meta
    policy: PolicyTarget
    """The policy object."""
    status: PolicyStatusStatus | UnsetType = UNSET
    """How far it is in force."""


class ClusterPolicyStatus(Model, frozen=True):
    """What became of one cluster-scoped policy object; the twin of PolicyStatus."""

    api_version: str
    kind: Literal["ClusterPolicyStatus"]
    metadata: Meta
    policy: PolicyTarget
    """The policy object."""
    status: PolicyStatusStatus | UnsetType = UNSET
    """How far it is in force."""


StateObject = RuleSet | StateSlice | NodeState | Identity
"""What makes up the desired state; the policy statuses tell of it and are no part of it."""

# ---- Bytes and names ---------------------------------------------------------------

_encoder = msgspec.json.Encoder(order="deterministic")


def encode(value: object) -> bytes:
    """Canonical JSON: equal content, equal bytes."""
    return _encoder.encode(value)


def digest(value: object) -> str:
    """The first 40 hex digits of SHA-256 over the canonical JSON; fits a
    Kubernetes name with room for a prefix."""
    return hashlib.sha256(encode(value)).hexdigest()[:40]


class PeerDigests:
    """Digests of sets of peer sets. Keeps those of single ones, by name, while they are the same
    objects."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[PeerSet, bytes]] = {}

    def of(self, names: Iterable[str], peers: Mapping[str, PeerSet]) -> str:
        """Of those with `names`, of which `peers` has all that there are."""
        found = hashlib.sha256()
        for name in sorted(names):
            item = peers.get(name)
            if item is None:
                continue
            known = self._known.get(name)
            if known is None or known[0] is not item:
                known = self._known[name] = (item, hashlib.sha256(encode(item)).digest())
            found.update(known[1])
        return found.hexdigest()[:40]

    def keep_only(self, peers: Mapping[str, PeerSet]) -> None:
        for name in self._known.keys() - peers.keys():
            del self._known[name]


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


def format_of_rules(spec: RuleSetSpec) -> int:
    """The lowest format that can say it."""
    new = spec.others or any(rule.log for rule in spec.rules) or any(map(_is_newer, spec.terms))
    return NEWEST_FORMAT if new else FORMAT


def _is_newer(term: Term) -> bool:
    return (
        term.action == "Pass"
        or term.audit
        or term.port_name is not UNSET
        or term.protocol in ("ICMP", "ICMPv6")
        or isinstance(term.peer, EntityPeer)
    )


def format_of_peers(sets: Iterable[PeerSet]) -> int:
    """The lowest format that can say all of them."""
    return NEWEST_FORMAT if any(item.cidrs or item.ports for item in sets) else FORMAT


def policy_status_name(kind: str, name: str) -> str:
    """Name of the PolicyStatus of a policy: "networkpolicy.web". A name that would grow
    past what Kubernetes allows is cut and ends in a hash of the whole."""
    whole = f"{kind.lower()}.{name}"
    if len(whole) <= MAX_NAME:
        return whole
    end = hashlib.sha256(whole.encode()).hexdigest()[:16]
    return f"{whole[: MAX_NAME - len(end) - 1].rstrip('.-')}-{end}"


def identity_labels(spec: IdentitySpec) -> dict[str, str]:
    """As people read them: the pods' own first, then system labels without their colon."""
    labels = spec.labels or {}
    ordered = sorted(labels, key=lambda key: (key.startswith(":"), key))
    return {key.removeprefix(":"): labels[key] for key in ordered}


def identity_summary(spec: IdentitySpec) -> str:
    """An identity in words for `status.summary`: "app=web,tier=front,port/TCP/http=80", or its
    CIDRs; cut at 253 characters. No labels: ""."""
    labels = identity_labels(spec)
    whole = ",".join(spec.cidrs or [f"{key}={value}" for key, value in labels.items()])
    return whole if len(whole) <= MAX_NAME else f"{whole[: MAX_NAME - 1]}…"
