"""Read the course's data: JSON lines, one record a line."""

from __future__ import annotations

import json
import os
from pathlib import Path

FACTS = Path(__file__).parents[1] / "data" / "facts"


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
