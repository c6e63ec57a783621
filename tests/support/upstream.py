"""What others publish and Tidegate does not ship: fetched as Go modules when a test runs."""

from __future__ import annotations

from typing import Any

import yaml

from kind import golang

NETWORK_POLICY_API = "sigs.k8s.io/network-policy-api"
FIRST, NEWEST = "v0.2.0", "v0.3.0"
"""Versions that have ClusterNetworkPolicy v1alpha2."""


def cluster_policy_crd(version: str = NEWEST) -> dict[str, Any]:
    """ClusterNetworkPolicy's CRD, as users install it: of the channel that has every field."""
    folder = golang.module_directory(NETWORK_POLICY_API, version) / "config/crd/experimental"
    text = (folder / "policy.networking.k8s.io_clusternetworkpolicies.yaml").read_text()
    found: dict[str, Any] = yaml.safe_load(text)
    return found
