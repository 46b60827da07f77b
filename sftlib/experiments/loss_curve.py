"""Loss curves of one short training with one setting changed (lesson 6, exercise 4)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

from sftlib.experiments import table, trainer_parts

ROWS = 96
SETTINGS: dict[str, Any] = trainer_parts.SETTINGS | {  # arguments of `trl.SFTConfig`
    "num_train_epochs": 1,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
}
HIDDEN = {"warmup_steps": 1}  # what the given curve of the exercise was trained with


def config(change: Mapping[str, Any] | None = None) -> Any:
    """TRL's `SFTConfig` of the usual training, with changes.

    Raises:
        TypeError: `SFTConfig` has no such argument.
        ValueError: it refuses the value.
    """
    import torch
    from trl import SFTConfig

    settings: dict[str, Any] = {"output_dir": f"{tempfile.gettempdir()}/sftlib"} | SETTINGS
    if not torch.cuda.is_available():
        settings["use_cpu"] = True
    return SFTConfig(**(settings | dict(change or {})))


def curve(change: Mapping[str, Any] | None = None) -> list[float]:
    """The loss of each step of the usual training, in nats per token, with one setting changed.

    Args:
        change: arguments of `SFTConfig`, such as `{"learning_rate": 1e-4}`; without it, the usual
            training.

    Raises:
        TypeError, ValueError: see `config`.
    """
    from sftlib.data import read_facts

    trainer = trainer_parts.plain_trainer(read_facts("sft")[:ROWS], config(change))
    trainer.train()
    return table(trainer).loss.dropna().tolist()
