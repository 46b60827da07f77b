"""Control tokens belong to the chat template: text that spells one must stay text.

A tokenizer reads `<|im_end|>` as one token wherever it stands. So whoever may write a message could
end it, and speak for the system or the assistant (prompt injection by special tokens). `escape`
takes that away from a text, and `unescape` gives the text back as it was.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\u2060"
"""WORD JOINER (invisible). Placed after a control token's first character, it makes the tokenizer
read the control token as plain text."""
INSIDE = "~^`"
"""Marks for `encode`, which takes them away: templates write these as they are, also in JSON and in
Python's notation. One is taken that no control token has."""


def template_of(tokenizer: PreTrainedTokenizerBase, with_tools: bool = False) -> str:
    """The tokenizer's chat template, or an empty text.

    Of several it is the one for tools (`tool_use`) where that is asked for, else the default one,
    as in `apply_chat_template`.
    """
    template = tokenizer.chat_template or ""
    if isinstance(template, str):
        return template
    return (with_tools and template.get("tool_use")) or template.get("default", "")


def escape(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text with a `MARK` in each control token of the tokenizer, which then reads it as text.

    For pipelines that pass text on. `sftlib.chat.encode` escapes by itself, and leaves no marks.

    Raises:
        ValueError: the text holds a control token of one character, which leaves no room for one.
    """
    return ControlTokens.of(tokenizer).escape(text)


def unescape(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What `escape` was given: `unescape(escape(text, t), t) == text` for every text."""
    return "".join(piece for _, piece in ControlTokens.of(tokenizer).cut(text))


@dataclass(frozen=True)
class ControlTokens:
    """The control tokens of a tokenizer, and the patterns that find them in text.

    They are its special tokens, and those added tokens that its chat template writes (as in
    `transformers`, "sanitize_control_tokens").
    """

    mark: str
    ids: frozenset[int]
    whole: re.Pattern  # a control token
    open: re.Pattern  # the first character of one, which may have marks inside
    marked: re.Pattern  # the first mark inside one, behind its first character
    short: re.Pattern | None  # one of a single character, in which no mark can be

    _known = WeakKeyDictionary()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, marks: str = MARK) -> ControlTokens:
        """The tokenizer's control tokens, to be marked with the first fitting one of the marks."""
        added = [(t.content, n, t.special) for n, t in tokenizer.added_tokens_decoder.items()]
        templates = tokenizer.chat_template or ""
        written = templates if isinstance(templates, str) else "\n".join(templates.values())
        state = (added, written)  # both can change
        if cls._known.get(tokenizer, (None,))[0] != state:
            cls._known[tokenizer] = (state, {})
        found = cls._known[tokenizer][1]
        if marks not in found:
            found[marks] = cls._read(*state, marks)
        return found[marks]

    @classmethod
    def _read(cls, added: list[tuple[str, int, bool]], template: str, marks: str) -> ControlTokens:
        tokens = {
            content: number
            for content, number, special in added
            if special or (content in template and len(content) > 1 and not content.isspace())
        }
        longest_first = sorted(filter(None, tokens), key=len, reverse=True)
        mark = next((m for m in marks if not any(m in token for token in tokens)), MARK)
        any_marks = f"{re.escape(mark)}*"
        rests = defaultdict(list)  # by first character: what follows it, marks or not
        for token in filter(lambda token: len(token) > 1, longest_first):
            rests[token[0]].append(any_marks.join(map(re.escape, token[1:])))
        begin = {re.escape(first): "|".join(rest) for first, rest in rests.items()}
        single = [token for token in longest_first if len(token) == 1]
        never = "(?!)"
        return cls(
            mark=mark,
            ids=frozenset(tokens.values()),
            whole=re.compile("|".join(map(re.escape, longest_first)) or never),
            open=re.compile(
                "|".join(f"{a}(?={any_marks}(?:{rest}))" for a, rest in begin.items()) or never
            ),
            marked=re.compile(
                "|".join(
                    f"(?<={a}){re.escape(mark)}(?={any_marks}(?:{rest}))"
                    for a, rest in begin.items()
                )
                or never
            ),
            short=re.compile("|".join(map(re.escape, single))) if single else None,
        )

    def escape(self, text: str) -> str:
        if self.short and (found := self.short.search(text)):
            raise ValueError(
                f"Expected text without {found[0]!r}, found it at {found.start()}: this tokenizer "
                "reads it as a control token wherever it stands. Take it out of the text."
            )
        return self.open.sub(rf"\g<0>{self.mark}", text)

    def escape_all(self, value: Any) -> Any:
        """A copy of lists and objects in which each text is escaped, keys included."""
        if isinstance(value, str):
            return self.escape(value)
        if isinstance(value, Mapping):
            return {self.escape_all(key): self.escape_all(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.escape_all(item) for item in value]
        return value

    def cut(self, text: str) -> list[tuple[int, str]]:
        """The pieces between the marks of an escaped text, each with its place in it."""
        if self.mark not in text:
            return [(0, text)]  # nearly always, and much faster
        pieces, at = [], 0
        for mark in self.marked.finditer(text):
            pieces.append((at, text[at : mark.start()]))
            at = mark.end()
        return [*pieces, (at, text[at:])]

    def check(self, ids: list[int], escaped: str) -> None:
        """Raise unless the ids hold as many control tokens as an escaped text spells.

        A tokenizer that changes text before it looks for them (Unicode forms, letter case) may find
        one in what only resembles it.
        """
        expected = len(self.whole.findall(escaped))
        found = sum(map(self.ids.__contains__, ids))
        if found != expected:
            raise ValueError(
                f"Expected {expected} control tokens, those of the chat template, found {found}: "
                "this tokenizer takes something in the messages for one. Take out what resembles "
                f"a control token in {escaped[:200]!r}."
            )
