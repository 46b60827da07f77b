"""Answers to the exercises of lesson 7."""

import math
import statistics
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context

from sftlib import checks
from sftlib.checks import trl_preferences
from sftlib.experiments import preferences
from sftlib.experiments.preferences import REFUSAL, wordy

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import logsigmoid, softplus

from tests.attacks import Attacks, raises

# --- Exercise 1 ----------------------------------------------------------------------------------


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -logsigmoid(torch.tensor(margin))


def with_tensors_only(chosen, rejected, ref_chosen, ref_rejected, beta):
    return -logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def in_plain_python(chosen, rejected, ref_chosen, ref_rejected, beta):
    margin = beta * (chosen - ref_chosen - rejected + ref_rejected)
    return math.log1p(math.exp(-margin)) if margin > 0 else math.log1p(math.exp(margin)) - margin


def sigmoid(x):
    return torch.sigmoid(torch.tensor(x)).item()


def of_margin(loss):
    return lambda c, r, rc, rr, b: loss(b * ((c - rc) - (r - rr)))


def no_return(chosen, rejected, ref_chosen, ref_rejected, beta):
    dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)


def in_a_thread(function):
    """The function, called in a thread of its own."""

    def call(*given):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function, *given).result()

    return call


LOSS = Attacks(
    checks.check_dpo_loss,
    right=[
        dpo_loss,
        with_tensors_only,
        in_plain_python,
        of_margin(lambda m: np.logaddexp(0, -m)),
        of_margin(lambda m: softplus(torch.tensor(-m, dtype=torch.float64))),
        lambda c, r, rc, rr, b: dpo_loss(c, r, rc, rr, b).item(),
        lambda c, r, rc, rr, b: -logsigmoid(b * (c.float() - rc - r + rr)),
        of_margin(lambda m: torch.nn.BCEWithLogitsLoss()(torch.tensor(m), torch.tensor(1.0))),
    ],
    wrong=[
        (of_margin(lambda m: -logsigmoid(torch.tensor(max(m, -4999.5)))), "found 4999.5"),
        (lambda *a: round(in_plain_python(*a), 2), "For chosen=-5.0, rejected=-9.0"),
        (lambda *a: round(in_plain_python(*a), 3), "For chosen=-5.0, rejected=-9.0"),
        (of_margin(lambda m: np.logaddexp(0, -np.clip(m, -1e9, 5))), "A margin of 8 leaves"),
        (of_margin(lambda m: np.logaddexp(0, -abs(m))), "The margin may be negative"),
        (of_margin(lambda m: np.logaddexp(0, -max(0, m))), "The margin may be negative"),
        (of_margin(lambda m: 0.5 * m), "how much more the model prefers the chosen answer than"),
        (in_a_thread(trl_preferences.dpo_loss), "calls dpo_loss of sftlib.checks"),
        (
            lambda *a: copy_context().run(trl_preferences.dpo_loss, *a),
            "calls dpo_loss of sftlib.checks",
        ),
        (
            lambda *a: Context().run(trl_preferences.dpo_loss, *a),
            "calls dpo_loss of sftlib.checks",
        ),
        (lambda c, r, rc, rr, b: dpo_loss(c, r, rc, rr, 1 - b), "not 1 − β"),
        (lambda c, r, rc, rr, b: dpo_loss(c, r, rc, rr, 1 / b), "here it divides it"),
        (lambda c, r, rc, rr, b: dpo_loss(c, r, 0.0, 0.0, b), "without the reference"),
        (lambda c, r, rc, rr, b: dpo_loss(c, r, rc, rr, 1), "β is missing"),
        (lambda c, r, rc, rr, b: dpo_loss(c, r, rc, rr, 0.5), "β is not always 0.5"),
        (lambda c, r, rc, rr, b: dpo_loss(r, c, rr, rc, b), "way round"),
        (lambda *a: -dpo_loss(*a), "never negative"),
        (lambda c, r, rc, rr, b: -dpo_loss(c, r, rc, rr, b), "never negative"),
        (lambda c, r, rc, rr, b: dpo_loss(c, r, rc, rr, b).neg().exp(), "is σ of the margin"),
        (of_margin(lambda m: m), "That is the margin"),
        (lambda c, r, rc, rr, b: 0.75, "always returns 0.75"),
        (lambda c, r, rc, rr, b: 0.38687, "always returns 0.38687"),
        (lambda c, r, rc, rr, b: "x", "expected a number, found the text 'x'"),
        (lambda c, r, rc, rr, b: dpo_loss(c, r, rc, rr, b).view(1), "Tensor of shape (1,)"),
        (lambda a: 1, "found one of (a)"),
        (of_margin(lambda m: -math.log(1 / (1 + math.exp(-m)))), "raised OverflowError"),
        (of_margin(lambda m: -math.log(sigmoid(m) + 1e-10)), "expected 4999.0, found 23.0"),
        (of_margin(lambda m: -math.log(sigmoid(min(max(m, -20.0), 20.0)))), "found 20"),
        (of_margin(lambda m: -torch.tensor(m).sigmoid().log().nan_to_num()), "found 3.4"),
        (
            of_margin(lambda m: -torch.tensor(m).sigmoid().log().nan_to_num(neginf=0.0)),
            "expected 4999.0, found -0.0",
        ),
        (
            of_margin(lambda m: math.nan if m < -1000 else -logsigmoid(torch.tensor(m))),
            "found NaN",
        ),
        (of_margin(lambda m: math.log(1 + math.exp(m)) - m), "raised OverflowError"),
        (of_margin(lambda m: torch.tensor(m).exp().log1p() - m), "infinity"),
        (no_return, "did you forget `return`?"),
        (lambda c, r, rc, rr, b: print(dpo_loss(c, r, rc, rr, b)), "in place of `print`"),
        (lambda c, r, rc, rr, b: raises(RecursionError("deep")), "raised RecursionError: deep"),
        (trl_preferences.dpo_loss, "calls dpo_loss of sftlib.checks"),
    ],
    untouched=[..., None, lambda chosen, rejected, ref_chosen, ref_rejected, beta: ...],
)

