"""Secrets of the environment, of URIs and of git remotes are in nothing that is written."""

from __future__ import annotations

import base64
import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import rows
from servers import MlflowProcess, tracking_words
from tracked import words_of

ENVIRONMENT = {
    "HF_TOKEN": "hf_PlantedSecretOfTheHub0123456789",
    "MLFLOW_TRACKING_USERNAME": "planted-secret-user",
    "MLFLOW_TRACKING_PASSWORD": "planted-secret-password",
    "MLFLOW_TRACKING_TOKEN": "planted-secret-tracking-token",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDSECRETKEY",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+aws/key",
    "DATABRICKS_TOKEN": "dapi00plantedsecret",
    "OPENAI_API_KEY": "sk-planted-secret-openai-key",
    "WANDB_API_KEY": "planted-secret-wandb",
}
IN_ADDRESSES = ("planted-secret-in-uri", "planted-secret-in-remote", "planted-secret-in-query")
OPEN = ("MLFLOW_TRACKING_USERNAME",)
"""MLflow writes this as the author of a run (`mlflow.user`)."""
SECRETS = (*(value for name, value in ENVIRONMENT.items() if name not in OPEN), *IN_ADDRESSES)


def found(texts: Iterable[tuple[str, bytes]]) -> list[tuple[str, str]]:
    """Return (where, secret) for each secret that stands somewhere, in any usual encoding."""
    hits = []
    for where, data in texts:
        views = [data]
        if data[:2] == b"\x1f\x8b":
            views.append(gzip.decompress(data))
        for secret in SECRETS:
            login = base64.b64encode(f"user:{secret}".encode())  # of an Authorization header
            forms = [secret.encode(), secret.encode("utf-16-le"), quote(secret, "").encode(), login]
            if any(form in view for form in forms for view in views):
                hits.append((where, secret))
    return hits


def files(folder: Path) -> Iterable[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file() and ".git" not in path.parts:
            yield str(path), path.read_bytes()


@pytest.fixture
def project(tmp_path: Path, base_folder: Path, empty_store: Path) -> Path:
    """A git checkout with a token in its remote, and a script in it that is the command."""
    folder = tmp_path / "project"
    folder.mkdir()
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (folder / "command.py").write_text(DRIVER, encoding="utf-8")
    (folder / "rows.json").write_text(json.dumps(rows(40)), encoding="utf-8")
    remote = "https://token:planted-secret-in-remote@example.org/a.git"
    for words in (["init", "-q"], ["remote", "add", "origin", remote], ["add", "command.py"],
                  ["commit", "-q", "-m", "a"]):  # fmt: skip
        subprocess.run([*git, *words], check=True, capture_output=True)
    shutil.copytree(base_folder, folder / "base")
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder


DRIVER = """
import json, sys, traceback
from click.testing import CliRunner
from adaptive_lora.cli import main
done = []
for words in json.load(open("commands.json")):
    result = CliRunner().invoke(main, words)
    trace = "".join(traceback.format_exception(result.exception)) if result.exception else ""
    done.append([result.exit_code, result.output, trace])
json.dump(done, open(sys.argv[1], "w"))
"""


CACHES = ("ADAPTIVE_LORA_CACHE", "XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR")
"""Left out, so that all of them are in the home folder."""


def fingerprint(folder: Path) -> dict[str, str]:
    """Return the environment of a command: secrets, and a home folder of its own."""
    source = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(source), *filter(None, [os.environ.get("PYTHONPATH")])])
    place = {"HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    others = {name: text for name, text in os.environ.items() if name not in CACHES}
    return {**others, **ENVIRONMENT, **place}


def run(folder: Path, commands: list[tuple[str, ...]], seen: Path) -> list[tuple[int, str, str]]:
    """Run commands in one process; return exit code, what was printed and what was raised."""
    (folder / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "command.py", str(seen)], cwd=folder, env=fingerprint(folder), capture_output=True, check=False
    )
    (folder / "commands.json").unlink()
    assert done.returncode == 0, done.stderr.decode()
    assert found([("output", done.stdout + done.stderr)]) == []
    return [(code, output, trace) for code, output, trace in json.loads(seen.read_text())]


SMALL: dict[str, object] = {
    "model": "base", "data": "rows.json", "template": "compact", "max_tokens": 120,
    "methods": "uniform:rank=2 empirical:rank=1", "seeds": "0", "lr": "1e-2", "max_steps": 2,
    "batch_size": 4, "profile_batches": 1, "profile_batch_size": 2, "validations": 1,
    "generate": "off", "precision": "fp32",
}  # fmt: skip


