"""From messages to tokens: the ids of a conversation, and which of them the model learns from."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Sequence, Sized
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from sftlib.chat.control_tokens import ControlTokens, template_of
from sftlib.chat.templates import Messages, render_marked, training_template
from sftlib.data.validation import fault

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 500  # conversations in memory with their offsets; with more, each takes longer
IGNORED = -100  # the label of a token that is not learned: PyTorch's cross-entropy leaves it out


def encode(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    add_generation_prompt: bool = False,
) -> dict[str, list[int]]:
    """The tokens of a conversation, and which of them the model learns from.

    Control tokens come from the chat template alone: what a message holds is encoded as text, and
    decodes to what was written. Otherwise the ids are those of `tokenizer.apply_chat_template`.

    Args:
        messages: dicts with `role` and `content`, from the user and the assistant in turn, after a
            message from the system or without one.
        tokenizer: a fast one; its chat template must mark the assistant's tokens with
            `{% generation %}`, or be one for which TRL has a training template.
        max_length: keep only the first tokens, and warn of what is lost. An answer that is cut is
            learned without its end. Without `max_length` nothing is cut. Prompts are never cut.
        add_generation_prompt: also open the assistant's turn; the last message is the user's then.

    Returns:
        Three lists of one length: `input_ids`; `assistant_masks`, in which 1 means "learn this";
        and `labels`, the id where the mask is 1 and `IGNORED` (-100) elsewhere. Labels are not
        shifted: each stands at its own token. In a prompt (`add_generation_prompt`) without an
        answer all labels are `IGNORED`.

    Raises:
        ValueError: the conversation is not sound; or nothing in it would be learned, because it
            has no answer, because the first `max_length` tokens have none, or because the template
            does not mark what the assistant says.
    """
    encoded = encode_batch([messages], tokenizer, max_length, add_generation_prompt)
    return {column: rows[0] for column, rows in encoded.items()}


def encode_batch(
    conversations: Sequence[Messages],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    add_generation_prompt: bool = False,
) -> dict[str, list[list[int]]]:
    """`encode` for many conversations, as columns: for `Dataset.map(…, batched=True)`."""
    for number, messages in enumerate(conversations, 1):
        if wrong := fault(messages, add_generation_prompt):
            raise ValueError(_which(number, conversations) + wrong)
    asked = add_generation_prompt and template_of(tokenizer)
    template = asked or training_template(tokenizer)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "assistant_masks": []}
    with _plain(tokenizer.backend_tokenizer):
        for start in range(0, len(conversations), AT_ONCE):
            some = conversations[start : start + AT_ONCE]
            _encode_into(columns, some, tokenizer, template, add_generation_prompt)
    if max_length is not None and not add_generation_prompt:
        _cut(columns, max_length)
    pairs = zip(columns["input_ids"], columns["assistant_masks"], strict=True)
    columns["labels"] = [_labels(ids, mask) for ids, mask in pairs]
    return columns


def _labels(ids: list[int], mask: list[int]) -> list[int]:
    return [token if learned else IGNORED for token, learned in zip(ids, mask, strict=True)]


def _encode_into(
    columns: dict[str, list[list[int]]],
    conversations: Sequence[Messages],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    add_generation_prompt: bool,
) -> None:
    """Append the rows of sound conversations to the columns; the tokenizer is `_plain`."""
    controls = ControlTokens.of(tokenizer)
    safe = [
        [{"role": m["role"], "content": controls.escape(m["content"])} for m in messages]
        for messages in conversations
    ]
    texts, spans = render_marked(
        safe, template, add_generation_prompt, **tokenizer.special_tokens_map
    )
    cut = [controls.cut(text) for text in texts]
    backend = tokenizer.backend_tokenizer
    # A piece from the middle of a text follows a line break, which is taken away again: some
    # tokenizers (SentencePiece's) put a space before the beginning of a text.
    break_ids = backend.encode("\n", add_special_tokens=False).ids
    encodings = iter(
        backend.encode_batch(
            ["\n" * bool(at) + piece for pieces in cut for at, piece in pieces],
            add_special_tokens=False,
        )
    )
    for text, pieces, marked in zip(texts, cut, spans, strict=True):
        ids, mask = [], []
        for at, piece in pieces:
            encoding, lead = next(encodings), int(at > 0)
            if lead and encoding.ids[: len(break_ids)] != break_ids:
                encoding, lead = backend.encode(piece, add_special_tokens=False), 0
            here = [(start - at + lead, end - at + lead) for start, end in marked]
            skipped = len(break_ids) * lead
            ids += encoding.ids[skipped:]
            mask += _mask(encoding, here, lead + len(piece))[skipped:]
        controls.check(ids, text)
        columns["input_ids"].append(ids)
        columns["assistant_masks"].append(mask)


@contextmanager
def _plain(backend: Tokenizer) -> Generator[None]:
    """Inside, no padding and no truncation, and control tokens are read; afterwards as before.

    A tokenizer keeps what the last call asked for. What the caller has set stays the caller's.
    """
    padding, truncation = backend.padding, backend.truncation
    special_as_text = backend.encode_special_tokens
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = False
    try:
        yield
    finally:
        if padding:
            backend.enable_padding(**padding)
        if truncation:
            backend.enable_truncation(**truncation)
        backend.encode_special_tokens = special_as_text


def _which(number: int, conversations: Sized) -> str:
    return f"Conversation {number} of {len(conversations)}: " if len(conversations) > 1 else ""


def _mask(encoding: Encoding, spans: list[tuple[int, int]], length: int) -> list[int]:
    """1 for each token of a text that has a character in one of the spans, else 0."""
    mask = [0] * len(encoding)
    for start, end in spans:
        places = range(max(start, 0), min(end, length))
        first, last = (_first_token(encoding, some) for some in (places, reversed(places)))
        if first is None or last is None:  # both or neither
            continue
        # The bytes of one character may be several tokens.
        while last + 1 < len(mask) and (at := encoding.token_to_chars(last + 1)) and at[0] < end:
            last += 1
        mask[first : last + 1] = [1] * (last + 1 - first)
    return mask


def _first_token(encoding: Encoding, places: Iterable[int]) -> int | None:
    """The first token that there is: a tokenizer may drop a character (accents, for instance)."""
    for place in places:
        if (token := encoding.char_to_token(place)) is not None:
            return token
    return None


def _cut(columns: dict[str, list[list[int]]], max_length: int) -> None:
    """Cut in place; warn of what is lost, raise when that is all there was to learn."""
    masks, longer, lost = columns["assistant_masks"], 0, 0
    for number, mask in enumerate(masks, 1):
        kept = sum(mask[: max(max_length, 0)])
        if not kept:
            raise ValueError(
                f"{_which(number, masks)}Expected something to learn in the first "
                f"max_length={max_length} tokens, found none: there are {len(mask)}, and the "
                "answer begins later. Raise max_length, or leave the conversation out."
            )
        longer += len(mask) > max_length
        lost += sum(mask) - kept
    if longer:
        warnings.warn(
            f"{longer} of {len(masks)} conversations are longer than max_length={max_length} "
            f"tokens and were cut: {lost} of {sum(map(sum, masks))} tokens to learn are lost.",
            stacklevel=3,
        )
    for column, rows in columns.items():
        columns[column] = [row[:max_length] for row in rows]


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token with which the assistant ends its turn.

    It is the last token that the template marks as the assistant's, white space aside. If the
    template marks nothing, it is the last token of a conversation. If that is not a control token,
    or the template cannot be rendered, it is EOS.
    """
    from jinja2 import TemplateError

    columns: dict[str, list[list[int]]] = {"input_ids": [], "assistant_masks": []}
    conversation = [{"role": role, "content": "Hi"} for role in ("user", "assistant")]
    with suppress(TemplateError), _plain(tokenizer.backend_tokenizer):
        _encode_into(columns, [conversation], tokenizer, template_of(tokenizer), False)
    ids, mask = (sum(rows, []) for rows in columns.values())
    turn = [token for token, learned in zip(ids, mask, strict=True) if learned] or ids
    last = next((token for token in reversed(turn) if str(tokenizer.decode([token])).strip()), None)
    return last if last in ControlTokens.of(tokenizer).ids else tokenizer.eos_token_id
