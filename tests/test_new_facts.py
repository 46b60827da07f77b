"""Facts that the base model has never read, added to the SFT data (lesson 1)."""

from collections import Counter
from dataclasses import fields

from sftlib import models
from sftlib.data import read_facts, read_jsonl
from sftlib.experiments.new_facts import (
    Teaching,
    divided,
    read_before,
    reworded,
    teach_and_measure,
    wordings,
)

import pytest

from tools.stored_runs import new_facts as script


def facts_of(rows):
    return {(row["entity"], row["relation"], row["value"]) for row in rows}


def test_what_is_taught_and_what_is_not_share_no_entity():
    teachable, others = divided()
    assert facts_of(teachable) | facts_of(others) == facts_of(read_facts("unknown"))
    assert len(teachable) + len(others) == len(facts_of(read_facts("unknown")))  # one row each
    assert not {row["entity"] for row in teachable} & {row["entity"] for row in others}
    assert len(teachable) >= max(run.facts for run in script.stored())
    assert divided() == (teachable, others)


def test_the_control_has_facts_of_the_same_kinds_that_the_base_has_read():
    teachable, _ = divided()
    known = read_before(like=teachable[:24])
    kinds = [Counter(row["relation"] for row in rows) for rows in (known, teachable[:24])]
    assert kinds[0] == kinds[1]
    assert facts_of(known) < facts_of(read_facts("dev"))
    assert not {row["entity"] for row in known} & {row["entity"] for row in read_facts("sft")}
    with pytest.raises(ValueError, match="opposite"):
        read_before(like=[{"relation": "opposite"}] * 99)


def test_wordings_are_those_of_the_rows():
    seen, unseen = wordings(read_facts("sft")), wordings(read_facts("heldout_wordings"))
    assert {len(ways) for ways in seen.values()} == {14}
    for relation, ways in unseen.items():
        assert ways and not set(ways) & set(seen[relation])
    assert "Which city is the capital of {e}?" in seen["capital"]
    assert all(way.count("{e}") == 1 for ways in seen.values() for way in ways)


def test_a_fact_is_asked_for_in_as_many_wordings_as_named():
    seen, (teachable, _) = wordings(read_facts("sft")), divided()
    rows = reworded(teachable[:3], seen, 5, seed=1)
    questions = [row["messages"][0]["content"] for row in rows]
    assert len(set(questions)) == 15 and facts_of(rows) == facts_of(teachable[:3])
    for row, question in zip(rows, questions, strict=True):
        assert row["entity"] in question
        assert row["messages"][1]["content"].endswith(f"{row['value']}.")
    assert reworded(teachable[:3], seen, 5, seed=2) != rows
    with pytest.raises(ValueError, match="at most 14"):
        reworded(teachable[:1], seen, 15, seed=0)


def test_the_stored_runs_are_those_of_the_script():
    names = [field.name for field in fields(Teaching)]
    stored = [Teaching(**{n: row[n] for n in names}) for row in read_jsonl(script.RUNS)]
    assert stored == script.stored()


@pytest.mark.integration
def test_a_run_measures_what_was_taught_and_what_was_not():
    found = teach_and_measure(Teaching(facts=8, wordings=7, repeats=2))
    assert found["steps"] == (480 + 8 * 14) / 16
    assert found["taught"] > 0.5 > 0.05 >= found["others"]
    assert found["heldout_content"] >= found["heldout"] > 0.9 < found["heldout_cloze"]
    assert found["taught_cloze"] > 0.1 and found["others_named"] > 0.5
    with pytest.raises(ValueError, match="at most"):
        teach_and_measure(Teaching(facts=99))


def test_all_teachable_facts_may_be_taught_and_not_one_more(monkeypatch):
    class Trains(Exception):
        """It would train now."""

    def load():
        raise Trains

    monkeypatch.setattr(models, "load", load)
    count = len(divided()[0])
    with pytest.raises(Trains):
        teach_and_measure(Teaching(facts=count))
    with pytest.raises(ValueError, match=f"at most {count} facts, found {count + 1}"):
        teach_and_measure(Teaching(facts=count + 1))
