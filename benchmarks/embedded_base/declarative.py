"""Declarative text of the pretraining corpus: stories, descriptions, talks, letters, recipes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from benchmarks.embedded_base import vocabulary as words
from benchmarks.embedded_base.grammar import ANIMAL_NAMES, THING_NAMES, NounPhrase, clause, place, sentence
from benchmarks.embedded_base.inflection import past, plural, third_person, with_article
from benchmarks.embedded_base.nonsense import pretraining_word

_OPENINGS = (
    "One day",
    "Early in the morning",
    "Last week",
    "In the evening",
    "After that",
    "Then",
    "Soon",
    "Later",
    "Before dinner",
    "On {day}",
    "In {month}",
    "At last",
    "Suddenly",
)


def _opening(rng: Random) -> str:
    phrase = rng.choice(_OPENINGS)
    return phrase.format(day=rng.choice(words.DAYS), month=rng.choice(words.MONTHS))


def _lower_first(text: str, keep: bool) -> str:
    return text if keep else text[0].lower() + text[1:]


def story(rng: Random) -> str:
    """Write three to six sentences about one hero, who becomes a pronoun."""
    woman = rng.random() < 0.5
    name = rng.choice(words.WOMEN if woman else words.MEN)
    pronoun = NounPhrase(noun="she" if woman else "he", determiner="")
    hero = NounPhrase(noun=name, determiner="")
    lines = []
    if rng.random() < 0.5:
        work, where, verb, target = rng.choice(words.PROFESSIONS)
        lines.append(f"{name} is {with_article(work)} and works in the {where}.")
        lines.append(f"Every day {pronoun.noun} {third_person(verb)} {target}.")
    for index in range(rng.randint(3, 6)):
        subject = hero if index == 0 else rng.choice((pronoun, pronoun, hero))
        said = replace(clause(rng, relative=False), subject=subject).at("past").statement()
        if rng.random() < 0.35:
            said = f"{_opening(rng)} {_lower_first(said, subject is hero)}"
        lines.append(said)
    if rng.random() < 0.4:
        lines.append(f"In the end {pronoun.noun} was {rng.choice(words.TRAITS)}.")
    return " ".join(lines)


def scene(rng: Random) -> str:
    """Write loosely joined sentences, some of two clauses."""
    lines = []
    tense = rng.choice(("past", "present"))
    for _ in range(rng.randint(2, 5)):
        first = clause(rng).at(tense).statement()
        if rng.random() < 0.3:
            other = clause(rng, relative=False).at(tense)
            name = other.subject.determiner == ""
            link = rng.choice(("and", "but", "because", "while", "so"))
            first = f"{first[:-1]} {link} {_lower_first(other.statement(), name)}"
        lines.append(first)
    return " ".join(lines)


def animal_description(rng: Random) -> str:
    """Describe an animal: class, home, sound and young."""
    name, kind, young, sound, home = rng.choice(words.ANIMALS)
    many = plural(name)
    lines = [
        rng.choice(
            (
                f"{with_article(name)} is {with_article(kind)}.",
                f"{many} are {plural(kind)}.",
                f"the {name} belongs to the {plural(kind)}.",
            )
        ),
        rng.choice(
            (f"it lives in the {home}.", f"you find {many} in the {home}.", f"the home of the {name} is the {home}.")
        ),
    ]
    if sound != "-":
        lines.append(rng.choice((f"a {name} {sound}.", f"the {name} {sound} when it calls.")))
    if young != "-":
        lines.append(
            rng.choice((f"a young {name} is called {with_article(young)}.", f"the {young} is the young of the {name}."))
        )
    return _shuffled(rng, lines)


def _shuffled(rng: Random, lines: list[str]) -> str:
    rng.shuffle(lines)
    kept = lines[: rng.randint(2, max(2, len(lines)))]
    return " ".join(line[0].upper() + line[1:] for line in kept)


def work_description(rng: Random) -> str:
    """Describe a profession."""
    work, where, verb, target = rng.choice(words.PROFESSIONS)
    name = rng.choice(words.WOMEN + words.MEN)
    return _shuffled(
        rng,
        [
            f"{with_article(work)} works in the {where}.",
            f"the {work} {third_person(verb)} {target}.",
            f"{name} {past(verb)} {target} in the {where}, for {name} is {with_article(work)}.",
            f"people who {verb} {target} are {plural(work)}.",
            f"in the {where} you meet the {work}.",
        ],
    )


def country_description(rng: Random) -> str:
    """Describe a country."""
    country, capital, language, continent = rng.choice(words.COUNTRIES)
    name = rng.choice(words.WOMEN + words.MEN)
    return _shuffled(
        rng,
        [
            f"{capital} is the capital of {country}.",
            f"{country} is in {continent}.",
            f"people in {country} speak {language}.",
            f"{name} lives in {capital} and speaks {language}.",
            f"the capital of {country} is {capital}, a city in {continent}.",
        ],
    )


def kinds(rng: Random) -> str:
    """State to which groups things belong, their colours and opposites."""
    noun, kind = rng.choice((*words.FOODS, *words.THINGS))
    other, other_kind = rng.choice((*words.FOODS, *words.THINGS))
    thing, colour = rng.choice(words.COLOURED)
    first, second = rng.choice(words.ANTONYMS)
    base, more, most = rng.choice(words.COMPARATIVES)
    named = noun if noun in words.UNCOUNTED else with_article(noun)
    return _shuffled(
        rng,
        [
            f"{named} is a kind of {kind}.",
            f"the group of {noun} is {kind}, that of {other} is {other_kind}.",
            f"the colour of {thing} is {colour}.",
            f"as {colour} as {thing}.",
            f"the opposite of {first} is {second}.",
            f"what is not {second} is {first}.",
            f"{base}, {more}, {most}.",
        ],
    )


def words_abroad(rng: Random) -> str:
    """State what words are called in other languages."""
    tables = (
        ("Spanish", words.SPANISH_NOUNS),
        ("French", words.FRENCH_WORDS),
        ("German", words.GERMAN_WORDS),
        ("Spanish", words.SPANISH_ADJECTIVES),
    )
    lines = []
    for _ in range(rng.randint(2, 5)):
        language, table = rng.choice(tables)
        row = rng.choice(table)
        lines.append(
            rng.choice(
                (
                    f"the {language} word for {row[0]} is {row[1]}.",
                    f"in {language} {row[0]} is {row[1]}.",
                    f"{row[1]} is {language} for {row[0]}.",
                )
            )
        )
    return " ".join(line[0].upper() + line[1:] for line in lines)


def comparison(rng: Random) -> str:
    """Compare two animals."""
    first, second = rng.sample(ANIMAL_NAMES, 2)
    _, more, most = rng.choice(words.COMPARATIVES)
    base = rng.choice(words.TRAITS)
    return _shuffled(
        rng,
        [
            f"the {first} is {more} than the {second}.",
            f"the {second} is not as {base} as the {first}.",
            f"of all the animals the {first} is the {most}.",
            f"both the {first} and the {second} are {base}.",
        ],
    )


def conversation(rng: Random) -> str:
    """Write a short talk between two people."""
    one, two = rng.sample(words.WOMEN + words.MEN, 2)
    said = clause(rng, relative=False)
    answer = rng.choice((("Yes.", said.statement()), ("No.", said.negation())))
    where = place(rng)
    return "\n".join(
        (
            f"{one}: {said.question()}",
            f"{two}: {' '.join(answer)}",
            f"{one}: {rng.choice(('Where is that?', 'Where was it?', 'And where?'))}",
            f"{two}: {sentence(where)}",
            f"{one}: {rng.choice(('Thank you.', 'I see.', 'How strange!', 'Good.'))}",
        )
    )


def letter(rng: Random) -> str:
    """Write a note with a greeting, news and a name."""
    one, two = rng.sample(words.WOMEN + words.MEN, 2)
    news = " ".join(clause(rng).at("past").statement() for _ in range(rng.randint(1, 3)))
    sky = rng.choice(words.WEATHER)
    wish = rng.choice(words.TRAITS)
    return f"Dear {one},\nIt is {sky} here. {news} I hope you are {wish}.\n{two}"


def recipe(rng: Random) -> str:
    """Write a recipe."""
    dish, *parts = (row[0] for row in rng.sample(words.FOODS, 4))
    steps = rng.sample(
        (
            "Wash the {0}.",
            "Cut the {1}.",
            "Mix the {0} and the {1}.",
            "Add the {2}.",
            "Cook the {1} slowly.",
            "Wait an hour.",
            "Taste it.",
            "Serve it warm.",
        ),
        4,
    )
    listed = ", ".join(parts)
    return f"{dish.capitalize()}: {listed}.\n" + " ".join(step.format(*parts) for step in steps)


def invented_creature(rng: Random) -> str:
    """Define an invented word and use it."""
    word, model = pretraining_word(rng), rng.choice(ANIMAL_NAMES + THING_NAMES)
    colour, trait = rng.choice(words.COLOURS), rng.choice(words.TRAITS)
    return _shuffled(
        rng,
        [
            f"a {word} is a {colour} {model}.",
            f"the {word} is {trait} and {colour}.",
            f"we call every {trait} {model} {with_article(word)}.",
            f"two {word}s stood {place(rng)}.",
            f"the word {word} means {model}, and {model} is {word}.",
        ],
    )


def calendar(rng: Random) -> str:
    """State dates, weather and counts."""
    index = rng.randrange(7)
    month = rng.randrange(12)
    number = rng.randrange(20)
    return _shuffled(
        rng,
        [
            f"after {words.DAYS[index]} comes {words.DAYS[(index + 1) % 7]}.",
            f"{words.MONTHS[month]} comes before {words.MONTHS[(month + 1) % 12]}.",
            f"it was {rng.choice(words.WEATHER)} in {words.MONTHS[month]}.",
            f"{words.NUMBERS[number]} and one is {words.NUMBERS[number + 1]}.",
            f"in {rng.choice(words.SEASONS)} the days are {rng.choice(words.WEATHER)}.",
        ],
    )


TEXTS: tuple[tuple[Callable[[Random], str], int], ...] = (
    (story, 5),
    (scene, 5),
    (animal_description, 2),
    (work_description, 2),
    (country_description, 1),
    (kinds, 2),
    (words_abroad, 1),
    (comparison, 1),
    (conversation, 1),
    (letter, 1),
    (recipe, 1),
    (invented_creature, 2),
    (calendar, 1),
)
"""(writer, weight) of the declarative texts."""
