"""The exercises of lesson 7."""

from __future__ import annotations

import contextlib
import functools
import math
import random
import re
from collections.abc import Callable
from statistics import fmean, pstdev, stdev
from typing import Any

from sftlib.checks.exercise import exercise
from sftlib.checks.functions import call, compare, reference
from sftlib.checks.reading import Unread, mapping, same, sequence, text
from sftlib.checks.verdict import NOT_ATTEMPTED, CheckEnds, Verdict, right, still_open, wrong

# --- DPO's loss ----------------------------------------------------------------------------------


def _margin(
    chosen: float, rejected: float, ref_chosen: float, ref_rejected: float, beta: float
) -> float:
    return beta * ((chosen - ref_chosen) - (rejected - ref_rejected))


def _minus_log_sigmoid(margin: float) -> float:
    return max(-margin, 0.0) + math.log1p(math.exp(-abs(margin)))


@reference
def dpo_loss(
    chosen: float, rejected: float, ref_chosen: float, ref_rejected: float, beta: float
) -> float:
    """The loss of one pair, right for any margin; Rafailov et al. 2023, equation 7."""
    return _minus_log_sigmoid(_margin(chosen, rejected, ref_chosen, ref_rejected, beta))


def _draw_logprobs(rng: random.Random, size: int) -> tuple[float, float, float, float, float]:
    """Log-probabilities of short answers (size 1) to very long ones, and a β below 1."""
    c, r, ref_c, ref_r = (-round(rng.uniform(0, 10**size), 3) for _ in range(4))
    return c, r, ref_c, ref_r, round(rng.uniform(0.05, 0.95), 2)


@exercise(7, 1, "DPO's loss of one pair from four log-probabilities")
def check_dpo_loss(function: Any) -> Verdict:
    function = _or_with_tensors(function, LOSSES[0][1])
    compare(function, dpo_loss, LOSSES, None, LOSS_MISTAKES, relative=1e-5, absolute=1e-6)
    compare(
        function,
        dpo_loss,
        HUGE,
        _draw_logprobs,
        sizes=(1, 2, 3, 4),
        relative=1e-3,
        absolute=5e-3,  # four float32 numbers of a size of 10,000
    )
    return right("The loss of RewardTrainer, with implied rewards.")


def _or_with_tensors(function: Any, first: tuple) -> Any:
    """The function itself, or one that gives it tensors if it works with nothing else."""
    if not callable(function) or not isinstance(
        call(function, *first).error, TypeError | AttributeError
    ):
        return function

    @functools.wraps(function)
    def with_tensors(*given: Any) -> Any:
        import torch

        tensors = [torch.tensor(g) if isinstance(g, list | float) else g for g in given]
        before = [
            t.tolist() if isinstance(g, list) else g for g, t in zip(given, tensors, strict=True)
        ]
        found = function(*tensors)
        for g, t, then in zip(given, tensors, before, strict=True):
            if isinstance(g, list) and t.tolist() != then:
                g[:] = t.tolist()  # so that a change in place is seen
        return found

    return with_tensors


LOSSES = [
    (
        "The margin says how much more the model prefers the chosen answer than the reference "
        "does, times β; what is the loss of a margin?",
        (-5.0, -9.0, -6.0, -8.5, 0.5),
    ),
    ("β is not always 0.5.", (-5.0, -9.0, -6.0, -8.5, 0.1)),
    (
        "The margin may be negative, and the loss is greater then: the model prefers the rejected "
        "answer.",
        (-9.0, -5.0, -8.5, -6.0, 0.5),
    ),
    ("A margin of 8 leaves a small loss, but not that one.", (-2.0, -14.0, -6.0, -10.0, 1.0)),
]


EXTREME = (
    "Right, but not for such a margin. In floating point σ is 0 or 1 there, and exp overflows. Use "
    "torch.nn.functional.logsigmoid."
)
HUGE = [(EXTREME, (margin, 0.0, 0.0, 0.0, 1.0)) for margin in (-4999.0, 4999.0, -20000.0, 20000.0)]


def _of_margin(loss: Callable[[float], float]) -> Callable[..., float]:
    """A function of the five numbers that depends on the margin alone."""
    return lambda c, r, ref_c, ref_r, beta: loss(_margin(c, r, ref_c, ref_r, beta))


