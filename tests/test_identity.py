"""Identity covers the text: template, tokenizer and rendered tokens decide what is reused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import rows
from task_studies import TASKS, study_of
from tracked import quiet, trials_in
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from adaptive_lora import __version__, serving
from adaptive_lora.config import StudyConfig, study_from
from adaptive_lora.data.tokens import numbers_digest
from adaptive_lora.errors import ConfigError, DataError, ModelError
from adaptive_lora.models.tasks import CausalTask
from adaptive_lora.models.tasks.prepared import PreparedSet
from adaptive_lora.runner.comparison_input import Selection, read_comparison_input
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.recorded import EXAMPLES
from adaptive_lora.runner.trial import run_trial
from adaptive_lora.serving import BaseMismatch, content_hash, content_hashes, load_adapter
from adaptive_lora.tracking import StudyRun, connect

Study = Callable[..., StudyConfig]
BaseContext = Callable[..., StudyContext]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') }} " + TEMPLATE


def talks(count: int = 24) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "yes"}]}
        for number in range(count)
    ]


def templated(base: Path, template: object) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(base)
    return base


@pytest.fixture
def chat(base_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a small study of conversations on a base with a chat template."""
    base = shutil.copytree(base_folder, tmp_path / "chat")
    data = tmp_path / "talks.json"
    data.write_text(json.dumps(talks()), encoding="utf-8")
    return {
        "model": str(templated(base, TEMPLATE)), "data": str(data), "template": "auto",
        "max_tokens": 100,
    }  # fmt: skip


# --- the base's content hash


def wrote(name: str, text: str) -> Callable[[Path], object]:
    def change(base: Path) -> None:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text, encoding="utf-8")

    return change


def states(name: str, **settings: object) -> Callable[[Path], object]:
    def change(base: Path) -> None:
        path = base / name
        before = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**before, **settings}), encoding="utf-8")

    return change


def adds_token(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["red"])
    tokenizer.save_pretrained(base)


@pytest.mark.parametrize(
    "change",
    [
        lambda base: templated(base, TEMPLATE.replace("<assistant>", "<model>")),
        wrote("chat_template.jinja", TEMPLATE + " "),
        wrote("additional_chat_templates/tool_use.jinja", TEMPLATE),
        wrote("chat_template.json", json.dumps({"chat_template": TEMPLATE})),  # of processors
        adds_token,
        wrote("added_tokens.json", '{"red": 258}'),
        wrote("special_tokens_map.json", '{"eos_token": "a"}'),
        wrote("sentencepiece.bpe.model", "x"),
        wrote("source.spm", "x"),
        wrote("qwen.tiktoken", "x"),
        states("tokenizer_config.json", add_bos_token=True),
        states("config.json", eos_token_id=[256, 65]),
        states("generation_config.json", eos_token_id=[256, 65]),
    ],
)  # fmt: skip
def test_what_decides_the_text_is_part_of_the_base(change: Callable[[Path], object], chat: dict[str, Any]) -> None:
    base = Path(chat["model"])
    before = content_hash(base)
    assert before == content_hash(base)
    change(base)
    assert content_hash(base) != before


@pytest.mark.parametrize(
    "change",
    [
        states("generation_config.json", repetition_penalty=1.3, num_beams=3, do_sample=True),
        states("generation_config.json", eos_token_id=[256]),  # that of config.json
        lambda base: (base / "generation_config.json").unlink(),
        wrote("README.md", "notes"),
        wrote("training_args.json", "{}"),
    ],
)
def test_what_decides_nothing_is_not(change: Callable[[Path], object], base_folder: Path,
                                     tmp_path: Path) -> None:  # fmt: skip
    base = shutil.copytree(base_folder, tmp_path / "base")
    change(base)
    assert content_hashes(base) == content_hashes(base_folder)
    assert len(content_hashes(base)) == 1  # as version 0.1 had it: nothing else decides there


def test_the_start_of_a_decoder_counts_where_only_generation_config_states_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    states("generation_config.json", decoder_start_token_id=1)(tmp_path)
    one = content_hash(tmp_path)
    states("generation_config.json", decoder_start_token_id=2)(tmp_path)
    other = content_hash(tmp_path)
    assert one != other
    states("config.json", decoder_start_token_id=2)(tmp_path)
    stated = content_hash(tmp_path)
    states("generation_config.json", decoder_start_token_id=3)(tmp_path)
    assert content_hash(tmp_path) == stated
    (tmp_path / "generation_config.json").write_text("{")  # damaged: transformers says so
    assert content_hash(tmp_path) != stated


