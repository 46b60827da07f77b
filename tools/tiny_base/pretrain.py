"""Pretrain the tiny base model: a Llama of 2.8 million parameters, on two CPU cores.

The 1,212 steps take about twenty minutes on two cores: 0.8 to 0.9 s per step on a CPU with bfloat16
instructions, about 1.1 s on one with AVX2 alone (see `_Float32`).
"""

import math
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LENGTH = 128  # tokens in a row
ROWS = 32  # rows in a batch
MUON_LEARNING_RATE = 0.02
ADAM_LEARNING_RATE = 3e-3
WARMUP = 50  # steps


def pack(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Documents in order, each closed by the end-of-text token, cut into rows of `LENGTH`."""
    ids: list[int] = []
    for document in tokenizer(documents)["input_ids"]:
        ids += [*document, tokenizer.eos_token_id]
    rows = len(ids) // LENGTH
    return torch.tensor(ids[: rows * LENGTH]).view(rows, LENGTH)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model; the seed of torch decides its weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            num_hidden_layers=3,
            intermediate_size=640,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the rest, as Muon's author recommends.

    Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks") learned
    the facts from about half the tokens that AdamW alone needed here.
    """
    hidden, rest = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and "embed_tokens" not in name
        (hidden if matrix else rest).append(parameter)
    return [
        torch.optim.Muon(hidden, lr=MUON_LEARNING_RATE, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(
            rest, lr=ADAM_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05, fused=True
        ),
    ]


class _Float32(TorchFunctionMode):
    """Inside `with`, `tensor.bfloat16()` copies the tensor in float32 instead.

    `torch.optim.Muon` (torch 2.13) orthogonalizes in bfloat16 and has no option for another type.
    CPUs without bfloat16 instructions (those with AVX2 alone, for instance) emulate it: a step
    takes 3.4 times as long there as in float32, on one thread. Where a CPU has the instructions,
    float32 takes 9 % longer. Over 50 steps no loss differs by more than 0.0063; another seed
    changes them by up to 0.052.
    """

    def __torch_function__(self, func, types, args: tuple = (), kwargs: dict | None = None):
        if func is torch.Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)  # Muon changes the result in place
        return func(*args, **(kwargs or {}))


def _schedule(steps: int):
    """Linear warm-up, then a cosine down to 3 % of the peak."""

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
        return min(1.0, (step + 1) / WARMUP) * (0.03 + 0.97 * cosine)

    return factor


def pretrain(model: LlamaForCausalLM, rows: torch.Tensor) -> Iterator[tuple[int, float]]:
    """One epoch over `rows`, in order (the corpus is a curriculum); yields (step, loss)."""
    optimizers = _optimizers(model)
    batches = rows[: len(rows) // ROWS * ROWS].split(ROWS)
    factor = _schedule(len(batches))
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in optimizers]
    model.train()
    for step, batch in enumerate(batches, 1):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with _Float32():
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        yield step, loss.item()
