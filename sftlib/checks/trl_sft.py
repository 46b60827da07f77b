"""The exercises of lesson 6."""

from __future__ import annotations

from numbers import Real
from typing import Any

from sftlib.checks.exercise import exercise
from sftlib.checks.verdict import NOT_ATTEMPTED, Verdict, call, result_of, right, untouched, wrong


@exercise(6, 1, "labels of a prompt with its completion, cut to a length")
def check_completion_labels(function: Any) -> Verdict:
    prompt, together = [5, 6, 7], [5, 6, 7, 8, 9]
    found = result_of(function, prompt, together, 10)
    if not isinstance(found, list):
        return wrong(f"Expected a list of labels, found {type(found).__name__}.")
    causes = {
        (8, 9): "Labels stand beside the ids: as many, with −100 for the prompt.",
        (5, 6, 7, -100, -100): "That learns the prompt: it is the other way round.",
        (5, 6, 7, 8, 9): "That learns the prompt, too.",
        (-100, -100, 8, 9, -100): "Do not shift: the trainer compares each position with the next.",
        (0, 0, 0, 8, 9): "0 is a token: the number that is not counted is −100.",
    }
    if found != [-100, -100, -100, 8, 9]:
        fallback = f"Expected [-100, -100, -100, 8, 9] for {prompt} and {together}, found {found}."
        return wrong(causes.get(tuple(found), fallback))
    for why, (prompt, together, max_length, expected) in FURTHER_LABELS.items():
        found = call(function, list(prompt), list(together), max_length)
        if found != expected:
            return wrong(
                f"{why} For {prompt} and {together}, with max_length={max_length}, expected "
                f"{expected}, found {found}."
            )
    return right("That is what SFTTrainer does before the first step.")


# what is tested → prompt, prompt and completion, max_length, the right labels
FURTHER_LABELS = {
    "A tokenizer may join the prompt's last token with the completion's first: learn from where "
    "the two lists differ.": ([5, 6, 7], [5, 6, 11, 9], 10, [-100, -100, 11, 9]),
    "A token of the prompt may come again in the answer, and is learned there.": (
        [5, 6, 7],
        [5, 6, 7, 8, 6, 9],
        10,
        [-100, -100, -100, 8, 6, 9],
    ),
    "The completion begins at the first difference: all tokens from there on are learned.": (
        [5, 6, 7, 8],
        [5, 9, 7, 8, 1],
        10,
        [-100, 9, 7, 8, 1],
    ),
    "The labels are cut, too.": ([5, 6, 7], [5, 6, 7, 8, 9], 4, [-100, -100, -100, 8]),
    "If nothing is left to learn, return None.": ([5, 6, 7], [5, 6, 7, 8, 9], 3, None),
}


@exercise(6, 2, "optimizer steps of Alpaca's training, and its warm-up")
def check_training_steps(steps: Any, warmup: Any) -> Verdict:
    if untouched(warmup):
        return NOT_ATTEMPTED
    if not isinstance(steps, Real) or not isinstance(warmup, Real):
        return wrong(f"Expected two numbers, found {steps!r} and {warmup!r}.")
    causes = {
        407: "That is one epoch: there are three.",
        1219: "The last, smaller step of each epoch counts: round up before you multiply.",
        3 * 1626: "That is without the accumulation: four batches make a step.",
        3 * 3251: "That is one GPU: eight of them work on each step.",
        3 * 13001: "That is one GPU without accumulation.",
    }
    if steps != 1221:
        fallback = f"Expected rows / (4 · 8 · 4), rounded up, times 3; found {steps:,}."
        return wrong(causes.get(steps, fallback))
    if warmup != 37:
        rounded = "Transformers rounds the fraction up." if 36 <= warmup < 37 else ""
        return wrong(rounded or f"3 % of {steps:,}, rounded up, is not {warmup}.")
    return right("1,221 steps of 128 rows, the first 37 of them warm-up.")


@exercise(6, 3, "an old tutorial's call, with today's arguments")
def check_modern_call(config_arguments: Any, trainer_arguments: Any) -> Verdict:
    if untouched(trainer_arguments):
        return NOT_ATTEMPTED
    if not isinstance(config_arguments, dict) or not isinstance(trainer_arguments, dict):
        return wrong("Expected two dictionaries, for SFTConfig and for SFTTrainer.")
    if moved := MOVED & set(trainer_arguments):
        return wrong(f"{', '.join(sorted(moved))}: no longer the trainer's; it moved to SFTConfig.")
    for name in (*config_arguments, *trainer_arguments):
        if name in RENAMED:
            return wrong(f"{name} is now called {RENAMED[name]}.")
    of_config = {
        name: value
        for name, value in config_arguments.items()
        if name != "output_dir" and (name not in OPTIONAL or OPTIONAL[name] != value)
    }
    of_trainer = {n: x for n, x in trainer_arguments.items() if n not in ("model", "args")}
    if cause := (
        _difference(of_config, CONFIG, "SFTConfig")
        or _difference(of_trainer, TRAINER, "SFTTrainer")
    ):
        return wrong(cause)
    return _accepted(config_arguments)


MOVED = {"max_length", "packing", "dataset_text_field"}  # from the trainer to its config
RENAMED = {
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "tokenizer": "processing_class",
    "warmup_ratio": "warmup_steps, which below 1 is a fraction",
}
CONFIG = {
    "eval_strategy": "epoch",
    "warmup_steps": 0.03,
    "dataset_text_field": "content",
    "max_length": 512,
    "packing": True,
}
# Old defaults that a right answer may name, because today's are others; and what a CPU needs.
OPTIONAL = {
    "use_cpu": True,
    "packing_strategy": "wrapped",
    "learning_rate": 5e-5,
    "bf16": False,
    "activation_checkpointing": False,
    "gradient_checkpointing": False,
    "logging_steps": 500,
}
TRAINER = {"train_dataset": "data", "eval_dataset": "eval_data", "processing_class": "tokenizer"}


def _difference(found: dict, expected: dict, whose: str) -> str:
    """How arguments differ from the right ones; empty if they do not."""
    if extra := sorted(set(found) - set(expected)):
        return f"{whose}: {', '.join(extra)} was not in the old call."
    for name, value in expected.items():
        if name not in found:
            return f"{whose}: {name} is missing."
        if found[name] != value:
            return f"{whose}: {name} should be {value!r}, found {found[name]!r}."
    return ""


def _accepted(config_arguments: dict) -> Verdict:
    from trl import SFTConfig

    settings: dict[str, Any] = config_arguments | {"use_cpu": True, "bf16": False}
    made = call(lambda: SFTConfig(**settings))
    if isinstance(made, Exception):
        return wrong(f"SFTConfig says {type(made).__name__}: {made}")
    return right("TRL takes it.")
