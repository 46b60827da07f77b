"""Answers to the exercises of lesson 2."""

import ast
import json
import operator
import re
from collections import Counter, deque
from decimal import Decimal
from fractions import Fraction
from functools import cache, partial
from typing import NamedTuple

from sftlib import checks
from sftlib.checks.sft_data import dirty_rows, pairs, problems
from sftlib.data import decontaminate, deduplicate, read_facts, validate
from sftlib.data.validation import CONTROL_TOKEN, normalise
from sftlib.teacher import Prices

import numpy as np
import pandas as pd
import torch
from datasets import Dataset

from tests.attacks import Attacks, Made, raises

# --- Exercise 1 ----------------------------------------------------------------------------------


def validator(question, answer, repeats=str.__eq__, tokens=("<|",)):
    texts = question.strip().lower(), answer.strip().lower()
    found = ["empty"] if not texts[1] else []
    found += ["repeats"] if texts[1] and repeats(*texts) else []
    return found + ["control token"] * any(token in question + answer for token in tokens)


def without_return(question, answer):
    if found := validator(question, answer):
        return found


def one_at_a_time(question, answer):
    yield from validator(question, answer)


def one_text(question, answer):
    return ", ".join(validator(question, answer))


def keeps_old_results(question, answer, found=[]):  # noqa: B006
    found += validator(question, answer)
    return found


def by_expression(token):
    return lambda q, a: validator(q, a, tokens=()) + ["x"] * bool(re.search(token, f"{q}\n{a}"))


def only_answer_stripped(question, answer):
    found = [problem for problem in validator(question, answer) if problem != "repeats"]
    return found + ["repeats"] * (question.lower() == answer.strip().lower())


def without_repeats(question, answer):
    return [problem for problem in validator(question, answer) if problem != "repeats"]


def knows_some_blanks(question, answer):
    found = [problem for problem in validator(question, answer) if problem != "empty"]
    return found + ["empty"] * (answer in ("", " ", " \n "))


def lists_nothing(question, answer):
    return [] if not validator(question, answer) else [None]


