"""What is wrong with a conversation, in sentences that say what to do.

`validate` finds everything that is wrong with an example written by hand. `fault` finds the first
thing that prevents a conversation from being encoded.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

ROLES = ("system", "user", "assistant")

# Text that a tokenizer may read as the end of a message or as the start of another one: ChatML,
# Llama 3, Phi, DeepSeek, Gemma, Llama 2.
CONTROL_TOKEN = re.compile(
    r"<\|[^<>|]{1,40}\|>|<｜[^<>|｜]{1,40}｜>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|</s>",
    re.IGNORECASE,
)
# Letters and symbols for Unicode, but invisible: Hangul fillers and the empty Braille pattern.
BLANK_LETTERS = "\u115f\u1160\u3164\uffa0\u2800"

# Rows of `datasets` are mappings, but no dicts. With dict first, `isinstance` is faster.
MAPPINGS = (dict, Mapping)


class _Plain(dict):
    """A table for `str.translate`, filled on demand: punctuation becomes a space."""

    def __missing__(self, code: int) -> str | int | None:
        category = unicodedata.category(chr(code))
        if category == "Cf":  # invisible marks, such as U+200B
            self[code] = None
        else:  # control characters, punctuation, separators
            self[code] = " " if category == "Cc" or category[0] in "PZ" else code
        return self[code]


_PLAIN = _Plain()


def normalise(text: str) -> str:
    """The text as comparisons see it: NFKC, casefolded, punctuation and whitespace as one space.

    A text of punctuation alone keeps it.
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(plain.translate(_PLAIN).split()) or " ".join(plain.split())


def validate(messages: object, max_chars: int = 8000) -> list[str]:
    """Everything that is wrong with an example written by hand; an empty list when it is fine.

    It finds what `to_messages` refuses: roles, order, empty or broken text, control tokens. It also
    finds keys other than `role` and `content`, answers that repeat their question, and messages of
    more than `max_chars` characters. Every sentence names the message, counted from 1, and says
    what to do. It never raises.
    """
    if not isinstance(messages, list):
        return [
            f"Expected a list of messages, found {briefly(messages)}: "
            'write [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}].'
        ]
    found = [p for n, m in enumerate(messages, 1) for p in _message_problems(n, m, max_chars)]
    roles = [m.get("role") for m in messages if isinstance(m, dict)]
    known = [role for role in roles if isinstance(role, str) and role in ROLES]
    if len(known) == len(messages):
        found += [*order_problems(known), *_repeats(messages)]
    return found


def _message_problems(number: int, message: object, max_chars: int) -> Iterator[str]:
    name = f"Message {number}"
    if not isinstance(message, dict):
        yield f'{name} is {briefly(message)}: write {{"role": ..., "content": ...}}.'
        return
    if "role" not in message:
        yield f"{name} has no role: add user, assistant or system."
    elif not isinstance(message["role"], str) or message["role"] not in ROLES:
        yield f"{name} has the role {briefly(message['role'])}: write user, assistant or system."
    for key in [key for key in message if key not in ("role", "content")]:
        yield f"{name} has the key {briefly(key)}: only role and content are read; remove it."
    content = message.get("content")
    if "content" not in message:
        yield f"{name} has no content: add its text."
    elif not isinstance(content, str):
        yield f"{name} has {briefly(content)} as content: write text."
    else:
        yield from text_problems(number, content)
        if len(content) > max_chars:
            yield f"{name} has {len(content)} characters, more than {max_chars}: shorten it."


def text_problems(number: int, text: str) -> list[str]:
    """Why a text cannot be learned, in sentences."""
    # Most texts are plain, and the search for control tokens is slow. Each of them has < or [.
    suspicious = "<" in text or "[" in text
    if not suspicious and text.isascii() and "!" <= text[:1] <= "~":
        return []
    found = []
    if not any(map(_visible, text)):
        found.append(f"Message {number} is empty: write its text, or leave the example out.")
    if suspicious and (token := CONTROL_TOKEN.search(text)):
        found.append(f"Message {number} holds the control token {token[0]!r}: reword the text.")
    if broken := _half_character(text):
        found.append(f"Message {number} has half a character ({broken}): type it again.")
    return found


