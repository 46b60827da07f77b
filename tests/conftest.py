"""Fixtures that several test files share, and the time that a unit test may take."""

import os
import socket
import sys
import time

import pytest

CPU_SECONDS, WALL_SECONDS = 2.0, 60.0  # of a unit test, at most
IMPORTED = 50  # modules: a test that loads more pays for all that come after it


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """A unit test that takes long fails: `make quick` stays short only if each of its tests does.

    What counts is CPU time, of this process and of the children that it waited for. Beside ten busy
    programs on two cores CPU time grew by up to 1.7, the time by the clock by ten: where the clock
    shows that the machine is busy, twice the CPU time is allowed. The limit on the clock is there
    for a test that hangs.

    The first test that needs torch, TRL or DeepSpeed imports it. This costs seconds, which test it
    is depends on what else runs, and others would pay it otherwise: that test is not judged.
    """
    loaded, cpu, wall = len(sys.modules), cpu_seconds(), time.perf_counter()
    result = yield
    cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    is_unit = not any(item.get_closest_marker(tier) for tier in ("integration", "nightly"))
    judged = is_unit and len(sys.modules) - loaded < IMPORTED
    busy = wall > 1.5 * cpu
    if judged and (cpu > CPU_SECONDS * (1 + busy) or wall > WALL_SECONDS):
        pytest.fail(
            f"Expected a unit test to take at most {CPU_SECONDS:g} s of CPU time (or to wait "
            f"{WALL_SECONDS:.0f} s), found {cpu:.1f} s ({wall:.1f} s by the clock). Make it "
            "smaller: a model of two layers, fewer rows, a shared fixture. If it must take long, "
            "mark it `@pytest.mark.integration`.",
            pytrace=False,
        )
    return result


def cpu_seconds() -> float:
    """Of this process, all its threads, and the children that have ended and were waited for."""
    return sum(os.times()[:4])


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
