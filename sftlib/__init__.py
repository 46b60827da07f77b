"""Helpers of the course *Supervised Finetuning (SFT) I*.

Lessons call TRL, PEFT, DeepSpeed and Datasets directly. This package holds what several of them
share. Importing it is fast, because functions import torch and transformers when they need them.

The import makes other libraries quiet and stops their telemetry (see `_quiet`), in any order of
imports. There is one exception: a line that bitsandbytes logs at its import on some CPUs stays away
only if sftlib is imported first. Environment variables that you have set yourself are respected.
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

# If one of these is set, the user has decided about telemetry
_TELEMETRY = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")


def progress_bars() -> bool:
    """Whether to show progress bars: not if outputs are compared (tests) or stored (notebooks)."""
    return not any(os.environ.get(name) for name in ("CI", "PYTEST_CURRENT_TEST", "SFT_NO_BARS"))


def progress_bar(items: Iterable | None = None, **options: Any) -> tqdm:
    """A bar of one line that disappears when the work is done; without bars, only the items.

    Args:
        options: for `tqdm.tqdm`, such as `unit="step"` or `total=20`.
    """
    from tqdm import tqdm

    defaults = {"leave": False, "file": sys.stdout, "disable": not progress_bars()}
    return tqdm(items, **defaults | options)


def _quiet() -> None:
    """Quiet the libraries: by variables, and by their own functions if they are imported already.

    The variables also reach child processes, such as the ranks of a launch.
    """
    imported = sys.modules
    # Tokenizers' pool of threads does not survive a fork, for instance by a data loader. The
    # library reads the variable at each use.
    _set("TOKENIZERS_PARALLELISM", "false")
    if not any(name in os.environ for name in _TELEMETRY):
        _set("HF_HUB_DISABLE_TELEMETRY", "1")
        patches.stop_telemetry()
    if _set("TRANSFORMERS_VERBOSITY", "error") and "transformers.utils.logging" in imported:
        from transformers.utils import logging as verbosity

        if verbosity.get_verbosity() == verbosity.WARNING:  # else the user has chosen a level
            verbosity.set_verbosity_error()
    if progress_bars():
        return
    if _set("HF_DATASETS_DISABLE_PROGRESS_BARS", "1") and "datasets.config" in imported:
        import datasets

        datasets.disable_progress_bars()
    if _set("HF_HUB_DISABLE_PROGRESS_BARS", "1") and "huggingface_hub.constants" in imported:
        from huggingface_hub import utils

        utils.disable_progress_bars()
        if "transformers.utils.logging" in imported:  # it copied the setting at its import
            from transformers.utils import logging as bars

            bars.disable_progress_bar()


def _set(name: str, value: str) -> bool:
    """Set an environment variable unless it is set already; returns whether it was set here."""
    if name in os.environ:
        return False
    os.environ[name] = value
    return True


_quiet()
patches.bars_of_text()
for _message in (
    "`is_gradient_checkpointing` is deprecated",  # PEFT 0.21 calls the old name
    "`gradient_checkpointing` is deprecated",  # TRL 1.16 has it among its defaults
):
    warnings.filterwarnings("ignore", message=_message)

# On a CPU with AVX512-BF16, bitsandbytes looks for a faster kernel, and logs that it has none.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
