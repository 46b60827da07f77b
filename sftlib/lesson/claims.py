"""Claims: what a lesson says of its results, each checked where it stands and kept in a ledger.

`claim` prints one line, and raises an error where the claim fails with the shipped base: the course
is then wrong. Another model (`SFT_MODEL`) may differ, and the lesson goes on.

Each claim adds a row to `claims.jsonl` in `work/`. `begin` opens a new record for its lesson: the
rows of an older run no longer count, as soon as there are new ones. `make claims` collects them.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sftlib import models

LEDGER = "claims.jsonl"  # beside the lesson's work folder; SFT_LEDGER names another file
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "deepspeed")
KINDS = {  # kind of evidence → how the printed line says it; a number of seeds says itself
    "arithmetic": "",  # follows from definitions: a count, an identity
    "one run": "",
    "seeds": "",
    "control": "with control",  # a second run in which only the supposed cause differs
    "stored": "stored run",  # measured earlier, on this machine or another
    "source": "from a source",  # somebody else's measurement, checked against ours
}


class ClaimFails(AssertionError):
    """A claim of a lesson does not hold with the base that the course ships."""


@dataclass
class Record:
    """What the claims of one run of a lesson have in common."""

    lesson: str = ""
    model: str = ""
    ledger: Path | None = None  # no lesson has begun, and no row is written
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    cell: str = ""  # the id of the cell that runs now, where it is known
    counts: dict[str, int] = field(default_factory=dict)  # claims so far, by cell


_record = Record()


def start(lesson: str, work: Path) -> None:
    """Open a new record for a lesson; `begin` calls it.

    The lesson's model is the last one that was loaded before, by its set-up cell, or else the one
    that `SFT_MODEL` names. Models that the lesson loads later do not change it.

    Args:
        work: the lesson's folder. A model in it was made by the lesson itself.
    """
    global _record
    work = work.resolve()
    loaded = [name for name in models.loaded if not Path(name).resolve().is_relative_to(work)]
    model = loaded[-1] if loaded else models.chosen()
    ledger = Path(os.environ.get("SFT_LEDGER") or work.with_name(LEDGER))
    _record = Record(lesson, model, ledger.resolve())


def enter(cell: str) -> None:
    """From now on claims belong to this cell, and are numbered from 1 again."""
    _record.cell = cell
    _record.counts.pop(cell, None)


def claim(
    text: str,
    holds: bool | Callable[[], Any],
    measured: object | Callable[[], object] = "",
    *,
    bound: str = "",
    seeds: int = 1,
    kind: str | None = None,
) -> None:
    """Check a claim, print it as one line with what was measured, and keep it in the ledger.

    Args:
        text: the claim, a sentence without a full stop.
        holds: whether it is so: a `bool`, or NumPy's or torch's. A function is called first; with
            another model than the shipped base it may also raise an error.
        measured: the values found, with their units; a function of them is called, too.
        bound: the condition in words, such as "at most five points apart", for the ledger.
        seeds: the number of runs, each with another seed, behind the measured values.
        kind: of the evidence, one of `KINDS`. Without it, `seeds` if there are several seeds, else
            `one run`.

    Raises:
        ClaimFails: the claim does not hold with the shipped base.
        TypeError: `holds` is not one truth value.
        ValueError: the text is empty, or `kind` or `seeds` is not possible.
        Exception: with the shipped base, whatever `holds` or `measured` raises as a function.
    """
    text, kind = " ".join(str(text).split()), kind or ("one run" if seeds == 1 else "seeds")
    _check(text, seeds, kind)
    model = _record.model or (models.loaded or [models.chosen()])[-1]
    shipped = models.is_shipped(model)
    holds, found, problem = _evaluated(holds, measured, text)
    row: dict[str, Any] = {"lesson": _record.lesson, "run": _record.run, "id": _next_id()}
    row |= {"text": text, "kind": kind, "bound": bound, "measured": found, "seeds": seeds}
    row |= {"holds": holds, "model": models.DEFAULT if shipped else model}
    if _record.ledger:
        row |= {"machine": _machine(), "versions": _versions(), "date": f"{date.today()}"}
        _append(row, _record.ledger)
    if shipped and problem:
        raise problem
    if shipped and not holds:
        measured_now = f" Found: {found}." if found else ""
        raise ClaimFails(
            f"This claim does not hold: {text}.{measured_now} Did you change a setting? If not, "
            "please report this, with the output of lesson.environment()."
        )
    print(line(row))


def line(row: dict[str, Any]) -> str:
    """The line that a claim prints, made from its row of the ledger."""
    sign = "✓" if row["holds"] else "✗ not so with this model:"
    evidence = [f"{row['seeds']} seeds"] if row["seeds"] > 1 else []
    evidence += [words] if (words := KINDS[row["kind"]]) else []
    measured = f": {row['measured']}" if row["measured"] else ""
    return f"{sign} {row['text']}{measured}" + (f" ({', '.join(evidence)})" if evidence else "")


def read_ledger(path: Path, model: str = models.DEFAULT) -> list[dict[str, Any]]:
    """The claims of the last run of each lesson with a model, in the order in which they ran.

    Of a cell that ran again in that run, the claims of its last time count.
    """
    from sftlib.data.files import read_valid_rows

    columns = {"lesson": str, "run": str, "id": str, "model": str}
    rows = [row for row in read_valid_rows(path, **columns) if row["model"] == model]
    last = {row["lesson"]: row["run"] for row in rows}
    rows = [row for row in rows if row["run"] == last[row["lesson"]]]
    return [
        row
        for i, row in enumerate(rows, 1)
        if not any(new["run"] == row["run"] and _since(new["id"], row["id"]) for new in rows[i:])
    ]


def _since(claim_id: str, other: str) -> bool:
    """Whether another id is that of the same or a later claim of the same cell: c, c/2, … c/10."""
    same_cell = claim_id.partition("/")[0] == other.partition("/")[0]
    return same_cell and (len(other), other) >= (len(claim_id), claim_id)


def _check(text: str, seeds: int, kind: str) -> None:
    if not text:
        raise ValueError("Expected a claim in words, found an empty text. Say what holds.")
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        raise ValueError(f"Expected a number of seeds from 1, found {seeds!r}: {text}.")
    if kind not in KINDS:
        raise ValueError(f"Expected one of the kinds {', '.join(KINDS)}, found {kind!r}: {text}.")
    if (kind == "seeds" and seeds == 1) or (kind == "one run" and seeds > 1):
        raise ValueError(f"Expected a kind that fits {seeds=}, found {kind!r}: {text}.")


def _evaluated(holds: Any, measured: Any, text: str) -> tuple[bool, str, Exception | None]:
    """Whether a claim holds, what was measured, on one line, and the error that came instead."""
    try:
        holds = holds() if callable(holds) else holds
        found = str(measured() if callable(measured) else measured)
    except Exception as error:
        return False, " ".join(f"{type(error).__name__}: {error}".split()), error
    # NumPy's and torch's truth values are known by their dtype and shape
    dtype = str(getattr(holds, "dtype", "")).removeprefix("torch.")
    if isinstance(holds, bool) or (dtype == "bool" and tuple(holds.shape) == ()):
        return bool(holds), " ".join(found.split()), None
    raise TypeError(
        f"Expected True or False, found {holds!r} ({type(holds).__name__}): {text}. "
        "Compare it with a bound, and reduce an array with .all() or .any()."
    )


def _next_id() -> str:
    """The cell and, from its second claim on, a number; without a cell the claim's number."""
    number = _record.counts[_record.cell] = _record.counts.get(_record.cell, 0) + 1
    if not _record.cell:
        return str(number)
    return _record.cell if number == 1 else f"{_record.cell}/{number}"


def _append(row: dict[str, Any], ledger: Path) -> None:
    """Add one line. The ledger may fail, the lesson goes on."""
    with contextlib.suppress(OSError):
        ledger.parent.mkdir(parents=True, exist_ok=True)
        with ledger.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


@cache
def _machine() -> str:
    from sftlib.experiments.sweep import machine

    return machine()


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}
