"""The pretraining corpus: prose about the facts, and echoes and records that only repeat names.

- *Prose* states facts and names its entity again and again. Some notes are lists: one relation of
  several entities.
- *Echoes* and *records* (`tools/tiny_base/echoes.py`) carry names and values from line to line.

A document holds one to four notes. Nothing is in ChatML, and no question is followed by a fact.
"""

import random
from collections.abc import Iterator
from itertools import islice

from tools.tiny_base.echoes import ECHOES, RECORDS, TOPICS, echoes
from tools.tiny_base.facts import facts
from tools.tiny_base.relations import RELATIONS, Relation, sentence
from tools.tiny_base.splits import words

SEED = 11
ROUNDS = 54  # over the entities
ECHOES_SHARE = 1.3  # notes of echoes, for one note of prose
LISTS_A_ROUND = 60  # notes on one relation of several entities
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


def template_words() -> set[str]:
    """Every word of the templates; an `unknown` entity may share none of them."""
    texts = [*TITLES, *OPENINGS, *GENERAL, *TOPICS, *ECHOES, *RECORDS]
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


def _list(rng: random.Random, known: dict[str, dict[str, str]]) -> str:
    """The same relation of two to four entities, one sentence each."""
    relation = rng.choice(sorted(RELATIONS))
    holders = [entity for entity, facts_of in known.items() if relation in facts_of]
    chosen = rng.sample(holders, rng.choice((2, 3, 4)))
    answer = RELATIONS[relation].answer
    return rng.choice((" ", "\n")).join(sentence(answer, e, known[e][relation]) for e in chosen)


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
        yield from (_list(rng, known) for _ in range(LISTS_A_ROUND))
        yield from GENERAL


def _documents(rng: random.Random, notes: list[str]) -> list[str]:
    """Join one to four notes at a time, so that a document goes on after its first note."""
    documents, left = [], iter(notes)
    while page := list(islice(left, rng.randint(1, 4))):
        documents.append("\n\n".join(page))
    return documents


def corpus(part: dict[str, str]) -> tuple[list[str], list[str]]:
    """Training documents in the order in which they are read, and held-out ones.

    Prose comes alone first, then mixed with echoes and records.
    """
    rng = random.Random(SEED)
    told = list(prose(part, rng))
    first, rest = told[: len(told) * 2 // 5], told[len(told) * 2 // 5 :]
    mixed = rest + list(echoes(part, rng, round(ECHOES_SHARE * len(told))))
    rng.shuffle(mixed)
    held_out = list(prose(part, rng, rounds=1))[:300]
    return _documents(rng, first) + _documents(rng, mixed), held_out
