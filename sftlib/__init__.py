"""Helpers of the course *Supervised Finetuning (SFT) I*.

The package is thin on purpose: lessons call TRL, PEFT, DeepSpeed and Datasets directly, and
`sftlib` only takes noise away. Importing it is fast; torch and transformers are loaded by the
modules that need them, when they need them.

Import it before those libraries: they read the settings below when they are imported.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

_QUIET = {
    "TOKENIZERS_PARALLELISM": "false",  # no warning when a data loader forks
    "TRANSFORMERS_VERBOSITY": "error",
}
_NO_BARS = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


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


for _name, _value in (_QUIET if progress_bars() else _QUIET | _NO_BARS).items():
    os.environ.setdefault(_name, _value)
for _message in (
    "IProgress not found",  # tqdm, without ipywidgets: bars of text will do
    "`is_gradient_checkpointing` is deprecated",  # PEFT 0.21 calls the old name
    "`gradient_checkpointing` is deprecated",  # TRL 1.16 has it among its defaults
):
    warnings.filterwarnings("ignore", message=_message)

# bitsandbytes looks for a faster kernel where the CPU has AVX512-BF16, and says that it has none
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
