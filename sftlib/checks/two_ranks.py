"""Lesson 5, exercise 4: a script for two ranks, run and compared with one process.

`sftlib.checks.launched` is the other side: what runs on each rank.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftlib.checks.exercise import exercise
from sftlib.checks.functions import current_seed
from sftlib.checks.reading import described
from sftlib.checks.verdict import CheckEnds, Verdict, right, wrong
from sftlib.experiments.sharding import LARGEST_NORM, MICRO_BATCHES

if TYPE_CHECKING:
    import torch

HARNESS = Path(__file__).with_name("launched.py")
STEPS, TESTS, STAGE, RANKS = 6, 2, 2, 2
APART = 1e-5  # nats per token

BROKEN_SCRIPT = """\
from sftlib.models import load

import deepspeed
import torch
from deepspeed import comm

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_step": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 5e-4, "weight_decay": 0.0, "torch_adam": True}},
    "zero_optimization": {"stage": 2},
}


def train(batches):
    engine = deepspeed.initialize(model=load()[0].train(), config=CONFIG)[0]
    losses = torch.zeros(len(batches))
    for step, batch in enumerate(batches):
        for micro in batch:
            mine = micro[:1]  # the row of this rank
            loss = engine(input_ids=mine, labels=mine).loss
            engine.backward(loss)
            engine.step()
            losses[step] += loss.detach() / len(batch) / comm.get_world_size()
    if comm.get_rank() == 0:
        comm.all_reduce(losses)  # add up what the ranks have
    return engine, losses.tolist()
