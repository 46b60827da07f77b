"""How each final figure of a training comes about.

The figures are those of Transformers' `Trainer`: `trainer.py` and `trainer_utils.py`
(`speed_metrics`) of version 5.23, with which the tests compare them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sftlib.experiments.logs import table

if TYPE_CHECKING:
    import pandas


def explain(output: Any, log: Any = None) -> pandas.DataFrame:
    """Each figure of a `TrainOutput`: its value, what it is, and how it follows from the others.

    Args:
        output: what `trainer.train()` returned, or its three parts: global_step, training_loss,
            metrics.
        log: the run's log, as for `table`; with it the loss is checked, too.

    Returns:
        A row a figure with `value`, `is` and `follows from`, which holds the arithmetic.

    Raises:
        ValueError: it is no `TrainOutput`.
    """
    import pandas

    steps, loss, metrics = _parts(output)
    runtime = metrics.get("train_runtime", math.nan)
    follows = _loss(loss) if log is None else _mean_loss(loss, steps, log)
    rows = {
        "global_step": (steps, "optimizer steps done, also those before a resumption", ""),
        "training_loss": (loss, "mean loss of the steps of this call, in nats a token", follows),
    }
    for name, value in metrics.items():
        rows[name] = (value, *_meaning(name, value, steps, runtime))
    rows.pop("train_loss", None)  # training_loss again
    return pandas.DataFrame.from_dict(rows, orient="index", columns=["value", "is", "follows from"])


def _parts(output: Any) -> tuple[int, float, dict[str, float]]:
    try:
        steps, loss, metrics = output
        return int(steps), float(loss), {name: float(value) for name, value in metrics.items()}
    except (TypeError, ValueError, AttributeError):
        raise ValueError(
            "Expected what trainer.train() returns, TrainOutput(global_step, training_loss, "
            f"metrics), found {type(output).__name__}: {str(output)[:60]}"
        ) from None


def _loss(loss: float) -> str:
    if not math.isfinite(loss):
        return "not a finite number: the run is broken from the first step that logs none"
    return f"perplexity exp({loss:.4g}) = {math.exp(min(loss, 700)):.4g}"


def _mean_loss(loss: float, steps: int, log: Any) -> str:
    rows = table(log)
    losses = rows.loss.dropna()
    before = [0, *losses.index[:-1]]
    covers = [step - last for step, last in zip(losses.index, before, strict=True)]
    mean = sum(n * value for n, value in zip(covers, losses, strict=True)) / sum(covers)
    said = f"mean of {len(losses)} logged losses = {mean:.6g}; {_loss(loss)}"
    if losses.index[-1] < steps:
        said += f"; steps {losses.index[-1] + 1} to {steps} were not logged"
    return said


def _meaning(name: str, value: float, steps: int, runtime: float) -> tuple[str, str]:
    rate = f"{runtime:g} s"
    if name == "train_runtime":
        return "seconds on the clock, with evaluation and saving", ""
    if name == "train_steps_per_second":
        return "optimizer steps a second", f"{steps} / {rate} = {_ratio(steps, runtime):.3f}"
    if name == "train_samples_per_second":
        rows = value * runtime
        a_step = f"{rows:.0f} rows; a step had {_ratio(rows, steps):.1f}"
        return "rows of the dataset a second, each epoch counted", f"times {rate} = {a_step}"
    if name == "total_flos":
        return (
            "floating-point operations, estimated: 6 · parameters without embeddings · tokens, "
            "padding and frozen parameters included (Kaplan et al. 2020, arXiv 2001.08361)",
            f"/ {rate} = {_ratio(value, runtime) / 1e9:.3g} GFLOP/s",
        )
    if name == "epoch":
        if not math.isfinite(value):
            return "passes over the dataset", "not a finite number"
        part = f", {value % 1:.0%} of the next" if value % 1 else ""
        return "passes over the dataset", f"{int(value)} whole{part}"
    return "of the trainer's own or of a callback", ""


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan
