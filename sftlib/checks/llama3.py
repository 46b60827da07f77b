"""The exercises of lesson 9."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import random
import re
from collections.abc import Callable, Generator
from decimal import Decimal
from numbers import Rational
from typing import TYPE_CHECKING, Any, cast

from sftlib.checks.exercise import exercise
from sftlib.checks.functions import call, compare, reference
from sftlib.checks.held_out import refuse_leaks, training_seed
from sftlib.checks.reading import Unread, mapping, number, sequence, shown, text, whole
from sftlib.checks.verdict import CheckEnds, Verdict, right, wrong

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# --- GPU hours -----------------------------------------------------------------------------------


@reference
def gpu_hours(
    parameters: float, tokens: float, peak: float, utilisation: float, method: str
) -> float:
    """6 · N · D operations (2 of them forward; LoRA: 4 · N · D) at a share of the GPU's peak."""
    operations = {"full": 6, "lora": 4}[method] * parameters * tokens
    return operations / (peak * 1e12 * utilisation) / 3600


def _draw_training(rng: random.Random, size: int) -> tuple[float, float, float, float, str]:
    """A model, its data and a GPU, of any size."""
    parameters, tokens = rng.randint(1, 70) * 1e9, rng.randint(1, 10**size) * 1e5
    peak, used = rng.choice([125.0, 312.0, 989.0, 60]), rng.choice([0.2, 0.35, 0.5, 1.0])
    return parameters, tokens, peak, used, rng.choice(["full", "lora"])


@exercise(9, 1, "hours of one GPU, from operations, peak and utilisation")
def check_gpu_hours(function: Any) -> Verdict:
    full = ("Operations divided by operations per second.", (8e9, 24e6, 989.0, 0.4, "full"))
    lora = ("LoRA computes no gradients of frozen weights.", (8e9, 24e6, 989.0, 0.4, "lora"))
    compare(function, gpu_hours, [full, lora], _draw_training, HOUR_MISTAKES, relative=1e-5)
    return right("An hour or two for 8B: the budget is for the runs that you repeat.")


def _times(factor: Any) -> Any:
    """Hours that are wrong by a factor, which may depend on utilisation and method."""
    return lambda parameters, tokens, peak, utilisation, method: (
        gpu_hours(parameters, tokens, peak, utilisation, method) * factor(utilisation, method)
    )


def _rounded(digits: int, to: Callable = round) -> Callable:
    return lambda *given: to(gpu_hours(*given) * 10**digits) / 10**digits


HOUR_MISTAKES = {
    "Do not round: a short training takes a part of an hour.": _rounded(0),
    "Do not round down: a short training takes a part of an hour.": _rounded(0, math.floor),
    "Do not round up: a short training takes a part of an hour.": _rounded(0, math.ceil),
    "Do not round, not even to one digit.": _rounded(1),
    "Do not round, not even to two digits.": _rounded(2),
    "`peak` is in TFLOP/s, 10¹² operations per second; 10⁹ would be GFLOP/s.": (
        _times(lambda used, method: 1e3)
    ),
    "`peak` is in TFLOP/s, 10¹² operations per second; 10¹⁵ would be PFLOP/s.": (
        _times(lambda used, method: 1e-3)
    ),
    "`peak` is in TFLOP/s, 10¹² operations per second, and an hour has 3,600 seconds.": (
        _times(lambda used, method: 3.6e15)
    ),
    "Divide by the utilisation, too, and by the 3,600 seconds of an hour.": (
        _times(lambda used, method: 3600 * used)
    ),
    "Divide by 3,600: that multiplies.": _times(lambda used, method: 3600**2),
    "a / b * c divides by b alone: put brackets around the divisor.": (
        _times(lambda used, method: 1e24 * used**2)
    ),
    "`utilisation` goes from 0 to 1, it is no percentage: do not multiply it by 100.": (
        _times(lambda used, method: 0.01)
    ),
    "`utilisation` goes from 0 to 1, it is no percentage: do not divide it by 100.": (
        _times(lambda used, method: 100)
    ),
    "LoRA skips the gradients of frozen weights, 2 · N · D; forward and backward remain.": (
        _times(lambda used, method: 0.5 if method == "lora" else 1)
    ),
    "Those are seconds: an hour has 3,600.": _times(lambda used, method: 3600),
    "Those are minutes: an hour has 60.": _times(lambda used, method: 60),
    "Those are days: give hours.": _times(lambda used, method: 1 / 24),
    "`peak` is in TFLOP/s: 10¹² operations per second.": _times(lambda used, method: 1e12),
    "No GPU reaches its peak: divide by the utilisation, too.": _times(lambda used, method: used),
    "Divide by the utilisation: a GPU that is used less needs longer.": (
        _times(lambda used, method: used**2)
    ),
    "2 · N · D is the forward pass alone.": (
        _times(lambda used, method: 2 / {"full": 6, "lora": 4}[method])
    ),
    "6 · N · D for full finetuning, 4 · N · D for LoRA.": (
        _times(lambda used, method: 1.5 if method == "lora" else 1)
    ),
    "4 · N · D is LoRA's; full finetuning has 6 · N · D.": (
        _times(lambda used, method: 1 if method == "lora" else 2 / 3)
    ),
    "6 · N · D for full finetuning, 4 · N · D for LoRA: it is the other way round.": (
        _times(lambda used, method: 1.5 if method == "lora" else 2 / 3)
    ),
}


