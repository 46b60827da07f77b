"""The exercises of lesson 1."""

from __future__ import annotations

import re
from typing import Any

from sftlib.checks.exercise import exercise
from sftlib.checks.verdict import NOT_ATTEMPTED, Verdict, call, result_of, right, wrong


@exercise(1, 1, "one SFT example about the capital of Kenya, as `messages`")
def check_example(messages: Any) -> Verdict:
    if messages == []:
        return NOT_ATTEMPTED
    if (verdict := _wrong_format(messages)) is not None:  # a wrong one is false, too
        return verdict
    *_, question, answer = (m["content"] for m in messages)
    if any("<|" in m["content"] for m in messages):
        return wrong("No control tokens in the text: the chat template adds them.")
    if "Kenya" not in question or "capital" not in question.lower():
        return wrong("The question should ask for the capital of Kenya.")
    if "Nairobi" in question:
        return wrong("The question gives the answer away: leave Nairobi to the assistant.")
    if "Nairobi" not in answer:
        return wrong("The answer is wrong: a model learns wrong answers as well as right ones.")
    if answer != "The capital of Kenya is Nairobi.":
        return wrong(
            f"True, but not in the style of the data: {answer!r}. The ten examples above answer in "
            "one full sentence that ends with a full stop; mixed styles teach a mixed style."
        )
    return right("A clean example: two roles, a question, one true answer in the data's style.")


def _wrong_format(messages: Any) -> Verdict | None:
    """What is wrong with the types, keys and roles of an example; None if nothing is."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return wrong(
            "Expected a list of dicts, one per message; "
            f"found {type(messages).__name__}. Start with [{{'role': …, 'content': …}}, …]."
        )
    for number, message in enumerate(messages, 1):
        if set(message) != {"role", "content"}:
            return wrong(
                f"Message {number} has the keys {sorted(map(str, message))}; "
                "it needs exactly 'role' and 'content'."
            )
        if ... in message.values() or None in message.values():
            return NOT_ATTEMPTED
        if not isinstance(message["content"], str):
            return wrong(
                f"Expected text as the content of message {number}, found {message['content']!r}."
            )
    roles = [m["role"] for m in messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        return wrong(
            "Expected a 'user' message and then an 'assistant' message, at most with a 'system' "
            f"message before them; found {roles}. "
            "The names 'human', 'gpt' or 'instruction' belong to other formats."
        )
    return None


@exercise(1, 2, "`function(text, stopped, reference) -> bool`")
def check_exact_match(function: Any) -> Verdict:
    reference = "The capital of Kenya is Nairobi."
    result_of(function, reference, True, reference)
    matches = {(reference, True): "An identical answer that stopped must match."}
    differs = {
        (reference, False): "An answer that did not stop must not match: in use, it would ramble "
        "on. Did you forget `stopped`?",
        ("The capital of Kenya is Mombasa.", True): "A wrong city must not match: compare the "
        "whole text, not its beginning or length.",
        (f"{reference} {reference}", True): "The right sentence followed by more must not match: "
        "`in` asks for content, and exact match asks for equality.",
        (reference.lower(), True): "Upper and lower case count.",
        ("Nairobi", True): "A part of the reference must not match: exact match asks for all of "
        "it, with `==`.",
        ("", True): "An empty answer must not match, though every text begins with it.",
        (reference[:-1], True): "The full stop counts: compare the texts as they are.",
    }
    for (text, stopped), why in (matches | differs).items():
        found = call(function, text, stopped, reference)
        if not isinstance(found, bool):
            return wrong(f"Expected True or False, found {found!r}.")
        if found is not ((text, stopped) in matches):
            return wrong(why)
    return right("Strict where it should be: the same text, and stopped.")


@exercise(1, 3, "how many tokens of the example the model learns from")
def check_learned_tokens(number: Any, masks: list[int]) -> Verdict:
    expected = sum(masks)
    if isinstance(number, bool) or not isinstance(number, int):
        return wrong(f"Expected a whole number, found {number!r}.")
    if number == expected:
        return right(f"{expected} of {len(masks)} tokens: the answer and the token that ends it.")
    likely = {
        len(masks): "That is every token. The question is only read, not learned from.",
        len(masks) - expected: "That counts the tokens that are only read; we want the others.",
        expected
        - 1: "One short: the control token that ends the answer is learned too. Without it "
        "the model never learns to stop.",
        expected + 1: "One too many: the line break after <|im_end|> belongs to the template.",
    }
    return wrong(likely.get(number, "Count the bold, underlined tokens of the picture above."))


@exercise(1, 4, "which measurement shows that SFT gave the model no knowledge")
def check_knowledge(claim: Any) -> Verdict:
    match = re.fullmatch(r"(\w+)\s*/\s*(\w+)", claim.strip()) if isinstance(claim, str) else None
    if not match:
        return wrong(f"Expected text such as 'dev / stops' (a set, a measure), found {claim!r}.")
    name, measure = match.groups()
    if (name, measure) in {("unknown", "exact_match"), ("unknown", "content")}:
        return right(
            "What the model had never read it still does not know after SFT, "
            "although it nearly always answers in the right form."
        )
    if name == "unknown":
        return wrong(
            f"'{measure}' on the unknown set rises: the model answers and stops. "
            "That is format. Which measure asks whether the answer is true?"
        )
    return wrong(
        f"The set '{name}' asks about facts that the model had read in pretraining, so a high "
        "score there may be old knowledge, newly accessible. Which set asks about facts it "
        "never read?"
    )
