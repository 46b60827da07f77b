"""What all checks have in common: each answer gets a verdict, whatever it is and does."""

import math
import sys
from collections import deque
from decimal import Decimal
from fractions import Fraction

from sftlib.checks import functions, reading
from sftlib.checks.causes import likely_cause
from sftlib.checks.exercise import exercise
from sftlib.checks.functions import call, compare, reference
from sftlib.checks.verdict import NOT_ATTEMPTED, CheckEnds, right, wrong

import numpy as np
import pandas as pd
import pytest
import torch


@pytest.fixture(autouse=True)
def no_place_in_the_course(monkeypatch):
    """Exercises of these tests do not enter the list of the lessons'."""
    monkeypatch.setattr(sys.modules["sftlib.checks.progress"], "EXERCISES", {})
    monkeypatch.delenv("SFT_CHECK_SEED", raising=False)


def frame(check, **options):
    return exercise(1, 1, "a task", **options)(check)


# --- Numbers of any type -------------------------------------------------------------------------

THREES = [
    *(3, 3.0, Fraction(3), Decimal("3.0"), np.int64(3), np.float16(3), np.longdouble(3)),
    *(np.array(3), np.array(3.0), torch.tensor(3), torch.tensor(3.0, requires_grad=True)),
    *(torch.tensor(3, dtype=torch.bfloat16), pd.Series([3])[0], np.uint8(3)),
]


@pytest.mark.parametrize("three", THREES, ids=lambda three: type(three).__name__)
def test_a_number_of_any_type_is_read(three):
    found = reading.number(three)
    assert found == 3 and type(found) in (int, float)
    assert reading.whole(three) == 3 and type(reading.whole(three)) is int
    assert reading.same(three, 3) and reading.same(three, 3.0) and not reading.same(three, 4)


@pytest.mark.parametrize(
    ("no_number", "words"),
    [
        (True, "found True"),
        (np.bool_(True), "found True"),
        (None, "found None"),
        ("3", "the text '3'"),
        (3j, "found complex"),
        (np.array([3]), "ndarray of shape (1,)"),
        (torch.tensor([[3]]), "Tensor of shape (1, 1)"),
        (torch.empty((), device="meta"), "Tensor of shape ()"),
        ([3], "list [3]"),
        (len, "len itself"),
        (int, "int itself"),
        (math.nan, "NaN, which is no number"),
        (Decimal("sNaN"), "NaN, which is no number"),
        (np.float32("nan"), "NaN, which is no number"),
        (torch.tensor(math.nan), "NaN, which is no number"),
        (math.inf, "found infinity: look for a division by 0"),
        (-math.inf, "found −infinity"),
        (10**400, "found infinity"),
        (pd.NA, "found NAType"),
    ],
)
def test_what_is_no_finite_number_is_refused_in_words(no_number, words):
    with pytest.raises(reading.Unread, match="Expected a number") as refused:
        reading.number(no_number)
    assert words in str(refused.value)


def test_a_part_of_an_answer_is_named():
    with pytest.raises(reading.Unread, match="^Stage 1: expected a number, found the text 'x'"):
        reading.number("x", "Stage 1")
    with pytest.raises(reading.Unread, match="^Expected a whole number, found 3.5"):
        reading.whole(3.5)


@pytest.mark.parametrize("yes", [True, np.bool_(True), 1, 1.0, torch.tensor(True), np.array(1)])
def test_a_truth_of_any_type_is_read(yes):
    assert reading.truth(yes) is True
    assert reading.same(yes, True) and not reading.same(yes, False)


@pytest.mark.parametrize("no_truth", [None, 2, "True", [], math.nan])
def test_what_is_no_truth_is_refused(no_truth):
    with pytest.raises(reading.Unread, match="Expected True or False, found"):
        reading.truth(no_truth)


# --- Sequences of any kind -----------------------------------------------------------------------

