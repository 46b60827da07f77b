"""A spread says what the seeds gave, and `beyond` how little three of them prove."""

import itertools

import sftlib.experiments.spread as spread_module
from sftlib.experiments import Spread, over_seeds
from sftlib.experiments.sweep import Run, train_and_measure

import numpy as np
import pandas as pd
import pytest
import torch


def test_a_spread_holds_the_seeds_with_their_mean_and_their_range():
    found = Spread([96.5, 98.0, 97.4])
    assert found.values == (96.5, 98.0, 97.4)
    assert (found.least, found.greatest, found.count) == (96.5, 98.0, 3)
    assert found.mean == pytest.approx(97.3)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([96.5, 98.0, 97.4], "97.3 (96.5 to 98.0, 3 seeds)"),
        ([0.97, 0.98, 0.9651], "0.972 (0.965 to 0.980, 3 seeds)"),
        ([1200, 1250], "1225 (1200 to 1250, 2 seeds)"),
        ([0.00012, 0.00034], "0.000230 (0.000120 to 0.000340, 2 seeds)"),
        ([-1.0, 1.0], "0.00 (-1.00 to 1.00, 2 seeds)"),  # as many digits as the seeds need
        ([0, 0, 0], "0 (0 to 0, 3 seeds)"),
        ([4.25], "4.25 (1 seed)"),
    ],
)
def test_a_spread_is_said_with_its_range_and_the_number_of_seeds(values, said):
    assert str(Spread(values)) == said


def test_a_format_applies_to_the_mean_and_to_the_range():
    found = Spread([0.965, 0.98, 0.974])
    assert f"{found:.1%}" == "97.3% (96.5% to 98.0%, 3 seeds)"
    assert f"{Spread([0.5]):.0%}" == "50% (1 seed)"
    assert f"{found}" == str(found)
    assert f"{100 * found:.1f}" == f"{found * 100:.1f}" == "97.3 (96.5 to 98.0, 3 seeds)"


def test_a_spread_takes_numbers_of_any_library_and_is_a_cell_of_a_table():
    rows = pd.DataFrame({"rate": [1, 1, 2], "dev": [0.5, 0.7, 0.9]})
    by_rate = rows.groupby("rate").dev.agg(Spread)
    assert by_rate[1] == Spread(np.array([0.5, 0.7])) != by_rate[2]
    assert Spread(torch.tensor([0.5, 0.25])) == Spread((0.5, 0.25))
    assert all(type(value) is float for value in Spread(np.float32([1, 2])).values)
    assert "0.600 (0.500 to 0.700, 2 seeds)" in str(by_rate)


@pytest.mark.parametrize("values", [[], [0.5, float("nan")], [float("inf")]])
def test_a_spread_without_seeds_or_with_a_diverged_one_is_refused(values):
    with pytest.raises(ValueError, match="Expected .*, found"):
        Spread(values)


# --- Apart ---------------------------------------------------------------------------------------


def test_settings_differ_beyond_their_spread_where_the_ranges_are_apart():
    low, high, wide = Spread([1, 2, 3]), Spread([4, 5, 6]), Spread([3, 4, 9])
    assert low.beyond(high) and high.beyond(low)
    assert not wide.beyond(high) and not high.beyond(wide)
    assert not low.beyond(wide)  # they touch
    assert not low.beyond(low)


def test_a_number_stands_for_what_no_seed_changes():
    found = Spread([0.5, 0.6, 0.7])
    assert found.beyond(0.4) and found.beyond(0.8)
    assert not found.beyond(0.5) and not found.beyond(0.55)


@pytest.mark.parametrize("few", [[0.5], [0.5, 0.6]])
def test_fewer_than_three_seeds_decide_nothing(few):
    many = Spread([1, 2, 3])
    for one, other in ((many, Spread(few)), (Spread(few), many), (Spread(few), 0.1)):
        with pytest.raises(ValueError, match=f"at least 3 seeds of each, found {len(few)}"):
            one.beyond(other)


@pytest.mark.parametrize(("seeds", "apart", "orders"), [(3, 2, 20), (4, 2, 70), (5, 2, 252)])
def test_by_chance_ranges_are_apart_as_often_as_the_docstring_says(seeds, apart, orders):
    ranks = set(range(2 * seeds))
    splits = [*itertools.combinations(ranks, seeds)]
    found = sum(Spread(one).beyond(Spread(ranks - {*one})) for one in splits)
    assert (found, len(splits)) == (apart, orders)
    assert f"{apart} of the {orders}" in Spread.beyond.__doc__


def test_three_seeds_miss_most_small_differences_as_the_docstring_says():
    drawn = np.random.default_rng(0).normal(size=(1000, 2, 3)) + [[[0.0], [1.0]]]
    share = np.mean([Spread(one).beyond(Spread(other)) for one, other in drawn])
    assert share == pytest.approx(1 / 4, abs=0.04)
    assert "in one comparison of four" in " ".join(Spread.beyond.__doc__.split())


# --- Running -------------------------------------------------------------------------------------


def test_each_seed_runs_once_in_order_with_a_bar(monkeypatch):
    bars, ran = [], []
    monkeypatch.setattr(spread_module, "progress_bar", lambda x, **how: bars.append(how) or x)
    found = over_seeds(lambda seed: ran.append(seed) or seed / 10, seeds=(3, 1, 2))
    assert found == Spread([0.3, 0.1, 0.2]) and ran == [3, 1, 2]
    assert bars == [{"unit": "seed"}]
    assert over_seeds(float).values == (0, 1, 2)


@pytest.mark.parametrize("kind", [dict, pd.Series])
def test_a_run_may_measure_several_things(kind):
    found = over_seeds(lambda seed: kind({"dev": seed, "heldout": 2 * seed}), range(1, 4))
    assert found == {"dev": Spread([1, 2, 3]), "heldout": Spread([2, 4, 6])}


def test_one_seed_twice_is_no_second_seed():
    with pytest.raises(ValueError, match=r"different seeds, found \[0, 0, 1\]"):
        over_seeds(float, [0, 0, 1])
    with pytest.raises(ValueError, match="at least one"):
        over_seeds(float, [])


@pytest.mark.integration
def test_the_seeds_of_a_training_differ():
    def measured(seed):
        run = Run(5e-4, examples=32, seed=seed)
        return train_and_measure(run, prompts=2, texts=["Kenya is in Africa.", "So is Chad."])

    found = over_seeds(measured, range(2))
    assert found["steps"] == Spread([2, 2])
    assert found["loss"].least < found["loss"].greatest
