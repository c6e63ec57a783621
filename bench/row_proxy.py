"""svc-connect, svc-rate-*, svc-nodeport: Services against kube-proxy's.

Each proxy has nodes, pods and veths of its own, all alike, and the same Services: kube-proxy from
a real kube-apiserver, ours from what the operator's code makes of the same objects. Rounds are
interleaved; client, server and all packets are on one CPU, and no proxy's process lives meanwhile.
The Services that are measured lie anywhere among the others, as kube-proxy's chains have no order.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import proxies
from measure import Result, interleaved, paired, pinned, progress
from support import sites

SIZES = (1, 1_000, 10_000)
RATES_AT = 1_000
ENDPOINTS = 5
MEASURED = 15
"""Services with a server behind them; one each round."""
ROUNDS = 15
COUNT = 1500
NEAR, FAR = (sites.PODS[name][1] for name in ("near", "far"))
NODE = sites.NODES["node-1"]
NEAR_PORT, FAR_PORT = 30080, 30081
FAR_VIP = "10.96.201.1"
MODES = {"nft": "nftables", "iptables": "iptables"}


def filler(number: int, first: int = 0) -> list[sites.Tree]:
    """Endpoints `first` and the four after it of a Service's own ten."""
    pods = [
        f"10.{64 + (n >> 16)}.{n >> 8 & 255}.{n & 255}"
        for n in (number * 10 + (first + i) % 10 for i in range(ENDPOINTS))
    ]
    address = f"10.96.{1 + (number >> 8)}.{number & 255}"
    return sites.service(f"s{number}", address, [sites.ready(pod) for pod in pods])


def is_filler(tree: sites.Tree) -> bool:
    return str(tree["metadata"]["name"]).startswith("s")


def vip(number: int) -> str:
    return f"10.96.200.{1 + number}"


