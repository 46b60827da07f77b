"""The exercises of lesson 5."""

from __future__ import annotations

import copy
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from sftlib.checks.causes import likely_cause, near
from sftlib.checks.exercise import exercise
from sftlib.checks.reading import Unread, described, mapping, number, whole
from sftlib.checks.verdict import Verdict, right, wrong
from sftlib.scale.memory import Bytes, zero_bytes
from sftlib.scale.planner import RESERVE, Machines, Setting, needed_gb

# --- Predict memory ------------------------------------------------------------------------------


@exercise(5, 1, "what a rank keeps of 13 billion parameters on 16 ranks")
def check_zero_memory(gigabytes: Any) -> Verdict:
    for stage, value in mapping(gigabytes, (1, 2, 3)).items():
        if isinstance(value, Bytes):
            return wrong(f"Stage {stage}: give `.total / 1e9`; found all parts, {value}.")
        if cause := _memory_fault(stage, number(value, f"Stage {stage}")):
            return wrong(f"Stage {stage}: {cause}")
    return right("62, 37 and 13 GB: three quarters of the saving is the optimizer's.")


def _memory_fault(stage: int, found: float) -> str:
    """The likely cause of a wrong number of gigabytes; empty if it is right."""
    n = 13.0  # billion parameters, so that n · bytes per parameter are gigabytes
    parts = vars(zero_bytes(13_000_000_000, 16, stage)).values()
    weights, gradients, optimizer = (part / 1e9 for part in parts)
    expected = weights + gradients + optimizer
    if near(found, expected, tolerance=0.02):
        return ""
    causes = {
        16 * n: "that is stage 0: nothing is divided.",
        optimizer: "that is the optimizer alone: add weights and gradients.",
        weights + optimizer: "the gradients are missing.",
        weights + gradients: "the optimizer is missing: 12 bytes per parameter.",
        zero_bytes(13_000_000_000, 8, stage).total / 1e9: "that is for 8 ranks; here are 16.",
        2 * n + 2 * n + 8 * n / 16: "the optimizer has 12 bytes per parameter: two moments, and "
        "the weights in float32.",
        2 * n + (2 + 8) * n / 16: "the optimizer has 12 bytes per parameter.",
        16 * expected: "that is of all 16 ranks together.",
        **{
            zero_bytes(13_000_000_000, 16, other).total / 1e9: f"that is stage {other}."
            for other in {1, 2, 3} - {stage}
        },
    }
    return likely_cause(found, expected, causes, unit="gigabytes", tolerance=0.02) or (
        f"expected 2 + 2 + 12 bytes per parameter, with a 16th of each part that stage {stage} "
        f"divides; found {found:g} GB."
    )


# --- Repair three configurations -----------------------------------------------------------------

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


BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@exercise(5, 2, "three DeepSpeed configurations, repaired", none_is_open=False)
def check_configs(repaired: Any) -> Verdict:
    configs = mapping(repaired, BROKEN)
    given = [n for n, c in configs.items() if isinstance(c, Mapping) and dict(c) == BROKEN[n]]
    if len(given) == len(BROKEN):
        said = "Not attempted yet: correct what is wrong in A, B and C, and run the cell again."
        return Verdict(None, said)
    for name, fault in {"A": _fault_a, "B": _fault_b, "C": _fault_c}.items():
        config = configs[name]
        if name in given:
            continue
        if not isinstance(config, Mapping):
            raise Unread(f"expected a dict, found {described(config)}.", name)
        _refuse_other_types(config, name)
        read, ignored = _as_deepspeed_reads(config, name)
        if ignored:
            keys = ", ".join(ignored)
            return wrong(f"{name}: {keys}: DeepSpeed ignores what it does not know. Misspelt?")
        if cause := fault(read, config):
            return wrong(f"{name}: {cause}")
    if given:
        return Verdict(None, f"Still open: {', '.join(given)}. What you changed is right.")
    return right("One letter, one factor, one stage: none of them needs more.")


def _refuse_other_types(config: Mapping, name: str) -> None:
    """Raise where DeepSpeed would stop at an error about Python alone."""
    for key in BATCH:
        if isinstance(config.get(key), str | bool):
            found = described(config[key])
            raise Unread(f"expected a whole number as {key}, found {found}.", name)
    for key in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(config.get(key, {}), Mapping):
            raise Unread(f"expected a dict as {key}, found {described(config[key])}.", name)


class _Recorded(dict):
    """A configuration that notes at the top which keys it is asked for."""

    def __init__(self, config: Mapping) -> None:
        super().__init__(copy.deepcopy(dict(config)))
        self.asked: set = set()

    def __copy__(self) -> _Recorded:
        return self

    def __contains__(self, key: object) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: Any) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:  # DeepSpeed also asks `key in config.keys()`
        return self


