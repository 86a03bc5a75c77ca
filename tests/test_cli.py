"""The command line: fast help, plans, and one clear message with exit code 2 for bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete, get_completion_class
from click.testing import CliRunner, Result
from documents import require_schema

from adaptive_lora.cli import main
from adaptive_lora.cli.options import WORKERS
from adaptive_lora.config import option_fields

Options = dict[str, object]


def invoke(*words: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


def flags(options: Options, **changes: object) -> list[str]:
    """Return options as command-line words."""
    pairs = {**options, **changes}.items()
    return [word for name, value in pairs for word in (f"--{name.replace('_', '-')}", str(value))]


COMMANDS = (
    "study", "plan", "profile", "train", "evaluate", "export", "compare", "doctor", "ui",
)  # fmt: skip


def test_help_is_light() -> None:
    code = (
        "import sys\n"
        "from adaptive_lora.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'peft', 'datasets', 'scipy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    if command in ("study", "train"):
        text = " ".join(result.output.split())
        fields = option_fields()
        if command == "train":
            fields = {name: found for name, found in fields.items() if name not in NOT_OF_A_TRIAL}
        for name, (_, field, _) in fields.items():
            assert f"--{name.replace('_', '-')}" in text
            unit = field.metadata["unit"]
            assert not unit or f"[unit: {unit}]" in text or re.search(rf"{METAVARS[unit]} ", text)
        assert text.count("[default:") >= len(fields)
        groups = re.findall(r"(?m)^  ([A-Z][a-z ]+): $", result.output)
        assert groups == [
            "Model", "Data", "Study", "Training", "Evaluation", "Importance profile", "Tracking", "Where to run",
        ]  # fmt: skip


NOT_OF_A_TRIAL = {"methods", "seeds", "baseline", "race", *WORKERS}
METAVARS = {"tokens": "TOKENS", "steps": "STEPS", "minutes": "MINUTES", "%": "PERCENT"}


@pytest.mark.parametrize(
    ("words", "begun", "values"),
    [
        (["study", "--batching"], "pa", ["packed", "padded"]),
        (["plan", "--roles"], "q", ["query", "qkv"]),
        (["train", "--method"], "trun", ["truncate", "truncate_retrain"]),
        (["study", "--epochs"], "", []),
        (["study", "--methods"], "grow", ["grow_prune"]),
        (["study", "--methods"], "uniform:rank=8 waterfill:bu", ["uniform:rank=8 waterfill:budget="]),
        (["study", "--methods"], "waterfill:rank=8,met", ["waterfill:rank=8,metric="]),
        (["study", "--methods"], "empirical:metric=stab", ["empirical:metric=stable_rank"]),
        (["plan", "--method"], "uniform:placement=a", ["uniform:placement=all", "uniform:placement=attention"]),
        (["plan", "--method"], "uniform:rank=8,ran", []),
        (["plan", "--method"], "nobody:", []),
        (["study", "--trust-remote-code"], "t", ["true"]),
        (["profile", "--metric"], "heavy", ["heavy_tail"]),
        (["schema"], "pl", ["plan", "planted"]),
        (["study", "--data"], "emb", ["emb", "embedded"]),
        (["study", "--template"], "dia", ["dia", "dialogue"]),
    ],
)
def test_shells_complete_choices_and_methods(words: list[str], begun: str, values: list[str]) -> None:
    found = ShellComplete(main, {}, "adaptive-lora", "_ADAPTIVE_LORA_COMPLETE").get_completions(words, begun)
    assert [item.value for item in found] == values


@pytest.mark.parametrize(
    ("shell", "words", "printed"),
    [
        ("bash", ["study", "--methods", "waterfill", ":", "bu"], "plain,budget="),
        ("bash", ["study", "--methods", "uniform", ":", "placement", "=", "at"], "plain,attention"),
        ("bash", ["study", "--methods", "=", "grow"], "plain,grow_prune"),
        ("bash", ["study", "--methods", "trun"], "plain,truncate\nplain,truncate_retrain"),
        ("zsh", ["study", "--methods", "waterfill:bu"], "plain\nwaterfill:budget=\n_"),
        ("fish", ["study", "--methods", "waterfill:bu"], "plain,waterfill:budget="),
    ],
)
def test_every_shell_gets_its_own_form(
    shell: str, words: list[str], printed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["adaptive-lora", *words]
    monkeypatch.setenv("COMP_WORDS", ("\n" if shell == "bash" else " ").join(line))
    monkeypatch.setenv("COMP_CWORD", words[-1] if shell == "fish" else str(len(line) - 1))
    complete = get_completion_class(shell)
    assert complete is not None
    assert complete(main, {}, "adaptive-lora", "_ADAPTIVE_LORA_COMPLETE").complete() == printed


def test_shells_complete_paths() -> None:
    complete = ShellComplete(main, {}, "adaptive-lora", "_ADAPTIVE_LORA_COMPLETE")
    kinds = [complete.get_completions(["study", option], "")[0].type for option in ("--test-data", "--output")]
    assert kinds == ["file", "dir"]


EXACT = {
    ("uniform", "--rank", 8): 3_145_728,
    ("uniform", "--rank", 16): 6_291_456,
    ("linear_decay", "--rank", 16, "--low-rank", 4): 3_751_936,
    ("attention_heavy",): 4_325_376,
    ("three_band", "--rank", 16): 5_980_160,
    ("uniform", "--rank", 16, "--placement", "attention"): 2_359_296,
    ("uniform", "--rank", 16, "--placement", "feed_forward"): 3_932_160,
    ("uniform", "--rank", 16, "--target-names", "c_attn,c_proj"): 4_325_376,
    ("uniform", "--rank", 16, "--target-names", "c_fc"): 1_966_080,
}


@pytest.mark.parametrize(("words", "parameters"), EXACT.items())
def test_plan_of_dialogpt_medium(shared_models: Path, words: tuple[object, ...], parameters: int) -> None:
    folder = shared_models / "dialogpt-medium"
    result = invoke("plan", "--model", folder, "--method", *words, "--json")
    plan = json.loads(result.output)
    assert plan["trainable_parameters"] == parameters
    assert plan["total_parameters"] == 354_823_168
    assert plan["reduction_vs_full"] == 1 - parameters / 354_823_168
    assert sum(site["parameters"] for site in plan["sites"]) == parameters
    columns = [
        "name",
        "layer",
        "role",
        "tower",
        "in_features",
        "out_features",
        "rank",
        "alpha",
        "scale",
        "step_size",
        "lr_multiplier",
        "parameters",
    ]
    assert all(list(site) == columns for site in plan["sites"])


def test_plan_with_a_budget_and_a_table(base_folder: Path) -> None:
    words = ("plan", "--model", base_folder, "--method", "three_band", "--budget", 5000)
    plan = json.loads(invoke(*words, "--json").output)
    assert 5000 - 160 < plan["trainable_parameters"] <= 5000
    table = invoke(*words).output
    assert "transformer.h.0.attn.c_attn" in table
    assert "fewer than full fine-tuning" in table


def test_direction_up(base_folder: Path) -> None:
    words = ("plan", "--model", base_folder, "--method", "linear_decay", "--direction", "up")
    sites = json.loads(invoke(*words, "--json").output)["sites"]
    assert sites[0]["rank"] == 4
    assert sites[-1]["rank"] == 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "unifrom"), "did you mean 'uniform'"),
        (("--rank", 0), "rank must be at least 1"),
        (("--rank", 33), "smaller side"),
        (("--budget", 7), "too small"),
        (("--budget", 10**9), "cannot be used"),
        (("--placement", "somewhere"), "placement must be one of"),
        (("--target-names", "q_proj"), "unknown target name"),
        (("--method", "empirical"), "needs an importance profile"),
        (("--profile", "nope.json"), "cannot be read"),
        (("--model", "./nowhere"), "does not exist"),
    ],
)
def test_bad_plans_exit_with_2(base_folder: Path, words: tuple[object, ...], message: str) -> None:
    result = invoke("plan", "--model", base_folder, *words)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere.json"}, "does not exist"),
        ({"model": "./nowhere"}, "does not exist"),
        ({"methods": "uniform:rank=33"}, "smaller side"),
        ({"methods": "uniform:budget=3"}, "too small"),
        ({"max_tokens": 20}, "no supervised token"),
        ({"response_column": "nope"}, "missing nope"),
        ({"template": "nope"}, "unknown template"),
        ({"test_share": 0.001}, "leave the test split empty"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"tracking_uri": "http://127.0.0.1:9"}, "cannot be used"),
        ({"tracking_uri": "nonsense://x"}, "cannot be used"),
        ({"seeds": "1 1", "lr": "fast", "methods": "unifrom"}, "did you mean"),
    ],
)
def test_bad_studies_leave_nothing_behind(options: Options, tmp_path: Path, changes: Options, message: str) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    result = invoke("study", *flags(options, **changes))
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_no_disk_space(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    full = type("Usage", (), {"free": 1024})()
    monkeypatch.setattr("adaptive_lora.tracking.connection.shutil.disk_usage", lambda path: full)
    result = invoke("study", *flags(options))
    assert result.exit_code == 2
    assert "0 MiB free" in result.output


def test_profile_feeds_plan(options: Options, base_folder: Path) -> None:
    given = {k: v for k, v in options.items() if k not in ("methods", "lr", "seeds")}
    profile = invoke("profile", *flags(given), "--metric", "gradient_norm")
    assert profile.exit_code == 0, profile.output
    path = "adaptive-lora-out/profile_gradient_norm_seed0.json"
    planning = ("plan", "--model", base_folder, "--profile", path, "--json")
    plan = invoke(*planning, "--method", "empirical:rank=4,metric=gradient_norm")
    ranks = {site["rank"] for site in json.loads(plan.output)["sites"]}
    assert len(ranks) > 1
    other = invoke(*planning, "--method", "empirical:rank=4")
    assert other.exit_code == 2
    assert "follows weight_gradient, but the profile given measured gradient_norm" in other.output


def test_plan_prints_the_certificate_of_a_spectrum(options: Options, base_folder: Path) -> None:
    given = {k: v for k, v in options.items() if k not in ("methods", "lr", "seeds")}
    profile = invoke("profile", *flags(given), "--metric", "whitened_gradient")
    assert profile.exit_code == 0, profile.output
    path = "adaptive-lora-out/profile_whitened_gradient_seed0.json"
    planning = ("plan", "--model", base_folder, "--profile", path, "--method", "waterfill")
    shown = invoke(*planning, "--rank", "4", "--max-rank", "8", "--abstain", "1000")
    assert shown.exit_code == 0, shown.output
    assert "proved optimal" in shown.output
    assert "over uniform at equal parameters" in shown.output
    assert "so ranks are uniform's" in shown.output
    plan = json.loads(invoke(*planning, "--rank", "4", "--max-rank", "8", "--json").output)
    assert plan["certificate"]["captured"] >= plan["certificate"]["uniform"]
    assert max(site["rank"] for site in plan["sites"]) <= 8
    rates = invoke("plan", "--model", base_folder, "--method", "lr_only:of=linear_decay")
    assert "x1.6" in rates.output  # rank 16 of linear_decay over rank 10 of uniform
    drawn = [
        json.loads(
            invoke("plan", "--model", base_folder, "--method", "random:of=linear_decay", "--seed",
                   seed, "--json").output
        )["sites"]
        for seed in ("0", "0", "1")
    ]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]


def test_train_then_evaluate_gives_the_same_loss(options: Options) -> None:
    given = {k: v for k, v in options.items() if k not in ("methods", "seeds")}
    trained = invoke("train", *flags(given), "--method", "three_band:rank=3", "--adapter", "out")
    assert trained.exit_code == 0, trained.output
    again = invoke("train", *flags(given), "--method", "three_band:rank=3", "--json")
    assert "was finished before" in again.output
    require_schema("train", json.loads(again.stdout))
    data = {k: v for k, v in given.items() if k not in ("model", "lr")}
    scores = invoke("evaluate", *flags(data), "--adapter", "out", "--json")
    require_schema("evaluate", json.loads(scores.stdout))
    loss = json.loads(scores.stdout)["test/loss"]
    assert f"test loss {loss:.4f}" in trained.output
    occupied = invoke("train", *flags(given), "--adapter", "out")
    assert occupied.exit_code == 2
    assert "is not empty" in occupied.output


def test_what_trains_nothing_plans_no_method(options: Options, tmp_path: Path) -> None:
    """Methods that do not fit a base stop a study, and neither a profile nor the score of an adapter."""
    given = {k: v for k, v in options.items() if k not in ("methods", "seeds", "lr")}
    trained = invoke("train", *flags(given), "--method", "uniform:rank=2", "--adapter", "out")
    assert trained.exit_code == 0, trained.output
    (tmp_path / "study.yaml").write_text("methods: uniform:rank=33\n", encoding="utf-8")
    given["config"] = tmp_path / "study.yaml"
    study = invoke("study", *flags(given))
    assert study.exit_code == 2
    assert "would get rank 33; required at most 32" in study.output
    profile = invoke("profile", *flags(given), "--metric", "stable_rank")
    assert profile.exit_code == 0, profile.output
    del given["model"]
    scores = invoke("evaluate", *flags(given), "--adapter", "out", "--json")
    assert scores.exit_code == 0, scores.output
    assert f"test loss {json.loads(scores.stdout)['test/loss']:.4f}" in trained.output


def test_evaluate_takes_the_task_of_its_adapter(tmp_path: Path) -> None:
    """The columns of the data are those of the adapter's task, not of a causal model."""
    rows = [json.dumps({"tokens": ["a", "b"], "ner_tags": ["O", "B-X"]})] * 4
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    result = invoke("evaluate", "nowhere", "--data", tmp_path / "rows.jsonl")
    assert result.exit_code == 2
    assert "nowhere is no adapter folder" in result.output


def test_evaluate_wants_an_adapter(options: Options, tmp_path: Path) -> None:
    data = {k: v for k, v in options.items() if k not in ("model", "lr", "methods", "seeds")}
    for words, message in (
        ((), "needs --adapter"),
        (("--adapter", tmp_path), "is no adapter folder"),
        (("--adapter", "models:/nobody@champion"), "there is no tracking store"),
    ):
        result = invoke("evaluate", *flags(data), *words)
        assert result.exit_code == 2
        assert message in result.output


def test_compare_without_studies() -> None:
    result = invoke("compare", "--tracking-uri", "sqlite:///empty.db")
    assert result.exit_code == 2
    assert "there is no tracking store" in result.output
    assert not Path("empty.db").exists()


def test_doctor(base_folder: Path) -> None:
    result = invoke("doctor", "--model", base_folder, "--json")
    findings = {finding["check"]: finding for finding in json.loads(result.output)}
    assert findings["base model"]["text"].endswith("12 sites")
    assert findings["packages"]["text"].endswith("as pinned")
    assert {"device", "memory", "disk", "tracking", "hub"} <= set(findings)
    assert not Path("mlflow.db").exists()
    broken = invoke("doctor", "--model", "./nowhere", "--json")
    assert broken.exit_code == 2
