"""Meeting the other ranks, an engine, a step: what the scripts beside this one share."""

from collections.abc import Callable, Iterable

from sftlib.models import load
from sftlib.patches import without_builds

import deepspeed
import torch
from deepspeed import DeepSpeedEngine, comm

from data import batches

without_builds()  # `sftlib.scale.rank_process` has done so; other launchers do not
deepspeed.init_distributed()
rank, world = comm.get_rank(), comm.get_world_size()
data = batches()


def start(
    stage: int, dtype: str = "float32", settings: dict | None = None, **zero
) -> DeepSpeedEngine:
    """An engine for the tiny base, with more keys of the configuration and of its ZeRO section."""
    divide_all = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    config = {
        "train_micro_batch_size_per_gpu": data.shape[2] // world,
        "gradient_accumulation_steps": data.shape[1],
        "gradient_clipping": 1.0,
        # torch's Adam: DeepSpeed's own for a CPU is compiled first, for two minutes
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 5e-4, "weight_decay": 0.0, "torch_adam": True},
        },
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 500_000, **divide_all, **zero},
    }
    return deepspeed.initialize(model=load()[0].train(), config=config | (settings or {}))[0]


def train(
    engine: DeepSpeedEngine,
    steps: Iterable[int],
    after_backward: Callable[[int], None] = lambda step: None,
) -> Iterable[float]:
    """Train for these steps; yields each one's loss, the mean over the ranks."""
    for step in steps:
        total = torch.zeros((), dtype=torch.float64)
        for micro in data[step]:
            mine = micro.chunk(world)[rank]
            loss = engine(input_ids=mine, labels=mine).loss
            engine.backward(loss)
            after_backward(step)
            engine.step()
            total += loss.detach().double() / len(data[step]) / world
        comm.all_reduce(total)
        yield total.item()
