"""Answers to the exercises of lesson 6."""

from collections import UserDict
from decimal import Decimal
from fractions import Fraction
from itertools import takewhile

from sftlib import checks
from sftlib.checks import trl_sft

import numpy as np
import pandas as pd
import torch
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig

from tests.attacks import Attacks, raises

# --- Exercise 1 ----------------------------------------------------------------------------------


def labels(prompt, together, max_length):
    same = [*takewhile(lambda pair: pair[0] == pair[1], zip(prompt, together, strict=False))]
    found = ([-100] * len(same) + together[len(same) :])[:max_length]
    return found if set(found) - {-100} else None


def as_kind(kind):
    def convert(prompt, together, max_length):
        found = labels(prompt, together, max_length)
        return None if found is None else kind(found)

    return convert


def one_by_one(prompt, together, max_length):
    found, alike = [], True
    for i in range(min(len(together), max_length)):
        alike = alike and prompt[i : i + 1] == [together[i]]
        found.append(-100 if alike else together[i])
    return None if all(label == -100 for label in found) else found


def with_index_error(prompt, together, max_length):
    start = 0
    while start < len(prompt) and prompt[start] == together[start]:
        start += 1
    found = ([-100] * start + together[start:])[:max_length]
    return found if any(label != -100 for label in found) else None


def in_place(prompt, together, max_length):
    expected = labels(prompt, together, max_length)
    for i in range(len(prompt)):
        together[i : i + 1] = [-100]
    return expected


def no_return(prompt, together, max_length):
    labels(prompt, together, max_length)


def without_zeros(prompt, together, max_length):
    found = labels(prompt, together, max_length) or []
    return found if any(label > 0 for label in found) else None


def too_early(prompt, together, max_length):
    return None if max_length <= len(prompt) else labels(prompt, together, max_length)


LABELS = Attacks(
    checks.check_completion_labels,
    right=[
        labels,
        one_by_one,
        as_kind(tuple),
        as_kind(np.array),
        as_kind(torch.tensor),
        as_kind(lambda found: [np.int64(label) for label in found]),
        as_kind(iter),
    ],
    wrong=[
        (
            lambda p, t, n: labels(p, t, n) if p else None,
            "The prompt may be empty: then all of `together` is learned. For prompt=[]",
        ),
        (lambda p, t, n: labels(p, t, n) if t else [], "`together` may be empty"),
        (lambda p, t, n: (t[0], labels(p, t, n))[1], "raised IndexError"),
        (too_early, "Even below the prompt's length something may be left"),
        (with_index_error, "but your function raised IndexError: list index out of range in line"),
        (lambda p, t, n: t[len(p) :], "as many, with −100"),
        (lambda p, t, n: t, "learns the prompt, too"),
        (lambda p, t, n: t[:n], "learns the prompt"),
        (lambda p, t, n: p + [-100] * (len(t) - len(p)), "the other way round"),
        (lambda p, t, n: [0] * len(p) + t[len(p) :], "0 is a token"),
        (lambda p, t, n: [-100] * len(p) + t[len(p) :], "learn from where the two lists differ"),
        (lambda p, t, n: labels(p, t, 99), "The labels are cut, too. For prompt=[5, 6, 7]"),
        (lambda p, t, n: labels(p, t, n) or [-100] * n, "expected None"),
        (lambda p, t, n: [-100 if x in p else x for x in t][:n], "come again in the answer"),
        (
            lambda p, t, n: [-100 if p[i : i + 1] == [x] else x for i, x in enumerate(t)][:n],
            "begins at the first difference",
        ),
        (
            lambda p, t, n: (labels(p, t, n) or [0])[1:] + [-100],
            "expected [-100, -100, -100, 8, 9]",
        ),
        (
            lambda p, t, n: labels(p, t, n) if any(x > 0 for x in labels(p, t, n) or []) else None,
            "0 is a token, too",
        ),
        (lambda p, t, n: [-100, -100, -100, 8, 9], "always returns [-100, -100, -100, 8, 9]"),
        (lambda p, t, n: [], "always returns []"),
        (lambda p, t, n: set(labels(p, t, n) or ()), "a set, which has no order"),
        (lambda p, t, n: len(t), "expected a list, found 5"),
        (lambda p, t, n: str(labels(p, t, n)), "expected a list, found the text"),
        (in_place, "changes its argument together in place"),
        (no_return, "did you forget `return`?"),
        (lambda p, t, n: print(labels(p, t, n)), "write `return` in place of `print`"),
        (lambda prompt: [], "function of (prompt, together, max_length), found one of (prompt)"),
        (lambda p, t, n: raises(SystemExit("no")), "raised SystemExit: no"),
        (trl_sft.completion_labels, "calls completion_labels of sftlib.checks"),
    ],
    untouched=[..., None, lambda prompt, together, max_length: ...],
)

# --- Exercise 2 ----------------------------------------------------------------------------------

