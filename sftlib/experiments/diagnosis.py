"""What a log says about a training: signs that something is wrong, in plain words.

Each rule looks for one sign. The thresholds were chosen on some of the trainings of `failures` and
tested on others (`tools/stored_runs/failures.py`, lesson 8). They are rules of thumb, except for
the bound in `_out_of_scale`, which can be proven.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from sftlib.experiments.logs import log_lines, table

if TYPE_CHECKING:
    import pandas

HEALTHY = "nothing unusual"
SIGNS = {
    "not a number": "the loss or grad_norm is NaN or infinite",
    "no gradient": "grad_norm is 0",
    "out of scale": "the training loss is a multiple of the evaluation loss all along",
    "starts near chance": "the first loss is near ln(vocabulary), the cost of guessing, or above",
    "unstable": "the loss rises clearly above where it began",
    "barely learning": "the loss falls by less than a sixth",
    "plateau": "the loss falls, and then stays where much is still guessed wrong",
    "spike": "one step stands out, and the next is as before",
    "overfitting": "the evaluation loss rises, or stays well above the training loss",
    HEALTHY: "none of these",
}
"""What `diagnose` looks for."""
MIN_LOSSES = 8  # with fewer logged losses, a trend cannot be told from noise
WRONG_GUESS = 12  # nats: in a sound model, a token that is guessed wrong costs less


class Sign(str):
    """A sign that `diagnose` found. It is a text; an exercise can tell it from a reader's own."""


class Finding(NamedTuple):
    """A row of `diagnose`; `remedy` becomes its column `try`, which is no name in Python."""

    sign: str
    sees: str
    because: str
    remedy: str


def diagnose(log: Any) -> pandas.DataFrame:
    """Signs of trouble in a log, in plain words.

    Many failures leave no sign in a log: a model that never learned to stop, a template that is not
    the one in use, evaluation rows among the training rows. Only answers to held-out questions show
    these.

    Args:
        log: as for `table`. It shows more if it also holds evaluation losses and TRL's `entropy`
            and `mean_token_accuracy`.

    Returns:
        One row per sign, indexed by its name: what the rule `sees`, what the cause may be
        (`because`), and what to `try`. If no rule finds a sign: one row, "nothing unusual".

    Raises:
        ValueError: `log` is no log (see `table`).
    """
    import pandas

    found = list(_findings(log)) or [_HEALTHY]
    signs = pandas.Index([Sign(each.sign) for each in found], dtype=object, name="sign")
    columns = ["sees", "because", "try"]
    return pandas.DataFrame([each[1:] for each in found], columns=columns, index=signs)


_HEALTHY = Finding(
    HEALTHY,
    "Losses fall and settle; gradients, learning rate and evaluation go with them.",
    "No rule found a sign.",
    "Ask held-out questions, as they will be asked: a log does not show everything.",
)


def _findings(log: Any) -> Iterator[Finding]:
    if broken := _not_a_number(log_lines(log)):
        yield broken
        return  # after a NaN, the log means nothing
    rows = table(log)
    for rule in (_no_gradient, _out_of_scale, _starts_near_chance):
        if found := rule(rows):
            yield found
            return  # the other rules would only find its consequences
    if len(rows.loss.dropna()) < MIN_LOSSES:
        yield _short(rows)
        return
    if unstable := _unstable(rows):
        yield unstable
        return
    trend = _barely_learning(rows) or _plateau(rows)
    yield from filter(None, (trend, _spike(rows), _overfitting(rows)))


def _not_a_number(lines: list[dict]) -> Finding | None:
    for line in lines:
        for name in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(line.get(name, 0)):
                return Finding(
                    "not a number",
                    f"{name} is {line[name]} at step {line['step']}.",
                    "A division by zero (a batch in which no label counts), an overflow (fp16, a "
                    "learning rate that is too high) or a broken input. From then on all weights "
                    "are broken. The logged loss may look fine: Transformers replaces a NaN by a "
                    "low number or 0, unless logging_nan_inf_filter=False.",
                    "Look at the labels of that step's batch; try bf16 instead of fp16, or a lower "
                    "learning rate. Start again from a checkpoint before that step.",
                )
    return None


def _no_gradient(rows: pandas.DataFrame) -> Finding | None:
    zero = _values(rows, "grad_norm") < 1e-8
    if not len(zero) or zero.mean() <= 0.5:
        return None
    return Finding(
        "no gradient",
        f"grad_norm is 0 in {zero.sum()} of {len(zero)} steps.",
        "Nothing is trained: an adapter was loaded without is_trainable=True, all parameters have "
        "requires_grad=False, or no label counts.",
        "Count the parameters with requires_grad before you train.",
    )


