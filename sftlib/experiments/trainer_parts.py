"""TRL's trainer by itself, and looking inside it while it runs unchanged (lesson 6)."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from trl import SFTConfig, SFTTrainer

SETTINGS: dict[str, Any] = {  # arguments of `trl.SFTConfig` for short trainings of the lesson
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-4,
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


def plain_trainer(
    rows: Sequence[dict], args: SFTConfig, make: type[SFTTrainer] | None = None
) -> SFTTrainer:
    """TRL's trainer of the dial's model on rows with `messages`, without bars and printed logs.

    `sftlib.training` has no part in it.

    Args:
        make: a class derived from TRL's `SFTTrainer`, in its place.
    """
    from sftlib import patches
    from sftlib.models import load

    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTTrainer

    model, tokenizer = load()
    dataset = Dataset.from_list([{"messages": row["messages"]} for row in rows])
    with patches.without_dataset_bars():
        trainer = (make or SFTTrainer)(
            model=model, args=args, train_dataset=dataset, processing_class=tokenizer
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


Step = tuple[str, dict[str, Any]]
"""What TRL says that it does, and the first row after it."""


@contextmanager
def watched() -> Generator[list[Step]]:
    """A list that fills with each step of TRL's data preparation inside the block.

    TRL prepares rows by `Dataset.map` and `Dataset.filter`, and gives each call a description for
    its progress bar. Both methods are replaced inside the block by ones that also note the
    description. Steps that only number the rows are left out.
    """
    from datasets import Dataset

    seen: list[Step] = []
    methods = {name: getattr(Dataset, name) for name in ("map", "filter")}

    def spy(method: Callable) -> Callable:
        def watching(self, *args, desc=None, **kwargs):
            result = method(self, *args, desc=desc, **kwargs)
            if desc and len(result) and "indices" not in result.column_names:
                step = re.sub(r"( (to|for|from))? train dataset", "", desc)
                seen.append((step, result[0]))
            return result

        return watching

    for name, method in methods.items():
        setattr(Dataset, name, spy(method))
    try:
        yield seen
    finally:
        for name, method in methods.items():
            setattr(Dataset, name, method)


def changes(before: dict[str, Any], steps: Sequence[Step]) -> str:
    """The steps as text, each with the columns that it added or changed."""
    lines = []
    for step, row in steps:
        lines.append(step)
        lines += [f"    {k}: {v!r}" for k, v in row.items() if before.get(k) != v]
        before = row
    return "\n".join(lines)


def apart(
    one: torch.nn.Module | Sequence[float], other: torch.nn.Module | Sequence[float]
) -> float:
    """The largest difference between two lists, or between the weights of two models."""
    import torch

    if isinstance(one, torch.nn.Module) and isinstance(other, torch.nn.Module):
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        return max((a.detach() - b.detach()).abs().max().item() for a, b in pairs)
    numbers: Any = zip(one, other, strict=True)  # ty: ignore[invalid-argument-type]  # lists
    return max(abs(a - b) for a, b in numbers)


def said(call: Callable[[], Any]) -> str:
    """The error of a call on one line, without Python's suggestions; "no error" if there is none.

    Brackets are left out, and the suggestions that Python adds since 3.13.
    """
    try:
        call()
    except Exception as error:
        message = str(error).split(" (")[0].split(". Did you mean")[0]
        return f"{type(error).__name__}: {message}"
    return "no error"
