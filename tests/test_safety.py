"""Nothing from a model, an adapter or a registry runs code."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from tracked import Finished, quiet, runs_in, words_of

from adaptive_lora.cli import main
from adaptive_lora.config import ModelConfig, StudyConfig
from adaptive_lora.errors import ModelError, TrackingError
from adaptive_lora.models.base import load_base, skeleton
from adaptive_lora.serving import TRUST_VARIABLE, content_hash, load_adapter
from adaptive_lora.serving.safety import UnsafeFiles
from adaptive_lora.tracking import connect
from adaptive_lora.tracking.registry import MODEL_TAG, adapter_folder, require_own_code

MODELING = """
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel
Path({canary!r}).write_text("code of the model ran")
class OwnConfig(GPT2Config):
    model_type = "own_gpt"
class OwnModel(GPT2LMHeadModel):
    config_class = OwnConfig
"""


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


def edit(path: Path, **changes: Any) -> None:
    """Change a JSON object in a file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **changes}), encoding="utf-8")


@pytest.fixture
def own_code(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base that works with its own Python code only, which writes `canary` when it runs."""
    folder = tmp_path / "own"
    shutil.copytree(base_folder, folder)
    code = MODELING.format(canary=str(tmp_path / "canary"))
    (folder / "modeling_own.py").write_text(code, encoding="utf-8")
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit(folder / "config.json", auto_map=names, model_type="own_gpt", architectures=["OwnModel"])
    return folder


def test_code_of_a_base_runs_only_where_the_user_says_so(
    own_code: Path, in_store: Callable[..., StudyConfig], options: dict[str, object], tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    for words in (
        ("plan", "--model", own_code),
        ("study", *words_of({**options, "model": own_code})),
        ("profile", *words_of({k: v for k, v in options.items() if k not in ("methods", "lr")}),
         "--model", own_code),
    ):  # fmt: skip
        result = invoke(*words)
        assert result.exit_code == 2, result.output
        assert "give --trust-remote-code true" in result.output
        assert not canary.exists()
    assert invoke("doctor", "--model", own_code).exit_code == 2
    assert not canary.exists()

    planned = invoke("plan", "--model", own_code, "--trust-remote-code", "true")
    assert planned.exit_code == 0, planned.output
    assert canary.exists()
    assert content_hash(own_code) != content_hash(own_code, code=True)


def test_a_tokenizer_of_ones_own_is_asked_for_or_said_not_to_run(
    base_folder: Path, llama_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    for base in (base_folder, llama_folder):
        folder = shutil.copytree(base, tmp_path / base.name)
        edit(folder / "tokenizer_config.json", auto_map=names, tokenizer_class="OwnTokenizer")
    with pytest.raises(ModelError, match="give --trust-remote-code true"):
        load_base(ModelConfig(model=str(tmp_path / llama_folder.name)), torch.float32)
    load_base(ModelConfig(model=str(tmp_path / base_folder.name)), torch.float32)
    assert "names Python code of its own (tokenization_own.OwnTokenizer)" in caplog.text


def test_an_adapter_of_a_base_with_code_says_so(
    own_code: Path, in_store: Callable[..., StudyConfig], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = in_store(model=str(own_code), trust_remote_code=True)
    outcome, shown = quiet(config)
    assert outcome.study_result.champion is not None, shown
    parents = [run for run in runs_in(tmp_path) if "verdict" in run.data.tags]
    assert parents[0].data.tags["trust_remote_code"] == "true"
    assert "code of the base" in outcome.study_result.report().read_text(encoding="utf-8")

    folder = adapter_folder(outcome.study_result.champion.model_uri)
    with pytest.raises(UnsafeFiles, match=TRUST_VARIABLE):
        load_adapter(folder)
    load_adapter(folder, trust_remote_code=True)
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    load_adapter(folder)
    monkeypatch.delenv(TRUST_VARIABLE)
    result = invoke("compare", *words_of({"tracking_uri": config.tracking.tracking_uri}))
    assert result.exit_code == 0, result.output
    assert "nothing registered" in result.output  # the study's record cannot give the permission
    assert "--trust-remote-code" in result.output
    (own_code / "modeling_own.py").write_text("raise SystemExit('changed')", encoding="utf-8")
    with pytest.raises(RuntimeError, match="content hash"):
        load_adapter(folder, trust_remote_code=True)


def test_pickled_weights_are_refused_with_a_way_out(base_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(base_folder, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": 0, **weights}, folder / "pytorch_model.bin")
    config = ModelConfig(model=str(folder))
    with pytest.raises(ModelError, match="pickled weights only") as caught:
        load_base(config, torch.float32)
    assert skeleton(config).num_parameters() > 0  # a plan reads no weights

    torch.save(weights, folder / "pytorch_model.bin")
    code = re.search(r'python -c "(.+)" and give', str(caught.value))
    assert code is not None
    exec(code[1], {})  # what the message tells the user to run
    converted = load_base(ModelConfig(model="./converted"), torch.float32).model.state_dict()
    original = load_base(ModelConfig(model=str(base_folder)), torch.float32).model.state_dict()
    assert all(torch.equal(converted[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("config.json", {"attn_implementation": "evil/kernel"}, "compiled code from the hub"),
        ("config.json", {"_attn_implementation": {"text": "evil/kernel"}}, "compiled code"),
        ("adapter_config.json", {"peft_type": "LORA"}, "give the base alone"),
    ],
)
def test_bases_that_reach_out_are_refused(
    base_folder: Path, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base_folder, folder)
    if not (folder / name).exists():
        (folder / name).write_text("{}", encoding="utf-8")
    edit(folder / name, **changes)
    with pytest.raises(ModelError, match=message):
        load_base(ModelConfig(model=str(folder)), torch.float32)


def test_code_from_another_repository_is_refused_even_where_code_is_trusted(own_code: Path) -> None:
    edit(own_code / "config.json", auto_map={"AutoConfig": "evil/other--modeling.Evil"})
    with pytest.raises(ModelError, match="takes its code from elsewhere"):
        skeleton(ModelConfig(model=str(own_code), trust_remote_code=True))


EVIL = "from pathlib import Path\nPath({canary!r}).write_text('code of the registry ran')\n"


@pytest.mark.parametrize(
    "name",
    [
        "served_adapter.py",
        "code/adapter_serving/__init__.py",
        "code/torch.py",
        "code/adapter_serving/more.so",
        "artifacts/adapter/weights.pkl",
    ],
)
def test_a_model_with_foreign_code_is_compared_but_neither_run_nor_registered(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(finished.folder)
    connect(finished.config.tracking)
    uri = finished.children[0].data.tags[MODEL_TAG]
    require_own_code(uri)
    place = adapter_folder(uri).parents[1]
    original = (place / name).read_bytes() if (place / name).exists() else None
    canary = tmp_path / "canary"
    (place / name).write_text(EVIL.format(canary=str(canary)), encoding="utf-8")
    try:
        with pytest.raises(TrackingError, match="not this version's") as caught:
            require_own_code(uri)
        assert name in str(caught.value)
        load_adapter(adapter_folder(uri))  # by our own code
        assert not canary.exists()
    finally:
        if original is None:
            (place / name).unlink()
        else:
            (place / name).write_bytes(original)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("MLmodel", "mlflow.pyfunc.loaders.code_model", "os"),
        ("MLmodel", "code: code", "code: ../../elsewhere"),
        ("requirements.txt", "pandas==", "evil @ https://example.org/"),
        ("conda.yaml", "- pandas==", "- evil=="),
        ("python_env.yaml", "- setuptools", "- evil"),
    ],
)
def test_a_model_served_with_other_packages_is_not_registered(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, name: str, old: str, new: str
) -> None:
    monkeypatch.chdir(finished.folder)
    connect(finished.config.tracking)
    uri = finished.children[0].data.tags[MODEL_TAG]
    path = adapter_folder(uri).parents[1] / name
    original = path.read_text(encoding="utf-8")
    assert old in original
    path.write_text(original.replace(old, new), encoding="utf-8")
    try:
        with pytest.raises(TrackingError, match=name):
            require_own_code(uri)
    finally:
        path.write_text(original, encoding="utf-8")


def test_nothing_was_pickled_and_pickles_need_not_be_allowed(finished: Finished) -> None:
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"  # for all tests
    endings = {path.suffix for path in finished.folder.rglob("*") if path.is_file()}
    assert not endings & {".pkl", ".pickle", ".pt", ".bin", ".pth", ".joblib", ".npy", ".npz"}


SOURCES = [
    path
    for folder in ("adaptive_lora", "entrypoints", "supply")
    for path in (Path(__file__).resolve().parents[1] / folder).rglob("*.py")
]
READ_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "imp"}
CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.save", "np.load", "numpy.load",
    "yaml.load", "yaml.unsafe_load", "os.system", "os.popen", "pd.read_pickle", "Template",
}  # fmt: skip
ARGUMENTS = {"trust_remote_code", "allow_pickle", "shell", "use_auth_token"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_reads_pickles_or_runs_text(path: Path) -> None:
    """Whatever a file's content, there is no call in the sources that would run it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                names = {str(node.module)}
            assert not {name.partition(".")[0] for name in names} & READ_CODE, path
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in CALLS, (path, ast.unparse(node))
            for argument in node.keywords:
                on = isinstance(argument.value, ast.Constant) and bool(argument.value.value)
                assert not (on and argument.arg in ARGUMENTS), (path, ast.unparse(node))


def test_code_of_others_is_off_by_default() -> None:
    assert ModelConfig().trust_remote_code is False
