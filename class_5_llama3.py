"""Finetune Llama 3, or another model of its kind, to follow instructions.

Examples:

    python class_5_llama3.py
        The shipped tiny base, on a CPU, in less than a minute: a complete run to look at.

    python class_5_llama3.py --plan --model meta-llama/Meta-Llama-3-8B --method lora
        What that would need: parameters, bytes, steps, operations. Nothing is loaded.

    python class_5_llama3.py --model meta-llama/Meta-Llama-3-8B --method lora --data my.jsonl
        Your own conversations, on one GPU.

    torchrun --nproc-per-node 8 class_5_llama3.py --model meta-llama/Meta-Llama-3-8B \\
        --method full --deepspeed deepspeed_configs/zero3_bf16.json --data my.jsonl
        All parameters, divided over eight GPUs. `deepspeed` and `accelerate launch` do as well.

    python class_5_llama3.py --config my.yaml
        The same arguments from a file; the command line counts more.

The same command again goes on where it was interrupted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not sys.stdout.isatty():  # a log is no place for progress bars
    os.environ.update({"TQDM_DISABLE": "1", "SFT_NO_BARS": "1"})  # libraries read it at import

from sftlib import progress_bars
from sftlib.adapters import control_token_rows
from sftlib.finetune.arguments import FinetuneArguments, check, parse, zero_stage
from sftlib.finetune.callbacks import AskHeldOut, PrintLoss, StopOnSignal, questions_that_fit
from sftlib.finetune.card import model_card, print_samples, saved_step
from sftlib.finetune.checkpoints import RunFolder, run_identity
from sftlib.finetune.data import Data, load_data
from sftlib.finetune.model import (
    allowed_max_length,
    count_parameters,
    default_learning_rate,
    load_model,
)
from sftlib.finetune.plan import make_plan
from sftlib.finetune.save import leave_together, save
from sftlib.models import chosen
from sftlib.training import prepare

from peft import LoraConfig
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import SFTConfig, SFTTrainer

INTERRUPTED = 130  # exit code; a job file asks for another turn when it sees it


def main(argv: list[str] | None = None) -> int:
    """Finetune as the command line says; return the exit code."""
    # 1. Arguments: ours, and all of TRL's SFTConfig.
    args, training = parse(argv, introduction=__doc__)
    check(args, training)
    args.model = chosen(args.model)

    # 2. Data: conversations in any published layout, some of them held out.
    data = load_data(args)
    if args.plan:
        print(make_plan(args, training, data.train))
        return 0

    # 3. The run's folder: is it finished, or does it go on from a checkpoint?
    folder = RunFolder(str(training.output_dir), run_identity(args, training, data.train))
    first = training.process_index == 0  # one rank speaks and writes for all
    if folder.finished(args.saved_folders[-1]):
        if first:
            saved = folder.path / args.saved_folders[-1]
            print(f"{saved} is finished, and stays. Another --output_dir trains anew.")
        return 0
    checkpoint = folder.last_checkpoint()
    if first:
        print(f"{len(data.train):,} conversations to train on, {len(data.held_out):,} held out")

    # 4. Model and template, adapters, and TRL's trainer.
    trainer, asked, stopped = make_trainer(args, training, data)

    # 5. Train, and save.
    if first:  # only now, so that what is refused above leaves no trace
        folder.begin(data.rejects)
        announce(args, training, folder, data, checkpoint)
    saved = train_and_save(trainer, args, folder, checkpoint, stopped)

    # 6. What came out.
    if first:
        report(trainer, args, training, data, asked, saved)
    leave_together(trainer)
    return 0 if saved else INTERRUPTED


def make_trainer(
    args: FinetuneArguments, training: SFTConfig, data: Data
) -> tuple[SFTTrainer, AskHeldOut, StopOnSignal]:
    """TRL's trainer, ready to train, and the two callbacks that are asked afterwards."""
    set_seed(training.seed)
    model, tokenizer = load_model(args, training)
    if training.learning_rate is None:
        training.learning_rate = default_learning_rate(args.method, count_parameters(model))
    training.max_length = allowed_max_length(model, training)

    lora = lora_config(args, model, tokenizer) if args.trains_adapters else None
    from datasets import Dataset  # TEMP

    train, held = (
        Dataset.from_list([{"messages": r["messages"]} for r in rows]) for rows in data[:2]
    )
    trainer = prepare(model, tokenizer, train, lora, held, training)
    learned: dict[str, Any] = {"--data": trainer.train_dataset, "--held_out": trainer.eval_dataset}
    for name, rows in learned.items():
        if not len(rows):
            raise ValueError(
                f"Expected conversations for {name} in which something is learned within "
                f"{training.max_length} tokens, found none: raise --max_length."
            )

    questions = questions_that_fit(
        data.held_out, tokenizer, args.ask, args.answer_tokens, training.max_length
    )
    asked = AskHeldOut(trainer, questions, args.answer_tokens)
    stopped = StopOnSignal()
    trainer.add_callback(asked)
    trainer.add_callback(stopped)
    if not progress_bars():
        trainer.add_callback(PrintLoss())
    if args.patience:
        trainer.add_callback(EarlyStoppingCallback(args.patience))
    return trainer, asked, stopped


