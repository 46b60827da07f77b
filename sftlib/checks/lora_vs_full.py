"""The exercises of lesson 4."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any

from sftlib.checks.exercise import exercise
from sftlib.checks.verdict import Verdict, likely_cause, result_of, right, wrong
from sftlib.scale.memory import adam_bytes

if TYPE_CHECKING:
    import pandas


@exercise(4, 1, "the output of an adapted layer")
def check_adapted_layer(function: Any) -> Verdict:
    import torch

    # 5 inputs, W of 4 × 3, rank 2
    generator, shapes = torch.Generator().manual_seed(0), ((5, 4), (3, 4), (2, 4), (3, 2))
    x, w, a, b = (torch.randn(shape, generator=generator) for shape in shapes)
    alpha = 6
    found = result_of(function, x, w, a, b, alpha, context="Mind the transposes: x @ W.T. ")
    if not isinstance(found, torch.Tensor) or found.shape != (5, 3):
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        return wrong(f"Expected a tensor of shape (5, 3) for 5 inputs, found {shape}.")
    base, product = x @ w.T, x @ a.T @ b.T  # (5, 3)
    causes = {
        "That is the frozen layer alone.": base,
        "That is the adapter alone: add the frozen layer's output.": alpha / 2 * product,
        "α is missing: the product counts α / r times.": base + product,
        "Divide α by the rank, which is the number of rows of A.": base + alpha * product,
        "Divide α by the rank, not by its square root (that is rsLoRA).": base
        + alpha / 2**0.5 * product,
        "The product is multiplied by r / α: it is the other way round.": base
        + 2 / alpha * product,
    }
    if torch.allclose(found, base + alpha / 2 * product, atol=1e-5):
        return right("W and, α / r times, B A.")
    for cause, output in causes.items():
        if torch.allclose(found, output, atol=1e-5):
            return wrong(cause)
    return wrong("Expected x Wᵀ + (α / r) x Aᵀ Bᵀ, found other numbers.")


@exercise(4, 2, "LoRA's parameters on two matrices of Llama 3 8B")
def check_trainable(trainable: Any) -> Verdict:
    if not isinstance(trainable, Real):
        return wrong(f"Expected a number, found {type(trainable).__name__}.")
    query, value, r, layers = 4096 + 4096, 4096 + 1024, 8, 32
    if trainable == r * (query + value) * layers:
        return right("3.4 million of 8 billion: 0.04 %.")
    causes = {
        r * (query + value): "That is one layer: there are 32.",
        (query + value) * layers: "That is r = 1: multiply by r.",
        r * 2 * query * layers: "v_proj has fewer outputs, 1024: keys and values share heads.",
        r * query * layers: "That is q_proj alone.",
        r * value * layers: "That is v_proj alone.",
        (4096 * 4096 + 4096 * 1024) * layers: "Those are the frozen weights themselves.",
    }
    fallback = f"Expected r · (inputs + outputs) for both, in 32 layers; found {trainable:,}."
    return wrong(causes.get(trainable, fallback))


@exercise(4, 3, "what a 13B model keeps in memory in three ways of training")
def check_memory(gigabytes: Any) -> Verdict:
    base, adapter = 13_000_000_000, 60_000_000
    expected = {
        "full": adam_bytes(base, precision="mixed").total / 1e9,
        "LoRA": adam_bytes(adapter, base, frozen_dtype="bfloat16").total / 1e9,
        "QLoRA": adam_bytes(adapter, base, frozen_dtype="nf4").total / 1e9,
    }
    if not isinstance(gigabytes, dict) or set(gigabytes) != set(expected):
        return wrong(f"Expected a dict with the keys {', '.join(expected)}.")
    hints = {
        "full": {
            4 * 13: "that is 4 bytes, the weights in float32: gradients and moments are missing.",
            2 * 13: "that is the weights alone: gradients and the optimizer are missing.",
            8 * 13: "that is bfloat16 throughout: mixed precision keeps 12 bytes in float32.",
        },
        "LoRA": {
            16 * 13: "the frozen weights have neither gradients nor moments.",
            4 * 13: "the base is stored in bfloat16, 2 bytes.",
        },
        "QLoRA": {
            2 * 13: "NF4 is about half a byte per weight.",
            16 * 13: "the frozen weights have neither gradients nor moments.",
        },
    }
    for name, value in expected.items():
        found = gigabytes[name]
        if not isinstance(found, Real):
            return wrong(f"{name}: expected a number, found {found!r}.")
        if abs(found / value - 1) > 0.04:
            size = "bytes, not gigabytes?" if found > 1e6 else "too much."
            size = size if found > value else "too little."
            return wrong(f"{name}: {likely_cause(found, hints[name], tolerance=0.06) or size}")
    return right("208, 27 and 7.7 GB: three, one and a small part of an 80 GB card.")


@exercise(4, 4, "the best learning rate by dev, and its held-out score, for each")
def check_fair_comparison(fair: Any, full: pandas.DataFrame, lora: pandas.DataFrame) -> Verdict:
    if not isinstance(fair, dict) or set(fair) != {"full", "LoRA"}:
        return wrong("Expected a dict with the keys full and LoRA.")
    for name, runs in (("full", full), ("LoRA", lora)):
        pair = fair[name]
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            return wrong(f"{name}: expected (learning rate, held-out score), found {pair!r}.")
        if not all(isinstance(value, Real) for value in pair):
            return wrong(f"{name}: expected two numbers, found {pair!r}.")
        if cause := _unfair(*pair, runs):
            return wrong(f"{name}: {cause}")
    return right("Tuned on dev, reported on heldout: the difference is gone.")


def _unfair(rate: float, score: float, runs: pandas.DataFrame) -> str:
    """What is wrong with a rate and its score; empty when nothing is."""
    means = runs.groupby("learning_rate")[["dev", "heldout"]].mean()
    by_rate = means[(means.index / rate - 1).map(abs) < 1e-6] if rate else means[:0]
    if by_rate.empty:
        return f"there is no run with a learning rate of {rate}; take one of {list(means.index)}."
    dev, heldout = by_rate.iloc[0]
    if dev < means.dev.max() - 1e-9:
        if heldout >= means.heldout.max() - 1e-9:
            return "that is the best on heldout. Choose by dev: heldout is only for the final test."
        return f"another learning rate has more than {dev:.3f} on dev."
    if abs(score - heldout) > 0.006:
        if abs(score - dev) <= 0.001:
            return "that score is dev's. Report heldout, by which the rate was not chosen."
        return f"expected the mean of the seeds on heldout, found {score}."
    return ""
