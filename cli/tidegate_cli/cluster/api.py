"""One API server, as the kubeconfig says: JSON in and out, errors for people, exec and logs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import urllib3
from tidegate_kube.resources import PODS, Resource

from tidegate_cli.cluster.kubeconfig import present as kubeconfig_present
from tidegate_cli.errors import CliError

CONNECT_SECONDS = 5.0
READ_SECONDS = 60.0
PAGE_OBJECTS = 500
EXEC_SECONDS = 60.0
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"


class ApiError(CliError):
    """The server's answer was no. `code` is HTTP's, `reason` the API's word."""

    def __init__(self, what: str, code: int, reason: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.code = code
        self.reason = reason


@dataclass(frozen=True)
class Ran:
    """What a command in a container said."""

    code: int
    out: str
    err: str


class Api:
    """Thread-safe. Every call raises ApiError, or CliError where the server does not answer."""

    def __init__(self, configuration: Any, name: str) -> None:
        """`configuration`: kubernetes.client.Configuration; `name`: for people."""
        from kubernetes import client  # noqa: PLC0415 - slow

        self.name = name
        self.server: str = configuration.host
        self._configuration = configuration
        self._client = client
        # Its pool knows the certificates; requests are made here, as bytes.
        self._pool = client.ApiClient(configuration).rest_client.pool_manager

    # ---- objects -------------------------------------------------------------------

    def get(self, path: str, **query: str) -> Any:
        return json.loads(self.request("GET", path, query))

    def find(self, path: str) -> Any | None:
        """None: there is none."""
        try:
            return self.get(path)
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    def items(self, resource: Resource, namespace: str = "", **query: str) -> Iterator[Any]:
        """Every object of a kind, page by page, each with its apiVersion and kind."""
        return self.each(resource.path(namespace), **query)

    def each(self, path: str, **query: str) -> Iterator[Any]:
        more = ""
        while True:
            page = self.get(
                path, limit=str(PAGE_OBJECTS), **({"continue": more} if more else {}), **query
            )
            kind = page["kind"].removesuffix("List")
            for item in page.get("items") or ():
                yield {"apiVersion": page["apiVersion"], "kind": kind, **item}
            more = page["metadata"].get("continue") or ""
            if not more:
                return

    def create(self, path: str, body: Any) -> Any:
        return json.loads(self.request("POST", path, {}, body, "application/json"))

    def apply(self, path: str, body: Any, manager: str, force: bool) -> Any:
        """Server-side apply."""
        query = {"fieldManager": manager, "force": "true" if force else "false"}
        return json.loads(self.request("PATCH", path, query, body, APPLY))

    def merge(self, path: str, body: Any) -> Any:
        return json.loads(self.request("PATCH", path, {}, body, MERGE))

    def delete(self, path: str, *, foreground: bool = False) -> bool:
        """False: there was none."""
        policy = "Foreground" if foreground else "Background"
        try:
            self.request("DELETE", path, {"propagationPolicy": policy})
        except ApiError as error:
            if error.code != 404:
                raise
            return False
        return True

    def text(self, path: str, **query: str) -> bytes:
        """An answer that is no JSON: a log."""
        return self.request("GET", path, query)

    def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Any = None,
        content_type: str = "",
    ) -> bytes:
        url = f"{self.server.rstrip('/')}{path}"
        if query:
            url += f"?{urlencode(query)}"
        headers = {"accept": "application/json, */*", **self._credentials()}
        if content_type:
            headers["content-type"] = content_type
        try:
            answer = self._pool.request(
                method,
                url,
                headers=headers,
                body=None if body is None else json.dumps(body).encode(),
                timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
                retries=False,
            )
        except urllib3.exceptions.HTTPError as error:
            why = getattr(error, "reason", None) or error
            raise CliError(f"{self.server} does not answer: {why}", "is the cluster up?") from error
        data: bytes = answer.data
        if answer.status >= 400:
            raise _refused(method, path, answer.status, data)
        return data

    # ---- containers ------------------------------------------------------------------

    def execute(self, namespace: str, pod: str, container: str, command: list[str]) -> Ran:
        """Run `command` in a container and wait for it. CliError: it cannot be run there."""
        try:
            running = self._exec(namespace, pod, container, command)
            running.run_forever(timeout=EXEC_SECONDS)
            if running.is_open():
                running.close()
                raise CliError(f"{pod}: {command[0]} did not end in {EXEC_SECONDS:.0f} seconds")
            out, err = running.read_stdout(timeout=0), running.read_stderr(timeout=0)
            return Ran(_code(running), out or "", err or "")
        except self._client.ApiException as error:
            raise CliError(
                f"cannot run a command in pod {namespace}/{pod}: {error.reason}"
            ) from error

    def begin(self, namespace: str, pod: str, container: str, command: list[str]) -> Any:
        """Start `command` there, with its standard input open: kubernetes.stream's WSClient, in
        bytes. CliError: it cannot be started."""
        try:
            return self._exec(namespace, pod, container, command, stdin=True, binary=True)
        except self._client.ApiException as error:
            raise CliError(
                f"cannot run a command in pod {namespace}/{pod}: {error.reason}"
            ) from error

    def _exec(
        self,
        namespace: str,
        pod: str,
        container: str,
        command: list[str],
        *,
        stdin: bool = False,
        binary: bool = False,
    ) -> Any:
        # Not by CoreV1Api: with it come the models of everything, most of a second of CPU.
        from kubernetes.stream import ws_client as untyped  # noqa: PLC0415

        query = [
            ("container", container),
            *(("command", word) for word in command),
            *(("stdin", "true") for _ in range(stdin)),
            ("stdout", "true"),
            ("stderr", "true"),
        ]
        ws_client: Any = untyped
        return ws_client.websocket_call(
            self._configuration,
            "GET",
            self.server.rstrip("/") + PODS.path(namespace, pod, "exec"),
            headers=self._credentials(),
            query_params=query,
            _preload_content=False,
            binary=binary,
        )

    def _credentials(self) -> dict[str, str]:
        """As headers."""
        return {one["key"]: one["value"] for one in self._configuration.auth_settings().values()}


