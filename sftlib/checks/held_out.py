"""An exercise that trains: what the student made is judged on held-out questions."""

from __future__ import annotations

import math
import random
import time
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sftlib.checks.exercise import judged
from sftlib.checks.functions import current_seed
from sftlib.checks.reading import described, open_parts, sequence, shown
from sftlib.checks.verdict import NOT_ATTEMPTED, CheckEnds, Verdict, is_none, still_open, wrong
from sftlib.data import decontaminate, read_facts, validate
from sftlib.data.validation import normalise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = Mapping[str, Any]
BY_CHANCE = 0.05  # a difference that chance gives more often than this gets a note
AT_ONCE = 50  # prompts between two looks at the clock
FEW = 3  # open places that a message names
MEASURES = ("exact_match", "content", "stops")
SHORT = 4  # words: a shorter answer ("Yes.") stands in other rows by chance
NAMES = ("entity", "value")  # of the course's facts
GIVE_A_TRAINER = "Give the SFTTrainer: it has the model and its tokenizer."


@dataclass(frozen=True, repr=False)
class Score(Verdict):
    """What `beats` found.

    Attributes:
        score, baseline: shares of the held-out prompts, from 0 to 1.
        prompts: how many there were.
        chance: how often a model that is exactly as good as the baseline does at least as well as
            this one (or as badly, below the baseline), from 0 to 1.
    """

    score: float = 0.0
    baseline: float = 0.0
    prompts: int = 0
    chance: float = 1.0


@judged
def beats(
    model_or_rows: Any,
    baseline: float,
    held_out: Sequence[Row] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    measure: str = "exact_match",
    steps: int = 30,
    most_rows: int = 500,
    most_seconds: float = 60.0,
    **settings: Any,
) -> Verdict:
    """Whether a model, or one that is trained on the student's rows, beats a stated baseline.

    Rows train the model that the dial names (`sftlib.models.load`), with `sftlib.training` and the
    same number of steps for everybody. `sftlib.evaluate` then asks the held-out questions.

    An exercise of lesson 1, its check, and a right answer:

        @exercise(1, 5, "20 rows that teach the model to answer")
        def check_rows(rows):
            return beats(rows, baseline=0.5, most_rows=20)

        check_rows(read_facts("sft")[:20])

    ✓ Score: 85.0 % of 200 held-out prompts (exact match). Baseline: 50.0 %.
    Difference: +35.0 percentage points.

    **Chance.** The prompts are taken for independent draws, and the baseline for exactly known. If
    a model's true share were the baseline, the number of right answers would follow a binomial
    distribution. A note is added if a result at least as far on the same side has a probability
    above 5 %.

    Args:
        model_or_rows: rows with `messages` (or conversations) to train on; a trainer that has
            trained, which brings its tokenizer; or a model, if the check gives its `tokenizer`.
        baseline: a share from 0 to 1.
        held_out: rows with `messages` and, for the measure `content`, `value`; without it, the
            course's held-out facts.
        measure: `exact_match`, `content` or `stops`, see `sftlib.evaluate`. An answer without text
            counts for none of them.
        steps: optimizer steps of a training on rows.
        most_rows: more rows are refused.
        most_seconds: of training and answering, without the loading of libraries and models;
            what takes longer is stopped and refused. Time counts only while this process works.
        settings: for `sftlib.training.prepare`: `peft_config`, or arguments of `trl.SFTConfig`.

    Returns:
        A `Score`; or a plain `Verdict` that says why there is none: nothing was attempted, rows
        contain held-out rows, there are none or too many, a row is no sound conversation, a model
        has no tokenizer, or time is up. What a model was trained on cannot be seen, but what a
        trainer was given can.

    Raises:
        Nothing: a wrong argument is reported as a failure of the check itself.
    """
    if not 0 <= baseline <= 1:
        raise ValueError(f"Expected the baseline as a share from 0 to 1, found {baseline!r}.")
    tests = read_facts("heldout") if held_out is None else list(held_out)
    _refuse_other_tests(tests, measure)
    model, spent = model_or_rows, 0.0
    is_trainer = hasattr(model, "train_dataset")
    if is_trainer:
        tokenizer = model.processing_class
    if not is_trainer and not hasattr(model, "generate"):
        rows = read_rows(model, most_rows)
        refuse_leaks(rows, tests)
        model, tokenizer, spent = _trained(rows, steps, most_seconds, settings)
    elif tokenizer is None:
        found = "a trainer" if is_trainer else "a model"
        raise CheckEnds(wrong(f"Found {found} without a tokenizer. {GIVE_A_TRAINER}"))
    elif is_trainer:
        refuse_leaks(_seen_by(model), tests)
        model = model.model
    hits = _hits(model, tokenizer, tests, measure, most_seconds - spent)
    return _score(hits, len(tests), baseline, measure)


