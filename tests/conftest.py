"""Real components at small size: a GPT-2 made in code, its own tokenizer, generated rows."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from spared import draw_text_as_outlines, freeze_modules, skip_rendering_of_studies, skip_syncs
from xdist import is_xdist_controller
from zygote import Zygote

if TYPE_CHECKING:
    from tracked import Finished

    from adaptive_lora.config import StudyConfig
    from adaptive_lora.runner.context import StudyContext

os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # nothing here needs it
settings.register_profile("suite", deadline=None)  # no test may fail because a machine is busy
settings.load_profile("suite")

SHARED = Path(__file__).resolve().parents[2] / "shared"
WORDS = ["red", "blue", "green", "small", "large", "fast", "slow", "old", "new", "warm", "cold", "bright"]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Import what most tests use, except in the process that only hands tests out to workers."""
    if is_xdist_controller(session):
        return
    importlib.import_module("tracked")
    importlib.import_module("torch").set_num_threads(1)  # models this small only make threads wait for each other


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Come before fixtures of modules, which train the first studies."""
    freeze_modules()


@pytest.fixture(scope="session", autouse=True)
def _spared() -> None:
    """Spare this process what users need and no test asks for."""
    skip_syncs()
    draw_text_as_outlines()
    skip_rendering_of_studies()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep tokens in a folder of this run; processes that tests start take it over."""
    os.environ["ADAPTIVE_LORA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Each test works in its own folder, with no tracking server from outside."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID",
        "MLFLOW_RUN_NAME", "ADAPTIVE_LORA_BASE",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real data sets; tests that need it are skipped where it is not there."""
    if not (SHARED / "data").is_dir():
        pytest.skip("real data sets are not on this machine")
    return SHARED / "data"


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Folder with DialoGPT-medium's architecture and the GPT-2 tokenizer."""
    if not (SHARED / "models").is_dir():
        pytest.skip("real model configurations are not on this machine")
    return SHARED / "models"


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 3 layers and width 32 with random weights and dropout, and a byte tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("base")
    save_byte_tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=258, n_positions=128, n_embd=32, n_layer=3, n_head=2,
                bos_token_id=256, eos_token_id=256, pad_token_id=257, resid_pdrop=0.1,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers: all of its sites are Linear."""
    return save_llama(tmp_path_factory.mktemp("llama"), width=32)


def save_llama(folder: Path, width: int) -> Path:
    """Write a Llama of 2 layers with random weights, and a tokenizer with one token a byte."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    save_byte_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=258, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def save_byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer with one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>").save_pretrained(
        folder
    )


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return Alpaca rows: reverse two words."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        first, second = draw.sample(WORDS, 2)
        made.append({"instruction": f"Swap {number}", "input": f"{first} {second}", "output": f"{second} {first}"})
    return made


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """Forty Alpaca rows as JSON."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows(40)), encoding="utf-8")
    return path


Options = dict[str, object]


@pytest.fixture
def options(base_folder: Path, data_file: Path) -> Options:
    """Options of a study that runs in seconds."""
    return small_options(base_folder, data_file)


def small_options(base_folder: Path, data_file: Path) -> Options:
    """Return the options of a study that runs in seconds."""
    return {
        "model": str(base_folder),
        "data": str(data_file),
        "template": "compact",
        "max_tokens": 120,
        "methods": "uniform:rank=2 linear_decay:rank=3,low_rank=1",
        "seeds": "0 1",
        "lr": "1e-2",
        "max_steps": 3,
        "batch_size": 4,
        "validations": 1,
        "generate": "off",
        "precision": "fp32",  # auto is bf16 on some CPUs
    }


@pytest.fixture
def make_study(options: Options) -> Callable[..., StudyConfig]:
    """Return a function that makes a small study with some options changed."""
    from adaptive_lora.config import study_from

    def make(**changes: object) -> StudyConfig:
        return study_from({**options, **changes})

    return make


@pytest.fixture
def make_bench(make_study: Callable[..., StudyConfig]) -> Callable[..., StudyContext]:
    """Return a function that loads a small study's workbench."""
    from adaptive_lora.runner.context import StudyContext

    def make(**changes: object) -> StudyContext:
        return StudyContext(make_study(**changes))

    return make


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """A process that forks study commands; one a session, for its imports take seconds."""
    with Zygote() as process:
        yield process


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialised tracking database; copies of it spare each test the migrations."""
    from mlflow import MlflowClient
    from tracked import store_in

    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the default experiment's artifacts belong to where it was made
        MlflowClient(store_in(folder)).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def finished(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished study of 2 methods x 2 seeds in the default store, shared by tests that read."""
    from tracked import Finished, quiet

    from adaptive_lora.analysis.report import write_report
    from adaptive_lora.config import study_from
    from adaptive_lora.runner import result

    folder = tmp_path_factory.mktemp("finished")
    (folder / "rows.json").write_text(json.dumps(rows(40)), encoding="utf-8")
    config = study_from(
        {
            "model": str(base_folder),
            "data": str(folder / "rows.json"),
            "template": "compact",
            "max_tokens": 120,
            "methods": "uniform:rank=2 empirical:rank=1",
            "seeds": "0 1",
            "lr": "2e-3",
            "max_steps": 2,
            "batch_size": 4,
            "profile_batches": 2,
            "profile_batch_size": 2,
            "validations": 2,
            "generate": "off",
            "precision": "fp32",
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "ADAPTIVE_LORA_BASE"):
            patch.delenv(name, raising=False)
        patch.setattr(result, "write_report", write_report)  # with rendered figures
        outcome, shown = quiet(config)
    return Finished(folder=folder, config=config, outcome=outcome, shown=shown)


@pytest.fixture
def in_store(empty_store: Path, make_study: Callable[..., StudyConfig], tmp_path: Path) -> Callable[..., StudyConfig]:
    """Return a function that makes a small study tracked in a store of this test's own.

    MLflow keeps one connection a URI, so only one relative URI can be used in a process.
    """
    from tracked import store_in

    shutil.copy(empty_store, tmp_path / "mlflow.db")
    own = {"tracking_uri": store_in(tmp_path), "max_steps": 2, "methods": "uniform:rank=2", "seeds": "0"}

    def make(**changes: object) -> StudyConfig:
        return make_study(**{**own, **changes})

    return make


@pytest.fixture
def own_store(empty_store: Path, tmp_path: Path) -> str:
    """URI of an initialised store of this test's own."""
    from tracked import store_in

    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return store_in(tmp_path)
