"""How much memory finetuning needs, computed from shapes before it runs.

Each formula names its source. `sftlib.scale.measure` measures the same quantities.
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
"""Bits per weight. NF4 with double quantisation has 4 bits, an 8-bit scale per block of 64 weights,
and a 32-bit scale per 256 blocks (Dettmers et al. 2023, arXiv 2305.14314, section 3)."""

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Parameters:
    """How many parameters a model has, and how many of them are trained."""

    total: int
    trainable: int

    @property
    def share(self) -> float:
        """The share of parameters that are trained, from 0 to 1."""
        return self.trainable / self.total


def parameters(model: torch.nn.Module) -> Parameters:
    """Count the parameters of a model; those shared by two modules count once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return Parameters(
        total=sum(size for size, _ in sizes),
        trainable=sum(size for size, trained in sizes if trained),
    )


def linear_shapes(
    model: PreTrainedModel | PeftModel, head: bool = False
) -> dict[str, tuple[int, int]]:
    """The linear layers of a model, with or without its output head: name → (inputs, outputs).

    The model may be on torch's `meta` device, without weights, and it may have adapters.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    model = getattr(model, "get_base_model", lambda: model)()
    output = model.get_output_embeddings()
    # An adapter on the output head wraps it in further modules: leave out all of them.
    left_out = set(output.modules()) if output and not head else ()
    shapes = {}
    for path, module in model.named_modules():
        # PEFT moves a wrapped layer to `.base_layer`: report it under its former name.
        name = path.removesuffix(".base_layer")
        if module in left_out or ".lora_" in path:
            continue
        if isinstance(module, torch.nn.Linear):
            shapes[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):  # GPT-2's linear layer, whose matrix is transposed
            inputs, outputs = module.weight.shape
            shapes[name] = (inputs, outputs)
    return shapes


def lora_targets(
    model_or_shapes: PreTrainedModel | PeftModel | Shapes,
    r: int,
    target_modules: str | Sequence[str],
) -> dict[str, tuple[int, int]]:
    """The linear layers that get a LoRA adapter, chosen as PEFT chooses them.

    Args:
        model_or_shapes: a model, or name → (inputs, outputs) of its linear layers.
        r: the adapters' rank.
        target_modules: `"all-linear"`, a list of the last parts of names, or a regular expression
            for whole names.

    Raises:
        ValueError: a target fits no layer; the regular expression is not valid; or the rank is
            below 1 or above that of a matrix.
    """
    if isinstance(model_or_shapes, Mapping):
        shapes = model_or_shapes
    else:
        shapes = linear_shapes(model_or_shapes)
    _every_target_fits(shapes, target_modules)
    targets = {n: shape for n, shape in shapes.items() if is_target(n, target_modules)}
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"Expected a rank of 1 or more, found r={r!r}: 8 or 16 is usual.")
    # A higher rank than the matrix's own would only waste parameters.
    name, shape = min(targets.items(), key=lambda item: min(item[1]))
    if r > min(shape):
        raise ValueError(
            f"Expected a rank of at most {min(shape)}, found r={r}: the matrix of {name} is "
            f"{shape[0]} × {shape[1]} and can have no higher rank. Lower r, or leave it out."
        )
    return targets


def _every_target_fits(shapes: Shapes, target_modules: str | Sequence[str]) -> None:
    """Raise if a target fits no layer: PEFT ignores such a target if another one fits."""
    is_pattern = isinstance(target_modules, str)
    if is_pattern:
        try:
            re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                f"Expected a regular expression as target_modules, found {target_modules!r}: "
                f"{error}. For some layers by name, give a list."
            ) from error
    unmatched = [
        repr(target)
        for target in ([target_modules] if is_pattern else target_modules)
        if not any(is_target(name, target if is_pattern else [target]) for name in shapes)
    ]
    if unmatched or not target_modules:
        names = sorted({name.rsplit(".", 1)[-1] for name in shapes})
        raise ValueError(
            f"Expected target_modules that name linear layers, found {target_modules!r}: "
            f"{', '.join(unmatched) or 'an empty list'} fits none. "
            f'Choose among {", ".join(names)}, or write "all-linear".'
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
    """Bytes for the weights, gradients and optimizer states of a training, without activations."""

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
        frozen: number of parameters that are not. They have neither gradients nor moments.
        precision: of the training: `float32` (4 + 4 + 8 bytes per parameter), `bfloat16` throughout
            (2 + 2 + 4), or `mixed` (2 + 2 + 12: the moments and a copy of the weights in float32;
            Rajbhandari et al. 2020, "ZeRO", arXiv 1910.02054, section 3.1).
        frozen_dtype: how the frozen ones are stored, a key of `BITS`.

    Raises:
        ValueError: the precision or the dtype is not one of these.
    """
    # bytes per parameter for weights, gradients, optimizer
    per_parameter = {"float32": (4, 4, 8), "bfloat16": (2, 2, 4), "mixed": (2, 2, 12)}
    _one_of(precision, per_parameter)
    _one_of(frozen_dtype, BITS)
    weights, gradients, optimizer = (trainable * n for n in per_parameter[precision])
    return Bytes(weights + round(frozen * BITS[frozen_dtype] / 8), gradients, optimizer)


