"""The measures that all lessons use: exact match, content, stopping, likelihoods, cloze."""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = Mapping[str, Any]
"""A test row: `messages`, of which the last is the reference answer, and perhaps `tools`. `content`
and `cloze` also need `value`, the word that a right answer must hold; `named` needs `entity`, what
the question is about."""
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
    """The model's answers to conversations that end with a user's message or a tool's result.

    Decoding is greedy; `temperature` and `seed` sample (see `continuations`). Text in a message
    that spells a control token stays text (see `sftlib.chat.encode`).
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
    """As `answers`, but for prompts as they are (texts or ids), without the chat template."""
    from sftlib.chat import end_of_turn_id

    end = end_of_turn_id(tokenizer)
    written = continuations(model, tokenizer, prompts, max_new_tokens, batch_size, end, **sampling)
    found = []
    for ids in written:
        stopped = end in ids
        text = tokenizer.decode(ids[: ids.index(end)] if stopped else ids, skip_special_tokens=True)
        found.append(Answer(str(text).strip(), stopped))
    return found


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
    """The ids that the model appends to each prompt (text or ids), its stop token included.

    Decoding is greedy. With a `temperature` above 0 it samples from the whole distribution: no
    top-k, no top-p. The same `seed` and `batch_size` give the same draws on the same machine.

    Args:
        stop: the id of a token that ends an answer, besides the tokenizer's end of text.
    """
    import torch

    if temperature > 0:
        torch.manual_seed(seed)
    stop_ids = [i for i in {tokenizer.eos_token_id, stop} if i is not None]
    rows: Sequence[Any] = prompts
    if prompts and isinstance(prompts[0], str):
        rows = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    # Batches of prompts of similar length need less padding.
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, list[int]] = {}
    with _inference(model):
        for start in range(0, len(by_length), batch_size):
            chosen = by_length[start : start + batch_size]
            prompt_ids = [rows[i] for i in chosen]
            _, written = generate(
                model, tokenizer, prompt_ids, max_new_tokens, stop_ids, temperature
            )
            for i, ids in zip(chosen, written.tolist(), strict=True):
                # Padding follows the first stop token, and may be the same token: cut it off.
                end = next((n + 1 for n, token in enumerate(ids) if token in stop_ids), len(ids))
                found[i] = ids[:end]
    return [found[i] for i in range(len(prompts))]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
) -> tuple[Any, torch.Tensor]:
    """One batch of answers with Transformers' `generate`: greedy, or sampled as in `continuations`.

    Returns:
        The prompts as a batch of P positions, padded on the left: `input_ids` and
        `attention_mask`, each (B, P). And the answers' ids, (B, A), padded on the right.
    """
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side="left")
    batch = batch.to(model.device)
    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    declared: Any = model  # PreTrainedModel does not declare `generate`
    ids = declared.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids,
        pad_token_id=tokenizer.pad_token_id,
        **how,
    )  # (B, P + A)
    return batch, ids[:, batch["input_ids"].shape[1] :]


@contextmanager
def _inference(model: PreTrainedModel) -> Generator[None]:
    """Inside, the model has no dropout and computes no gradients; afterwards it is as before."""
    import torch

    was_training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(was_training)


def exact_match(
    given: Sequence[Answer],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> float:
    """Share of answers that stopped and equal the reference, character for character (0 to 1).

    Args:
        tokenizer: if given, the answer must also hold the reference's thoughts and tool calls, as
            the tokenizer's chat template writes them. Otherwise only the content counts.
    """
    return _share(
        a.stopped and a.text == reference(row, tokenizer)
        for a, row in zip(given, rows, strict=True)
    )


def reference(row: Row, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """The reference answer as a model writes it; see `exact_match`."""
    from sftlib.chat import IGNORED, encode

    *before, last = row["messages"]
    if tokenizer is None or not (last.get("reasoning_content") or last.get("tool_calls")):
        return last["content"]
    learned = {key: value for key, value in last.items() if key != "weight"}
    labels = encode([*before, learned], tokenizer, row.get("tools"), learn="last")["labels"]
    ids = [label for label in labels if label != IGNORED]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def content(given: Sequence[Answer], rows: Sequence[Row]) -> float:
    """Share of answers in which the row's `value` stands somewhere as a whole word (0 to 1)."""
    return _share(_holds(a.text, row["value"]) for a, row in zip(given, rows, strict=True))


