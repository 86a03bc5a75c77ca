"""Study files: unknown keys, all problems at once, signatures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_lora.config import StudyConfig, load_study, option_fields, study_from
from adaptive_lora.errors import ConfigError

SURROUNDINGS = {"base": "b", "data": "d", "precision": "fp32"}


def signatures(study: StudyConfig) -> list[str]:
    """Return the signatures of all trials."""
    return [trial.signature(SURROUNDINGS) for trial in study.trials()]


def test_flat_settings_round_trip() -> None:
    study = study_from({"lr": "1e-4,3e-4", "epochs": "2", "gradient_checkpointing": "true"})
    assert study_from(study.flat()) == study
    assert study.lr == (1e-4, 3e-4)


def test_option_names_are_unique_and_explained() -> None:
    fields = option_fields()
    declared = sum(
        len(dataclasses.fields(field.default)) if dataclasses.is_dataclass(field.default) else 1
        for field in dataclasses.fields(StudyConfig)
    )
    assert len(fields) == declared
    assert all(field.metadata["help"] for _, field, _ in fields.values())


def test_all_problems_of_a_file_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("epohcs: 3\nbatch_size: 0\nlr: fast\nmethods: [unifrom]\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_study(path, {})
    message = str(caught.value)
    assert "line 1: unknown setting 'epohcs'; did you mean 'epochs'?" in message
    assert "line 2: batch_size must be at least 1; got 0" in message
    assert "line 3: lr: expected a number, got 'fast'" in message
    assert "did you mean 'uniform'" in message


def test_options_go_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("epochs: 3\nlr: 1e-4\nmethods:\n  - uniform:rank=4\n", encoding="utf-8")
    study = load_study(path, {"epochs": "5"})
    assert (study.train.epochs, study.lr, study.methods) == (5.0, (1e-4,), ("uniform:rank=4",))


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "\x00"])
def test_files_that_are_no_studies(tmp_path: Path, text: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="study file"):
        load_study(path, {})


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_study(tmp_path / "none.yaml", {})


def test_a_file_is_read_by_its_name_alone(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("epochs: 4\n", encoding="utf-8")
    assert load_study(str(tmp_path / "study.yaml")) == study_from({"epochs": 4})
    with pytest.raises(ConfigError, match=r"required the path of a study file; got int"):
        load_study(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"required settings by name, a dictionary; got list"):
        study_from(["epochs"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": "uniform uniform"}, "methods: given more than once: uniform-r16"),
        ({"seeds": "1 1"}, "seeds: given more than once: 1"),
        ({"seeds": ""}, "seeds: required at least one"),
        ({"baseline": "uniform-r9"}, "unknown baseline"),
        ({"validation_share": 0.5, "test_share": 0.5}, "nothing to train on"),
        ({"precision": "int3"}, "must be one of"),
        ({"study": "../up"}, "letters, digits"),
        ({"lr": "nan"}, "expected a number"),
        ({"epochs": "inf"}, "expected a number"),
        ({"gradient_checkpointing": "perhaps"}, "true or false"),
    ],
)
def test_wrong_settings(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study_from(values)


def test_grid_holds_every_combination() -> None:
    study = study_from({"methods": "uniform three_band", "seeds": "0 1", "folds": 2, "lr": "1 2"})
    assert len(list(study.trials())) == len(set(signatures(study))) == 2 * 2 * 2 * 2


def test_other_trials_keep_their_signature_when_the_grid_grows() -> None:
    small = study_from({"methods": "uniform", "seeds": "0"})
    large = study_from({"methods": "three_band uniform", "seeds": "1 0", "lr": "3e-4 1e-3"})
    assert set(signatures(small)) < set(signatures(large))


CHANGES = {
    "batching": "padded",
    "epochs": 9, "max_steps": 7, "batch_size": 3, "accumulation": 2, "schedule": "linear",
    "warmup_share": 0.3, "weight_decay": 0.1, "clip_norm": 0.5, "dropout": 0.2, "alpha": 16.0,
    "base_dropout": False,
    "scaling": "rslora", "probe_rank": 4, "probe_epochs": 2.0,
    "gradient_checkpointing": True, "validations": 2, "patience": 2, "max_skipped_steps": 1,
    "precision": "bf16", "generate": "off", "short_answer_tokens": 4, "profile_batches": 2,
    "profile_batch_size": 2, "max_examples": 50, "max_tokens": 64, "loss_on": "all",
    "validation_share": 0.2, "test_share": 0.2, "split_seed": 1, "folds": 2,
}  # fmt: skip


def test_settings_that_change_numbers_change_the_signature() -> None:
    names = {name for name, (_, field, _) in option_fields().items() if field.metadata["identity"]}
    assert names == set(CHANGES)
    before = signatures(study_from({"methods": "uniform", "seeds": "0"}))[0]
    for name, value in CHANGES.items():
        after = signatures(study_from({"methods": "uniform", "seeds": "0", name: value}))[0]
        assert after != before, name


def test_places_do_not_change_the_signature() -> None:
    before = signatures(study_from({}))
    assert signatures(study_from({"output": "x", "model": "y", "experiment": "z"})) == before
    other = {**SURROUNDINGS, "base": "another"}
    assert next(study_from({}).trials()).signature(other) != before[0]


@given(st.dictionaries(st.sampled_from(sorted(option_fields())), st.text(max_size=12), max_size=6))
def test_any_text_is_taken_or_refused_clearly(values: dict[str, object]) -> None:
    try:
        study = study_from(values)
    except ConfigError:
        return  # any other error fails the test
    assert study_from(study.flat()) == study


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("on", "on"),
        ("yes", "on"),
        ("off", "off"),
        ("no", "off"),
        ("auto", "auto"),
        ("On", "on"),
        ("TRUE", "on"),
        ("False", "off"),
        ("'no'", "off"),
    ],
)
def test_choices_that_yaml_reads_as_true_or_false(tmp_path: Path, word: str, value: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(f"generate: {word}\nrace: off\n", encoding="utf-8")
    study = load_study(path, {})
    assert study.evaluation.generate == value
    assert study.race is False
    path.write_text("loss_on: on\n", encoding="utf-8")  # no choice is spelt so
    with pytest.raises(ConfigError, match=r"line 1: loss_on must be one of .*; got 'on'"):
        load_study(path, {})


def test_a_home_folder_is_found_without_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    places = {name: f"~/{name}" for name in ("model", "data", "test_data", "template", "output")}
    study = study_from(places)
    found = {**vars(study.model), **vars(study.data), **vars(study.tracking)}
    assert {name: found[name] for name in places} == {name: f"/home/somebody/{name}" for name in places}
    assert study_from({"study": "a", "data": "a~b"}).data.data == "a~b"


def test_values_of_a_study_file_are_as_they_are_written(tmp_path: Path) -> None:
    """YAML's own types would make 7, 1.1, 42798, 64 and True of these."""
    path = tmp_path / "study.yaml"
    path.write_text(
        "study: 007\nexperiment: 1.10\ndata_revision: 0123456\nmax_tokens: 0100\n"
        "prompt_column: on\nresponse_column: 2021-05-01\nlr: [1e-3, 2.50e-3]\nseeds: [0, 1]\n"
        "max_examples: null\ntest_data: ~\n",
        encoding="utf-8",
    )
    study = load_study(path, {})
    assert (study.study, study.tracking.experiment) == ("007", "1.10")
    assert (study.data.data_revision, study.data.max_tokens) == ("0123456", 100)
    assert (study.data.prompt_column, study.data.response_column) == ("on", "2021-05-01")
    assert (study.lr, study.seeds, study.data.max_examples) == ((1e-3, 2.5e-3), (0, 1), None)
    assert study.data.test_data is None
    path.write_text("seeds: 1:30\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="expected a whole number, got '1:30'"):
        load_study(path, {})