def _refuse_other_tests(tests: Sequence[Row], measure: str) -> None:
    """Raise before any training if the model could not be judged after it."""
    if measure not in MEASURES:
        raise ValueError(f"Expected a measure ({', '.join(MEASURES)}), found {measure!r}.")
    if not tests:
        raise ValueError("Expected held-out rows, found none.")
    for number, row in enumerate(tests, 1):
        messages = row.get("messages") if isinstance(row, Mapping) else None
        problems = (
            validate(list(messages))
            if isinstance(messages, list | tuple)
            else [f"expected a dict with messages, found {described(row)}."]
        )
        if problems:
            raise ValueError(f"Held-out row {number}: {problems[0]}")
        if measure == "content" and not row.get("value"):
            raise ValueError(f"Held-out row {number}: expected a `value` for the measure content.")


# --- Rows ----------------------------------------------------------------------------------------


def read_rows(answer: Any, most: int) -> list[dict]:
    """The student's rows as new objects, each a sound conversation.

    Raises:
        CheckEnds: they are open, none, too many, or not sound.
    """
    if answer is None:
        raise CheckEnds(is_none([]))
    if isinstance(answer, tuple) and any(hasattr(part, "generate") for part in answer):
        raise CheckEnds(wrong(f"Found a tuple with a model in it. {GIVE_A_TRAINER}"))
    if isinstance(answer, Mapping) or answer is ...:
        answer = [answer]
    given = sequence(answer, what="a list of rows, a trainer, or a model")
    _refuse_open(given)
    if not given:
        raise CheckEnds(wrong("Expected rows to train on, found none."))
    if len(given) > most:
        raise CheckEnds(wrong(f"Expected at most {most:,} rows, found {len(given):,}."))
    rows = []
    for number, row in enumerate(given, 1):
        messages = _messages(row)
        if not isinstance(messages, list | tuple):
            has = isinstance(row, Mapping) and "messages" in row
            wanted = "a list as messages" if has else "a dict with messages"
            found = described(messages if has else row)
            raise CheckEnds(wrong(f"Row {number}: expected {wanted}, found {found}."))
        if problems := validate(list(messages)):
            raise CheckEnds(wrong(f"Row {number}: {problems[0]}"))
        rows.append({"messages": [dict(message) for message in messages]})
    return rows


def _messages(row: Any) -> Any:
    """The messages of a row, or of a conversation that stands for one."""
    return row.get("messages") if isinstance(row, Mapping) else row


def _refuse_open(given: Sequence[Any]) -> None:
    """Raise if a role or a content is still `...`. Other keys may be None: Arrow adds such keys."""

    def said(message: Any) -> Any:
        keys = ("role", "content")
        is_message = isinstance(message, Mapping)
        return {k: message[k] for k in keys if k in message} if is_message else message

    rows = []
    for row in given:
        messages = _messages(row)
        if isinstance(messages, list | tuple):
            messages = [said(message) for message in messages]
        rows.append({"messages": messages} if isinstance(row, Mapping) else messages)
    places, filled = open_parts(rows, none=False)
    if places and not filled:
        raise CheckEnds(NOT_ATTEMPTED)
    if places:
        more = f"and {len(places) - FEW:,} more"
        raise CheckEnds(still_open([*places[:FEW], *[more] * (len(places) > FEW)]))


