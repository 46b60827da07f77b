"""Attacks on the checks: wrong answers are refused with their cause, right ones are accepted."""

import importlib
from pathlib import Path

from sftlib import checks
from sftlib.checks import Verdict

import pytest

from tests.attacks import Attacks

MODULES = sorted(path.stem for path in (Path(__file__).parent / "attacks").glob("lesson_*.py"))
ATTACKS: list[Attacks] = [
    attacks
    for name in MODULES
    for attacks in importlib.import_module(f"tests.attacks.{name}").ATTACKS
]
SEEDS = ("", "autumn")  # the usual one, and one that nobody knew when the answers were written


def answers(kind: str) -> list:
    """A parameter for each answer of a kind: the attacks that it belongs to, and the answer."""
    return [
        pytest.param(attacks, answer, id=f"{attacks.check.__name__}-{number}")
        for attacks in ATTACKS
        for number, answer in enumerate(getattr(attacks, kind))
    ]


def _all_dots(answer: object) -> bool:
    return isinstance(answer, tuple) and set(answer) == {...}


def judged(attacks: Attacks, answer: object) -> list[Verdict]:
    """The verdicts with each seed; the answer must stay as it was."""
    before = repr(answer)
    verdicts = [attacks.verdict(answer, seed=seed) for seed in SEEDS]
    assert repr(answer) == before
    return verdicts


@pytest.mark.parametrize(("attacks", "answer"), answers("right"))
def test_a_right_answer_passes(attacks, answer):
    for verdict in judged(attacks, answer):
        assert verdict.passed is True, verdict
        assert repr(verdict).startswith("✓ ")


@pytest.mark.parametrize(("attacks", "attack"), answers("wrong"))
def test_a_wrong_answer_gets_its_cause(attacks, attack):
    answer, hint = attack
    for verdict in judged(attacks, answer):
        assert verdict.passed is False, verdict
        assert hint in verdict.message


@pytest.mark.parametrize(("attacks", "answer"), answers("untouched"))
def test_an_open_answer_is_not_judged(attacks, answer):
    for verdict in judged(attacks, answer):
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
