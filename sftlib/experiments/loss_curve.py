"""Loss curves of one short training with one setting changed (lesson 6, exercise 4)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

ROWS = 96
SETTINGS: dict[str, Any] = {  # arguments of `trl.SFTConfig`, those of lesson 6
    "per_device_train_batch_size": 8,
    "num_train_epochs": 1,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "assistant_only_loss": True,
    "train_sampling_strategy": "sequential",
    "bf16": False,
    "activation_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 0,
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
    from sftlib import patches
    from sftlib.data import read_facts
    from sftlib.models import load

    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTTrainer

    args = config(change)
    model, tokenizer = load()
    rows = [{"messages": row["messages"]} for row in read_facts("sft")[:ROWS]]
    with patches.without_dataset_bars():
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]
