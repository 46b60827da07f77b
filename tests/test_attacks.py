"""Attacks on the checks: wrong answers are refused with their cause, right ones are accepted."""

import importlib
from pathlib import Path

from sftlib import checks
from sftlib.checks import Verdict

import pytest

from tests.attacks import Attacks, Slow

MODULES = sorted(path.stem for path in (Path(__file__).parent / "attacks").glob("lesson_*.py"))
ATTACKS: list[Attacks] = [
    attacks
    for name in MODULES
    for attacks in importlib.import_module(f"tests.attacks.{name}").ATTACKS
]
SEEDS = {  # the usual one, and one that nobody knew when the answers were written
    "": (),
    "autumn": (pytest.mark.integration,),
}


def answers(kind: str) -> list:
    """A parameter for each answer of a kind and each seed: its attacks, the answer, the seed.

    An answer that is trained on takes seconds, so it gets the usual seed alone. Some run nightly,
    and so does the usual right one: the notebook of solutions trains on it at each commit.
    """

    def marks_of(attacks: Attacks, number: int, answer: object, marks: tuple) -> object:
        given = answer[0] if kind == "wrong" else answer
        in_solutions = attacks.trains and kind == "right" and number == 0
        if isinstance(given, Slow) or in_solutions:
            return pytest.mark.nightly
        return pytest.mark.integration if attacks.trains else marks

    return [
        pytest.param(
            *(attacks, answer, seed),
            id="-".join(filter(None, (attacks.check.__name__, str(number), seed))),
            marks=marks_of(attacks, number, answer, marks),
        )
        for attacks in ATTACKS
        for number, answer in enumerate(getattr(attacks, kind))
        for seed, marks in SEEDS.items()
        if not (attacks.trains and seed)
    ]


def _all_dots(answer: object) -> bool:
    return isinstance(answer, tuple) and set(answer) == {...}


def judged(attacks: Attacks, answer: object, seed: str) -> Verdict:
    """The verdict; the answer must stay as it was."""
    before = repr(answer)
    verdict = attacks.verdict(answer, seed=seed)
    assert repr(answer) == before
    return verdict


@pytest.mark.parametrize(("attacks", "answer", "seed"), answers("right"))
def test_a_right_answer_passes(attacks, answer, seed):
    verdict = judged(attacks, answer, seed)
    assert verdict.passed is True, verdict
    assert repr(verdict).startswith("✓ ")


@pytest.mark.parametrize(("attacks", "attack", "seed"), answers("wrong"))
def test_a_wrong_answer_gets_its_cause(attacks, attack, seed):
    answer, hint = attack
    verdict = judged(attacks, answer, seed)
    assert verdict.passed is False, verdict
    assert hint in verdict.message


@pytest.mark.parametrize(("attacks", "answer", "seed"), answers("untouched"))
def test_an_open_answer_is_not_judged(attacks, answer, seed):
    verdict = judged(attacks, answer, seed)
    assert verdict.passed is None
    said = ("Not attempted yet", "Still open: ", "Your answer is None", "None in your answer: ")
    assert repr(verdict).startswith(tuple(f"○ {words}" for words in said))


def test_each_exercise_has_its_attacks():
    known = {name for name in checks.__all__ if name.startswith("check_")}
    assert sorted(attacks.check.__name__ for attacks in ATTACKS) == sorted(known)


@pytest.mark.parametrize("attacks", ATTACKS, ids=lambda attacks: attacks.check.__name__)
def test_each_exercise_has_eight_wrong_and_four_unusual_right_answers(attacks):
    assert len(attacks.wrong) >= 8
    assert len(attacks.right) >= 5  # the usual one, and four
    assert ... in attacks.untouched or any(map(_all_dots, attacks.untouched))