def lora_config(
    args: FinetuneArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> LoraConfig:
    """LoRA on all linear layers, and on the control tokens, which a base model has never read."""
    # Under ZeRO-3 the control tokens stay as they are: PEFT 0.21 copies their rows from a weight
    # of which a rank holds only a part.
    rows = None if is_deepspeed_zero3_enabled() else control_token_rows(model, tokenizer)
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        target_modules="all-linear",
        trainable_token_indices=rows,
        task_type="CAUSAL_LM",
    )


def train_and_save(
    trainer: SFTTrainer,
    args: FinetuneArguments,
    folder: RunFolder,
    checkpoint: str | None,
    stopped: StopOnSignal,
) -> Path | None:
    """The folder of the model that can be asked; None where a signal stopped the training."""
    folder.require_shared_disk(trainer.accelerator)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        return None if stopped.received else save(trainer, args, folder.path)
    except Exception as error:
        folder.raise_if_full(error)
        raise


def announce(
    args: FinetuneArguments,
    training: SFTConfig,
    folder: RunFolder,
    data: Data,
    checkpoint: str | None,
) -> None:
    """Say what the reader should know before the training begins."""
    if data.rejects:
        reasons = folder.path / "rejects.jsonl"
        print(f"{len(data.rejects)} cannot be used: {reasons} says why")
    if checkpoint:
        print(f"Going on from {checkpoint}")
    if args.method == "lora" and zero_stage(training) == 3:
        print(
            "ZeRO-3 does not train the rows of the control tokens beside an adapter: a base "
            "model may not learn to end its turn. With zero2.json it does."
        )


def report(
    trainer: SFTTrainer,
    args: FinetuneArguments,
    training: SFTConfig,
    data: Data,
    asked: AskHeldOut,
    saved: Path | None,
) -> None:
    """Write the model card, and print a few answers and where the model is."""
    last, kept = trainer.state.global_step, saved_step(trainer)
    if saved is None:
        print(f"Stopped and saved at step {last}. The same command again goes on from there.")
        return
    (saved / "README.md").write_text(model_card(args, training, trainer, data))
    print_samples(asked.rows, asked.given.get(kept, []))
    if kept < last:
        print(f"Kept: the weights after step {kept}, where the held-out loss was lowest.")
    took = next((line for line in trainer.state.log_history if "train_runtime" in line), {})
    print(f"{last} steps in {took.get('train_runtime', 0):.1f} s")
    talk = f" Talk to it: python -m sftlib.deploy.talk {saved}" if saved.name != "adapter" else ""
    print(f"Saved in {saved}.{talk}")


if __name__ == "__main__":
    try:
        code = main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    raise SystemExit(code)