VALIDATOR = Attacks(
    checks.check_validator,
    right=[
        validator,
        lambda q, a: tuple(validator(q, a)),
        one_at_a_time,
        lambda q, a: set(validator(q, a)),
        lambda q, a: np.array(validator(q, a)),
        lambda q, a: pd.Series(validator(q, a), dtype=object),
        lambda q, a: filter(None, ["empty" if not a.strip() else "", *validator(q, a)]),
        lambda q, a: validator(normalise(q), normalise(a)) + ["control"] * ("<|" in q + a),
        lambda q, a: deque(validator(q.casefold(), a.casefold())),
        lambda *texts: validator(*texts),
        partial(validator, repeats=operator.eq),
        lambda question, answer, strict=True: frozenset(2 * validator(question, answer)),
    ],
    wrong=[
        (lambda q, a: validator(q, a, lambda q, a: a in q), "a part of the question"),
        (lambda q, a: validator(q, a, lambda q, a: q.startswith(a)), "begin as the question does"),
        (lambda q, a: validator(q, a, lambda q, a: q in a), "quote the question"),
        (lambda q, a: validator(q, a, lambda q, a: len(q) == len(a)), "the same length"),
        (lambda q, a: validator(q, a, lambda q, a: set(q) == set(a)), "of the same letters"),
        (lambda q, a: validator(q, a, lambda q, a: False), "that is the question"),
        (lambda q, a: validator(q, a, tokens=("<|im_end|>", "<|im_start|>")), "another model"),
        (lambda q, a: validator(q, a, tokens=("<|im", "<|e")), "not in general"),
        (
            lambda q, a: validator(q, a, tokens=()) + ["x"] * (q + a).startswith("<|"),
            "token in the answer",
        ),
        (
            lambda q, a: validator(q, a, tokens=()) + ["x"] * any(map("<|".__eq__, (q[:2], a[:2]))),
            "token in the answer",
        ),
        (
            lambda q, a: validator(q, a, tokens=()) + ["x"] * (a[-2:] == "|>" or q[:2] == "<|"),
            "may stand anywhere",
        ),
        (lambda q, a: validator(q, a, tokens=("<",)), "`<` alone is no control token"),
        (lambda q, a: validator("", a), "that is the question"),
        (lambda q, a: [] if a.strip() else ["empty"], "is the question"),
        (lambda q, a: ["empty"] * (not a), "spaces and line breaks"),
        (by_expression(r"\|>"), "cut off"),
        (by_expression(r"<\|\w+\|>"), "cut off"),
        (by_expression(r"<\||\|>"), "`|>` alone is none"),
        (lambda q, a: validator(q, a) + ["x"] * (len(a.strip()) < 2), "A short answer"),
        (only_answer_stripped, "`strip()` the question too"),
        (keeps_old_results, "still holds what earlier calls"),
        (lambda answer, question: validator(question, answer), "in another order"),
        (lambda q, a: ["bad"], "always returns ['bad']. There is nothing wrong"),
        (lambda q, a: [], "always returns []. An empty answer"),
        (without_return, "expected [], found None. Did a branch end without `return`?"),
        (lambda q, a: print(validator(q, a)), "write `return` in place of `print`"),
        (lambda q, a: True, "expected a list of problems, found True"),
        (lambda q, a: bool(validator(q, a)), "expected a list of problems, found False"),
        (one_text, "expected a list of problems, found the text ''"),
        (lists_nothing, "a problem in the list: expected a text, found None"),
        (lambda q, a: {"problems": validator(q, a)}, "expected a list of problems, found dict"),
        (lambda q: [], "function of (question, answer), found one of (q)"),
        (lambda q, a: raises(ValueError("bad")), "your function raised ValueError: bad"),
        (problems, "calls problems of sftlib.checks"),
        (lambda q, a: validator(q, a, tokens=()) + ["x"] * ("<|" in a), "in the question too"),
        (lambda q, a: validator(q, a, tokens=()) + ["x"] * ("<|" in q), "token in the answer"),
        (lambda q, a: without_repeats(q, a) + ["same"] * (q == a), "in other case"),
        (lambda q, a: without_repeats(q, a) + ["same"] * (q.lower() == a.lower()), "`strip()`ped"),
        (lambda q, a: without_repeats(q, a) + ["same"] * (q == a.lower()), "is the question"),
        (knows_some_blanks, "knows all white space"),
        (lambda q, a: len(validator(q, a)), "expected a list of problems, found 0"),
        (lambda q, a: str(validator(q, a)), "expected a list of problems, found the text '[]'"),
        (lambda q, a: validator(q, a) + ["x"] * (a[-1] == "?"), "raised IndexError"),
    ],
    untouched=[..., None, lambda question, answer: ...],
)

# --- Exercise 2 ----------------------------------------------------------------------------------

BOTH = (("question", "answer"), ("instruction", "response"))


def items_of(text):
    data = json.loads(re.search(r"[\[{].*[\]}]", text, re.DOTALL)[0])
    return data if isinstance(data, list) else [data]


def parse(text, read=lambda item, q, a: (item[q], item[a]), keys=BOTH):
    try:
        items = items_of(text)
    except (ValueError, TypeError):
        return []
    return [read(item, q, a) for item in items for q, a in keys if q in item and a in item]


def by_pattern(text):
    quoted = r'"(?:question|instruction)":\s*"(.*?)",\s*"(?:answer|response)":\s*"(.*?)"'
    return re.findall(quoted, text)


def any_values(text):
    try:
        return [tuple(item.values())[:2] for item in items_of(text)]
    except (ValueError, TypeError):
        return []


def with_get(text):
    try:
        items = items_of(text)
    except (ValueError, TypeError):
        return []
    return [
        (i.get("question") or i.get("instruction"), i.get("answer") or i.get("response"))
        for i in items
    ]


