"""Answers to the exercises of lesson 8."""

import math
from decimal import Decimal
from fractions import Fraction
from functools import partial

from sftlib import checks
from sftlib.checks import metrics
from sftlib.experiments.diagnosis import HEALTHY, diagnose

import numpy as np
import pandas as pd
import torch

from tests.attacks import Attacks

# --- Exercise 1 ----------------------------------------------------------------------------------

SIGNS = dict.fromkeys("ABHJKL", "nothing unusual") | {
    **{"C": "not a number", "D": "starts near chance", "E": "spike"},
    **{"F": "unstable", "G": "no gradient", "I": "overfitting", "M": "out of scale"},
    **{"N": "barely learning", "O": "unstable", "P": "overfitting"},
    **{"Q": "plateau", "R": "plateau"},
}
FALLING = [{"step": step, "loss": 2.6 * 0.93**step} for step in range(1, 21)]

DIAGNOSIS = Attacks(
    checks.check_diagnosis,
    right=[
        SIGNS,
        {letter: sign.capitalize() for letter, sign in SIGNS.items()},
        pd.Series(SIGNS),
        {letter: np.str_(sign) for letter, sign in SIGNS.items()},
        SIGNS | {"B": HEALTHY, "H": " nothing  unusual "},
        dict(sorted(SIGNS.items())),
        {letter: sign.replace(" ", "-") for letter, sign in SIGNS.items()},
        {letter: f"{sign.replace(' ', '_')}." for letter, sign in SIGNS.items()},
    ],
    wrong=[
        (SIGNS | {"B": diagnose(FALLING).index[0]}, "B: that is what `diagnose` found"),
        (dict.fromkeys(SIGNS, diagnose(FALLING).index.tolist()[0]), "`diagnose` found"),
        (diagnose, "letter → sign, found diagnose itself"),
        (SIGNS | {"A": diagnose}, "A: expected a text, found diagnose itself"),
        (SIGNS | {"A": diagnose(FALLING)}, "A: expected a text, found DataFrame"),
        (SIGNS | {"A": ["unstable"]}, "A: expected a text, found list ['unstable']"),
        (SIGNS | {"A": 3}, "A: expected a text, found 3"),
        (["A"], "found list"),
        (SIGNS | {"Z": "spike"}, "found Z"),
        (SIGNS | {"C": "diverged"}, "C: expected one of not a number"),
        (SIGNS | {"H": "plateau"}, "17 of 18 are right. Look again at H."),
        (SIGNS | {"J": "plateau"}, "If none does"),
        (SIGNS | {"M": "spike", "P": ...}, "with the evaluation loss"),
        (dict.fromkeys(SIGNS, "nothing unusual"), "6 of 18 are right"),
        ({"A": "spike"}, "0 of 18 are right. Look again at A."),
    ],
    untouched=[..., None, dict.fromkeys(SIGNS, ...), {}],
)

# --- Exercise 2 ----------------------------------------------------------------------------------


def rate(step, steps, warmup, peak):
    if step < warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def in_torch(step, steps, warmup, peak):
    if step < warmup:
        return torch.tensor(peak) * step / warmup
    done = torch.tensor((step - warmup) / max(1, steps - warmup))
    return peak * (1 + torch.cos(torch.pi * done)) / 2


def late(change):
    """A schedule that has the right warm-up, and then another shape."""
    return lambda s, n, w, p: p * s / w if s < w else change(s, n, w, p)


def linear(step, steps, warmup, peak):
    return peak * (steps - step) / (steps - warmup)


def without_warmup(change):
    return lambda s, n, w, p: change(s, n, w, p) if w == 0 else rate(s, n, w, p)


def no_return_in_warmup(step, steps, warmup, peak):
    if step >= warmup:
        return rate(step, steps, warmup, peak)


