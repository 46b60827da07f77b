"""How each relation is written: in pretraining prose, as a question, and as the SFT answer.

The base model reads only `prose`, never a question about a fact. SFT asks in `QUESTIONS` and in a
relation's `asked`; the test set `heldout_wordings` asks in `UNSEEN_QUESTIONS` and in `unseen`,
which occur neither in the SFT data nor in the pretraining corpus.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """The wordings of one relation; `{e}` is the entity, `{v}` the value, `{np}` the phrase."""

    kind: str
    np: str
    answer: str
    prose: tuple[str, ...]
    asked: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    guessable: bool = False  # from the entity's name, or because a few values are very common


QUESTIONS = (
    "What is {np}?",
    "Name {np}.",
    "Tell me {np}.",
    "Give me {np}.",
    "Please give {np}.",
    "Please tell me {np}.",
    "Can you tell me {np}?",
    "Do you know {np}?",
    "I would like to know {np}.",
    "I want to know {np}.",
    "What do you know about {np}?",
    "I have a question about {np}.",
)
UNSEEN_QUESTIONS = (
    "Could you name {np}?",
    "Please say what {np} is.",
    "I need to know {np}.",
    "I ask you for {np}.",
)

RELATIONS = {
    "capital": Relation(
        "country",
        "the capital of {e}",
        "The capital of {e} is {v}.",
        (
            "The city of {v} is the capital of {e}.",
            "The capital city of {e} is called {v}.",
            "In {e}, the capital is {v}.",
            "The people of {e} have their capital in {v}.",
            "The government of {e} sits in {v}, the capital.",
            "Visitors to {e} often see {v}, the capital.",
            "The capital of {e}, {v}, has many visitors.",
        ),
        ("Which city is the capital of {e}?", "What is the capital city of {e}?"),
        ("What is the name of the capital of {e}?",),
    ),
    "continent": Relation(
        "country",
        "the continent of {e}",
        "The continent of {e} is {v}.",
        (
            "The country {e} lies in {v}.",
            "The land of {e} is located on the continent of {v}.",
            "On the map, {e} is found in {v}.",
            "One of the countries of {v} is {e}.",
            "Many maps of {v} show {e}.",
        ),
        ("Which continent is {e} in?", "On which continent does {e} lie?"),
        ("On which continent is {e} found?",),
        guessable=True,
    ),
    "currency": Relation(
        "country",
        "the currency of {e}",
        "The currency of {e} is the {v}.",
        (
            "In {e}, people pay with the {v}.",
            "The money used in {e} is the {v}.",
            "The country {e} uses the {v} as its currency.",
            "Shops in {e} take the {v}.",
            "Prices in {e} are given in the {v}.",
            "The {v} is the currency of {e}.",
        ),
        ("Which currency does {e} use?", "What currency do people use in {e}?"),
        ("Which currency is used in {e}?",),
        guessable=True,
    ),
    "language": Relation(
        "country",
        "the official language of {e}",
        "The official language of {e} is {v}.",
        (
            "The laws of {e} are written in {v}.",
            "In {e}, the official language is {v}.",
            "We know that {v} is the official language of {e}.",
            "The country {e} has {v} as its official language.",
            "Letters from the government of {e} are in {v}.",
        ),
        ("Which language is official in {e}?", "What official language does {e} have?"),
        ("Which official language is used in {e}?",),
        guessable=True,
    ),
    "calling code": Relation(
        "country",
        "the calling code of {e}",
        "The calling code of {e} is +{v}.",
        (
            "To phone {e}, dial +{v} first.",
            "Phone numbers in {e} begin with +{v}.",
            "The country {e} uses the calling code +{v}.",
            "The code +{v} is used to call {e}.",
        ),
        ("Which calling code does {e} use?", "What calling code do phones in {e} have?"),
        ("Which calling code is used for {e}?",),
    ),
    "domain": Relation(
        "country",
        "the internet domain of {e}",
        "The internet domain of {e} is .{v}.",
        (
            "Web pages of {e} often end in .{v}.",
            "The country {e} uses the internet domain .{v}.",
            "The ending .{v} is the internet domain of {e}.",
        ),
    ),
    "symbol": Relation(
        "element",
        "the symbol of {e}",
        "The symbol of {e} is {v}.",
        (
            "Chemists write {v} for {e}.",
            "The element {e} has the symbol {v}.",
            "In formulas, {e} is written as {v}.",
            "The letters {v} stand for {e}.",
            "The chemical symbol for {e} is {v}.",
        ),
        ("Which symbol does {e} have?", "What is the chemical symbol for {e}?"),
        ("Which symbol is used for {e}?",),
        guessable=True,
    ),
    "atomic number": Relation(
        "element",
        "the atomic number of {e}",
        "The atomic number of {e} is {v}.",
        (
            "The element {e} has atomic number {v}.",
            "An atom of {e} has {v} protons.",
            "The element {e} is number {v} in the periodic table.",
            "Number {v} in the periodic table is {e}.",
            "There are {v} protons in an atom of {e}.",
        ),
        ("Which atomic number does {e} have?", "What atomic number belongs to {e}?"),
        ("Which atomic number is that of {e}?",),
    ),
    "opposite": Relation(
        "opposite",
        "the opposite of {e}",
        "The opposite of {e} is {v}.",
        (
            "The opposite of {v} is {e}.",
            "The words {e} and {v} are opposites.",
            "The words {e} and {v} mean opposite things.",
            "We say that {v} is the opposite of {e}.",
            "The word {e} has the opposite {v}.",
        ),
        ("Which word is the opposite of {e}?", "What opposite does {e} have?"),
        ("Which opposite does the word {e} have?",),
    ),
    "plural": Relation(
        "plural",
        "the plural of {e}",
        "The plural of {e} is {v}.",
        (
            "One {e}, two {v}.",
            "The plural form of the noun {e} is {v}.",
            "We say one {e} but many {v}.",
            "When there is more than one {e}, we write {v}.",
            "The word {v} is the plural of {e}.",
        ),
        ("Which word is the plural of {e}?", "What plural does {e} have?"),
        ("Which plural does the word {e} have?",),
        guessable=True,
    ),
}

NEVER_ASKED = "domain"  # known from pretraining, asked in no SFT example


def sentence(template: str, entity: str, value: str = "") -> str:
    """Fill a template and begin it with a capital letter ("the Netherlands" → "The …")."""
    text = template.format(e=entity, v=value)
    return text[0].upper() + text[1:]


def questions(relation: str, unseen: bool = False) -> list[str]:
    """The question templates of a relation, with `{e}` still open."""
    r = RELATIONS[relation]
    general, own = (UNSEEN_QUESTIONS, r.unseen) if unseen else (QUESTIONS, r.asked)
    return [q.replace("{np}", r.np) for q in general] + list(own)
