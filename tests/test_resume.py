"""A training that is killed goes on from its checkpoint to the very same weights."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from sftlib import patches
from sftlib.data import read_facts
from sftlib.models import load
from sftlib.training import config

import pytest
import torch
from datasets import Dataset
from trl import SFTTrainer


def trainer(folder: Path, steps_per_save: int = 0) -> SFTTrainer:
    """Twelve steps of four rows in random order; saved as often as it is said.

    With the patches of TRL, which another test may have made in this process: they change sums in
    the last bit, and the process that is killed must add up in the same way.
    """
    patches.score_learned_positions_alone()
    patches.score_in_one_piece()
    rows = [{"messages": row["messages"]} for row in read_facts("sft")[:48]]
    model, tokenizer = load()
    saving = {"save_strategy": "steps", "save_steps": steps_per_save} if steps_per_save else {}
    args = config(output_dir=str(folder), per_device_train_batch_size=4, **saving)
    dataset = Dataset.from_list(rows)
    return SFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)


@pytest.mark.integration
def test_killed_and_resumed_gives_the_weights_of_an_undisturbed_run(tmp_path: Path):
    threads = torch.get_num_threads()  # sums in another order would differ in the last bit
    process = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": f"{threads}"},
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint-5/trainer_state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    undisturbed = trainer(tmp_path / "other")
    undisturbed.train()
    first, second = (
        [line["loss"] for line in one.state.log_history if "loss" in line]
        for one in (resumed, undisturbed)
    )
    assert len(first) == 12 and first == second
    weights = zip(resumed.model.parameters(), undisturbed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)


if __name__ == "__main__":  # the training to be killed, slow enough to be caught
    victim = trainer(Path(sys.argv[1]), steps_per_save=5)
    step = victim.training_step

    def slowly(*args, **kwargs):
        time.sleep(0.3)
        return step(*args, **kwargs)

    victim.training_step = slowly
    victim.train()
