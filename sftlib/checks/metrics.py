"""The exercises of lesson 8."""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

from sftlib.checks.exercise import exercise
from sftlib.checks.functions import compare, reference
from sftlib.checks.reading import Unread, described, mapping, number, open_parts, shown, text, whole
from sftlib.checks.verdict import NOT_ATTEMPTED, CheckEnds, Verdict, right, wrong
from sftlib.experiments.diagnosis import HEALTHY, SIGNS, Sign
from sftlib.experiments.failures import BATCH, SICK_SETTINGS, Training, train_with, unnamed

# --- Name the sign -------------------------------------------------------------------------------

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
    if hasattr(answer, "to_dict"):
        answer = answer.to_dict()  # a Series
    if not isinstance(answer, Mapping):
        raise Unread(f"expected a dictionary, letter → sign, found {described(answer)}.")
    if odd := sorted(set(map(str, answer)) - set(truth)):
        return wrong(f"Expected the letters {', '.join(truth)}, found {', '.join(odd)}.")
    given = {}
    for letter in truth:
        sign = answer.get(letter)
        if isinstance(sign, Sign):
            return wrong(
                f"{letter}: that is what `diagnose` found. Read the curves, and write what you "
                "see; compare later."
            )
        if sign is not None and sign is not ...:
            given[letter] = re.sub(r"[\W_]+", " ", text(sign, letter).lower()).strip()
            if given[letter] not in SIGNS:
                return wrong(f"{letter}: expected one of {', '.join(SIGNS)}; found {sign!r}.")
    if not given:
        return NOT_ATTEMPTED
    return _compared(given, truth)


def _compared(given: dict[str, str], truth: dict[str, str]) -> Verdict:
    """How many of the named signs are right, and where to look again."""
    missed = [letter for letter in truth if given.get(letter) != truth[letter]]
    if not missed:
        healthy = sum(sign == HEALTHY for sign in truth.values())
        return right(f"All {len(truth)}, and {healthy} of them look healthy. Are they? Read on.")
    named = [letter for letter in missed if letter in given]
    count = f"{len(truth) - len(missed)} of {len(truth)} are right."
    if not named:
        return Verdict(None, f"{count} Still open: {', '.join(missed)}.")
    hint = HINTS[truth[named[0]]]
    return wrong(f"{count} Look again at {', '.join(named)}. Of {named[0]}: {hint}")


# --- The learning rate of any step ---------------------------------------------------------------


@reference
def cosine(step: int, steps: int, warmup: int, peak: float) -> float:
    """As in `transformers.get_cosine_schedule_with_warmup`; a test compares the two."""
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (1 + math.cos(math.pi * done)) / 2


def _draw_step(rng: random.Random, size: int) -> tuple[int, int, int, float]:
    """A step of a short or long training, often without warm-up."""
    steps = rng.randint(size + 1, 20 * size + 1)
    warmup = rng.choice([0, rng.randint(0, size)])
    return rng.randint(0, steps), steps, warmup, rng.choice([1e-5, 2e-4, 0.004, 1.0])


@exercise(8, 2, "the rate of each step, with warm-up and then a cosine")
def check_learning_rate(function: Any) -> Verdict:
    compare(function, cosine, RATE_EDGES, _draw_step, RATE_MISTAKES, relative=1e-4, absolute=1e-8)
    return right("The learning_rate of every line of a log, known before the training.")


RATE_EDGES = [
    ("Steps count from 0, and the first has rate 0.", (0, 24, 4, 0.004)),
    ("In the warm-up the rate rises in a line.", (3, 24, 4, 0.004)),
    ("The warm-up ends at the peak.", (4, 24, 4, 0.004)),
    ("Halfway through what follows the warm-up, the cosine is at half.", (14, 24, 4, 0.004)),
    ("A cosine falls slowly, fast, and slowly again.", (9, 24, 4, 0.004)),
    ("At step `steps` the rate is 0.", (24, 24, 4, 0.004)),
    ("Without warm-up it should begin at the peak.", (0, 24, 0, 0.004)),
    ("Without warm-up it falls as a cosine, too.", (6, 24, 0, 0.004)),
    ("One step before the end the rate is small, but not 0.", (23, 24, 4, 0.004)),
    ("One step before the end it is not 0, for any number of steps.", (11, 12, 0, 0.004)),
]


