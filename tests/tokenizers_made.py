"""Small tokenizers of every kind that bases come with, made here: no files from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_python import PythonBackend

CORPUS = [
    f"{verb} the {noun} of {number}.\n\n### Response:\nit is {noun} {number}, said the user: yes.\n"
    for verb in ("Name", "Count", "Describe")
    for noun in ("river", "garden", "letter", "window")
    for number in range(12)
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }} "
    "{{ eos_token }}{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
VICUNA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}ASSISTANT: "
    "{{ m['content'] }}{{ eos_token }}{% else %}USER: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def wrapped(tokenizer: Tokenizer, template: str, **names: Any) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.chat_template = template
    return made


def byte_level(
    *special: str, around: str = "", trim: bool = False, template: str = CHATML, **names: Any
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as of GPT-2, Llama 3 and Qwen.

    Args:
        special: further special tokens.
        around: what is put around every text, such as `<s> $A </s>`.
        trim: offsets leave white space out, as RoBERTa's do.
        template: of conversations.
        names: of special tokens, if not `<|im_end|>` for the end.
    """
    names = {"eos_token": "<|im_end|>", **names}
    tokens = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", *special]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    steps: list[Any] = [processors.ByteLevel(trim_offsets=True)] if trim else []
    if around:
        known = [(token, tokenizer.token_to_id(token)) for token in tokens if token in around]
        steps += [processors.TemplateProcessing(single=around, special_tokens=known)]
    if steps:
        tokenizer.post_processor = processors.Sequence(steps)
    return wrapped(tokenizer, template, **names)


def blank_in_front(*, always: bool) -> PreTrainedTokenizerFast:
    """SentencePiece BPE with bytes for what it does not know, as of Llama 2 and Mistral.

    Args:
        always: a blank stands before every piece between special tokens, as in Llama 2's older
            files; otherwise before the first alone.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if always:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    known = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=known)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return wrapped(tokenizer, LLAMA, **names)


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece Unigram that ends every text, as of T5 and XLNet."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace("\t", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    alphabet = sorted({chr(code) for code in range(33, 127)} | set("éß€\n"))
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "</s>"], unk_token="<unk>",
        initial_alphabet=alphabet, show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    known = [("</s>", tokenizer.token_to_id("</s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=known)
    return wrapped(tokenizer, VICUNA, bos_token="</s>", eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """WordPiece without case between [CLS] and [SEP], as of BERT."""
    signs = [chr(code) for code in range(33, 127)]
    words = ["river", "garden", "the", "##ver", "name", "response", "is", "##er"]
    listed = ["[UNK]", "[CLS]", "[SEP]", *signs, *(f"##{sign}" for sign in signs), *words]
    vocabulary = {token: index for index, token in enumerate(listed)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    known = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=known)
    names = {"bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "[UNK]"}
    return wrapped(tokenizer, VICUNA, **names)


def takes_white_space() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose signs of a turn take in the white space after them, as of Phi-3."""
    made = byte_level()
    signs = [AddedToken(sign, rstrip=True, special=True) for sign in ("<|assistant|>", "<|end|>")]
    made.add_tokens(signs, special_tokens=True)
    made.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>\n{{ m['content'] }}"
        "<|end|>\n{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    return made


class Letters(PythonBackend):
    """A tokenizer that is written in Python: one token a letter, <s> before and </s> after."""

    vocab_files_names: dict[str, str] = {}  # noqa: RUF012 - as transformers has it

    def __init__(self, **names: Any) -> None:
        self._letters = [chr(code) for code in range(9, 127)]
        pattern = {"special_tokens_pattern": "bos_eos", "chat_template": VICUNA}
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="?", **{**pattern, **names})

    @property
    def vocab_size(self) -> int:
        return len(self._letters)

    def get_vocab(self) -> dict[str, int]:
        own = {letter: index for index, letter in enumerate(self._letters)}
        return {**own, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._letters.index(token if token in self._letters else "?")

    def _convert_id_to_token(self, index: int) -> str:
        return self._letters[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


MADE: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte level": byte_level,
    "byte level with a beginning": lambda: byte_level(around="<s> $A", bos_token="<s>"),
    "byte level with an end": lambda: byte_level(
        around="<s> $A </s>", bos_token="<s>", eos_token="</s>", template=VICUNA
    ),
    "byte level, trimmed offsets": lambda: byte_level(around="<s> $A", bos_token="<s>", trim=True),
    "byte level, greedy signs": takes_white_space,
    "SentencePiece": lambda: blank_in_front(always=False),
    "SentencePiece, always a blank": lambda: blank_in_front(always=True),
    "Unigram with an end": unigram,
    "WordPiece": word_piece,
    "Python": Letters,
}
"""Kind -> how it is made."""
