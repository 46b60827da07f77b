"""From likelihood to preference: the stored runs of lesson 7 (`make sweeps`).

The task: answer briefly what the model knows, and say "I do not know." where it does not. A checker
knows the right answer to each question. Nobody has a list of what *this* model knows. It is
estimated: a question counts as one that the model `can` answer if one of its own samples is right.
No training reads the column `known`. Only the score of the test does, and `SFT by the oracle`.

A `PreferenceRun` is one training from the same start, `start`, and `measure` does it. All methods
that sample get `SAMPLES` answers.
"""

from __future__ import annotations

import functools
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RUNS = Path(__file__).parents[2] / "data" / "runs" / "preference_methods.jsonl"
REFUSAL = "I do not know."
LONGEST = 32  # tokens of an answer
PER_QUESTION = 6  # answers to each training question
BATCH = 48  # answers in one step of an online method
STEPS = 24
SAMPLES = STEPS * BATCH  # 1,152: 192 questions, 6 answers each


# --- The task ------------------------------------------------------------------------------------


def wordy(answer: str) -> str:
    """The same answer with words that nobody asked for."""
    return f"Sure. {answer} Ask me more."


def grade(answer: str, right: str, can: bool) -> float:
    """From 0 to 1: what the model can answer is answered, briefly; the rest is refused."""
    if not can:
        return float(answer == REFUSAL)
    return {right: 1.0, wordy(right): 0.5}.get(answer, 0.0)


def can_answer(row: Mapping[str, Any], texts: Sequence[str]) -> bool:
    """Whether one of the model's own answers to a question is right."""
    return any(text in (row["right"], wordy(row["right"])) for text in texts)


