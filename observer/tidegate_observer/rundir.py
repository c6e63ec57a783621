"""A Directory from a node's files: a run directory of `tidegate up`, or of a loader on a cluster.

`objects/` (addresses, rule sets, Services) and the node's `realised.json` (ids) and `interfaces/`,
and People for who has the addresses. Files are read again only where they changed. Reads only.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET
from msgspec.structs import replace
from tidegate_api.state import Reserved, RuleSet, StateSlice

from tidegate_observer.cgroups import Cgroups
from tidegate_observer.directory import Directory, reserved_labels
from tidegate_observer.flow import SCTP, TCP, UDP, End, FrontendKey, Service, address_bytes
from tidegate_observer.people import Files, People, Pod, PodKey, RunDirPeople, objects_in

WAIT_SECONDS = {"address": 0.5, "cgroup": 0.5, "rule set": 5.0}
"""How long a batch of records waits for the file that names what it speaks of: whoever made it
true writes it down a moment later, and on a node that is busy later than that. An address may be
of somebody who is never named, and so may a cgroup; a rule set in force always is. Not while so
many records wait behind it that some would be lost."""
STEP_SECONDS = 0.01
REREAD_SECONDS = 0.1
"""How often the files are read again for what is not known, once there is no more waiting:
strangers by the thousand must not make the observer read files by the thousand."""
UNKNOWN_SECONDS = 10.0
"""For how long a number that nobody explained is not asked for again."""
MAX_UNKNOWN = 4096
SETTLED_NS = 10**9

PROTOCOLS = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP}

K = TypeVar("K")


class _Endpoint(msgspec.Struct, frozen=True):
    id: int
    namespace: str
    name: str
    identity: int
    addresses: list[str] = []
    ingress: int = 0
    """Its rule set in that direction; 0: none."""
    egress: int = 0


class _RuleSet(msgspec.Struct, frozen=True):
    name: str


class _Interface(msgspec.Struct, frozen=True):
    """A file of nodes/NODE/interfaces: the node's end of a pod's pair."""

    ifname: str
    ifindex: int


class Programming(msgspec.Struct, frozen=True):
    counts: list[int] = []
    seconds: float = 0.0


class _Realised(msgspec.Struct, frozen=True, rename="camel"):
    """What realised.json says that matters here; other members pass."""

    endpoints: dict[str, _Endpoint] = {}
    rule_sets: dict[str, _RuleSet] = {}
    programming: Programming = Programming()


class RunDirSource:
    """Keeps `directory` as the files say. Not thread-safe: one thread refreshes and looks up."""

    def __init__(
        self,
        run_dir: Path,
        node: str,
        objects: Path | None = None,
        people: People | None = None,
        cgroup: Path | None = None,
        *,
        in_node: bool = False,
    ) -> None:
        """`objects`: where rulesets/ and stateslices/ are; default: the run directory's, as is
        `people`. `cgroup`: cgroup2, to know pods in the node's network by. `in_node`: this
        process is in the node's network, and knows its interfaces itself."""
        self.node = node
        self.directory = Directory(self._missing)
        self.pods_known = 0
        self._objects = objects or run_dir / "objects"
        self._people = people or RunDirPeople(run_dir, self._objects)
        self._realised = run_dir / "nodes" / node / "realised.json"
        self._files = Files()
        self._pods: Mapping[PodKey, Pod] = {}
        self._ids: _Realised = _Realised()
        self._identity_of: dict[str, int] = {}
        self._slices: dict[str, StateSlice] = {}
        self._facts: tuple[dict[bytes, int], dict[FrontendKey, Service]] = {}, {}
        self._rule_sets: dict[str, RuleSet] = {}
        self._cgroups = Cgroups(cgroup)
        self._interfaces = run_dir / "nodes" / node / "interfaces"
        self._interfaces_seen = 0
        self._in_node = in_node
        self._links: dict[int, str] = {}
        """The node's own, by index."""
        self._interface_of: dict[Path, _Interface] = {}
        self.hurry: Callable[[], bool] = lambda: False
        """Whether there is no time to wait for a name; set from outside."""
        self._unknown: dict[tuple[str, bytes | int], float] = {}
        self._waited = dict.fromkeys(WAIT_SECONDS, -UNKNOWN_SECONDS)
        self._reread = -REREAD_SECONDS

    @property
    def programming(self) -> Programming:
        """Network programming latency, as the node's loader has measured it."""
        return self._ids.programming

    def enforcement(self) -> list[str]:
        """Of each endpoint in force: in which directions policies select it."""
        words = {(False, False): "none", (True, False): "ingress", (False, True): "egress"}
        ends = self._ids.endpoints.values()
        return [words.get((end.ingress > 0, end.egress > 0), "both") for end in ends]

    # ---- reading -------------------------------------------------------------------

    def refresh(self) -> bool:
        """Reads what changed; whether anything did."""
        people = self._people.fresh()
        self._read_interfaces()
        realised = self._files.fresh(self._realised, _Realised)
        slices = self._read_slices()
        if slices:
            self._facts = self._read_facts()
        if people:
            self._pods = self._people.pods
            self.directory.identities = dict(self._people.identities)
        if realised is not None:
            self._ids = realised
            self._read_rule_sets()
        if not (people or realised is not None or slices):
            return False
        self._fill()
        return True

    def _read_slices(self) -> bool:
        before = dict(self._slices)
        seen = set()
        for path in objects_in(self._objects / "stateslices"):
            seen.add(path.stem)
            item = self._files.fresh(path, StateSlice)
            if item is not None:
                self._slices[path.stem] = item
        for gone in self._slices.keys() - seen:
            del self._slices[gone]
            self._files.forget(self._objects / "stateslices" / f"{gone}.json")
        return before != self._slices

    def _read_interfaces(self) -> None:
        """Each file is written once and renamed into place: the directory tells when to look."""
        try:
            stamp = os.stat(self._interfaces).st_mtime_ns
        except FileNotFoundError:
            stamp = 0
        if stamp == self._interfaces_seen:
            return
        # What changed just now may change again within one tick of the file system's clock.
        self._interfaces_seen = stamp if time.time_ns() - stamp > SETTLED_NS else 0
        held, self._interface_of = self._interface_of, {}
        for path in objects_in(self._interfaces):
            item = self._files.fresh(path, _Interface) or held.get(path)
            if item is not None:
                self._interface_of[path] = item
        for gone in held.keys() - self._interface_of.keys():
            self._files.forget(gone)
        found = {item.ifindex: item.ifname for item in self._interface_of.values()}
        self.directory.interfaces = self._links | found

    def _interface(self, index: int) -> bool:
        """A pod's is written down before it carries anything: that is not waited for."""
        self._read_interfaces()
        if index not in self.directory.interfaces and self._in_node:
            with contextlib.suppress(OSError):
                self._links[index] = socket.if_indextoname(index)
                self.directory.interfaces = {**self.directory.interfaces, **self._links}
        return index in self.directory.interfaces

    def _read_rule_sets(self) -> None:
        wanted = {int(number): item.name for number, item in self._ids.rule_sets.items()}
        sets = self.directory.rule_sets
        for number, name in wanted.items():
            if number in sets:
                continue
            item = self._rule_sets.get(name) or self._files.fresh(
                self._objects / "rulesets" / f"{name}.json", RuleSet
            )
            if item is not None:
                self._rule_sets[name] = sets[number] = item
        self.directory.in_force(wanted)
        kept = set(wanted.values())
        for name in [n for n in self._rule_sets if n not in kept]:
            del self._rule_sets[name]
            self._files.forget(self._objects / "rulesets" / f"{name}.json")

    # ---- the directory ---------------------------------------------------------------

    def _fill(self) -> None:
        directory = self.directory
        identities, services = self._facts
        addresses: dict[bytes, End] = {}
        for address, number in identities.items():
            known = directory.identities.get(number)
            addresses[address] = known or End(number, labels=reserved_labels(number))
        for (namespace, name), pod in self._pods.items():
            if not pod.host_network:
                for text in pod.addresses:
                    raw = _packed(text)
                    addresses[raw] = self._end(namespace, name, identities.get(raw, 0))
        endpoints = {}
        for item in self._ids.endpoints.values():
            end = self._end(item.namespace, item.name, item.identity, item.id)
            endpoints[item.id] = end
            for text in item.addresses:
                addresses[address_bytes(text)] = end
        # The flows that are held share them: one that did not change stays the same object.
        directory.addresses = _kept(directory.addresses, addresses)
        directory.endpoints = _kept(directory.endpoints, endpoints)
        directory.services = services
        self._fill_hosts()
        self.pods_known = len(self._pods) or len(endpoints)

    def _fill_hosts(self) -> None:
        known = {
            pod.uid: _of_host(self._end(namespace, name, Reserved.HOST))
            for (namespace, name), pod in self._pods.items()
            if pod.host_network and pod.uid
        }
        # Of whom nobody has heard yet: it is asked for again.
        self.directory.hosts = {
            cgroup: known.get(uid)
            for cgroup, uid in self._cgroups.pods.items()
            if not uid or uid in known
        }

    def _read_facts(self) -> tuple[dict[bytes, int], dict[FrontendKey, Service]]:
        """Of ipcache: address → identity; frontends → Service."""
        identities: dict[bytes, int] = {}
        services = {}
        for item in self._slices.values():
            spec = item.spec
            for entry in spec.ipcache if spec.ipcache is not UNSET else ():
                host, _, bits = entry.cidr.partition("/")
                if bits == ("128" if ":" in host else "32"):
                    identities[address_bytes(host)] = entry.identity
            for port in spec.services if spec.services is not UNSET else ():
                service = Service(port.namespace, port.name)
                for front in port.frontends:
                    # A NodePort's address is each node's own.
                    text = getattr(front, "address", UNSET)
                    if text is not UNSET:
                        key = address_bytes(text), front.port, PROTOCOLS[front.protocol]
                        services[key] = service
        return identities, services

    def _end(self, namespace: str, name: str, identity: int, endpoint: int = 0) -> End:
        pod = self._pods.get((namespace, name))
        if pod is not None:
            made = pod.workload, pod.workload_kind
            return End(identity, endpoint, namespace, name, pod.labels, *made)
        known = self.directory.identities.get(identity)
        return End(identity, endpoint, namespace, name, known.labels if known else ())

    # ---- what a record speaks of before the files do ---------------------------------

    def _missing(self, what: str, which: bytes | int) -> bool:
        """Reads again, and waits a moment if need be: for each thing once in a while, and for all
        together not longer, so that nothing unknown keeps the ring from being read."""
        now = time.monotonic()
        if now - self._unknown.get((what, which), -UNKNOWN_SECONDS) < UNKNOWN_SECONDS:
            return False
        if what == "cgroup" and self._cgroups.root is None:
            return False
        if isinstance(which, int) and what == "interface":
            if not self._interface(which):
                self._forgotten(what, which)
            return which in self.directory.interfaces
        while True:
            patient = time.monotonic() < self._patient_until(what, now) and not self.hurry()
            if not patient and time.monotonic() - self._reread < REREAD_SECONDS:
                break
            self.refresh()
            self._reread = time.monotonic()
            if self._holds(what, which):
                return True
            if not patient:
                break
            time.sleep(STEP_SECONDS)
        if what == "cgroup" and which not in self._cgroups.pods:
            return False  # nobody has looked
        self._forgotten(what, which)
        return False

    def _forgotten(self, what: str, which: bytes | int) -> None:
        """It is not asked for again soon."""
        if len(self._unknown) >= MAX_UNKNOWN:
            self._unknown.clear()
        self._unknown[what, which] = time.monotonic()

    def _holds(self, what: str, which: bytes | int) -> bool:
        directory = self.directory
        if what == "cgroup":
            assert isinstance(which, int)
            self._cgroups.look(which)
            self._fill_hosts()
            return which in directory.hosts
        held: Mapping[Any, object]
        held = directory.rule_sets if what == "rule set" else directory.addresses
        return which in held

    def _patient_until(self, what: str, now: float) -> float:
        if now - self._waited[what] >= UNKNOWN_SECONDS:
            self._waited[what] = now
        return self._waited[what] + WAIT_SECONDS[what]


@functools.lru_cache(maxsize=16384)
def _packed(address: str) -> bytes:
    """Ten thousand pods are looked at when one of them changes."""
    return address_bytes(address)


def _of_host(end: End) -> End:
    """Policies know it as the node, and so may who asks."""
    return replace(end, labels=tuple(sorted((*end.labels, *reserved_labels(end.identity)))))


def _kept(before: Mapping[K, End], after: Mapping[K, End]) -> dict[K, End]:
    """`after`, with the objects of `before` where they are equal."""
    return {key: old if (old := before.get(key)) == end else end for key, end in after.items()}
