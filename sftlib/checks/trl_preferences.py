"""The exercises of lesson 7."""

from __future__ import annotations

from typing import Any

from sftlib.checks.exercise import exercise
from sftlib.checks.verdict import Verdict, call, result_of, right, wrong

METHODS = ("SFT on the best samples", "DPO", "GRPO", "best of n")


@exercise(7, 1, "DPO's loss of one pair from four log-probabilities")
def check_dpo_loss(function: Any) -> Verdict:
    found = call(float, result_of(function, -5.0, -9.0, -6.0, -8.5, 0.5))
    if isinstance(found, Exception):
        return wrong(f"Expected one number, found: {found}")
    causes = {
        0.1269: "That is without the reference: each log-probability counts from the reference's.",
        0.2014: "β is missing: it multiplies the margin.",
        1.1369: "The wrong way round: that makes the rejected answer likelier.",
        0.7500: "That is the margin; the loss is −log σ of it.",
        0.6792: "That is σ of the margin, the probability of the right order; take −log of it.",
        -0.3869: "The sign: a loss is −log σ, and never negative.",
    }
    if abs(found - 0.3869) > 1e-3:
        near = [cause for value, cause in causes.items() if abs(found - value) < 1e-3]
        margin = "β · ((−5 − −6) − (−9 − −8.5)) with β = 0.5, a margin of 0.75"
        return wrong((near or [f"Expected −log σ of {margin}: 0.3869; found {found:.4f}."])[0])
    for margin, expected in ((-4999, 4999), (4999, 0)):
        loss = call(lambda chosen=float(margin): float(function(chosen, 0.0, 0.0, 0.0, 1.0)))
        if isinstance(loss, Exception) or not abs(loss - expected) < 1:  # `not`, because of NaN
            shown = f"{type(loss).__name__}: {loss}" if isinstance(loss, Exception) else loss
            return wrong(
                f"Right, but for a margin of {margin} expected {expected}, found {shown}. In "
                "floating point σ is 0 or 1 there, and exp overflows. Use "
                "torch.nn.functional.logsigmoid."
            )
    return right("The loss of RewardTrainer, with implied rewards.")


@exercise(7, 2, "what RLOO and GRPO make of one group's rewards")
def check_advantages(function: Any) -> Verdict:
    rewards = [1.0, 0.0, 0.0, 0.5]
    expected = {"RLOO": [0.8333, -0.5, -0.5, 0.1667], "GRPO": [1.3056, -0.7833, -0.7833, 0.2611]}
    population = [1.5076, -0.9045, -0.9045, 0.3015]  # the standard deviation divided by n
    centred = [0.625, -0.375, -0.375, 0.125]
    for method, right_ones in expected.items():
        returned = result_of(function, list(rewards), method, context=f"{method}: ")
        found = _floats(returned)
        if isinstance(found, Exception):
            return wrong(f"{method}: expected a list of numbers, found {returned!r}.")
        if _near(found, right_ones) or method == "GRPO" and _near(found, population):
            continue
        if _near(found, centred):
            cause = {
                "RLOO": "the mean is over the *other* answers, without the answer itself.",
                "GRPO": "divide by the group's standard deviation, too.",
            }
            return wrong(f"{method}: {cause[method]}")
        shown = [round(value, 3) for value in found]
        return wrong(f"{method}: for {rewards} expected {right_ones}, found {shown}.")
    equal = _floats(call(function, [1.0, 1.0, 1.0, 1.0], "GRPO"))
    if isinstance(equal, Exception) or not _near(equal, [0.0] * 4):
        shown = type(equal).__name__ if isinstance(equal, Exception) else equal
        return wrong(
            f"GRPO, four equal rewards: expected zeros, found {shown}. Their standard deviation is "
            "0, and nothing can be divided by 0: add a small number to it."
        )
    return right("A group of equal rewards teaches nothing: that is why batches must be large.")


def _floats(found: Any) -> list[float] | Exception:
    """The numbers as Python's floats, or the error of a student's function or of this."""
    return found if isinstance(found, Exception) else call(lambda: [float(x) for x in found])


def _near(found: list[float], expected: list[float]) -> bool:
    return len(found) == len(expected) and all(
        abs(a - b) < 0.005 for a, b in zip(found, expected, strict=True)
    )


@exercise(7, 3, "which method for which task")
def check_methods(choice: Any) -> Verdict:
    reasons = {
        "frozen": ("best of n", "only that leaves the weights as they are."),
        "pairs": ("DPO", "there are pairs, and nothing that could grade a new answer."),
        "today": (
            "SFT on the best samples",
            "a quarter of its answers is right: keep these and train on them, with the tools that "
            "are there.",
        ),
        "further": (
            "GRPO",
            "imitating the best gains no more, answers can be graded, and there is the compute to "
            "sample from the model as it changes.",
        ),
    }
    if not isinstance(choice, dict) or set(choice) != set(reasons):
        return wrong(f"Expected a dictionary with the keys {', '.join(reasons)}.")
    for task, (method, reason) in reasons.items():
        if choice[task] is ...:
            return wrong(f"Still open: {task}.")
        if choice[task] not in METHODS:
            return wrong(f"{task}: expected one of {', '.join(METHODS)}, found {choice[task]!r}.")
        if choice[task] != method:
            return wrong(f"{task}: look again. A hint: {reason}")
    return right("The data that you have decides before taste does.")
