"""Sequence to sequence: T5 from a table to a proven adapter."""

from __future__ import annotations

import json
import random
from pathlib import Path

import mlflow
import pytest
import torch
from task_bases import SIZE, WORDS, run_and_prove, save_base, small_study, write_rows

from adaptive_lora.config import StudyConfig
from adaptive_lora.errors import ModelError
from adaptive_lora.models.tasks.scores import exact, rouge
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import run_trial
from adaptive_lora.serving import answer, load_adapter

T5 = {
    "d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 258,
    "pad_token_id": 257, "eos_token_id": 256, "decoder_start_token_id": 257,
}  # fmt: skip


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert SIZE["hidden_size"] == T5["d_model"]
    return save_base(tmp_path_factory.mktemp("t5"), "T5Config", T5, "T5ForConditionalGeneration")


def study(model: Path, tmp_path: Path, **changes: object) -> StudyConfig:
    draw = random.Random(0)
    rows = []
    for number in range(40):
        first, second = draw.sample(WORDS, 2)
        rows.append({"input": f"{number} {first} {second}", "target": f"{second} {first}"})
    return small_study(model, write_rows(tmp_path / "rows.json", rows), **changes)


def test_study(t5: Path, own_store: str, tmp_path: Path) -> None:
    config = study(
        t5,
        tmp_path,
        methods="uniform:rank=2 waterfill:rank=1 adalora:rank=1 uniform:rank=2,towers=decoder",
        max_steps=8,
        tracking_uri=own_store,
    )
    proven = run_and_prove(config)
    towers = {record.method: {site["tower"] for site in record.plan["sites"]} for record in proven.records}
    assert towers["uniform-r2"] == {"encoder", "decoder"}
    assert towers["uniform-r2-decoder"] == {"decoder"}
    for record in proven.records:
        test = record.test
        assert test is not None
        assert test.exact_match_E is not None
        assert record.metrics["test/rouge_l"] == pytest.approx(test.further_E["rouge_l"].mean())
        assert record.metrics["test/perplexity"] == pytest.approx(test.perplexity)
    assert "rouge l" in (Path(proven.report).read_text(encoding="utf-8"))
    served = mlflow.pyfunc.load_model(proven.champion)
    answers = served.predict([{"prompt": "7 red old\n"}], params={"max_new_tokens": 4})
    assert isinstance(answers[0], str)


def test_loss_is_the_models_own(t5: Path, tmp_path: Path) -> None:
    """The decoder sees the target moved by one, as T5 itself moves it; padding changes nothing."""
    context = StudyContext(study(t5, tmp_path))
    test = context.splits(0).test
    batch = context.task.collate(test)
    model = context.base.model
    own = model.prepare_decoder_input_ids_from_labels(batch.labels)
    mask = batch.inputs["decoder_attention_mask"].bool()
    assert torch.equal(batch.inputs["decoder_input_ids"][mask], own[mask])
    result = context.losses(model, test)
    for example, nll in zip(test, result.nll_E, strict=True):
        alone = context.task.collate([example])
        loss = model(input_ids=alone.input_ids, attention_mask=alone.attention_mask, labels=alone.labels).loss
        assert nll == pytest.approx(float(loss) * example.supervised_tokens, rel=1e-4)


def test_generation_does_not_depend_on_the_batch(t5: Path, tmp_path: Path) -> None:
    context = StudyContext(study(t5, tmp_path))
    test = context.splits(0).test
    together = context.score(context.base.model, test)
    single = StudyContext(study(t5, tmp_path, eval_batch_size=1)).score(context.base.model, test)
    assert together.exact_match_E is not None
    assert together.exact_match_E.tolist() == single.exact_match_E.tolist()
    assert together.further_E["rouge_l"].tolist() == single.further_E["rouge_l"].tolist()


BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 258,
    "max_position_embeddings": 24, "decoder_start_token_id": 256, "bos_token_id": None,
    "eos_token_id": 256, "pad_token_id": 257,
}  # fmt: skip


def test_a_tokenizer_without_padding_and_a_decoder_of_few_positions(tmp_path: Path) -> None:
    base = save_base(tmp_path / "bart", "BartConfig", BART, "BartForConditionalGeneration")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    context = StudyContext(study(base, tmp_path))
    assert context.base.tokenizer.pad_token_id is None
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    assert outcome.test.exact_match_E is not None
    loaded = load_adapter(tmp_path / "adapter")
    inputs = [{"prompt": text} for text in ("red old 7", "blue")]
    texts = answer(loaded, inputs, 99)
    assert texts == [answer(loaded, [row], 99)[0] for row in inputs]
    del settings["eos_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="neither a pad nor an end-of-text token"):
        StudyContext(context.config)


def test_rouge_by_hand() -> None:
    class Wanted:
        response = "the cat sat on the mat"

    scores = rouge(["the cat on a mat"], [Wanted])
    assert scores["rouge1"][0] == pytest.approx(2 * (4 / 5 * 4 / 6) / (4 / 5 + 4 / 6))
    assert scores["rouge2"][0] == pytest.approx(2 * (1 / 4 * 1 / 5) / (1 / 4 + 1 / 5))
    assert exact([" the cat sat on the mat"], [Wanted], None, [()]).tolist() == [1.0]