def services(size: int) -> list[sites.Tree]:
    """Those measured are made first, in the middle and last."""
    found = sites.service("real-0", vip(0), [sites.ready(NEAR)])
    if size == 1:
        return found
    found += sites.service("near", "10.96.201.2", [sites.ready(NEAR)], NEAR_PORT)
    found += sites.service("far", FAR_VIP, [sites.ready(FAR)], FAR_PORT)
    for number in range(1, MEASURED):
        found += sites.service(f"real-{number}", vip(number), [sites.ready(NEAR)])
    for number in range(1, size - len(found) // 2 + 1):
        found += filler(number)
    return found


@dataclass
class Arena:
    api: proxies.Api
    places: Mapping[str, sites.Site]
    tidegate: sites.Tidegate
    held: set[str] = field(default_factory=set)
    """Names of what the API server has."""

    def fill(self, size: int, modes: Mapping[str, str] = MODES) -> None:
        """Everybody serves `size` Services; `modes`: of kube-proxy, by its place."""
        wanted = services(size)
        fresh = [tree for tree in wanted if tree["metadata"]["name"] not in self.held]
        with progress(f"{size:,} Services in the API server"):
            self.api.apply([tree for tree in fresh if not is_filler(tree)])
            self.api.store([tree for tree in fresh if is_filler(tree)])
        self.held = {tree["metadata"]["name"] for tree in wanted}
        with progress(f"{size:,} Services in our maps"):
            self.tidegate.publish(wanted)
            self.tidegate.realise()
        for name, mode in modes.items():
            for node in sites.NODES if (name, size) == ("nft", RATES_AT) else ("node-1",):
                with progress(f"{size:,} Services in kube-proxy's {mode} of {node}"):
                    self.kube_proxy(name, mode, node).__exit__()

    def kube_proxy(self, place: str, mode: str, node: str) -> proxies.KubeProxy:
        """Its rules are in the kernel."""
        made = proxies.KubeProxy(self.api, self.places[place].space(node), node, mode)
        try:
            made.wait(2)  # IPv4 and IPv6
        except BaseException:
            made.__exit__()
            raise
        return made

    def run(
        self, name: str, who: str, mode: str, to: Sequence[tuple[str, int]]
    ) -> Callable[[], float]:
        """A variant: its next figure is of the next of `to`."""
        group = self.tidegate.group if name == "ours" and who == "client" else None
        turns = itertools.cycle(to)

        def run() -> float:
            return proxies.measure(self.places[name], who, mode, next(turns), COUNT, group)

        return run

    def direct(self) -> float:
        """To the backend itself; the client's sockets meet no program."""
        to = (NEAR, sites.PORT)
        return proxies.measure(self.places["ours"], "client", "first", to, COUNT, None)


def connect(arena: Arena, size: int) -> dict[str, list[float]]:
    to = [(vip(n), 80) for n in range(MEASURED if size > 1 else 1)]
    variants = {name: arena.run(name, "client", "first", to) for name in arena.places}
    return interleaved({"direct": arena.direct, **variants}, ROUNDS)


def connect_results(found: Mapping[int, dict[str, list[float]]]) -> Iterator[Result]:
    extra = {
        "us": {
            size: {name: round(statistics.median(v), 2) for name, v in figures.items()}
            for size, figures in found.items()
        }
    }
    sizes = ", ".join(f"{size:,}" for size in found)
    what = f"TCP connect and first byte through a ClusterIP, {sizes} Services, p50"
    direct = {size: paired(figures, "ours", "direct") for size, figures in found.items()}
    against = "the backend itself; the worst size"
    yield Result("svc-connect", what, max(direct.values()), "ratio", against, 1.05, extra)
    flat = max(direct.values()) / min(direct.values())
    yield Result("svc-connect-flat", what, flat, "ratio", "the best size, the worst", 1.05)
    for name, mode in MODES.items():
        ahead = min(paired(figures, name, "ours") for figures in found.values())
        against = f"kube-proxy {mode}, which takes so much longer; the worst size"
        yield Result(f"svc-connect-{mode}", what, ahead, "ratio", against, 1.0, at_least=True)


RATES = {
    "svc-rate-local": (1.15, "client", (vip(0), 80), "short connections to a pod of the node"),
    "svc-rate-remote": (1.03, "client", (FAR_VIP, 80), "short connections to a pod elsewhere"),
    "svc-nodeport": (1.1, "outside", (NODE, NEAR_PORT), "NodePort of a near pod, from outside"),
    "svc-nodeport-far": (1.1, "outside", (NODE, FAR_PORT), "NodePort of a far pod, from outside"),
}  # fmt: skip
"""id → bar, who asks, what, in words."""


def rates(arena: Arena) -> Iterator[Result]:
    for id, (bar, who, to, words) in RATES.items():
        variants = {name: arena.run(name, who, "short", [to]) for name in ("ours", "nft")}
        figures = interleaved(variants, ROUNDS)
        extra = {"us": {name: round(statistics.median(v), 2) for name, v in figures.items()}}
        what = f"{words}, {RATES_AT:,} Services, one after the other"
        against = "kube-proxy nftables, connections a second"
        value = paired(figures, "nft", "ours")
        yield Result(id, what, value, "ratio", against, bar, extra, at_least=True)


def everything() -> Iterator[Result]:
    with ExitStack() as stack:
        api = stack.enter_context(proxies.api())
        places = {}
        for name in ("ours", *MODES):
            places[name] = stack.enter_context(sites.made(f"tg-bench-{name}"))
            stack.enter_context(proxies.servers(places[name]))
        arena = Arena(api, places, stack.enter_context(sites.tidegate(places["ours"])))
        found = {}
        for size in SIZES:
            arena.fill(size)
            with pinned():
                with progress(f"connections with {size:,} Services"):
                    found[size] = connect(arena, size)
                if size == RATES_AT:
                    yield from rates(arena)
        yield from connect_results(found)


ROWS: dict[str, Callable[[], Iterator[Result]]] = {"svc-connect": everything}
"""It yields the others too: filling an API server with so many Services takes minutes."""
