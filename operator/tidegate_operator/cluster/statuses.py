"""What people read: PolicyStatus, Identity.status, events, and the taint of nodes that wait.

Behind the runner, on a thread of its own: telling never holds up publishing. Everything is
written only when it changes; what is compared with is what the API server holds, so a restart
repeats nothing. Only the leader writes.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog
from msgspec import UNSET
from tidegate_api import API_VERSION
from tidegate_api.state import (
    DIGEST_ANNOTATION,
    ClusterPolicyStatus,
    Condition,
    Identity,
    IdentitySpec,
    IdentityStatus,
    Meta,
    NodeCount,
    OwnerReference,
    PeerDigests,
    PolicyStatus,
    PolicyStatusStatus,
    PolicyTarget,
    encode,
    identity_summary,
    policy_status_name,
)
from tidegate_kube import (
    AlreadyExists,
    Client,
    Conflict,
    Invalid,
    KubeError,
    NotFound,
    Reflector,
    resources,
)

from tidegate_operator.cluster import formats
from tidegate_operator.cluster.conditions import (
    Said,
    conditions,
    named,
    now_text,
    of_policy,
    stalled_nodes,
)
from tidegate_operator.cluster.events import API_VERSIONS, Events
from tidegate_operator.cluster.kinds import NOT_READY_TAINT, Held, PolicyFacts, UserIdentityFacts
from tidegate_operator.cluster.lead import Lead, term_of
from tidegate_operator.cluster.metrics import Metrics
from tidegate_operator.cluster.progress import PolicyKey, Progress, policies_on_nodes
from tidegate_operator.cluster.reports import SILENT_SECONDS, Reports
from tidegate_operator.cluster.runner import Published
from tidegate_operator.cluster.watches import Watches
from tidegate_operator.cluster.world import every_policy
from tidegate_operator.leader import NotLeader
from tidegate_operator.objects import IdentityKey, ObjectName, Pod, PolicyName
from tidegate_operator.problems import Problem
from tidegate_operator.relevance import label_sets

PAUSE_SECONDS = 0.2
"""Between two rounds, so that a burst of reports is one."""
IDLE_SECONDS = 10.0
POLICY_SECONDS = 1.0
"""The least time between two writes of one PolicyStatus that is as ready as it was."""
IDENTITY_SECONDS = 5.0
"""The least time between two looks at identities: they count pods, and no pod is worth a
write of its own."""
RETRY_SECONDS = 2.0
HELD_SECONDS = 10.0
"""How long numbers are kept apart before it is said whose fault it is."""
APART = (
    "no policy tells its pods from others any more; it goes when {} has in force what is "
    "published, or has not reported for {:.0f} minutes"
)
DELAYS = (
    "the node does not have in force what is published; identities that no policy tells apart any "
    "more are kept apart until it has"
)
STOP_SECONDS = 1.0

CLUSTER_KINDS = ("ClusterNetworkPolicy",)
"""Policies of the cluster: what became of them is in a ClusterPolicyStatus."""

log = structlog.get_logger()


# ---- Twins ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Twin:
    """The kind of status for policies of namespaces, or for those of the cluster."""

    cluster: bool
    held: Reflector[Any]

    @property
    def kind(self) -> str:
        return self.held.resource.kind

    def make(self, meta: Meta, target: PolicyTarget) -> PolicyStatus | ClusterPolicyStatus:
        if self.cluster:
            return ClusterPolicyStatus(
                api_version=API_VERSION, kind="ClusterPolicyStatus", metadata=meta, policy=target
            )
        return PolicyStatus(
            api_version=API_VERSION, kind="PolicyStatus", metadata=meta, policy=target
        )


# ---- The thread ------------------------------------------------------------------------------


class Statuses:
    """`published` and `poke` may be called from any thread."""

    def __init__(
        self,
        client: Client,
        watches: Watches,
        lead: Lead,
        metrics: Metrics,
        taint: bool = False,
        reports: Reports | None = None,
    ) -> None:
        """`taint`: also put the taint on nodes that never had a state in force. `reports`: shared
        with who waits for nodes."""
        self._reports = reports or Reports()
        self._client = client
        self._watches = watches
        self._lead = lead
        self._metrics = metrics
        self._taint = taint
        self._events = Events(client)
        self._progress = Progress()
        self._twins = (
            _Twin(False, watches.policy_statuses),
            _Twin(True, watches.cluster_policy_statuses),
        )
        self._thread = threading.Thread(target=self._run, name="statuses", daemon=True)
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._latest: Published | None = None
        self._policies: dict[PolicyKey, frozenset[str]] = {}
        self._problems: dict[str, list[Problem]] = {}
        self._unread: dict[str, str] = {}
        """Node → why its loader cannot read what is published for it."""
        self._why: dict[str, str] = {}
        """Node → why it stays behind: the same, or what its loader says."""
        self._silent: frozenset[str] = frozenset()
        self._behind: list[str] = []
        """Living nodes that lack what was published."""
        self._digests = PeerDigests()
        self._digests_of: Published | None = None
        self._held_since: float | None = None
        """Since when numbers are kept apart that no policy needs apart."""
        self._apart: frozenset[IdentityKey] = frozenset()
        """What would go if no node were behind; once that has lasted."""
        self._arrived: list[tuple[int, float]] = []
        self._written: dict[object, float] = {}
        self._looked = -IDENTITY_SECONDS
        self._sets: Mapping[IdentityKey, int] = {}
        self._sets_of: Mapping[ObjectName, Pod] = {}

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def poke(self) -> None:
        self._wake.set()

    def published(self, what: Published) -> None:
        """In the runner's thread, and so cheap."""
        with self._lock:
            digests = {
                name: _digest(item)
                for (_, name), item in self._watches.node_states.snapshot().items()
                if isinstance(item, Held)
            }
            self._latest = what
            self._policies = policies_on_nodes(what)
            self._progress.published(digests, self._policies)
            if what.changed:
                self._arrived.append((self._progress.number, what.arrived))
        self._wake.set()

    def _run(self) -> None:
        pause = IDLE_SECONDS
        while not self._stopping.is_set():
            self._wake.wait(pause)
            if self._stopping.is_set():
                return
            self._wake.clear()
            try:
                pause = self._round()
            except NotLeader:
                pause = IDLE_SECONDS
            except KubeError as error:
                log.warning("cannot write statuses, trying again", error=str(error))
                pause = RETRY_SECONDS
            except Exception:  # a fault of ours: said; publishing goes on without
                log.exception("statuses failed")
                pause = RETRY_SECONDS
            self._stopping.wait(PAUSE_SECONDS)

    def _round(self) -> float:
        """Write what differs; seconds until something that must wait is due."""
        self._watch_nodes()
        with self._lock:
            what = self._latest
        if what is None or term_of(self._lead) is None:
            return IDLE_SECONDS
        self._problems = {}
        for problem in what.problems:
            self._problems.setdefault(problem.object, []).append(problem)
        watches = self._watches
        states = watches.node_states.snapshot()
        self._unread = formats.unread(
            states,
            watches.rule_sets.snapshot(),
            watches.state_slices.snapshot(),
        )
        self._why = {**stalled_nodes(states), **self._unread}
        due = [self._nodes(), self._policy_statuses(what), self._identities(what)]
        nodes = self._watches.nodes.snapshot()
        self._events.nodes("FormatNotRead", self._unread, nodes, self._lead.check)
        delays = dict.fromkeys(self._behind, DELAYS) if self._apart else {}
        self._events.nodes("DelaysMerge", delays, nodes, self._lead.check)
        self._events.services(what.problems, what.world.snapshot.services, self._lead.check)
        self._written = {
            key: when
            for key, when in self._written.items()
            if time.monotonic() - when < POLICY_SECONDS
        }
        return min(due)

    def _watch_nodes(self) -> None:
        """Take over what nodes report; measure what has come to be in force everywhere."""
        nodes = self._watches.node_states
        states, in_touch = nodes.snapshot(), nodes.health().failing_since is None
        self._silent = self._reports.silent(states, in_touch)
        self._behind = self._reports.lagging(states, in_touch)
        self._metrics.nodes.labels("silent").set(len(self._silent))
        self._metrics.nodes.labels("behind").set(len(self._behind))
        reported = {
            name: item.item.status
            for (_, name), item in states.items()
            if isinstance(item, Held) and item.item.status is not UNSET
        }
        peers = {
            name: status.peer_sets
            for name, status in reported.items()
            if status.peer_sets is not UNSET and name not in self._silent
        }
        with self._lock:
            what = self._latest
        wanted = self._wanted_peers(what)
        with self._lock:
            now = time.monotonic()
            if wanted is not None:
                self._progress.peers(wanted, now)
            digests = {name: status.realised or "" for name, status in reported.items()}
            self._progress.realised(digests, self._silent)
            self._progress.realised_peers(peers, now)
            reached = self._progress.everywhere()
            done = [arrived for number, arrived in self._arrived if number <= reached]
            self._arrived = [item for item in self._arrived if item[0] > reached]
        for arrived in done:
            self._metrics.realised_seconds.observe(now - arrived)

    def _wanted_peers(self, what: Published | None) -> dict[str, str] | None:
        """Node → digest of the peer sets that it names; None: those of the last time."""
        if what is None or what is self._digests_of:
            return None
        self._digests_of, peers = what, what.desired.peers
        self._digests.keep_only(peers)
        return {
            name: self._digests.of(content.peer_sets, peers)
            for name, content in what.desired.nodes.items()
        }

    def _due(self, key: object, least: float) -> float:
        """Seconds until `key` may be written again; 0: now."""
        last = self._written.get(key)
        return 0.0 if last is None else max(0.0, last + least - time.monotonic())

    def _send(
        self, key: object, about: tuple[str, str, int], request: Callable[[float], bytes]
    ) -> bytes | None:
        """The answer; None: somebody was faster, and the next round will see it. `about`: verb,
        kind and bytes, for the metrics."""
        left = self._lead.check()
        try:
            answer = request(min(left, 10.0))
        except (Conflict, NotFound, AlreadyExists):
            return None
        except Invalid as error:
            log.warning("a status was refused", object=str(key), error=str(error))
            answer = None
        self._written[key] = time.monotonic()
        if answer is not None:
            self._metrics.written(*about)
        return answer

    # ---- nodes ----

    def _nodes(self) -> float:
        """The taint goes when the node has a state in force."""
        states = self._watches.node_states.snapshot()
        for (_, name), node in self._watches.nodes.snapshot().items():
            held = states.get(("", name))
            status = held.item.status if isinstance(held, Held) else UNSET
            steps: list[dict[str, Any]]
            ready = status is not UNSET and bool(status.realised)
            if ready and node.taint is not None:
                path = f"/spec/taints/{node.taint}"
                steps = [
                    {"op": "test", "path": f"{path}/key", "value": NOT_READY_TAINT},
                    {"op": "remove", "path": path},
                ]
            elif self._taint and not ready and node.taint is None and node.linux:
                taint = {"key": NOT_READY_TAINT, "effect": "NoSchedule"}
                steps = (
                    [{"op": "add", "path": "/spec/taints/-", "value": taint}]
                    if node.taints
                    else [
                        {"op": "test", "path": "/spec/taints", "value": None},
                        {"op": "add", "path": "/spec/taints", "value": [taint]},
                    ]
                )
            else:
                continue
            if self._due(("node", name), POLICY_SECONDS):
                continue
            body = msgspec.json.encode(steps)
            self._send(
                ("node", name),
                ("patch", "Node", len(body)),
                lambda left, name=name, body=body: self._client.patch(  # type: ignore[misc]
                    resources.NODES, name, body, kind="json", timeout=left
                ),
            )
        return IDLE_SECONDS

    # ---- policies ----

    def _policy_statuses(self, what: Published) -> float:
        return min(self._policy_statuses_of(what, twin) for twin in self._twins)

    def _policy_statuses_of(self, what: Published, twin: _Twin) -> float:
        if not twin.held.synced:
            return RETRY_SECONDS
        there = twin.held.snapshot()
        wanted: set[tuple[str, str]] = set()
        due = IDLE_SECONDS
        for policy, facts in every_policy(what.world.snapshot):
            if (policy.kind in CLUSTER_KINDS) != twin.cluster:
                continue
            name = (policy.namespace, policy_status_name(policy.kind, policy.name))
            wanted.add(name)
            due = min(due, self._policy(twin, policy, facts, name, there.get(name)))
        for name, item in there.items():
            if name not in wanted:
                self._send(
                    name,
                    ("delete", twin.kind, 0),
                    lambda left, at=name, item=item: self._client.delete(  # type: ignore[misc]
                        twin.held.resource, at[1], at[0], uid=item.uid, timeout=left
                    ),
                )
        return due

    def _policy(
        self,
        twin: _Twin,
        policy: PolicyName,
        facts: PolicyFacts,
        name: tuple[str, str],
        held: Any,
    ) -> float:
        """Seconds until this one is due again."""
        target = PolicyTarget(
            kind=policy.kind,
            name=policy.name,
            uid=facts.target.uid,
            generation=facts.target.generation,
        )
        there: PolicyStatus | ClusterPolicyStatus | None = (
            held.item if isinstance(held, Held) else None
        )
        if there is None or there.policy != target:
            there = self._policy_object(twin, name, target, held)
            if there is None:
                return RETRY_SECONDS
        problems = self._problems.get(str(policy), [])
        with self._lock:
            standing = self._progress.of((policy, target.uid, target.generation))
        count = standing.count
        why = next((self._why[name] for name in standing.behind if name in self._why), "")
        before = there.status if there.status is not UNSET else PolicyStatusStatus()
        generation = there.metadata.generation or 0
        status = PolicyStatusStatus(
            nodes=NodeCount(realised=count.realised, total=count.total),
            conditions=conditions(
                of_policy(standing, problems, why), before.conditions, generation, now_text()
            ),
            observed_generation=generation,
        )
        if status == before:
            return IDLE_SECONDS
        turned = _is_ready(before.conditions) != _is_ready(status.conditions)
        wait = 0.0 if turned else self._due(name, POLICY_SECONDS)
        if wait:
            return wait
        body = encode(
            msgspec.structs.replace(there, metadata=_addressed(there.metadata), status=status)
        )
        answer = self._send(
            name,
            ("status", twin.kind, len(body)),
            lambda left: self._client.update(
                twin.held.resource, name[1], body, name[0], "status", timeout=left
            ),
        )
        if answer is not None:
            twin.held.remember(answer)
            self._events.policy(policy, facts.target.uid, before, status, self._lead.check)
        return IDLE_SECONDS

    def _policy_object(
        self, twin: _Twin, name: tuple[str, str], target: PolicyTarget, held: Any
    ) -> PolicyStatus | ClusterPolicyStatus | None:
        """Create it, or make it tell of the policy's present generation."""
        owner = OwnerReference(
            api_version=API_VERSIONS[target.kind],
            kind=target.kind,
            name=target.name,
            uid=target.uid,
        )
        item = twin.make(
            Meta(
                name=name[1],
                namespace=name[0] or UNSET,
                owner_references=[owner],
                resource_version=UNSET if held is None else held.version,
            ),
            target,
        )
        body = encode(item)
        resource = twin.held.resource
        answer = self._send(
            ("policy", name),
            ("create" if held is None else "update", twin.kind, len(body)),
            lambda left: (
                self._client.create(resource, body, name[0], timeout=left)
                if held is None
                else self._client.update(resource, name[1], body, name[0], timeout=left)
            ),
        )
        if answer is None:
            return None
        twin.held.remember(answer)
        return msgspec.json.decode(answer, type=type(item))

    # ---- identities ----

    def _identities(self, what: Published) -> float:
        wait = self._looked + IDENTITY_SECONDS - time.monotonic()
        if wait > 0:
            return wait
        self._looked = time.monotonic()
        counts = Counter(pod.identity for pod in what.world.pods.values() if not pod.host_network)
        if what.world.pods is not self._sets_of:
            self._sets_of, self._sets = what.world.pods, label_sets(what.world)
            saved = sum(self._sets.values()) - len(self._sets)
            self._metrics.identities.labels("saved").set(saved)
        self._apart = self._kept_apart(what)
        for (_, name), held in self._watches.identities.snapshot().items():
            if isinstance(held, Held):
                item: Identity = held.item
                key = IdentityKey(
                    item.spec.namespace or "",
                    tuple(sorted((item.spec.labels or {}).items())),
                    tuple(item.spec.cidrs or ()),
                )
                held_up = ""
                if key in self._apart:
                    held_up = APART.format(named(self._behind), SILENT_SECONDS / 60)
                count = (counts[key], self._sets.get(key, 0))
                self._identity(name, item, int(name), count, held_up=held_up)
            elif isinstance(held, UserIdentityFacts):
                made = what.world.identities.get(name)
                number = what.ledger.live.get(made.key) if made is not None else None
                reason = what.world.stalled.get(name, "")
                count = (counts[made.key], self._sets.get(made.key, 0)) if made else (0, 0)
                item = _as_identity(name, held)
                self._identity(name, item, number, count, reason)
        return IDENTITY_SECONDS

    def _kept_apart(self, what: Published) -> frozenset[IdentityKey]:
        now, world = time.monotonic(), what.world
        if world.relevance == world.asked or not self._behind:
            self._held_since = None
            return frozenset()
        if self._held_since is None:
            self._held_since = now
        if now - self._held_since < HELD_SECONDS:
            return frozenset()
        return frozenset(
            pod.identity
            for pod in world.pods.values()
            if not pod.host_network
            and world.asked.key(pod.namespace, pod.labels, pod.ports) != pod.identity
        )

    def _identity(
        self,
        name: str,
        item: Identity,
        number: int | None,
        counts: tuple[int, int],
        stalled: str = "",
        held_up: str = "",
    ) -> None:
        """`counts`: pods that have it, and their sets of labels. `held_up`: why it is still
        there."""
        if number is None and not stalled:
            return  # not published yet
        before = item.status if item.status is not UNSET else IdentityStatus()
        generation = item.metadata.generation or 0
        said = [Said("Ready", True, "Published", "every node knows the number")]
        if stalled:
            said = [
                Said("Ready", False, "Stalled", stalled),
                Said("Stalled", True, "Clash", stalled),
            ]
        if held_up:
            said.append(Said("HeldApart", True, "NodeBehind", held_up))
        status = IdentityStatus(
            id=UNSET if number is None else number,
            summary=identity_summary(item.spec),
            endpoints=counts[0],
            label_sets=counts[1],
            conditions=conditions(said, before.conditions, generation, now_text()),
            observed_generation=generation,
        )
        if status == before:
            return
        body = encode(
            msgspec.structs.replace(item, metadata=_addressed(item.metadata), status=status)
        )
        answer = self._send(
            ("identity", name),
            ("status", "Identity", len(body)),
            lambda left: self._client.update(
                resources.IDENTITIES, name, body, subresource="status", timeout=left
            ),
        )
        if answer is not None:
            self._watches.identities.remember(answer)


def _is_ready(found: Iterable[Condition]) -> bool:
    return any(item.type == "Ready" and item.status == "True" for item in found)


def _digest(held: Held[Any]) -> str:
    return str((held.item.metadata.annotations or {}).get(DIGEST_ANNOTATION, ""))


def _addressed(meta: Meta) -> Meta:
    """What an update of a status needs to say of the object."""
    return Meta(
        name=meta.name,
        namespace=meta.namespace,
        resource_version=meta.resource_version,
        uid=meta.uid,
    )


def _as_identity(name: str, facts: UserIdentityFacts) -> Identity:
    spec = facts.spec
    return Identity(
        api_version=API_VERSION,
        kind="Identity",
        metadata=Meta(name=name, uid=facts.target.uid, generation=facts.target.generation,
                      resource_version=facts.version),
        spec=IdentitySpec(
            namespace=UNSET if spec.namespace is None else spec.namespace,
            labels=UNSET if spec.labels is None else spec.labels,
            cidrs=UNSET if spec.cidrs is None else spec.cidrs,
        ),
        status=facts.status,
    )  # fmt: skip
