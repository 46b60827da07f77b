"""Exercise checks: the solution passes, an empty answer is noticed, a wrong one gets a hint."""

import json
import re

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


def validate(question, answer):
    texts = question.strip(), answer.strip()
    found = ["empty"] if not texts[1] else []
    found += ["repeats"] if texts[0].lower() == texts[1].lower() else []
    return found + (["control token"] if "<|" in question + answer else [])


def parse(text, keys=(("question", "answer"), ("instruction", "response"))):
    try:
        data = json.loads(re.search(r"[\[{].*[\]}]", text, re.DOTALL)[0])
    except (ValueError, TypeError):
        return []
    items = data if isinstance(data, list) else [data]
    return [(i[q], i[a]) for i in items for q, a in keys if q in i]


RIGHT = [
    (checks.check_validator, (validate,)),
    (checks.check_parser, (parse,)),
    (checks.check_leaks, ({1, 3},)),
    (checks.check_leaks, ([3, 1],)),
    (checks.check_cost, (4.67,)),
    (checks.check_cost, (280 / 60,)),
    (checks.check_example, (KENYA,)),
    (checks.check_example, ([{"role": "system", "content": "Be brief."}, *KENYA],)),
    (checks.check_exact_match, (exact,)),
    (checks.check_learned_tokens, (3, MASKS)),
    (checks.check_knowledge, ("unknown / exact_match",)),
    (checks.check_knowledge, ("unknown/content",)),
]
EMPTY = [
    (checks.check_validator, (...,)),
    (checks.check_validator, (lambda question, answer: ...,)),
    (checks.check_parser, (...,)),
    (checks.check_parser, (lambda text: ...,)),
    (checks.check_leaks, (...,)),
    (checks.check_cost, (...,)),
    (checks.check_example, (...,)),
    (checks.check_example, (None,)),
    (checks.check_exact_match, (...,)),
    (checks.check_exact_match, (lambda text, stopped, reference: ...,)),
    (checks.check_learned_tokens, (..., MASKS)),
    (checks.check_knowledge, (...,)),
]
WRONG = [  # check, arguments, a word of the hint
    (checks.check_validator, (lambda q, a: [] if a.strip() else ["empty"],), "is the question"),
    (checks.check_validator, (lambda q, a: ["empty"] * (not a),), "spaces and line breaks"),
    (checks.check_validator, (lambda q, a: ["bad"],), "nothing wrong"),
    (checks.check_validator, (lambda q, a: validate(q, a) + ["quotes"] * (q in a),), "quote"),
    (checks.check_validator, (lambda q, a: validate("", a),), "that is the question"),
    (checks.check_validator, (lambda q, a: validate(q, a) + ["x"] * ("<" in a),), "no control"),
    (checks.check_validator, (lambda q, a: True,), "list of problems"),
    (checks.check_validator, (lambda q: [],), "raised TypeError"),
    (checks.check_parser, (lambda text: json.loads(text) and parse(text),), "code fence"),
    (checks.check_parser, (lambda text: parse(text, (("question", "answer"),)),), "instruction"),
    (checks.check_parser, (lambda text: parse(text)[:1],), "Both kinds"),
    (checks.check_leaks, ({1, 2, 3},), "another country"),
    (checks.check_leaks, ({1, 3, 4},), "another fact"),
    (checks.check_leaks, ({1},), "the question inside"),
    (checks.check_leaks, ({3},), "the same answer"),
    (checks.check_leaks, (5,), "set of numbers"),
    (checks.check_cost, (2.8,), "6,000 would be usable"),
    (checks.check_cost, (1.68,), "divide"),
    (checks.check_cost, (28 / 6 * 1e6,), "for a million"),
    (checks.check_cost, (4 / 3,), "prompt costs too"),
    (checks.check_cost, (10 / 3,), "writes costs"),
    (checks.check_cost, (13.667,), "wrong way round"),
    (checks.check_cost, ("4.67",), "Expected a number"),
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
