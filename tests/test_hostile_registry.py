"""A tracking server that means harm: what it sends stays in its folder."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_bad_inputs import require_refusal, tree

from adaptive_lora.cli import main

RUN = "0123456789abcdef0123456789abcdef"
ESCAPES = (
    "../evil", "../../../../../../../../tmp/evil", "/tmp/evil", "a/../../evil", "..%2f..%2fevil",
    "%2e%2e/evil", "..\\..\\evil", "file:///tmp/evil", "adapter/../../../evil",
)  # fmt: skip


GOOD = "a.json"


class _Hostile(BaseHTTPRequestHandler):
    """Answers as MLflow does, but lists files that lie elsewhere."""

    listed = ""
    asked: list[str]

    def do_GET(self) -> None:
        """Answer a question."""
        self.asked.append(self.path)
        if "/runs/get" in self.path:
            info = {
                "run_id": RUN, "run_uuid": RUN, "experiment_id": "0", "status": "FINISHED",
                "artifact_uri": "mlflow-artifacts:/0/artifacts", "lifecycle_stage": "active",
            }  # fmt: skip
            self._say({"run": {"info": info, "data": {}}})
        elif "/experiments/get" in self.path:
            experiment = {"experiment_id": "0", "name": "a", "lifecycle_stage": "active"}
            self._say({"experiment": experiment})
        elif "path=" in self.path or self.path.endswith("/mlflow-artifacts/artifacts"):
            self._say({"files": [{"path": self.listed, "is_dir": False, "file_size": 4}]})
        elif "/mlflow-artifacts/artifacts/" in self.path:
            self._say({"evil": True})
        else:
            self._say({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}, 404)

    do_POST = do_GET

    def _say(self, values: object, code: int = 200) -> None:
        body = json.dumps(values).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[tuple[type[_Hostile], str]]:
    """A hostile server: its handler and its address."""
    kind = type("Hostile", (_Hostile,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        try:
            yield kind, f"http://127.0.0.1:{listener.server_port}"
        finally:
            listener.shutdown()
            thread.join()


@pytest.mark.parametrize("listed", [GOOD, *ESCAPES])
def test_files_of_a_registry_stay_in_their_folder(
    listed: str, server: tuple[type[_Hostile], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, address = server
    kind.listed = listed
    temporary = tmp_path / "a" / "b" / "temporary"
    temporary.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    words = ["export", "--merged", f"runs:/{RUN}/adapter", "out", "--tracking-uri", address]
    before = tree(tmp_path)
    require_refusal(CliRunner().invoke(main, words), "")
    assert any("path=" in path for path in kind.asked)  # the list was asked for
    fetched = any("/artifacts/0/artifacts/adapter/a.json" in path for path in kind.asked)
    assert fetched == (listed == GOOD)
    outside = {name: content for name, content in tree(tmp_path).items() if not name.startswith("a/b/temporary/")}
    assert outside == before
    assert not Path("/tmp/evil").exists()
