"""What finetuning takes of memory, measured while it runs.

`sftlib.scale.memory` has the formulas that these measurements are held against.
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
    # ZeRO wraps the optimizer that was asked for, whose state is Adam's moments; the wrappers keep
    # the rest, each stage under other names.
    outer: Any = engine.optimizer
    inner = outer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer

    def kept(*names: str) -> list[torch.Tensor]:
        return [t for name in names for t in _tensors(getattr(outer, name, None))]

    # With stage 3 a parameter is empty, and `ds_tensor` is this rank's part of it.
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
    # By storage, so that views of one tensor count once.
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
def saved_bytes(model: torch.nn.Module) -> Generator[Saved]:
    """Measure what forward passes inside the block keep for the backward pass, weights aside.

    It reads what autograd saves (`torch.autograd.graph.saved_tensors_hooks`). Activation
    checkpointing saves in its own way, which is not seen.
    """
    import torch

    # Autograd also saves the weights, which are there anyway: leave them aside.
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
        # The weak reference tells when the storage is given back. Views share one storage.
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
def peak_bytes(before: Iterable[torch.Tensor] = ()) -> Generator[Peak]:
    """Measure the most bytes that tensors occupy at one time inside the block.

    It sees each tensor when an operation makes it and when it is given back, so the figure is exact
    and the same in each run. That slows steps down: measure memory and time in two runs.

    Args:
        before: tensors made before the block that count, such as a model's parameters.
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
