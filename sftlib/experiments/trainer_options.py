"""What options of `SFTTrainer` cost in time and memory (lesson 6).

`measure` trains the same conversations with one option. Time is CPU time of one thread, because
another program on the machine changes it less than the clock's. `tools.stored_runs.trainer` stores
three repetitions of each option.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftlib.experiments import table, trainer_parts
from sftlib.experiments.spread import Spread

if TYPE_CHECKING:
    import pandas
    import torch
    from trl import SFTTrainer

RUNS = Path(__file__).parents[2] / "data" / "runs" / "trainer_options.jsonl"
ROWS, BATCH = 64, 8
OPTIONS: dict[str, dict[str, Any]] = {  # changes to `SETTINGS`
    "padded batches": {},
    "padding_free": {"padding_free": True, "max_length": None},
    "packing": {"packing": True, "max_length": 512, "per_device_train_batch_size": 1},
    "activation_checkpointing": {"activation_checkpointing": True},
    "full logits": {},  # see `FULL`
    "torch_compile": {"torch_compile": True},
}
FULL = "full logits"  # the loss of `trainer_class`, not TRL's
SETTINGS: dict[str, Any] = trainer_parts.SETTINGS | {  # arguments of `trl.SFTConfig`
    "per_device_train_batch_size": BATCH,
    "num_train_epochs": 2,
    "use_cpu": True,
}


@dataclass(frozen=True)
class OptionRun:
    """One training with an option of `OPTIONS`; repetitions differ in nothing else.

    Raises:
        ValueError: there is no such option.
    """

    option: str
    repetition: int = 0

    def __post_init__(self) -> None:
        if self.option not in OPTIONS:
            raise ValueError(f"Expected one of {[*OPTIONS]}, found {self.option!r}.")


def conversations() -> list[dict]:
    """64 conversations of different lengths: single questions and talks of two or three rounds."""
    from sftlib.experiments.chat_runs import pool, talks

    pairs = zip(pool(), talks(), strict=False)
    return [row for pair in pairs for row in pair][:ROWS]


def trainer_class(option: str) -> type[SFTTrainer]:
    """TRL's trainer; for `FULL` one that computes all logits at once, as our loop does."""
    from torch.nn.functional import cross_entropy
    from trl import SFTTrainer

    class FullLogits(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            logits = model(**inputs, use_cache=False).logits  # (B, T, V)
            total = cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
            )
            return total / num_items_in_batch  # ty: ignore[unsupported-operator]  # never None

    return FullLogits if option == FULL else SFTTrainer


def measure(run: OptionRun) -> dict[str, Any]:
    """Train two passes over the conversations with an option.

    Returns:
        `first` and `second`: CPU seconds of each pass, of this process and of the compiler that it
        starts. `losses`: of each step. In the first repetition also `peak`: the most bytes that
        tensors occupy in one pass, weights and optimizer included, measured in a run of its own
        (not for `torch_compile`, which `peak_bytes` would switch off).
    """
    import torch
    from transformers import TrainerCallback

    times = []

    class Clock(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **_):
            times.append(_cpu_seconds())

        on_train_end = on_epoch_begin

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    try:
        trainer = _trainer(run.option)
        trainer.add_callback(Clock())
        trainer.train()
        found: dict[str, Any] = {"first": times[1] - times[0], "second": times[2] - times[1]}
        found["losses"] = table(trainer).loss.dropna().round(5).tolist()
        if run.repetition == 0 and run.option != "torch_compile":
            found["peak"] = peak(run.option)
    finally:
        torch.set_num_threads(before)
    return found


def peak(option: str) -> int:
    """The most bytes that tensors occupy in one pass, weights and optimizer included."""
    from sftlib.scale.measure import peak_bytes

    trainer = _trainer(option, num_train_epochs=1)
    with peak_bytes(trainer.model.parameters()) as found:
        trainer.train()
    return found.peak


def _trainer(option: str, **changes: Any) -> Any:
    from trl import SFTConfig

    args = SFTConfig("work/options", **(SETTINGS | OPTIONS[option] | changes))
    return trainer_parts.plain_trainer(conversations(), args, trainer_class(option))


def _cpu_seconds() -> float:
    """CPU seconds of this process and of the processes that it has started and waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def stored(path: Path = RUNS) -> pandas.DataFrame:
    """The stored runs: a row for each option, with times as `Spread`s over the repetitions.

    Columns: `first` and `second` (CPU seconds), `peak` (MB; NaN where it was not measured),
    `losses` (of the first repetition).
    """
    from sftlib.data import read_jsonl

    import pandas

    runs = read_jsonl(path)
    found = {}
    for option in OPTIONS:
        own = [run for run in runs if run["option"] == option]
        peaks = [run["peak"] / 1e6 for run in own if "peak" in run] or [nan]
        found[option] = {
            "first": Spread(run["first"] for run in own),
            "second": Spread(run["second"] for run in own),
            "peak": peaks[0],
            "losses": own[0]["losses"],
        }
    return pandas.DataFrame(found).T


def said(times: Spread) -> str:
    """CPU seconds of several repetitions: mean and range."""
    return f"{times.mean:.2f} ({times.least:.2f} to {times.greatest:.2f})"


# --- The loss alone ------------------------------------------------------------------------------


def tile() -> tuple[int, int]:
    """Tokens and entries of the vocabulary in one tile of TRL's loss."""
    from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    return TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE


def loss_peak(
    fused: bool, tokens: int, vocabulary: int, width: int, dtype: torch.dtype, device: str = "meta"
) -> int:
    """The most bytes that one loss and its backward pass occupy, beside its inputs.

    On PyTorch's device `meta`, tensors have a size and no content: nothing is computed, and any
    size can be tried. (Autocast does not know this device, so it is reported as off.)

    Args:
        fused: TRL's own function, in tiles; else PyTorch's `cross_entropy` of all logits.
        tokens: positions that are learned.
        vocabulary: rows of the output head.
        width: of the hidden states.
        device: another one computes with real tensors.
    """
    from unittest.mock import patch

    from sftlib.scale.measure import peak_bytes

    import torch
    from torch.nn.functional import cross_entropy
    from trl.kernels import ChunkedLogProbFunction

    hidden = torch.zeros(tokens, width, dtype=dtype, device=device, requires_grad=True)
    head = torch.zeros(vocabulary, width, dtype=dtype, device=device, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.long, device=device)
    with patch.object(torch, "is_autocast_enabled", lambda *_: False), peak_bytes() as found:
        if fused:
            rest = (1.0, tile()[1], None, 1.0, ("log_probs", "entropy", "is_top1"))
            loss = -ChunkedLogProbFunction.apply(hidden, head, None, targets, *rest)[0].mean()
        else:
            loss = cross_entropy((hidden @ head.T).float(), targets)
        loss.backward()
    return found.peak
