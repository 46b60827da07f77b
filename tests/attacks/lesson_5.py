"""Answers to the exercises of lesson 5."""

import atexit
import shutil
import tempfile
from collections import UserDict
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from sftlib import checks
from sftlib.checks.deepspeed import BROKEN
from sftlib.checks.two_ranks import BROKEN_SCRIPT
from sftlib.scale.memory import zero_bytes

import numpy as np
import pandas as pd
import torch

from tests.attacks import Attacks, Slow

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
        (repaired("A", zero_optimisation={"stage": 2}), "A: zero_optimisation: DeepSpeed ignores"),
        (
            repaired("A", zero_optimization=None, zero_optimisation={"stage": 3}),
            "A: zero_optimisation: DeepSpeed ignores",
        ),
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
        (repaired("B", gradient_accumulation_steps=4, bf16={"enabled": True}), "64 != 4 * 4 * 8"),
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
        (
            repaired("C", zero_optimization={"stage": 1, "offload_param": {"device": "cpu"}}),
            "only with stage 3",
        ),
        (BROKEN | {"B": repaired()["C"]}, "B: "),
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
        *(repaired() | {name: BROKEN[name]} for name in BROKEN),
        BROKEN | {"C": repaired()["C"]},
    ],
)

# --- Exercise 3 ----------------------------------------------------------------------------------

FIRST = {
    "small": 0,
    "seven": 1,
    "wide": 2,
    "large": 3,
    "huge": "offload",
    "starved": "nothing",
}

STAGES = Attacks(
    checks.check_stages,
    right=[
        FIRST,
        FIRST | {"small": np.int64(0), "wide": np.float32(2)},
        FIRST | {"large": torch.tensor(3)},
        pd.Series(FIRST),
        FIRST | {"seven": 1.0},
        dict(reversed(FIRST.items())),
        UserDict(FIRST),
    ],
    wrong=[
        (3, "keys small"),
        ([0, 1, 2, 3], "keys small, seven, wide, large, huge, starved, found list"),
        (
            FIRST | {"small": 4},
            "small: expected a stage from 0 to 3, 'offload' or 'nothing', found 4",
        ),
        (FIRST | {"small": 1}, "small: stage 1 fits, but so does stage 0, and stage 1 sends half"),
        (FIRST | {"small": 2}, "so does stage 0, and stage 2 sends gradients with each"),
        (FIRST | {"small": 3}, "so does stage 0, and stage 3 gathers the weights with each"),
        (FIRST | {"small": "offload"}, "small: stage 0 fits without any help"),
        (FIRST | {"seven": 2}, "seven: stage 2 fits, but so does stage 1"),
        (FIRST | {"seven": 0}, "seven: stage 0 keeps 112 GB per GPU; 64 are free"),
        (FIRST | {"wide": 1}, "keeps 72 GB"),
        (FIRST | {"wide": 3}, "wide: stage 3 fits"),
        (FIRST | {"large": 2}, "keeps 75 GB"),
        (FIRST | {"large": "nothing"}, "large: stage 3 fits without any help"),
        (FIRST | {"large": 2.5}, "large: expected a whole number, found 2.5"),
        (FIRST | {"large": "3"}, "large: expected a stage from 0 to 3, 'offload' or 'nothing'"),
        (FIRST | {"huge": 3}, "huge: stage 3 keeps 141 GB"),
        (FIRST | {"huge": "nothing"}, "needs 18 of 64 GB per GPU and 1,271 of 1,600 GB of main"),
        (FIRST | {"starved": "offload"}, "needs 1,271 GB of main memory; 800 are free"),
        (FIRST | {"starved": 3}, "starved: stage 3 keeps 141 GB"),
        (FIRST | {"seven": True}, "seven: expected a whole number, found True"),
        (FIRST | {"wide": float("nan")}, "found NaN"),
        (dict.fromkeys(FIRST, 3), "small: stage 3 fits"),
    ],
    untouched=[..., None, dict.fromkeys(FIRST, ...), FIRST | {"wide": ...}],
)

# --- Exercise 4 ----------------------------------------------------------------------------------

