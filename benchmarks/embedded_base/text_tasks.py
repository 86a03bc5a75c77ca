"""Instruction families about phrases and sentences: edit, reorder, find and look up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from adaptive_lora.data.embedded_tasks import Family
from benchmarks.embedded_base import vocabulary as words
from benchmarks.embedded_base.grammar import ANIMAL_NAMES, PROFESSION_NAMES, THING_NAMES, Clause, clause, sentence
from benchmarks.embedded_base.inflection import past, plural
from benchmarks.embedded_base.nonsense import pretraining_word, pretraining_words

Maker = Callable[[Random], tuple[str, str]]
_NOUNS = ANIMAL_NAMES + PROFESSION_NAMES + THING_NAMES
_ADJECTIVES = words.COLOURS + words.TRAITS


def _rewrite(change: Callable[[Clause], str], *, with_object: bool | None = None) -> Maker:
    def make(rng: Random) -> tuple[str, str]:
        chosen = clause(rng, with_object=with_object, relative=False)
        return chosen.statement(), change(chosen)

    return make


def _tense(tense: str) -> Maker:
    def make(rng: Random) -> tuple[str, str]:
        chosen = clause(rng, relative=False)
        return chosen.statement(), chosen.at(tense).statement()

    return make


def _list(rng: Random, low: int = 2, high: int = 5) -> list[str]:
    """Choose a few words, real ones or sometimes invented ones."""
    count = rng.randint(low, high)
    if rng.random() < 0.45:
        return pretraining_words(rng, count)
    return rng.sample(_NOUNS + _ADJECTIVES, count)


def _on_list(change: Callable[[list[str]], Sequence[str]], *, low: int = 2) -> Maker:
    def make(rng: Random) -> tuple[str, str]:
        items = _list(rng, low)
        return " ".join(items), " ".join(change(items))

    return make


def _find(group: Sequence[str]) -> Maker:
    """Make lists with one word of a group, which is the answer."""

    def make(rng: Random) -> tuple[str, str]:
        wanted = rng.choice(group)
        items = [wanted, *(w for w in rng.sample(THING_NAMES, 3) if w not in group)]
        rng.shuffle(items)
        return " ".join(items), wanted

    return make


def _adjective_last(rng: Random) -> tuple[str, str]:
    adjective, noun = rng.choice(_ADJECTIVES), rng.choice(_NOUNS)
    return f"the {adjective} {noun}", f"the {noun} {adjective}"


def _verb_last(rng: Random) -> tuple[str, str]:
    subject, target = rng.sample(_NOUNS, 2)
    verb = past(rng.choice(words.TRANSITIVE)[0])
    return f"the {subject} {verb} the {target}", f"the {subject} the {target} {verb}"


def _bare(rng: Random) -> tuple[str, str]:
    """Leave out the articles."""
    chosen = clause(rng, with_object=True, relative=False)
    text = chosen.statement()[:-1]
    kept = [word for word in text.split() if word.lower() not in ("the", "a", "an")]
    return text, " ".join(kept)


def _glossary(rng: Random) -> tuple[str, str]:
    """Look invented words up in a glossary given in the text."""
    entries = dict(zip(rng.sample(_NOUNS, 3), pretraining_words(rng, 3), strict=True))
    asked = rng.sample(list(entries), rng.choice((1, 1, 2)))
    listed = ", ".join(f"{word} = {invented}" for word, invented in entries.items())
    return f"{listed}. {' '.join(asked)}", " ".join(entries[word] for word in asked)


def _reverse_glossary(rng: Random) -> tuple[str, str]:
    entries = dict(zip(pretraining_words(rng, 3), rng.sample(_NOUNS, 3), strict=True))
    asked = rng.choice(list(entries))
    listed = ", ".join(f"{invented} = {word}" for invented, word in entries.items())
    return f"{listed}. {asked}", entries[asked]


def _definition(rng: Random) -> tuple[str, str]:
    invented, kind = pretraining_word(rng), rng.choice(_NOUNS)
    adjective = rng.choice(_ADJECTIVES)
    if rng.random() < 0.5:
        meaning = f"a {adjective} {kind}"
        return f"A {invented} is {meaning}. What is a {invented}?", meaning
    return f"Every {kind} is called {invented}. What is a {kind} called?", invented


def _suffix(rng: Random) -> tuple[str, str]:
    """Add an ending shown by one example."""
    first, second = pretraining_words(rng, 2)
    ending = rng.choice(("s", "en", "ik", "a", "o", "ul"))
    return f"{first} -> {first}{ending}, {second} ->", f"{second}{ending}"


def _who_did(rng: Random) -> tuple[str, str]:
    names = rng.sample(words.WOMEN + words.MEN, 2)
    places = rng.sample(words.PLACES, 2)
    asked = rng.randrange(2)
    story = " ".join(f"{n} went to the {p}." for n, p in zip(names, places, strict=True))
    if rng.random() < 0.5:
        return f"{story} Where is {names[asked]}?", places[asked]
    return f"{story} Who is in the {places[asked]}?", names[asked]


def _ownership(rng: Random) -> tuple[str, str]:
    names = rng.sample(words.WOMEN + words.MEN, 2)
    owned, colours = rng.sample(THING_NAMES, 2), rng.sample(words.COLOURS, 2)
    asked = rng.randrange(2)
    story = " ".join(f"{n} has a {c} {t}." for n, c, t in zip(names, colours, owned, strict=True))
    if rng.random() < 0.5:
        return f"{story} What does {names[asked]} have?", f"a {colours[asked]} {owned[asked]}"
    return f"{story} What colour is the {owned[asked]}?", colours[asked]


def _replace(rng: Random) -> tuple[str, str]:
    items = rng.sample(_NOUNS, 4)
    old, new = items[0], items[3]
    shown = items[:3]
    rng.shuffle(shown)
    changed = [new if word == old else word for word in shown]
    return f"{old} by {new}: {' '.join(shown)}", " ".join(changed)


def _unscramble(rng: Random) -> tuple[str, str]:
    chosen = clause(rng, with_object=False, relative=False).statement()
    parts = chosen[:-1].lower().split()
    rng.shuffle(parts)
    return " ".join(parts), chosen


def _many(rng: Random) -> tuple[str, str]:
    noun, number = rng.choice(ANIMAL_NAMES), rng.randint(2, 9)
    return f"{number} {noun}", f"{words.NUMBERS[number]} {plural(noun)}"


def _subject(rng: Random) -> tuple[str, str]:
    chosen = clause(rng, relative=False)
    return chosen.statement(), chosen.subject.text()


TEXT_FAMILIES = (
    Family(
        "negation",
        ("Make it negative.", "Say that it is not so: {x}", "Write the negation.", "Negate: {x}"),
        _rewrite(Clause.negation),
    ),
    Family(
        "question",
        ("Turn it into a question.", "Ask whether it is so: {x}", "Question: {x}", "Make a yes-no question."),
        _rewrite(Clause.question),
    ),
    Family(
        "passive",
        ("Use the passive.", "Write in the passive voice: {x}", "Passive: {x}"),
        _rewrite(Clause.passive, with_object=True),
    ),
    Family("to_past", ("Put it in the past tense.", "Tell it in the past: {x}", "Say yesterday."), _tense("past")),
    Family("to_present", ("Put it in the present tense.", "Tell it in the present: {x}"), _tense("present")),
    Family(
        "to_future",
        ("Put it in the future tense.", "Tell it in the future: {x}", "Say it with will."),
        _tense("future"),
    ),
    Family("subject", ("Who or what does it?", "Name the subject: {x}", "Find the subject."), _subject),
    Family(
        "copy",
        ("Repeat.", "Copy this: {x}", "Write the same words.", "Say again: {x}"),
        _on_list(lambda items: items, low=1),
    ),
    Family(
        "reverse",
        ("Reverse the order.", "Write backwards: {x}", "Reverse the words."),
        _on_list(lambda items: items[::-1]),
    ),
    Family("first", ("Give the first word.", "First word of: {x}"), _on_list(lambda i: i[:1])),
    Family("last", ("Give the last word.", "Last word of: {x}"), _on_list(lambda i: i[-1:])),
    Family("second", ("Give the second word.", "Second word of: {x}"), _on_list(lambda i: i[1:2])),
    Family("without_first", ("Leave out the first word.", "Drop the first: {x}"), _on_list(lambda items: items[1:])),
    Family(
        "swap",
        ("Move the first word to the end.", "First word last: {x}"),
        _on_list(lambda items: [*items[1:], items[0]]),
    ),
    Family(
        "twice",
        ("Write every word twice.", "Double each word: {x}"),
        _on_list(lambda items: [word for item in items for word in (item, item)]),
    ),
    Family("sort", ("Sort by alphabet.", "Put in alphabetical order: {x}"), _on_list(sorted)),
    Family(
        "count",
        ("How many words?", "Count the words: {x}"),
        lambda rng: (" ".join(items := _list(rng, 1, 6)), words.NUMBERS[len(items)]),
    ),
    Family(
        "commas",
        ("Put commas between the words.", "Make a list: {x}"),
        lambda rng: (" ".join(items := _list(rng)), ", ".join(items)),
    ),
    Family(
        "capitals",
        ("Write in capitals.", "Capital letters: {x}"),
        lambda rng: (word := rng.choice(_NOUNS), word.upper()),
    ),
    Family("find_animal", ("Find the animal.", "Which is an animal? {x}"), _find(ANIMAL_NAMES)),
    Family("find_colour", ("Find the colour.", "Which is a colour? {x}"), _find(words.COLOURS)),
    Family("find_person", ("Find the person.", "Which is a person? {x}"), _find(PROFESSION_NAMES)),
    Family("adjective_last", ("Put the adjective last.", "Adjective after noun: {x}"), _adjective_last),
    Family("verb_last", ("Put the verb last.", "Verb at the end: {x}"), _verb_last),
    Family("no_articles", ("Leave out the articles.", "Drop the and a: {x}"), _bare),
    Family("glossary", ("Use the glossary.", "Translate with the list: {x}", "Look up: {x}"), _glossary),
    Family("reverse_glossary", ("Read the glossary.", "Which word is meant? {x}"), _reverse_glossary),
    Family("definition", ("Answer from the text.", "Read and answer: {x}", "{x}"), _definition),
    Family("suffix", ("Go on in the same way.", "Follow the example: {x}"), _suffix),
    Family("who_where", ("Answer the question.", "Read and answer: {x}", "{x}"), _who_did),
    Family("ownership", ("Answer the question.", "Read the text: {x}", "{x}"), _ownership),
    Family("replace", ("Replace a word.", "Replace {x}"), _replace),
    Family("unscramble", ("Put the words in order.", "Make a sentence: {x}"), _unscramble),
    Family("quantity", ("Write out.", "Say the amount: {x}"), _many),
    Family(
        "tidy",
        ("Write as a sentence.", "Add a capital and a full stop: {x}"),
        lambda rng: ((text := clause(rng).statement()[:-1]).lower(), sentence(text.lower())),
    ),
)
