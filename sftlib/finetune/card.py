"""What came out: the model card, and a few answers to look at."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftlib.finetune.arguments import schedule

if TYPE_CHECKING:
    from sftlib.evaluate import Answer
    from sftlib.finetune.arguments import FinetuneArguments
    from sftlib.finetune.data import Data

    from trl import SFTConfig, SFTTrainer

EVALUATIONS = ("| step | held-out loss | exact answers | ended by itself |", "|--:|--:|--:|--:|")
PACKAGES = ("torch", "transformers", "trl", "peft")


def saved_step(trainer: SFTTrainer) -> int:
    """The step whose weights are saved: the one with the lowest held-out loss, or the last."""
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    return best or trainer.state.global_step


def held_out_losses(trainer: SFTTrainer) -> tuple[float, float, float] | None:
    """The held-out loss before the training, of the kept weights, and at the end; or None."""
    log = trainer.state.log_history
    losses = {line["step"]: line["eval_loss"] for line in log if "eval_loss" in line}
    if 0 not in losses or len(losses) < 2:
        return None
    last = losses[max(losses)]
    return losses[0], losses.get(saved_step(trainer), last), last


def is_worse(trainer: SFTTrainer) -> bool:
    """Whether the kept weights have a higher held-out loss than the model had before."""
    losses = held_out_losses(trainer)
    return losses is not None and losses[1] > losses[0]


def warning_of_loss(trainer: SFTTrainer) -> str:
    """A sentence where the held-out loss ended higher than it began; otherwise empty."""
    before, kept, last = held_out_losses(trainer) or (0, 0, 0)
    if kept > before:
        return (
            f"WARNING: worse than before the training: the held-out loss rose from {before:.3f} to "
            f"{kept:.3f}. Do not use these weights. Try a lower learning rate, and look at the "
            "data: are the held-out conversations of the same kind?"
        )
    if last > before:
        return (
            f"WARNING: the held-out loss began at {before:.3f} and ended at {last:.3f}, which is "
            f"worse. The kept weights, from before, have {kept:.3f}. Try a lower learning rate."
        )
    return ""


def model_card(
    args: FinetuneArguments, training: SFTConfig, trainer: SFTTrainer, data: Data
) -> str:
    """A model card in Markdown: data, settings, scores, versions. No absolute path is in it."""
    model = str(args.model)
    base = Path(model).name if Path(model).is_absolute() else model
    rank = f", r = {args.lora_r}, α = {args.lora_alpha}" if args.trains_adapters else ""
    learned = "the assistant's" if training.assistant_only_loss else "all"
    evaluations = [line for line in trainer.state.log_history if "eval_loss" in line]
    table = "\n".join([*EVALUATIONS, *map(_table_line, evaluations)]) if evaluations else ""
    warning = warning_of_loss(trainer)
    results = "\n\n".join(filter(None, [warning and f"**{warning}**", table])) or "Not evaluated."
    return f"""---
library_name: transformers
pipeline_tag: text-generation
base_model: {base}
tags: [sft, trl]
---

# {Path(base).name}, finetuned to follow instructions

**Data**: {len(data.train):,} conversations of `{Path(args.data).name}`; \
{len(data.held_out):,} held out. Their licence, and that of the base model, apply to this model.

**Settings**: {args.method}{rank}; learning rate {training.learning_rate:g}, \
{schedule(training)}; {trainer.state.global_step} steps, of which the weights after \
step {saved_step(trainer)} are kept; seed {training.seed}; loss on {learned} tokens.

{results}

**Versions**: {", ".join(f"{name} {version(name)}" for name in PACKAGES)}.
"""


def _table_line(evaluation: dict[str, Any]) -> str:
    def share(name: str) -> str:
        return f"{evaluation[name]:.1%}" if name in evaluation else "–"

    return (
        f"| {evaluation['step']} | {evaluation['eval_loss']:.3f} | {share('eval_exact_match')} "
        f"| {share('eval_stops')} |"
    )


def print_samples(rows: list[dict], given: list[Answer], count: int = 3) -> None:
    """Print the first questions with the model's answers."""
    for row, answer in zip(rows[:count], given, strict=False):
        text = answer.text.replace("\n", "\n    ")
        end = "" if answer.stopped else " … (does not end)"
        print(f"\n{row['messages'][-2]['content']}\n    {text}{end}")
    print()
