"""SFT with TRL's own trainer and the course's defaults: quiet, deterministic, fast on a CPU.

Nothing is hidden: `config` returns TRL's `SFTConfig`, `prepare` TRL's `SFTTrainer`, and `tune` the
same, already trained. Every default can be overridden by its own name.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sftlib import progress_bar, progress_bars
from sftlib.adapters import check_lora

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from trl import SFTConfig, SFTTrainer

FULL_LEARNING_RATE = 5e-4
LORA_LEARNING_RATE = 5e-3  # about ten times that of full finetuning


def config(**overrides: Any) -> SFTConfig:
    """TRL's `SFTConfig` with the course's defaults.

    Differences from TRL's own defaults, and why: the loss is on the assistant's tokens only; no
    activation checkpointing (it trades time for memory that a small model does not need); batches
    of similar length (less padding); each step logged; no files, no trackers.

    Args:
        overrides: any argument of `trl.SFTConfig`, by its name.
    """
    from trl import SFTConfig

    return SFTConfig(**(defaults() | overrides))


def defaults() -> dict[str, Any]:
    """The arguments that `config` sets, for the device that is there."""
    import torch

    gpu = torch.cuda.is_available()
    return {
        "output_dir": tempfile.gettempdir() + "/sftlib",
        "use_cpu": not gpu,
        "bf16": gpu and torch.cuda.is_bf16_supported(including_emulation=False),
        "assistant_only_loss": True,
        "per_device_train_batch_size": 32,
        "learning_rate": FULL_LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,  # a fraction of all steps
        "num_train_epochs": 1,
        "max_length": 512,
        "train_sampling_strategy": "group_by_length",
        "activation_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,  # `tune` shows a bar of its own, one line
        "seed": 0,
    }


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    peft_config: PeftConfig | None = None,
    eval_dataset: Dataset | None = None,
    **overrides: Any,
) -> SFTTrainer:
    """Finetune `model` on `dataset` with TRL's `SFTTrainer`, made by `prepare`, and return it."""
    trainer = prepare(model, tokenizer, dataset, peft_config, eval_dataset, **overrides)
    trainer.train()
    return trainer


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    peft_config: PeftConfig | None = None,
    eval_dataset: Dataset | None = None,
    args: SFTConfig | None = None,
    **overrides: Any,
) -> SFTTrainer:
    """TRL's `SFTTrainer` for `model` and `dataset`, ready for its `train()`.

    Conversations are encoded by `sftlib.chat.encode`, so that no text in them becomes a control
    token; everything after that is TRL's. As there, a conversation longer than `max_length` is cut
    and one in which then nothing is learned is left out; a warning counts them.

    Args:
        model: changed in place; with `peft_config`, `trainer.model` is the wrapped model.
        tokenizer: its chat template must mark the assistant's tokens with `{% generation %}`.
        dataset: rows with a `messages` column (lists of `role` and `content`), or another of TRL's
            dataset types, which then goes to TRL as it is.
        eval_dataset: of the same kind, for `eval_strategy="steps"` or `"epoch"`.
        peft_config: for instance a `peft.LoraConfig`; without it all parameters are trained.
        args: TRL's settings, whole; without them those of `config`.
        overrides: arguments of `trl.SFTConfig`, see `config`.

    Raises:
        ValueError: a `LoraConfig` does not fit the model (see `sftlib.adapters.check_lora`).
    """
    import datasets
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import SFTTrainer

    _score_learned_positions_alone()
    _score_in_one_piece()
    if len(dataset) < 10_000:  # ready at once: four bars of a tenth of a second are noise
        datasets.disable_progress_bars()
    if peft_config is not None:
        if isinstance(peft_config, LoraConfig):
            check_lora(model, peft_config)
        overrides = {"learning_rate": LORA_LEARNING_RATE} | overrides
    args = args or config(**overrides)
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=encoded(dataset, tokenizer, args),
        eval_dataset=None if eval_dataset is None else encoded(eval_dataset, tokenizer, args),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    _show_trl_the_head(trainer.model)
    trainer.remove_callback(PrinterCallback)
    if progress_bars():
        trainer.add_callback(_one_line_bar())
    return trainer


