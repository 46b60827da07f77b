"""What the check of lesson 5's launch says of two ranks, without starting them."""

from sftlib.checks import two_ranks

import pytest

LOSSES = [1.5, 1.25, 1.0, 0.75, 0.5, 0.25]


def rows(first=None, second=None, **changes):
    """What two ranks say that did as one process does; with changes, on both."""
    right = {"exercise": "done", "losses": LOSSES, "held_out": 2.0, "stage": 2}
    right |= {"accumulation": 2, "clipping": 1.0, **changes}
    return {0: right | (first or {}), 1: right | (second or {})}


def differs(by_rank):
    return two_ranks._differs(by_rank, LOSSES, held_out=2.0)


def test_what_one_process_does_is_right_up_to_rounding():
    assert differs(rows()) == differs(rows(losses=[loss + 9e-6 for loss in LOSSES])) == ""


@pytest.mark.parametrize(
    ("by_rank", "said"),
    [
        (rows(stage=0), "ZeRO stage 0, not 2"),
        (rows(losses=LOSSES[:5]), "a loss for each of 6 steps, found 5"),
        (rows(accumulation=1), "takes 1 micro-batches before it updates, one process 2"),
        (rows(clipping=0), "clips gradients at 0 (0: not at all), one process at 1"),
        (rows(second={"losses": [0.0] * 6}), "Rank 1 returns other losses than one process"),
        (rows(first={"losses": [0.0] * 6}), "Rank 0 returns other losses than one process"),
        (rows(losses=[9.0, *LOSSES[1:]]), "each rank must take its own"),
        (rows(losses=[3.0, *LOSSES[1:]]), "the mean over the ranks is not"),
        (rows(losses=[0.75, *LOSSES[1:]]), "the mean over the ranks is not"),
        (rows(losses=[*LOSSES[:2], 9.0, *LOSSES[3:]]), "up to step 1, and other ones from step 2"),
        (rows(losses=[float("nan")] * 6), "look at the rows"),
        (rows(held_out=2.1), "its held-out loss is 0.1 off"),
        (rows(second={"held_out": float("nan")}), "its held-out loss is nan off"),
    ],
)
def test_each_difference_gets_its_cause(by_rank, said):
    assert said in differs(by_rank)


def test_a_rank_that_said_nothing_is_told_with_what_the_launcher_found():
    found = two_ranks._missing({0: {}}, ["rank 1: killed by SIGKILL"])
    assert found == "It did not run on 2 ranks: rank 1: killed by SIGKILL."


def test_an_error_is_told_before_a_hang_that_it_caused(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("a = 1\nwait(a)  # for ever\n")
    error = {"exercise": "error", "error": "KeyError: 'x'", "line": 1}
    waits = {"exercise": "waits", "line": 2}
    assert (
        two_ranks._stopped({0: waits, 1: error}, script) == "Rank 1 stopped, line 1: KeyError: 'x'"
    )
    found = two_ranks._stopped({0: waits, 1: {"exercise": "done"}}, script)
    assert found == "It hangs. Rank 0 waits in line 2, `wait(a)`. Rank 1 has returned."
    assert two_ranks._stopped(rows(), script) == ""
