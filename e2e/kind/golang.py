"""Programs built from Go modules: Kubernetes, etcd, CoreDNS, CNI plugins, kind and Helm.

One static file each, without debug information. A program that is there in the wanted version is
not built again: a stamp says what it was built from."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kind.run import Failed, lock, run, say
from kind.settings import CNI_PLUGINS, COREDNS, ETCD, HELM, KIND, KUBERNETES, binaries, cache


@dataclass(frozen=True)
class Module:
    """A Go module and the programs wanted of it: name → import path below the module."""

    path: str
    version: str
    programs: Mapping[str, str]
    linker_flags: tuple[str, ...] = ()
    staged: bool = False
    """Its go.mod replaces modules by directories that only its repository has."""

    def stamp(self) -> str:
        return " ".join((f"{self.path}@{self.version}", *self.linker_flags)) + "\n"


def _kubernetes_version_flags() -> tuple[str, ...]:
    # What the release scripts set; kubeadm refuses a version it cannot read.
    package = "k8s.io/component-base/version"
    major, minor, _ = KUBERNETES.removeprefix("v").split(".")
    return (
        f"-X {package}.gitVersion={KUBERNETES}",
        f"-X {package}.gitMajor={major}",
        f"-X {package}.gitMinor={minor}",
    )


def _kubernetes(*names: str) -> Module:
    return Module(
        "k8s.io/kubernetes",
        KUBERNETES,
        {name: f"cmd/{name}" for name in names},
        _kubernetes_version_flags(),
        staged=True,
    )


_ETCD = Module("go.etcd.io/etcd/server/v3", ETCD, {"etcd": ""})

APISERVER = (_kubernetes("kube-apiserver", "kubectl"), _ETCD)
"""What tests against an API server need, without nodes."""

EVERYTHING = (
    *APISERVER,
    _kubernetes("kube-controller-manager", "kube-scheduler", "kubelet", "kubeadm", "kube-proxy"),
    Module("github.com/coredns/coredns", COREDNS, {"coredns": ""}),
    Module(
        "github.com/containernetworking/plugins",
        CNI_PLUGINS,
        {
            "host-local": "plugins/ipam/host-local",
            "loopback": "plugins/main/loopback",
            "ptp": "plugins/main/ptp",
            "bridge": "plugins/main/bridge",
            "portmap": "plugins/meta/portmap",
        },
    ),
    Module("sigs.k8s.io/kind", KIND, {"kind": ""}),
    Module("helm.sh/helm/v3", HELM, {"helm": "cmd/helm"}),
)


def ensure(modules: Iterable[Module]) -> None:
    """Builds what is missing or of another version. Of two runs at once the second waits, then
    finds it there. Raises Failed where there is no Go or a build fails; what was built stays."""
    if not any(_missing(m) for m in modules):
        return
    with lock(binaries().parent / "lock"):
        for module in modules:
            for name in _missing(module):
                _build(module, name)


def build_local(name: str, sources: Path, fetch: bool = False) -> Path:
    """Builds the program of a directory with a go.mod; where it is now. `fetch`: the go.mod
    names the versions of modules to fetch, and what they need is found out."""
    _require_go()
    program = cache() / name
    cache().mkdir(parents=True, exist_ok=True)
    with lock(cache() / f"{name}.lock"), tempfile.TemporaryDirectory() as scratch:
        if fetch:  # which writes beside the sources
            sources = Path(shutil.copytree(sources, Path(scratch) / "sources"))
        run(
            "go", "build", "-trimpath", *(["-mod=mod"] if fetch else []),
            "-ldflags", "-s -w", "-o", program, ".",
            cwd=sources, env={"CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false", "GOWORK": "off"},
        )  # fmt: skip
    return program


def module_directory(path: str, version: str) -> Path:
    """Where Go keeps the module's sources; fetched where they are not there."""
    return Path(_fetch(path, version)["Dir"])


def _missing(module: Module) -> list[str]:
    return [n for n in module.programs if not _is_built(module, n)]


def _is_built(module: Module, name: str) -> bool:
    try:
        return (binaries() / name).is_file() and _stamp(name).read_text() == module.stamp()
    except FileNotFoundError:
        return False


def _require_go() -> None:
    if not shutil.which("go"):
        raise Failed(
            "there is no `go` on the PATH: install Go 1.21 or later"
            " (it fetches the toolchain that a module asks for)"
        )


def _stamp(name: str) -> Path:
    return binaries().parent / "stamps" / name


def _build(module: Module, name: str) -> None:
    _require_go()
    say(f"building {name} from {module.path} {module.version} (kept in {binaries()})")
    binaries().mkdir(parents=True, exist_ok=True)
    _stamp(name).parent.mkdir(exist_ok=True)
    package = "/".join(p for p in (module.path, module.programs[name]) if p)
    # Beside its place, so that it gets there whole by a rename.
    with tempfile.TemporaryDirectory(dir=binaries().parent, prefix="build-") as scratch:
        (Path(scratch) / "go.mod").write_text(_go_mod(module))
        run(
            "nice", "go", "build", "-mod=mod", "-trimpath",
            "-ldflags", " ".join(("-s", "-w", *module.linker_flags)),
            "-o", "program", package,
            cwd=Path(scratch), env={"CGO_ENABLED": "0", "GOFLAGS": "", "GOWORK": "off"},
        )  # fmt: skip
        _stamp(name).unlink(missing_ok=True)
        (Path(scratch) / "program").rename(binaries() / name)
        _stamp(name).write_text(module.stamp())


def _go_mod(module: Module) -> str:
    """A main module that requires `module`: replacements count only in a main module."""
    upstream = Path(_fetch(module.path, module.version)["GoMod"]).read_text()
    go = re.search(r"^go (\S+)$", upstream, re.MULTILINE)
    lines = [
        "module build",
        f"go {go[1] if go else '1.21'}",
        f"require {module.path} {module.version}",
    ]
    if module.staged:
        version = "v0." + module.version.removeprefix("v1.")
        staged = re.findall(r"^\s+(\S+) => \./staging/", upstream, re.MULTILINE)
        lines += [f"replace {name} => {name} {version}" for name in staged]
    return "\n".join(lines) + "\n"


def _fetch(path: str, version: str) -> dict[str, str]:
    # In a directory without go.mod, so that no main module has a say.
    with tempfile.TemporaryDirectory() as nowhere:
        out = run(
            "go",
            "mod",
            "download",
            "-json",
            f"{path}@{version}",
            cwd=Path(nowhere),
            env={"GOWORK": "off"},
        )
    found: dict[str, str] = json.loads(out)
    return found