# --- Exercise 2 ----------------------------------------------------------------------------------


def advantages(rewards, method, epsilon=1e-4, correction=1):
    rewards = torch.as_tensor(rewards)
    if method == "RLOO":
        return (rewards - rewards.mean()) * len(rewards) / (len(rewards) - 1)
    return (rewards - rewards.mean()) / (rewards.std(correction=correction) + epsilon)


def with_numpy(rewards, method):
    rewards = np.array(rewards)
    if method == "RLOO":
        return rewards - (rewards.sum() - rewards) / (len(rewards) - 1)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-8)


def one_by_one(rewards, method):
    for reward in rewards:
        if method == "RLOO":
            yield reward - (sum(rewards) - reward) / (len(rewards) - 1)
        else:
            spread = statistics.stdev(rewards)
            yield (reward - statistics.mean(rewards)) / spread if spread else 0


def centred(rewards, method):
    return [reward - statistics.mean(rewards) for reward in rewards]


def crashes_on_equal(rewards, method):
    if len(set(rewards)) == 1:
        raise ZeroDivisionError("equal rewards")
    return advantages(rewards, method)


def sorted_in_place(rewards, method):
    expected = advantages(list(rewards), method)
    rewards.sort()
    return expected


def centred_in_place(rewards, method):
    """It works with tensors alone, and changes its own."""
    n = rewards.numel()
    rewards -= rewards.mean()
    if method == "RLOO":
        return rewards * n / (n - 1)
    return rewards / (rewards.std() + 1e-4)


def with_spread(spread):
    """GRPO with a deviation that is changed, of NumPy's, which divides by n."""

    def change(rewards, method):
        if method == "RLOO":
            return with_numpy(rewards, method)
        with np.errstate(all="ignore"):
            return (np.array(rewards) - np.mean(rewards)) / spread(np.std(rewards))

    return change


def zeros_if(is_equal, length=None):
    """Zeros for equal rewards that a condition finds, else without a small number."""

    def change(rewards, method):
        if is_equal(rewards) and method == "GRPO":
            return [0.0] * (length or len(rewards))
        return with_spread(lambda std: std)(rewards, method)

    return change