def test_the_embedded_base_has_the_hash_that_version_0_1_gave_it() -> None:
    base = serving.base_folder("embedded", "embedded")
    assert content_hashes(base) == ("89d56e6401a888a7ab55867a32e55ed38309c0fc6f6eede00e1cf85cb6b9330b",)


def test_an_adapter_that_version_0_1_recorded_is_served_as_then(
    chat: dict[str, Any], make_bench: BaseContext, tmp_path: Path
) -> None:
    context = make_bench(**chat, methods="uniform:rank=2", max_steps=1)
    folder = run_trial(context, next(context.config.trials()), tmp_path / "adapter").folder
    base = Path(chat["model"])
    now, then = content_hashes(base)
    record = json.loads((folder / serving.RECORD).read_text())
    assert record["base"]["content_hash"] == now == context.base.reference.content_hash
    assert context.base.is_recorded_as(now)
    assert context.base.is_recorded_as(then)
    assert not context.base.is_recorded_as("0" * 64)
    (base / "chat_template.jinja").write_text(TEMPLATE + "!")
    with pytest.raises(BaseMismatch, match=f"the adapter was trained on {now[:12]}"):
        load_adapter(folder)
    record["base"]["content_hash"] = then  # whose author never saw the template
    (folder / serving.RECORD).write_text(json.dumps(record))
    load_adapter(folder)
    states("config.json", layer_norm_epsilon=1e-3)(base)
    with pytest.raises(BaseMismatch, match=f"the adapter was trained on {then[:12]}"):
        load_adapter(folder)


# --- token ids and loss masks


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_digest_of_what_it_learns_from(task: str, tmp_path: Path) -> None:
    config = study_from({**study_of(task, tmp_path), "methods": "uniform:rank=2"})
    context = StudyContext(config)
    parts, trial = context.splits(0), next(config.trials())
    assert context.fingerprint["tokens"] == parts.digest == StudyContext(config).tokens_digest
    fewer = dataclasses.replace(parts, test=parts.test[1:], train=(*parts.train, parts.test[0]))
    assert fewer.digest != parts.digest
    first = parts.train[0]
    names = [field.name for field in dataclasses.fields(first)]
    changes: dict[str, Any] = {
        "first_label": lambda number: number + 1,
        "input_ids": lambda ids: (*ids[:-1], 1),
        "gaps": lambda gaps: ((4, 5),),
    }
    changed = [name for name in names if name in changes and getattr(first, name) is not None]
    others = [dataclasses.replace(first, **{name: changes[name](getattr(first, name))}) for name in changed]
    for name, ids in getattr(first, "inputs", {}).items():
        others.append(dataclasses.replace(first, inputs={**first.inputs, name: (*ids[:-1], 1)}))
    assert others or task == "image_classification"
    signature = context.signature(trial)
    for other in others:
        context._splits = [dataclasses.replace(parts, train=(other, *parts.train[1:]))]
        for kept in ("tokens_digest", "fingerprint", "study_id", "study_key"):
            context.__dict__.pop(kept, None)
        assert context.signature(trial) != signature, other


def test_numbers_that_stand_elsewhere_have_another_digest() -> None:
    made = [
        [{"ids": [1, 2], "at": [3]}],
        [{"ids": [1], "at": [2, 3]}],
        [{"ids": [1, 2]}, {"at": [3]}],
        [{"ids": [1, 2], "at": [3]}, {}],
        [{"ids": [1, 2], "at": [-3]}],
        [{"at": [1, 2], "ids": [3]}],
    ]
    assert len({numbers_digest(one) for one in made}) == len(made)
    assert numbers_digest([{"at": [3], "ids": (1, 2)}]) == numbers_digest(made[0])


# --- studies


def test_a_changed_template_is_refused_with_both_hashes(in_store: Study, chat: dict[str, Any], tmp_path: Path) -> None:
    config = in_store(**chat)
    quiet(config)
    first = trials_in(tmp_path)[0].data.tags
    template = Path(chat["model"]) / "chat_template.jinja"
    template.write_text(TEMPLATE.replace("<{{", "### {{").replace("<assistant>", "### assistant>"))
    now = content_hash(Path(chat["model"]))
    for seeds in ("0", "0,1"):
        with pytest.raises(ModelError) as refused:
            quiet(in_store(**chat, seeds=seeds))
        text = str(refused.value)
        assert f"changed (SHA-256 {first['base_hash'][:16]} then, {now[:16]} now) since" in text
        assert "--study NAME" in text
    assert len(trials_in(tmp_path)) == 1
    quiet(in_store(**chat, study="new"))
    assert len({run.data.tags["tokens_digest"] for run in trials_in(tmp_path)}) == 2
    template.write_text(TEMPLATE)
    assert quiet(in_store(**chat))[0].trials_run == 0  # put back, the first study goes on


