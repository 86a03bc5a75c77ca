"""`doctor` on machines that are not well, and `ui`, which only its own machine reaches."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner, Result
from servers import PATIENCE, free_port

from adaptive_lora.cli import doctor, main
from adaptive_lora.config import study_from

ROOT = Path(__file__).resolve().parents[1]
Found = dict[str, dict[str, str]]


def asked(*words: str) -> tuple[int, Found]:
    """Return doctor's exit code, and its findings by check."""
    result = CliRunner().invoke(main, ["doctor", "--json", *words])
    return result.exit_code, {one["check"]: one for one in json.loads(result.stdout)}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions to find instead of those installed here; None: not installed."""
    others: dict[str, str | None] = {}

    def found(name: str) -> str:
        if name not in others:
            return version(name)
        other = others[name]
        if other is None:
            raise PackageNotFoundError(name)
        return other

    monkeypatch.setattr(doctor, "version", found)
    return others


def test_a_machine_that_is_well_gives_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ADVISED", 0.0)
    code, found = asked()
    assert code == 0, found
    assert {one["status"] for one in found.values()} == {"ok"}


@pytest.mark.parametrize(
    ("other", "status", "says"),
    [
        ("2.13.0+cu130", None, ""),
        ("2.14.1", "warn", "2.14.1; the tests ran with 2.13.0"),
        ("2.5.1", "fail", "2.5.1; required >=2.13, pip install 'torch>=2.13'"),
        (None, "fail", "not installed; pip install 'torch>=2.13'"),
    ],
)
def test_another_torch(installed: dict[str, str | None], other: str | None, status: str | None, says: str) -> None:
    installed["torch"] = other
    code, found = asked()
    if status is None:
        assert "torch" not in found
    else:
        assert (found["torch"]["status"], found["torch"]["text"]) == (status, says)
        assert code == {"warn": 1, "fail": 2}[status]


def test_ray_and_its_cluster(installed: dict[str, str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    installed["ray"] = "2.60.0"
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
        cluster = tmp_path / "ray" / "ray_current_cluster"
        for given, status, says in (
            (None, "ok", "Ray 2.60.0"),
            (place, "ok", f"Ray 2.60.0; {place} answers"),
            (f"ray://{place}", "ok", f"ray://{place} answers"),
            (f"http://{place}", "fail", "required auto, HOST:PORT or ray://HOST:PORT"),
            ("host", "fail", "required auto"),
            ("host:x", "fail", "required auto"),
            ("127.0.0.1:1", "fail", "no Ray cluster answers at 127.0.0.1:1"),
            ("nowhere.invalid:6379", "fail", "no Ray cluster answers at nowhere.invalid:6379"),
            ("auto", "fail", "no Ray cluster was started on this machine"),
        ):
            finding = doctor.ray(study_from({} if given is None else {"engine": "ray", "ray_address": given}))
            assert finding.status == status, finding
            assert says in finding.text
        cluster.parent.mkdir()
        cluster.write_text(f"{place}\n", encoding="utf-8")
        _, found = asked("--ray-address", "auto")
        assert found["ray"]["text"] == f"Ray 2.60.0; {place} answers"
        cluster.write_text("127.0.0.1:1\n", encoding="utf-8")
        monkeypatch.setenv("RAY_ADDRESS", place)
        _, found = asked("--ray-address", "auto")
        assert found["ray"]["text"] == f"Ray 2.60.0; {place} answers"
    installed["ray"] = None
    assert doctor.ray(study_from({})).status == "ok"
    missing = doctor.ray(study_from({"engine": "ray", "ray_address": place}))
    assert (missing.status, 'pip install "adaptive-lora[ray]"' in missing.text) == ("fail", True)


BROKEN = {
    "an extension that does not load": "raise ImportError('libtorch_cpu.so: undefined symbol')",
    "a library that is missing": "raise OSError('libcudart.so.13: cannot open shared object')",
    "an empty folder": "",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_torch_that_cannot_be_imported(content: str, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(content, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "adaptive_lora.cli", "doctor", "--json"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    found = {one["check"]: one for one in json.loads(done.stdout)}
    assert found["device"]["status"] == "fail"
    assert "cannot be checked" in found["device"]["text"]
    assert found["disk"]["text"]  # one failure hides no other
    assert found["python"]["status"] == "ok"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[psutil.Process, int, str]]:
    """A running `adaptive-lora ui`: its process, its port and what it printed."""
    folder, port = tmp_path_factory.mktemp("ui"), free_port()
    log = folder / "log.txt"
    words = ["ui", "--tracking-uri", f"sqlite:///{folder / 'mlflow.db'}", "--port", str(port)]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_WORKERS": "1"}
    with log.open("wb") as output:
        process = psutil.Popen(
            [sys.executable, "-m", "adaptive_lora.cli", *words], cwd=folder, stdout=output,
            stderr=output, env=environment, start_new_session=True,
        )  # fmt: skip
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
        except OSError:
            time.sleep(0.2)
    try:
        yield process, port, log.read_text(encoding="utf-8")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except psutil.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_the_ui_is_for_this_machine_alone(shown: tuple[psutil.Process, int, str]) -> None:
    process, port, printed = shown
    assert "Only this machine reaches it." in printed
    assert "AUTH=basic and ALLOWED_HOSTS" in printed
    family = [process, *process.children(recursive=True)]
    listening = {
        connection.laddr.ip
        for one in family
        for connection in one.net_connections()
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    assert listening == {"127.0.0.1"}
    for header in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search"
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, b'{"max_results": 1}', {**kind, **header})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        assert refused.value.code == 403
        refused.value.close()


def test_a_server_that_does_not_know_its_name(shown: tuple[psutil.Process, int, str]) -> None:
    port = shown[1]
    code, found = asked("--tracking-uri", f"http://127.0.0.1:{port}")
    assert found["tracking"]["status"] == "ok", found
    assert "health OK" in found["tracking"]["text"]
    code, found = asked("--tracking-uri", f"http://127.1:{port}")  # the same, by another name
    assert code == 2
    assert "--allowed-hosts NAME[:PORT]" in found["tracking"]["text"]
    assert "PASSWORD" not in found["tracking"]["text"]  # which would not help
    result: Result = CliRunner().invoke(main, ["compare", "--tracking-uri", f"http://127.1:{port}"])
    assert result.exit_code == 2
    assert "--allowed-hosts NAME[:PORT]" in result.output
