"""Forgetting: other data scored before and after training, compared by seed and example, and bounded."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import rows
from mlflow.entities import Run
from synthetic_study import BASE_LOSS, FROZEN_LOSS, scores, study
from task_studies import TASKS, study_of
from tracked import Finished, quiet, trials_in, words_of

import adaptive_lora as al
from adaptive_lora.analysis.comparison import Comparison, VerdictKind, compare
from adaptive_lora.analysis.comparison.forgetting import ForgettingBound
from adaptive_lora.analysis.report import formats
from adaptive_lora.analysis.report.forgetting_figures import learned_against_forgotten
from adaptive_lora.analysis.report.style import STYLE
from adaptive_lora.analysis.report.svg import to_svg
from adaptive_lora.analysis.report.tables import more_tables, result_table
from adaptive_lora.cli import main
from adaptive_lora.config import RetainedSource, StudyConfig, study_from
from adaptive_lora.config.sections import DataConfig
from adaptive_lora.errors import AdapterError, ConfigError, DataError, ModelError
from adaptive_lora.results import EvalResult, RetainedScores, TrialRecord
from adaptive_lora.runner.evaluation import Evaluation

OLD = "0123456789abcdef"
BASELINE, BETTER = "uniform-r8", "uniform-r8-better"
FROZEN = scores(FROZEN_LOSS, 0)


def retained(forgotten: float, seed: int, *, examples: int = 30) -> RetainedScores:
    """Return scores that lose `forgotten`, a little more or less by example, on the same examples for every seed."""
    before = scores(1.0, 0, examples=examples)
    own_E = np.random.default_rng([seed, 5]).normal(0, 0.02, examples)
    order = np.random.default_rng(seed).permutation(examples)  # pairs are found by name
    after = EvalResult(
        example_ids=tuple(np.array(before.example_ids)[order].tolist()),
        nll_E=(before.nll_E + before.tokens_E * (forgotten + own_E))[order],
        tokens_E=before.tokens_E[order],
        correct_E=None,
    )
    return RetainedScores(source="old.jsonl", before=before, after=after)


def remembering(
    forgotten: Mapping[str, float], seeds: Sequence[int] = range(6), effects: Mapping[str, float] | None = None
) -> list[TrialRecord]:
    """Return a study whose methods forget so much; `BETTER` has a lower test loss."""
    effects = effects or {BASELINE: 0.0, **({BETTER: -0.3} if BETTER in forgotten else {})}
    return [
        dataclasses.replace(record, retained={OLD: retained(forgotten[record.method], record.seed)})
        for record in study(effects, seeds)
    ]


def compared(records: Sequence[TrialRecord], **options: object) -> Comparison:
    return compare(records, baseline=BASELINE, base_scores=FROZEN, **options)


def test_forgetting_is_the_loss_after_minus_before_paired_by_seed_and_example() -> None:
    records = remembering({BASELINE: 0.1, BETTER: 0.25})
    comparison = compared(records)
    base, better = (method.forgetting["old.jsonl"] for method in comparison.methods)
    for label, found in ((BASELINE, base), (BETTER, better)):
        by_hand = [r.retained[OLD].after.loss - r.retained[OLD].before.loss for r in records if r.method == label]
        assert found.forgotten.values == pytest.approx(by_hand)
        assert found.forgotten.mean == pytest.approx(np.mean(by_hand))
        assert found.forgotten.interval.low < np.mean(by_hand) < found.forgotten.interval.high
        assert found.loss == pytest.approx(1.0 + np.mean(by_hand))
    assert base.to_baseline is None
    # The seeds' own noise is equal for both and goes with the pairs.
    assert better.to_baseline.values == pytest.approx([0.15] * 6)
    (source,) = comparison.retained
    assert (source.name, source.examples, source.base_loss) == ("old.jsonl", 30, pytest.approx(1.0))


def test_scores_on_other_examples_are_refused() -> None:
    first, *others = remembering({BASELINE: 0.1})
    wrong = retained(0.1, 0)
    wrong = dataclasses.replace(wrong, after=dataclasses.replace(wrong.after, example_ids=("x",) * 30))
    with pytest.raises(DataError, match="frozen base, seed 0, fold 0: scored on different test examples"):
        compared([dataclasses.replace(first, retained={OLD: wrong}), *others])


def test_an_adapter_that_changes_nothing_forgets_nothing_and_keeps_any_bound() -> None:
    records = study({BASELINE: 0.0}, range(3))
    kept = RetainedScores(source="old.jsonl", before=scores(1.0, 0), after=scores(1.0, 0))
    comparison = compared(
        [dataclasses.replace(r, retained={OLD: kept}) for r in records], bound=ForgettingBound(loss=0.0)
    )
    (method,) = comparison.methods
    assert method.forgetting["old.jsonl"].forgotten.mean == 0.0
    assert not method.barred
    assert comparison.winner == BASELINE


@pytest.mark.parametrize("bound", [ForgettingBound(loss=0.2), ForgettingBound(share=0.2)])
def test_a_method_that_forgets_too_much_is_better_and_no_champion(bound: ForgettingBound) -> None:
    records = remembering({BASELINE: 0.1, BETTER: 0.25})
    assert compared(records).winner == BETTER
    comparison = compared(records, bound=bound)
    assert comparison.method(BETTER).verdict.kind is VerdictKind.BETTER
    assert comparison.winner == BASELINE
    assert comparison.decision.endswith(f"; the bound on forgetting leaves out {BETTER}")
    text = comparison.method(BETTER).verdict.text
    assert "Not eligible as champion: the upper end of what it forgot of old.jsonl, +0.2" in text
    assert "at most 0.2000 nats per token may be forgotten." in text
    assert "(the champion may forget at most 0.2000)" in " ".join(comparison.notes)


def test_the_upper_end_decides_and_not_the_mean() -> None:
    records = remembering({BASELINE: 0.1})
    change = compared(records).methods[0].forgetting["old.jsonl"].forgotten
    between = (change.mean + change.interval.high) / 2
    comparison = compared(records, bound=ForgettingBound(loss=between))
    assert comparison.winner == "none"
    assert comparison.decision == f"no method is eligible; the bound on forgetting leaves out {BASELINE}"
    assert compared(records, bound=ForgettingBound(loss=change.interval.high)).winner == BASELINE


def test_one_seed_shows_nothing_and_missing_scores_are_named() -> None:
    alone = compared(remembering({BASELINE: 0.0}, seeds=[3]), bound=ForgettingBound(loss=9.0))
    assert "one seed has no interval of what it forgot" in alone.methods[0].barred
    first, *others = remembering({BASELINE: 0.1, BETTER: 0.1})
    records = [dataclasses.replace(first, retained={}), *others]
    assert f"1 trial without scores on old.jsonl, left out of what is said about it: {BASELINE}, seed 0, fold 0." in (
        compared(records).notes
    )
    assert compared(records).methods[0].forgetting["old.jsonl"].missing_seeds == (0,)
    barred = compared(records, bound=ForgettingBound(loss=9.0))
    assert "not every seed has scores on old.jsonl" in barred.methods[0].barred
    assert barred.winner == BETTER


def test_only_the_data_that_a_study_was_last_run_with_are_compared() -> None:
    records = remembering({BASELINE: 0.1})
    assert compared(records, retained=()).retained == ()
    with pytest.raises(ConfigError, match="no trial has scores on retained data"):
        compared(records, retained=(), bound=ForgettingBound(loss=0.1))


def test_column_table_and_figure_are_there_with_retained_data_only() -> None:
    bare = compared(study({BASELINE: 0.0, BETTER: -0.3}, range(3)))
    assert "retained" not in bare.to_dict()
    assert not {"forgetting", "barred"} & set(bare.to_dict()["methods"][0])
    assert not [head for head in result_table(bare).head if "Forgotten" in head]
    records = remembering({BASELINE: 0.1, BETTER: 0.25}, range(3))
    comparison = compared(records, bound=ForgettingBound(loss=0.2))
    table = result_table(comparison)
    column = table.head.index("Forgotten [95 % interval]")
    assert [row[column].value for row in table.rows] == [
        method.forgetting["old.jsonl"].forgotten.mean for method in comparison.methods
    ]
    assert comparison.to_dict()["methods"][1]["forgetting"]["old.jsonl"]["forgotten"]["seeds"] == [0, 1, 2]
    (forgetting,) = (found for found in more_tables(comparison) if found.title == "Forgetting")
    assert forgetting.rows[1][forgetting.head.index("To baseline")].text == "+0.1500"
    assert "Forgotten" in formats.render_markdown(comparison)
    with matplotlib.style.context(STYLE):
        figure = learned_against_forgotten(comparison, records)
    assert figure is not None
    _, svg = to_svg(figure, "figure")
    assert learned_against_forgotten(bare, []) is None
    better = comparison.method(BETTER)
    learned, forgot = FROZEN_LOSS - better.loss.mean, better.forgetting["old.jsonl"].forgotten.mean
    assert f"{BETTER}: learned {learned:.4f}" in svg
    assert f"forgot {forgot:+.4f}" in svg
    assert FROZEN_LOSS - BASE_LOSS < learned < FROZEN_LOSS


# Studies that are run.

RETAINED = "old.jsonl"


@pytest.fixture
def retain_file(tmp_path: Path) -> Path:
    """Rows of another task, of which two are trained on too."""
    others = [{"instruction": f"Say {row['input']}", "output": row["output"], "note": "x"} for row in rows(6, seed=1)]
    trained = [{**row, "note": ""} for row in rows(40)]
    path = tmp_path / RETAINED
    path.write_text("\n".join(map(json.dumps, [*others, *trained])), encoding="utf-8")
    return path


def kept(run: Run) -> dict[str, float]:
    """Return a trial's metrics on the retained data."""
    prefix = f"retained/{RETAINED}/"
    return {name.removeprefix(prefix): value for name, value in run.data.metrics.items() if name.startswith(prefix)}


