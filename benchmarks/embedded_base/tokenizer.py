"""The base's own byte-level BPE tokenizer, trained on its corpus."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Any

from benchmarks.embedded_base.corpus import END, documents
from benchmarks.embedded_base.nonsense import pretraining_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 2048
"""Tokens, with the 256 bytes and the two special ones."""
PAD = "<|pad|>"
TRAINING_DOCUMENTS = 30_000
"""Documents the merges are counted on."""
SYLLABLE_LISTS = 4_000
"""Lists of invented words on top, so that their syllables become tokens."""
CONTEXT = 256
"""Tokens the model can see."""
_HEADINGS = r"\n*### (?:Instruction|Input|Response):\n"
"""Prompt headings stay whole, so that each becomes one token."""
_GPT2_WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How GPT-2 cuts text into words (Radford et al. 2019, encoder.py)."""


def _training_texts(seed: int) -> Iterator[str]:
    yield from islice(documents(f"tokenizer {seed}"), TRAINING_DOCUMENTS)
    rng = Random(f"syllables {seed}")
    for _ in range(SYLLABLE_LISTS):
        chosen = pretraining_words(rng, 12)
        yield "\n".join(chosen[:6]) + " " + " ".join(chosen[6:])


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same seed gives the same one."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"{_HEADINGS}|{_GPT2_WORDS}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_training_texts(seed), trainer)
    wrap: Any = PreTrainedTokenizerFast  # its constructor has no types
    tokenizer: PreTrainedTokenizerFast = wrap(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer
