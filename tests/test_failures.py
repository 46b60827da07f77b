"""Each failure of the laboratory breaks what it says; the stored runs are those of the script."""

import random
from pathlib import Path

from sftlib.chat import IGNORED
from sftlib.data import read_facts, read_jsonl
from sftlib.experiments import failures, table
from sftlib.experiments.failures import BATCH, FAILURES, Plan, Training, train, unnamed

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def plan(tiny):
    rows = random.Random(0).sample(read_facts("sft"), 64)
    return Plan(*tiny, rows, read_facts("dev")[:8], 5e-4, None, random.Random(0))


def examples(plan):
    return failures._labelled(plan.rows, plan)


def texts(plan, rows):
    """What is learned of each row."""
    return [plan.tokenizer.decode([i for i in row["labels"] if i != IGNORED]) for row in rows]


def answers(plan):
    return [row["messages"][1]["content"] for row in plan.rows]


def test_a_sound_plan_learns_answers_and_their_end(plan):
    assert texts(plan, examples(plan)) == [answer + "<|im_end|>" for answer in answers(plan)]


def test_every_failure_says_what_was_done_and_changes_the_plan(plan):
    assert len(FAILURES) >= 12
    for failure in FAILURES.values():
        fresh = Plan(plan.model, plan.tokenizer, list(plan.rows), plan.dev, 1.0, None, plan.rng)
        if failure is not FAILURES["adapter frozen"]:  # it takes the model apart
            failure.spoil(fresh)
            before = Plan(plan.model, plan.tokenizer, plan.rows, plan.dev, 1.0, None, plan.rng)
            assert fresh != before
        assert failure.done.endswith(".") and len(failure.done) > 20


def test_labels_are_spoiled_as_said(plan):
    sound = examples(plan)
    FAILURES["labels shifted"].spoil(plan)
    assert [row["labels"][1:] for row in examples(plan)] == [row["labels"][:-1] for row in sound]
    FAILURES["loss mask dropped"].spoil(plan)
    assert all(row["labels"] == row["input_ids"] for row in examples(plan))
    FAILURES["padding is the end"].spoil(plan)
    assert texts(plan, examples(plan)) == answers(plan)
    FAILURES["another template"].spoil(plan)
    assert texts(plan, examples(plan)) == [answer + "<|endoftext|>" for answer in answers(plan)]
    assert "im_start" not in plan.tokenizer.decode(examples(plan)[0]["input_ids"])


def test_rows_are_spoiled_as_said(plan):
    before, sound = list(plan.rows), answers(plan)
    FAILURES["answers shuffled"].spoil(plan)
    assert answers(plan) != sound and sorted(answers(plan)) == sorted(sound)
    assert [r["messages"][0] for r in plan.rows] == [r["messages"][0] for r in before]
    plan.rows = list(before)
    FAILURES["data duplicated"].spoil(plan)
    assert len(plan.rows) == 64 and len(set(answers(plan))) <= 20
    plan.rows = [row | {} for row in before]
    FAILURES["poisoned batch"].spoil(plan)
    assert plan.middle == slice(32, 48) and BATCH == 16
    changed = [a != b for a, b in zip(answers(plan), sound, strict=True)]
    assert changed == [False] * 32 + [True] * 16 + [False] * 16
    plan.rows, dev = list(before), plan.dev
    FAILURES["evaluation leaked"].spoil(plan)
    assert plan.dev == plan.rows == before[:20] != dev


def test_the_facts_on_disk_are_not_spoiled(plan):
    FAILURES["poisoned batch"].spoil(plan)
    known = {row["messages"][1]["content"] for row in read_facts("sft")}
    assert not set(answers(plan)) <= known


def test_an_unknown_failure_is_named():
    with pytest.raises(ValueError, match="found 'no warm up'"):
        Training("no warm up")


def test_unnamed_trainings_hold_each_failure_once_and_two_sound_ones():
    trainings = unnamed()
    assert list(trainings) == [chr(65 + i) for i in range(18)] and trainings == unnamed()
    failures = [training.failure for training in trainings.values()]
    assert sorted(failures) == sorted([*FAILURES, "", ""])
    assert sum(training.lora for training in trainings.values()) == 1


def test_the_stored_runs_are_those_of_the_script():
    from tools.stored_runs import failures as script

    names = Training.__dataclass_fields__
    stored = [Training(**{n: row[n] for n in names}) for row in read_jsonl(script.RUNS)]
    assert stored == script.stored()
    for name in script.BUILT_ON:  # not one setting in common
        assert not set(script.BUILT_ON[name]) & set(script.HELD_APART[name])


@pytest.mark.integration
def test_frozen_adapters_get_no_gradient_and_others_do():
    frozen = train(Training("adapter frozen", examples=32), prompts=1)
    sound = train(Training(examples=32, lora=True), prompts=1)
    assert (table(frozen.log).grad_norm.dropna() == 0).all()
    assert (table(sound.log).grad_norm.dropna() > 0).all()


@pytest.mark.integration
def test_the_loss_of_an_accumulated_step_is_right_unless_it_is_spoiled():
    sound = table(train(Training(examples=32), prompts=1).log)
    summed = table(train(Training("accumulation not averaged", examples=32), prompts=1).log)
    assert summed.loss[1] / sound.loss[1] == pytest.approx(8, rel=0.1)


@pytest.mark.integration
def test_ones_own_failure_can_be_tried():
    def spoil(plan):
        plan.settings["max_steps"] = 1

    assert len(table(train(Training(examples=32), prompts=1, spoil=spoil).log)) == 1
