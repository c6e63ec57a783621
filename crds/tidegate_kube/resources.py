"""The kinds we talk about, and their paths."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind as the API serves it. `group` is "" for the core group."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool

    @property
    def api_version(self) -> str:
        """As in an object's `apiVersion`."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """The URL's path: of the collection (all namespaces when `namespace` is ""), or of
        one object. ValueError: a namespace is missing or not wanted."""
        if namespace and not self.namespaced:
            raise ValueError(f"{self.plural} has no namespaces, so not {namespace!r}")
        if name and self.namespaced and not namespace:
            raise ValueError(f"{self.plural} {name!r} needs a namespace")
        root = f"/apis/{self.group}" if self.group else "/api"
        parts = [root, self.version]
        if namespace:
            parts += ["namespaces", quote(namespace, safe="")]
        parts.append(self.plural)
        parts += [quote(part, safe="") for part in (name, subresource) if part]
        return "/".join(parts)


_OURS = "tidegate.dev"

PODS = Resource("", "v1", "pods", "Pod", True)
NODES = Resource("", "v1", "nodes", "Node", False)
NAMESPACES = Resource("", "v1", "namespaces", "Namespace", False)
SERVICES = Resource("", "v1", "services", "Service", True)
CONFIG_MAPS = Resource("", "v1", "configmaps", "ConfigMap", True)
SERVICE_ACCOUNTS = Resource("", "v1", "serviceaccounts", "ServiceAccount", True)
ENDPOINT_SLICES = Resource("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice", True)
NETWORK_POLICIES = Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", True)
CLUSTER_NETWORK_POLICIES = Resource(
    "policy.networking.k8s.io", "v1alpha2", "clusternetworkpolicies", "ClusterNetworkPolicy", False
)
"""Its CRD is the users' to install, or not."""
LEASES = Resource("coordination.k8s.io", "v1", "leases", "Lease", True)
EVENTS = Resource("events.k8s.io", "v1", "events", "Event", True)
CRDS = Resource(
    "apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", False
)

IDENTITIES = Resource(_OURS, "v1alpha1", "identities", "Identity", False)
RULE_SETS = Resource(_OURS, "v1alpha1", "rulesets", "RuleSet", False)
STATE_SLICES = Resource(_OURS, "v1alpha1", "stateslices", "StateSlice", False)
NODE_STATES = Resource(_OURS, "v1alpha1", "nodestates", "NodeState", False)
TRAFFIC_POLICIES = Resource(_OURS, "v1alpha1", "trafficpolicies", "TrafficPolicy", True)
POLICY_STATUSES = Resource(_OURS, "v1alpha1", "policystatuses", "PolicyStatus", True)
CLUSTER_POLICY_STATUSES = Resource(
    _OURS, "v1alpha1", "clusterpolicystatuses", "ClusterPolicyStatus", False
)