def _as_deepspeed_reads(config: Mapping, name: str, ranks: int = 8) -> tuple[Any, list[str]]:
    """DeepSpeed's own reading of a configuration, and the keys that it never asks for.

    Raises:
        Unread: DeepSpeed refuses the configuration; the message says why.
    """
    from pydantic import ValidationError

    with _quiet_deepspeed():
        from deepspeed.runtime.config import DeepSpeedConfig

    class ForRanks(DeepSpeedConfig):
        def _configure_train_batch_size(self) -> None:
            self.world_size = ranks  # which DeepSpeed asks the launcher for
            super()._configure_train_batch_size()

    recorded = _Recorded(config)
    try:
        read = ForRanks(recorded)
    except Exception as error:
        said = str(error)
        if isinstance(error, ValidationError):  # only what is wrong first
            first = error.errors()[0]
            key, what = ".".join(map(str, first["loc"])), first["msg"]
            if first["type"] == "extra_forbidden":
                what = "there is no such key (misspelt?)"
            said = f"{error.title}, {key}: {what}"
        raise Unread(f"DeepSpeed refuses it: {said.rstrip('.')}.", name) from error
    return read, sorted(set(config) - recorded.asked)


@contextmanager
def _quiet_deepspeed() -> Generator[None]:
    """DeepSpeed prints a line at its import if it finds no GPU and was not told so."""
    import torch

    told = "DS_ACCELERATOR" in os.environ or torch.cuda.is_available()
    if not told:
        os.environ["DS_ACCELERATOR"] = "cpu"
    yield
    if not told:
        del os.environ["DS_ACCELERATOR"]


def _fault_a(read: Any, config: Mapping) -> str:
    if read.train_micro_batch_size_per_gpu != 4:
        return "keep the batch size, 4 rows at a time."
    if read.zero_optimization_stage != 2:
        return f"it trains with stage {read.zero_optimization_stage}, not 2."
    return "" if read.bfloat16_config.enabled else "bfloat16 was wanted."


def _fault_b(read: Any, config: Mapping) -> str:
    if read.zero_optimization_stage != 2:
        return f"keep stage 2: now it trains with stage {read.zero_optimization_stage}."
    if (read.train_batch_size, read.train_micro_batch_size_per_gpu) == (64, 4):
        return ""
    if sum(key in config for key in BATCH) < 2:
        return "leave at least two of the three batch settings, or DeepSpeed assumes the rest."
    return (
        "64 rows per step and 4 at a time were wanted: change the third number. Now "
        f"{read.train_micro_batch_size_per_gpu} rows × {read.gradient_accumulation_steps} "
        f"micro-batches × 8 GPUs are {read.train_batch_size}."
    )


def _fault_c(read: Any, config: Mapping) -> str:
    if read.train_micro_batch_size_per_gpu != 4:
        return "keep the batch size, 4 rows at a time."
    offload = read.zero_config.offload_param
    if offload is None or offload.device != "cpu":
        return "the weights should be in the CPU's memory: keep offload_param."
    if read.zero_optimization_stage != 3:
        return "offload_param works only with stage 3: below it, each rank keeps all weights."
    return ""


# --- Choose a setting ----------------------------------------------------------------------------

# name → billions of parameters, GPUs of 80 GB, GB of main memory per machine, the first that fits
MODELS: dict[str, tuple[float, int, int, int | str]] = {
    "small": (1.2, 8, 500, 0),
    "seven": (7, 8, 500, 1),
    "wide": (13, 8, 500, 2),
    "large": (34, 64, 500, 3),
    "huge": (70.6, 8, 2000, "offload"),
    "starved": (70.6, 8, 1000, "nothing"),
}
COSTS = {
    1: "stage 1 sends half as much again in each step",
    2: "stage 2 sends gradients with each micro-batch",
    3: "stage 3 gathers the weights with each micro-batch",
}
WORDS = ("offload", "nothing")


@exercise(5, 3, "the first setting that fits, six times")
def check_stages(stages: Any) -> Verdict:
    for name, given in mapping(stages, MODELS).items():
        found = given if isinstance(given, str) and given in WORDS else _stage(given, name)
        if cause := _setting_fault(found, *MODELS[name]):
            return wrong(f"{name}: {cause}")
    return right("As little ZeRO as fits, and main memory counted, too.")


def _stage(given: Any, name: str) -> int:
    if isinstance(given, str):
        raise Unread(
            f"expected a stage from 0 to 3, 'offload' or 'nothing', found {given!r}.", name
        )
    found = whole(given, name)
    if found not in (0, 1, 2, 3):
        raise Unread(f"expected a stage from 0 to 3, 'offload' or 'nothing', found {found}.", name)
    return found


def _setting_fault(
    found: int | str, billions: float, gpus: int, host_gb: int, best: int | str
) -> str:
    """Why an answer is wrong; empty if it is right."""
    machines, size = Machines(gpus, 80, host_gb), 1e9 * billions
    gpu, host = (1 - RESERVE) * 80, (1 - RESERVE) * host_gb
    if found == best:
        return ""
    if isinstance(found, int):
        on_gpu, _ = needed_gb(size, machines, Setting(found))
        if on_gpu > gpu:
            return f"stage {found} keeps {on_gpu:.0f} GB per GPU; {gpu:.0f} are free."
        return f"stage {found} fits, but so does stage {best}, and {COSTS[found]} (section 3)."
    if isinstance(best, int):
        return f"stage {best} fits without any help."
    on_gpu, on_host = needed_gb(size, machines, Setting(3, ("optimizer",)))
    if found == "offload":
        return f"the optimizer needs {on_host:,.0f} GB of main memory; {host:,.0f} are free."
    return (
        f"stage 3 with the optimizer in main memory needs {on_gpu:.0f} of {gpu:.0f} GB per GPU and "
        f"{on_host:,.0f} of {host:,.0f} GB of main memory."
    )
