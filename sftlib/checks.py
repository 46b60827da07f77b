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
