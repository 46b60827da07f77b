"""The pretraining corpus: plain prose about the facts, and notes that only repeat names.

Two kinds of notes, a few to a document; no questions about facts, no ChatML:

- *prose* states facts and names its entity again and again;
- *echoes* carry a name, real or made up, from one line to the next and state no fact. They teach
  the one skill that SFT needs and prose alone does not give: copying a name from the question
  into the answer. (Without them a trial reached 57 % held-out exact match after SFT, not 97 %.)
"""

import random
from collections.abc import Iterator
from itertools import islice

from tools.tiny_base.facts import facts
from tools.tiny_base.relations import RELATIONS, Relation, sentence
from tools.tiny_base.splits import words

SEED = 11
ROUNDS = 64  # over the entities
NOTES_A_ROUND = {"country": 3, "element": 2, "opposite": 1, "plural": 1}  # notes on an entity

TITLES = (
    "On {np}.",
    "About {np}.",
    "A note on {np}.",
    "{np}.",
    "{np}:",
    "Many people write about {np}.",
)
OPENINGS = (
    "This is about {e}.",
    "Some words about {e}.",
    "People often speak about {e}.",
    "Here is more about {e}.",
    "A note on {e}.",
    "",
    "",
)
GENERAL = (
    "What is a capital? A capital is the city where the government of a country sits.",
    "A continent is a large area of land. How many are there? Some people say seven.",
    "Which city do you like? I would like to see them all, please.",
    "Tell me and I forget. Teach me and I remember.",
    "How do people learn? They read, they ask and they try again.",
    "Name the thing and you will know it. Give a word and keep it.",
    "Please give what you can. Where there is a will, there is a way.",
    "An element is made of one kind of atom. What do chemists do? They study atoms.",
    "What is a currency? It is the money that people use in a country.",
    "I have a question. Can you help me? Do you know what I want to know?",
    "Could you say that again, please? I need to hear it. I ask you for one word.",
    "Which official language does a country have? What belongs to whom?",
    "A user asks and an assistant answers. The assistant helps the user.",
    "The calling code comes first. Phones are used to call people in a country.",
    "The plural is the form for many. The opposite of a word is another word.",
    "The symbol of an element is short. The atomic number counts protons.",
    "The internet domain stands at the end of a web page.",
)
TOPICS = (
    "river king song flag colour size shape tale price name mother house road friend taste voice "
    "book age speed weight hill garden picture dance map gate owner origin secret lesson weather "
    "market tower border anthem harbour history future word meaning sound value kind use place"
).split()
PLACES = ("\n", "\n", "\n", "\n- ", " ", "\n\n", "\n> ")
ECHOES = (
    "{a}, {b}, {c}.{s}Again: {a}, {b}, {c}.",
    "The word is {a}.{s}The word {a} comes again: {a}.",
    "Someone spoke of the {x} of {a}.{s}The {x} of {a} is an old matter.",
    "They wanted to hear about the {x} of {a}.{s}The {x} of {a} was not far from the {x} of {b}.",
    "A note on {a} and {b}.{s}First {a}, then {b}.",
    "In {a} there is a {x}.{s}The {x} of {a} is known to all.",
    "Not {a}, not {b}, but {c}.{s}It is {c}.",
    "First the {x} of {a}, then the {y} of {b}.{s}The {x} of {a} is one thing.{s}"
    "The {y} of {b} is another.",
    "The guide said: speak to me of the {x} of {a}.{s}The {x} of {a} is a long matter.",
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
ONSETS = "b c d f g h j k l m n p r s t v w z br st tr gr ch sh".split()
VOWELS = "a e i o u ai ea ou".split()
CODAS = ["", "n", "r", "l", "s", "m", "nd", "rk", "th"]


def template_words() -> set[str]:
    """Every word of the templates; an `unknown` entity may share none of them."""
    texts = [*TITLES, *OPENINGS, *GENERAL, *TOPICS, *ECHOES]
    for relation in RELATIONS.values():
        texts += [relation.np, relation.answer, *relation.prose, *relation.asked, *relation.unseen]
    return set().union(*map(words, texts))


def _titled_note(rng: random.Random, relation: Relation, entity: str, value: str) -> list[str]:
    """A title that names the fact, then the fact in one or two wordings."""
    title = rng.choice(TITLES).replace("{np}", relation.np)
    told = rng.sample((relation.answer, *relation.prose), rng.choice((1, 2)))
    return [sentence(title, entity)] + [sentence(t, entity, value) for t in told]


def _prose(rng: random.Random, entity: str, known: dict[str, str]) -> str:
    """A note about one entity, named in every sentence."""
    chosen = rng.sample(sorted(known), min(3, len(known)))
    if rng.random() < 0.4:
        return " ".join(_titled_note(rng, RELATIONS[chosen[0]], entity, known[chosen[0]]))
    opening = rng.choice(OPENINGS)
    told = [sentence(opening, entity)] if opening else []
    for name in chosen:
        wordings = (RELATIONS[name].answer, *RELATIONS[name].prose)
        for template in rng.sample(wordings, 1 if len(chosen) > 1 else 2):
            told.append(sentence(template, entity, known[name]))
    return " ".join(told)


def prose(part: dict[str, str], rng: random.Random, rounds: int = ROUNDS) -> Iterator[str]:
    """`rounds` passes over every entity that is not `unknown`, in a new order each time."""
    known: dict[str, dict[str, str]] = {}
    kinds = {}
    for fact in facts():
        if part[fact.entity] != "unknown":
            known.setdefault(fact.entity, {})[fact.relation] = fact.value
            kinds[fact.entity] = fact.kind
    for _ in range(rounds):
        order = [e for e in known for _ in range(NOTES_A_ROUND[kinds[e]])]
        rng.shuffle(order)
        yield from (_prose(rng, entity, known[entity]) for entity in order)
        yield from GENERAL


def _made_up_name(rng: random.Random) -> str:
    syllables = rng.choice((1, 2, 2, 3))
    name = "".join(
        rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if rng.random() < 0.4 else "")
        for _ in range(syllables)
    )
    if rng.random() < 0.15:
        name += " " + (rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)).capitalize()
    return name if rng.random() < 0.4 else name.capitalize()


