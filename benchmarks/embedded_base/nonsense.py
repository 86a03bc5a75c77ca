"""Invented words that pretraining may use: two syllables each, those of the embedded tasks left out.

Pretraining meets invented words only with a meaning given on the spot, so the base learns to read
and write syllables; the words of the study's languages are pairs it never saw.
"""

from __future__ import annotations

from random import Random

from adaptive_lora.data.embedded_tasks import FIRST, SECOND, is_reserved


def pretraining_word(rng: Random) -> str:
    """Choose an invented word that pretraining may use."""
    while True:
        word = rng.choice(FIRST) + rng.choice(SECOND)
        if not is_reserved(word):
            return word


def pretraining_words(rng: Random, count: int) -> list[str]:
    """Choose several different invented words."""
    chosen: dict[str, None] = {}
    while len(chosen) < count:
        chosen[pretraining_word(rng)] = None
    return list(chosen)