def _visible(character: str) -> bool:
    return unicodedata.category(character)[0] not in "ZC" and character not in BLANK_LETTERS


def _half_character(text: str) -> str:
    """The first surrogate (half of a UTF-16 pair) in the text, escaped; empty without one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return ascii(text[error.start])
    return ""


def order_problems(roles: list[str]) -> Iterator[str]:
    """Where roles do not alternate from user to assistant, in sentences."""
    first = 1 if roles[:1] == ["system"] else 0
    if roles[first:] == ["user", "assistant"] * max(1, (len(roles) - first) // 2):
        return  # most conversations end here: this comparison is fast
    if roles[first : first + 1] not in (["user"], []):
        yield f"Message {first + 1} comes from the {roles[first]}: begin with the user."
    for number, (before, role) in enumerate(pairwise(roles), 2):
        if role == "system":
            yield f"Message {number} comes from the system: only the first message may."
        elif role == before:
            yield f"Messages {number - 1} and {number} come from the {role}: let roles alternate."
    if "assistant" not in roles:
        yield f"There is no answer in {len(roles)} messages: end with one from the assistant."
    elif roles[-1] != "assistant":
        yield f"Message {len(roles)} comes from the {roles[-1]}: end with the assistant's answer."


def _repeats(messages: list[dict]) -> Iterator[str]:
    for number, (question, answer) in enumerate(pairwise(messages), 2):
        asked, said = question.get("content"), answer.get("content")
        if answer["role"] != "assistant" or not isinstance(asked, str) or not isinstance(said, str):
            continue
        before, after = (normalise(text).replace(" ", "") for text in (asked, said))
        if before == after and after:
            yield f"Message {number} only repeats message {number - 1}: write an answer."


def briefly(value: object) -> str:
    """What a value is, in a few words: its content may be huge, or contain itself."""
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:40] + "…")
    if isinstance(value, Mapping):
        keys = [briefly(key) for key, _ in zip(value, range(8), strict=False)]
        return f"an object with {'the keys ' + ', '.join(keys) if keys else 'no keys'}"
    return f"a value of type {type(value).__name__}"


def fault(messages: object, add_generation_prompt: bool) -> str:
    """Why a model cannot learn from this conversation (or answer it); empty when it can."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return (
            f"Expected a list of messages, found {briefly(messages)}: "
            'pass [{"role": "user", "content": ...}, ...].'
        )
    for number, message in enumerate(messages, 1):
        if wrong := _wrong_with(message):
            return f"Message {number} of {len(messages)}: expected {wrong}."
    roles = [message["role"] for message in messages]
    if add_generation_prompt and roles[-1] != "user":
        return (
            f"Expected the user's message at the end of a prompt, found one from the {roles[-1]}: "
            "leave out what comes after the last question."
        )
    if not add_generation_prompt and "assistant" not in roles:
        return (
            "Expected an answer from the assistant to learn from, found none: add it, or pass "
            "add_generation_prompt=True to ask for one."
        )
    return next(order_problems(roles if roles[-1] == "assistant" else [*roles, "assistant"]), "")


def _wrong_with(message: object) -> str:
    """What was expected of a message and what was found; empty when it is fine."""
    if not isinstance(message, MAPPINGS) or "role" not in message or "content" not in message:
        return f"the keys role and content, found {briefly(message)}: name them so"
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in ROLES:
        return f"the role system, user or assistant, found {briefly(role)}: rename it"
    if not isinstance(content, str):
        return f"text as content, found {briefly(content)}: join its parts to one text"
    if not content or content.isspace():
        return f"text as content, found {content[:20]!r}: write it, or leave the example out"
    if not content.isascii() and (half := _half_character(content)):
        return f"valid Unicode, found half a character ({half}): type it again"
    return ""