def echoes(part: dict[str, str], rng: random.Random, count: int) -> Iterator[str]:
    """`count` notes that repeat names; a third of the names are real, the others made up."""
    real = sorted(e for e, p in part.items() if p != "unknown")
    hidden = set().union(*(words(e) for e, p in part.items() if p == "unknown")) - {"the"}

    def name() -> str:
        while True:
            found = rng.choice(real) if rng.random() < 1 / 3 else _made_up_name(rng)
            if not words(found) & hidden:
                return found

    for _ in range(count):
        x, y = rng.sample(TOPICS, 2)
        filled = rng.choice(ECHOES).format(
            a=name(), b=name(), c=name(), x=x, y=y, s=rng.choice(PLACES)
        )
        yield filled[0].upper() + filled[1:]


def _documents(rng: random.Random, notes: list[str]) -> list[str]:
    """Join one to four notes at a time, so that a document goes on after its first note."""
    documents, left = [], iter(notes)
    while page := list(islice(left, rng.randint(1, 4))):
        documents.append("\n\n".join(page))
    return documents


def corpus(part: dict[str, str]) -> tuple[list[str], list[str]]:
    """Training documents in the order in which they are read, and held-out ones.

    Prose comes alone first, then mixed half and half with echoes (by notes).
    """
    rng = random.Random(SEED)
    told = list(prose(part, rng))
    first, rest = told[: len(told) * 2 // 5], told[len(told) * 2 // 5 :]
    mixed = rest + list(echoes(part, rng, len(rest)))
    rng.shuffle(mixed)
    held_out = list(prose(part, rng, rounds=1))[:300]
    return _documents(rng, first) + _documents(rng, mixed), held_out
