"""The exercises of lesson 6."""

from __future__ import annotations

import contextlib
import inspect
import random
import re
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from sftlib.checks.exercise import exercise
from sftlib.checks.functions import call, compare, reference
from sftlib.checks.reading import Unread, described, number, same, shown
from sftlib.checks.verdict import CheckEnds, Verdict, right, wrong

if TYPE_CHECKING:
    import pandas

# --- Labels for a completion ---------------------------------------------------------------------


@reference
def completion_labels(prompt: list[int], together: list[int], max_length: int) -> list[int] | None:
    pairs = zip(prompt, together, strict=False)
    shorter = min(len(prompt), len(together))
    start = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
    labels = ([-100] * start + together[start:])[:max_length]
    return labels if any(label != -100 for label in labels) else None


def _draw_completion(rng: random.Random, size: int) -> tuple[list[int], list[int], int]:
    """A prompt, the same with a completion, of few different ids, and a length."""
    prompt = [rng.randint(0, 9) for _ in range(size)]
    kept = size - (rng.random() < 0.4) * rng.randint(0, min(size, 2))  # the rest was joined
    together = prompt[:kept] + [rng.randint(0, 9) for _ in range(rng.randint(1, size + 1))]
    return prompt, together, rng.randint(1, len(together) + 3)


@exercise(6, 1, "labels of a prompt with its completion, cut to a length")
def check_completion_labels(function: Any) -> Verdict:
    compare(function, completion_labels, LABEL_EDGES, _draw_completion, LABEL_MISTAKES)
    return right("That is what SFTTrainer does before the first step.")


P, T = [5, 6, 7], [5, 6, 7, 8, 9]
LABEL_EDGES = [
    ("−100 where the two begin alike, the ids after that.", (P, T, 10)),
    (
        "A tokenizer may join the prompt's last token with the completion's first: learn from "
        "where the two lists differ.",
        (P, [5, 6, 11, 9], 10),
    ),
    (
        "A token of the prompt may come again in the answer, and is learned there.",
        (P, [5, 6, 7, 8, 6, 9], 10),
    ),
    (
        "The completion begins at the first difference: all tokens from there on are learned.",
        ([5, 6, 7, 8], [5, 9, 7, 8, 1], 10),
    ),
    ("The labels are cut, too.", (P, T, 4)),
    ("If nothing is left to learn, return None.", (P, T, 3)),
    (
        "Even below the prompt's length something may be left: look whether any label is not −100.",
        (P, [5, 11, 12], 3),
    ),
    ("0 is a token, too, and may be the only one that is learned.", (P, [5, 6, 7, 0], 10)),
    ("`together` may end before the prompt does.", ([5, 6, 7, 8], [5, 11], 10)),
    ("`together` may be the prompt's beginning: nothing is left to learn.", (P, [5, 6], 10)),
    ("The prompt may be empty: then all of `together` is learned.", ([], [8, 9], 10)),
    ("`together` may be empty: nothing is left to learn.", (P, [], 10)),
    ("Both may be empty: nothing is left to learn.", ([], [], 10)),
]


def _labels(
    start: Callable[[list[int], list[int]], int] = lambda p, t: len(p),
    ignored: int = -100,
    cut: bool = True,
) -> Callable:
    """Labels with a mistake: where the completion begins, with what it is hidden, or no cut."""
    return lambda p, t, n: ([ignored] * start(p, t) + t[start(p, t) :])[: n if cut else None]


LABEL_MISTAKES = {
    "Labels stand beside the ids: as many, with −100 for the prompt.": lambda p, t, n: t[len(p) :],
    "That learns the prompt, too.": lambda p, t, n: t,
    "That learns the prompt, and cuts.": lambda p, t, n: t[:n],
    "That learns the prompt: it is the other way round.": (
        lambda p, t, n: p + [-100] * (len(t) - len(p))
    ),
    "0 is a token: the number that is not counted is −100.": _labels(ignored=0, cut=False),
    "Do not shift: the trainer compares each position with the next.": (
        lambda p, t, n: [-100] * (len(p) - 1) + t[len(p) :] + [-100]
    ),
    "A tokenizer may join the prompt's last token with the completion's first: learn from where "
    "the two lists differ.": _labels(cut=False),
}


