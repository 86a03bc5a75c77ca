"""What is wrong with files and addresses is told before anything heavy is loaded."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptive_lora.config import TrackingConfig, study_from
from adaptive_lora.config.store_place import require_reachable
from adaptive_lora.data import reading
from adaptive_lora.errors import TrackingError

HEAVY = {"torch", "transformers", "mlflow", "peft", "accelerate"}
SCRIPT = """
import json, sys
from click.testing import CliRunner
from adaptive_lora.cli import main
found = []
for words in json.load(sys.stdin):
    result = CliRunner().invoke(main, words)
    found.append([result.exit_code, result.output, sorted(sys.modules)])
json.dump(found, sys.stdout)
"""
GOOD = [{"instruction": f"Say {n}", "output": "hi"} for n in range(20)]


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port at which nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield closed.getsockname()[1]


def test_inputs_are_refused_with_nothing_heavy_loaded(closed_port: int, tmp_path: Path) -> None:
    """In one fresh process: once a heavy package is in, it stays."""
    for name, rows in {"good": GOOD, "other": [{"a": "b"}]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "broken.jsonl").write_text('{"instruction": "a"', encoding="utf-8")
    (tmp_path / "broken.csv").write_text("instruction,output\na,b,c\n", encoding="utf-8")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "no.db").write_text("no database", encoding="utf-8")
    good = ("--data", "good.json")
    away = ("--tracking-uri", f"http://user:word@127.0.0.1:{closed_port}")
    cases: list[tuple[tuple[str, ...], str]] = [
        (("study", "--data", "nowhere.json"), "nowhere.json does not exist"),
        (("train", "--data", "nowhere.json"), "nowhere.json does not exist"),
        (("profile", "--data", "nowhere.json"), "nowhere.json does not exist"),
        (("transfer", "--data", "good.json", "--data", "nowhere.json"), "does not exist"),
        (("evaluate", "--adapter", "x", "--data", "nowhere.json"), "does not exist"),
        (("study", *good, "--test-data", "nowhere.csv"), "nowhere.csv does not exist"),
        (("study", *good, "--model", "./gone"), "model folder ./gone does not exist"),
        (("plan", "--model", "/gone/model"), "model folder /gone/model does not exist"),
        (("study", "--data", "broken.jsonl"), "line 1"),
        (("study", "--data", "broken.csv"), "line 2"),
        (("train", "--data", "broken.parquet"), "broken.parquet"),
        (("study", *good, "--prompt-column", "nope"), "missing nope"),
        (("train", *good, "--image-column", "picture"), "missing picture"),
        (("study", "--data", "other.json"), "found a"),
        (("study", *good, "--methods", "empirical:profiled_on=gone.json"), "gone.json"),
        (("study", *good, *away), "cannot be used: no answer"),
        (("compare", *away), "cannot be used: no answer"),
        (("study", *good, "--tracking-uri", f"postgresql://127.0.0.1:{closed_port}/x"), "no conn"),
        (("study", *good, "--tracking-uri", "nonsense://there"), "'nonsense' is no kind of store"),
        (("study", *good, "--tracking-uri", "sqlite:///no.db"), "no SQLite database"),
        (("study", *good, "--tracking-uri", "sqlite:///no.db/x.db"), "is no folder"),
        (("compare",), "there is no tracking store"),
    ]
    before = sorted(tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([words for words, _ in cases]),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        check=True,
    )
    for (words, says), (code, output, modules) in zip(cases, json.loads(done.stdout), strict=True):
        assert code == 2, (words, output)
        assert says in output, (words, output)
        assert "word@" not in output
        assert not HEAVY & set(modules), words
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("status", [200, 401, 404, 503])
def test_a_server_that_answers_counts_as_reachable(status: int) -> None:
    """Whether it lets this user in is seen later, with what it says."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n".encode())

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        uri = f"http://user:word@127.0.0.1:{server.getsockname()[1]}/mlflow"
        require_reachable(TrackingConfig(tracking_uri=uri))
        thread.join()


def test_a_server_without_an_answer_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptive_lora.config.store_place._SILENCE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TrackingError, match="no answer"):
            require_reachable(TrackingConfig(tracking_uri=uri))


def test_rows_that_were_read_early_are_not_read_again(data_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = study_from({"data": str(data_file)}).data
    table = reading.read_ahead(config)
    with monkeypatch.context() as patch:
        patch.setattr(reading, "read_file", None)
        assert reading.read_table(config) is table
    assert reading.read_table(config) is not table  # kept for one study