STATES = {"adamw": 2, "ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0}
PLAIN = {"torch", "fused", "bnb", "8bit", "32bit", "npu", "xla"}  # what may follow in a name
BLOCK, SMALLEST = 256, 4096  # elements that share a scale; smaller tensors stay in 32 bits


def optimizer_bytes(name: str, sizes: Iterable[int], embeddings: Iterable[int]) -> int | None:
    """Bytes of an optimizer's states, by its name in Transformers' `--optim`; None if unknown.

    A state in 32 bits has 4 bytes per parameter. One in 8 bits (bitsandbytes) has 1, and a float32
    scale per block of 256, but tensors below 4,096 elements stay in 32 bits (Dettmers et al. 2021,
    arXiv 2110.02861, section 2; `bitsandbytes.optim.AdamW8bit`), and Transformers leaves embeddings
    in 32 bits, too. SGD is taken without momentum, as Transformers does.

    Args:
        sizes: elements of each trained tensor that is no table of embeddings.
        embeddings: elements of each trained table.
    """
    family, *rest = name.removeprefix("paged_").split("_")
    if family not in STATES or not set(rest) <= PLAIN:
        return None
    small = 1 + 4 / BLOCK if "8bit" in rest else 4
    each = [(n, small if n >= SMALLEST else 4) for n in sizes] + [(n, 4) for n in embeddings]
    return round(STATES[family] * sum(n * width for n, width in each))


def _one_of(value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"Expected one of {', '.join(known)}, found {value!r}: name one.")


def nf4_bytes(model: PreTrainedModel, dtype: str = "bfloat16") -> int:
    """Bytes of a model's weights with its linear layers in NF4, as bitsandbytes loads them.

    Embeddings, norms, biases and the output head keep `dtype`. The model may be on torch's `meta`
    device.
    """
    linear = sum(inputs * outputs for inputs, outputs in linear_shapes(model).values())
    packed = adam_bytes(0, linear, frozen_dtype="nf4")
    rest = adam_bytes(0, model.num_parameters() - linear, frozen_dtype=dtype)
    return packed.weights + rest.weights


def zero_bytes(
    parameters: int, world_size: int, stage: int, dtype: str = "bfloat16", frozen: int = 0
) -> Bytes:
    """Bytes that one rank keeps when Adam's training is partitioned with ZeRO.

    Stage 1 partitions the optimizer's states over the ranks, stage 2 also the gradients, and stage
    3 also the weights: figure 1 and section 5 of Rajbhandari et al. 2020, "ZeRO", arXiv 1910.02054.
    Communication buffers and activations are not included.

    Args:
        parameters: number of parameters that are trained.
        world_size: number of ranks.
        stage: 0 to 3; with 0 each rank keeps everything.
        dtype: `bfloat16` or `float16` for mixed precision (2 + 2 + 12 bytes per parameter), or
            `float32` (4 + 4 + 8, and from stage 1 on 4 more: DeepSpeed 0.19 keeps the optimizer's
            own copy of the weights for every dtype).
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
    weight_copy = 4 * parameters if dtype == "float32" and stage else 0

    def per_rank(size: int, from_stage: int) -> int:
        # Rounded up: all ranks keep parts of the same size, and the last part is padded.
        return -(-size // world_size) if stage >= from_stage else size

    return Bytes(
        weights=per_rank(whole.weights, 3),
        gradients=per_rank(whole.gradients, 2),
        optimizer=per_rank(whole.optimizer + weight_copy, 1),
    )


def fsdp_bytes(parameters: int, world_size: int) -> Bytes:
    """Bytes that one rank keeps when FSDP2 divides Adam's training (`fully_shard`).

    Weights, gradients and moments are all divided, and all in float32: 4 + 4 + 8 bytes per
    parameter. With a `MixedPrecisionPolicy` the copies in bfloat16 live only while a layer computes
    (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html).

    Args:
        parameters: number of parameters, all of them trained.
        world_size: number of ranks.

    Raises:
        ValueError: there is no rank, or the number of parameters is negative.
    """
    if world_size < 1 or parameters < 0:
        raise ValueError(
            "Expected at least one rank and no negative number of parameters, found "
            f"{world_size=}, {parameters=}."
        )
    whole = adam_bytes(parameters)
    return Bytes(*(-(-part // world_size) for part in vars(whole).values()))


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
    keeps no matrix of length × length. (Korthikanti et al. 2022, arXiv 2205.05198, equation 2, is
    for attention that keeps it.)

    Args:
        config: a `LlamaConfig`, or another with its fields.
        batch_size, length: rows, and tokens per row.
        dtype: of the weights, `float32` or `bfloat16`; norms and loss compute in float32 anyway.
        r: rank of LoRA adapters on all linear layers; 0 means full finetuning.
        checkpointing: keep only the input of each layer, and compute the rest again, one layer at
            a time (Chen et al. 2016, arXiv 1604.06174).

    Raises:
        ValueError: the dtype is not one of these.
    """
    _one_of(dtype, ("float32", "bfloat16"))
    size = round(BITS[dtype] / 8)  # bytes per number
    # The widths of the tensors: hidden states, inside the MLP, queries, keys (and values).
    h, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or h // heads
    q, kv = head_width * heads, head_width * config.num_key_value_heads
    # All figures below are bytes per token. A norm keeps its input and the root mean square, in
    # float32 for each dtype of the weights.
    norm = 4 * h + 4
    # Every layer keeps two norms; attention's queries, keys, values and output, with one float32
    # number per head; and three tensors between the matrices of the MLP.
    always = 2 * norm + size * (2 * q + 2 * kv + 3 * f) + 4 * heads
    # A matrix that is trained keeps its input for its own gradient. A frozen one does not, but its
    # adapter keeps the inputs of A and of B.
    if not r:  # each norm before and after its gain, and the input of the MLP's last matrix
        layer, after_layers = always + size * (4 * h + f), norm + 2 * size * h
    elif size == 4:  # adapters on the same input share one tensor
        layer, after_layers = always + 4 * (2 * h + f + 7 * r), 0
    else:  # adapters are float32, but the input is not: PEFT copies it for each of the seven
        layer, after_layers = always + 4 * (5 * h + q + f + 7 * r), 0
    after_layers += 4 * config.vocab_size  # the loss keeps the logits in float32
    layers = config.num_hidden_layers
    per_token = layers * layer + after_layers
    if checkpointing:  # each layer's input, and one layer at a time (or what follows them) in full
        per_token = layers * size * h + max(layer, after_layers)
    return batch_size * length * per_token