def test_no_secret_is_written(project: Path, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    small = SMALL
    failing = {**small, "study": "failing", "lr": "1e30", "max_skipped_steps": 0, "max_steps": 4}
    uri = f"http://user:planted-secret-in-uri@127.0.0.1:{port}?token=planted-secret-in-query"
    commands: list[tuple[int, tuple[str, ...]]] = [
        (0, ("study", *words_of({**small, "checkpoints": "memory://user:planted-secret-in-uri@bucket"}))),
        (2, ("study", *words_of({**small, "checkpoints": "none://user:planted-secret-in-uri@bucket"}))),
        (2, ("study", *words_of({**failing, "methods": "uniform:rank=2"}))),
        (0, ("doctor", "--model", "base", "--json")),
        (2, ("doctor", "--model", "base", "--tracking-uri", uri)),
        (0, ("plan", "--model", "base", "--json")),
        (0, ("profile", *words_of({k: v for k, v in small.items() if k not in ("methods", "lr")}))),
        (2, ("study", *words_of({**small, "tracking_uri": uri}))),
        (2, ("compare", "--tracking-uri", uri)),
        (2, ("plan", "--model", "https://u:planted-secret-in-uri@h/m?sig=planted-secret-in-query")),
        (2, ("study", *words_of({**small, "data": "https://u:planted-secret-in-uri@h/rows.json"}))),
        (2, ("study", *words_of({**small, "data": ENVIRONMENT["HF_TOKEN"]}))),
    ]  # fmt: skip
    results = run(project, [words for _, words in commands], tmp_path / "seen.json")
    for (expected, words), (code, output, trace) in zip(commands, results, strict=True):
        assert code == expected or (words[0] == "doctor" and code in (0, 1, 2)), output + trace
        assert found([(words[0], output.encode())]) == []  # causes of errors are not shown
    seen = dict(files(project))
    assert any(path.endswith("report.html") for path in seen)
    assert any(path.endswith("mlflow.db") for path in seen)
    assert any(path.endswith("adapter_model.safetensors") for path in seen)
    assert found(seen.items()) == []


def test_no_secret_is_in_what_an_outage_and_a_stop_leave(project: Path, tmp_path: Path) -> None:
    """Journals, checkpoints, and what reached a real server under an address with a password."""
    (tmp_path / "server").mkdir()
    words = tracking_words(f"sqlite:///{tmp_path}/server/mlflow.db", tmp_path / "server" / "files")
    server = MlflowProcess(words, "/health", tmp_path / "server")
    uri = f"http://user:planted-secret-in-uri@127.0.0.1:{server.port}"
    study = {
        **SMALL, "methods": "uniform:rank=2", "max_steps": 5000, "epochs": 3000,
        "checkpoint_steps": 1, "tracking_uri": uri,
    }  # fmt: skip
    (project / "commands.json").write_text(json.dumps([["study", *words_of(study)]]), "utf-8")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "command.py", str(tmp_path / "seen.json")],
            cwd=project, env=fingerprint(project), stdout=log, stderr=log,
        )  # fmt: skip
    left = project / "adaptive-lora-out"

    def reached() -> bool:
        """Whether the trial is training and its run, which another thread sends, is at the server."""
        journals = left.glob("spool/*/journal.jsonl")
        return any("train/loss" in path.read_text() for path in journals) and any(
            b"uniform-r2" in path.read_bytes() for path in (tmp_path / "server").glob("mlflow.db*")
        )

    try:
        while process.poll() is None and not reached():
            time.sleep(0.05)
    finally:
        server.stop()
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0, (tmp_path / "log").read_text()
    ((code, output, trace),) = json.loads((tmp_path / "seen.json").read_text())
    assert code == 143, output + trace
    (project / "commands.json").unlink()
    ((code, more, trace),) = run(project, [("sync", "--tracking-uri", uri)], tmp_path / "more.json")
    assert code == 2, more + trace
    assert list(left.glob("checkpoints/*/*/training1-step*/tensors.safetensors"))
    assert list(left.glob("spool/*/journal.jsonl"))
    assert any(b"uniform-r2" in content for _, content in files(tmp_path / "server"))
    said = [("log", (tmp_path / "log").read_bytes()), ("said", f"{output}{more}".encode())]
    assert found([*files(project), *files(tmp_path / "server"), *said]) == []


BUG = f"""
import sys
from adaptive_lora import cli

def broken(*_, **__):
    raise RuntimeError("a bug: http://u:planted-secret-in-uri@h {ENVIRONMENT["HF_TOKEN"]}")

import adaptive_lora.cli.doctor
adaptive_lora.cli.doctor.diagnose = broken
cli.main(["doctor"])
"""


def test_the_traceback_of_a_bug_holds_no_secret(project: Path) -> None:
    words = [sys.executable, "-c", BUG]
    done = subprocess.run(words, cwd=project, env=fingerprint(project), capture_output=True)
    assert done.returncode == 1
    assert b"RuntimeError: a bug: http://***@h ***" in done.stderr
    assert b"in broken" in done.stderr  # where it is remains
    assert found([("output", done.stdout + done.stderr)]) == []


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"..." + SECRETS[0].encode())
    (tmp_path / "b.gz").write_bytes(gzip.compress(SECRETS[1].encode()))
    assert {secret for _, secret in found(files(tmp_path))} == {SECRETS[0], SECRETS[1]}
