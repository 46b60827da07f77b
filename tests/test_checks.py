"""Exercise checks: the solution passes, an empty answer is noticed, a wrong one gets a hint."""

import json
import math
import re

from sftlib import checks
from sftlib.chat import CHATML, LLAMA3, encode
from sftlib.checks import chatml
from sftlib.models import TINY_BASE

import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer

from tests.test_attacks import ATTACKS

TOKENIZER = AutoTokenizer.from_pretrained(TINY_BASE)


def validate(question, answer):
    texts = question.strip(), answer.strip()
    found = ["empty"] if not texts[1] else []
    found += ["repeats"] if texts[0].lower() == texts[1].lower() else []
    return found + (["control token"] if "<|" in question + answer else [])


def parse(text, keys=(("question", "answer"), ("instruction", "response"))):
    try:
        data = json.loads(re.search(r"[\[{].*[\]}]", text, re.DOTALL)[0])
    except (ValueError, TypeError):
        return []
    items = data if isinstance(data, list) else [data]
    return [(i[q], i[a]) for i in items for q, a in keys if q in i]


def changed(*replacements):
    """Llama 3's template with something replaced."""
    text = LLAMA3
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    return text


POSITIONS = [[11, 12, 13, 14, 15, 28, 29, 30, 31], [11, 12, 13, 14]]
BUGS = {
    "A": "labels shifted",
    "B": "end not learned",
    "C": "template twice",
    "D": "padding learned",
    "E": "question learned",
}


def adapted(x, w, a, b, alpha):
    return x @ w.T + alpha / len(a) * (x @ a.T @ b.T)


def scaled(factor):
    return lambda x, w, a, b, alpha: x @ w.T + factor(alpha, len(a)) * (x @ a.T @ b.T)


MEMORY = {"full": 208, "LoRA": 26.96, "QLoRA": 7.67}
RUNS = pd.DataFrame(
    {
        "learning_rate": [1e-4, 1e-4, 1e-3, 1e-3, 1e-2, 1e-2],
        "dev": [0.5, 0.6, 0.9, 1.0, 0.9, 0.9],
        "heldout": [0.5, 0.5, 0.9, 0.92, 0.98, 0.98],
    }
)
FAIR = {"full": (1e-3, 0.91), "LoRA": (1e-3, 0.91)}
START, END = "{% generation %}", "{% endgeneration %}"
BEGIN = "{{ '<|begin_of_text|>' }}"
ZERO = {1: 61.75, 2: 37.375, 3: 13.0}
CONFIG = {
    "eval_strategy": "epoch",
    "warmup_steps": 0.03,
    "dataset_text_field": "content",
    "max_length": 512,
    "packing": True,
}
AS_BEFORE = {"learning_rate": 5e-5, "bf16": False, "activation_checkpointing": False}
AS_BEFORE |= {"gradient_checkpointing": False, "logging_steps": 500}
TRAINER = {"train_dataset": "data", "eval_dataset": "eval_data", "processing_class": "tokenizer"}
STAGES = {"small": 0, "accumulating": 1, "wide": 2, "large": 3}


def completion_labels(prompt, together, max_length):
    start = next(
        (i for i, (a, b) in enumerate(zip(prompt, together, strict=False)) if a != b), len(prompt)
    )
    labels = ([-100] * start + together[start:])[:max_length]
    return labels if set(labels) != {-100} else None


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -torch.nn.functional.logsigmoid(torch.tensor(margin))


def sigmoid(x):
    return torch.sigmoid(torch.tensor(x)).item()


def advantages(rewards, method, epsilon=1e-4, correction=1):
    rewards = torch.tensor(rewards)
    if method == "RLOO":
        return (rewards - rewards.mean()) * len(rewards) / (len(rewards) - 1)
    return (rewards - rewards.mean()) / (rewards.std(correction=correction) + epsilon)


CHOICE = {
    "frozen": "best of n",
    "pairs": "DPO",
    "today": "SFT on the best samples",
    "further": "GRPO",
}


def without(arguments: dict, *names: str) -> dict:
    return {name: value for name, value in arguments.items() if name not in names}


