"""Train the training sets of lesson 2 with three seeds each: its stored runs (`make sweeps`).

The sets are made by the lesson's own functions, which this script takes from its cells. So what is
stored was trained on what a student sees. Each row has a hash of its training set: a test fails if
the lesson makes another one. Takes seven minutes on one core; goes on where it was interrupted. To
begin anew, delete the file.
"""

import ast
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
    *("setup", "hand-good", "topics", "measure", "augment", "forms"),
    *("size", "falsify", "noise", "named", "exam-sets", "mix-sets", "mix-draw", "mix-tests"),
    "brief",
)
OTHERS = ("size", "noise", "named", "brief")  # of these cells only the functions are taken
STEPS = {"by_size": 30, "with_false_answers": 30, "with_leaks": 60}
STEPS |= {"mixtures": 30, "trained_longer": 120}


def lesson_names() -> dict[str, Any]:
    """What the lesson's cells define; without its work folder, which they do not need."""
    os.environ["SFT_TEACHER"] = "recording"
    sources = {cell.id: cell.source for cell in nbformat.read(LESSON, 4).cells}
    names: dict[str, Any] = {"mixture": read_jsonl(MIXTURE)}
    with contextlib.redirect_stdout(io.StringIO()):
        for cell in CELLS:
            source = functions(sources[cell]) if cell in OTHERS else sources[cell]
            exec(source.replace("work = lesson.begin", "# "), names)
    return names


def functions(source: str) -> str:
    """The functions that a cell defines, without what else it does."""
    defined = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return "\n\n\n".join(ast.unparse(node) for node in defined)


def training_sets(names: dict[str, Any], seed: int) -> dict[str, dict[str, list[dict]]]:
    """Each experiment's training sets for a seed, by their names."""
    return {experiment: names[experiment](seed) for experiment in STEPS}


def tests(names: dict[str, Any], training: Training) -> dict[str, list[dict]]:
    """The test sets that the model is asked after a training, by their names."""
    if training.experiment == "with_leaks":
        return names["exams"]
    if training.experiment == "mixtures":
        return names["five_tests"]
    asked = {"held-out": names["facts"]["heldout"]}
    if training.experiment == "trained_longer":
        asked["brief"] = names["five_tests"]["brief"]
    if training.data in ("0% false", "50% false"):  # the control is asked the same questions
        again = names["asked_again"](training.seed)
        asked |= {test: list(rows) for test, rows in again.items()}
    return asked


def digest(rows: list[dict]) -> str:
    """A short hash of a training set: of the conversations, in their order."""
    text = json.dumps([row["messages"] for row in rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def measure_with(names: dict[str, Any]) -> Callable[[Training], dict[str, Any]]:
    """A function that does one training, and returns what to store of it."""

    def measure(training: Training) -> dict[str, Any]:
        rows = names[training.experiment](training.seed)[training.data]
        trained = names["train"](rows, training.seed, training.steps)
        scores = names["report"](trained.model, names["tokenizer"], tests(names, training))
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
