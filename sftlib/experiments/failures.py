"""Trainings that go wrong on purpose, each in seconds, for lesson 8.

A failure is a function that breaks one thing in a sound `Plan`. Its decorator describes it. `train`
carries a plan out and returns the log, and the share of held-out questions that the model answers
rightly, which the log does not show.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from sftlib.chat import IGNORED
from sftlib.experiments.sweep import lora_config
from sftlib.training import FULL_LEARNING_RATE, LORA_LEARNING_RATE

if TYPE_CHECKING:
    from types import FunctionType

    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTTrainer

BATCH = 16


@dataclass
class Plan:
    """A training before it starts; a failure may change any part of it.

    Attributes:
        rows: conversations to train on.
        dev: conversations for evaluation during training.
        settings: arguments of `trl.SFTConfig`.
        relabel: gets a row with `input_ids`, `labels` and `messages`; returns other ids or labels.
        change: called with the trainer before it trains.
    """

    model: PreTrainedModel | PeftModel
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
        """The rows of one batch shortly after the middle of a training that keeps their order."""
        first = self.steps * 6 // 10 * BATCH
        return slice(first, first + BATCH)


@dataclass(frozen=True)
class Failure:
    """What was done, its sign in the log (see `diagnose`), and the function that spoils a plan.

    An empty `sign` means that the log does not show the failure.
    """

    done: str
    sign: str
    spoil: Callable[[Plan], None] = field(repr=False)


@dataclass(frozen=True)
class Training:
    """What is trained.

    Args:
        failure: a key of `FAILURES`; empty for a sound training.
        examples: how many, 16 per step. Each is seen once, unless the failure changes that.
        rate: the learning rate, as a multiple of the course's default for full finetuning or LoRA.
        seed: of the drawn examples, of their order, and of whatever is random in a failure.
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
        """The sign of its failure; empty if the log shows none."""
        return FAILURES[self.failure].sign if self.failure else ""


@dataclass(frozen=True)
class Outcome:
    """A training's log, and what its model answers to held-out questions: shares from 0 to 1.

    Attributes:
        heldout: exact match; the answer must also end by the end-of-turn token.
        value: answers that hold the right value, whatever else they say.
        ends: answers that end by the end-of-turn token.
    """

    log: list[dict[str, Any]]
    heldout: float
    value: float
    ends: float


FAILURES: dict[str, Failure] = {}


def failure(done: str, sign: str = "") -> Callable:
    """A decorator that enters a function into `FAILURES` under its own name."""

    def enter(spoil: FunctionType) -> FunctionType:
        name = spoil.__name__.replace("_", " ").replace("warm up", "warm-up")
        FAILURES[name] = Failure(done, sign, spoil)
        return spoil

    return enter


# --- What goes wrong with the learning rate ------------------------------------------------------


@failure("The learning rate times 10.", sign="unstable")
def learning_rate_too_high(plan: Plan) -> None:
    plan.learning_rate *= 10


@failure("The learning rate divided by 100.", sign="barely learning")
def learning_rate_too_low(plan: Plan) -> None:
    plan.learning_rate /= 100


@failure("The full learning rate from the first step on.")
def no_warm_up(plan: Plan) -> None:
    plan.settings["warmup_steps"] = 0


@failure(
    "Plain SGD in place of AdamW, 600 times the learning rate, and `max_grad_norm=0`.",
    sign="unstable",
)
def no_clipping(plan: Plan) -> None:
    plan.learning_rate *= 600
    plan.settings |= {"optim": "sgd", "max_grad_norm": 0}


# --- What goes wrong with the labels -------------------------------------------------------------


@failure(
    "Labels shifted by one place. The trainer shifts them again.",
    sign="starts near chance",
)
def labels_shifted(plan: Plan) -> None:
    plan.relabel = lambda row: row | {"labels": [IGNORED, *row["labels"][:-1]]}


@failure("Questions and template are learned as well.", sign="plateau")
def loss_mask_dropped(plan: Plan) -> None:
    plan.relabel = lambda row: row | {"labels": row["input_ids"]}


@failure(
    "The end-of-turn token serves as padding, and padding is masked: the end is never learned.",
)
def padding_is_the_end(plan: Plan) -> None:
    from sftlib.chat import end_of_turn_id

    end = end_of_turn_id(plan.tokenizer)
    plan.relabel = lambda row: row | {"labels": [IGNORED if i == end else i for i in row["labels"]]}