# --- How many steps? -----------------------------------------------------------------------------


@exercise(6, 2, "optimizer steps of Alpaca's training, and its warm-up", answers=2)
def check_training_steps(steps: Any, warmup: Any) -> Verdict:
    found, warm = number(steps, "steps"), number(warmup, "warmup")
    causes = {
        407: "That is one epoch: there are three.",
        1219: "The last, smaller step of each epoch counts: round up before you multiply.",
        1218: "The last, smaller step of each epoch counts: round up, not down.",
        3 * 1626: (
            "That is 32 rows a step: either the batch of 4 or the accumulation of 4 is missing. "
            "Both count."
        ),
        3 * 3251: "That is 16 rows a step, of one GPU: eight of them work on each step.",
        3 * 6501: "That is 8 rows a step: each GPU has a batch of 4, and accumulates 4 of them.",
        3 * 13001: "That is 4 rows a step: batch, GPUs and accumulation all count.",
        156_006: "That is rows: 128 of them make a step.",
    }
    if found != 1221:
        fallback = "How many rows does a step see, and how many steps has one epoch?"
        return wrong(causes.get(found, f"{found:,} are not the steps. {fallback}"))
    if warm != 37:
        if 36 <= warm < 37:
            return wrong("Transformers rounds the fraction up.")
        if warm in (3, 0.03):
            return wrong("That is the share. How many steps of 1,221 are it?")
        return wrong(f"3 % of {found:,}, rounded up, is not {warm:g}.")
    return right("1,221 steps of 128 rows, the first 37 of them warm-up.")


# --- Repair an old tutorial ----------------------------------------------------------------------

MOVED = {"max_length", "packing", "dataset_text_field"}  # from the trainer to its config
RENAMED = {
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "tokenizer": "processing_class",
    "warmup_ratio": "warmup_steps, which below 1 is a fraction",
}
CONFIG = {
    "eval_strategy": "epoch",
    "warmup_steps": 0.03,
    "dataset_text_field": "content",
    "max_length": 512,
    "packing": True,
}
# Old defaults that a right answer may name, because today's are others.
OPTIONAL = {
    "packing_strategy": "wrapped",
    "learning_rate": 5e-5,
    "bf16": False,
    "activation_checkpointing": False,
    "gradient_checkpointing": False,
}
NOT_TRAINING = {"use_cpu", "output_dir", "report_to", "run_name", "disable_tqdm", "logging_steps"}
TRAINER = {"train_dataset": "data", "eval_dataset": "eval_data", "processing_class": "tokenizer"}
WANTED = CONFIG | TRAINER
# A name such as config, training_args or self.config; or SFTConfig, called with arguments.
A_CONFIG = re.compile(
    r"([a-z_]\w*\.)*[a-z_]*(config|cfg|args|arguments)\w*|(trl\.)?SFTConfig\(.*[*=].+\)"
)


@exercise(6, 3, "an old tutorial's call, with today's arguments", answers=2, none_is_open=False)
def check_modern_call(config_arguments: Any, trainer_arguments: Any) -> Verdict:
    from trl import SFTConfig, SFTTrainer

    config_arguments = _arguments(config_arguments, "SFTConfig")
    trainer_arguments = _arguments(trainer_arguments, "SFTTrainer")
    if moved := MOVED & set(trainer_arguments):
        return wrong(f"{', '.join(sorted(moved))}: no longer the trainer's; it moved to SFTConfig.")
    for name in (*config_arguments, *trainer_arguments):
        if name in RENAMED:
            return wrong(f"{name} is now called {RENAMED[name]}.")
    of_config = _without_defaults(config_arguments, SFTConfig, NOT_TRAINING)
    of_trainer = _without_defaults(trainer_arguments, SFTTrainer, ("model", "args"))
    if cause := (
        _difference(of_config, CONFIG, "SFTConfig")
        or _wrong_objects(trainer_arguments, config_arguments)
        or _difference(of_trainer, TRAINER, "SFTTrainer")
    ):
        return wrong(cause)
    settings: dict[str, Any] = {**config_arguments, "use_cpu": True, "bf16": False}
    made = call(lambda: SFTConfig(**settings))
    if made.error:
        return wrong(f"SFTConfig says {type(made.error).__name__}: {made.error}")
    return right("TRL takes it.")


