"""Answers to the exercises of lesson 4."""

from decimal import Decimal
from fractions import Fraction

from sftlib import checks
from sftlib.checks import lora_vs_full
from sftlib.scale.memory import adam_bytes

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig

from tests.attacks import Attacks, Slow

# --- Exercise 1 ----------------------------------------------------------------------------------


def adapted(x, W, A, B, alpha):
    return x @ W.T + alpha / len(A) * (x @ A.T @ B.T)


def scaled(factor):
    return lambda x, W, A, B, alpha: x @ W.T + factor(alpha, len(A)) * (x @ A.T @ B.T)


def in_float64(x, W, A, B, alpha):
    x, W, A, B = (tensor.double() for tensor in (x, W, A, B))
    return adapted(x, W, A, B, alpha)


def in_numpy(x, W, A, B, alpha):
    x, W, A, B = (tensor.numpy() for tensor in (x, W, A, B))
    return x @ W.T + alpha / A.shape[0] * x @ (B @ A).T


def merges_in_place(x, W, A, B, alpha):
    W += alpha / len(A) * B @ A
    return x @ W.T


def for_one_shape(x, W, A, B, alpha):
    assert x.shape == (5, 4)
    return adapted(x, W, A, B, alpha)


def prints(x, W, A, B, alpha):
    print(adapted(x, W, A, B, alpha))


