"""The exercises of lesson 2."""

from __future__ import annotations

import json
import random
import re
from typing import Any

from sftlib.checks.causes import likely_cause, near
from sftlib.checks.exercise import exercise
from sftlib.checks.functions import compare, reference
from sftlib.checks.reading import number, sequence, text, unique
from sftlib.checks.verdict import Verdict, right, wrong

# --- Write a validator ---------------------------------------------------------------------------

QUESTION, ANSWER = "What is the capital of Niger?", "The capital of Niger is Niamey."


@reference
def problems(question: str, answer: str) -> list[str]:
    asked, given = question.strip().lower(), answer.strip().lower()
    found = {
        "empty": not given,
        "repeats the question": asked == given,
        "control token": "<|" in question or "<|" in answer,
    }
    return [problem for problem, holds in found.items() if holds]


def _draw_pair(rng: random.Random, size: int) -> tuple[str, str]:
    """A question of some words and an answer, sound or with one problem."""
    words = rng.choices(["which", "capital", "Niger", "2 < 3", "a|b", "it's", "Lomé"], k=size + 1)
    question = " ".join(words) + "?"
    answers = [
        *[" ".join(rng.choices(words, k=size)) + "."] * 3,
        rng.choice(words),
        question[: len(question) // 2] + "!",
        f"{question} {question}",
        "x" * len(question),
        rng.choice(["", " ", "\n\t "]),
        rng.choice(["", " ", "\n"]) + question.swapcase() + rng.choice(["", "  "]),
    ]
    texts = [question, rng.choice(answers)]
    if rng.random() < 0.3:  # a control token anywhere in either text
        side, name = rng.randrange(2), rng.choice(["im_end", "eot_id", "end", "x_7", "begin"])
        at = rng.randint(0, len(texts[side]))
        texts[side] = f"{texts[side][:at]}<|{name}|>{texts[side][at:]}"
    return texts[0], texts[1]


def _any_problem(found: Any) -> bool:
    listed = sequence(found, what="a list of problems", ordered=False)
    return bool([text(problem, "A problem in the list") for problem in listed])


@exercise(2, 1, "`function(question, answer) -> list of problems`")
def check_validator(function: Any) -> Verdict:
    compare(function, problems, PAIR_EDGES, _draw_pair, read=_any_problem)
    return right("It finds what is broken, and leaves what is well.")


PAIR_EDGES = [
    ("There is nothing wrong with a true, plain pair.", (QUESTION, ANSWER)),
    ("An empty answer is a problem.", (QUESTION, "")),
    ("An answer of spaces and line breaks is empty too: `strip()` it.", (QUESTION, " \n ")),
    ("An answer that is the question is a problem.", (QUESTION, QUESTION)),
    (
        "The question repeated in other case, with spaces around, is still the question: compare "
        "`strip()`ped, `lower()`ed texts.",
        (QUESTION, " what is the CAPITAL of Niger? "),
    ),
    (
        "An answer may quote the question and go on: ask whether they are equal, not `in`.",
        (QUESTION, f"You ask: {QUESTION} It is Niamey."),
    ),
    (
        "An answer may be a part of the question: ask whether they are equal, not `in`.",
        ("Is Niamey or Zinder the capital of Niger?", "Niamey"),
    ),
    (
        "An answer may begin as the question does: ask whether they are equal, to the end.",
        ("Niamey or Zinder: which is the capital of Niger?", "Niamey"),
    ),
    (
        "An answer of the same length, or of the same letters, is another text.",
        (QUESTION, QUESTION[::-1]),
    ),
    ("A control token in the answer is a problem.", (QUESTION, ANSWER + "<|im_end|>")),
    ("Look for control tokens in the question too.", ("<|im_start|>" + QUESTION, ANSWER)),
    (
        "`<|eot_id|>` is a control token too, of another model: look for `<|`, not for names.",
        (QUESTION, ANSWER + "<|eot_id|>"),
    ),
    (
        "A control token may stand anywhere in a text, not only where it begins or ends.",
        (QUESTION, "The capital <|end|> is Niamey."),
    ),
    ("`<` alone is no control token; `<|` is.", ("Is 2 < 3?", "Yes: 2 < 3, and 3 > 2.")),
    (
        "A control token that is cut off is a problem too: look for `<|`, not for its end.",
        (QUESTION, "The capital of Niger is Niamey.<|im_en"),
    ),
    ("`|>` alone is none: a control token begins with `<|`.", ("What is a pipe?", "It is x |> f.")),
    ("A short answer is an answer: empty means that nothing is left of it.", ("2 + 2?", "4")),
    (
        "The question may have spaces around it, which do not count: `strip()` the question too.",
        (f" {QUESTION} ", QUESTION.lower()),
    ),
]


# --- Read what an LLM writes ---------------------------------------------------------------------

KEYS = (("question", "answer"), ("instruction", "response"))


@reference
def pairs(text: str) -> list[tuple[str, str]]:
    found = re.search(r"[\[{].*[\]}]", text, re.DOTALL)
    try:
        data = json.loads(found[0]) if found else []
    except ValueError:
        return []
    items = data if isinstance(data, list) else [data]
    return [(item[q], item[a]) for item in items for q, a in KEYS if q in item and a in item]


def _draw_completion(rng: random.Random, size: int) -> tuple[str]:
    """JSON with some pairs and perhaps something else, in a fence or between sentences or bare."""
    texts = ['Say "hi".', "2 + 2?", "Lomé", "f(x) = {x}", "a, b", "It's 4: [4].", "\\alpha", "1\n2"]
    items = []
    for _ in range(size):
        question, answer = rng.choice(KEYS)
        item = {question: rng.choice(texts), answer: rng.choice(texts)}
        if rng.random() < 0.3:  # the keys may come in any order
            item = dict(reversed(item.items()))
        items.append(item | rng.choice([*[{}] * 4, {"id": 7}, {"ok": True}, {"note": None}]))
    if rng.random() < 0.3:
        items.insert(rng.randint(0, size), {"title": rng.choice(texts), "text": "A list."})
    data = items[0] if len(items) == 1 and rng.random() < 0.5 else items
    written = json.dumps(data, indent=rng.choice([None, 2]), ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.5:
        written = f"{rng.choice(['```', '```json'])}\n{written}\n```"
    before = rng.choice(["", "", "Here you are:\n", "Sure: ", "Of course, with pleasure!\n\n"])
    return (before + written + rng.choice(["", "", "\nEnjoy!", " Bye.", "\n\nShall I go on?"]),)


def _read_pairs(found: Any) -> list[list]:
    what = "a pair (question, answer)"
    return [sequence(item, f"item {n}", what) for n, item in enumerate(sequence(found), 1)]


@exercise(2, 2, "`function(text) -> list of (question, answer)`")
def check_parser(function: Any) -> Verdict:
    compare(function, pairs, COMPLETION_EDGES, _draw_completion, read=_read_pairs)
    return right("It reads what small models really write. (`parse_pairs` also checks the texts.)")


ONE = '{"question": "2 + 2?", "answer": "4"}'
OTHER = '{"instruction": "Say hello.", "response": "Hello."}'
COMPLETION_EDGES = [
    ("A list of one pair.", (f"[{ONE}]",)),
    ("A code fence around the list: look for brackets.", (f"```json\n[{ONE}]\n```",)),
    ("The keys may be `instruction` and `response`.", (f"[{OTHER}]",)),
    ("A single object, not in a list, is a pair too.", (ONE,)),
    ("Both kinds of keys may stand in one list.", (f"[{ONE}, {OTHER}]",)),
    (
        "JSON may go over several lines: `.` stops at a line break without `re.DOTALL`.",
        (json.dumps([json.loads(ONE)], indent=2),),
    ),
    ("Sentences before and after the JSON.", (f"Here you are:\n[{ONE}]\nEnjoy!",)),
    (
        "Sentences before and after the JSON, whatever they are.",
        (f"With pleasure!\n[{ONE}]\nShall I write more?",),
    ),
    ("Sentences before and after the JSON, on one line with it.", (f"Sure: [{ONE}] Bye.",)),
    ("No JSON at all: an empty list.", ("I would rather not.",)),
    ("JSON that was cut off: catch ValueError.", ('[{"question": "2 + 2?", "ans',)),
    ("Brackets that hold no JSON: catch ValueError.", ("I would [not] do that.",)),
    (
        "JSON that was cut off after a bracket: catch ValueError.",
        ('[{"question": "What is a[i]?", "ans',),
    ),
    (
        "JSON is no Python: `true` and `null` are read by `json.loads`, not by `eval`.",
        ('[{"question": "2 + 2?", "answer": "4", "ok": true, "note": null}]',),
    ),
    ("The keys may stand in the other order.", ('[{"answer": "4", "question": "2 + 2?"}]',)),
    (
        "Quotation marks in a text are escaped: let `json.loads` read them, no pattern.",
        (r'[{"question": "Say \"hi\".", "answer": "Hi."}]',),
    ),
    (
        "Brackets may stand inside a text: let `json.loads` find where an object ends.",
        ('[{"question": "Greet me.", "answer": "Hi, {you}."}]',),
    ),
    ("An object with other keys is no pair.", ('[{"title": "A list", "text": "of things"}]',)),
    ("A question without its answer is no pair.", ('[{"question": "2 + 2?"}]',)),
]


# --- Find the leaks ------------------------------------------------------------------------------


@exercise(2, 3, "which training rows give the test question away")
def check_leaks(rows: Any) -> Verdict:
    found = unique(rows, what="a set of numbers from 1 to 4, such as {1, 4}", among=range(1, 5))
    if found == {1, 3}:
        return right("A new wording with the same answer, and the question inside a longer text.")
    reasons = {
        2: "Row 2 asks about another country: alike in letters, another fact.",
        4: "Row 4 is about Togo, but gives another fact away. (Splitting by entity prevents that.)",
    }
    if extra := sorted(found & set(reasons)):
        return wrong(reasons[extra[0]])
    if not found:
        return wrong("None of them? Two of the four rows give the answer of the test away.")
    missing = {
        1: "the same question in other words, with its answer",
        3: "the question stands inside a longer text, with its answer",
    }
    return wrong(f"One more row: {missing[min({1, 3} - found)]}.")


# --- What would it cost? -------------------------------------------------------------------------


@exercise(2, 4, "what 10,000 usable pairs cost")
def check_cost(cost: Any) -> Verdict:
    found = number(cost)
    attempts = 10_000 / 0.6
    expected = (0.5 * 400 + 2.0 * 40) * attempts / 1e6
    if near(found, expected, tolerance=0.01):
        return right(f"About {expected:.2f}: the attempts that fail are paid for too.")
    causes = {
        expected * 0.6: "That pays for 10,000 attempts. Of these only 6,000 would be usable.",
        expected * 0.36: "You multiplied by 0.6; to *get* 10,000 you must divide by it.",
        expected * 1e6: "Prices are per million tokens.",
        expected * 1e3: "Prices are per million tokens, not per thousand.",
        2.0 * 40 * attempts / 1e6: "The prompt costs too, and here it costs most.",
        0.5 * 400 * attempts / 1e6: "What the model writes costs too.",
        (0.5 * 40 + 2.0 * 400) * attempts / 1e6: "The two prices are the wrong way round.",
        expected / attempts: "That is the price of one attempt.",
        expected / 10_000: "That is the price of one usable pair; 10,000 are wanted.",
        expected * 0.4: "That pays for the attempts that fail alone; the others cost, too.",
        2.0 * 440 * attempts / 1e6: "That is 2.0 for all tokens: prompt tokens cost 0.5.",
        0.5 * 440 * attempts / 1e6: "That is 0.5 for all tokens: completion tokens cost 2.0.",
        4.6: "That is cut. Round to 4.67, or give all digits.",
    }
    cause = likely_cause(found, expected, causes, unit="money")
    cause = cause or "Count the attempts first: how many give 10,000 usable pairs at 60 %?"
    return wrong(cause[0].upper() + cause[1:])