def _out_of_scale(rows: pandas.DataFrame) -> Finding | None:
    cause = (
        "It is a sum where a mean was meant, for instance over the batches of an accumulated step. "
        "Adam hardly minds, but clipping, SGD and every comparison with other runs do."
    )
    remedy = "Divide by all tokens of the step (num_items_in_batch); update Transformers and TRL."
    # If the likeliest token is the right one, its loss is the lowest of all −log p: at most their
    # mean, the entropy. Only tokens that are guessed wrong can cost more.
    loss, accuracy, entropy = (_values(rows, name) for name in ("loss", *_TRL_COLUMNS))
    if len(loss) == len(accuracy) == len(entropy):
        too_high = (accuracy >= 0.5) & (loss > entropy + WRONG_GUESS * (1 - accuracy))
        if too_high.mean() > 0.5:
            step = too_high[too_high].index[-1]
            return Finding(
                "out of scale",
                f"At step {step} the loss is {loss[step]:.2f}, though {accuracy[step]:.0%} of the "
                f"tokens are guessed rightly, with an entropy of {entropy[step]:.2f}.",
                f"A loss per token cannot be so high there. {cause}",
                remedy,
            )
    # Without these columns: both losses are means per token, so they must be of the same size.
    both = rows[["loss", "eval_loss"]].dropna() if "eval_loss" in rows else rows[:0]
    if len(both) >= 3 and (both.loss > 2.5 * both.eval_loss).all():
        ratio = (both.loss / both.eval_loss).median()
        return Finding(
            "out of scale",
            f"The training loss is {ratio:.1f} times the evaluation loss, at each evaluation.",
            cause,
            remedy,
        )
    return None


_TRL_COLUMNS = ("mean_token_accuracy", "entropy")


def _starts_near_chance(rows: pandas.DataFrame) -> Finding | None:
    first = rows.loss.dropna()[:3].median()
    accuracy, entropy = (_values(rows, name)[:3].median() for name in _TRL_COLUMNS)
    if math.isnan(accuracy) or math.isnan(entropy):
        # A log does not say how large the vocabulary is. 8 nats is ln(3,000): a small vocabulary.
        near_chance, evidence = first >= 8, ""
    else:
        # The model is sure (low entropy), but wrong nearly everywhere.
        near_chance = accuracy <= 0.15 and first >= entropy + 4
        evidence = f", with an entropy of {entropy:.1f} and {accuracy:.0%} of guesses right"
    if not near_chance:
        return None
    return Finding(
        "starts near chance",
        f"The first losses are about {first:.1f} nats per token{evidence}.",
        "Guessing costs ln(vocabulary), 10.8 for GPT-2 and 11.8 for Llama 3; a pretrained model "
        "begins far below. This one is wrong almost everywhere: labels shifted twice, a tokenizer "
        "of another model, weights that were not loaded, or text unlike any that it knows.",
        "Print the ids and labels of one example. The trainer shifts labels itself.",
    )


def _short(rows: pandas.DataFrame) -> Finding:
    return Finding(
        "too short",
        f"{len(rows.loss.dropna())} logged losses.",
        "With so few, a trend cannot be told from the noise between batches.",
        "Train longer, or log more often (logging_steps).",
    )


