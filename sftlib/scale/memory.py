"""What finetuning needs in memory: counted from shapes before training, and measured while it runs.

The counts are formulas with their sources; `tracked_bytes`, `saved_bytes`, `peak_bytes`
and `peak_rss` are measurements to hold them against.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine
    from transformers import PretrainedConfig, PreTrainedModel

BITS = {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0, "nf4": 4 + 8 / 64 + 32 / (64 * 256)}
"""Bits a weight. NF4 with double quantisation: an 8-bit scale for each block of 64 weights, and a
32-bit one for each 256 of those scales (Dettmers et al. 2023, arXiv 2305.14314, section 3)."""

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


def linear_shapes(model: PreTrainedModel, head: bool = False) -> dict[str, tuple[int, int]]:
    """The linear layers of a model, with or without its output head: name → (inputs, outputs).

    A model on torch's `meta` device, without weights, will do; so will one with adapters.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    model = getattr(model, "get_base_model", lambda: model)()
    output = model.get_output_embeddings()
    heads = set(output.modules()) if output and not head else ()  # with what adapters put around it
    shapes = {}
    for path, module in model.named_modules():
        name = path.removesuffix(".base_layer")
        if module in heads or ".lora_" in path:
            continue
        if isinstance(module, torch.nn.Linear):
            shapes[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):  # GPT-2's: the transposed matrix
            shapes[name] = tuple(module.weight.shape)
    return shapes


def lora_targets(
    model_or_shapes: PreTrainedModel | Shapes, r: int, target_modules: str | Sequence[str]
) -> dict[str, tuple[int, int]]:
    """The linear layers that get a LoRA adapter, chosen as PEFT does it.

    Args:
        model_or_shapes: a model, or name → (inputs, outputs) of its linear layers.
        r: the adapters' rank.
        target_modules: `"all-linear"`, the last parts of names, or a pattern for whole names.

    Raises:
        ValueError: nothing has such a name; the pattern is none; or the rank is below 1 or above
            that of a matrix.
    """
    if isinstance(target_modules, str):
        try:
            re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                f"Expected a regular expression as target_modules, found {target_modules!r}: "
                f"{error}. For some layers by name, give a list."
            ) from error
    given = isinstance(model_or_shapes, Mapping)
    shapes = model_or_shapes if given else linear_shapes(model_or_shapes)
    targets = {n: shape for n, shape in shapes.items() if is_target(n, target_modules)}
    pattern = isinstance(target_modules, str)
    idle = [
        repr(target)
        for target in ([target_modules] if pattern else target_modules)
        if not any(is_target(name, target if pattern else [target]) for name in shapes)
    ]
    if idle or not targets:
        names = sorted({name.rsplit(".", 1)[-1] for name in shapes})
        raise ValueError(
            f"Expected target_modules that name linear layers, found {target_modules!r}: "
            f"{', '.join(idle) or 'an empty list'} fits none. Choose among {', '.join(names)}, "
            'or write "all-linear".'
        )
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"Expected a rank of 1 or more, found r={r!r}: 8 or 16 is usual.")
    name, shape = min(targets.items(), key=lambda item: min(item[1]))
    if r > min(shape):
        raise ValueError(
            f"Expected a rank of at most {min(shape)}, found r={r}: the matrix of {name} is "
            f"{shape[0]} × {shape[1]} and can have no higher rank. Lower r, or leave it out."
        )
    return targets


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
        precision: of training: `float32` (4 + 4 + 8 bytes a parameter), `bfloat16` throughout
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
        dtype: `bfloat16` or `float16` for mixed precision (2 + 2 + 12 bytes a parameter), or
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
        batch_size, length: rows, and tokens a row.
        dtype: of the weights, `float32` or `bfloat16`; norms and loss compute in float32 anyway.
        r: rank of LoRA adapters on all linear layers; 0 is full finetuning.
        checkpointing: keep the input of each layer alone, and compute the rest again for a layer at
            a time (Chen et al. 2016, arXiv 1604.06174).

    Raises:
        ValueError: the dtype is not one of these.
    """
    _one_of(dtype, ("float32", "bfloat16"))
    each = round(BITS[dtype] / 8)
    h, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or h // heads
    q, kv = head * heads, head * config.num_key_value_heads
    norm = 4 * h + 4  # its input and the root mean square, in float32 whatever the weights
    shared = 2 * norm + each * (2 * q + 2 * kv + 3 * f) + 4 * heads
    if not r:  # each norm before and after its gain, and the input of the last matrix
        layer, last = shared + each * (4 * h + f), norm + 2 * each * h
    elif each == 4:  # what goes into A and into B
        layer, last = shared + 4 * (2 * h + f + 7 * r), 0
    else:  # adapters are float32: each gets its input in a copy of its own
        layer, last = shared + 4 * (5 * h + q + f + 7 * r), 0
    last += 4 * config.vocab_size
    layers = config.num_hidden_layers
    kept = layers * each * h + max(layer, last) if checkpointing else layers * layer + last
    return batch_size * length * kept


def tracked_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Bytes:
    """What `adam_bytes` predicts, summed over the tensors that are there after a backward pass."""
    import torch

    found = list(model.parameters())
    state = [
        value
        for kept in optimizer.state.values()
        for value in kept.values()
        if isinstance(value, torch.Tensor)
    ]
    return Bytes(_bytes(found), _bytes(p.grad for p in found if p.grad is not None), _bytes(state))


def tracked_zero_bytes(engine: DeepSpeedEngine) -> Bytes:
    """What `zero_bytes` predicts, summed over the tensors that this rank's engine holds now.

    Reads where DeepSpeed 0.19 keeps them; call it after `engine.backward` for the gradients.
    """
    found = list(engine.module.parameters())
    outer, inner = engine.optimizer, engine.optimizer
    while hasattr(inner, "optimizer"):  # ZeRO wraps the optimizer that was asked for
        inner = inner.optimizer

    def kept(*names: str) -> list[torch.Tensor]:
        return [t for name in names for t in _tensors(getattr(outer, name, None))]

    weights = found + [p.ds_tensor for p in found if getattr(p, "ds_tensor", None) is not None]
    gradients = [p.grad for p in found if p.grad is not None]
    gradients += kept("averaged_gradients", "grad_partitions_flat_buffer")  # stages 1, 2; 3
    # the optimizer's own copy of the weights: stages 1 and 2; 3; 0 with bfloat16
    master = kept("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups")
    return Bytes(_bytes(weights), _bytes(gradients), _bytes(master + _tensors(dict(inner.state))))


def _tensors(kept: object) -> list[torch.Tensor]:
    """All tensors in lists and dicts within each other."""
    import torch

    if isinstance(kept, torch.Tensor):
        return [kept]
    if isinstance(kept, Mapping):
        kept = list(kept.values())
    return [t for one in kept for t in _tensors(one)] if isinstance(kept, list | tuple) else []


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@dataclass
class Saved:
    """What autograd saved: bytes by address of the storage."""

    storages: dict[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.storages.values())


@contextmanager
def saved_bytes(model: torch.nn.Module) -> Iterator[Saved]:
    """Measure what forward passes inside the block keep for the backward pass, weights aside.

    Reads what autograd saves (`torch.autograd.graph.saved_tensors_hooks`); activation checkpointing
    hides its own from that.
    """
    import torch

    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = Saved()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@dataclass
class Peak:
    """Bytes that tensors occupy now, and the most at one time so far."""

    now: int = 0
    peak: int = 0
    _alive: dict[int, weakref.ref] = field(default_factory=dict)

    def see(self, tensor: torch.Tensor) -> None:
        """Count the tensor's storage until it is given back."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        if self._alive.pop(key, None):
            self.now -= size


