"""What finetuning takes of memory, counted from shapes before it runs.

Each formula names its source. `sftlib.scale.measure` has the measurements to hold against them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

BITS = {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0, "nf4": 4 + 8 / 64 + 32 / (64 * 256)}
"""Bits per weight. NF4 with double quantisation has 4, and an 8-bit scale per block of 64 weights,
and a 32-bit scale per 256 of those (Dettmers et al. 2023, arXiv 2305.14314, section 3)."""

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Parameters:
    """How many parameters a model has, and how many of them are trained."""

    total: int
    trainable: int

    @property
    def share(self) -> float:
        """Trainable of all, from 0 to 1."""
        return self.trainable / self.total


def parameters(model: torch.nn.Module) -> Parameters:
    """Count the parameters of a model; those shared by two modules count once."""
    found = list(model.parameters())
    return Parameters(
        sum(p.numel() for p in found), sum(p.numel() for p in found if p.requires_grad)
    )


def linear_shapes(
    model: PreTrainedModel | PeftModel, head: bool = False
) -> dict[str, tuple[int, int]]:
    """The linear layers of a model, with or without its output head: name → (inputs, outputs).

    A model on torch's `meta` device, without weights, will do; so will one with adapters.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    model = getattr(model, "get_base_model", lambda: model)()
    output = model.get_output_embeddings()
    # An adapter on the head wraps it in modules of its own: leave out all of them.
    heads = set(output.modules()) if output and not head else ()
    shapes = {}
    for path, module in model.named_modules():
        # PEFT keeps the wrapped layer as `.base_layer`: report it under the name it had before.
        name = path.removesuffix(".base_layer")
        if module in heads or ".lora_" in path:
            continue
        if isinstance(module, torch.nn.Linear):
            shapes[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):  # GPT-2's: the transposed matrix
            inputs, outputs = module.weight.shape
            shapes[name] = (inputs, outputs)
    return shapes


def lora_targets(
    model_or_shapes: PreTrainedModel | PeftModel | Shapes,
    r: int,
    target_modules: str | Sequence[str],
) -> dict[str, tuple[int, int]]:
    """The linear layers that get a LoRA adapter, chosen as PEFT does it.

    Args:
        model_or_shapes: a model, or name → (inputs, outputs) of its linear layers.
        r: the adapters' rank.
        target_modules: `"all-linear"`, the last parts of names, or a pattern for whole names.

    Raises:
        ValueError: nothing has such a name; the pattern is no valid regular expression; or the
            rank is below 1 or above that of a matrix.
    """
    given = isinstance(model_or_shapes, Mapping)
    shapes = model_or_shapes if given else linear_shapes(model_or_shapes)
    _every_target_fits(shapes, target_modules)
    targets = {n: shape for n, shape in shapes.items() if is_target(n, target_modules)}
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"Expected a rank of 1 or more, found r={r!r}: 8 or 16 is usual.")
    # B · A has at most the rank of the matrix that it is added to.
    name, shape = min(targets.items(), key=lambda item: min(item[1]))
    if r > min(shape):
        raise ValueError(
            f"Expected a rank of at most {min(shape)}, found r={r}: the matrix of {name} is "
            f"{shape[0]} × {shape[1]} and can have no higher rank. Lower r, or leave it out."
        )
    return targets


def _every_target_fits(shapes: Shapes, target_modules: str | Sequence[str]) -> None:
    """Raise if a target fits no layer: PEFT ignores it silently as long as another one fits."""
    pattern = isinstance(target_modules, str)
    if pattern:
        try:
            re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                f"Expected a regular expression as target_modules, found {target_modules!r}: "
                f"{error}. For some layers by name, give a list."
            ) from error
    idle = [
        repr(target)
        for target in ([target_modules] if pattern else target_modules)
        if not any(is_target(name, target if pattern else [target]) for name in shapes)
    ]
    if idle or not target_modules:
        names = sorted({name.rsplit(".", 1)[-1] for name in shapes})
        raise ValueError(
            f"Expected target_modules that name linear layers, found {target_modules!r}: "
            f"{', '.join(idle) or 'an empty list'} fits none. Choose among {', '.join(names)}, "
            'or write "all-linear".'
        )


def is_target(name: str, target_modules: str | Iterable[str]) -> bool:
    """Whether PEFT would put an adapter on the linear layer of this name."""
    if isinstance(target_modules, str):
        return target_modules == "all-linear" or bool(re.fullmatch(target_modules, name))
    return any(name == target or name.endswith("." + target) for target in target_modules)


def lora_parameters(
    model_or_shapes: PreTrainedModel | Shapes, r: int, target_modules: str | Sequence[str]
) -> int:
    """How many parameters LoRA trains: r · (inputs + outputs) for each target matrix.

    From Hu et al. 2021 (arXiv 2106.09685, section 4.1). Arguments and errors as in `lora_targets`.
    """
    targets = lora_targets(model_or_shapes, r, target_modules)
    return sum(r * (inputs + outputs) for inputs, outputs in targets.values())


