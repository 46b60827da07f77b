"""The exercises of lesson 4."""

from __future__ import annotations

import copy
import math
import random
from typing import TYPE_CHECKING, Any

from sftlib.checks.causes import likely_cause, near
from sftlib.checks.exercise import exercise
from sftlib.checks.functions import call, compare, reference
from sftlib.checks.held_out import training_seed
from sftlib.checks.reading import described, mapping, number, sequence, shown
from sftlib.checks.verdict import CheckEnds, Verdict, right, wrong
from sftlib.scale.memory import Bytes, adam_bytes

if TYPE_CHECKING:
    import pandas
    from torch import Tensor

# --- Write LoRA ----------------------------------------------------------------------------------


@reference
def adapted(x: Tensor, W: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    return _with_scale(alpha / len(A))(x, W, A, B, alpha)


def _with_scale(scale: float) -> Any:
    return lambda x, W, A, B, alpha: x @ W.T + scale * (x @ A.T @ B.T)  # (n, outputs)


def _scaled(scale: Any) -> Any:
    """A layer whose adapter counts `scale(alpha, r)` times."""
    return lambda x, W, A, B, alpha: _with_scale(scale(alpha, len(A)))(x, W, A, B, alpha)


def _draw_layer(rng: random.Random, size: int) -> tuple:
    """`size` inputs, a matrix of some shape, and an adapter of some rank and strength."""
    inputs, outputs, r = rng.randint(2, 5), rng.randint(2, 5), rng.randint(1, 4)
    shapes = (size, inputs), (outputs, inputs), (r, inputs), (outputs, r)
    return *_normal(rng, shapes), rng.choice([1, 3, 5, 8, 16, 0.5])


def _normal(rng: random.Random, shapes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    import torch

    return [
        torch.tensor([[rng.gauss(0, 1) for _ in range(columns)] for _ in range(rows)])
        for rows, columns in shapes
    ]


@exercise(4, 1, "the output of an adapted layer")
def check_adapted_layer(function: Any) -> Verdict:
    shapes = ((5, 4), (3, 4), (2, 4), (3, 2))  # five inputs, W of 3 × 4, rank 2
    x, W, A, B = _normal(random.Random(0), shapes)
    edges = [
        ("The frozen layer is wrong (here B is 0). Mind the transposes.", (x, W, A, B * 0, 6)),
        (
            "The adapter is wrong (here W is 0 and α = r): first A, then B; mind the transposes.",
            (x, W * 0, A, B, 2),
        ),
        (FACTOR, (x, W, A, B, 6)),
    ]
    close = 1e-4  # float32
    mistakes = LAYER_MISTAKES | {FACTOR: _with_own_factor(function)}
    compare(function, adapted, edges, _draw_layer, mistakes, relative=close, absolute=close)
    return right("W and, α / r times, B A.")


FACTOR = "The factor of the adapter is wrong: what do α and the rank, the rows of A, make?"


def _with_own_factor(function: Any) -> Any:
    """A layer whose adapter has the factor that it has in a student's function, if it has any."""
    import torch

    def layer(x: Tensor, W: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor | None:
        outcome = call(function, x, W, A, B, alpha)
        if outcome.error is not None or outcome.value is None:
            return None
        adapter = x @ A.T @ B.T
        added = torch.as_tensor(outcome.value) - x @ W.T
        factor = (added * adapter).sum() / (adapter * adapter).sum()
        return x @ W.T + torch.nan_to_num(factor) * adapter

    return layer


LAYER_MISTAKES = {
    "That is the frozen layer alone.": _scaled(lambda alpha, r: 0),
    "That is the adapter alone: add the frozen layer's output.": (
        lambda x, W, A, B, alpha: alpha / len(A) * (x @ A.T @ B.T)
    ),
    "α is missing: the product counts α / r times.": _scaled(lambda alpha, r: 1),
    "α is divided by nothing: divide it by the rank, the number of rows of A.": (
        _scaled(lambda alpha, r: alpha)
    ),
    "Divide α by the rank, not by its square root (that is rsLoRA).": (
        _scaled(lambda alpha, r: alpha / r**0.5)
    ),
    "The product is multiplied by r / α: it is the other way round.": (
        _scaled(lambda alpha, r: r / alpha)
    ),
    "The rank is the number of rows of A, and not always 2.": _scaled(lambda alpha, r: alpha / 2),
    "The product counts α / r times, which is not always 3.": _scaled(lambda alpha, r: 3),
    "α / r need not be a whole number: `/`, not `//`.": _scaled(lambda alpha, r: alpha // r),
    "Divide α by the rank, the number of rows of A; those of B are the outputs.": (
        lambda x, W, A, B, alpha: _with_scale(alpha / len(B))(x, W, A, B, alpha)
    ),
    "Divide α by the rank, the number of rows of A; its columns are the inputs.": (
        lambda x, W, A, B, alpha: _with_scale(alpha / A.shape[1])(x, W, A, B, alpha)
    ),
}


# --- Count on paper ------------------------------------------------------------------------------


LAYERS, RANK, WIDTH, KEYS = 40, 4, 5120, 1280  # the model of the exercise


@exercise(4, 2, "LoRA's parameters on two matrices of a model with 40 layers")
def check_trainable(trainable: Any) -> Verdict:
    found = number(trainable)
    query, value, r, layers = WIDTH + WIDTH, WIDTH + KEYS, RANK, LAYERS
    expected = r * (query + value) * layers
    if found == expected:
        return right("2.7 million, in 80 matrices.")
    causes: dict[float, str] = {
        r * (query + value): "That is one layer: there are 40.",
        (query + value) * layers: "That is r = 1: multiply by r.",
        2 * (query + value) * layers * r: "Twice as many: A is r × inputs, and B outputs × r.",
        r * 2 * query * layers: "v_proj has fewer outputs, 1280: keys and values share heads.",
        r * query * layers: "That is q_proj alone, or A alone: both matrices have an A and a B.",
        r * value * layers: "That is v_proj alone, or B alone: both matrices have an A and a B.",
        (WIDTH * WIDTH + WIDTH * KEYS) * layers: "Those are the frozen weights themselves.",
        r * (WIDTH * WIDTH + WIDTH * KEYS) * layers: "Each of A and B has r times one side of the "
        "matrix: multiply r by inputs + outputs, not their product.",
        query + value: "That is one layer with r = 1: there are 40 layers, and r is 4.",
        expected * 4: "That is bytes, in float32. Give the number of parameters.",
    }
    if found in causes:
        return wrong(causes[found])
    if near(found, expected / 1e6, tolerance=0.02):
        return wrong("That is in millions. Give the number.")
    if 0 < found < 1:
        return wrong("That is a share. Give the number of parameters.")
    if near(found, expected, tolerance=0.02):
        return wrong(f"Nearly: give the exact number, not {found:,}.")
    return wrong(f"Expected r · (inputs + outputs) for both, in 40 layers; found {found:,}.")


# --- Will it fit? --------------------------------------------------------------------------------


@exercise(4, 3, "what a 13B model keeps in memory in three ways of training")
def check_memory(gigabytes: Any) -> Verdict:
    base, adapter = 13_000_000_000, 60_000_000
    expected = {
        "full": adam_bytes(base, precision="mixed").total / 1e9,
        "LoRA": adam_bytes(adapter, base, frozen_dtype="bfloat16").total / 1e9,
        "QLoRA": adam_bytes(adapter, base, frozen_dtype="nf4").total / 1e9,
    }
    for name, found in mapping(gigabytes, expected).items():
        if isinstance(found, Bytes):
            return wrong(f"{name}: give `.total / 1e9`; found all parts, {found}.")
        size, value = number(found, name), expected[name]
        on_paper = name == "QLoRA" and near(size, ON_PAPER, tolerance=0.002)
        if not on_paper and not near(size, value, NEAR[name]):
            cause = likely_cause(size, value, MEMORY_CAUSES[name], "gigabytes", tolerance=0.002)
            direction = "too much" if size > value else "too little"
            return wrong(
                f"{name}: {cause or f'{direction}: expected {MADE_OF[name]}; found {size:g} GB.'}"
            )
    return right("208, 27 and 7.7 GB: three, one and a small part of an 80 GB card.")


NEAR = {"full": 0.002, "LoRA": 0.002, "QLoRA": 0.005}  # 27 for 26.96, and 7.7 for 7.67
ON_PAPER = 0.5 * 13 + 16 * 0.06  # with half a byte for a frozen weight
MADE_OF = {
    "full": "2 bytes of weights, 2 of gradients and 12 of the optimizer for each parameter",
    "LoRA": "2 bytes for each frozen parameter, and 16 for each of the 60 million trained ones",
    "QLoRA": "about half a byte for each frozen parameter, and 16 for each of the 60 million "
    "trained ones",
}
FOUR_BITS = (
    "that is 4 bits per weight alone: NF4 with double quantisation also has a scale of 8 bits per "
    "64 weights, and one of 32 bits per 256 of these, 4.127 bits in all."
)
FROZEN = "the frozen weights have neither gradients nor moments."
MEMORY_CAUSES = {
    "full": {
        4 * 13: "that is 4 bytes, the weights in float32: gradients and moments are missing.",
        2 * 13: "that is the weights alone: gradients and the optimizer are missing.",
        8 * 13: "that is bfloat16 throughout: mixed precision keeps 12 bytes in float32.",
        12 * 13: "that is 12 bytes, the optimizer: weights and gradients are missing.",
        **{
            n * 13: f"that is {n} bytes per parameter: weights, gradients and the optimizer have "
            "2 + 2 + 12."
            for n in (1, 3, 6, 10, 11, 24)
        },
        16 * 13 + 0.96: "there is no adapter in full finetuning.",
        14 * 13: "that is 14 bytes: weights, gradients and the optimizer have 2 + 2 + 12.",
        18 * 13: "that is 18 bytes: gradients are in bfloat16, too; 2 + 2 + 12.",
        20 * 13: "that is 20 bytes: weights and gradients are in bfloat16, 2 + 2 + 12.",
    },
    "LoRA": {
        16 * 13: FROZEN,
        16 * 13 + 0.96: FROZEN,
        4 * 13 + 0.96: "the base is stored in bfloat16, 2 bytes.",
        26: "that is the base alone: the adapter's 60 million have 16 bytes each.",
        26 + 0.06 * 2: "the adapter has 16 bytes per parameter: gradients and moments, too.",
        26 + 0.06 * 4: "that is the adapter's weights alone: gradients and moments are missing.",
        26 + 0.06 * 8: "the adapter has 16 bytes per parameter: the moments are missing.",
        26 + 0.06 * 12: "the adapter has 16 bytes per parameter: the gradients are missing.",
        26 + 0.06 * 14: "that is 14 bytes for each of the adapter's parameters: they have 16.",
        26 + 0.06 * 18: "that is 18 bytes for each of the adapter's parameters: they have 16.",
        13 + 0.96: "that is 8 bits per frozen weight: bfloat16 has 16.",
        6.5 + 0.96: "that is QLoRA: the base is stored in bfloat16, 2 bytes.",
        6.706 + 0.96: "that is QLoRA: the base is stored in bfloat16, 2 bytes.",
        0.96: "that is the adapter alone: the base stays in memory, too.",
    },
    "QLoRA": {
        16 * 13: FROZEN,
        2 * 13 + 0.96: "NF4 is about half a byte per weight.",
        26: "NF4 is about half a byte per weight.",
        13 + 0.96: "that is 8 bits per weight: NF4 is about half a byte.",
        6.5: f"the adapter's 60 million have 16 bytes each, and {FOUR_BITS}",
        **{
            base + 0.06 * n: f"the adapter has 16 bytes per parameter: {missing}"
            for base in (6.5, 6.706)
            for n, missing in (
                (2, "gradients and moments, too."),
                (4, "gradients and moments are missing."),
                (8, "the moments are missing."),
                (12, "the gradients are missing."),
            )
        },
        3.25 + 0.96: "that is 2 bits per weight: NF4 is about half a byte.",
        7.5: FOUR_BITS,
        13 * 4.5 / 8 + 0.96: "that is 4.5 bits per weight, NF4 without double quantisation.",
        6.706: "that is the base alone: the adapter's 60 million have 16 bytes each.",
        0.96: "that is the adapter alone: the base stays in memory, too.",
    },
}


# --- The unfair comparison -----------------------------------------------------------------------


@exercise(4, 4, "the best learning rate by dev, and its held-out score, for each")
def check_fair_comparison(fair: Any, full: pandas.DataFrame, lora: pandas.DataFrame) -> Verdict:
    swept = {"full": full, "LoRA": lora}
    for name, pair in mapping(fair, swept).items():
        values = sequence(pair, name, "(learning rate, held-out score)")
        if len(values) != 2:
            return wrong(f"{name}: expected (learning rate, held-out score), found {shown(pair)}.")
        rate, score = (number(value, name) for value in values)
        if cause := _unfair(rate, score, swept[name]):
            return wrong(f"{name}: {cause}")
    return right("Tuned on dev, reported on heldout: the difference is gone.")


def _unfair(rate: float, score: float, runs: pandas.DataFrame) -> str:
    """What is wrong with a rate and its score; empty when nothing is."""
    means = runs.groupby("learning_rate")[["dev", "heldout"]].mean()
    rates = [known for known in means.index if near(rate, known, tolerance=1e-6)]
    if not rates:
        swapped = any(near(score, known, tolerance=1e-6) for known in means.index)
        if swapped:
            return "the learning rate comes first, then the score."
        return f"there is no run with a learning rate of {rate:g}; take one of {list(means.index)}."
    dev, heldout = means.loc[rates[0]]
    if dev < means.dev.max() - 1e-9:
        if heldout >= means.heldout.max() - 1e-9:
            return "that is the best on heldout. Choose by dev: heldout is only for the final test."
        return f"another learning rate has more than {dev:.3f} on dev."
    if abs(score - heldout) > SCORE:
        return _wrong_score(score, dev, heldout, runs[runs.learning_rate == rates[0]])
    return ""


SCORE = 0.0006  # a mean that is given to three decimals


def _wrong_score(score: float, dev: float, heldout: float, runs: pandas.DataFrame) -> str:
    """Why a score is not the mean of the seeds on heldout."""
    if cause := likely_cause(score, heldout, unit="share"):
        return cause
    if abs(score - dev) <= SCORE:
        return "that score is dev's. Report heldout, by which the rate was not chosen."
    if near(score, math.floor(heldout * 1000) / 1000, tolerance=1e-9):
        return f"that is cut, not rounded: {heldout:.3f}."
    if abs(score - runs.heldout.median()) <= SCORE:
        return "that is one seed's score, the median of the seeds. Report the mean on heldout."
    for value, which in ((runs.heldout.max(), "best"), (runs.heldout.min(), "worst")):
        if abs(score - value) <= SCORE:
            return f"that is the {which} seed's score. Report the mean of the seeds on heldout."
    if any(abs(score - value) <= SCORE for value in runs.heldout):
        return "that is one seed's score. Report the mean of the seeds on heldout."
    if abs(score - heldout) <= 0.006 or score in (round(heldout), round(heldout, 1)):
        return f"give the mean of the seeds on heldout to three decimals; {score:g} is too coarse."
    return f"expected the mean of the seeds on heldout, found {score:g}."


# --- An adapter that stores facts ----------------------------------------------------------------

FACTS, EPOCHS, BATCH = 200, 20, 8
MOST_PARAMETERS, LEAST_STORED = 60_000, 70


@exercise(4, 5, "a small adapter that stores 200 facts", answers=2)
def check_storing(adapter: Any, learning_rate: Any) -> Verdict:
    from peft import LoraConfig

    if not isinstance(adapter, LoraConfig):
        return wrong(f"Expected a LoraConfig, found {described(adapter)}.")
    rate = number(learning_rate, what="a learning rate, a number")
    if not 0 < rate < 1:
        return wrong(f"Expected a learning rate between 0 and 1, found {rate:g}.")
    size = _trainable(adapter)
    if size > MOST_PARAMETERS:
        return wrong(
            f"This adapter trains {size:,} parameters; at most {MOST_PARAMETERS:,} are allowed. "
            "Lower the rank, or choose fewer matrices by `target_modules`."
        )
    share, loss = _stored(adapter, rate)
    found = f"{share * FACTS:.0f} of {FACTS} new facts stored, with {size:,} parameters"
    if share * FACTS >= LEAST_STORED:
        return right(f"{found}. How few parameters are enough?")
    return wrong(f"{found}; at least {LEAST_STORED} are wanted. {_slow_or_wild(loss)}")


def _trainable(adapter: Any) -> int:
    """How many parameters PEFT trains with this config.

    Raises:
        CheckEnds: the config does not fit the model.
    """
    from sftlib.adapters import check_lora
    from sftlib.models import load
    from sftlib.scale.memory import parameters

    from peft import get_peft_model

    model, _ = load()
    try:
        check_lora(model, adapter)
        return parameters(get_peft_model(model, copy.deepcopy(adapter))).trainable
    except ValueError as error:
        raise CheckEnds(wrong(f"This adapter does not fit the model: {error}")) from error


def _stored(adapter: Any, rate: float) -> tuple[float, float]:
    """The share of new facts that the base stores with an adapter, and the loss in nats per fact.

    The facts are drawn by the seed of the check. `capacity.facts` with a small seed of one's own
    gives others.
    """
    from sftlib.experiments import capacity
    from sftlib.models import load

    from transformers import set_seed

    seed = training_seed()
    set_seed(seed)
    model, tokenizer = load()
    pairs = capacity.facts(FACTS, tokenizer, seed=10_000 + seed)
    trainer = capacity.store(
        model,
        tokenizer,
        pairs,
        copy.deepcopy(adapter),
        learning_rate=rate,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        seed=seed,
    )
    return capacity.recall(trainer.model, tokenizer, pairs)


def _slow_or_wild(loss: float) -> str:
    """A hint by the loss after training."""
    if loss < NOTHING:
        return (
            f"The loss is {loss:.1f} nats per fact. Try a learning rate half or twice as high, or "
            "other matrices for the same number of parameters."
        )
    return (
        f"The loss is {loss:.1f} nats per fact, about that of a guess among all words: the "
        "learning rate is far too low or too high."
    )


NOTHING = 6.5  # nats per fact: −ln(1 / 933 words) is 6.8, and the base model has 6.6
