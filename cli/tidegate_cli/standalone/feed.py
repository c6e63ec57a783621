"""The operator as `up` sees it: folder -> objects in the run directory, and
where their pods lie on this machine. Touches no network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog
from tidegate_operator import services, world
from tidegate_operator.problems import Problem
from tidegate_operator.relevance import EXCLUDED, Settings
from tidegate_operator.standalone import Runner, StepResult
from tidegate_operator.store import PublishError
from tidegate_operator.world import MadePod, MadeWorld

from tidegate_cli.standalone import supervisor
from tidegate_cli.standalone.cluster import Layout
from tidegate_cli.standalone.errors import StandaloneError
from tidegate_cli.standalone.layout import place_node, place_pod
from tidegate_cli.standalone.loaders import Loaders
from tidegate_cli.standalone.observer import Observer
from tidegate_cli.standalone.options import UpOptions
from tidegate_cli.standalone.rundir import Pod, Port, RunDir
from tidegate_cli.standalone.teardown import cgroup_of

RETRY_SECONDS = 1.0
STOP_SECONDS = 5.0
MAX_PROBLEMS = 20

log = structlog.get_logger()


class OperatorFeed:
    """Implements `supervisor.Feed`."""

    def __init__(self, run_dir: RunDir, folder: Path, options: world.Options) -> None:
        self._run_dir = run_dir
        self._folder = folder
        self._options = options
        self._changed: Callable[[Layout], None] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._problems: tuple[Problem, ...] = ()
        self._runner: Runner | None = None

    def first(self) -> Layout:
        """Raises StandaloneError where the folder cannot be read."""
        runner = Runner(self._folder, self._run_dir.path, self._options, self._on_world)
        try:
            result = runner.step()
        except PublishError as error:
            raise StandaloneError(str(error)) from error
        if result.desired is None:
            raise StandaloneError(
                "\n".join(map(str, result.problems)) or f"cannot read {self._folder}"
            )
        self._problems = result.problems
        self._runner = runner
        return self._layout(result.world)

    def follow(self, changed: Callable[[Layout], None]) -> None:
        self._changed = changed
        self._thread = threading.Thread(target=self._watch, name="feed", daemon=True)
        self._thread.start()

    def summary(self) -> str:
        assert self._runner is not None
        services = self._runner.world.services
        width = max([len(str(name)) for name in services] + [8])
        lines = [f"{'SERVICE':<{width}}  {'PORTS':<24} CLUSTER IPS"] if services else []
        for name, service in services.items():
            ports = ",".join(f"{port.port}/{port.protocol}" for port in service.ports) or "-"
            ips = ", ".join(service.cluster_ips) or "None"
            lines.append(f"{name!s:<{width}}  {ports:<24} {ips}")
        if self._problems:
            lines += ["", *map(str, self._problems[:MAX_PROBLEMS])]
        if len(self._problems) > MAX_PROBLEMS:
            rest = len(self._problems) - MAX_PROBLEMS
            lines.append(f"and {rest} more in {self._run_dir.objects / 'problems.json'}")
        return "\n".join(lines)

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)

    def _watch(self) -> None:
        assert self._runner is not None
        while not self._stop.is_set():
            try:
                self._runner.watch(self._stop, self._report)
            except (PublishError, OSError) as error:
                log.error("cannot publish, trying again", error=str(error))
                self._stop.wait(RETRY_SECONDS)
            except Exception:  # or nobody would follow the folder any more, and nobody would say so
                log.exception("cannot follow the folder, trying again")
                self._stop.wait(RETRY_SECONDS)

    def _on_world(self, _before: MadeWorld, after: MadeWorld) -> None:
        if self._changed is not None:
            self._changed(self._layout(after))

    def _report(self, result: StepResult) -> None:
        if result.written:
            log.info("published", objects=len(result.written))
        if result.problems != self._problems:
            self._problems = result.problems
            for problem in result.problems[:MAX_PROBLEMS]:
                log.warning("problem in the folder", problem=str(problem))

    def _layout(self, snapshot: MadeWorld) -> Layout:
        cgroup = cgroup_of(self._run_dir)
        nodes = {
            node.name: place_node(
                self._run_dir,
                cgroup,
                name=node.name,
                addresses=list(node.addresses),
                pod_cidrs=list(node.pod_cidrs),
            )
            for node in snapshot.nodes.values()
        }
        workloads = world.workloads(snapshot)
        pods = [
            place_pod(self._run_dir, nodes[pod.node], _pod(pod, workloads))
            for pod in snapshot.pods.values()
            if pod.node in nodes
        ]
        return Layout(list(nodes.values()), pods)


def _pod(pod: MadePod, workloads: Mapping[tuple[str, str], tuple[str, str]]) -> Pod:
    kind, workload = workloads.get((pod.namespace, pod.name), ("", ""))
    return Pod(
        uid=pod.uid,
        namespace=pod.namespace,
        name=pod.name,
        node=pod.node,
        addresses=list(pod.addresses),
        ports=[Port(name=p.name, port=p.port, protocol=p.protocol) for p in pod.ports],
        host_network=pod.host_network,
        command=pod.command,
        netns="",
        cgroup="",
        ifname="",
        labels=pod.labels,
        workload=workload,
        workload_kind=kind,
    )


def _loader_options(options: UpOptions) -> list[str]:
    return [
        f"--load-balancer-mode={options.load_balancer}",
        f"--load-balancer-acceleration={options.acceleration}",
    ]


def up(options: UpOptions) -> int:
    """Exit code. Raises StandaloneError."""
    run_dir = RunDir.at(options.run_dir)
    folder = options.folder.resolve()
    if not folder.is_dir():
        raise StandaloneError(f"{folder}: no such folder; name one that holds manifests")
    made_of = world.Options(
        nodes=options.nodes,
        keep_nodes=True,
        identities=Settings(options.identities, options.excluded_labels or EXCLUDED),
        services=services.Settings(masquerade=options.masquerade),
    )
    parts = supervisor.Parts(
        run_dir,
        folder,
        OperatorFeed(run_dir, folder, made_of),
        Loaders(run_dir, _loader_options(options)),
        options.wait,
        Observer(run_dir, options.policy_log) if options.observer else None,
        options.excluded_labels,
    )
    ending = f"\nready: following {folder}"
    if options.detach:
        return supervisor.detached(
            lambda on_ready: supervisor.serve(
                parts, lambda summary: on_ready(f"{summary}\n{ending}; `tidegate down` ends it")
            ),
            run_dir.logs / "up.out",
        )
    supervisor.serve(parts, lambda summary: print(f"{summary}\n{ending}; ^C ends it", flush=True))
    return 0
