"""What every rank trains on, and the test itself: no DeepSpeed here."""

from sftlib.data import read_facts
from sftlib.models import load

import torch


def batches() -> torch.Tensor:
    """Blocks of tokens of our prose: step, micro-batch, row, token."""
    tokenizer = load()[1]
    ids = tokenizer(" ".join(row["text"] for row in read_facts("prose")))["input_ids"]
    return torch.tensor(ids[: 20 * 2 * 4 * 16]).view(20, 2, 4, 16)
