"""The exercises of lesson 2."""

from __future__ import annotations

from typing import Any

from sftlib.checks.exercise import exercise
from sftlib.checks.verdict import Verdict, likely_cause, result_of, right, wrong


@exercise(2, 1, "`function(question, answer) -> list of problems`")
def check_validator(function: Any) -> Verdict:
    question, answer = "What is the capital of Niger?", "The capital of Niger is Niamey."
    cases = [
        (question, answer, False, "There is nothing wrong with a true, plain pair."),
        (question, "", True, "An empty answer is a problem."),
        (question, " \n ", True, "An answer of spaces and line breaks is empty too: `strip()` it."),
        (question, question, True, "An answer that is the question is a problem."),
        (
            question,
            " what is the CAPITAL of Niger? ",
            True,
            "The question repeated in other case, with spaces around, is still the question: "
            "compare `strip()`ped, `lower()`ed texts.",
        ),
        (
            question,
            f"You ask: {question} It is Niamey.",
            False,
            "An answer may quote the question and go on: ask whether they are equal, not `in`.",
        ),
        (question, answer + "<|im_end|>", True, "A control token in the answer is a problem."),
        ("<|im_start|>" + question, answer, True, "Look for control tokens in the question too."),
        (
            question,
            answer + "<|eot_id|>",
            True,
            "`<|eot_id|>` is a control token too, of another model: look for `<|`, not for names.",
        ),
        ("Is 2 < 3?", "Yes: 2 < 3, and 3 > 2.", False, "`<` alone is no control token; `<|` is."),
    ]
    for *texts, expected, why in cases:
        found = result_of(function, *texts)
        if not isinstance(found, list):
            return wrong(f"Expected a list of problems, found {type(found).__name__}.")
        if bool(found) is not expected:
            return wrong(why + (f" You found: {found}" if found else ""))
    return right("It finds what is broken, and leaves what is well.")


@exercise(2, 2, "`function(text) -> list of (question, answer)`")
def check_parser(function: Any) -> Verdict:
    one = '{"question": "2 + 2?", "answer": "4"}'
    other = '{"instruction": "Say hello.", "response": "Hello."}'
    pair, other_pair = ("2 + 2?", "4"), ("Say hello.", "Hello.")
    cases = [
        (f"[{one}]", [pair], "A list of one pair."),
        (f"```json\n[{one}]\n```", [pair], "A code fence around the list: look for brackets."),
        (f"[{other}]", [other_pair], "The keys may be `instruction` and `response`."),
        (one, [pair], "A single object, not in a list, is a pair too."),
        (f"[{one}, {other}]", [pair, other_pair], "Both kinds of keys may stand in one list."),
        (f"Here you are:\n[{one}]\nEnjoy!", [pair], "Sentences before and after the JSON."),
        ("I would rather not.", [], "No JSON at all: an empty list."),
        ('[{"question": "2 + 2?", "ans', [], "JSON that was cut off: catch ValueError."),
    ]
    for text, expected, why in cases:
        found = result_of(function, text, context=f"{why} ")
        if not isinstance(found, list) or [tuple(p) for p in found] != expected:
            return wrong(f"{why} Expected {expected}, found {found!r}, for {text!r}.")
    return right("It reads what small models really write. (`parse_pairs` also checks the texts.)")


@exercise(2, 3, "which training rows give the test question away")
def check_leaks(rows: Any) -> Verdict:
    if not isinstance(rows, set | list | tuple) or not set(rows) <= {1, 2, 3, 4}:
        return wrong(f"Expected a set of numbers from 1 to 4, such as {{1, 4}}; found {rows!r}.")
    rows = set(rows)
    if rows == {1, 3}:
        return right("A new wording with the same answer, and the question inside a longer text.")
    reasons = {
        2: "Row 2 asks about another country: alike in letters, another fact.",
        4: "Row 4 is about Togo, but gives another fact away. (Splitting by entity prevents that.)",
    }
    for number in sorted(rows & set(reasons)):
        return wrong(reasons[number])
    missing = {1: "the same answer in other words of the question", 3: "the question inside"}
    return wrong(f"There is another one: {missing[min({1, 3} - rows)]}.")


@exercise(2, 4, "what 10,000 usable pairs cost")
def check_cost(cost: Any) -> Verdict:
    if isinstance(cost, bool) or not isinstance(cost, int | float):
        return wrong(f"Expected a number, found {cost!r}.")
    attempts = 10_000 / 0.6
    expected = (0.5 * 400 + 2.0 * 40) * attempts / 1e6
    if abs(cost - expected) <= 0.01 * expected:
        return right(f"About {expected:.2f}: the attempts that fail are paid for too.")
    causes = {
        expected * 0.6: "That pays for 10,000 attempts. Of these only 6,000 would be usable.",
        expected * 0.36: "You multiplied by 0.6; to *get* 10,000 you must divide by it.",
        expected * 1e6: "Prices are per million tokens.",
        2.0 * 40 * attempts / 1e6: "The prompt costs too, and here it costs most.",
        0.5 * 400 * attempts / 1e6: "What the model writes costs too.",
        (0.5 * 40 + 2.0 * 400) * attempts / 1e6: "The two prices are the wrong way round.",
    }
    fallback = "Count the attempts first: how many give 10,000 usable pairs at 60 %?"
    return wrong(likely_cause(cost, causes, tolerance=0.01) or fallback)