def _seen_by(trainer: Any) -> list[dict]:
    """What a trainer was given, as far as it can be read: its texts, as one answer per row."""
    dataset = trainer.train_dataset
    if dataset is None:
        return []
    if not hasattr(dataset, "__len__"):
        raise CheckEnds(
            wrong(
                "Expected a trainer with a dataset that has a length, found "
                f"{type(dataset).__name__}: its rows cannot be looked at. Use a Dataset."
            )
        )
    columns = getattr(dataset, "column_names", ())
    if "messages" in columns:
        return [{"messages": messages} for messages in dataset["messages"]]
    if "input_ids" not in columns:
        return []
    decode = trainer.processing_class.decode
    texts = [decode(ids, skip_special_tokens=True) for ids in dataset["input_ids"]]
    return [{"messages": [{"role": "assistant", "content": text}]} for text in texts]


def refuse_leaks(rows: Sequence[dict], held_out: Sequence[Row]) -> None:
    """Raise if a row contains a held-out question, its answer or its fact.

    Raises:
        CheckEnds: with the row, and what it gives away.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of many leaks: one is enough here
        _, leaks = decontaminate(rows, [dict(row) for row in held_out])
    found = [(leak.row, leak.held_out, leak.reason) for leak in leaks[:1]] or _told(rows, held_out)
    if found:
        row, test, reason = found[0]
        asked = test["messages"][-2]["content"]
        raise CheckEnds(
            wrong(
                f"Row {rows.index(row) + 1} contains a held-out question or its answer "
                f"({reason}): {shown(asked, 100)}. Remove this row: held-out rows are for the test."
            )
        )


def _told(rows: Sequence[dict], held_out: Sequence[Row]) -> list[tuple[dict, Row, str]]:
    """The first row that tells a held-out answer inside of a longer text, in any wording.

    The messages of a row are read as one text: a question and its answer tell a fact together.
    """
    tests = [
        (test, _spaced(test["messages"][-1]["content"]), *(_name(test, n) for n in NAMES))
        for test in held_out
    ]
    for row in rows:
        text = _spaced(" ".join(_texts(row["messages"])))
        for test, answer, entity, value in tests:
            if answer.count(" ") > SHORT and answer in text:
                return [(row, test, "answer inside")]
            if entity and value and entity in text and value in text.replace(entity, "  "):
                return [(row, test, "same fact in other words")]
    return []


def _texts(part: Any) -> Iterator[str]:
    """All that messages tell: contents, thoughts, and calls with the arguments' names."""
    if isinstance(part, Mapping):
        told = {k: v for k, v in part.items() if k not in ("role", "type", "weight")}
        yield from _texts([*told.keys(), *told.values()])
    elif isinstance(part, list | tuple):
        yield from (text for item in part for text in _texts(item))
    elif part is not None:
        yield str(part)


def _spaced(text: str) -> str:
    """A text as comparisons see it, without symbols, so that only whole words are found in it."""
    kept = (" " if unicodedata.category(c)[0] == "S" else c for c in normalise(text))
    return f" {' '.join(''.join(kept).split())} "


def _name(row: Row, key: str) -> str:
    """What a row is about, or its value; empty if it does not say."""
    name = _spaced(str(row.get(key, ""))).strip().removeprefix("the ")
    return name and f" {name} "


# --- Training and asking -------------------------------------------------------------------------


class _Clock:
    """Seconds since it was made, without those in which other processes had the machine."""

    def __init__(self) -> None:
        self.clock, self.cpu = time.monotonic(), time.process_time()

    def seconds(self) -> float:
        # Several threads use more CPU time than the clock shows; on a busy machine it is less.
        return min(time.monotonic() - self.clock, time.process_time() - self.cpu)


