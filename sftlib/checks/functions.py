"""A student's function, called safely and compared with a right one on many inputs.

`compare` does all of it: stated edge cases first, then random inputs of several sizes, drawn from a
seed. If the two disagree, it looks for the mistake that explains all the answers, and shows the
smallest input on which they differ.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import os
import random
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sftlib.checks.reading import LONGEST, NotFinite, Unread, described, open_parts, same, shown
from sftlib.checks.verdict import NOT_ATTEMPTED, CheckEnds, Verdict, still_open, wrong

SIZES = (1, 2, 3, 5, 8)
ROUNDS = 8  # random inputs of each size
LONG_TEXT = 80  # characters: of a longer text, only where it differs is shown
SEED = ContextVar("SEED", default="")  # what a check was called with; see `exercise`
# What a student's function has called, while it runs. No ContextVar: a thread begins without one.
_called: list[list[str]] = []

Inputs = tuple[Any, ...]
Edges = Sequence[tuple[str, Inputs]]
"""Stated inputs, each with the hint for an answer that is wrong there."""


def current_seed() -> str:
    """The argument `seed` of the check that runs, else the environment's `SFT_CHECK_SEED`, or 0."""
    return SEED.get() or os.environ.get("SFT_CHECK_SEED") or "0"


def random_inputs(
    draw: Callable[[random.Random, int], Inputs], sizes: Sequence[int] = SIZES
) -> Iterator[Inputs]:
    """Inputs of each size; the same seed gives the same ones."""
    seed = current_seed()
    for size in sizes:
        for number in range(ROUNDS):
            yield draw(random.Random(f"{seed}/{size}/{number}"), size)


def reference(function: Callable) -> Callable:
    """A right answer, for the checks alone: a student's function that calls it is found out."""

    @functools.wraps(function)
    def guarded(*args: Any, **options: Any) -> Any:
        if _called:
            _called[-1].append(getattr(function, "__name__", "the answer"))
        return function(*args, **options)

    vars(guarded)["__signature__"] = inspect.signature(function)
    del vars(guarded)["__wrapped__"]  # the way past the guard
    return guarded


@dataclass(frozen=True)
class Outcome:
    """What came of one call of a student's function.

    Attributes:
        value: what it returned, as it was then; the items of a generator are in a list.
        returned: what it returned, which later calls may have changed.
        error: what it raised, and `line`, where in the student's code.
        printed: what it printed.
        changed: the numbers of the arguments that it changed in place, counted from 0.
    """

    value: Any = None
    returned: Any = None
    error: BaseException | None = None
    line: str = ""
    printed: str = ""
    changed: tuple[int, ...] = ()


def call(function: Callable, *args: Any) -> Outcome:
    """Call a student's function on copies of the arguments, whatever it does.

    Everything that it raises is caught, `SystemExit` and `RecursionError` as well; only
    `KeyboardInterrupt` is not, so that an endless loop can be interrupted.

    Raises:
        CheckEnds: the function returns `...`, or calls the right answer of the check.
    """
    given = tuple(map(_separate, args))
    before = [_values(argument) for argument in copy.deepcopy(args)]
    value, error, line, printed, called = None, None, "", io.StringIO(), []
    _called.append(called)
    try:
        with redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = function(*given)
            if isinstance(value, Iterator):
                value = list(islice(value, LONGEST + 1))
    except KeyboardInterrupt:
        raise
    except BaseException as raised:
        error, line = raised, _line(raised, function)
    finally:
        _called.pop()
    if called:
        raise CheckEnds(
            wrong(f"Your function calls {called[0]} of sftlib.checks. Write the answer yourself.")
        )
    places, filled = open_parts(value, none=False)
    if places:
        raise CheckEnds(still_open(places) if filled else NOT_ATTEMPTED)
    pairs = enumerate(zip(given, before, strict=True))
    changed = tuple(number for number, (now, then) in pairs if _values(now) != then)
    then = copy.copy(value) if isinstance(value, list | dict | set) else value
    return Outcome(then, value, error, line, printed.getvalue(), changed)


def _separate(argument: Any) -> Any:
    """A copy; of a text, too, so that `is` does not pass for `==`."""
    return f"{argument} "[:-1] if type(argument) is str else copy.deepcopy(argument)


def _values(argument: Any) -> Any:
    """What two arguments are compared by: an array or tensor has no single ==."""
    return argument.tolist() if hasattr(argument, "tolist") else argument


def _line(error: BaseException, function: Callable) -> str:
    """Where in the student's own code an error was raised; empty if that is not known."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if code and frame.filename == code.co_filename]
    return f" in line {own[-1].lineno}, `{own[-1].line}`" if own else ""


@dataclass(frozen=True)
class Trial:
    """One input, what is right there, and what is wrong with the student's answer, if anything."""

    why: str
    inputs: Inputs
    expected: Any
    outcome: Outcome
    fault: str
    says_all: bool = False  # the fault explains itself, and the hint would lead astray