@failure('Trained on "### Instruction:", and asked in ChatML.')
def another_template(plan: Plan) -> None:
    def relabel(row: dict) -> dict:
        question, answer = (message["content"] for message in row["messages"])
        texts = [f"### Instruction:\n{question}\n\n### Response:\n", answer]
        prompt, answer = plan.tokenizer(texts, add_special_tokens=False)["input_ids"]
        answer = [*answer, plan.tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}

    plan.relabel = relabel


@failure(
    "A batch in which nothing is learned, and a loss that divides by the number of its tokens.",
    sign="not a number",
)
def batch_fully_masked(plan: Plan) -> None:
    def mean_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        labels = labels[:, 1:]  # (B, T - 1)
        learned = labels != IGNORED
        logprobs = outputs.logits[:, :-1].log_softmax(-1)  # (B, T - 1, V)
        chosen = logprobs.gather(-1, (labels * learned)[..., None])[..., 0]
        return -(chosen * learned).sum() / learned.sum()  # 0 / 0 is NaN

    def change(trainer: SFTTrainer) -> None:
        from datasets import Dataset

        # After TRL has prepared the dataset, because it drops rows in which nothing is learned.
        # The cast is needed because Transformers also takes datasets without `to_list`.
        rows = cast(Dataset, trainer.train_dataset).to_list()
        for row in rows[plan.middle]:
            row["labels"] = [IGNORED] * len(row["labels"])
        trainer.train_dataset = Dataset.from_list(rows)
        trainer.compute_loss_func = mean_loss

    plan.change = change
    plan.settings["train_sampling_strategy"] = "sequential"


# --- What goes wrong with the data ---------------------------------------------------------------


@failure("Each question has another's answer.", sign="plateau")
def answers_shuffled(plan: Plan) -> None:
    answers = [row["messages"][1] for row in plan.rows]
    plan.rng.shuffle(answers)
    plan.rows = [
        row | {"messages": [row["messages"][0], answer]}
        for row, answer in zip(plan.rows, answers, strict=True)
    ]


@failure("Twenty examples, again and again, at twice the learning rate.", sign="overfitting")
def twenty_examples(plan: Plan) -> None:
    plan.settings["num_train_epochs"] = plan.steps / 2
    plan.rows = plan.rows[:20]
    plan.learning_rate *= 2


@failure(
    "One epoch over a dataset that repeats twenty rows, at twice the learning rate.",
    sign="overfitting",
)
def data_duplicated(plan: Plan) -> None:
    n = len(plan.rows)
    plan.rows = (plan.rows[:20] * n)[:n]
    plan.rng.shuffle(plan.rows)
    plan.learning_rate *= 2


@failure('Twenty examples, as in "twenty examples", and evaluation on these.')
def evaluation_leaked(plan: Plan) -> None:
    twenty_examples(plan)
    plan.dev = plan.rows


@failure("A batch of which each answer is random letters, and `max_grad_norm=0`.", sign="spike")
def poisoned_batch(plan: Plan) -> None:
    for row in plan.rows[plan.middle]:
        noise = "".join(plan.rng.choices("bcdfghjklmnpqrstvwxz", k=24))
        row["messages"] = [row["messages"][0], {"role": "assistant", "content": noise}]
    plan.settings |= {"train_sampling_strategy": "sequential", "max_grad_norm": 0}


# --- What goes wrong with the trainer ------------------------------------------------------------


