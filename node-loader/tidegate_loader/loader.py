"""One node's cycle: state -> maps -> plan -> apply -> read back -> realised.json.

Holds what is known between cycles. No waiting and no signals here (`main`), no
decision about what belongs in a map (`maps`, `plan`).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from msgspec import UNSET, structs
from tidegate_api.state import Condition, NodeStateStatus, PeerDigests
from tidegate_bpf import BpfError, mounts

from tidegate_loader import (
    addresses,
    ahead,
    attach,
    cni,
    datagrams,
    kernel,
    kubeproxy,
    plan,
    uplinks,
    xdp,
)
from tidegate_loader.apply import apply
from tidegate_loader.local import (
    READS_FORMATS,
    LocalInterface,
    NodePaths,
    Realised,
    RealisedEndpoint,
    RealisedFile,
    RealisedRuleSet,
    read_realised,
)
from tidegate_loader.maps import Builder, DesiredMaps, MapsError, State, Uplinks
from tidegate_loader.plan import Actual, NodeEntry
from tidegate_loader.programming import Latency
from tidegate_loader.rules import RuleSetError
from tidegate_loader.source import Source, Stalled

if TYPE_CHECKING:  # an import costs what TLS costs, and on one machine nobody needs it
    from tidegate_loader import health
    from tidegate_loader.mirror import Mirror

MAX_MESSAGE = 4096
"""Characters of a condition's message: the rest repeats itself."""
BESIDE = "what Tidegate serves never reaches it; remove it, and what rules it has left"
UDP = socket.IPPROTO_UDP
AUTO = Path("auto")
"""`--cgroup auto`."""


