"""Convert a whole file of a published SFT dataset, and list every record that cannot be used."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sftlib.data.files import write_jsonl
from sftlib.data.formats import FORMATS, RecordError, oasst_trees, to_messages
from sftlib.data.validation import MAPPINGS, briefly


@dataclass(frozen=True)
class Converted:
    """What became of a file.

    Attributes:
        rows: the conversations, `{"messages": [...]}`, in the file's order.
        rejects: what could not be converted: `line` (from 1), `reason`, `text` (its beginning).
    """

    rows: list[dict]
    rejects: list[dict]


def convert(path: str | os.PathLike, rejects: str | os.PathLike | None = None) -> Converted:
    """Every record of a published file as a conversation, and a list of those that are not.

    Reads JSON lines (`.jsonl`) and JSON arrays (`.json`), also gzipped (`.gz`), and Parquet, with
    records of any format of `to_messages`. A record that is broken in any way is listed and never
    stops the rest. After a broken record of an array, reading goes on at the next object that
    begins with the same key as the first record or has a known format. OASST's table, with one
    message per row, becomes trees first.

    Args:
        rejects: where to write the rejects too, as JSON lines.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is neither JSON lines nor a JSON array, or its gzip data is damaged;
            or a message of OASST's table is missing.
    """
    path = Path(path)
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    if kind == ".parquet":
        from datasets import Dataset

        found = convert_records(Dataset.from_parquet(str(path), keep_in_memory=True))
    elif kind in (".jsonl", ".json"):
        data = _read(path)
        found = _converted(_lines(data) if kind == ".jsonl" else _elements(data, path))
    else:
        raise ValueError(
            f"Expected a file of JSON lines (.jsonl) or a JSON array (.json), either perhaps with "
            f".gz, or .parquet, found {path.name!r}: rename it, or export it as one of them."
        )
    if rejects is not None:
        write_jsonl(rejects, found.rejects)
    return found


def convert_records(records: Iterable[Mapping]) -> Converted:
    """The same for records that are in memory, for instance a `datasets.Dataset`."""
    return _converted((n, repr(record), record) for n, record in enumerate(records, 1))


def _converted(parts: Parts) -> Converted:
    found = Converted([], [])
    for line, text, record in _trees(parts):
        try:
            if isinstance(record, RecordError):
                raise record
            found.rows.append(to_messages(record))
        except RecordError as error:
            found.rejects.append({"line": line, "reason": str(error), "text": _excerpt(text)})
    return found


def _trees(parts: Parts) -> Iterable[tuple[int, str, object]]:
    """OASST's messages as trees, each at the line of its first message; other records unchanged."""
    every = list(parts)
    sound = [(n, text, record) for n, text, record in every if isinstance(record, MAPPINGS)]
    if not sound or not all(record.keys() >= _MESSAGE for *_, record in sound):
        return every
    trees = oasst_trees(record for *_, record in sound)
    places = {record["message_id"]: (line, text) for line, text, record in sound}
    broken = [part for part in every if not isinstance(part[2], MAPPINGS)]
    return broken + [(*places[tree["prompt"]["message_id"]], tree) for tree in trees]


_MESSAGE = {"message_id", "parent_id", "text"}


def _read(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"Expected a complete gzip file, found damaged data in {path} ({error}): "
                "fetch it again."
            ) from error
    return data.removeprefix(codecs.BOM_UTF8)


def _excerpt(text: str) -> str:
    """The beginning of a record that may hold bytes which are not UTF-8, shown as `\\xff`."""
    return text[:200].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")[:200]


# Of each record: its line, its text, and the record itself or the RecordError that it caused.
Parts = Iterator[tuple[int, str, object]]


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """An object whose keys all differ; the json module would silently keep the last of two."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("the same key twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _parse(text: str, at: int) -> tuple[object, int]:
    """The JSON value at `at`, or a RecordError, and where it ends."""
    try:
        record, end = _DECODER.raw_decode(text, at)
        text[at:end].encode()  # a byte that is not UTF-8 was decoded as half a character
        return record, end
    except UnicodeEncodeError:
        reason = "Expected text in UTF-8, found other bytes: save the file in UTF-8."
    except json.JSONDecodeError as error:
        where = f"{error.msg} at character {error.pos - at + 1}"
        reason = f"Expected one JSON object, found broken JSON ({where}): mend or remove it."
    except (ValueError, RecursionError) as error:
        reason = f"Expected one JSON object, found broken JSON ({error}): mend or remove it."
    return RecordError(reason), len(text)


def _lines(data: bytes) -> Parts:
    for number, line in enumerate(data.split(b"\n"), 1):
        if not (text := line.decode("utf-8", "surrogateescape").strip()):
            continue
        record, end = _parse(text, 0)
        if end < len(text):
            record = RecordError(
                f"Expected one JSON object, found more after it: {briefly(text[end:].strip())}. "
                "Give each its own line."
            )
        yield number, text, record


_GAP = re.compile(r"[ \t\r\n,]*")  # what may stand between two records
_FIRST_KEY = re.compile(r'\{\s*"(?:[^"\\]|\\.)*"\s*:')


def _elements(data: bytes, path: Path) -> Parts:
    text = data.decode("utf-8", "surrogateescape").rstrip()
    at = len(text) - len(text.lstrip())
    if not text.startswith("[", at):
        raise ValueError(
            f"Expected a JSON array, with '[' first, found {briefly(text[at:][:20])} in {path}: "
            "if it has one record per line, name it .jsonl."
        )
    at = _after_gap(text, at + 1)
    end_of_array = len(text) - text.endswith("]")
    # Records of a file usually begin with the same key. A string cannot hold such a beginning,
    # because JSON escapes the quotes in it.
    first = _FIRST_KEY.match(text, at)
    beginning = re.compile(re.escape(first[0]) if first else r"(?!)")
    line, counted, record = 1, 0, None
    while at < end_of_array:
        line, counted = line + text.count("\n", counted, at), at
        record, end = _parse(text, at)
        if isinstance(record, RecordError):
            end = _next_record(text, at, beginning) or end_of_array
        yield line, text[at:end], record
        at = _after_gap(text, end)
    if at == len(text) and not isinstance(record, RecordError):
        line += text.count("\n", counted)
        yield line, "", RecordError("Expected ']' after the last record: the file is cut off.")


def _after_gap(text: str, at: int) -> int:
    gap = _GAP.match(text, at)
    return gap.end() if gap else at


def _next_record(text: str, broken: int, beginning: re.Pattern) -> int | None:
    """Where the next record begins after the broken one; None when there is none.

    The position at which the parser failed does not help. Behind a missing quote, for instance, the
    parser fails in the middle of the next record. So every `{` is tried.
    """
    at = broken
    while (at := text.find("{", at + 1)) >= 0:
        if beginning.match(text, at) or _has_known_format(_parse(text, at)[0]):
            return at
    return None


def _has_known_format(value: object) -> bool:
    return isinstance(value, Mapping) and any(value.keys() >= keys for keys, _ in FORMATS)
