"""How much can an adapter store? Random words for made-up names, learned by heart (lesson 4).

A word cannot be guessed from its name, and the base model has read neither pair. So what a model
completes rightly after training, the training has stored. Rows are plain text, such as
`Zarbek:window`: the base model has read no control token, and LoRA would not train theirs.

Sources: Schulman et al. 2025, *LoRA Without Regret* (https://thinkingmachines.ai/blog/lora/), on
capacity; Biderman et al. 2024 (https://arxiv.org/abs/2405.09673), on LoRA that learns less.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

from sftlib.experiments.sweep import lora_config

if TYPE_CHECKING:
    import pandas
    import torch
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTTrainer

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"

Pairs = Sequence[tuple[str, str]]
"""A made-up name and its word, for each fact."""


@dataclass(frozen=True)
class Storing:
    """The settings of one run.

    Args:
        learning_rate: the peak of the schedule.
        r: LoRA's rank, on all linear layers, with α = 2r; 0 means full finetuning.
        embeddings: whether full finetuning trains the embeddings, too. LoRA never does here.
        facts: how many facts there are.
        epochs: how often each is read.
        batch: facts per step.
        seed: of the facts, of their order, and of LoRA's first weights.
    """

    learning_rate: float
    r: int = 0
    embeddings: bool = True
    facts: int = 512
    epochs: int = 16
    batch: int = 32
    seed: int = 0


def words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The words of small letters that are a single token, three letters or more."""
    texts = (str(tokenizer.decode([i])) for i in range(len(tokenizer)))
    found = [t for t in texts if len(t) > 2 and t.isascii() and t.isalpha() and t.islower()]
    return [word for word in found if len(tokenizer(word)["input_ids"]) == 1]


def facts(number: int, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> list[tuple[str, str]]:
    """Made-up names, each once, and a random word for each; the seed draws both."""
    rng, known = random.Random(seed), words(tokenizer)
    names: dict[str, None] = {}
    while len(names) < number:
        parts = (rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(3))
        names["".join(parts).capitalize()] = None
    return [(name, rng.choice(known)) for name in names]


def bits(tokenizer: PreTrainedTokenizerBase) -> float:
    """How much information one fact holds."""
    return math.log2(len(words(tokenizer)))


def encoded(pairs: Pairs, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """A row `name:word` for each fact; the loss is on the word alone."""
    from sftlib.chat import IGNORED

    from datasets import Dataset

    begins = [tokenizer(f"{name}:")["input_ids"] for name, _ in pairs]
    ends = [tokenizer(word)["input_ids"] for _, word in pairs]
    rows = list(zip(begins, ends, strict=True))
    return Dataset.from_dict(
        {
            "input_ids": [begin + end for begin, end in rows],
            "labels": [[IGNORED] * len(begin) + end for begin, end in rows],
        }
    )


def store(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    peft_config: PeftConfig | None = None,
    **settings: Any,
) -> SFTTrainer:
    """Train a model on facts; returns TRL's trainer.

    Args:
        settings: for `sftlib.training.tune`, such as `learning_rate`, `num_train_epochs`,
            `per_device_train_batch_size` or `seed`.
    """
    from sftlib.training import tune

    settings = {"logging_steps": 1000} | settings
    return tune(model, tokenizer, encoded(pairs, tokenizer), peft_config, **settings)


def recall(model: Any, tokenizer: PreTrainedTokenizerBase, pairs: Pairs) -> tuple[float, float]:
    """The share of facts whose word the model finds most probable, and the loss in nats per fact.

    A word of one token that is the most probable is what greedy decoding writes.

    Args:
        model: with or without an adapter.
    """
    import torch

    rows = encoded(pairs, tokenizer)
    right = loss = 0.0
    for length in {len(ids) for ids in rows["input_ids"]}:  # rows of one length need no padding
        same = [ids for ids in rows["input_ids"] if len(ids) == length]
        ids = torch.tensor(same, device=model.device)
        with torch.no_grad():
            scores = model.eval()(ids[:, :-1]).logits[:, -1].float()
        right += (scores.argmax(-1) == ids[:, -1]).sum().item()
        loss += torch.nn.functional.cross_entropy(scores, ids[:, -1], reduction="sum").item()
    return right / len(pairs), loss / len(pairs)


def store_and_measure(run: Storing) -> dict[str, float]:
    """Train the model that the dial names on the facts of a run; measure what it has stored.

    Returns:
        `trainable` (parameters), `steps` (of the optimizer), `stored` (share of the facts whose
        word is completed rightly), `loss` (nats per fact) and `bits` (of information in a fact).
    """
    from sftlib.models import load
    from sftlib.scale.memory import parameters

    from transformers import set_seed

    set_seed(run.seed)
    model, tokenizer = load()
    if not run.embeddings:
        model.get_input_embeddings().requires_grad_(False)
    pairs = facts(run.facts, tokenizer, run.seed)
    trainer = store(
        model,
        tokenizer,
        pairs,
        lora_config(r=run.r, lora_alpha=2 * run.r) if run.r else None,
        learning_rate=run.learning_rate,
        num_train_epochs=run.epochs,
        per_device_train_batch_size=run.batch,
        seed=run.seed,
    )
    share, loss = recall(trainer.model, tokenizer, pairs)
    return {
        "trainable": parameters(cast("torch.nn.Module", trainer.model)).trainable,
        "steps": trainer.state.global_step,
        "stored": share,
        "loss": loss,
        "bits": bits(tokenizer),
    }


def tuned(
    run: Storing,
    rates: Sequence[float],
    measure: Callable[[list[Storing]], list[dict]],
    seeds: Sequence[int] = (),
    factor: float = 2,
) -> tuple[float, list[Storing]]:
    """The learning rate that stores most on average, and the runs that were needed to find it.

    Where the best is the first or the last of the rates, the next one beyond it is tried, smaller
    or larger by `factor`, until it is not. Between equal shares, the lower loss decides.

    Args:
        run: the setting; its learning rate does not count.
        rates: to begin with, in rising order.
        measure: does runs, and returns for each a row with `stored` and `loss`.
        seeds: of the runs at each rate [the run's own].
        factor: between neighbouring rates, roughly.
    """
    rates, seeds = list(rates), list(seeds) or [run.seed]
    digits = ".1g" if factor == 2 else ".2g"
    while True:
        runs = [replace(run, learning_rate=rate, seed=seed) for rate in rates for seed in seeds]
        rows = measure(runs)
        order = [_mean(rows[i : i + len(seeds)]) for i in range(0, len(rows), len(seeds))]
        best = order.index(max(order))
        if 0 < best < len(rates) - 1:
            return rates[best], runs
        if best == 0:
            rates.insert(0, float(format(rates[0] / factor, digits)))
        else:
            rates.append(float(format(rates[-1] * factor, digits)))


def _mean(rows: Sequence[dict]) -> tuple[float, float]:
    """What `tuned` compares: the mean share that is stored, and minus the mean loss."""
    return fmean(row["stored"] for row in rows), -fmean(row["loss"] for row in rows)


def at_best(found: pandas.DataFrame) -> pandas.DataFrame:
    """The runs of a setting at its best learning rate, among those that have every seed.

    Args:
        found: stored runs that differ in learning rate and seed only.
    """
    seeds = found.seed.nunique()
    whole = found.groupby("learning_rate").filter(lambda runs: runs.seed.nunique() == seeds)
    means = whole.groupby("learning_rate")[["stored", "loss"]].mean()
    best = means.sort_values(["stored", "loss"], ascending=[False, True]).index[0]
    return whole[whole.learning_rate == best]
