"""The same few numbers in every lesson: exact match, content, stopping, perplexity, cloze."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = Mapping[str, Any]
"""A test row: `messages` (the last one is the reference answer) and `value` (its key word)."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote: the text before it stopped, and whether it ended its turn by itself."""

    text: str
    stopped: bool


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[dict[str, str]]],
    max_new_tokens: int = 32,
    batch_size: int = 256,
) -> list[Answer]:
    """Greedy answers to conversations that end with a user's message, in the given order.

    Control tokens that stand in a message are read as text (see `sftlib.chat.encode`).
    """
    from sftlib.chat import encode_batch

    prompts = encode_batch(conversations, tokenizer, add_generation_prompt=True)["input_ids"]
    return answers_to_text(model, tokenizer, prompts, max_new_tokens, batch_size)


def answers_to_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[int]],
    max_new_tokens: int = 32,
    batch_size: int = 256,
) -> list[Answer]:
    """Greedy answers to prompts as they are (texts or ids), without the chat template."""
    from sftlib.chat import end_of_turn_id

    end = end_of_turn_id(tokenizer)
    written = continuations(model, tokenizer, prompts, max_new_tokens, batch_size, stop=end)
    return [
        Answer(tokenizer.decode(_until(ids, end), skip_special_tokens=True).strip(), end in ids)
        for ids in written
    ]


def _until(ids: list[int], stop: int) -> list[int]:
    return ids[: ids.index(stop)] if stop in ids else ids


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 256,
    stop: int | None = None,
) -> list[list[int]]:
    """The ids that the model greedily appends to each prompt, text or ids, up to its stop token."""
    import torch

    stops = [i for i in {tokenizer.eos_token_id, stop} if i is not None]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # less padding
    if prompts and isinstance(prompts[0], str):
        prompts = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    found: dict[int, list[int]] = {}
    training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad(
            {"input_ids": [prompts[i] for i in chosen]}, return_tensors="pt", padding_side="left"
        ).to(model.device)
        with torch.no_grad():
            written = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=tokenizer.pad_token_id,
            )[:, batch["input_ids"].shape[1] :].tolist()
        for i, ids in zip(chosen, written, strict=True):
            end = next((n + 1 for n, token in enumerate(ids) if token in stops), len(ids))
            found[i] = ids[:end]  # padding comes after it, and may be the same token
    model.train(training)
    return [found[i] for i in range(len(prompts))]


def exact_match(given: Sequence[Answer], rows: Sequence[Row]) -> float:
    """Share of answers that stopped and equal the reference, character for character (0 to 1)."""
    return _share(
        a.stopped and a.text == row["messages"][-1]["content"]
        for a, row in zip(given, rows, strict=True)
    )


def content(given: Sequence[Answer], rows: Sequence[Row]) -> float:
    """Share of answers that hold the right value as a whole word anywhere (0 to 1)."""
    return _share(
        re.search(rf"(?<!\w){re.escape(row['value'])}(?!\w)", a.text) is not None
        for a, row in zip(given, rows, strict=True)
    )


def stops(given: Sequence[Answer]) -> float:
    """Share of answers that the model ended itself, with the end-of-turn token (0 to 1)."""
    return _share(a.stopped for a in given)


def _share(hits) -> float:
    hits = [bool(hit) for hit in hits]
    if not hits:
        raise ValueError("Expected at least one answer to judge, found none: the set is empty.")
    return sum(hits) / len(hits)


def report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Row]],
    max_new_tokens: int = 32,
) -> pandas.DataFrame:
    """One line a test set: `prompts`, `exact_match`, `content`, `stops` (shares from 0 to 1)."""
    import pandas

    lines = {}
    for name, rows in sets.items():
        asked = [row["messages"][:-1] for row in rows]
        given = answers(model, tokenizer, asked, max_new_tokens=max_new_tokens)
        lines[name] = {
            "prompts": len(rows),
            "exact_match": exact_match(given, rows),
            "content": content(given, rows),
            "stops": stops(given),
        }
    return pandas.DataFrame.from_dict(lines, orient="index")


def cloze(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    examples: Sequence[Row],
    shots: int = 3,
) -> float:
    """Share of facts that the model completes in plain text, without any chat format (0 to 1).

    The prompt holds `shots` true statements of the same relation from `examples`, then the
    statement in question up to its value. This asks what a *base* model knows, in its own terms
    (few-shot prompting: Brown et al. 2020, arXiv 2005.14165).
    """
    prompts = []
    for row in rows:
        told = [e["messages"][-1]["content"] for e in examples if e["relation"] == row["relation"]]
        answer = row["messages"][-1]["content"]
        stem = answer[: answer.rindex(row["value"])].rstrip()
        prompts.append(" ".join([*dict.fromkeys(told)][:shots] + [stem]))
    written = continuations(model, tokenizer, prompts, max_new_tokens=12)
    return _share(
        tokenizer.decode(ids).strip().startswith(row["value"] + ".")
        for ids, row in zip(written, rows, strict=True)
    )


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 64,
) -> float:
    """exp of the mean negative log-likelihood a token, over all tokens but each text's first."""
    import torch

    total, count = 0.0, 0
    training = model.training
    model.eval()
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            list(texts[start : start + batch_size]), return_tensors="pt", padding=True
        ).to(model.device)
        keep = batch["attention_mask"][:, 1:].bool()
        with torch.no_grad():
            logits = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2).float(), batch["input_ids"][:, 1:], reduction="none"
        )
        total += nll[keep].sum().item()
        count += int(keep.sum())
    model.train(training)
    if not count:
        raise ValueError("Expected texts of at least two tokens, found none.")
    return math.exp(total / count)
