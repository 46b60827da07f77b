"""Fixtures that several test files share, and the time that a unit test may take."""

import gc
import os
import socket
import sys
import time

import hypothesis
import psutil
import pytest

CPU_SECONDS, WALL_SECONDS = 2.0, 60.0  # of a unit test, at most
CLOCKS_DIFFER = 0.1  # seconds: CPU time and idle time are counted in steps
LOOP_SECONDS = 0.025  # of `a_known_loop` on the machine for which CPU_SECONDS is meant
hypothesis.settings.register_profile("default", deadline=None)  # 100 examples of each
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)
IMPORTED = 50  # modules: a test that loads more pays for all that come after it


def pytest_collection_finish() -> None:
    """What torch, TRL and their like have made by now stays: garbage is not looked for in it again.

    An eighth of the time of `make quick`. And Hypothesis makes its table of all characters, which
    it keeps in `.hypothesis/`: in a fresh clone the first test that draws a text would pay for it.
    """
    hypothesis.strategies.text().validate()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """A unit test that takes long fails: `make quick` stays short only if each of its tests does.

    What counts is CPU time, of this process and of the children that it waited for, and the time in
    which the test waits though a core is idle (`time.sleep`). Time by the clock alone says little:
    beside ten busy programs on two cores it grew by ten. CPU time grew by up to 1.7 there: where
    the test had to share its core, twice the limit is allowed. A slower machine gets more in
    proportion to the time that it takes for a loop whose time is known. The limit on the clock is
    there for a test that hangs.

    The first test that needs torch, TRL or DeepSpeed imports it. This costs seconds, which test it
    is depends on what else runs, and others would pay it otherwise: that test is not judged.
    """
    loaded, before = len(sys.modules), clocks()
    result = yield
    cpu, wall, idle = (now - then for now, then in zip(clocks(), before, strict=True))
    is_unit = not any(item.get_closest_marker(tier) for tier in ("integration", "nightly"))
    thorough = item.config.getoption("--hypothesis-profile", None) == "thorough"
    judged = is_unit and not thorough and len(sys.modules) - loaded < IMPORTED
    waited = min(max(wall - cpu, 0), idle)
    shared = wall - cpu - waited > max(cpu / 2, CLOCKS_DIFFER)
    took, limit = cpu + waited, CPU_SECONDS * (1 + shared)
    if judged and (wall > WALL_SECONDS or (took > limit and took > limit * slowness())):
        pytest.fail(
            f"Expected a unit test to take at most {CPU_SECONDS:g} s (on a machine of usual speed "
            f"with a core to itself), found {cpu:.1f} s of CPU time, {wall:.1f} s by the clock. "
            "Make it smaller: a model of two layers, fewer rows, a shared fixture. If it must take "
            "long, mark it `@pytest.mark.integration`.",
            pytrace=False,
        )
    return result


def clocks() -> tuple[float, float, float]:
    """Seconds: CPU of this process and of children that have ended, clock, idle cores together."""
    return sum(os.times()[:4]), time.perf_counter(), psutil.cpu_times().idle


def slowness() -> float:
    """How many times as long as on the machine of `LOOP_SECONDS` the same loop takes here; from 1.

    Asked for only where a test took long: the loop's time at that moment counts.
    """
    return max(1.0, min(a_known_loop() for _ in range(5)) / LOOP_SECONDS)


def a_known_loop() -> float:
    start = time.process_time()
    sum(n * n for n in range(500_000))
    return time.process_time() - start


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """The cache folder of Datasets, here and in child processes: what tests read goes nowhere else.

    A folder that the user has named stays.
    """
    if "HF_DATASETS_CACHE" in os.environ:
        return
    folder = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(folder)
    if config := sys.modules.get("datasets.config"):
        config.HF_DATASETS_CACHE = folder


@pytest.fixture(scope="session")
def tiny():
    """The shipped base model and its tokenizer; do not train it (load another one for that)."""
    from sftlib.models import DEFAULT, load

    return load(DEFAULT)


@pytest.fixture
def tokenizer():
    """A fresh tokenizer of the tiny base, which a test may change."""
    from sftlib.models import TINY_BASE

    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_BASE)


@pytest.fixture
def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def somebody_comes(monkeypatch):
    """Call it in a test: from then on no variable says that outputs are compared or stored."""

    def come():  # not before: pytest sets its own variable again when the test begins
        for name in ("CI", "PYTEST_CURRENT_TEST", "SFT_NO_BARS"):
            monkeypatch.delenv(name, raising=False)

    return come
