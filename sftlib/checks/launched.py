"""What runs on each rank when `check_launch` tries a student's script: SCRIPT DATA.

It prints one line of JSON, with `exercise`: "done" (and what was trained), "error" (and its line)
or "waits" (and the line in which the rank has hung for too long).
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from sftlib.checks.two_ranks import mean_loss

PATIENCE = 30.0  # seconds for the training, in which two idle cores need three


def main(script: str, data_file: str) -> None:
    import deepspeed
    import torch

    deepspeed.init_distributed()
    data = torch.load(data_file)
    returned = Path(data_file).with_name(f"returned{os.environ['RANK']}")
    started = time.monotonic()
    threading.Thread(target=_watch, args=(script, returned), daemon=True).start()
    try:
        engine, losses = _answer(_module(script).train(data["train"]))
        found = _described(engine, losses, data["tests"])
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame.lineno for frame in frames if frame.filename == script]
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        _say(exercise="error", error=text, line=own[-1] if own else 0)
        raise
    _say(exercise="done", **found)
    returned.touch()
    # A rank that ended now would break the connection on which the other one may still wait.
    while len(list(returned.parent.glob("returned?"))) < 2:
        if time.monotonic() - started > PATIENCE + 5:
            break
        time.sleep(0.05)
    os._exit(0)


def _module(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("answer", script)
    if spec is None or spec.loader is None:
        raise ImportError(f"Expected a Python file, found {script}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _answer(returned: Any) -> tuple[Any, list[float]]:
    """The engine and the losses that `train` returned.

    Raises:
        TypeError: it returned something else.
    """
    try:
        engine, losses = returned
        return engine, [float(loss) for loss in losses]
    except (TypeError, ValueError):
        found = type(returned).__name__
        raise TypeError(f"expected an engine and its losses from `train`, found {found}") from None


def _described(engine: Any, losses: list[float], tests: Any) -> dict[str, Any]:
    if not hasattr(engine, "zero_optimization_stage"):
        raise TypeError(f"expected DeepSpeed's engine first, found {type(engine).__name__}")
    engine.eval()
    return {
        "losses": losses,
        "held_out": mean_loss(engine, tests),
        "stage": engine.zero_optimization_stage(),
        "accumulation": engine.gradient_accumulation_steps(),
        "clipping": engine.gradient_clipping() or 0,
    }


def _watch(script: str, returned: Path) -> None:
    """Say where the main thread is, and end, if it has not returned in time."""
    time.sleep(PATIENCE)
    if returned.exists():
        return
    frame: FrameType | None = sys._current_frames()[threading.main_thread().ident or 0]
    while frame and frame.f_code.co_filename != script:
        frame = frame.f_back
    _say(exercise="waits", line=frame.f_lineno if frame else 0)
    os._exit(1)


def _say(**row: Any) -> None:
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
