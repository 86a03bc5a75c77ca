"""The study's fine-tuning tasks: two invented languages.

Neither their words nor their names are in the pretraining corpus, which has other invented
languages. No clause comes twice, under whatever wording, yet every test clause can be translated
from the training part: each of its words occurs there many times, in other combinations. Needs
nothing but the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from random import Random

from adaptive_lora.embedded.families import Family
from adaptive_lora.embedded.inflection import past, plural
from adaptive_lora.embedded.nonsense import reserved_words
from adaptive_lora.embedded.vocabulary import split_words

_ATTEMPTS = 200
"""Draws in a row that may repeat a clause before a family counts as used up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InventedLanguage:
    """An order of words and two endings over a small lexicon."""

    name: str
    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]
    order: tuple[str, ...]
    plural_ending: str
    past_ending: str

    @property
    def english_words(self) -> tuple[str, ...]:
        """Words that have a translation."""
        return self.nouns + self.adjectives + self.verbs

    def clause(self, lexicon: Mapping[str, str], rng: Random) -> tuple[str, str]:
        """Choose a clause and translate it: other order, no article, endings of its own."""
        noun, adjective, verb = map(rng.choice, (self.nouns, self.adjectives, self.verbs))
        many, before = rng.random() < 0.5, rng.random() < 0.5
        action = past(verb) if before else f"will {verb}"
        parts = {
            "noun": lexicon[noun] + (self.plural_ending if many else ""),
            "adjective": lexicon[adjective],
            "verb": lexicon[verb] + (self.past_ending if before else ""),
        }
        english = f"the {adjective} {plural(noun) if many else noun} {action}"
        return english, " ".join(parts[part] for part in self.order)


LANGUAGES = (
    InventedLanguage(
        name="Velu",
        nouns=split_words("cat dog horse cow pig lion bear wolf"),
        adjectives=split_words("red blue old small"),
        verbs=split_words("run sleep swim jump"),
        order=("noun", "adjective", "verb"),
        plural_ending="ti",
        past_ending="ne",
    ),
    InventedLanguage(
        name="Orsk",
        nouns=split_words("hat shoe boat train chair table lamp book"),
        adjectives=split_words("new clean heavy broken"),
        verbs=split_words("fall wait rest stand"),
        order=("verb", "adjective", "noun"),
        plural_ending="shi",
        past_ending="ra",
    ),
)


def _lexicons() -> dict[str, dict[str, str]]:
    """Give every English word of a language an invented one that pretraining never saw."""
    invented = list(reserved_words())
    Random("study languages").shuffle(invented)
    supply = iter(invented)
    return {language.name: {word: next(supply) for word in language.english_words} for language in LANGUAGES}


LEXICONS: Mapping[str, Mapping[str, str]] = _lexicons()
"""Language to {English word: invented word}."""


def _family(language: InventedLanguage) -> Family:
    name = language.name
    return Family(
        name.lower(),
        (f"Say in {name}: {{x}}", f"{name}, please.", f"{name} for: {{x}}"),
        partial(language.clause, LEXICONS[name]),
    )


STUDY_FAMILIES = tuple(map(_family, LANGUAGES))


def task_examples(count: int, seed: int) -> list[dict[str, str]]:
    """Return examples of the study's tasks, the families in turn, no clause twice.

    Args:
        count: how many.
        seed: other seeds give other examples of the same languages.

    Returns:
        Rows of `instruction`, `input` (may be empty), `output` and `family`.

    Raises:
        ValueError: a family has no further clauses.
    """
    rng = Random(f"tasks {seed}")
    seen: set[tuple[str, str]] = set()
    rows = []
    for index in range(count):
        family = STUDY_FAMILIES[index % len(STUDY_FAMILIES)]
        for _ in range(_ATTEMPTS):
            row = family.example(rng)
            clause = (family.name, row["output"])
            if clause not in seen:
                break
        else:
            raise ValueError(
                f"the embedded task '{family.name}' has no {index + 1} different clauses; "
                f"required a count of at most {index}, got {count}."
            )
        seen.add(clause)
        rows.append(row)
    return rows
