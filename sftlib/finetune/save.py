"""What a finished run leaves: the adapter or the model, and the merged model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftlib.adapters import WEIGHTS
from sftlib.data.files import replace_folder
from sftlib.finetune.arguments import FinetuneArguments
from sftlib.finetune.model import set_generation_config, set_template
from sftlib.models import load
from sftlib.patches import wait_for_gloo

if TYPE_CHECKING:
    from trl import SFTTrainer


def rehearse(trainer: SFTTrainer) -> None:
    """Save everything but weights to a temporary folder: what fails there would fail at the end.

    Raises:
        ValueError: something cannot be saved; the message says what.
    """
    model: Any = trainer.model
    base = getattr(model, "get_base_model", lambda: model)()
    parts: list[Any] = [base.config, base.generation_config, trainer.processing_class]
    parts += getattr(model, "peft_config", {}).values()
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            try:
                part.save_pretrained(folder)
            except Exception as error:
                raise ValueError(
                    f"Expected a {type(part).__name__} that can be saved after the training, found "
                    f"one that cannot ({' '.join(str(error).split())[:300]}). Mend the file in the "
                    "folder of --model."
                ) from error


def save(trainer: SFTTrainer, args: FinetuneArguments, folder: Path) -> Path:
    """Save all that `args.saved_folders` names, each whole or not at all; return the last one.

    All ranks must call it, because each may hold a part of the weights.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    name, last = args.saved_folders[0], args.saved_folders[-1]
    trainer.save_model(str(folder / f"{name}.part"))
    if trainer.is_world_process_zero():
        replace_folder(folder / f"{name}.part", folder / name)
        if args.trains_adapters and has_new_rows(folder / name):
            print(
                "The base has no rows for the tokens that were added. "
                f"peft.AutoPeftModelForCausalLM.from_pretrained('{folder / name}') adds them; "
                "before PeftModel.from_pretrained, call base.resize_token_embeddings yourself."
            )
    if last != name:
        # Only the first rank merges. With ZeRO-3 still on, loading would wait for the others.
        unset_hf_deepspeed_config()
        if trainer.is_world_process_zero():
            print(f"The adapter is in {folder / name}; --no_merge would skip the merged model.")
            save_merged(args, folder)
    return folder / last


def has_new_rows(adapter: Path) -> bool:
    """Whether an adapter brings whole tables of embeddings: PEFT saves them where they grew."""
    from safetensors import safe_open

    with safe_open(adapter / WEIGHTS, "pt") as tensors:
        return any("lora_" not in k and k.endswith(".weight") for k in tensors.keys())  # noqa: SIM118


def save_merged(args: FinetuneArguments, folder: Path) -> None:
    """Merge `folder/adapter` into the base, and save it as `folder/merged`.

    The base is loaded again as it was published, not as QLoRA quantised it, and on the CPU, since
    the GPU has no room for both.
    """
    from peft import PeftModel

    base, tokenizer = load(args.model, device="cpu")
    set_template(base, tokenizer, args)
    merged = PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload()
    set_generation_config(merged, tokenizer)
    merged.save_pretrained(folder / "merged.part")
    tokenizer.save_pretrained(folder / "merged.part")
    replace_folder(folder / "merged.part", folder / "merged")


def end_all_ranks(trainer: SFTTrainer) -> None:
    """Wait for all ranks, then end: a launcher may stop those that still write after one ended."""
    trainer.accelerator.wait_for_everyone()
    wait_for_gloo()
    trainer.accelerator.end_training()
