"""Conversations to train on, and conversations held out, from files or from the Hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sftlib.data import FACTS, Converted, convert, convert_records, split
from sftlib.finetune.arguments import FinetuneArguments
from sftlib.models import hub_answers

FILES = (".jsonl", ".json", ".parquet", ".gz")


class Data(NamedTuple):
    """Rows are dicts with `messages`; `rejects` are as in `Converted`, each with its `source`."""

    train: list[dict]
    held_out: list[dict]
    rejects: list[dict]


def load_data(args: FinetuneArguments) -> Data:
    """Read `--data`, and hold out what `--held_out` says.

    `--held_out` names a file or dataset of its own, or gives the share to keep back. Without it,
    the course's own data has a held-out file, and of any other data a tenth is kept back.

    Raises:
        ValueError: no conversation can be used, or the share is not between 0 and 1.
        OSError: there is no such file or dataset.
    """
    found = load_usable(args.data, args.data_config, args.data_split)
    shipped = args.data == FinetuneArguments.data and not args.held_out
    held_out = str(FACTS / "heldout.jsonl") if shipped else args.held_out or "0.1"
    try:
        share = float(held_out)
    except ValueError:  # it is a name, not a share
        held = load_usable(held_out, args.data_config, args.held_out_split)
        return Data(found.rows, held.rows, found.rejects + held.rejects)
    if not 0 < share < 1:
        raise ValueError(
            f"Expected a file or a share between 0 and 1 for --held_out, found {share}."
        )
    if len(found.rows) < 2:
        raise ValueError(
            f"Expected at least two conversations in {args.data}, found one: none could be held "
            "out. Give --held_out a file."
        )
    # Rows with the same question stay on one side, so that no held-out question is trained on.
    # Where all rows ask the same ("Summarise it."), rows are grouped by their whole text instead.
    asks_one_question = len({first_question(row) for row in found.rows}) == 1
    train, held = split(found.rows, str if asks_one_question else first_question, share)
    return Data(train, held, found.rejects)


def first_question(row: dict) -> str:
    """The first message of the user; a system message before it may be the same in all rows."""
    return next(m["content"] for m in row["messages"] if m["role"] == "user")


def load_usable(source: str, config: str, split: str) -> Converted:
    """The conversations of a source; raise where there are none. Rejects name their source."""
    found = load_conversations(source, config, split)
    found = replace(found, rejects=[{"source": source} | one for one in found.rejects])
    if found.rows:
        return found
    why = "It is empty."
    if found.rejects:
        first = found.rejects[0]
        why = f"The first of {len(found.rejects)}: line {first['line']}: {first['reason']}"
    raise ValueError(f"Expected conversations in {source}, found none that can be used. {why}")


def load_conversations(source: str, config: str = "", split: str = "train") -> Converted:
    """The conversations of a file or of a dataset on the Hub, and what could not be used.

    Raises:
        FileNotFoundError: `source` looks like a file, and there is none.
        OSError: there is neither a file nor a dataset of this name.
        ValueError: the dataset has no such configuration or split.
    """
    if Path(source).is_file():
        return convert(source)
    if Path(source).suffix in FILES:
        raise FileNotFoundError(f"Expected a file of conversations, found none at {source}.")
    import datasets.config
    from datasets import load_dataset
    from huggingface_hub import constants

    if not hub_answers():  # read the local cache at once, rather than wait for the network
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        return convert_records(load_dataset(source, config or None, split=split))
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