def repaired(name: str = "A", **changed) -> dict:
    """Lesson 5's configurations, right; one of them with other keys (None removes a key)."""
    batch = {"train_micro_batch_size_per_gpu": 4}
    configs = {
        "A": {**batch, "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
        "B": {
            **batch,
            "train_batch_size": 64,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": 2},
        },
        "C": {**batch, "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
    }
    found = configs[name] | changed
    configs[name] = {key: value for key, value in found.items() if value is not None}
    return configs


SIGNS = dict.fromkeys("BHJKL", "nothing unusual") | {
    **{"A": "unstable", "C": "not a number", "D": "starts near chance", "E": "spike"},
    **{"F": "unstable", "G": "no gradient", "I": "overfitting", "M": "out of scale"},
    **{"N": "barely learning", "O": "unstable", "P": "overfitting"},
    **{"Q": "plateau", "R": "plateau"},
}


def rate(step, steps, warmup, peak):
    """As Transformers has it; see test_logs.py."""
    if step < warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def late(change):
    """A schedule that has the right warm-up, and then another shape."""
    return lambda s, n, w, p: p * s / w if s < w else change(s, n, w, p)


def hours(n, d, peak, used, method):
    return {"full": 6, "lora": 4}[method] * n * d / (peak * 1e12 * used) / 3600


def schedule(conversations, batch, gpus, rows):
    if batch % (gpus * rows):
        raise ValueError("not exactly")
    return batch // (gpus * rows), -(-conversations // batch)


def form_and_content(text, value, keys=("subject", "relation", "answer")):
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    form = isinstance(found, dict) and tuple(found) == keys
    form = form and all(isinstance(field, str) for field in found.values())
    return form, value.lower() in (found["answer"] if form else text).lower()


RIGHT = [
    (checks.check_diagnosis, (SIGNS,)),
    (checks.check_learning_rate, (rate,)),
    (checks.check_train_output, (4000, 32, 180.0)),
    (checks.check_gpu_hours, (hours,)),
    (checks.check_schedule, (schedule,)),
    (checks.check_form_and_content, (form_and_content,)),
]
EMPTY = [
    (checks.check_diagnosis, (dict.fromkeys(SIGNS, ...),)),
    (checks.check_learning_rate, (...,)),
    (checks.check_learning_rate, (lambda step, steps, warmup, peak: ...,)),
    (checks.check_train_output, (..., ..., ...)),
    (checks.check_gpu_hours, (...,)),
    (checks.check_gpu_hours, (lambda *_: ...,)),
    (checks.check_schedule, (lambda *_: (..., ...),)),
    (checks.check_form_and_content, (lambda *_: (..., ...),)),
]
WRONG = [  # check, arguments, a word of the hint
    (checks.check_gpu_hours, (lambda *a: 3600 * hours(*a),), "seconds"),
    (checks.check_gpu_hours, (lambda *a: 1e12 * hours(*a),), "TFLOP/s"),
    (checks.check_gpu_hours, (lambda *a: a[3] * hours(*a),), "No GPU reaches"),
    (checks.check_gpu_hours, (lambda *a: a[3] ** 2 * hours(*a),), "used less needs longer"),
    (checks.check_gpu_hours, (lambda *a: hours(*a[:4], "full"),), "4 · N · D for LoRA"),
    (checks.check_gpu_hours, (lambda *a: hours(*a) / 3,), "forward pass alone"),
    (checks.check_gpu_hours, (lambda *a: hours(*a) + 1,), "expected"),
    (checks.check_gpu_hours, (lambda *a: "two",), "a number of hours"),
    (checks.check_schedule, (lambda c, b, g, r: (b // r, -(-c // b)),), "divide by the GPUs"),
    (checks.check_schedule, (lambda c, b, g, r: (b // r // g, c // b),), "round up"),
    (checks.check_schedule, (lambda c, b, g, r: (max(1, b // r // g), -(-c // b)),), "exactly 64"),
    (checks.check_schedule, (lambda *_: 3,), "(accumulation, steps)"),
    (checks.check_schedule, (lambda *_: (1, 1),), "expected (8, 16)"),
    (checks.check_form_and_content, (lambda t, v: ("{" in t, v in t),), "another field"),
    (checks.check_form_and_content, (lambda t, v: 1 / 0,), "raised"),
    (checks.check_form_and_content, (lambda t, v: True,), "(form, content)"),
    (
        checks.check_form_and_content,
        (lambda t, v: (form_and_content(t, v)[0] or t[0] == "S", form_and_content(t, v)[1]),),
        "text before the object",
    ),
    (checks.check_diagnosis, (["A"],), "found list"),
    (checks.check_diagnosis, (SIGNS | {"Z": "spike"},), "found Z"),
    (checks.check_diagnosis, (SIGNS | {"C": "diverged"},), "C: expected one of not a number"),
    (checks.check_diagnosis, (SIGNS | {"C": ..., "D": ...},), "16 of 18 are right. Still open: C"),
    (checks.check_diagnosis, (SIGNS | {"H": "plateau"},), "17 of 18 are right. Look again at H."),
    (checks.check_diagnosis, (SIGNS | {"H": "plateau"},), "If none does"),
    (checks.check_diagnosis, (SIGNS | {"M": "spike", "P": ...},), "with the evaluation loss"),
    (checks.check_learning_rate, (late(lambda s, n, w, p: p * (n - s) / (n - w)),), "in a line"),
    (checks.check_learning_rate, (late(lambda s, n, w, p: rate(s, n, 0, p)),), "warm-up ends"),
    (checks.check_learning_rate, (lambda s, n, w, p: rate(max(s, w), n, w, p),), "is missing"),
    (checks.check_learning_rate, (late(lambda s, n, w, p: 2 * rate(s, n, w, p) - p),), "Half of"),
    (checks.check_learning_rate, (lambda s, n, w, p: rate(s + 1, n, w, p),), "count from 0"),
    (checks.check_learning_rate, (lambda s, n, w, p: p,), "expected 0.000000, found 0.004000"),
    (checks.check_learning_rate, (lambda s: 1,), "raised TypeError"),
    (checks.check_learning_rate, (lambda *a: "1",), "expected a number, found '1'"),
    (
        checks.check_learning_rate,
        (lambda s, n, w, p: rate(s, n, w, p) * s / s if w == 0 else rate(s, n, w, p),),
        "Without warm-up",
    ),
    (checks.check_train_output, (12000, 32, 180), "in each epoch"),
    (checks.check_train_output, (4000, 8, 180), "samples per second"),
    (checks.check_train_output, (4000, 32, 540), "three epochs"),
    (checks.check_train_output, (4000, 32, 1080), "the 6 is left"),
    (checks.check_train_output, (4000, 31, 180), "rows_per_step: 31 does not agree"),
    (checks.check_train_output, (4000, ..., 180), "rows_per_step is still open"),
    (checks.check_train_output, ("4000", 32, 180), "found '4000'"),
]


@pytest.mark.parametrize(("check", "arguments"), RIGHT)
def test_the_solution_passes(check, arguments):
    verdict = check(*arguments)
    assert verdict.passed is True, verdict
    assert repr(verdict).startswith("✓ ")


@pytest.mark.parametrize(("check", "arguments"), EMPTY)
def test_an_empty_answer_is_called_not_attempted(check, arguments):
    verdict = check(*arguments)
    assert verdict.passed is None
    assert repr(verdict).startswith(("○ Not attempted", "○ Still open"))


@pytest.mark.parametrize(("check", "arguments", "hint"), WRONG)
def test_a_wrong_answer_gets_its_likely_cause(check, arguments, hint):
    verdict = check(*arguments)
    assert verdict.passed is False
    assert hint in verdict.message


def test_every_check_has_right_empty_and_two_wrong_answers():
    every = {value for name, value in vars(checks).items() if name.startswith("check_")}
    every -= {attacks.check for attacks in ATTACKS}
    assert {check for check, _ in RIGHT} == every
    assert {check for check, _ in EMPTY} == every
    for check in every:
        assert sum(wrong is check for wrong, _, _ in WRONG) >= 2


def test_each_batch_of_lesson_3_has_the_bug_of_its_letter(tokenizer):
    tokenizer.chat_template = CHATML
    found = checks.broken_batches(tokenizer)
    whole = encode([chatml.QUESTION, chatml.ANSWER], tokenizer)
    ids, mask = whole["input_ids"], whole["assistant_masks"]
    learned = [i for i, is_learned in zip(ids, mask, strict=True) if is_learned]
    seen = {
        letter: [label for label in batch["labels"] if label != -100]
        for letter, batch in found.items()
    }
    assert all(len(batch["input_ids"]) == len(batch["labels"]) for batch in found.values())
    assert seen["A"] == learned and found["A"]["labels"].index(learned[0]) == mask.index(1) - 1
    assert seen["B"] == learned[:-1] and seen["C"] == learned and seen["E"] == ids
    assert found["C"]["input_ids"][-len(learned) :] == found["C"]["labels"][-len(learned) :]
    assert tokenizer.decode(found["C"]["input_ids"]).count("<|im_start|>user") == 2
    assert seen["D"] == learned + [tokenizer.pad_token_id] * 3