def _after_warmup(rate: Callable[[float], float]) -> Callable:
    """A right warm-up, and then a share of the peak that depends on what part is done."""
    return lambda step, steps, warmup, peak: (
        peak * step / warmup if step < warmup else peak * rate((step - warmup) / (steps - warmup))
    )


RATE_MISTAKES = {
    "That falls in a line; a cosine falls slowly, fast, and slowly again.": (
        _after_warmup(lambda done: 1 - done)
    ),
    "The cosine begins where the warm-up ends: (step − warmup) / (steps − warmup).": (
        lambda step, steps, warmup, peak: (
            peak * step / warmup if step < warmup else cosine(step, steps, 0, peak)
        )
    ),
    "The warm-up is missing: before it ends, the rate rises in a line from 0.": (
        lambda step, steps, warmup, peak: cosine(max(step, warmup), steps, warmup, peak)
    ),
    "The warm-up is missing: before it ends, the rate rises in a line. Then the cosine begins.": (
        lambda step, steps, warmup, peak: cosine(step, steps, 0, peak)
    ),
    "Half of 1 + cos: cos alone goes from 1 to −1, and no rate is negative.": (
        _after_warmup(lambda done: math.cos(math.pi * done))
    ),
    "Half of 1 + cos: without the half it begins at twice the peak.": (
        _after_warmup(lambda done: 1 + math.cos(math.pi * done))
    ),
    "The first step has rate 0: count from 0.": (
        lambda step, steps, warmup, peak: cosine(step + 1, steps, warmup, peak)
    ),
    "Your rate stays at the peak after the warm-up; it should fall to 0, as half a cosine.": (
        _after_warmup(lambda done: 1)
    ),
}


# --- What was trained? ---------------------------------------------------------------------------


@exercise(8, 3, "what was trained, found from the figures of its `TrainOutput`", answers=3)
def check_train_output(rows: Any, rows_per_step: Any, tokens_per_row: Any) -> Verdict:
    given = {"rows": rows, "rows_per_step": rows_per_step, "tokens_per_row": tokens_per_row}
    found = {name: number(value, name) for name, value in given.items()}
    expected = {"rows": 4000, "rows_per_step": 32, "tokens_per_row": 180}
    causes = {
        ("rows", 12000): "rows counts each row once; samples per second count it in each epoch.",
        ("rows", 1333): "It is the other way round: 12,000 rows were read in three epochs.",
        ("rows", 36000): "12,000 rows were read in three epochs: divide by 3, do not multiply.",
        ("rows", 375): "That is the steps: samples per second times seconds are rows.",
        ("rows", 1500): "That is the seconds: samples per second times seconds are rows.",
        ("rows_per_step", 4): "That is seconds for a step: how many rows are read in them?",
        ("rows_per_step", 96): "12,000 rows were read in all, three epochs included.",
        ("rows_per_step", 8): "That is samples per second: a step took four seconds.",
        ("rows_per_step", 11): "Rows were read in three epochs: divide all 12,000 by the steps.",
        ("tokens_per_row", 540): (
            "Three times too many: total_flos are 6 · N · D, not 2 · N · D, and D is the tokens "
            "of all three epochs."
        ),
        ("tokens_per_row", 270): "That is with 4 · N · D; a full training takes 6 · N · D.",
        ("tokens_per_row", 60): "The 12,000 rows are those of all three epochs: not 36,000.",
        ("tokens_per_row", 2_160_000): "That is all tokens of the training: divide by its rows.",
        ("tokens_per_row", 1080): "6 · N · D: the 6 is left.",
        ("tokens_per_row", 5760): "That is for each step; a step has 32 rows.",
    }
    for name, value in found.items():
        if abs(value - expected[name]) > 0.01:
            fallback = f"{name}: {value:g} does not agree with the figures."
            return wrong(causes.get((name, round(value)), fallback))
    return right("4,000 rows of 180 tokens, 32 in a step, three times.")


