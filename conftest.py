"""Settings for pytest that the notebooks need; in the root because `notebooks/` is tested too."""

import json
import os
from collections import Counter, defaultdict
from pathlib import Path

# One thread for each test process and kernel, as `make` starts several: two processes of two
# threads on two cores slow each other down (`make threads` measures it). Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil  # noqa: E402
import pytest  # noqa: E402
from nbval.plugin import IPyNbFile  # noqa: E402

from tools import notebooks  # noqa: E402

# Outputs are compared with stored ones: no progress bars (see sftlib.progress_bars), and whatever
# `.env` says, the shipped model. Nor is anybody's account charged.
os.environ |= notebooks.SETTINGS | {"SFT_NO_BARS": "1"}

MEASURED = Path(__file__).parent / "data" / "benchmarks.json"
SECONDS = {"integration": 10, "nightly": 60, None: 0.05}  # of a test, roughly
CASES = 20  # of one test function; one that has more has short ones

start_kernel = IPyNbFile.setup


def start_kernel_as_outside_pytest(notebook: IPyNbFile) -> None:
    """With PYTEST_CURRENT_TEST set, ipykernel loses the output of child processes: hide it."""
    current = os.environ.pop("PYTEST_CURRENT_TEST", None)
    try:
        start_kernel(notebook)
    finally:
        if current is not None:
            os.environ["PYTEST_CURRENT_TEST"] = current


IPyNbFile.setup = start_kernel_as_outside_pytest


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes `-n auto` starts: one for each core, and at least two.

    Beside the notebooks one more, since launches, servers and browsers leave a core idle while a
    test waits for them; without them it would cost more (imports, collection) than it gains. Each
    process may take 2 GB.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory().available // 2**31
    return int(max(2, min((cores or 2) + bool(config.option.nbval), memory, 8)))


@pytest.hookimpl(trylast=True)  # when `-m` and `-k` have taken out what does not run
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no worker begins one when others are done.

    A file's tests stay together and in order: the cells of a notebook need each other, and a file's
    tests share fixtures (`--dist loadfile` keeps them in one process).
    """
    lessons = json.loads(MEASURED.read_text(encoding="utf-8"))["lessons"]
    files = defaultdict(list)
    for item in items:
        files[item.path].append(item)

    def seconds(path: Path) -> float:
        if path.suffix == ".ipynb":  # the solutions of a lesson have its name, and are short
            solved = path.parent.name == "solutions"
            return 5 if solved else lessons.get(path.stem, {}).get("seconds", 60)
        cases = Counter(
            (getattr(item, "originalname", item.name), tier(item)) for item in files[path]
        )
        return sum(SECONDS[kind] * min(count, CASES) for (_, kind), count in cases.items())

    items[:] = [item for path in sorted(files, key=seconds, reverse=True) for item in files[path]]


def tier(item: pytest.Item) -> str | None:
    return next(filter(item.get_closest_marker, ("nightly", "integration")), None)