def named(given: Sequence[Answer], rows: Sequence[Row]) -> float:
    """Share of answers that name the row's `entity`, what the question is about (0 to 1)."""
    return _share(_holds(a.text, row["entity"]) for a, row in zip(given, rows, strict=True))


def _holds(text: str, words: str) -> bool:
    """Whether the words stand somewhere in the text, and not inside of longer words."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def stops(given: Sequence[Answer]) -> float:
    """Share of answers that the model ended with its end-of-turn token (0 to 1)."""
    return _share(a.stopped for a in given)


def _share(hits: Iterable[bool]) -> float:
    found = [bool(hit) for hit in hits]
    if not found:
        raise ValueError("Expected at least one answer to judge, found none: the set is empty.")
    return sum(found) / len(found)


def report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    test_sets: Mapping[str, Sequence[Row]],
    max_new_tokens: int = 32,
) -> pandas.DataFrame:
    """One row per test set: `prompts` (a count), `exact_match`, `content`, `stops` (0 to 1)."""
    import pandas

    measured = {}
    for name, rows in test_sets.items():
        asked = [row["messages"][:-1] for row in rows]
        tools = [row.get("tools") for row in rows]
        given = answers(model, tokenizer, asked, max_new_tokens=max_new_tokens, tools=tools)
        measured[name] = {
            "prompts": len(rows),
            "exact_match": exact_match(given, rows, tokenizer),
            "content": content(given, rows),
            "stops": stops(given),
        }
    return pandas.DataFrame.from_dict(measured, orient="index")


def cloze(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    examples: Sequence[Row],
    shots: int = 3,
) -> float:
    """Share of facts that the model completes in plain text, without any chat format (0 to 1).

    The prompt holds `shots` true statements of the same relation from `examples`, then the
    statement in question, which ends before its value. In this way a *base* model, which knows no
    chat format, can show what it knows (few-shot prompting: Brown et al. 2020, arXiv 2005.14165).
    """
    prompts = []
    for row in rows:
        statements = [
            example["messages"][-1]["content"]
            for example in examples
            if example["relation"] == row["relation"]
        ]
        answer = row["messages"][-1]["content"]
        without_value = answer[: answer.rindex(row["value"])].rstrip()
        prompts.append(" ".join([*dict.fromkeys(statements)][:shots] + [without_value]))
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
    """exp of the mean loss per token, in nats, over all tokens but the first of each text."""
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

    The end-of-turn token counts. On answers sampled from one model, its sum minus that of another
    model estimates the Kullback-Leibler divergence of the first model from the second.
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
        batch_size: conversations in one forward pass; more need more memory.

    Returns:
        A list for each conversation. A conversation of T tokens (as `sftlib.chat.encode` makes
        them, template and questions included) has T − 1 losses, because nothing predicts its first
        token. The losses of the answers stand where `assistant_masks[1:]` is 1.
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
    from torch.nn.functional import cross_entropy

    found = []
    with _inference(model):
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            padded = tokenizer.pad({"input_ids": part}, return_tensors="pt", padding_side="right")
            ids = padded["input_ids"].to(model.device)  # (B, T)
            mask = padded["attention_mask"].to(model.device)
            logits = model(input_ids=ids, attention_mask=mask).logits  # (B, T, V)
            # The logits at a position are for the next token. Cross-entropy wants (B, V, T - 1).
            by_token = logits[:, :-1].transpose(1, 2).float()
            losses = cross_entropy(by_token, ids[:, 1:], reduction="none")  # (B, T - 1)
            # Padding is on the right, so a row's own losses come first. An empty row has none.
            for row, row_ids in zip(losses.tolist(), part, strict=True):
                found.append(row[: max(len(row_ids) - 1, 0)])
    return found
