"""Train the training sets of lesson 2 with three seeds each: its stored runs (`make sweeps`).

The sets are made by the lesson's own cells, which this script runs. So what is stored was trained
on what a student sees. Each row has a hash of its training set: a test fails if the lesson makes
another one. Takes five minutes on one core; goes on where it was interrupted. To begin anew, delete
the file.
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sftlib.data import MIXTURE, read_jsonl
from sftlib.experiments.data_quality import RUNS, Training
from sftlib.experiments.sweep import sweep

import nbformat

LESSON = Path(__file__).parents[2] / "notebooks" / "02_sft_data.ipynb"
SEEDS = range(3)
CELLS = (  # those that make the training sets and the tests, and what they need
    *("setup", "hand-good", "topics", "measure", "augment", "augment-show", "forms", "swap"),
    *("sample", "size-sets", "falsify", "noise-sets", "copies-sets", "exam-sets"),
    *("aug-sets", "aug-test", "mix-sets"),
)
STEPS = {"by_size": 30, "with_false_answers": 30, "with_copies": 30, "with_leaks": 60}
STEPS |= {"augmented": 30, "mixtures": 30}


def lesson_names() -> dict[str, Any]:
    """What the lesson's cells define; without its work folder, which they do not need."""
    os.environ["SFT_TEACHER"] = "recording"
    sources = {cell.id: cell.source for cell in nbformat.read(LESSON, 4).cells}
    names: dict[str, Any] = {"mixture": read_jsonl(MIXTURE)}
    with contextlib.redirect_stdout(io.StringIO()):
        for cell in CELLS:
            exec(sources[cell].replace("work = lesson.begin", "# "), names)
    return names


def training_sets(names: dict[str, Any], seed: int) -> dict[str, dict[str, list[dict]]]:
    """Each experiment's training sets for a seed, by their names."""
    return {experiment: names[experiment](seed) for experiment in STEPS}


def tests(names: dict[str, Any]) -> dict[str, dict[str, list[dict]]]:
    """Each experiment's test sets, by their names."""
    held_out = {"held-out": names["facts"]["heldout"]}
    found = dict.fromkeys(STEPS, held_out)
    found["with_leaks"] = names["exams"]
    found["augmented"] = {"new wordings in context": names["asked_anew"]}
    found["mixtures"] = names["four_tests"]
    return found


def digest(rows: list[dict]) -> str:
    """A short hash of a training set: of the conversations, in their order."""
    text = json.dumps([row["messages"] for row in rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def measure_with(names: dict[str, Any]) -> Callable[[Training], dict[str, Any]]:
    """A function that does one training, and returns what to store of it."""
    asked = tests(names)

    def measure(training: Training) -> dict[str, Any]:
        rows = names[training.experiment](training.seed)[training.data]
        trained = names["train"](rows, training.seed, training.steps)
        scores = names["report"](trained.model, names["tokenizer"], asked[training.experiment])
        shares = scores.exact_match.round(5).to_dict()
        return {"rows": len(rows), "set": digest(rows), "scores": shares}

    return measure


def stored(names: dict[str, Any]) -> list[Training]:
    """What the file holds, in order."""
    return [
        Training(experiment, data, seed, STEPS[experiment])
        for seed in SEEDS
        for experiment, sets in training_sets(names, seed).items()
        for data in sets
    ]


if __name__ == "__main__":
    lesson = lesson_names()
    sweep(stored(lesson), RUNS, measure_with(lesson))
