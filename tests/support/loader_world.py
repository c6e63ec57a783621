"""Small node states for the loader's tests: as values, and as files of a run directory."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from msgspec import UNSET, UnsetType
from support import other_version
from tidegate_api import API_VERSION
from tidegate_api import state as api
from tidegate_loader.local import LocalInterface
from tidegate_loader.maps import State

NODE = "node-1"
ROOT = other_version.ROOT

STUB = """
#include <tidegate/maps.h>
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__uint(value_size, SCRATCH);
	__uint(max_entries, 1);
} scratch SEC(".maps");
char LICENSE[] SEC("license") = "Dual BSD/GPL";
SEC("tc") int from_pod(struct __sk_buff *skb) { return %d; }
SEC("tc") int to_pod(struct __sk_buff *skb) { return %d; }
"""


def stub_object(directory: Path, verdict: int = -1) -> Path:
    """pod.o with every map and two programs that return `verdict`."""
    directory.mkdir(parents=True, exist_ok=True)
    source = directory / "pod.bpf.c"
    source.write_text(STUB.replace("SCRATCH", str(8 + verdict)) % (verdict, verdict))
    other_version.compile_object(source, directory / "pod.o")
    return directory


def peer_set(name: str, *identities: int) -> api.PeerSet:
    return api.PeerSet(name=name, selector=name, identities=sorted(identities))


def term(
    peer: api.Peer,
    rule: int = 0,
    protocol: api.Protocol | UnsetType = UNSET,
    port: int | UnsetType = UNSET,
    **more: object,
) -> api.Term:
    fields: dict[str, object] = {"action": "Allow", "precedence": 100} | more
    return api.Term(peer=peer, rule=rule, protocol=protocol, port=port, **fields)  # type: ignore[arg-type]


def rule_set(*terms: api.Term, direction: str = "Ingress", name: str = "p") -> api.RuleSet:
    spec = api.RuleSetSpec(
        format=api.FORMAT,
        direction=direction,  # type: ignore[arg-type]
        policies=[api.PolicyRef(kind="NetworkPolicy", namespace="ns", name=name)],
        rules=[api.Rule(policy=0, index=i) for i in range(1 + max([t.rule for t in terms] or [0]))],
        terms=list(terms),
    )
    return api.rule_set(spec)


def endpoint(
    number: int, identity: int, ingress: str | None = None, egress: str | None = None
) -> api.Endpoint:
    return api.Endpoint(
        uid=f"uid-{number}",
        namespace="ns",
        name=f"pod-{number}",
        identity=identity,
        addresses=[f"10.0.0.{number}", f"fd00::{number:x}"],
        ingress=ingress or UNSET,
        egress=egress or UNSET,
    )


def interface(number: int, ifindex: int | None = None) -> LocalInterface:
    return LocalInterface(
        uid=f"uid-{number}",
        namespace="ns",
        name=f"pod-{number}",
        ifname=f"veth{number}",
        ifindex=ifindex or 10 + number,
        pod_mac=f"02:00:00:00:00:{number:02x}",
        host_mac=f"02:00:00:00:01:{number:02x}",
        addresses=[f"10.0.0.{number}", f"fd00::{number:x}"],
    )


def interfaces(*numbers: int) -> dict[str, LocalInterface]:
    return {f"uid-{n}": interface(n) for n in numbers}


def service(
    name: str, address: str, port: int, backends: Iterable[tuple[str, int]] = ()
) -> api.ServicePort:
    return api.ServicePort(
        namespace="ns",
        name=name,
        type="ClusterIP",
        frontends=[api.Frontend(address=address, port=port, protocol="TCP")],
        backends=[api.Backend(address=a, port=p) for a, p in backends],
    )


def slices(
    table: str, items: Sequence[object], shards: int, revision: int = 1, epoch: int = 1
) -> tuple[api.StateSlice, ...]:
    found = []
    for shard in range(shards):
        mine = [i for i in items if api.shard_of(_key(i), shards) == shard]
        spec = api.StateSliceSpec(
            format=api.FORMAT,
            table=table,  # type: ignore[arg-type]
            epoch=epoch,
            shard=shard,
            shards=shards,
            revision=revision,
            **{table: mine},  # type: ignore[arg-type]
        )
        name = api.slice_name(table, epoch, shard, shards)
        meta = api.Meta(name=name, labels={"tidegate.dev/table": table})
        found.append(
            api.StateSlice(api_version=API_VERSION, kind="StateSlice", metadata=meta, spec=spec)
        )
    return tuple(found)


def _key(item: object) -> str:
    match item:
        case api.IPCacheEntry(cidr=cidr):
            return cidr
        case api.ServicePort(namespace=namespace, name=name):
            return f"{namespace}/{name}"
        case api.PeerSet(name=name):
            return name
        case _:
            raise TypeError(item)


class World(msgspec.Struct):
    """One node state in parts that a test changes."""

    endpoints: list[api.Endpoint] = []
    rule_sets: list[api.RuleSet] = []
    peers: list[api.PeerSet] = []
    ipcache: dict[str, int] = {}
    """CIDR -> identity; host prefixes are pods."""
    services: list[api.ServicePort] = []
    mode: str = "Enforcing"
    shards: int = 2
    revision: int = 1

    def state(self) -> State:
        entries = [_entry(c, i) for c, i in sorted(self.ipcache.items())]
        node = self._node()
        return State(
            node=node,
            digest=api.digest(node.spec),
            rule_sets={r.metadata.name: r for r in self.rule_sets},
            peers={p.name: p for p in self.peers},
            ipcache=slices("ipcache", entries, self.shards, self.revision),
            services=slices("services", self.services, self.shards, self.revision),
        )

    def _node(self) -> api.NodeState:
        ref = api.TableRef(epoch=1, shards=self.shards, min_revision=self.revision)
        return api.NodeState(
            api_version=API_VERSION,
            kind="NodeState",
            metadata=api.Meta(name=NODE),
            spec=api.NodeStateSpec(
                format=api.FORMAT,
                mode=self.mode,  # type: ignore[arg-type]
                endpoints=sorted(self.endpoints, key=lambda e: e.uid),
                rule_sets=sorted(r.metadata.name for r in self.rule_sets),
                peer_sets=sorted(p.name for p in self.peers),
                tables=dict.fromkeys(api.TABLES, ref),
            ),
        )

    def write(self, run_dir: Path) -> None:
        """As publish does: what is named before what names it, each by rename."""
        state = self.state()
        peers = slices("peers", self.peers, self.shards, self.revision)
        listed = [
            *(("rulesets", r) for r in self.rule_sets),
            *(("stateslices", s) for s in (*peers, *state.ipcache, *state.services)),
            ("nodestates", state.node),
        ]
        for directory, item in listed:
            write_object(run_dir / "objects" / directory, item.metadata.name, item)  # type: ignore[attr-defined]


def triggered(item: api.StateSlice) -> api.StateSlice:
    """As if its endpoints had changed just now."""
    now = datetime.datetime.now(datetime.UTC).isoformat()
    meta = msgspec.structs.replace(item.metadata, annotations={api.TRIGGER_ANNOTATION: now})
    return msgspec.structs.replace(item, metadata=meta)


def write_object(directory: Path, name: str, item: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    data, path = api.encode(item), directory / f"{name}.json"
    if path.exists() and path.read_bytes() == data:
        return
    temporary = directory / f".{name}.tmp"
    temporary.write_bytes(data)
    temporary.rename(path)


def _entry(cidr: str, identity: int) -> api.IPCacheEntry:
    host = cidr.endswith(("/32", "/128"))
    return api.IPCacheEntry(cidr=cidr, identity=identity, node=NODE if host else UNSET)


def example() -> World:
    """Two pods, one isolated by peers, a CIDR with a hole and ports; a service; networks."""
    ingress = rule_set(
        term(api.SetPeer(name="web"), 0, "TCP", 80),
        term(api.CIDRPeer(cidr="192.0.2.0/24", excepts=["192.0.2.64/26"]), 1, "UDP"),
    )
    egress = rule_set(
        term(api.AnyPeer(), 0, "TCP", 8080, end_port=8083), direction="Egress", name="q"
    )
    names = ingress.metadata.name, egress.metadata.name
    return World(
        endpoints=[endpoint(1, 300, *names), endpoint(2, 301)],
        rule_sets=[ingress, egress],
        peers=[peer_set("web", 301, 302)],
        ipcache={
            "10.0.0.1/32": 300,
            "10.0.0.2/32": 301,
            "10.0.1.9/32": 302,
            "fd00::1/128": 300,
            "10.0.0.0/8": 0,
            "198.51.100.0/24": 900,
        },
        services=[
            service("a", "10.96.0.1", 80, [("10.0.0.1", 8080), ("10.0.1.9", 8080)]),
            service("b", "10.96.0.2", 53),
        ],
    )