SEQUENCES = [
    *([1, 2, 3], (1, 2, 3), range(1, 4), deque([1, 2, 3]), {1: "a", 2: "b", 3: "c"}.keys()),
    *(
        np.array([1, 2, 3]),
        torch.tensor([1.0, 2.0, 3.0]),
        pd.Series([1, 2, 3]),
        pd.Index([1, 2, 3]),
    ),
    [np.int64(1), Fraction(2), torch.tensor(3)],
]


@pytest.mark.parametrize("items", SEQUENCES, ids=lambda items: type(items).__name__)
def test_a_sequence_of_any_kind_is_read(items):
    assert reading.sequence(items) == [1, 2, 3]
    assert reading.same(items, [1, 2, 3]) and reading.same(items, (1.0, 2.0, 3.0))
    assert not reading.same(items, [1, 2]) and not reading.same(items, [1, 3, 2])
    assert reading.same(items, {3, 2, 1})


def test_a_generator_is_read_and_one_without_end_is_refused():
    assert reading.sequence(n for n in (1, 2, 3)) == [1, 2, 3]
    with pytest.raises(reading.Unread, match="does it end"):
        reading.sequence(iter(int, 1))


def test_a_set_is_read_where_the_order_does_not_matter():
    assert sorted(reading.sequence({1, 2}, ordered=False)) == [1, 2]
    assert reading.same({np.int64(1), 2}, {1, 2}) and not reading.same({1}, {1, 2})
    with pytest.raises(reading.Unread, match="a set, which has no order"):
        reading.sequence({1, 2})


@pytest.mark.parametrize(
    "other", ["abc", b"abc", 3, None, {"a": 1}, np.array(1), pd.DataFrame({"a": [1]}), len]
)
def test_what_is_no_sequence_is_refused(other):
    with pytest.raises(reading.Unread, match="Expected a list, found"):
        reading.sequence(other)


def test_as_many_items_as_are_allowed_are_read():
    assert len(reading.sequence(range(reading.LONGEST))) == reading.LONGEST


def test_a_generator_that_raises_is_no_crash():
    with pytest.raises(reading.Unread, match="cannot be read.*ZeroDivisionError"):
        reading.sequence(1 / n for n in (1, 0))


def test_a_mapping_is_read_in_the_order_of_its_keys():
    assert list(reading.mapping({"b": 2, "a": 1}, ["a", "b"])) == ["a", "b"]
    assert reading.mapping(pd.Series({"a": 1}), ["a"]) == {"a": 1}
    assert reading.same({1: 2.0}, {np.int64(1): 2})
    with pytest.raises(reading.Unread, match="Expected the keys 1, 2, found '1'"):
        reading.mapping({"1": 0}, [1, 2])
    with pytest.raises(reading.Unread, match="a dictionary with the keys a, found list"):
        reading.mapping([1], ["a"])


def test_values_are_shown_short():
    assert reading.shown([1 / 3, 2.0, "a"]) == "[0.333333, 2.0, 'a']"
    assert reading.shown((1,)) == "(1,)" and reading.shown({"a": {1}}) == "{'a': {1}}"
    assert reading.shown(torch.tensor([0.5, 1.0])) == "[0.5, 1.0]"
    assert reading.shown(2.4e7) == "2.4e+07" and reading.shown(-math.inf) == "-inf"
    long = reading.shown("x" * 10_000)
    assert len(long) < 250 and " … " in long


# --- Answers that are open -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer", [..., {"a": ...}, [..., (..., ...)], {"a": {"b": [...]}}, {...}, [..., None]]
)
def test_an_answer_that_was_not_touched_is_no_attempt(answer):
    assert frame(lambda answer: right("Yes."))(answer) is NOT_ATTEMPTED


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "Your answer is None. Did you forget `return`? `print` and"),
        ([None], "None in your answer: item 1. Did you forget `return`?"),
        ({"a": 1, "b": {"c": None}}, "None in your answer: b, c."),
    ],
)
def test_where_the_student_sees_none_and_no_dots_the_message_says_none(answer, words):
    verdict = frame(lambda answer: right("Yes."))(answer)
    assert verdict.passed is None and verdict.message.startswith(words)
    assert "..." not in verdict.message