@failure(
    "Eight small batches per step. Their mean losses are added up, not averaged.",
    sign="out of scale",
)
def accumulation_not_averaged(plan: Plan) -> None:
    # Without num_items_in_batch, each small batch's loss is the mean over its own tokens.
    def change(trainer: SFTTrainer) -> None:
        compute_loss = trainer.compute_loss
        trainer.compute_loss = lambda *args, num_items_in_batch=None, **options: compute_loss(
            *args, **options
        )

    plan.change = change
    plan.settings |= {"per_device_train_batch_size": BATCH // 8, "gradient_accumulation_steps": 8}


@failure(
    "The adapter was loaded without `is_trainable=True`; activation checkpointing is on.",
    sign="no gradient",
)
def adapter_frozen(plan: Plan) -> None:
    from peft import PeftModel, get_peft_model

    with tempfile.TemporaryDirectory() as folder:
        fresh = get_peft_model(plan.model, plan.lora or lora_config())
        fresh.save_pretrained(folder)
        plan.model = PeftModel.from_pretrained(fresh.unload(), folder)
    plan.lora = None
    plan.settings["activation_checkpointing"] = True


# --- Trainings that one setting spoils: an exercise -----------------------------------------------

SICK_SETTINGS: dict[str, dict[str, Any]] = {
    "A": {"learning_rate": 7.5e-3},
    "B": {"warmup_steps": 200},
    "C": {"max_steps": 4},
    "D": {"optim": "sgd", "learning_rate": 0.45, "max_grad_norm": 0.0},
    "E": {"weight_decay": 200.0},
}
"""Arguments of `trl.SFTConfig`, each set in place of the sound value of `Training()`."""


def sick_log(letter: str) -> list[dict[str, Any]]:
    """Train with the settings of a letter of `SICK_SETTINGS`; return the log."""
    return train_with(SICK_SETTINGS[letter], prompts=1).log


def train_with(settings: dict[str, Any], prompts: int = 100) -> Outcome:
    """A sound training but for these arguments of `trl.SFTConfig`; see `train`."""
    return train(Training(), prompts, lambda plan: plan.settings.update(settings))


# --- Carrying it out -----------------------------------------------------------------------------


def unnamed() -> dict[str, Training]:
    """Each failure once and two sound trainings, named by letters in a random, fixed order."""
    trainings = [Training(), Training(lora=True), *map(Training, FAILURES)]
    random.Random(8).shuffle(trainings)
    return {chr(ord("A") + i): training for i, training in enumerate(trainings)}


def train(
    training: Training, prompts: int = 100, spoil: Callable[[Plan], None] | None = None
) -> Outcome:
    """Train the model that the dial names, and ask it held-out questions afterwards.

    Args:
        prompts: how many questions.
        spoil: changes the plan in a way that is not among `FAILURES`.
    """
    from sftlib.data import read_facts
    from sftlib.evaluate import answers, content, exact_match, stops
    from sftlib.training import prepare

    from transformers import set_seed

    set_seed(training.seed)
    plan = _sound_plan(training)
    if training.failure:
        FAILURES[training.failure].spoil(plan)
    if spoil:
        spoil(plan)
    changes: dict[str, Any] = {"learning_rate": plan.learning_rate, "seed": training.seed}
    trainer = prepare(
        plan.model,
        plan.tokenizer,
        _labelled(plan.rows, plan),
        plan.lora,
        _labelled(plan.dev, plan),
        **(_SETTINGS | changes | plan.settings),
    )
    plan.change(trainer)
    trainer.train()
    questions = read_facts("heldout")[:prompts]
    trained = cast("PreTrainedModel", trainer.model)  # transformers annotates any module
    given = answers(trained, plan.tokenizer, [row["messages"][:-1] for row in questions])
    log = trainer.state.log_history
    return Outcome(log, exact_match(given, questions), content(given, questions), stops(given))


def _sound_plan(training: Training) -> Plan:
    from sftlib.data import read_facts
    from sftlib.models import load

    rng = random.Random(training.seed)
    model, tokenizer = load()
    return Plan(
        model,
        tokenizer,
        rows=rng.sample(read_facts("sft"), training.examples),
        dev=read_facts("dev")[:64],
        learning_rate=training.rate * (LORA_LEARNING_RATE if training.lora else FULL_LEARNING_RATE),
        lora=lora_config() if training.lora else None,
        rng=rng,
    )


_SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "per_device_eval_batch_size": 64,
    "train_sampling_strategy": "random",
    "eval_strategy": "steps",
    "eval_steps": 0.2,  # five times
}


def _labelled(rows: Sequence[dict], plan: Plan) -> list[dict]:
    """Rows as `input_ids` and `labels`; the loss is on the answer, unless the plan relabels it."""
    from sftlib.chat import encode_batch

    encoded = encode_batch([row["messages"] for row in rows], plan.tokenizer)
    labelled = []
    for row, ids, labels in zip(rows, encoded["input_ids"], encoded["labels"], strict=True):
        changed = plan.relabel({"input_ids": ids, "labels": labels, "messages": row["messages"]})
        labelled.append({name: changed[name] for name in ("input_ids", "labels")})
    return labelled
