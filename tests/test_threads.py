"""`make threads` measures how threads should wait; the lessons' default comes from it."""

import json
import os

import pytest

from tools import lab, threads


@pytest.mark.nightly
def test_two_processes_train_at_the_same_time_under_a_setting():
    for processes in (1, 2):
        assert 0 < threads.seconds({"OMP_NUM_THREADS": "1"}, processes, steps=1) < 120


def test_each_machine_keeps_its_own_table_beside_what_else_is_stored(tmp_path, capsys):
    path = tmp_path / "benchmarks.json"
    path.write_text('{"lessons": {"01": 1}}')
    figures = {"steps": 20, "turns": 3, "seconds": {"default": {"alone": 4.2, "two_at_once": 9.8}}}
    for machine in ("one", "other", "one"):
        threads.store(figures, machine, path)
    found = json.loads(path.read_text())
    assert found == {"lessons": {"01": 1}, "threads": {"one": figures, "other": figures}}
    threads.show(figures)
    assert "default                     4.2          9.8" in capsys.readouterr().out


def test_tests_have_one_thread_and_lessons_threads_that_spin_briefly(monkeypatch):
    assert os.environ["OMP_NUM_THREADS"]  # set by conftest.py, unless somebody set it before
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert lab.settings()["GOMP_SPINCOUNT"] == "1000"
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        with monkeypatch.context() as own:
            own.setenv(name, "7")
            assert "GOMP_SPINCOUNT" not in lab.settings()