@pytest.mark.parametrize(
    ("answer", "place"),
    [
        ({"a": 1, "b": ...}, "open: b."),
        ([1, [2, ...]], "open: item 2, item 2."),
        ({"a": (1, ...), "b": None}, "open: a, item 2; b."),
        ({1, ...}, "open: item"),
    ],
)
def test_the_open_parts_of_an_answer_are_named(answer, place):
    verdict = frame(lambda answer: right("Yes."))(answer)
    assert verdict.passed is None and place in verdict.message


@pytest.mark.parametrize("answer", [[], {}, 0, "", "...", [0], np.zeros(2), {"a": {"b": 1}}])
def test_what_was_changed_is_an_attempt(answer):
    assert frame(lambda answer: wrong("No."))(answer).passed is False


def test_several_answers_are_open_by_their_names_and_the_rest_is_not_looked_at():
    check = frame(lambda rows, steps, given: right("Yes."), answers=2)
    assert check(..., ..., None) is NOT_ATTEMPTED
    assert "Still open: steps." in check(1, ..., None).message
    assert "Still open: rows." in check(steps=1, rows=..., given=...).message
    assert "None in your answer: steps." in check(1, None, None).message
    assert "None in your answer: rows; steps." in check(None, None, 1).message
    assert check(1, 2, ...)


def test_none_may_be_a_value_and_parts_may_be_left_to_the_check():
    check = frame(lambda answer: right("Yes."), none_is_open=False)
    assert check({"a": None, "b": 1}) and "answer is None" in check(None).message
    check = frame(lambda answer: right("Yes."), parts_may_be_open=True)
    assert check({"a": ..., "b": 1}) and check({"a": ..., "b": ...}) is NOT_ATTEMPTED
    assert check({"a": None, "b": 1})


def test_an_answer_that_holds_itself_is_judged():
    loop: list = [1]
    loop.append(loop)
    assert frame(lambda answer: right("Yes."))(loop)


# --- Errors --------------------------------------------------------------------------------------


def test_a_type_that_cannot_be_read_is_a_wrong_answer():
    verdict = frame(lambda answer: right(str(reading.number(answer))))("x")
    assert verdict.passed is False and verdict.message.startswith("Expected a number")


def test_a_check_that_fails_by_itself_blames_nobody():
    verdict = frame(lambda answer: right(str(1 / 0)))(3)
    assert verdict.passed is None
    assert "check itself failed (ZeroDivisionError" in verdict.message
    assert "test_exercise.py, line " in verdict.message and "please report" in verdict.message


class Unruly(dict):
    """An answer that cannot be looked at."""

    def items(self):
        raise OSError("no")


def test_an_answer_that_cannot_be_looked_at_is_no_crash():
    assert (
        "check itself failed (OSError" in frame(lambda answer: right("Yes."))(Unruly(a=1)).message
    )


def test_a_check_that_is_called_wrongly_says_so_as_python_does():
    with pytest.raises(TypeError, match="missing a required argument: 'given'"):
        frame(lambda answer, given: right("Yes."))(1)


def test_an_interrupt_is_not_caught():
    def interrupted(n):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(interrupted, 1)


def deep(n):
    return deep(n + 1)


def leaves(n):
    raise SystemExit(n)


def divides(n):
    return n / 0


@pytest.mark.parametrize(
    ("function", "error", "line"),
    [
        (deep, "RecursionError", "return deep(n + 1)"),
        (leaves, "SystemExit: 3", "raise SystemExit(n)"),
        (divides, "ZeroDivisionError: division by zero", "return n / 0"),
        (lambda n: int("x"), "ValueError", 'int("x")'),
        (lambda n: (1 / k for k in (n, 0)), "ZeroDivisionError", "(1 / k for k in (n, 0))"),
    ],
)
def test_whatever_a_function_raises_is_caught_and_its_line_is_named(function, error, line):
    verdict = doubling(function)
    assert verdict.passed is False
    assert f"your function raised {error}" in verdict.message
    assert line in verdict.message and " in line " in verdict.message
    assert "n=3" in verdict.message


