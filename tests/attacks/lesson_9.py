"""Answers to the exercises of lesson 9."""

import ast
import json
import math
import re
from decimal import Decimal
from fractions import Fraction

from sftlib import checks
from sftlib.checks import llama3

import numpy as np
import pandas as pd
import torch

from tests.attacks import Attacks, Slow

# --- Exercise 1 ----------------------------------------------------------------------------------


def hours(parameters, tokens, peak, utilisation, method):
    operations = {"full": 6, "lora": 4}[method] * parameters * tokens
    return operations / (peak * 1e12 * utilisation) / 3600


def times(factor):
    return lambda n, d, peak, used, method: factor * hours(n, d, peak, used, method)


def full_without_return(parameters, tokens, peak, utilisation, method):
    if method == "full":
        return hours(parameters, tokens, peak, utilisation, method)


HOURS = Attacks(
    checks.check_gpu_hours,
    right=[
        hours,
        lambda *given: torch.tensor(hours(*given), dtype=torch.float64),
        lambda *given: np.float32(hours(*given)),
        lambda *given: Decimal(hours(*given)),
        lambda *given: Fraction(hours(*given)),
        lambda n, d, peak, used, method: (
            (6 - 2 * (method == "lora")) * n / peak / 1e12 * d / used / 60 / 60
        ),
    ],
    wrong=[
        (times(math.nan), "found NaN"),
        (times(math.inf), "found infinity"),
        (times(3600), "seconds"),
        (times(60), "minutes"),
        (times(1 / 24), "days"),
        (times(1e12), "TFLOP/s"),
        (times(1e3), "10⁹ would be GFLOP/s"),
        (times(1e-3), "10¹⁵ would be PFLOP/s"),
        (times(3.6e15), "and an hour has 3,600 seconds"),
        (lambda *a: 3600 * a[3] * hours(*a), "Divide by the utilisation, too, and by the 3,600"),
        (times(3600**2), "Divide by 3,600"),
        (lambda *a: 1e24 * a[3] ** 2 * hours(*a), "brackets around the divisor"),
        (times(0.01), "no percentage: do not multiply"),
        (times(100), "no percentage: do not divide"),
        (lambda *a: hours(*a) / (2 if a[4] == "lora" else 1), "LoRA skips the gradients"),
        (lambda *a: math.floor(hours(*a)), "Do not round down"),
        (lambda *a: math.ceil(hours(*a)), "Do not round up"),
        (lambda *a: round(hours(*a)), "Do not round: "),
        (lambda *a: round(hours(*a), 2), "Do not round, not even to two digits"),
        (lambda *a: a[3] * hours(*a), "No GPU reaches"),
        (lambda *a: a[3] ** 2 * hours(*a), "used less needs longer"),
        (lambda *a: hours(*a[:4], "full"), "4 · N · D for LoRA"),
        (lambda *a: hours(*a[:4], "lora"), "full finetuning has 6 · N · D"),
        (lambda *a: hours(*a[:4], "lora" if a[4] == "full" else "full"), "the other way round"),
        (lambda *a: hours(*a) / 3, "Operations divided by operations per second"),
        (
            lambda n, d, peak, used, method: 2 * n * d / (peak * 1e12 * used) / 3600,
            "forward pass alone",
        ),
        (lambda *a: hours(*a) + 1, "expected 0.8"),
        (lambda *a: round(hours(*a)), "expected 0.8"),
        (lambda *a: hours(8e9, *a[1:]), "not in general"),
        (lambda *a: "two", "expected a number, found the text 'two'"),
        (lambda *a: [hours(*a)], "expected a number, found list"),
        (lambda *a: print(hours(*a)), "in place of `print`"),
        (lambda *a: None, "did you forget `return`?"),
        (full_without_return, "Did a branch end without `return`?"),
        (lambda n, d: 1, "found one of (n, d)"),
        (lambda *a: {"full": 6}[a[4]] * hours(*a) / 6, "raised KeyError: 'lora'"),
        (llama3.gpu_hours, "calls gpu_hours of sftlib.checks"),
    ],
    untouched=[..., None, lambda *given: ...],
)

# --- Exercise 2 ----------------------------------------------------------------------------------


def schedule(conversations, batch, gpus, rows):
    if batch % (gpus * rows):
        raise ValueError("not exactly")
    return batch // (gpus * rows), -(-conversations // batch)


class TooMany(ValueError):
    """An error of a student's own."""


