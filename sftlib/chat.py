"""Chat templates: how a list of messages becomes the text, and the tokens, of a conversation.

A template marks what the assistant says with `{% generation %}`, so that the tokenizer can tell
which tokens to learn from. The end-of-turn token lies inside the mark: a model that never learned
it never stops.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The format of OpenAI's chat models (openai-python, `chatml.md`), used by many open models."""

LLAMA3 = (
    "{{ '<|begin_of_text|>' }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""The format of Llama 3 Instruct (Llama 3 model card, "Prompt format")."""

Messages = Sequence[dict[str, str]]


def render(messages: Messages, template: str = CHATML, add_generation_prompt: bool = False) -> str:
    """The text of a conversation in a chat format.

    Args:
        messages: dicts with `role` (system, user or assistant) and `content`.
        template: a Jinja chat template, for instance `CHATML` or `LLAMA3`.
        add_generation_prompt: also open the assistant's turn, so that a model answers next.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template(
        conversations=[list(messages)],
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
    )
    return texts[0]


def encode(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> dict[str, list[int]]:
    """The tokens of a conversation, and which of them the model learns from.

    Args:
        tokenizer: its chat template must mark the assistant's tokens with `{% generation %}`.
        max_length: keep only the first tokens; without it nothing is cut.

    Returns:
        `input_ids` and `assistant_masks`, two lists of one length; a mask of 1 means "learn this".

    Raises:
        ValueError: the template does not mark the assistant's tokens.
    """
    if not marks_the_assistant(tokenizer.chat_template or ""):
        raise ValueError(
            "Expected a chat template that marks the assistant's tokens with {% generation %}, "
            "found one without it. Set tokenizer.chat_template, for instance to sftlib.chat.CHATML."
        )
    encoded = tokenizer.apply_chat_template(
        list(messages), return_dict=True, return_assistant_tokens_mask=True
    )
    return {k: list(encoded[k])[:max_length] for k in ("input_ids", "assistant_masks")}


def marks_the_assistant(template: str) -> bool:
    """Whether a chat template says which tokens are the assistant's."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token with which the assistant ends its turn: the last one its template learns."""
    known = set(tokenizer.get_vocab())
    template = tokenizer.chat_template or ""
    for token in ("<|im_end|>", "<|eot_id|>"):
        if token in known and token in template:
            return tokenizer.convert_tokens_to_ids(token)
    return tokenizer.eos_token_id