LOSS_MISTAKES = {
    "That is without the reference: each log-probability counts from the reference's.": (
        lambda c, r, ref_c, ref_r, beta: _minus_log_sigmoid(beta * (c - r))
    ),
    "β is missing: it multiplies the margin.": (
        lambda c, r, ref_c, ref_r, beta: _minus_log_sigmoid(_margin(c, r, ref_c, ref_r, 1))
    ),
    "β multiplies the margin, not 1 − β.": (
        lambda c, r, ref_c, ref_r, beta: _minus_log_sigmoid(_margin(c, r, ref_c, ref_r, 1 - beta))
    ),
    "β multiplies the margin; here it divides it.": (
        lambda c, r, ref_c, ref_r, beta: _minus_log_sigmoid(_margin(c, r, ref_c, ref_r, 1 / beta))
    ),
    "The wrong way round: that makes the rejected answer likelier.": (
        _of_margin(lambda margin: _minus_log_sigmoid(-margin))
    ),
    "That is the margin; the loss is −log σ of it.": _of_margin(lambda margin: margin),
    "That is σ of the margin, the probability of the right order; take −log of it.": (
        _of_margin(lambda margin: math.exp(-_minus_log_sigmoid(margin)))
    ),
    "The sign: a loss is −log σ, and never negative.": (
        _of_margin(lambda margin: -_minus_log_sigmoid(margin))
    ),
}


# --- Advantages of a group -----------------------------------------------------------------------


@reference
def rloo(rewards: list[float], method: str) -> list[float]:
    """Each reward, less the mean of the others; Ahmadian et al. 2024, section 3."""
    return [reward - (sum(rewards) - reward) / (len(rewards) - 1) for reward in rewards]


def _grpo(deviation: Callable[[list[float]], float], epsilon: float = 1e-4) -> Callable:
    @reference
    def grpo(rewards: list[float], method: str) -> list[float]:
        """Each reward, less the mean, divided by the deviation; Shao et al. 2024, section 4.1."""
        mean, spread = fmean(rewards), deviation(rewards) + epsilon
        return [(reward - mean) / spread for reward in rewards]

    return grpo


def _centred(rewards: list[float], method: str) -> list[float]:
    return [reward - fmean(rewards) for reward in rewards]


def _draw_rewards(method: str, rng: random.Random, size: int) -> tuple[list[float], str]:
    """Rewards of a group of two or more answers, not all equal."""
    rewards = [rng.choice([-1.0, 0.0, 0.5, 1.0, 2.0]) for _ in range(size + 1)]
    rewards[rng.randrange(size + 1)] += 0.5 if len(set(rewards)) == 1 else 0.0
    return rewards, method


@exercise(7, 2, "what RLOO and GRPO make of one group's rewards")
def check_advantages(function: Any) -> Verdict:
    still = [method for method in ADVANTAGE_MISTAKES if _is_open(function, method)]
    if len(still) == 1:
        raise CheckEnds(still_open(still))
    function = _or_with_tensors(function, ([1.0, 0.0], "RLOO"))
    _compare_advantages(function, "RLOO", rloo)
    grpo = _grpo(pstdev if _divides_by_n(function) else stdev)
    _compare_advantages(function, "GRPO", grpo)
    return right("A group of equal rewards teaches nothing: that is why batches must be large.")


def _is_open(function: Any, method: str) -> bool:
    """Whether a method is not written yet."""
    try:
        call(function, FOUR, method)
    except CheckEnds as end:
        return end.verdict is NOT_ATTEMPTED
    return False


def _divides_by_n(function: Any) -> bool:
    """Whether GRPO's deviation is the one divided by n, which is as good as that by n − 1."""
    given = (FOUR, "GRPO")
    with contextlib.suppress(Unread):
        return same(call(function, *given).value, _grpo(pstdev)(*given), *CLOSE)
    return False


def _compare_advantages(function: Any, method: str, right_one: Callable) -> None:
    equal = f"{method}: equal rewards teach nothing, so expect zeros."
    if method == "GRPO":
        equal += (
            " Their standard deviation is 0, and nothing can be divided by 0: add a small number "
            "to it."
        )
    edges = [
        (f"{method}: four rewards.", (FOUR, method)),
        (f"{method}: a group need not have four answers.", ([1.0, 0.0], method)),
        *((equal, (rewards, method)) for rewards in EQUAL),
    ]
    draw, mistakes = functools.partial(_draw_rewards, method), ADVANTAGE_MISTAKES[method]
    compare(function, right_one, edges, draw, mistakes, relative=CLOSE[0], absolute=CLOSE[1])
    small = f"{method}: the rewards may lie close together; they count as much."
    near = [(small, ([0.1, 0.0, 0.0, 0.05], method))]
    compare(function, right_one, near, relative=0.02, absolute=0.002)


