"""Answers to the exercises of lesson 5."""

from collections import UserDict
from decimal import Decimal
from fractions import Fraction

from sftlib import checks
from sftlib.checks.deepspeed import BROKEN
from sftlib.scale.memory import zero_bytes

import numpy as np
import pandas as pd
import torch

from tests.attacks import Attacks

# --- Exercise 1 ----------------------------------------------------------------------------------

ZERO = {1: 61.75, 2: 37.375, 3: 13.0}
GIB = {stage: value * 1e9 / 2**30 for stage, value in ZERO.items()}

MEMORY = Attacks(
    checks.check_zero_memory,
    right=[
        ZERO,
        {1: 62, 2: 37, 3: 13},
        {np.int64(stage): np.float32(value) for stage, value in ZERO.items()},
        pd.Series(ZERO),
        {stage: torch.tensor(value) for stage, value in ZERO.items()},
        {3: Decimal(13), 1: Fraction(247, 4), 2: np.array(37.375)},
        {stage: zero_bytes(13_000_000_000, 16, stage).total / 1e9 for stage in (1, 2, 3)},
        UserDict(ZERO),
    ],
    wrong=[
        (GIB, "Stage 1: that is GiB, 2³⁰ bytes each. Give GB"),
        (ZERO | {2: GIB[2]}, "Stage 2: that is GiB"),
        (ZERO | {3: GIB[3]}, "Stage 3: that is GiB"),
        (ZERO | {1: 61_750}, "Stage 1: that is MB"),
        (ZERO | {1: 61.75e9 / 2**20}, "Stage 1: that is MiB"),
        (ZERO | {3: 13e9}, "that is bytes. Give GB"),
        (208, "Expected a dictionary with the keys 1, 2, 3, found 208"),
        ([61.75, 37.375, 13], "keys 1, 2, 3, found list"),
        ({"1": 61.75, "2": 37.375, "3": 13}, "Expected the keys 1, 2, 3, found '1', '2', '3'"),
        (ZERO | {0: 208}, "Expected the keys 1, 2, 3"),
        (ZERO | {1: 208}, "Stage 1: that is stage 0"),
        (ZERO | {1: 37.4}, "Stage 1: that is stage 2"),
        (ZERO | {2: zero_bytes(13_000_000_000, 16, 2)}, "Stage 2: give `.total / 1e9`"),
        (ZERO | {1: 52}, "Stage 1: the optimizer is missing"),
        (ZERO | {1: 71.5}, "Stage 1: that is for 8 ranks"),
        (ZERO | {2: 48.75}, "Stage 2: that is for 8 ranks"),
        (ZERO | {1: 35.75}, "gradients are missing"),
        (ZERO | {1: 58.5}, "12 bytes per parameter: two"),
        (ZERO | {2: 34.1}, "12 bytes per parameter"),
        (ZERO | {3: 9.75}, "optimizer alone"),
        (ZERO | {2: 37.375 * 16}, "of all 16 ranks"),
        (ZERO | {3: 20}, "found 20 GB"),
        (ZERO | {3: float("nan")}, "Stage 3: expected a number, found NaN"),
        (ZERO | {3: "13"}, "Stage 3: expected a number, found the text '13'"),
        (ZERO | {3: True}, "found True"),
    ],
    untouched=[..., None, dict.fromkeys(ZERO, ...), ZERO | {2: ...}],
)

# --- Exercise 2 ----------------------------------------------------------------------------------


