"""The tasks of the embedded data: two invented languages to translate into.

Neither their words nor their names are in the corpus that the embedded base was pretrained on
(`benchmarks/embedded_base`), which has other invented languages. No clause comes twice, under whatever
wording, yet every test clause can be translated from the training part: each of its words occurs there
many times, in other combinations. Needs no deep learning library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random

from adaptive_lora.errors import DataError

_ATTEMPTS = 200
"""Draws in a row that may repeat a clause before a family counts as used up."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST = _words("ba ke mo zu ti ra fe lo vi du na pe go shi ku za ve mi tho ja wu bre kli dro sna gu ho xe")
SECOND = _words("""
lum nak rif dos vek mar til gan pod zim bur kel nov sut hab wen tor pli gro fas jeb mok ruz din yat cho lex vum
""")
"""First and second syllables of all invented words."""


def is_reserved(word: str) -> bool:
    """Return whether an invented word belongs to these tasks and not to pretraining."""
    for index, first in enumerate(FIRST):
        rest = word.removeprefix(first)
        if rest != word and rest in SECOND:
            return (index + SECOND.index(rest)) % 3 == 0
    return False


def reserved_words() -> tuple[str, ...]:
    """Return all words kept for these tasks, in a fixed order."""
    pairs = (first + second for first in FIRST for second in SECOND)
    return tuple(word for word in pairs if is_reserved(word))


@dataclass(frozen=True, slots=True)
class Family:
    """One task with many wordings of its instruction, of a study or of pretraining."""

    name: str
    wordings: tuple[str, ...]
    """Instructions; `{x}` takes the input inline, without it the input is a text of its own."""
    make: Callable[[Random], tuple[str, str]]
    """Function that draws (input, output)."""

    def example(self, rng: Random) -> dict[str, str]:
        """Return one example: instruction, input, output and family."""
        given, output = self.make(rng)
        wording = rng.choice(self.wordings)
        inline = "{x}" in wording
        return {
            "instruction": wording.replace("{x}", given),
            "input": "" if inline else given,
            "output": output,
            "family": self.name,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class InventedLanguage:
    """An order of words and two endings over a small lexicon."""

    name: str
    nouns: Mapping[str, str]
    """Noun -> its plural."""
    adjectives: tuple[str, ...]
    verbs: Mapping[str, str]
    """Verb -> its past."""
    order: tuple[str, ...]
    plural_ending: str
    past_ending: str

    @property
    def english_words(self) -> tuple[str, ...]:
        """Words that have a translation."""
        return (*self.nouns, *self.adjectives, *self.verbs)

    def clause(self, lexicon: Mapping[str, str], rng: Random) -> tuple[str, str]:
        """Choose a clause and translate it: other order, no article, endings of its own."""
        noun, adjective, verb = map(rng.choice, (tuple(self.nouns), self.adjectives, tuple(self.verbs)))
        many, before = rng.random() < 0.5, rng.random() < 0.5
        action = self.verbs[verb] if before else f"will {verb}"
        parts = {
            "noun": lexicon[noun] + (self.plural_ending if many else ""),
            "adjective": lexicon[adjective],
            "verb": lexicon[verb] + (self.past_ending if before else ""),
        }
        english = f"the {adjective} {self.nouns[noun] if many else noun} {action}"
        return english, " ".join(parts[part] for part in self.order)


def _forms(text: str) -> dict[str, str]:
    """Return word -> inflected word from pairs between commas."""
    return dict(pair.split() for pair in text.split(","))


LANGUAGES = (
    InventedLanguage(
        name="Velu",
        nouns=_forms("cat cats, dog dogs, horse horses, cow cows, pig pigs, lion lions, bear bears, wolf wolves"),
        adjectives=_words("red blue old small"),
        verbs=_forms("run ran, sleep slept, swim swam, jump jumped"),
        order=("noun", "adjective", "verb"),
        plural_ending="ti",
        past_ending="ne",
    ),
    InventedLanguage(
        name="Orsk",
        nouns=_forms(
            "hat hats, shoe shoes, boat boats, train trains, chair chairs, table tables, lamp lamps, book books"
        ),
        adjectives=_words("new clean heavy broken"),
        verbs=_forms("fall fell, wait waited, rest rested, stand stood"),
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
        DataError: a family has no further clauses.
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
            raise DataError(
                f"the embedded tasks have no {count} different examples; required max_examples of at most {index}."
            )
        seen.add(clause)
        rows.append(row)
    return rows