"""
"""The script of exercise 4, as the lesson gives it."""


@exercise(5, 4, "a script for two ranks that learns what one process learns")
def check_launch(script: Any) -> Verdict:
    from sftlib.scale.launch import launch, unavailable

    import torch

    path = _readable(script)
    if reason := unavailable():
        return Verdict(None, f"Not run, because {reason}.")
    train, tests = _data()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "data.pt")
        torch.save({"train": train, "tests": tests}, file)
        options: dict[str, Any] = {"ranks": RANKS, "logs": Path(folder, "logs"), "timeout": 300}
        with contextlib.redirect_stdout(io.StringIO()):  # the verdict says what went wrong
            done = launch(HARNESS, path, file, **options, check=False)
    by_rank = {row["rank"]: row for row in done.rows if "exercise" in row}
    if fault := _stopped(by_rank, path) or _missing(by_rank, done.failures):
        return wrong(fault)
    losses, held_out = _one_process(train, tests)
    if fault := _differs(by_rank, losses, held_out):
        return wrong(fault)
    return right(
        f"On two ranks as on one: losses of {STEPS} steps and the held-out loss at most {APART:g} "
        "apart. One rank alone had called a collective, both had learned from the same row, and "
        "DeepSpeed had ignored a key that it does not know."
    )


def _readable(script: Any) -> Path:
    """The path of a script that can be tried.

    Raises:
        CheckEnds: it is no path, no such file, not Python, without `train`, or the one given.
    """
    if not isinstance(script, str | os.PathLike):
        said = f"Expected the path of your script, found {described(script)}."
        raise CheckEnds(wrong(said))
    path = Path(script)
    if not path.is_file():
        raise CheckEnds(wrong(f"Found no file {path.name}. Run the cell that writes it first."))
    source = path.read_text(encoding="utf-8")
    if source.strip() == BROKEN_SCRIPT.strip():
        said = "Not attempted yet: mend the script, run its cell again, and then this one."
        raise CheckEnds(Verdict(None, said))
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        said = f"Line {error.lineno} is not Python: {error.msg}."
        raise CheckEnds(wrong(said)) from None
    if not any(isinstance(node, ast.FunctionDef) and node.name == "train" for node in tree.body):
        raise CheckEnds(wrong("Expected a function `train(batches)` in the script, found none."))
    return path.resolve()


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    """What is trained on and what is tested on, drawn with the seed; see `sharding.batches`."""
    from sftlib.experiments.sharding import batches
    from sftlib.models import load

    skip = random.Random(current_seed()).randrange(20)
    found = batches(load()[1], STEPS + TESTS, skip)
    return found[:STEPS], found[STEPS:]


def _one_process(train: torch.Tensor, tests: torch.Tensor) -> tuple[list[float], float]:
    """The losses and the held-out loss of plain PyTorch."""
    from sftlib.experiments.sharding import one_process
    from sftlib.models import load

    model = load()[0]
    losses = one_process(model, train)
    return losses, mean_loss(model, tests)


def mean_loss(model: Any, batches: torch.Tensor) -> float:
    """The mean loss on (steps, micro-batches, rows, tokens), without training."""
    import torch

    rows = batches.flatten(0, 2)
    with torch.no_grad():
        return model(input_ids=rows, labels=rows).loss.item()


def _stopped(by_rank: Mapping[int, Mapping[str, Any]], path: Path) -> str:
    """Where a rank hangs, or which error ended it; empty if none did."""
    lines = ["", *path.read_text(encoding="utf-8").splitlines()]
    for rank, row in sorted(by_rank.items()):
        if row["exercise"] == "error":
            at = f", line {row['line']}" if row["line"] else ""
            return f"Rank {rank} stopped{at}: {row['error']}"
    for rank, row in sorted(by_rank.items()):
        if row["exercise"] == "waits":
            others = [number for number, one in by_rank.items() if one["exercise"] == "done"]
            rest = f" Rank {others[0]} has returned." if others else ""
            code = lines[row["line"]].split("#")[0].strip()
            return f"It hangs. Rank {rank} waits in line {row['line']}, `{code}`.{rest}"
    return ""


def _missing(by_rank: Mapping[int, Any], failures: Sequence[str]) -> str:
    if set(by_rank) == set(range(RANKS)):
        return ""
    return f"It did not run on {RANKS} ranks: {'; '.join(failures) or 'a rank said nothing'}."


def _differs(
    by_rank: Mapping[int, Mapping[str, Any]], losses: Sequence[float], held_out: float
) -> str:
    """In what the ranks differ from one process; empty if in nothing."""
    rows = [by_rank[rank] for rank in range(RANKS)]
    for row in rows:
        if row["stage"] != STAGE:
            return f"It trains with ZeRO stage {row['stage']}, not {STAGE}."
        if wrong_setting := _wrong_setting(row):
            return wrong_setting
        if len(row["losses"]) != STEPS:
            return f"Expected a loss for each of {STEPS} steps, found {len(row['losses'])}."
    wrong_steps = [_first_wrong(row["losses"], losses) for row in rows]
    if None in wrong_steps and wrong_steps != [None, None]:
        rank = 1 - wrong_steps.index(None)
        return f"Rank {rank} returns other losses than one process, the other rank the right ones."
    if wrong_steps == [0, 0]:
        return _wrong_rows([row["losses"][0] for row in rows], losses[0])
    if wrong_steps != [None, None]:
        return _wrong_update(min(step for step in wrong_steps if step is not None))
    for row in rows:
        apart = abs(row["held_out"] - held_out)
        if not apart <= APART:  # NaN is not
            return (
                "The losses are those of one process, and the model is not: its held-out loss is "
                f"{apart:.1g} off. Return the engine that was trained."
            )
    return ""


def _first_wrong(found: Sequence[float], expected: Sequence[float]) -> int | None:
    """The first step with another loss; None if there is none."""
    pairs = enumerate(zip(found, expected, strict=True))
    return next((step for step, (one, other) in pairs if not abs(one - other) <= APART), None)


def _wrong_rows(found: Sequence[float], expected: float) -> str:
    said = f"The loss of the first step is {found[0]:.4f} and {found[1]:.4f} on the two ranks, "
    said += f"{expected:.4f} in one process. No weight has changed yet, so "
    sums = (sum(found), sum(found) / RANKS, found[0] / RANKS, found[0] * RANKS)
    if any(abs(total - expected) <= APART for total in sums):
        return said + "the rows are right, and the mean over the ranks is not."
    return said + "look at the rows: each rank must take its own."


def _wrong_update(step: int) -> str:
    return (
        f"The losses are those of one process up to step {step - 1}, and other ones from step "
        f"{step} on. So the rows are right, and an update is not. Accumulation and clipping are "
        "right: compare the settings of the optimizer."
    )


def _wrong_setting(row: Mapping[str, Any]) -> str:
    """What the engine does otherwise than one process; empty if nothing."""
    if row["accumulation"] != MICRO_BATCHES:
        found = (
            f"{row['accumulation']} micro-batches before it updates, one process {MICRO_BATCHES}"
        )
        return f"The engine takes {found}. Which key of the configuration did it not read?"
    if row["clipping"] != LARGEST_NORM:
        found = f"{row['clipping']:g} (0: not at all), one process at {LARGEST_NORM:g}"
        return f"The engine clips gradients at {found}. Which key did it not read?"
    return ""
