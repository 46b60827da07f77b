"""What finetuning does to single tokens (lesson 4).

Which tokens of a text became unlikely? How sure is the model of the token that ends its answer?
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import pandas
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 50  # texts at once


def lookalikes(model: PreTrainedModel, token: int, cosine: float = 0.9) -> torch.Tensor:
    """Which tokens have nearly the embedding of a token: a mask (vocabulary,), itself included.

    Args:
        cosine: the least similarity.
    """
    import torch

    weight = cast("torch.Tensor", model.get_input_embeddings().weight)
    vectors = weight.detach().float()
    return torch.nn.functional.cosine_similarity(vectors, vectors[token : token + 1]) > cosine


def surprises(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    ends: torch.Tensor,
) -> pandas.DataFrame:
    """How well a model predicts each token of plain texts, from the second token on.

    Args:
        ends: a mask (vocabulary,) of the tokens that stand for an end.

    Returns:
        For each token: `token`, its text; `before`, the text of the token before it; `nats`, −ln
        of its probability; `end`, the probability of an end in its place.
    """
    import pandas
    import torch

    parts = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(list(texts[start : start + BATCH]), return_tensors="pt", padding=True)
        ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
        with torch.no_grad():
            scores = model.eval()(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        nats = torch.nn.functional.cross_entropy(
            scores.transpose(1, 2), ids[:, 1:], reduction="none"
        )
        end = scores.softmax(-1)[..., ends].sum(-1)
        real = mask[:, 1:].bool()
        parts.append([part[real].cpu() for part in (ids[:, 1:], ids[:, :-1], nats, end)])
    token, before, nats, end = (torch.cat(part) for part in zip(*parts, strict=True))
    read = {"token": token, "before": before}
    found = {name: [tokenizer.decode([i]) for i in part.tolist()] for name, part in read.items()}
    return pandas.DataFrame(found | {"nats": nats.numpy(), "end": end.numpy()})


def answer_chances(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[dict]],
) -> dict[str, float]:
    """The mean probability of the reference answers' words, and of the token that ends them.

    Args:
        model: with or without an adapter.
    """
    from sftlib.chat import encode_batch
    from sftlib.evaluate import token_losses

    masks = encode_batch(conversations, tokenizer)["assistant_masks"]
    words, ends = [], []
    for losses, mask in zip(token_losses(model, tokenizer, conversations), masks, strict=True):
        pairs = zip(losses, mask[1:], strict=True)
        *inside, end = [math.exp(-loss) for loss, learned in pairs if learned]
        words += inside
        ends.append(end)
    return {
        "words of the answer": sum(words) / len(words),
        "the end-of-turn token": sum(ends) / len(ends),
    }