@dataclass(frozen=True)
class Raises:
    """Stands for a right answer that is no value but an error of this kind."""

    kind: type[BaseException]


def compare(
    function: Any,
    right_one: Callable,
    edges: Edges,
    draw: Callable[[random.Random, int], Inputs] | None = None,
    mistakes: Mapping[str, Callable] | None = None,
    read: Callable[[Any], Any] = lambda value: value,
    relative: float = 1e-6,
    absolute: float = 1e-9,
    sizes: Sequence[int] = SIZES,
    subject: str = "your function",
) -> None:
    """End the check with the likely cause unless a function does what the right one does.

    Args:
        function: the student's.
        right_one: a right answer. The type of what it returns says how the student's answer is read
            (see `reading.same`). If it raises an error, the student's must raise one of its kind.
        edges: stated inputs, from the simplest to the subtlest, each with a hint.
        draw: makes the random inputs, from a generator and a size.
        mistakes: hint → a function with that mistake. The hint is given if the student's function
            answers as this one does on all inputs.
        read: makes of an answer what is compared; it may raise `Unread`.
        relative, absolute: tolerances for floats.
        sizes: of the random inputs.
        subject: how messages call what the student wrote.

    Raises:
        CheckEnds: with the verdict, if the function is not right.
    """
    names = list(inspect.signature(right_one).parameters)
    _refuse_other_arguments(function, names)
    judge = functools.partial(_fault, subject, read, relative, absolute)
    inputs = [*edges, *(("", given) for given in (random_inputs(draw, sizes) if draw else ()))]
    trials, still_open_for = [], []
    for why, given in inputs:
        expected, outcome = _result(right_one, given), _outcome(function, given)
        if outcome is None:
            still_open_for.append(given)
            continue
        says_all = False
        try:
            fault = judge(outcome, expected)
            if not fault:
                fault, says_all = _in_place(outcome, names, subject), True
        except Unread as error:
            said = str(error).rstrip(".")
            fault, says_all = said[0].lower() + said[1:], not isinstance(error, NotFinite)
        trials.append(Trial(why, given, expected, outcome, fault, says_all))
    if still_open_for:
        some = f"Still open: for {_shown_inputs(still_open_for[0], names)} it returns `...`."
        raise CheckEnds(Verdict(None, some) if trials else NOT_ATTEMPTED)
    if any(trial.fault for trial in trials):
        hint = _mistake(trials, mistakes or {}, judge)
        raise CheckEnds(wrong(_message(trials, hint, names)))


def _outcome(function: Callable, given: Inputs) -> Outcome | None:
    """What came of a call; None if the function returned `...`."""
    try:
        return call(function, *given)
    except CheckEnds as end:
        if end.verdict is not NOT_ATTEMPTED:
            raise
        return None