class Loader:
    """BpfError, OSError at start when programs cannot be loaded or pins not used."""

    def __init__(
        self,
        paths: NodePaths,
        options: argparse.Namespace,
        logger: Any,
        arrivals: cni.Server | None = None,
        api: Mirror | None = None,
    ) -> None:
        """`arrivals`: where pods come from on a cluster; None: who writes interface files
        removes them, too. `api`: who writes objects/ from an API server, and hears of the
        status; None: somebody else does, and reads realised.json."""
        self._arrivals = arrivals
        self._api = api
        self._paths = paths
        self._options = options
        self._log = logger
        self._source = Source(paths, options.node)
        self._builder = Builder()
        self._realised = read_realised(paths.realised) or Realised(node=options.node, epoch=0)
        self._peer_digests = PeerDigests()
        self._file = RealisedFile(paths.realised)
        self._state: State | None = None
        self._kept: State | None = None
        self._desired: DesiredMaps | None = None
        self._kernel: kernel.Kernel | None = None
        self._attached = True
        """Something of ours may be in the kernel; a loader before this one may have left it."""
        self._built_from: State | None = None
        self._health: health.Server | None = None
        self._uplinks = uplinks.Found(frozenset(), Uplinks())
        self._accelerated = options.load_balancer_acceleration != xdp.DISABLED
        self._ways: dict[int, str] = {}
        """Where XDP's program hangs, and how."""
        self._asked: dict[str, LocalInterface] | None = None
        self._gated: dict[str, LocalInterface] = {}
        self._ungated = False
        """An interface is there that could not be gated: its endpoint is in no node table."""
        self._latency = Latency(time.time())
        self._standing: list[str] = []
        self._beside = kubeproxy.traces()
        """Problems of the machine, found at the start."""
        self.waiting = False
        """An interface is named that is not there (yet), or could not be attached to."""
        self.dirty = False
        """Something could not be applied; try again."""
        self.realised_now = False
        """The kernel was equal to the newest complete state when last looked at."""
        if not self._source.is_detached():
            self._start()

    def _start(self) -> None:
        self._attached = True
        self._paths.detached.unlink(missing_ok=True)
        # The kernel verifies programs and reads maps without the interpreter's lock: read the
        # state meanwhile.
        options = self._options
        foresight = ahead.Foresight(self._source, self._builder)
        empty = ahead.Empty(options.pin_dir, foresight, options.force_clsact)
        foresight.start()
        try:
            self._load(foresight, empty)
        finally:
            foresight.join()
            empty.join()

    def _load(self, foresight: ahead.Foresight, empty: ahead.Empty) -> None:
        options = self._options
        programs = attach.Programs(
            options.objects,
            options.pin_dir,
            self._realised.objects,
            self._paths.loaded,
            flow_events=options.flow_events,
            dsr=options.load_balancer_mode == "dsr",
            more=(xdp.OBJECT,) if self._accelerated else (),
            meanwhile=empty.start,
        )
        if self._accelerated and xdp.OBJECT not in programs.specs:
            raise BpfError(2, f"no {xdp.OBJECT} in {options.objects}")
        if "pod.o" not in programs.specs:
            raise BpfError(2, f"no pod.o in {options.objects}")
        layouts = kernel.Layouts(programs.specs["pod.o"])
        self._programs = programs
        self._kernel = kernel.Kernel(options.pin_dir, layouts)
        empty.filled()
        dumped = self._kernel.dump_ipcache()
        foresight.join()
        self._attacher = attach.Attacher(options.pin_dir, programs.programs, options.force_clsact)
        if programs.migrations:
            self._look(foresight, dumped)
            return
        gating = ahead.Gating(self._attacher, foresight)
        if not empty.started:
            gating.start()
        try:
            self._attach_sockets(options.cgroup)
            self._attach_uplinks()
            self._look(foresight, dumped)
        finally:
            if not empty.started:
                gating.join()

    def _try_to_move(self) -> list[str]:
        try:
            self._move()
        except OSError as error:
            self.dirty = True
            return [f"cannot move to maps of another layout: {error}"]
        return []

    def _move(self) -> None:
        """New maps are filled, of other layouts than those in use: carry over what programs
        made, let every hook run the new programs, and carry what the old ones made meanwhile.
        BpfError, OSError: some hooks may run the old ones still, on the old maps."""
        programs = self._programs
        carried = sum(migration.copy() for migration in programs.migrations)
        self._attach_sockets(self._options.cgroup)
        self._attacher.interfaces(self._gated)
        self._attach_uplinks()
        carried += sum(migration.copy() for migration in programs.migrations)
        names = [migration.old.name for migration in programs.migrations]
        programs.migrated()
        self._log.info("moved to maps of another layout", left=names, carried=carried)

    def _look(self, foresight: ahead.Foresight, dumped: tuple[bytes, bytes]) -> None:
        """What the kernel holds; `dumped`: its addresses. Where nothing is in force yet, addresses
        are filled in already: until there is a node table no program looks at them."""
        assert self._kernel is not None
        if self._realised.instance != self._kernel.instance:
            self._realised = Realised(
                node=self._options.node,
                epoch=0,
                instance=self._kernel.instance,
                counters=self._realised.counters,
            )
        names = {int(n): r.name for n, r in self._realised.rule_sets.items()}
        self._actual = self._kernel.actual(self._realised, names, foresight.ipcache, dumped)
        empty = self._actual.node_table is None and not self._actual.ipcache
        if empty and foresight.ipcache and len(foresight.ipcache) <= self._actual.limits.ipcache:
            first = plan.Plan((plan.UpsertIpcache(foresight.ipcache),), (), 0)
            if apply(first, self._kernel, self._actual):
                self._actual = self._kernel.actual(self._realised, names)
        if self._actual.ipcache is foresight.ipcache:
            self._actual.ipcache_parts = foresight.parts
        self._actual.reindex()
        # Without a word of how it ended, the last apply may have missed its bump.
        self._actual.interrupted = self._paths.applying.exists()

    @property
    def detached(self) -> bool:
        """Nothing of ours is in the kernel, as the NodeState wants it."""
        return not self._attached

    @property
    def leaving(self) -> bool:
        """A pod is being taken down, and its interface was still there when last looked at."""
        return self._arrivals is not None and bool(self._arrivals.left())

    def _attach_sockets(self, cgroup: Path | None) -> None:
        if cgroup == AUTO:
            found = mounts.cgroup2()
            if found is None:
                # Packets from pods are still translated one by one.
                self._standing = ["no cgroup2 is mounted: connections of the node's own processes "
                                  "to Services are not balanced"]  # fmt: skip
                return
            cgroup = Path(found)
        if cgroup is not None:
            self._attacher.cgroup(cgroup)

    def _attach_uplinks(self) -> list[str]:
        if "net.o" not in self._programs.specs:
            return []
        problems = self._attacher.uplinks(self._uplinks.interfaces)
        if not self._accelerated:
            xdp.remove(self._options.pin_dir)
            return problems
        found = xdp.attach(
            self._options.pin_dir / "links",
            self._programs.programs[xdp.PROGRAM],
            self._uplinks.interfaces,
            self._options.load_balancer_acceleration,
        )
        if found.ways != self._ways:
            self._log.info("XDP at the uplinks", interfaces=found.ways)
            self._ways = found.ways
        return problems + found.problems

    def _answer_health(self, desired: DesiredMaps) -> list[str]:
        if self._health is None:
            if not desired.health:
                return []
            # What answers over HTTP costs memory: only where a Service asks for it.
            from tidegate_loader import health  # noqa: PLC0415

            self._health = health.Server()
        return self._health.serve(desired.health)

    def _build(self, state: State) -> tuple[DesiredMaps, list[str]]:
        """What the maps should hold, and what of the machine is in the way."""
        desired = self._builder.build(state, self._gated, self._uplinks.uplinks)
        if not desired.outer:
            return desired, []
        try:
            found = uplinks.look(desired.ipcache, desired.networks)
        except OSError as error:
            return desired, [f"the node's addresses and routes cannot be read: {error}"]
        if found.uplinks != self._uplinks.uplinks:
            desired = self._builder.build(state, self._gated, found.uplinks)
        self._uplinks = found
        if not found.interfaces:
            return desired, ["no uplink: no interface has a node's address or the default route"]
        return desired, []

    def close(self) -> None:
        """Close descriptors; everything stays in force."""
        if self._kernel is not None:
            self._kernel.close()
            self._programs.close()

    # -- one cycle ---------------------------------------------------------------

    def cycle(self, look_again: bool = False) -> None:
        """Bring the kernel up to the newest complete state. Never raises for bad input.
        `look_again`: at the interfaces and at every file too, though nothing says that they
        changed."""
        stalled: Stalled | None = None
        try:
            self._read(look_again)
        except Stalled as error:
            stalled = error
        if self._state is not None and self._state.node.spec.mode == "Detached":
            self._detach()
            return
        if self._kernel is None:
            self._start()
        problems = [*self._standing, *self._gate(look_again)]
        if self._state is not None:
            try:
                self._desired, missed = self._build(self._state)
                problems += missed
                self._built_from = self._state
            except (MapsError, RuleSetError) as error:
                stalled = Stalled("Refused", str(error))
        if self._desired is not None:
            problems += self._apply(self._desired)
            if self._desired.outer and not self._programs.migrations:
                problems += self._attach_uplinks()
            problems += self._answer_health(self._desired)
            if self._programs.migrations and not self.dirty:
                problems += self._try_to_move()
        in_force = self._desired is not None and not self.dirty
        if in_force and self._built_from is not None and not self._ungated:
            state = self._built_from
            self._realised = structs.replace(
                self._realised,
                digest=state.digest,
                peer_sets=self._peer_digests.of(state.node.spec.peer_sets, state.peers),
            )
            self._peer_digests.keep_only(state.peers)
        self.realised_now = in_force and stalled is None
        if self.realised_now:
            self._measure()
        self._report(stalled, problems)
        if self.realised_now:
            self._keep()
            if self._api is not None and self._state is not None:
                self._api.realised(self._source.names(self._state))
            if self._arrivals is not None and not self._paths.enforcing.exists():
                self._paths.enforcing.touch()

    def _read(self, look_again: bool) -> None:
        """Take over the newest complete state; at the start of all, the last good one.
        Stalled: it is not the newest. Who writes the files knows which they were; now and then
        all are looked at, as on one machine always: what somebody did to one by hand is found."""
        try:
            with self._whole():
                written = self._api.changes() if self._api is not None else None
                self._state = self._source.state(None if look_again else written)
        except Stalled:
            if self._state is None:
                with contextlib.suppress(Stalled):
                    self._state = self._kept = self._source.last_good()
                    self._log.warning("objects are incomplete, starting from lastgood")
            raise

    def _whole(self) -> contextlib.AbstractContextManager[object]:
        """While in it, objects/ is not half-way between two states."""
        return self._api.guard if self._api is not None else contextlib.nullcontext()

    def _gate(self, look_again: bool) -> list[str]:
        """Attach to the interfaces; `self._gated` are those that endpoints may use."""
        interfaces, problems = self._source.interfaces()
        wanted = self._gateable(interfaces)
        if look_again or self.waiting or self.leaving or wanted != self._asked:
            move = not self._programs.migrations
            gated, unattached = self._attacher.interfaces(wanted, move=move)
            problems = [*problems, *unattached]
            if gated != self._gated:
                self._gated = gated
            self._asked = wanted
            self._ungated = bool(unattached)
            self.waiting = len(gated) < len(wanted)
            if self._arrivals is not None:
                self._forget_gone(self._arrivals, interfaces)
        return problems

    def _gateable(self, interfaces: dict[str, LocalInterface]) -> dict[str, LocalInterface]:
        """Not those of pods that ran before us and that no NodeState names: they would be cut
        off for what is not their fault."""
        if not any(interface.adopted for interface in interfaces.values()):
            return interfaces
        published = self._published()
        return {u: i for u, i in interfaces.items() if not i.adopted or u in published}

    def _forget_gone(self, arrivals: cni.Server, interfaces: Mapping[str, LocalInterface]) -> None:
        """Remove the files of pods that are gone: taken down through the CNI step, or in
        nobody's mind any more (they went while no loader was there to be told)."""
        left = arrivals.left()
        wanted = self._published()
        for uid, interface in interfaces.items():
            known = self._state is None or uid in wanted
            if uid not in self._gated and (uid in left or not known) and _is_gone(interface):
                arrivals.forget(interface)
        arrivals.keep_left(frozenset(interfaces))

    def _published(self) -> frozenset[str]:
        if self._state is None:
            return frozenset()
        return frozenset(endpoint.uid for endpoint in self._state.node.spec.endpoints)

    def _apply(self, desired: DesiredMaps) -> list[str]:
        """What went wrong. `self.dirty`: the kernel is not equal to `desired`."""
        assert self._kernel is not None
        actual = self._actual
        actual.wake(kernel.now())
        made = plan.plan(desired, actual)
        counters = structs.replace(self._realised.counters, left_out=made.left_out)
        self._realised = structs.replace(self._realised, counters=counters)
        errors: list[str] = []
        if made.steps:
            self._paths.applying.touch()
            errors = apply(made, self._kernel, actual)
            if errors:
                self._actual = actual = self._read_back()
            left = plan.plan(desired, actual)
            self.dirty = bool(errors or left.steps)
            # What was removed may have made room for what was left out: once more.
            if left.steps and not errors and not made.left_out:
                errors.append(f"{len(left.steps)} steps are left after applying")
                self._actual = actual = self._read_back()
            self._count(made)
            self._let_go(made)
        else:
            self.dirty = False
        if not self.dirty and not made.left_out:
            actual.ipcache_parts, actual.service_parts = desired.ipcache, desired.services
        return [*desired.problems, *made.problems, *errors]

    def _measure(self) -> None:
        if self._state is None:
            return
        self._latency.realised(self._state.services, time.time())
        figures = self._latency.figures
        if figures is not None and figures != self._realised.programming:
            self._realised = structs.replace(self._realised, programming=figures)

    def _let_go(self, made: plan.Plan) -> None:
        """Of backends that are gone, the node's own sockets for datagrams. Where the kernel cannot
        do it nothing is wrong: `tidegate doctor` says so."""
        freed = [s for s in made.steps if isinstance(s, plan.FreeBackends)]
        gone = [b.key[:2] for step in freed for b in step.entries.values() if b.key[2] == UDP]
        if not gone or self._kernel is None:
            return
        try:
            count = datagrams.destroy(gone, self._kernel.asked_for_service)
        except OSError as error:
            self._log.debug("sockets stay with backends that are gone", error=str(error))
            return
        if count:
            self._log.info("sockets have lost their backend", destroyed=count)

    def _count(self, made: plan.Plan) -> None:
        switched = any(isinstance(step, plan.SwitchNodeTable) for step in made.steps)
        self._counters(switches=int(switched))
        self._log.info(
            "applied",
            steps=[type(step).__name__ for step in made.steps],
            epoch=self._actual.epoch,
            dirty=self.dirty,
        )

    def _counters(self, drift: int = 0, switches: int = 0) -> None:
        held = self._realised.counters
        counters = structs.replace(
            held, drift=held.drift + drift, switches=held.switches + switches
        )
        self._realised = structs.replace(self._realised, counters=counters)

    def _read_back(self) -> Actual:
        assert self._kernel is not None
        names = {number: r.name for number, r in self._actual.rule_sets.items()}
        found = self._kernel.actual(None, names, self._actual.ipcache)
        found.uids = self._actual.uids
        found.resting = self._actual.resting
        found.interrupted = self._actual.interrupted
        found.reindex()
        return found

    def verify(self) -> None:
        """Read everything back, repair what changed behind our back, count it. Also looks around:
        who else serves Services here."""
        if self._kernel is None:
            return
        self._beside = kubeproxy.traces()
        found = self._read_back()
        drift = 0 if self.dirty else plan.drift(self._actual, found)
        self._actual = found
        if drift:
            self._log.warning("entries changed behind the loader's back", entries=drift)
            self._counters(drift=drift)
            # Flows may have been judged by what was there.
            found.interrupted = True
        self.cycle(look_again=True)

    def _detach(self) -> None:
        if self._attached:
            self.close()
            self._kernel, self._attached = None, False
            interfaces, _ = self._source.interfaces()
            self._paths.enforcing.unlink(missing_ok=True)
            self._paths.detached.touch()
            attach.detach(self._options.pin_dir, [i.ifindex for i in interfaces.values()])
            self._log.warning("detached: nothing of this node is enforced")
        self._desired, self._built_from = None, None
        self._asked, self._gated, self.waiting = None, {}, False
        self._builder = Builder()
        self.realised_now = True
        self._realised = Realised(
            node=self._options.node,
            epoch=0,
            counters=self._realised.counters,
            digest=self._state.digest if self._state is not None else UNSET,
        )
        self._report(None, [])
        self._keep()  # or a restart without objects would enforce what was last good

    # -- telling -------------------------------------------------------------------

    def _keep(self) -> None:
        if self._state is None or self._state is self._kept:
            return
        try:
            with self._whole():
                self._source.keep(self._state)
            self._kept = self._state
        except OSError as error:  # replaced while it was copied: the next event does it
            self._log.warning("lastgood not written", error=str(error))

    def _report(self, stalled: Stalled | None, problems: list[str]) -> None:
        held = self._realised
        desired = self._desired
        actual = self._actual if self._kernel is not None else None
        entries = actual.node_table if actual is not None else None
        table = {e.id: e for e in (entries or {}).values()}
        status = NodeStateStatus(
            realised=held.digest,
            peer_sets=held.peer_sets,
            endpoints=len(table),
            drift=held.counters.drift,
            formats=list(READS_FORMATS),
            conditions=self._conditions(stalled, problems),
            observed_generation=self._source.generation,
        )
        names = desired.service_names if desired is not None else {}
        self._realised = structs.replace(
            held,
            epoch=actual.epoch if actual else 0,
            endpoints=_endpoints(actual, table, desired) if actual else {},
            rule_sets=_rule_sets(actual) if actual else {},
            services=names,
            objects=self._programs.hashes if actual else {},
            status=status,
        )
        self._write()
        self._tell(status)
        if self._api is not None:
            self._api.report(status)

    def _tell(self, status: NodeStateStatus) -> None:
        """Pods that wait for their policy learn whether it is in force."""
        if self._arrivals is None:
            return
        wrong = [
            c.message for c in status.conditions if (c.type == "Ready") != (c.status == "True")
        ]
        in_force = cni.InForce(
            endpoints={uid: e.ifindex for uid, e in self._realised.endpoints.items()},
            published=self._published(),
            message="; ".join(filter(None, wrong)),
            detached=self._kernel is None,
        )
        self._arrivals.tell(in_force)

    def _write(self) -> None:
        self._file.write(self._realised)
        if not self.dirty:
            self._paths.applying.unlink(missing_ok=True)

    def _conditions(self, stalled: Stalled | None, problems: list[str]) -> list[Condition]:
        before = {c.type: c for c in self._realised.status.conditions}
        ready, reason = self.realised_now and not problems, "Realised"
        message = "the kernel holds the desired state"
        if problems:
            reason, message = "Problems", "; ".join(problems[: plan.MAX_PROBLEMS])
        elif not self.realised_now:
            reason, message = "Pending", "the desired state is not in force yet"
        elif self._desired is not None and self._desired.pending:
            message += f"; {len(self._desired.pending)} endpoints wait for their interface"
        said = [("Ready", ready, reason, message)]
        if self._beside:
            text = (
                f"kube-proxy serves Services on this node too: {', '.join(self._beside)}; {BESIDE}"
            )
            said.append(("KubeProxy", True, "Beside", text))
        # Of these two people and tools expect to be there only while they are true.
        if stalled is not None:
            said.append(("Stalled", True, stalled.reason, str(stalled)))
        elif not self.realised_now:
            said.append(("Reconciling", True, reason, message))
        found = []
        for kind, on, why, text in said:
            status: Literal["True", "False"] = "True" if on else "False"
            old = before.get(kind)
            since = old.last_transition_time if old and old.status == status else _timestamp()
            found.append(
                Condition(
                    type=kind,
                    status=status,
                    reason=why,
                    message=text[:MAX_MESSAGE],
                    last_transition_time=since,
                    observed_generation=self._source.generation,
                )
            )
        return found