# --- Functions -----------------------------------------------------------------------------------


@reference
def double(n):
    return 2 * n


def draw(rng, size):
    return (rng.randint(2, 10**size),)


MISTAKES = {"That is the square.": lambda n: n * n, "That adds 2.": lambda n: n + 2}


@frame
def doubling(function):
    compare(function, double, [("Twice three.", (3,)), ("Nothing twice.", (0,))], draw, MISTAKES)
    return right("Twice.")


TWICE = [
    lambda n: n + n,
    lambda n: float(2 * n),
    lambda n: np.int64(2 * n),
    lambda n: torch.tensor(2) * n,
    lambda n, factor=2: factor * n,
    lambda *args: sum(args) * 2,
    lambda n: print("debug") or 2 * n,
]


@pytest.mark.parametrize("function", TWICE)
def test_a_right_function_passes_whatever_number_it_returns(function):
    verdict = doubling(function)
    assert verdict.passed is True, verdict


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda n: None, "returns None: did you forget `return`?"),
        (lambda n: print(2 * n), "prints its answer ('6') and returns None: write `return` in pl"),
        (lambda n: 2 * n if n else None, "Nothing twice. For n=0: expected 0, found None. Did a b"),
        (lambda n: n * n, "That is the square. For n=3: expected 6, found 9."),
        (lambda n: n + 2, "That adds 2. For n=3: expected 6, found 5."),
        (lambda n: 6, "Your function always returns 6. Nothing twice. For n=0: expected 0"),
        (lambda n: 6 if n == 3 else 0, "Right for the stated inputs, not in general. For n="),
        (lambda n: 2 * n + math.nan, "For n=3: expected a number, found NaN"),
        (lambda n: "6", "expected a number, found the text '6'"),
        (lambda n: [2 * n], "expected a number, found list [6]"),
        (lambda n: ValueError("no"), "found ValueError"),
        (lambda: 6, "function of (n), found one of ()"),
        (lambda n, m: 6, "function of (n), found one of (n, m)"),
        (6, "function of (n), found 6"),
        (double(3), "function of (n), found 6. Give its name alone"),
        (double, "calls double of sftlib.checks. Write the answer yourself."),
        (lambda n: double(n), "calls double of sftlib.checks"),
        (lambda n: print("so") or n, "expected 6, found 3. (It printed 'so'.)"),
    ],
)
def test_a_wrong_function_gets_its_likely_cause(function, words):
    verdict = doubling(function)
    assert verdict.passed is False
    assert words in verdict.message


def test_a_right_answer_of_the_checks_cannot_be_reached_past_its_guard():
    assert double(3) == 6 and not hasattr(double, "__wrapped__")


@pytest.mark.parametrize("open_answer", [lambda n: ..., lambda n: (..., ...), lambda n: [...]])
def test_a_function_that_returns_dots_was_not_attempted(open_answer):
    assert doubling(open_answer) is NOT_ATTEMPTED


def test_an_open_part_of_what_a_function_returns_is_named():
    assert "Still open: item 2." in doubling(lambda n: (n, ...)).message


def test_the_smallest_failing_input_is_shown():
    verdict = doubling(lambda n: 2 * n if n < 50 else 2 * n + 1)
    shown_number = int(verdict.message.split("n=")[1].split(":")[0])
    drawn = [n for (n,) in functions.random_inputs(draw) if n >= 50]
    assert len(str(shown_number)) == min(len(str(n)) for n in drawn)


