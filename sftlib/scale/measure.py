"""How much memory finetuning needs, measured while it runs.

`sftlib.scale.memory` predicts the same quantities.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sftlib.scale.memory import Bytes

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine


def tracked_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Bytes:
    """What `adam_bytes` predicts, summed over the tensors that exist after a backward pass."""
    weights = list(model.parameters())
    gradients = [p.grad for p in weights if p.grad is not None]
    return Bytes(_bytes(weights), _bytes(gradients), _bytes(_tensors(dict(optimizer.state))))


def tracked_zero_bytes(engine: DeepSpeedEngine) -> Bytes:
    """What `zero_bytes` predicts, summed over the tensors that this rank's engine holds now.

    It reads the attributes in which DeepSpeed 0.19 keeps them. Call it after `engine.backward`, so
    that there are gradients.
    """
    parameters = list(engine.module.parameters())
    # ZeRO wraps the optimizer that the configuration names. The inner one holds Adam's moments; the
    # wrapper holds the rest, in attributes whose names depend on the stage.
    wrapper: Any = engine.optimizer
    adam = wrapper
    while hasattr(adam, "optimizer"):
        adam = adam.optimizer

    def held(*names: str) -> list[torch.Tensor]:
        return [t for name in names for t in _tensors(getattr(wrapper, name, None))]

    # With stage 3 a parameter is empty, and `ds_tensor` is this rank's part of it.
    parts = [p.ds_tensor for p in parameters if getattr(p, "ds_tensor", None) is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    gradients += held("averaged_gradients", "grad_partitions_flat_buffer")  # stages 1, 2; 3
    # the optimizer's own copy of the weights: stages 1 and 2; 3; 0 with bfloat16
    copy = held("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups")
    return Bytes(
        weights=_bytes(parameters + parts),
        gradients=_bytes(gradients),
        optimizer=_bytes(copy + _tensors(dict(adam.state))),
    )


def tracked_fsdp_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Bytes:
    """What `fsdp_bytes` predicts, summed over the parts that this rank holds now.

    Args:
        model: after `torch.distributed.fsdp.fully_shard`. Call it after a backward pass, so that
            there are gradients.
        optimizer: made from the divided parameters, after its first step.
    """
    weights = list(model.parameters())
    gradients = [p.grad for p in weights if p.grad is not None]
    states = _tensors(dict(optimizer.state))
    return Bytes(*(_bytes(map(_own_part, part)) for part in (weights, gradients, states)))


def _own_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a `DTensor`; any other tensor as it is."""
    return getattr(tensor, "to_local", lambda: tensor)()


def _tensors(value: object) -> list[torch.Tensor]:
    """All tensors in a nest of lists and dicts."""
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    # Counted by storage, so that two views of one tensor count once.
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def step_bytes(
    model: torch.nn.Module, batch: torch.Tensor, optimizer: torch.optim.Optimizer
) -> dict[str, int]:
    """What a training step keeps in memory, in bytes, and its peak.

    The first step makes the optimizer's moments. The second is measured.

    Args:
        model: changed by the two steps.
        batch: token ids (rows, tokens), which are the labels, too.
        optimizer: of the trained parameters.

    Returns:
        `weights`, `gradients`, `optimizer`, `activations` (what the forward pass keeps for the
        backward pass) and `peak`, the most that is there at once.
    """
    model.train()(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    kept = tracked_bytes(model, optimizer)
    optimizer.zero_grad()
    before = [*model.parameters(), *_tensors(dict(optimizer.state))]
    with saved_bytes(model) as saved, peak_bytes(before) as peak:
        model(input_ids=batch, labels=batch).loss.backward()
    found = {"weights": kept.weights, "gradients": kept.gradients, "optimizer": kept.optimizer}
    return found | {"activations": saved.total, "peak": peak.peak}


@dataclass
class Saved:
    """What autograd saved: address of a storage → its bytes."""

    storages: dict[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.storages.values())


@contextmanager
def saved_bytes(model: torch.nn.Module) -> Generator[Saved]:
    """Measure what forward passes inside the block keep for the backward pass, without weights.

    It counts what autograd saves (`torch.autograd.graph.saved_tensors_hooks`). It does not see what
    activation checkpointing saves.
    """
    import torch

    # Autograd also saves weights. They exist anyway, so they do not count.
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = Saved()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


ONCE, TWICE = 1, 2
COLLECTIVES = {  # torch's operation → how often its tensor passes a rank
    "allreduce_": TWICE,  # a reduce-scatter and an all-gather
    "reduce_": ONCE,
    "broadcast_": ONCE,
    "_allgather_base_": ONCE,
    "_reduce_scatter_base_": ONCE,
}


@contextmanager
def sent_bytes() -> Generator[dict[str, int]]:
    """Count what this rank's collectives send inside the block: operation → bytes.

    An all-gather and a reduce-scatter count the whole tensor once, an all-reduce twice, as in
    section 7.1 of Rajbhandari et al. 2020, "ZeRO", arXiv 1910.02054. (Exactly, (N - 1) / N of this
    passes each of N ranks.) All libraries count alike: DeepSpeed and FSDP2 both call torch's
    operations. It slows steps down: measure bytes and time in separate steps.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    sent: dict[str, int] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.__name__.partition(".")[0]
            if func.namespace == "c10d" and name in COLLECTIVES:
                sizes = [t.nbytes for t in tree_leaves(args) if hasattr(t, "nbytes")]
                # The base operations have the whole tensor and a part of it as arguments.
                size = max(sizes) if name.endswith("base_") else sum(sizes)
                sent[name] = sent.get(name, 0) + COLLECTIVES[name] * size
            return func(*args, **(kwargs or {}))

    with Watch():
        yield sent


@dataclass
class Peak:
    """Bytes that tensors occupy now, and the highest number so far."""

    now: int = 0
    peak: int = 0
    _alive: dict[int, weakref.ref] = field(default_factory=dict)

    def see(self, tensor: torch.Tensor) -> None:
        """Count the tensor's storage until it is freed."""
        # The weak reference calls back when the storage is freed. Views share one storage.
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._freed(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> None:
        if self._alive.pop(key, None):
            self.now -= size


@contextmanager
def peak_bytes(before: Iterable[torch.Tensor] = ()) -> Generator[Peak]:
    """Measure the most bytes that tensors occupy at one time inside the block.

    It sees each tensor when an operation makes it and when it is freed, so the figure is exact and
    the same in each run. It slows steps down: measure memory and time in separate runs.

    Args:
        before: tensors from before the block that count as well, such as a model's parameters.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    peak = Peak()
    for tensor in before:
        peak.see(tensor)

    # Every operation, also those of the backward pass, goes through a dispatch mode.
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for value in tree_iter(result):
                if isinstance(value, torch.Tensor):
                    peak.see(value)
            return result

    with Watch():
        yield peak
