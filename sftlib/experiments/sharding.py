"""Trainings whose state is divided over ranks, each measured in the same way (lesson 5).

`measure` runs in the ranks of a launch (`sftlib.scale.launch`). It does not know the library that
divides: it gets three functions, and so DeepSpeed and FSDP2 are measured alike.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

from sftlib.data import read_facts
from sftlib.experiments.spread import Spread
from sftlib.models import load
from sftlib.scale.measure import sent_bytes
from sftlib.scale.memory import Bytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

MICRO_BATCHES, ROWS, TOKENS = 2, 2, 16
LEARNING_RATE, LARGEST_NORM = 5e-4, 1.0
WARM_UP, TIMED = 2, 5  # steps whose time does not count, and the steps after them whose time does


def batches(tokenizer: PreTrainedTokenizerBase, steps: int, skip: int = 0) -> torch.Tensor:
    """Blocks of the course's prose, (steps, micro-batches, rows, tokens).

    Args:
        skip: how many steps' tokens to leave out first, for other data.
    """
    import torch

    text = " ".join(row["text"] for row in read_facts("prose"))
    size = MICRO_BATCHES * ROWS * TOKENS
    ids = tokenizer(text)["input_ids"][skip * size : (skip + steps) * size]
    return torch.tensor(ids).view(steps, MICRO_BATCHES, ROWS, TOKENS)


def one_process(model: torch.nn.Module, data: torch.Tensor) -> list[float]:
    """The loss of each step of plain PyTorch; the model is trained in place.

    Args:
        data: (steps, micro-batches, rows, tokens).
    """
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for batch in data:
        parts = [model(input_ids=micro, labels=micro).loss / len(batch) for micro in batch]
        sum(parts).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(part.item() for part in parts))
    return losses


def measure(
    case: str,
    data: torch.Tensor,
    backward: Callable[[torch.Tensor], torch.Tensor],
    update: Callable[[bool], None],
    kept: Callable[[], Bytes],
) -> None:
    """Train on each step of `data`, and print one line of JSON for `launch`.

    The line has `case`, `losses` (means over ranks and micro-batches), `held` (the most bytes that
    `kept` gives in step 1, by kind), `seconds` (of the five steps after two of warm-up, however
    many there are; the last step is never timed) and `sent` (bytes per parameter of the course's
    model, with each micro-batch of the last step).

    Args:
        data: (steps, micro-batches, rows, tokens); each rank takes its part of the rows.
        backward: forward and backward pass on (rows, tokens); returns the loss.
        update: called after each micro-batch, with whether it was the step's last.
        kept: the bytes that this rank keeps, asked for after a backward pass.
    """
    import torch
    from torch import distributed

    rank, world = distributed.get_rank(), distributed.get_world_size()
    losses, seconds, held, sent = [], [], [], []
    for step, batch in enumerate(data):
        last_step = step + 1 == len(data)
        total = torch.zeros((), dtype=torch.float64)
        started = time.perf_counter()
        for number, micro in enumerate(batch, 1):
            with sent_bytes() if last_step else nullcontext({}) as counted:
                loss = backward(micro.chunk(world)[rank])
                held += [vars(kept())] if step == 1 else []
                update(number == len(batch))
            sent.append(sum(counted.values()) / _parameters())
            total += loss.detach().double().cpu() / len(batch) / world
        seconds.append(time.perf_counter() - started)
        distributed.all_reduce(total)
        losses.append(total.item())
    row = {"case": case, "losses": losses, "seconds": seconds[:-1][WARM_UP:][:TIMED]}
    row["held"] = {kind: max(one[kind] for one in held) for kind in held[0]}
    row["sent"] = sent[-len(data[0]) :]
    print(json.dumps(row))


@cache
def _parameters() -> int:
    """Of the model that the dial names. Under ZeRO-3 a divided model does not show its own."""
    return load()[0].num_parameters()


def time_all_reduce(numbers: int = 2_800_000) -> None:
    """All-reduce so many float32 numbers a few times; prints one line of JSON for `launch`.

    The line has `case`, which is "all-reduce", and `rates` (bytes per second, counted as
    `sent_bytes` counts them, of as many all-reduces as `measure` times steps, after its warm-up).
    """
    import torch
    from torch import distributed

    values, rates = torch.ones(numbers), []
    for _ in range(WARM_UP + TIMED):
        distributed.barrier()
        started = time.perf_counter()
        distributed.all_reduce(values)
        rates.append(2 * values.nbytes / (time.perf_counter() - started))
    print(json.dumps({"case": "all-reduce", "rates": rates[WARM_UP:]}))


def bytes_per_second(rows: Sequence[Mapping[str, Any]]) -> Spread:
    """The fastest all-reduce in each call of `time_all_reduce`, on rank 0; see `seconds_per_step`.

    A statement that sending is quick rests on the slowest of these values, `.least`.
    """
    return Spread(
        max(row["rates"]) for row in rows if row["case"] == "all-reduce" and not row["rank"]
    )


def seconds_per_step(rows: Sequence[Mapping[str, Any]], case: str) -> Spread:
    """The fastest of the timed steps in each repetition of a case.

    All repetitions and cases must have timed equally many steps: the fastest of many is faster than
    the fastest of few. Other work of the machine can only slow a step down, so the fastest one says
    most about the library (https://docs.python.org/3/library/timeit.html says so of `repeat`). A
    step ends when its slowest rank does, so of the ranks of a repetition the slower one counts.

    Args:
        rows: what `launch` returned, from all ranks.

    Raises:
        ValueError: a repetition of the case timed another number of steps than `TIMED`.
    """
    by_rank: dict[int, list[float]] = {}
    for row in rows:
        if row["case"] == case:
            if len(row["seconds"]) != TIMED:
                found = len(row["seconds"])
                raise ValueError(
                    f"Expected {TIMED} timed steps in each repetition of {case!r}, found {found}. "
                    f"Train at least {WARM_UP + TIMED + 1} steps in each."
                )
            by_rank.setdefault(row["rank"], []).append(min(row["seconds"]))
    return Spread(map(max, zip(*by_rank.values(), strict=True)))
