"""Invented words: two syllables each, part of them kept out of pretraining for the study.

Pretraining meets invented words only with a meaning given on the spot, so the base learns to read
and write syllables; the words of the study's languages are pairs it never saw.
"""

from __future__ import annotations

from random import Random

from adaptive_lora.embedded.vocabulary import split_words

FIRST = split_words("""
ba ke mo zu ti ra fe lo vi du na pe go shi ku za ve mi tho ja wu bre kli dro sna gu ho xe
""")
SECOND = split_words("""
lum nak rif dos vek mar til gan pod zim bur kel nov sut hab wen tor pli gro fas jeb mok ruz din
yat cho lex vum
""")


def is_reserved(word: str) -> bool:
    """Return whether an invented word belongs to the study and not to pretraining."""
    for index, first in enumerate(FIRST):
        rest = word.removeprefix(first)
        if rest != word and rest in SECOND:
            return (index + SECOND.index(rest)) % 3 == 0
    return False


def reserved_words() -> tuple[str, ...]:
    """Return all words kept for the study, in a fixed order."""
    pairs = (first + second for first in FIRST for second in SECOND)
    return tuple(word for word in pairs if is_reserved(word))


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
