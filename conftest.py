"""Settings for pytest that the notebooks need; in the root because `notebooks/` is tested too."""

import os

from nbval.plugin import IPyNbFile

from tools import notebooks

# Outputs are compared with stored ones: no progress bars (see sftlib.progress_bars), and whatever
# `.env` says, the shipped model. Nor is anybody's account charged.
os.environ |= notebooks.SETTINGS | {"SFT_NO_BARS": "1"}

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