TWO = "two dictionaries, for SFTConfig and for SFTTrainer"


def _arguments(given: Any, whose: str, wanted: str = TWO) -> dict[str, Any]:
    """The student's arguments, of a dictionary or a Series."""
    if hasattr(given, "to_dict") and not hasattr(given, "columns"):
        given = given.to_dict()
    if not isinstance(given, Mapping):
        raise Unread(f"expected {wanted}; found for {whose} {described(given)}.")
    if odd := [name for name in given if not isinstance(name, str)]:
        raise Unread(f"expected names of arguments as keys for {whose}, found {shown(odd[0])}.")
    return dict(given)


def _without_defaults(arguments: Mapping, callee: Callable, optional: Collection[str]) -> dict:
    """The arguments that change something: without TRL's defaults and those that are optional."""
    defaults = {name: p.default for name, p in inspect.signature(callee).parameters.items()}
    unchanged = {name: value for name, value in (defaults | OPTIONAL).items() if name not in WANTED}
    return {
        name: value
        for name, value in arguments.items()
        if name not in optional and (name not in unchanged or not _equal(value, unchanged[name]))
    }


def _wrong_objects(trainer: Mapping, config: Mapping) -> str:
    """What is wrong with the trainer's model and args; empty if nothing is."""
    if missing := [name for name in ("model", "args") if name not in trainer]:
        return (
            f"SFTTrainer: {', '.join(missing)} is missing. Without `args`, the settings never "
            "reach the trainer; without `model`, it has nothing to train. Write 'model', and "
            "'config' for the SFTConfig."
        )
    if not _equal(trainer["model"], "model"):
        return f"SFTTrainer: model should be 'model', found {shown(trainer['model'])}."
    args = trainer["args"]
    if type(args).__name__ == "SFTConfig":
        args = {name: getattr(args, name) for name in config}
    named = isinstance(args, str) and A_CONFIG.fullmatch(args.strip())
    if not named and not (isinstance(args, Mapping) and _equal(dict(args), dict(config))):
        return f"SFTTrainer: args should name the SFTConfig, such as 'config'; found {shown(args)}."
    return ""


def _difference(found: dict, expected: dict, whose: str) -> str:
    """How arguments differ from the right ones; empty if they do not."""
    if extra := sorted(set(found) - set(expected)):
        others = [name for name in extra if name in WANTED or name in ("model", "args")]
        if others:
            other = "SFTTrainer" if whose == "SFTConfig" else "SFTConfig"
            return f"{whose}: {', '.join(others)} belongs to {other}."
        if extra[0] in OPTIONAL:
            return (
                f"{whose}: {extra[0]}={shown(found[extra[0]])} does not say the same as the old "
                f"call, in which it was {OPTIONAL[extra[0]]!r}: write that, or nothing."
            )
        return f"{whose}: {', '.join(extra)} was not in the old call."
    for name, value in expected.items():
        if name not in found:
            return f"{whose}: {name} is missing."
        if not _equal(found[name], value):
            return f"{whose}: {name} should be {value!r}, found {shown(found[name])}."
    return ""


def _equal(found: Any, expected: Any) -> bool:
    """Whether two arguments are the same, of whatever types they are."""
    with contextlib.suppress(Exception):
        if found is expected or bool(found == expected):
            return True
        return same(found, expected)
    return False


# --- Which setting gives this loss curve? --------------------------------------------------------