def _unstable(rows: pandas.DataFrame) -> Finding | None:
    # Losses of single batches are noisy, so a rise must exceed the noise. The noise is measured in
    # the second half, where the loss hardly falls.
    loss = rows.loss.dropna()
    smooth = loss.rolling(max(3, len(loss) // 10), center=True, min_periods=1).median()
    noise = ((loss - smooth).abs() / smooth)[len(loss) // 2 :].median()
    start = loss[: _losses_before_any_update(rows)].max()
    # A short rise in the beginning disappears in the smoothed loss: look for it in the raw one.
    early = loss[: len(loss) // 3].drop(_spikes(loss), errors="ignore")
    peak, height = smooth.idxmax(), smooth.max()
    if height < (1.3 + 3 * noise) * start:
        peak, height = early.idxmax(), early.max()
        if height < (1.2 + 5 * noise) * start:
            return None
    return Finding(
        "unstable",
        f"The loss rises from {start:.2f} to {height:.2f} at step {peak}{_rate(rows)}.",
        "Steps are too large: the learning rate is too high, there is no warm-up, or gradients are "
        "not clipped.",
        "Lower the learning rate three to ten times; then try warm-up and max_grad_norm=1.",
    )


def _barely_learning(rows: pandas.DataFrame) -> Finding | None:
    loss = rows.loss.dropna()
    start, end = loss[:3].median(), _end(loss)
    if end < 0.85 * start:
        return None
    return Finding(
        "barely learning",
        f"The loss goes from {start:.2f} to {end:.2f} only{_rate(rows)}.",
        "Steps are too small, too few parameters are trained, or the model knew it all before.",
        "Raise the learning rate ten times (LoRA needs about ten times that of full finetuning); "
        "count the trainable parameters; train for more steps.",
    )


def _plateau(rows: pandas.DataFrame) -> Finding | None:
    loss, accuracy = rows.loss.dropna(), _values(rows, "mean_token_accuracy")
    third_quarter, end = loss[len(loss) // 2 : 3 * len(loss) // 4].median(), _end(loss)
    if end < 0.75 * third_quarter or end < 0.3:  # it still falls, or little is left
        return None
    if len(accuracy):  # does the model still guess many tokens wrong?
        learned = _end(accuracy) > 0.92
        wrong = f", and {1 - _end(accuracy):.0%} of the tokens are guessed wrong"
    else:  # then only the fall of the loss can tell
        learned, wrong = end < 0.25 * loss[:3].median(), ""
    if learned:
        return None
    return Finding(
        "plateau",
        f"The loss stays at about {end:.2f}{wrong}.",
        "The remaining tokens cannot be predicted from the text before them. That is normal for "
        "free text. It is not for answers that follow from their questions: some answers belong to "
        "other questions, rows contradict each other, or the loss is also on the questions.",
        "Read twenty rows; look at which tokens are learned.",
    )


def _spike(rows: pandas.DataFrame) -> Finding | None:
    loss = rows.loss.dropna()
    steps = _spikes(loss)
    if not steps:
        return None
    return Finding(
        "spike",
        f"At step {steps[0]} the loss is {loss[steps[0]]:.2f}, far above the steps before and "
        f"after{f' (and at {len(steps) - 1} more)' if steps[1:] else ''}.",
        "One batch is unlike the others: broken text, another language, wrong labels.",
        "Read that batch (the seed decides the order). Keep max_grad_norm=1: it makes one such "
        "batch harmless, but not many.",
    )


def _spikes(loss: pandas.Series) -> list[int]:
    """Steps whose loss is far above those around them."""
    steps = []
    for i in range(2, len(loss) - 1):
        around = max(loss[max(0, i - 5) : i].median(), loss[i + 1 : i + 4].median())
        if loss.iloc[i] > 3 * around and loss.iloc[i] > around + 1:
            steps.append(loss.index[i])
    return steps


def _overfitting(rows: pandas.DataFrame) -> Finding | None:
    evaluated = _values(rows, "eval_loss")
    if len(evaluated) < 2:
        return None
    best, last, train = evaluated.min(), evaluated.iloc[-1], _end(rows.loss.dropna())
    # A relative threshold is not enough: small losses vary by large shares of themselves.
    risen = last > max(1.08 * best, best + 0.03) and train < best
    if not risen and last < max(1.2 * train, train + 0.05):
        return None
    rise = f", after {best:.3f} at step {evaluated.idxmin()}" if risen else ""
    return Finding(
        "overfitting",
        f"In the end the evaluation loss is {last:.3f}{rise}, the training loss {train:.3f}.",
        "The model memorizes its rows: there are few rows, repeated rows or many epochs.",
        "Use more and different rows, fewer epochs or early stopping; look for duplicates.",
    )


def _values(rows: pandas.DataFrame, name: str) -> pandas.Series:
    """The logged values of a column; empty if the log has no such column."""
    return rows[name].dropna() if name in rows else rows.loss[:0]


def _end(values: pandas.Series) -> float:
    """The median of the last fifth of the values, at least of three."""
    return values[-max(3, len(values) // 5) :].median()


def _losses_before_any_update(rows: pandas.DataFrame) -> int:
    """How many of the first losses were computed with the weights as they were loaded.

    A step computes its loss before its update, and an update with learning rate 0 changes nothing.
    """
    rate = rows.learning_rate[rows.loss.notna()] if "learning_rate" in rows else rows.loss[:0]
    return 1 + int((rate[:2].cumsum() == 0).sum())


def _rate(rows: pandas.DataFrame) -> str:
    rate = _values(rows, "learning_rate")
    return f", with a learning rate of up to {rate.max():.2g}" if len(rate) else ""