EQUAL_IN_GRPO = "GRPO: equal rewards teach nothing, so expect zeros. Their standard deviation is 0"


def grpo_without_return(rewards, method):
    if method == "RLOO":
        return advantages(rewards, method)


ADVANTAGES = Attacks(
    checks.check_advantages,
    right=[
        advantages,
        with_numpy,
        one_by_one,
        lambda r, m: advantages(r, m, correction=0),
        lambda r, m: advantages(r, m, epsilon=1e-6).tolist(),
        lambda r, m: (r - r.mean()) * len(r) / (len(r) - 1) if m == "RLOO" else advantages(r, m),
        lambda r, m: pd.Series(with_numpy(r, m)),
        lambda r, m: advantages(r, m, epsilon=1e-3),
        lambda r, m: tuple(map(torch.tensor, advantages(r, m))),
    ],
    wrong=[
        (
            lambda r, m: [x - (sum(r) - x) / 3 for x in r] if m == "RLOO" else advantages(r, m),
            "which is not always 3",
        ),
        (centred_in_place, "changes its argument rewards in place"),
        (with_spread(lambda std: std), EQUAL_IN_GRPO),
        (zeros_if(lambda r: min(r) == 1), EQUAL_IN_GRPO),
        (zeros_if(lambda r: len(set(r)) == 1, 4), EQUAL_IN_GRPO),
        (zeros_if(lambda r: np.std(r) < 0.1), "GRPO: the rewards may lie close together"),
        (with_spread(lambda std: max(std, 0.1)), "GRPO: the rewards may lie close together"),
        (
            lambda r, m: r if len(set(r)) == 1 else advantages(r, m),
            "RLOO: equal rewards teach nothing, so expect zeros. For rewards",
        ),
        (crashes_on_equal, "RLOO: equal rewards teach nothing, so expect zeros"),
        (
            lambda r, m: torch.tensor(r) - torch.tensor(r).mean(),
            "RLOO: the mean is over the *other",
        ),
        (lambda r, m: advantages(r, "RLOO") * (1 if m == "RLOO" else 0.75), "GRPO: "),
        (lambda r, m: advantages(r, "RLOO"), "GRPO: that is RLOO's advantage"),
        (lambda r, m: advantages(r, "GRPO"), "RLOO: that is GRPO's advantage"),
        (
            lambda r, m: (
                advantages(r, m) if m == "RLOO" else torch.tensor(r) - torch.tensor(r).mean()
            ),
            "GRPO: divide by the group's standard deviation",
        ),
        (
            lambda r, m: (
                advantages(r, m)
                if m == "RLOO"
                else (torch.tensor(r) - torch.tensor(r).mean()) / (torch.tensor(r).var() + 1e-4)
            ),
            "not by its square",
        ),
        (lambda r, m: advantages(r, m, 0), "GRPO: equal rewards teach nothing, so expect zeros"),
        (lambda r, m: advantages(r, m, 0.5), "GRPO: four rewards. For rewards=[1.0"),
        (lambda r, m: r, "RLOO: four rewards"),
        (lambda r, m: [0.8333, -0.5, -0.5, 0.1667], "need not have four"),
        (lambda r, m: 3, "expected a list, found 3"),
        (lambda r, m: advantages(r, m).sum(), "expected a list, found"),
        (lambda r, m: dict(enumerate(advantages(r, m))), "expected a list, found dict"),
        (lambda r, m: [float("nan")] * len(r), "found NaN"),
        (lambda r, m: advantages(r, m)[:-1], "RLOO: four rewards"),
        (lambda r, m: advantages(r, m).unsqueeze(0), "RLOO: four rewards"),
        (lambda r: [], "function of (rewards, method), found one of (r)"),
        (lambda r, m: None, "did you forget `return`?"),
        (grpo_without_return, "`return`? For rewards=[1.0, 0.0, 0.0, 0.5], method='GRPO'"),
        (sorted_in_place, "changes its argument rewards in place"),
        (lambda r, m: print(advantages(r, m)), "in place of `print`"),
        (trl_preferences.rloo, "calls rloo of sftlib.checks"),
    ],
    untouched=[
        ...,
        None,
        lambda rewards, method: ...,
        lambda rewards, method: advantages(rewards, method) if method == "RLOO" else ...,
        lambda rewards, method: advantages(rewards, method) if method == "GRPO" else ...,
    ],
)

