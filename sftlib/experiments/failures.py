"""Trainings that go wrong on purpose, each in seconds: the laboratory of lesson 8.

A failure is a function that breaks one thing of a sound `Plan`; its docstring says what was done.
`train` carries a plan out, and returns the log together with what the log does not say: how the
model answers questions that it never saw.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sftlib.chat import IGNORED
from sftlib.experiments.sweep import lora_config
from sftlib.training import FULL_LEARNING_RATE, LORA_LEARNING_RATE

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTTrainer

BATCH = 16


@dataclass
class Plan:
    """A training before it starts: what a failure may break."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: list[dict]
    dev: list[dict]
    learning_rate: float
    lora: LoraConfig | None
    rng: random.Random
    settings: dict[str, Any] = field(default_factory=dict)
    relabel: Callable[[dict], dict] = dict
    change: Callable[[SFTTrainer], None] = lambda trainer: None

    @property
    def steps(self) -> int:
        return math.ceil(len(self.rows) / BATCH)

    @property
    def middle(self) -> slice:
        """The rows of one batch after the middle, where the order is kept."""
        at = self.steps * 6 // 10 * BATCH
        return slice(at, at + BATCH)


@dataclass(frozen=True)
class Failure:
    """What was done, how it is done, and its sign in the log (see `sftlib.experiments.diagnose`).

    No log shows a failure whose `sign` is empty.
    """

    done: str
    sign: str
    spoil: Callable[[Plan], None] = field(repr=False)


@dataclass(frozen=True)
class Training:
    """What is trained.

    Args:
        failure: a key of `FAILURES`; empty: nothing is broken.
        examples: how many, 16 in a step, each seen once where the failure does not say otherwise.
        rate: of learning, as a multiple of the course's for full finetuning or LoRA.
        seed: of the choice and order of examples, and of what is random in a failure.
    """

    failure: str = ""
    examples: int = 320
    rate: float = 1.5
    lora: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.failure and self.failure not in FAILURES:
            raise ValueError(f"Expected one of {', '.join(FAILURES)}, found {self.failure!r}.")

    @property
    def sign(self) -> str:
        """That of its failure; empty where there is none in the log."""
        return FAILURES[self.failure].sign if self.failure else ""


@dataclass(frozen=True)
class Outcome:
    """A training's log, and the share of held-out questions answered rightly (exact match)."""

    log: list[dict[str, Any]]
    heldout: float


FAILURES: dict[str, Failure] = {}


def failure(sign: str = "") -> Callable:
    """Enter a function under its own name."""

    def enter(spoil: Callable[[Plan], None]) -> Callable[[Plan], None]:
        name = spoil.__name__.replace("_", " ").replace("warm up", "warm-up")
        FAILURES[name] = Failure(" ".join((spoil.__doc__ or "").split()), sign, spoil)
        return spoil

    return enter


# --- What goes wrong with the learning rate ------------------------------------------------------


@failure("unstable")
def learning_rate_too_high(plan: Plan) -> None:
    """The learning rate times 40."""
    plan.learning_rate *= 40


@failure("barely learning")
def learning_rate_too_low(plan: Plan) -> None:
    """The learning rate divided by 100."""
    plan.learning_rate /= 100


@failure("unstable")
def no_warm_up(plan: Plan) -> None:
    """The learning rate times 10, from the first step on."""
    plan.learning_rate *= 10
    plan.settings["warmup_steps"] = 0


@failure("unstable")
def no_clipping(plan: Plan) -> None:
    """Plain SGD with a rate that only clipped gradients bear, and `max_grad_norm=0`."""
    plan.learning_rate *= 600
    plan.settings |= {"optim": "sgd", "max_grad_norm": 0}


# --- What goes wrong with the labels -------------------------------------------------------------


@failure("starts near chance")
def labels_shifted(plan: Plan) -> None:
    """Labels shifted by one place, as if the trainer did not do that itself."""
    plan.relabel = lambda row: row | {"labels": [IGNORED, *row["labels"][:-1]]}


@failure("plateau")
def loss_mask_dropped(plan: Plan) -> None:
    """Questions and template are learned as well."""
    plan.relabel = lambda row: row | {"labels": row["input_ids"]}


@failure()
def padding_is_the_end(plan: Plan) -> None:
    """The end-of-turn token serves as padding, and padding is masked: the end is never learned."""
    from sftlib.chat import end_of_turn_id

    end = end_of_turn_id(plan.tokenizer)
    plan.relabel = lambda row: row | {"labels": [IGNORED if i == end else i for i in row["labels"]]}


@failure()
def another_template(plan: Plan) -> None:
    """Trained on "### Instruction:", and asked in ChatML."""

    def relabel(row: dict) -> dict:
        question, answer = (message["content"] for message in row["messages"])
        texts = [f"### Instruction:\n{question}\n\n### Response:\n", answer]
        prompt, answer = plan.tokenizer(texts, add_special_tokens=False)["input_ids"]
        answer = [*answer, plan.tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}

    plan.relabel = relabel


@failure("not a number")
def batch_fully_masked(plan: Plan) -> None:
    """A batch in which nothing is learned, and a loss that divides by the number of its tokens."""

    def mean(outputs, labels, num_items_in_batch=None):
        labels = labels[:, 1:]
        learned = labels != IGNORED
        found = outputs.logits[:, :-1].log_softmax(-1).gather(-1, (labels * learned)[..., None])
        return -(found[..., 0] * learned).sum() / learned.sum()

    def change(trainer: SFTTrainer) -> None:
        from datasets import Dataset

        rows = trainer.train_dataset.to_list()  # as TRL made it, or it would leave these rows out
        for row in rows[plan.middle]:
            row["labels"] = [IGNORED] * len(row["labels"])
        trainer.train_dataset = Dataset.from_list(rows)
        trainer.compute_loss_func = mean

    plan.change = change
    plan.settings["train_sampling_strategy"] = "sequential"


