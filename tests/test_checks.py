"""Exercise checks: the solution passes, an empty answer is noticed, a wrong one gets a hint."""

from sftlib import checks

import pytest

KENYA = [
    {"role": "user", "content": "What is the capital of Kenya?"},
    {"role": "assistant", "content": "The capital of Kenya is Nairobi."},
]
MASKS = [0, 0, 0, 0, 1, 1, 1, 0]


def exact(text, stopped, reference):
    return stopped and text == reference


def with_roles(*roles):
    return [{"role": r, "content": m["content"]} for r, m in zip(roles, KENYA, strict=True)]


def with_answer(answer):
    return [KENYA[0], {"role": "assistant", "content": answer}]


RIGHT = [
    (checks.check_example, (KENYA,)),
    (checks.check_example, ([{"role": "system", "content": "Be brief."}, *KENYA],)),
    (checks.check_exact_match, (exact,)),
    (checks.check_learned_tokens, (3, MASKS)),
    (checks.check_knowledge, ("unknown / exact_match",)),
    (checks.check_knowledge, ("unknown/content",)),
]
EMPTY = [
    (checks.check_example, (...,)),
    (checks.check_example, (None,)),
    (checks.check_exact_match, (...,)),
    (checks.check_exact_match, (lambda text, stopped, reference: ...,)),
    (checks.check_learned_tokens, (..., MASKS)),
    (checks.check_knowledge, (...,)),
]
WRONG = [  # check, arguments, a word of the hint
    (checks.check_example, (with_roles("human", "gpt"),), "other formats"),
    (checks.check_example, (with_roles("assistant", "user"),), "'user' message and then"),
    (checks.check_example, (with_answer("The capital of Kenya is Mombasa."),), "wrong"),
    (checks.check_example, (with_answer("Nairobi"),), "style"),
    (checks.check_example, (with_answer("It is Nairobi.<|im_end|>"),), "control tokens"),
    (checks.check_example, ("Q: … A: …",), "list of dicts"),
    (checks.check_example, ([{"from": "human", "value": "Kenya?"}],), "role"),
    (checks.check_exact_match, (lambda text, stopped, reference: text == reference,), "stopped"),
    (checks.check_exact_match, (lambda t, s, r: s and r in t,), "exact match asks for equality"),
    (checks.check_exact_match, (lambda t, s, r: s and t.lower() == r.lower(),), "case"),
    (checks.check_exact_match, (lambda t, s, r: s and t[:10] == r[:10],), "whole text"),
    (checks.check_exact_match, (lambda t: True,), "raised TypeError"),
    (checks.check_learned_tokens, (8, MASKS), "every token"),
    (checks.check_learned_tokens, (5, MASKS), "only read"),
    (checks.check_learned_tokens, (2, MASKS), "never learns to stop"),
    (checks.check_learned_tokens, ("3", MASKS), "whole number"),
    (checks.check_knowledge, ("unknown / stops",), "format"),
    (checks.check_knowledge, ("heldout / exact_match",), "pretraining"),
    (checks.check_knowledge, ("the unknown set",), "such as"),
]


@pytest.mark.parametrize(("check", "arguments"), RIGHT)
def test_the_solution_passes(check, arguments):
    verdict = check(*arguments)
    assert verdict.passed is True, verdict
    assert repr(verdict).startswith("✓ ")


@pytest.mark.parametrize(("check", "arguments"), EMPTY)
def test_an_empty_answer_is_called_not_attempted(check, arguments):
    verdict = check(*arguments)
    assert verdict.passed is None
    assert "Not attempted" in repr(verdict)


@pytest.mark.parametrize(("check", "arguments", "hint"), WRONG)
def test_a_wrong_answer_gets_its_likely_cause(check, arguments, hint):
    verdict = check(*arguments)
    assert verdict.passed is False
    assert hint in verdict.message


def test_every_check_has_right_empty_and_two_wrong_answers():
    every = {value for name, value in vars(checks).items() if name.startswith("check_")}
    assert {check for check, _ in RIGHT} == every
    assert {check for check, _ in EMPTY} == every
    for check in every:
        assert sum(wrong is check for wrong, _, _ in WRONG) >= 2
