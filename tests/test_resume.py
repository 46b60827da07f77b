"""A training that is killed goes on from its checkpoint to the very same weights."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from sftlib import patches
from sftlib.data import read_facts, write_jsonl
from sftlib.finetune.callbacks import early_stopping
from sftlib.models import load
from sftlib.training import config

import pytest
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerState
from trl import SFTTrainer

import class_5_llama3 as script
from tests.random_model import random_model

ROOT = Path(__file__).parents[1]
COUNTER = "early_stopping_patience_counter"


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
        env=os.environ | {"OMP_NUM_THREADS": f"{threads}", "PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 120
    state = tmp_path / "checkpoint-5/trainer_state.json"  # the last file of a checkpoint
    while not (state.exists() and state.read_text().rstrip().endswith("}")):
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


@pytest.fixture
def arguments(tokenizer, tmp_path):
    """A run of six steps of a random model, evaluated and saved after each."""
    random_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"messages": row["messages"]} for row in read_facts("sft")[:60]]
    write_jsonl(tmp_path / "data.jsonl", rows)
    words = f"--model {tmp_path}/base --data {tmp_path}/data.jsonl --output_dir {tmp_path}/run "
    words += "--max_steps 6 --save_steps 1 --eval_steps 1 --save_total_limit 9 --ask 1 --no_merge "
    return (words + "--answer_tokens 2 --learning_rate 0.01").split()


def forget(run: Path, after: int) -> None:
    """As if the run had been killed in the step after this one."""
    shutil.rmtree(run / "adapter")
    for folder in run.glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) > after:
            shutil.rmtree(folder)


@pytest.mark.integration
@pytest.mark.parametrize("step", [2, 4, 5])  # in an epoch of four steps, after it, in the next one
def test_the_script_resumes_the_same_run_and_patience_counts_on(step, arguments, tmp_path, capsys):
    arguments += ["--patience", "1"]
    assert script.main(arguments) == 0
    before, weights = capsys.readouterr().out, "run/adapter/adapter_model.safetensors"
    adapter = (tmp_path / weights).read_bytes()
    forget(tmp_path / "run", step)
    (tmp_path / "run/checkpoint-best").mkdir()
    assert script.main(arguments) == 0
    said = capsys.readouterr().out
    assert "Going on from" in said and f"checkpoint-{step}\n" in said and "6 steps in" in said
    assert (tmp_path / weights).read_bytes() == adapter
    lines = [line for line in before.splitlines() if "held-out loss" in line]
    assert [line for line in said.splitlines() if "held-out loss" in line] == lines[step + 1 :]


def test_patience_that_was_half_used_up_is_half_used_up_after_a_resume(tmp_path):
    used = EarlyStoppingCallback(2)
    setattr(used, COUNTER, 1)
    state = TrainerState(stateful_callbacks=[used])
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    assert getattr(early_stopping(5, str(tmp_path)), COUNTER) == 1
    assert early_stopping(5, str(tmp_path)).early_stopping_patience == 5
    assert getattr(early_stopping(5, None), COUNTER) == 0


@pytest.mark.integration
def test_weights_alone_are_no_checkpoint_and_it_is_said(arguments, tmp_path, capsys):
    assert script.main([*arguments, "--save_only_model", "true"]) == 0
    forget(tmp_path / "run", 2)
    capsys.readouterr()
    assert script.main(arguments) == 0
    said = capsys.readouterr().out
    assert (
        "checkpoint-2 cannot be resumed: it lacks rng_state.pth, scheduler.pt, optimizer.*." in said
    )
    assert "No checkpoint can be resumed: the run starts again." in said and "Going on" not in said
    assert "step     1: held-out loss" in said


@pytest.mark.nightly
def test_another_stage_or_another_number_of_ranks_is_refused_in_words(arguments, tmp_path):
    two = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc-per-node", "2"]
    zero2 = [*arguments, "--deepspeed", "deepspeed_configs/zero2.json"]

    def run(*words: str | Path) -> str:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
        return f"{done.returncode} {done.stdout}{done.stderr}"

    assert run(*two, "class_5_llama3.py", *zero2).startswith("0 ")
    forget(tmp_path / "run", 2)
    three = [*two[:-1], "1"]
    for start, words in (
        ([sys.executable, "class_5_llama3.py", *arguments], "ranks 2, zero_stage 2"),
        ([*three, "class_5_llama3.py", *zero2], "start as many ranks as before"),
    ):
        said = run(*start)
        assert words in said and "ZeRORuntime" not in said and not said.startswith("0 ")
    said = run(*two, "class_5_llama3.py", *zero2)
    assert said.startswith("0 ") and "checkpoint-2\n" in said and "6 steps in" in said


if __name__ == "__main__":  # the training to be killed, slow enough to be caught
    victim = trainer(Path(sys.argv[1]), steps_per_save=5)
    step = victim.training_step

    def slowly(*args, **kwargs):
        time.sleep(0.3)
        return step(*args, **kwargs)

    victim.training_step = slowly
    victim.train()
