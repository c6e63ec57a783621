"""The image of kind's nodes: the stock one where it can be pulled, else an equal made here.

Made here it is Debian from the mirror that this machine's apt uses, kind's own units and scripts
out of kind's module, and the programs that `golang` built. Its tag is a hash of what decides its
content, so that an image of other sources is never taken for it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from kind import golang, images, settings
from kind.run import Failed, attempt, run, say

REPOSITORY = "tidegate/kind-node"
DEBIAN = "tidegate/kind-debian"
# What the stock image has, less storage; and what one wants when something is wrong.
PACKAGES = (
    "bash,ca-certificates,conntrack,containerd,curl,dbus,e2fsprogs,ethtool,iproute2,iptables,jq"
    ",kmod,libseccomp2,mount,nftables,pigz,procps,runc,socat,systemd,systemd-sysv,util-linux"
    ",iputils-ping,tcpdump"
)
CONTROL_PLANE = ("kube-apiserver", "kube-controller-manager", "kube-scheduler")
ON_THE_NODE = ("kubeadm", "kubectl", "kubelet")
CNI = ("bridge", "host-local", "loopback", "portmap", "ptp")


def ensure() -> str:
    """The name of an image that is there: $E2E_NODE_IMAGE, the stock one, or one made here.

    Raises Failed where none is to be had."""
    given = os.environ.get("E2E_NODE_IMAGE")
    if given:
        return given
    name = f"{REPOSITORY}:{_content()}"
    if images.exists(name):
        return name
    stock = _stock()
    if images.exists(stock):
        return stock
    if images.can_pull(stock):
        say(f"pulling {stock}")
        run("docker", "pull", "-q", stock)
        return stock
    say("no container registry can be reached: making the node image from Debian packages")
    _make(name)
    return name


def _stock() -> str:
    """The node image that this release of kind is made for."""
    directory = golang.module_directory("sigs.k8s.io/kind", settings.KIND)
    text = (directory / "pkg/apis/config/defaults/image.go").read_text()
    found = re.search(r'Image = "([^"]+)"', text)
    if not found:
        raise Failed(f"kind {settings.KIND} does not say which node image is its own")
    return found[1]


def _content() -> str:
    """Twelve digits that change with whatever goes into the image."""
    versions = [
        f"{k}={v}" for k, v in sorted(vars(settings).items()) if isinstance(v, str) and k.isupper()
    ]
    sources = [(settings.HERE / f).read_text() for f in ("node.py", "node-setup.sh", "pause.c")]
    return hashlib.sha256("\0".join([*versions, *sources, _suite()]).encode()).hexdigest()[:12]


def _suite() -> str:
    """The release of Debian (or what descends from it) that runs on this machine."""
    release = dict(
        line.split("=", 1)
        for line in Path("/etc/os-release").read_text().splitlines()
        if "=" in line
    )
    if "VERSION_CODENAME" not in release:
        raise Failed("this machine is no Debian: set E2E_NODE_IMAGE to a node image that is there")
    return release["VERSION_CODENAME"].strip('"')


def _mirror(suite: str) -> str:
    """Where this machine's own apt has the release from."""
    lines = run("apt-get", "indextargets", "--format", "$(RELEASE) $(CREATED_BY) $(REPO_URI)")
    for release, kind, address in (line.split() for line in lines.splitlines()):
        if (release, kind) == (suite, "Packages"):
            return address
    raise Failed(f"apt on this machine has no mirror of {suite}")


def _make(name: str) -> None:
    golang.ensure(golang.EVERYTHING)
    debian = _debian()
    with tempfile.TemporaryDirectory(dir=settings.cache(), prefix="node-") as scratch:
        sandbox = _stage(Path(scratch))
        say("setting the node image up")
        container = run(
            "docker", "run", "-d", "--privileged", "--stop-signal", "SIGRTMIN+3",
            "-v", f"{scratch}:/stage:ro", "--entrypoint", "sleep", debian, "infinity",
        ).strip()  # fmt: skip
        try:
            run("docker", "exec", container, "bash", "/stage/setup.sh", sandbox)
            run(
                "docker", "commit", "--change", "ENV container=docker", "--change",
                'ENTRYPOINT ["/usr/local/bin/entrypoint","/sbin/init"]', "--change", "CMD []",
                container, name,
            )  # fmt: skip
        finally:
            run("docker", "rm", "-f", container)
    _remove_others(name)


def _remove_others(name: str) -> None:
    """Removes node images of other sources; one that a cluster still uses stays."""
    for other in run(
        "docker", "images", "--format", "{{.Repository}}:{{.Tag}}", REPOSITORY
    ).split():
        if other != name:
            attempt("docker", "rmi", other)


def _debian() -> str:
    """An image of Debian with the packages of a node."""
    suite = _suite()
    name = f"{DEBIAN}:{suite}-{hashlib.sha256(PACKAGES.encode()).hexdigest()[:12]}"
    if images.exists(name):
        return name
    say(f"installing Debian {suite} into an image of its own")
    packages = settings.cache() / "debian-packages"
    packages.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.cache(), prefix="debian-") as root:
        run(
            "debootstrap", "--variant=minbase", f"--include={PACKAGES}",
            f"--cache-dir={packages}", suite, root, _mirror(suite),
        )  # fmt: skip
        shutil.rmtree(Path(root) / "var/cache/apt/archives")
        shutil.rmtree(Path(root) / "var/lib/apt/lists")
        run("bash", "-o", "pipefail", "-c", 'tar -C "$0" -c . | docker import - "$1"', root, name)
    return name


def _stage(stage: Path) -> str:
    """Lays out what node-setup.sh wants; the name of the sandbox image."""
    base = golang.module_directory("sigs.k8s.io/kind", settings.KIND) / "images/base/files"
    shutil.copytree(base, stage / "files")
    run("chmod", "-R", "u+w", stage / "files")
    for directory, programs in (("bin", ON_THE_NODE), ("cni", CNI)):
        (stage / directory).mkdir()
        for program in programs:
            os.link(settings.binaries() / program, stage / directory / program)
    (stage / "version").write_text(settings.KUBERNETES)
    shutil.copy(settings.HERE / "node-setup.sh", stage / "setup.sh")
    names = _cluster_images(stage)
    (stage / "images.list").write_text("".join(f"{n}\n" for n in names.values()))
    run("docker", "save", "-o", stage / "images.tar", *names.values())
    run("docker", "rmi", *names.values())
    return names["pause"]


def _cluster_images(stage: Path) -> dict[str, str]:
    """Makes the images that kubeadm asks for by name, but kube-proxy's; program → image."""
    kubeadm = settings.binaries() / "kubeadm"
    listed = run(kubeadm, "config", "images", "list", "--kubernetes-version", settings.KUBERNETES)
    wanted = {line.rsplit("/", 1)[1].split(":")[0]: line for line in listed.split()}
    pause = stage / "pause"
    run("gcc", "-Os", "-static", "-s", "-o", pause, settings.HERE / "pause.c")
    programs = {p: settings.binaries() / p for p in (*CONTROL_PLANE, "etcd", "coredns")}
    places = {"coredns": "/coredns", "pause": "/pause"}
    for program, file in {**programs, "pause": pause}.items():
        place = places.get(program, f"/usr/local/bin/{program}")
        images.from_program(wanted[program], file, place)
    return {program: wanted[program] for program in (*programs, "pause")}