def either_or(text):
    try:
        items = items_of(text)
    except (ValueError, TypeError):
        return []
    return [
        (i["question"], i["answer"]) if "question" in i else (i["instruction"], i["response"])
        for i in items
    ]


def without_try(text):
    found = re.search(r"[\[{].*[\]}]", text, re.DOTALL)
    return parse(found[0]) if found and json.loads(found[0]) is not None else []


def as_python(read):
    def parser(text):
        found = re.search(r"[\[{].*[\]}]", text, re.DOTALL)
        try:
            return parse(json.dumps(read(found[0]))) if found else []
        except (ValueError, SyntaxError):
            return []

    return parser


def known_prose(text):
    for prose in ("Here you are:", "Enjoy!", "```json", "```"):
        text = text.replace(prose, "")
    return parse(text) if text.strip()[:1] in ("[", "{") else []


def whole_lines(text):
    lines = text.splitlines()
    first = next((n for n, line in enumerate(lines) if line[:1] in ("[", "{")), len(lines))
    return parse("\n".join(lines[first:]))


def within_a_line(text):
    found = re.search(r"[\[{].*[\]}]", text)
    return parse(found[0]) if found else []


def without_braces_inside(text):
    return [pair for item in re.findall(r"\{[^{}]*\}", text) for pair in parse(item)]


def gives_up(text):
    if found := parse(text):
        return found


class Pair(NamedTuple):
    asked: str
    said: str


def first_json(text):
    for at in (found.start() for found in re.finditer(r"[\[{]", text)):
        try:
            data, _ = json.JSONDecoder().raw_decode(text, at)
        except ValueError:
            continue
        return parse(json.dumps(data))
    return []


def two_keys_alone(text):
    try:
        items = items_of(text)
    except (ValueError, TypeError):
        return []
    return [(i[q], i[a]) for i in items for q, a in BOTH if set(i) == {q, a}]


def question_is_enough(text):
    try:
        items = items_of(text)
    except (ValueError, TypeError):
        return []
    return [(i[q], i[a]) for i in items for q, a in BOTH if q in i]


PARSER = Attacks(
    checks.check_parser,
    right=[
        parse,
        lambda text: tuple(parse(text)),
        lambda text: parse(text, lambda item, q, a: [item[q], item[a]]),
        lambda text: (pair for pair in parse(text)),
        lambda text: deque(parse(text)),
        lambda text: np.array(parse(text), dtype=object),
        first_json,
        lambda text: map(list, parse(text)),
        lambda text: [Pair(*pair) for pair in parse(text)],
        lambda text: pd.DataFrame(parse(text)).itertuples(index=False),
    ],
    wrong=[
        (by_pattern, "other order"),
        (lambda text: by_pattern(text.replace("\\", "")), "other order"),
        (any_values, "other order"),
        (with_get, "An object with other keys is no pair. For text="),
        (either_or, "but your function raised KeyError: 'instruction'"),
        (lambda text: [("2 + 2?", "4")], "always returns [('2 + 2?', '4')]"),
        (lambda text: [], "always returns []. A list of one pair"),
        (lambda text: json.loads(text) and parse(text), "code fence"),
        (lambda text: parse(text, keys=BOTH[:1]), "instruction"),
        (lambda text: parse(text)[:1], "Both kinds"),
        (lambda text: items_of(text) and parse(text), "No JSON at all"),
        (lambda text: parse(text) if "[" in text else [], "A single object"),
        (lambda text: parse(text, lambda item, q, a: (item[a], item[q])), "A list of one pair"),
        (
            lambda text: parse(text, lambda item, q, a: item),
            "item 1: expected a pair (question, answer), found dict",
        ),
        (lambda text: parse(text, lambda item, q, a: item[q]), "item 1: expected a pair"),
        (lambda text: parse(text.encode().decode("ascii", "ignore")), "not in general"),
        (without_try, "catch ValueError"),
        (as_python(ast.literal_eval), "JSON is no Python"),
        (as_python(eval), "JSON is no Python"),
        (known_prose, "whatever they are"),
        (whole_lines, "on one line"),
        (within_a_line, "re.DOTALL"),
        (without_braces_inside, "Brackets may stand inside a text"),
        (gives_up, "expected [], found None. Did a branch end without `return`?"),
        (lambda text: [1], "item 1: expected a pair (question, answer), found 1"),
        (lambda text: [None], "item 1: expected a pair (question, answer), found None"),
        (lambda text: dict(parse(text)), "expected a list, found dict"),
        (lambda text: print(parse(text)), "write `return` in place of `print`"),
        (lambda text: raises(KeyError("question")), "your function raised KeyError"),
        (pairs, "calls pairs of sftlib.checks"),
        (lambda text: parse(text) if re.search(r"\[\s*\{", text) else [], "A single object"),
        (lambda text: parse(text)[::-1], "Both kinds"),
        (lambda text: parse(text.lower()), "found [('say hello.', 'hello.')]"),
        (lambda text: sorted(parse(text)), "not in general"),
        (lambda text: parse(text.replace("'", '"')), "not in general"),
        (lambda text: parse(text.replace("\n", " ").replace("\\n", " ")), "not in general"),
        (two_keys_alone, "may have other keys besides"),
        (question_is_enough, "A question without its answer"),
        (lambda text: parse(text, keys=BOTH[1:]), "A list of one pair"),
        (lambda text: json.dumps(parse(text)), "expected a list, found the text"),
    ],
    untouched=[..., None, lambda text: ...],
)

