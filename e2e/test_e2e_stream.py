"""A stream of events that fails in every way it can, between the API server and all of Tidegate."""

from __future__ import annotations

import random

import pytest
from support.ca_soak import campaign, scaled
from support.fault_proxy import ALL_FAULTS

from kind import cluster
from rig import api, cold, pods, proxied, town

pytestmark = pytest.mark.kind
CHANGES = 12
SETTLED_SECONDS = 240.0
"""A loader notices after 90 s that its watch is silent, and waits before it asks again."""
ROLES = ("friend", "stranger", "nobody")


def test_faults_between_tidegate_and_the_api_server(traffic: None, place: town.Town) -> None:
    wanted = scaled(ci=40, soak=600)
    draw = random.Random(11)
    with (
        campaign("kind-faults", "faults between Tidegate on kind and its API server") as figures,
        proxied.behind(seed=11) as proxy,
    ):
        while figures.count < wanted:
            proxy.kinds = frozenset(draw.sample(sorted(ALL_FAULTS), draw.randrange(2, 6)))
            proxy.rate = 0.2
            for _ in range(CHANGES):
                change(draw)
            proxy.rate = 0.0
            cold.settle(SETTLED_SECONDS)
            figures.count = proxy.count
        print(dict(sorted(proxy.faults.items())))
    cluster.kubectl("delete", "networkpolicies,services", "-n", town.SPACE, "-l", "churn=yes")
    for name in town.STRANGERS:
        pods.relabel(name, town.SPACE, churn=None)


def change(draw: random.Random) -> None:
    """Of what neither friends nor strangers notice: they stay served, and refused."""
    name = f"churn-{draw.randrange(4)}"
    role, peer = draw.choice(ROLES), draw.choice(ROLES)
    metadata = {"name": name, "namespace": town.SPACE, "labels": {"churn": "yes"}}
    allowed = {"from": [{"podSelector": {"matchLabels": {"role": peer}}}]}
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata,
        "spec": {"podSelector": {"matchLabels": {"role": "stranger"}}, "ingress": [allowed]},
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {"selector": {"role": role}, "ports": [{"port": 80}]},
    }
    match draw.choice(("policy", "service", "label", "gone")):
        case "policy":
            api.apply(policy)
        case "service":
            api.apply(service)
        case "label":
            value = str(draw.randrange(3))
            pods.relabel(draw.choice(town.STRANGERS), town.SPACE, churn=value)
        case "gone":
            api.delete(draw.choice((policy, service)))
