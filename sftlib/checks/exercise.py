"""What all checks have in common: each answer gets a verdict, whatever it is and does.

A check is a function of an answer that returns a `Verdict`; `@exercise` gives it its place in the
course, and the following:

- An answer that is still `...` was not attempted; if a part of it is, the verdict names that part.
  For None, the verdict asks whether a `return` is missing.
- A wrong type is no error but a verdict that says what was expected (see `reading`).
- `seed`, an argument of every check, or the environment's `SFT_CHECK_SEED`, draws other random
  inputs for the answers that are functions (see `functions`). It also seeds the trainings of
  `held_out.beats`. To grade, set a seed that students do not know: `SFT_CHECK_SEED=autumn`.
- A check that fails by itself says so, and blames nobody.

A check runs beside the answer in one process, so it is no defence against a student who rewrites
it. To grade, run the answers again, with your own copy of `sftlib` and your own seed.
"""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path

from sftlib.checks.functions import SEED
from sftlib.checks.progress import enter, note
from sftlib.checks.reading import Unread, open_parts, shown
from sftlib.checks.verdict import NOT_ATTEMPTED, CheckEnds, Verdict, is_none, still_open, wrong

Check = Callable[..., Verdict]


def exercise(
    lesson: int,
    number: int,
    task: str,
    answers: int = 1,
    none_is_open: bool = True,
    parts_may_be_open: bool = False,
) -> Callable[[Check], Check]:
    """A decorator for the check of an exercise; a right answer is recorded for `progress`.

    Args:
        lesson, number: its place in the course.
        task: what it asks for, in a few words.
        answers: how many of the check's arguments are the student's, from the first on.
        none_is_open: whether None inside an answer counts as not attempted, as `...` does.
        parts_may_be_open: whether the check itself judges an answer of which some parts are open.
    """

    def decorate(check: Check) -> Check:
        enter(lesson, number, task)
        check.__doc__ = f"Lesson {lesson}, exercise {number}: {task}."
        signature = inspect.signature(check)

        @judged
        def judge(*args, **options) -> Verdict:
            given = list(signature.bind(*args, **options).arguments.items())
            found = _open(dict(given[:answers]), none_is_open, parts_may_be_open)
            return check(*args, **options) if found is None else found

        @functools.wraps(check)
        def recording(*args, **options) -> Verdict:
            if set(options) <= {"seed"} and 0 < len(args) < answers:
                names = list(signature.parameters)[:answers]
                return _too_few(names, args)
            signature.bind(*args, **{n: v for n, v in options.items() if n != "seed"})
            verdict = judge(*args, **options)
            if verdict:
                note(lesson, number)
            return verdict

        return recording

    return decorate


def judged(check: Check) -> Check:
    """The check, with a verdict in place of every error, and with the argument `seed`.

    Inside another check, such as `beats` in a lesson's own, the outer check's seed stays in force
    where no other seed is given.
    """

    @functools.wraps(check)
    def judge(*args, seed: object = "", **options) -> Verdict:
        token = SEED.set(str(seed) or SEED.get())
        try:
            return check(*args, **options)
        except CheckEnds as end:
            return end.verdict
        except Unread as unread:
            return wrong(str(unread))
        except Exception as error:
            return _own_failure(error)
        finally:
            SEED.reset(token)

    return judge


def _too_few(names: list[str], given: tuple) -> Verdict:
    wanted = f"{', '.join(names[:-1])} and {names[-1]}"
    found = ", ".join(map(shown, given))
    return wrong(f"Expected {len(names)} answers, {wanted}, found {len(given)}: {found}.")


def _open(answers: dict, none_is_open: bool, parts_may_be_open: bool) -> Verdict | None:
    """The verdict on answers that are open, in all parts or in some; None if they are not."""
    named = {name: ... if value is None else value for name, value in answers.items()}
    given, whole = (
        found if len(found) > 1 else next(iter(found.values())) for found in (answers, named)
    )
    places, filled = open_parts(whole, none_is_open)
    if not places or (filled and parts_may_be_open):
        return None
    if not open_parts(given, none=False)[0]:  # the student sees no `...`
        return is_none(places)
    return still_open(places) if filled else NOT_ATTEMPTED


def _own_failure(error: Exception) -> Verdict:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"in {Path(frame.filename).name}, line {frame.lineno}"
    return Verdict(
        None,
        f"The check itself failed ({type(error).__name__}: {error}, {where}). Your answer was not "
        "judged, and this is not your mistake: please report it, with your answer.",
    )