def repaired(name="A", **changed):
    """The configurations, right; one of them with other keys (None removes a key)."""
    batch = {"train_micro_batch_size_per_gpu": 4}
    configs = {
        "A": {**batch, "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
        "B": {
            **batch,
            "train_batch_size": 64,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": 2},
        },
        "C": {**batch, "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
    }
    found = configs[name] | changed
    configs[name] = {key: value for key, value in found.items() if value is not None}
    return configs


CPU = {"device": "cpu", "pin_memory": True}
CONFIGS = Attacks(
    checks.check_configs,
    right=[
        repaired(),
        pd.Series(repaired()),
        repaired("B", gradient_accumulation_steps=None),
        repaired("B", train_batch_size=None),
        repaired("B", train_micro_batch_size_per_gpu=None),
        repaired("A", fp16={"enabled": False}),
        repaired("A", steps_per_print=10, zero_allow_untested_optimizer=True),
        repaired("A", zero_optimization={"stage": "2", "contiguous_gradients": True}),
        repaired("A", gradient_clipping=1.0, wall_clock_breakdown=False),
        repaired("C", zero_optimization={"stage": 3, "offload_param": CPU, "overlap_comm": True}),
        {name: UserDict(config) for name, config in repaired().items()},
    ],
    wrong=[
        (repaired("A", train_micro_batch_size_per_gpu=0), "has to be greater than 0"),
        (repaired("A", train_micro_batch_size_per_gpu="four"), "found the text 'four'"),
        (
            repaired("A", train_batch_size=7, gradient_accumulation_steps=3),
            "DeepSpeed refuses it: Check batch",
        ),
        (repaired("A", bf16={"enable": True}), "enable: there is no such key"),
        (repaired("A", bf16={"enabled": True, "on": True}), "A: DeepSpeed refuses it"),
        (repaired("A", gradient_accumulation_steps=0), "has to be greater than 0"),
        (repaired("A", fp16={"enabled": True}), "cannot be simultaneously enabled"),
        (repaired("A", train_micro_batch_size_per_gpu=8), "A: keep the batch size"),
        (repaired("C", train_micro_batch_size_per_gpu=1), "C: keep the batch size"),
        ([], "keys A, B, C, found list"),
        (repaired() | {"A": BROKEN["A"]}, "A: zero_optimisation: DeepSpeed ignores"),
        (repaired("A", zero_optimization={"stage": 1}), "stage 1, not 2"),
        (repaired("A", zero_optimization=None), "stage 0, not 2"),
        (repaired("A", zero_optimization=2), "A: expected a dict as zero_optimization, found 2"),
        (repaired("A", zero_optimization={"stages": 2}), "stages: there is no such key"),
        (
            repaired("A", zero_optimization={"stage": 4}),
            "stage: Input should be",
        ),
        (repaired("A", bf16=None), "bfloat16 was wanted"),
        (repaired("A", bf16={"enabled": False}), "bfloat16 was wanted"),
        (repaired("A", train_micro_batch_size_per_gpu=None), "needs to be provided"),
        (repaired() | {"A": 3}, "A: expected a dict, found 3"),
        (repaired() | {"B": BROKEN["B"]}, "64 != 4 * 4 * 8"),
        (repaired("B", train_batch_size=128, gradient_accumulation_steps=4), "third number"),
        (repaired("B", zero_optimization=None), "B: keep stage 2"),
        (repaired("B", train_batch_size=None, gradient_accumulation_steps=None), "at least two"),
        (
            repaired("B", train_micro_batch_size_per_gpu=8, gradient_accumulation_steps=1),
            "8 rows × 1 micro-batches × 8 GPUs are 64",
        ),
        (
            repaired("B", gradient_accumulation_step=2),
            "step: DeepSpeed ignores",
        ),
        (repaired() | {"C": BROKEN["C"]}, "only with stage 3"),
        (repaired("C", zero_optimization={"stage": 3}), "keep offload_param"),
        (
            repaired("C", zero_optimization={"stage": 3, "offload_param": {"device": "none"}}),
            "keep offload_param",
        ),
        (repaired("C", train_micro_batch_size_per_gpu=None), "needs to be provided"),
        ({"A": repaired()["A"]}, "Expected the keys A, B, C, found 'A'"),
    ],
    untouched=[
        ...,
        None,
        BROKEN,
        pd.Series(BROKEN),
        dict.fromkeys(BROKEN, ...),
        repaired() | {"B": ...},
    ],
)

# --- Exercise 3 ----------------------------------------------------------------------------------

LOWEST = {"small": 0, "accumulating": 1, "wide": 2, "large": 3}

STAGES = Attacks(
    checks.check_stages,
    right=[
        LOWEST,
        {name: np.int64(stage) for name, stage in LOWEST.items()},
        {name: torch.tensor(stage) for name, stage in LOWEST.items()},
        pd.Series(LOWEST),
        {name: float(stage) for name, stage in LOWEST.items()},
        dict(reversed(LOWEST.items())),
    ],
    wrong=[
        (3, "keys small"),
        ([0, 1, 2, 3], "keys small, accumulating, wide, large, found list"),
        (LOWEST | {"small": 4}, "from 0 to 3"),
        (LOWEST | {"small": 1}, "small: stage 1 fits, but it gathers the updated weights"),
        (LOWEST | {"small": 2}, "small: stage 2 fits, but it sends gradients"),
        (LOWEST | {"small": 3}, "small: stage 3 fits, but it gathers the weights in each"),
        (LOWEST | {"accumulating": 2}, "sends gradients after each micro-batch"),
        (LOWEST | {"accumulating": 0}, "accumulating: stage 0 keeps 112 GB"),
        (LOWEST | {"wide": 1}, "keeps 72 GB"),
        (LOWEST | {"wide": 3}, "wide: stage 3 fits"),
        (LOWEST | {"large": 2}, "keeps 75 GB"),
        (LOWEST | {"large": 2.5}, "large: expected a whole number, found 2.5"),
        (LOWEST | {"large": "3"}, "large: expected a whole number, found the text '3'"),
        (LOWEST | {"accumulating": True}, "accumulating: expected a whole number, found True"),
        (LOWEST | {"wide": float("nan")}, "found NaN"),
        (dict.fromkeys(LOWEST, 3), "small: stage 3 fits"),
    ],
    untouched=[..., None, dict.fromkeys(LOWEST, ...), LOWEST | {"wide": ...}],
)

ATTACKS = [MEMORY, CONFIGS, STAGES]
