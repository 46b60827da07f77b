"""SFT with TRL's own trainer and the course's defaults: quiet, deterministic, fast on a CPU.

Nothing is hidden: `config` returns TRL's `SFTConfig`, `tune` TRL's `SFTTrainer`, already trained.
Every default can be overridden by its own name.
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

from sftlib import progress_bars

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig, SFTTrainer

FULL_LEARNING_RATE = 5e-4
LORA_LEARNING_RATE = 5e-3  # about ten times that of full finetuning


def config(**overrides: Any) -> SFTConfig:
    """TRL's `SFTConfig` with the course's defaults.

    Differences from TRL's own defaults, and why: the loss is on the assistant's tokens only; no
    gradient checkpointing (it trades time for memory that a small model does not need); batches of
    similar length (less padding); one log line a step; no files, no trackers.

    Args:
        overrides: any argument of `trl.SFTConfig`, by its name.
    """
    import torch
    from trl import SFTConfig

    gpu = torch.cuda.is_available()
    defaults: dict[str, Any] = {
        "output_dir": tempfile.gettempdir() + "/sftlib",
        "use_cpu": not gpu,
        "bf16": gpu and torch.cuda.is_bf16_supported(),
        "assistant_only_loss": True,
        "per_device_train_batch_size": 16,
        "learning_rate": FULL_LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,  # a fraction of all steps
        "num_train_epochs": 1,
        "max_length": 512,
        "train_sampling_strategy": "group_by_length",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": not progress_bars(),
        "seed": 0,
    }
    return SFTConfig(**(defaults | overrides))


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    peft_config: PeftConfig | None = None,
    **overrides: Any,
) -> SFTTrainer:
    """Finetune `model` on `dataset` with TRL's `SFTTrainer` and return the trainer.

    Args:
        model: changed in place; with `peft_config`, `trainer.model` is the wrapped model.
        tokenizer: its chat template must mark the assistant's tokens with `{% generation %}`.
        dataset: rows with a `messages` column (lists of `role` and `content`).
        peft_config: for instance a `peft.LoraConfig`; without it all parameters are trained.
        overrides: arguments of `trl.SFTConfig`, see `config`.
    """
    from transformers import PrinterCallback
    from trl import SFTTrainer

    _score_learned_positions_alone()
    if peft_config is not None:
        overrides = {"learning_rate": LORA_LEARNING_RATE} | overrides
    trainer = SFTTrainer(
        model=model,
        args=config(**overrides),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def _score_learned_positions_alone() -> None:
    """Let TRL compute the loss on a CPU as it does on a GPU: at the learned positions alone.

    TRL 1.16 (`trl.trainer.utils.add_fused_lm_head`) skips the other positions only where Triton
    runs, because tiles of changing shape make some accelerators compile again. A CPU does not
    compile, and most of our tokens are not learned: the same loss takes two thirds of the time.
    """
    import trl.trainer.utils

    if hasattr(trl.trainer.utils, "_use_triton"):
        trl.trainer.utils._use_triton = lambda device: True
