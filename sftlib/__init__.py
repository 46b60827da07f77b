"""Helpers of the course *Supervised Finetuning (SFT) I*.

Lessons call TRL, PEFT, DeepSpeed and Datasets directly; here is what they share. Importing it is
fast, because torch and transformers are loaded only where and when a module needs them.

The import makes other libraries quiet and stops their telemetry (see `_quiet`), whether they are
imported before it or after; one line that bitsandbytes logs at its import, on some CPUs, needs
sftlib first. A variable that you have set yourself counts more.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sftlib import patches

if TYPE_CHECKING:
    from tqdm import tqdm

# With any of these a student decides about telemetry
_TELEMETRY = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")


def progress_bars() -> bool:
    """Whether to show progress bars: yes for people, no where outputs are compared or stored."""
    return not any(os.environ.get(name) for name in ("CI", "PYTEST_CURRENT_TEST", "SFT_NO_BARS"))


def progress_bar(items: Iterable | None = None, **options: Any) -> tqdm:
    """A bar of one line, which goes when the work is done; where bars are off, the items alone.

    Args:
        options: go to `tqdm.tqdm`, such as `unit="step"` or `total=20`.
    """
    from tqdm import tqdm

    shown = {"leave": False, "file": sys.stdout, "disable": not progress_bars()}
    return tqdm(items, **shown | options)


def _quiet() -> None:
    """Quiet the libraries: by a variable, and by their own function where they are imported.

    The variables also reach child processes, such as the ranks of a launch.
    """
    imported = sys.modules
    # A pool of threads does not survive a fork, as by a data loader. Read at each use.
    _set("TOKENIZERS_PARALLELISM", "false")
    if not any(name in os.environ for name in _TELEMETRY):
        _set("HF_HUB_DISABLE_TELEMETRY", "1")
        patches.stop_telemetry()
    if _set("TRANSFORMERS_VERBOSITY", "error") and "transformers.utils.logging" in imported:
        from transformers.utils import logging as verbosity

        if verbosity.get_verbosity() == verbosity.WARNING:  # else somebody has chosen another level
            verbosity.set_verbosity_error()
    if progress_bars():
        return
    if _set("HF_DATASETS_DISABLE_PROGRESS_BARS", "1") and "datasets.config" in imported:
        import datasets

        datasets.disable_progress_bars()
    if _set("HF_HUB_DISABLE_PROGRESS_BARS", "1") and "huggingface_hub.constants" in imported:
        from huggingface_hub import utils

        utils.disable_progress_bars()
        if "transformers.utils.logging" in imported:  # it has asked the Hub's client at its import
            from transformers.utils import logging as bars

            bars.disable_progress_bar()


def _set(name: str, value: str) -> bool:
    """Set an environment variable, unless it is set already; whether it was set here."""
    if name in os.environ:
        return False
    os.environ[name] = value
    return True


_quiet()
for _message in (
    "IProgress not found",  # tqdm, without ipywidgets: bars of text will do
    "`is_gradient_checkpointing` is deprecated",  # PEFT 0.21 calls the old name
    "`gradient_checkpointing` is deprecated",  # TRL 1.16 has it among its defaults
):
    warnings.filterwarnings("ignore", message=_message)

# bitsandbytes looks for a faster kernel where the CPU has AVX512-BF16, and says that it has none
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