class Later(datetime):
    """The clock of another day."""

    @classmethod
    def now(cls, tz: Any = None) -> Later:
        return cls(2031, 5, 4)


def test_the_date_in_a_template_decides_by_the_text_that_it_gives(
    in_store: Study, chat: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    templated(Path(chat["model"]), DATED)
    config = in_store(**chat)
    quiet(config)
    digest = trials_in(tmp_path)[0].data.tags["tokens_digest"]
    assert quiet(config)[0].trials_run == 0  # on the same day
    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    context = StudyContext(config)
    shown = context.base.tokenizer.decode(context.splits(0).train[0].input_ids)
    assert shown.startswith("04 May 2031 <user>")  # no tokens of the day before
    with pytest.raises(DataError) as refused:
        quiet(config)
    text = str(refused.value)
    assert f"changed (digest {digest} then, {context.tokens_digest} now)" in text
    assert "the base's chat template writes the date or time" in text
    assert len(trials_in(tmp_path)) == 1


def test_other_tokens_of_the_same_data_and_base_are_refused(
    in_store: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As another version of transformers may make them."""
    config = in_store()
    quiet(config)
    usual = CausalTask.prepare

    def prepared(task: CausalTask, examples: Any) -> Any:
        made = usual(task, examples)
        return tuple(dataclasses.replace(each, first_label=each.first_label + 1) for each in made)

    monkeypatch.setattr(CausalTask, "prepare", prepared)
    monkeypatch.setenv("ADAPTIVE_LORA_CACHE", "")
    with pytest.raises(DataError, match=r"token ids or loss masks .* by another version of trans"):
        quiet(config)
    quiet(dataclasses.replace(config, study="new"))
    with pytest.raises(DataError, match="token ids differs"):
        read_comparison_input(connect(config.tracking), Selection(query="tags.method = 'uniform-r2'"))


def test_a_study_without_digests_of_tokens_is_refused_by_its_version(in_store: Study, tmp_path: Path) -> None:
    config = in_store()
    outcome, _ = quiet(config)
    study = StudyRun.find(outcome.store, outcome.study_result.study_id)
    client = outcome.store.client
    client.delete_tag(study.run_id, "tokens_digest")
    client.set_tag(study.run_id, "study_id", "study-0000000000")
    with pytest.raises(ConfigError, match=f"by adaptive-lora {__version__} before the identity"):
        quiet(config)


def test_profiles_of_other_data_count_with_their_tokens(
    make_bench: BaseContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps(rows(40, seed=3)), encoding="utf-8")
    context = make_bench(methods=f"empirical:rank=2,profiled_on={other}")
    (trial, *_) = context.config.trials()
    signature = context.signature(trial)
    parts = context.splits(0, (str(other),))
    shifted = tuple(dataclasses.replace(e, first_label=e.first_label + 1) for e in parts.train)
    changed = PreparedSet(
        data=context.task.read(dataclasses.replace(context.config.data, data=str(other))),
        folds=[dataclasses.replace(parts, train=shifted)],
        summary=context.data_summary,
    )
    monkeypatch.setattr("adaptive_lora.runner.profiling.prepare_set", lambda task, data: changed)
    context._task_data.clear()
    assert context.signature(trial) != signature


def test_examples_of_a_test_file_have_their_texts(in_store: Study, data_file: Path, tmp_path: Path) -> None:
    test_data = tmp_path / "test.json"
    test_data.write_text(json.dumps(rows(8, seed=5)), encoding="utf-8")
    config = in_store(test_data=str(test_data))
    outcome, _ = quiet(config)
    study = StudyRun.find(outcome.store, outcome.study_result.study_id)
    texts = outcome.store.read_json(study.run_id, EXAMPLES)
    context = StudyContext(config)
    wanted = {e.id: f"{e.prompt}{e.response}" for e in context.data.test or ()}
    assert texts == wanted
    assert len(texts) == 8
    assert re.search(r"[a-z]", "".join(texts.values()))