# --- Exercises 3 and 4 ---------------------------------------------------------------------------

LEAKS = Attacks(
    checks.check_leaks,
    right=[
        {1, 3},
        [3, 1],
        (1, 3),
        frozenset({1, 3}),
        np.array([1, 3]),
        {np.int64(1), np.int64(3)},
        torch.tensor([3, 1]),
        range(1, 4, 2),
        Made(lambda: (row for row in (1, 3))),
        pd.Series([1, 3]),
        pd.Index([3, 1]),
        deque([3, 1]),
        np.array([1, 3], dtype=np.uint8),
        Made(lambda: {1: "same question", 3: "inside"}.keys()),
    ],
    wrong=[
        ({2}, "another country"),
        ({4}, "another fact"),
        ({2, 4}, "another country"),
        ({3, 4}, "another fact"),
        ({1, 2, 3, 4}, "another country"),
        ([1, 1], "1 is given twice"),
        ({-1, 3}, "found -1"),
        ((1, 3j), "Expected a whole number, found complex"),
        (lambda: {1, 3}, "when it is called"),
        ({1, 2, 3}, "another country"),
        ({1, 3, 4}, "another fact"),
        ({1}, "One more row: the question stands inside a longer text"),
        ({3}, "One more row: the same question in other words"),
        (set(), "None of them? "),
        ([1, 3, 3], "3 is given twice"),
        ({1, 3, 5}, "found 5"),
        ({0, 2}, "found 0"),
        (5, "set of numbers from 1 to 4, such as {1, 4}, found 5"),
        ("1, 3", "found the text '1, 3'"),
        ({"1", "3"}, "Expected a whole number, found the text"),
        ([1, True], "found True"),
        ([1, 3.5], "Expected a whole number, found 3.5"),
        ([[1, 3]], "Expected a whole number, found list [1, 3]"),
        ({1: True, 3: True}, "found dict"),
    ],
    untouched=[..., None, {...}, [None], [1, ...]],
)

