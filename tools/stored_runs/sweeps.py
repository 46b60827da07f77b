"""Train the tiny base model again and again: the stored runs of lesson 4 (`make sweeps`).

Takes an hour; goes on where it was interrupted. To begin anew, delete the files. With
`--larger`, five runs of SmolLM2-135M-Instruct instead (`make teacher` installs it), which take as
long.
"""

import os
import pydoc_data.topics
import sys
from itertools import product
from pathlib import Path
from typing import Any

from sftlib.data import write_jsonl
from sftlib.experiments.sweep import Run, sweep
from sftlib.training import FULL_LEARNING_RATE as FULL
from sftlib.training import LORA_LEARNING_RATE as LORA

RUNS = Path(__file__).parents[2] / "data" / "runs" / "lora_vs_full.jsonl"
LARGER_RUNS = RUNS.with_name("lora_vs_full_135m.jsonl")
SEEDS = (0, 1, 2)
LARGER = [Run(0, examples=16), Run(1e-4), Run(1e-3, r=8), Run(3e-4), Run(3e-3, r=8)]


def grid(learning_rates: tuple[float, ...], **settings) -> list[Run]:
    """A run for each learning rate and seed."""
    return [Run(rate, seed=seed, **settings) for rate, seed in product(learning_rates, SEEDS)]


FULL_RATES = (1e-4, 2e-4, 3e-4, FULL, 7e-4, 1e-3, 2e-3, 5e-3)
LORA_RATES = (5e-4, 1e-3, 2e-3, 3e-3, LORA, 7e-3, 1e-2, 2e-2)
# Each rate about twice the one before. The best rate must not be the first or the last of a grid.
FULL_COARSE = (2e-4, FULL, 1e-3, 2e-3, 5e-3)
LORA_COARSE = (1e-3, 2e-3, LORA, 1e-2, 2e-2)


Tuned = list[tuple[dict[str, Any], tuple[float, ...]]]


def tuned() -> Tuned:
    """The settings that are compared at their best learning rates, and the rates each one got."""
    ranks: Tuned = [({"r": 1}, (*LORA_COARSE, 5e-2))]
    ranks += [({"r": r}, LORA_COARSE) for r in (2, 4, 16, 32, 64)]
    places: Tuned = [({"r": 8, "targets": t}, LORA_COARSE) for t in ("attention", "mlp")]
    full_places: Tuned = [({"targets": t}, FULL_COARSE) for t in ("attention", "mlp", "all-linear")]
    variants: Tuned = [
        ({"r": 8, "variant": v}, LORA_COARSE) for v in ("dora", "rslora", "control tokens")
    ]
    alphas: Tuned = [
        ({"r": 8, "alpha": 4}, (2e-3, LORA, 1e-2, 2e-2, 5e-2)),
        ({"r": 8, "alpha": 64}, (5e-4, 1e-3, 2e-3, LORA, 1e-2)),
        ({"r": 8, "alpha": 128}, (2e-4, 5e-4, 1e-3, 2e-3, LORA)),
    ]
    both: Tuned = [({}, FULL_RATES), ({"r": 8}, LORA_RATES)]
    return both + ranks + alphas + places + full_places + variants


def runs() -> list[Run]:
    """What lesson 4 reads, study by study."""
    found = [run for settings, rates in tuned() for run in grid(rates, **settings)]
    found += grid((1e-3,), r=8, alpha=4)  # with the same rate as the other values of alpha
    for examples in (16, 32, 64, 128, 240, 960):  # 30 steps each
        found += grid((FULL,), examples=examples, epochs=480 / examples)
        found += grid((LORA,), r=8, examples=examples, epochs=480 / examples)
    found += grid((5e-5, 1e-4, 2e-4, 3e-4), epochs=4)
    found += grid((3e-4, 5e-4, 1e-3, 2e-3), r=8, epochs=4)
    found += grid((FULL,), replay=48) + grid((LORA,), r=8, replay=48)
    return [Run(0, examples=16), *found]  # a learning rate of 0: the base model


if __name__ == "__main__":
    if "--larger" in sys.argv:
        os.environ["SFT_MODEL"] = "smollm2-135m"
        # Ordinary prose that comes with each Python: its own reference.
        reference = [text[:600] for _, text in sorted(pydoc_data.topics.topics.items())]
        texts = [text for text in reference if len(text) == 600][:48]
        sweep(LARGER, LARGER_RUNS, prompts=40, texts=texts)
    else:
        write_jsonl(RUNS, sweep(runs(), RUNS))  # in the order of `runs`, whenever they were made
