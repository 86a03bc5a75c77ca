"""Clauses: who does what to whom, where and how, in three tenses and several moods.

A clause is chosen once and can then be said as a statement, a negation, a question or a passive,
so that rewriting tasks have an exact answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from benchmarks.embedded_base import vocabulary as words
from benchmarks.embedded_base.inflection import gerund, participle, past, plural, third_person, with_article

ANIMAL_NAMES = tuple(row[0] for row in words.ANIMALS)
FOOD_NAMES = tuple(row[0] for row in words.FOODS)
PROFESSION_NAMES = tuple(row[0] for row in words.PROFESSIONS)
THING_NAMES = tuple(row[0] for row in words.THINGS if row[1] not in ("metal", "shape", "tree"))


@dataclass(frozen=True, kw_only=True, slots=True)
class NounPhrase:
    """A noun with what stands before and after it."""

    noun: str
    adjective: str = ""
    determiner: str = "the"
    """`the`, `a`, a number word, or empty for names and mass nouns."""
    many: bool = False
    relative: str = ""
    """A relative clause such as `who sings`, or empty."""

    def text(self) -> str:
        """Return the phrase as written."""
        noun = plural(self.noun) if self.many else self.noun
        core = f"{self.adjective} {noun}".strip()
        if self.determiner == "a":
            core = with_article(core)
        elif self.determiner:
            core = f"{self.determiner} {core}"
        return f"{core} {self.relative}".strip()


@dataclass(frozen=True, kw_only=True, slots=True)
class Clause:
    """One clause; its methods are the ways to say it."""

    subject: NounPhrase
    verb: str
    target: NounPhrase | None = None
    """The direct object, where the verb takes one."""
    place: str = ""
    """A prepositional phrase, or empty."""
    adverb: str = ""
    tense: str = "past"
    """`past`, `present`, `future` or `progressive`."""

    def _tail(self) -> str:
        parts = (self.target.text() if self.target else "", self.place, self.adverb)
        return " ".join(part for part in parts if part)

    def _be(self) -> str:
        return "are" if self.subject.many else "is"

    def _verb(self) -> str:
        many = self.subject.many
        return {
            "past": past(self.verb),
            "present": self.verb if many else third_person(self.verb),
            "future": f"will {self.verb}",
            "progressive": f"{self._be()} {gerund(self.verb)}",
        }[self.tense]

    def statement(self) -> str:
        """Say it as in `The cat sees a bird in the garden.`."""
        return sentence(f"{self.subject.text()} {self._verb()} {self._tail()}")

    def negation(self) -> str:
        """Say it as in `The cat does not see a bird in the garden.`."""
        do = "do" if self.subject.many else "does"
        verb = {
            "past": f"did not {self.verb}",
            "present": f"{do} not {self.verb}",
            "future": f"will not {self.verb}",
            "progressive": f"{self._be()} not {gerund(self.verb)}",
        }[self.tense]
        return sentence(f"{self.subject.text()} {verb} {self._tail()}")

    def question(self) -> str:
        """Say it as in `Does the cat see a bird in the garden?`."""
        helper = {
            "past": "did",
            "present": "do" if self.subject.many else "does",
            "future": "will",
            "progressive": self._be(),
        }[self.tense]
        verb = gerund(self.verb) if self.tense == "progressive" else self.verb
        return sentence(f"{helper} {self.subject.text()} {verb} {self._tail()}", "?")

    def passive(self) -> str:
        """Say it as in `A bird was seen by the cat in the garden.`; needs an object."""
        if self.target is None:
            raise ValueError("passive: the clause has no object")
        many = self.target.many
        be = {
            "past": "were" if many else "was",
            "present": "are" if many else "is",
            "future": "will be",
            "progressive": "are being" if many else "is being",
        }[self.tense]
        head = f"{self.target.text()} {be} {participle(self.verb)} by {self.subject.text()}"
        return sentence(f"{head} {self.place} {self.adverb}")

    def at(self, tense: str) -> Clause:
        """Return the same clause in another tense."""
        return replace(self, tense=tense)


def sentence(text: str, mark: str = ".") -> str:
    """Return text with single spaces, a capital and a final mark."""
    tidy = " ".join(text.split())
    return tidy[0].upper() + tidy[1:] + mark


def person(rng: Random) -> NounPhrase:
    """Choose a person: a name or a profession."""
    if rng.random() < 0.5:
        return NounPhrase(noun=rng.choice(words.WOMEN + words.MEN), determiner="")
    return _described(rng, rng.choice(PROFESSION_NAMES), words.TRAITS)


def animal(rng: Random) -> NounPhrase:
    """Choose an animal, one or several."""
    return _described(rng, rng.choice(ANIMAL_NAMES), words.TRAITS + words.COLOURS)


def thing(rng: Random) -> NounPhrase:
    """Choose a thing, one or several."""
    return _described(rng, rng.choice(THING_NAMES), words.LOOKS + words.COLOURS)


def food(rng: Random) -> NounPhrase:
    """Choose something to eat or drink."""
    noun = rng.choice(FOOD_NAMES)
    if noun in words.UNCOUNTED:
        return NounPhrase(noun=noun, determiner=rng.choice(("the", "some", "")))
    return _described(rng, noun, ("fresh", "sweet", "big", "small", "warm", "cold"))


def _described(rng: Random, noun: str, adjectives: tuple[str, ...]) -> NounPhrase:
    many = rng.random() < 0.25
    determiner = rng.choice(("the", "the", "a", "a", "this", "every"))
    if many:
        determiner = rng.choice(("the", "two", "three", "some", "many", "four"))
    adjective = rng.choice(adjectives) if rng.random() < 0.45 else ""
    return NounPhrase(noun=noun, adjective=adjective, determiner=determiner, many=many)


def place(rng: Random) -> str:
    """Choose a prepositional phrase of place."""
    return f"{rng.choice(words.PREPOSITIONS)} the {rng.choice(words.PLACES)}"


def clause(rng: Random, *, with_object: bool | None = None, relative: bool = True) -> Clause:
    """Choose a clause.

    Args:
        rng: source of randomness.
        with_object: whether it must (True) or must not (False) have an object; None: either.
        relative: whether a relative clause may follow the subject.
    """
    subject = person(rng) if rng.random() < 0.6 else animal(rng)
    if relative and subject.determiner and rng.random() < 0.12:
        verb = rng.choice(words.INTRANSITIVE)[1]
        subject = replace(subject, relative=f"that {verb} {place(rng)}")
    has_object = rng.random() < 0.7 if with_object is None else with_object
    target: NounPhrase | None = None
    if has_object:
        table, choose = rng.choice(
            (
                (words.TRANSITIVE, animal),
                (words.TRANSITIVE, person),
                (words.TRANSITIVE, thing),
                (words.HANDLING, thing),
                (words.EATING, food),
            )
        )
        verb, target = rng.choice(table)[0], choose(rng)
    else:
        verb = rng.choice(words.INTRANSITIVE)[0]
    return Clause(
        subject=subject,
        verb=verb,
        target=target,
        place=place(rng) if rng.random() < (0.3 if has_object else 0.6) else "",
        adverb=rng.choice(words.ADVERBS) if rng.random() < 0.15 else "",
        tense=rng.choice(("past", "past", "present", "present", "future", "progressive")),
    )
