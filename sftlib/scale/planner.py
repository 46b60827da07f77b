"""Which settings of ZeRO fit into GPUs and main memory, counted before anything is bought or run.

`sftlib.finetune.plan` plans one training in detail. This module compares all stages for a model of
which only the size is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftlib.scale.memory import zero_bytes

if TYPE_CHECKING:
    import pandas

# Bytes per parameter in main memory. With an offloaded optimizer, DeepSpeed 0.19 keeps there, in
# all ranks together: Adam's moments and the float32 weights (12), the gradients in float32 (4) and
# in bfloat16 (2). `tests/test_planner.py` compares this with two ranks of stage 3.
OPTIMIZER_STATES, HOST_GRADIENTS, WEIGHTS = 12, 4 + 2, 2
RESERVE = 0.2  # of each memory: for activations and buffers, and for the system


@dataclass(frozen=True)
class Setting:
    """A ZeRO stage, and what it keeps in main memory: nothing, `optimizer`, or also `weights`."""

    stage: int
    offload: tuple[str, ...] = ()

    def __str__(self) -> str:
        moved = " and ".join(self.offload)
        return f"stage {self.stage}" + (f", {moved} in main memory" if moved else "")


SETTINGS = [
    Setting(0),
    Setting(1),
    Setting(2),
    Setting(3),
    Setting(2, ("optimizer",)),
    Setting(3, ("optimizer",)),
    Setting(3, ("optimizer", "weights")),
]
"""From the one that sends least to the one that sends most (lesson 5, sections 3 and 5)."""


@dataclass(frozen=True)
class Machines:
    """What there is.

    Attributes:
        gpus: in all.
        gpu_gb: memory of each GPU, in GB (10⁹ bytes).
        host_gb: main memory of each machine, in GB.
        gpus_per_machine: at most.
    """

    gpus: int
    gpu_gb: float
    host_gb: float
    gpus_per_machine: int = 8

    @property
    def count(self) -> int:
        """How many machines there are."""
        return -(-self.gpus // self.gpus_per_machine)


def needed_gb(
    trained: float, machines: Machines, setting: Setting, frozen: float = 0
) -> tuple[float, float]:
    """GB on each GPU and in the main memory of each machine, in mixed precision, with Adam.

    Activations, communication buffers and the system are not included.

    Args:
        trained: number of parameters that are trained.
        frozen: number of parameters that are not, in bfloat16.
    """
    kept = zero_bytes(round(trained), machines.gpus, setting.stage, frozen=round(frozen))
    on_gpu, on_host = kept.total, 0.0
    if "optimizer" in setting.offload:
        on_gpu -= kept.optimizer + kept.gradients
        on_host += (OPTIMIZER_STATES + HOST_GRADIENTS) * trained
    if "weights" in setting.offload:
        on_gpu -= kept.weights
        on_host += WEIGHTS * (trained + frozen)
    return on_gpu / 1e9, on_host / machines.count / 1e9


def plan(trained: float, machines: Machines, frozen: float = 0) -> pandas.DataFrame:
    """All settings, each with what it needs and whether that fits, a fifth of each memory left.

    Args:
        trained: number of parameters that are trained.
        frozen: number of parameters that are not, in bfloat16.

    Returns:
        A row for each of `SETTINGS`: `GB on each GPU`, `GB of main memory` and `fits`, which says
        `yes`, or what is too small.
    """
    import pandas

    rows = {}
    for setting in SETTINGS:
        on_gpu, on_host = needed_gb(trained, machines, setting, frozen)
        too_small = ", ".join(_too_small(on_gpu, on_host, machines))
        rows[str(setting)] = {
            "GB on each GPU": round(on_gpu, 1),
            "GB of main memory": round(on_host, 1),
            "fits": f"no: {too_small}" if too_small else "yes",
        }
    return pandas.DataFrame(rows).T.rename_axis("setting")


def _too_small(on_gpu: float, on_host: float, machines: Machines) -> Iterator[str]:
    if on_gpu > (1 - RESERVE) * machines.gpu_gb:
        yield "GPU memory"
    if on_host > (1 - RESERVE) * machines.host_gb:
        yield "main memory"


def first_that_fits(trained: float, machines: Machines, frozen: float = 0) -> str:
    """The first of `SETTINGS` that fits, in words; `nothing fits` where none does."""
    fits = plan(trained, machines, frozen).fits
    return next((name for name, said in fits.items() if said == "yes"), "nothing fits")
