"""What a training would need, counted from shapes before anything is loaded: `--plan`."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from sftlib.finetune.arguments import (
    FinetuneArguments,
    deepspeed_config,
    rows_per_step,
    zero_config,
    zero_stage,
)
from sftlib.finetune.device import device_here, memory_of
from sftlib.finetune.model import allowed_max_length, describe_for_chat
from sftlib.finetune.speed import planned_speed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig

AT_ONCE = 1000  # conversations that are in memory while their tokens are counted


@dataclass(frozen=True)
class Workload:
    """How much is computed.

    Attributes:
        conversations: rows of the data.
        tokens: in all epochs, template included.
        steps: optimizer steps.
        rows_per_step: rows that all ranks together see in a step.
        row_kind: what a row is, "conversations" or "packed rows".
        longest: tokens of the longest row.
    """

    conversations: int
    tokens: int
    epochs: float
    steps: int
    rows_per_step: int
    row_kind: str
    longest: int


@dataclass(frozen=True)
class Plan:
    """Parameters, work, and the bytes that one rank keeps.

    Attributes:
        parameters: of the base model.
        trained: how many parameters are updated; those of adapters are not in `parameters`.
        on_device: bytes by what they are for.
        offloaded: bytes that are in main memory or on disk, or go there where the GPU is full.
        available: bytes of one GPU, or of this machine's main memory.
        where: the ranks, the ZeRO stage and the dtype, in words.
        changes: the bytes on the device with one argument changed, for each change that saves
            some, the one that saves most first.
        otherwise: what else may help, in words; no change above counts it.
        speed: tokens per second of all ranks, and where that is from; 0 where nothing says.
    """

    parameters: int
    trained: int
    adapters: bool
    work: Workload
    on_device: dict[str, int]
    offloaded: dict[str, int]
    available: int
    where: str
    changes: tuple[tuple[str, int], ...] = ()
    otherwise: str = ""
    speed: tuple[float, str] = (0, "")

    @property
    def needed(self) -> int:
        return sum(self.on_device.values())

    @property
    def fits(self) -> bool:
        return self.needed < 0.9 * self.available  # the rest is for buffers, which are not counted

    def __str__(self) -> str:
        work, gib = self.work, 2**30
        epochs = f"{work.epochs:.3g} epoch{'s' * (work.epochs != 1)}"
        operations = 6 * self.parameters * work.tokens  # Kaplan et al. 2020, arXiv 2001.08361
        lines = [
            f"parameters      {self.parameters:,}"
            + (", and" if self.adapters else ", of which")
            + f" {self.trained:,} "
            + "of the adapter, which " * self.adapters
            + "are trained",
            f"conversations   {work.conversations:,}, {work.tokens:,} tokens in {epochs}",
            f"steps           {work.steps:,} of {work.rows_per_step} {work.row_kind}",
            f"operations      at most {operations:.2e} (6 · parameters · tokens)",
            f"time            {self.time}",
            f"memory {self.where}:",
            *(f"    {size / gib:8.2f} GiB  {name}" for name, size in self.on_device.items()),
            *(f"    {size / gib:8.2f} GiB  {name}" for name, size in self.offloaded.items()),
            f"    {self.needed / gib:8.2f} GiB  in all, of {self.available / gib:.2f} GiB",
            *(["It fits."] if self.fits else self._advice()),
        ]
        return "\n".join(lines)

    def _advice(self) -> list[str]:
        """What to do where it does not fit, each with the memory that it would take."""
        changes = [f"    {size / 2**30:8.2f} GiB  with {words}" for words, size in self.changes]
        if not changes:
            return [f"It does not fit. Try {self.otherwise}."]
        return ["It does not fit. It would take", *changes, f"Or try {self.otherwise}."]

    @property
    def time(self) -> str:
        """How long the training takes, or how to find out."""
        rate, source = self.speed
        if not rate:
            return (
                "unknown: give --tokens_per_second, or --output_dir of a short run (--max_steps 20)"
            )
        hours = duration(self.work.tokens / rate / 3600)
        return f"{hours} of training, at {rate:,g} tokens per second ({source})"


def duration(hours: float) -> str:
    """Hours, or minutes, with two digits."""
    number, unit = (hours, "hours") if hours >= 1 else (60 * hours, "minutes")
    return f"{number:,.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}"


def make_plan(
    args: FinetuneArguments,
    training: SFTConfig,
    rows: Sequence[dict],
    held_out: Sequence[dict] = (),
) -> Plan:
    """Count parameters, steps and bytes of a training on `rows`, evaluated on `held_out`."""
    from sftlib.scale.memory import lora_parameters, lora_targets

    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    model, tokenizer = describe_for_chat(args, training)
    unset_hf_deepspeed_config()  # adapters are counted on it, too
    total = trained = model.num_parameters()
    if args.trains_adapters:
        trained = lora_parameters(model, args.lora_r, args.targets)
        if args.use_dora:  # and a length for each output
            trained += sum(out for _, out in lora_targets(model, 1, args.targets).values())
    dtype = _dtype(args, training)
    work = _work(training, args.plan_gpus, _lengths(rows, tokenizer), model)
    lengths = _lengths(held_out, tokenizer) if training.eval_strategy != "no" and held_out else [0]
    rows_read = (work.longest, min(max(lengths), allowed_max_length(model, training)))
    on_device, offloaded = _memory(args, training, model, trained, *rows_read)
    device = device_here(training.use_cpu, bool(training.deepspeed))
    kind = "GPU" if device.name != "cpu" or dtype == "bfloat16" else "process"
    several = f"each of {args.plan_gpus} {'GPUs' if kind == 'GPU' else 'processes'}"
    ranks = several if args.plan_gpus > 1 else f"1 {kind}"
    return Plan(
        parameters=total,
        trained=trained,
        adapters=args.trains_adapters,
        work=work,
        on_device=on_device,
        offloaded=offloaded,
        available=round(args.plan_gib * 2**30) or memory_of(device),
        where=f"on {ranks} (ZeRO stage {zero_stage(training)}, computed in {dtype})",
        changes=_changes(args, training, model, sum(on_device.values()), *rows_read),
        otherwise=_otherwise(args, training),
        speed=planned_speed(args, training),
    )


def _dtype(args: FinetuneArguments, training: SFTConfig) -> str:
    # --plan_gib stands for another machine: its GPUs are taken to compute in bfloat16.
    return "bfloat16" if training.bf16 or args.plan_gib > 0 else "float32"


def _memory(
    args: FinetuneArguments,
    training: SFTConfig,
    model: PreTrainedModel,
    trained: int,
    longest: int,
    evaluated: int,
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes on the device, and bytes that are elsewhere, by what they are for."""
    dtype = _dtype(args, training)
    on_device = _bytes(args, training, model, trained, dtype, longest, evaluated)
    offloaded = _offloaded(on_device, args, training)
    return on_device, offloaded


