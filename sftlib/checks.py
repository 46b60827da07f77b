"""One `check_…` an exercise: ✓ when right, the likely cause when wrong, never just "wrong".

A check shows its verdict as the last value of a cell. An exercise that was not attempted (the
answer is still `...`) says so and is no error, so that a notebook with open exercises runs through.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """What a check found: `passed` is True, False, or None for "not attempted"."""

    passed: bool | None
    message: str

    def __repr__(self) -> str:
        return {True: "✓ ", False: "✗ ", None: "○ "}[self.passed] + self.message

    def __bool__(self) -> bool:
        return bool(self.passed)


NOT_ATTEMPTED = Verdict(None, "Not attempted yet: replace the `...` with your answer.")


def _right(message: str) -> Verdict:
    return Verdict(True, message)


def _wrong(message: str) -> Verdict:
    return Verdict(False, message)


def check_example(messages: Any) -> Verdict:
    """Lesson 1, exercise 1: one SFT example about the capital of Kenya, as `messages`."""
    if messages is ... or messages is None or messages == []:
        return NOT_ATTEMPTED
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return _wrong(
            "Expected a list of dicts, one a message; "
            f"found {type(messages).__name__}. Start with [{{'role': …, 'content': …}}, …]."
        )
    for number, message in enumerate(messages, 1):
        if set(message) != {"role", "content"}:
            return _wrong(
                f"Message {number} has the keys {sorted(map(str, message))}; "
                "it needs exactly 'role' and 'content'."
            )
    roles = [m["role"] for m in messages if m["role"] != "system"]
    if roles != ["user", "assistant"]:
        return _wrong(
            f"Expected a 'user' message and then an 'assistant' message, found {roles}. "
            "The names 'human', 'gpt' or 'instruction' belong to other formats."
        )
    question, answer = (m["content"] for m in messages if m["role"] != "system")
    if "<|" in question + answer:
        return _wrong("No control tokens in the text: the chat template adds them.")
    if "Kenya" not in question:
        return _wrong("The question should ask about Kenya.")
    if "Nairobi" not in answer:
        return _wrong("The answer is wrong: a model learns wrong answers as readily as right ones.")
    if answer != "The capital of Kenya is Nairobi.":
        return _wrong(
            f"True, but not in the style of the data: {answer!r}. The ten examples above answer in "
            "one full sentence that ends with a full stop; mixed styles teach a mixed style."
        )
    return _right("A clean example: two roles, a question, one true answer in the data's style.")


def _call(function: Callable, *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as error:
        return error


def check_exact_match(function: Any) -> Verdict:
    """Lesson 1, exercise 2: `function(text, stopped, reference) -> bool`."""
    if function is ...:
        return NOT_ATTEMPTED
    if not callable(function):
        return _wrong(f"Expected a function, found {type(function).__name__}.")
    reference = "The capital of Kenya is Nairobi."
    first = _call(function, reference, True, reference)
    if first is ... or first is None:
        return NOT_ATTEMPTED
    if isinstance(first, Exception):
        return _wrong(f"Your function raised {type(first).__name__}: {first}")
    cases = [
        (reference, True, True, "An identical answer that stopped must match."),
        (
            reference,
            False,
            False,
            "An answer that did not stop must not match: in use, it would ramble on. Did you "
            "forget `stopped`?",
        ),
        (
            "The capital of Kenya is Mombasa.",
            True,
            False,
            "A wrong city must not match: compare the whole text, not its beginning or length.",
        ),
        (
            reference + " The capital of Kenya is Nairobi.",
            True,
            False,
            "The right sentence followed by more must not match: `in` asks for content, and "
            "exact match asks for equality.",
        ),
        ("the capital of kenya is nairobi.", True, False, "Upper and lower case count."),
    ]
    for text, stopped, expected, why in cases:
        found = _call(function, text, stopped, reference)
        if not isinstance(found, bool):
            return _wrong(f"Expected True or False, found {found!r}.")
        if found is not expected:
            return _wrong(why)
    return _right("Strict where it should be: the same text, and stopped.")


def check_learned_tokens(number: Any, masks: list[int]) -> Verdict:
    """Lesson 1, exercise 3: how many tokens of the example the model learns from."""
    if number is ... or number is None:
        return NOT_ATTEMPTED
    right = sum(masks)
    if isinstance(number, bool) or not isinstance(number, int):
        return _wrong(f"Expected a whole number, found {number!r}.")
    if number == right:
        return _right(f"{right} of {len(masks)} tokens: the answer and the token that ends it.")
    likely = {
        len(masks): "That is every token. The question is only read, not learned from.",
        len(masks) - right: "That counts the tokens that are only read; we want the others.",
        right - 1: "One short: the control token that ends the answer is learned too. Without it "
        "the model never learns to stop.",
        right + 1: "One too many: the line break after <|im_end|> belongs to the template.",
    }
    return _wrong(likely.get(number, "Count the bold, underlined tokens of the picture above."))


def check_knowledge(claim: Any) -> Verdict:
    """Lesson 1, exercise 4: which measurement shows that SFT gave the model no knowledge."""
    if claim is ... or claim is None:
        return NOT_ATTEMPTED
    match = re.fullmatch(r"(\w+)\s*/\s*(\w+)", claim.strip()) if isinstance(claim, str) else None
    if not match:
        return _wrong(f"Expected text such as 'dev / stops' (a set, a measure), found {claim!r}.")
    name, measure = match.groups()
    if (name, measure) in {("unknown", "exact_match"), ("unknown", "content")}:
        return _right(
            "What the model had never read it still does not know after SFT, "
            "although it answers in a perfect sentence."
        )
    if name == "unknown":
        return _wrong(
            f"'{measure}' on the unknown set rises: the model answers and stops. "
            "That is format. Which measure asks whether the answer is true?"
        )
    return _wrong(
        f"The set '{name}' asks about facts that the model had read in pretraining, so a high "
        "score there may be old knowledge, newly accessible. Which set asks about facts it "
        "never read?"
    )


def check_validator(function: Any) -> Verdict:
    """Lesson 2, exercise 1: `function(question, answer) -> list of problems`."""
    if function is ...:
        return NOT_ATTEMPTED
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
        ("Is 2 < 3?", "Yes: 2 < 3, and 3 > 2.", False, "`<` alone is no control token; `<|` is."),
    ]
    for *texts, expected, why in cases:
        found = _call(function, *texts)
        if found is ... or found is None:
            return NOT_ATTEMPTED
        if isinstance(found, Exception):
            return _wrong(f"Your function raised {type(found).__name__}: {found}")
        if not isinstance(found, list):
            return _wrong(f"Expected a list of problems, found {type(found).__name__}.")
        if bool(found) is not expected:
            return _wrong(why + (f" You found: {found}" if found else ""))
    return _right("It finds what is broken, and leaves what is well.")


def check_parser(function: Any) -> Verdict:
    """Lesson 2, exercise 2: `function(text) -> list of (question, answer)`."""
    if function is ...:
        return NOT_ATTEMPTED
    one = '{"question": "2 + 2?", "answer": "4"}'
    other = '{"instruction": "Say hello.", "response": "Hello."}'
    pair, said = ("2 + 2?", "4"), ("Say hello.", "Hello.")
    cases = [
        (f"[{one}]", [pair], "A list of one pair."),
        (f"```json\n[{one}]\n```", [pair], "A code fence around the list: look for brackets."),
        (f"[{other}]", [said], "The keys may be `instruction` and `response`."),
        (one, [pair], "A single object, not in a list, is a pair too."),
        (f"[{one}, {other}]", [pair, said], "Both kinds of keys may stand in one list."),
        (f"Here you are:\n[{one}]\nEnjoy!", [pair], "Sentences before and after the JSON."),
        ("I would rather not.", [], "No JSON at all: an empty list."),
        ('[{"question": "2 + 2?", "ans', [], "JSON that was cut off: catch ValueError."),
    ]
    for text, expected, why in cases:
        found = _call(function, text)
        if found is ... or found is None:
            return NOT_ATTEMPTED
        if isinstance(found, Exception):
            return _wrong(f"{why} Your function raised {type(found).__name__}: {found}")
        if not isinstance(found, list) or [tuple(p) for p in found] != expected:
            return _wrong(f"{why} Expected {expected}, found {found!r}, for {text!r}.")
    return _right("It reads what small models really write. (`parse_pairs` also checks the texts.)")


def check_leaks(rows: Any) -> Verdict:
    """Lesson 2, exercise 3: which training rows give the test question away."""
    if rows is ... or rows is None:
        return NOT_ATTEMPTED
    if not isinstance(rows, set | list | tuple) or not set(rows) <= {1, 2, 3, 4}:
        return _wrong(f"Expected a set of numbers from 1 to 4, such as {{1, 4}}; found {rows!r}.")
    rows = set(rows)
    if rows == {1, 3}:
        return _right("A new wording with the same answer, and the question inside a longer text.")
    reasons = {
        2: "Row 2 asks about another country: alike in letters, another fact.",
        4: "Row 4 is about Togo, but gives another fact away. (That is what splitting by entity is "
        "for.)",
    }
    for number in sorted(rows & set(reasons)):
        return _wrong(reasons[number])
    missing = {1: "the same answer in other words of the question", 3: "the question inside"}
    return _wrong(f"There is another one: {missing[min({1, 3} - rows)]}.")


def check_cost(cost: Any) -> Verdict:
    """Lesson 2, exercise 4: what 10,000 usable pairs cost."""
    if cost is ... or cost is None:
        return NOT_ATTEMPTED
    if isinstance(cost, bool) or not isinstance(cost, int | float):
        return _wrong(f"Expected a number, found {cost!r}.")
    attempts = 10_000 / 0.6
    right = (0.5 * 400 + 2.0 * 40) * attempts / 1e6
    if abs(cost - right) <= 0.01 * right:
        return _right(f"About {right:.2f}: the attempts that fail are paid for too.")
    likely = [
        (right * 0.6, "That pays for 10,000 attempts. Of these only 6,000 would be usable."),
        (right * 0.36, "You multiplied by 0.6; to *get* 10,000 you must divide by it."),
        (right * 1e6, "Prices are for a million tokens."),
        (2.0 * 40 * attempts / 1e6, "The prompt costs too, and here it costs most."),
        (0.5 * 400 * attempts / 1e6, "What the model writes costs too."),
        ((0.5 * 40 + 2.0 * 400) * attempts / 1e6, "The two prices are the wrong way round."),
    ]
    for wrong, why in likely:
        if abs(cost - wrong) <= 0.01 * wrong:
            return _wrong(why)
    return _wrong("Count the attempts first: how many give 10,000 usable pairs at 60 %?")