def _refuse_other_arguments(function: Any, names: list[str]) -> None:
    if not callable(function):
        raise Unread(
            f"expected a function of ({', '.join(names)}), found {described(function)}. Give its "
            "name alone, without calling it."
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtin functions do not tell
        return
    try:
        signature.bind(*names)
    except TypeError as error:
        raise Unread(
            f"expected a function of ({', '.join(names)}), found one of {signature}: {error}."
        ) from error
    own = list(signature.parameters)
    if sorted(own) == sorted(names) and own != names:
        raise Unread(
            f"expected a function of ({', '.join(names)}), found the same in another order, "
            f"({', '.join(own)}): a call gives them by their places."
        )


def _result(right_one: Callable, given: Inputs) -> Any:
    """What the right function returns, or `Raises`."""
    try:
        return right_one(*copy.deepcopy(given))
    except Exception as error:
        return Raises(type(error))


def _fault(
    subject: str,
    read: Callable[[Any], Any],
    relative: float,
    absolute: float,
    outcome: Outcome,
    expected: Any,
) -> str:
    """What is wrong with an outcome; empty if nothing is.

    Raises:
        Unread: it is of another kind than expected.
    """
    wanted = f"a {expected.kind.__name__}" if isinstance(expected, Raises) else shown(expected)
    if isinstance(expected, Raises) or outcome.error is not None:
        if outcome.error is None:
            returned = isinstance(outcome.value, BaseException)
            found = "it as a returned value: `raise` it" if returned else shown(outcome.value)
            return f"expected {wanted}, found {found}"
        if isinstance(expected, Raises) and isinstance(outcome.error, expected.kind):
            return ""
        error = f"{type(outcome.error).__name__}: {outcome.error}".removesuffix(": ")
        return f"expected {wanted}, but {subject} raised {error}{outcome.line}"
    if outcome.value is None and expected is not None:
        return f"expected {wanted}, found None"
    if same(read(outcome.value), read(expected), relative, absolute):
        return ""
    return _difference(expected, outcome.value)


def _difference(expected: Any, found: Any) -> str:
    """What was expected and what was found: of long texts and of shapes, only what differs."""
    shapes = [tuple(getattr(value, "shape", ())) for value in (expected, found)]
    if all(shapes) and shapes[0] != shapes[1]:
        return f"expected a result of shape {shapes[0]}, found shape {shapes[1]}"
    if isinstance(expected, str) and isinstance(found, str) and len(expected) > LONG_TEXT:
        return where_they_part(expected, found)
    return f"expected {shown(expected)}, found {shown(found)}"


def where_they_part(expected: str, found: str) -> str:
    """Where two texts begin to differ, and what stands there; tokens and tags stay whole."""
    there, here = (
        re.findall(r"<\|\w+\|>|{%.*?%}|.", text, re.DOTALL) for text in (expected, found)
    )
    n = len(os.path.commonprefix([there, here]))
    before, there, here = (
        "".join(p) for p in (there[:n][-20:], there[n : n + 20], here[n : n + 20])
    )
    return f"after {before!r} expected {there!r}, found {here!r}"


def _in_place(outcome: Outcome, names: Sequence[str], subject: str) -> str:
    """What is wrong with a right answer that changed its arguments; empty if it did not."""
    if not outcome.changed:
        return ""
    changed = ", ".join(names[number] for number in outcome.changed)
    return (
        f"the answer is right, but {subject} changes its argument {changed} in place, and whoever "
        "called it still needs the old one: work on a copy"
    )


def _mistake(
    trials: Sequence[Trial], mistakes: Mapping[str, Callable], judge: Callable[..., str]
) -> str:
    """The hint of the first mistake that explains the student's answers to all inputs."""
    for hint, mistaken in mistakes.items():
        with contextlib.suppress(Unread):
            if all(not judge(t.outcome, _result(mistaken, t.inputs)) for t in trials):
                return hint
    return ""


def _message(trials: Sequence[Trial], hint: str, names: Sequence[str]) -> str:
    """The likely cause, and the input that shows it: the first stated one, or the smallest."""
    failed = [trial for trial in trials if trial.fault]
    smallest = min(failed, key=lambda trial: len(_shown_inputs(trial.inputs, names)))
    shows = next((trial for trial in failed if trial.why), smallest)
    outcomes = [trial.outcome for trial in trials]
    if shows.says_all or all(outcome.error for outcome in outcomes):
        cause = ""
    elif all(outcome.error is None and outcome.value is None for outcome in outcomes):
        cause = _no_return(outcomes)
    elif any(_changed_later(outcome) for outcome in outcomes):
        cause = (
            "What your function returns still holds what earlier calls put there: make it anew in "
            "each call (a default value such as `found=[]` is made only once)."
        )
    elif hint:
        cause = hint
    elif _is_constant(trials):
        cause = f"Your function always returns {shown(outcomes[0].value)}. {shows.why}"
    else:
        cause = shows.why or "Right for the stated inputs, not in general."
    seen = f"For {_shown_inputs(shows.inputs, names)}: {shows.fault}."
    return " ".join(filter(None, (cause.strip(), seen, _remark(shows, trials))))


def _changed_later(outcome: Outcome) -> bool:
    """Whether later calls added to what a call had returned."""
    kept = isinstance(outcome.returned, list | dict | set)
    return kept and len(outcome.returned) != len(outcome.value)


def _remark(shows: Trial, trials: Sequence[Trial]) -> str:
    """What else helps to understand an answer."""
    outcomes = [trial.outcome for trial in trials if trial.outcome.error is None]
    if all(outcome.value is None for outcome in outcomes):
        return ""
    if printed := shows.outcome.printed.strip():
        return f"(It printed {shown(printed, 120)}.)"
    none_is_right = any(trial.expected is None for trial in trials)
    ends = shows.outcome.value is None and shows.outcome.error is None and not none_is_right
    return "Did a branch end without `return`?" if ends else ""


def _no_return(outcomes: Sequence[Outcome]) -> str:
    printed = next((outcome.printed.strip() for outcome in outcomes if outcome.printed), "")
    if printed:
        return (
            f"Your function prints its answer ({shown(printed, 60)}) and returns None: write "
            "`return` in place of `print`."
        )
    return "Your function returns None: did you forget `return`?"


def _is_constant(trials: Sequence[Trial]) -> bool:
    """Whether all answers are the same though the right ones are not."""
    answers = {shown(trial.outcome.value) for trial in trials}
    answers |= {"an error" for trial in trials if trial.outcome.error is not None}
    return len(answers) == 1 and len({shown(trial.expected) for trial in trials}) > 1


def _shown_inputs(inputs: Inputs, names: Sequence[str]) -> str:
    """The arguments by name, those with a shape by their shapes."""
    return ", ".join(
        f"{name} of shape {tuple(value.shape)}"
        if hasattr(value, "shape")
        else f"{name}={shown(value, 160)}"
        for name, value in zip(names, inputs, strict=True)
    )
