"""Instruction families about single words and facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from adaptive_lora.data.embedded_tasks import Family
from benchmarks.embedded_base import vocabulary as words
from benchmarks.embedded_base.grammar import ANIMAL_NAMES, PROFESSION_NAMES, THING_NAMES
from benchmarks.embedded_base.inflection import VERB_FORMS, gerund, participle, past, plural, third_person, with_article

Maker = Callable[[Random], tuple[str, str]]

COUNTED = tuple(
    noun
    for noun in (*ANIMAL_NAMES, *PROFESSION_NAMES, *THING_NAMES, *(row[0] for row in words.FOODS))
    if noun not in words.UNCOUNTED
)
_KINDS = tuple((row[0], row[1]) for row in (*words.ANIMALS, *words.FOODS, *words.THINGS))


def _pairs(table: Sequence[tuple[str, ...]], given: int, wanted: int) -> Maker:
    """Make examples from two columns of a table, leaving out rows without an entry."""
    rows = [(row[given], row[wanted]) for row in table if "-" not in (row[given], row[wanted])]
    return lambda rng: rng.choice(rows)


def _of(nouns: Sequence[str], answer: Callable[[str], str]) -> Maker:
    """Make examples by applying a function to a word."""

    def make(rng: Random) -> tuple[str, str]:
        word = rng.choice(nouns)
        return word, answer(word)

    return make


def _antonym(rng: Random) -> tuple[str, str]:
    first, second = rng.choice(words.ANTONYMS)
    return (first, second) if rng.random() < 0.5 else (second, first)


def _number_after(rng: Random) -> tuple[str, str]:
    value = rng.randrange(len(words.NUMBERS) - 1)
    return words.NUMBERS[value], words.NUMBERS[value + 1]


def _sum(rng: Random) -> tuple[str, str]:
    first, second = rng.randrange(11), rng.randrange(10)
    return f"{first} + {second}", str(first + second)


def _number_word(rng: Random) -> tuple[str, str]:
    value = rng.randrange(len(words.NUMBERS))
    return str(value), words.NUMBERS[value]


def _next_in(names: Sequence[str], step: int) -> Maker:
    def make(rng: Random) -> tuple[str, str]:
        index = rng.randrange(len(names))
        return names[index], names[(index + step) % len(names)]

    return make


def _spanish_pair(rng: Random) -> tuple[str, str]:
    """Return `red house`, `casa roja`: noun first, adjective agreeing with it."""
    noun, spanish, gender = rng.choice(words.SPANISH_NOUNS)
    adjective, form = rng.choice(words.SPANISH_ADJECTIVES)
    if gender == "f" and form.endswith("o"):
        form = form[:-1] + "a"
    return f"{adjective} {noun}", f"{spanish} {form}"


def _spelling(rng: Random) -> tuple[str, str]:
    word = rng.choice([noun for noun in COUNTED if len(noun) < 7 and noun.isalpha()])
    return word, " ".join(word)


def _odd_one_out(rng: Random) -> tuple[str, str]:
    groups = (ANIMAL_NAMES, PROFESSION_NAMES, words.COLOURS, words.WOMEN, words.MEN, words.DAYS)
    common, other = rng.sample(groups, 2)
    items = [*rng.sample(common, 3), odd := rng.choice(other)]
    rng.shuffle(items)
    return ", ".join(items), odd


def _is_it_a(rng: Random) -> tuple[str, str]:
    noun, kind = rng.choice(_KINDS)
    asked = kind if rng.random() < 0.5 else rng.choice(_KINDS)[1]
    return f"{noun}, {asked}", "yes" if asked == kind else "no"


def _translate(language: str) -> tuple[str, ...]:
    return (
        f"Translate to {language}: {{x}}",
        f"Say in {language}: {{x}}",
        f"Put into {language}.",
        f"What is {{x}} in {language}?",
        f"{language}: {{x}}",
        f"Give the {language} words.",
    )


WORD_FAMILIES = (
    Family(
        "plural",
        ("Give the plural of {x}.", "Write the plural.", "One {x}, two what?", "Plural: {x}", "Make this word plural."),
        _of(COUNTED, plural),
    ),
    Family(
        "singular",
        ("Give the singular.", "What is one of {x} called?", "Singular: {x}"),
        lambda rng: (plural(noun := rng.choice(COUNTED)), noun),
    ),
    Family(
        "past_tense",
        ("Give the past tense of {x}.", "Write the verb in the past.", "Today {x}, yesterday what?", "Past: {x}"),
        _of(tuple(VERB_FORMS), past),
    ),
    Family(
        "participle",
        ("Give the past participle of {x}.", "I have ... ({x})", "Write the past participle."),
        _of(tuple(VERB_FORMS), participle),
    ),
    Family(
        "ing_form",
        ("Give the -ing form of {x}.", "I am ... ({x})", "Add -ing to this verb."),
        _of(tuple(VERB_FORMS), gerund),
    ),
    Family(
        "third_person",
        ("Use {x} with he.", "I {x}, he what?", "Give the form for she."),
        _of(tuple(VERB_FORMS), third_person),
    ),
    Family(
        "base_form",
        ("Give the base form.", "Which verb is {x} from?", "Infinitive: {x}"),
        lambda rng: (past(verb := rng.choice(tuple(VERB_FORMS))), verb),
    ),
    Family(
        "antonym",
        (
            "Give the opposite of {x}.",
            "What is the opposite?",
            "Not {x} but what?",
            "Opposite: {x}",
            "Write an antonym.",
        ),
        _antonym,
    ),
    Family(
        "comparative",
        ("Give the comparative of {x}.", "Compare two: {x}", "Write the comparative form."),
        _pairs(words.COMPARATIVES, 0, 1),
    ),
    Family(
        "superlative",
        ("Give the superlative of {x}.", "Which form is used for the most {x}?", "Superlative: {x}"),
        _pairs(words.COMPARATIVES, 0, 2),
    ),
    Family(
        "kind",
        (
            "What kind of thing is this?",
            "Name the group of {x}.",
            "To what group does {x} belong?",
            "Kind: {x}",
            "Classify: {x}",
        ),
        lambda rng: rng.choice(_KINDS),
    ),
    Family("is_it", ("Is the first a kind of the second?", "Does it belong to the group? {x}"), _is_it_a),
    Family(
        "young",
        ("What is the young of a {x} called?", "Name the young animal.", "Baby {x}:"),
        _pairs(words.ANIMALS, 0, 2),
    ),
    Family(
        "sound",
        ("What sound does a {x} make?", "What does the {x} do when it calls?", "The {x} ..."),
        _pairs(words.ANIMALS, 0, 3),
    ),
    Family(
        "habitat",
        ("Where does a {x} live?", "Name the place where this animal lives.", "Home of the {x}:"),
        _pairs(words.ANIMALS, 0, 4),
    ),
    Family(
        "workplace",
        ("Where does a {x} work?", "Name the workplace.", "Place of work: {x}"),
        _pairs(words.PROFESSIONS, 0, 1),
    ),
    Family(
        "duty",
        ("What does a {x} do?", "Name the work of this person.", "Work of a {x}:"),
        lambda rng: ((row := rng.choice(words.PROFESSIONS))[0], f"{third_person(row[2])} {row[3]}"),
    ),
    Family(
        "capital", ("What is the capital of {x}?", "Name the capital.", "Capital: {x}"), _pairs(words.COUNTRIES, 0, 1)
    ),
    Family(
        "country",
        ("In which country is {x}?", "Name the country of this city.", "Country: {x}"),
        _pairs(words.COUNTRIES, 1, 0),
    ),
    Family("continent", ("On which continent is {x}?", "Name the continent."), _pairs(words.COUNTRIES, 0, 3)),
    Family("colour", ("What colour is {x}?", "Name the usual colour.", "Colour of {x}:"), _pairs(words.COLOURED, 0, 1)),
    Family("spanish_word", _translate("Spanish"), _pairs(words.SPANISH_NOUNS, 0, 1)),
    Family("spanish_phrase", _translate("Spanish"), _spanish_pair),
    Family("french_word", _translate("French"), _pairs(words.FRENCH_WORDS, 0, 1)),
    Family("german_word", _translate("German"), _pairs(words.GERMAN_WORDS, 0, 1)),
    Family(
        "from_spanish",
        ("Translate to English: {x}", "Say in English: {x}", "What does {x} mean?"),
        _pairs(words.SPANISH_NOUNS, 1, 0),
    ),
    Family("next_number", ("What comes after {x}?", "Name the next number.", "Count on from {x}."), _number_after),
    Family("sum", ("Add: {x}", "Work out the sum.", "What is {x}?", "{x} ="), _sum),
    Family("number_word", ("Write {x} as a word.", "Say this number."), _number_word),
    Family(
        "next_day",
        ("Which day comes after {x}?", "Today is {x}. What is tomorrow?", "Name the next day."),
        _next_in(words.DAYS, 1),
    ),
    Family(
        "previous_day", ("Which day comes before {x}?", "Today is {x}. What was yesterday?"), _next_in(words.DAYS, -1)
    ),
    Family("next_month", ("Which month follows {x}?", "The month after {x}:"), _next_in(words.MONTHS, 1)),
    Family("spelling", ("Spell {x}.", "Write the letters of the word."), _spelling),
    Family("article", ("Put a or an before it.", "A or an? {x}"), _of(COUNTED, with_article)),
    Family("odd_one_out", ("Which word does not belong?", "Find the odd one out: {x}", "Odd one out."), _odd_one_out),
)
