"""Change a saved model's files so that other programs prompt it as in training.

llama.cpp runs the chat template itself. Ollama does not: it compares the template with those that
it knows, takes the nearest one if fewer than 100 characters differ, and otherwise sends the text
without any template (its `template/template.go`, `Named`). The course's templates, with their marks
for training, differ too much from all of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sftlib.chat import CHATML, LLAMA3
from sftlib.chat.control_tokens import template_of
from sftlib.chat.templates import Messages, render_marked
from sftlib.data.files import replace_text
from sftlib.models import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML_PUBLISHED = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML as most models have it. It renders as `CHATML` does, but has no marks."""

LLAMA3_PUBLISHED = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""Meta's template of Llama 3 Instruct. It renders as `LLAMA3` does, but has no marks."""

BEGIN = "<|begin_of_text|>"

# The same two for Ollama, in Go's template language, without BOS, which its tokenizer adds. From
# github.com/ollama/ollama, template/chatml.gotmpl and template/llama3-instruct.gotmpl (MIT).
_GO_TEMPLATES = {
    CHATML: (
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n"
        "{{ end }}<|im_start|>assistant\n"
    ),
    LLAMA3: (
        "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n"
        "{{ .Content }}<|eot_id|>\n"
        "{{- end }}<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
}
_TURNS = [("user", "One."), ("assistant", "Two."), ("user", "Three.")]
_PROBES = [
    [{"role": role, "content": content} for role, content in turns]
    for turns in (_TURNS[:1], _TURNS, [("system", "Zero."), *_TURNS])
]


def published_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template as other programs know it: the same text, without marks."""
    template = template_of(tokenizer)
    if template == LLAMA3:
        known = tokenizer.bos_token == BEGIN
        return LLAMA3_PUBLISHED if known else LLAMA3_PUBLISHED.replace("bos_token", f"'{BEGIN}'")
    return CHATML_PUBLISHED if template == CHATML else template


def make_portable(folder: str | os.PathLike) -> None:
    """Change the tokenizer files of a model folder so that other programs write the same prompts.

    The chat template becomes the published one. `add_bos_token` is true only if the template
    itself writes BOS; otherwise llama.cpp and Ollama would add a BOS that was not in training. A
    folder without a tokenizer stays as it is.
    """
    config_file = Path(folder) / "tokenizer_config.json"
    if not config_file.exists():
        return
    tokenizer = read_tokenizer(folder)
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if isinstance(tokenizer.chat_template, str):
        config.pop("chat_template", None)
        replace_text(Path(folder) / "chat_template.jinja", published_template(tokenizer))
    (prompt,) = _prompts(tokenizer, _PROBES[:1])
    adds_bos = _adds_bos(tokenizer) and prompt.startswith(tokenizer.bos_token)
    config |= {"add_bos_token": adds_bos, "add_eos_token": False}
    replace_text(config_file, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def modelfile(folder: str | os.PathLike, gguf: str) -> str:
    """Ollama's `Modelfile` for the GGUF file of a model folder: template and stop tokens.

    Args:
        gguf: the file's name; it lies beside the Modelfile.

    The Modelfile holds a template only if the model's own is ChatML or Llama 3's. For any other, a
    comment says that Ollama must know it.
    """
    tokenizer = read_tokenizer(folder)
    lines = [f"FROM ./{gguf}"]
    if go := _go_template(tokenizer):
        lines.append(f'TEMPLATE """{go}"""')
    else:
        lines.append(
            "# No TEMPLATE: the model's own is neither ChatML nor Llama 3's. If `ollama show "
            "--template` prints {{ .Prompt }}, Ollama does not know it: write one here."
        )
    lines += [f'PARAMETER stop "{token}"' for token in _stop_tokens(folder, tokenizer)]
    return "\n".join(lines) + "\n"


def _go_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Ollama's version of the chat template; empty if that is neither ChatML nor Llama 3's."""
    bos = tokenizer.bos_token or BEGIN
    try:
        texts = _prompts(tokenizer, _PROBES)
    except ValueError:  # for instance a template that allows no system message
        return ""
    without_bos = [text.removeprefix(bos) for text in texts]
    for ours, go in _GO_TEMPLATES.items():
        expected = [render_marked(probe, ours, True)[0].removeprefix(BEGIN) for probe in _PROBES]
        if without_bos == expected:
            # If the tokenizer adds BOS, the template must not write it again.
            writes_bos = texts[0].startswith(bos) and not _adds_bos(tokenizer)
            return bos * writes_bos + go
    return ""


def _stop_tokens(folder: str | os.PathLike, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The stop tokens as texts: those of generation_config.json, EOS and the end-of-turn token."""
    from sftlib.chat import end_of_turn_id

    file = Path(folder) / "generation_config.json"
    found = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    ids = found if isinstance(found, list) else [found]
    ids = [*ids, tokenizer.eos_token_id, end_of_turn_id(tokenizer)]
    return [str(tokenizer.convert_ids_to_tokens(i)) for i in dict.fromkeys(ids) if i is not None]


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself adds BOS to every text."""
    return tokenizer.bos_token_id in tokenizer("")["input_ids"]


def _prompts(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages]
) -> Sequence[str]:
    template, special = template_of(tokenizer), tokenizer.special_tokens_map
    return [render_marked(m, template, True, None, **special)[0] for m in conversations]
