"""A training log, laid out as a table."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

FIRST = ("epoch", "loss", "grad_norm", "learning_rate", "eval_loss")


def table(log: Any) -> pandas.DataFrame:
    """A log with a row a step: what was logged while training and, beside it, what evaluation gave.

    Args:
        log: a trainer after training, its `state`, its `state.log_history`, or the path of a
            checkpoint's `trainer_state.json`. Numbers may be text, as printed logs have them.

    Returns:
        One row for each logged step, in order, with `step` as the index; values that a step lacks
        are NaN, and those that were logged as NaN or infinite stay so. Where a run was resumed,
        steps repeat: what was logged before the resumption and then done again is left out.

    Raises:
        ValueError: no line of it holds a loss; a line is no dictionary; a step or a loss is no
            number; some lines have a step and others have none.
    """
    import pandas

    frame = pandas.DataFrame(rows_of(log)).set_index("step")
    frame.index = frame.index.astype(int)
    order = [name for name in FIRST if name in frame]
    return frame[order + [name for name in frame if name not in order]]


def rows_of(log: Any) -> list[dict[str, Any]]:
    """The rows of `table` as dictionaries, which tell a value that is NaN from one that lacks."""
    lines = [_numbers(i, line) for i, line in enumerate(_lines(log), 1)]
    lines = [line for line in lines if "train_runtime" not in line]  # the summary of the whole run
    if not any(_trains(line) for line in lines):
        raise ValueError(
            f"Expected a log with at least one line that holds a loss, found {len(lines)} without. "
            "Pass trainer.state.log_history, after training with logging_steps small enough."
        )
    rows: dict[float, dict[str, Any]] = {}
    trained = -1.0  # the last step of training so far
    for line in _numbered(lines):
        step = line["step"]
        if _trains(line):
            if step <= trained:  # resumed from before it
                rows = {at: row for at, row in rows.items() if at < step}
            trained = step
        rows[step] = rows.get(step, {}) | line
    return [rows[step] for step in sorted(rows)]


def _lines(log: Any) -> list:
    if isinstance(log, str | os.PathLike):
        log = json.loads(Path(log).read_text(encoding="utf-8"))
    log = getattr(log, "state", log)
    log = getattr(log, "log_history", log)
    if isinstance(log, Mapping):
        log = log.get("log_history", [log])
    if not isinstance(log, Iterable):
        raise ValueError(
            f"Expected a trainer, its state or its log_history, found {type(log).__name__}."
        )
    return list(log)


def _numbers(number: int, line: Any) -> dict[str, Any]:
    if not isinstance(line, Mapping):
        raise ValueError(f"Line {number}: expected a dictionary, found {type(line).__name__}.")
    found = {}
    for name, value in line.items():
        try:
            found[name] = float(value)
        except (TypeError, ValueError):
            found[name] = value  # a callback may note a text
        if name in ("step", *FIRST) and not isinstance(found[name], float):
            raise ValueError(f"Line {number}: expected a number for {name}, found {value!r}.")
    if "step" in found and not (found["step"] >= 0 and found["step"] % 1 == 0):
        raise ValueError(f"Line {number}: expected a whole step, found {line['step']!r}.")
    return found


def _trains(line: Mapping) -> bool:
    return "loss" in line


def _numbered(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each line with its step; a log without any, as printed, is counted by its training lines."""
    without = [i for i, line in enumerate(lines, 1) if "step" not in line]
    if not without:
        return list(lines)
    if len(without) < len(lines):
        raise ValueError(
            f"Expected a step in each line of the log, found none in line {without[0]}."
        )
    counted, step = [], 0
    for line in lines:
        step += _trains(line)
        counted.append(line | {"step": step})
    return counted
