"""Generation is plain greedy search, and ends where an answer ends, whatever a checkpoint proposes.

Texts are compared with those of transformers' own `generate` on the same adapter, one row at a time
under a configuration that says greedy and nothing else, on a base without settings of its own.
"""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import save_byte_tokenizer
from peft import PeftModel
from task_bases import SEEING, WORDS, save_base, save_pictures, save_seeing_base, write_rows
from test_tasks_seq2seq import T5
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, GenerationConfig, LlamaConfig

from adaptive_lora.config import study_from
from adaptive_lora.data import TokenizedExample
from adaptive_lora.data.conversations import CHAT
from adaptive_lora.models.tasks.causal import continuations
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import run_trial
from adaptive_lora.serving import TASKS, answer, load_adapter, open_image
from adaptive_lora.serving.greedy import end_tokens, pads_left, turn_end
from adaptive_lora.serving.images import inputs_of
from adaptive_lora.serving.text import generate

BaseContext = Callable[..., StudyContext]
PROPOSED = {
    "do_sample": True, "temperature": 1.5, "top_k": 50, "num_beams": 3, "repetition_penalty": 1.7,
    "no_repeat_ngram_size": 2, "min_new_tokens": 3, "suppress_tokens": [32, 97, 101, 116],
    "begin_suppress_tokens": [220], "bad_words_ids": [[65], [66, 67]], "length_penalty": 2.0,
    "forced_eos_token_id": 10, "early_stopping": True, "renormalize_logits": True,
}  # fmt: skip
"""What a generation_config.json may hold besides the tokens that end an answer."""
ENCODER_DECODER = {"forced_bos_token_id": 12, "encoder_no_repeat_ngram_size": 2}
MOST = 12
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def propose(folder: Path, settings: dict[str, Any]) -> None:
    """Add settings to a base's generation_config.json."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}), encoding="utf-8")


def trained(folder: Path, base: Path, data: Path, **changes: object) -> tuple[Path, StudyContext]:
    """Train an adapter for a few steps at a high rate; return its folder, and the bench."""
    options = {
        "model": str(base), "data": str(data), "methods": "uniform:rank=4", "seeds": "0",
        "lr": "5e-2", "max_steps": 6, "batch_size": 4, "validations": 1, "precision": "fp32",
        "max_tokens": 120, "generate": "on",
    }  # fmt: skip
    context = StudyContext(study_from({**options, **changes}))
    outcome = run_trial(context, next(context.config.trials()), folder / "adapter")
    return outcome.folder, context


def loaded_base(base: Path) -> tuple[Any, Any]:
    """Return model and tokenizer of a base."""
    return AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)


def stock(base: Path, adapter: Path, task: str) -> Any:
    """Return the adapted model as transformers and PEFT load it, without settings of its own."""
    model = TASKS[task].model_class.from_pretrained(base)
    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def stock_text(model: Any, tokenizer: Any, inputs: dict[str, Any], skip: int, **own: Any) -> str:
    """Return what stock greedy generation writes after the first `skip` tokens."""
    plain = GenerationConfig(do_sample=False, max_new_tokens=MOST, **own)
    with torch.no_grad():
        (row,) = model.generate(**inputs, generation_config=plain)
    return str(tokenizer.decode(row[skip:], skip_special_tokens=True)).strip()


def ids(values: Any) -> torch.Tensor:
    return torch.tensor([list(values)])


# --- greedy means greedy


def test_texts_are_those_of_stock_greedy_generation(llama_folder: Path, data_file: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama_folder, tmp_path / "base")
    propose(base, PROPOSED)
    adapter, context = trained(tmp_path, base, data_file, template="compact")
    test = context.splits(0).test
    prompts = [each.input_ids[: each.prompt_length] for each in test]
    model, tokenizer = stock(base, adapter, "causal"), context.base.tokenizer
    ends = {"pad_token_id": 256, "eos_token_id": 256}
    wanted = [stock_text(model, tokenizer, {"input_ids": ids(p)}, len(p), **ends) for p in prompts]
    assert len(set(wanted)) > 1 or wanted[0], wanted
    loaded = load_adapter(adapter)
    assert generate(loaded[0], tokenizer, prompts, max_new_tokens=MOST) == wanted
    assert answer(loaded, [{"prompt": tokenizer.decode(p)} for p in prompts], MOST) == wanted
    scored = continuations(loaded[0], tokenizer, test, runtime=context.runtime, batch_size=3)
    assert all(text.startswith(short) or short.startswith(text)
               for text, short in zip(scored, wanted, strict=True))  # fmt: skip
    # what the checkpoint proposes would give others; it is kept for whoever exports the model
    model.generation_config = GenerationConfig(**PROPOSED)
    (row,) = model.generate(input_ids=ids(prompts[0]), do_sample=False, max_new_tokens=MOST, **ends)
    assert tokenizer.decode(row[len(prompts[0]) :], skip_special_tokens=True).strip() != wanted[0]
    assert loaded[0].get_base_model().generation_config.num_beams == 3


def test_settings_in_config_json_do_not_apply(base_folder: Path, tmp_path: Path) -> None:
    """Checkpoints of before generation_config.json keep them there."""
    old = shutil.copytree(base_folder, tmp_path / "old")
    (old / "generation_config.json").unlink()
    config = json.loads((old / "config.json").read_text())
    config |= {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 2}
    (old / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(old)
    prompts = [tokenizer(text)["input_ids"] for text in ("red blue", "a", "warm cold old")]
    plain, odd = (AutoModelForCausalLM.from_pretrained(path) for path in (base_folder, old))
    texts = generate(plain, tokenizer, prompts, max_new_tokens=MOST)
    assert generate(odd, tokenizer, prompts, max_new_tokens=MOST) == texts


def test_targets_are_those_of_stock_greedy_generation(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "T5Config", T5, "T5ForConditionalGeneration")
    propose(base, PROPOSED | ENCODER_DECODER)
    draw = random.Random(0)
    made = [{"input": " ".join(draw.sample(WORDS, 2)) + f" {n}", "target": "a"} for n in range(30)]
    data = write_rows(tmp_path / "rows.json", made)
    adapter, context = trained(tmp_path, base, data, template="plain")
    model, tokenizer = stock(base, adapter, "seq2seq"), context.base.tokenizer
    inputs = [row["input"] for row in made[:5]]
    wanted = [
        stock_text(
            model, tokenizer, {"input_ids": ids(tokenizer(text)["input_ids"])}, 1,
            pad_token_id=257, eos_token_id=256, decoder_start_token_id=257,
        )
        for text in inputs
    ]  # fmt: skip
    assert any(wanted)
    assert answer(load_adapter(adapter), [{"prompt": text} for text in inputs], MOST) == wanted
    clean = context.score(context.base.model, context.splits(0).test)
    propose(base, {name: None for name in PROPOSED | ENCODER_DECODER})
    again = StudyContext(context.config)
    assert again.score(again.base.model, again.splits(0).test).further_E["rouge_l"].tolist() == (
        clean.further_E["rouge_l"].tolist()
    )


def test_answers_about_pictures_are_those_of_stock_greedy_generation(tmp_path: Path) -> None:
    kind, settings, head = SEEING["llava"]
    base = save_seeing_base(tmp_path / "base", kind, settings, head)
    propose(base, PROPOSED)
    made = save_pictures(tmp_path / "pictures", 20)
    data = write_rows(tmp_path / "pictures" / "rows.json", made)
    adapter, context = trained(tmp_path, base, data, prompt_column="question",
                             response_column="answer")  # fmt: skip
    model, processor = stock(base, adapter, "vision_language"), context.base.tokenizer
    asked = [
        {"image": str(tmp_path / "pictures" / row["image"]), "question": f"Which colour? {n}"}
        for n, row in enumerate(made[:4])
    ]
    wanted = []
    for row in asked:
        inputs = inputs_of(processor, (row["question"], open_image(row["image"])))
        skip = inputs["input_ids"].shape[1]
        ends = {"pad_token_id": 256, "eos_token_id": 256}
        wanted.append(stock_text(model, processor.tokenizer, inputs, skip, **ends))
    assert any(wanted)
    assert answer(load_adapter(adapter), asked, MOST) == wanted


def test_threads_of_a_server_do_not_see_each_others_settings(base_folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(base_folder, tmp_path / "base")
    propose(base, {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1})
    model, tokenizer = (kind.from_pretrained(base) for kind in (AutoModelForCausalLM, AutoTokenizer))
    prompts = [tokenizer(text)["input_ids"] for text in WORDS[:3]]
    wanted = generate(model, tokenizer, prompts, max_new_tokens=MOST)
    found: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda: found.append(generate(model, tokenizer, prompts, max_new_tokens=MOST)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wanted] * 4
    assert model.generation_config.repetition_penalty == 9.0


# --- where an answer ends

MARKS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|other|>")


def counting_base(
    folder: Path, template: str | None = None, ends: object = None, config_ends: object = 256
) -> tuple[Any, Any]:
    """Write and load a base whose next token is the last one plus 1; specials are 256 to 261."""
    save_byte_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS[2:])})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size, hidden_size=size + size % 2, intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=64,
        eos_token_id=config_ends, bos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.layers[0].input_layernorm.weight.fill_(1.0)
        model.model.embed_tokens.weight[:, :size] = torch.eye(size)
        model.lm_head.weight[:, :size] = torch.eye(size).roll(1, dims=0)
    model.save_pretrained(folder)
    if ends is not None:
        propose(folder, {"eos_token_id": ends})
    return loaded_base(folder)


def written(model: Any, tokenizer: Any, start: int) -> int:
    """Return how many tokens are written from `start` on until one that ends an answer."""
    texts: list[list[int]] = []
    usual = tokenizer.decode
    tokenizer.decode = lambda row, **options: texts.append(list(row)) or usual(row, **options)
    generate(model, tokenizer, [[start]], max_new_tokens=9)
    return len(texts[0])


@pytest.mark.parametrize(
    ("template", "ends", "config_ends", "found"),
    [
        (None, None, 256, {256}),
        (None, [256, 260], 256, {256, 260}),  # Llama 3 and its like
        (None, None, [256, 261], {256, 261}),
        (CHATML, None, 256, {256, 259}),  # a base model to which somebody added a template
        (CHATML, [260], 261, {256, 259, 260, 261}),
        (None, 70, 256, {70, 256}),  # an ordinary token, as the checkpoint says
        (None, None, 2, {256}),  # the default of its class, which here is an ordinary token
    ],
)
def test_an_answer_ends_at_each_of_its_end_tokens(
    template: str | None, ends: object, config_ends: object, found: set[int], tmp_path: Path
) -> None:
    model, tokenizer = counting_base(tmp_path / "base", template, ends, config_ends)
    assert set(end_tokens(model, tokenizer)) == found
    for end in range(256, 262):
        later = min([each - end for each in found if each >= end], default=9)
        assert written(model, tokenizer, end - 1) == min(later, 9), end


def test_answers_of_a_chat_end_at_the_turns_token_in_scores_and_in_serving(
    make_bench: BaseContext, tmp_path: Path
) -> None:
    model, tokenizer = counting_base(tmp_path / "base", CHATML)
    record = {"template": CHAT, "dtype": "float32", "task": {"name": "causal"}}
    asked = [{"prompt": "!"}, {"prompt": "<|im_start|>"}]
    shown = [tokenizer(row["prompt"])["input_ids"] for row in asked]
    after = tokenizer.decode([shown[0][-1] + step for step in range(1, 10)])
    assert answer((model, tokenizer, record), asked, 9) == [after, ""]
    examples = [
        TokenizedExample(id="x", input_ids=(*ids, *range(9)), first_label=1, prompt_length=1, response="")
        for ids in shown
    ]
    runtime = make_bench().runtime
    assert continuations(model, tokenizer, examples, runtime=runtime, batch_size=2) == [after, ""]


TURNS = {
    "chatml": (CHATML, "<|im_end|>"),
    "no end after the last answer": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}",
        "<|im_start|>",
    ),
    "two marks": (
        "{% for m in messages %}{{ m.content }}<|eot|>{% if loop.last %}<|endoftext|>{% endif %}{% endfor %}",
        "<|eot|>",
    ),
    "another mark at the end": (
        "{% for m in messages %}{{ m.content }}{{ '<|eot|>' if loop.last else '<|im_end|>' }}{% endfor %}",
        "<|eot|>",
    ),
    "ordinary text": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
    "refuses": ("{{ raise_exception('no') }}", None),
    "damaged": ("{% for", None),
    "leaves answers out": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|eot|>{% endif %}{% endfor %}",
        None,
    ),
    "named": ({"default": CHATML, "tool_use": "{{ messages }}"}, "<|im_end|>"),
}


@pytest.mark.parametrize("name", TURNS)
def test_the_end_of_a_turn_is_read_from_the_template(name: str, tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS[2:])})
    template, end = TURNS[name]
    tokenizer.chat_template = template
    found = turn_end(tokenizer)
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == end


def test_the_end_of_a_turn_of_a_processor(tmp_path: Path) -> None:
    kind, settings, head = SEEING["idefics3"]
    base = save_seeing_base(tmp_path / "base", kind, settings, head)
    processor = AutoProcessor.from_pretrained(base)
    assert turn_end(processor) is None  # it has no template
    processor.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% for part in m.content %}"
        "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}<end_of_utterance>\n"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    processor.save_pretrained(base)
    again = AutoProcessor.from_pretrained(base)
    end = again.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    assert turn_end(again) == end
    model = TASKS["vision_language"].model_class.from_pretrained(base)
    assert set(end_tokens(model, again)) == {256, end}


def test_a_long_prompt_takes_no_room_from_others_of_its_batch(tmp_path: Path) -> None:
    model, tokenizer = counting_base(tmp_path / "base")
    short, long = [33], [40] * 61  # of 64 positions
    texts = generate(model, tokenizer, [long, short, [*long, 40, 40]], max_new_tokens=MOST)
    assert list(map(len, texts)) == [3, MOST, 1]


UNPADDED = {
    "rwkv": ("RwkvConfig", {"attention_hidden_size": 32}),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {"num_hidden_layers": 3, "num_attention_heads": 4, "lru_width": 32,
         "attention_window_size": 16, "head_dim": 8},
    ),
    "bart": ("BartConfig", {"d_model": 32, "decoder_layers": 2, "is_decoder": True}),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*UNPADDED, "llama"])
def test_padding_changes_no_answer(kind: str, llama_folder: Path, tmp_path: Path) -> None:
    """A recurrence reads padding, and learned positions count it: such bases are not padded."""
    save_byte_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    torch.manual_seed(0)
    if kind == "llama":
        model = AutoModelForCausalLM.from_pretrained(llama_folder)
    else:
        name, settings = UNPADDED[kind]
        sizes = {
            "vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2,
            "intermediate_size": 64, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257,
        }  # fmt: skip
        config = getattr(transformers, name)(**{**sizes, **settings})
        model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
    prompts = [tokenizer(text)["input_ids"] for text in ("ab", "warm cold old", "xyz", "qr")]
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert len({*alone}) > 1
    assert generate(model, tokenizer, prompts, max_new_tokens=6) == alone
    assert pads_left(model) == (kind == "llama")