RATE = Attacks(
    checks.check_learning_rate,
    right=[
        rate,
        in_torch,
        lambda s, n, w, p: np.float64(rate(s, n, w, p)),
        lambda s, n, w, p: Decimal(rate(s, n, w, p)),
        lambda s, n, w, p: Fraction(rate(s, n, w, p)),
        partial(rate),
        lambda s, n, w, p: (
            s / w * p if s < w else p * math.cos(math.pi / 2 * (s - w) / max(1, n - w)) ** 2
        ),
    ],
    wrong=[
        (lambda s, n, w, p: 0 if s >= n - 1 > w else rate(s, n, w, p), "before the end the rate"),
        (
            without_warmup(lambda s, n, w, p: 0 if s == n - 1 else rate(s, n, w, p)),
            "for any number of steps",
        ),
        (without_warmup(lambda s, n, w, p: p), "falls as a cosine, too"),
        (without_warmup(linear), "falls as a cosine, too"),
        (without_warmup(lambda s, n, w, p: rate(s, n, w, p) * s / s), "Without warm-up it should"),
        (without_warmup(lambda s, n, w, p: p * s / w), "raised ZeroDivisionError"),
        (late(linear), "in a line"),
        (late(lambda s, n, w, p: p), "Your rate stays at the peak"),
        (late(lambda s, n, w, p: rate(s, n, 0, p)), "warm-up ends"),
        (lambda s, n, w, p: rate(s, n, 0, p), "The warm-up is missing"),
        (lambda s, n, w, p: rate(max(s, w), n, w, p), "is missing"),
        (late(lambda s, n, w, p: 2 * rate(s, n, w, p) - p), "Half of 1 + cos: cos alone"),
        (late(lambda s, n, w, p: 2 * rate(s, n, w, p)), "twice the peak"),
        (lambda s, n, w, p: rate(s + 1, n, w, p), "count from 0"),
        (lambda s, n, w, p: p, "expected 0.0, found 0.004"),
        (lambda s, n, w, p: rate(s, 24, w, p), "for any number of steps"),
        (lambda s, n, w, p: rate(s, n, w, 0.004), "not in general"),
        (lambda s, n, w, p: rate(s, n, w, p) / p, "rises in a line"),
        (lambda s: 1, "found one of (s)"),
        (lambda s, n, w, p: "1", "expected a number, found the text '1'"),
        (lambda s, n, w, p: [rate(s, n, w, p)], "a number, found list"),
        (lambda s, n, w, p: math.nan, "found NaN"),
        (no_return_in_warmup, "Did a branch end without `return`?"),
        (lambda s, n, w, p: print(rate(s, n, w, p)), "in place of `print`"),
        (metrics.cosine, "calls cosine of sftlib.checks"),
        (0.004, "function of (step, steps, warmup, peak), found 0.004"),
    ],
    untouched=[..., None, lambda step, steps, warmup, peak: ...],
)

# --- Exercise 3 ----------------------------------------------------------------------------------

NAN = float("nan")

OUTPUT = Attacks(
    checks.check_train_output,
    right=[
        (4000, 32, 180.0),
        (8.0 * 1500 / 3, 12000 / 375, 180),
        tuple(torch.tensor([4000.0, 32.0, 180.0])),
        np.array([4000, 32, 180]),
        (Fraction(4000), Decimal(32), np.int8(90) * 2.0),
        (np.array(4000), torch.tensor(32), 180),
    ],
    wrong=[
        ((NAN, NAN, NAN), "rows: expected a number, found NaN"),
        ((4000, 32, float("inf")), "tokens_per_row: expected a number, found infinity"),
        ((12000, 32, 180), "in each epoch"),
        ((1333.3, 32, 180), "the other way round"),
        ((4000, 8, 180), "samples per second"),
        ((4000, 10.67, 180), "divide all 12,000 by the steps"),
        ((4000, 32, 540), "not 2 · N · D, and D is the tokens of all three epochs"),
        ((4000, 32, 270), "That is with 4 · N · D"),
        ((4000, 32, 60), "not 36,000"),
        ((4000, 32, 2_160_000), "all tokens of the training"),
        ((4000, 4, 180), "seconds for a step"),
        ((4000, 96, 180), "three epochs included"),
        ((36000, 32, 180), "do not multiply"),
        ((375, 32, 180), "That is the steps"),
        ((1500, 32, 180), "That is the seconds"),
        ((4000.4, 32.4, 180.4), "rows: 4000.4 does not agree"),
        ((4000, 32.5, 180), "rows_per_step: 32.5 does not agree"),
        ((4000, 32, 179.6), "tokens_per_row: 179.6 does not agree"),
        ([(4000, 32, 180)], "Expected 3 answers, rows, rows_per_step and tokens_per_row, found 1"),
        ((4000, 32), "Expected 3 answers, rows, rows_per_step and tokens_per_row, found 2: 4000"),
        ((4000, 32, 1080), "the 6 is left"),
        ((4000, 32, 5760), "for each step"),
        ((4000, 31, 180), "rows_per_step: 31 does not agree"),
        (("4000", 32, 180), "rows: expected a number, found the text '4000'"),
        ((4000, [32], 180), "rows_per_step: expected a number, found list"),
        ((True, 32, 180), "rows: expected a number, found True"),
        ((180, 32, 4000), "rows: 180 does not agree"),
    ],
    untouched=[(..., ..., ...), (4000, ..., 180), (None, None, None)],
    arguments=lambda three: tuple(three),
)

