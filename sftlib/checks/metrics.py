"""The exercises of lesson 8."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from sftlib.checks.exercise import exercise
from sftlib.checks.verdict import NOT_ATTEMPTED, Verdict, call, result_of, right, wrong
from sftlib.experiments.diagnosis import HEALTHY, SIGNS
from sftlib.experiments.failures import unnamed

HINTS = {
    "not a number": "Does each of its lines go on to the last step?",
    "no gradient": "Look at grad_norm, right at the bottom.",
    "out of scale": "Compare the training loss with the evaluation loss.",
    "starts near chance": "Compare its first loss with ln(vocabulary).",
    "unstable": "Is the loss ever clearly higher than at the start?",
    "barely learning": "How far does the loss fall, from the first step to the last?",
    "plateau": "Compare its last losses with those of the other trainings.",
    "spike": "Is there one step unlike those before and after it?",
    "overfitting": "Which line is lower in the end, loss or eval_loss, and by how much?",
    HEALTHY: "Which of its lines shows that something is wrong? If none does, say so.",
}


@exercise(8, 1, "the sign in each of the unnamed trainings", parts_may_be_open=True)
def check_diagnosis(answer: Any) -> Verdict:
    truth = {letter: training.sign or HEALTHY for letter, training in unnamed().items()}
    if not isinstance(answer, dict):
        return wrong(f"Expected a dictionary, letter → sign, found {type(answer).__name__}.")
    if odd := sorted(set(map(str, answer)) - set(truth)):
        return wrong(f"Expected the letters {', '.join(truth)}, found {', '.join(odd)}.")
    given = {letter: answer.get(letter, ...) for letter in truth}
    if all(sign is ... for sign in given.values()):
        return NOT_ATTEMPTED
    for letter, sign in given.items():
        if sign is not ... and sign not in SIGNS:
            return wrong(f"{letter}: expected one of {', '.join(SIGNS)}; found {sign!r}.")
    missed = [letter for letter in truth if given[letter] != truth[letter]]
    if not missed:
        healthy = sum(sign == HEALTHY for sign in truth.values())
        return right(f"All {len(truth)}, and {healthy} of them look healthy. Are they? Read on.")
    named = [letter for letter in missed if given[letter] is not ...]
    count = f"{len(truth) - len(missed)} of {len(truth)} are right."
    if not named:
        return wrong(f"{count} Still open: {', '.join(missed)}.")
    hint = HINTS[truth[named[0]]]
    return wrong(f"{count} Look again at {', '.join(named)}. Of {named[0]}: {hint}")


@exercise(8, 2, "the rate of each step, with warm-up and then a cosine")
def check_learning_rate(function: Any) -> Verdict:
    peak, warmup, steps = 0.004, 4, 24
    found = [
        result_of(function, step, steps, warmup, peak, context=f"At step {step}: ")
        for step in range(steps)
    ]
    for step, value in enumerate(found):
        if not isinstance(value, Real):
            return wrong(f"At step {step}: expected a number, found {value!r}.")
    if _near(found, [cosine(step, steps, warmup, peak) for step in range(steps)]):
        bare = call(function, 0, steps, 0, peak)
        if isinstance(bare, Exception) or not _near([bare], [peak]):
            return wrong(f"Without warm-up it should begin at the peak, {peak}; found {bare!r}.")
        return right("The learning_rate of every line of a log, known before the training.")
    mistakes = [_mistakes(step, steps, warmup, peak) for step in range(steps)]
    for cause in mistakes[0]:
        if _near(found, [rates[cause] for rates in mistakes]):
            return wrong(cause)
    step = next(s for s in range(steps) if not _near([found[s]], [cosine(s, steps, warmup, peak)]))
    return wrong(
        f"At step {step} of {steps}, warm-up {warmup}, peak {peak}: expected "
        f"{cosine(step, steps, warmup, peak):.6f}, found {found[step]:.6f}."
    )


def cosine(step: int, steps: int, warmup: int, peak: float) -> float:
    """As in `transformers.get_cosine_schedule_with_warmup`; a test compares the two."""
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (1 + math.cos(math.pi * done)) / 2


def _mistakes(step: int, steps: int, warmup: int, peak: float) -> dict[str, float]:
    """Common mistakes, each with the learning rate that it gives."""
    rises, warm, done = step < warmup, peak * step / warmup, (step - warmup) / (steps - warmup)
    return {
        "That falls in a line; a cosine falls slowly, fast, and slowly again.": (
            warm if rises else peak * (1 - done)
        ),
        "The cosine begins where the warm-up ends: (step − warmup) / (steps − warmup).": (
            warm if rises else cosine(step, steps, 0, peak)
        ),
        "The warm-up is missing: before it ends, the rate rises in a line from 0.": (
            peak if rises else cosine(step, steps, warmup, peak)
        ),
        "Half of 1 + cos: cos alone goes from 1 to −1, and no rate is negative.": (
            warm if rises else peak * math.cos(math.pi * done)
        ),
        "The first step has rate 0: count from 0.": cosine(step + 1, steps, warmup, peak),
    }


def _near(found: list, expected: list) -> bool:
    return all(abs(a - b) < 1e-7 for a, b in zip(found, expected, strict=True))


@exercise(8, 3, "what was trained, found from the figures of its `TrainOutput`")
def check_train_output(rows: Any, rows_per_step: Any, tokens_per_row: Any) -> Verdict:
    given = {"rows": rows, "rows_per_step": rows_per_step, "tokens_per_row": tokens_per_row}
    for name, value in given.items():
        if value is ...:
            return wrong(f"{name} is still open.")
        if not isinstance(value, Real):
            return wrong(f"Expected a number for {name}, found {value!r}.")
    expected = {"rows": 4000, "rows_per_step": 32, "tokens_per_row": 180}
    causes = {
        ("rows", 12000): "rows counts each row once; samples per second count it in each epoch.",
        ("rows", 1333): "It is the other way round: 12,000 rows were read in three epochs.",
        ("rows_per_step", 8): "That is samples per second: a step took four seconds.",
        ("rows_per_step", 11): "Rows were read in three epochs: divide all 12,000 by the steps.",
        ("tokens_per_row", 540): "The tokens are those of three epochs: divide by 12,000 rows.",
        ("tokens_per_row", 1080): "6 · N · D: the 6 is left.",
        ("tokens_per_row", 5760): "That is for each step; a step has 32 rows.",
    }
    for name, value in given.items():
        if abs(value - expected[name]) > 0.5:
            fallback = f"{name}: {value:g} does not agree with the figures."
            return wrong(causes.get((name, round(value)), fallback))
    return right("4,000 rows of 180 tokens, 32 in a step, three times.")
