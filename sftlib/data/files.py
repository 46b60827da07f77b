"""Read JSON lines, write them all or nothing, and find the course's own sets."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FACTS = Path(__file__).parents[2] / "data" / "facts"
MIXTURE = FACTS.parent / "mixture.jsonl"  # made by lesson 2 from all its sources


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


def read_valid_rows(path: Path, **columns: Any) -> Iterator[dict]:
    """The rows with columns of these types; other lines are skipped, and no file has no rows."""
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError, LookupError, RecursionError):
            row = json.loads(line)
            _line(0, row)  # a dict that can be written again
            if all(isinstance(row[name], kind) for name, kind in columns.items()):
                yield row


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

    The rows go to a temporary file beside it, which then replaces it (`os.replace`). A failure
    before that leaves the old file as it was.

    Raises:
        ValueError: a row is no dict, or holds what JSON cannot (an object, NaN, half a character);
            the message names the row, counted from 1.
    """
    path = Path(path).resolve()  # replace the target of a link, not the link
    with _draft_of(path) as draft, open(draft, "xb") as file:
        file.writelines(_line(number, row) for number, row in enumerate(rows, 1))
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole, or leave it as it was. A link is replaced, its target stays."""
    with _draft_of(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def _draft_of(path: Path) -> Generator[Path]:
    """A file beside another, to be written in the block; it then replaces the other, or is gone."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def drop_torn_line(path: str | os.PathLike) -> None:
    """Remove an incomplete last line of a JSON-lines file: its writing was interrupted."""
    text = Path(path).read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):  # otherwise the file need not be writable
        os.truncate(path, whole)


def replace_folder(new: Path, folder: Path) -> None:
    """Move a complete folder to a path, all or nothing; a folder that is there is replaced."""
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