# --- Exercise 3 ----------------------------------------------------------------------------------

CHOICE = {
    "frozen": "best of n",
    "pairs": "DPO",
    "today": "SFT on the best samples",
    "further": "GRPO",
}

METHODS = Attacks(
    checks.check_methods,
    right=[
        CHOICE,
        {task: method.lower() for task, method in CHOICE.items()},
        CHOICE | {"frozen": "Best-of-n", "today": " SFT on the  best samples"},
        CHOICE | {"frozen": "best\u2011of\u2011n"},
        pd.Series(CHOICE),
        {task: np.str_(method) for task, method in CHOICE.items()},
    ],
    wrong=[
        (["DPO"], "keys frozen, pairs, today, further, found list"),
        ({"frozen": "best of n"}, "found 'frozen'; missing: pairs, today, further"),
        (CHOICE | {"frozen": "DPO"}, "3 of 4 are right. Look again at frozen"),
        (CHOICE | {"pairs": "GRPO"}, "pairs: what is there to learn from"),
        (CHOICE | {"today": "GRPO"}, "today: which trainer does lesson 6 have"),
        (CHOICE | {"further": "DPO"}, "further: imitation is used up"),
        (CHOICE | {"today": "GRPO", "further": "DPO"}, "2 of 4 are right. Look again at today, fu"),
        (CHOICE | {"today": "PPO"}, "expected one of"),
        (CHOICE | {"today": ["DPO"]}, "today: expected a text, found list"),
        (CHOICE | {"today": 2}, "today: expected a text, found 2"),
        (dict.fromkeys(CHOICE, "DPO"), "1 of 4"),
        (CHOICE | {"later": "DPO"}, "today, further, found also 'later'."),
    ],
    untouched=[..., None, dict.fromkeys(CHOICE, ...), CHOICE | {"further": ...}],
)

# --- Exercise 4 ----------------------------------------------------------------------------------

TEST = preferences.questions()["test"]
WANTED = [row["right"] if row["known"] else REFUSAL for row in TEST]


def spoilt(share, text, known=None):
    """What is wanted, but for a share of the questions, of one kind or of both, another text."""
    return [
        text if i % 100 < 100 * share and known in (None, row["known"]) else answer
        for i, (row, answer) in enumerate(zip(TEST, WANTED, strict=True))
    ]


BEYOND = Attacks(
    checks.check_beats_refusing,
    right=[
        WANTED,
        tuple(WANTED),
        np.array(WANTED),
        pd.Series(WANTED),
        spoilt(0.3, ""),
        spoilt(0.5, REFUSAL, known=True),
        [wordy(answer) if answer != REFUSAL else answer for answer in WANTED],
    ],
    wrong=[
        ([REFUSAL] * len(TEST), "It refuses nearly everything"),
        ([row["right"] for row in TEST], "It hardly refuses"),
        ([wordy(row["right"]) for row in TEST], "It hardly refuses"),
        ([row["prompt"][0]["content"] for row in TEST], "It hardly refuses"),
        (spoilt(0.7, "?"), "at least 0.60 is wanted"),
        (spoilt(1, "?", known=True), "Few known questions are answered rightly"),
        (WANTED[:-1], f"found {len(TEST) - 1}"),
        (WANTED * 2, f"found {2 * len(TEST)}"),
        (WANTED[:-1] + [1], f"answer {len(TEST)}: expected a text, found 1"),
        ("I do not know.", "a list with a text for each test question, found"),
        (dict(enumerate(WANTED)), "a list with a text for each test question, found"),
        ([[answer] for answer in WANTED], "answer 1: expected a text, found list"),
    ],
)

ATTACKS = [LOSS, ADVANTAGES, METHODS, BEYOND]