NEAR = 2e-3  # nats per token: other thread counts and processors differ by less
WITHOUT_EFFECT = {"output_dir", "use_cpu", "report_to", "disable_tqdm", "save_strategy"}


def loss_curves() -> pandas.DataFrame:
    """Lesson 6, exercise 4: the losses of the usual training, and those of the given one."""
    import pandas

    curves = {"usual": _curve(None), "given": _curve(("warmup_steps", _hidden()))}
    steps = pandas.RangeIndex(1, len(curves["usual"]) + 1, name="step")
    return pandas.DataFrame(curves, index=steps)


def _hidden() -> int:
    from sftlib.experiments.loss_curve import HIDDEN

    return HIDDEN["warmup_steps"]


@cache
def _curve(change: tuple[str, Any] | None) -> tuple[float, ...]:
    from sftlib.experiments.loss_curve import curve

    return tuple(curve(dict([change]) if change else None))


@exercise(6, 4, "the one setting that was changed in a given loss curve")
def check_loss_curve(change: Any) -> Verdict:
    name, value = _one_setting(change)
    try:
        found = _curve((name, value))
    except Exception as error:
        return wrong(f"With {name}={shown(value)} TRL says {type(error).__name__}: {error}")
    given, usual = _curve(("warmup_steps", _hidden())), _curve(None)
    if len(found) != len(given):
        return wrong(f"Your training has {len(found)} losses, the given one {len(given)}.")
    apart = [abs(a - b) for a, b in zip(found, given, strict=True)]
    if max(apart) <= NEAR:
        return right(f"Your losses are at most {max(apart):.1g} from the given ones.")
    if max(abs(a - b) for a, b in zip(found, usual, strict=True)) <= NEAR:
        return wrong(f"{name}={shown(value)} gives the usual curve. It changes no loss here.")
    step = next(number for number, one in enumerate(apart, 1) if one > NEAR)
    return wrong(
        f"Your curve leaves the given one at step {step}: a loss of {found[step - 1]:.3f}, where "
        f"{given[step - 1]:.3f} is wanted. {_first_difference(step)}"
    )


def _first_difference(step: int) -> str:
    """What follows from the step at which a curve leaves the given one."""
    if step == 1:
        return (
            "The first loss is that of the untouched model: it shows the rows, the mask and the "
            "precision, and the given curve begins like the usual one."
        )
    if step == 2:
        return (
            "In the given curve the second loss is the usual one, so its first step changed "
            "nothing, either."
        )
    return (
        f"The losses before it are right. So your updates are right up to step {step - 2}, and "
        f"that of step {step - 1} is not."
    )


def _one_setting(change: Any) -> tuple[str, Any]:
    """Name and value of the one setting that differs from the usual training.

    Raises:
        CheckEnds: there is none, or several; SFTConfig refuses it; or it does not touch the losses.
    """
    from sftlib.experiments.loss_curve import SETTINGS, config

    wanted = 'a dictionary such as {"learning_rate": 1e-4}'
    if type(change).__name__ == "SFTConfig":  # it names all settings, not the one that was changed
        raise Unread(f"expected {wanted}, found an SFTConfig.")
    arguments = _arguments(change, "SFTConfig", wanted)
    changed = {k: v for k, v in arguments.items() if not (k in SETTINGS and _equal(v, SETTINGS[k]))}
    if len(changed) != 1:
        names = ", ".join(changed) or "none"
        raise CheckEnds(
            wrong(f"Expected one setting that is not the usual one, found {len(changed)}: {names}.")
        )
    ((name, value),) = changed.items()
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if name in WITHOUT_EFFECT:
        raise CheckEnds(wrong(f"{name} does not touch the losses. Find a setting that does."))
    made = call(lambda: config({name: value}))
    if made.error:
        raise CheckEnds(wrong(f"SFTConfig says {type(made.error).__name__}: {made.error}"))
    try:
        hash(value)
    except TypeError:
        raise CheckEnds(wrong(f"{name}: expected one value, found {described(value)}.")) from None
    return name, value
