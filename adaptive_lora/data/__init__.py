"""Data: from files, hub sets or the embedded generator to tokenised train, validation and test splits."""

from adaptive_lora.data.batches import Batch, collate, stacked, training_batches
from adaptive_lora.data.examples import Example, ExampleSet
from adaptive_lora.data.packed import PackedBatch, pack, unpadded
from adaptive_lora.data.sources import load_examples
from adaptive_lora.data.splits import Splits, split_examples, split_set
from adaptive_lora.data.templates import load_template
from adaptive_lora.data.token_cache import Tokenised, cached_tokens
from adaptive_lora.data.tokens import TokenizedExample, tokenize

__all__ = [
    "Batch",
    "Example",
    "ExampleSet",
    "PackedBatch",
    "Splits",
    "Tokenised",
    "TokenizedExample",
    "cached_tokens",
    "collate",
    "load_examples",
    "load_template",
    "pack",
    "split_examples",
    "split_set",
    "stacked",
    "tokenize",
    "training_batches",
    "unpadded",
]