# --- The same batch on other GPUs ----------------------------------------------------------------


@reference
def schedule(conversations: int, batch: int, gpus: int, rows: int) -> tuple[int, int]:
    accumulation, left = divmod(batch, gpus * rows)
    if left or not accumulation:
        raise ValueError(f"{gpus} GPUs with {rows} rows each cannot see exactly {batch}.")
    return accumulation, -(-conversations // batch)


def _draw_schedule(rng: random.Random, size: int) -> tuple[int, int, int, int]:
    """Numbers with which the batch can mostly be met."""
    gpus, rows = rng.randint(1, size), rng.randint(1, 2 * size)
    batch = gpus * rows * rng.randint(1, size) + (rng.random() < 0.2)
    conversations = batch * rng.randint(0, 5) + rng.choice([0, 1, batch // 3, batch - 1])
    return max(1, conversations), batch, gpus, rows


def _whole_numbers(found: Any) -> list[int]:
    """Accumulation and steps, which must be whole: TrainingArguments refuses 8.0."""
    items = _pair(found, PLAN)
    values = [number(value, name) for name, value in zip(PLAN, items, strict=True)]
    for name, item, value in zip(PLAN, items, values, strict=True):
        exact = isinstance(item, int | Rational | Decimal) and value == int(value)
        if not isinstance(value, int) and not exact:
            raise Unread(
                f"expected {name} as an int, found {value!r}: `//` and math.ceil give one, `/` and "
                "np.ceil do not."
            )
    return [int(value) for value in values]


def _pair(found: Any, names: tuple[str, str]) -> list:
    """The two values that a function returns."""
    wanted = f"({', '.join(names)})"
    items = sequence(found, what=wanted)
    if len(items) != 2:
        raise Unread(f"expected {wanted}, found {shown(found)}.")
    return items


@contextlib.contextmanager
def _named(names: tuple[str, str]) -> Generator[None]:
    """What is still open in a pair is called by its name, not by its place."""
    try:
        yield
    except CheckEnds as end:
        if end.verdict.passed is not None:
            raise
        said = end.verdict.message
        for number_, name in enumerate(names, 1):
            said = said.replace(f"item {number_}", name)
        raise CheckEnds(Verdict(None, said)) from end


PLAN = ("accumulation", "steps")
SCORES = ("form", "content")


@exercise(9, 2, "accumulation and steps that keep the batch on other GPUs")
def check_schedule(function: Any) -> Verdict:
    sizes = (1, 2, 4, 8, 16)
    with _named(PLAN):
        compare(
            function, schedule, BATCHES, _draw_schedule, BATCH_MISTAKES, _whole_numbers, sizes=sizes
        )
    return right("The same steps on any number of GPUs, and the learning rate holds.")


BATCHES = [
    ("One GPU sees 8 of 64, and the last, smaller step counts.", (1000, 64, 1, 8)),
    ("Also divide by the GPUs.", (1000, 64, 8, 8)),
    ("Where the last step is full, none is added.", (1024, 128, 4, 2)),
    ("The last step also counts, however small: round up.", (1025, 128, 4, 2)),
    ("Even one conversation takes a step.", (1, 64, 1, 8)),
    ("3 GPUs with room for 8 cannot see exactly 64.", (1000, 64, 3, 8)),
    ("4 GPUs with room for 4 see more than 8.", (1000, 8, 4, 4)),
]
BATCH_MISTAKES = {
    "The GPUs work at the same time: also divide by the GPUs.": (
        lambda conversations, batch, gpus, rows: (batch // rows, -(-conversations // batch))
    ),
    "The last, smaller step also counts: round up.": (
        lambda conversations, batch, gpus, rows: (
            schedule(conversations, batch, gpus, rows)[0],
            conversations // batch,
        )
    ),
    "The last, smaller step also counts: round up, not to the nearest.": (
        lambda conversations, batch, gpus, rows: (
            schedule(conversations, batch, gpus, rows)[0],
            round(conversations / batch),
        )
    ),
    "A last step is added even if the one before it was full: round up instead.": (
        lambda conversations, batch, gpus, rows: (
            schedule(conversations, batch, gpus, rows)[0],
            conversations // batch + 1,
        )
    ),
}


# --- Form and content, apart ---------------------------------------------------------------------

KEYS = ["subject", "relation", "answer"]
KENYA = {"subject": "Kenya", "relation": "capital", "answer": "Nairobi"}


@reference
def form_and_content(answer: str, value: str) -> tuple[bool, bool]:
    fields: Any = None
    with contextlib.suppress(ValueError):
        fields = json.loads(answer)
    form = isinstance(fields, dict) and list(fields) == KEYS
    form = form and all(isinstance(field, str) for field in fields.values())
    said = fields["answer"] if form else answer
    return form, value.lower() in said.lower()


def _draw_score(rng: random.Random, size: int) -> tuple[str, str]:
    """An answer that has the form, or nearly has it, and perhaps the right value."""
    value = rng.choice(["Nairobi", "Lomé", "+254", "Mexico City", "C"])
    said = rng.choice([value, value, value.upper(), f"It is {value.lower()}.", "Mombasa", "", "No"])
    fields: dict[str, Any] = {"subject": "Kenya", "relation": "capital", "answer": said}
    key, odd = rng.choice(KEYS), rng.choice([7, None, True, [value], {"is": value}, 0.5])
    written = json.dumps(fields, ensure_ascii=False)
    texts = [
        *[written] * 4,
        json.dumps(fields, ensure_ascii=False, indent=size),
        json.dumps(fields | {"subject": value, "relation": value.lower()}, ensure_ascii=False),
        json.dumps(fields | {key: odd}, ensure_ascii=False),
        json.dumps({k: v for k, v in fields.items() if k != key}, ensure_ascii=False),
        json.dumps(fields | {"note": value}, ensure_ascii=False),
        json.dumps(dict(rng.sample(list(fields.items()), 3)), ensure_ascii=False),
        json.dumps([fields] * size, ensure_ascii=False),
        json.dumps(rng.choice([said, odd]), ensure_ascii=False),
        f"Sure! {written}",
        f"{written}\nIt is {said}.",
        f"```json\n{written}\n```",
        str(fields),
        written[:-2],
        f"The capital of Kenya is {said}.",
        said * size,
    ]
    return rng.choice(texts), value


@exercise(9, 3, "whether an answer has the form, and whether it is right")
def check_form_and_content(function: Any) -> Verdict:
    edges = [(why[0].upper() + why[1:], (answer, "Nairobi")) for answer, why in ANSWERS.items()]
    read, sizes = functools.partial(_pair, names=SCORES), (1, 2, 3, 4, 5, 6, 7)
    with _named(SCORES):
        compare(function, form_and_content, edges + MORE, _draw_score, read=read, sizes=sizes)
    return right(f"All {len(edges)} answers, those that were meant to mislead included.")


def _json(**changed: Any) -> str:
    return json.dumps(KENYA | changed)


ANSWERS = {  # answer → what is special about it
    _json(): "the form, and the right value.",
    _json(answer="Mombasa"): "the form, and a wrong value.",
    _json(subject="Nairobi", answer="Mombasa"): "the right value in another field.",
    _json(answer="NAIROBI"): "the value in capitals: upper and lower case count as the same.",
    _json(answer="It is Nairobi."): "the value in a sentence in the field: look with `in`.",
    "The capital of Kenya is Nairobi.": "no form, the right value.",
    "the capital of kenya is nairobi.": "no form, the value in small letters.",
    "Sure! " + _json(): "text before the object.",
    _json() + " I hope it helps.": "text after the object.",
    _json(note="x"): "a fourth key.",
    json.dumps({"subject": "Kenya", "answer": "Nairobi"}): "a key is missing.",
    json.dumps(dict(reversed(KENYA.items()))): "the keys in another order.",
    json.dumps([KENYA]): "a list with the object in it.",
    str(KENYA): "single quotation marks are Python, no JSON: use `json.loads`.",
    _json(answer='"Nairobi", they say'): "quotation marks inside: `json.loads` reads them.",
    _json(answer="Nairob\u00ed"): "another letter than the value's, written as an escape.",
    json.dumps(KENYA, indent=2): "the form, on five lines.",
    json.dumps(KENYA, separators=(",", ":")): "the form, without spaces.",
    _json(answer=7): "all fields must be text: the answer is a number.",
    _json(subject=None): "all fields must be text: the subject is null.",
    _json(relation=["capital"]): "all fields must be text: the relation is a list.",
    "42": "a number alone.",
    "null": "null alone.",
    '"Nairobi"': "a text alone, in quotation marks.",
    "": "an empty answer.",
}
MORE = [
    (
        "The value may be a part of a word: look with `in`.",
        (_json(answer="Nairobian"), "Nairobi"),
    ),
    ("The value may be a part of a word here, too.", ("The Nairobians know it.", "Nairobi")),
    (
        "No form, because of a fourth key: then the value may stand anywhere in the answer.",
        (_json(answer="Mombasa", note="Nairobi"), "Nairobi"),
    ),
    (
        "In JSON \\u00e9 is é: look in the field, not in the text.",
        (json.dumps(KENYA | {"answer": "Lomé"}), "Lomé"),
    ),
    ("The value has two words.", (_json(answer="Mexico City"), "Mexico City")),
    ("The value has two words, without the form.", ("It is Mexico City.", "Mexico City")),
    ("The value is +254, with its sign.", (_json(answer="+254"), "+254")),
    ("254 is not +254: the whole value counts.", (_json(answer="254"), "+254")),
    ("254 is not +254, without the form either.", ("The calling code is 254.", "+254")),
]


# --- The capstone, rehearsed ---------------------------------------------------------------------

SETTINGS = ("lora_r", "learning_rate", "max_steps", "trained_parameters")
MOST_STEPS, MOST_RANK = 60, 64
FORM, CONTENT = 0.95, 0.75  # shares of the held-out answers
LONGEST_ANSWER = 64  # tokens


@exercise(9, 4, "a form that keeps the facts, trained and judged on held-out questions", answers=2)
def check_rehearsal(function: Any, plan: Any) -> Verdict:
    settings = _settings(plan)
    rows = _written(function)
    _refuse_other_count(settings)
    scores = _rehearsed(tuple(rows), tuple(settings.items()), training_seed())
    form, right_ = scores
    said = f"Of 200 held-out answers {form:.1%} have the form, {right_:.1%} the right value."
    if form < FORM:
        return wrong(
            f"{said} Expected the form in {FORM:.0%}: take more steps, or another learning rate."
        )
    if right_ < CONTENT:
        return wrong(
            f"{said} Expected the right value in {CONTENT:.0%}. Read some answers on `dev`. What "
            "stands before the value in the texts that the base has read? Then try other rates."
        )
    return right(f"{said} Now with a model of your own, and your own questions.")


def _settings(plan: Any) -> dict[str, Any]:
    given = mapping(plan, SETTINGS, "my_plan")
    where = {name: f"my_plan, {name}" for name in SETTINGS}
    found: dict[str, Any] = {
        name: whole(given[name], where[name])
        for name in ("lora_r", "max_steps", "trained_parameters")
    }
    found["learning_rate"] = float(number(given["learning_rate"], where["learning_rate"]))
    limits = {"lora_r": (0, MOST_RANK), "max_steps": (1, MOST_STEPS), "learning_rate": (0, 1)}
    for name, (least, most) in limits.items():
        if not least <= found[name] <= most:
            raise Unread(f"expected {least} to {most}, found {shown(found[name])}.", where[name])
    return found


def _written(function: Any) -> list[tuple[str, str]]:
    """Question and answer of each training row, as the student's function writes them."""
    from sftlib.data import read_facts

    found = []
    for row in read_facts("sft"):
        said = _said(function, row)
        form, content = form_and_content(said, row["value"])
        if not form:
            raise Unread(f"expected JSON of exercise 3's form, found {shown(said)}.", "my_answer")
        if not content or _other_value(json.loads(said)["answer"], row):
            raise Unread(
                f"expected {row['value']!r} in the field `answer`, and no other {row['relation']}, "
                f"found {shown(said)}.",
                "my_answer",
            )
        found.append((row["messages"][0]["content"], said))
    messages = [[{"role": "assistant", "content": said}] for _, said in dict.fromkeys(found)]
    refuse_leaks([{"messages": one} for one in messages], read_facts("heldout"))
    return found


def _said(function: Any, row: dict) -> str:
    """What the student's function writes for a row."""
    if not callable(function):
        raise Unread(f"expected a function of a row, found {shown(function)}.", "my_answer")
    outcome = call(function, row)
    if outcome.error is not None:
        error = f"{type(outcome.error).__name__}: {outcome.error}".removesuffix(": ")
        where = f" ({outcome.line})" if outcome.line else ""
        raise CheckEnds(wrong(f"my_answer: your function raised {error}{where}."))
    if outcome.value is None:
        raise CheckEnds(wrong("my_answer: found None. Did you forget `return`?"))
    return text(outcome.value, "my_answer")


@functools.cache
def _values(relation: str) -> frozenset[str]:
    from sftlib.data import read_facts

    known = [*read_facts("sft"), *read_facts("heldout")]
    return frozenset(row["value"] for row in known if row["relation"] == relation)


def _other_value(said: str, row: Any) -> bool:
    """Whether the field holds another value of the relation, beside the right one."""
    for name in (row["entity"], row["value"]):  # "Mexico City" is in Mexico
        said = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", " ", said, flags=re.IGNORECASE)
    words = rf"(?<!\w)(?:{'|'.join(map(re.escape, _values(row['relation'])))})(?!\w)"
    return re.search(words, said, re.IGNORECASE) is not None


def _refuse_other_count(settings: dict[str, Any]) -> None:
    from sftlib.models import load
    from sftlib.scale.memory import lora_parameters

    model, _ = load()
    rank, said = settings["lora_r"], settings["trained_parameters"]
    trained = lora_parameters(model, rank, "all-linear") if rank else model.num_parameters()
    if said != trained:
        other = model.num_parameters()
        hints = {other: " That is the whole model.", other + trained: " That counts the base, too."}
        raise Unread(
            f"expected the parameters that this plan trains, found {said:,}."
            f"{hints.get(said, ' Count them with `lora_parameters`, or `base.num_parameters()`.')}",
            "my_plan, trained_parameters",
        )


@functools.cache
def _rehearsed(rows: tuple, settings: tuple, seed: int) -> tuple[float, float]:
    """Shares of held-out answers with the form, and with the right value alone in its field."""
    from sftlib.data import read_facts
    from sftlib.evaluate import answers
    from sftlib.experiments.sweep import lora_config
    from sftlib.models import load
    from sftlib.training import tune

    plan = dict(settings)
    rank = plan["lora_r"]
    adapter = lora_config(r=rank, lora_alpha=2 * rank) if rank else None
    data = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in rows
    ]
    model, tokenizer = load()
    trainer = tune(
        model,
        tokenizer,
        data,
        peft_config=adapter,
        learning_rate=plan["learning_rate"],
        max_steps=plan["max_steps"],
        seed=seed,
    )
    held_out = read_facts("heldout")
    asked = [row["messages"][:-1] for row in held_out]
    trained = cast("PreTrainedModel", trainer.model)  # transformers annotates any module
    given = answers(trained, tokenizer, asked, max_new_tokens=LONGEST_ANSWER)
    forms, hits = 0, 0
    for answer, row in zip(given, held_out, strict=True):
        form, content = form_and_content(answer.text, row["value"])
        forms += form
        hits += form and content and not _other_value(json.loads(answer.text)["answer"], row)
    return forms / len(held_out), hits / len(held_out)
