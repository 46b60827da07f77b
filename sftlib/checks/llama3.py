"""The exercises of lesson 9."""

from __future__ import annotations

import json
from numbers import Real
from typing import Any

from sftlib.checks.exercise import exercise
from sftlib.checks.verdict import Verdict, call, likely_cause, result_of, right, wrong


@exercise(9, 1, "hours of one GPU, from operations, peak and utilisation")
def check_gpu_hours(function: Any) -> Verdict:
    cases = [
        (8e9, 24e6, 989.0, 0.4, "full"),
        (8e9, 24e6, 989.0, 0.4, "lora"),
        (7e10, 1e8, 312.0, 0.3, "full"),
    ]
    for case in cases:
        found = result_of(function, *case, context=f"For {case}: ")
        expected = gpu_hours(*case)
        if not isinstance(found, Real):
            return wrong(f"For {case}: expected a number of hours, found {found!r}.")
        if abs(found / expected - 1) > 1e-6:
            return wrong(
                _cause_of_hours(found / expected, case[3], case[4]) or _other_hours(case, found)
            )
    return right("An hour or two for 8B: the budget is for the runs that you repeat.")


def gpu_hours(
    parameters: float, tokens: float, peak: float, utilisation: float, method: str
) -> float:
    """6 · N · D operations (2 of them forward; LoRA: 4 · N · D) at a share of the GPU's peak."""
    operations = {"full": 6, "lora": 4}[method] * parameters * tokens
    return operations / (peak * 1e12 * utilisation) / 3600


def _cause_of_hours(ratio: float, utilisation: float, method: str) -> str:
    """Why the hours differ by this ratio from the right ones; empty if it is not known."""
    causes = {
        3600.0: "Those are seconds: an hour has 3,600.",
        1e12: "`peak` is in TFLOP/s: 10¹² operations per second.",
        utilisation: "No GPU reaches its peak: divide by the utilisation, too.",
        utilisation**2: "Divide by the utilisation: a GPU that is used less needs longer.",
        2 / 6 if method == "full" else 2 / 4: "2 · N · D is the forward pass alone.",
        1.5 if method == "lora" else 2 / 3: "6 · N · D for full finetuning, 4 · N · D for LoRA.",
    }
    return likely_cause(ratio, causes, tolerance=1e-6)


def _other_hours(case: tuple, found: float) -> str:
    names = ("parameters", "tokens", "peak", "utilisation", "method")
    given = ", ".join(f"{name} {value}" for name, value in zip(names, case, strict=True))
    return f"With {given}: expected {gpu_hours(*case):.4g} hours, found {found:.4g}."


@exercise(9, 2, "accumulation and steps that keep the batch on other GPUs")
def check_schedule(function: Any) -> Verdict:
    cases = {(1000, 64, 1, 8): (8, 16), (1000, 64, 8, 8): (1, 16), (1024, 128, 4, 2): (16, 8)}
    for case, expected in cases.items():
        found = result_of(function, *case, context=f"For {case}: ")
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            return wrong(f"For {case}: expected (accumulation, steps), found {found!r}.")
        accumulation, steps = found
        conversations, batch, gpus, rows = case
        if accumulation == batch / rows != expected[0]:
            return wrong(f"{gpus} GPUs see {gpus} × {rows} at once: also divide by the GPUs.")
        if steps == conversations // batch != expected[1]:
            return wrong("The last, smaller step also counts: round up.")
        if tuple(found) != expected:
            return wrong(
                f"{conversations} conversations, {batch} in a step, {gpus} GPUs with room for "
                f"{rows}: expected {expected}, found {tuple(found)}."
            )
    for case in ((1000, 64, 3, 8), (1000, 8, 4, 4)):
        found = call(function, *case)
        if not isinstance(found, ValueError):
            return wrong(
                f"{case[2]} GPUs with room for {case[3]} cannot see exactly {case[1]}: expected a "
                f"ValueError, found {found!r}."
            )
    return right("The same steps on any number of GPUs, and the learning rate holds.")


@exercise(9, 3, "whether an answer has the form, and whether it is right")
def check_form_and_content(function: Any) -> Verdict:
    full = {"subject": "Kenya", "relation": "capital", "answer": "Nairobi"}
    cases = [
        (json.dumps(full), (True, True), "the form, and the right value"),
        (json.dumps(full | {"answer": "Mombasa"}), (True, False), "the form, and a wrong value"),
        (
            json.dumps(full | {"subject": "Nairobi", "answer": "Mombasa"}),
            (True, False),
            "the right value in another field",
        ),
        (json.dumps(full | {"answer": "NAIROBI"}), (True, True), "the value in capitals"),
        ("The capital of Kenya is Nairobi.", (False, True), "no form, the right value"),
        ("Sure! " + json.dumps(full), (False, True), "text before the object"),
        (json.dumps(full | {"note": "x"}), (False, True), "a fourth key"),
        (json.dumps(dict(reversed(full.items()))), (False, True), "the keys in another order"),
        (json.dumps([full]), (False, True), "a list with the object in it"),
        (json.dumps(full | {"answer": 7}), (False, False), "a number in place of text"),
        ("42", (False, False), "a number alone"),
    ]
    for text, expected, what in cases:
        found = result_of(function, text, "Nairobi", context=f"{what} ({text}): ")
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            return wrong(f"Expected (form, content), found {found!r}.")
        for name, truth, given in zip(("form", "content"), expected, found, strict=True):
            if bool(given) is not truth:
                return wrong(f"{what} ({text}): expected {name} {truth}, found {given}.")
    return right(f"All {len(cases)} answers, those that were meant to mislead included.")
