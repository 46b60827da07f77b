"""What a saved model must say so that other programs prompt it as it was trained.

llama.cpp runs the chat template itself. Ollama does not: it compares the template with those that
it knows, takes the nearest if fewer than 100 characters differ, and otherwise sends the bare text
(its `template/template.go`, `Named`). Ours, with its marks for training, is too far from all.
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
from sftlib.models import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML_PUBLISHED = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML as most models carry it. It renders as `CHATML` does, and has no marks."""

LLAMA3_PUBLISHED = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""Meta's, of Llama 3 Instruct. It renders as `LLAMA3` does."""

BEGIN = "<|begin_of_text|>"

# The same two for Ollama, which writes no BOS: its tokenizer does. From github.com/ollama/ollama,
# template/chatml.gotmpl and template/llama3-instruct.gotmpl (MIT).
_GO = {
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
    """The tokenizer's chat template as others know it: without our marks, with the same text."""
    template = template_of(tokenizer)
    if template == LLAMA3:
        known = tokenizer.bos_token == BEGIN
        return LLAMA3_PUBLISHED if known else LLAMA3_PUBLISHED.replace("bos_token", f"'{BEGIN}'")
    return CHATML_PUBLISHED if template == CHATML else template


def make_portable(folder: str | os.PathLike) -> None:
    """Change the tokenizer files of a model folder so that other programs write what was trained.

    The chat template becomes the published one. The settings say whether the tokenizer begins a
    text with BOS: only if the template writes it, because llama.cpp and Ollama add it to every
    prompt otherwise. A folder without a tokenizer stays as it is.
    """
    settings = Path(folder) / "tokenizer_config.json"
    if not settings.exists():
        return
    tokenizer = read_tokenizer(folder)
    found = json.loads(settings.read_text(encoding="utf-8"))
    if isinstance(tokenizer.chat_template, str):
        found.pop("chat_template", None)
        _write(Path(folder) / "chat_template.jinja", published_template(tokenizer))
    (prompt,) = _prompts(tokenizer, _PROBES[:1])
    adds_bos = tokenizer.bos_token_id in _added(tokenizer) and prompt.startswith(
        tokenizer.bos_token
    )
    found |= {"add_bos_token": adds_bos, "add_eos_token": False}
    _write(settings, json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def modelfile(folder: str | os.PathLike, gguf: str) -> str:
    """Ollama's `Modelfile` for the GGUF file of a model folder: template and stop tokens.

    Args:
        gguf: the file's name; it lies beside the Modelfile.

    The template is there where the model's own is ChatML or Llama 3's. For another one a comment
    says that Ollama must know it.
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
    """Ollama's version of the chat template; empty for one of another family."""
    bos = tokenizer.bos_token or BEGIN
    try:
        texts = _prompts(tokenizer, _PROBES)
    except ValueError:  # for instance one that takes no system message
        return ""
    bare = [text.removeprefix(bos) for text in texts]
    for ours, go in _GO.items():
        if bare == [render_marked(one, ours, True)[0].removeprefix(BEGIN) for one in _PROBES]:
            begins = texts[0].startswith(bos) and tokenizer.bos_token_id not in _added(tokenizer)
            return bos * begins + go  # a tokenizer that adds BOS would double it
    return ""


def _stop_tokens(folder: str | os.PathLike, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The stop tokens' texts: those of generation_config.json, EOS and the end of the turn."""
    from sftlib.chat import end_of_turn_id

    file = Path(folder) / "generation_config.json"
    found = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    ids = found if isinstance(found, list) else [found]
    ids = [*ids, tokenizer.eos_token_id, end_of_turn_id(tokenizer)]
    return [str(tokenizer.convert_ids_to_tokens(i)) for i in dict.fromkeys(ids) if i is not None]


def _added(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer adds to every text, such as BOS."""
    return tokenizer("")["input_ids"]


def _prompts(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages]
) -> Sequence[str]:
    template, special = template_of(tokenizer), tokenizer.special_tokens_map
    return [render_marked(one, template, True, None, **special)[0] for one in conversations]


def _write(path: Path, text: str) -> None:
    """All or nothing; a link is replaced, not its target."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
