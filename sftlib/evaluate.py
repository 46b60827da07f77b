"""The same few numbers in every lesson: exact match, content, stopping, likelihoods, cloze."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas
    import torch
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
    **sampling: float,
) -> list[Answer]:
    """Answers to conversations that end with a user's message, in the given order.

    Greedy, or sampled with `temperature` and `seed` (see `continuations`). Control tokens that
    stand in a message are read as text (see `sftlib.chat.encode`).
    """
    from sftlib.chat import encode_batch

    prompts = encode_batch(conversations, tokenizer, add_generation_prompt=True)["input_ids"]
    return answers_to_text(model, tokenizer, prompts, max_new_tokens, batch_size, **sampling)


def answers_to_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[int]],
    max_new_tokens: int = 32,
    batch_size: int = 256,
    **sampling: float,
) -> list[Answer]:
    """Answers to prompts as they are (texts or ids), without the chat template; see `answers`."""
    from sftlib.chat import end_of_turn_id

    end = end_of_turn_id(tokenizer)
    written = continuations(model, tokenizer, prompts, max_new_tokens, batch_size, end, **sampling)
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
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """The ids that the model appends to each prompt, text or ids, up to its stop token.

    Greedily, or with a `temperature` above 0 drawn from the whole distribution: no top-k, no top-p.
    The same `seed` gives the same draws on the same machine.
    """
    import torch

    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(seed)
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
                eos_token_id=stops,
                pad_token_id=tokenizer.pad_token_id,
                **how,
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
    total, count = 0.0, 0
    training = model.training
    model.eval()
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            list(texts[start : start + batch_size]), return_tensors="pt", padding=True
        ).to(model.device)
        keep = batch["attention_mask"][:, 1:].bool()
        total += _token_losses(model, batch)[keep].sum().item()
        count += int(keep.sum())
    model.train(training)
    if not count:
        raise ValueError("Expected texts of at least two tokens, found none.")
    return math.exp(total / count)


def logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[dict[str, str]]],
    batch_size: int = 128,
) -> list[float]:
    """log π(answer | prompt) of each conversation, in nats: the sum over the assistant's tokens.

    The end-of-turn token counts. The difference between two models, on answers that the first has
    sampled, estimates the Kullback-Leibler divergence of the first from the second.
    """
    from sftlib.chat import encode_batch

    import torch

    encoded = encode_batch(conversations, tokenizer)
    found = []
    training = model.training
    model.eval()
    for start in range(0, len(conversations), batch_size):
        part = slice(start, start + batch_size)
        batch = tokenizer.pad(
            {"input_ids": encoded["input_ids"][part]}, return_tensors="pt", padding_side="right"
        ).to(model.device)
        learned = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(mask) for mask in encoded["assistant_masks"][part]], batch_first=True
        ).to(model.device)
        found += (-_token_losses(model, batch) * learned[:, 1:]).sum(-1).tolist()
    model.train(training)
    return found


def _token_losses(model: PreTrainedModel, batch: Mapping[str, Any]) -> torch.Tensor:
    """−log π of each token but the first, (batch, length − 1); padding is not left out."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), batch["input_ids"][:, 1:], reduction="none"
    )
