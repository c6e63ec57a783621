"""Who Tidegate is to the API server and whom it believes is replaced while flows are under way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from kind import cluster
from rig import asking, authorities, install, pods, town

pytestmark = pytest.mark.kind
ACCOUNTS = ("tidegate-loader", "tidegate-operator")
# As the kubelet does: all files of the volume change with one rename.
REPLACE = """
set -e
cd /var/lib/kubelet/pods/"$1"/volumes/kubernetes.io~projected/*/
new=$(mktemp -d ..tokenXXXXXX)
chmod 755 "$new"
cp -a ..data/. "$new"
cat > "$new/$2"
if cmp -s "$new/$2" "..data/$2"; then rm -r "$new"; exit; fi
ln -s "$new" ..data_tmp
mv -T ..data_tmp ..data
"""
# The other authority is not kubectl's.
UNSEEN = "--insecure-skip-tls-verify"


def test_tokens_that_are_void_and_then_new(
    traffic: None, askers: asking.Askers, place: town.Town
) -> None:
    for account in ACCOUNTS:
        cluster.kubectl("delete", "serviceaccount", "-n", install.NAMESPACE, account)
    # Of the same name, and yet another: what was signed for the one before is refused.
    install.apply()
    pods.signal(cluster.control_plane(), "kube-apiserver", "KILL")
    pods.eventually(cluster.is_up, "the API server is back", 120)
    try:
        for pod in everybody():
            pods.eventually(lambda pod=pod: _is_refused(pod), f"{pod.key} is refused", 60)
        place.served(askers)
        place.refused(askers)
        _changes_arrive(place, {pod: _token(pod) for pod in everybody()}, "token")
    finally:
        install.restart()


def test_another_certificate_authority(
    traffic: None, askers: asking.Askers, place: town.Town, tmp_path: Path
) -> None:
    served = authorities.Served(tmp_path)
    both = authorities.of_cluster(tmp_path).read_text() + served.authority.read_text()
    believed = dict.fromkeys(everybody(), both)
    try:
        served.change()
        place.served(askers)
        place.refused(askers)
        _changes_arrive(place, believed, "ca.crt", UNSEEN)
    finally:
        served.close()


def everybody() -> list[pods.Pod]:
    return [*install.loaders().values(), *install.operators().values()]


def _token(pod: pods.Pod) -> str:
    (account,) = (name for name in ACCOUNTS if pod.name.startswith(name))
    return cluster.kubectl(
        "create", "token", "-n", pod.namespace, account, "--bound-object-kind=Pod",
        f"--bound-object-name={pod.name}", f"--bound-object-uid={pod.uid}",
    ).strip()  # fmt: skip


def _is_refused(pod: pods.Pod) -> bool:
    said = cluster.kubectl("logs", "-n", pod.namespace, pod.name, "--since=60s")
    return "Unauthorized" in said or "401" in said


def _changes_arrive(
    place: town.Town, files: Mapping[pods.Pod, str], name: str, *options: str
) -> None:
    """With these files in its pods, a change of policy comes to be in force on every node."""
    key = "tidegate.dev/digest"

    def states() -> dict[str, tuple[str, str]]:
        """Node → wanted, in force."""
        for pod, text in files.items():
            # Each time: the kubelet puts back what it knows, now and then.
            cluster.inside(pod.node, "sh", "-c", REPLACE, "sh", pod.uid, name, stdin=text)
        text = cluster.kubectl(*options, "get", "nodestates", "-o", "json")
        return {
            i["metadata"]["name"]: (i["metadata"]["annotations"][key], i["status"].get("realised"))
            for i in json.loads(text)["items"]
        }

    def write(policy: pods.Manifest) -> None:
        command = ("apply", "--server-side", "--force-conflicts", "-f", "-")
        cluster.kubectl(*options, *command, stdin=json.dumps(policy))

    node, before = place.pods["server"].node, states()
    write(town.policy("nobody"))
    pods.eventually(lambda: states()[node][0] != before[node][0], "the operator works", 60)
    pods.eventually(lambda: all(w == r for w, r in states().values()), "the loaders work", 60)
    write(town.policy())