def _offloaded(
    on_device: dict[str, int], args: FinetuneArguments, training: SFTConfig
) -> dict[str, int]:
    """Take out of `on_device` what may be elsewhere, and return it."""
    moved = {"offload_optimizer": "optimizer", "offload_param": "weights"}
    zero = zero_config(training)
    devices = {key: (zero.get(key) or {}).get("device", "none") for key in moved}
    found = {moved[key]: on_device.pop(moved[key]) for key in moved if devices[key] != "none"}
    offloaded = {f"{name}, offloaded": size for name, size in found.items()}
    # NVIDIA's unified memory moves a paged optimizer; a CPU has no other memory.
    gpu = args.plan_gib > 0 or device_here(training.use_cpu).name == "cuda"
    if optimizer_name(training).startswith("paged_") and gpu and "optimizer" in on_device:
        offloaded["optimizer, paged: moved to main memory if the GPU is full"] = on_device.pop(
            "optimizer"
        )
    return offloaded


SAVES = 0.01  # of the memory: a change that saves less is not worth a line


def _changes(
    args: FinetuneArguments,
    training: SFTConfig,
    model: PreTrainedModel,
    needed: int,
    longest: int,
    evaluated: int,
) -> tuple[tuple[str, int], ...]:
    """The bytes that a run would need with one argument changed; only changes that save some."""
    from sftlib.scale.memory import lora_parameters

    def bytes_of(changed: FinetuneArguments, trained_as: SFTConfig) -> int:
        total = model.num_parameters()
        adapter = changed.trains_adapters
        trained = lora_parameters(model, changed.lora_r, changed.targets) if adapter else total
        on_device, _ = _memory(changed, trained_as, model, trained, longest, evaluated)
        return sum(on_device.values())

    saving = []
    for words, changed, trained_as in _possible(args, training):
        with suppress(ValueError):  # an adapter that does not fit this model is no advice
            saving.append((words, bytes_of(changed, trained_as)))
    helpful = [(words, size) for words, size in saving if size < (1 - SAVES) * needed]
    return tuple(sorted(helpful, key=lambda change: change[1]))


