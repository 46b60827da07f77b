"""What finetuning does to single tokens (lesson 4)."""

from sftlib.data import read_facts
from sftlib.evaluate import perplexity
from sftlib.experiments.forgetting import answer_chances, lookalikes, surprises

import numpy as np
import pytest


def test_a_token_looks_like_itself_and_unused_tokens_look_alike(tiny):
    model, tokenizer = tiny
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    alike = lookalikes(model, end)
    assert alike[end] and 100 < alike.sum() < 400
    assert lookalikes(model, end, cosine=0.999999).sum() == 1


def test_surprises_are_the_losses_of_single_tokens(tiny):
    model, tokenizer = tiny
    texts = [row["text"] for row in read_facts("prose")][:60]  # more than a batch
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = surprises(model, tokenizer, texts, lookalikes(model, end))
    lengths = [len(tokenizer(text)["input_ids"]) - 1 for text in texts]
    assert len(found) == sum(lengths) and found.end.between(0, 1).all()
    assert np.exp(found.nats.mean()) == pytest.approx(perplexity(model, tokenizer, texts), rel=1e-3)
    assert (found.before == ".").any()
    first = tokenizer(texts[0])["input_ids"]
    assert list(found.token[: lengths[0]]) == [tokenizer.decode([i]) for i in first[1:]]
    assert list(found.before[: lengths[0]]) == [tokenizer.decode([i]) for i in first[:-1]]


def test_chances_of_words_and_of_ends_are_apart(tiny):
    model, tokenizer = tiny
    rows = [row["messages"] for row in read_facts("heldout")[:5]]
    found = answer_chances(model, tokenizer, rows)
    # the base has never read the token that ends a turn
    assert found["words of the answer"] > 0.2 > 0.01 > found["the end-of-turn token"]