def test_random_inputs_have_several_sizes_and_follow_the_seed(monkeypatch):
    plain = list(functions.random_inputs(draw))
    assert len(plain) == len(functions.SIZES) * functions.ROUNDS and len(functions.SIZES) >= 2
    assert plain == list(functions.random_inputs(draw))
    monkeypatch.setenv("SFT_CHECK_SEED", "autumn")
    assert plain != list(functions.random_inputs(draw))


def test_a_function_made_for_the_usual_inputs_fails_with_another_seed(monkeypatch):
    known = {0: 0, 3: 6} | {n: 2 * n for (n,) in functions.random_inputs(draw)}
    assert doubling(known.get)
    assert not doubling(known.get, seed=7)
    monkeypatch.setenv("SFT_CHECK_SEED", "autumn")
    assert not doubling(known.get)
    assert doubling(known.get, seed=0)


def total(numbers):
    return sum(numbers)


@frame
def summing(function):
    edges = [("One number.", ([4],)), ("None at all.", ([],))]
    compare(function, total, edges, lambda rng, n: ([rng.randint(0, 9) for _ in range(n)],))
    return right("The sum.")


def in_place(numbers):
    found = 0
    while numbers:
        found += numbers.pop()
    return found


def test_a_function_that_changes_its_argument_is_told_so():
    verdict = summing(in_place)
    assert verdict.passed is False
    assert "changes its argument numbers in place" in verdict.message
    assert summing(sum)


def test_the_inputs_of_a_check_stay_as_they_are():
    tensor, numbers = torch.zeros(2), [1, 2]
    outcome = call(lambda a, b: (a.add_(1), b.clear()), tensor, numbers)
    assert outcome.changed == (0, 1)
    assert tensor.tolist() == [0, 0] and numbers == [1, 2]


def checked(n):
    if n < 0:
        raise ValueError("negative")
    return n


@frame
def refusing(function):
    compare(function, checked, [("A number.", (1,)), ("A negative one.", (-1,))])
    return right("It refuses.")


def raises(error):
    raise error


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda n: n, "A negative one. For n=-1: expected a ValueError, found -1"),
        (lambda n: n if n > 0 else ValueError("no"), "as a returned value: `raise` it"),
        (lambda n: n if n > 0 else raises(KeyError("no")), "your function raised KeyError"),
        (lambda n: n if n > 0 else None, "expected a ValueError, found None"),
    ],
)
def test_where_an_error_is_wanted_it_must_be_raised(function, words):
    assert refusing(lambda n: n if n > 0 else raises(ValueError("no")))
    verdict = refusing(function)
    assert verdict.passed is False and words in verdict.message


def test_answers_may_be_read_before_they_are_compared():
    def read(value):
        return bool(reading.sequence(value, ordered=False))

    @frame
    def finds(function):
        compare(function, lambda n: [n] if n > 1 else [], [("", (1,)), ("", (2,))], read=read)
        return right("It does.")

    assert finds(lambda n: ["problem"] if n > 1 else ())
    assert finds(lambda n: (word for word in ["problem"] if n > 1))
    assert "expected a list, found 3" in finds(lambda n: 3).message


def test_of_a_long_text_only_the_difference_is_shown():
    @frame
    def writes(function):
        compare(function, lambda n: "so " * n + "it is.", [("", (50,))])
        return right("It does.")

    assert writes(lambda n: "so " * n + "it is.")
    message = writes(lambda n: "so " * n + "it was.").message
    assert "expected 'is.', found 'was.'" in message and len(message) < 200


def test_a_function_whose_arguments_python_does_not_tell_is_called():
    with pytest.raises(CheckEnds) as end:
        compare(print, total, [("", ([1],))])
    assert "prints its answer" in end.value.verdict.message


def test_a_cause_is_named_within_half_a_percent_and_not_beyond():
    causes = {1.0: "halved", 4.0: "doubled"}
    assert likely_cause(1.004, 2.0, causes) == likely_cause(0.996, 2.0, causes) == "halved"
    assert likely_cause(1.007, 2.0, causes) == likely_cause(3.97, 2.0, causes) == ""