LAYER = Attacks(
    checks.check_adapted_layer,
    right=[
        adapted,
        in_float64,
        in_numpy,
        lambda x, W, A, B, alpha: adapted(x, W, A, B, alpha).tolist(),
        lambda x, W, A, B, alpha: x @ (W + alpha / B.shape[1] * B @ A).T,
        lambda x, W, A, B, alpha: (
            torch.nn.functional.linear(x, W) + (alpha / len(A)) * x @ A.T @ B.T
        ),
        lambda x, W, A, B, alpha: [row for row in adapted(x, W, A, B, alpha)],
        lambda x, W, A, B, alpha: torch.nn.Parameter(adapted(x, W, A, B, alpha)),
    ],
    wrong=[
        (scaled(lambda alpha, r: alpha / 2), "not always 2"),
        (scaled(lambda alpha, r: 3), "not always 3"),
        (scaled(lambda alpha, r: alpha // r), "`/`, not `//`"),
        (scaled(lambda alpha, r: 0), "frozen layer alone"),
        (scaled(lambda alpha, r: 1), "α is missing"),
        (scaled(lambda alpha, r: alpha), "divide it by the rank"),
        (scaled(lambda alpha, r: alpha / r**0.5), "rsLoRA"),
        (scaled(lambda alpha, r: r / alpha), "the other way round"),
        (scaled(lambda alpha, r: 1 / alpha), "The factor of the adapter"),
        (scaled(lambda alpha, r: alpha / (r + 1)), "The factor of the adapter"),
        (lambda x, W, A, B, alpha: x @ W.T + x @ A.T @ B[:, :1].T, "The adapter is wrong"),
        (lambda x, W, A, B, alpha: 2 * x @ W.T, "The frozen layer is wrong"),
        (lambda W, x, A, B, alpha: adapted(x, W, A, B, alpha), "in another order"),
        (lambda x, W, A, B, alpha: adapted(x, W, A, B, alpha) - x @ W.T, "adapter alone"),
        (lambda x, W, A, B, alpha: x @ W.T + alpha / len(B) * x @ A.T @ B.T, "are the outputs"),
        (lambda x, W, A, B, alpha: x @ W, "Mind the transposes"),
        (lambda x, W, A, B, alpha: x, "shape (5, 3), found shape (5, 4)"),
        (
            lambda x, W, A, B, alpha: adapted(x, W, A, B, alpha).T,
            "(5, 3), found shape (3, 5)",
        ),
        (lambda x, W, A, B, alpha: adapted(x, W, A, B, alpha).sum(), "expected a list, found"),
        (lambda x, W, A, B, alpha: adapted(x, W, A, B, alpha) * float("nan"), "found NaN"),
        (merges_in_place, "changes its argument W in place"),
        (for_one_shape, "not in general. For x of shape ("),
        (lambda x, W, A, B, alpha: None, "did you forget `return`?"),
        (prints, "write `return` in place of `print`"),
        (lambda x, W, A, B: x @ W.T, "function of (x, W, A, B, alpha), found one of (x, W, A, B)"),
        (lambda x, W, A, B, alpha: A.T @ x, "your function raised RuntimeError"),
        (lora_vs_full.adapted, "calls adapted of sftlib.checks"),
        (torch.zeros(5, 3), "function of (x, W, A, B, alpha), found Tensor of shape (5, 3)"),
    ],
    untouched=[..., None, lambda x, W, A, B, alpha: ...],
)

# --- Exercise 2 ----------------------------------------------------------------------------------

TRAINABLE = Attacks(
    checks.check_trainable,
    right=[
        2_662_400,
        2_662_400.0,
        torch.tensor(2_662_400),
        np.int32(2_662_400),
        Fraction(2_662_400),
        Decimal(2_662_400),
        np.array(2_662_400),
    ],
    wrong=[
        (66_560, "one layer"),
        (665_600, "r = 1"),
        (3_276_800, "fewer outputs"),
        (1_638_400, "q_proj alone, or A alone"),
        (1_024_000, "v_proj alone, or B alone"),
        (1_310_720_000, "frozen weights themselves"),
        (5_324_800, "Twice as many"),
        (2.6624, "in millions"),
        (2.7, "in millions"),
        (4 * (5120 * 5120 + 5120 * 1280) * 40, "inputs + outputs, not their product"),
        (16_640, "one layer with r = 1"),
        (0.02, "a share"),
        (10_649_600, "bytes"),
        (2_700_000, "give the exact number"),
        (3_407_872, "found 3,407,872"),
        (12, "found 12"),
        (0, "found 0"),
        ("3M", "Expected a number, found the text '3M'"),
        ([2_662_400], "Expected a number, found list"),
        (float("nan"), "found NaN"),
        (True, "found True"),
    ],
)

# --- Exercise 3 ----------------------------------------------------------------------------------

GIGABYTES = {"full": 208, "LoRA": 26.96, "QLoRA": 7.67}
GIB = {name: value * 1e9 / 2**30 for name, value in GIGABYTES.items()}

MEMORY = Attacks(
    checks.check_memory,
    right=[
        GIGABYTES,
        GIGABYTES | {"LoRA": 27, "QLoRA": 7.7},
        GIGABYTES | {"QLoRA": 7.46},
        {name: np.float64(value) for name, value in GIGABYTES.items()},
        {name: torch.tensor(value) for name, value in GIGABYTES.items()},
        pd.Series(GIGABYTES),
        {name: Decimal(str(value)) for name, value in GIGABYTES.items()},
        {
            "QLoRA": adam_bytes(60_000_000, 13_000_000_000, frozen_dtype="nf4").total / 1e9,
            "LoRA": Fraction(2696, 100),
            "full": 16 * 13,
        },
    ],
    wrong=[
        (GIGABYTES | {"LoRA": 26.0}, "LoRA: that is the base alone"),
        (GIGABYTES | {"LoRA": 26.24}, "LoRA: that is the adapter's weights alone"),
        (GIGABYTES | {"LoRA": 26.48}, "the moments are missing"),
        (
            GIGABYTES | {"full": adam_bytes(13_000_000_000, precision="mixed")},
            "full: give `.total / 1e9`",
        ),
        (GIGABYTES | {"full": 208.96}, "full: there is no adapter"),
        (GIGABYTES | {"full": 207}, "full: too little"),
        (GIGABYTES | {"full": 130}, "that is 10 bytes per parameter"),
        (GIGABYTES | {"LoRA": 26.84}, "that is 14 bytes for each of the adapter's"),
        (GIGABYTES | {"LoRA": 27.08}, "that is 18 bytes for each of the adapter's"),
        (GIGABYTES | {"LoRA": 13.96}, "LoRA: that is 8 bits per frozen weight"),
        (GIGABYTES | {"LoRA": 7.46}, "LoRA: that is QLoRA"),
        (GIGABYTES | {"LoRA": 30}, "16 for each of the 60 million"),
        (GIGABYTES | {"QLoRA": 6.82}, "the adapter has 16 bytes per parameter"),
        (GIGABYTES | {"QLoRA": 7.18}, "the moments are missing"),
        (GIGABYTES | {"QLoRA": 7.43}, "the gradients are missing"),
        (GIGABYTES | {"QLoRA": 4.21}, "that is 2 bits per weight"),
        (GIGABYTES | {"QLoRA": 8}, "about half a byte for each"),
        (GIGABYTES | {"QLoRA": 7.5}, "4.127 bits in all"),
        (GIGABYTES | {"QLoRA": 6.5}, "16 bytes each, and that is 4 bits"),
        (GIGABYTES | {"QLoRA": 8.27}, "without double quantisation"),
        (GIB, "full: that is GiB"),
        (GIGABYTES | {"LoRA": GIB["LoRA"]}, "LoRA: that is GiB"),
        (GIGABYTES | {"QLoRA": GIB["QLoRA"]}, "QLoRA: that is GiB"),
        (GIGABYTES | {"LoRA": 26_960}, "LoRA: that is MB"),
        (GIGABYTES | {"LoRA": 26.96e9 / 2**20}, "LoRA: that is MiB"),
        (208, "keys full, LoRA, QLoRA, found 208"),
        ([208, 26.96, 7.67], "keys full, LoRA, QLoRA, found list"),
        ({"full": 208, "LoRA": 27}, "Expected the keys full, LoRA, QLoRA, found 'full', 'LoRA'"),
        (GIGABYTES | {"full": 52}, "full: that is 4 bytes"),
        (GIGABYTES | {"full": 104}, "bfloat16 throughout"),
        (GIGABYTES | {"LoRA": 208}, "LoRA: the frozen weights"),
        (GIGABYTES | {"LoRA": 52.96}, "LoRA: the base is stored in bfloat16"),
        (GIGABYTES | {"LoRA": 0.96}, "LoRA: that is the adapter alone"),
        (GIGABYTES | {"QLoRA": 26}, "half a byte"),
        (GIGABYTES | {"QLoRA": 1}, "too little"),
        (GIGABYTES | {"QLoRA": 300}, "too much"),
        (GIGABYTES | {"LoRA": 26.96e9}, "that is bytes. Give GB"),
        (GIGABYTES | {"LoRA": float("nan")}, "LoRA: expected a number, found NaN"),
        (GIGABYTES | {"full": "208"}, "full: expected a number, found the text '208'"),
        (GIGABYTES | {"full": True}, "full: expected a number, found True"),
    ],
    untouched=[..., None, dict.fromkeys(GIGABYTES, ...), GIGABYTES | {"LoRA": ...}],
)

# --- Exercise 4 ----------------------------------------------------------------------------------

RUNS = pd.DataFrame(
    {
        "learning_rate": [1e-4, 1e-4, 1e-3, 1e-3, 1e-3, 1e-2, 1e-2],
        "dev": [0.5, 0.6, 0.9, 1.0, 0.95, 0.9, 0.9],
        "heldout": [0.5, 0.5, 0.9, 0.9232, 0.909, 0.98, 0.98],
    }
)
MEAN = (0.9 + 0.9232 + 0.909) / 3
FAIR = {"full": (1e-3, MEAN), "LoRA": (1e-3, MEAN)}


def full(rate, score):
    return FAIR | {"full": (rate, score)}


COMPARISON = Attacks(
    checks.check_fair_comparison,
    right=[
        FAIR,
        {name: list(pair) for name, pair in FAIR.items()},
        {name: np.array(pair) for name, pair in FAIR.items()},
        {name: (np.float64(rate), torch.tensor(score)) for name, (rate, score) in FAIR.items()},
        {name: pd.Series(pair) for name, pair in FAIR.items()},
        full(0.001, 0.911),
        full(Fraction(1, 1000), Decimal("0.9107")),
    ],
    wrong=[
        (full(1e-3, 0.95), "full: that score is dev's"),
        (full(1e-3, 0.909), "full: that is one seed's score"),
        (full(1e-3, 0.9), "full: that is the worst seed's score"),
        (full(1e-3, 0.910), "that is cut, not rounded: 0.911"),
        (full(1e-3, 0.91), "that is cut"),
        (full(1e-3, 0.9), "the worst"),
        (full(1e-3, 1.0), "to three decimals"),
        (full(1e-3, 0.909), "the median of the seeds"),
        (full(1e-3, 0.9232), "full: that is the best seed's score"),
        (full(1e-3, 0.912), "to three decimals"),
        (full(1e-3, 0.8), "mean of the seeds"),
        (full(1e-3, 91.07), "full: that is percent. Give the share"),
        (full(5, 0.9), "no run with a learning rate of 5"),
        (full(0, 0.9), "no run with a learning rate of 0"),
        (full(MEAN, 1e-3), "the learning rate comes first"),
        (full(1e-4, 0.5), "more than 0.550"),
        (FAIR | {"LoRA": (1e-2, 0.98)}, "LoRA: that is the best on heldout"),
        (FAIR | {"full": 1e-3}, "full: expected (learning rate, held-out score), found 0.001"),
        (
            FAIR | {"full": (1e-3,)},
            "held-out score), found (0.001,)",
        ),
        (FAIR | {"full": {1e-3, MEAN}}, "a set, which has no order"),
        (full("1e-3", MEAN), "full: expected a number, found the text"),
        (full(1e-3, float("nan")), "found NaN"),
        ({"full": FAIR["full"]}, "Expected the keys full, LoRA"),
        ([FAIR["full"], FAIR["LoRA"]], "the keys full, LoRA, found list"),
    ],
    untouched=[
        ...,
        None,
        dict.fromkeys(FAIR, (..., ...)),
        FAIR | {"LoRA": (1e-3, ...)},
        FAIR | {"LoRA": ...},
    ],
    arguments=lambda fair: (fair, RUNS, RUNS),
)

# --- Exercise 5 ----------------------------------------------------------------------------------


def on(targets, r=1, **options):
    return LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, **options)


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GOOD = on("all-linear", r=4)
STORING = Attacks(
    checks.check_storing,
    right=[
        (GOOD, 5e-3),
        Slow((on(ALL, r=4), np.float64(5e-3))),
        Slow((on("all-linear", r=4, task_type="CAUSAL_LM"), torch.tensor(5e-3))),
        Slow((on(r".*(self_attn|mlp)\.\w+_proj", r=4), Fraction(1, 200))),
        Slow((LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", use_rslora=True), 5e-3)),
    ],
    wrong=[
        ((on("all-linear", r=8), 5e-3), "at most 60,000 are allowed"),
        ((on("all-linear", r=4, trainable_token_indices=[*range(100)]), 5e-3), "at most 60,000"),
        (Slow((on(ALL[2:4], r=16), 5e-3)), "half or twice as high"),
        ((GOOD, 1e-6), "far too low or too high"),
        (Slow((GOOD, 0.9)), "far too low or too high"),
        ((on(["gate_porj"]), 5e-3), "does not fit the model"),
        ((on(["down_proj"], r=999), 5e-3), "does not fit the model"),
        ((4, 5e-3), "Expected a LoraConfig, found 4"),
        (({"r": 4}, 5e-3), "Expected a LoraConfig, found dict"),
        ((LoraConfig, 5e-3), "Expected a LoraConfig, found LoraConfig itself"),
        ((GOOD, "5e-3"), "found the text '5e-3'"),
        ((GOOD, -5e-3), "between 0 and 1, found -0.005"),
        ((GOOD, float("nan")), "found NaN"),
    ],
    untouched=[(..., ...), (GOOD, ...), (None, 5e-3)],
    arguments=lambda answer: answer,
    trains=True,
)

ATTACKS = [LAYER, TRAINABLE, MEMORY, COMPARISON, STORING]
