"""Conversations as a model reads them: templates, tokens, and text that must stay text.

| file | what it does |
|---|---|
| `templates` | `CHATML`, `LLAMA3`, `render`: messages → text |
| `layout` | which parts of a conversation a template shows, and which it marks |
| `encoding` | `encode`: messages → token ids, and the mask and the labels of what is learned |
| `control_tokens` | `escape`: text that spells a control token stays text |
| `survey` | TRL's templates, and random conversations to compare templates on |
"""

from sftlib.chat.control_tokens import escape
from sftlib.chat.encoding import IGNORED, encode, encode_batch, end_of_turn_id
from sftlib.chat.survey import random_conversation, trl_templates
from sftlib.chat.templates import CHATML, LLAMA3, marks_the_assistant, render, training_template

__all__ = [
    "CHATML",
    "IGNORED",
    "LLAMA3",
    "encode",
    "encode_batch",
    "end_of_turn_id",
    "escape",
    "marks_the_assistant",
    "random_conversation",
    "render",
    "training_template",
    "trl_templates",
]
