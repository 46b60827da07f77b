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

PACKAGES = ("torch", "transformers", "trl", "peft")


def saved_step(trainer: SFTTrainer) -> int:
    """The step whose weights are saved: the one with the lowest held-out loss, or the last."""
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    return best or trainer.state.global_step


def model_card(
    args: FinetuneArguments, training: SFTConfig, trainer: SFTTrainer, data: Data
) -> str:
    """A model card in Markdown: data, settings, scores, versions. No absolute path is in it."""
    model = str(args.model)
    base = Path(model).name if Path(model).is_absolute() else model
    rank = f", r = {args.lora_r}, α = {args.lora_alpha}" if args.trains_adapters else ""
    learned = "the assistant's" if training.assistant_only_loss else "all"
    evaluations = [line for line in trainer.state.log_history if "eval_loss" in line]
    table = "\n".join(map(_table_line, evaluations))
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

| step | held-out loss | exact answers | ended by itself |
|--:|--:|--:|--:|
{table}

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
        asked = [m["content"] for m in row["messages"] if m["role"] == "user"]
        print(f"\n{asked[-1]}\n    {text}{end}")
    print()
