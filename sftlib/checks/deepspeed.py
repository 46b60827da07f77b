"""The exercises of lesson 5."""

from __future__ import annotations

from numbers import Real
from typing import Any

from sftlib.checks.exercise import exercise
from sftlib.checks.verdict import NOT_ATTEMPTED, Verdict, likely_cause, right, wrong
from sftlib.scale.memory import zero_bytes


@exercise(5, 1, "what a rank keeps of 13 billion parameters on 16 ranks")
def check_zero_memory(gigabytes: Any) -> Verdict:
    if not isinstance(gigabytes, dict) or set(gigabytes) != {1, 2, 3}:
        return wrong("Expected a dict with the keys 1, 2 and 3.")
    for stage, found in gigabytes.items():
        if not isinstance(found, Real) or isinstance(found, bool):
            return wrong(f"Stage {stage}: expected a number, found {found!r}.")
        if cause := _memory_fault(stage, found):
            return wrong(f"Stage {stage}: {cause}")
    return right("62, 37 and 13 GB: three quarters of the saving is the optimizer's.")


def _memory_fault(stage: int, found: float) -> str:
    """The likely cause of a wrong number of gigabytes; empty if it is right."""
    n = 13.0  # billion parameters, so that n · bytes per parameter are gigabytes
    parts = vars(zero_bytes(13_000_000_000, 16, stage)).values()
    weights, gradients, optimizer = (part / 1e9 for part in parts)
    if abs(found / (weights + gradients + optimizer) - 1) < 0.02:
        return ""
    causes = {
        16 * n: "that is stage 0: nothing is divided.",
        optimizer: "that is the optimizer alone: add weights and gradients.",
        weights + optimizer: "the gradients are missing.",
        2 * n + 2 * n + 8 * n / 16: "the optimizer has 12 bytes per parameter: two moments, and "
        "the weights in float32.",
        2 * n + (2 + 8) * n / 16: "the optimizer has 12 bytes per parameter.",
        **{
            zero_bytes(13_000_000_000, 16, other).total / 1e9: f"that is stage {other}."
            for other in {1, 2, 3} - {stage}
        },
    }
    if cause := likely_cause(found, causes, tolerance=0.02):
        return cause
    if found > 1e6:
        return "bytes, not gigabytes?"
    return (
        f"expected 2 + 2 + 12 bytes per parameter, with a 16th of each part that stage {stage} "
        f"divides; found {found:g} GB."
    )


BROKEN = {
    "A": {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimisation": {"stage": 2},
        "bf16": {"enabled": True},
    },
    "B": {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 4,
        "zero_optimization": {"stage": 2},
    },
    "C": {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}},
    },
}
"""The configurations of exercise 2, as the lesson gives them."""


@exercise(5, 2, "three DeepSpeed configurations, repaired")
def check_configs(repaired: Any) -> Verdict:
    if repaired == BROKEN:
        return NOT_ATTEMPTED
    if not isinstance(repaired, dict) or set(repaired) != set(BROKEN):
        return wrong("Expected a dict with the keys A, B and C.")
    for name, fault in {"A": _fault_a, "B": _fault_b, "C": _fault_c}.items():
        config = repaired[name]
        if not isinstance(config, dict) or not isinstance(
            config.get("zero_optimization", {}), dict
        ):
            return wrong(f"{name}: expected a dict, with a dict as zero_optimization.")
        if cause := _unknown(config) or fault(config):
            return wrong(f"{name}: {cause}")
    return right("One letter, one factor, one stage: none of them needs more.")


def _unknown(config: dict) -> str:
    """A key that is misspelt or not needed; empty without any."""
    known = {key for given in BROKEN.values() for key in given} - {"zero_optimisation"}
    known |= {"zero_optimization", "fp16", "gradient_clipping", "optimizer", "scheduler"}
    if unknown := sorted(set(config) - known):
        return (
            f"{', '.join(unknown)} is not needed here, or misspelt: DeepSpeed silently ignores "
            "top-level keys that it does not know."
        )
    offload = config.get("zero_optimization", {}).get("offload_param")
    if isinstance(offload, dict) and (more := sorted(set(offload) - {"device", "pin_memory"})):
        return f"{', '.join(more)} is not needed in offload_param, or misspelt."
    known = {"stage", "offload_param", "offload_optimizer", "reduce_bucket_size", "overlap_comm"}
    if unknown := sorted(set(config.get("zero_optimization", {})) - known):
        return f"{', '.join(unknown)} is not needed in zero_optimization, or misspelt."
    return ""


def _enabled(config: dict, precision: str) -> bool:
    part = config.get(precision, {})
    return isinstance(part, dict) and part.get("enabled") is True


def _fault_a(config: dict) -> str:
    if _stage(config) != 2:
        return f"it trains with stage {_stage(config)}, not 2."
    if no_batch := _no_batch(config):
        return no_batch
    if not _enabled(config, "bf16") or _enabled(config, "fp16"):
        return "bfloat16 was wanted, without fp16."
    return ""


def _no_batch(config: dict) -> str:
    if {"train_batch_size", "train_micro_batch_size_per_gpu"} & set(config):
        return ""
    return "keep the batch size: without one DeepSpeed does not start."


def _fault_b(config: dict) -> str:
    if _stage(config) != 2:
        return f"keep stage 2: now it trains with stage {_stage(config)}."
    rows, micro = config.get("train_batch_size"), config.get("train_micro_batch_size_per_gpu")
    accumulation = config.get("gradient_accumulation_steps")
    if micro not in (4, None) or rows not in (64, None):
        return "64 rows per step and 4 at a time were wanted: change the third number."
    if [rows, micro, accumulation].count(None) > 1:
        return "leave at least two of the three batch settings, or DeepSpeed assumes the rest."
    rows, micro = rows or 64, micro or 4
    accumulation = accumulation or rows // (micro * 8)
    if rows != micro * accumulation * 8:
        return f"{micro} rows × {accumulation} micro-batches × 8 GPUs are not {rows}."
    return ""


def _fault_c(config: dict) -> str:
    offload = config.get("zero_optimization", {}).get("offload_param")
    if not isinstance(offload, dict) or offload.get("device") != "cpu":
        return "the weights should be in the CPU's memory: keep offload_param."
    if no_batch := _no_batch(config):
        return no_batch
    if _stage(config) != 3:
        return "offload_param works only with stage 3: below it, each rank keeps all weights."
    return ""


def _stage(config: dict) -> Any:
    return config.get("zero_optimization", {}).get("stage", 0)


@exercise(5, 3, "the lowest stage that fits")
def check_stages(stages: Any) -> Verdict:
    # name → billions of parameters, GPUs, the lowest stage that fits
    models = {
        "small": (1.2, 8, 0),
        "accumulating": (7, 8, 1),
        "wide": (13, 8, 2),
        "large": (34, 64, 3),
    }
    if not isinstance(stages, dict) or set(stages) != set(models):
        return wrong(f"Expected a dict with the keys {', '.join(models)}.")
    for name, (billions, gpus, best) in models.items():
        found = stages[name]
        if found not in (0, 1, 2, 3) or isinstance(found, bool):
            return wrong(f"{name}: expected a stage from 0 to 3, found {found!r}.")
        needs = zero_bytes(round(billions * 1e9), gpus, found).total / 1e9
        if found < best:
            return wrong(f"{name}: stage {found} keeps {needs:.0f} GB per GPU; 64 are free.")
        if found > best:
            why = "sends gradients each time" if best == 1 else "has to gather weights"
            return wrong(f"{name}: stage {found} fits, but {why}; a lower stage also fits.")
    return right("As little ZeRO as fits.")
