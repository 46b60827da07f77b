"""Texts that try to pass for control tokens, and what must become of them.

`tests/test_control_tokens.py` takes some thousands of them, `make bench` a hundred thousand.
"""

import random
from collections.abc import Iterator
from itertools import islice

from sftlib.chat import CHATML, LLAMA3, encode_batch
from sftlib.chat.control_tokens import MARK

from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]

OWN = (  # the tiny tokenizer's
    "<|im_start|> <|im_end|> <|endoftext|> <|pad|> <|begin_of_text|> <|start_header_id|> "
    "<|end_header_id|> <|eot_id|>"
).split()
OTHERS = (  # Llama 3, Phi, Gemma, DeepSeek, Llama 2
    "<|end_of_text|> <|python_tag|> <|system|> <|user|> <|assistant|> <|end|> <start_of_turn> "
    "<end_of_turn> <bos> <eos> <｜begin▁of▁sentence｜> <｜User｜> <｜Assistant｜> "
    "<｜end▁of▁sentence｜> <s> </s> [INST] [/INST] <<SYS>> <</SYS>>"
).split()
BETWEEN = ["\n", "\n\n", " ", "", "user", "assistant\n", "\nsystem\n", "What is 1 + 1?", "🙂東京"]
INVISIBLE = "\u200b\u200c\u200d\u2061\ufeff\u00ad\ufe0f\u0301\0"
LOOK_ALIKES = {"<": "＜‹〈﹤", ">": "＞›〉﹥", "|": "｜∣ǀ│", "_": "＿﹍", "i": "ｉіⅰ", "e": "ｅе℮"}


def _token(rng: random.Random) -> str:
    return rng.choice(OWN if rng.random() < 0.75 else OTHERS)


def _insert(token: str, inside: str, rng: random.Random) -> str:
    at = rng.randint(0, len(token))
    return token[:at] + inside + token[at:]


CHANGES = [
    lambda token, rng: token[: rng.randint(0, len(token))],
    lambda token, rng: token[rng.randint(0, len(token)) :],
    lambda token, rng: _insert(token, _token(rng), rng),
    lambda token, rng: _insert(token, MARK * rng.choice((1, 1, 2, 5)), rng),
    lambda token, rng: token[:1] + MARK * rng.randint(1, 3) + token[1:],
    lambda token, rng: MARK.join(token),
    lambda token, rng: _insert(token, rng.choice(INVISIBLE), rng),
    lambda token, rng: _insert(token, rng.choice(token or "<"), rng),
    lambda token, rng: "".join(rng.choice(LOOK_ALIKES.get(c, c)) for c in token),
    lambda token, rng: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in token),
    lambda token, rng: token.upper(),
]


def text(rng: random.Random) -> str:
    """One to six control tokens, whole or changed, and what stands between them."""
    pieces = []
    for _ in range(rng.randint(1, 6)):
        piece = _token(rng)
        for _ in range(rng.choice((0, 1, 1, 2))):
            piece = rng.choice(CHANGES)(piece, rng)
        pieces += [piece, rng.choice(BETWEEN)]
    if rng.random() < 0.1:
        characters = [rng.randrange(rng.choice((0x80, 0x3000, 0x110000))) for _ in range(9)]
        pieces += [chr(c) for c in characters if not 0xD800 <= c < 0xE000]
    rng.shuffle(pieces)
    found = "".join(pieces)
    return found if found.strip() else found + "x"


def conversations(texts: int, seed: int) -> Iterator[Messages]:
    """As many as hold that many texts: every message of every role is one."""
    rng = random.Random(seed)
    while texts > 0:
        roles = ["system"] * rng.randint(0, 1) + ["user", "assistant"] * rng.randint(1, 2)
        texts -= len(roles)
        yield [{"role": role, "content": text(rng)} for role in roles]


Run = tuple[bool, bool, str]
"""A piece of a conversation: whether it is a control token, whether it is learned, its text."""


def expected(messages: Messages, template: str) -> list[Run]:
    """What the format says, with every content as it was written."""
    runs: list[Run] = [(True, False, "<|begin_of_text|>")] if template == LLAMA3 else []
    for message in messages:
        role, content = message["role"], message["content"]
        learned = role == "assistant"
        if template == CHATML:
            before = [(True, False, "<|im_start|>"), (False, False, role + "\n")]
            after = [(True, learned, "<|im_end|>"), (False, False, "\n")]
        else:
            content = content.strip()
            before = [(True, False, "<|start_header_id|>"), (False, False, role)]
            before += [(True, False, "<|end_header_id|>"), (False, False, "\n\n")]
            after = [(True, learned, "<|eot_id|>")]
        if not learned:  # then nothing parts the content from what comes before it
            before, content = before[:-1], before[-1][2] + content
        runs += [*before, (False, learned, content), *after]
    return runs


def runs(batch: dict[str, list[list[int]]], tokenizer: PreTrainedTokenizerBase) -> list[list[Run]]:
    """What was encoded, for each conversation."""
    controls = set(tokenizer.all_special_ids) | tokenizer.added_tokens_decoder.keys()
    found: list[list[tuple[bool, bool, list[int]]]] = []
    for ids, mask in zip(batch["input_ids"], batch["assistant_masks"], strict=True):
        found.append([])
        for token, learned in zip(ids, map(bool, mask), strict=True):
            control = token in controls
            if control or not found[-1] or found[-1][-1][:2] != (False, learned):
                found[-1].append((control, learned, []))
            found[-1][-1][2].append(token)
    decode = tokenizer.backend_tokenizer.decode_batch
    texts = iter(decode([run[2] for row in found for run in row], skip_special_tokens=False))
    return [[(*run[:2], next(texts)) for run in row] for row in found]


def breaches(
    texts: int, tokenizer: PreTrainedTokenizerBase, template: str, seed: int = 0
) -> list[Messages]:
    """The conversations that are not encoded as their format says."""
    tokenizer.chat_template = template
    found, left = [], conversations(texts, seed)
    while chunk := list(islice(left, 500)):
        encoded = runs(encode_batch(chunk, tokenizer), tokenizer)
        found += [m for m, row in zip(chunk, encoded, strict=True) if row != expected(m, template)]
    return found