# --- Repair five trainings -----------------------------------------------------------------------

GOOD = 0.9  # exact match that a repaired training reaches
MOST_STEPS = 40  # twice as many as a sound training has
ROWS = Training().examples
SIZES = {"max_steps", "num_train_epochs", "per_device_train_batch_size"}
RATES = {"learning_rate", "max_grad_norm", "warmup_steps", "weight_decay"}
SETTINGS = SIZES | RATES | {"lr_scheduler_type", "optim"}


@exercise(8, 4, "one setting for each of five sick trainings", parts_may_be_open=True)
def check_repairs(answer: Any) -> Verdict:
    given = mapping(answer, SICK_SETTINGS)
    attempted = {letter: part for letter, part in given.items() if open_parts(part)[1]}
    repairs = {letter: _repair(part, letter) for letter, part in attempted.items()}
    if not repairs:
        return NOT_ATTEMPTED
    sick = {}
    for letter, (name, value) in repairs.items():
        share = _repaired(letter, name, value)
        if share < GOOD:
            sick[letter] = f"{letter} with {name}={value!r}: {share:.0%} held out"
    if sick:
        letter = next(iter(sick))
        return wrong(f"{'; '.join(sick.values())}. Of {letter}: {SICK_HINTS[letter]}")
    if missing := [letter for letter in given if letter not in repairs]:
        done = ", ".join(repairs)
        return Verdict(None, f"Still open: {', '.join(missing)}. Repaired: {done}.")
    return right(f"All {len(repairs)} answer at least {GOOD:.0%} of the held-out questions.")


SICK_HINTS = {
    "A": "Its loss rises: which setting decides how large a step is?",
    "B": "Compare learning_rate in the last line with that of a sound training.",
    "C": "How many lines has its log?",
    "D": "Look at grad_norm: which setting keeps a gradient from being that long?",
    "E": "Something other than the gradient changes the weights in each step.",
}


def _repair(part: Any, letter: str) -> tuple[str, Any]:
    """The name and the value of the one setting that an answer changes."""
    if not isinstance(part, Mapping):
        raise Unread("expected {setting: value}, found " + described(part) + ".", letter)
    if len(part) > 1:
        raise Unread(
            f"expected one setting, found {len(part)}: {', '.join(map(str, part))}.", letter
        )
    ((name, value),) = part.items()
    if name not in SETTINGS:
        known = ", ".join(sorted(SETTINGS))
        raise Unread(f"expected one of {known}; found {shown(name)}.", letter)
    where = f"{letter}, {name}"
    if name in SIZES:
        read = number if name == "num_train_epochs" else whole
        value = read(value, where)
        if value <= 0:
            raise Unread(f"expected more than 0, found {shown(value)}.", where)
    elif name in RATES:
        value = number(value, where)
        if value < 0:
            raise Unread(f"expected at least 0, found {shown(value)}.", where)
    else:
        value = text(value, where)
    settings: dict[str, Any] = SICK_SETTINGS[letter] | {name: value}
    batch = settings.get("per_device_train_batch_size", BATCH)
    epochs = settings.get("num_train_epochs", 1)
    steps = settings.get("max_steps", math.ceil(math.ceil(ROWS / batch) * epochs))
    if steps > MOST_STEPS or steps * min(batch, ROWS) > MOST_STEPS * BATCH:
        raise Unread(
            f"expected at most {MOST_STEPS} steps of {BATCH} rows, found {steps:g} of {batch}: "
            "repair what is broken.",
            where,
        )
    return name, value


@functools.cache
def _repaired(letter: str, name: str, value: Any) -> float:
    """The held-out score of a sick training with one setting in place of its own."""
    try:
        settings = SICK_SETTINGS[letter] | {name: value, "eval_strategy": "no"}
        return train_with(settings).heldout
    except (ValueError, TypeError) as error:
        raise CheckEnds(wrong(f"{letter}: SFTConfig refuses {name}={value!r}: {error}")) from error
