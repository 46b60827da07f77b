"""Plans count both memories: that of the GPUs and that of the machines."""

from sftlib.scale.memory import zero_bytes
from sftlib.scale.planner import SETTINGS, Machines, Setting, first_that_fits, needed_gb, plan

import pytest

EIGHT = Machines(gpus=8, gpu_gb=80, host_gb=1000)
OFFLOAD = Setting(3, ("optimizer",))


@pytest.mark.parametrize("stage", range(4))
def test_without_offload_a_gpu_keeps_what_zero_bytes_says_and_main_memory_nothing(stage):
    found = needed_gb(13e9, EIGHT, Setting(stage))
    assert found == (zero_bytes(13_000_000_000, 8, stage).total / 1e9, 0)


def test_an_offloaded_optimizer_takes_its_gradients_along():
    on_gpu, on_host = needed_gb(70.6e9, EIGHT, OFFLOAD)
    assert on_gpu == pytest.approx(2 * 70.6 / 8) and on_host == pytest.approx(18 * 70.6)
    on_gpu, on_host = needed_gb(1e9, EIGHT, Setting(3, ("optimizer", "weights")), frozen=1e9)
    assert on_gpu == 0 and on_host == pytest.approx(18 + 2 * 2)


def test_main_memory_is_that_of_all_machines_and_the_last_need_not_be_full():
    assert needed_gb(70.6e9, Machines(16, 80, 1000), OFFLOAD)[1] == pytest.approx(18 * 70.6 / 2)
    assert [Machines(n, 80, 1000).count for n in (1, 8, 9, 64)] == [1, 1, 2, 8]


def test_a_plan_names_what_is_too_small():
    fits = plan(70.6e9, EIGHT).fits
    assert [*fits.index] == [str(setting) for setting in SETTINGS]
    assert fits["stage 3"] == "no: GPU memory"
    assert fits["stage 3, optimizer in main memory"] == "no: main memory"
    assert fits["stage 2, optimizer in main memory"] == "no: GPU memory, main memory"


@pytest.mark.parametrize(
    ("billions", "machines", "first"),
    [
        (1.2, EIGHT, "stage 0"),
        (8.03, EIGHT, "stage 1"),
        (13, EIGHT, "stage 2"),
        (34, Machines(64, 80, 500), "stage 3"),
        (8.03, Machines(1, 80, 1000), "stage 2, optimizer in main memory"),
        (70.6, EIGHT, "nothing fits"),
        (70.6, Machines(8, 80, 2000), "stage 3, optimizer in main memory"),
        (70.6, Machines(8, 16, 2000), "stage 3, optimizer and weights in main memory"),
    ],
)
def test_the_first_setting_that_fits_both_memories(billions, machines, first):
    assert first_that_fits(billions * 1e9, machines) == first


def test_a_fifth_of_each_memory_stays_free():
    assert first_that_fits(4e9, Machines(1, 80, 64)) == "stage 0"
    assert first_that_fits(4.01e9, Machines(1, 80, 90.3)) == "stage 2, optimizer in main memory"
    assert first_that_fits(4.01e9, Machines(1, 80, 90.2)) == "nothing fits"
