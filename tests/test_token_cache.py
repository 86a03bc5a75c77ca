"""Tokens on disk: those of a fresh start, made once; whatever decides them enters their name."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import rows
from task_studies import study_of
from test_conversations import TALK, TEMPLATE
from tokenizers import normalizers
from transformers import AutoTokenizer

from adaptive_lora.config import study_from
from adaptive_lora.data import Example, TokenizedExample, cached_tokens, token_cache
from adaptive_lora.data.arrow_file import Columns, CorruptColumns, integers, read_columns, stored, write_columns
from adaptive_lora.data.token_cache import token_folder, tokenizer_digest
from adaptive_lora.errors import DataError
from adaptive_lora.models.tasks import CausalTask, task_named
from adaptive_lora.runner.context import StudyContext

BaseContext = Callable[..., StudyContext]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a test's tokens are kept."""
    monkeypatch.setenv("ADAPTIVE_LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def kept(folder: Path) -> set[Path]:
    return set(folder.glob("*.arrow"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count of examples of each time that causal tokens are made."""
    counts: list[int] = []
    usual = CausalTask.prepare

    def counted(task: CausalTask, examples: Sequence[Example]) -> Any:
        counts.append(len(examples))
        return usual(task, examples)

    monkeypatch.setattr(CausalTask, "prepare", counted)
    return counts


@pytest.mark.parametrize("task", ["causal", "classification", "seq2seq"])
def test_tokens_from_disk_are_those_of_a_fresh_start(
    task: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = study_from({**study_of(task, tmp_path / "study"), "methods": "uniform:rank=2"})
    first = StudyContext(config).splits(0)
    assert len(kept(folder)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(task_named(config), "prepare", None)  # a second time it is not asked for
        again = StudyContext(config).splits(0)
    monkeypatch.setenv("ADAPTIVE_LORA_CACHE", "")
    fresh = StudyContext(config).splits(0)
    assert first == again == fresh
    assert type(again.train[0].input_ids if task != "classification" else ()) is tuple


def test_conversations_keep_their_gaps(
    folder: Path, base_folder: Path, tmp_path: Path, make_bench: BaseContext, made: list[int]
) -> None:
    base = shutil.copytree(base_folder, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    asked = [{"role": "user", "content": f"{number}?"} for number in range(12)]
    talks = [{"messages": [TALK[0], ask, *TALK[2:]]} for ask in asked]
    data = tmp_path / "talks.json"
    data.write_text(json.dumps(talks), encoding="utf-8")
    options = {"model": str(base), "data": str(data), "template": "auto", "max_tokens": 120}
    first, again = (make_bench(**options).splits(0) for _ in range(2))
    assert made == [12]
    assert first == again
    assert all(example.gaps for example in again.train)


def test_an_example_is_tokenised_once_for_all_folds(make_bench: BaseContext, made: list[int]) -> None:
    context = make_bench(folds=3)
    assert made == [len(context.data.examples)]
    parts = [context.splits(fold) for fold in range(3)]
    assert sum(len(part.test) for part in parts) == len(context.data.examples)
    by_id = {example.id: example for example in parts[0].train}
    shared = [example for example in parts[1].train if example.id in by_id]
    assert shared
    assert all(example == by_id[example.id] for example in shared)


def test_the_collector_of_cycles_rests_while_a_data_set_is_built_and_no_longer(
    make_bench: BaseContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def refuse(task: CausalTask, examples: Sequence[Example]) -> Any:
        seen.append(gc.isenabled())
        raise DataError("an example cannot be used")

    monkeypatch.setattr(CausalTask, "prepare", refuse)
    with pytest.raises(DataError):
        make_bench()
    assert seen == [False]
    assert gc.isenabled()


def test_what_decides_tokens_enters_their_name(
    folder: Path, make_bench: BaseContext, made: list[int], options: dict[str, Any], tmp_path: Path
) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps([*rows(39), {**rows(40)[39], "output": "other"}]))
    changes: list[dict[str, Any]] = [
        {},
        {"max_tokens": 100},
        {"loss_on": "all"},
        {"template": "plain"},
        {"data": str(other)},
    ]
    for number, change in enumerate(changes, start=1):
        make_bench(**change)
        assert len(kept(folder)) == len(made) == number, change
    for same in ({"lr": "1e-3"}, {"seeds": "7"}, {"methods": "uniform:rank=4"}, {"folds": 2}):
        make_bench(**same)
        assert len(made) == len(changes), same


def test_what_a_tokenizer_does_is_told_by_its_digest(base_folder: Path) -> None:
    def changed(**attributes: Any) -> str | None:
        tokenizer = AutoTokenizer.from_pretrained(base_folder)
        for name, value in attributes.items():
            setattr(tokenizer, name, value)
        return tokenizer_digest(tokenizer)

    added = AutoTokenizer.from_pretrained(base_folder)
    added.add_tokens(["red"])
    lower = AutoTokenizer.from_pretrained(base_folder)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    plain = changed()
    others = {
        changed(chat_template=TEMPLATE),
        changed(chat_template=TEMPLATE + " "),
        changed(model_max_length=7),
        changed(eos_token="a"),
        tokenizer_digest(added),
        tokenizer_digest(lower),
    }
    assert len(others | {plain, None}) == 8
    used = AutoTokenizer.from_pretrained(base_folder)
    used(["red green", "a"], truncation=True, max_length=3, padding=True)
    assert tokenizer_digest(used) == plain  # what the last call asked for does not enter
    assert tokenizer_digest(object()) is None  # written in Python: nothing is kept


def test_another_process_finds_the_same_digest(base_folder: Path) -> None:
    """Hashes of Python's own differ between processes; none may enter."""
    script = (
        "import sys; from transformers import AutoTokenizer;"
        "from adaptive_lora.data.token_cache import tokenizer_digest;"
        "print(tokenizer_digest(AutoTokenizer.from_pretrained(sys.argv[1])))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(base_folder)],
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split()[-1] == tokenizer_digest(AutoTokenizer.from_pretrained(base_folder))


def _flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "corruption",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: _flipped(content, len(content) - 1),  # in a number
        lambda content: _flipped(content, 30),  # in the head
        lambda content: b"\x80\x04" + content,  # of another format
    ],
    ids=["empty", "cut", "number", "head", "format"],
)
def test_a_damaged_file_is_made_anew_with_a_warning(
    folder: Path,
    make_bench: BaseContext,
    made: list[int],
    caplog: pytest.LogCaptureFixture,
    corruption: Callable[[bytes], bytes],
) -> None:
    first = make_bench().splits(0)
    (path,) = kept(folder)
    damaged = corruption(path.read_bytes())
    path.unlink()  # `first` is still mapped from the sound one
    path.write_bytes(damaged)
    assert make_bench().splits(0) == first
    assert len(made) == 2
    assert f"tokens in {path} are recomputed: the file is corrupt" in caplog.text
    assert make_bench().splits(0) == first
    assert len(made) == 2  # the file is sound again


def test_a_file_of_other_tokens_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    numbers = [{"ids": [1, 2, 3], "at": []}, {"ids": [], "at": [4]}]
    written = write_columns(path, "key", *integers(numbers))
    assert listed(written) == listed(read_columns(path, "key", 2)) == numbers
    assert path.stat().st_mode & 0o077 == 0  # the data may be private
    for key, count in (("other", 2), ("key", 3)):
        with pytest.raises(CorruptColumns):
            read_columns(path, key, count)


@pytest.mark.parametrize("room", [None, 0, 900, 20_000])
def test_columns_without_a_name_go_to_memory_where_the_disk_takes_no_more(
    room: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            rest = (room or 0) - self.tell()
            if rest <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(memoryview(content)[:rest])

    if room is not None:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full(tmp_path / "file", "w+"))
    numbers = [{"ids": list(range(index % 7)), "at": [index]} for index in range(2_500)]
    assert listed(stored(*integers(numbers), tmp_path)) == numbers
    assert listed(stored(*integers(numbers), None)) == numbers


def listed(columns: Columns) -> list[dict[str, list[int]]]:
    """Return the rows of columns of integers."""
    values = [[row for chunk in columns.chunks(name) for row in chunk.to_pylist()] for name in columns.names]
    return [dict(zip(columns.names, row, strict=True)) for row in zip(*values, strict=True)]


def test_a_disk_that_takes_nothing_is_gone_without(
    folder: Path,
    make_bench: BaseContext,
    made: list[int],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        first = make_bench().splits(0)
    assert "tokens cannot be cached" in caplog.text
    assert "No space left" in caplog.text
    assert list(folder.iterdir()) == []
    caplog.clear()
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADAPTIVE_LORA_CACHE", str(tmp_path / "file"))
    assert make_bench().splits(0) == first
    assert caplog.text.count("tokens cannot be cached") == 1
    assert len(made) == 3  # made again in memory where the disk took some of them, once where it took none


def test_the_folder_is_bounded_and_tidied(
    folder: Path, make_bench: BaseContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bench()
    (oldest,) = kept(folder)
    make_bench(max_tokens=100)
    (second,) = kept(folder) - {oldest}
    abandoned, young = folder / "a.partial", folder / "b.partial"
    for path, age in ((oldest, 0), (abandoned, 0), (second, 10**9)):
        path.touch()
        os.utime(path, (age, age))
    young.touch()
    make_bench()  # using it makes it the newest
    assert oldest.stat().st_mtime > second.stat().st_mtime
    monkeypatch.setattr(token_cache, "MOST_BYTES", 2.5 * oldest.stat().st_size)
    make_bench(max_tokens=110)
    assert len(kept(folder)) == 2
    assert second not in kept(folder)
    assert oldest in kept(folder)
    assert young.exists()
    assert not abandoned.exists()
    monkeypatch.setattr(token_cache, "MOST_BYTES", 1)
    earlier = folder / "a.safetensors"
    earlier.write_bytes(b"tokens of an earlier version")
    make_bench(max_tokens=105)
    assert len(kept(folder)) == 1  # what is in use stays, however large
    assert not earlier.exists()


def test_processes_at_one_folder_do_not_disturb_each_other(folder: Path) -> None:
    examples = [Example(id=str(i), prompt=f"p{i}", response="r", where="") for i in range(50)]
    wanted = tuple(
        TokenizedExample(id=e.id, input_ids=(1, 2, i), first_label=1, prompt_length=1, response="r")
        for i, e in enumerate(examples)
    )
    wrong: list[object] = []

    def work() -> None:
        for number in range(20):
            (folder / "none").parent.mkdir(parents=True, exist_ok=True)
            found = cached_tokens(examples, TokenizedExample, lambda some: wanted, {"number": number % 2})
            if found != wanted:
                wrong.append(found)
            if number % 5 == 0:
                for path in kept(folder):
                    path.unlink(missing_ok=True)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not list(folder.glob("*.partial*"))


def test_the_folder_is_where_the_platform_keeps_such_things(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ADAPTIVE_LORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert token_folder() == tmp_path / "xdg" / "adaptive-lora" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert token_folder() == Path.home() / ".cache" / "adaptive-lora" / "tokens"
    monkeypatch.setenv("ADAPTIVE_LORA_CACHE", "")
    assert token_folder() is None