def _is_gone(interface: LocalInterface) -> bool:
    try:
        return socket.if_nametoindex(interface.ifname) != interface.ifindex
    except OSError:
        return True


def _timestamp() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _endpoints(
    actual: Actual, table: Mapping[int, NodeEntry], desired: DesiredMaps | None
) -> dict[str, RealisedEndpoint]:
    """By UID; those in force that the desired state still names."""
    found = {}
    for endpoint in desired.endpoints if desired is not None else ():
        entry = table.get(actual.uids.get(endpoint.uid, -1))
        if entry is None:
            continue
        found[endpoint.uid] = RealisedEndpoint(
            id=entry.id,
            ifindex=entry.ifindex,
            half_open=entry.half_open,
            namespace=endpoint.namespace,
            name=endpoint.name,
            identity=entry.identity,
            addresses=[addresses.text(a) for a in (entry.ip4, entry.ip6) if a != addresses.ZERO],
            ingress=entry.ingress.rule_set if entry.ingress else UNSET,
            egress=entry.egress.rule_set if entry.egress else UNSET,
        )
    return found


def _rule_sets(actual: Actual) -> dict[str, RealisedRuleSet]:
    return {
        str(number): RealisedRuleSet(name=r.name, content=r.content, slot=r.slot)
        for number, r in actual.rule_sets.items()
        if r.slot is not None
    }