def _code(running: Any) -> int:
    """The exit code; what the library makes of a command that could not be started is an error."""
    try:
        return int(running.returncode)
    except (KeyError, TypeError, ValueError, IndexError):
        return 126


def _refused(method: str, path: str, code: int, data: bytes) -> ApiError:
    try:
        status = json.loads(data)
        message, reason = str(status.get("message", "")), str(status.get("reason", ""))
    except (ValueError, AttributeError):
        message, reason = data.decode(errors="replace").strip()[:200], ""
    remedy = ""
    if code in (401, 403):
        remedy = "the kubeconfig's user may not do this"
    return ApiError(message or f"{method} {path}: HTTP {code}", code, reason, remedy)


def connect(kubeconfig: str | None, context: str | None) -> Api:
    """The cluster of a kubeconfig (default: KUBECONFIG, else ~/.kube/config), else, inside a
    pod, the cluster that this is. CliError: there is none, or it cannot be used."""
    try:
        from kubernetes import client  # noqa: PLC0415 - slow
        from kubernetes import config as untyped  # noqa: PLC0415
    except ImportError as error:
        raise CliError(
            f"a cluster needs the Python package kubernetes ({error})",
            "pip install 'tidegate[cli]'",
        ) from error

    if kubeconfig is not None and not os.path.isfile(kubeconfig):
        raise CliError(f"there is no kubeconfig {kubeconfig}", "give a file that is there")
    config: Any = untyped
    configuration = client.Configuration()
    load: Callable[[], str]

    def of_file() -> str:
        config.load_kube_config(kubeconfig, context, client_configuration=configuration)
        if context is not None:
            return context
        _, active = config.list_kube_config_contexts(kubeconfig)
        return str(active["name"])

    def of_pod() -> str:
        config.load_incluster_config(client_configuration=configuration)
        return "of this pod"

    load = of_file
    if kubeconfig is None and context is None and not kubeconfig_present():
        load = of_pod
    try:
        name = load()
    except config.ConfigException as error:
        raise CliError(f"no cluster: {error}", "give --kubeconfig and --context") from error
    except Exception as error:  # whatever the library stumbles over in a file that is none
        what = kubeconfig or "the kubeconfig"
        text = " ".join(str(error).split())
        raise CliError(
            f"{what} cannot be read as a kubeconfig: {text}", "give --kubeconfig another"
        ) from error
    configuration.retries = False
    return Api(configuration, name)
