"""Data for SFT: read and write JSON lines, and split.

The names of `sftlib.formats` (records to conversations) and `sftlib.hygiene` (duplicates and leaks)
are here too.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from sftlib.formats import oasst_trees, to_messages
from sftlib.hygiene import decontaminate, deduplicate
from sftlib.validation import problems

__all__ = [
    "decontaminate",
    "deduplicate",
    "drop_torn_line",
    "oasst_trees",
    "problems",
    "read_facts",
    "read_jsonl",
    "split",
    "to_messages",
    "write_jsonl",
]

FACTS = Path(__file__).parents[1] / "data" / "facts"
MIXTURE = FACTS.parent / "mixture.jsonl"  # what lesson 2 makes of all its sources


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """The records of a JSON-lines file, in order; empty lines are skipped.

    Raises:
        ValueError: a line is not a JSON object; the message names file and line number.
    """
    records = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: expected one JSON object, found {line.strip()[:60]!r} "
                    f"({error.msg}). Each line must be a complete JSON object."
                ) from error
            if not isinstance(record, dict):
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object in braces, "
                    f"found {type(record).__name__}: {line.strip()[:60]!r}."
                )
            records.append(record)
    return records


def read_facts(name: str) -> list[dict]:
    """The rows of one of the course's own sets, see `data/README.md`.

    Args:
        name: `sft`, `dev`, `heldout`, `heldout_wordings`, `unknown`, `never_asked` (rows with
            `messages`, `relation`, `entity`, `value`) or `prose` (rows with `text`).

    Raises:
        ValueError: there is no set of that name.
    """
    path = FACTS / f"{name}.jsonl"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in FACTS.glob("*.jsonl")))
        raise ValueError(f"Expected the name of a set in data/facts ({there}), found {name!r}.")
    return read_jsonl(path)


def write_jsonl(path: str | os.PathLike, rows: Iterable[dict]) -> None:
    """Write rows as JSON lines, all or nothing: the file appears, or changes, when it is complete.

    The rows go to a temporary file beside it, which then takes its place (`os.replace`). Whatever
    happens before that leaves an old file as it was.

    Raises:
        ValueError: a row is no dict, or holds what JSON cannot (an object, NaN, half a character);
            the message names the row, counted from 1.
    """
    path = Path(path).resolve()  # a link stays one: its target is what is replaced
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.writelines(_line(number, row) for number, row in enumerate(rows, 1))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def drop_torn_line(path: str | os.PathLike) -> None:
    """Remove the end of a JSON-lines file that is no whole line: its writing was interrupted."""
    text = Path(path).read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):  # else a file that nobody may write will do
        os.truncate(path, whole)


def replace_folder(new: Path, folder: Path) -> None:
    """Put a folder that is written whole in the place of another, or of none, all or nothing."""
    old = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}.old")
    if folder.exists():
        folder.replace(old)
    try:
        new.replace(folder)
    except BaseException:
        if old.exists():
            old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _line(number: int, row: dict) -> bytes:
    if not isinstance(row, dict):
        raise ValueError(f"Row {number}: expected a dict, found {type(row).__name__}.")
    try:
        return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"Row {number}: expected text, numbers, lists and dicts, found what JSON cannot hold "
            f"({error}): change or remove it."
        ) from error


# --- Split ---------------------------------------------------------------------------------------


def split(
    rows: Sequence[dict],
    by: str | Callable[[dict], object],
    held_out: float = 0.1,
    seed: int = 0,
) -> tuple[list[dict], list[dict]]:
    """Rows to train on and rows held out; all rows of one value are on the same side.

    Which values are held out depends on the values, how often each occurs and the seed, not on the
    order of the rows: values are taken in the order of a hash, as many as come nearest to the share
    that is wanted, at least one. Either side keeps the rows' order.

    Args:
        by: a key of the rows (`"entity"`), or a function that gives each row's value. Values are
            told apart by their `repr`.
        held_out: the share of rows to hold out.

    Raises:
        ValueError: a row lacks the key, the share is not between 0 and 1, or all rows have the same
            value, so that one side would be empty.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"Expected a share between 0 and 1 to hold out, found {held_out!r}.")
    values = [
        repr(by(row)) if callable(by) else _value(n, row, by) for n, row in enumerate(rows, 1)
    ]
    counts = Counter(values)
    if len(counts) < 2:
        raise ValueError(
            f"Expected at least two values of {by!r} to split by, found {len(counts)} in "
            f"{len(rows)} rows: one side would be empty. Split by another key."
        )
    order = sorted(counts, key=lambda v: hashlib.sha256(f"{seed} {v}".encode()).digest())
    sizes = list(accumulate(counts[value] for value in order[:-1]))
    nearest = min(range(len(sizes)), key=lambda i: abs(sizes[i] - held_out * len(rows)))
    chosen = set(order[: nearest + 1])
    sides: tuple[list[dict], list[dict]] = ([], [])
    for row, value in zip(rows, values, strict=True):
        sides[value in chosen].append(row)
    return sides


def _value(number: int, row: dict, key: str) -> str:
    if key not in row:
        raise ValueError(
            f"Row {number}: expected the key {key!r} to split by, found {', '.join(map(str, row))}."
        )
    return repr(row[key])
