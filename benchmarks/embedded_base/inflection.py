"""English inflection: plurals, verb forms and articles for the words of the vocabulary."""

from __future__ import annotations

from benchmarks.embedded_base.vocabulary import EATING, HANDLING, INTRANSITIVE, OTHER_VERBS, TRANSITIVE, split_words

_IRREGULAR_PLURALS = {
    "mouse": "mice",
    "goose": "geese",
    "sheep": "sheep",
    "deer": "deer",
    "salmon": "salmon",
    "trout": "trout",
    "tuna": "tuna",
    "carp": "carp",
    "wolf": "wolves",
    "calf": "calves",
    "knife": "knives",
    "shelf": "shelves",
    "scarf": "scarves",
    "leaf": "leaves",
    "fisherman": "fishermen",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "mango": "mangoes",
    "ox": "oxen",
    "child": "children",
    "foot": "feet",
    "tooth": "teeth",
    "woman": "women",
    "man": "men",
}
_DOUBLED = frozenset(split_words("run sit swim win cut plan stop beg drop"))
VERB_FORMS = {
    base: (past, participle)
    for base, past, participle in (*TRANSITIVE, *HANDLING, *EATING, *INTRANSITIVE, *OTHER_VERBS)
}
"""Base form to (past, participle)."""


def _ends_in_consonant_y(word: str) -> bool:
    return word.endswith("y") and word[-2] not in "aeiou"


def plural(noun: str) -> str:
    """Return the plural of a noun."""
    if noun in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[noun]
    if noun.endswith("ss") or noun.endswith(("s", "x", "ch", "sh", "z")):
        return noun + "es"
    return noun[:-1] + "ies" if _ends_in_consonant_y(noun) else noun + "s"


def third_person(verb: str) -> str:
    """Return the present form of a verb for he, she or it."""
    if verb.endswith(("s", "x", "ch", "sh", "z", "o")):
        return verb + "es"
    return verb[:-1] + "ies" if _ends_in_consonant_y(verb) else verb + "s"


def past(verb: str) -> str:
    """Return the simple past; verbs without an entry are regular."""
    if verb in VERB_FORMS:
        return VERB_FORMS[verb][0]
    if _ends_in_consonant_y(verb):
        return verb[:-1] + "ied"
    return verb + ("d" if verb.endswith("e") else "ed")


def participle(verb: str) -> str:
    """Return the past participle."""
    return VERB_FORMS[verb][1] if verb in VERB_FORMS else past(verb)


def gerund(verb: str) -> str:
    """Return the -ing form."""
    if verb in _DOUBLED:
        return verb + verb[-1] + "ing"
    if verb.endswith("e") and not verb.endswith("ee"):
        return verb[:-1] + "ing"
    return verb + "ing"


def with_article(phrase: str) -> str:
    """Put `a` or `an` before a phrase, by the letter it starts with."""
    return ("an " if phrase[0] in "aeio" or phrase.startswith("umb") else "a ") + phrase