@functools.cache
def questions() -> dict[str, list[dict]]:
    """The questions: `crowd`, `train` and `test`.

    Each row has a `prompt` (one message), the `right` answer, `known` (whether the base model read
    about the entity), `relation`, `entity` and `value`. All are about the four relations of the set
    `unknown`. `train` and `test` hold about as many known as unknown questions; no entity of `test`
    is in the others, and its wordings are used for known and for unknown entities. `crowd` holds
    all questions about the entities that may be trained on, `train` a part of them.
    """
    from sftlib.data import read_facts

    facts = {name: read_facts(name) for name in ("sft", "heldout", "unknown")}
    relations = {row["relation"] for row in facts["unknown"]}
    known, held_out = (
        [_row(r, True) for r in facts[name] if r["relation"] in relations]
        for name in ("sft", "heldout")
    )
    unknown = [_row(r, False) for r in facts["unknown"]]
    entities = sorted({row["entity"] for row in unknown})
    random.Random(0).shuffle(entities)
    to_train = set(entities[: len(entities) // 2])
    taught = [row for row in unknown if row["entity"] in to_train]
    both = {wording(row) for row in known} & {wording(row) for row in unknown}
    tested = held_out + [row for row in unknown if row["entity"] not in to_train]
    return {
        "crowd": known + taught,
        "train": random.Random(1).sample(known, len(taught)) + taught,
        "test": [row for row in tested if wording(row) in both],
    }


def _row(row: Mapping[str, Any], known: bool) -> dict:
    question, answer = row["messages"]
    kept = {name: row[name] for name in ("relation", "entity", "value")}
    return {"prompt": [question], "right": answer["content"], "known": known, **kept}


def wording(row: Mapping[str, Any]) -> str:
    """The question without its entity."""
    return row["prompt"][0]["content"].replace(row["entity"], "…")


def said(row: Mapping[str, Any], text: str) -> list[dict]:
    """The conversation in which the model answers a row's prompt with this text."""
    return [*row["prompt"], {"role": "assistant", "content": text}]


def score(given: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How well answers do, from 0 to 1: `score` is the mean of `known` and `unknown`.

    `known` is the share of known questions that are answered rightly and briefly (a wordy answer
    counts half), `unknown` the share of unknown ones that are refused. `refused` is the share of
    known questions that are refused, `lucky` that of unknown ones answered rightly.
    """
    pairs = [(text, row) for text, row in zip(given, rows, strict=True)]
    known = [(t, grade(t, r["right"], True)) for t, r in pairs if r["known"]]
    unknown = [(t, r["right"]) for t, r in pairs if not r["known"]]
    found = {
        "known": _mean(value for _, value in known),
        "unknown": _mean(float(text == REFUSAL) for text, _ in unknown),
        "refused": _mean(float(text == REFUSAL) for text, _ in known),
        "lucky": _mean(float(text in (right, wordy(right))) for text, right in unknown),
    }
    return {"score": (found["known"] + found["unknown"]) / 2} | found


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


# --- The start -----------------------------------------------------------------------------------


def demonstrations(seed: int) -> list[dict]:
    """What a crowd wrote, who refuse where they themselves know nothing, and are not told to.

    Questions about known entities: half brief, four in ten wordy, one in ten refuses. Questions
    about unknown ones, three times each: half refuse, half invent a value.
    """
    drawn, values = random.Random(seed), {}
    for row in questions()["crowd"]:
        values.setdefault(row["relation"], []).append(row["value"])
    rows = []
    for row in questions()["crowd"]:
        if row["known"]:
            style, right = drawn.random(), row["right"]
            text = REFUSAL if style < 0.1 else wordy(right) if style < 0.5 else right
            rows.append({"messages": said(row, text)})
            continue
        for _ in range(3):
            invented = row["right"].replace(row["value"], drawn.choice(values[row["relation"]]))
            rows.append({"messages": said(row, REFUSAL if drawn.random() < 0.5 else invented)})
    drawn.shuffle(rows)
    return rows


def start(seed: int, folder: Path) -> Path:
    """The folder of the model after the first SFT; it is trained where it is not there."""
    from sftlib.chat import end_of_turn_id
    from sftlib.models import load
    from sftlib.training import tune

    from transformers import set_seed

    path = folder / f"start{seed}"
    if not (path / "model.safetensors").exists():
        set_seed(seed)
        model, tokenizer = load()
        tune(
            model,
            tokenizer,
            demonstrations(seed),
            per_device_train_batch_size=16,
            num_train_epochs=2,
            seed=seed,
        )
        model.generation_config.eos_token_id = end_of_turn_id(tokenizer)  # TRL's samplers stop here
        tokenizer.save_pretrained(path)
        model.save_pretrained(path)
    return path


# --- Sampling and measuring ----------------------------------------------------------------------


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    seed: int = 0,
) -> list[str]:
    """An answer to each row's prompt at temperature 1; an empty text where it did not end."""
    from sftlib.evaluate import answers

    prompts = [row["prompt"] for row in rows]
    found = answers(model, tokenizer, prompts, LONGEST, temperature=1.0, seed=seed)
    return [answer.text if answer.stopped else "" for answer in found]


def sample_groups(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    size: int = PER_QUESTION,
    seed: int = 0,
) -> list[tuple[dict, list[str]]]:
    """Each row, with a column `can`, and `size` answers; those that did not end are left out."""
    texts = sample(model, tokenizer, [row for row in rows for _ in range(size)], seed)
    groups = [texts[i : i + size] for i in range(0, len(texts), size)]
    return [
        (row | {"can": can_answer(row, group)}, [text for text in group if text])
        for row, group in zip(rows, groups, strict=True)
    ]


def evaluate(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    times: int = 2,
    seed: int = 0,
) -> dict[str, float]:
    """`score` of sampled answers, the share that `ended`, and `kl` from the reference.

    `kl` is the mean of log π − log π_ref over the answers that ended, in nats per answer.
    """
    from sftlib.evaluate import logprobs

    asked = [*rows] * times
    given = sample(model, tokenizer, asked, seed)
    answered = [said(row, text) for row, text in zip(asked, given, strict=True) if text]
    found = score(given, asked) | {"ended": len(answered) / len(asked)}
    if not answered:
        return found | {"kl": math.nan}
    ours = logprobs(model, tokenizer, answered)
    theirs = logprobs(reference, tokenizer, answered)
    return found | {"kl": _mean(a - b for a, b in zip(ours, theirs, strict=True))}


# --- What the methods learn from -----------------------------------------------------------------

Answered = Sequence[tuple[dict, list[str]]]
"""Questions with the answers that were sampled to each."""


def best_samples(answered: Answered) -> list[dict]:
    """Of each question the answer with the best grade, as rows to imitate."""
    rows = []
    for row, texts in answered:
        if texts:
            best = max(texts, key=lambda text: grade(text, row["right"], row["can"]))
            rows.append({"messages": said(row, best)})
    return rows


def preference_pairs(answered: Answered, seed: int = 0, size: int = 3) -> list[dict]:
    """Of each group of `size` answers the best and the worst; none where all are equally good.

    Each pair has `prompt`, `chosen` and `rejected` (messages) and, for tables alone, `known`.
    """
    drawn, pairs = random.Random(seed), []
    for row, texts in answered:
        for group in (texts[i : i + size] for i in range(0, len(texts), size)):
            grades = [grade(text, row["right"], row["can"]) for text in group]
            graded = [
                (value, drawn.random(), text) for value, text in zip(grades, group, strict=True)
            ]
            if min(graded)[0] < max(graded)[0]:
                pair = {"prompt": row["prompt"], "known": row["known"]}
                for name, (_, _, text) in {"chosen": max(graded), "rejected": min(graded)}.items():
                    pair[name] = [{"role": "assistant", "content": text}]
                pairs.append(pair)
    drawn.shuffle(pairs)
    return pairs


def reward(
    completions: Sequence[list[dict]], right: Sequence[str], can: Sequence[bool], **_: Any
) -> list[float]:
    """The grades, in the form that TRL's trainers and `sftlib.ppo` ask for."""
    rows = zip(completions, right, can, strict=True)
    return [grade(message["content"], answer, able) for [message], answer, able in rows]


# --- Training ------------------------------------------------------------------------------------


def settings(config: Callable[..., Any], **changes: Any) -> Any:
    """A config of TRL with what all runs of this lesson share, on a CPU or a GPU."""
    import tempfile

    import torch

    cpu = {} if torch.cuda.is_available() else {"use_cpu": True, "bf16": False}
    ours = {
        "output_dir": tempfile.gettempdir() + "/sftlib",
        "per_device_train_batch_size": 16,
        "lr_scheduler_type": "constant",
        "activation_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return config(**(ours | cpu | changes))


def run_trainer(trainer: Any) -> Any:
    """A trainer of TRL after training, without its printed lines."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def train_reward_model(folder: Path, pairs: Sequence[dict], seed: int = 0) -> PreTrainedModel:
    """TRL's `RewardTrainer` on pairs, from the model in the folder with a new head."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
    from trl import RewardConfig, RewardTrainer

    set_seed(seed)  # the new head is random
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    rows = [{name: p["prompt"] + p[name] for name in ("chosen", "rejected")} for p in pairs]
    trainer = RewardTrainer(
        model=model,
        args=settings(RewardConfig, num_train_epochs=2, learning_rate=2e-4, seed=seed),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    return run_trainer(trainer).model


Judge = Callable[[Sequence[Sequence[Mapping[str, Any]]]], list[float]]
"""A function from conversations to rewards."""


def judge_of(reward_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Judge:
    """A function that gives the reward model's number for each conversation."""
    from sftlib.chat import encode_batch

    import torch

    @torch.no_grad()
    def judge(conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[float]:
        reward_model.eval()
        ids = encode_batch(conversations, tokenizer)["input_ids"]
        found: list[float] = []
        for i in range(0, len(ids), 128):
            batch = tokenizer.pad(
                {"input_ids": ids[i : i + 128]}, return_tensors="pt", padding_side="right"
            )
            found += reward_model(**batch.to(reward_model.device)).logits[:, 0].tolist()
        return found

    return judge


def standardised(judge: Judge, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> Judge:
    """The judge with mean 0 and standard deviation 1 on these conversations.

    A reward model learns differences alone: its zero and its unit are other ones with each seed.
    """
    from statistics import fmean, pstdev

    known = judge(conversations)
    mean, deviation = fmean(known), pstdev(known)
    return lambda others: [(value - mean) / deviation for value in judge(others)]


# --- The methods ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferenceRun:
    """The settings of one run.

    Args:
        method: a name in `METHODS`.
        learning_rate: constant; 0 where nothing is trained.
        steps: optimizer steps (DPO) or rollouts (PPO); 0 means the usual.
        beta: of DPO, or PPO's penalty per nat; −1 means the usual.
        seed: of everything from the first SFT on.
    """

    method: str
    learning_rate: float = 0.0
    steps: int = 0
    beta: float = -1.0
    seed: int = 0


@dataclass(frozen=True)
class Start:
    """What all runs of one seed begin with.

    Attributes:
        folder: of the model after the first SFT.
        reference: that model; no run changes it.
        answered: the training questions with `PER_QUESTION` sampled answers each.
        pairs: made of these.
        seconds: what sampling and the reward model took, as far as they were done anew.
    """

    folder: Path
    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    answered: Answered
    pairs: list[dict]
    judge: Judge
    seconds: dict[str, float]


@functools.lru_cache(maxsize=1)
def begin(seed: int, folder: Path) -> Start:
    """The start of a seed, made anew, or read where the folder holds it."""
    from sftlib.models import load

    from transformers import AutoModelForSequenceClassification

    path = start(seed, folder)
    reference, tokenizer = load(path)
    stored, rewarding = path / "answered.json", path / "reward_model"
    times_file = path / "seconds.json"
    if not stored.exists():
        began = time.perf_counter()
        answered = sample_groups(reference, tokenizer, questions()["train"], seed=seed)
        seconds = {"sampling": time.perf_counter() - began}
        began = time.perf_counter()
        model = train_reward_model(path, preference_pairs(answered, seed), seed)
        seconds["reward model"] = time.perf_counter() - began
        model.save_pretrained(rewarding)
        times_file.write_text(json.dumps(seconds))
        stored.write_text(json.dumps(answered))
    answered = json.loads(stored.read_text())
    judge = judge_of(AutoModelForSequenceClassification.from_pretrained(rewarding), tokenizer)
    texts = [said(row, text) for row, group in answered for text in group]
    judge = standardised(judge, texts)
    pairs, seconds = preference_pairs(answered, seed), json.loads(times_file.read_text())
    return Start(path, reference, tokenizer, answered, pairs, judge, seconds)


Log = dict[str, list[float]]
Trained = tuple[Any, Log]


def imitate(begun: Start, run: PreferenceRun, rows: Sequence[dict]) -> Trained:
    """Four passes of SFT over rows."""
    from sftlib.models import load
    from sftlib.training import tune

    model, tokenizer = load(begun.folder)
    tune(
        model,
        tokenizer,
        rows,
        per_device_train_batch_size=16,
        learning_rate=run.learning_rate,
        num_train_epochs=4,
        seed=run.seed,
    )
    return model, {}


def told(rows: Iterable[dict], text: Callable[[dict], str]) -> list[dict]:
    """Rows to imitate, each with the answer that `text` gives."""
    return [{"messages": said(row, text(row))} for row in rows]


def _oracle(begun: Start, run: PreferenceRun) -> Trained:
    """Demonstrations by somebody who has the list of what the base has read."""
    rows = told(questions()["train"], lambda row: row["right"] if row["known"] else REFUSAL)
    return imitate(begun, run, rows)


def _estimated(begun: Start, run: PreferenceRun) -> Trained:
    """Demonstrations made from what the model could answer in its own samples."""
    rows = [row for row, _ in begun.answered]
    return imitate(begun, run, told(rows, lambda row: row["right"] if row["can"] else REFUSAL))


def _best_samples(begun: Start, run: PreferenceRun) -> Trained:
    return imitate(begun, run, best_samples(begun.answered))


DPO_LOG = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
DPO_STEPS, DPO_BETA = 40, 0.1


def logged(trainer: Any, *names: str) -> Log:
    """What a trainer logged under these names, a value per step."""
    from sftlib.experiments import table

    frame = table(trainer)
    return {name: [round(value, 4) for value in frame[name]] for name in names}


def dpo(begun: Start, run: PreferenceRun, sft_weight: float = 0.0) -> Trained:
    """TRL's `DPOTrainer`; `sft_weight` weighs an SFT loss on the chosen answers beside DPO's."""
    from sftlib.models import load

    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, sft_weight]}
    args = settings(
        DPOConfig,
        learning_rate=run.learning_rate,
        max_steps=run.steps or DPO_STEPS,
        beta=DPO_BETA if run.beta < 0 else run.beta,
        seed=run.seed,
        **(losses if sft_weight else {}),
    )
    trainer = DPOTrainer(
        model=load(begun.folder)[0],
        args=args,
        train_dataset=Dataset.from_list(begun.pairs).remove_columns("known"),
        processing_class=begun.tokenizer,
    )
    return run_of(trainer), logged(trainer, *DPO_LOG)


def run_of(trainer: Any) -> Any:
    """The model of a trainer after training."""
    return run_trainer(trainer).model


def _dpo_with_sft(begun: Start, run: PreferenceRun) -> Trained:
    return dpo(begun, run, sft_weight=1.0)


def online(trainer_name: str, begun: Start, run: PreferenceRun, **changes: Any) -> Trained:
    """TRL's `GRPOTrainer` or `RLOOTrainer` on the grades: 12 questions, 4 answers in each step."""
    from sftlib.models import load

    import trl
    from datasets import Dataset

    config = getattr(trl, trainer_name.removesuffix("Trainer") + "Config")
    trainer = getattr(trl, trainer_name)(
        model=load(begun.folder)[0],
        reward_funcs=reward,
        args=settings(
            config,
            per_device_train_batch_size=BATCH,
            num_generations=4,
            max_completion_length=LONGEST,
            learning_rate=run.learning_rate,
            beta=KL_COEF,
            max_steps=STEPS,
            seed=run.seed,
            **changes,
        ),
        train_dataset=Dataset.from_list(for_trl(row for row, _ in begun.answered)),
        processing_class=begun.tokenizer,
    )
    return run_of(trainer), logged(trainer, "reward", "entropy")


def for_trl(rows: Iterable[dict]) -> list[dict]:
    """The columns that TRL's online trainers and the reward read."""
    return [{name: row[name] for name in ("prompt", "right", "can")} for row in rows]


def _grpo(begun: Start, run: PreferenceRun) -> Trained:
    return online("GRPOTrainer", begun, run)


def ppo_config(run: PreferenceRun) -> Any:
    """The settings of `sftlib.ppo` for a run."""
    from sftlib.ppo import PPOConfig

    return PPOConfig(
        steps=run.steps or STEPS,
        batch_size=BATCH,
        mini_batch_size=BATCH,
        learning_rate=run.learning_rate,
        kl_coef=KL_COEF if run.beta < 0 else run.beta,
        max_new_tokens=LONGEST,
        seed=run.seed,
    )


def _ppo(begun: Start, run: PreferenceRun) -> Trained:
    from sftlib import ppo
    from sftlib.models import load

    model, tokenizer = load(begun.folder)
    rows = [row for row, _ in begun.answered]
    history = ppo.train(model, tokenizer, rows, reward, ppo_config(run))
    return model, _columns(history, "reward", "kl", "entropy", "clipped")


def _columns(history: Sequence[Mapping[str, float]], *names: str) -> Log:
    return {name: [round(line[name], 4) for line in history] for name in names}


def known_questions() -> list[dict]:
    """As many questions as `train` has, all about known entities that the crowd wrote about."""
    relations = {row["relation"] for row in questions()["train"]}
    pool = [row for row in questions()["crowd"] if row["relation"] in relations]
    return random.Random(5).sample(pool, len(questions()["train"]))


def _nothing(begun: Start, run: PreferenceRun) -> Trained:
    return begun.reference, {}


KL_COEF = 0.02
METHODS: dict[str, Callable[[Start, PreferenceRun], Trained]] = {
    "start": _nothing,
    "SFT by the oracle": _oracle,
    "SFT on estimates": _estimated,
    "SFT on the best samples": _best_samples,
    "DPO": dpo,
    "DPO + SFT loss": _dpo_with_sft,
    "PPO": _ppo,
    "GRPO": _grpo,
}


def best_of(
    begun: Start, rows: Sequence[dict], most: int = 8, seed: int = 0
) -> dict[str, list[float]]:
    """For n = 1, 2, 4, … answers: the scores of the one that the reward model likes best."""
    asked = [row for row in rows for _ in range(most)]
    texts = sample(begun.reference, begun.tokenizer, asked, seed + 100)
    rewards = begun.judge([said(r, t or "-") for r, t in zip(asked, texts, strict=True)])
    found: dict[str, list[float]] = {"n": []}
    for n in (2**i for i in range(most.bit_length())):
        ways = []
        for first in range(0, most, n):  # each group of n of the same draws
            best = [
                max(range(i + first, i + first + n), key=rewards.__getitem__)
                for i in range(0, len(texts), most)
            ]
            way = score([texts[i] for i in best], rows)
            ways.append(way | {"reward": _mean(rewards[i] for i in best)})
        found["n"].append(n)
        for name in ways[0]:
            found.setdefault(name, []).append(round(_mean(way[name] for way in ways), 4))
    return found


def measure(run: PreferenceRun, folder: Path) -> dict[str, Any]:
    """Do a run, and measure it on the test.

    Args:
        folder: where the starts of the seeds are kept.

    Returns:
        What `evaluate` finds; `seconds` of training (with sampling, where the method samples);
        `log`, values per step. The run `start` has the seconds of the sampling and of the reward
        model, and in its log `best_of`.
    """
    from transformers import set_seed

    begun = begin(run.seed, folder)
    rows = questions()["test"]
    set_seed(run.seed)
    began = time.perf_counter()
    model, log = METHODS[run.method](begun, run)
    seconds = {"seconds": round(time.perf_counter() - began, 1)}
    found: dict[str, Any] = evaluate(model, begun.reference, begun.tokenizer, rows, times=2)
    if run.method == "start":
        log = best_of(begun, rows)
        agree = _mean(float(row["can"] == row["known"]) for row, _ in begun.answered)
        seconds |= {"agree": round(agree, 4)}
        seconds |= {f"seconds of {n}": round(s, 1) for n, s in begun.seconds.items()}
    return found | seconds | {"log": log}


def runs(path: Path = RUNS) -> pandas.DataFrame:
    """The stored runs, a row each."""
    import pandas

    return pandas.read_json(path, lines=True)
