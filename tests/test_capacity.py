"""Random facts, learned by heart: what is stored in an adapter (lesson 4)."""

from dataclasses import asdict, fields

from sftlib.data import read_jsonl
from sftlib.experiments import capacity
from sftlib.experiments.capacity import Storing, encoded, facts, recall, store_and_measure, tuned
from sftlib.experiments.sweep import sweep

import pandas as pd
import pytest

from tools.stored_runs import capacity as script


def test_facts_are_made_up_and_each_word_is_one_token(tiny):
    _, tokenizer = tiny
    pairs = facts(300, tokenizer, seed=1)
    names, words = zip(*pairs, strict=True)
    assert len(set(names)) == 300 and all(name.isalpha() for name in names)
    assert all(len(tokenizer(word)["input_ids"]) == 1 for word in words)
    assert len(set(words)) > 100
    assert pairs == facts(300, tokenizer, seed=1) != facts(300, tokenizer, seed=2)
    assert 2 ** capacity.bits(tokenizer) == pytest.approx(len(capacity.words(tokenizer)))


def test_the_loss_is_on_the_word_alone(tiny):
    _, tokenizer = tiny
    [row] = encoded([("Zarbek", "window")], tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "Zarbek:window"
    learned = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(learned) == "window" and len(row["labels"]) == len(row["input_ids"])


def test_recall_counts_the_most_probable_words(tiny):
    model, tokenizer = tiny
    pairs = facts(40, tokenizer)
    share, loss = recall(model, tokenizer, pairs)
    assert share < 0.2 and loss > 2  # nothing was trained


@pytest.mark.parametrize(
    ("best", "rates"), [(2, [1, 2, 4]), (8, [1, 2, 4, 8, 20]), (0.5, [0.2, 0.5, 1, 2, 4])]
)
def test_a_search_goes_on_until_the_best_rate_is_inside(best, rates):
    def measure(runs):
        return [{"stored": 0.5, "loss": abs(run.learning_rate - best)} for run in runs]

    found, runs = tuned(Storing(0, r=4), (1, 2, 4), measure)
    assert (found, [run.learning_rate for run in runs]) == (best, rates)
    assert {run.r for run in runs} == {4}


def test_a_search_with_several_seeds_goes_by_their_mean():
    shares = {1.0: (0.9, 0.1, 0.1), 1.4: (0.3, 0.6, 0.6), 2.0: (0.2, 0.2, 0.2)}

    def measure(runs):
        return [{"stored": shares[run.learning_rate][run.seed], "loss": 1.0} for run in runs]

    best, runs = tuned(Storing(0, r=4), (1.0, 1.4, 2.0), measure, (0, 1, 2), 2**0.5)
    assert best == 1.4 and len(runs) == 9

    def rising(runs):
        return [{"stored": min(run.learning_rate, 4), "loss": run.learning_rate} for run in runs]

    best, runs = tuned(Storing(0, r=4), (1.0, 1.4, 2.0), rising, (0, 1), 2**0.5)
    assert best == 4.0 and sorted({run.learning_rate for run in runs}) == [1, 1.4, 2, 2.8, 4, 5.7]


def test_the_best_rate_is_among_those_with_all_seeds():
    rows = [(1, 0, 0.9, 1), (2, 0, 0.5, 3), (2, 1, 0.5, 3), (4, 0, 0.3, 1), (4, 1, 0.7, 2)]
    found = pd.DataFrame(rows, columns=["learning_rate", "seed", "stored", "loss"])
    assert list(capacity.at_best(found).learning_rate) == [4, 4]


def test_each_setting_has_its_best_rate_inside_its_grid():
    found = pd.DataFrame(read_jsonl(script.RUNS))
    settings = list(found.groupby(["r", "embeddings", "epochs", "batch"]))
    assert len(settings) == len(script.studies())
    for (r, _, epochs, _), tried in settings:
        best = capacity.at_best(tried).learning_rate.iloc[0]
        assert tried.learning_rate.min() < best < tried.learning_rate.max()
        if Storing(0, r=r, epochs=epochs) in script.NARROW:
            whole = tried.groupby("learning_rate").seed.nunique()
            rates = [*whole[whole == len(script.SEEDS)].index]
            assert rates[0] < best < rates[-1]


def test_the_stored_runs_are_those_of_the_script():
    names = [field.name for field in fields(Storing)]
    rows = {Storing(**{n: row[n] for n in names}): row for row in read_jsonl(script.RUNS)}
    assert list(rows) == script.runs(lambda some: [rows[run] for run in some])


@pytest.mark.integration
def test_a_run_stores_a_few_facts(tmp_path):
    [row] = sweep([Storing(1e-3, facts=32, epochs=30)], tmp_path / "runs.jsonl", store_and_measure)
    assert row["steps"] == 30 and row["stored"] > 0.8 and row["loss"] < 2
    assert asdict(Storing(1e-3, facts=32, epochs=30)).items() <= row.items()