def by_hand(folder: Path, path: Path, adapter: Path | None) -> float:
    """Return the loss of a base in nats per token of the responses, by transformers and PEFT alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.eval()
    total, tokens = 0.0, 0
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        given = f"\n\n### Input:\n{row['input']}" if row.get("input") else ""
        prompt = tokenizer(f"### Instruction:\n{row['instruction']}{given}\n\n### Response:\n")["input_ids"]
        answer = [*tokenizer(row["output"])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].log_softmax(-1)
        total -= float(log_p[torch.arange(ids.shape[1] - 1), ids[0, 1:]][len(prompt) - 1 :].sum())
        tokens += len(answer)
    return total / tokens


def test_a_study_that_goes_on_with_retained_data_scores_its_saved_adapters(
    in_store: Callable[..., StudyConfig],
    tmp_path: Path,
    retain_file: Path,
    base_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(formats, "draw_all", lambda *_: ())
    own = {"methods": "uniform:rank=2 uniform:rank=1", "lr": "5e-2", "retain_data": [str(retain_file)]}
    quiet(in_store(lr="5e-2"))
    (bare,) = trials_in(tmp_path)
    assert "retained" not in bare.data.tags
    assert not kept(bare)
    outcome, shown = quiet(in_store(**own))
    assert outcome.trials_run == 1
    assert "1 finished trial has no scores on the retained data yet; its saved adapter is scored" in shown
    assert "retained  old.jsonl: 46 rows" in shown
    assert "not used: note" in shown
    repeated = re.search(r"(\d+) of 46 examples have a prompt that is trained on too", shown)
    assert repeated is not None
    assert 20 < int(repeated[1]) < 40  # those of the training split
    late, trained = trials_in(tmp_path)
    assert late.info.run_id == bare.info.run_id
    assert late.data.tags["trial_signature"] == bare.data.tags["trial_signature"]
    for run in (late, trained):
        assert run.info.status == "FINISHED"
        adapter = _file_of(run, "adapter_config.json", tmp_path).parent
        found = kept(run)
        assert found["loss_before"] == pytest.approx(by_hand(base_folder, retain_file, None), abs=1e-5)
        assert found["loss_after"] == pytest.approx(by_hand(base_folder, retain_file, adapter), abs=1e-5)
        assert found["forgetting"] == pytest.approx(found["loss_after"] - found["loss_before"])
        assert abs(found["forgetting"]) > 1e-4
    (source,) = outcome.study_result.comparison.retained
    assert not source.unscored
    # A changed file is another file. A trial whose adapter is lost is named and not trained again.
    retain_file.write_text(retain_file.read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    _file_of(late, "adapter_model.safetensors", tmp_path).unlink()
    again, shown = quiet(in_store(**own, max_forgetting=0.0))
    assert again.trials_run == 0
    assert "no scores on the retained data: uniform-r2·seed0·lr0.05: its adapter cannot be loaded back" in shown
    (changed,) = again.study_result.comparison.retained
    assert (changed.examples, changed.unscored) == (1, ("uniform-r2, seed 0, fold 0",))
    assert [run.data.tags["retained"].split() for run in trials_in(tmp_path)] == [
        [source.digest],
        [source.digest, changed.digest],
    ]
    assert again.study_result.champion is None  # one seed shows nothing
    assert "no method is eligible" in again.study_result.no_champion


def _file_of(run: Run, name: str, store: Path) -> Path:
    """Return a file of the MLflow model that a run logged."""
    for path in store.rglob(name):
        (model,) = (parent / "MLmodel" for parent in path.parents if (parent / "MLmodel").is_file())
        if run.info.run_id in model.read_text(encoding="utf-8"):
            return path
    raise AssertionError(f"{run.info.run_id} has no {name}")


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_scored_before_and_after(
    task: str, tmp_path: Path, own_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "draw_all", lambda *_: ())
    given = {**study_of(task, tmp_path / "own"), "methods": "uniform:rank=2", "tracking_uri": own_store}
    outcome, _ = quiet(study_from({**given, "retain_data": [str(given["data"])]}))
    (method,) = outcome.study_result.comparison.methods
    (source,) = outcome.study_result.comparison.retained
    change = method.forgetting[source.name].forgotten
    assert change.mean == pytest.approx(method.forgetting[source.name].loss - source.base_loss)
    assert change.mean < 0  # the rows are those that it learned
    (adapter,) = {path.parent for path in tmp_path.rglob("adapter_config.json")}
    found = al.evaluate(adapter, str(given["data"]), template="compact", max_tokens=120)
    assert found.digest == source.digest
    assert found.difference == pytest.approx(change.mean, abs=1e-5)


def test_options_of_a_source_come_before_those_of_the_study() -> None:
    study = DataConfig(data="a.json", prompt_column="q", data_subset="main", max_examples=5, test_data="t.json")
    source = RetainedSource.parse("my file.csv:response_column=a, max_examples=9")
    found = source.settings(study)
    assert (found.data, found.prompt_column, found.response_column) == ("my file.csv", "q", "a")
    assert (found.data_subset, found.max_examples, found.test_data) == (None, 9, None)
    assert RetainedSource.parse("C:\\rows.json").data == "C:\\rows.json"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--retain-data", "none.jsonl"], "data file none.jsonl does not exist"),
        (["--retain-data", "empty.jsonl"], "data file empty.jsonl is empty"),
        (["--retain-data", "labels.csv"], "labels.csv: required Alpaca columns"),
        (["--retain-data", "old.jsonl", "--max-forgetting", "-1"], "max_forgetting must be at least 0; got -1"),
        (["--retain-data", "old.jsonl:seed=1"], "unknown option 'seed'"),
        (["--retain-data", "old.jsonl:template=a,template=b"], "'template=b': given twice"),
        (["--retain-data", "planted"], "a planted teacher has no texts that its base has learned"),
        (["--retain-data", "old.jsonl", "--data", "planted"], "retain_data: the loss of a planted study"),
        (["--max-forgetting", "0.1"], "max_forgetting: required --retain-data SOURCE"),
        (["--max-forgetting-percent", "1"], "max_forgetting_percent: required --retain-data SOURCE"),
        (["--max-forgetting", "1", "--max-forgetting-percent", "1"], "required one of them, got both"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_anything_is_written(
    words: list[str], says: str, options: dict[str, object], tmp_path: Path, retain_file: Path
) -> None:
    Path("empty.jsonl").touch()
    Path("labels.csv").write_text("quality\n1\n", encoding="utf-8")
    given = {key: value for key, value in options.items() if f"--{key}" not in words}
    result = CliRunner().invoke(main, ["study", *words_of(given), *words])
    assert result.exit_code == 2, result.output
    assert says in result.output
    assert not (tmp_path / "mlflow.db").exists()


# One adapter and its base on any data.


@pytest.fixture
def saved(finished: Finished) -> Path:
    """Folder of an adapter that a study saved, of uniform rank 2."""
    run = next(run for run in finished.children if run.data.tags["method"] == "uniform-r2")
    return _file_of(run, "adapter_config.json", finished.folder).parent


def test_a_saved_adapter_and_a_peft_model_are_scored_alike(saved: Path, base_folder: Path, retain_file: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = {"template": "compact", "max_tokens": 120}
    found = al.evaluate(saved, f"{retain_file}:max_examples=12", **given)
    assert found.base_mean == pytest.approx(found.scores.before.nll_E.sum() / found.scores.before.tokens_E.sum())
    assert found.difference == pytest.approx(found.mean - found.base_mean)
    assert len(found.examples) == 12
    total = sum(example["difference"] * example["tokens"] for example in found.examples)
    assert total / sum(example["tokens"] for example in found.examples) == pytest.approx(found.difference)
    assert found.interval.low < found.difference < found.interval.high
    assert "old.jsonl: 46 rows, 12 drawn by max_examples" in found.reading[0]
    assert f"<td>{found.mean:.4f}</td>" in found._repr_html_()
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32), str(saved)
    ).train()
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    own = al.evaluate(model, f"{retain_file}:max_examples=12", tokenizer=tokenizer, **given)
    assert all(module.training for module in model.modules() if isinstance(module, torch.nn.Dropout))
    assert own.digest == found.digest
    assert own.scores.after.nll_E == pytest.approx(found.scores.after.nll_E, rel=1e-5)
    assert own.scores.before.nll_E == pytest.approx(found.scores.before.nll_E, rel=1e-5)
    whole = al.evaluate(model, retain_file, tokenizer=tokenizer, **given)
    assert whole.mean == pytest.approx(by_hand(base_folder, retain_file, saved), abs=1e-5)


def test_an_untrained_adapter_changes_nothing_and_has_no_interval(base_folder: Path, retain_file: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def evaluated(**settings: object) -> Evaluation:
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        model = peft.get_peft_model(
            base, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **settings)
        )
        tokenizer = AutoTokenizer.from_pretrained(base_folder)
        return al.evaluate(model, retain_file, tokenizer=tokenizer, template="compact")

    found = evaluated()
    assert found.difference == 0.0
    assert found.interval.low is None
    assert "all 46 examples gave the same value" in str(found)
    with pytest.raises(ModelError, match="initialised by pissa, which changes the base's weights"):
        evaluated(init_lora_weights="pissa")


def test_evaluate_refuses_what_it_cannot_score(saved: Path, base_folder: Path, retain_file: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_folder)
    with pytest.raises(ModelError, match=r"required a PEFT model, .* got a GPT2LMHeadModel"):
        al.evaluate(base, retain_file)
    with pytest.raises(ConfigError, match="evaluate has no option batch; required any of template"):
        al.evaluate(saved, retain_file, batch=3)
    with pytest.raises(ConfigError, match="a saved adapter has that of its base"):
        al.evaluate(saved, retain_file, tokenizer=object())
    with pytest.raises(AdapterError, match="is no adapter folder"):
        al.evaluate(base_folder, retain_file)
    with pytest.raises(ConfigError, match="data: required a file, folder, hub data set or embedded; got a list"):
        al.evaluate(saved, [{"instruction": "a", "output": "b"}])  # type: ignore[arg-type]
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(ConfigError, match="tokenizer: required a loaded one, as AutoTokenizer gives; got 'gpt2'"):
        al.evaluate(adapted, retain_file, tokenizer="gpt2")


def test_the_command_scores_other_data_and_the_test_split_where_asked_for(
    saved: Path, finished: Finished, retain_file: Path, own_store: str
) -> None:
    words = ["evaluate", str(saved), "--template", "compact", "--retain-data", str(retain_file), "--json"]
    words += ["--tracking-uri", own_store]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    (one,) = document.pop("retained")
    assert document == {"schema": "adaptive-lora/evaluate/1"}
    assert one["difference"] == pytest.approx(one["loss"] - one["base_loss"])
    assert "columns   instruction: prompt" in result.stderr
    both = CliRunner().invoke(main, [*words, "--data", finished.config.data.data], catch_exceptions=False)
    assert {"retained", "test/loss"} <= set(json.loads(both.stdout))
    twice = CliRunner().invoke(main, [*words, "--adapter", "x"])
    assert twice.exit_code == 2
    assert "evaluate scores one adapter" in twice.stderr
