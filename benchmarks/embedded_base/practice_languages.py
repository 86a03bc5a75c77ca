"""Invented languages of pretraining: other words and other rules than the study's.

They teach the base what it means to have a second word for everything, so that a study's
adapters learn new languages and not that languages exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from adaptive_lora.data.embedded_tasks import Family
from benchmarks.embedded_base.grammar import ANIMAL_NAMES, PROFESSION_NAMES, THING_NAMES
from benchmarks.embedded_base.inflection import past, plural
from benchmarks.embedded_base.nonsense import pretraining_words
from benchmarks.embedded_base.vocabulary import COLOURS, INTRANSITIVE, LOOKS, TRANSITIVE

NAMES = ("Dovish", "Hulman", "Peskan", "Arrol", "Munt")
_ORDERS = (("adjective", "noun", "verb"), ("verb", "noun", "adjective"), ("noun", "adjective", "verb"))
_ENDINGS = ("ik", "en", "o", "ul", "as", "em")


@dataclass(frozen=True, kw_only=True, slots=True)
class Language:
    """A lexicon, an order of words and two endings."""

    name: str
    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]
    lexicon: Mapping[str, str]
    order: tuple[str, ...]
    plural_ending: str
    past_ending: str

    def word(self, rng: Random) -> tuple[str, str]:
        """Choose one word and its translation."""
        return rng.choice(tuple(self.lexicon.items()))

    def clause(self, rng: Random) -> tuple[str, str]:
        """Choose a clause and its translation; the adjective may be missing."""
        noun, verb = rng.choice(self.nouns), rng.choice(self.verbs)
        adjective = rng.choice(self.adjectives) if rng.random() < 0.7 else ""
        many, before = rng.random() < 0.4, rng.random() < 0.5
        said = f"the {adjective} {plural(noun) if many else noun} "
        said += past(verb) if before else f"will {verb}"
        parts = {
            "noun": self.lexicon[noun] + (self.plural_ending if many else ""),
            "verb": self.lexicon[verb] + (self.past_ending if before else ""),
            "adjective": self.lexicon[adjective] if adjective else "",
        }
        translated = " ".join(parts[part] for part in self.order if parts[part])
        return " ".join(said.split()), translated

    def back(self, rng: Random) -> tuple[str, str]:
        """Choose a clause to be translated back."""
        english, translated = self.clause(rng)
        return translated, english


def _language(index: int, name: str) -> Language:
    """Make a language; the same name gives the same one."""
    rng = Random(f"practice language {name}")
    nouns = tuple(rng.sample(ANIMAL_NAMES + PROFESSION_NAMES + THING_NAMES, 24))
    adjectives = tuple(rng.sample(COLOURS + LOOKS, 8))
    verbs = tuple(row[0] for row in rng.sample(INTRANSITIVE + TRANSITIVE, 8))
    english = tuple(dict.fromkeys(nouns + adjectives + verbs))
    invented = pretraining_words(rng, len(english))
    endings = rng.sample(_ENDINGS, 2)
    return Language(
        name=name,
        nouns=nouns,
        adjectives=adjectives,
        verbs=verbs,
        lexicon=dict(zip(english, invented, strict=True)),
        order=_ORDERS[index % len(_ORDERS)],
        plural_ending=endings[0],
        past_ending=endings[1],
    )


def _families(language: Language) -> tuple[Family, ...]:
    name = language.name
    wordings = (
        f"Translate to {name}: {{x}}",
        f"Say in {name}: {{x}}",
        f"{name}: {{x}}",
        f"Put into {name}.",
        f"Give the {name} words.",
    )
    back = (f"{name} to English: {{x}}", f"Translate from {name}.", f"English for {name}: {{x}}")
    return (
        Family(f"{name.lower()}_word", wordings, language.word),
        Family(f"{name.lower()}_clause", wordings, language.clause),
        Family(f"from_{name.lower()}", back, language.back),
    )


LANGUAGES = tuple(_language(index, name) for index, name in enumerate(NAMES))
LANGUAGE_FAMILIES = tuple(family for language in LANGUAGES for family in _families(language))