@dataclass(frozen=True)
class Bytes:
    """Weights, gradients and optimizer of a training, in bytes; activations come on top."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def adam_bytes(
    trainable: int, frozen: int = 0, precision: str = "float32", frozen_dtype: str = "float32"
) -> Bytes:
    """Bytes for training with Adam or AdamW, which keeps two moments for each trained parameter.

    Args:
        trainable: number of parameters that are trained.
        frozen: number of those that are not: they have neither gradients nor moments.
        precision: of training: `float32` (4 + 4 + 8 bytes per parameter), `bfloat16` throughout
            (2 + 2 + 4), or `mixed` (2 + 2 + 12: the moments and a copy of the weights in float32;
            Rajbhandari et al. 2020, "ZeRO", arXiv 1910.02054, section 3.1).
        frozen_dtype: how the frozen ones are stored, a key of `BITS`.

    Raises:
        ValueError: the precision or the dtype is not one of these.
    """
    each = {"float32": (4, 4, 8), "bfloat16": (2, 2, 4), "mixed": (2, 2, 12)}
    _one_of(precision, each)
    _one_of(frozen_dtype, BITS)
    weights, gradients, optimizer = (trainable * n for n in each[precision])
    return Bytes(weights + round(frozen * BITS[frozen_dtype] / 8), gradients, optimizer)


def _one_of(value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"Expected one of {', '.join(known)}, found {value!r}: name one.")


def nf4_bytes(model: PreTrainedModel, dtype: str = "bfloat16") -> int:
    """Bytes of a model's weights with its linear layers in NF4, as bitsandbytes loads them.

    Embeddings, norms, biases and the output head stay as they are, in `dtype`. A model on torch's
    `meta` device will do.
    """
    linear = sum(inputs * outputs for inputs, outputs in linear_shapes(model).values())
    packed = adam_bytes(0, linear, frozen_dtype="nf4")
    rest = adam_bytes(0, model.num_parameters() - linear, frozen_dtype=dtype)
    return packed.weights + rest.weights


def zero_bytes(
    parameters: int, world_size: int, stage: int, dtype: str = "bfloat16", frozen: int = 0
) -> Bytes:
    """Bytes that one rank keeps when Adam's training is partitioned with ZeRO.

    Stage 1 partitions the optimizer's states over the ranks, stage 2 the gradients, too, and stage
    3 the weights, too: figure 1 and section 5 of Rajbhandari et al. 2020, "ZeRO", arXiv 1910.02054.
    Buffers for communication and activations come on top.

    Args:
        parameters: number of parameters that are trained.
        world_size: number of ranks.
        stage: 0 to 3; with 0 each rank keeps everything.
        dtype: `bfloat16` or `float16` for mixed precision (2 + 2 + 12 bytes per parameter), or
            `float32` (4 + 4 + 8, and from stage 1 on 4 more: DeepSpeed 0.19 keeps the optimizer's
            own copy of the weights whatever their dtype).
        frozen: number of parameters that are not trained, stored in `dtype`.

    Raises:
        ValueError: the stage, the dtype or a number is not one of these.
    """
    _one_of(dtype, ("float32", "bfloat16", "float16"))
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"Expected a ZeRO stage from 0 to 3, found {stage!r}: name one.")
    if world_size < 1 or parameters < 0 or frozen < 0:
        raise ValueError(
            "Expected at least one rank and no negative number of parameters, found "
            f"{world_size=}, {parameters=}, {frozen=}."
        )
    whole = adam_bytes(parameters, frozen, "float32" if dtype == "float32" else "mixed", dtype)
    copy = 4 * parameters if dtype == "float32" and stage else 0

    def share(bytes_: int, from_stage: int) -> int:
        # Rounded up: ranks keep parts of one size, and the last part is padded.
        return -(-bytes_ // world_size) if stage >= from_stage else bytes_

    return Bytes(
        share(whole.weights, 3), share(whole.gradients, 2), share(whole.optimizer + copy, 1)
    )


def activation_bytes(
    config: PretrainedConfig,
    batch_size: int,
    length: int,
    dtype: str = "float32",
    r: int = 0,
    checkpointing: bool = False,
) -> int:
    """Bytes that a Llama's forward pass keeps for the backward pass, its logits included.

    Counted operation by operation for the architecture of `transformers` with SDPA attention, which
    keeps no matrix of length × length (for attention that does: Korthikanti et al. 2022, arXiv
    2205.05198, equation 2).

    Args:
        config: a `LlamaConfig`, or another with its fields.
        batch_size, length: rows, and tokens per row.
        dtype: of the weights, `float32` or `bfloat16`; norms and loss compute in float32 anyway.
        r: rank of LoRA adapters on all linear layers; 0 is full finetuning.
        checkpointing: keep only the input of each layer, and compute the rest again, one layer at
            a time (Chen et al. 2016, arXiv 1604.06174).

    Raises:
        ValueError: the dtype is not one of these.
    """
    _one_of(dtype, ("float32", "bfloat16"))
    each = round(BITS[dtype] / 8)
    h, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or h // heads
    q, kv = head * heads, head * config.num_key_value_heads
    # All figures below are bytes per token. A norm keeps its input and the root mean square, in
    # float32 whatever the dtype of the weights.
    norm = 4 * h + 4
    # Every layer keeps two norms, attention's queries, keys, values and output with one float32
    # number per head, and three tensors between the matrices of the MLP.
    shared = 2 * norm + each * (2 * q + 2 * kv + 3 * f) + 4 * heads
    # A matrix that is trained keeps its input for its own gradient; a frozen one does not, but its
    # adapter keeps what goes into A and into B.
    if not r:  # each norm before and after its gain, and the input of the MLP's last matrix
        layer, last = shared + each * (4 * h + f), norm + 2 * each * h
    elif each == 4:  # adapters on the same input share one tensor
        layer, last = shared + 4 * (2 * h + f + 7 * r), 0
    else:  # adapters are float32, the input is not: PEFT makes a copy for each of the seven
        layer, last = shared + 4 * (5 * h + q + f + 7 * r), 0
    last += 4 * config.vocab_size  # the loss keeps the logits in float32
    layers = config.num_hidden_layers
    # With checkpointing one layer, or what comes after the last one, is there as a whole at a time.
    kept = layers * each * h + max(layer, last) if checkpointing else layers * layer + last
    return batch_size * length * kept