COST = Attacks(
    checks.check_cost,
    right=[
        4.67,
        280 / 60,
        Fraction(14, 3),
        Decimal("4.67"),
        np.float32(4.67),
        torch.tensor(4.6667),
        Prices(prompt=0.5, completion=2.0).of(400 * 10_000 / 0.6, 40 * 10_000 / 0.6),
        10_000 * Prices(prompt=0.5, completion=2.0).of(400, 40) / 0.6,
        np.array(14 / 3),
        round(14 / 3, 3),
        4.7,
        Decimal(14) / 3,
    ],
    wrong=[
        (0.00028 * 14_000, "of which 8,400 would be usable"),
        (0.00028 * 16_000, "of which 9,600 would be usable"),
        (10_000 / 0.6, "the number of attempts"),
        (440 * 10_000 / 0.6, "the number of tokens"),
        (2.5 * 440 * 10_000 / 0.6 / 1e6, "Count the attempts first"),
        (280, "in cents"),
        ("4.67 a million", "Expected a number, found the text"),
        ({4.67}, "Expected a number, found set"),
        (4.67 + 0j, "Expected a number"),
        (2.8, "6,000 would be usable"),
        (1.68, "divide"),
        (28 / 6 * 1e6, "per million"),
        (28 / 6 * 1e3, "not per thousand"),
        (4 / 3, "prompt costs too"),
        (10 / 3, "writes costs"),
        (13.667, "wrong way round"),
        (467, "That is in cents"),
        (0.00028, "one attempt"),
        (4.6, "Round to 4.67"),
        (4.6 / 1e3, "Count the attempts first"),
        (14.667, "prompt tokens cost 0.5"),
        (3.667, "completion tokens cost 2.0"),
        (0.000467, "one usable pair"),
        (1.867, "the attempts that fail"),
        (5, "Count the attempts first"),
        (0, "Count the attempts first"),
        (-4.67, "Count the attempts first"),
        ("4.67", "Expected a number, found the text '4.67'"),
        ([4.67], "Expected a number, found list"),
        (np.array([4.67]), "ndarray of shape (1,)"),
        (float("nan"), "found NaN"),
        (float("inf"), "found infinity"),
        (True, "found True"),
        (lambda: 4.67, "when it is called"),
    ],
)

# --- Exercise 5 ----------------------------------------------------------------------------------


def sound(rows):
    return [row for row in rows if not validate(row["messages"])]


def unleaked(rows):
    return decontaminate(rows, read_facts("heldout"))[0]


def unique_rows(rows):
    return deduplicate(rows)[0]


def about(row):
    return row["messages"][1]["content"].partition(" is ")[0]


def believed(rows):
    """The answer that most rows about a fact give."""
    votes = {}
    for row in rows:
        votes.setdefault(about(row), Counter())[row["messages"][1]["content"]] += 1
    return {fact: found.most_common(1)[0][0] for fact, found in votes.items()}


def agreeing(rows):
    most = believed(rows)
    return [row for row in rows if row["messages"][1]["content"] == most[about(row)]]


def corrected(rows):
    most = believed(rows)
    return [answered(row, most[about(row)]) for row in rows]


def answered(row, answer):
    return {"messages": [row["messages"][0], row["messages"][1] | {"content": answer}]}


def without_tokens(rows):
    return [
        answered(row, CONTROL_TOKEN.sub("", row["messages"][1]["content"]).strip()) for row in rows
    ]


def cleaned():
    return list(_cleaned())


@cache
def _cleaned():
    return agreeing(unique_rows(unleaked(sound(dirty_rows()))))


def repaired():
    """Nothing is removed that can be repaired; of two copies the other one stays."""
    rows = unique_rows(unleaked(sound(without_tokens(dirty_rows()[::-1]))))
    return unique_rows(corrected(rows))


def true_copies():
    """No row is false, but the copies are still there."""
    kept = {row["messages"][1]["content"] for row in cleaned()}
    return [r for r in unleaked(sound(dirty_rows())) if r["messages"][1]["content"] in kept]


def shifted(rows):
    """Each row with the answer of the row before it."""
    answers = [row["messages"][1]["content"] for row in rows]
    return [
        answered(row, answer) for row, answer in zip(rows, answers[-1:] + answers, strict=False)
    ]