FOUR = [1.0, 0.0, 0.0, 0.5]
EQUAL = [[1.0] * 4, [0.0] * 2, [0.5] * 3, [0.0] * 8]
CLOSE = (5e-3, 5e-3)  # tolerances, for another small number
ADVANTAGE_MISTAKES: dict[str, dict[str, Callable]] = {
    "RLOO": {
        "RLOO: the mean is over the *other* answers, without the answer itself.": _centred,
        "RLOO: that is GRPO's advantage.": _grpo(stdev),
        "RLOO: divide by n − 1, the number of the others, which is not always 3.": (
            lambda rewards, method: [r - (sum(rewards) - r) / 3 for r in rewards]
        ),
    },
    "GRPO": {
        "GRPO: divide by the group's standard deviation, too.": _centred,
        "GRPO: that is RLOO's advantage.": rloo,
        "GRPO: divide by the standard deviation, not by its square, the variance.": (
            _grpo(lambda rewards: stdev(rewards) ** 2)
        ),
    },
}


# --- Which method? -------------------------------------------------------------------------------

METHODS = ("SFT on the best samples", "DPO", "GRPO", "best of n")
CASES = {
    "frozen": ("best of n", "may the weights change, and what is at hand when it answers?"),
    "pairs": ("DPO", "what is there to learn from, and could anything judge a new answer?"),
    "today": (
        "SFT on the best samples",
        "which trainer does lesson 6 have, and where could its rows come from by this evening?",
    ),
    "further": ("GRPO", "imitation is used up, and what else can be done with a grader?"),
}


@exercise(7, 3, "which method for which task")
def check_methods(choice: Any) -> Verdict:
    def plain(name: str) -> str:
        return re.sub(r"[\W_]+", " ", name.lower()).strip()  # also without hyphens of any kind

    given = {task: text(name, task) for task, name in mapping(choice, CASES).items()}
    for task, name in given.items():
        if plain(name) not in map(plain, METHODS):
            return wrong(f"{task}: expected one of {', '.join(METHODS)}, found {name!r}.")
    missed = [task for task, (method, _) in CASES.items() if plain(given[task]) != plain(method)]
    if missed:
        count = f"{len(CASES) - len(missed)} of {len(CASES)} are right."
        return wrong(
            f"{count} Look again at {', '.join(missed)}. {missed[0]}: {CASES[missed[0]][1]}"
        )
    return right("The data that you have decides before taste does.")


# --- A model that knows what it knows ------------------------------------------------------------

LEAST_SCORE = 0.6


@exercise(7, 4, "answers to the test questions by a model that refuses what it does not know")
def check_beats_refusing(answers: Any) -> Verdict:
    from sftlib.experiments.preferences import questions, score

    rows = questions()["test"]
    given = sequence(answers, what="a list with a text for each test question")
    if len(given) != len(rows):
        return wrong(f"Expected {len(rows)} answers, one per test question, found {len(given)}.")
    found = score([text(one, f"answer {i}") for i, one in enumerate(given, 1)], rows)
    said = "score {score:.2f} (known {known:.2f}, unknown {unknown:.2f})".format(**found)
    if found["score"] >= LEAST_SCORE:
        return right(f"{said}. A model that always refuses scores 0.50.")
    return wrong(f"{said}; at least {LEAST_SCORE:.2f} is wanted. {_why_low(found)}")


def _why_low(found: dict[str, float]) -> str:
    """A hint by the two parts of a score."""
    if found["refused"] > 0.9:
        return "It refuses nearly everything: known questions want their answer."
    if found["unknown"] < 0.1:
        return "It hardly refuses: what it could not answer in six tries wants a refusal."
    if found["known"] + found["refused"] < 0.3:
        return "Few known questions are answered rightly: is the learning rate too high?"
    return "Which demonstrations can be made from what the model could answer itself?"
