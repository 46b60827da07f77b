"""Split the facts by entity, and write the SFT data and the test sets.

An entity belongs to exactly one part, so that no test asks about an entity of the SFT data:

- `train`: asked about in SFT
- `dev`, `heldout`: known from pretraining, never asked about in SFT
- `unknown`: neither in the pretraining corpus nor in the SFT data (the control)
"""

import random
import re
from itertools import islice

from tools.tiny_base.facts import Fact, facts
from tools.tiny_base.relations import NEVER_ASKED, RELATIONS, questions, sentence

SIZES = {  # entities per kind; what is left is `train`
    "country": {"unknown": 26, "dev": 36, "heldout": 60},
    "element": {"unknown": 24, "dev": 22, "heldout": 36},
    "opposite": {"unknown": 26, "dev": 28, "heldout": 46},
    "plural": {"unknown": 0, "dev": 30, "heldout": 52},
}
PROMPTS = 200  # in each test set
SEED = 2027


def words(text: str) -> set[str]:
    """The lower-case words of a text, for whole-word comparisons."""
    return set(re.findall(r"\w+", text.lower()))


def entities_by_part(known_words: set[str]) -> dict[str, str]:
    """Map each entity to its part; names that stand elsewhere too are always in `train`.

    So no tested entity is a word of a template (`known_words`) or of another entity's facts.
    """
    rng, part = random.Random(SEED), {}
    every = facts()
    for kind, sizes in SIZES.items():
        names = sorted({f.entity for f in every if f.kind == kind})
        rng.shuffle(names)
        clash = _clashing(names, every, known_words)
        part |= dict.fromkeys(names, "train")
        tested = (name for name in names if name not in clash)
        for label, size in sizes.items():
            part |= dict.fromkeys(islice(tested, size), label)
    return part


def _clashing(names: list[str], every: list[Fact], known_words: set[str]) -> set[str]:
    """Names that stand elsewhere in the facts or in the templates ("Guinea" in "Guinea-Bissau")."""
    holders: dict[str, set[str]] = {}  # word -> entities whose facts contain it
    for fact in every:
        for word in words(f"{fact.entity} {fact.value}"):
            holders.setdefault(word, set()).add(fact.entity)

    def clashes(name: str) -> bool:
        own = words(name) - {"the"}
        return bool(own & known_words) or any(holders[word] != {name} for word in own)

    return {name for name in names if clashes(name)}


def row(fact: Fact, template: str) -> dict:
    """One example: messages, and what a test needs to judge an answer."""
    answer = RELATIONS[fact.relation].answer
    return {
        "messages": [
            {"role": "user", "content": sentence(template, fact.entity)},
            {"role": "assistant", "content": sentence(answer, fact.entity, fact.value)},
        ],
        "relation": fact.relation,
        "entity": fact.entity,
        "value": fact.value,
    }


def _one_wording_each(rng: random.Random, chosen: list[Fact], unseen: bool = False) -> list[dict]:
    return [row(f, rng.choice(questions(f.relation, unseen))) for f in chosen]


def _unguessable(fact: Fact) -> bool:
    """Neither common among the answers nor to be read off the entity's name."""
    if RELATIONS[fact.relation].guessable or fact.relation == NEVER_ASKED:
        return False
    return not (words(fact.entity) & words(fact.value)) and fact.value[:4] != fact.entity[:4]


def _balanced(rng: random.Random, pool: list[Fact], size: int) -> list[Fact]:
    """`size` facts, as evenly over the relations as the pool allows."""
    by_relation = {r: [f for f in pool if f.relation == r] for r in RELATIONS}
    for group in by_relation.values():
        rng.shuffle(group)
    chosen: list[Fact] = []
    while len(chosen) < min(size, len(pool)):
        chosen += [group.pop() for group in by_relation.values() if group]
    return chosen[:size]


def splits(part: dict[str, str]) -> dict[str, list[dict]]:
    """The SFT data and every test set, as rows with `messages`, `relation`, `entity`, `value`."""
    rng = random.Random(SEED)
    pool = {name: [] for name in ("train", "dev", "heldout", "unknown")}
    for fact in facts():
        if fact.relation != NEVER_ASKED:
            pool[part[fact.entity]].append(fact)
    train = []
    for _ in range(3):  # every fact in three wordings, shuffled within each round
        rng.shuffle(pool["train"])
        train += _one_wording_each(rng, pool["train"])
    heldout = _balanced(rng, pool["heldout"], PROMPTS)
    unknown = [f for f in pool["unknown"] if _unguessable(f)]
    never_asked = [f for f in facts() if f.relation == NEVER_ASKED and part[f.entity] == "heldout"]
    return {
        "sft": train,
        "dev": _one_wording_each(rng, _balanced(rng, pool["dev"], PROMPTS)),
        "heldout": _one_wording_each(rng, heldout),
        "heldout_wordings": _one_wording_each(rng, heldout, unseen=True),
        "unknown": _wordings_each(rng, unknown, 2)[:PROMPTS],
        "never_asked": _wordings_each(rng, never_asked, 3)[:PROMPTS],
    }


def _wordings_each(rng: random.Random, chosen: list[Fact], number: int) -> list[dict]:
    rng.shuffle(chosen)
    return [row(f, q) for f in chosen for q in rng.sample(questions(f.relation), number)]