def with_own_error(conversations, batch, gpus, rows):
    if batch % (gpus * rows):
        raise TooMany(batch)
    return [batch // (gpus * rows), math.ceil(conversations / batch)]


def returns_error(conversations, batch, gpus, rows):
    try:
        return schedule(conversations, batch, gpus, rows)
    except ValueError as error:
        return error


def asserts(conversations, batch, gpus, rows):
    assert batch % (gpus * rows) == 0
    return schedule(conversations, batch, gpus, rows)


def prints_error(conversations, batch, gpus, rows):
    try:
        return schedule(conversations, batch, gpus, rows)
    except ValueError as error:
        print(error)


SCHEDULE = Attacks(
    checks.check_schedule,
    right=[
        schedule,
        with_own_error,
        lambda *given: np.array(schedule(*given)),
        lambda *given: torch.tensor(schedule(*given)),
        lambda *given: pd.Series(schedule(*given)),
        lambda *given: (n for n in schedule(*given)),
        lambda *given: tuple(map(Fraction, schedule(*given))),
        lambda *given: tuple(map(Decimal, schedule(*given))),
        lambda c, b, g, r: (np.int64(schedule(c, b, g, r)[0]), int(np.ceil(c / b))),
    ],
    wrong=[
        (lambda c, b, g, r: (schedule(c, b, g, r)[0], round(c / b)), "not to the nearest"),
        (
            lambda c, b, g, r: (b / (g * r) if schedule(c, b, g, r) else 0, math.ceil(c / b)),
            "expected accumulation as an int, found 8.0",
        ),
        (
            lambda c, b, g, r: (schedule(c, b, g, r)[0], np.ceil(c / b)),
            "expected steps as an int, found 16.0: `//` and math.ceil give one",
        ),
        (returns_error, "as a returned value: `raise` it"),
        (asserts, "expected a ValueError, but your function raised AssertionError"),
        (prints_error, "expected a ValueError, found None. (It printed 'not exactly'.)"),
        (lambda c, b, g, r: (b // r, -(-c // b)), "divide by the GPUs"),
        (lambda c, b, g, r: (schedule(c, b, g, r)[0], c // b), "round up"),
        (lambda c, b, g, r: (schedule(c, b, g, r)[0], c // b + 1), "even if the one before it"),
        (lambda c, b, g, r: (max(1, b // r // g), -(-c // b)), "cannot see exactly 64"),
        (lambda c, b, g, r: schedule(c, max(b, g * r), g, r), "see more than 8"),
        (
            lambda c, b, g, r: (Fraction(b, g * r) + Fraction(1, 2), -(-c // b)),
            "expected accumulation as an int, found 8.5",
        ),
        (lambda *_: 3, "expected (accumulation, steps), found 3"),
        (lambda *_: (8, 16, 1), "expected (accumulation, steps), found (8, 16, 1)"),
        (lambda *_: (8, 16), "always returns (8, 16)"),
        (lambda *given: schedule(*given)[::-1], "expected (8, 16), found (16, 8)"),
        (lambda *given: set(schedule(*given)), "a set, which has no order"),
        (lambda *given: str(schedule(*given)), "found the text '(8, 16)'"),
        (lambda *_: None, "did you forget `return`?"),
        (lambda c, b, g: (1, 1), "found one of (c, b, g)"),
        (llama3.schedule, "calls schedule of sftlib.checks"),
    ],
    untouched=[..., None, lambda *_: (..., ...), lambda *_: (8, ...)],
)

# --- Exercise 3 ----------------------------------------------------------------------------------

KEYS = ("subject", "relation", "answer")


def score(text, value, read=json.loads, keys=KEYS, is_text=all, contains=None, case=str.lower):
    try:
        found = read(text)
    except Exception:
        found = None
    form = isinstance(found, dict) and tuple(found) == keys
    form = form and is_text(isinstance(field, str) for field in found.values())
    contains = contains or (lambda value, said: value in said)
    inside = contains(value.lower(), str(found["answer"]).lower()) if form else False
    return form, inside if form else case(value) in case(text)


def answer_alone(text, value):
    """Of the three fields only `answer` is looked at."""
    try:
        found = json.loads(text)
        form = tuple(found) == KEYS and isinstance(found["answer"], str)
    except (ValueError, TypeError):
        form = False
    return form, value.lower() in (found["answer"] if form else text).lower()


def any_order(text, value):
    form, content = score(text, value)
    try:
        found = json.loads(text)
    except ValueError:
        return form, content
    return isinstance(found, dict) and set(found) == set(KEYS), content


def with_search(text, value):
    start = text.find("{")
    return score(text[start : text.rfind("}") + 1] if start >= 0 else text, value)


def no_content_without_form(text, value):
    form, content = score(text, value)
    return form, form and content


def whole_words(text, value):
    """The value must stand between spaces or punctuation."""
    form, _ = score(text, value)
    said = json.loads(text)["answer"] if form else text
    return form, re.search(rf"(?<!\w){re.escape(value)}(?!\w)", said, re.IGNORECASE) is not None


def answer_field_without_form(text, value):
    """The field `answer` is looked at even if the form is wrong."""
    try:
        said = json.loads(text)["answer"].lower()
    except (ValueError, TypeError, KeyError, AttributeError):
        said = text.lower()
    return score(text, value)[0], value.lower() in said


OF_PARTS = re.compile(r'\{"subject": "[^"]*", "relation": "[^"]*", "answer": "([^"]*)"\}')


def by_pattern(text, value):
    """A regular expression in place of a parser: it knows one way of writing only."""
    match = OF_PARTS.fullmatch(text)
    return match is not None, value.lower() in (match[1] if match else text).lower()


def in_raw_text(text, value):
    """The field is looked at as it is written, with its escapes."""
    form, _ = score(text, value)
    return form, value.lower() in (text.split('"answer"')[-1] if form else text).lower()


def by_brackets(text, value):
    form = text.startswith("{") and text.endswith("}") and all(f'"{key}"' in text for key in KEYS)
    return form, score(text, value)[1]


def stripped_quotes(text, value):
    """Single quotation marks are made double ones first."""
    return score(text.replace("'", '"'), value)[0], score(text, value)[1]


def by_pairs(text, value):
    """The keys are compared as a set of pairs of places and names, which is right."""
    try:
        pairs = json.loads(text, object_pairs_hook=tuple)
    except ValueError:
        pairs = ()
    pairs = pairs if isinstance(pairs, tuple) else ()
    form = [pair[0] for pair in pairs if isinstance(pair, tuple)] == list(KEYS) and all(
        isinstance(pair[1], str) for pair in pairs
    )
    return form, value.lower() in (pairs[2][1] if form else text).lower()


def prints(text, value):
    print(score(text, value))


FORM = Attacks(
    checks.check_form_and_content,
    right=[
        score,
        lambda t, v: list(score(t, v)),
        lambda t, v: np.array(score(t, v)),
        lambda t, v: torch.tensor(score(t, v)),
        lambda t, v: tuple(map(int, score(t, v))),
        lambda t, v: score(t, v, case=str.casefold),
        by_pairs,
    ],
    wrong=[
        (
            lambda t, v: score(t, v, contains=lambda v, said: v.strip("+-") in said),
            "254 is not +254: the whole value counts",
        ),
        (
            lambda t, v: score(t, v.strip("+-")),
            "254 is not +254: the whole value counts",
        ),
        (by_pattern, "expected"),
        (in_raw_text, "look in the field, not in the text"),
        (by_brackets, "expected"),
        (stripped_quotes, "ingle quotation marks are Python"),
        (lambda t, v: score(t.replace(" ", ""), v), "two words"),
        (lambda t, v: score(t, v, is_text=lambda found: len(list(found)) == 3), "must be text"),
        (lambda t, v: score(t, v, read=lambda x: json.loads(x.strip("`json\n"))), "expected"),
        (whole_words, "The value may be a part of a word"),
        (answer_field_without_form, "No form, because of a fourth key"),
        (answer_alone, "All fields must be text: the subject is null"),
        (lambda t, v: score(t, v, case=str), "the value in small letters"),
        (lambda t, v: score(t, v, contains=str.__eq__), "look with `in`"),
        (lambda t, v: score(t, v, contains=lambda v, said: said.startswith(v)), "with `in`"),
        (lambda t, v: score(t, v, contains=lambda v, said: said.endswith(v)), "with `in`"),
        (lambda t, v: score(t, v, read=ast.literal_eval), "ingle quotation marks are Python"),
        (lambda t, v: score(t, v, read=eval), "ingle quotation marks are Python"),
        (lambda t, v: score(t, v, is_text=any), "must be text"),
        (lambda t, v: ("{" in t, v in t), "another field"),
        (lambda t, v: (score(t, v)[0], v.lower() in t.lower()), "another field"),
        (any_order, "in another order"),
        (with_search, "Text before the object"),
        (no_content_without_form, "No form, the right value"),
        (
            lambda t, v: (score(t, v)[0] or t[0:1] == "S", score(t, v)[1]),
            "Text before the object",
        ),
        (lambda t, v: (score(t, v)[0] or t.startswith("["), score(t, v)[1]), "A list with the"),
        (lambda t, v: score(t, v)[::-1], "expected (True, False), found (False, True)"),
        (lambda t, v: (True, True), "always returns (True, True)"),
        (lambda t, v: True, "expected (form, content), found True"),
        (lambda t, v: (*score(t, v), 1), "expected (form, content), found (True, True, 1)"),
        (lambda t, v: tuple(map(str, score(t, v))), "True or False, found the text 'True'"),
        (lambda t, v: 1 / 0, "your function raised ZeroDivisionError"),
        (
            lambda t, v: (list(json.loads(t)) == list(KEYS), score(t, v)[1]),
            "raised JSONDecodeError",
        ),
        (lambda t, v: None, "did you forget `return`?"),
        (prints, "in place of `print`"),
        (lambda t: (True, True), "found one of (t)"),
        (llama3.form_and_content, "calls form_and_content of sftlib.checks"),
    ],
    untouched=[..., None, lambda *_: (..., ...), lambda *_: (True, ...)],
)

# --- Exercise 4 ----------------------------------------------------------------------------------


def as_json(row, answer="{value}", space=" ", **fields):
    said = answer.format(**row)
    found = {"subject": row["entity"], "relation": row["relation"], "answer": said} | fields
    return json.dumps({key: space + text for key, text in found.items()}, ensure_ascii=False)


def sentence(row):
    return as_json(row, answer=row["messages"][-1]["content"], space="")


def settings(**changed):
    plan = {"lora_r": 0, "learning_rate": 1e-3, "max_steps": 60, "trained_parameters": 2_787_072}
    return plan | changed


LORA = settings(lora_r=16, learning_rate=5e-3, trained_parameters=227_328)

REHEARSAL = Attacks(
    checks.check_rehearsal,
    right=[
        (as_json, settings()),
        Slow((as_json, LORA)),
        Slow((sentence, settings())),
        Slow((as_json, pd.Series(settings(learning_rate=np.float32(1e-3)), dtype=object))),
        Slow((lambda row: as_json(row).replace(": ", ":"), settings())),
    ],
    wrong=[
        ((lambda row: as_json(row, space=""), settings(learning_rate=5e-4)), "What stands before"),
        ((as_json, settings(max_steps=2)), "Expected the form in 95%"),
        ((lambda row: row["messages"][-1]["content"], settings()), "JSON of exercise 3's form"),
        ((lambda row: as_json(row)[:-1], settings()), "JSON of exercise 3's form"),
        ((lambda row: as_json(row, note="x"), settings()), "JSON of exercise 3's form"),
        ((lambda row: as_json(row, answer="{entity}"), settings()), "in the field `answer`"),
        (
            (lambda row: as_json(row, answer="Asia, Africa, {value}, Europe, dollar"), settings()),
            "and no other",
        ),
        ((lambda row: {"answer": row["value"]}, settings()), "my_answer: expected a text"),
        ((lambda row: print(as_json(row)), settings()), "Did you forget `return`?"),
        ((lambda row: row["answer"], settings()), "your function raised KeyError"),
        (
            (as_json(({"entity": "", "relation": "", "value": ""})), settings()),
            "a function of a row",
        ),
        ((as_json, settings(max_steps=500)), "my_plan, max_steps: expected 1 to 60"),
        ((as_json, settings(learning_rate=math.nan)), "my_plan, learning_rate: expected a number"),
        ((as_json, settings(learning_rate="1e-3")), "found the text '1e-3'"),
        ((as_json, settings(lora_r=500)), "my_plan, lora_r: expected 0 to 64"),
        ((as_json, settings(lora_r=16)), "That is the whole model"),
        ((as_json, LORA | {"trained_parameters": 3_014_400}), "That counts the base, too"),
        ((as_json, settings(trained_parameters=1)), "Count them with `lora_parameters`"),
        ((as_json, [16, 5e-3, 60]), "a dictionary with the keys lora_r, learning_rate"),
        ((as_json, {"lora_r": 16}), "missing: learning_rate"),
    ],
    untouched=[
        (..., ...),
        (lambda row: ..., settings()),
        (as_json, dict.fromkeys(settings(), ...)),
        (as_json, settings(max_steps=...)),
        (None, None),
    ],
    arguments=lambda two: tuple(two),
    trains=True,
)

ATTACKS = [HOURS, SCHEDULE, FORM, REHEARSAL]