def encoded(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> Dataset:
    """The dataset with columns `input_ids` and `labels`, as TRL itself would make them."""
    from sftlib.chat import encode_batch

    columns = set(dataset.column_names)
    if "messages" not in columns or columns & {"input_ids", "tools", "chat_template_kwargs"}:
        return dataset

    def encode(rows: dict) -> dict:
        found = encode_batch(rows["messages"], tokenizer)
        if not args.assistant_only_loss:
            return {"input_ids": found["input_ids"], "labels": found["input_ids"]}
        pairs = zip(found["input_ids"], found["assistant_masks"], strict=True)
        labels = [[i if m else -100 for i, m in zip(*pair, strict=True)] for pair in pairs]
        return {"input_ids": found["input_ids"], "labels": labels}

    encoded = dataset.map(encode, batched=True)
    cuts = not args.packing or args.packing_strategy == "bfd"  # the others split, and keep all
    if args.max_length is not None and cuts:
        _warn_of_cuts(encoded["labels"], args.max_length, args.truncation_mode == "keep_start")
    return encoded


def _warn_of_cuts(labels: Iterable[list[int]], max_length: int, keep_start: bool) -> None:
    longer = [row for row in labels if len(row) > max_length]
    part = slice(max_length) if keep_start else slice(-max_length, None)
    emptied = sum(all(label == -100 for label in row[part]) for row in longer)
    if longer:
        warnings.warn(
            f"{len(longer)} of {len(labels)} conversations are longer than max_length={max_length} "
            f"tokens: the {'end' if keep_start else 'start'} is cut off, and {emptied} of them, in "
            "which then nothing is learned, are left out. Raise max_length where the memory allows "
            "it.",
            stacklevel=4,
        )


def _one_line_bar() -> TrainerCallback:
    """A bar with the latest loss, in place of a table that grows by a row a step."""
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            if state.is_world_process_zero:
                self.bar = progress_bar(total=state.max_steps, unit="step")

        def on_log(self, args, state, control, logs=None, **_):
            if state.is_world_process_zero and "loss" in (logs or {}):
                self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)
                self.bar.update(state.global_step - self.bar.n)

        def on_train_end(self, args, state, control, **_):
            if state.is_world_process_zero:
                self.bar.close()

    return Bar()


def _score_learned_positions_alone() -> None:
    """Let TRL compute the loss on a CPU as it does on a GPU: at the learned positions alone.

    TRL 1.16 (`trl.trainer.utils.add_fused_lm_head`) skips the other positions only where Triton
    runs, because tiles of changing shape make some accelerators compile again. A CPU does not
    compile, and most of our tokens are not learned: the same loss takes two thirds of the time.
    """
    import trl.trainer.utils

    if hasattr(trl.trainer.utils, "_use_triton"):
        trl.trainer.utils._use_triton = lambda device: True


def _score_in_one_piece() -> None:
    """Let `SFTTrainer` compute the logits on a CPU once and keep them for the backward pass.

    TRL 1.16 (`trl.kernels.ChunkedLogProbFunction`) computes them in tiles of 4,096 tokens by 32,768
    entries of the vocabulary, keeps none of them, and computes them again in the backward pass. Its
    PyTorch version also goes over each tile about ten times. That saves memory where there are many
    tiles. Where one tile holds all logits, as with our tiny base, it saves little and costs an
    eighth of a training step. There the patch takes PyTorch's own `log_softmax`. Loss, entropy,
    accuracy and gradients are the same up to rounding. All other cases go to TRL's function: GPUs,
    more logits than one tile, bfloat16, ZeRO-3, and TRL's other trainers.
    """
    import torch
    import trl.trainer.utils
    from torch.nn.functional import linear, log_softmax
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    in_tiles = getattr(trl.trainer.utils, "_ChunkedLogProbFunction", None)
    if not getattr(in_tiles, "__module__", "").startswith("trl."):
        return  # another version of TRL, or patched already

    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs):
        # hidden: (tokens, hidden size), weight: (vocabulary, hidden size), targets: (tokens,)
        if not (
            set(outputs) == {"log_probs", "entropy", "is_top1"}  # what SFTTrainer asks for
            and (temperature, softcap, scale) == (1, None, 1)
            and hidden.device.type == "cpu"
            and hidden.dtype == weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and not is_deepspeed_zero3_enabled()  # gives back the weight before the backward pass
            and len(hidden) <= 4096
            and len(weight) <= chunk_size
        ):
            rest = (temperature, chunk_size, softcap, scale, outputs)
            return in_tiles.apply(hidden, weight, bias, targets, *rest)
        all_log_probs = log_softmax(linear(hidden, weight, bias), dim=-1)
        log_probs = all_log_probs.gather(-1, targets[:, None])[:, 0]
        with torch.no_grad():  # for the log alone
            entropy = -all_log_probs.exp().mul_(all_log_probs).sum(-1)
            is_top1 = all_log_probs.argmax(-1) == targets
        return log_probs, entropy, None, None, is_top1

    trl.trainer.utils._ChunkedLogProbFunction = SimpleNamespace(apply=apply)


def _show_trl_the_head(model: PreTrainedModel) -> None:
    """Let TRL read the output head where PEFT trains some of its rows.

    PEFT 0.21's wrapper around it (`trainable_token_indices`) passes on its weight, but not its
    bias, for which TRL 1.16 asks, too.
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.bias = None
