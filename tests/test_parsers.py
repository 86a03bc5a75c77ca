"""Whatever is read, the result is valid or an error for users."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptive_lora.allocation import METHODS, MethodSpec, RankPlan, method_options
from adaptive_lora.config import DataConfig, StudyConfig, load_study, option_fields, study_from
from adaptive_lora.data import load_examples
from adaptive_lora.errors import AdaptiveLoraError
from adaptive_lora.methods.importance import ImportanceProfile

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


@given(st.dictionaries(st.sampled_from(list(option_fields())), PLAIN, max_size=6))
def test_settings(values: dict[str, object]) -> None:
    try:
        study = study_from(values)
    except AdaptiveLoraError:
        return
    assert study_from(study.flat()) == study


METHOD = st.one_of(
    st.text(max_size=40),
    st.builds(
        lambda name, options: f"{name}:" + ",".join(f"{k}={v}" for k, v in options),
        st.sampled_from(list(METHODS)),
        st.lists(
            st.tuples(
                st.sampled_from(list(method_options())),
                st.one_of(st.integers().map(str), st.floats().map(str), st.text(max_size=8)),
            ),
            max_size=3,
        ),
    ),
)


@given(METHOD)
def test_methods(text: str) -> None:
    try:
        spec = MethodSpec.parse(text)
    except AdaptiveLoraError:
        return
    values = spec.to_dict()
    assert MethodSpec.build(values.pop("name"), values).label == spec.label


PLAN = {
    "method": "uniform-r1", "budget": None, "trainable_parameters": 8, "left_out": [],
    "scale_policy": "constant_alpha_over_r", "certificate": None,
    "sites": [{"name": "a", "layer": 0, "role": "up", "tower": "", "in_features": 4,
               "out_features": 4, "rank": 1, "alpha": 2.0, "scale": 2.0, "lr_multiplier": 1.0,
               "parameters": 8}],
}  # fmt: skip


@given(st.dictionaries(st.sampled_from([*PLAN, *PLAN["sites"][0]]), PLAIN, min_size=1))  # type: ignore[index,misc]
def test_plans(changes: dict[str, object]) -> None:
    assert RankPlan.from_dict(PLAN).trainable_parameters == 8
    site = {**PLAN["sites"][0], **{k: v for k, v in changes.items() if k not in PLAN}}  # type: ignore[index,dict-item]
    values = {**PLAN, "sites": [site], **{k: v for k, v in changes.items() if k in PLAN}}
    try:
        plan = RankPlan.from_dict(values)
    except AdaptiveLoraError:
        return
    assert all(entry.rank >= 1 for entry in plan.entries)
    json.dumps(plan.to_dict(), allow_nan=False)


PROFILE = {
    "metric": "a", "scores": {"a": 1.0}, "spectra": None, "replicates": [], "tokens": 1,
    "processed_tokens": 1, "seconds": 1.0, "seed": 0, "stability": None, "stability_note": "",
}  # fmt: skip


@given(st.dictionaries(st.sampled_from(list(PROFILE)), PLAIN, max_size=3), st.text(max_size=5))
def test_profiles(changes: dict[str, object], tail: str) -> None:
    try:
        profile = ImportanceProfile.from_json(json.dumps({**PROFILE, **changes}) + tail)
    except AdaptiveLoraError:
        return
    assert all(0 <= score < float("inf") for score in profile.scores.values())


@in_one_folder
@given(st.one_of(st.binary(max_size=60), PLAIN.map(lambda v: json.dumps(v).encode())))
def test_study_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(content)
    with contextlib.suppress(AdaptiveLoraError):
        assert isinstance(load_study(path, {}), StudyConfig)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ROWS = st.lists(st.fixed_dictionaries({"instruction": TEXT | PLAIN, "output": TEXT | PLAIN}), max_size=3)


@in_one_folder
@given(ROWS, st.sampled_from(["json", "jsonl", "csv", "tsv"]), st.integers(0, 30))
def test_data_files(tmp_path: Path, rows: list[dict[str, object]], ending: str, cut: int) -> None:
    """Truncated and odd files, in every text format."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    sign = {"csv": ",", "tsv": "\t"}.get(ending)
    if sign is not None:
        lines = [f"instruction{sign}output"]
        lines += [f"{row['instruction']}{sign}{row['output']}" for row in rows]
    text = "[" + ",".join(lines) + "]" if ending == "json" else "\n".join(lines)
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(text.encode("utf-8", "surrogatepass")[: len(text) - cut or None])
    try:
        examples = load_examples(DataConfig(data=str(path))).examples
    except AdaptiveLoraError:
        return
    assert all(example.response.strip() for example in examples)


@pytest.mark.parametrize(
    "text",
    [
        "naïve café", "日本語の文", "שלום עולם", "مرحبا", "👩‍🚀🏳️‍🌈", 
        "e\u0301a\u0308", "\u202eabc", "a\u200bb", "<b>&amp;",
        "\u2028line\u2029", "a\u0085b", "{input.__class__}", "{prompt}", "%s%n", "${HOME}",
        "\ufeffBOM", "007", "NA", "null", "=1+1", "ǅ ß ﬁ", "𝒜" * 50,
    ],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_odd_but_valid_text_comes_through(tmp_path: Path, text: str, ending: str) -> None:
    import pandas as pd

    rows = [{"instruction": f"{text} {n}", "input": text, "output": text} for n in range(3)]
    path, frame = tmp_path / f"rows.{ending}", pd.DataFrame(rows)
    if ending in ("json", "jsonl"):
        frame.to_json(path, orient="records", lines=ending == "jsonl", force_ascii=False)
    elif ending == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, sep="\t" if ending == "tsv" else ",", index=False)
    examples = load_examples(dataclasses.replace(DataConfig(), data=str(path))).examples
    assert [example.response for example in examples] == [text] * 3
    assert all(f"{text} {n}" in example.prompt for n, example in enumerate(examples))


def test_a_few_seconds_of_fuzzing(tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed (pip install 'adaptive-lora[fuzz]')")
    script = Path(__file__).parent / "fuzz" / "parsers.py"
    done = subprocess.run(
        [sys.executable, str(script), "-max_total_time=5", "-seed=1"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(re.findall(r"Done (\d+) runs", done.stderr)[-1]) > 10
