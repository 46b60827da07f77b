"""The same few numbers in every lesson: exact match, content, stopping, likelihoods, cloze."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = Mapping[str, Any]
"""A test row: `messages` (the last one is the reference answer), perhaps `tools`, and for `content`
and `cloze` a `value` (its key word)."""
Conversations = Sequence[Sequence[Mapping[str, Any]]]
Tools = Sequence[Sequence[Mapping[str, Any]] | None]
"""For each conversation the schemas of its tools, or None."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote: the text before it stopped, and whether it ended its turn by itself."""

    text: str
    stopped: bool


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Conversations,
    max_new_tokens: int = 32,
    batch_size: int = 256,
    tools: Tools | None = None,
    **sampling: Any,
) -> list[Answer]:
    """Answers to conversations that end with a user's message or a tool's result, in their order.

    Greedy, or sampled with `temperature` and `seed` (see `continuations`). Control tokens that
    stand in a message are read as text (see `sftlib.chat.encode`).
    """
    from sftlib.chat import encode_batch

    prompts = encode_batch(conversations, tokenizer, tools, add_generation_prompt=True)["input_ids"]
    return answers_to_text(model, tokenizer, prompts, max_new_tokens, batch_size, **sampling)


def answers_to_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[int]],
    max_new_tokens: int = 32,
    batch_size: int = 256,
    **sampling: Any,
) -> list[Answer]:
    """Answers to prompts as they are (texts or ids), without the chat template; see `answers`."""
    from sftlib.chat import end_of_turn_id

    end = end_of_turn_id(tokenizer)
    written = continuations(model, tokenizer, prompts, max_new_tokens, batch_size, end, **sampling)
    return [
        Answer(
            str(tokenizer.decode(_until(ids, end), skip_special_tokens=True)).strip(), end in ids
        )
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
    The same `seed` and `batch_size` give the same draws on the same machine.
    """
    import torch

    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(seed)
    stops = [i for i in {tokenizer.eos_token_id, stop} if i is not None]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # less padding
    rows: Sequence[Any] = prompts
    if prompts and isinstance(prompts[0], str):
        rows = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    generate: Any = model.generate  # PreTrainedModel does not declare it
    found: dict[int, list[int]] = {}
    training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad(
            {"input_ids": [rows[i] for i in chosen]}, return_tensors="pt", padding_side="left"
        ).to(model.device)
        with torch.no_grad():
            written = generate(
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


def exact_match(
    given: Sequence[Answer],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> float:
    """Share of answers that stopped and equal the reference, character for character (0 to 1).

    Args:
        tokenizer: with it, thoughts and calls of tools in the reference count, as its chat template
            writes them; without it the content alone.
    """
    return _share(
        a.stopped and a.text == reference(row, tokenizer)
        for a, row in zip(given, rows, strict=True)
    )


def reference(row: Row, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """The right answer as a model writes it; see `exact_match`."""
    from sftlib.chat import IGNORED, encode

    *before, last = row["messages"]
    if tokenizer is None or not (last.get("reasoning_content") or last.get("tool_calls")):
        return last["content"]
    learned = {key: value for key, value in last.items() if key != "weight"}
    labels = encode([*before, learned], tokenizer, row.get("tools"), learn="last")["labels"]
    ids = [label for label in labels if label != IGNORED]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def content(given: Sequence[Answer], rows: Sequence[Row]) -> float:
    """Share of answers that hold the right value as a whole word anywhere (0 to 1)."""
    return _share(
        re.search(rf"(?<!\w){re.escape(row['value'])}(?!\w)", a.text) is not None
        for a, row in zip(given, rows, strict=True)
    )


def stops(given: Sequence[Answer]) -> float:
    """Share of answers that the model ended itself, with the end-of-turn token (0 to 1)."""
    return _share(a.stopped for a in given)


def _share(hits: Iterable[bool]) -> float:
    found = [bool(hit) for hit in hits]
    if not found:
        raise ValueError("Expected at least one answer to judge, found none: the set is empty.")
    return sum(found) / len(found)


def report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Row]],
    max_new_tokens: int = 32,
) -> pandas.DataFrame:
    """One line per test set: `prompts`, `exact_match`, `content`, `stops` (shares from 0 to 1)."""
    import pandas

    lines = {}
    for name, rows in sets.items():
        asked = [row["messages"][:-1] for row in rows]
        tools = [row.get("tools") for row in rows]
        given = answers(model, tokenizer, asked, max_new_tokens=max_new_tokens, tools=tools)
        lines[name] = {
            "prompts": len(rows),
            "exact_match": exact_match(given, rows, tokenizer),
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
        str(tokenizer.decode(ids)).strip().startswith(row["value"] + ".")
        for ids, row in zip(written, rows, strict=True)
    )


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 64,
) -> float:
    """exp of the mean negative log-likelihood per token, over all tokens but each text's first."""
    ids = tokenizer(list(texts))["input_ids"] if texts else []
    losses = [loss for row in _losses(model, tokenizer, ids, batch_size) for loss in row]
    if not losses:
        raise ValueError("Expected texts of at least two tokens, found none.")
    return math.exp(sum(losses) / len(losses))


def logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Conversations,
    batch_size: int = 128,
    tools: Tools | None = None,
) -> list[float]:
    """log π(answer | prompt) of each conversation, in nats: the sum over the assistant's tokens.

    The end-of-turn token counts. The difference between two models, on answers that the first has
    sampled, estimates the Kullback-Leibler divergence of the first from the second.
    """
    from sftlib.chat import encode_batch

    encoded = encode_batch(conversations, tokenizer, tools)
    losses = _losses(model, tokenizer, encoded["input_ids"], batch_size)
    return [
        -sum(loss for loss, learned in zip(row, mask[1:], strict=True) if learned)
        for row, mask in zip(losses, encoded["assistant_masks"], strict=True)
    ]


def token_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Conversations,
    batch_size: int = 128,
    tools: Tools | None = None,
) -> list[list[float]]:
    """The loss of each token but the first, −log π(token | tokens before it), in nats per token.

    Args:
        batch_size: conversations in one forward pass; with more, more memory is needed.

    Returns:
        A list for each conversation. A conversation of T tokens (as `sftlib.chat.encode` makes
        them, template and questions included) has T − 1 losses; the first is that of its second
        token. So the losses of the answers stand where `assistant_masks[1:]` is 1.
    """
    from sftlib.chat import encode_batch

    ids = encode_batch(conversations, tokenizer, tools)["input_ids"]
    return _losses(model, tokenizer, ids, batch_size)


def _losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    batch_size: int,
) -> list[list[float]]:
    """`token_losses` of rows of ids."""
    import torch

    found = []
    training = model.training
    model.eval()
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        padded = tokenizer.pad({"input_ids": part}, return_tensors="pt", padding_side="right")
        batch = {name: padded[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():  # logits: (B, T, V)
            logits = model(**batch).logits
        # The logits at a position are for the next token. Cross-entropy wants (B, V, T - 1).
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2).float(), batch["input_ids"][:, 1:], reduction="none"
        )
        # Padding is on the right, so a row's own losses come first. An empty row has none.
        found += [
            row[: max(len(ids) - 1, 0)] for row, ids in zip(losses.tolist(), part, strict=True)
        ]
    model.train(training)
    return found