def _possible(
    args: FinetuneArguments, training: SFTConfig
) -> Iterator[tuple[str, FinetuneArguments, SFTConfig]]:
    """Changes of one argument that may save memory, and are not made yet."""

    def trained_with(**settings: Any) -> SFTConfig:
        changed = copy.copy(training)
        for name, value in settings.items():
            setattr(changed, name, value)
        return changed

    fewer = ["lora", "qlora"] if args.method == "full" else ["qlora"]
    for method in fewer if args.method != "qlora" else []:
        if method == "lora" or zero_stage(training) < 3:  # 4 bits cannot be divided
            yield f"--method {method}", replace(args, method=method), training
    if (rows := training.per_device_train_batch_size) > 1:
        evaluated = training.per_device_eval_batch_size
        small = {"per_device_train_batch_size": 1}
        small |= {"per_device_eval_batch_size": 1 if evaluated == rows else evaluated}
        again = rows * training.gradient_accumulation_steps
        words = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {again}"
        yield words, args, trained_with(**small)
    if not training.activation_checkpointing:
        checkpointing = trained_with(activation_checkpointing=True)
        yield "--activation_checkpointing true", args, checkpointing
    if optimizer_name(training).startswith("adamw") and "8bit" not in optimizer_name(training):
        yield "--optim adamw_8bit", args, trained_with(optim="adamw_8bit")


def _otherwise(args: FinetuneArguments, training: SFTConfig) -> str:
    """What else needs less memory, in words."""
    highest = 2 if args.method == "qlora" else 3
    if zero_stage(training) < highest:
        return "a higher ZeRO stage on more GPUs, a smaller --max_length, or a smaller model"
    return "a smaller --max_length, a smaller model, or more GPUs"