STEPS = Attacks(
    checks.check_training_steps,
    right=[
        (1221, 37),
        (1221.0, 37.0),
        (np.int64(1221), np.ceil(36.63)),
        torch.tensor([1221, 37]),
        (torch.tensor(1221), torch.tensor(37)),
        (Fraction(1221), Decimal(37)),
    ],
    wrong=[
        ((407, 13), "one epoch"),
        ((1219, 37), "round up before"),
        ((1218, 37), "not down"),
        ((4878, 147), "either the batch of 4 or the accumulation of 4 is missing"),
        ((19503, 586), "8 rows a step"),
        ((1000, 30), "1,000 are not the steps. How many rows does a step see"),
        ([(1221, 37)], "Expected 2 answers, steps and warmup, found 1: (1221, 37)"),
        ((9753, 293), "one GPU"),
        ((39003, 1171), "4 rows a step"),
        ((156_006, 37), "That is rows"),
        ((1218.796875, 37), "1,218.796875 are not the steps"),
        ((1221, 36), "rounds the fraction up"),
        ((1221, 36.63), "rounds the fraction up"),
        ((1221, 122), "is not 122"),
        ((1221, 0.03), "That is the share"),
        ((1221, 3), "That is the share"),
        ((37, 1221), "37 are not the steps"),
        (("1221", 37), "steps: expected a number, found the text '1221'"),
        ((1221, "37"), "warmup: expected a number, found the text '37'"),
        ((1221, [37]), "warmup: expected a number, found list"),
        ((float("nan"), 37), "steps: expected a number, found NaN"),
        ((1221, True), "warmup: expected a number, found True"),
    ],
    untouched=[(..., ...), (..., 37), (1221, ...), (None, None)],
    arguments=lambda pair: pair,
)

# --- Exercise 3 ----------------------------------------------------------------------------------

CONFIG = {
    "output_dir": "out",
    "eval_strategy": "epoch",
    "warmup_steps": 0.03,
    "dataset_text_field": "content",
    "max_length": 512,
    "packing": True,
}
TRAINER = {
    "model": "model",
    "args": "config",
    "train_dataset": "data",
    "eval_dataset": "eval_data",
    "processing_class": "tokenizer",
}
AS_BEFORE = {"learning_rate": 5e-5, "bf16": False, "activation_checkpointing": False}
AS_BEFORE |= {"gradient_checkpointing": False, "logging_steps": 500}


def without(arguments, *names):
    return {name: value for name, value in arguments.items() if name not in names}


def config(**more):
    return CONFIG | more, TRAINER


def trainer(**more):
    return CONFIG, TRAINER | more