# --- What goes wrong with the data ---------------------------------------------------------------


@failure("plateau")
def answers_shuffled(plan: Plan) -> None:
    """Each question has another's answer."""
    answers = [row["messages"][1] for row in plan.rows]
    plan.rng.shuffle(answers)
    plan.rows = [
        row | {"messages": [row["messages"][0], answer]}
        for row, answer in zip(plan.rows, answers, strict=True)
    ]


@failure("overfitting")
def twenty_examples(plan: Plan) -> None:
    """Twenty examples, again and again, at twice the learning rate."""
    plan.settings["num_train_epochs"] = plan.steps / 2
    plan.rows = plan.rows[:20]
    plan.learning_rate *= 2


@failure("overfitting")
def data_duplicated(plan: Plan) -> None:
    """Seen once, but the same twenty rows again and again; twice the learning rate."""
    n = len(plan.rows)
    plan.rows = (plan.rows[:20] * n)[:n]
    plan.rng.shuffle(plan.rows)
    plan.learning_rate *= 2


@failure()
def evaluation_leaked(plan: Plan) -> None:
    """Twenty examples, as in "twenty examples", and evaluation on these."""
    twenty_examples(plan)
    plan.dev = plan.rows


@failure("spike")
def poisoned_batch(plan: Plan) -> None:
    """A batch of which each answer is random letters, and `max_grad_norm=0`."""
    for row in plan.rows[plan.middle]:
        noise = "".join(plan.rng.choices("bcdfghjklmnpqrstvwxz", k=24))
        row["messages"] = [row["messages"][0], {"role": "assistant", "content": noise}]
    plan.settings |= {"train_sampling_strategy": "sequential", "max_grad_norm": 0}


# --- What goes wrong with the trainer ------------------------------------------------------------


@failure("out of scale")
def accumulation_not_averaged(plan: Plan) -> None:
    """Eight small batches a step, whose mean losses are added up."""

    def change(trainer: SFTTrainer) -> None:
        right = trainer.compute_loss
        trainer.compute_loss = lambda *args, num_items_in_batch=None, **more: right(*args, **more)

    plan.change = change
    plan.settings |= {"per_device_train_batch_size": BATCH // 8, "gradient_accumulation_steps": 8}


@failure("no gradient")
def adapter_frozen(plan: Plan) -> None:
    """An adapter loaded to be used (`is_trainable` left out), under activation checkpointing."""
    from peft import PeftModel, get_peft_model

    with tempfile.TemporaryDirectory() as folder:
        fresh = get_peft_model(plan.model, plan.lora or lora_config())
        fresh.save_pretrained(folder)
        plan.model = PeftModel.from_pretrained(fresh.unload(), folder)
    plan.lora = None
    plan.settings["activation_checkpointing"] = True


# --- Carrying it out -----------------------------------------------------------------------------


def unnamed(seed: int = 8) -> dict[str, Training]:
    """Each failure once and two sound trainings under letters, in an order that says nothing."""
    trainings = [Training(), Training(lora=True), *map(Training, FAILURES)]
    random.Random(seed).shuffle(trainings)
    return {chr(ord("A") + i): training for i, training in enumerate(trainings)}


def train(
    training: Training, prompts: int = 100, spoil: Callable[[Plan], None] | None = None
) -> Outcome:
    """Train the model that the dial names, and ask it held-out questions afterwards.

    Args:
        prompts: how many.
        spoil: breaks something that is not among `FAILURES`.
    """
    from sftlib.data import read_facts
    from sftlib.evaluate import answers, exact_match
    from sftlib.models import load
    from sftlib.training import prepare

    from transformers import set_seed

    set_seed(training.seed)
    rng = random.Random(training.seed)
    model, tokenizer = load()
    plan = Plan(
        model,
        tokenizer,
        rng.sample(read_facts("sft"), training.examples),
        read_facts("dev")[:64],
        training.rate * (LORA_LEARNING_RATE if training.lora else FULL_LEARNING_RATE),
        lora_config() if training.lora else None,
        rng,
    )
    if training.failure:
        FAILURES[training.failure].spoil(plan)
    if spoil:
        spoil(plan)
    changes = {"learning_rate": plan.learning_rate, "seed": training.seed} | plan.settings
    trainer = prepare(
        plan.model,
        tokenizer,
        _labelled(plan.rows, plan),
        plan.lora,
        _labelled(plan.dev, plan),
        **(_SETTINGS | changes),
    )
    plan.change(trainer)
    trainer.train()
    asked = read_facts("heldout")[:prompts]
    given = answers(trainer.model, tokenizer, [row["messages"][:-1] for row in asked])
    return Outcome(trainer.state.log_history, exact_match(given, asked))


_SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "per_device_eval_batch_size": 64,
    "train_sampling_strategy": "random",
    "eval_strategy": "steps",
    "eval_steps": 0.2,  # five times
}


def _labelled(rows: Sequence[dict], plan: Plan) -> list[dict]:
    """Rows as `input_ids` and `labels`: the answer is learned, or what the plan says."""
    from sftlib.chat import encode_batch

    found = encode_batch([row["messages"] for row in rows], plan.tokenizer)
    made = []
    for row, ids, labels in zip(rows, found["input_ids"], found["labels"], strict=True):
        given = plan.relabel({"input_ids": ids, "labels": labels, "messages": row["messages"]})
        made.append({name: given[name] for name in ("input_ids", "labels")})
    return made
