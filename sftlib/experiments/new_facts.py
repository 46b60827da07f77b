"""Can SFT teach facts? Facts that the base model has never read, added to the SFT data (lesson 1).

The base model has read nothing about the entities of the set `unknown`. Some of its facts are
`taught`: each in several wordings, among the usual examples. The facts about the `others` are never
taught. The control adds as many rows about facts that the base model has read, and that no other
example mentions.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sftlib.evaluate import Row

EXAMPLES = 480  # the usual examples, as in lesson 1
OTHERS = 30  # facts that are never taught
BATCH = 16


@dataclass(frozen=True)
class Teaching:
    """The settings of one run.

    Args:
        facts: how many facts are added to the usual examples. With no wordings they are asked for
            in the test alone.
        wordings: in how many wordings the rows ask for each of them.
        repeats: how many equal rows there are of each wording.
        known: the control: the added facts are ones that the base model has read.
        seed: of the wordings that are drawn, and of the order of the rows.
    """

    facts: int = 24
    wordings: int = 8
    repeats: int = 1
    known: bool = False
    seed: int = 0


def divided() -> tuple[list[dict], list[dict]]:
    """The never-read facts, one row each: those that may be taught, and the others.

    No entity is in both, and the order is random but always the same.
    """
    from sftlib.data import read_facts

    facts = _one_row_each(read_facts("unknown"))
    entities = list(dict.fromkeys(row["entity"] for row in facts))
    random.Random(1).shuffle(entities)
    facts.sort(key=lambda row: entities.index(row["entity"]))
    first = next(
        i
        for i in range(len(facts) - OTHERS, len(facts))
        if facts[i]["entity"] != facts[i - 1]["entity"]
    )
    return facts[:first], facts[first:]


def read_before(like: Sequence[Row]) -> list[dict]:
    """Facts that the base model has read and no SFT example mentions: as many, of the same kinds.

    They come from the set `dev`.
    """
    from sftlib.data import read_facts

    kinds = Counter(row["relation"] for row in like)
    found = []
    for row in _one_row_each(read_facts("dev")):
        if kinds[row["relation"]] > 0:
            kinds[row["relation"]] -= 1
            found.append(row)
    if missing := +kinds:
        raise ValueError(f"Expected as many facts that the base model has read, lacking {missing}.")
    return found


def wordings(rows: Sequence[Row]) -> dict[str, list[str]]:
    """In which ways the rows ask: for each relation the questions, with `{e}` for the entity."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        before, entity, after = row["messages"][0]["content"].rpartition(row["entity"])
        if entity:
            found.setdefault(row["relation"], {})[f"{before}{{e}}{after}"] = None
    return {relation: sorted(templates) for relation, templates in found.items()}


def reworded(
    facts: Sequence[Row], ways: Mapping[str, Sequence[str]], number: int, seed: int
) -> list[dict]:
    """Rows that ask for each fact in `number` different wordings, drawn by the seed.

    Raises:
        ValueError: there are fewer wordings.
    """
    rng, rows = random.Random(seed), []
    for fact in facts:
        templates = ways[fact["relation"]]
        if len(templates) < number:
            raise ValueError(f"Expected at most {len(templates)} wordings, found {number}.")
        for template in rng.sample(templates, number):
            question = template.replace("{e}", fact["entity"])
            messages = [{"role": "user", "content": question}, fact["messages"][-1]]
            rows.append({**fact, "messages": messages})
    return rows


def teach_and_measure(run: Teaching) -> dict[str, float]:
    """Train the model that the dial names on the usual examples and the added facts; measure.

    Returns:
        `steps` of the optimizer, and shares from 0 to 1:

        - `taught`, `taught_cloze`: the added facts in two wordings that no training row uses (exact
          match), and completed in plain text;
        - `heldout`, `heldout_content`, `heldout_cloze`: facts that the base model has read (exact
          match; the right value anywhere; completed in plain text);
        - `others`, `others_named`: never-taught facts in two wordings that no training row uses
          (exact match), and how often the answer names the right entity.
    """
    from sftlib.data import read_facts
    from sftlib.evaluate import answers, cloze, content, exact_match, named
    from sftlib.models import load
    from sftlib.training import tune

    examples, heldout = read_facts("sft"), read_facts("heldout")
    seen, unseen = wordings(examples), wordings(read_facts("heldout_wordings"))
    teachable, others = divided()
    if run.facts > len(teachable):
        raise ValueError(f"Expected at most {len(teachable)} facts, found {run.facts}.")
    added = teachable[: run.facts]
    if run.known:
        added = read_before(like=added)
    rows = reworded(added, seen, run.wordings, run.seed) * run.repeats
    tests = {
        "taught": reworded(added, unseen, 2, run.seed),
        "heldout": heldout,
        "others": reworded(others, unseen, 2, run.seed),
    }
    model, tokenizer = load()
    rows = examples[:EXAMPLES] + rows
    trainer = tune(model, tokenizer, rows, per_device_train_batch_size=BATCH, seed=run.seed)
    given = {
        name: answers(model, tokenizer, [row["messages"][:1] for row in asked])
        for name, asked in tests.items()
    }
    return {
        "steps": trainer.state.global_step,
        **{name: exact_match(found, tests[name]) for name, found in given.items()},
        "taught_cloze": cloze(model, tokenizer, added, examples),
        "heldout_content": content(given["heldout"], heldout),
        "heldout_cloze": cloze(model, tokenizer, heldout, examples),
        "others_named": named(given["others"], tests["others"]),
    }


def _one_row_each(rows: Sequence[dict]) -> list[dict]:
    """The first row of each fact."""
    found: dict[tuple[str, str], dict] = {}
    for row in rows:
        found.setdefault((row["entity"], row["relation"]), row)
    return list(found.values())
