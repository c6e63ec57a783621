"""Which backends the kernel leads to, against the oracle of endpoint selection.

What is compiled of every combination of policies, conditions, places and hints is loaded, and asked
in each way there is: by a socket, per packet at a pod's interface, and at an uplink. Over many new
flows the set of backends that are reached is the oracle's, for each node.

Faults it was seen to find: the list for clients outside used for those inside; a slot too few of a
list that two scopes share.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec import UNSET, structs
from support import ca_rig, edge
from support import loader_world as world
from support.ca_soak import SOAK, Figures, campaign
from support.choosing import DROPPED, REFUSED, Ask, by_packet, by_socket
from support.service_oracle import Answer, Kind, Tree, answer
from tidegate_api import state as api
from tidegate_loader import addresses, maps
from unit.operator import test_op_choice as cases

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

NODES = {"here-1": (cases.HERE, cases.ZONE), "here-2": (cases.HERE, ""), "there-1": ("there", "z2")}
"""Pin directory → (name, zone)."""
PORT = 80
CLIENT_POD, CLIENT_OUT = "10.0.0.1", "192.0.2.8"
ENOUGH, MOST = 24 if SOAK else 8, 120
"""New flows that are asked at least, and until every backend has been seen. That MOST of them miss
one of three backends happens once in 10^20 times."""
UPLINKS = maps.Uplinks(
    frozenset({addresses.pack(edge.NODE4)}), (addresses.pack(edge.NODE4), addresses.ZERO)
)


def vip(kind: Kind, number: int) -> tuple[str, int]:
    """The address and port of service `number`."""
    low = f"{number >> 8}.{number & 255}"
    match kind:
        case "ClusterIP":
            return f"10.96.{low}", PORT
        case "NodePort":
            return edge.NODE4, 30000 + number
        case "LoadBalancer":
            return f"203.0.{low}", PORT
        case "ExternalIP":
            return f"198.51.{low}", PORT


def numbered(port: api.ServicePort, number: int) -> api.ServicePort:
    """With addresses of its own, over UDP: a datagram's socket says at once where it leads."""
    found = []
    for front in port.frontends:
        address, at = vip("ClusterIP" if front.kind is UNSET else front.kind, number)
        if front.kind == "NodePort":
            address = front.address
        found.append(structs.replace(front, address=address, port=at, protocol="UDP"))
    # Ports of its own: at an uplink flows to one backend's port take ports of the node, of which
    # there are not as many as flows here.
    backends = [structs.replace(backend, port=1024 + number) for backend in port.backends]
    front = sorted(found, key=_order)
    return structs.replace(port, name=f"s{number}", frontends=front, backends=backends)


def _order(front: api.Frontend) -> tuple[str, int]:
    return front.address, front.port


def state(ports: Sequence[api.ServicePort], node: str, zone: str) -> maps.State:
    made = world.World(
        endpoints=[world.endpoint(1, 300)],
        ipcache={f"{CLIENT_POD}/32": 300, "10.0.0.0/8": 0},
        services=list(ports),
    ).state()
    spec = structs.replace(made.node.spec, node_port_addresses=[edge.NODE4], zone=zone or UNSET)
    meta = structs.replace(made.node.metadata, name=node)
    return structs.replace(made, node=structs.replace(made.node, spec=spec, metadata=meta))


@contextlib.contextmanager
def ways_of(node: ca_rig.Node) -> Iterator[dict[str, Ask]]:
    with by_socket(node, f"tgt-choice-{os.getpid()}") as by:
        yield {
            "socket": by,
            "pod": by_packet(node, "from_pod", [CLIENT_POD], ca_rig.FIRST_IFINDEX + 1),
            "uplink": by_packet(node, "from_net", [CLIENT_OUT], edge.UPLINK),
        }


def reached(ask: Ask, where: tuple[str, int], expected: Answer) -> Answer:
    wanted = {expected} if isinstance(expected, str) else set(expected)
    found: set[str] = set()
    for number in range(MOST):
        found.add(ask(*where))
        if number >= ENOUGH and found == wanted:
            break
    if len(found) == 1 and (only := next(iter(found))) in (REFUSED, DROPPED):
        return only  # type: ignore[return-value]
    return frozenset(found)


# ---- the comparison -------------------------------------------------------------------------


def sets() -> list[list[Tree]]:
    """Every set of up to two endpoints of the sorts that differ most; in full up to three."""
    sizes = (0, 1, 2, 3) if SOAK else (0, 1, 2)
    found = itertools.chain(
        *(itertools.combinations_with_replacement(cases.FEW, size) for size in sizes)
    )
    return [cases.placed(sorts) for sorts in found]


AT_ONCE = 200
"""Sets of endpoints whose Services are there together."""


def test_the_kernel_chooses_as_the_oracle_does(tmp_path: Path) -> None:
    every = sets()
    with campaign("choice", "Services of every combination, on three nodes") as figures:
        for first in range(0, len(every), AT_ONCE):
            figures.failures += _batch(
                every[first : first + AT_ONCE], tmp_path / str(first), figures
            )


def _batch(every: list[list[Tree]], directory: Path, figures: Figures) -> list[str]:
    """On nodes of their own: a datagram that has the addresses and ports of a flow of before goes
    where that one went."""
    directory.mkdir()
    wrong: list[str] = []
    with ca_rig.bench(directory, list(NODES)) as nodes:
        edge.wire()
        combined = list(itertools.product(every, cases.SERVICES.items()))
        ports = [
            numbered(cases.compiled(item, endpoints), number)
            for number, (endpoints, (_, item)) in enumerate(combined)
        ]
        for place, node in nodes.items():
            interfaces = {"uid-1": world.interface(1, ca_rig.FIRST_IFINDEX + 1)}
            node.loader.apply(state(ports, *NODES[place]), interfaces, UPLINKS)
            with ways_of(node) as ways:
                for number, (endpoints, (policy, _)) in enumerate(combined):
                    asked = Asked(number, endpoints, policy, *NODES[place])
                    figures.count += 1
                    wrong += compare(ways, asked)
    return wrong


@dataclass(frozen=True)
class Asked:
    number: int
    endpoints: list[Tree]
    policy: tuple[str, str]
    node: str
    zone: str


WAYS: tuple[tuple[str, bool], ...] = (("socket", True), ("pod", True), ("uplink", False))


def compare(ways: Mapping[str, Ask], asked: Asked) -> Iterator[str]:
    for (way, inside), kind in itertools.product(WAYS, cases.KINDS):
        if kind == "ClusterIP" and not inside:
            continue  # nobody outside is served there
        spec = cases.spec_of(*asked.policy)
        expected = answer(spec, asked.endpoints, asked.node, asked.zone, kind, inside)
        found = reached(ways[way], vip(kind, asked.number), expected)
        if found != expected:
            yield f"{way} {kind} {asked}: {found}, not {expected}"