# --- Exercise 4 ----------------------------------------------------------------------------------

REPAIRS = {
    "A": {"learning_rate": 1e-3},
    "B": {"warmup_steps": 2},
    "C": {"max_steps": 20},
    "D": {"max_grad_norm": 1.0},
    "E": {"weight_decay": 0.01},
}

REPAIR = Attacks(
    checks.check_repairs,
    right=[
        REPAIRS,
        pd.Series(REPAIRS),
        REPAIRS | {"A": {"learning_rate": np.float64(1e-3)}, "C": {"max_steps": np.int64(20)}},
        REPAIRS | {"B": {"warmup_steps": torch.tensor(2)}, "D": {"max_grad_norm": Fraction(1)}},
        dict(reversed(REPAIRS.items())),
        {letter: dict(part) for letter, part in REPAIRS.items()},
    ],
    wrong=[
        (REPAIRS | {"A": {"learning_rate": 7.5e-3}}, "which setting decides how large a step is"),
        (REPAIRS | {"B": {"warmup_steps": 100}}, "learning_rate in the last line"),
        ({"A": ..., "B": ..., "C": {"max_steps": 5}, "D": ..., "E": ...}, "How many lines"),
        (REPAIRS | {"E": {"max_grad_norm": 0.1}}, "Something other than the gradient"),
        (REPAIRS | {"A": {"learning_rate": 1e-3, "max_steps": 20}}, "A: expected one setting"),
        (REPAIRS | {"A": {"lr": 1e-3}}, "found 'lr'"),
        (REPAIRS | {"A": 1e-3}, "A: expected {setting: value}, found 0.001"),
        (REPAIRS | {"A": {"learning_rate": NAN}}, "A, learning_rate: expected a number, found NaN"),
        (REPAIRS | {"A": {"learning_rate": -1}}, "A, learning_rate: expected at least 0, found -1"),
        (REPAIRS | {"A": {"learning_rate": "1e-3"}}, "found the text '1e-3'"),
        (REPAIRS | {"A": {"seed": 3}}, "found 'seed'"),
        (REPAIRS | {"A": {"optim": "adam"}}, "SFTConfig refuses optim='adam'"),
        (REPAIRS | {"C": {"max_steps": 1000}}, "at most 40 steps"),
        (REPAIRS | {"C": {"max_steps": 0}}, "C, max_steps: expected more than 0"),
        (REPAIRS | {"C": {"max_steps": 20.5}}, "C, max_steps: expected a whole number"),
        (REPAIRS | {"A": {"num_train_epochs": 50}}, "repair what is broken"),
        (REPAIRS | {"A": {"per_device_train_batch_size": 1}}, "at most 40 steps of 16 rows"),
        (REPAIRS | {"A": {"max_steps": math.inf}}, "found infinity"),
        ([REPAIRS], "a dictionary with the keys A, B, C, D, E"),
        ({"A": {"learning_rate": 1e-3}}, "the keys A, B, C, D, E"),
    ],
    untouched=[
        ...,
        None,
        dict.fromkeys(REPAIRS, ...),
        dict.fromkeys(REPAIRS, {...: ...}),
        dict.fromkeys(REPAIRS, ...) | {"C": {"max_steps": 20}},
    ],
    trains=True,
)

ATTACKS = [DIAGNOSIS, RATE, OUTPUT, REPAIR]
