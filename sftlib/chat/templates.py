"""Chat templates: how a list of messages becomes the text of a conversation.

A template marks what the assistant says with `{% generation %}`, so that the tokenizer can tell
which tokens to learn from. The end-of-turn token lies inside the mark: a model that never learned
it never stops.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from sftlib.chat.control_tokens import template_of

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

    A control token that stands in a message stands in the text, too, where a tokenizer cannot tell
    it from the template's own. To read, not to train on: `encode` keeps them apart.
    """
    return render_marked([messages], template, add_generation_prompt)[0][0]


def render_marked(
    conversations: Sequence[Messages],
    template: str,
    add_generation_prompt: bool = False,
    **special_tokens: str,
) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """The texts, and where in each (from, to) the template marks what the assistant says."""
    from transformers.utils.chat_template_utils import render_jinja_template

    # transformers annotates a text as the result
    render_all = cast("Callable[..., tuple[list[str], list]]", render_jinja_template)
    texts, spans = render_all(
        conversations=conversations,
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        return_assistant_tokens_mask=marks_the_assistant(template),
        **special_tokens,
    )
    return texts, spans or [[] for _ in texts]


def training_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template if it marks what the assistant says, else TRL's version of it.

    Raises:
        ValueError: it does not, and TRL does not know it either.
    """
    template = template_of(tokenizer)
    if marks_the_assistant(template):
        return template
    from trl.chat_template_utils import get_training_chat_template

    try:
        template = get_training_chat_template(tokenizer) if template else None
    except ValueError:
        template = None
    if template is None:
        raise ValueError(
            "Expected a chat template that marks the assistant's tokens with {% generation %}, "
            "found one without it. Set tokenizer.chat_template, for instance to sftlib.chat.CHATML "
            "(class_5_llama3.py: --template chatml)."
        )
    return template


@lru_cache
def marks_the_assistant(template: str) -> bool:
    """Whether a chat template says which tokens are the assistant's."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