@contextmanager
def peak_bytes(before: Iterable[torch.Tensor] = ()) -> Iterator[Peak]:
    """Measure the most bytes that tensors occupy at one time inside the block.

    Exact, and the same in each run: sees each tensor as an operation makes it, and when it is given
    back. That slows steps down, so measure memory and time in two runs.

    Args:
        before: tensors made before the block that count, such as a model's parameters.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    peak = Peak()
    for tensor in before:
        peak.see(tensor)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for value in tree_iter(result):
                if isinstance(value, torch.Tensor):
                    peak.see(value)
            return result

    with Watch():
        yield peak


@dataclass
class Rss:
    """Resident memory of this process, in bytes: as the block began, and the most since."""

    start: int
    peak: int

    @property
    def grown(self) -> int:
        return self.peak - self.start


@contextmanager
def peak_rss(every: float = 0.002) -> Iterator[Rss]:
    """Measure how far the process's resident memory rises inside the block.

    What the operating system sees, with all that Python and torch add, looked at each `every`
    seconds. Memory that was freed before may be used again without a rise: measure large things, in
    a fresh process.
    """
    import psutil

    process = psutil.Process()
    rss = Rss(*[process.memory_info().rss] * 2)
    done = threading.Event()

    def look() -> None:
        while not done.wait(every):
            rss.peak = max(rss.peak, process.memory_info().rss)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield rss
    finally:
        rss.peak = max(rss.peak, process.memory_info().rss)
        done.set()
        thread.join()
