"""Experiments: many runs in a row, runs that go wrong on purpose, and what their logs say.

| file | what it does |
|---|---|
| `spread` | `over_seeds`: one setting with several seeds; `Spread`: what they gave |
| `sweep` | many finetuning runs, each measured in the same way and saved at once |
| `new_facts` | facts that the base has never read, taught by SFT (lesson 1) |
| `capacity` | how many random facts an adapter can store (lesson 4) |
| `forgetting` | what finetuning does to single tokens (lesson 4) |
| `chat_runs` | trainings with other masks, graded turns, system messages and packing (lesson 3) |
| `sharding` | trainings divided over ranks by DeepSpeed and by FSDP2 (lesson 5) |
| `data_quality` | what flaws of the training data cost (lesson 2) |
| `trainer_parts` | what TRL's trainer does to rows, watched (lesson 6) |
| `early_stopping` | training for too long, and which checkpoint to keep (lesson 6) |
| `trainer_options` | time and memory of options of the trainer (lesson 6) |
| `loss_curve` | one short training with one setting changed (lesson 6) |
| `failures` | trainings that go wrong on purpose (lesson 8) |
| `logs` | `table`: a training log as a table; `explain`: each figure of a `TrainOutput` |
| `diagnosis` | `diagnose`: signs of trouble in a log |
"""

from sftlib.experiments.diagnosis import diagnose
from sftlib.experiments.logs import explain, table
from sftlib.experiments.spread import Spread, over_seeds

__all__ = ["Spread", "diagnose", "explain", "over_seeds", "table"]