def _lengths(rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of each conversation, template included."""
    from sftlib.chat import encode_batch

    lengths = []
    for start in range(0, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE]
        tools = [row.get("tools") for row in part]
        encoded = encode_batch([row["messages"] for row in part], tokenizer, tools)
        lengths += map(len, encoded["input_ids"])
    return lengths


def _work(
    training: SFTConfig, world_size: int, lengths: list[int], model: PreTrainedModel
) -> Workload:
    limit = allowed_max_length(model, training)
    cut = [min(n, limit) for n in lengths]
    count, kind, longest = len(cut), "conversations", max(cut)
    if training.packing:  # conversations fill each row up to the limit
        count, kind, longest = math.ceil(sum(cut) / limit), "packed rows", limit
    per_step = rows_per_step(training, world_size)
    per_epoch = math.ceil(count / per_step)
    steps = round(per_epoch * training.num_train_epochs)
    steps = training.max_steps if training.max_steps > 0 else steps
    epochs = steps / per_epoch if training.max_steps > 0 else training.num_train_epochs
    return Workload(
        conversations=len(lengths),
        tokens=round(sum(cut) * epochs),
        epochs=epochs,
        steps=steps,
        rows_per_step=per_step,
        row_kind=kind,
        longest=longest,
    )


def _bytes(
    args: FinetuneArguments,
    training: SFTConfig,
    model: PreTrainedModel,
    trained: int,
    dtype: str,
    longest: int,
    evaluated: int,
) -> dict[str, int]:
    """Bytes that one rank keeps, by what they are for; rows of `longest` and `evaluated` tokens."""
    from sftlib.scale.memory import nf4_bytes, zero_bytes

    gpus, stage = args.plan_gpus, zero_stage(training)
    frozen = model.num_parameters() if args.trains_adapters else 0
    # What is trained is kept in float32, unless DeepSpeed keeps a float32 copy, or TRL casts it.
    trained_dtype = dtype if training.deepspeed else "float32"
    trained_dtype = "bfloat16" if args.method == "qlora" else trained_dtype
    states = zero_bytes(trained, gpus, stage, trained_dtype)
    base = zero_bytes(0, gpus, stage, dtype, frozen).weights
    if args.method == "qlora":
        base = nf4_bytes(model, dtype)
    # Autocast makes a copy of each trained weight, and keeps it from forward to backward.
    autocast = (trained_dtype, dtype) == ("float32", "bfloat16")
    copies = {f"copies in {dtype} to compute with": 2 * trained} if autocast else {}
    return {
        "weights": states.weights + base,
        "gradients": states.gradients,
        **_optimizer(args, training, model, trained, trained_dtype),
        **copies,
        **_activations(args, training, model, dtype, longest, evaluated),
    }


def optimizer_name(training: SFTConfig) -> str:
    """The optimizer of `--optim`; empty where DeepSpeed's file names one, which counts more."""
    if "optimizer" in deepspeed_config(training):
        return ""
    return str(getattr(training.optim, "value", training.optim))


def _optimizer(
    args: FinetuneArguments,
    training: SFTConfig,
    model: PreTrainedModel,
    trained: int,
    trained_dtype: str,
) -> dict[str, int]:
    """Bytes of the optimizer on one rank: its states, and under DeepSpeed a float32 copy."""
    from sftlib.scale.memory import lora_targets, optimizer_bytes

    gpus, stage = args.plan_gpus, zero_stage(training)
    table = cast(Any, model.get_input_embeddings()).weight
    if training.deepspeed:  # its ranks keep one long tensor
        sizes, tables = [trained], []
    elif args.trains_adapters:
        shapes = lora_targets(model, args.lora_r, args.targets).values()
        sizes, tables = [args.lora_r * n for shape in shapes for n in shape], []
    else:
        sizes, tables = [p.numel() for p in model.parameters() if p is not table], [table.numel()]
    states = optimizer_bytes(optimizer_name(training) or "adamw_torch", sizes, tables)
    label = "optimizer (counted as AdamW)" if states is None else "optimizer"
    if states is None:
        states = optimizer_bytes("adamw_torch", sizes, tables) or 0
    copy = 4 * trained if training.deepspeed and (trained_dtype != "float32" or stage) else 0
    return {label: -(-(states + copy) // (gpus if stage else 1))}


def _activations(
    args: FinetuneArguments,
    training: SFTConfig,
    model: PreTrainedModel,
    dtype: str,
    longest: int,
    evaluated: int,
) -> dict[str, int]:
    """The larger of two: what training keeps for the backward pass, and what evaluating needs."""
    from sftlib.scale.memory import activation_bytes

    batch, other = training.per_device_train_batch_size, training.per_device_eval_batch_size
    r, checkpointing = args.lora_r * args.trains_adapters, bool(training.activation_checkpointing)
    kept = activation_bytes(model.config, batch, longest, dtype, r, checkpointing)
    # Nothing is kept from layer to layer; the logits are there as a whole.
    needed = activation_bytes(model.config, other, evaluated, dtype, 0, checkpointing=True)
    if needed > kept:
        return {f"evaluation ({other} × {evaluated} tokens), more than in training": needed}
    return {f"activations ({batch} × {longest} tokens)": kept}
