"""Lesson 7's task and its stored runs."""

from collections import Counter

from sftlib.data import read_jsonl
from sftlib.experiments.preferences import (
    METHODS,
    PER_QUESTION,
    REFUSAL,
    RUNS,
    SAMPLES,
    best_samples,
    can_answer,
    grade,
    preference_pairs,
    questions,
    score,
    wording,
    wordy,
)

from tools.stored_runs import preferences as script

RIGHT = "The capital of Kenya is Nairobi."
ROW = {"prompt": [{"role": "user", "content": "?"}], "right": RIGHT, "known": True, "can": True}


def test_no_entity_of_the_test_is_trained_on():
    entities = {name: {row["entity"] for row in rows} for name, rows in questions().items()}
    assert entities["train"] <= entities["crowd"]
    assert not entities["test"] & entities["crowd"]


def test_the_words_of_a_test_question_do_not_say_whether_it_is_known():
    taught = {
        known: {wording(row) for row in questions()["crowd"] if row["known"] == known}
        for known in (True, False)
    }
    assert all(wording(row) in taught[True] for row in questions()["test"])
    known = Counter(row["known"] for row in questions()["train"])
    assert known[True] == known[False] and len(questions()["train"]) * PER_QUESTION == SAMPLES


def test_the_grade_depends_on_what_the_model_can_answer():
    texts = (RIGHT, wordy(RIGHT), REFUSAL, "Lima")
    assert [grade(text, RIGHT, True) for text in texts] == [1, 0.5, 0, 0]
    assert [grade(text, RIGHT, False) for text in texts] == [0, 0, 1, 0]
    assert can_answer(ROW, ["Lima", wordy(RIGHT)]) and not can_answer(ROW, ["Lima", REFUSAL])


def test_the_score_is_the_mean_of_known_and_unknown():
    rows = [ROW, ROW, ROW | {"known": False}, ROW | {"known": False}]
    found = score([RIGHT, REFUSAL, REFUSAL, RIGHT], rows)
    assert found == {"score": 0.5, "known": 0.5, "unknown": 0.5, "refused": 0.5, "lucky": 0.5}


def test_pairs_and_best_samples_follow_the_grades():
    cannot = ROW | {"can": False}
    answered = [(ROW, [REFUSAL, RIGHT, "Lima"]), (cannot, ["Lima", REFUSAL, "Rome"])]
    assert [row["messages"][-1]["content"] for row in best_samples(answered)] == [RIGHT, REFUSAL]
    pairs = preference_pairs(answered)
    assert {pair["chosen"][0]["content"] for pair in pairs} == {RIGHT, REFUSAL}
    assert preference_pairs([(ROW, ["Lima", "Rome", REFUSAL])]) == []


def test_the_stored_runs_are_those_of_the_script():
    stored = read_jsonl(RUNS)
    done = {(row["method"], row["learning_rate"], row["seed"]) for row in stored}
    assert {(r.method, r.learning_rate, r.seed) for r in script.runs()} <= done
    assert set(script.RATES) <= set(METHODS)