def believed_copies():
    """The copies are removed last, so that a false row with its copy outvotes the right ones."""
    return unique_rows(agreeing(unleaked(sound(dirty_rows()))))


def disagreeing(right):
    """The other half: the rows that were outvoted."""
    kept = {row["messages"][1]["content"] for row in right}
    rows = unique_rows(unleaked(sound(dirty_rows())))
    return [row for row in rows if row["messages"][1]["content"] not in kept]


def in_small_letters(row):
    return answered(row, row["messages"][1]["content"].lower())


def two_in_one(rows):
    return [{"messages": rows[0]["messages"] + rows[1]["messages"]}]


CLEANING = Attacks(
    checks.check_cleaning,
    right=[
        Made(cleaned),
        Made(lambda: agreeing(unique_rows(sound(unleaked(dirty_rows()))))),
        Made(lambda: tuple(row["messages"] for row in cleaned())),
        Made(lambda: (row for row in reversed(cleaned()))),
        Made(repaired),
        Made(lambda: [row | {"kept": True} for row in cleaned()]),
        Made(lambda: Dataset.from_list(cleaned())),
        Made(lambda: deque(cleaned())),
        Made(lambda: dict(enumerate(cleaned())).values()),
        Made(lambda: filter(None, cleaned())),
    ],
    wrong=[
        (Made(lambda: shifted(cleaned())), "have the answer to another question"),
        (
            Made(
                lambda: [answered(row, cleaned()[0]["messages"][1]["content"]) for row in cleaned()]
            ),
            "have the answer to another question",
        ),
        (Made(believed_copies), "about one fact that contradict each other"),
        (Made(lambda: disagreeing(cleaned())), "about one fact that contradict each other"),
        (Made(lambda: cleaned()[::2]), "at least 200 rows, found 120"),
        (Made(lambda: [in_small_letters(row) for row in cleaned()]), "Score: 0.0 %"),  # it trains
        (Made(lambda: two_in_one(cleaned()) + cleaned()), "does not come from dirty_rows()"),
        (Made(lambda: [answered(row, "") for row in cleaned()]), "Message 2 is empty"),
        (Made(lambda: [*cleaned(), "and so on"]), "expected a dict with messages, found the text"),
        (Made(lambda: {"rows": cleaned()}), "expected a dict with messages"),
        (Made(dirty_rows), "Message 2"),
        (Made(lambda: without_tokens(dirty_rows())), "Message 2"),
        (Made(lambda: sound(dirty_rows())), "contains a held-out question or its answer"),
        (
            Made(lambda: agreeing(unique_rows(sound(dirty_rows())))),
            "contains a held-out question or its answer",
        ),
        (Made(lambda: unleaked(sound(dirty_rows()))), "about one fact that contradict each other"),
        (
            Made(lambda: unique_rows(unleaked(sound(dirty_rows())))),
            "about one fact that contradict each other",
        ),
        (Made(true_copies), "repeat another one"),
        (Made(lambda: cleaned() + cleaned()[:50]), "repeat another one"),
        (Made(lambda: cleaned()[:150]), "at least 200 rows, found 150"),
        (read_facts("sft")[:240], "does not come from dirty_rows()"),
        (Made(lambda: [answered(row, "Yes.") for row in cleaned()]), "does not come from dirty"),
        (Made(lambda: cleaned() + read_facts("sft")[-1:]), "does not come from dirty_rows()"),
        ([], "Expected rows to train on, found none"),
        (240, "a list of rows"),
        (Made(lambda: [about(row) for row in cleaned()]), "a dict with messages"),
        (dirty_rows, "when it is called"),
    ],
    untouched=[..., None, [...], [{"messages": ...}], Made(lambda: [*cleaned(), None])],
    trains=True,
)

ATTACKS = [VALIDATOR, PARSER, LEAKS, COST, CLEANING]
