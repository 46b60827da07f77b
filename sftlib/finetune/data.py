"""Conversations to train on, and conversations held out, from files or from the Hub."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from sftlib.chat import encode
from sftlib.chat.layout import is_plain
from sftlib.data import FACTS, Converted, convert, convert_records, split
from sftlib.data.records import PACKED, SUFFIXES
from sftlib.finetune.arguments import FinetuneArguments
from sftlib.finetune.model import describe_for_chat
from sftlib.models import hub_answers

if TYPE_CHECKING:
    from trl import SFTConfig, SFTTrainer


class Data(NamedTuple):
    """What is trained on, what is held out, and what the user should hear about both.

    Attributes:
        train, held_out: rows, dicts with `messages`.
        rejects: as in `Converted`, each with its `source`.
        notes: sentences about the data, to be printed before the training.
    """

    train: list[dict]
    held_out: list[dict]
    rejects: list[dict]
    notes: tuple[str, ...] = ()


def load_data(args: FinetuneArguments) -> Data:
    """Read `--data`, and hold out what `--held_out` says.

    `--held_out` names a file or dataset of its own, or gives the share to keep back. Without it,
    the course's own data has a held-out file, and of any other data a tenth is kept back, at most
    `--max_held_out` conversations.

    Raises:
        ValueError: no conversation can be used, the share is not between 0 and 1, or the held-out
            conversations are those of the training.
        OSError: there is no such file or dataset.
    """
    found = load_usable(args.data, args.data_config, args.data_split, args.keys)
    shipped = args.data == FinetuneArguments.data and not args.held_out
    held_out = str(FACTS / "heldout.jsonl") if shipped else args.held_out
    try:
        share = float(held_out or 0.1)
    except ValueError:  # it is a name, not a share
        held = load_usable(held_out, args.data_config, args.held_out_split, args.keys)
        notes = overlap(found.rows, held.rows, held_out)
        rows, capped = at_most(args.max_held_out, held.rows)
        return Data(found.rows, rows, found.rejects + held.rejects, (*notes, *capped))
    if share == 0:
        return Data(found.rows, [], found.rejects, ("Nothing is held out: nothing is evaluated.",))
    if not 0 < share < 1:
        raise ValueError(
            f"Expected a file or a share from 0 to below 1 for --held_out, found {share}."
        )
    notes = ()
    if not held_out and args.max_held_out and share * len(found.rows) > args.max_held_out:
        share = args.max_held_out / len(found.rows)
        notes = (f"{args.max_held_out:,} are held out, not a tenth: --max_held_out changes it.",)
    train, held, why = hold_out(found.rows, share, args.data)
    return Data(train, held, found.rejects, (*notes, *why))


def refuse_unshown(data: Data, args: FinetuneArguments, training: SFTConfig) -> Data:
    """Rows of which the chat template leaves something out (tools, thoughts) become rejects.

    Plain conversations are not looked at, and without others no tokenizer is loaded.

    Raises:
        ValueError: no row to train on is left.
    """
    if all(_is_plain(row) for row in data.train + data.held_out):
        return data
    _, tokenizer = describe_for_chat(args, training)
    rejects: list[dict] = []

    def shown(row: dict) -> bool:
        try:
            encode(row["messages"], tokenizer, row.get("tools"))
        except ValueError as error:
            text = json.dumps(row, ensure_ascii=False)[:500]
            source = {"source": args.data, "line": None}  # which line it was, is no longer known
            rejects.append(source | {"reason": str(error), "text": text})
            return False
        return True

    train, held_out = (
        [row for row in rows if _is_plain(row) or shown(row)]
        for rows in (data.train, data.held_out)
    )
    if not train:
        raise ValueError(
            f"Expected conversations in {args.data} that the chat template can show, found none of "
            f"{len(data.train):,}. The first: {rejects[0]['reason']}"
        )
    return data._replace(train=train, held_out=held_out, rejects=data.rejects + rejects)


def _is_plain(row: dict) -> bool:
    return is_plain(row["messages"], row.get("tools"))


def summary(data: Data) -> list[str]:
    """Sentences on what was read, used and refused, and why: the three commonest reasons."""
    refused = len(data.rejects)
    read = len(data.train) + len(data.held_out) + refused
    lines = [f"{read:,} records read, {refused:,} refused"]
    # Reasons that differ in a name or a number alone are of one kind.
    kinds = Counter(_kind(reject["reason"]) for reject in data.rejects)
    for kind, count in kinds.most_common(3):
        first = next(r for r in data.rejects if _kind(r["reason"]) == kind)
        line = first["line"]
        where = f"{Path(first.get('source', '')).name}{'' if line is None else f' line {line}'}"
        lines.append(f"  {count:,} ×, the first is {where}: {' '.join(first['reason'].split())}")
    if refused > read / 3:
        lines.append(
            f"WARNING: {refused:,} of {read:,} records, more than a third, are refused. Is this "
            "the right file, and are these its keys?"
        )
    return [*lines, *data.notes]


def cut_rows(trainer: SFTTrainer, rows: int) -> str:
    """A sentence on what `max_length` does to the rows; packed ones are whole where they fit."""
    args, dataset = cast("SFTConfig", trainer.args), cast(Any, trainer.train_dataset)
    lengths, limit = [len(ids) for ids in dataset["input_ids"]], args.max_length or 0
    if args.packing:
        return f"{rows:,} conversations packed into {len(lengths):,} rows of {limit:,} tokens"
    cut, left_out = sum(length >= limit for length in lengths), rows - len(lengths)
    return (
        f"longest {max(lengths):,} tokens; {cut:,} reach max_length ({limit:,}) and are cut there; "
        f"{left_out:,} left out, because nothing is learned before it"
    )


def _kind(reason: str) -> str:
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "…", reason)[:80]


# --- What is held out ----------------------------------------------------------------------------

TOLERANCE = 0.2  # of the share that was asked for


def hold_out(
    rows: list[dict], share: float, source: str = "--data"
) -> tuple[list[dict], list[dict], tuple[str, ...]]:
    """Rows to train on, rows held out, and sentences on what could not be done as asked.

    Rows with the same opening question stay on one side, so that no held-out question is trained
    on, as far as the share allows. Where one question opens too many rows ("Hi"), those rows are
    grouped by all that the user says, and where that is the same, too, by their whole text.

    Raises:
        ValueError: all rows are the same, so that none could be held out.
    """
    first = whole_text(rows[0])
    if all(whole_text(row) == first for row in rows):
        raise ValueError(
            f"Expected at least two different conversations in {source}, found one"
            f"{f', {len(rows)} times' * (len(rows) > 1)}: none could be held out. Give --held_out "
            "a file, or 0 to hold out nothing."
        )
    asked, notes = share * len(rows), []
    if len(set(map(first_question, rows))) > 1:
        train, held = split(rows, first_question, share)
        if abs(len(held) - asked) <= TOLERANCE * asked:
            return train, held, ()
    key, divided = grouped_within(rows, 2 * TOLERANCE * asked)
    train, held = split(rows, key, share)
    if divided:
        common = Counter(map(first_question, rows)).most_common(1)[0][0]
        notes.append(
            f"{divided:,} of {len(rows):,} conversations open with what many others open with "
            f"({common[:40]!r}): the same opening is on both sides, what follows it differs."
        )
    if abs(len(held) - asked) > TOLERANCE * asked:
        found = len(held) / len(rows)
        notes.append(
            f"{len(held):,} of {len(rows):,} conversations are held out ({found:.1%}, not "
            f"{share:.1%}): at least one is, and those with the same text stay together."
        )
    return train, held, tuple(notes)


def grouped_within(rows: list[dict], largest: float) -> tuple[Callable[[dict], object], int]:
    """A key by which no group is larger than `largest` rows, as far as possible; rows divided.

    A row's key is the coarsest of three that few enough rows share.
    """
    keys = (first_question, user_turns, whole_text)
    counts = [Counter(map(key, rows)) for key in keys]

    def key_of(row: dict) -> tuple[int, object]:
        found = [key(row) for key in keys]
        small = (n for n in range(len(keys)) if counts[n][found[n]] <= max(1, largest))
        level = next(small, len(keys) - 1)
        return level, found[level]

    return key_of, sum(key_of(row)[0] > 0 for row in rows)


def first_question(row: dict) -> str:
    """The first message of the user; a system message before it may be the same in all rows."""
    return next(m["content"] for m in row["messages"] if m["role"] == "user")


def user_turns(row: dict) -> tuple[str, ...]:
    """All that the user says."""
    return tuple(m["content"] for m in row["messages"] if m["role"] == "user")


def whole_text(row: dict) -> str:
    """The conversation without the system message; case and spacing do not count."""
    said = (f"{m['role']}: {m['content']} {m.get('tool_calls', '')}" for m in row["messages"])
    turns = [text for text in said if not text.startswith("system: ")]
    return " ".join(" ".join(turns).casefold().split())


def overlap(train: list[dict], held_out: list[dict], source: str) -> tuple[str, ...]:
    """Sentences on the held-out rows that are trained on, too.

    Raises:
        ValueError: all of them are, and nothing else is trained on.
    """
    trained = set(map(whole_text, train))
    tested = list(map(whole_text, held_out))
    same = sum(text in trained for text in tested)
    if trained == set(tested):
        raise ValueError(
            f"Expected other conversations in --held_out {source} than in --data, found the same "
            f"{len(trained):,}: the held-out loss would measure memory alone. Give another file, "
            "or a share such as 0.1."
        )
    if same:
        return (
            f"WARNING: {same:,} of {len(held_out):,} held-out conversations are trained on, too: "
            "held-out loss and answers will look better than they are. Take them out of one side.",
        )
    asked = set(map(user_turns, train))
    again = sum(user_turns(row) in asked for row in held_out)
    if again and len(asked) > 1:
        return (
            f"WARNING: {again:,} of {len(held_out):,} held-out conversations ask what is trained "
            "on, too, with other answers: held-out scores may look better than they are.",
        )
    return ()


def at_most(count: int, rows: list[dict]) -> tuple[list[dict], tuple[str, ...]]:
    """`count` rows, evenly spaced, and a sentence where that leaves some out; 0: all."""
    if not count or len(rows) <= count:
        return rows, ()
    some = [rows[i * len(rows) // count] for i in range(count)]
    left = f"{count:,} of {len(rows):,} held-out conversations are used, to save time: "
    return some, (left + "--max_held_out 0 uses all.",)


# --- Files and datasets --------------------------------------------------------------------------


def load_usable(
    source: str, config: str, split: str, keys: Mapping[str, str] | None = None
) -> Converted:
    """The conversations of a source; raise where there are none. Rejects name their source."""
    found = load_conversations(source, config, split, **(keys or {}))
    found = replace(found, rejects=[{"source": source} | one for one in found.rejects])
    if found.rows:
        return found
    why = "It is empty."
    if found.rejects:
        first = found.rejects[0]
        why = f"The first of {len(found.rejects)}: line {first['line']}: {first['reason']}"
    raise ValueError(f"Expected conversations in {source}, found none that can be used. {why}")


def load_conversations(
    source: str, config: str = "", split: str = "train", **keys: str
) -> Converted:
    """The conversations of a file, a folder or a dataset on the Hub, and what could not be used.

    `keys` goes to `sftlib.data.convert`: names of a record's own keys.

    Raises:
        FileNotFoundError: `source` looks like a file, and there is none.
        OSError: there is neither a file nor a dataset of this name.
        ValueError: the dataset has no such configuration or split.
    """
    columns = cast(Any, keys)
    if Path(source).exists() and not _names_its_splits(Path(source)):
        return convert(source, **columns)
    if Path(source).suffix.lower() in (*SUFFIXES, *PACKED):
        raise FileNotFoundError(f"Expected a file of conversations, found none at {source}.")
    import datasets.config
    from datasets import load_dataset
    from huggingface_hub import constants

    if not hub_answers():  # read the local cache at once, rather than wait for the network
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        return convert_records(load_dataset(source, config or None, split=split), **columns)
    except ValueError as error:  # the dataset is there, but not this part of it
        raise ValueError(
            f"Expected a configuration and a split that {source!r} has, found {config!r} and "
            f"{split!r}: {' '.join(str(error).split())[:300]} Give --data_config, --data_split or "
            "--held_out_split."
        ) from error
    except Exception as error:
        raise OSError(
            f"Expected a file, or a dataset on the Hub, found neither for {source!r} "
            f"({type(error).__name__}: {str(error).splitlines()[0][:200]}). Check the spelling; "
            "offline, give a file; for a gated dataset set HF_TOKEN."
        ) from error


def _names_its_splits(folder: Path) -> bool:
    """Whether a folder's README lists configurations and splits, as datasets of the Hub do."""
    readme = folder / "README.md"
    return readme.is_file() and "\nconfigs:" in readme.read_text(encoding="utf-8", errors="replace")