def _trained(
    rows: list[dict], steps: int, most_seconds: float, settings: dict[str, Any]
) -> tuple[Any, PreTrainedTokenizerBase, float]:
    """The base model after `steps` optimizer steps on the rows, and the seconds that they took.

    Raises:
        CheckEnds: time is up, or the rows cannot be encoded.
    """
    from sftlib.models import load
    from sftlib.training import prepare

    model, tokenizer = load()
    settings = {"max_steps": steps, "seed": training_seed()} | settings
    try:
        trainer = prepare(model, tokenizer, rows, **settings)
    except ValueError as error:
        raise CheckEnds(wrong(f"These rows cannot be trained on: {error}")) from error
    clock = _Clock()
    trainer.add_callback(_stop_after(most_seconds, clock))
    trainer.train()
    done = trainer.state.global_step
    if done < settings["max_steps"]:
        raise CheckEnds(
            wrong(
                f"Time is up: {done} of {settings['max_steps']} steps were done in "
                f"{most_seconds:g} seconds on this machine. Shorter rows take less time."
            )
        )
    return trainer.model, tokenizer, clock.seconds()


def training_seed() -> int:
    """The seed of a training: that of the exercise, as a number."""
    seed = current_seed()
    return int(seed) if seed.isdecimal() else random.Random(seed).randrange(2**16)


def _stop_after(most_seconds: float, clock: _Clock) -> Any:
    from transformers import TrainerCallback

    class StopAfter(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop |= clock.seconds() > most_seconds
            return control

    return StopAfter()


def _hits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tests: Sequence[Row],
    measure: str,
    most_seconds: float,
) -> int:
    """How many of the held-out prompts are answered as the measure asks.

    Raises:
        CheckEnds: time is up.
    """
    from sftlib import evaluate

    measures = {
        "exact_match": lambda given, rows: evaluate.exact_match(given, rows, tokenizer),
        "content": evaluate.content,
        "stops": lambda given, rows: sum(a.stopped and bool(a.text) for a in given) / len(given),
    }
    hits, clock = 0, _Clock()
    for start in range(0, len(tests), AT_ONCE):
        if clock.seconds() > most_seconds:
            said = f"Time is up: {start} of {len(tests)} held-out prompts were asked"
            raise CheckEnds(wrong(f"{said} in the time that is allowed, on this machine."))
        part = tests[start : start + AT_ONCE]
        asked, tools = [row["messages"][:-1] for row in part], [row.get("tools") for row in part]
        given = evaluate.answers(model, tokenizer, asked, tools=tools)
        hits += round(measures[measure](given, part) * len(part))
    return hits


# --- By how much ---------------------------------------------------------------------------------


def chance(hits: int, prompts: int, baseline: float) -> float:
    """How often a model whose true share is the baseline does at least as well, or as badly.

    The tail of a binomial distribution: from `hits` up where they are more than expected, else
    from `hits` down.
    """
    if baseline in (0, 1):
        return float(hits == baseline * prompts)
    tail = range(hits, prompts + 1) if hits > baseline * prompts else range(hits + 1)

    def logarithm(k: int) -> float:
        ways = math.lgamma(prompts + 1) - math.lgamma(k + 1) - math.lgamma(prompts - k + 1)
        return ways + k * math.log(baseline) + (prompts - k) * math.log1p(-baseline)

    return min(1.0, math.fsum(math.exp(logarithm(k)) for k in tail))


def _score(hits: int, prompts: int, baseline: float, measure: str) -> Score:
    score, often = hits / prompts, chance(hits, prompts, baseline)
    points = 100 * (score - baseline)
    message = (
        f"Score: {100 * score:.1f} % of {prompts} held-out prompts ({measure.replace('_', ' ')}). "
        f"Baseline: {100 * baseline:.1f} %. "
        f"Difference: {f'{points:+.1f}' if points else '0.0'} percentage points."
    )
    if points and often > BY_CHANCE:
        side = "high or higher" if points > 0 else "low or lower"
        message += (
            " This difference may be chance. A model as good as the baseline scores this "
            f"{side} in {100 * often:.0f} % of such tests."
        )
    return Score(score > baseline, message, score, baseline, prompts, often)
