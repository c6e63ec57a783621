"""A zombie says so, and so does who is started wrongly."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from support.apiserver import ApiServer
from support.waiting import until
from tidegate_operator.cluster import main, runner

pytestmark = pytest.mark.apiserver

SECONDS = 60.0


def test_zombies_fail_their_probe(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    options = main.parse(["--no-election", "--listen", "127.0.0.1:0"])
    operator = main.Operator(options, server.client().access)
    operator.start()

    def probe() -> tuple[int, str]:
        url = f"http://127.0.0.1:{operator.web.port}/healthz"
        try:
            with urllib.request.urlopen(url, timeout=5) as found:
                return found.status, found.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    try:
        until(lambda: operator.runner.published is not None, "published", SECONDS)
        assert probe() == (200, "ok\n")
        with monkeypatch.context() as patch:
            patch.setattr(runner, "STUCK_SECONDS", -1.0)
            code, text = probe()
            assert (code, "stuck" in text) == (500, True)
        operator.beat()
        with monkeypatch.context() as patch:
            patch.setattr(main, "SILENT_SECONDS", -1.0)
            assert probe() == (500, "the event loop hangs\n")
        operator.watches.pods.stop()
        assert probe() == (500, "the thread that watches pods has ended\n")
    finally:
        operator.stop()


def test_what_is_wrong_with_the_arguments_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The logs of this process would go to this test's output, also when that is closed.
    monkeypatch.setattr(main, "configure_logs", lambda _: None)
    assert main.main(["--kubeconfig", "/nowhere"]) == 1
    assert "/nowhere" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main.parse(["--listen", "here"])
    assert "'here' is not host:port" in capsys.readouterr().err


def test_start_imports_no_client_library() -> None:
    """It lies in the image, for the command line."""
    code = (
        "import sys; import tidegate_operator.cluster.main; "
        "assert 'kubernetes' not in sys.modules; import kubernetes"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