SCRIPTS = Path(tempfile.mkdtemp(prefix="sftlib-attacks-"))
atexit.register(shutil.rmtree, SCRIPTS, ignore_errors=True)
MENDED = {
    '"gradient_accumulation_step"': '"gradient_accumulation_steps"',
    "micro[:1]": "micro.chunk(comm.get_world_size())[comm.get_rank()]",
    "    if comm.get_rank() == 0:\n        comm.all_reduce(losses)": "    comm.all_reduce(losses)",
}
HANG = "    if comm.get_rank() == 0:\n        comm.all_reduce(losses)"


def script(but: Iterable[str] = (), **changes: str) -> Path:
    """The script without its mistakes, written to a file.

    Args:
        but: mistakes, keys of `MENDED`, that stay.
        changes: `old` and `new`, a piece of the mended script and what stands in its place.
    """
    text = BROKEN_SCRIPT
    for old, new in MENDED.items():
        assert old in text
        text = text if old in but else text.replace(old, new)
    if changes:
        assert changes["old"] in text
        text = text.replace(changes["old"], changes["new"])
    file = SCRIPTS / f"script{len(list(SCRIPTS.iterdir()))}.py"
    file.write_text(text, encoding="utf-8")
    return file


def written(text: str) -> Path:
    file = SCRIPTS / f"script{len(list(SCRIPTS.iterdir()))}.py"
    file.write_text(text, encoding="utf-8")
    return file


OTHER_ADAM = """\
    model = load()[0].train()
    adamw = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
    config = {k: v for k, v in CONFIG.items() if k != "optimizer"}
    config["zero_allow_untested_optimizer"] = True
    engine = deepspeed.initialize(model=model, optimizer=adamw, config=config)[0]
"""
START = "    engine = deepspeed.initialize(model=load()[0].train(), config=CONFIG)[0]\n"
RETURNED = "return engine, losses.tolist()"

LAUNCHED = Attacks(
    checks.check_launch,
    right=[
        script(),
        Slow(str(script(old="micro.chunk(comm.get_world_size())", new="torch.chunk(micro, 2)"))),
        Slow(script(old="all_reduce(losses)", new="all_reduce(losses)\n    comm.barrier()")),
        Slow(script(old="comm.all_reduce(", new="torch.distributed.all_reduce(")),
        Slow(script(old=START, new=OTHER_ADAM)),
        Slow(script(old=RETURNED, new="return [engine, losses.double().numpy()]")),
    ],
    wrong=[
        (5, "Expected the path of your script, found 5"),
        ([script()], "Expected the path of your script, found list"),
        (SCRIPTS / "missing.py", "Found no file missing.py"),
        (written("def train(batches:\n"), "Line 1 is not Python"),
        (written("def fit(batches):\n    return 1\n"), "Expected a function `train(batches)`"),
        (
            Slow(script(but=[HANG])),
            "It hangs. Rank 0 waits in line 27, `comm.all_reduce(losses)`. Rank 1",
        ),
        (script(but=["micro[:1]"]), "look at the rows: each rank must take its own"),
        (
            Slow(script(but=['"gradient_accumulation_step"'])),
            "The engine takes 1 micro-batches before it updates, one process 2. Which key",
        ),
        (
            Slow(script(old='clipping": 1.0', new='clipping": 0.0')),
            "clips gradients at 0 (0: not at all)",
        ),
        (
            Slow(script(old="    comm.all_reduce(losses)  # add up what the ranks have\n", new="")),
            "the mean over the ranks is not",
        ),
        (Slow(script(old=" / comm.get_world_size()", new="")), "the mean over the ranks is not"),
        (Slow(script(old='"stage": 2', new='"stage": 1')), "It trains with ZeRO stage 1, not 2"),
        (
            Slow(script(old='"lr": 5e-4', new='"lr": 1e-3')),
            "up to step 0, and other ones from step 1 on",
        ),
        (
            Slow(script(old=RETURNED, new="return losses.tolist()")),
            "expected an engine and its losses",
        ),
        (script(old="comm.get_rank()]", new="comm.rank()]"), "stopped, line "),
    ],
    untouched=[..., None, written(BROKEN_SCRIPT)],
    trains=True,
)

ATTACKS = [MEMORY, CONFIGS, STAGES, LAUNCHED]