CALL = Attacks(
    checks.check_modern_call,
    right=[
        (CONFIG, TRAINER),
        (without(CONFIG, "output_dir"), TRAINER),
        config(**AS_BEFORE),
        config(packing_strategy="wrapped", use_cpu=True),
        config(assistant_only_loss=False),
        config(use_cpu=False),
        config(report_to="none"),
        config(report_to=["tensorboard"], seed=42),
        trainer(args="SFTConfig(**config_arguments)"),
        trainer(args=CONFIG),
        trainer(args=SFTConfig(**CONFIG, use_cpu=True, bf16=False)),
        trainer(args="trl.SFTConfig(**config_arguments)"),
        trainer(args="self.config"),
        trainer(args="training_args"),
        (pd.Series(CONFIG), pd.Series(TRAINER)),
        trainer(peft_config=None),
        (UserDict(CONFIG), UserDict(TRAINER)),
        config(max_length=np.int64(512), warmup_steps=Fraction(3, 100), packing=np.bool_(True)),
        config(eval_strategy=IntervalStrategy.EPOCH),
    ],
    wrong=[
        ((CONFIG, without(TRAINER, "args")), "args is missing. Without `args`, the settings"),
        ((CONFIG, without(TRAINER, "model")), "model is missing"),
        ((CONFIG, without(TRAINER, "model", "args")), "model, args is missing"),
        *(
            (
                trainer(args=name),
                f"args should name the SFTConfig, such as 'config'; found '{name}'",
            )
            for name in (
                "SFTConfig()",
                "SFTConfig",
                "TrainingArguments",
                "None",
                "banana",
                "epoch",
                "out",
                "eval_dataset",
                "SFTConfig(nonsense)",
                "",
            )
        ),
        (trainer(args=SFTConfig("out", use_cpu=True, bf16=False)), "args should name the SFTCon"),
        (trainer(args=np.arange(3)), "args should name the SFTConfig"),
        (trainer(args=pd.DataFrame({"a": [1, 2]})), "args should name the SFTConfig"),
        (trainer(model=np.arange(3)), "model should be 'model', found [0, 1, 2]"),
        ((CONFIG | {3: 4}, TRAINER), "names of arguments as keys for SFTConfig, found 3"),
        ((CONFIG, TRAINER | {None: 4, (1, 2): 5}), "as keys for SFTTrainer, found None"),
        (config(learning_rate=np.arange(3)), "does not say the same as the old call"),
        (config(learning_rate=2e-5), "in which it was 5e-05: write that, or nothing"),
        (config(processing_class="tokenizer"), "processing_class belongs to SFTTrainer"),
        (trainer(eval_strategy="epoch"), "eval_strategy belongs to SFTConfig"),
        ((CONFIG | TRAINER, TRAINER), "model, processing_class, train_dataset belongs to SFTTr"),
        ((pd.DataFrame([CONFIG]), TRAINER), "found for SFTConfig DataFrame"),
        (trainer(args=42), "args should name the SFTConfig, such as 'config'; found 42"),
        (trainer(args="tokenizer"), "args should name the SFTConfig"),
        (trainer(args=None), "args should name the SFTConfig"),
        (trainer(model="tokenizer"), "model should be 'model', found 'tokenizer'"),
        (trainer(processing_class="model"), "processing_class should be 'tokenizer'"),
        ((CONFIG, []), "two dictionaries, for SFTConfig and for SFTTrainer; found for SFTTrainer"),
        (("CONFIG", TRAINER), "found for SFTConfig the text"),
        (trainer(packing=True), "moved to SFTConfig"),
        (config(warmup_ratio=0.03), "now called warmup"),
        ((CONFIG, TRAINER | {"tokenizer": "tokenizer"}), "processing_class"),
        (config(evaluation_strategy="epoch"), "eval_strategy"),
        (config(max_seq_length=512), "now called max_length"),
        ((without(CONFIG, "packing"), TRAINER), "packing is missing"),
        (config(max_length=64), "should be 512"),
        (config(max_length=None), "max_length should be 512, found None"),
        (config(packing=False), "packing should be True"),
        (config(warmup_steps=3), "warmup_steps should be 0.03"),
        ((CONFIG, without(TRAINER, "eval_dataset")), "eval_dataset is missing"),
        (trainer(eval_dataset="data"), "eval_dataset should be 'eval_data'"),
        (config(bf16=True), "in which it was False"),
        (config(packing_strategy="bfd"), "in which it was 'wrapped'"),
        (config(assistant_only_loss=True), "assistant_only_loss was not in the old call"),
        (config(per_device_batch=4), "per_device_batch was not in the old call"),
        (trainer(peft_config="lora"), "peft_config was not in the old call"),
        (config(logging_steps=0), "SFTConfig says ValueError"),
        (config(eval_strategy=3), "eval_strategy should be 'epoch', found 3"),
    ],
    untouched=[(..., ...), (CONFIG, ...), config(max_length=...), (None, None)],
    arguments=lambda pair: pair,
)

# --- Exercise 4 ----------------------------------------------------------------------------------

CURVE = Attacks(
    checks.check_loss_curve,
    right=[
        {"warmup_steps": 1},
        {"warmup_steps": np.int64(1), "learning_rate": 5e-4},
        {"warmup_steps": 0.08},  # a fraction of twelve steps, rounded up
        UserDict({"warmup_steps": 1.0}),
        pd.Series({"warmup_steps": 1}),
        {"warmup_steps": torch.tensor(1)},
    ],
    wrong=[
        ({"learning_rate": 1e-3}, "leaves the given one at step 4"),
        ({"warmup_steps": 0}, "leaves the given one at step 2"),
        ({"assistant_only_loss": False}, "leaves the given one at step 1"),
        ({"max_length": 512}, "It changes no loss here"),
        ({"per_device_train_batch_size": 4}, "Your training has 24 losses, the given one 12"),
        ({"lr_scheduler_type": "constant_with_warmup"}, "leaves the given one at step 3"),
        ({}, "one setting that is not the usual one, found 0: none"),
        ({"warmup_steps": 2}, "found 0: none"),
        ({"warmup_steps": 1, "learning_rate": 1e-3}, "found 2: warmup_steps, learning_rate"),
        ({"warm_up": 1}, "SFTConfig says TypeError"),
        ({"warmup_steps": -1}, "SFTConfig says ValueError"),
        ({"output_dir": "out"}, "output_dir does not touch the losses"),
        ({"lr_scheduler_type": "no such curve"}, "SFTConfig says ValueError"),
        ({"warmup_steps": [1]}, "SFTConfig says TypeError"),
        ("warmup_steps=1", "a dictionary such as"),
        (1, "a dictionary such as"),
        ({1: "warmup_steps"}, "names of arguments as keys for SFTConfig, found 1"),
        (SFTConfig("out", warmup_steps=1, use_cpu=True, bf16=False), "a dictionary such as"),
    ],
    untouched=[..., None, {"warmup_steps": ...}],
    trains=True,
)

ATTACKS = [LABELS, STEPS, CALL, CURVE]
