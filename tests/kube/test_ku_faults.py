"""Reflectors behind a proxy that breaks what it can: after quiet they hold what a fresh list says.

Seen to find, when put into the reflector on purpose: lists that add to what is held, and
objects that stay invalid when they are gone; in full also lines out of order that nobody
notices, and a bookmark taken for one more than it says. Never found by it: what heals by the
next event (an older event that undoes a write of our own); `tests/unit/kube` has those.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec
import pytest
from kube.given import FAST, Watching, config_map, listed, namespace
from support.apiserver import ApiServer
from support.ca_soak import campaign, scaled
from support.fault_proxy import ALL_FAULTS, BOOKMARK_SECONDS, FaultProxy, proxied
from support.waiting import until
from tidegate_kube import Access, Client, KubeError, resources

pytestmark = [pytest.mark.apiserver, pytest.mark.slow]

CONFIG_MAPS = resources.CONFIG_MAPS
NAMES = 15
SECONDS = 120.0
PATIENT = replace(FAST, watch=15.0, silence=2.0, longest_delay=0.2)
"""Lists anew only when it must: what a watch lost must be noticed, not healed by and by."""


@dataclass
class Town:
    """Random writes to the ConfigMaps of one namespace; some through a reflector's own hand."""

    client: Client
    space: str
    random: random.Random
    count: int = 0

    def change(self, own: Watching) -> None:
        self.count += 1
        name = f"c{self.random.randrange(NAMES)}"
        kind = self.random.choice(["put"] * 4 + ["delete"] * 4 + ["again", "invalid"])
        if kind in ("delete", "again"):
            self._delete(name, own)
        if kind != "delete":
            self._put(name, {"invalid": "yes"} if kind == "invalid" else {}, own)

    def _put(self, name: str, data: dict[str, str], own: Watching) -> None:
        body = config_map(name, n=str(self.count), **data)
        held = msgspec.json.decode(body)
        try:
            answer = self.client.create(CONFIG_MAPS, body, self.space)
        except KubeError:
            answer = self.client.update(CONFIG_MAPS, name, msgspec.json.encode(held), self.space)
        if self.random.random() < 0.3:
            own.reflector.remember(answer)
            if not data:
                assert own.held()[name] == held["data"], "our own write is held at once"

    def _delete(self, name: str, own: Watching) -> None:
        with contextlib.suppress(KubeError):
            meta = msgspec.json.decode(self.client.get(CONFIG_MAPS, name, self.space))["metadata"]
            self.client.delete(CONFIG_MAPS, name, self.space, uid=meta["uid"])
            if self.random.random() < 0.3:
                own.reflector.forget(self.space, name, meta["uid"])


def _equal(watching: Watching, client: Client, space: str) -> bool:
    """Valid objects are held as they are; of invalid ones at most an older meaning."""
    really = listed(client, space)
    invalid = {name for name, data in really.items() if "invalid" in data}
    held = watching.held()
    return (
        watching.reflector.synced
        and held.keys() <= really.keys()
        and all(held.get(name) == data for name, data in really.items() if name not in invalid)
        and {name for _, name in watching.reflector.invalid} == invalid
    )


@pytest.fixture
def client(apiserver: ApiServer) -> Iterator[Client]:
    client = apiserver.client()
    yield client
    client.close()


@contextlib.contextmanager
def _reflectors(proxy: FaultProxy, space: str, count: int) -> Iterator[list[Watching]]:
    """Alike but for their pages, each with its own connections."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                Watching(
                    stack.enter_context(
                        contextlib.closing(Client(Access(server=proxy.url), timeout=2.0))
                    ),
                    space,
                    pace=replace(PATIENT, page=page),
                )
            )
            for page in [3, 10, 500][:count]
        ]


def test_after_quiet_it_is_what_a_list_says(apiserver: ApiServer, client: Client) -> None:
    space, wanted = namespace(client, "ku-faults"), scaled(ci=100, soak=1_000)
    with (
        campaign("reflector-faults", "faults of the stream") as figures,
        proxied(apiserver, seed=4) as proxy,
        _reflectors(proxy, space, 3) as reflectors,
    ):
        town = Town(client, space, random.Random(4))
        while figures.count < wanted:
            # A few kinds at a time: one that makes reflectors list anew hides the harm of others.
            kinds = town.random.sample(sorted(ALL_FAULTS), town.random.randrange(1, 4))
            proxy.kinds, proxy.rate = frozenset(kinds), 0.25
            # In bursts, so that watches see both crowds and silence.
            for _ in range(town.random.randrange(1, 40)):
                town.change(town.random.choice(reflectors))
            proxy.rate = 0.0
            for each in reflectors:
                until(
                    lambda each=each: _equal(each, client, space),
                    f"equal after {town.count} changes, {dict(proxy.faults)}; "
                    f"{each.reflector.health()}",
                    SECONDS,
                )
            figures.count = proxy.count
            proxy.wait(town.random.uniform(0.0, 2 * BOOKMARK_SECONDS))
        for each in reflectors:
            assert each.reflector.health().alive
        print(f"{town.count} changes, {proxy.lists} pages; {dict(sorted(proxy.faults.items()))}")


def test_what_no_client_can_notice_is_healed_by_listing_anew(
    apiserver: ApiServer, client: Client
) -> None:
    """An event that is dropped while the stream goes on as if nothing were missing."""
    space = namespace(client, "ku-silent")
    with proxied(apiserver, seed=5) as proxy:
        access = Client(Access(server=proxy.url), timeout=2.0)
        with Watching(access, space, pace=replace(PATIENT, watch=1.0, relist=3.0)) as watching:
            until(lambda: watching.reflector.synced, "synced", SECONDS)
            proxy.swallow = 3
            for name in ("a", "b", "c", "d"):
                client.create(CONFIG_MAPS, config_map(name), space)
            until(lambda: proxy.swallow == 0 and "d" in watching.held(), "the fourth", SECONDS)
            until(lambda: set(watching.held()) == {"a", "b", "c", "d"}, "all four", SECONDS)
