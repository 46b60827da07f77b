"""A unit test that takes long fails, and the longest files are the first to be run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = '''
import subprocess, sys, time, conftest, pytest
conftest.CPU_SECONDS = 0.5  # so that this test need not take long itself
conftest.a_known_loop = lambda: conftest.LOOP_SECONDS  # whatever machine it is
class Idle:  # a core that idles, or none, whatever else runs
    def __init__(self, a_core): self.a_core = a_core
    def cpu_times(self): return self
    @property
    def idle(self): return time.perf_counter() * 0.99 * self.a_core  # clocks differ a little
conftest.psutil = Idle(False)
SPIN = """import time
end = time.process_time() + 1.3  # beyond the limit of a busy machine, too
while time.process_time() < end: pass"""

def test_short(): pass
def test_busy(): exec(SPIN)
def test_busy_child(): subprocess.run([sys.executable, "-c", SPIN], check=True)
def test_waits(): time.sleep(1.3)  # by the clock, as on a machine where others take the cores
@pytest.fixture
def idle(monkeypatch): monkeypatch.setattr(conftest, "psutil", Idle(True))
def test_sleeps(idle): time.sleep(0.7)
@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(conftest, "a_known_loop", lambda: conftest.LOOP_SECONDS * 5)
def test_on_a_slow_machine(slow): exec(SPIN)
def test_wrong():
    exec(SPIN)
    assert False, "its own reason"
def test_first_import():
    sys.modules.update({f"made_up_{n}": time for n in range(60)})
    exec(SPIN)
@pytest.mark.integration
def test_integration(): exec(SPIN)
@pytest.mark.nightly
def test_nightly(): exec(SPIN)
def test_hangs():  # the last one: with a limit that it need not wait for
    conftest.WALL_SECONDS = 0.5
    time.sleep(1)
'''


@pytest.mark.integration
def test_a_unit_test_that_takes_long_fails_and_is_told_what_to_do(tmp_path: Path):
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests/test_it.py").write_text(TESTS)
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "tests")
    command = [sys.executable, "-m", "pytest", "-rA", "-q", "-p", "no:cacheprovider"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    ends = {name: end for end, name in re.findall(r"^(PASSED|FAILED) \S+::test_(\w+)", said, re.M)}
    failed = {name for name, end in ends.items() if end == "FAILED"}
    assert failed == {"busy", "busy_child", "hangs", "sleeps", "wrong"} and len(ends) == 11, said
    assert len(re.findall("^E? *Expected a unit test to take at most 0.5 s", said, re.M)) == 4, said
    assert "mark it `@pytest.mark.integration`" in said and "its own reason" in said


@pytest.mark.integration
def test_the_files_that_take_longest_come_first_each_in_its_order():
    """A notebook takes what `make bench` measured, a test file what its tests' tiers cost."""
    command = [*(sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider")]
    command += ["--nbval", "notebooks", "tests/test_progress.py", "tests/test_launch.py"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    ids = [line.split("::") for line in said.splitlines() if "::" in line]
    files = list(dict.fromkeys(parts[0] for parts in ids))
    assert [parts[0] for parts in ids] == [f for f in files for parts in ids if parts[0] == f]
    lesson = "notebooks/01_what_is_sft.ipynb"
    cells = [int(parts[1].split()[-1]) for parts in ids if parts[0] == lesson]
    assert len(cells) > 20 and cells == sorted(cells)
    assert files[0] == "tests/test_launch.py" and files[-1] == "tests/test_progress.py"
    solutions = [at for at, file in enumerate(files) if "solutions" in file]
    assert files.index(lesson) < min(solutions) and len(solutions) == 9
